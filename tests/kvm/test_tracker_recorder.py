"""TrackerRecorder on the real device: a collection's rows are what the guest wrote."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, DirtySet, Source, StateError, Tracker, page_size

from ..gates import has, needs_kvm
from .rig import PAGE, Rig, assert_exact

pytest.importorskip("pyarrow", reason="the extra `trace` is not installed")
pytest.importorskip("numpy", reason="the extra `trace` is not installed")

from kvmring.host import traces
from kvmring.host.recording import read
from kvmring.host.tracked import TrackerRecorder

if TYPE_CHECKING:
    from pathlib import Path

    from kvmring import System
    from kvmring.host.recording import Recording

    from .rig import RingFacts

pytestmark = needs_kvm()
PAGES = 2048


def write(rig: Rig, tracker: Tracker, pages: list[int]) -> None:
    """Have the guest write pages; full rings are served."""
    rig.guest.load(0, [rig.ram.gpa + page * PAGE for page in pages])
    while not rig.guest.is_done(rig.guest.run(0)):
        tracker.serve(rig.guest.vcpus[0])


def by_collection(found: Recording, slot: int) -> list[set[int]]:
    """Return the pages of each collection: the pushes before each reset."""
    taken: list[set[int]] = []
    pages: set[int] = set()
    for row in found.table.to_pylist():
        assert row["vcpu"] is row["dirty_index"] is row["reset_index"] is None
        if row["event"] == "reset":
            taken.append(pages)
            pages = set()
        else:
            assert (row["event"], row["slot"]) == ("push", slot)
            assert row["page"] not in pages, "a page once in a collection"
            pages.add(row["page"])
    assert not pages, "a reset ends each collection"
    return taken


@pytest.mark.parametrize("mode", ["ring", "clear-log", "bitmap"])
def test_rows_are_what_was_written(
    kvm: System, facts: RingFacts, tmp_path: Path, mode: str
) -> None:
    if mode == "clear-log" and not has(Cap.MANUAL_DIRTY_LOG_PROTECT2):
        pytest.skip("no manual protection")
    path = tmp_path / "x.parquet"
    rng = random.Random(3)
    truth: list[set[int]] = []
    begin = time.monotonic_ns()
    with Rig(kvm, pages=PAGES, entries=facts.smallest if mode == "ring" else 0) as rig:
        source = Source.AUTO if mode == "ring" else Source(mode)
        with Tracker(rig.vm, source) as tracker, TrackerRecorder(tracker, path) as recorder:
            recorder.collect()
            truth.append(set())
            for number in (1, PAGES, 0, 700):
                pages = [rng.randrange(PAGES) for _ in range(number)]
                if pages:
                    write(rig, tracker, pages)
                dirty = recorder.collect()
                assert_exact(pages, dirty[rig.ram.slot])
                truth.append(set(pages))
            write(rig, tracker, [5, 6])
            assert_exact([5, 6], recorder.finish()[rig.ram.slot])
            truth.append({5, 6})
        found = read(path)
        assert by_collection(found, rig.ram.slot) == truth
        assert found.slots == {rig.ram.slot: PAGES}
    assert found.source == "tracker"
    assert found.page_size == page_size()
    assert found.ring_entries == (facts.smallest if mode == "ring" else None)
    trace = traces.load(found)
    assert not trace.exact_times
    assert trace.pushes == sum(map(len, truth))
    assert trace.distinct == len(set().union(*truth))
    assert (trace.memory_pages, trace.memory_known) == (PAGES, True)
    times = [int(str(value)) for value in found.table["time_ns"].to_pylist()]
    assert times == sorted(times)
    assert begin <= found.begin_ns <= times[0] <= times[-1] <= found.end_ns


def test_a_page_kept_back_is_seen_here(
    kvm: System, facts: RingFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    collect = Tracker.collect

    def lossy(tracker: Tracker, *, flush: bool = True) -> DirtySet:
        dirty = collect(tracker, flush=flush)
        dirty[0].clear(7, num_pages=1)
        return dirty

    monkeypatch.setattr(Tracker, "collect", lossy)
    with (
        Rig(kvm, pages=64, entries=facts.smallest) as rig,
        Tracker(rig.vm) as tracker,
        TrackerRecorder(tracker, path) as recorder,
    ):
        write(rig, tracker, [6, 7, 8])
        recorder.collect()
        assert rig.ram.slot == 0
    assert by_collection(read(path), 0) == [{6, 8}]


def test_errors_of_the_tracker_come_through_and_the_file_is_whole(
    kvm: System, facts: RingFacts, tmp_path: Path
) -> None:
    path = tmp_path / "x.parquet"
    with Rig(kvm, pages=64, entries=facts.smallest) as rig:
        tracker = Tracker(rig.vm)
        with (
            pytest.raises(StateError, match="needs it tracking"),
            TrackerRecorder(tracker, path) as recorder,
        ):
            recorder.collect()
        tracker.close()
    assert len(read(path)) == 0


def test_a_slot_that_went_keeps_its_pages(kvm: System, facts: RingFacts, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with Rig(kvm, pages=64, entries=facts.smallest) as rig:
        extra = rig.vm.add_memory(1 << 33, 8 * PAGE, log_dirty=True)
        with Tracker(rig.vm) as tracker, TrackerRecorder(tracker, path) as recorder:
            tracker.mark(extra.gpa + PAGE, 2 * PAGE)
            recorder.collect()
            slot = extra.slot
            extra.remove()
            extra.close()
            assert not recorder.collect()
    found = read(path)
    assert by_collection(found, slot) == [{1, 2}, set()]
    assert found.slots == {rig.ram.slot: 64, slot: 8}
