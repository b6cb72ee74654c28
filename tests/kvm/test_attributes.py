"""Statistics, device attributes and devices: what KVM tells and takes beside its ioctls."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, Device, DeviceType, KvmError, System

from ..gates import needs, needs_kvm
from .rig import X86, Rig, only_arm64, only_x86

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_kvm()
TSC_CTRL, TSC_OFFSET = 0, 0  # KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET
TIMER_CTRL, TIMER_IRQ_VTIMER = 1, 0  # KVM_ARM_VCPU_TIMER_CTRL


@pytest.fixture
def device(kvm: System) -> Iterator[Device]:
    """A device of the first kind that this host knows."""
    with kvm.create_vm() as vm:
        kinds = [kind for kind in DeviceType if vm.has_device(kind)]
        if not kinds:
            pytest.skip("this KVM has none of the devices that the package names")
        yield vm.create_device(kinds[0])


@needs(Cap.BINARY_STATS_FD)
def test_statistics(kvm: System) -> None:
    """Names to numbers, or to tuples; a vCPU's exits grow by running it."""
    with Rig(kvm, pages=16) as rig:
        vcpu = rig.vm.vcpus[0]
        before = vcpu.stats()
        rig.write(rig.gpas())
        after = vcpu.stats()
        assert before.keys() == after.keys()
        old, new = before["exits"], after["exits"]
        assert isinstance(old, int)
        assert isinstance(new, int)
        assert new > old
        assert after["halt_wait_ns"] == 0
        histogram = after["halt_wait_hist"]
        assert isinstance(histogram, tuple)
        assert len(histogram) == 32
        whole = rig.vm.stats()
        assert "remote_tlb_flush" in whole
        assert "exits" not in whole
        for name, value in (*after.items(), *whole.items()):
            assert name.isidentifier()
            values = value if isinstance(value, tuple) else (value,)
            assert all(0 <= number < 1 << 63 for number in values), name


@only_x86
@needs(Cap.VCPU_ATTRIBUTES)
def test_an_attribute_of_a_vcpu(kvm: System) -> None:
    """The TSC offset: what is set is what is got; others do not exist."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        assert vcpu.has_attr(TSC_CTRL, TSC_OFFSET)
        vcpu.set_attr(TSC_CTRL, TSC_OFFSET, 1 << 40)
        kept = vcpu.get_attr(TSC_CTRL, TSC_OFFSET) != bytes(8)  # software KVMs may have none
        for value in (0, 12345678901234567, (1 << 64) - 1):
            vcpu.set_attr(TSC_CTRL, TSC_OFFSET, value)
            there = int.from_bytes(vcpu.get_attr(TSC_CTRL, TSC_OFFSET), "little")
            assert there == (value if kept else 0)
        vcpu.set_attr(TSC_CTRL, TSC_OFFSET, bytes(8))
        assert vcpu.get_attr(TSC_CTRL, TSC_OFFSET) == bytes(8)
        assert not vcpu.has_attr(TSC_CTRL, 99)
        for group, attr in ((TSC_CTRL, 99), (99, 0)):
            for use in (vcpu.get_attr, lambda g, a: vcpu.set_attr(g, a, 0)):
                with pytest.raises(KvmError) as caught:
                    use(group, attr)
                assert caught.value.errno in (errno.ENXIO, errno.EINVAL)


@only_arm64
def test_an_attribute_of_an_arm_vcpu(kvm: System) -> None:
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.arm_vcpu_init(vm.arm_preferred_target())
        assert vcpu.has_attr(TIMER_CTRL, TIMER_IRQ_VTIMER)
        assert len(vcpu.get_attr(TIMER_CTRL, TIMER_IRQ_VTIMER, 4)) == 4
        assert not vcpu.has_attr(99, 0)
        with pytest.raises(KvmError, match="ENXIO"):
            vcpu.set_attr(99, 0, 0)


def test_arguments_of_attributes(kvm: System) -> None:
    """What does not fit the kernel's struct is refused before the call."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        for group in (-1, 1 << 32):
            with pytest.raises(ValueError, match="group must lie between"):
                vcpu.has_attr(group, 0)
        for attr in (-1, 1 << 64):
            with pytest.raises(ValueError, match="attr must lie between"):
                vcpu.has_attr(0, attr)
        for value in (-1, 1 << 64, bytes(4097)):
            with pytest.raises(ValueError, match="value"):
                vcpu.set_attr(0, 0, value)
        for size in (0, -1, 4097, b"", bytes(4097)):
            with pytest.raises(ValueError, match="value"):
                vcpu.get_attr(0, 0, size)


def test_a_device(device: Device) -> None:
    """It is made of a kind that has_device() knows, and tells which it is."""
    assert isinstance(device.type, DeviceType)
    assert device.type.name in repr(device)
    assert not device.has_attr(0xFFFF, 0)
    with pytest.raises(KvmError, match="KVM_SET_DEVICE_ATTR") as caught:
        device.set_attr(0xFFFF, 0, 0)
    assert caught.value.errno == errno.ENXIO


def test_kinds_of_device(kvm: System) -> None:
    """An unknown one is ENODEV; has_device() tells beforehand, and makes nothing."""
    with kvm.create_vm() as vm:
        unknown = [1 << 31, (1 << 32) - 1]
        if X86:
            unknown += [DeviceType.ARM_VGIC_V3, DeviceType.ARM_VGIC_ITS]
        for kind in unknown:
            assert not vm.has_device(kind)
            with pytest.raises(KvmError, match="no such device") as caught:
                vm.create_device(kind)
            assert (caught.value.ioctl, caught.value.errno) == ("KVM_CREATE_DEVICE", errno.ENODEV)
        for kind in (-1, 1 << 32):
            with pytest.raises(ValueError, match="device_type must lie between"):
                vm.create_device(kind)
            with pytest.raises(ValueError, match="device_type must lie between"):
                vm.has_device(kind)


@only_arm64
def test_the_gic(kvm: System) -> None:
    with kvm.create_vm() as vm:
        if not vm.has_device(DeviceType.ARM_VGIC_V3):
            pytest.skip("no GICv3 here")
        gic = vm.create_device(DeviceType.ARM_VGIC_V3)
        assert gic.has_attr(0, 2)  # KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST
        gic.set_attr(0, 2, 0x08000000)
        assert gic.get_attr(0, 2) == (0x08000000).to_bytes(8, "little")
        with pytest.raises(KvmError, match="EEXIST"):
            vm.create_device(DeviceType.ARM_VGIC_V3)
