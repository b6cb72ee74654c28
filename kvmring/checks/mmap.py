"""mmap.*: where a vCPU's ring is mapped, with which rights, and what lies round it."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from functools import partial
from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.raw import RING_PAGE, in_child, ioctl, map_vcpu, touch
from kvmring.checks.rules import RAM_GPA, Trial, rule
from kvmring.guests import PageWriter
from kvmring.system import System

if TYPE_CHECKING:
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

VCPU_MMAP = "virt/kvm/kvm_main.c, kvm_vcpu_mmap()"
FAULT = "virt/kvm/kvm_main.c, kvm_vcpu_fault(); kvm_page_in_dirty_ring()"
ACQ_REL = Cap.DIRTY_LOG_RING_ACQ_REL
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
R, W, X = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
PAGES = 100  # few enough for the smallest ring


def ring_vcpu(trial: Trial, num_pages: int = 1) -> tuple[VCPU, int]:
    """Make a vCPU whose ring has at least so many pages; return it and the ring's bytes."""
    entries = trial.least_entries
    while entries * 16 < num_pages * trial.page_size:
        entries *= 2
    return trial.vm(ring=entries).create_vcpu(), entries * 16


def write_pages(kvm: System, vm: VM) -> VCPU:
    """Have a guest write PAGES pages of slot 0, in order; return its vCPU."""
    page_size = os.sysconf("SC_PAGESIZE")
    ram = vm.add_memory(RAM_GPA, PAGES * page_size, log_dirty=True)
    guest = PageWriter(kvm, vm)
    guest.load(0, [ram.gpa + n * page_size for n in range(PAGES)])
    while not guest.is_done(guest.run(0)):
        pass
    return guest.vcpus[0]


def try_map(
    vcpu: VCPU, num_bytes: int, page: int = RING_PAGE, flags: int = mmap.MAP_SHARED, prot: int = R
) -> None:
    """Map and unmap again."""
    map_vcpu(vcpu, num_bytes, page=page, flags=flags, prot=prot).close()


@rule(
    "mmap.ring.offset",
    "a vCPU's ring is mapped from its fd at 64 pages of the running kernel, and is all zeros "
    "before the vCPU has run",
    source=FAULT + ": KVM_DIRTY_LOG_PAGE_OFFSET",
    needs=[ACQ_REL],
    meaning="With 4096 * 64 written in, or the 0 of old arm64 headers, something else is mapped.",
)
def ring_offset(trial: Trial) -> None:
    """Map it and read it."""
    vcpu, size = ring_vcpu(trial)
    ring = map_vcpu(vcpu, size)
    trial.expect("bytes that are not 0", size - ring[:].count(0), 0)
    ring.close()


@rule(
    "mmap.ring.entry",
    "an entry is 16 bytes: u32 flags, 1 for dirty, u32 slot (as_id << 16 | id), and u64 page in "
    "the slot; the first that is free has flags 0",
    source="include/uapi/linux/kvm.h, struct kvm_dirty_gfn; virt/kvm/dirty_ring.c, "
    "kvm_dirty_ring_push()",
    needs=[ACQ_REL],
    guest=True,
    meaning="Entries would be taken for other pages.",
)
def ring_entry(trial: Trial) -> None:
    """Have entries of two slots written, and read the bytes."""
    entries = trial.least_entries
    vm = trial.vm(ring=entries)
    size = 8 * trial.page_size
    low = vm.add_memory(RAM_GPA, size, log_dirty=True, slot=3)
    high = vm.add_memory(RAM_GPA + size, size, log_dirty=True, slot=0x123)
    guest = trial.writer(vm)
    guest.load(0, [low.gpa + 5 * trial.page_size, high.gpa, high.gpa + 7 * trial.page_size])
    trial.expect("whether the guest is done", guest.is_done(guest.run(0)), True)
    ring = map_vcpu(guest.vcpus[0], entries * 16)
    found = [struct.unpack_from("=IIQ", ring, at) for at in (0, 16, 32)]
    trial.expect("the first entries", found, [(1, 3, 5), (1, 0x123, 0), (1, 0x123, 7)])
    trial.expect("flags of the next", struct.unpack_from("=I", ring, 48)[0], 0)
    ring.close()


@rule(
    "mmap.ring.rights",
    "a ring can be mapped shared for reading, for writing, and for both",
    source=VCPU_MMAP,
    needs=[ACQ_REL],
)
def ring_rights(trial: Trial) -> None:
    """Map it with each."""
    vcpu, size = ring_vcpu(trial)
    for name, prot in (("reading", R), ("writing", W), ("both", R | W)):
        trial.errno(f"a mapping for {name}", partial(try_map, vcpu, size, prot=prot), 0)


@rule(
    "mmap.ring.private",
    "a private mapping that begins or ends in the ring is EINVAL: marks in it would not reach KVM",
    source=VCPU_MMAP + ": VM_SHARED",
    needs=[ACQ_REL],
    meaning="Entries harvested through a private mapping are never reset: the ring stays full.",
)
def ring_private(trial: Trial) -> None:
    """Map it whole, and from one end to outside."""
    vcpu, size = ring_vcpu(trial, 2)
    page, private = trial.page_size, mmap.MAP_PRIVATE
    for what, first, num_bytes in (
        ("the ring", RING_PAGE, size),
        ("its first page", RING_PAGE, page),
        ("its last page", RING_PAGE + size // page - 1, page),
        ("the ring and the page before", RING_PAGE - 1, size + page),
        ("the ring and the page after", RING_PAGE, size + page),
    ):
        for prot in (R, R | W):
            trial.errno(
                f"a private mapping of {what}",
                partial(try_map, vcpu, num_bytes, first, private, prot),
                errno.EINVAL,
            )
    trial.errno("a shared mapping of the ring", lambda: try_map(vcpu, size), 0)


@rule(
    "mmap.ring.private_round",
    "only the ends of a mapping are looked at: a private one that begins before the ring and ends "
    "behind it is accepted",
    source=VCPU_MMAP + ": vm_pgoff, and vm_pgoff + vma_pages() - 1",
    needs=[ACQ_REL],
)
def ring_private_round(trial: Trial) -> None:
    """Map from the page before to the page after."""
    vcpu, size = ring_vcpu(trial)
    trial.errno(
        "a private mapping round the ring",
        lambda: try_map(vcpu, size + 2 * trial.page_size, RING_PAGE - 1, mmap.MAP_PRIVATE),
        0,
    )


@rule(
    "mmap.ring.exec",
    "a ring cannot be mapped executable: EPERM where anonymous inodes are noexec, EINVAL from KVM "
    "before that",
    source=VCPU_MMAP + ": VM_EXEC; mm/mmap.c, do_mmap(): path_noexec()",
    needs=[ACQ_REL],
)
def ring_exec(trial: Trial) -> None:
    """Map it so."""
    vcpu, size = ring_vcpu(trial)
    answers = errno.EPERM, errno.EINVAL
    seen = trial.errno("an executable mapping", lambda: try_map(vcpu, size, prot=R | X), *answers)
    trial.errno("also writable", lambda: try_map(vcpu, size, prot=R | W | X), seen)


@rule(
    "mmap.ring.end",
    "a mapping may be longer than the ring, but what lies behind it is not there: SIGBUS",
    source=FAULT,
    needs=[ACQ_REL],
    meaning="Never map more than was enabled: the VMM is killed by the first access behind it.",
)
def ring_end(trial: Trial) -> None:
    """Touch the last page, and the one after."""
    vcpu, size = ring_vcpu(trial, 2)
    pages = size // trial.page_size
    ring = map_vcpu(vcpu, size + trial.page_size)
    for what, page, end in (
        ("first page", 0, "success"),
        ("last page", pages - 1, "success"),
        ("page behind the ring", pages, "SIGBUS"),
    ):
        trial.expect(f"touching the {what}", in_child(partial(touch, ring, [page])), end)
    ring.close()


@rule(
    "mmap.ring.before",
    "between kvm_run with its companions and the ring there is nothing: mapped without error, "
    "SIGBUS when touched",
    source=FAULT,
    needs=[ACQ_REL],
)
def ring_before(trial: Trial) -> None:
    """Touch the page before the ring, and the ring behind it."""
    vcpu, size = ring_vcpu(trial)
    ring = map_vcpu(vcpu, size + trial.page_size, page=RING_PAGE - 1)
    before, first = [0], [1]
    trial.expect("touching page 63", in_child(partial(touch, ring, before)), "SIGBUS")
    trial.expect("touching page 64", in_child(partial(touch, ring, first)), "success")
    ring.close()


@rule(
    "mmap.no_ring",
    "a vCPU without a ring can be mapped at 64 pages all the same; touching that is SIGBUS",
    source=FAULT + ": dirty_ring_size",
    meaning="That mmap succeeds says nothing about a ring: ask what was enabled.",
)
def no_ring(trial: Trial) -> None:
    """Map and touch it."""
    vcpu = trial.vm().create_vcpu()
    for what, flags in (("shared", mmap.MAP_SHARED), ("private", mmap.MAP_PRIVATE)):
        trial.errno(
            f"a {what} mapping at 64 pages",
            partial(try_map, vcpu, 65536, RING_PAGE, flags),
            0,
        )
    ring = map_vcpu(vcpu, 65536)
    nothing, run = [0], [0]
    trial.expect("touching it", in_child(partial(touch, ring, nothing)), "SIGBUS")
    kvm_run = map_vcpu(vcpu, trial.page_size, page=0)
    trial.expect("touching page 0", in_child(partial(touch, kvm_run, run)), "success")
    ring.close()
    kvm_run.close()


@rule(
    "mmap.ring.partial",
    "a ring can be mapped in part and several times: all mappings show the same memory",
    source=FAULT + ": kvm_dirty_ring_get_page()",
    needs=[ACQ_REL],
)
def ring_partial(trial: Trial) -> None:
    """Write through one, read through others; this vCPU never runs."""
    vcpu, size = ring_vcpu(trial, 4)
    page = trial.page_size
    whole = map_vcpu(vcpu, size)
    for number in range(size // page):
        # the page field of each page's first entry; flags stay 0
        struct.pack_into("=Q", whole, number * page + 8, 1000 + number)
    again = map_vcpu(vcpu, size)
    trial.expect("whether a second mapping shows the same", again[:] == whole[:], True)
    for number in (1, size // page - 1):
        part = map_vcpu(vcpu, page, page=RING_PAGE + number)
        seen = struct.unpack_from("=IIQ", part, 0)
        trial.expect(f"the first entry of page {number}", seen, (0, 0, 1000 + number))
        part.close()
    whole.close()
    again.close()


@rule(
    "mmap.ring.per_vcpu",
    "each vCPU has a ring of its own, and what a vCPU writes is in its own",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl_create_vcpu(): kvm_dirty_ring_alloc()",
    needs=[ACQ_REL],
    guest=True,
    meaning="A VMM that harvests one ring only loses the other vCPUs' pages.",
)
def ring_per_vcpu(trial: Trial) -> None:
    """Have two vCPUs write different pages."""
    entries = trial.least_entries
    vm = trial.vm(ring=entries)
    ram = trial.ram(vm, PAGES)
    guest = trial.writer(vm, vcpus=2)
    for index, pages in enumerate((range(0, 40), range(40, 100))):
        guest.load(index, [ram.gpa + n * trial.page_size for n in pages])
        trial.expect("whether the guest is done", guest.is_done(guest.run(index)), True)
        ring = map_vcpu(guest.vcpus[index], entries * 16)
        logged = sorted(entry.offset for entry in raw.entries(ring) if entry.flags == 1)
        trial.expect(f"pages in the ring of vCPU {index}", logged, list(pages))
        ring.close()


@rule(
    "mmap.ring.marks",
    "marks written through any shared mapping count: KVM resets the entries and frees them",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_reset(): kvm_dirty_gfn_set_invalid()",
    needs=[ACQ_REL],
    guest=True,
)
def ring_marks(trial: Trial) -> None:
    """Mark through a write-only mapping, look through another."""
    size = trial.least_entries * 16
    vm = trial.vm(ring=trial.least_entries)
    vcpu = write_pages(trial.kvm, vm)
    seen, marks = map_vcpu(vcpu, size, prot=R), map_vcpu(vcpu, size, prot=W)
    flags = [entry.flags for entry in raw.entries(seen, 0, PAGES)]
    trial.expect("flags before", flags, [1] * PAGES)
    for index in range(30):
        struct.pack_into("=I", marks, 16 * index, 2)
    trial.expect("entries reset", ioctl(vm, raw.KVM_RESET_DIRTY_RINGS), 30)
    flags = [entry.flags for entry in raw.entries(seen, 0, PAGES)]
    trial.expect("flags after", flags, [0] * 30 + [1] * (PAGES - 30))
    seen.close()
    marks.close()


@rule(
    "mmap.ring.keeps",
    "a mapped ring keeps the vCPU: its entries can be read when every file descriptor is closed",
    source="virt/kvm/kvm_main.c, kvm_vcpu_mmap(): the mapping holds the vCPU's file",
    needs=[ACQ_REL],
    guest=True,
    meaning="A VM whose rings are not unmapped is not freed when its fds are closed.",
)
def ring_keeps(trial: Trial) -> None:
    """Close everything in a child that made a VM of its own, then read."""
    entries = trial.least_entries

    def close_all() -> None:
        kvm = System(trial.kvm.path)
        vm = kvm.create_vm()
        vm.enable_dirty_ring(entries)
        ring = map_vcpu(write_pages(kvm, vm), entries * 16)
        kvm.close()  # and with it the VM, the vCPU, and the library's mappings
        os.closerange(3, 1 << 16)  # also that of Python's mapping
        found = sorted(entry.offset for entry in raw.entries(ring) if entry.flags == 1)
        if found != list(range(PAGES)):
            raise OSError(errno.EPROTO, "other entries")

    trial.expect("reading the entries (EPROTO: others)", in_child(close_all), "success")


@rule(
    "mmap.other_fds",
    "rings are mapped from vCPUs: the fds of a VM and of /dev/kvm cannot be mapped, ENODEV",
    source="virt/kvm/kvm_main.c, kvm_vm_fops and kvm_chardev_ops: no mmap",
    needs=[ACQ_REL],
)
def other_fds(trial: Trial) -> None:
    """Try them."""
    vm = trial.vm(ring=trial.least_entries)
    page = trial.page_size
    for what, fd in (("a VM", vm.fileno()), ("/dev/kvm", trial.kvm.fileno())):
        for at in (0, RING_PAGE):
            trial.errno(
                f"a mapping of {what} at page {at}",
                partial(map_vcpu, fd, page, page=at, prot=R),
                errno.ENODEV,
            )


@rule(
    "mmap.vcpu_size",
    "KVM_GET_VCPU_MMAP_SIZE is that of kvm_run and its companions, in pages of the running kernel, "
    "below the ring, which it does not count",
    source="virt/kvm/kvm_main.c, kvm_dev_ioctl(): KVM_GET_VCPU_MMAP_SIZE",
    meaning="The ring is a second mapping, of the size that was enabled.",
)
def vcpu_size(trial: Trial) -> None:
    """Ask, map as much, and touch it."""
    size = ioctl(trial.kvm, KVM_GET_VCPU_MMAP_SIZE)
    trial.note("KVM_GET_VCPU_MMAP_SIZE", size)
    pages, rest = divmod(size, trial.page_size)
    trial.expect("bytes beyond whole pages", rest, 0)
    trial.expect_true("pages", 1 <= pages < RING_PAGE, got=pages, rule="1 to 63")
    vcpu = trial.vm().create_vcpu()
    run = map_vcpu(vcpu, size, page=0)
    trial.expect("touching each", in_child(partial(touch, run, range(pages))), "success")
    run.close()
    behind = map_vcpu(vcpu, trial.page_size, page=pages)
    first = [0]
    trial.expect("touching the page behind", in_child(partial(touch, behind, first)), "SIGBUS")
    behind.close()
