"""KVM_ENABLE_CAP for dirty logging: what the kernel takes, and what the package refuses first.

The raw level (ioctls.enable_cap) shows the kernel's own rules and errnos; enable_dirty_ring()
says them in words before anything happened. After each refusal the VM runs its guest.
"""

from __future__ import annotations

import errno
import os

import pytest

from kvmring import Cap, KvmError, KvmNotSupported, StateError, System, ioctls

from ..gates import has, needs, needs_kvm
from .rig import ENTRY_BYTES, PAGE, Rig, RingFacts, assert_exact, assert_usable, skip_with

RING = needs(Cap.DIRTY_LOG_RING_ACQ_REL)
MANUAL = Cap.MANUAL_DIRTY_LOG_PROTECT2
OBSOLETE_MANUAL = 166


def ring_caps() -> list[Cap]:
    """The capabilities of a ring that this host has; the first exists on x86 alone."""
    return [c for c in (Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_ACQ_REL) if has(c)]


def refused(vm: object, cap: int, args: list[int], number: int, flags: int = 0) -> None:
    """Expect the kernel to refuse a capability with an errno."""
    with pytest.raises(KvmError) as caught:
        ioctls.enable_cap(vm, cap, args, flags=flags)  # type: ignore[arg-type]
    assert (caught.value.ioctl, caught.value.errno) == ("KVM_ENABLE_CAP", number), args


# What KVM says of itself


@needs_kvm()
def test_answers_on_both_handles(kvm: System) -> None:
    """Sizes are bytes; system and VM agree on dirty logging; an unknown number is 0."""
    with kvm.create_vm() as vm:
        for cap in (Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING_WITH_BITMAP, MANUAL):
            assert kvm.check_extension(cap) == vm.check_extension(cap)
        assert kvm.check_extension((1 << 31) - 1) == 0
        assert kvm.check_extension(OBSOLETE_MANUAL) == 0
        assert vm.check_extension(Cap.NR_MEMSLOTS) > 1
    assert kvm.api_version == 12
    assert kvm.get_vcpu_mmap_size() >= PAGE


@needs_kvm()
@pytest.mark.parametrize("cap", [-1, 1 << 31, 1 << 70])
def test_capability_numbers_out_of_range(kvm: System, cap: int) -> None:
    with kvm.create_vm() as vm:
        for handle in (kvm, vm):
            with pytest.raises(ValueError, match="cap must lie between"):
                handle.check_extension(cap)
            with pytest.raises(TypeError, match="cap must be an integer"):
                handle.check_extension("ring")  # type: ignore[arg-type]


# The kernel's rules for rings


@RING
def test_sizes_that_the_kernel_takes(kvm: System, facts: RingFacts) -> None:
    """Every power of two from the smallest to the largest, through either capability."""
    assert facts.smallest * ENTRY_BYTES >= PAGE
    assert facts.largest == 65536
    entries = facts.smallest
    while entries <= facts.largest:
        for cap in ring_caps():
            with kvm.create_vm() as vm:
                ioctls.enable_cap(vm, cap, [entries * ENTRY_BYTES])
                assert vm.ring_entries == entries
                assert vm.create_vcpu().dirty_ring.entries == entries
        entries *= 2


@RING
def test_sizes_that_the_kernel_refuses(kvm: System, facts: RingFacts) -> None:
    least, most = facts.smallest * ENTRY_BYTES, facts.largest * ENTRY_BYTES
    with kvm.create_vm() as vm:
        for cap in ring_caps():
            for size in (0, 1, 1000, 6000, 3 * most, least // 2, least + ENTRY_BYTES, 1 << 32):
                refused(vm, cap, [size], errno.EINVAL)
            for size in (2 * most, 1 << 31):
                refused(vm, cap, [size], errno.E2BIG)
        assert vm.ring_entries == 0


@RING
def test_the_kernel_sees_32_bits_of_the_size(kvm: System, facts: RingFacts) -> None:
    """What the kernel made of it is what is mapped."""
    with kvm.create_vm() as vm:
        ioctls.enable_cap(
            vm, Cap.DIRTY_LOG_RING_ACQ_REL, [(1 << 32) + facts.smallest * ENTRY_BYTES]
        )
        assert vm.ring_entries == facts.smallest
        assert vm.create_vcpu().dirty_ring.entries == facts.smallest


@RING
def test_a_ring_is_enabled_once(kvm: System, facts: RingFacts) -> None:
    size = facts.smallest * ENTRY_BYTES
    for first in ring_caps():
        with kvm.create_vm() as vm:
            ioctls.enable_cap(vm, first, [size])
            for second in ring_caps():
                refused(vm, second, [size], errno.EINVAL)
                refused(vm, second, [2 * size], errno.EINVAL)
            assert vm.ring_entries == facts.smallest


@RING
@pytest.mark.parametrize("closed", [False, True])
def test_the_kernel_wants_the_ring_before_any_vcpu(
    kvm: System, facts: RingFacts, closed: bool
) -> None:
    """Even one whose handle is closed."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        if closed:
            vcpu.close()
        for cap in ring_caps():
            refused(vm, cap, [facts.smallest * ENTRY_BYTES], errno.EINVAL)
        assert vm.ring_entries == 0


@RING
def test_the_bitmap_where_there_is_none(kvm: System, facts: RingFacts) -> None:
    skip_with(Cap.DIRTY_LOG_RING_WITH_BITMAP)
    with kvm.create_vm() as vm:
        refused(vm, Cap.DIRTY_LOG_RING_WITH_BITMAP, [], errno.EINVAL)
        vm.enable_dirty_ring(facts.smallest)
        assert not vm.with_bitmap
        refused(vm, Cap.DIRTY_LOG_RING_WITH_BITMAP, [], errno.EINVAL)
        assert not vm.with_bitmap


@needs(MANUAL)
def test_manual_protect(kvm: System) -> None:
    """0 and 1, and 3 where both bits are offered; nothing else, and no flags."""
    offered = kvm.check_extension(MANUAL)
    assert offered in (1, 3)
    with kvm.create_vm() as vm:
        for value in (1, 0, *((3,) if offered == 3 else ()), 0):
            ioctls.enable_cap(vm, MANUAL, [value])
        for value in (2, 4, 5, 1 << 32, (1 << 32) + 1):
            refused(vm, MANUAL, [value], errno.EINVAL)
        refused(vm, MANUAL, [1], errno.EINVAL, flags=1)
        refused(vm, OBSOLETE_MANUAL, [1], errno.EINVAL)
        refused(vm, (1 << 32) - 1, [], errno.EINVAL)


# The package's own refusals


@RING
@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        (0, ValueError, "power of two"),
        (1000, ValueError, "power of two, not 1000; nearest: 512 or 1024"),
        (1 << 20, ValueError, "at most 65536"),
        (-1, ValueError, "power of two"),
        (-4096, ValueError, "power of two"),
        (1 << 63, ValueError, "at most 65536"),
        (1 << 70, ValueError, "entries must lie between"),
        (-(1 << 70), ValueError, "entries must lie between"),
        (1, ValueError, "at least"),
        (PAGE // ENTRY_BYTES // 2, ValueError, "at least"),
        ("x", TypeError, "entries must be an integer, not str"),
        (None, TypeError, "entries must be an integer, not NoneType"),
        (4096.0, TypeError, "entries must be an integer, not float"),
    ],
)
def test_sizes_that_are_refused_in_words(
    kvm: System, facts: RingFacts, entries: int, error: type[Exception], message: str
) -> None:
    with kvm.create_vm() as vm:
        with pytest.raises(error, match=message):
            vm.enable_dirty_ring(entries)
        assert vm.ring_entries == 0
        vm.enable_dirty_ring(facts.smallest)
        assert vm.create_vcpu().dirty_ring.entries == facts.smallest


@RING
def test_a_size_that_only_the_kernel_refuses(kvm: System, facts: RingFacts) -> None:
    """Below its minimum (PML's 512 more) it is the kernel that says no."""
    below = facts.smallest // 2
    if below * ENTRY_BYTES < PAGE:
        pytest.skip("the smallest ring here is a page")
    with kvm.create_vm() as vm:
        with pytest.raises(KvmError) as caught:
            vm.enable_dirty_ring(below)
        assert caught.value.errno == errno.EINVAL
        assert vm.ring_entries == 0


@RING
def test_after_a_vcpu(kvm: System, facts: RingFacts) -> None:
    with Rig(kvm, pages=16) as rig:
        fds = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StateError, match="comes before the first"):
            rig.vm.enable_dirty_ring(facts.smallest, with_bitmap=False)
        assert rig.vm.ring_entries == 0
        assert_usable(rig)
        assert len(os.listdir("/proc/self/fd")) == fds


@RING
def test_twice(kvm: System, facts: RingFacts) -> None:
    with Rig(kvm, entries=facts.smallest, pages=16) as rig:
        for entries in (facts.smallest, 2 * facts.smallest):
            with pytest.raises(StateError, match=f"ring of {facts.smallest} entries already"):
                rig.vm.enable_dirty_ring(entries)
        assert rig.vm.ring_entries == facts.smallest
        assert_usable(rig)


@RING
def test_with_bitmap_where_there_is_none(kvm: System, facts: RingFacts) -> None:
    skip_with(Cap.DIRTY_LOG_RING_WITH_BITMAP)
    with kvm.create_vm() as vm:
        with pytest.raises(KvmNotSupported, match="KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP") as caught:
            vm.enable_dirty_ring(facts.smallest, with_bitmap=True)
        assert caught.value.cap == "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP"
        assert vm.ring_entries == 0
        vm.enable_dirty_ring(facts.smallest, with_bitmap=False)
        assert vm.ring_entries == facts.smallest


@RING
@needs(MANUAL)
def test_initially_set_after_a_ring(kvm: System, facts: RingFacts) -> None:
    """The two together lose pages; the ring that was there works on."""
    with Rig(kvm, entries=facts.smallest, pages=16) as rig:
        with pytest.raises(StateError, match="INITIALLY_SET"):
            rig.vm.enable_cap(MANUAL, [3])
        rig.vm.enable_cap(MANUAL, [1])
        assert_usable(rig)


@RING
@needs(MANUAL)
def test_a_ring_after_initially_set(kvm: System, facts: RingFacts) -> None:
    """Also by the raw capability; taken back, the ring may come."""
    with kvm.create_vm() as vm:
        if kvm.check_extension(MANUAL) != 3:
            pytest.skip("INITIALLY_SET is not offered")
        vm.enable_cap(MANUAL, [3])
        with pytest.raises(StateError, match="INITIALLY_SET"):
            vm.enable_dirty_ring(facts.smallest)
        for cap in ring_caps():
            with pytest.raises(StateError, match="INITIALLY_SET"):
                vm.enable_cap(cap, [facts.smallest * ENTRY_BYTES])
        assert vm.ring_entries == 0
        vm.enable_cap(MANUAL, [0])
        vm.enable_dirty_ring(facts.smallest)
        assert vm.ring_entries == facts.smallest


@needs_kvm()
def test_arguments_of_enable_cap(kvm: System) -> None:
    """What does not fit the kernel's struct is refused before the call."""
    with Rig(kvm, pages=16) as rig:
        vm = rig.vm
        for cap in (-1, 1 << 32):
            with pytest.raises(ValueError, match="cap must lie between"):
                vm.enable_cap(cap)
        for argument in (-1, 1 << 64):
            with pytest.raises(ValueError, match="argument must lie between"):
                vm.enable_cap(MANUAL, [argument])
        with pytest.raises(ValueError, match="at most 4"):
            vm.enable_cap(MANUAL, [0, 0, 0, 0, 0])
        with pytest.raises(TypeError, match="argument must be an integer"):
            vm.enable_cap(MANUAL, ["x"])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="flags must lie between"):
            vm.enable_cap(MANUAL, [0], flags=-1)
        with pytest.raises(KvmError, match=r"KVM_ENABLE_CAP: Invalid argument \[EINVAL\]"):
            vm.enable_cap((1 << 32) - 1)
        assert_usable(rig)


@RING
def test_pages_are_exact_after_every_refusal(kvm: System, facts: RingFacts) -> None:
    """One VM, refused everything there is to refuse, logs what its guest writes."""
    with Rig(kvm, entries=facts.smallest, pages=16) as rig:
        fds = sorted(os.listdir("/proc/self/fd"))
        for entries in (0, 1000, 1 << 20, -1, 1 << 70, "x", None, facts.smallest):
            with pytest.raises((ValueError, TypeError, StateError)):
                rig.vm.enable_dirty_ring(entries)  # type: ignore[arg-type]
        assert sorted(os.listdir("/proc/self/fd")) == fds
        for _ in range(3):
            assert_usable(rig)
        assert_exact(rig.gpas(0, 8), rig.guest.written(0))
