"""The numbers of a trace against brute force over small random ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmring.host import analysis, traces

from .recorded import Row, collections, pushes, recording_of, trace_of

MS = 1_000_000
LENGTH = 50 * MS
EVENTS = st.lists(
    st.tuples(st.integers(0, LENGTH - 1), st.integers(0, 2), st.integers(0, 9)), max_size=60
)
Events = list[tuple[int, int, int]]


def place(time: int, bins: int) -> int:
    """Tell which of the equal stretches of a recording a time lies in."""
    return next(i for i in range(bins) if i * LENGTH <= time * bins < (i + 1) * LENGTH)


@settings(max_examples=60)
@given(EVENTS)
def test_pages_and_their_predecessors(events: Events) -> None:
    trace = trace_of(pushes(events), length_ns=LENGTH)
    ordered = sorted(events, key=lambda event: event[0])
    assert trace.time_ns.tolist() == [time for time, _, _ in ordered]
    named = [(slot, page) for _, slot, page in ordered]
    assert list(zip(trace.slot.tolist(), trace.page.tolist(), strict=True)) == named
    keys = trace.key.tolist()
    assert len(set(zip(named, keys, strict=True))) == len(set(named)) == trace.distinct
    for i, what in enumerate(named):
        before = [j for j in range(i) if named[j] == what]
        assert trace.previous[i] == (before[-1] if before else -1)
        assert trace.last[keys[i]] == max(j for j, other in enumerate(named) if other == what)
    assert trace.pushes == len(events)
    assert trace.unrecorded == 0
    for slot in trace.slots:
        pages = {page for number, page in named if number == slot.slot}
        assert (slot.pages, slot.first, slot.last) == (len(pages), min(pages), max(pages))
        assert slot.pushes == sum(number == slot.slot for number, _ in named)
    assert sum(slot.pages for slot in trace.slots) == trace.distinct
    assert trace.memory_pages == sum(slot.last + 1 for slot in trace.slots)
    assert not trace.memory_known


@settings(max_examples=60)
@given(EVENTS, st.integers(1, LENGTH))
def test_working_set(events: Events, width: int) -> None:
    trace = trace_of(pushes(events), length_ns=LENGTH)
    (found,) = analysis.working_set(trace, [width / 1e9]) if width > 100 else [None]
    if found is None:
        with pytest.raises(ValueError, match="fit into the recording"):
            analysis.working_set(trace, [10 / 1e9])
        return

    def unique(begin: int, end: int) -> int:
        return len({(slot, page) for time, slot, page in events if begin <= time < end})

    number = LENGTH // width
    assert found.windows == number
    # windows without events are not gone through one by one: there may be half a million
    busy = {time // width for time, _, _ in events if time // width < number}
    sizes = [unique(i * width, (i + 1) * width) for i in busy]
    assert math.isclose(found.mean_pages * number, sum(sizes), abs_tol=1e-6)
    assert found.max_pages == max([*sizes, unique(LENGTH - width, LENGTH)])
    assert found.max_pages_bound == found.max_pages


def test_the_last_part_that_no_whole_window_reaches_counts() -> None:
    trace = trace_of(pushes([(0, 0, 0), (48 * MS, 0, 1), (49 * MS, 0, 2)]), length_ns=LENGTH)
    (found,) = analysis.working_set(trace, [0.040])
    assert (found.windows, found.mean_pages, found.max_pages) == (1, 1.0, 2)


@settings(max_examples=40)
@given(EVENTS, st.integers(1, 20), st.integers(1, 7))
def test_rate_and_heat(events: Events, bins: int, sampling: int) -> None:
    trace = trace_of(pushes(events), length_ns=LENGTH, sampling=sampling)
    edges, rate = analysis.dirty_rate(trace, bins)
    assert len(edges) == bins + 1
    assert edges[-1] == LENGTH / 1e9
    for i, found in enumerate(rate):
        number = sum(place(time, bins) == i for time, _, _ in events)
        assert math.isclose(found * (edges[i + 1] - edges[i]), sampling * number, abs_tol=1e-6)
    for slot in trace.slots:
        heat = analysis.heat_map(trace, slot.slot, columns=bins, rows=4)
        assert heat.pages[0] == slot.first
        assert heat.pages[-1] > slot.last
        assert len(heat.pages) <= 5
        for row in range(len(heat.pages) - 1):
            for column in range(bins):
                number = sum(
                    number == slot.slot
                    and heat.pages[row] <= page < heat.pages[row + 1]
                    and place(time, bins) == column
                    for time, number, page in events
                )
                assert heat.pushes[row, column] == sampling * number


STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),  # vCPU
        st.integers(0, 5),  # pushes before the row
        st.booleans(),  # the row is a reset, of everything
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(STEPS, st.integers(0, 1 << 32), st.integers(1, 9))
def test_counters_count_what_rows_leave_out(
    steps: list[tuple[int, int, bool]], start: int, bins: int
) -> None:
    rows: list[Row] = []
    dirty, reset = [start, 7], [start, 7]
    seen = [False, False]
    truth: list[tuple[int, int, int]] = []  # time, vCPU, pushes since the vCPU's last row
    fills: list[tuple[int, int, int]] = []
    for i, (vcpu, number, is_reset) in enumerate(steps):
        time = i * MS
        number += not is_reset  # a push row tells of itself at least
        dirty[vcpu] += number
        if is_reset:
            reset[vcpu] = dirty[vcpu]
        row: Row = {
            "time_ns": time,
            "pid": 3,
            "vcpu": vcpu,
            "event": "reset" if is_reset else "push",
            "dirty_index": dirty[vcpu] % (1 << 32),
            "reset_index": reset[vcpu] % (1 << 32),
        }
        rows.append(row)
        truth.append((time, vcpu, number if seen[vcpu] else not is_reset))
        fills.append((time, vcpu, dirty[vcpu] - reset[vcpu]))
        seen[vcpu] = True
    trace = trace_of(rows, length_ns=LENGTH)
    assert trace.pushes == sum(number for _, _, number in truth)
    assert trace.unrecorded == trace.pushes - sum(row["event"] == "push" for row in rows)
    edges, rate = analysis.dirty_rate(trace, bins)
    for i, found in enumerate(rate):
        number = sum(n for time, _, n in truth if place(time, bins) == i)
        assert math.isclose(found * (edges[i + 1] - edges[i]), number, abs_tol=1e-6)
    assert [(f.pid, f.vcpu) for f in analysis.ring_fill(trace, bins)] == [
        (3, vcpu) for vcpu in range(2) if seen[vcpu]
    ]
    for fill in analysis.ring_fill(trace, bins):
        own = [(place(time, bins), n) for time, vcpu, n in fills if vcpu == fill.vcpu]
        for i, most in enumerate(fill.most):
            there = [n for where, n in own if where == i]
            there += [n for where, n in own if where < i][-1:]
            assert math.isnan(most) if not there else most == max(there)


def test_another_rings_counters_do_not_count_as_billions() -> None:
    # two VMs in one process look alike: their counters alternate in what seems one ring
    rows: list[Row] = [
        {"time_ns": i, "pid": 3, "vcpu": 0, "event": "push", "dirty_index": n, "reset_index": 0}
        for i, n in enumerate((1000, 5, 1001, 6))
    ]
    trace = trace_of(rows, length_ns=10)
    assert trace.pushes < 3000


def test_sampled_pushes_count_for_the_pushes_they_stand_for() -> None:
    events = [(i * MS, 0, i % 10) for i in range(50)]
    trace = trace_of(pushes(events), length_ns=LENGTH, sampling=100, slots={0: 10_000})
    assert trace.pushes == 5000
    (found,) = analysis.working_set(trace, [0.010])
    assert (found.max_pages, found.max_pages_bound) == (10, 1000)
    (found,) = analysis.working_set(trace, [0.050])
    assert (found.max_pages, found.max_pages_bound) == (10, 5000)
    few = trace_of(pushes(events), length_ns=LENGTH, sampling=100, slots={0: 400})
    (found,) = analysis.working_set(few, [0.050])
    assert found.max_pages_bound == 400


def test_a_trackers_pages_are_spread_over_their_collection() -> None:
    rows = collections([(10 * MS, [(0, 1), (0, 2)]), (20 * MS, []), (40 * MS, [(0, 1)] * 1)])
    trace = trace_of(rows, length_ns=77 * MS, source="tracker")
    assert trace.length_ns == 40 * MS  # of what came after the last collection nothing is known
    assert trace.since_ns.tolist() == [0, 0, 20 * MS]
    assert trace.resolution_ns == 20 * MS
    _, rate = analysis.dirty_rate(trace, 4)
    assert rate.tolist() == pytest.approx([200, 0, 50, 50])
    heat = analysis.heat_map(trace, 0, columns=4, rows=2)
    assert heat.seconds.tolist() == [0, 0.010, 0.020, 0.040]
    assert heat.pushes.tolist() == [[1, 0, 1], [1, 0, 0]]
    assert analysis.heat_map(trace, 0, columns=2, rows=2).pushes.tolist() == [[1, 1], [1, 0]]
    with pytest.raises(ValueError, match=r"longest took 0\.020 s"):
        analysis.working_set(trace, [0.010])
    (found,) = analysis.working_set(trace, [0.040])
    assert (found.windows, found.max_pages) == (1, 2)
    assert min(analysis.default_windows(trace)) >= 0.020


def test_an_empty_recording_has_no_numbers_but_zeros() -> None:
    trace = trace_of([], length_ns=LENGTH)
    assert (trace.pushes, trace.distinct, trace.memory_pages) == (0, 0, 0)
    assert analysis.dirty_rate(trace, 3)[1].tolist() == [0, 0, 0]
    assert analysis.ring_fill(trace, 3) == []
    assert all(s.max_pages == 0 for s in analysis.working_set(trace, [0.001, 0.05]))


@pytest.mark.parametrize("window", [0.0, -1.0, 0.0501])
def test_windows_that_do_not_fit(window: float) -> None:
    trace = trace_of(pushes([(1, 0, 0)]), length_ns=LENGTH)
    with pytest.raises(ValueError, match=r"at most as long as the recording, 0\.050 s"):
        analysis.working_set(trace, [window])


def test_events_of_another_clock_have_their_own_span() -> None:
    events = pushes([(10**15, 0, 1), (10**15 + MS, 0, 2)])
    trace = traces.load(recording_of(events, length_ns=LENGTH))
    assert trace.length_ns == MS + 1
    assert trace.time_ns.tolist() == [0, MS]
