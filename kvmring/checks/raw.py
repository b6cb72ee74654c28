"""System calls as the checks need them: wrong sizes, bad pointers, forbidden mappings.

The library refuses most of what stands here before the kernel sees it, and the checks ask the
kernel. Nothing here is for use elsewhere. Pointers are only ever given to the kernel, which
answers EFAULT for a bad one; none is followed in this process.
"""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmring.system import System
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__all__ = ["ioctl"]


def ioctl(handle: System | VM | VCPU, request: int, argument: int | bytes | bytearray = 0) -> int:
    """Make an ioctl: a number is passed as it is, bytes as a pointer to a copy of them.

    Raises:
        OSError: What the kernel said.
    """
    result = fcntl.ioctl(handle.fileno(), request, argument)
    return result if isinstance(result, int) else 0
