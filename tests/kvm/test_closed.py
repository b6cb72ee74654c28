"""The closed state: every public method of every handle raises ClosedError after close().

The methods are taken from the classes; handles.py says how each is called, and which few need
nothing of the kernel. Closing a parent closes what was made from it.
"""

from __future__ import annotations

import pytest

from kvmring import (
    VCPU,
    VM,
    Cap,
    ClosedError,
    Device,
    DirtyGfns,
    DirtyRing,
    GuestMemory,
    KvmNotSupported,
    System,
)

from ..gates import needs
from .handles import CLASSES, OTHER_ARCH, TABLE, Fixture, is_local, make, public, use
from .rig import PAGE, RingFacts

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)
MEMBERS = [(cls, name) for cls in CLASSES for name in sorted(TABLE[cls])]
# who closes whom
PARENTS: dict[type, tuple[type, ...]] = {
    System: (System,),
    VM: (VM, System),
    VCPU: (VCPU, VM, System),
    Device: (Device, VM, System),
    GuestMemory: (GuestMemory, VM, System),
    DirtyRing: (DirtyRing, VCPU, VM, System),
}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_public_member_stands_in_the_table(cls: type) -> None:
    assert public(cls) == set(TABLE[cls])


def require(fixture: Fixture, cls: type) -> None:
    if cls not in fixture.handles:
        pytest.skip("this KVM has none of the devices that the package names")


@pytest.mark.parametrize(("cls", "name"), MEMBERS)
def test_after_close(kvm: System, facts: RingFacts, cls: type, name: str) -> None:
    fixture = make(kvm, facts)
    require(fixture, cls)
    for parent in PARENTS[cls]:
        fixture.handles[parent].close()
        assert fixture.handles[cls].closed
        if is_local(cls, name):
            use(fixture, cls, name)
            continue
        allowed = KvmNotSupported if name in OTHER_ARCH else ClosedError
        with pytest.raises((ClosedError, allowed)):
            use(fixture, cls, name)


@pytest.mark.parametrize("cls", CLASSES)
def test_with_and_repr(kvm: System, facts: RingFacts, cls: type) -> None:
    """`with` closes; a closed handle says so, cannot be entered, and closes again."""
    fixture = make(kvm, facts)
    require(fixture, cls)
    handle = fixture.handles[cls]
    assert not handle.closed
    assert "closed" not in repr(handle)
    with handle as same:
        assert same is handle
        assert handle.handle is not None
    assert handle.closed
    assert repr(handle) == f"<{cls.__name__} closed>"
    with pytest.raises(ClosedError, match=f"{cls.__name__} is closed"), handle:
        pass
    handle.close()
    kvm.close()


@pytest.mark.parametrize("cls", CLASSES)
def test_closing_one_leaves_the_others(kvm: System, facts: RingFacts, cls: type) -> None:
    """What was not made from it is untouched."""
    fixture = make(kvm, facts)
    require(fixture, cls)
    fixture.handles[cls].close()
    for other, handle in fixture.handles.items():
        assert handle.closed == (cls in PARENTS[other]), other
    kvm.close()


def test_ram_of_a_vcpu_outlives_its_handle(kvm: System, facts: RingFacts) -> None:
    """Closing RAM takes no memory from the guest, nor entries from the log."""
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(facts.smallest)
        ram = vm.add_memory(0, 64 * PAGE, log_dirty=True)
        vcpu = vm.create_vcpu()
        ring = vcpu.dirty_ring
        ram.close()
        vcpu.close()
        assert ring.closed
        assert list(vm.slots) == [ram.slot]
        assert vm.harvest(DirtyGfns(1)) == 0
        assert vm.reset_dirty_rings().reset == 0
