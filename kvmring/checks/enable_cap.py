"""enable_cap.ring.* and what holds for KVM_ENABLE_CAP as such; the rest: enable_cap_bitmap.py."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.raw import LOG, Memory, enable_cap, in_child, ioctl, map_vcpu
from kvmring.checks.rules import RAM_GPA, Trial, errno_name, rule

if TYPE_CHECKING:
    from kvmring.vm import VM

RING = "virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_dirty_log_ring()"
GENERIC = "virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_cap_generic()"
ACQ_REL = Cap.DIRTY_LOG_RING_ACQ_REL
MAX_BYTES = 1 << 20
VM_CAPS = (
    Cap.DIRTY_LOG_RING,
    Cap.DIRTY_LOG_RING_ACQ_REL,
    Cap.DIRTY_LOG_RING_WITH_BITMAP,
    Cap.MANUAL_DIRTY_LOG_PROTECT2,
)


def has_ring(vm: VM) -> bool:
    """Ask the kernel whether a VM has rings: without, KVM_RESET_DIRTY_RINGS is EINVAL."""
    try:
        ioctl(vm, raw.KVM_RESET_DIRTY_RINGS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def expect_ring(trial: Trial, vm: VM, num_bytes: int) -> None:
    """Expect that a new vCPU's ring has this very size: touching what follows is SIGBUS."""
    vcpu = vm.create_vcpu()
    pages = num_bytes // trial.page_size
    ring = map_vcpu(vcpu, num_bytes + trial.page_size)
    first, last = [0, pages - 1], [pages]
    trial.expect(
        f"touching the ends of {num_bytes} bytes",
        in_child(partial(raw.touch, ring, first)),
        "success",
    )
    trial.expect("touching the page after", in_child(partial(raw.touch, ring, last)), "SIGBUS")
    ring.close()


@rule(
    "enable_cap.ring.zero",
    "a ring of 0 bytes is EINVAL",
    source=RING,
    needs=[ACQ_REL],
)
def ring_zero(trial: Trial) -> None:
    """Try it, and look for a ring."""
    vm = trial.vm()
    trial.errno("0 bytes", lambda: enable_cap(vm, ACQ_REL, 0), errno.EINVAL)
    trial.expect("whether the VM has rings", has_ring(vm), False)


@rule(
    "enable_cap.ring.power_of_two",
    "a ring's size in bytes must be a power of two, otherwise it is EINVAL, also beyond the "
    "limit, where a power of two is E2BIG",
    source=RING,
    needs=[ACQ_REL],
)
def ring_power_of_two(trial: Trial) -> None:
    """Try sizes that are none."""
    vm = trial.vm()
    for size in (1000, 6000, (1 << 17) + 16, 3 << 18, 3 << 20):
        trial.errno(f"{size} bytes", partial(enable_cap, vm, ACQ_REL, size), errno.EINVAL)
    trial.errno(f"{2 << 20} bytes", lambda: enable_cap(vm, ACQ_REL, 2 << 20), errno.E2BIG)
    trial.expect("whether the VM has rings", has_ring(vm), False)


@rule(
    "enable_cap.ring.least",
    "a ring has at least a page and more than its reserved entries: EINVAL below a least power "
    "of two, success from there to 1 MiB, E2BIG above",
    source=RING + "; dirty_ring.c, kvm_dirty_ring_get_rsvd_entries()",
    needs=[ACQ_REL],
    meaning="A VMM with a fixed small ring works without PML and fails with it: 64 entries are "
    "reserved, and with PML 512 more.",
)
def ring_least(trial: Trial) -> None:
    """Try every power of two."""
    sizes = [1 << n for n in range(4, 31)]
    answers: dict[int, int] = {}
    for size in sizes:
        try:
            enable_cap(trial.vm(), ACQ_REL, size)
        except OSError as error:
            answers[size] = error.errno or 0
        else:
            answers[size] = 0
    least = min(size for size in sizes if answers[size] == 0)
    trial.note("least ring in bytes", least)
    for size in sizes:
        expected = (
            0 if least <= size <= MAX_BYTES else errno.EINVAL if size < least else errno.E2BIG
        )
        trial.expect(f"{size} bytes", errno_name(answers[size]), errno_name(expected))
    # 64 entries reserved, and 512 for PML: 9216 bytes, so 16 KiB
    allowed = {trial.page_size, max(trial.page_size, 16384)}
    trial.expect_true(
        "the least size",
        least in allowed,
        got=least,
        rule=" or ".join(map(str, sorted(allowed))),
    )


@rule(
    "enable_cap.ring.size",
    "each vCPU's ring has exactly the bytes that were enabled",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_alloc(); kvm_main.c, kvm_page_in_dirty_ring()",
    needs=[ACQ_REL],
)
def ring_size(trial: Trial) -> None:
    """Map rings of several sizes."""
    for size in (trial.least_entries * 16, trial.least_entries * 32, MAX_BYTES):
        vm = trial.vm()
        trial.errno(f"a ring of {size} bytes", partial(enable_cap, vm, ACQ_REL, size), 0)
        expect_ring(trial, vm, size)


@rule(
    "enable_cap.ring.u32",
    "the size is taken as 32 bits: 1 << 32 is 0 and so EINVAL, and (1 << 32) + n is n",
    source=GENERIC + ": kvm_vm_ioctl_enable_dirty_log_ring(kvm, u32 size)",
    needs=[ACQ_REL],
)
def ring_u32(trial: Trial) -> None:
    """Try both."""
    vm = trial.vm()
    size = trial.least_entries * 16
    trial.errno("1 << 32 bytes", lambda: enable_cap(vm, ACQ_REL, 1 << 32), errno.EINVAL)
    big = (1 << 32) + size
    trial.errno(f"(1 << 32) + {size} bytes", lambda: enable_cap(vm, ACQ_REL, big), 0)
    expect_ring(trial, vm, size)


@rule(
    "enable_cap.ring.flags",
    "flags and args[1..3] are not looked at",
    source=GENERIC,
    needs=[ACQ_REL],
)
def ring_flags(trial: Trial) -> None:
    """Fill them."""
    vm = trial.vm()
    size = trial.least_entries * 16
    rest = (0xFFFFFFFFFFFFFFFF, 1, 12345)
    trial.errno(
        "flags 0xffffffff and further arguments",
        lambda: enable_cap(vm, ACQ_REL, size, *rest, flags=0xFFFFFFFF),
        0,
    )
    trial.expect("whether the VM has rings", has_ring(vm), True)


@rule(
    "enable_cap.ring.twice",
    "a ring is enabled once: again is EINVAL, of the same size or another",
    source=RING + ": kvm->dirty_ring_size",
    needs=[ACQ_REL],
)
def ring_twice(trial: Trial) -> None:
    """Enable it again."""
    vm = trial.vm()
    size = trial.least_entries * 16
    trial.errno("the first time", lambda: enable_cap(vm, ACQ_REL, size), 0)
    trial.errno("the same again", lambda: enable_cap(vm, ACQ_REL, size), errno.EINVAL)
    trial.errno("another size", lambda: enable_cap(vm, ACQ_REL, MAX_BYTES), errno.EINVAL)
    trial.errno("no ring", lambda: enable_cap(vm, ACQ_REL, 0), errno.EINVAL)
    expect_ring(trial, vm, size)


@rule(
    "enable_cap.ring.either_cap",
    "KVM_CAP_DIRTY_LOG_RING and KVM_CAP_DIRTY_LOG_RING_ACQ_REL give the same ring, and each "
    "refuses after the other",
    source=GENERIC,
    needs=[Cap.DIRTY_LOG_RING, ACQ_REL],
)
def ring_either_cap(trial: Trial) -> None:
    """Enable one, then the other."""
    size = trial.least_entries * 16
    for one, other in ((Cap.DIRTY_LOG_RING, ACQ_REL), (ACQ_REL, Cap.DIRTY_LOG_RING)):
        vm = trial.vm()
        trial.errno(f"KVM_CAP_{one.name}", partial(enable_cap, vm, one, size), 0)
        trial.errno(
            f"KVM_CAP_{other.name} after it", partial(enable_cap, vm, other, size), errno.EINVAL
        )
        expect_ring(trial, vm, size)


@rule(
    "enable_cap.ring.after_vcpu",
    "once a vCPU was created a ring is EINVAL, also when the vCPU's fd is closed again",
    source=RING + ": kvm->created_vcpus",
    needs=[ACQ_REL],
    meaning="A VMM must enable rings before its first vCPU, or run without them.",
)
def ring_after_vcpu(trial: Trial) -> None:
    """Create one, then close it."""
    vm = trial.vm()
    size = trial.least_entries * 16
    vcpu = vm.create_vcpu()
    trial.errno("with a vCPU", lambda: enable_cap(vm, ACQ_REL, size), errno.EINVAL)
    vcpu.close()
    trial.errno("with its fd closed", lambda: enable_cap(vm, ACQ_REL, size), errno.EINVAL)
    trial.expect("whether the VM has rings", has_ring(vm), False)


@rule(
    "enable_cap.ring.with_slots",
    "a ring may be enabled when memory slots exist; KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG of "
    "them are ENXIO from then on",
    source=RING + "; kvm_get_dirty_log_protect(): kvm_use_dirty_bitmap()",
    needs=[ACQ_REL],
)
def ring_with_slots(trial: Trial) -> None:
    """Have a logging slot first."""
    vm, memory = trial.vm(), Memory(64 * trial.page_size)
    raw.set_region(vm, 0, RAM_GPA, memory.num_bytes, memory.address, LOG)
    trial.expect("dirty pages before", raw.get_dirty_log(vm, 0, 64), 0)
    size = trial.least_entries * 16
    trial.errno("a ring after the slot", lambda: enable_cap(vm, ACQ_REL, size), 0)
    trial.errno("KVM_GET_DIRTY_LOG", lambda: raw.get_dirty_log(vm, 0, 64), errno.ENXIO)
    trial.errno("KVM_CLEAR_DIRTY_LOG", lambda: raw.clear_dirty_log(vm, 0, 0, 64, 1), errno.ENXIO)


@rule(
    "enable_cap.ring.logs_old_slots",
    "slots that existed before the ring was enabled are logged in it",
    source="virt/kvm/kvm_main.c, mark_page_dirty_in_slot()",
    needs=[ACQ_REL],
    guest=True,
    meaning="Pages of early slots would be lost.",
)
def ring_logs_old_slots(trial: Trial) -> None:
    """Write to such a slot."""
    entries = trial.least_entries
    vm = trial.vm()
    ram = trial.ram(vm, 100)
    vm.enable_dirty_ring(entries, with_bitmap=False)
    guest = trial.writer(vm)
    ring = map_vcpu(guest.vcpus[0], entries * 16)
    guest.load(0, [ram.gpa + n * trial.page_size for n in range(100)])
    trial.expect("whether the guest is done", guest.is_done(guest.run(0)), True)
    logged = sorted(entry.offset for entry in raw.entries(ring) if entry.flags == 1)
    trial.expect("pages in the ring", logged, list(range(100)))
    ring.close()


@rule(
    "enable_cap.ring.refused",
    "a refused ring leaves the VM without one, and a proper one can still be enabled",
    source=RING,
    needs=[ACQ_REL],
)
def ring_refused(trial: Trial) -> None:
    """Be refused in every way, then do it right."""
    vm = trial.vm()
    for size, answer in ((0, errno.EINVAL), (1000, errno.EINVAL), (2 << 20, errno.E2BIG)):
        trial.errno(f"{size} bytes", partial(enable_cap, vm, ACQ_REL, size), answer)
    trial.expect("whether the VM has rings", has_ring(vm), False)
    size = trial.least_entries * 16
    trial.errno(f"{size} bytes", lambda: enable_cap(vm, ACQ_REL, size), 0)
    trial.expect("whether the VM has rings", has_ring(vm), True)


@rule(
    "enable_cap.unknown",
    "a capability that the kernel does not know, or that a VM's fd does not have, is EINVAL",
    source=GENERIC + "; kvm_vm_ioctl_enable_cap() of the architecture",
)
def unknown(trial: Trial) -> None:
    """Try some."""
    vm = trial.vm()
    for cap in (0x7FFFFFFF, 60000, Cap.NR_MEMSLOTS, Cap.MULTI_ADDRESS_SPACE):
        trial.errno(f"capability {int(cap)}", partial(enable_cap, vm, cap, 1), errno.EINVAL)


@rule(
    "enable_cap.vcpu",
    "rings, the backup bitmap and manual protect are a VM's: on a vCPU's fd they are EINVAL",
    source="virt/kvm/kvm_main.c, kvm_vcpu_ioctl(); kvm_arch_vcpu_ioctl(): KVM_ENABLE_CAP",
)
def on_vcpu(trial: Trial) -> None:
    """Try them there."""
    vm = trial.vm()
    vcpu = vm.create_vcpu()
    for cap in VM_CAPS:
        trial.errno(f"KVM_CAP_{cap.name}", partial(enable_cap, vcpu, cap, 65536), errno.EINVAL)


@rule(
    "enable_cap.efault",
    "a bad pointer is EFAULT",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl(): KVM_ENABLE_CAP",
)
def efault(trial: Trial) -> None:
    """Give some."""
    vm = trial.vm()
    for address in (0, 8, 0xFF0):
        trial.errno(
            f"a struct at {address:#x}",
            partial(ioctl, vm, raw.KVM_ENABLE_CAP, address),
            errno.EFAULT,
        )
