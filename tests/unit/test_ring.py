"""The harvest, on a synthetic ring: order, wrapping, limits, illegal entries, threads.

The C code under test is what harvests a vCPU's ring; only the producer is not KVM. Where a test
says that no entry is lost, another one takes an entry away and sees the same check fail.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kvmring import ClosedError, DirtyGfn, DirtyGfns, DirtySet, MemorySlot, RingError, StateError
from kvmring.abi import ffi, lib, out

from .synthetic import (
    DIRTY,
    FREE,
    RESERVED,
    RESET,
    Geometry,
    SyntheticRing,
    differences,
    one_slot,
    pages_of,
)

Target = DirtyGfns | DirtySet


def targets() -> list[Target]:
    return [DirtyGfns(capacity=4096), one_slot(1 << 20)]


def found(target: Target) -> list[int]:
    return pages_of(target) if isinstance(target, DirtyGfns) else list(target[0])


# What a harvest takes


def test_an_empty_ring_gives_nothing() -> None:
    with SyntheticRing() as ring:
        for target in targets():
            assert ring.ring.harvest(target) == 0
            assert found(target) == []
        assert ring.ring.indices == (0, 0)


def test_entries_come_in_order_with_slot_and_vcpu() -> None:
    with SyntheticRing() as ring:
        ring.push(3, first=7, slot=1 << 16 | 2)
        ring.push(1, first=5, slot=9)
        gfns = DirtyGfns(capacity=10)
        assert ring.ring.fill() == 4
        assert ring.ring.harvest(gfns) == 4
        assert list(gfns) == [(0x10002, 0, 7), (0x10002, 0, 8), (0x10002, 0, 9), (9, 0, 5)]
        assert ring.ring.fill() == 0
        assert ring.ring.pending == 4


def test_offsets_keep_all_their_64_bits() -> None:
    with SyntheticRing() as ring:
        last = (1 << 64) - 1
        ring.push(1, first=last, slot=(1 << 32) - 1)
        gfns = DirtyGfns(capacity=1)
        ring.ring.harvest(gfns)
        assert gfns[0] == DirtyGfn((1 << 32) - 1, 0, last)


def test_harvests_append() -> None:
    with SyntheticRing() as ring:
        for target in targets():
            ring.push(10, first=100)
            ring.ring.harvest(target)
            ring.push(10, first=110)
            assert ring.ring.harvest(target) == 10
            assert found(target) == list(range(100, 120))


def test_wraps_around_many_times() -> None:
    with SyntheticRing(128) as ring:
        gfns, dirty = DirtyGfns(capacity=1 << 16), one_slot(1 << 16)
        total = 0
        for batch in range(2000):  # sizes that fit no power of two, so every index is met
            num = ring.push(1 + batch % 37, first=total)
            target: Target = gfns if batch % 2 else dirty
            assert ring.ring.harvest(target) == num
            assert ring.reset() == num
            total += num
        assert total > 200 * ring.entries
        assert differences(range(total), pages_of(gfns) + list(dirty[0])) == ([], [])
        assert ring.ring.indices == (total, total)


def test_is_full_at_exactly_the_soft_limit() -> None:
    with SyntheticRing(256) as ring:
        assert ring.push(1000) == 256 - RESERVED
        gfns = DirtyGfns(capacity=1000)
        assert ring.ring.harvest(gfns) == ring.soft_limit
        assert ring.push(1, first=1000) == 0, "harvested entries are not free before the reset"
        assert ring.reset() == ring.soft_limit
        assert ring.push(1, first=1000) == 1


def test_one_reset_entry_makes_room_for_one() -> None:
    with SyntheticRing(128) as ring:
        ring.push(1000)
        gfns = DirtyGfns(capacity=1000)
        for n in range(200):
            assert ring.ring.harvest(gfns, limit=1) == 1
            assert ring.reset() == 1
            assert ring.push(1000, first=ring.soft_limit + n) == 1
        assert pages_of(gfns) == list(range(200))


@pytest.mark.parametrize("limit", [0, 1, 7, 49, 50, 51, 1 << 40])
def test_limit_bounds_the_harvest(limit: int) -> None:
    for target in targets():
        with SyntheticRing() as ring:
            ring.push(50)
            taken = min(limit, 50)
            assert ring.ring.harvest(target, limit=limit) == taken
            assert found(target) == list(range(taken))
            assert ring.ring.fill() == 50 - taken
            assert ring.ring.harvest(target) == 50 - taken
            assert found(target) == list(range(50))


@pytest.mark.parametrize(
    ("limit", "error"),
    [(-1, ValueError), (1 << 64, ValueError), (-(1 << 70), ValueError), ("1", TypeError)],
)
def test_a_bad_limit_takes_nothing(limit: int, error: type[Exception]) -> None:
    with SyntheticRing() as ring:
        ring.push(5)
        for target in targets():
            with pytest.raises(error, match="limit"):
                ring.ring.harvest(target, limit=limit)
        assert ring.ring.fill() == 5


@pytest.mark.parametrize("target", [[], None, 5, bytearray(100), memoryview(b"")])
def test_a_bad_target_takes_nothing(target: object) -> None:
    with SyntheticRing() as ring:
        ring.push(5)
        with pytest.raises(TypeError, match="DirtyGfns or a DirtySet"):
            ring.ring.harvest(target)  # type: ignore[arg-type]
        assert ring.ring.fill() == 5


# Strays: entries of slots that are gone


def test_entries_without_a_page_in_the_set_are_counted() -> None:
    vm = Geometry(
        MemorySlot(slot=1, gpa=0, num_pages=100), MemorySlot(slot=3, gpa=1 << 30, num_pages=64)
    )
    dirty = DirtySet(vm)
    with SyntheticRing() as ring:
        ring.push(2, first=99, slot=1)  # 99 is a page, 100 is not
        ring.push(1, slot=0)
        ring.push(1, slot=2)
        ring.push(1, slot=4)
        ring.push(1, first=64, slot=3)
        ring.push(1, first=63, slot=3)
        assert ring.ring.harvest(dirty) == 7
        assert {slot: list(bits) for slot, bits in dirty.items()} == {1: [99], 3: [63]}
        assert dirty.strays == 5
        vm.put(MemorySlot(slot=2, gpa=2 << 30, num_pages=8))
        ring.push(1, slot=2)
        ring.push(1, slot=5)
        ring.ring.harvest(dirty)
        assert dirty.strays == 6, "strays outlive a change of the slots"
        assert list(dirty[2]) == [0]


# Illegal states


@pytest.mark.parametrize(
    ("flags", "name"), [(3, "DIRTY|RESET"), (4, "flags 0x4"), (RESET, "RESET"), (1 << 31, "flags")]
)
@pytest.mark.parametrize("laps", [0, 3])
def test_an_illegal_entry_stops_the_harvest_there(flags: int, name: str, laps: int) -> None:
    for target in targets():
        with SyntheticRing(128) as ring:
            for _ in range(laps * 10):  # so that the place is not the index
                ring.push(15)
                ring.ring.harvest(DirtyGfns(capacity=15))
                ring.reset()
            at = (150 * laps + 6) % 128
            ring.push(10, first=500, slot=0)
            ring.poke(at, flags)
            with pytest.raises(RingError, match="dirty ring of vCPU 0") as caught:
                ring.ring.harvest(target)
            error = caught.value
            assert name in str(error)
            assert (error.vcpu, error.index, error.flags) == (0, at, flags)
            assert (error.slot, error.offset, error.harvested) == (0, 506, 6)
            assert found(target) == list(range(500, 506)), "what came before is kept"
            with pytest.raises(RingError) as again:
                ring.ring.harvest(target)
            assert (again.value.index, again.value.harvested) == (at, 0), "nothing was repaired"
            ring.poke(at, DIRTY)
            assert ring.ring.harvest(target) == 4
            assert found(target) == list(range(500, 510))


def test_reset_where_free_should_be_is_illegal() -> None:
    with SyntheticRing(128) as ring:
        gfns = DirtyGfns(capacity=128)
        ring.push(5)
        ring.poke(5, RESET)
        with pytest.raises(RingError, match="somebody else harvested") as caught:
            ring.ring.harvest(gfns)
        assert (caught.value.index, caught.value.flags, caught.value.harvested) == (5, RESET, 5)


def test_reset_is_legal_when_every_entry_is_ours() -> None:
    with SyntheticRing(128) as ring:
        gfns = DirtyGfns(capacity=500)
        ring.push(128)
        for index in range(ring.soft_limit, 128):  # beyond the soft limit, as PML may push
            ring.poke(index, DIRTY)
        assert ring.ring.harvest(gfns, limit=127) == 127
        assert ring.ring.harvest(gfns) == 1
        assert ring.ring.pending == 128
        assert ring.ring.harvest(gfns) == 0, "the next entry is RESET, and ours"
        assert ring.ring.fill() == 0


def test_a_limit_that_ends_before_the_illegal_entry_does_not_see_it() -> None:
    with SyntheticRing(128) as ring:
        ring.push(10)
        ring.poke(4, 3)
        gfns = DirtyGfns(capacity=10)
        assert ring.ring.harvest(gfns, limit=4) == 4
        with pytest.raises(RingError):
            ring.ring.harvest(gfns, limit=1)


# DirtyGfns


def test_a_full_buffer_is_an_error_and_takes_nothing() -> None:
    with SyntheticRing() as ring:
        gfns = DirtyGfns(capacity=3)
        ring.push(5)
        assert ring.ring.harvest(gfns) == 3
        with pytest.raises(ValueError, match=r"full; clear\(\)"):
            ring.ring.harvest(gfns)
        assert ring.ring.fill() == 2
        gfns.clear()
        assert (len(gfns), gfns.capacity) == (0, 3)
        assert ring.ring.harvest(gfns) == 2
        assert pages_of(gfns) == [3, 4]


def test_gfns_are_a_sequence_and_a_buffer() -> None:
    with SyntheticRing() as ring:
        ring.push(4, first=1 << 40, slot=6)
        gfns = DirtyGfns(capacity=9)
        assert len(memoryview(gfns)) == 0
        ring.ring.harvest(gfns)
    assert len(gfns) == 4
    assert gfns[1] == gfns[-3] == DirtyGfn(slot=6, vcpu=0, offset=(1 << 40) + 1)
    for index in (4, -5, 1 << 70):
        with pytest.raises(IndexError):
            gfns[index]
    with pytest.raises(TypeError):
        gfns["0"]  # type: ignore[index]
    assert [gfn.offset - (1 << 40) for gfn in reversed(list(gfns))] == [3, 2, 1, 0]
    table = np.frombuffer(gfns, "u4,u4,u8")  # type: ignore[call-overload]
    assert table.tolist() == [tuple(gfn) for gfn in gfns]
    view = memoryview(gfns)
    assert view.readonly
    assert view.nbytes == 16 * 4
    assert repr(gfns) == "<DirtyGfns 4 of 9 entries>"


def test_an_empty_buffer_has_no_first_entry() -> None:
    with pytest.raises(IndexError):
        DirtyGfns(capacity=1)[0]


@pytest.mark.parametrize(
    ("capacity", "error"),
    [(0, ValueError), (-1, ValueError), (1 << 64, ValueError), (1.5, TypeError), ("9", TypeError)],
)
def test_capacity_must_be_a_number_of_entries(capacity: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="capacity"):
        DirtyGfns(capacity=capacity)


# Life and death


def test_a_closed_ring_refuses_everything() -> None:
    ring = SyntheticRing().ring
    ring.close()
    ring.close()
    assert ring.closed
    assert repr(ring) == "<DirtyRing closed>"
    for use in (
        lambda: ring.harvest(DirtyGfns(capacity=1)),
        ring.fill,
        lambda: ring.indices,
        lambda: ring.pending,
    ):
        with pytest.raises(ClosedError, match="DirtyRing is closed"):
            use()


def test_what_was_harvested_outlives_the_ring() -> None:
    gfns = DirtyGfns(capacity=5)
    with SyntheticRing() as ring:
        ring.push(5, first=3)
        ring.ring.harvest(gfns)
    assert pages_of(gfns) == [3, 4, 5, 6, 7]


FORK = """
import os
from kvmring import DirtyGfns, ForkedError
from tests.unit.synthetic import SyntheticRing, pages_of

ring = SyntheticRing()
ring.push(5)
gfns = DirtyGfns(capacity=5)
pid = os.fork()
if pid == 0:
    refused = 0
    for use in (lambda: ring.ring.harvest(gfns), ring.ring.fill, lambda: ring.ring.indices):
        try:
            use()
        except ForkedError as error:
            refused += "made it" in str(error)
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
assert ring.ring.harvest(gfns) == 5, "the child took nothing"
print(pages_of(gfns))
ring.ring.close()
"""


def test_a_forked_child_cannot_harvest() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2, 3, 4]\n", "")


@pytest.mark.parametrize("entries", [0, 1, 64, 100, 1000, (1 << 24) + 1, 1 << 25])
def test_synthetic_rings_have_a_legal_size(entries: int) -> None:
    place = out("struct kvr_ring *")
    assert lib.kvr_ring_synthetic(entries, place) < 0
    assert place[0] == ffi.NULL


# Threads


class Producer(threading.Thread):
    """Pushes pages 0, 1, 2, ... for as long as it takes, in C and without the GIL."""

    def __init__(self, ring: SyntheticRing, total: int) -> None:
        super().__init__(daemon=True)
        self.ring, self.total, self.full = ring, total, 0

    def run(self) -> None:
        done = 0
        while done < self.total:
            pushed = self.ring.push(self.total - done, first=done)
            self.full += pushed == 0
            done += pushed


def test_under_load_every_entry_comes_once_and_in_order() -> None:
    total = 300_000
    with SyntheticRing(1024) as ring:
        producer = Producer(ring, total)
        gfns = DirtyGfns(capacity=total)
        producer.start()
        while len(gfns) < total:
            ring.ring.harvest(gfns, limit=300)
            ring.reset()
        producer.join()
        assert pages_of(gfns) == list(range(total))
        assert ring.ring.harvest(DirtyGfns(capacity=1)) == 0, "and nothing more"


def test_under_load_with_a_resetter_of_its_own_nothing_is_lost() -> None:
    total = 200_000
    with SyntheticRing(2048) as ring:
        producer, dirty = Producer(ring, total), one_slot(total)
        stop = threading.Event()
        count = [0]

        def resetter() -> None:
            while not stop.is_set() or ring.ring.pending:
                count[0] += ring.reset()

        others = [producer, threading.Thread(target=resetter, daemon=True)]
        for thread in others:
            thread.start()
        taken = 0
        while taken < total:
            taken += ring.ring.harvest(dirty)
        stop.set()
        for thread in others:
            thread.join()
        assert (taken, dirty.count(), dirty.strays, count[0]) == (total, total, 0, total)


def test_a_second_harvester_is_refused_and_nothing_is_lost() -> None:
    entries = 1 << 16
    with SyntheticRing(entries) as ring:
        dirty, mine = one_slot(entries), DirtyGfns(capacity=1)
        refused: list[StateError] = []
        totals = {"pushed": 0, "taken": 0, "reset": 0}

        def first() -> None:  # is inside the harvest for most of its time
            while not refused:
                totals["pushed"] += ring.push(entries)
                try:
                    totals["taken"] += ring.ring.harvest(dirty)
                except StateError as error:  # then the other one was first
                    refused.append(error)
                totals["reset"] += ring.reset()

        thread = threading.Thread(target=first, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not refused and time.monotonic() < deadline:
            try:
                assert ring.ring.harvest(mine, limit=0) == 0
            except StateError as error:
                refused.append(error)
        met = list(refused)
        refused.append(StateError("the end"))
        thread.join()
        assert met, "two harvesters never met"
        assert "another thread" in str(met[0])
        totals["taken"] += ring.ring.harvest(dirty)
        totals["reset"] += ring.reset()
        assert totals["pushed"] == totals["taken"] == totals["reset"] > 0


def test_harvesters_in_turn_share_the_entries() -> None:
    total = 100_000
    with SyntheticRing(1024) as ring:
        producer = Producer(ring, total)
        sinks = [DirtyGfns(capacity=total) for _ in range(3)]
        lock = threading.Lock()
        taken = [0]

        def harvester(sink: DirtyGfns) -> None:
            while True:
                try:
                    n = ring.ring.harvest(sink, limit=64)
                except StateError:
                    continue
                ring.reset()
                with lock:
                    taken[0] += n
                    if taken[0] == total:
                        return
                if not n and not producer.is_alive() and not ring.ring.fill():
                    return

        threads = [threading.Thread(target=harvester, args=(s,), daemon=True) for s in sinks]
        producer.start()
        for thread in threads:
            thread.start()
        for thread in (producer, *threads):
            thread.join()
        everything = [page for sink in sinks for page in pages_of(sink)]
        assert differences(range(total), everything) == ([], [])
        for sink in sinks:
            pages = pages_of(sink)
            assert pages == sorted(pages), "each one's share is in order"


# Losing on purpose: the checks above can fail


def test_the_comparison_sees_a_page_that_was_dropped_or_doubled() -> None:
    with SyntheticRing() as ring:
        ring.push(100)
        gfns = DirtyGfns(capacity=100)
        ring.ring.harvest(gfns)
    pages = pages_of(gfns)
    assert differences(range(100), pages) == ([], [])
    assert differences(range(100), pages[:40] + pages[41:]) == ([40], [])
    assert differences(range(100), [*pages, 7]) == ([], [7])


def test_an_entry_that_was_withheld_is_missed() -> None:
    for target in targets():
        with SyntheticRing() as ring:
            ring.push(10)
            ring.poke(4, FREE)  # its flags were never seen: what follows is out of reach
            assert ring.ring.harvest(target) == 4
            assert differences(range(10), found(target)) == ([4, 5, 6, 7, 8, 9], [])
            ring.poke(4, DIRTY)
            ring.ring.harvest(target)
            assert differences(range(10), found(target)) == ([], [])


def test_an_entry_that_somebody_else_took_is_missed_and_reported() -> None:
    for target in targets():
        with SyntheticRing() as ring:
            ring.push(10)
            ring.poke(4, RESET)
            with pytest.raises(RingError):
                ring.ring.harvest(target)
            assert 4 in differences(range(10), found(target))[0]
