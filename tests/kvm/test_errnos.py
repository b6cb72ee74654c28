"""System calls on the wrong handle: the kernel's errno comes through, and nothing happens.

Every function of kvmring.ioctls is called with every kind of handle that it is not for. VM and
device descriptors answer ENOTTY to what they do not know; /dev/kvm and vCPUs, and on arm64 VMs
too, answer EINVAL (virt/kvm/kvm_main.c and the architectures' defaults).
"""

from __future__ import annotations

import errno
import inspect
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvmring import (
    VCPU,
    VM,
    Cap,
    Device,
    DeviceType,
    DirtyBitmap,
    GuestMemory,
    KvmError,
    KvmNotSupported,
    System,
    abi,
    ioctls,
)
from kvmring.abi import lib
from kvmring.serving import RingServer

from ..gates import needs_kvm
from .rig import PAGE, X86, Rig, assert_usable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Fd = System | VM | VCPU | Device

pytestmark = needs_kvm()
SYSTEM, VMS, VCPUS, DEVICE = "System", "VM", "VCPU", "Device"
ONE_REG = 0x6030_0000_0010_0000


class Handles:
    """One handle of each kind."""

    def __init__(self, kvm: System) -> None:
        self.vm = kvm.create_vm()
        self.vcpu = self.vm.create_vcpu()
        self.ram = self.vm.add_memory(0, 64 * PAGE, log_dirty=True)
        self.fds: dict[str, Fd] = {SYSTEM: kvm, VMS: self.vm, VCPUS: self.vcpu}
        for kind in DeviceType:
            if self.vm.has_device(kind):
                self.fds[DEVICE] = self.vm.create_device(kind)
                break


# function -> the kinds that know it, and a call of it
TABLE: dict[str, tuple[set[str], Callable[[Fd, GuestMemory], object]]] = {
    "get_api_version": ({SYSTEM}, lambda fd, _: ioctls.get_api_version(fd)),
    "check_extension": ({SYSTEM, VMS}, lambda fd, _: ioctls.check_extension(fd, 1)),
    "get_vcpu_mmap_size": ({SYSTEM}, lambda fd, _: ioctls.get_vcpu_mmap_size(fd)),
    "create_vm": ({SYSTEM}, lambda fd, _: ioctls.create_vm(fd, 0)),
    "enable_cap": (
        {VMS, VCPUS},
        lambda fd, _: ioctls.enable_cap(fd, Cap.MANUAL_DIRTY_LOG_PROTECT2, [0]),
    ),
    "create_vcpu": ({VMS}, lambda fd, _: ioctls.create_vcpu(fd, 9)),
    "set_user_memory_region": (
        {VMS},
        lambda fd, ram: ioctls.set_user_memory_region(fd, 9, 0, 1 << 30, PAGE, ram, 0),
    ),
    "set_user_memory_region2": (
        {VMS},
        lambda fd, ram: ioctls.set_user_memory_region2(fd, 9, 0, 1 << 30, PAGE, ram, 0),
    ),
    "get_dirty_log": ({VMS}, lambda fd, _: ioctls.get_dirty_log(fd, 0, DirtyBitmap(64))),
    "clear_dirty_log": (
        {VMS},
        lambda fd, _: ioctls.clear_dirty_log(fd, 0, DirtyBitmap(64), 0, 64),
    ),
    "reset_dirty_rings": ({VMS}, lambda fd, _: ioctls.reset_dirty_rings(fd, guarded=True)),
    "create_device": ({VMS}, lambda fd, _: ioctls.create_device(fd, DeviceType.VFIO, 0)),
    "set_device_attr": (
        {VMS, VCPUS, DEVICE},
        lambda fd, _: ioctls.set_device_attr(fd, 0, 0, bytes(8)),
    ),
    # /dev/kvm has attributes to read, too, on x86 (KVM_CAP_SYS_ATTRIBUTES)
    "get_device_attr": (
        {SYSTEM, VMS, VCPUS, DEVICE},
        lambda fd, _: ioctls.get_device_attr(fd, 0, 0, bytes(8)),
    ),
    "has_device_attr": (
        {SYSTEM, VMS, VCPUS, DEVICE},
        lambda fd, _: ioctls.has_device_attr(fd, 0, 0),
    ),
    "get_stats_fd": ({VMS, VCPUS}, lambda fd, _: ioctls.get_stats_fd(fd)),
    "run": ({VCPUS}, lambda fd, _: ioctls.run(fd)),
    "run_serving": ({VCPUS}, lambda fd, _: ioctls.run_serving(fd, RingServer()._server)),
    "io_data": ({VCPUS}, lambda fd, _: ioctls.io_data(fd)),
    "get_regs": ({VCPUS}, lambda fd, _: ioctls.get_regs(fd)),
    "set_regs": ({VCPUS}, lambda fd, _: ioctls.set_regs(fd, {})),
    "get_sregs": ({VCPUS}, lambda fd, _: ioctls.get_sregs(fd)),
    "set_sregs": ({VCPUS}, lambda fd, _: ioctls.set_sregs(fd, {})),
    "get_supported_cpuid": ({SYSTEM}, lambda fd, _: ioctls.get_supported_cpuid(fd)),
    "set_cpuid2": ({VCPUS}, lambda fd, _: ioctls.set_cpuid2(fd, [])),
    "arm_preferred_target": ({VMS}, lambda fd, _: ioctls.arm_preferred_target(fd)),
    "arm_vcpu_init": ({VCPUS}, lambda fd, _: ioctls.arm_vcpu_init(fd, {})),
    # an arm64 VM takes the same number for KVM_ARM_SET_DEVICE_ADDR
    "get_one_reg": (
        {VCPUS} if X86 else {VCPUS, VMS},
        lambda fd, _: ioctls.get_one_reg(fd, ONE_REG),
    ),
    "set_one_reg": ({VCPUS}, lambda fd, _: ioctls.set_one_reg(fd, ONE_REG, bytes(8))),
    "get_reg_list": ({VCPUS}, lambda fd, _: ioctls.get_reg_list(fd)),
    "ioctl": (set(), lambda fd, _: ioctls.ioctl(fd, 0xAEFF, name="KVM_NOTHING")),
}
NO_FD = {"open_kvm", "pread", "as_dict"}  # they take a path, a statistics file, a struct


def test_the_table_has_every_function() -> None:
    functions = {
        name
        for name, function in inspect.getmembers(ioctls, inspect.isfunction)
        if function.__module__ == ioctls.__name__ and not name.startswith("_")
    }
    assert functions - NO_FD == set(TABLE)


WRONG = [
    (name, kind)
    for name, (kinds, _) in TABLE.items()
    for kind in (SYSTEM, VMS, VCPUS, DEVICE)
    if kind not in kinds
]


@pytest.mark.parametrize(("name", "kind"), WRONG)
def test_the_wrong_kind_of_handle(kvm: System, name: str, kind: str) -> None:
    _, call = TABLE[name]
    handles = Handles(kvm)
    with handles.vm:
        if kind not in handles.fds:
            pytest.skip("no device here")
        before, slots = abi.live(), dict(handles.vm.slots)
        with pytest.raises(KvmError) as caught:
            call(handles.fds[kind], handles.ram)
        if not isinstance(caught.value, KvmNotSupported):  # of the other architecture
            assert caught.value.errno in (errno.ENOTTY, errno.EINVAL), caught.value
            assert caught.value.errno == errno.ENOTTY or kind != DEVICE
            assert caught.value.ioctl.startswith("KVM_")
        assert abi.live() == before
        assert dict(handles.vm.slots) == slots
        assert kvm.api_version == 12


def test_a_handle_that_is_no_descriptor(kvm: System) -> None:
    """RAM, rings and bitmaps are other types in C; they cannot be mistaken."""
    handles = Handles(kvm)
    with handles.vm:
        for thing in (handles.ram, DirtyBitmap(1)):
            with pytest.raises(TypeError, match="kvr_obj"):
                ioctls.run(thing)
        with pytest.raises(TypeError, match="kvr_bitmap"):
            ioctls.get_dirty_log(handles.vm, 0, handles.ram)


def test_kick_and_ring_of_the_wrong_kind(kvm: System) -> None:
    """What is no ioctl answers as one: ENOTTY."""
    with kvm.create_vm() as vm:
        for handle in (kvm.handle, vm.handle):
            assert lib.kvr_kick(handle) == -errno.ENOTTY
            assert lib.kvr_running(handle) == -errno.ENOTTY
            assert lib.kvr_vcpu_ring(handle, abi.out("struct kvr_ring *")) == -errno.ENOTTY
        del handle


# EBADF: closed behind our back


@contextmanager
def closed_behind_its_back(fd: int) -> Iterator[None]:
    """Close a descriptor, and put something on its number again for its owner to close."""
    os.close(fd)
    try:
        yield
    finally:
        null = os.open("/dev/null", os.O_RDONLY)
        if null != fd:
            os.dup2(null, fd)
            os.close(null)


def bad_fd(function: Callable[[], object]) -> None:
    with pytest.raises(KvmError, match="behind kvmring's back") as caught:
        function()
    assert caught.value.errno == errno.EBADF


def test_descriptors_that_somebody_else_closed(kvm: System) -> None:
    handles = Handles(kvm)
    vm, vcpu = handles.vm, handles.vcpu
    bitmap = DirtyBitmap(64)
    with vm:
        with closed_behind_its_back(vcpu.fileno()):
            bad_fd(vcpu.run)
            bad_fd(lambda: vcpu.has_attr(0, 0))
            bad_fd(vcpu.get_reg_list)
            vcpu.kick()
        with closed_behind_its_back(vm.fileno()):
            bad_fd(lambda: vm.check_extension(1))
            bad_fd(lambda: vm.add_memory(1 << 30, PAGE))
            bad_fd(lambda: handles.ram.set_log_dirty(False))
            bad_fd(handles.ram.remove)
            bad_fd(lambda: ioctls.get_dirty_log(vm, 0, bitmap))
            bad_fd(lambda: ioctls.clear_dirty_log(vm, 0, bitmap, 0, 64))
            bad_fd(vm.create_vcpu)
            bad_fd(lambda: vm.create_device(DeviceType.VFIO))
            bad_fd(lambda: vm.has_device(DeviceType.VFIO))
            with pytest.raises(KvmError, match="EBADF"):
                ioctls.reset_dirty_rings(vm, guarded=True)
            with pytest.raises(KvmError, match="EBADF"):
                vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, [0])
        if DEVICE in handles.fds:
            device = handles.fds[DEVICE]
            assert isinstance(device, Device)
            with closed_behind_its_back(device.fileno()):
                bad_fd(lambda: device.has_attr(0, 0))
    with System() as other, closed_behind_its_back(other.fileno()):
        bad_fd(lambda: other.api_version)
        bad_fd(lambda: other.check_extension(1))
        bad_fd(other.create_vm)
    with Rig(kvm, pages=16) as rig:
        assert_usable(rig)


def test_something_else_on_the_number(kvm: System) -> None:
    """A file that is no KVM answers ENOTTY, and its owner closes just that."""
    with kvm.create_vm() as vm:
        with closed_behind_its_back(vm.fileno()):
            pass
        with pytest.raises(KvmError, match="ENOTTY"):
            vm.check_extension(1)
