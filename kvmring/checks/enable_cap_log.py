"""enable_cap.bitmap.* and enable_cap.manual.*: the backup bitmap, and manual protect.

What manual protect then does to KVM_GET_DIRTY_LOG is in manual_protect.py; here is when it can
be enabled, and that it takes effect at once.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.raw import LOG, Memory, enable_cap, map_vcpu
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


# Manual protect


@rule(
    "enable_cap.manual.values",
    "manual protect takes 0, 1 and, where offered, 3: INITIALLY_SET (2) alone and unknown bits "
    "are EINVAL",
    source=GENERIC + ": KVM_DIRTY_LOG_MANUAL_CAPS",
    needs=[MANUAL],
)
def manual_values(trial: Trial) -> None:
    """Try each, and high bits."""
    vm = trial.vm()
    offered = vm.check_extension(MANUAL)
    for value in (0, 1, 2, 3, 4, 5, 6, 7, 8, 1 << 31, 1 << 32 | 1, 1 << 63):
        answer = 0 if value in (0, 1, offered) else errno.EINVAL
        trial.errno(f"manual protect {value:#x}", partial(enable_cap, vm, MANUAL, value), answer)


@rule(
    "enable_cap.manual.flags",
    "manual protect with flags is EINVAL; args[1..3] are not looked at",
    source=GENERIC,
    needs=[MANUAL],
)
def manual_flags(trial: Trial) -> None:
    """Set some."""
    vm = trial.vm()
    for flags in (1, 1 << 31):
        trial.errno(
            f"flags {flags:#x}", partial(enable_cap, vm, MANUAL, 1, flags=flags), errno.EINVAL
        )
    trial.errno("further arguments", lambda: enable_cap(vm, MANUAL, 1, 7, 7, 7), 0)


@rule(
    "enable_cap.manual.any_time",
    "manual protect can be changed at any time, with slots and vCPUs, back to 0 too",
    source=GENERIC,
    needs=[MANUAL],
)
def manual_any_time(trial: Trial) -> None:
    """Change it all along."""
    vm = trial.vm()
    trial.errno("in an empty VM", lambda: enable_cap(vm, MANUAL, 1), 0)
    add_slot(trial, vm)
    trial.errno("with a slot, back to 0", lambda: enable_cap(vm, MANUAL, 0), 0)
    vcpu = vm.create_vcpu()
    trial.errno("with a vCPU", lambda: enable_cap(vm, MANUAL, 1), 0)
    trial.errno("with both, back to 0", lambda: enable_cap(vm, MANUAL, 0), 0)
    vcpu.close()


def initially_set(trial: Trial) -> VM:
    """Make a VM with manual protect 3, whose new bitmaps are all ones."""
    if trial.kvm.check_extension(MANUAL) != 3:
        trial.skip("this KVM has no KVM_DIRTY_LOG_INITIALLY_SET")
    vm = trial.vm()
    enable_cap(vm, MANUAL, 3)
    return vm


@rule(
    "enable_cap.manual.at_once",
    "a change of manual protect counts from the next KVM_GET_DIRTY_LOG on, for bitmaps that "
    "exist: with it bits stay, without they are cleared",
    source="virt/kvm/kvm_main.c, kvm_get_dirty_log_protect(): kvm->manual_dirty_log_protect",
    needs=[MANUAL],
    meaning="Bits that a VMM expects to keep until KVM_CLEAR_DIRTY_LOG would be gone.",
)
def manual_at_once(trial: Trial) -> None:
    """Fetch a bitmap of ones again and again, changing it between."""
    vm = initially_set(trial)
    add_slot(trial, vm)
    trial.expect("the first GET", raw.get_dirty_log(vm, 0, PAGES), ALL)
    trial.expect("the second GET", raw.get_dirty_log(vm, 0, PAGES), ALL)
    enable_cap(vm, MANUAL, 1)
    trial.expect("with 1", raw.get_dirty_log(vm, 0, PAGES), ALL)
    enable_cap(vm, MANUAL, 0)
    trial.expect("with 0, which clears", raw.get_dirty_log(vm, 0, PAGES), ALL)
    trial.expect("after it", raw.get_dirty_log(vm, 0, PAGES), 0)


@rule(
    "enable_cap.manual.new_bitmaps",
    "INITIALLY_SET counts for bitmaps that are made while it is set: slots that log already, and "
    "those of later, are not touched",
    source="virt/kvm/kvm_main.c, kvm_prepare_memory_region(): "
    "kvm_dirty_log_manual_protect_and_init_set()",
    needs=[MANUAL],
)
def manual_new_bitmaps(trial: Trial) -> None:
    """Make slots before, meanwhile and after."""
    if trial.kvm.check_extension(MANUAL) != 3:
        trial.skip("this KVM has no KVM_DIRTY_LOG_INITIALLY_SET")
    vm = trial.vm()
    for slot, value in enumerate((1, 3, 1, 0)):
        enable_cap(vm, MANUAL, value)
        add_slot(trial, vm, slot)
    for slot, expected in enumerate((0, ALL, 0, 0)):
        trial.expect(f"slot {slot}", raw.get_dirty_log(vm, slot, PAGES), expected)


@rule(
    "enable_cap.manual.with_ring",
    "manual protect 1 together with a ring changes nothing: pages mapped before logging began "
    "are logged in the ring",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_cap_generic(); "
    "kvm_dirty_log_manual_protect_and_init_set()",
    needs=[MANUAL, ACQ_REL],
    guest=True,
    meaning="Pages that a guest had written before migration began would be lost. With 3 they "
    "are: never combine INITIALLY_SET with a ring.",
)
def manual_with_ring(trial: Trial) -> None:
    """Write, begin to log, write again."""
    entries = trial.least_entries
    vm = trial.vm(ring=entries, with_bitmap=False)
    trial.errno("manual protect 1", lambda: enable_cap(vm, MANUAL, 1), 0)
    ram = trial.ram(vm, PAGES, log=False)
    guest = trial.writer(vm)
    ring = map_vcpu(guest.vcpus[0], entries * 16)
    for log, expected in ((False, []), (True, list(range(PAGES)))):
        ram.set_log_dirty(log)
        guest.load(0, [ram.gpa + n * trial.page_size for n in range(PAGES)])
        trial.expect("whether the guest is done", guest.is_done(guest.run(0)), True)
        logged = sorted(entry.offset for entry in raw.entries(ring) if entry.flags)
        trial.expect(f"pages in the ring, logging {log}", logged, expected)
    ring.close()
