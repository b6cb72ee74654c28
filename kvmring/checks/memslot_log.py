"""memslot.log.*, .move.*, .ring.* and others: what a change of a slot does to its dirty log."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmring.abi import Cap, ExitReason
from kvmring.checks import raw
from kvmring.checks.raw import LOG, Memory, ioctl, map_vcpu, set_region
from kvmring.checks.rules import RAM_GPA, Trial, rule
from kvmring.errors import GuestError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable

    from kvmring.guests import PageWriter
    from kvmring.memory import GuestMemory
    from kvmring.vm import VM

PREPARE = "virt/kvm/kvm_main.c, kvm_prepare_memory_region()"
COMMIT = "virt/kvm/kvm_main.c, kvm_commit_memory_region(); kvm_arch_commit_memory_region()"
MARK = "virt/kvm/kvm_main.c, mark_page_dirty_in_slot()"
ACQ_REL = Cap.DIRTY_LOG_RING_ACQ_REL
PAGES = 100  # few enough for the smallest ring
RESET = 2


def write(trial: Trial, guest: PageWriter, ram: GuestMemory, pages: Iterable[int]) -> None:
    """Have the guest write to these pages of a slot, once each."""
    guest.load(0, [ram.gpa + page * trial.page_size for page in pages])
    trial.expect("whether the guest is done", guest.is_done(guest.run(0)), True)


def dirty(vm: VM, slot: int = 0) -> list[int]:
    """Fetch a slot's bitmap as page numbers; without manual protect that clears it."""
    bits = raw.get_dirty_log(vm, slot, PAGES)
    return [page for page in range(PAGES) if bits >> page & 1]


class RingVM:
    """A VM with rings and a slot, its guest, and the ring mapped once more."""

    def __init__(self, trial: Trial, *, log: bool = True, second: bool = False) -> None:
        entries = trial.least_entries
        self.vm = trial.vm(ring=entries)
        self.ram = trial.ram(self.vm, PAGES, log=log)
        self.other = self.ram
        if second:
            gpa = self.ram.gpa + self.ram.size_bytes
            self.other = trial.ram(self.vm, PAGES, gpa=gpa, log=not log)
        self.guest = trial.writer(self.vm)
        self.ring: mmap.mmap = map_vcpu(self.guest.vcpus[0], entries * 16)

    def logged(self) -> list[tuple[int, int]]:
        """Return slot and page of every entry that is dirty; with PML their order varies."""
        entries = raw.entries(self.ring)
        return sorted((entry.slot, entry.offset) for entry in entries if entry.flags == 1)

    def reset(self, count: int) -> int:
        """Mark the first entries and have KVM take them back; return how many it did."""
        for index in range(count):
            struct.pack_into("=I", self.ring, 16 * index, RESET)
        return ioctl(self.vm, raw.KVM_RESET_DIRTY_RINGS)


@rule(
    "memslot.log.fresh",
    "a slot that begins to log has an empty bitmap, whatever was written before",
    source=PREPARE + ": kvm_alloc_dirty_bitmap()",
    guest=True,
    meaning="A VMM must send all memory once after it began to log.",
)
def log_fresh(trial: Trial) -> None:
    """Write, then begin to log."""
    vm = trial.vm()
    ram = trial.ram(vm, PAGES, log=False)
    guest = trial.writer(vm)
    write(trial, guest, ram, range(PAGES))
    ram.set_log_dirty(True)
    trial.expect("dirty pages when logging begins", dirty(vm), [])
    write(trial, guest, ram, [0, 1, 64, 99])
    trial.expect("dirty pages after writes", dirty(vm), [0, 1, 64, 99])


@rule(
    "memslot.log.write_protect",
    "pages that are mapped writable when a slot begins to log are protected: the next write to "
    "each is logged",
    source=COMMIT,
    guest=True,
    meaning="What was mapped before migration began would be lost.",
)
def log_write_protect(trial: Trial) -> None:
    """Write all pages, begin to log, write them again."""
    vm = trial.vm()
    ram = trial.ram(vm, PAGES, log=False)
    guest = trial.writer(vm)
    write(trial, guest, ram, range(PAGES))
    ram.set_log_dirty(True)
    write(trial, guest, ram, range(PAGES))
    trial.expect("dirty pages", dirty(vm), list(range(PAGES)))


@rule(
    "memslot.log.off",
    "a slot that no longer logs has no bitmap: KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG are "
    "ENOENT, and what it held is gone when logging begins again",
    source=PREPARE + "; kvm_get_dirty_log_protect()",
    guest=True,
    meaning="Fetch the bitmap before logging is turned off, or its pages are lost.",
)
def log_off(trial: Trial) -> None:
    """Have dirty pages, turn logging off and on."""
    vm = trial.vm()
    ram = trial.ram(vm, PAGES)
    guest = trial.writer(vm)
    write(trial, guest, ram, range(10))
    ram.set_log_dirty(False)
    trial.errno("KVM_GET_DIRTY_LOG", lambda: dirty(vm), errno.ENOENT)
    trial.errno(
        "KVM_CLEAR_DIRTY_LOG", lambda: raw.clear_dirty_log(vm, 0, 0, PAGES, 1), errno.ENOENT
    )
    write(trial, guest, ram, range(20, 30))
    ram.set_log_dirty(True)
    trial.expect("dirty pages when logging begins again", dirty(vm), [])
    write(trial, guest, ram, range(5, 25))
    trial.expect("dirty pages after writes", dirty(vm), list(range(5, 25)))


@rule(
    "memslot.same",
    "a slot set again as it is stays as it is: success, and its bitmap is kept",
    source="virt/kvm/kvm_main.c, kvm_set_memory_region(): nothing to change",
    guest=True,
)
def same(trial: Trial) -> None:
    """Set it again with dirty pages in the bitmap."""
    vm = trial.vm()
    ram = trial.ram(vm, PAGES)
    guest = trial.writer(vm)
    write(trial, guest, ram, [3, 50, 97])
    trial.errno("the same again", lambda: ram.set_log_dirty(True), 0)
    write(trial, guest, ram, [98])
    trial.expect("dirty pages", dirty(vm), [3, 50, 97, 98])


@rule(
    "memslot.move.keeps",
    "a slot that moves to another guest-physical address while it logs keeps its bitmap, whose "
    "bits are relative to the slot",
    source=PREPARE + ": the old slot's bitmap is kept",
    guest=True,
    meaning="Pages written before the move would be lost.",
)
def move_keeps(trial: Trial) -> None:
    """Move it with dirty pages, and write to it at its new place."""
    vm = trial.vm()
    ram = trial.ram(vm, PAGES)
    guest = trial.writer(vm)
    write(trial, guest, ram, range(0, 50))
    ram.move(RAM_GPA - (256 << 20))
    write(trial, guest, ram, range(70, 80))
    trial.expect("dirty pages", dirty(vm), [*range(50), *range(70, 80)])


@rule(
    "memslot.move.logs",
    "after a move the slot logs on: pages that were dirty before it and fetched are logged again",
    source=COMMIT,
    guest=True,
    meaning="Pages of a moved slot would be lost.",
)
def move_logs(trial: Trial) -> None:
    """Fetch, move, write again."""
    vm = trial.vm()
    ram = trial.ram(vm, PAGES)
    guest = trial.writer(vm)
    for gpa in (RAM_GPA - (256 << 20), RAM_GPA - (128 << 20), RAM_GPA):
        write(trial, guest, ram, range(PAGES))
        trial.expect("dirty pages before the move", dirty(vm), list(range(PAGES)))
        ram.move(gpa)
        trial.expect("dirty pages after the move", dirty(vm), [])


@rule(
    "memslot.delete.drops",
    "a slot that is deleted takes its bitmap with it: one made anew in its place begins empty",
    source="virt/kvm/kvm_main.c, kvm_set_memslot(): KVM_MR_DELETE",
    guest=True,
    meaning="Fetch the bitmap before memory is unplugged or remapped.",
)
def delete_drops(trial: Trial) -> None:
    """Delete it with dirty pages."""
    vm, memory = trial.vm(), Memory(PAGES * trial.page_size)
    ram = trial.ram(vm, PAGES)
    guest = trial.writer(vm)
    write(trial, guest, ram, range(10))
    ram.remove()
    trial.errno("KVM_GET_DIRTY_LOG", lambda: dirty(vm), errno.ENOENT)
    set_region(vm, 0, RAM_GPA, memory.num_bytes, memory.address, LOG)
    trial.expect("dirty pages of the new slot", dirty(vm), [])


@rule(
    "memslot.readonly.log",
    "a slot may be READONLY and log: a guest's write to it is an MMIO exit, and is not logged",
    source="virt/kvm/kvm_main.c, check_memory_region_flags(); gfn_to_hva_prot()",
    needs=[Cap.READONLY_MEM],
    guest=True,
)
def readonly_log(trial: Trial) -> None:
    """Write to one."""
    vm = trial.vm()
    ram = vm.add_memory(RAM_GPA, PAGES * trial.page_size, log_dirty=True, readonly=True)
    trial.expect("dirty pages of a new slot", dirty(vm), [])
    guest = trial.writer(vm)
    guest.load(0, [ram.gpa + 7 * trial.page_size])
    try:
        reason, gpa = guest.run(0).reason, 0
    except GuestError as error:
        reason, gpa = error.exit.reason, error.exit.phys_addr or 0
    trial.expect("the exit's reason", int(reason), int(ExitReason.MMIO))
    trial.expect("the exit's address", hex(gpa), hex(ram.gpa + 7 * trial.page_size))
    trial.expect("dirty pages after a write", dirty(vm), [])


@rule(
    "memslot.host_writes",
    "what the VMM itself writes to guest memory is not logged",
    source=MARK + ": called for vCPUs and KVM's own writes only",
    guest=True,
    meaning="A VMM marks the pages that its own devices write, besides KVM's log.",
)
def host_writes(trial: Trial) -> None:
    """Write every page from here, some from the guest."""
    vm = trial.vm()
    ram = trial.ram(vm, PAGES)
    guest = trial.writer(vm)
    write(trial, guest, ram, range(PAGES))
    trial.expect("dirty pages", dirty(vm), list(range(PAGES)))
    ram.write(0, b"\xa5" * ram.size_bytes)
    trial.expect("dirty pages after the VMM's writes", dirty(vm), [])
    write(trial, guest, ram, [9])
    trial.expect("dirty pages after the guest's write", dirty(vm), [9])


@rule(
    "memslot.alias",
    "memory that two slots show is logged in the slot through which it was written, and only there",
    source=MARK,
    guest=True,
    meaning="A VMM with aliases, or with SMM's address space, merges their bitmaps by host page.",
)
def alias(trial: Trial) -> None:
    """Show memory twice, write through each."""
    vm = trial.vm()
    ram = trial.ram(vm, PAGES)
    gpa = ram.gpa + ram.size_bytes
    again = vm.add_memory(gpa, backing=ram, log_dirty=True)
    guest = trial.writer(vm)
    write(trial, guest, ram, [1, 2, 3])
    write(trial, guest, again, [3, 4])
    trial.expect("dirty pages of the first slot", dirty(vm, ram.slot), [1, 2, 3])
    trial.expect("dirty pages of the second slot", dirty(vm, again.slot), [3, 4])


# With rings


@rule(
    "memslot.ring.log_on",
    "with a ring too, pages that are mapped writable when a slot begins to log are protected",
    source=COMMIT,
    needs=[ACQ_REL],
    guest=True,
    meaning="What was mapped before migration began would be lost.",
)
def ring_log_on(trial: Trial) -> None:
    """Write, begin to log, write again."""
    rig = RingVM(trial, log=False)
    write(trial, rig.guest, rig.ram, range(PAGES))
    trial.expect("entries before logging", rig.logged(), [])
    rig.ram.set_log_dirty(True)
    write(trial, rig.guest, rig.ram, range(PAGES))
    trial.expect("entries", rig.logged(), [(0, page) for page in range(PAGES)])


@rule(
    "memslot.ring.log_off",
    "writes to a slot that no longer logs are in no ring, and entries of before stay there",
    source=MARK + ": kvm_slot_dirty_track_enabled()",
    needs=[ACQ_REL],
    guest=True,
)
def ring_log_off(trial: Trial) -> None:
    """Turn logging off with entries in the ring."""
    rig = RingVM(trial)
    write(trial, rig.guest, rig.ram, range(10))
    rig.ram.set_log_dirty(False)
    write(trial, rig.guest, rig.ram, range(5, PAGES))
    expected = [(0, page) for page in range(10)]
    trial.expect("entries", rig.logged(), expected)
    trial.expect("entries reset", rig.reset(10), 10)
    rig.ram.set_log_dirty(True)
    write(trial, rig.guest, rig.ram, [42])
    trial.expect("entries when it logs again", rig.logged(), [(0, 42)])


@rule(
    "memslot.ring.other_slot",
    "of two slots only the one that logs is in the ring",
    source=MARK + ": kvm_slot_dirty_track_enabled()",
    needs=[ACQ_REL],
    guest=True,
)
def ring_other_slot(trial: Trial) -> None:
    """Write to both, with the one and then the other logging."""
    rig = RingVM(trial, second=True)
    for page in range(10):
        write(trial, rig.guest, rig.ram, [page])
        write(trial, rig.guest, rig.other, [page])
    trial.expect("entries", rig.logged(), [(rig.ram.slot, page) for page in range(10)])
    trial.expect("entries reset", rig.reset(10), 10)
    rig.ram.set_log_dirty(False)
    rig.other.set_log_dirty(True)
    write(trial, rig.guest, rig.ram, range(10))
    write(trial, rig.guest, rig.other, range(10))
    trial.expect("entries", rig.logged(), [(rig.other.slot, page) for page in range(10)])


@rule(
    "memslot.ring.move",
    "entries name a page by its place in the slot, also after the slot moved, and KVM resets "
    "those of before the move",
    source=MARK + "; dirty_ring.c, kvm_reset_dirty_gfn()",
    needs=[ACQ_REL],
    guest=True,
    meaning="Translate entries with the slot's address at the end, not at the time of harvest.",
)
def ring_move(trial: Trial) -> None:
    """Move it with entries in the ring, reset, and write again."""
    rig = RingVM(trial)
    write(trial, rig.guest, rig.ram, range(10))
    rig.ram.move(RAM_GPA - (256 << 20))
    trial.expect("entries", rig.logged(), [(0, page) for page in range(10)])
    trial.expect("entries reset", rig.reset(10), 10)
    write(trial, rig.guest, rig.ram, range(20))
    trial.expect("entries after the move", rig.logged(), [(0, page) for page in range(20)])


@rule(
    "memslot.ring.delete",
    "a deleted slot's entries stay in the ring, and a reset counts them",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_reset(); kvm_reset_dirty_gfn(): !memslot",
    needs=[ACQ_REL],
    guest=True,
    meaning="Harvest and reset before a slot is deleted, or its entries are taken for those of a "
    "new slot with its number.",
)
def ring_delete(trial: Trial) -> None:
    """Delete it with entries in the ring."""
    rig = RingVM(trial)
    write(trial, rig.guest, rig.ram, range(20))
    rig.ram.remove()
    trial.expect("entries", rig.logged(), [(0, page) for page in range(20)])
    trial.expect("entries reset", rig.reset(20), 20)
    trial.expect("flags of the entries", {e.flags for e in raw.entries(rig.ring, 0, 20)}, {0})


@rule(
    "memslot.ring.recreate",
    "entries of a deleted slot are applied to a slot made anew with its number, without harm: "
    "each page of that is logged when it is written",
    source="virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn(): id_to_memslot()",
    needs=[ACQ_REL],
    guest=True,
    meaning="An entry does not say which slot of that number it was of.",
)
def ring_recreate(trial: Trial) -> None:
    """Delete and make anew, with entries in the ring, then reset them."""
    rig = RingVM(trial)
    write(trial, rig.guest, rig.ram, range(20))
    rig.ram.remove()
    ram = trial.ram(rig.vm, PAGES)
    trial.expect("the new slot's number", ram.slot, 0)
    write(trial, rig.guest, ram, range(10, 30))
    trial.expect("entries", len(rig.logged()), 40)
    trial.expect("entries reset", rig.reset(40), 40)
    write(trial, rig.guest, ram, range(5, 40))
    trial.expect("entries after it", rig.logged(), [(0, page) for page in range(5, 40)])
