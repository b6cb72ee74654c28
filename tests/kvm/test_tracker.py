"""The Tracker over every source: what it collects is exactly what was written, in any order.

Each guarantee has a twin here that breaks it on purpose and sees the comparison fail.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvmring import (
    VM,
    Cap,
    DirtySet,
    ResetResult,
    Runner,
    Source,
    StateError,
    System,
    Tracker,
)
from kvmring.guests import PageWriter, page_order

from ..gates import needs, needs_kvm
from .rig import PAGE, Rig, RingFacts, assert_exact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmring import VCPU, Exit

pytestmark = needs_kvm()
PAGES = 512
MODES = ("ring", "clear-log", "bitmap")


def rig_for(kvm: System, facts: RingFacts, mode: str, *, pages: int = PAGES, vcpus: int = 1) -> Rig:
    return Rig(kvm, pages=pages, vcpus=vcpus, entries=facts.smallest if mode == "ring" else 0)


def source_for(rig: Rig, mode: str) -> Source:
    if mode == "ring":
        return Source.AUTO
    return Source(mode)


@pytest.fixture(params=MODES)
def tracked(
    request: pytest.FixtureRequest, kvm: System, facts: RingFacts
) -> Iterator[tuple[Rig, Tracker]]:
    """Yield a rig and a Tracker at work over each source that this host has."""
    mode = str(request.param)
    if mode == "clear-log" and not kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2):
        pytest.skip("no manual protection")
    with rig_for(kvm, facts, mode) as rig, Tracker(rig.vm, source_for(rig, mode)) as tracker:
        yield rig, tracker


def write(rig: Rig, tracker: Tracker, pages: list[int], index: int = 0) -> None:
    """Have a vCPU write pages; full rings are served."""
    rig.guest.load(index, [rig.ram.gpa + page * PAGE for page in pages])
    while not rig.guest.is_done(rig.guest.run(index)):
        tracker.serve(rig.guest.vcpus[index])


def pages_in(rig: Rig, dirty: DirtySet) -> list[int]:
    return list(dirty[rig.ram.slot])


def test_a_collection_is_what_was_written_since_the_last(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    assert pages_in(rig, tracker.collect()) == []
    write(rig, tracker, list(range(PAGES)))
    assert_exact(range(PAGES), pages_in(rig, tracker.collect()))
    write(rig, tracker, [5, 6, 300])
    assert_exact([5, 6, 300], pages_in(rig, tracker.collect()))
    assert pages_in(rig, tracker.collect()) == []


def test_finish_is_the_rest_and_freezes_the_memory(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    write(rig, tracker, [1, 2, 3])
    tracker.collect()
    write(rig, tracker, [3, 4])
    saved: list[str] = []
    assert_exact([3, 4], pages_in(rig, tracker.finish(lambda: saved.append("yes"))))
    assert saved == ["yes"]
    rig.guest.vcpus[0]
    for refused in (
        lambda: rig.guest.vcpus[0].run(),
        lambda: rig.ram.write(0, b"x"),
        lambda: rig.ram.set_log_dirty(False),
        lambda: rig.vm.add_memory(1 << 33, PAGE),
        tracker.collect,
        tracker.finish,
        lambda: tracker.mark(0, 1),
    ):
        with pytest.raises(StateError):
            refused()
    tracker.close()
    rig.ram.write(0, b"x")
    write_again = Tracker(rig.vm, tracker.source)
    with write_again:
        write(rig, write_again, [9])
        assert_exact([9], pages_in(rig, write_again.collect()))


def test_a_failing_save_loses_nothing(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    write(rig, tracker, [7, 8])

    def fails() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        tracker.finish(fails)
    write(rig, tracker, [9])
    assert_exact([7, 8, 9], pages_in(rig, tracker.finish()))


def test_marked_memory_is_dirty(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    rig.ram.write(10 * PAGE - 1, b"ab")
    tracker.mark(rig.ram.gpa + 10 * PAGE - 1, 2)
    assert_exact([9, 10], pages_in(rig, tracker.collect()))
    end = rig.ram.gpa + PAGES * PAGE
    with pytest.raises(ValueError, match="no memory"):
        tracker.mark(end - 1, 2)
    assert pages_in(rig, tracker.collect()) == []


def test_deleting_a_slot_takes_its_pages_and_no_others(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    extra = rig.vm.add_memory(1 << 33, 64 * PAGE, log_dirty=True)
    write(rig, tracker, [20, 21])
    tracker.mark(extra.gpa, PAGE)
    extra.remove()
    extra.close()
    again = rig.vm.add_memory(1 << 33, 64 * PAGE, log_dirty=True)
    assert again.slot == extra.slot
    dirty = tracker.collect()
    assert_exact([20, 21], pages_in(rig, dirty))
    assert not dirty[again.slot]
    assert dirty.strays == 0


def test_pages_move_with_their_slot(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    extra = rig.vm.add_memory(1 << 33, 64 * PAGE, log_dirty=True)
    tracker.mark(extra.gpa + 5 * PAGE, PAGE)
    extra.move(1 << 34)
    dirty = tracker.collect()
    assert list(dirty.runs()) == [((1 << 34) + 5 * PAGE, PAGE)]


def test_turning_logging_off_keeps_what_was_logged(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    write(rig, tracker, [30, 31])
    rig.ram.set_log_dirty(False)
    rig.ram.set_log_dirty(True)
    write(rig, tracker, [31, 32])
    assert_exact([30, 31, 32], pages_in(rig, tracker.collect()))


def test_rearm_keeps_everything(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    write(rig, tracker, [40])
    tracker.rearm()
    write(rig, tracker, [41])
    assert_exact([40, 41], pages_in(rig, tracker.collect()))


def test_suspects_stay_dirty_until_rearmed(kvm: System, facts: RingFacts) -> None:
    with rig_for(kvm, facts, "ring") as rig, Tracker(rig.vm) as tracker:
        tracker._pending.suspects[rig.ram.slot].set(77)  # as a reset that was cut short leaves them
        for _ in range(3):
            assert_exact([77], pages_in(rig, tracker.collect()))
        assert_exact([77], pages_in(rig, tracker.suspects))
        tracker.rearm()
        assert_exact([77], pages_in(rig, tracker.collect()))
        assert pages_in(rig, tracker.collect()) == []
        write(rig, tracker, [77])
        assert_exact([77], pages_in(rig, tracker.collect()))


def test_only_one_tracker_at_a_time(tracked: tuple[Rig, Tracker]) -> None:
    rig, tracker = tracked
    second = Tracker(rig.vm, tracker.source)
    with pytest.raises(StateError, match="another Tracker"):
        second.start()
    second.close()
    with pytest.raises(StateError, match="tracking"):
        tracker.start()


@needs(Cap.DIRTY_LOG_RING_WITH_BITMAP)
def test_rings_without_the_bitmap_are_refused_where_they_lose(
    kvm: System, facts: RingFacts
) -> None:
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(facts.smallest, with_bitmap=False)
        for source in (Source.AUTO, Source.RING):
            with pytest.raises(StateError, match="without the backup bitmap"):
                Tracker(vm, source)


def test_sources_that_would_miss_pages_are_refused(kvm: System, facts: RingFacts) -> None:
    with rig_for(kvm, facts, "ring") as rig:
        have = Tracker(rig.vm)
        assert "ring" in have.why
        for source in (Source.BITMAP, Source.CLEAR_LOG):
            with pytest.raises(StateError, match="log into rings"):
                Tracker(rig.vm, source)
        other = {Source.RING, Source.RING_WITH_BITMAP} - {have.source}
        with pytest.raises(StateError, match="was set up for"):
            Tracker(rig.vm, other.pop())
    with rig_for(kvm, facts, "bitmap") as rig:
        assert Tracker(rig.vm).source in (Source.CLEAR_LOG, Source.BITMAP)
        with pytest.raises(StateError, match="comes before the vCPUs"):
            Tracker(rig.vm, Source.RING)
        with pytest.raises(TypeError):
            Tracker(rig.vm, "ring")  # type: ignore[arg-type]


@contextmanager
def running(rig: Rig, tracker: Tracker, lists: list[list[int]]) -> Iterator[Runner]:
    """Run every vCPU over its list, for ever, until the end of the block."""
    for index, pages in enumerate(lists):
        rig.guest.load(index, [rig.ram.gpa + page * PAGE for page in pages], rounds=0)

    def on_exit(vcpu: VCPU, exit: Exit) -> bool:
        assert rig.guest.is_done(exit), exit
        return False

    runner = Runner(rig.guest.vcpus, on_exit)
    tracker.attach(runner)
    with runner:
        yield runner


@pytest.mark.parametrize("mode", MODES)
def test_running_vcpus_lose_nothing(kvm: System, facts: RingFacts, mode: str) -> None:
    """After the last collection each page's contents are those of when it was last dirty."""
    if mode == "clear-log" and not kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2):
        pytest.skip("no manual protection")
    halves = [list(range(0, PAGES, 2)), list(range(1, PAGES, 2))]
    with (
        rig_for(kvm, facts, mode, vcpus=2) as rig,
        Tracker(rig.vm, source_for(rig, mode)) as tracker,
    ):
        copy = bytearray(PAGES * PAGE)
        with running(rig, tracker, halves):
            for _ in range(30):
                copy_pages(rig, tracker.collect(), copy)
            copy_pages(rig, tracker.finish(), copy)
            assert bytes(copy) == rig.ram.read()
            tracker.close()
            for index in range(2):
                rig.guest.stop(index)


@pytest.mark.parametrize("finished", [False, True])
def test_the_guest_runs_on_after_close(kvm: System, facts: RingFacts, finished: bool) -> None:
    """Its rings are still emptied: a guest outlives the Tracker of a migration that failed."""
    pages = 2 * facts.smallest
    with rig_for(kvm, facts, "ring", pages=pages) as rig:
        tracker = Tracker(rig.vm)
        tracker.start()
        with running(rig, tracker, [list(range(pages))]) as runner:
            if finished:
                tracker.finish()
            tracker.close()
            # a slot that comes and goes is not this Tracker's business any more
            rig.vm.add_memory(1 << 33, PAGE, log_dirty=True).move(1 << 34)
            runner.resume()
            full, begin = tracker.stats.ring_full_exits, rig.guest.progress(0).stores
            while tracker.stats.ring_full_exits < full + 3:
                assert runner.running
            assert rig.guest.progress(0).stores > begin
            rig.guest.stop(0)


def copy_pages(rig: Rig, dirty: DirtySet, copy: bytearray) -> None:
    """Do what a migration does: take the pages that are dirty, as they are after it is known."""
    for first, length in dirty[rig.ram.slot].runs():
        span = slice(first * PAGE, (first + length) * PAGE)
        copy[span] = rig.ram.read(first * PAGE, length * PAGE)


@pytest.mark.parametrize("loss", ["a round's set dropped", "no reset", "an entry skipped"])
def test_each_way_to_lose_pages_is_seen(
    kvm: System, facts: RingFacts, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above fails when a collector does one thing wrong."""
    with rig_for(kvm, facts, "ring") as rig, Tracker(rig.vm) as tracker:
        copy = bytearray(PAGES * PAGE)
        few = list(range(100))
        write(rig, tracker, few)
        if loss == "a round's set dropped":
            tracker.collect()
        elif loss == "no reset":
            with monkeypatch.context() as patch:
                patch.setattr(
                    VM,
                    "reset_dirty_rings",
                    lambda vm: ResetResult(reset=0, suspects=DirtySet(vm), calls=1, unknown=0),
                )
                copy_pages(rig, tracker.collect(), copy)
                write(rig, tracker, few)  # still writable: KVM sees nothing of it
                copy_pages(rig, tracker.collect(), copy)
        else:
            bin = DirtySet(rig.vm)
            assert rig.ring.harvest(bin, limit=1) == 1
        copy_pages(rig, tracker.finish(), copy)
        assert bytes(copy) != rig.ram.read()


def test_stats_count_what_happened(kvm: System, facts: RingFacts) -> None:
    with rig_for(kvm, facts, "ring", pages=4 * facts.smallest) as rig, Tracker(rig.vm) as tracker:
        write(rig, tracker, list(range(4 * facts.smallest)))
        dirty = tracker.collect()
        stats = tracker.stats
        assert stats.pages == dirty.count() == 4 * facts.smallest
        assert stats.entries == stats.pages + stats.duplicates
        assert stats.ring_full_exits >= 3
        assert stats.full_ns > 0
        assert stats.resets >= stats.ring_full_exits
        assert stats.high_water[0] >= facts.smallest // 2
        assert stats.backup_pages == 0


def test_a_reaper_keeps_rings_from_filling(kvm: System, facts: RingFacts) -> None:
    with rig_for(kvm, facts, "ring") as rig, Tracker(rig.vm) as tracker:
        with tracker.reaper(interval_s=0.001):
            write(rig, tracker, list(range(64)))
            deadline = threading.Event()
            while rig.ring.fill():
                assert not deadline.wait(0.001)
        assert_exact(range(64), pages_in(rig, tracker.collect()))
        with pytest.raises(ValueError, match="interval_s"):
            tracker.reaper(interval_s=0)


def test_a_large_backup_share_is_warned_of(kvm: System, facts: RingFacts) -> None:
    with rig_for(kvm, facts, "ring") as rig, Tracker(rig.vm) as tracker:
        tracker._pending.counts.pages = 2000
        tracker._pending.counts.backup_pages = 30
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracker.collect()
        tracker._pending.counts.backup_pages = 300
        with pytest.warns(RuntimeWarning, match="plain bitmap"):
            tracker.collect()


def test_two_slots_and_a_view_of_one_are_merged_by_address(kvm: System, facts: RingFacts) -> None:
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(facts.smallest)
        ram = vm.add_memory(1 << 30, 64 * PAGE, log_dirty=True)
        other = vm.add_memory(2 << 30, 64 * PAGE, log_dirty=True)
        guest = PageWriter(kvm, vm)
        with Tracker(vm) as tracker:
            guest.load(0, [*page_order(ram, num_pages=3), *page_order(other, num_pages=2)])
            assert guest.is_done(guest.run(0))
            dirty = tracker.collect()
            assert list(dirty.runs()) == [(ram.gpa, 3 * PAGE), (other.gpa, 2 * PAGE)]
