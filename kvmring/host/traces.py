"""Trace: a recording's events as arrays, sorted by time; what every analysis starts from.

load() makes one of a Recording. Pushes are counted by the rings' own counters where rows carry
them, so events that were lost or not sampled count too; pages are known only from the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvmring.host.recording import EVENTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmring.host.recording import Recording

    Ints = NDArray[np.int64]

__all__ = ["NS", "Ring", "Slot", "Trace", "load"]

NS = 1_000_000_000
_UNKNOWN = np.iinfo(np.int64).min
_PUSH, _RESET, _EXIT = range(len(EVENTS))
_COUNTER = 1 << 32  # the rings' counters are u32


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The pages of one memory slot that a recording names.

    Attributes:
        slot: as_id << 16 | id; -1 where rows had none.
        pages: How many different ones.
        first, last: The lowest and the highest page number.
        pushes: How many rows.
    """

    slot: int
    pages: int
    first: int
    last: int
    pushes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """The counters of one vCPU's ring: entries put in and given back, at moments.

    Attributes:
        pid, vcpu: Whose ring it is; -1 where rows do not say.
        time_ns: The moments, ascending.
        fill: Entries in the ring then.
        pushed: Entries put in since the moment before, recorded or not.
    """

    pid: int
    vcpu: int
    time_ns: Ints
    fill: Ints
    pushed: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A recording's events as arrays. Times are nanoseconds since begin, ascending.

    Attributes:
        length_ns: How long was recorded.
        sampling: N where a push stands for N.
        page_size: Bytes.
        ring_entries: Size of the rings; None when it is not known.
        exact_times: Whether a push's time is its own; otherwise the page was dirtied between
            since_ns and time_ns, and is told at the latter.
        push_rows: Rows of pushes; what follows is one per push whose page is known.
        time_ns, since_ns, slot, page: When, and of what.
        key: The page as a number from 0 to distinct - 1, one per push.
        previous: Position of the push before it of the same page, or -1.
        last: Position of each page's last push, by key.
        rings: Counters by vCPU, where rows have them.
        uncounted_ns: Times of pushes that carry no counters.
        exit_ns: Times of ring-full exits.
        slots: What is known of each slot.
        memory_pages: Pages of all slots; at least that many unless memory_known.
        lost: Events that the recorder knows it lost.
    """

    length_ns: int
    sampling: int
    page_size: int
    ring_entries: int | None
    exact_times: bool
    push_rows: int
    time_ns: Ints
    since_ns: Ints
    slot: Ints
    page: Ints
    key: Ints
    previous: Ints
    last: Ints
    rings: tuple[Ring, ...]
    uncounted_ns: Ints
    exit_ns: Ints
    slots: tuple[Slot, ...]
    memory_pages: int
    memory_known: bool
    lost: int

    @property
    def seconds(self) -> float:
        """How long was recorded, in seconds."""
        return self.length_ns / NS

    @property
    def distinct(self) -> int:
        """Different pages that the recording names."""
        return len(self.last)

    @property
    def pushes(self) -> int:
        """Entries put into rings, recorded or not; pages collected, for a Tracker's recording."""
        counted = sum(int(ring.pushed.sum()) for ring in self.rings)
        return counted + self.sampling * len(self.uncounted_ns)

    @property
    def unrecorded(self) -> int:
        """Entries that the rings' counters tell of and no row does. 0 of a sampled recording."""
        return max(self.pushes - self.push_rows, 0) if self.sampling == 1 else 0

    @property
    def resolution_ns(self) -> int:
        """The longest time that passed between a page's write and its row: 0 for exact times."""
        return int((self.time_ns - self.since_ns).max(initial=0))

    def count(self, low: int, high: int) -> int:
        """Count the different pages among the pushes [low, high)."""
        return int(np.count_nonzero(self.previous[low:high] < low))


def load(recording: Recording) -> Trace:
    """Make a Trace of a recording."""
    columns = {name: _column(recording, name) for name in recording.table.column_names}
    order = np.argsort(columns["time_ns"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    begin, length = _span(recording, columns)
    columns["time_ns"] = columns["time_ns"] - begin
    event, time = columns["event"], columns["time_ns"]
    push = event == _PUSH
    named = push & (columns["page"] != _UNKNOWN)
    slot = np.where(columns["slot"] == _UNKNOWN, -1, columns["slot"])[named]
    page = columns["page"][named]
    exact = recording.source != "tracker"
    since = time[named] if exact else _since(time[named], time[event == _RESET])
    key, previous, last = _occurrences(slot, page)
    slots = _slots(slot, page, key)
    seen = {s.slot: s.last + 1 for s in slots}
    known = bool(recording.slots) and set(seen) <= set(recording.slots)
    rings = _rings(columns, recording.sampling)
    return Trace(
        length_ns=length,
        sampling=recording.sampling,
        page_size=recording.page_size,
        ring_entries=recording.ring_entries,
        exact_times=exact,
        push_rows=int(np.count_nonzero(push)),
        time_ns=time[named],
        since_ns=since,
        slot=slot,
        page=page,
        key=key,
        previous=previous,
        last=last,
        rings=rings,
        uncounted_ns=time[push & (columns["dirty_index"] == _UNKNOWN)],
        exit_ns=time[event == _EXIT],
        slots=slots,
        memory_pages=sum({**seen, **recording.slots}.values()),
        memory_known=known,
        lost=recording.lost,
    )


def _column(recording: Recording, name: str) -> Ints:
    """Return a column as 64-bit integers: events by their number, null as _UNKNOWN."""
    column = recording.table.column(name)
    if name == "event":
        codes = pc.index_in(column.cast(pa.string()), value_set=pa.array(EVENTS))
        return np.asarray(codes, np.int64)
    unknown = pa.scalar(_UNKNOWN, pa.int64())
    return np.asarray(pc.fill_null(column.cast(pa.int64()), unknown), np.int64)


def _span(recording: Recording, columns: Mapping[str, Ints]) -> tuple[int, int]:
    """Return when a recording began, and its length, both in nanoseconds."""
    time, event = columns["time_ns"], columns["event"]
    begin, end = recording.begin_ns, recording.end_ns
    if len(time) and (time[-1] < begin or time[0] > end):
        begin, end = int(time[0]), int(time[-1]) + 1  # another clock's: they have their own span
    elif len(time):
        begin, end = min(begin, int(time[0])), max(end, int(time[-1]) + 1)
    collections = time[event == _RESET]
    if recording.source == "tracker" and len(collections):
        end = int(collections[-1])  # of what came later, nothing is known
    return begin, max(end - begin, 1)


def _since(time: Ints, collections: Ints) -> Ints:
    """Return when the collection began that ended at each time."""
    edges = np.concatenate(([0], np.unique(collections)))
    return edges[np.maximum(np.searchsorted(edges, time, "left") - 1, 0)]


def _occurrences(slot: Ints, page: Ints) -> tuple[Ints, Ints, Ints]:
    """Number the pages, and find each push's predecessor and each page's last push."""
    if not len(page):
        none = np.empty(0, np.int64)
        return none, none, none
    order = np.lexsort((page, slot))  # stable: pushes of one page stay in their order
    same = (np.diff(slot[order]) == 0) & (np.diff(page[order]) == 0)
    key = np.empty(len(page), np.int64)
    key[order] = np.concatenate(([0], np.cumsum(~same)))
    previous = np.full(len(page), -1, np.int64)
    previous[order[1:][same]] = order[:-1][same]
    last = order[np.concatenate((~same, [True]))]
    return key, previous, last


def _slots(slot: Ints, page: Ints, key: Ints) -> tuple[Slot, ...]:
    found = []
    for number in np.unique(slot):
        here = slot == number
        pages = page[here]
        found.append(
            Slot(
                slot=int(number),
                pages=len(np.unique(key[here])),
                first=int(pages.min()),
                last=int(pages.max()),
                pushes=len(pages),
            )
        )
    return tuple(found)


def _rings(columns: Mapping[str, Ints], sampling: int) -> tuple[Ring, ...]:
    """Follow each vCPU's counters."""
    dirty, reset = columns["dirty_index"], columns["reset_index"]
    known = (dirty != _UNKNOWN) & (columns["event"] != _EXIT)
    pid, vcpu = (
        np.where(columns[name] == _UNKNOWN, -1, columns[name])[known] for name in ("pid", "vcpu")
    )
    whose = (pid << 32) + vcpu  # both are 32 bits wide
    rows = np.flatnonzero(known)
    found = []
    for one in np.unique(whose):
        first = int(np.argmax(whose == one))
        here = rows[whose == one]
        # The first row counts for itself. A counter that goes back is another ring's (two VMs
        # in one process look alike): such a row counts for itself too.
        itself = np.where(columns["event"][here] == _PUSH, sampling, 0)
        step = np.diff(dirty[here]) % _COUNTER
        pushed = itself.copy()
        pushed[1:] = np.where(step < _COUNTER // 2, step, itself[1:])
        found.append(
            Ring(
                pid=int(pid[first]),
                vcpu=int(vcpu[first]),
                time_ns=columns["time_ns"][here],
                fill=np.where(reset[here] == _UNKNOWN, -1, (dirty[here] - reset[here]) % _COUNTER),
                pushed=pushed,
            )
        )
    return tuple(found)
