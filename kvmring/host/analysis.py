"""What a trace says: dirty rate, ring fill, heat map, working set. Numbers only, by numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmring.host.traces import NS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvmring.host.traces import Trace

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

__all__ = [
    "MAX_WINDOWS",
    "Fill",
    "HeatMap",
    "WorkingSet",
    "default_windows",
    "dirty_rate",
    "heat_map",
    "ring_fill",
    "working_set",
]

MAX_WINDOWS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """How often parts of a slot were dirtied, over time.

    Attributes:
        slot: The slot.
        seconds: Edges of the columns.
        pages: Edges of the rows, in page numbers.
        pushes: Rows by columns; a sampled push counts for those it stands for.
    """

    slot: int
    seconds: Floats
    pages: Ints
    pushes: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """A ring's highest fill in each of many stretches of time.

    Attributes:
        pid, vcpu: Whose ring it is.
        seconds: Edges of the stretches.
        most: Entries; not-a-number before the first event.
    """

    pid: int
    vcpu: int
    seconds: Floats
    most: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingSet:
    """Different pages dirtied in windows of one length, laid end to end.

    Attributes:
        seconds: The windows' length.
        windows: How many fit into the recording.
        mean_pages: Different pages that rows name, the windows' mean.
        max_pages: The most of a window, the one that ends with the recording included.
        max_pages_bound: What max_pages may be in truth: of a sampled recording every push
            left out may have been of another page. Equal to max_pages without sampling.
    """

    seconds: float
    windows: int
    mean_pages: float
    max_pages: int
    max_pages_bound: int


def _edges(trace: Trace, bins: int) -> Floats:
    """Cut the recording into equal stretches; return their edges in seconds."""
    return np.linspace(0.0, trace.seconds, bins + 1)


def _stretch(trace: Trace, time_ns: Ints, bins: int) -> Ints:
    """Tell which of the equal stretches a time lies in, in integers: no edge moves by rounding."""
    return np.minimum(time_ns * bins // trace.length_ns, bins - 1)


def dirty_rate(trace: Trace, bins: int) -> tuple[Floats, Floats]:
    """Return the edges of equal stretches of time, in seconds, and the pushes per second in each.

    A Tracker's collection is spread evenly over the time since the one before.
    """
    edges = _edges(trace, bins)
    if trace.exact_times:
        places = _stretch(trace, trace.uncounted_ns, bins)
        total = np.bincount(places, minlength=bins) * float(trace.sampling)
        for ring in trace.rings:
            places = _stretch(trace, ring.time_ns, bins)
            total += np.bincount(places, weights=ring.pushed, minlength=bins)
    else:
        ends, firsts = np.unique(trace.time_ns, return_index=True)
        after = np.append(firsts[1:], len(trace.time_ns))
        moments = np.stack([trace.since_ns[firsts], ends], axis=1).ravel() / NS
        sums = np.stack([firsts, after], axis=1).ravel()
        total = np.diff(np.interp(edges, moments, sums)) if len(ends) else np.zeros(bins)
    return edges, total / np.diff(edges)


def ring_fill(trace: Trace, bins: int) -> list[Fill]:
    """Return each ring's highest fill in equal stretches of time."""
    edges = _edges(trace, bins)
    found = []
    for ring in trace.rings:
        known = ring.fill >= 0
        fill, time = ring.fill[known].astype(float), ring.time_ns[known]
        place = _stretch(trace, time, bins)
        most = np.full(bins, -1.0)
        np.maximum.at(most, place, fill)
        # what was in the ring at the beginning of a stretch is in it too
        before = np.searchsorted(place, np.arange(bins), "left") - 1
        if len(fill):
            entering = np.where(before >= 0, fill[np.maximum(before, 0)], -1.0)
            most = np.maximum(most, entering)
        most[most < 0] = np.nan
        found.append(Fill(pid=ring.pid, vcpu=ring.vcpu, seconds=edges, most=most))
    return found


def heat_map(trace: Trace, slot: int, *, columns: int, rows: int) -> HeatMap:
    """Count the pushes of a slot by time and page, in at most rows x columns cells.

    Of a Tracker's recording a column is a collection, as long as there are not more of them.
    """
    about = next(s for s in trace.slots if s.slot == slot)
    step = -(-(about.last + 1 - about.first) // rows)
    pages = np.arange(about.first, about.last + 1 + step, step)
    seconds = _edges(trace, columns)
    here = trace.slot == slot
    column = _stretch(trace, trace.time_ns[here], columns)
    if not trace.exact_times:
        ends = np.array([0, trace.length_ns], np.int64)
        edges = np.unique(np.concatenate([ends, trace.since_ns, trace.time_ns]))
        if len(edges) <= columns:
            column = np.searchsorted(edges, trace.time_ns[here], "left") - 1
            seconds, columns = edges / NS, len(edges) - 1
    # counted by page and time as integers: page numbers need not fit a float
    row = (trace.page[here] - about.first) // step
    cells = row * columns + column
    counts = np.bincount(cells, minlength=(len(pages) - 1) * columns)
    return HeatMap(
        slot=slot,
        seconds=seconds,
        pages=pages,
        pushes=(counts.reshape(-1, columns) * trace.sampling).astype(np.float64),
    )


def default_windows(trace: Trace) -> list[float]:
    """Choose window lengths for working_set(): 1, 2, 5, 10, ... from what the trace resolves."""
    shortest = max(trace.seconds / 10_000, 0.001, trace.resolution_ns / NS)
    series = (m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5))
    return [w for w in series if shortest <= w <= trace.seconds]


def working_set(trace: Trace, windows: Sequence[float]) -> list[WorkingSet]:
    """Count the different pages in windows of each length, laid end to end from the beginning.

    Args:
        trace: The trace.
        windows: Lengths in seconds.

    Raises:
        ValueError: A window is longer than the recording, or shorter than a Tracker's longest
            collection, whose pages all have the time of its end.
    """
    return [_working_set(trace, seconds) for seconds in windows]


def _working_set(trace: Trace, seconds: float) -> WorkingSet:
    width = round(seconds * NS)
    if not 0 < width <= trace.length_ns:
        raise ValueError(
            f"window {seconds:g} s: it must be longer than 0 and at most as long as the "
            f"recording, {trace.seconds:.3f} s"
        )
    if width < trace.resolution_ns:
        raise ValueError(
            f"window {seconds:g} s: this recording has the times of collections, and the "
            f"longest took {trace.resolution_ns / NS:.3f} s; take at least that"
        )
    number = trace.length_ns // width
    if number > MAX_WINDOWS:
        raise ValueError(
            f"window {seconds:g} s: {number:,} of them fit into the recording; take at least "
            f"{trace.seconds / MAX_WINDOWS:g} s"
        )
    rows = len(trace.time_ns)
    edges = np.searchsorted(trace.time_ns, np.arange(number + 1) * width, "left")
    if number * width == trace.length_ns:
        edges[-1] = rows  # a collection at the very end belongs to the last window
    window = np.repeat(np.arange(number), np.diff(edges))
    first = trace.previous[: edges[-1]] < edges[window]
    counts = np.bincount(window[first], minlength=number)
    # the window that ends with the recording: whole windows may leave its last part out
    tail = int(np.searchsorted(trace.time_ns, trace.length_ns - width, "left"))
    most = max(int(counts.max()), trace.count(tail, rows))
    bound = most
    if trace.sampling > 1:
        bound = trace.sampling * max(int(np.diff(edges).max()), rows - tail)
        bound = max(most, min(bound, trace.memory_pages) if trace.memory_known else bound)
    return WorkingSet(
        seconds=seconds,
        windows=number,
        mean_pages=float(counts.mean()),
        max_pages=most,
        max_pages_bound=bound,
    )
