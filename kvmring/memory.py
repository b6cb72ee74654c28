"""GuestMemory: RAM that backs a memory slot, and the VM's table of slots.

The table is shared by the VM and its memory: what the kernel accepted stands in it, and a
count of the changes tells who holds an old copy.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmring import ioctls
from kvmring.abi import PAGE_SIZE, MemFlag, check, ffi, lib, out, owner, uninitialised
from kvmring.errors import StateError, int_between
from kvmring.owned import Owned

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from kvmring._kvm import Map, Obj
    from kvmring.dirtyset import MemorySlot

__all__ = ["GuestMemory", "SlotTable"]

MAX_SLOT = (1 << 32) - 1
MAX_GPA = (1 << 52) - 1
MAX_SIZE = ((1 << 31) - 1) * PAGE_SIZE  # KVM_MEM_MAX_NR_PAGES


def _unwatched(number: int) -> AbstractContextManager[object]:
    return nullcontext()


class SlotTable(Owned["Obj"]):
    """The slots of a VM, as KVM accepted them, and the one way to change them.

    Attributes:
        slots: slot -> MemorySlot.
        version: Grows with every change.
        watcher: Entered with the slot's number around every change; a Tracker's.
        final: The memory's dirty state was declared final: write() is refused.
    """

    __slots__ = ("_lock", "final", "slots", "version", "watcher")

    def __init__(self, vm_handle: Obj) -> None:
        super().__init__(vm_handle)
        self._lock = threading.Lock()
        self.slots: dict[int, MemorySlot] = {}
        self.version = 0
        self.watcher: Callable[[int], AbstractContextManager[object]] = _unwatched
        self.final = False

    def __del__(self) -> None:
        """Say nothing: the VM's own handle complains when it was not closed."""

    def next_free(self, as_id: int) -> int:
        """Return the lowest slot number that an address space has free."""
        slot = as_id << 16
        while slot in self.slots:
            slot += 1
        return slot

    def set_region(
        self, slot: MemorySlot, memory: Owned[Map], offset: int, *, region2: bool
    ) -> None:
        """Make or change a slot, by one of the two ioctls."""
        flags = MemFlag(0)
        if slot.log_dirty:
            flags |= MemFlag.LOG_DIRTY_PAGES
        if slot.readonly:
            flags |= MemFlag.READONLY
        ioctl = ioctls.set_user_memory_region2 if region2 else ioctls.set_user_memory_region
        with self.watcher(slot.slot), self._lock:
            ioctl(self, slot.slot, flags, slot.gpa, slot.size_bytes, memory, offset)
            self.slots[slot.slot] = slot
            self.version += 1

    def delete(self, slot: int, memory: Owned[Map]) -> None:
        """Delete a slot."""
        with self.watcher(slot), self._lock:
            ioctls.set_user_memory_region(self, slot, 0, 0, 0, memory, 0)
            del self.slots[slot]
            self.version += 1


class GuestMemory(Owned["Map"]):
    """RAM of a VM, and the memory slot that shows it to the guest.

    Made by VM.add_memory(). What the VMM writes here is never logged as dirty: KVM logs what
    vCPUs and its own devices write. Offsets are byte offsets from the start of the slot.

    Lifetime: closing the handle leaves the slot in the VM, and the memory mapped, until the
        slot is deleted by remove(), or the VM and its vCPUs are closed.

    Attributes:
        num_pages: Size in pages of the running kernel.
    """

    __slots__ = ("_alive", "_number", "_table", "num_pages")

    def __init__(self, table: SlotTable, number: int, num_pages: int, handle: Map) -> None:
        super().__init__(handle)
        self._table = table
        self._number = number
        self._alive = True
        self.num_pages = num_pages

    @property
    def slot(self) -> int:
        """as_id << 16 | id."""
        return self._number

    @property
    def size_bytes(self) -> int:
        """Size in bytes."""
        return self.num_pages * PAGE_SIZE

    @property
    def gpa(self) -> int:
        """Guest-physical byte address of the slot.

        Raises:
            StateError: The slot was deleted.
        """
        return self._record().gpa

    @property
    def log_dirty(self) -> bool:
        """Whether the slot logs dirty pages."""
        return self._record().log_dirty

    @property
    def readonly(self) -> bool:
        """Whether guest writes exit as MMIO."""
        return self._record().readonly

    def _record(self) -> MemorySlot:
        if not self._alive:
            raise StateError(f"slot {self._number} was removed from the VM")
        return self._table.slots[self._number]

    def _about(self) -> str:
        if not self._alive:
            return f"slot {self._number}, removed"
        return f"slot {self._number}: {self.num_pages} pages at {self.gpa:#x}"

    def set_log_dirty(self, on: bool) -> None:
        """Turn dirty logging of the slot on or off.

        Ioctl: KVM_SET_USER_MEMORY_REGION with or without KVM_MEM_LOG_DIRTY_PAGES. Turning it
        off drops the slot's bitmap; what is in a ring stays there.
        """
        self._change(replace(self._record(), log_dirty=bool(on)))

    def move(self, gpa: int) -> None:
        """Move the slot to another guest-physical address; its log moves with it.

        Raises:
            KvmError: EEXIST, it would overlap another slot; EINVAL, not page-aligned.
        """
        self._change(replace(self._record(), gpa=int_between("gpa", gpa, 0, MAX_GPA)))

    def _change(self, slot: MemorySlot) -> None:
        self._table.set_region(slot, self, 0, region2=False)

    def remove(self) -> None:
        """Delete the slot from the VM. The memory stays readable until close().

        Harvest and reset the rings first: entries of a deleted slot are counted as strays,
        and would be applied to a new slot of the same number.
        """
        self._record()
        self._table.delete(self._number, self)
        self._alive = False

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        start = int_between("offset", offset, 0, self.size_bytes)
        return start, int_between("length", length, 0, self.size_bytes - start)

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copy bytes out; without length, to the end."""
        start = int_between("offset", offset, 0, self.size_bytes)
        start, size = self._range(start, self.size_bytes - start if length is None else length)
        buf = uninitialised("unsigned char[]", size or 1)
        check("read", lib.kvr_map_read(self.handle, start, buf, size))
        return bytes(ffi.buffer(buf, size))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes in. KVM does not log it."""
        if self._table.final:
            raise StateError("write: a Tracker has frozen the VM's memory; close it first")
        source = memoryview(data).cast("B")
        start, size = self._range(offset, len(source))
        with ffi.from_buffer("unsigned char[]", source) as buf:
            check("write", lib.kvr_map_write(self.handle, start, buf, size))

    def words(
        self, offset: int = 0, *, stride: int = PAGE_SIZE, count: int | None = None
    ) -> memoryview:
        """Read one 64-bit word at offset, offset + stride, ...: by default one of each page.

        Args:
            offset: Byte offset of the first, a multiple of 8.
            stride: Bytes from one to the next, a multiple of 8, at least 8.
            count: How many; without it, as many as there are.

        Returns:
            A memoryview of unsigned 64-bit ints.
        """
        start = int_between("offset", offset, 0, self.size_bytes - 8)
        step = int_between("stride", stride, 8, self.size_bytes)
        if start % 8 or step % 8:
            raise ValueError("offset and stride must be multiples of 8 bytes")
        most = (self.size_bytes - 8 - start) // step + 1
        number = most if count is None else int_between("count", count, 0, most)
        buf = uninitialised("uint64_t[]", number or 1)
        check("read", lib.kvr_map_gather(self.handle, start, step, number, buf))
        return memoryview(ffi.buffer(buf, 8 * number)).cast("B").cast("Q")


def new_map(size_bytes: int) -> Map:
    """Map anonymous memory, kept out of forked children; raises KvmError with ioctl "mmap"."""
    place = out("struct kvr_map *")
    check("mmap", lib.kvr_map_new(size_bytes, place))
    handle: Map = owner(place, lib.kvr_map_put)
    return handle
