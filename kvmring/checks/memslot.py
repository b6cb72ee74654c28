"""memslot.*: what KVM_SET_USER_MEMORY_REGION accepts; memslot_log.py: what that does to the log."""

from __future__ import annotations

import errno
import os
import struct
from functools import partial

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.raw import GUEST_MEMFD, LOG, READONLY, Memory, ioctl, set_region
from kvmring.checks.rules import RAM_GPA, Trial, rule

FLAGS = "virt/kvm/kvm_main.c, check_memory_region_flags()"
REGION = "virt/kvm/kvm_main.c, kvm_set_memory_region()"
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
KVM_CAP_GUEST_MEMFD_FLAGS = 244
GUEST_MEMFD_FLAG_MMAP = 1
SW_PROTECTED_VM = 1  # KVM_X86_SW_PROTECTED_VM
MAX_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
LOW_ADDRESS = 1 << 20  # page-aligned at any page size, a user's, and mapped by nobody
PAGES = 64


@rule(
    "memslot.flags.unknown",
    "flags that KVM_SET_USER_MEMORY_REGION does not know are EINVAL; guest_memfd is one of them",
    source=FLAGS + "; kvm_vm_ioctl(): KVM_SET_USER_MEMORY_REGION_V1_FLAGS",
)
def flags_unknown(trial: Trial) -> None:
    """Try them alone and beside LOG_DIRTY_PAGES."""
    vm, memory = trial.vm(), Memory(trial.page_size)
    add = partial(set_region, vm, 0, RAM_GPA, memory.num_bytes, memory.address)
    for flags in (GUEST_MEMFD, 8, 1 << 31, GUEST_MEMFD | LOG, 8 | LOG):
        trial.errno(f"flags {flags:#x}", partial(add, flags), errno.EINVAL)
    trial.errno("flags 1", partial(add, LOG), 0)


@rule(
    "memslot.flags.unknown2",
    "flags that KVM_SET_USER_MEMORY_REGION2 does not know are EINVAL, and LOG_DIRTY_PAGES means "
    "there what it always means",
    source=FLAGS,
    needs=[Cap.USER_MEMORY2],
)
def flags_unknown2(trial: Trial) -> None:
    """Try them with the second ioctl."""
    vm, memory = trial.vm(), Memory(PAGES * trial.page_size)
    add = partial(set_region, vm, 0, RAM_GPA, memory.num_bytes, memory.address, version=2)
    for flags in (8, 1 << 31, 8 | LOG):
        trial.errno(f"flags {flags:#x}", partial(add, flags), errno.EINVAL)
    trial.errno("flags 1", partial(add, LOG), 0)
    trial.expect("dirty pages", raw.get_dirty_log(vm, 0, PAGES), 0)


@rule(
    "memslot.flags.guest_memfd",
    "a slot of guest_memfd can be made, but not with LOG_DIRTY_PAGES or READONLY: EINVAL; and it "
    "can only be deleted, not changed",
    source=FLAGS + "; kvm_set_memory_region()",
    needs=[Cap.USER_MEMORY2],
    meaning="Private memory cannot be migrated with the dirty log.",
)
def flags_guest_memfd(trial: Trial) -> None:
    """Make one, then log it."""
    vm = trial.vm()
    if not vm.check_extension(Cap.GUEST_MEMFD):
        if not trial.kvm.check_extension(Cap.VM_TYPES) >> SW_PROTECTED_VM & 1:
            trial.skip("this KVM has no guest_memfd")
        vm = trial.kvm.create_vm(SW_PROTECTED_VM)
        if not vm.check_extension(Cap.GUEST_MEMFD):
            trial.skip("this KVM has no guest_memfd")
    memory = Memory(PAGES * trial.page_size)
    # arm64 takes only such as can be mapped; where that is not offered, plain ones are right
    mappable = vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP
    argument = bytearray(struct.pack("=QQ48x", memory.num_bytes, mappable))
    fd = ioctl(vm, KVM_CREATE_GUEST_MEMFD, argument)

    def add(flags: int) -> None:
        set_region(
            vm,
            0,
            RAM_GPA,
            memory.num_bytes,
            memory.address,
            GUEST_MEMFD | flags,
            memfd=(fd, 0),
            version=2,
        )

    try:
        trial.errno("with LOG_DIRTY_PAGES", lambda: add(LOG), errno.EINVAL)
        trial.errno("with READONLY", lambda: add(READONLY), errno.EINVAL)
        trial.errno("by itself", lambda: add(0), 0)
        trial.errno("LOG_DIRTY_PAGES on the slot", lambda: add(LOG), errno.EINVAL)
        trial.errno("the same slot again", lambda: add(0), errno.EINVAL)
        trial.errno("KVM_GET_DIRTY_LOG", lambda: raw.get_dirty_log(vm, 0, PAGES), errno.ENOENT)
        trial.errno("its deletion", lambda: set_region(vm, 0, RAM_GPA, 0, memory.address), 0)
    finally:
        os.close(fd)
        vm.close()


@rule(
    "memslot.efault",
    "a bad pointer is EFAULT, and no slot is made",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl(): KVM_SET_USER_MEMORY_REGION",
)
def efault(trial: Trial) -> None:
    """Give one."""
    vm = trial.vm()
    for address in (0, 8):
        trial.errno(
            f"a struct at {address}",
            partial(ioctl, vm, raw.KVM_SET_USER_MEMORY_REGION, address),
            errno.EFAULT,
        )
    trial.errno("KVM_GET_DIRTY_LOG", lambda: raw.get_dirty_log(vm, 0, 1), errno.ENOENT)


@rule(
    "memslot.align.size",
    "a size that is no multiple of the page size is EINVAL",
    source=REGION,
)
def align_size(trial: Trial) -> None:
    """Be a byte, and half a page, off."""
    vm, memory = trial.vm(), Memory(2 * trial.page_size)
    for size in (1, trial.page_size // 2, trial.page_size + 1, 2 * trial.page_size - 512):
        trial.errno(
            f"{size} bytes",
            partial(set_region, vm, 0, RAM_GPA, size, memory.address, LOG),
            errno.EINVAL,
        )


@rule(
    "memslot.align.gpa",
    "a guest-physical address that is no multiple of the page size is EINVAL",
    source=REGION,
)
def align_gpa(trial: Trial) -> None:
    """Be a byte, and half a page, off."""
    vm, memory = trial.vm(), Memory(trial.page_size)
    for off in (1, 512, trial.page_size // 2, trial.page_size - 1):
        trial.errno(
            f"an address {off} bytes into a page",
            partial(set_region, vm, 0, RAM_GPA + off, memory.num_bytes, memory.address, LOG),
            errno.EINVAL,
        )


@rule(
    "memslot.align.hva",
    "a host address that is no multiple of the page size is EINVAL",
    source=REGION,
)
def align_hva(trial: Trial) -> None:
    """Be a byte, and half a page, off."""
    vm, memory = trial.vm(), Memory(2 * trial.page_size)
    for off in (1, 512, trial.page_size // 2, trial.page_size - 1):
        hva = memory.address + off
        trial.errno(
            f"memory {off} bytes into a page",
            partial(set_region, vm, 0, RAM_GPA, trial.page_size, hva, LOG),
            errno.EINVAL,
        )


@rule(
    "memslot.hva.not_user",
    "a host address that is tagged, or not a user's, is EINVAL",
    source=REGION + ": untagged_addr(), access_ok()",
    meaning="A VMM with tagged pointers (arm64 MTE or TBI) must strip them first.",
)
def hva_not_user(trial: Trial) -> None:
    """Try a tag, the kernel's half, and a range that leaves the user's half."""
    vm, memory = trial.vm(), Memory(trial.page_size)
    for hva, size in (
        (memory.address | 1 << 56, trial.page_size),
        (1 << 63, trial.page_size),
        ((1 << 64) - trial.page_size, trial.page_size),
        (LOW_ADDRESS, (1 << 63) - LOW_ADDRESS),
    ):
        trial.errno(
            f"{size:#x} bytes at {hva:#x}",
            partial(set_region, vm, 0, RAM_GPA, size, hva, LOG),
            errno.EINVAL,
        )


@rule(
    "memslot.hva.unmapped",
    "nothing need be mapped at the host address when the slot is made",
    source=REGION + ": access_ok() only",
)
def hva_unmapped(trial: Trial) -> None:
    """Show what is not there."""
    vm = trial.vm()
    add = partial(set_region, vm, 0, RAM_GPA, PAGES * trial.page_size, LOW_ADDRESS, LOG)
    trial.errno("a slot of unmapped memory", add, 0)
    trial.expect("dirty pages", raw.get_dirty_log(vm, 0, PAGES), 0)


@rule(
    "memslot.wrap",
    "guest-physical addresses that wrap round the end of 64 bits are EINVAL",
    source=REGION,
)
def wrap(trial: Trial) -> None:
    """End at the very end, and beyond it."""
    vm, memory = trial.vm(), Memory(2 * trial.page_size)
    gpa = (1 << 64) - trial.page_size
    for size in (trial.page_size, 2 * trial.page_size):
        trial.errno(
            f"{size} bytes at {gpa:#x}",
            partial(set_region, vm, 0, gpa, size, memory.address, LOG),
            errno.EINVAL,
        )


@rule(
    "memslot.max_pages",
    "a slot of 2^31 pages or more is EINVAL",
    source=REGION + ": KVM_MEM_MAX_NR_PAGES",
)
def max_pages(trial: Trial) -> None:
    """Be one page too large."""
    vm = trial.vm()
    for pages, answer in ((MAX_PAGES + 1, errno.EINVAL), (1 << 33, errno.EINVAL), (1 << 18, 0)):
        size = pages * trial.page_size
        trial.errno(
            f"{pages} pages",
            partial(set_region, vm, 0, RAM_GPA, size, LOW_ADDRESS),
            answer,
        )


@rule(
    "memslot.delete.missing",
    "the deletion of a slot that does not exist is EINVAL; of one that does, it works once",
    source=REGION,
)
def delete_missing(trial: Trial) -> None:
    """Delete before, and twice after."""
    vm, memory = trial.vm(), Memory(PAGES * trial.page_size)
    delete = partial(set_region, vm, 0, RAM_GPA, 0, memory.address)
    trial.errno("before the slot was made", delete, errno.EINVAL)
    set_region(vm, 0, RAM_GPA, memory.num_bytes, memory.address, LOG)
    trial.expect("dirty pages", raw.get_dirty_log(vm, 0, PAGES), 0)
    trial.errno("the slot's deletion", delete, 0)
    trial.errno("KVM_GET_DIRTY_LOG", lambda: raw.get_dirty_log(vm, 0, PAGES), errno.ENOENT)
    trial.errno("its deletion again", delete, errno.EINVAL)


def expect_unchangeable(trial: Trial, what: str, *, pages: int, off: int, flags: int) -> None:
    """Expect that a slot of PAGES pages is not changed so, and is left as it was."""
    vm, memory = trial.vm(), Memory(2 * PAGES * trial.page_size)
    size = PAGES * trial.page_size
    set_region(vm, 0, RAM_GPA, size, memory.address, LOG)
    trial.errno(
        what,
        lambda: set_region(
            vm,
            0,
            RAM_GPA,
            pages * trial.page_size,
            memory.address + off * trial.page_size,
            flags,
        ),
        errno.EINVAL,
    )
    trial.errno(
        "the slot again as it was", lambda: set_region(vm, 0, RAM_GPA, size, memory.address, LOG), 0
    )
    trial.expect("dirty pages", raw.get_dirty_log(vm, 0, PAGES), 0)


@rule(
    "memslot.change.size",
    "the size of a slot cannot be changed: EINVAL",
    source=REGION,
    meaning="To resize memory a VMM deletes the slot, and with it its bitmap: fetch it before.",
)
def change_size(trial: Trial) -> None:
    """Grow it, and shrink it."""
    expect_unchangeable(trial, "a larger size", pages=PAGES + 1, off=0, flags=LOG)
    expect_unchangeable(trial, "a smaller size", pages=PAGES - 1, off=0, flags=LOG)


@rule(
    "memslot.change.hva",
    "the host memory of a slot cannot be changed: EINVAL",
    source=REGION,
)
def change_hva(trial: Trial) -> None:
    """Show the next page."""
    expect_unchangeable(trial, "other memory", pages=PAGES, off=1, flags=LOG)


@rule(
    "memslot.change.readonly",
    "READONLY of a slot cannot be changed: EINVAL",
    source=REGION,
    needs=[Cap.READONLY_MEM],
)
def change_readonly(trial: Trial) -> None:
    """Turn it on."""
    expect_unchangeable(trial, "READONLY", pages=PAGES, off=0, flags=LOG | READONLY)
    expect_unchangeable(trial, "READONLY without LOG", pages=PAGES, off=0, flags=READONLY)


@rule(
    "memslot.overlap",
    "slots that overlap in the guest's addresses are EEXIST, when made and when moved; "
    "slots that touch are allowed",
    source=REGION + ": kvm_check_memslot_overlap()",
)
def overlap(trial: Trial) -> None:
    """Overlap in every way."""
    page, vm = trial.page_size, trial.vm()
    memory = Memory(PAGES * page)

    def add(slot: int, first: int, pages: int) -> None:
        set_region(vm, slot, RAM_GPA + first * page, pages * page, memory.address, LOG)

    add(0, PAGES, PAGES)
    for what, first, pages in (
        ("the same pages", PAGES, PAGES),
        ("the first page", PAGES - 1, 2),
        ("the last page", 2 * PAGES - 1, 2),
        ("a page inside", PAGES + 5, 1),
    ):
        trial.errno(what, partial(add, 1, first, pages), errno.EEXIST)
    trial.errno("up to its first page", lambda: add(1, 0, PAGES), 0)
    trial.errno("from its last page on", lambda: add(2, 2 * PAGES, PAGES), 0)
    trial.errno("a move onto the next", lambda: add(1, 1, PAGES), errno.EEXIST)
    for slot in (0, 1, 2):
        trial.expect(f"dirty pages of slot {slot}", raw.get_dirty_log(vm, slot, PAGES), 0)
    trial.errno("a slot that was refused", lambda: raw.get_dirty_log(vm, 3, 1), errno.ENOENT)


@rule(
    "memslot.as_id.overlap",
    "slots of different address spaces may overlap, and each has a bitmap of its own",
    source=REGION + ": one tree of slots per address space",
    needs=[Cap.MULTI_ADDRESS_SPACE, Cap.MANUAL_DIRTY_LOG_PROTECT2],
    meaning="A VMM with SMM must fetch and merge both bitmaps, by guest-physical address.",
)
def as_id_overlap(trial: Trial) -> None:
    """Have the same pages in spaces 0 and 1, and clear one of the bitmaps."""
    vm, memory = trial.vm(), Memory(PAGES * trial.page_size)
    if vm.check_extension(Cap.MULTI_ADDRESS_SPACE) < 2:
        trial.skip("this KVM has one address space")
    if vm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) != 3:
        trial.skip("this KVM has no KVM_DIRTY_LOG_INITIALLY_SET")
    raw.enable_cap(vm, Cap.MANUAL_DIRTY_LOG_PROTECT2, 3)
    smm = 1 << 16
    for slot in (0, smm):
        add = partial(set_region, vm, slot, RAM_GPA, memory.num_bytes, memory.address, LOG)
        trial.errno(f"slot {slot:#x}", add, 0)
    everything = (1 << PAGES) - 1
    raw.clear_dirty_log(vm, smm, 0, PAGES, everything)
    trial.expect("dirty pages in space 1", raw.get_dirty_log(vm, smm, PAGES), 0)
    trial.expect("dirty pages in space 0", raw.get_dirty_log(vm, 0, PAGES), everything)
