"""VCPU: running, the exits it ends with, answers to reads, and two threads at one vCPU."""

from __future__ import annotations

import threading
import time

import pytest

from kvmring import (
    VCPU,
    ExitReason,
    GuestError,
    KvmError,
    Regs,
    StateError,
    System,
)
from kvmring.guests.arm64 import REG_PC, REG_X0

from ..gates import needs_kvm
from .rig import PAGE, X86, Rig, assert_usable, only_x86

pytestmark = needs_kvm()
CODE = 8 * PAGE  # where the programs below are put
# load 8 bytes from the address in the first argument register, and store them back there
LOAD_STORE = (
    bytes.fromhex("488b07 488907 ebfe")
    if X86
    else b"".join(n.to_bytes(4, "little") for n in (0xF9400001, 0xF9000001, 0x14000000))
)


def doorbell(rig: Rig) -> int:
    """An address that the VM has no memory at, but the guest can reach."""
    rig.guest.load(0, [])
    address = rig.guest.run(0).phys_addr
    assert address is not None
    return address


def start(rig: Rig, program: bytes, argument: int) -> VCPU:
    """Point the vCPU at a program of ours."""
    rig.ram.write(CODE, program)
    vcpu = rig.vm.vcpus[0]
    # first let KVM finish the exit before: on arm64 that moves the program counter on
    vcpu.kick()
    assert vcpu.run().reason is ExitReason.INTR
    if X86:
        vcpu.set_regs(Regs(rip=CODE, rdi=argument))
    else:
        vcpu.set_one_reg(REG_PC, CODE)
        vcpu.set_one_reg(REG_X0, argument)
    return vcpu


def test_the_end_of_a_command(kvm: System) -> None:
    """The guest's doorbell is a write to an address without memory."""
    with Rig(kvm, pages=16) as rig:
        rig.guest.load(0, rig.gpas(0, 3))
        exit = rig.vm.vcpus[0].run()
        assert exit.reason is ExitReason.MMIO
        assert exit.is_write
        assert exit.data == (3).to_bytes(8, "little")
        assert rig.guest.is_done(exit)
        assert "KVM_EXIT_MMIO" in str(exit)


def test_a_read_is_answered(kvm: System) -> None:
    """What respond() gives is what the guest gets; only a read of that length takes it."""
    with Rig(kvm, pages=16) as rig:
        vcpu = rig.vm.vcpus[0]
        for data in (b"", bytes(4), bytes(8)):
            with pytest.raises(ValueError, match="not a read"):
                vcpu.respond(data)
        address = doorbell(rig)
        with pytest.raises(ValueError, match="not a read of 8 bytes"):
            vcpu.respond(bytes(8))  # it was a write
        vcpu = start(rig, LOAD_STORE, address)
        exit = vcpu.run()
        assert (exit.reason, exit.phys_addr) == (ExitReason.MMIO, address)
        assert exit.is_write is False
        assert exit.data == bytes(8)
        for data in (b"", bytes(7), bytes(9), bytes(4096)):
            with pytest.raises(ValueError, match=f"not a read of {len(data)} bytes"):
                vcpu.respond(data)
        with pytest.raises(TypeError):
            vcpu.respond("x")  # type: ignore[arg-type]
        vcpu.respond(b"\x01KVMRING")
        exit = vcpu.run()
        assert exit.is_write
        assert exit.data == b"\x01KVMRING"
        rig.guest.reset(0)
        assert_usable(rig)


@only_x86
def test_a_triple_fault(kvm: System) -> None:
    """An unexpected exit is GuestError with the Exit; reset() brings the guest back."""
    with Rig(kvm, pages=16) as rig:
        rig.guest.load(0, rig.gpas(0, 1))
        start(rig, b"\xf4", 0)  # hlt, which CPL 3 may not
        with pytest.raises(GuestError, match="KVM_EXIT_SHUTDOWN") as caught:
            rig.guest.run(0)
        assert caught.value.exit.reason is ExitReason.SHUTDOWN
        for _ in range(2):
            rig.guest.reset(0)
            assert_usable(rig)


def test_two_threads_at_one_vcpu(kvm: System) -> None:
    """The second is refused, and the first does not notice."""
    with Rig(kvm, pages=16) as rig:
        vcpu = rig.vm.vcpus[0]
        assert not vcpu.running
        rig.guest.load(0, rig.gpas(), rounds=0)
        runner = threading.Thread(target=rig.guest.run, args=(0,))
        runner.start()
        try:
            while not vcpu.running:
                time.sleep(0.001)
            before = rig.guest.progress(0).stores
            for _ in range(50):
                with pytest.raises(StateError, match="another thread"):
                    vcpu.run()
            while rig.guest.progress(0).stores == before:
                time.sleep(0.001)
            assert vcpu.running
        finally:
            rig.guest.stop(0)
            runner.join(60)
        assert not runner.is_alive()
        assert not vcpu.running
        assert rig.guest.progress(0).done
        assert_usable(rig)


def test_ids(kvm: System) -> None:
    """The next one by default; a number that is taken, or too large, is KVM's to refuse."""
    with kvm.create_vm() as vm:
        assert vm.create_vcpu().id == 0
        assert vm.create_vcpu().id == 1
        with pytest.raises(KvmError, match="EEXIST"):
            vm.create_vcpu(1)
        for number in (-1, 1 << 31, 1 << 70):
            with pytest.raises(ValueError, match="vcpu_id must lie between"):
                vm.create_vcpu(number)
        with pytest.raises(TypeError, match="vcpu_id must be an integer"):
            vm.create_vcpu("x")  # type: ignore[arg-type]
        with pytest.raises(KvmError, match="EINVAL"):
            vm.create_vcpu((1 << 31) - 1)
        assert [vcpu.id for vcpu in vm.vcpus] == [0, 1]
        vm.vcpus[0].close()
        with pytest.raises(KvmError, match="EEXIST"):
            vm.create_vcpu(0)


def test_a_closed_vcpu_does_not_give_its_number_to_the_next(kvm: System) -> None:
    """The next number is free even after one was chosen out of turn."""
    with kvm.create_vm() as vm:
        vm.create_vcpu(1)
        vcpu = vm.create_vcpu()
        assert vcpu.id not in (1,)
