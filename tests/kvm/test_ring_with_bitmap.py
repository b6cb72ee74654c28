"""The ring with its backup bitmap (arm64): the order of enabling, and what each of them holds.

What vCPUs write goes to their rings; the bitmap is for what is dirtied outside any vCPU, so
here, where only vCPUs write, it stays empty.
"""

from __future__ import annotations

import errno

import pytest

from kvmring import Cap, DirtyBitmap, DirtySet, KvmError, StateError, System

from ..gates import needs
from .rig import ENTRY_BYTES, PAGE, Rig, RingFacts, assert_exact

WITH_BITMAP = Cap.DIRTY_LOG_RING_WITH_BITMAP
pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL, WITH_BITMAP)


def refused(number: int, vm_cap: tuple[object, list[int]]) -> None:
    vm, args = vm_cap
    with pytest.raises(KvmError) as caught:
        vm.enable_cap(WITH_BITMAP, args)  # type: ignore[attr-defined]
    assert caught.value.errno == number


def test_it_is_enabled_by_default(kvm: System, facts: RingFacts) -> None:
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(facts.smallest)
        assert vm.with_bitmap
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(facts.smallest, with_bitmap=True)
        assert vm.with_bitmap
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(facts.smallest, with_bitmap=False)
        assert not vm.with_bitmap


def test_vcpus_write_to_their_rings(kvm: System, facts: RingFacts) -> None:
    """GET works at any time, and has nothing of theirs."""
    pages = 2 * facts.smallest
    with Rig(kvm, entries=facts.smallest, pages=pages) as rig:
        dirty = DirtySet(rig.vm)
        rig.guest.load(0, rig.gpas(order="random"))
        assert rig.collect(dirty)
        assert not rig.vm.get_dirty_log(rig.ram.slot)
        assert_exact(rig.gpas(), dirty.gpas())
        rig.assert_memory()


def test_get_and_clear_between_harvests_take_nothing(kvm: System, facts: RingFacts) -> None:
    with Rig(kvm, entries=facts.smallest, pages=64) as rig:
        slot, everything = rig.ram.slot, DirtyBitmap(64)
        everything.set(0, num_pages=64)
        rig.write(rig.gpas(0, 32))
        assert not rig.vm.get_dirty_log(slot)
        rig.vm.clear_dirty_log(slot, everything)
        rig.write(rig.gpas(32, 32))
        dirty = DirtySet(rig.vm)
        assert rig.vm.harvest(dirty) == 64
        assert_exact(rig.gpas(), dirty.gpas())
        dirty.add(slot, rig.vm.get_dirty_log(slot))
        assert dirty.count() == 64
        rig.vm.reset_dirty_rings()
        rig.write(rig.gpas(0, 5))
        assert rig.vm.harvest(dirty) == 5


def test_the_ring_comes_first(kvm: System, facts: RingFacts) -> None:
    with kvm.create_vm() as vm:
        refused(errno.EINVAL, (vm, []))
        vm.enable_cap(Cap.DIRTY_LOG_RING_ACQ_REL, [facts.smallest * ENTRY_BYTES])
        vm.enable_cap(WITH_BITMAP)
        vm.enable_cap(WITH_BITMAP)
        assert vm.with_bitmap


def test_slots_come_after_it(kvm: System, facts: RingFacts) -> None:
    """The kernel says EINVAL; the package says what should have come first."""
    with kvm.create_vm() as vm:
        ram = vm.add_memory(0, PAGE)
        for with_bitmap in (True, None):
            with pytest.raises(StateError, match="a memory slot exists"):
                vm.enable_dirty_ring(facts.smallest, with_bitmap=with_bitmap)
        assert vm.ring_entries == 0
        vm.enable_cap(Cap.DIRTY_LOG_RING_ACQ_REL, [facts.smallest * ENTRY_BYTES])
        refused(errno.EINVAL, (vm, []))
        assert not vm.with_bitmap
        ram.remove()
        vm.enable_cap(WITH_BITMAP)
        assert vm.with_bitmap


def test_vcpus_may_come_before_it(kvm: System, facts: RingFacts) -> None:
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(facts.smallest, with_bitmap=False)
        assert vm.create_vcpu().has_dirty_ring
        vm.enable_cap(WITH_BITMAP)
        slot = vm.add_memory(0, 64 * PAGE, log_dirty=True).slot
        assert not vm.get_dirty_log(slot)
