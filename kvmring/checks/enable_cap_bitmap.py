"""enable_cap.bitmap.*: when the backup bitmap can be enabled, and that it then is there.

Manual protect has a group of its own, manual_protect.py.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.raw import LOG, Memory, enable_cap
from kvmring.checks.rules import RAM_GPA, Trial, rule

if TYPE_CHECKING:
    from kvmring.vm import VM

GENERIC = "virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_cap_generic()"
ACQ_REL = Cap.DIRTY_LOG_RING_ACQ_REL
WITH_BITMAP = Cap.DIRTY_LOG_RING_WITH_BITMAP
MANUAL = Cap.MANUAL_DIRTY_LOG_PROTECT2
PAGES = 100
ALL = (1 << PAGES) - 1


def add_slot(trial: Trial, vm: VM, slot: int = 0, *, flags: int = LOG) -> None:
    """Add a slot of PAGES pages at a place of its own, that no guest will touch."""
    memory = Memory(PAGES * trial.page_size)
    gpa = RAM_GPA + slot * memory.num_bytes
    raw.set_region(vm, slot, gpa, memory.num_bytes, memory.address, flags)


def ring_vm(trial: Trial) -> VM:
    """Make a VM with rings that the library does not know of."""
    vm = trial.vm()
    enable_cap(vm, ACQ_REL, trial.least_entries * 16)
    return vm


# The backup bitmap


@rule(
    "enable_cap.bitmap.unsupported",
    "where KVM does not offer the backup bitmap, enabling it is EINVAL, also with a ring",
    source=GENERIC + ": CONFIG_NEED_KVM_DIRTY_RING_WITH_BITMAP",
    needs=[ACQ_REL],
)
def bitmap_unsupported(trial: Trial) -> None:
    """Try it, and see that there is no bitmap."""
    if trial.kvm.check_extension(WITH_BITMAP):
        trial.skip("this KVM offers the backup bitmap")
    vm = trial.vm()
    trial.errno("without a ring", lambda: enable_cap(vm, WITH_BITMAP), errno.EINVAL)
    enable_cap(vm, ACQ_REL, trial.least_entries * 16)
    trial.errno("with a ring", lambda: enable_cap(vm, WITH_BITMAP), errno.EINVAL)
    add_slot(trial, vm)
    trial.errno("KVM_GET_DIRTY_LOG", lambda: raw.get_dirty_log(vm, 0, PAGES), errno.ENXIO)


@rule(
    "enable_cap.bitmap.needs_ring",
    "the backup bitmap before a ring is EINVAL",
    source=GENERIC + ": kvm->dirty_ring_size",
    needs=[WITH_BITMAP],
)
def bitmap_needs_ring(trial: Trial) -> None:
    """Enable it first, then in order."""
    vm = trial.vm()
    trial.errno("without a ring", lambda: enable_cap(vm, WITH_BITMAP), errno.EINVAL)
    enable_cap(vm, ACQ_REL, trial.least_entries * 16)
    trial.errno("with a ring", lambda: enable_cap(vm, WITH_BITMAP), 0)


@rule(
    "enable_cap.bitmap.flags",
    "the backup bitmap with flags is EINVAL",
    source=GENERIC,
    needs=[WITH_BITMAP],
)
def bitmap_flags(trial: Trial) -> None:
    """Set each."""
    vm = trial.vm()
    enable_cap(vm, ACQ_REL, trial.least_entries * 16)
    for flags in (1, 1 << 31):
        trial.errno(
            f"flags {flags:#x}", partial(enable_cap, vm, WITH_BITMAP, flags=flags), errno.EINVAL
        )
    trial.errno("no flags", lambda: enable_cap(vm, WITH_BITMAP), 0)


@rule(
    "enable_cap.bitmap.after_slot",
    "the backup bitmap is EINVAL while any memory slot exists, logging or not, and possible again "
    "when the last is deleted",
    source=GENERIC + ": kvm_are_all_memslots_empty()",
    needs=[WITH_BITMAP],
    meaning="Enable it right after the ring, before any memory.",
)
def bitmap_after_slot(trial: Trial) -> None:
    """Try with a slot, and after its deletion."""
    for flags in (0, LOG):
        vm = ring_vm(trial)
        add_slot(trial, vm, flags=flags)
        trial.errno(
            f"with a slot of flags {flags}", partial(enable_cap, vm, WITH_BITMAP), errno.EINVAL
        )
        raw.set_region(vm, 0, RAM_GPA, 0, 0)
        trial.errno("after its deletion", partial(enable_cap, vm, WITH_BITMAP), 0)


@rule(
    "enable_cap.bitmap.repeated",
    "the backup bitmap may be enabled again, and after vCPUs were created",
    source=GENERIC,
    needs=[WITH_BITMAP],
)
def bitmap_repeated(trial: Trial) -> None:
    """Enable it after a vCPU, and twice."""
    vm = ring_vm(trial)
    vcpu = vm.create_vcpu()
    trial.errno("with a vCPU", lambda: enable_cap(vm, WITH_BITMAP), 0)
    trial.errno("again", lambda: enable_cap(vm, WITH_BITMAP), 0)
    vcpu.close()
    add_slot(trial, vm)
    trial.expect("dirty pages", raw.get_dirty_log(vm, 0, PAGES), 0)


@rule(
    "enable_cap.bitmap.effect",
    "with the backup bitmap, slots of a VM with rings have a bitmap: KVM_GET_DIRTY_LOG and "
    "KVM_CLEAR_DIRTY_LOG work, where without it they are ENXIO",
    source="virt/kvm/dirty_ring.c, kvm_use_dirty_bitmap()",
    needs=[WITH_BITMAP],
)
def bitmap_effect(trial: Trial) -> None:
    """Compare two VMs."""
    without, with_it = ring_vm(trial), ring_vm(trial)
    enable_cap(with_it, WITH_BITMAP)
    for vm, answer in ((without, errno.ENXIO), (with_it, 0)):
        add_slot(trial, vm)
        trial.errno("KVM_GET_DIRTY_LOG", partial(raw.get_dirty_log, vm, 0, PAGES), answer)
        trial.errno(
            "KVM_CLEAR_DIRTY_LOG", partial(raw.clear_dirty_log, vm, 0, 0, PAGES, ALL), answer
        )
