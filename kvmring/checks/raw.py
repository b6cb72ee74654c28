"""System calls as the checks need them: wrong sizes, bad pointers, forbidden mappings.

The library refuses most of what stands here before the kernel sees it, and the checks ask the
kernel. Nothing here is for use elsewhere. Pointers are only ever given to the kernel, which
answers EFAULT for a bad one; none is followed in this process.

Request numbers and structs are written out as the kernel's ABI has them, not taken from a
header: what the kernel says to them is what is checked.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import resource
import signal
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmring.device import KvmFd

__all__ = [
    "LOG",
    "READONLY",
    "RING_PAGE",
    "Entry",
    "Memory",
    "at_edge",
    "clear_dirty_log",
    "enable_cap",
    "entries",
    "get_dirty_log",
    "in_child",
    "ioctl",
    "map_vcpu",
    "set_region",
]

KVM_CHECK_EXTENSION = 0xAE03
KVM_CREATE_VCPU = 0xAE41
KVM_GET_DIRTY_LOG = 0x4010AE42
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
KVM_RUN = 0xAE80
KVM_ENABLE_CAP = 0x4068AEA3
KVM_CLEAR_DIRTY_LOG = 0xC018AEC0
KVM_RESET_DIRTY_RINGS = 0xAEC7

LOG, READONLY, GUEST_MEMFD = 1, 2, 4  # KVM_MEM_*
RING_PAGE = 64  # KVM_DIRTY_LOG_PAGE_OFFSET
PAGE = os.sysconf("SC_PAGESIZE")


def ioctl(handle: KvmFd | int, request: int, argument: int | bytes | bytearray = 0) -> int:
    """Make an ioctl: a number is passed as it is, bytes as a pointer to a copy of them.

    A bytearray takes what the kernel writes back; only then, and with a number, is the result
    that of the ioctl.

    Raises:
        OSError: What the kernel said.
    """
    fd = handle if isinstance(handle, int) else handle.fileno()
    result = fcntl.ioctl(fd, request, argument)
    return result if isinstance(result, int) else 0


def enable_cap(handle: KvmFd | int, cap: int, *args: int, flags: int = 0) -> None:
    """KVM_ENABLE_CAP; the library does not learn of it."""
    padded = (*args, 0, 0, 0, 0)[:4]
    ioctl(handle, KVM_ENABLE_CAP, struct.pack("=II4Q64x", cap, flags, *padded))


def set_region(
    vm: KvmFd | int,
    slot: int,
    gpa: int,
    num_bytes: int,
    hva: int,
    flags: int = 0,
    *,
    memfd: tuple[int, int] | None = None,
    version: int = 1,
) -> None:
    """KVM_SET_USER_MEMORY_REGION, or its second version; the library does not learn of it.

    Args:
        vm: The VM.
        slot: as_id << 16 | id.
        gpa: Byte address in the guest.
        num_bytes: Size.
        hva: Byte address in this process; see Memory.
        flags: KVM_MEM_*.
        memfd: guest_memfd and offset, with version 2.
        version: Which of the two ioctls.
    """
    region = struct.pack("=IIQQQ", slot, flags, gpa, num_bytes, hva)
    if version == 1:
        ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
        return
    fd, offset = memfd or (0, 0)
    ioctl(vm, KVM_SET_USER_MEMORY_REGION2, region + struct.pack("=QII112x", offset, fd, 0))


class Memory:
    """Anonymous private memory whose address is known, for slots and bitmaps of one's own."""

    def __init__(self, num_bytes: int) -> None:
        self.map = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.num_bytes = num_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def close(self) -> None:
        """Unmap it; a slot that shows it is left with nothing."""
        self.map.close()


def get_dirty_log(vm: KvmFd | int, slot: int, num_pages: int, *, padding: int = 0) -> int:
    """KVM_GET_DIRTY_LOG: the bitmap as one int, whose bits are the pages'."""
    size = (num_pages + 63) // 64 * 8
    memory = Memory(max(size, 8))
    try:
        ioctl(vm, KVM_GET_DIRTY_LOG, struct.pack("=IIQ", slot, padding, memory.address))
        return int.from_bytes(memory.map[:size], "little")
    finally:
        memory.close()


def clear_dirty_log(vm: KvmFd | int, slot: int, first: int, num_pages: int, bits: int) -> None:
    """KVM_CLEAR_DIRTY_LOG of a range; bit 0 is page `first`."""
    size = max((num_pages + 63) // 64 * 8, 8)
    memory = Memory(size)
    try:
        memory.map[:size] = bits.to_bytes(size, "little")
        argument = struct.pack("=IIQQ", slot, num_pages, first, memory.address)
        ioctl(vm, KVM_CLEAR_DIRTY_LOG, argument)
    finally:
        memory.close()


@contextmanager
def at_edge(data: bytes) -> Iterator[int]:
    """Give the address of a copy of at most a page, with nothing mapped behind its last byte."""
    with mmap.mmap(-1, 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory.resize(PAGE)
        start = PAGE - len(data)
        memory[start:] = data
        yield address + start


class Entry(NamedTuple):
    """One entry of a ring as it stands in memory, struct kvm_dirty_gfn."""

    flags: int
    slot: int
    offset: int


def map_vcpu(
    vcpu: KvmFd | int,
    num_bytes: int,
    *,
    page: int = RING_PAGE,
    flags: int = mmap.MAP_SHARED,
    prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
) -> mmap.mmap:
    """Map a vCPU's fd from a page on, by default its ring. The caller closes it.

    What lies beyond the ring is SIGBUS at the first touch: see in_child().
    """
    fd = vcpu if isinstance(vcpu, int) else vcpu.fileno()
    return mmap.mmap(fd, num_bytes, flags, prot, offset=page * PAGE)


def entries(ring: mmap.mmap, first: int = 0, count: int | None = None) -> list[Entry]:
    """Read the entries of a mapped ring; it takes none."""
    end = len(ring) if count is None else 16 * (first + count)
    return [Entry(*fields) for fields in struct.iter_unpack("=IIQ", ring[16 * first : end])]


def in_child(function: Callable[[], object]) -> str:
    """Run a function in a forked child and say how it ended.

    Returns:
        "success", the name of its OSError's errno, or that of the signal that ended it.
    """
    child = os.fork()
    if child == 0:
        code = 255
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            function()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return signal.Signals(-code).name
    return "success" if code == 0 else errno.errorcode.get(code, f"exit status {code}")


def touch(ring: mmap.mmap, pages: Sequence[int]) -> None:
    """Read a byte of each of these pages of a mapping."""
    for page in pages:
        ring[page * PAGE]
