"""DirtyRing, and DirtyGfns: a vCPU's dirty ring and a buffer for what is harvested from it.

The protocol (Documentation/virt/kvm/api.rst, 8.29): KVM writes entries in order; a harvest
reads them and marks them; VM.reset_dirty_rings() hands them back. Until then the ring fills
up, and KVM_RUN ends with KVM_EXIT_DIRTY_RING_FULL. The loop itself is csrc/ring.c.
"""

from __future__ import annotations

import operator
import threading
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from kvmring.abi import check, ffi, lib, out, owner
from kvmring.bitmap import Buffer
from kvmring.errors import int_between
from kvmring.owned import Owned
from kvmring.target import failed, harvest, new_fault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmring._kvm import Gfns, Ring
    from kvmring.target import H, Harvest, Target

__all__ = ["DirtyGfn", "DirtyGfns", "DirtyRing"]


class DirtyGfn(NamedTuple):
    """One harvested entry: a page of a slot, and the vCPU that logged it (first writer)."""

    slot: int
    vcpu: int
    offset: int


class DirtyGfns(Buffer):
    """A buffer of harvested entries, in ring order. Harvests append; clear() empties it.

    The buffer protocol gives 16 bytes per entry, read-only: u32 slot, u32 vCPU id, u64 page
    number in the slot (`numpy.frombuffer(gfns, "u4,u4,u8")`).

    Args:
        capacity: Entries it can hold.

    Threads:
        One operation at a time; others wait.
    """

    __slots__ = ("__weakref__", "_buf", "_fault", "_lock", "_used", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = int_between("capacity", capacity, 1, 1 << 32)
        place = out("struct kvr_gfn *")
        if lib.kvr_gfns_new(self.capacity, place) < 0:
            raise MemoryError(f"no memory for {self.capacity} entries of 16 bytes")
        self._buf: Gfns = owner(place, lib.kvr_gfns_free)
        self._lock = threading.Lock()
        self._fault = new_fault()
        self._used = 0

    def __buffer__(self, flags: int, /) -> memoryview:
        return memoryview(ffi.buffer(self._buf, 16 * self._used)).toreadonly()

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, index: int) -> DirtyGfn:
        number = operator.index(index)
        if not -self._used <= number < self._used:
            raise IndexError(f"there are {self._used} entries, none at {number}")
        entry = self._buf[number % self._used]
        return DirtyGfn(entry.slot, entry.vcpu, entry.offset)

    def __iter__(self) -> Iterator[DirtyGfn]:
        return (self[i] for i in range(self._used))

    def __repr__(self) -> str:
        return f"<DirtyGfns {self._used} of {self.capacity} entries>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("DirtyGfns cannot be copied or pickled; its entries can: list(gfns)")

    def clear(self) -> None:
        """Forget the entries."""
        with self._lock:
            self._used = 0

    def _fill(self, function: Harvest[H], source: Owned[H], most: int) -> int:
        with self._lock:
            room = self.capacity - self._used
            if not room:
                raise ValueError("DirtyGfns is full; clear() it before the next harvest")
            n = function(
                source.handle, self._buf + self._used, ffi.NULL, min(most, room), self._fault
            )
            if n >= 0:
                self._used += n
                return n
            taken, error = failed(n, self._fault)
            self._used += taken
        raise error


class DirtyRing(Owned["Ring"]):
    """A vCPU's dirty ring, mapped. Got from VCPU.dirty_ring.

    Threads: one harvester at a time; a second one is refused with StateError. Harvests
        wait while the VM's rings are reset.
    Lifetime: the ring outlives a closed vCPU, for VM.harvest(), so that no entry is lost.
    """

    __slots__ = ("entries",)

    def __init__(self, handle: Ring) -> None:
        super().__init__(handle)
        self.entries = lib.kvr_ring_entries(handle)

    def _about(self) -> str:
        return f"{self.entries} entries"

    def harvest(self, into: Target, *, limit: int | None = None) -> int:
        """Take dirty entries, in order, into DirtyGfns or a DirtySet; return how many.

        No system call: the entries are read from shared memory, and marked as harvested.

        Args:
            into: DirtyGfns (appends) or a DirtySet (adds).
            limit: At most so many entries; all that are there without it.

        Raises:
            RingError: An entry is in no legal state. What was taken before is in the target.
            StateError: Another thread harvests this ring.
            ValueError: DirtyGfns has no room left.
        """
        return harvest(into, limit, lib.kvr_ring_harvest, self)

    def fill(self) -> int:
        """Count the entries that are dirty now and not harvested; takes none."""
        place = ffi.new("uint32_t *")
        check("fill", lib.kvr_ring_fill(self.handle, place))
        return int(place[0])

    @property
    def pending(self) -> int:
        """Entries harvested and not reset yet."""
        fetch, reset = self.indices
        return (fetch - reset) % (1 << 32)

    @property
    def indices(self) -> tuple[int, int]:
        """Our fetch index and the reset index; 32-bit counters, modulo entries a position."""
        places = ffi.new("uint32_t[2]")
        check("indices", lib.kvr_ring_indices(self.handle, places, places + 1))
        return int(places[0]), int(places[1])
