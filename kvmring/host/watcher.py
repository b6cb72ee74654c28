"""Watcher: what the dirty rings of one process did in an interval, from events or by polling.

With events (root) the counters that each of them carries make every figure exact, however few
pushes are sampled. Without, the rings are polled as often as their rate asks for, within a
share of one processor; a poll that may have missed a round makes the count a lower bound.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter
from typing import TYPE_CHECKING, Self

from kvmring.errors import KvmError, StateError
from kvmring.host import procfs
from kvmring.host.events import EventKind, RingEvents
from kvmring.host.observer import RingObserver
from kvmring.host.processes import inspect

if TYPE_CHECKING:
    from pathlib import Path

    from kvmring.host.events import RingEvent
    from kvmring.host.observer import RingView
    from kvmring.host.processes import HostVcpu

__all__ = ["RingFigures", "Watcher"]

SAMPLE = 251  # a prime: no working set of a round size falls into step with it
FADE, _FORGOTTEN = 0.8, 0.3  # what was hot long ago counts less with each interval
RESCAN_S = 0.1  # threads that were made since are recorded from then on
BUDGET = 0.03  # of one processor, for polling
_SHORTEST_S, _LONGEST_S = 0.0005, 0.1  # between two polls
_WRAP = 1 << 32  # KVM counts pushes and resets in 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class RingFigures:
    """What one vCPU's ring did in an interval.

    Attributes:
        vcpu: The vCPU's id; `thread` the thread that runs it, and `found_by` how that was
            found.
        entries: Size of the ring.
        seconds: Length of the interval.
        pushed: Entries pushed.
        lapped: `pushed` and `reset` are lower bounds: a poll may have missed a round.
        reset: Entries given back to KVM.
        fill: Entries in use at the end; `unreset` of them were harvested and not reset.
        high_water: Most entries seen in use.
        harvests: Resets that gave entries back; when polled, those that were seen, which are
            fewer than there were.
        harvest_period_s: Mean time between harvests that no full exit made, over the last
            intervals; the time looked at when there was none.
        full_exits: KVM_RUN calls that ended because the ring was full; None: polling does
            not see them.
        hot: (slot, page, share) of the pages pushed most often, of those that were looked
            at; the share is between 0 and 1.
        exact: From the kernel's own counters.
    """

    vcpu: int
    thread: int | None
    found_by: str | None
    entries: int
    seconds: float
    pushed: int
    lapped: bool
    reset: int
    fill: int
    unreset: int
    high_water: int
    harvests: int
    harvest_period_s: float
    full_exits: int | None
    hot: tuple[tuple[int, int, float], ...]
    exact: bool

    @property
    def rate(self) -> float | None:
        """Entries pushed per second; None when only a lower bound is known."""
        return None if self.lapped or self.seconds <= 0 else self.pushed / self.seconds


class _Ring:
    """One ring, and what it did since the interval began."""

    def __init__(self, pid: int, vcpu: HostVcpu) -> None:
        self.vcpu = vcpu
        self.thread, self.found_by = vcpu.thread, vcpu.found_by
        self.entries = vcpu.ring_entries or 0
        self._observer = RingObserver(pid, vcpu, pages=min(256, self.entries))
        try:
            self.view = self._observer.poll()
        except BaseException:
            self._observer.close()
            raise
        # at the last poll: where KVM writes next, when it was, and how full the ring
        self._write: int | None = None
        self._since = self._in_use = 0
        self._settle()
        self._dirty: int | None = None  # the kernel's counters, when an event has told them
        self._reset: int | None = None
        self._late = False  # the counters were not known when the interval began
        self._harvested: deque[tuple[float, int]] = deque(maxlen=10)
        self._hot: dict[tuple[int, int], float] = {}
        self.pushed = self.reset = self.harvests = self.full_exits = 0
        self.high_water = self.view.fill
        self.lapped = False

    def close(self) -> None:
        self._observer.close()

    def begin(self) -> None:
        """Count from here on."""
        self.view = self._observer.poll()
        self._settle()

    def _settle(self) -> None:
        self._write, self._since = self.view.write, self.view.time_ns
        self._in_use = self.view.fill

    def poll(self) -> RingView:
        """Copy the ring; the counts are taken over by one of the two methods that follow."""
        self.view = self._observer.poll()
        self.high_water = max(self.high_water, self.view.fill)
        for slot, _, page in self.view.pages:
            self._hot[slot, page] = self._hot.get((slot, page), 0.0) + 1
        return self.view

    def take_view(self) -> None:
        """Count what a poll saw, where there are no events."""
        self.pushed += self.view.pushed
        self.reset += self.view.reset
        self.lapped |= self.view.lapped
        self.harvests += self.view.reset > 0

    def take_last_view(self) -> None:
        """Bring the counter of events up to what a poll saw just after them.

        Fewer entries than the ring has can have been pushed since: every reset is an event.
        """
        if self._dirty is None or self._late:
            self.pushed = max(self.pushed, self.view.pushed)
            self.lapped |= self.view.lapped
        elif self.view.write is not None:
            self._advance(self._dirty + (self.view.write - self._dirty) % self.entries)
        if self._late and self._dirty is not None and self.view.write is not None:
            self._dirty += (self.view.write - self._dirty) % self.entries
        self._late = False
        self._settle()

    def _advance(self, dirty: int) -> None:
        assert self._dirty is not None
        step = (dirty - self._dirty) % _WRAP
        if step < _WRAP // 2:  # else: older than what is known
            self.pushed += step
            self._dirty = dirty % _WRAP

    def take(self, event: RingEvent) -> None:
        """Count an event of this ring."""
        if event.time_ns < self._since:
            return
        if event.event is not EventKind.RESET:
            self.thread, self.found_by = event.tid, "event"
        if event.event is EventKind.EXIT:
            self.full_exits += 1
            return
        assert event.dirty_index is not None
        assert event.reset_index is not None
        if event.event is EventKind.PUSH and event.slot is not None and event.page is not None:
            at = event.slot, event.page
            self._hot[at] = self._hot.get(at, 0.0) + 1
        if self._dirty is None:
            # its counter, when the copy was made: a position is the counter modulo the size
            self._late = self._write is None
            write = event.dirty_index if self._write is None else self._write
            self._dirty = event.dirty_index - (event.dirty_index - write) % self.entries
            if not self._late:
                self._reset = self._dirty - self._in_use
        self._advance(event.dirty_index)
        before = event.reset_index if self._reset is None else self._reset
        moved = (event.reset_index - before) % _WRAP
        if moved < _WRAP // 2:
            # the ring was at its fullest just before it was reset
            fill = (event.dirty_index - before) % _WRAP
            if fill <= self.entries:
                self.high_water = max(self.high_water, fill)
            self.reset += moved
            self.harvests += moved > 0
            self._reset = event.reset_index

    def _period(self, seconds: float) -> float:
        self._harvested.append((seconds, max(0, self.harvests - self.full_exits)))
        return sum(s for s, _ in self._harvested) / max(1, sum(n for _, n in self._harvested))

    def finish(self, seconds: float, *, top: int, exact: bool) -> RingFigures:
        """Sum up the interval, and begin the next."""
        total = sum(self._hot.values())
        hottest = nlargest(top, self._hot.items(), key=itemgetter(1))
        figures = RingFigures(
            vcpu=self.vcpu.id,
            thread=self.thread,
            found_by=self.found_by,
            entries=self.entries,
            seconds=seconds,
            pushed=self.pushed,
            lapped=self.lapped,
            reset=self.reset,
            fill=self.view.fill,
            unreset=self.view.harvested,
            high_water=self.high_water,
            harvests=self.harvests,
            harvest_period_s=self._period(seconds),
            full_exits=self.full_exits if exact else None,
            hot=tuple((slot, page, n / total) for (slot, page), n in hottest),
            exact=exact,
        )
        self.pushed = self.reset = self.harvests = self.full_exits = 0
        self.lapped = False
        self.high_water = self.view.fill
        self._hot = {page: n * FADE for page, n in self._hot.items() if n * FADE > _FORGOTTEN}
        return figures


class Watcher:
    """Follows the dirty rings of one process.

    Args:
        pid: The process.
        vcpu: Only vCPUs with this id.
        top: How many hot pages the figures name.
        events: False: poll, also where events could be had.
        tracefs: Where tracefs is mounted; found without it.

    Attributes:
        why_polling: Why there are no events; None: there are.

    Raises:
        ProcessLookupError, PermissionError, StateError: As inspect().
        StateError: The process has no such vCPU.

    Threads: one call at a time.
    """

    def __init__(
        self,
        pid: int,
        *,
        vcpu: int | None = None,
        top: int = 5,
        events: bool = True,
        tracefs: Path | None = None,
    ) -> None:
        self.process = inspect(pid)
        self.why_polling: str | None = None if events else "events were not asked for"
        self._vcpu = vcpu
        self._top = top
        self._events: RingEvents | None = None
        self._rings: list[_Ring] = []
        self._woken = threading.Event()  # never set: its wait is one that signals can end
        self._gap = 0.01
        if vcpu is not None and all(other.id != vcpu for other in self.process.vcpus):
            raise StateError(f"process {pid} has no vCPU {vcpu}")
        wanted = self._wanted()
        ids = Counter(ring.id for ring in self.process.rings)
        twice = sorted(number for number, n in ids.items() if n > 1)
        if events and twice:
            self.why_polling = (
                f"two VMs of this process have a vCPU {twice[0]}, and events do not tell them apart"
            )
        try:
            self._rings = [_Ring(pid, ring) for ring in wanted]
            if self.why_polling is None and self._rings:
                try:
                    self._events = RingEvents(pid, sample=SAMPLE, buffer_pages=16, tracefs=tracefs)
                except KvmError as error:
                    self.why_polling = str(error)
                for ring in self._rings:
                    ring.begin()
        except BaseException:
            self.close()
            raise
        self._began = time.monotonic()

    def _wanted(self) -> list[HostVcpu]:
        return [ring for ring in self.process.rings if self._vcpu in (None, ring.id)]

    @property
    def exact(self) -> bool:
        """Whether the figures come from events."""
        return self._events is not None

    @property
    def lost(self) -> int:
        """Events that were lost since the beginning; the counts do not suffer from it."""
        return 0 if self._events is None else self._events.lost

    def close(self) -> None:
        """Let go of the events and the copies."""
        if self._events is not None:
            self._events.close()
        for ring in self._rings:
            ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def follow(self, seconds: float) -> tuple[RingFigures, ...]:
        """Watch for so long, and tell what the rings did since the last call, by vCPU.

        Without a ring to watch it waits all the same, and returns nothing.

        Raises:
            ProcessLookupError: The process has ended, or the rings are gone.
            PermissionError: Its memory may not be read.
        """
        end = time.monotonic() + seconds
        exact = self.exact
        if self._events is not None:
            self._record(self._events, end)
        else:
            self._poll(end)
        now = time.monotonic()
        elapsed, self._began = now - self._began, now
        found = [ring.finish(elapsed, top=self._top, exact=exact) for ring in self._rings]
        self._look_again()
        return tuple(found)

    def _look_again(self) -> None:
        """Take up rings that were mapped since, and drop those that are gone."""
        pid = self.process.pid
        if procfs.identity(pid) != self.process.started:
            raise ProcessLookupError(f"process {pid} has ended")
        if self._events is not None:
            self._rescan(self._events)
        there = {mapping.address for mapping in procfs.rings_of(pid)}
        if there == {ring.ring_address for ring in self.process.rings}:
            return
        self.process = inspect(pid)
        wanted = {ring.ring_address: ring for ring in self._wanted()}
        for ring in [ring for ring in self._rings if ring.vcpu.ring_address not in wanted]:
            ring.close()
            self._rings.remove(ring)
        known = {ring.vcpu.ring_address for ring in self._rings}
        self._rings += [_Ring(pid, ring) for at, ring in wanted.items() if at not in known]

    def _rescan(self, events: RingEvents) -> bool:
        """Record new threads; false: not allowed any more, the rings are polled from now on."""
        try:
            events.rescan()
        except KvmError as error:
            events.close()
            self._events, self.why_polling = None, str(error)
        return self._events is not None

    def _record(self, events: RingEvents, end: float) -> None:
        rings = {ring.vcpu.id: ring for ring in self._rings}
        looked = time.monotonic()
        while True:
            left = end - time.monotonic()
            for event in events.read():
                ring = rings.get(event.vcpu)
                if ring is not None:
                    ring.take(event)
            if left <= 0:
                break
            events.wait(min(left, RESCAN_S))
            if time.monotonic() - looked >= RESCAN_S:
                looked = time.monotonic()
                if not self._rescan(events):
                    break
        for ring in self._rings:
            ring.poll()
            ring.take_last_view()

    def _poll(self, end: float) -> None:
        while True:
            began, at = time.thread_time(), time.monotonic()
            share = 0.0  # of a ring, pushed since the poll before
            for ring in self._rings:
                view = ring.poll()
                ring.take_view()
                share = max(share, 1.0 if view.lapped else view.pushed / view.entries)
            cost = time.thread_time() - began
            # a quarter of a ring at a time, as often as the budget allows
            ideal = self._gap * min(4.0, max(0.1, 0.25 / share)) if share else _LONGEST_S
            self._gap = min(_LONGEST_S, max(_SHORTEST_S, cost / BUDGET, ideal))
            left = end - time.monotonic()
            if left <= 0:
                return
            self._woken.wait(min(left, max(0.0, at + self._gap - time.monotonic())))
