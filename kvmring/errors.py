"""The exceptions that kvmring raises, and the argument checks that come before a call.

KvmringError
├── KvmError (OSError)      a system call failed: errno, ioctl, hint
│   ├── KvmUnavailable      the device cannot be opened, or is not KVM
│   └── KvmNotSupported     KVM lacks a capability, named in the message
├── ClosedError (ValueError)   the handle was closed before
├── ForkedError             the handle was made by another process
├── StateError              the right call at the wrong moment
├── RingError               a dirty ring broke the protocol
└── GuestError              the guest ended in a way that it should not

A bad argument is ValueError or TypeError, before anything was done.
"""

from __future__ import annotations

import errno as _errno
import operator
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmring.abi import Exit


class KvmringError(Exception):
    """Base of every error that is kvmring's own."""


class KvmError(KvmringError, OSError):
    """A system call failed.

    Attributes:
        errno: The kernel's error number.
        ioctl: The name of the ioctl, or of the system call.
        hint: A cause that fits, stated as possible; empty when none is known.
    """

    def __init__(self, errno: int, ioctl: str, hint: str | None = None) -> None:
        super().__init__(errno, os.strerror(errno))
        self.ioctl = ioctl
        self.hint = HINTS.get((ioctl, errno), "") if hint is None else hint

    def __str__(self) -> str:
        assert self.errno is not None
        name = _errno.errorcode.get(self.errno, str(self.errno))
        text = f"{self.ioctl}: {self.strerror} [{name}]"
        return f"{text} ({self.hint})" if self.hint else text


class KvmUnavailable(KvmError):
    """/dev/kvm cannot be opened, or what was opened is not KVM; the hint is the remedy."""


class KvmNotSupported(KvmError):
    """KVM does not offer a capability; the message names it."""

    def __init__(self, cap: str, hint: str = "") -> None:
        super().__init__(_errno.EOPNOTSUPP, cap, hint or "this host's KVM does not offer it")
        self.cap = cap


class ClosedError(KvmringError, ValueError):
    """The handle was closed before this call."""


class ForkedError(KvmringError):
    """The handle belongs to the process that made it; after fork() the child has none."""


class StateError(KvmringError):
    """The right call at the wrong moment; the message says what should have come first."""


class RingError(KvmringError):
    """A dirty ring is in a state that the protocol does not allow. Nothing was repaired.

    Attributes:
        vcpu: The vCPU whose ring it is, or None when the count of all rings is off.
        index: Position in the ring, in entries.
        flags: What stood there.
        slot, offset: The entry's page.
        harvested: Entries that the failing call had taken before; they are in its target.
    """

    def __init__(
        self,
        message: str,
        *,
        vcpu: int | None = None,
        index: int = 0,
        flags: int = 0,
        slot: int = 0,
        offset: int = 0,
        harvested: int = 0,
    ) -> None:
        super().__init__(message)
        self.vcpu = vcpu
        self.index = index
        self.flags = flags
        self.slot = slot
        self.offset = offset
        self.harvested = harvested


class GuestError(KvmringError):
    """A guest ended with FAIL_ENTRY, INTERNAL_ERROR, SHUTDOWN or another unexpected exit.

    Attributes:
        exit: The Exit that ended it.
    """

    def __init__(self, message: str, exit: Exit) -> None:
        super().__init__(message)
        self.exit = exit

    def __reduce__(self) -> tuple[type[GuestError], tuple[str, Exit]]:
        return type(self), (str(self), self.exit)


def int_between(name: str, value: object, low: int, high: int) -> int:
    """Return value as an int in [low, high], or raise TypeError or ValueError in one sentence."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not low <= number <= high:
        shown = [f"{n:#x}" if abs(n) > 1 << 20 else str(n) for n in (low, high, number)]
        raise ValueError(f"{name} must lie between {shown[0]} and {shown[1]}, not {shown[2]}")
    return number


_GET_CLEAR = "a dirty ring without KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP has no bitmap"

# (ioctl, errno) -> what may have caused it. Several causes are listed as such. The rules
# are those of virt/kvm/kvm_main.c.
HINTS: Mapping[tuple[str, int], str] = {
    ("KVM_CREATE_VM", _errno.EINVAL): "the VM type, or its address size, is not known here",
    ("KVM_CREATE_VCPU", _errno.EEXIST): "a vCPU with this id exists, even if its handle is closed",
    ("KVM_CREATE_VCPU", _errno.EINVAL): "possibly an id past KVM_CAP_MAX_VCPU_ID, or too many",
    ("KVM_CREATE_VCPU", _errno.ENOMEM): "possibly no contiguous memory for the dirty ring",
    ("KVM_ENABLE_CAP", _errno.EINVAL): (
        "the capability is unknown on this kind of handle, or its flags, arguments or moment "
        "are refused"
    ),
    ("KVM_ENABLE_CAP", _errno.E2BIG): "the ring is larger than KVM_CHECK_EXTENSION allows",
    ("KVM_SET_USER_MEMORY_REGION", _errno.EEXIST): "it overlaps another slot's addresses",
    ("KVM_SET_USER_MEMORY_REGION", _errno.EINVAL): (
        "possibly an alignment, an unknown slot or address space, or a change of an existing "
        "slot's size, backing or READONLY"
    ),
    ("KVM_SET_USER_MEMORY_REGION2", _errno.EEXIST): "it overlaps another slot's addresses",
    ("KVM_SET_USER_MEMORY_REGION2", _errno.ENOTTY): "KVM_CAP_USER_MEMORY2 came with Linux 6.8",
    ("KVM_GET_DIRTY_LOG", _errno.ENOENT): "no such slot, or it does not log (LOG_DIRTY_PAGES off)",
    ("KVM_GET_DIRTY_LOG", _errno.ENXIO): _GET_CLEAR,
    ("KVM_GET_DIRTY_LOG", _errno.EINVAL): "no such slot number or address space",
    ("KVM_CLEAR_DIRTY_LOG", _errno.ENOENT): "no such slot, or it does not log",
    ("KVM_CLEAR_DIRTY_LOG", _errno.ENXIO): _GET_CLEAR,
    ("KVM_CLEAR_DIRTY_LOG", _errno.EINVAL): (
        "first_page must be a multiple of 64, and num_pages too unless it reaches the slot's end"
    ),
    ("KVM_RESET_DIRTY_RINGS", _errno.EINVAL): "the VM has no dirty ring; enable_dirty_ring() first",
    ("KVM_RUN", _errno.EFAULT): "the guest touched an address whose host memory cannot be had",
    ("KVM_RUN", _errno.ENOEXEC): "the vCPU was not initialised (KVM_ARM_VCPU_INIT)",
    ("KVM_SET_SREGS", _errno.EINVAL): (
        "the registers contradict each other, or the vCPU has no CPUID yet (KVM_SET_CPUID2)"
    ),
    ("KVM_CREATE_DEVICE", _errno.ENODEV): "this architecture or kernel has no such device",
    ("KVM_CREATE_DEVICE", _errno.EEXIST): "the VM has one already",
    ("KVM_SET_DEVICE_ATTR", _errno.ENXIO): "no such group or attribute, or it cannot be set now",
    ("KVM_GET_DEVICE_ATTR", _errno.ENXIO): "no such group or attribute, or it has no value now",
    ("KVM_HAS_DEVICE_ATTR", _errno.ENXIO): "no such group or attribute",
    ("KVM_SET_DEVICE_ATTR", _errno.EBUSY): "a vCPU is running; stop all of them first",
    ("KVM_GET_STATS_FD", _errno.ENOTTY): "KVM_CAP_BINARY_STATS_FD came with Linux 5.14",
}
# An error of the same meaning for every ioctl of a VM, a vCPU or a device.
ANY_IOCTL: Mapping[int, str] = {
    _errno.EIO: "the VM belongs to another process, or is dead",
    _errno.ENOTTY: "this kind of handle does not know the ioctl, or this kernel does not",
    _errno.EBADF: "the file descriptor was closed behind kvmring's back",
}
