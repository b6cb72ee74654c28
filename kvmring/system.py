"""System: /dev/kvm itself. What KVM offers, and the door to everything else."""

from __future__ import annotations

import errno
import os
import weakref
from typing import TYPE_CHECKING

from kvmring import ioctls
from kvmring.device import U32, U64, KvmFd
from kvmring.errors import KvmError, KvmUnavailable, int_between
from kvmring.registers import CpuidEntry
from kvmring.vm import VM

if TYPE_CHECKING:
    from kvmring._kvm import Obj
    from kvmring.abi import Cap

__all__ = ["System"]

_REMEDY = {
    errno.ENOENT: (
        "no such device: load the module that fits the CPU (kvm_intel, kvm_amd), turn "
        "virtualisation on in the firmware, or, in a VM, allow nested virtualisation"
    ),
    errno.EACCES: "no permission: join the group that owns it (usually kvm), or run as root",
    errno.ENOTTY: "it is not KVM: name the KVM device, usually /dev/kvm",
    errno.EPROTO: "its API version is not 12: this is no KVM that this package knows",
}
for _number in (errno.ENODEV, errno.ENXIO):
    _REMEDY[_number] = (
        "the device is there but KVM is not: load the module that fits the CPU, or turn "
        "virtualisation on in the firmware"
    )
_REMEDY[errno.EPERM] = _REMEDY[errno.EACCES]


def _open(path: str) -> Obj:
    try:
        handle: Obj = ioctls.open_kvm(os.fsencode(path))
    except KvmError as error:
        number = error.errno or 0
        if number == errno.EISDIR:
            number = errno.ENOTTY
        raise KvmUnavailable(number, path, _REMEDY.get(number, "")) from None
    return handle


class System(KvmFd):
    """The KVM subsystem.

    Args:
        path: The device.

    Raises:
        KvmUnavailable: It cannot be opened, or is not KVM; the hint says what to do.

    Lifetime: VMs live on when it is only dropped; close() closes those that are still open.
    """

    __slots__ = ("_vms", "path")

    def __init__(self, path: str | bytes | os.PathLike[str] = "/dev/kvm") -> None:
        self.path = os.fsdecode(path)
        if "\0" in self.path:
            raise ValueError("path must not contain a NUL character")
        super().__init__(_open(self.path))
        self._vms: weakref.WeakSet[VM] = weakref.WeakSet()

    def _about(self) -> str:
        return self.path

    def close(self) -> None:
        """Close the system and the VMs made from it."""
        for vm in tuple(getattr(self, "_vms", ())):
            vm.close()
        super().close()

    @property
    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""
        return ioctls.get_api_version(self)

    def check_extension(self, cap: Cap | int) -> int:
        """Ask KVM about a capability: the value as KVM gives it, 0 for "no".

        Ioctl: KVM_CHECK_EXTENSION on /dev/kvm. DIRTY_LOG_RING and DIRTY_LOG_RING_ACQ_REL
        answer with the largest ring in bytes.

        Raises:
            KvmError: The call failed; that is never taken for "no".
        """
        return ioctls.check_extension(self, int_between("cap", cap, 0, U32 >> 1))

    def create_vm(self, vm_type: int = 0) -> VM:
        """Create a VM.

        Ioctl: KVM_CREATE_VM.

        Args:
            vm_type: 0 for the default; on arm64 the bits of the physical address size, on x86
                one of KVM_CAP_VM_TYPES.

        Raises:
            KvmError: EINVAL, no such type; EMFILE, too many open files; ENOMEM.
        """
        vm = VM(ioctls.create_vm(self, int_between("vm_type", vm_type, 0, U64 >> 1)))
        self._vms.add(vm)
        return vm

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """List what VCPU.set_cpuid2() may be given. Ioctl: KVM_GET_SUPPORTED_CPUID, x86-64."""
        return [CpuidEntry.from_struct(entry) for entry in ioctls.get_supported_cpuid(self)]

    def get_vcpu_mmap_size(self) -> int:
        """Return the bytes of kvm_run and what follows it. Ioctl: KVM_GET_VCPU_MMAP_SIZE."""
        return ioctls.get_vcpu_mmap_size(self)
