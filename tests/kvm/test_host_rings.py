"""Rings of another process, by copies and by events, against what that process pushed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, ClosedError, KvmNotSupported, StateError, host
from kvmring.host import EventKind, State

from ..gates import needs
from .other import Neighbour, mounted_tracefs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .rig import RingFacts

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)


@pytest.fixture(scope="module")
def tracefs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from mounted_tracefs(tmp_path_factory.mktemp("mounts") / "tracing")


@pytest.fixture
def other(facts: RingFacts) -> Iterator[Neighbour]:
    with Neighbour({"entries": 4 * facts.smallest, "vcpus": 2, "pages": 16384}) as neighbour:
        yield neighbour


def observe(other: Neighbour, vcpu: int = 0) -> host.RingObserver:
    return host.RingObserver(other.pid, host.inspect(other.pid).rings[vcpu], pages=256)


# By copies


def test_pushes_harvests_and_resets_are_seen_one_by_one(other: Neighbour) -> None:
    with observe(other) as ring:
        assert ring.poll().fill == 0
        other.do("write", first=10, pages=100)
        view = ring.poll()
        assert (view.pushed, view.dirty, view.harvested, view.lapped) == (100, 100, 0, False)
        assert [page.offset for page in view.pages] == list(range(109, 9, -1))
        assert {page.slot for page in view.pages} == {0}
        other.do("harvest")
        view = ring.poll()
        assert (view.pushed, view.dirty, view.harvested, view.reset) == (0, 0, 100, 0)
        other.do("reset")
        view = ring.poll()
        assert (view.pushed, view.fill, view.reset) == (0, 0, 100)


def test_an_observer_that_comes_late_counts_from_then_on(other: Neighbour) -> None:
    other.do("write", first=0, pages=300)
    with observe(other) as in_use:
        assert in_use.poll().pushed == 0
        other.do("harvest")
        other.do("reset")
        with observe(other) as free:  # nothing tells where KVM writes next
            assert free.poll().write is None
            other.do("write", first=1000, pages=50)
            assert free.poll().pushed == in_use.poll().pushed == 50


def test_a_missed_round_is_a_lower_bound(other: Neighbour) -> None:
    with observe(other) as ring:
        ring.poll()
        done = other.do("write", first=0, pages=16384)
        view = ring.poll()
        truth = done["entries"] + view.dirty
        assert view.lapped
        assert view.entries - 128 <= view.pushed <= truth


def test_polled_figures_agree_with_what_was_logged(other: Neighbour) -> None:
    other.flow(seconds=2.0, pages=500, every_s=0.002)
    pushed, lapped = 0, False
    with host.Watcher(other.pid, events=False) as watcher:
        assert watcher.why_polling == "events were not asked for"
        other.go()
        while other.busy:
            for ring in watcher.follow(0.2):
                assert ring.full_exits is None
                pushed += ring.pushed
                lapped |= ring.lapped
        pushed += sum(ring.pushed for ring in watcher.follow(0))
    truth = other.done()["entries"]
    assert pushed <= truth
    assert lapped or pushed >= 0.99 * truth


def test_nothing_is_missed_by_polls_that_did_not_lap(other: Neighbour) -> None:
    with observe(other) as one, observe(other, 1) as two:
        rings = (one, two)
        for ring in rings:
            ring.poll()
        other.flow(seconds=1.5, pages=500, every_s=0.005)
        other.go()
        pushed, lapped = 0, 0
        while other.busy:
            views = [ring.poll() for ring in rings]
            pushed += sum(view.pushed for view in views)
            lapped += sum(view.lapped for view in views)
        pushed += sum(ring.poll().pushed for ring in rings)
        truth = other.done()["entries"]
    assert pushed <= truth
    if not lapped:
        assert pushed >= 0.99 * truth


def test_a_process_that_ends_while_it_is_watched(other: Neighbour) -> None:
    with observe(other) as ring, host.Watcher(other.pid, events=False) as watcher:
        other.end()
        with pytest.raises(ProcessLookupError, match=f"process {other.pid} has ended"):
            ring.poll()
        with pytest.raises(ProcessLookupError, match=f"process {other.pid}"):
            watcher.follow(0)


def test_a_ring_that_goes_away_is_dropped(facts: RingFacts) -> None:
    plan = {"entries": facts.smallest, "vcpus": 1, "pages": 64}
    with Neighbour(plan, plan) as other, observe(other) as first:
        first.poll()
        other.do("close", vm=0)
        other.do("close", vm=1)
        with pytest.raises((ProcessLookupError, StateError)):
            host.Watcher(other.pid).follow(0)
        with pytest.raises(ProcessLookupError, match="unmapped"):
            first.poll()


def test_closed(other: Neighbour) -> None:
    ring = observe(other)
    ring.close()
    with pytest.raises(ClosedError):
        ring.poll()


def test_a_vcpu_that_is_not_there(other: Neighbour) -> None:
    with pytest.raises(StateError, match="no vCPU 7"):
        host.Watcher(other.pid, vcpu=7)


def test_bitmap_and_ring_mode_are_told_apart() -> None:
    with (
        Neighbour({"entries": 0, "vcpus": 1, "pages": 64}) as other,
        host.Watcher(other.pid) as watcher,
    ):
        other.do("write", first=0, pages=64)
        rings = watcher.follow(0)
        assert rings == ()
        assert host.judge(rings).state is State.NO_RING


def test_a_stuck_ring_is_recognised_without_events(other: Neighbour) -> None:
    other.do("stuck", times=1)
    with host.Watcher(other.pid, vcpu=0, events=False) as watcher:
        other.do("stuck", times=3)
        assert host.judge(watcher.follow(0.1)).state is State.STUCK


# By events


def test_every_event_in_order_with_its_page(other: Neighbour, tracefs: Path) -> None:
    with host.RingEvents(other.pid, tracefs=tracefs) as events:
        other.do("write", first=50, pages=200)
        other.do("write", first=50, pages=7, vcpu=1)
        other.do("harvest")
        other.do("reset")
        found = events.read()
        assert events.lost == 0
        assert events.read() == []
    pushes = [event for event in found if event.event is EventKind.PUSH]
    zero = [event for event in pushes if event.vcpu == 0]
    assert [event.page for event in zero] == list(range(50, 250))
    assert [event.dirty_index for event in zero] == list(range(1, 201))
    assert {event.slot for event in pushes} == {0}
    assert [event.page for event in pushes if event.vcpu == 1] == []  # vCPU 0 was first
    resets = {event.vcpu: event for event in found if event.event is EventKind.RESET}
    assert (resets[0].dirty_index, resets[0].reset_index) == (200, 200)
    times = [event.time_ns for event in found]
    assert times == sorted(times)


def test_full_exits_are_events(other: Neighbour, tracefs: Path) -> None:
    with host.RingEvents(other.pid, kinds=[EventKind.EXIT], tracefs=tracefs) as events:
        done = other.do("write", first=0, pages=16384)
        found = events.read()
    assert {event.event for event in found} == {EventKind.EXIT}
    assert len(found) == done["exits"] > 0


def test_a_sample_gives_the_exact_count(other: Neighbour, tracefs: Path) -> None:
    with host.RingEvents(other.pid, sample=97, tracefs=tracefs) as events:
        done = other.do("write", first=0, pages=16384)
        done["entries"] += other.do("harvest")["entries"]
        other.do("reset")
        found = events.read()
    pushes = [event for event in found if event.event is EventKind.PUSH]
    assert len(pushes) == done["entries"] // 97
    last = max(event.dirty_index or 0 for event in found)
    assert last == done["entries"], "the counters count what no sample shows"


def test_lost_events_are_counted(other: Neighbour, tracefs: Path) -> None:
    with host.RingEvents(
        other.pid, kinds=[EventKind.PUSH], buffer_pages=1, tracefs=tracefs
    ) as events:
        done = other.do("write", first=0, pages=16384)
        done["entries"] += other.do("harvest")["entries"]
        found = events.read()
        assert events.lost > 0
        assert len(found) + events.lost == done["entries"]


def test_watching_by_events_counts_the_pushes(other: Neighbour, tracefs: Path) -> None:
    other.flow(seconds=1.5, pages=3000, every_s=0.01)
    figures: list[host.RingFigures] = []
    with host.Watcher(other.pid, tracefs=tracefs) as watcher:
        assert watcher.exact, watcher.why_polling
        other.go()
        while other.busy:
            figures += watcher.follow(0.2)
        figures += watcher.follow(0)
    done = other.done()
    # exact here; on an emulated host one push in 18,621 was missed once, with nothing to show
    # which: what is promised is 99.5 %, and never one too many
    assert 0.995 * done["entries"] <= sum(ring.pushed for ring in figures) <= done["entries"]
    assert max(ring.high_water for ring in figures) <= figures[0].entries
    assert {ring.found_by for ring in figures[-2:]} == {"event"}


def test_what_the_figures_say_is_what_was_done(other: Neighbour, tracefs: Path) -> None:
    with host.Watcher(other.pid, vcpu=0, tracefs=tracefs) as watcher:
        other.do("write", first=0, pages=300)
        (ring,) = watcher.follow(0)
        assert (ring.pushed, ring.fill, ring.high_water, ring.reset) == (300, 300, 300, 0)
        assert not ring.lapped
        other.do("harvest")
        (ring,) = watcher.follow(0)
        assert (ring.pushed, ring.unreset) == (0, 300)
        other.do("reset")
        (ring,) = watcher.follow(0)
        assert (ring.pushed, ring.reset, ring.harvests, ring.fill) == (0, 300, 1, 0)
        assert host.judge([ring]).state is State.HEALTHY
        done = other.do("write", first=0, pages=16384)
        (ring,) = watcher.follow(0)
        assert (ring.full_exits, ring.reset) == (done["exits"], done["entries"])
        assert host.judge([ring]).state in (State.TOO_SMALL, State.TOO_SLOW)
        other.do("harvest")
        other.do("reset")
        watcher.follow(0)
        assert host.judge(watcher.follow(0)).state is State.IDLE
        other.do("stuck", times=1)
        watcher.follow(0)
        other.do("stuck", times=5)
        (ring,) = watcher.follow(0)
        assert ring.full_exits == 5
        assert host.judge([ring]).state is State.STUCK


def test_hot_pages_are_the_ones_that_are_written_again(other: Neighbour, tracefs: Path) -> None:
    with host.RingEvents(other.pid, kinds=[EventKind.PUSH], tracefs=tracefs) as events:
        with host.Watcher(other.pid, vcpu=0, events=False, top=8) as watcher:
            for turn in range(30):
                other.do("write", first=7, pages=8)
                other.do("write", first=1000 + 40 * turn, pages=40)
                ring = watcher.follow(0)
                other.do("harvest")
                other.do("reset")
        pushed = [event.page for event in events.read()]
    hot = {(slot, page) for slot, page, _ in ring[0].hot}
    assert hot == {(0, page) for page in range(7, 15)}
    assert pushed.count(7) == 30


def test_two_vms_with_the_same_vcpu_are_polled(facts: RingFacts, tracefs: Path) -> None:
    plan = {"entries": facts.smallest, "vcpus": 1, "pages": 64}
    with Neighbour(plan, plan) as other, host.Watcher(other.pid, tracefs=tracefs) as watcher:
        assert "two VMs" in (watcher.why_polling or "")
        other.do("write", vm=1, first=0, pages=20)
        assert sorted(ring.pushed for ring in watcher.follow(0)) == [0, 20]


def test_without_tracefs_the_rings_are_polled_and_it_is_said(
    other: Neighbour, tmp_path: Path
) -> None:
    with pytest.raises(KvmNotSupported, match="has none"):
        host.RingEvents(other.pid, tracefs=tmp_path)
    with host.Watcher(other.pid, tracefs=tmp_path) as watcher:
        assert not watcher.exact
        assert "kvm_dirty_ring_push" in (watcher.why_polling or "")
        other.do("write", first=0, pages=33)
        assert [ring.pushed for ring in watcher.follow(0)] == [33, 0]


def test_arguments(other: Neighbour, tracefs: Path) -> None:
    for what, match in (
        ({"sample": 0}, "sample"),
        ({"buffer_pages": 3}, "power of two"),
        ({"kinds": ()}, "at least one"),
    ):
        with pytest.raises(ValueError, match=match):
            host.RingEvents(other.pid, tracefs=tracefs, **what)


def test_a_counter_that_misses_one_push_in_a_hundred_is_noticed(
    other: Neighbour, tracefs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with the truth, made above, fails when it should."""
    read = host.RingEvents.read

    def lossy(events: host.RingEvents) -> list[host.RingEvent]:
        return [
            event._replace(dirty_index=event.dirty_index - event.dirty_index // 100)
            for event in read(events)
            if event.dirty_index is not None
        ]

    monkeypatch.setattr(host.RingEvents, "read", lossy)
    with host.Watcher(other.pid, vcpu=0, tracefs=tracefs) as watcher:
        done = other.do("write", first=0, pages=16384)
        entries = done["entries"] + other.do("harvest")["entries"]
        other.do("reset")
        (ring,) = watcher.follow(0)
    assert ring.pushed < entries
