"""Registers: what is set is what is got, and what does not fit is refused before the call."""

from __future__ import annotations

import errno
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import pytest

from kvmring import VCPU, KvmError, KvmNotSupported, Regs, System
from kvmring.guests.arm64 import REG_PC, REG_X0

from ..gates import needs_kvm
from .rig import only_arm64, only_x86

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_kvm()


@pytest.fixture
def vcpu(kvm: System) -> Iterator[VCPU]:
    """A vCPU that knows nothing yet."""
    with kvm.create_vm() as vm:
        yield vm.create_vcpu()


@only_x86
def test_general_registers(vcpu: VCPU) -> None:
    values = {f.name: 0x1111_0000_0000_0000 + i for i, f in enumerate(fields(Regs))}
    regs = replace(Regs(**values), rflags=0x202, rsp=(1 << 64) - 8, rip=0x1234)
    vcpu.set_regs(regs)
    assert vcpu.get_regs() == regs


@only_x86
@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_general_registers_out_of_range(vcpu: VCPU, value: int) -> None:
    before = vcpu.get_regs()
    with pytest.raises(ValueError, match="rax must lie between"):
        vcpu.set_regs(Regs(rax=value))
    with pytest.raises(TypeError, match="takes Regs"):
        vcpu.set_regs({"rax": 0})  # type: ignore[arg-type]
    assert vcpu.get_regs() == before


@only_x86
def test_system_registers(kvm: System, vcpu: VCPU) -> None:
    vcpu.set_cpuid2(kvm.get_supported_cpuid())
    sregs = vcpu.get_sregs()
    changed = replace(
        sregs,
        ds=replace(sregs.ds, base=0x12340, selector=0x1234),
        idt=replace(sregs.idt, base=0x5000, limit=0x1FF),
        cr2=0xDEAD000,
    )
    vcpu.set_sregs(changed)
    assert vcpu.get_sregs() == changed
    with pytest.raises(ValueError, match="does not fit"):
        vcpu.set_sregs(replace(sregs, cs=replace(sregs.cs, selector=1 << 16)))
    with pytest.raises(ValueError, match="does not fit"):
        vcpu.set_sregs(replace(sregs, cr3=-1))
    with pytest.raises(TypeError, match="takes Sregs"):
        vcpu.set_sregs(vcpu.get_regs())  # type: ignore[arg-type]
    assert vcpu.get_sregs() == changed


@only_x86
def test_system_registers_that_contradict_each_other(kvm: System, vcpu: VCPU) -> None:
    """Paging without protection: the kernel's EINVAL, with a hint."""
    vcpu.set_cpuid2(kvm.get_supported_cpuid())
    with pytest.raises(KvmError, match="contradict each other") as caught:
        vcpu.set_sregs(replace(vcpu.get_sregs(), cr0=0x80000000, efer=0x500))
    assert (caught.value.ioctl, caught.value.errno) == ("KVM_SET_SREGS", errno.EINVAL)


@only_x86
def test_cpuid(kvm: System, vcpu: VCPU) -> None:
    entries = kvm.get_supported_cpuid()
    assert any(entry.function == 0 for entry in entries)
    vcpu.set_cpuid2(entries)
    vcpu.set_cpuid2(entries)


@only_x86
def test_what_only_arm64_has(kvm: System, vcpu: VCPU) -> None:
    with kvm.create_vm() as vm, pytest.raises(KvmNotSupported):
        vm.arm_preferred_target()
    with pytest.raises(KvmNotSupported):
        vcpu.arm_vcpu_init(0)


@only_arm64
def test_one_reg(kvm: System) -> None:
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.arm_vcpu_init(vm.arm_preferred_target())
        ids = vcpu.get_reg_list()
        assert len(ids) == len(set(ids)) > 30
        assert {REG_PC, REG_X0} <= set(ids)
        for value in (0, 1, (1 << 64) - 1, 0x0123456789ABCDEF):
            vcpu.set_one_reg(REG_X0, value)
            assert vcpu.get_one_reg(REG_X0) == value
        for value in (-1, 1 << 64):
            with pytest.raises(ValueError, match="value must lie between"):
                vcpu.set_one_reg(REG_X0, value)
        assert vcpu.get_one_reg(REG_X0) == 0x0123456789ABCDEF
        with pytest.raises(KvmError) as caught:
            vcpu.get_one_reg(REG_X0 | 0xFFFF)
        assert caught.value.errno in (errno.ENOENT, errno.EINVAL)


@only_arm64
def test_what_only_x86_has(kvm: System, vcpu: VCPU) -> None:
    with pytest.raises(KvmNotSupported):
        kvm.get_supported_cpuid()
    with pytest.raises(KvmNotSupported):
        vcpu.get_regs()
    with pytest.raises(KvmNotSupported):
        vcpu.get_sregs()
    with pytest.raises(KvmNotSupported):
        vcpu.set_regs(Regs())


@only_arm64
def test_running_without_vcpu_init(vcpu: VCPU) -> None:
    """ENOEXEC, and a hint at what should have come first."""
    with pytest.raises(KvmError, match="KVM_ARM_VCPU_INIT") as caught:
        vcpu.run()
    assert caught.value.errno == errno.ENOEXEC


@pytest.mark.parametrize("reg_id", [-1, 1 << 64])
def test_register_ids_out_of_range(vcpu: VCPU, reg_id: int) -> None:
    with pytest.raises(ValueError, match="reg_id must lie between"):
        vcpu.get_one_reg(reg_id)
    with pytest.raises(ValueError, match="reg_id must lie between"):
        vcpu.set_one_reg(reg_id, 0)


def test_features_of_vcpu_init(vcpu: VCPU) -> None:
    with pytest.raises(ValueError, match="at most 7"):
        vcpu.arm_vcpu_init(0, [0] * 8)
    for word in (-1, 1 << 32):
        with pytest.raises(ValueError, match="feature word must lie between"):
            vcpu.arm_vcpu_init(0, [word])
        with pytest.raises(ValueError, match="target must lie between"):
            vcpu.arm_vcpu_init(word)
