"""The forecast against a simulation of its own: a clock, a set of pages, and events one by one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmring import page_size
from kvmring.host.forecast import MAX_ROUNDS, converging_bandwidth, dirtied, forecast

from .recorded import collections, pushes, trace_of

LENGTH = 1000  # ns
PAGE = page_size()
EVENTS = st.lists(
    st.tuples(st.integers(0, LENGTH - 1), st.integers(0, 1), st.integers(0, 7)), max_size=40
)
Event = tuple[int, int, int, int]  # dirtied at or after, before or at, slot, page


def exact(events: list[tuple[int, int, int]]) -> list[Event]:
    return [(time, time, slot, page) for time, slot, page in events]


def in_window(events: list[Event], length: int, begin: int, end: int) -> set[tuple[int, int]]:
    """Replay the repeated recording: the pages dirtied in [begin, end)."""
    pages = set()
    for repeat in range(begin // length - 1, end // length + 1):
        for since, until, slot, page in events:
            low, high = since + repeat * length, until + repeat * length
            meets = begin <= low < end if low == high else low < end and high > begin
            if repeat >= 0 and meets:
                pages.add((slot, page))
    return pages


def simulate(
    events: list[Event], length: int, bandwidth: int, memory: int, limit_ns: int
) -> tuple[bool, list[int]]:
    """Migrate: send, see what was dirtied meanwhile, and again."""
    now, left, history = 0, memory, [memory]
    for _ in range(MAX_ROUNDS):
        time = Fraction(left * PAGE * 10**9, bandwidth)
        end = now + -(-time.numerator // time.denominator)
        left = len(in_window(events, length, now, end))
        now = end
        history.append(left)
        if Fraction(left * PAGE * 10**9, bandwidth) <= limit_ns:
            return True, history
        if end > 40 * length:
            return False, history  # what converges below does so long before
    return False, history


@settings(max_examples=100)
@given(EVENTS, st.integers(0, 3 * LENGTH), st.integers(0, 2 * LENGTH))
def test_pages_dirtied_in_a_window(
    events: list[tuple[int, int, int]], begin: int, length: int
) -> None:
    trace = trace_of(pushes(events), length_ns=LENGTH)
    # the first repeat has none before it; a migration starts there, and comes round later
    truth = in_window(exact(events), LENGTH, begin, begin + length)
    assert dirtied(trace, begin, length, memory_pages=16) == len(truth)


COLLECTIONS = st.lists(
    st.tuples(
        st.integers(1, 200), st.sets(st.tuples(st.integers(0, 1), st.integers(0, 7)), max_size=6)
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100)
@given(COLLECTIONS, st.integers(0, 3000), st.integers(1, 2000))
def test_a_trackers_page_counts_wherever_it_may_have_been_dirtied(
    taken: list[tuple[int, set[tuple[int, int]]]], begin: int, length: int
) -> None:
    now, rows, events = 0, [], []
    for took, pages in taken:
        events += [(now, now + took, slot, page) for slot, page in pages]
        now += took
        rows.append((now, sorted(pages)))
    trace = trace_of(collections(rows), length_ns=now + 500, source="tracker")
    assert trace.length_ns == now
    truth = in_window(events, now, begin, begin + length)
    assert dirtied(trace, begin, length, memory_pages=16) == len(truth)


SHORT = 60  # ns: so short that rounds often end at the very time of an event


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, SHORT - 1), st.integers(0, 1), st.integers(0, 7)), max_size=40
    ),
    st.integers(1, 64),
    st.integers(16, 40),
    st.integers(0, 40),
)
def test_forecast_is_what_the_simulation_does(
    events: list[tuple[int, int, int]], pages_per_10_ns: int, memory: int, limit_ns: int
) -> None:
    trace = trace_of(pushes(events), length_ns=SHORT)
    bandwidth = pages_per_10_ns * PAGE * 10**8
    found = forecast(trace, bandwidth, memory_pages=memory, downtime_ns=limit_ns)
    converges, history = simulate(exact(events), SHORT, bandwidth, memory, limit_ns)
    if converges or found.converges:
        assert found.converges == converges
        assert list(found.remaining) == history
        assert found.rounds == len(history) - 1
        assert found.sent_pages == sum(history)
        assert found.downtime_s == pytest.approx(history[-1] * PAGE / bandwidth)
        assert found.downtime_s is not None
        assert found.downtime_s * 1e9 <= limit_ns + 1e-6
        assert found.total_s == pytest.approx(sum(history) * PAGE / bandwidth, abs=1e-7)
    else:
        assert found.downtime_s is None
        assert list(found.remaining[: len(history)]) == history[: len(found.remaining)]


def steady(pages: int, every_ns: int, rounds: int) -> list[tuple[int, int, int]]:
    """Write pages in turn, one every so many ns."""
    return [(i * every_ns, 0, i % pages) for i in range(pages * rounds)]


def test_a_writer_of_few_pages_converges_where_they_fit_the_limit() -> None:
    # 100 pages again and again, each every 100 us: any round of 100 us or more dirties them all
    trace = trace_of(pushes(steady(100, 1000, 10)), length_ns=1_000_000)
    limit_ns = 50_000
    fits = 100 * PAGE * 10**9 // limit_ns
    for memory in (1000, 100_000):
        found = converging_bandwidth(trace, memory_pages=memory, downtime_ns=limit_ns)
        assert found is not None
        # below that bandwidth a round is longer than the limit; in it more pages are dirtied
        # than fit when the bandwidth is below a page per us
        assert found <= fits
        assert forecast(trace, found, memory_pages=memory, downtime_ns=limit_ns).converges
        less = int(found * 0.98)
        assert not forecast(trace, less, memory_pages=memory, downtime_ns=limit_ns).converges


def test_nothing_dirtied_is_one_round_at_any_bandwidth() -> None:
    trace = trace_of([], length_ns=LENGTH)
    found = forecast(trace, 1, memory_pages=100, downtime_ns=0)
    assert found.converges
    assert found.remaining == (100, 0)
    assert found.downtime_s == 0
    assert converging_bandwidth(trace, memory_pages=100, downtime_ns=1) is None


def test_more_memory_than_the_recording_lasts_repeats_it() -> None:
    # the page of the second half is dirtied in every long round, however late it begins
    trace = trace_of(pushes([(600, 0, 3)]), length_ns=LENGTH)
    assert dirtied(trace, 0, 599, memory_pages=8) == 0
    assert dirtied(trace, 0, 601, memory_pages=8) == 1
    assert dirtied(trace, 7000, 600, memory_pages=8) == 0
    assert dirtied(trace, 7601, 999, memory_pages=8) == 0
    assert dirtied(trace, 7601, 1000, memory_pages=8) == 1
    assert dirtied(trace, 7601, 10**9, memory_pages=8) == 1


def test_of_a_sampled_recording_every_push_left_out_is_another_page() -> None:
    events = [(i * 10, 0, 5) for i in range(100)]
    trace = trace_of(pushes(events), length_ns=LENGTH, sampling=20)
    assert dirtied(trace, 0, 100, memory_pages=10_000) == 200
    assert dirtied(trace, 950, 100, memory_pages=10_000) == 200
    assert dirtied(trace, 0, 100, memory_pages=150) == 150
    assert dirtied(trace, 0, 5 * LENGTH, memory_pages=10_000) == 2000


def test_rounds_are_bounded() -> None:
    # two pages in turn, and time for one: always one or two are left, never none
    trace = trace_of(pushes(steady(2, 10, 50)), length_ns=LENGTH)
    bandwidth = PAGE * 10**9 // 10
    found = forecast(trace, bandwidth, memory_pages=2, downtime_ns=5)
    assert not found.converges
    assert found.rounds == MAX_ROUNDS
