"""Pending: what a Tracker has collected and not yet handed over, and the counts of it.

Full rings are served in C (serving.py) while nobody looks at the set; own() is how one gets it
for oneself. Suspects are here too: they go with every hand-over until they are protected anew.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmring.dirtyset import DirtySet
from kvmring.serving import RingServer
from kvmring.sources import TrackerStats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmring.bitmap import DirtyBitmap
    from kvmring.ring import DirtyRing
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__all__ = ["Pending"]


class Pending:
    """The pages of a VM that wait to be handed over.

    Args:
        vm: The VM.
        rings: Whether pages come from rings.

    Threads: any; inside own(), and everything that needs it says so, one at a time.

    Attributes:
        server: Runs vCPUs and serves their full rings into the set, while serving is true.
        serving: Whether the server may have the set when nobody owns it.
        dirty: The pages. For the owner.
        suspects: Pages that go with every hand-over. For the owner.
        counts: For the owner; stats is for everybody.
    """

    def __init__(self, vm: VM, *, rings: bool) -> None:
        self.server = RingServer()
        self.serving = False
        self.dirty = DirtySet(vm)
        self.suspects = DirtySet(vm)
        self._vm = vm
        self._rings = rings
        self._lock = threading.RLock()
        self._owners = 0  # how deep in own()
        self.counts = TrackerStats()
        self._entries = 0  # that went into the set
        self._beside = 0  # pages in it that no entry had brought

    @contextmanager
    def own(self) -> Iterator[None]:
        """Have the set for oneself; may be nested.

        The server gets it back at the end. Should an exception come at the worst place it
        does not, and vCPUs with full rings come to serve() until the next owner is done.
        """
        with self._lock:
            if self._owners == 0:
                self._take_back()
            self._owners += 1
            try:
                yield
            finally:
                self._owners -= 1
                if self._owners == 0 and self.serving and not self._vm.closed:
                    self.server.lend(self.dirty)

    def _take_back(self) -> None:
        served = self.server.take_back()
        stats = self.counts
        stats.ring_full_exits += served.fulls
        stats.full_ns += served.full_ns
        stats.resets += served.resets
        stats.short_resets += served.short_resets
        self._entries += served.entries
        if served.last.suspects or served.last.unknown:
            self._suspect(self._vm._suspects(served.last))

    def _suspect(self, pages: DirtySet) -> None:
        self.counts.suspects += pages.count()
        self.suspects |= pages

    def harvest(self, rings: DirtyRing | VM) -> None:
        """Harvest one ring, or all of the VM's. Needs own()."""
        self._entries += rings.harvest(self.dirty)

    def reset(self) -> None:
        """Reset the VM's rings. Needs own()."""
        result = self._vm.reset_dirty_rings()
        self.counts.resets += 1
        self.counts.short_resets += result.calls > 1
        if result.suspects:
            self._suspect(result.suspects)

    def reap(self) -> None:
        """Harvest and reset every ring, also those of vCPUs whose handles were closed."""
        with self.own():
            self.harvest(self._vm)
            self.reset()

    def serve(self, vcpu: VCPU) -> None:
        """Empty a full ring that the server did not."""
        begin = time.perf_counter_ns()
        with self.own():
            self.harvest(vcpu.dirty_ring)
            self.reset()
            self.counts.ring_full_exits += 1
            self.counts.full_ns += time.perf_counter_ns() - begin

    def add(self, slot: int, bitmap: DirtyBitmap) -> None:
        """Add a slot's pages, from a bitmap of KVM's. Needs own()."""
        if self._rings:
            only_here = (bitmap - self.dirty[slot]).count()
            self.counts.backup_pages += only_here
            self._beside += only_here
        self.dirty.add(slot, bitmap)

    def mark(self, slot: int, first: int, num_pages: int) -> None:
        """Add a range of a slot's pages. Needs own()."""
        bitmap = self.dirty[slot]
        if self._rings:
            old = sum(page in bitmap for page in range(first, first + num_pages))
            self._beside += num_pages - old
        bitmap.set(first, num_pages=num_pages)

    def follow_slots(self) -> None:
        """Keep the pages of those slots that still exist, where they are now. Needs own()."""
        self._close_count()
        self.dirty = self._followed(self.dirty)
        self._beside = self._num_pages()
        self.suspects = self._followed(self.suspects)

    def _followed(self, old: DirtySet) -> DirtySet:
        new = DirtySet(self._vm)
        for number, bitmap in old.items():
            slot = self._vm.slots.get(number)
            if slot is not None and slot.num_pages == len(bitmap):
                new.add(number, bitmap)
        return new

    def _num_pages(self) -> int:
        return sum(bitmap.count() for bitmap in self.dirty.values())

    def _duplicates(self, pages: int) -> int:
        """Count the entries that brought none of so many pages in the set."""
        return self._entries - (pages - self._beside) if self._rings else 0

    def _close_count(self) -> int:
        """Count what went into the set; what goes into the next one is counted anew."""
        pages = self._num_pages()
        self.counts.entries += self._entries
        self.counts.duplicates += self._duplicates(pages)
        self._entries = self._beside = 0
        return pages

    def forget(self) -> None:
        """Drop the pages. Needs own()."""
        self._close_count()
        self.dirty = DirtySet(self._vm)

    def hand_over(self) -> DirtySet:
        """Return the pages and the suspects, and begin anew. Needs own()."""
        taken = self.dirty
        self.counts.collections += 1
        self.counts.pages += self._close_count()
        self.dirty = DirtySet(self._vm)
        taken |= self.suspects
        return taken

    def note_high_water(self, *, clear: bool = False) -> None:
        """Ask the VM how full its rings were at most. Needs own()."""
        if not self._rings or self._vm.closed:
            return
        marks = self._vm._high_water(clear=clear)
        if not clear:
            self.counts.high_water |= marks

    @property
    def stats(self) -> TrackerStats:
        """The counts at this moment; a copy."""
        with self.own():
            self.note_high_water()
            return replace(
                self.counts,
                entries=self.counts.entries + self._entries,
                duplicates=self.counts.duplicates + self._duplicates(self._num_pages()),
                high_water=dict(self.counts.high_water),
            )
