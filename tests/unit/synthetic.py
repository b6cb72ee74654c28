"""A dirty ring without KVM, and the geometry of a VM without a VM, for the unit tests.

SyntheticRing has the layout of a real ring and is harvested by the same C functions through the
same Python classes; only the two things that the kernel does to a ring, to push entries and to
take harvested ones back, are done by csrc/ring.c instead. Geometry is all that a DirtySet asks
of a VM: where its slots lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from kvmring import DirtyGfns, DirtyRing, DirtySet, MemorySlot
from kvmring.abi import check, lib, out, owner

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FREE, DIRTY, RESET = 0, 1, 2
RESERVED = 64  # entries that the producer keeps back, as KVM does


class SyntheticRing:
    """A DirtyRing, and the kernel's side of it."""

    def __init__(self, entries: int = 256) -> None:
        place = out("struct kvr_ring *")
        check("synthetic", lib.kvr_ring_synthetic(entries, place))
        self.ring = DirtyRing(owner(place, lib.kvr_ring_put))
        self.entries = entries
        self.soft_limit = entries - RESERVED

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ring.close()

    def push(self, num: int, *, first: int = 0, slot: int = 0) -> int:
        """Push pages first, first + 1, ...; returns how many until the ring was full."""
        return check("push", lib.kvr_synthetic_push(self.ring.handle, slot, first, num))

    def reset(self) -> int:
        """Take harvested entries back, as KVM_RESET_DIRTY_RINGS does; returns how many."""
        return check("reset", lib.kvr_synthetic_reset(self.ring.handle))

    def poke(self, index: int, flags: int) -> None:
        """Break the ring: put flags at a position."""
        check("poke", lib.kvr_synthetic_poke(self.ring.handle, index, flags))


class Geometry:
    """Slots and a version that grows with each change: what a DirtySet needs of a VM."""

    def __init__(self, *slots: MemorySlot) -> None:
        self._slots = {slot.slot: slot for slot in slots}
        self._version = 1

    @property
    def slots(self) -> Mapping[int, MemorySlot]:
        return self._slots

    @property
    def slots_version(self) -> int:
        return self._version

    def put(self, slot: MemorySlot) -> None:
        """Add a slot, or move the one of the same number."""
        self._slots[slot.slot] = slot
        self._version += 1

    def delete(self, slot: int) -> None:
        del self._slots[slot]
        self._version += 1


def one_slot(num_pages: int, *, gpa: int = 0) -> DirtySet:
    """Make a DirtySet of a VM with slot 0 alone."""
    return DirtySet(Geometry(MemorySlot(slot=0, gpa=gpa, num_pages=num_pages)))


def pages_of(gfns: DirtyGfns) -> list[int]:
    """List the page numbers of harvested entries, in ring order."""
    words = memoryview(gfns).cast("Q")
    return words[1::2].tolist()


def differences(truth: Iterable[int], found: Iterable[int]) -> tuple[list[int], list[int]]:
    """Compare harvested pages with those that were pushed: (missed, extra), both sorted.

    A page that was found twice is extra once.
    """
    missed, extra = set(truth), []
    for page in found:
        if page in missed:
            missed.remove(page)
        else:
            extra.append(page)
    return sorted(missed), sorted(extra)
