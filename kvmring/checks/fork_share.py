"""fork.ring.* and fork.cow: what a forked child shares with its parent's VM, for good and ill."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import sys
from functools import partial
from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.raw import LOG, Memory, in_child, ioctl, map_vcpu, set_region
from kvmring.checks.rules import RAM_GPA, Trial, rule

if TYPE_CHECKING:
    from collections.abc import Iterable

VCPU_MMAP = "virt/kvm/kvm_main.c, kvm_vcpu_mmap()"
ACQ_REL = Cap.DIRTY_LOG_RING_ACQ_REL
PAGES = 100  # few enough for the smallest ring
DIRTY, RESET = 1, 2
COW_GPA = RAM_GPA - (256 << 20)  # below the library's memory, where the guest's tables reach


class Rig:
    """A VM with rings and a slot, its guest, and the ring mapped once more, to be inherited."""

    def __init__(self, trial: Trial) -> None:
        entries = trial.least_entries
        self.trial = trial
        self.size = entries * 16
        self.vm = trial.vm(ring=entries)
        self.ram = trial.ram(self.vm, PAGES)
        self.guest = trial.writer(self.vm)
        self.vcpu = self.guest.vcpus[0]
        self.ring = map_vcpu(self.vcpu, self.size)

    def write(self, pages: Iterable[int]) -> None:
        """Have the guest write to these pages."""
        self.guest.load(0, [self.ram.gpa + page * self.trial.page_size for page in pages])
        done = self.guest.is_done(self.guest.run(0))
        self.trial.expect("whether the guest is done", done, True)

    def flags(self, count: int) -> list[int]:
        """Return the flags of the first entries."""
        return [entry.flags for entry in raw.entries(self.ring, 0, count)]


def mark(ring: mmap.mmap, count: int) -> None:
    """Mark the first entries as harvested."""
    for index in range(count):
        struct.pack_into("=I", ring, 16 * index, RESET)


def expect_pages(ring: mmap.mmap, pages: Iterable[int]) -> None:
    """Raise EPROTO unless these very pages are dirty in a ring; for a child."""
    found = sorted(entry.offset for entry in raw.entries(ring) if entry.flags == DIRTY)
    if found != list(pages):
        raise OSError(errno.EPROTO, "other entries")


@rule(
    "fork.ring.mmap",
    "a child can map its parent's ring and read it: mmap of a vCPU's fd does not ask whose it is",
    source=VCPU_MMAP + ": no mm",
    needs=[ACQ_REL],
    guest=True,
    meaning="Whoever gets the fd, by fork() or pidfd_getfd(), can read and disturb the rings.",
)
def ring_mmap(trial: Trial) -> None:
    """Map it in a child and compare."""
    rig = Rig(trial)
    rig.write(range(PAGES))

    def look() -> None:
        expect_pages(map_vcpu(rig.vcpu, rig.size, prot=mmap.PROT_READ), range(PAGES))

    trial.expect("a child's look (EPROTO: other entries)", in_child(look), "success")


@rule(
    "fork.ring.inherited",
    "a mapped ring is inherited by a child, shared and live: it sees what the parent's guest "
    "writes later",
    source=VCPU_MMAP + ": VM_DONTCOPY is not set",
    needs=[ACQ_REL],
    guest=True,
    meaning="Set MADV_DONTFORK on ring mappings.",
)
def ring_inherited(trial: Trial) -> None:
    """Run the guest while a child waits, then have the child look."""
    rig = Rig(trial)
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        code = 255
        try:
            os.close(go)
            os.read(ready, 1)
            expect_pages(rig.ring, range(PAGES))
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    os.close(ready)
    rig.write(range(PAGES))
    os.close(go)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    trial.expect("the child's look (71, EPROTO: other entries)", code, 0)


@rule(
    "fork.ring.steals",
    "entries that a child marks in an inherited ring are reset by the parent as if it had "
    "harvested them",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_reset()",
    needs=[ACQ_REL],
    guest=True,
    meaning="A child that harvests takes its parent's pages without any error: they are lost. Set "
    "MADV_DONTFORK on ring mappings.",
)
def ring_steals(trial: Trial) -> None:
    """Have a child mark the first entries."""
    rig = Rig(trial)
    rig.write(range(PAGES))
    trial.expect("flags before", rig.flags(PAGES), [DIRTY] * PAGES)
    trial.expect("a child's marks", in_child(partial(mark, rig.ring, 30)), "success")
    trial.expect("entries reset", ioctl(rig.vm, raw.KVM_RESET_DIRTY_RINGS), 30)
    trial.expect("flags after", rig.flags(PAGES), [0] * 30 + [DIRTY] * (PAGES - 30))


@rule(
    "fork.ring.dontfork",
    "MADV_DONTFORK keeps a ring's mapping out of children, where nothing is at its address, and "
    "does not disturb the parent's",
    source="mm/madvise.c, MADV_DONTFORK; " + VCPU_MMAP,
    needs=[ACQ_REL],
    guest=True,
)
def ring_dontfork(trial: Trial) -> None:
    """Have the kernel read it in a child with and without: no SIGSEGV in the host's log."""
    rig = Rig(trial)
    out, into = os.pipe()

    def read() -> None:
        with memoryview(rig.ring) as view:
            os.write(into, view[:16])

    trial.expect("reading it in a child", in_child(read), "success")
    rig.ring.madvise(mmap.MADV_DONTFORK)
    trial.expect("reading it with MADV_DONTFORK", in_child(read), "EFAULT")
    os.close(out)
    os.close(into)
    rig.write(range(PAGES))
    trial.expect("flags in the parent", rig.flags(PAGES), [DIRTY] * PAGES)
    mark(rig.ring, PAGES)
    trial.expect("entries reset", ioctl(rig.vm, raw.KVM_RESET_DIRTY_RINGS), PAGES)


@rule(
    "fork.cow",
    "a fork() that shares the guest's memory copy-on-write loses nothing from the log: what the "
    "guest writes after it is logged, is in the parent's memory, and not in the child's",
    source="mm/memory.c, copy_page_range(): mmu_notifier_invalidate_range_start(); "
    "virt/kvm/kvm_main.c, mark_page_dirty_in_slot()",
    needs=[ACQ_REL],
    guest=True,
    meaning="Pages written after a fork() of the VMM would be lost.",
)
def cow(trial: Trial) -> None:
    """Fork with mapped, harvested pages, and have the guest write them again."""
    rig = Rig(trial)
    memory = Memory(PAGES * trial.page_size)
    set_region(rig.vm, 9, COW_GPA, memory.num_bytes, memory.address, LOG)

    def store(value: int) -> None:
        page = trial.page_size
        rig.guest.store(0, [(COW_GPA + n * page, value + n) for n in range(PAGES)])
        trial.expect("whether the guest is done", rig.guest.is_done(rig.guest.run(0)), True)

    def values() -> list[int]:
        return [
            int.from_bytes(memory.map[at : at + 8], sys.byteorder)
            for at in range(0, memory.num_bytes, trial.page_size)
        ]

    store(1000)
    logged = [(entry.slot, entry.offset) for entry in raw.entries(rig.ring, 0, PAGES)]
    every = [(9, page) for page in range(PAGES)]
    trial.expect("entries before the fork", sorted(logged), every)
    mark(rig.ring, PAGES)
    trial.expect("entries reset", ioctl(rig.vm, raw.KVM_RESET_DIRTY_RINGS), PAGES)

    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(ready, 1)  # until the guest has written again
        os._exit(0 if values() == list(range(1000, 1000 + PAGES)) else 1)
    os.close(ready)
    store(2000)
    os.close(go)
    _, status = os.waitpid(child, 0)
    entries = [entry for entry in raw.entries(rig.ring) if entry.flags == DIRTY]
    pages = sorted({(entry.slot, entry.offset) for entry in entries})
    trial.expect("pages logged after the fork", pages, every)
    trial.note("entries after the fork", len(entries))
    trial.expect("values in the parent", values(), list(range(2000, 2000 + PAGES)))
    trial.expect("whether the child saw others (1)", os.waitstatus_to_exitcode(status), 0)
