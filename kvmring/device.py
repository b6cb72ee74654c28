"""Device: a device of KVM's own, and the attributes that devices, VMs and vCPUs have."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmring import ioctls
from kvmring.abi import DeviceType, lib
from kvmring.errors import KvmError, int_between
from kvmring.owned import Owned

if TYPE_CHECKING:
    from kvmring._kvm import Obj

__all__ = ["Attributes", "Device", "KvmFd"]

U32, U64 = (1 << 32) - 1, (1 << 64) - 1


class KvmFd(Owned["Obj"]):
    """A handle that is a file descriptor of KVM."""

    __slots__ = ()

    def fileno(self) -> int:
        """Return the descriptor, to be polled or looked up; never close it."""
        return lib.kvr_fileno(self.handle)


class Attributes(KvmFd):
    """KVM_{SET,GET,HAS}_DEVICE_ATTR, which devices, VMs and vCPUs share."""

    __slots__ = ()

    def set_attr(self, group: int, attr: int, value: bytes | int = b"") -> None:
        """Set an attribute.

        Ioctl: KVM_SET_DEVICE_ATTR.

        Args:
            group: Group, 32 bits.
            attr: Attribute, 64 bits.
            value: Bytes in native order, at most 4096; an int is sent as 64 bits; nothing for
                attributes that are commands.

        Raises:
            KvmError: ENXIO, unknown group or attribute; EBUSY and others as the device says.
        """
        data = (
            int_between("value", value, 0, U64).to_bytes(8, "little")
            if isinstance(value, int)
            else bytes(value)
        )
        if len(data) > lib.KVR_ATTR_BYTES:
            raise ValueError(
                f"value has {len(data)} bytes; at most {lib.KVR_ATTR_BYTES} can be set"
            )
        ioctls.set_device_attr(
            self, int_between("group", group, 0, U32), int_between("attr", attr, 0, U64), data
        )

    def get_attr(self, group: int, attr: int, value: bytes | int = 8) -> bytes:
        """Get an attribute's value, as bytes in native order.

        Ioctl: KVM_GET_DEVICE_ATTR.

        Args:
            group: Group, 32 bits.
            attr: Attribute, 64 bits.
            value: How many bytes it has, or the bytes that the kernel shall find there.

        Raises:
            KvmError: ENXIO, unknown group or attribute; others as the device says.
        """
        most = lib.KVR_ATTR_BYTES
        data = (
            bytes(int_between("value", value, 1, most)) if isinstance(value, int) else bytes(value)
        )
        if not 1 <= len(data) <= most:
            raise ValueError(f"value must have 1 to {most} bytes, not {len(data)}")
        return ioctls.get_device_attr(
            self, int_between("group", group, 0, U32), int_between("attr", attr, 0, U64), data
        )

    def has_attr(self, group: int, attr: int) -> bool:
        """Tell whether an attribute exists.

        Ioctl: KVM_HAS_DEVICE_ATTR. ENXIO is False; ENOTTY, a kernel without attributes here,
        stays an error.
        """
        try:
            ioctls.has_device_attr(
                self, int_between("group", group, 0, U32), int_between("attr", attr, 0, U64)
            )
        except KvmError as error:
            if error.errno != errno.ENXIO:
                raise
            return False
        return True


class Device(Attributes):
    """A device that KVM emulates, such as the GIC; made by VM.create_device().

    Lifetime: the device lives as long as its VM, whatever becomes of this handle.

    Attributes:
        type: KVM_DEV_TYPE_*.
    """

    __slots__ = ("type",)

    def __init__(self, handle: Obj, device_type: DeviceType | int) -> None:
        super().__init__(handle)
        self.type = device_type

    def _about(self) -> str:
        return self.type.name if isinstance(self.type, DeviceType) else f"type {self.type}"
