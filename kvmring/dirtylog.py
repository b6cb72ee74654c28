"""Dirty logging over a whole VM: harvest and reset of every ring, and the bitmap of a slot.

What a VM (vm.py) does beside that is in its own file. The order that loses nothing: harvest,
reset, and with a backup bitmap KVM_GET_DIRTY_LOG last.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmring import ioctls
from kvmring.abi import check, ffi, lib
from kvmring.bitmap import DirtyBitmap
from kvmring.device import Attributes
from kvmring.dirtyset import DirtySet, MemorySlot
from kvmring.errors import RingError, StateError, int_between
from kvmring.memory import MAX_SLOT, SlotTable, _unwatched
from kvmring.target import harvest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from kvmring._kvm import Obj
    from kvmring.target import Target

    SlotWatcher = Callable[[int], AbstractContextManager[object]]

__all__ = ["DirtyLog", "ResetResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetResult:
    """What VM.reset_dirty_rings() did.

    Attributes:
        reset: Entries handed back to KVM.
        suspects: Pages that KVM may have left writable without logging, after it was
            interrupted: treat them as dirty until logging of their slots was turned off and
            on with the vCPUs stopped. Normally empty.
        calls: ioctls made; more than one when KVM returned a short count.
        unknown: Suspects that could not be named any more, since the ring had moved on;
            then every page of the VM is in suspects.
    """

    reset: int
    suspects: DirtySet
    calls: int
    unknown: int


class DirtyLog(Attributes):
    """The part of a VM that logs dirty pages."""

    __slots__ = ("_table",)

    def __init__(self, handle: Obj) -> None:
        super().__init__(handle)
        self._table = SlotTable(handle)

    def close(self) -> None:
        """Close the handle."""
        self._table.close()
        super().close()

    def _watch_slots(self, watcher: SlotWatcher | None) -> None:
        """Have a context entered around every change of a slot; None ends that.

        Raises:
            StateError: Another Tracker watches this VM.
        """
        self._require_open()
        if watcher is not None and self._table.watcher is not _unwatched:
            raise StateError("another Tracker tracks this VM; close it first")
        self._table.watcher = watcher or _unwatched

    def freeze(self, level: int) -> None:
        """Refuse what may dirty memory: lib.KVR_THAWED, KVR_FROZEN_VCPUS or KVR_FROZEN."""
        check("freeze", lib.kvr_freeze(self.handle, level))
        self._table.final = level == lib.KVR_FROZEN

    @property
    def slots(self) -> Mapping[int, MemorySlot]:
        """The memory slots: as_id << 16 | id to where each lies."""
        self._require_open()
        return MappingProxyType(self._table.slots)

    @property
    def slots_version(self) -> int:
        """A number that grows with every change of the slots."""
        return self._table.version

    def harvest(self, into: Target, *, limit: int | None = None) -> int:
        """Take the dirty entries of every vCPU's ring, in one call; return how many.

        Args:
            into: DirtyGfns (appends) or a DirtySet (adds).
            limit: At most so many entries; all that are there without it.

        Raises:
            RingError: A ring broke the protocol. The others were harvested all the same.
            StateError: Another thread harvests one of the rings; nothing was taken.
        """
        return harvest(into, limit, lib.kvr_vm_harvest, self)

    def reset_dirty_rings(self) -> ResetResult:
        """Hand every harvested entry back to KVM, which protects the pages anew.

        Reset before reading the pages' contents: what is written after it is logged again.

        Ioctl: KVM_RESET_DIRTY_RINGS, with every signal of the thread blocked, since Linux 6.17
        forgets to protect up to 64 pages when it sees one (virt/kvm/dirty_ring.c). A short
        count is completed, and what it may have left open comes back as suspects.

        Raises:
            KvmError: EINVAL, the VM has no dirty ring; EIO, another process's VM.
            RingError: KVM's count does not agree with what was harvested.
        """
        done = ioctls.reset_dirty_rings(self, guarded=True)
        if done.reset != done.expected:
            raise RingError(
                f"KVM reset {done.reset} entries where {done.expected} were harvested; "
                "another harvester is at work, or KVM did not finish"
            )
        return ResetResult(
            reset=done.reset,
            suspects=self._suspects(done),
            calls=done.calls,
            unknown=done.unknown,
        )

    def _suspects(self, done: ioctls.ResetCounts) -> DirtySet:
        """Make a DirtySet of suspects; when some have no name, of every page."""
        suspects = DirtySet(self)  # costs nothing while it stays empty
        for slot, page in done.suspects:
            if slot in suspects and page < len(suspects[slot]):
                suspects[slot].set(page)
        if done.unknown:
            for bitmap in suspects.values():
                bitmap.set(0, num_pages=len(bitmap))
        return suspects

    def _high_water(self, *, clear: bool = False) -> dict[int, int]:
        """By vCPU id, the most entries that one harvest took from its ring since the last clear."""
        room = 64
        while True:
            marks = ffi.new("struct kvr_high_water[]", room)
            n = check("vm", lib.kvr_vm_high_water(self.handle, marks, room, 0))
            if n <= room:
                break
            room = n
        if clear:
            lib.kvr_vm_high_water(self.handle, marks, 0, 1)
        return {marks[i].vcpu: marks[i].entries for i in range(n)}

    def get_dirty_log(self, slot: int, *, into: DirtyBitmap | None = None) -> DirtyBitmap:
        """Fetch a slot's bitmap of dirty pages; without manual protect, KVM starts a new one.

        Ioctl: KVM_GET_DIRTY_LOG. With a ring it works only with the backup bitmap too, and is
        then the last thing to do, after rings were reset and devices were saved.

        Args:
            slot: as_id << 16 | id.
            into: A bitmap of the slot's size to be overwritten, instead of a new one.

        Raises:
            KvmError: ENOENT, no such slot or LOG_DIRTY_PAGES off; ENXIO, ring without bitmap;
                EINVAL, no such slot number or address space; EIO, another process's VM.
            ValueError: The bitmap is not of the slot's size; nothing was fetched.
        """
        number = int_between("slot", slot, 0, MAX_SLOT)
        if into is None:
            known = self.slots.get(number)
            into = DirtyBitmap(known.num_pages if known else 0)
        if not isinstance(into, DirtyBitmap):
            raise TypeError(f"the bitmap must be a DirtyBitmap, not {type(into).__name__}")
        try:
            with into.lock:
                ioctls.get_dirty_log(self, number, into)
        except ValueError:  # C compares the sizes
            self._require_size(number, into)
            raise
        return into

    def clear_dirty_log(
        self,
        slot: int,
        bitmap: DirtyBitmap,
        *,
        first_page: int = 0,
        num_pages: int | None = None,
    ) -> None:
        """Mark pages clean in KVM and protect them anew: those set in the bitmap, in a range.

        Ioctl: KVM_CLEAR_DIRTY_LOG (Linux 5.0), usually with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.

        Args:
            slot: as_id << 16 | id.
            bitmap: Of the whole slot; page numbers are the slot's.
            first_page: A multiple of 64.
            num_pages: A multiple of 64, unless the range ends with the slot; to the end
                without it.

        Raises:
            ValueError: A range or a bitmap that breaks these rules; nothing was cleared.
            KvmError: ENOENT, no such slot or LOG_DIRTY_PAGES off; ENXIO, ring without bitmap.
        """
        number = int_between("slot", slot, 0, MAX_SLOT)
        if not isinstance(bitmap, DirtyBitmap):
            raise TypeError(f"bitmap must be a DirtyBitmap, not {type(bitmap).__name__}")
        total = len(bitmap)
        first = int_between("first_page", first_page, 0, total)
        num = int_between(
            "num_pages", total - first if num_pages is None else num_pages, 0, total - first
        )
        if first % 64:
            raise ValueError(f"first_page must be a multiple of 64, not {first}")
        if num % 64 and first + num != total:
            raise ValueError(
                f"num_pages must be a multiple of 64 or reach the slot's end, {total - first}; "
                f"not {num}"
            )
        self._require_size(number, bitmap)
        with bitmap.lock:
            ioctls.clear_dirty_log(self, number, bitmap, first, num)

    def _require_size(self, slot: int, bitmap: DirtyBitmap) -> None:
        known = self.slots.get(slot)
        if known is not None and known.num_pages != len(bitmap):
            raise ValueError(f"slot {slot} has {known.num_pages} pages, the bitmap {len(bitmap)}")
