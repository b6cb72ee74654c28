"""DirtySet: the dirty pages of a whole VM, slot by slot, and in guest-physical terms.

A set knows the slots of the VM it was made for and grows with them. It is what harvests
fill, what get_dirty_log() results are merged into, and what every consumer reads.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from typing import TYPE_CHECKING, Protocol

from kvmring.abi import PAGE_SIZE, check, ffi, lib, out, owner, uninitialised
from kvmring.bitmap import DirtyBitmap
from kvmring.errors import StateError
from kvmring.target import failed, new_fault

if TYPE_CHECKING:
    from kvmring._kvm import Set
    from kvmring.owned import Owned
    from kvmring.target import H, Harvest

__all__ = ["DirtySet", "MemorySlot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySlot:
    """Where a memory slot lies.

    Attributes:
        slot: as_id << 16 | id.
        gpa: Guest-physical byte address.
        num_pages: Size in pages.
        log_dirty: KVM_MEM_LOG_DIRTY_PAGES is set.
        readonly: KVM_MEM_READONLY is set.
    """

    slot: int
    gpa: int
    num_pages: int
    log_dirty: bool = False
    readonly: bool = False

    @property
    def size_bytes(self) -> int:
        """Size in bytes."""
        return self.num_pages * PAGE_SIZE

    @property
    def end(self) -> int:
        """First byte address behind it."""
        return self.gpa + self.size_bytes

    @property
    def as_id(self) -> int:
        """Address space."""
        return self.slot >> 16


class HasSlots(Protocol):
    """What a DirtySet needs of a VM."""

    @property
    def slots(self) -> Mapping[int, MemorySlot]: ...
    @property
    def slots_version(self) -> int: ...


class DirtySet(Mapping[int, DirtyBitmap]):
    """A mapping of slot to DirtyBitmap that knows where the slots lie.

    Harvests add to it; nothing in it becomes clean by itself. count(), gpas() and runs()
    speak of guest-physical memory: a page that two slots show (another address space, say)
    counts once.

    Args:
        vm: The VM whose slots it covers. Slots added to the VM later are taken in when they
            are first needed; a deleted slot's pages stay until clear().

    Threads:
        One operation at a time; a harvest into the set from another thread waits.
    """

    __slots__ = ("_bitmaps", "_c_set", "_fault", "_lock", "_seen", "_slots", "_strays", "_vm")

    def __init__(self, vm: HasSlots) -> None:
        self._lock = threading.Lock()
        self._vm = vm
        self._slots: dict[int, MemorySlot] = {}
        self._bitmaps: dict[int, DirtyBitmap] = {}
        self._seen = -1
        self._c_set: Set | None = None
        self._strays = 0
        self._fault = new_fault()

    @property
    def strays(self) -> int:
        """Entries harvested that named no slot, or no page, of the VM.

        Such are left in a ring by a slot that was deleted or made smaller since.
        """
        current = 0 if self._c_set is None else lib.kvr_set_strays(self._c_set)
        return self._strays + current

    def _sync(self) -> Set:
        """Take in the VM's slots as they are now. Called with the lock held."""
        version = self._vm.slots_version  # before the slots: a change after it is seen next time
        if self._c_set is not None and version == self._seen:
            return self._c_set
        for number, slot in dict(self._vm.slots).items():
            old = self._slots.get(number)
            same = old is not None and (old.gpa, old.num_pages) == (slot.gpa, slot.num_pages)
            if not same and old is not None and lib.kvr_bitmap_count(self._bitmaps[number].handle):
                raise StateError(
                    f"slot {number} was moved or made anew while this DirtySet held pages of it; "
                    "use what it holds, then clear() it or make a new one"
                )
            if not same:
                self._bitmaps[number] = DirtyBitmap(slot.num_pages, lock=self._lock)
            self._slots[number] = slot
        self._rebuild()
        self._seen = version
        assert self._c_set is not None
        return self._c_set

    def _rebuild(self) -> None:
        place = out("struct kvr_set *")
        check("set", lib.kvr_set_new(len(self._bitmaps), place))
        new: Set = owner(place, lib.kvr_set_free)
        for number in sorted(self._bitmaps):
            check("set", lib.kvr_set_put(new, number, self._bitmaps[number].handle))
        if self._c_set is not None:
            self._strays += lib.kvr_set_strays(self._c_set)
        self._c_set = new

    def c_set(self) -> Set:
        """Return the C set, with the VM's slots as they are now, for who writes to it in C."""
        with self._lock:
            return self._sync()

    def _fill(self, function: Harvest[H], source: Owned[H], most: int) -> int:
        with self._lock:
            c_set = self._c_set
            if c_set is None or self._vm.slots_version != self._seen:
                c_set = self._sync()
            n = function(source.handle, ffi.NULL, c_set, most, self._fault)
            if n >= 0:
                return n
            error = failed(n, self._fault)[1]
        raise error

    def __getitem__(self, slot: int) -> DirtyBitmap:
        if slot not in self._bitmaps:
            with self._lock:
                self._sync()
        return self._bitmaps[slot]

    def _cover(self) -> None:
        """Have a bitmap for every slot; until the first need there is none."""
        if self._seen < 0:
            with self._lock:
                self._sync()

    def __iter__(self) -> Iterator[int]:
        self._cover()
        return iter(sorted(self._bitmaps))

    def __len__(self) -> int:
        self._cover()
        return len(self._bitmaps)

    def __bool__(self) -> bool:
        """Whether any page is dirty."""
        return any(self._bitmaps.values())

    def __repr__(self) -> str:
        return f"<DirtySet {self.count()} pages in {len(self)} slots>"

    def slot_of(self, slot: int) -> MemorySlot:
        """Return where a slot lies, as of when the set took it in."""
        self._cover()
        return self._slots[slot]

    def _overlapping(self) -> bool:
        ordered = sorted(self._slots.values(), key=lambda slot: slot.gpa)
        return any(a.end > b.gpa for a, b in itertools.pairwise(ordered))

    def count(self) -> int:
        """Count the dirty pages of guest-physical memory."""
        if self._overlapping():
            return sum(length for _, length in self.runs()) // PAGE_SIZE
        return sum(bitmap.count() for bitmap in self._bitmaps.values())

    def runs(self) -> Iterator[tuple[int, int]]:
        """Iterate over dirty memory as (gpa, length in bytes), ascending, adjacent runs joined."""
        pieces = merge(*(self._slot_runs(number) for number in self._bitmaps))
        begin = end = None
        for first, length in pieces:
            if begin is None or end is None:
                begin, end = first, first + length
            elif first <= end:
                end = max(end, first + length)
            else:
                yield begin, end - begin
                begin, end = first, first + length
        if begin is not None and end is not None:
            yield begin, end - begin

    def _slot_runs(self, number: int) -> Iterator[tuple[int, int]]:
        gpa = self._slots[number].gpa
        for first, length in self._bitmaps[number].runs():
            yield gpa + first * PAGE_SIZE, length * PAGE_SIZE

    def gpas(self) -> memoryview:
        """Return the dirty pages' byte addresses, ascending, as unsigned 64-bit ints."""
        if self._overlapping():
            pages = [g for gpa, n in self.runs() for g in range(gpa, gpa + n, PAGE_SIZE)]
            buf = ffi.new("uint64_t[]", pages or 1)
            return memoryview(ffi.buffer(buf, 8 * len(pages))).cast("B").cast("Q")
        order = sorted(self._bitmaps, key=lambda number: self._slots[number].gpa)
        parts = [self._bitmaps[n]._numbers(self._slots[n].gpa, PAGE_SIZE) for n in order]
        if len(parts) == 1:
            return parts[0]
        total = sum(len(part) for part in parts)
        buf = uninitialised("uint64_t[]", total or 1)
        view = memoryview(ffi.buffer(buf, 8 * total)).cast("B").cast("Q")
        at = 0
        for part in parts:
            view[at : at + len(part)] = part
            at += len(part)
        return view

    def has_gpa(self, gpa: int) -> bool:
        """Tell whether the page at a guest-physical byte address is dirty."""
        return any(
            slot.gpa <= gpa < slot.end and (gpa - slot.gpa) // PAGE_SIZE in self._bitmaps[number]
            for number, slot in self._slots.items()
        )

    def clear(self) -> None:
        """Make every page clean, and forget slots that the VM has no longer."""
        with self._lock:
            self._slots.clear()
            self._bitmaps.clear()
            self._strays = 0
            self._c_set = None
            self._seen = -1

    def copy(self) -> DirtySet:
        """Return a set of its own with the same pages dirty."""
        twin = DirtySet.__new__(DirtySet)  # of the slots as this set has them, not as they are now
        twin._lock = threading.Lock()
        twin._vm = self._vm
        twin._bitmaps = {}
        twin._c_set = None
        with self._lock:
            twin._slots = dict(self._slots)
            twin._seen = self._seen
            bitmaps = dict(self._bitmaps)
        for number, bitmap in bitmaps.items():
            twin._bitmaps[number] = DirtyBitmap(len(bitmap), lock=twin._lock)
            twin._bitmaps[number] |= bitmap
        twin._strays = self.strays
        twin._fault = new_fault()
        if bitmaps:
            twin._rebuild()
        return twin

    __copy__ = copy

    def __deepcopy__(self, memo: object) -> DirtySet:
        return self.copy()

    def __ior__(self, other: DirtySet) -> DirtySet:
        """Add another set's pages; the slots of both must lie alike."""
        if not isinstance(other, DirtySet):
            return NotImplemented
        for number, bitmap in tuple(other._bitmaps.items()):
            self._adopt(other._slots[number])
            self._bitmaps[number] |= bitmap
        self._strays += other.strays if other is not self else 0
        return self

    def add(self, slot: int, bitmap: DirtyBitmap) -> None:
        """Add the pages of one slot, such as the result of get_dirty_log().

        Raises:
            KeyError: The VM has no such slot.
            ValueError: The bitmap is of another size.
        """
        target = self[slot]
        target |= bitmap

    def _adopt(self, slot: MemorySlot) -> None:
        """Have room for a slot of another set, which this VM may have deleted since."""
        with self._lock:
            self._sync()
            old = self._slots.get(slot.slot)
            if old is None:
                self._slots[slot.slot] = slot
                self._bitmaps[slot.slot] = DirtyBitmap(slot.num_pages, lock=self._lock)
                self._rebuild()
                return
        if (old.gpa, old.num_pages) != (slot.gpa, slot.num_pages):
            raise ValueError(f"slot {slot.slot} lies elsewhere in the other DirtySet")

    def __eq__(self, other: object) -> bool:
        """Whether the same guest-physical pages are dirty."""
        if not isinstance(other, DirtySet):
            return NotImplemented
        return self is other or list(self.runs()) == list(other.runs())

    __hash__ = None  # type: ignore[assignment]
