"""RingObserver against a model of KVM's ring: an array in this process, pushed and reset at will.

The observer reads it as it reads any process's, with process_vm_readv. The model knows how much
was pushed, so whatever is counted is compared with the truth; only what the contract calls
invisible (a page pushed again at its old position between two polls) is kept out of it.
"""

from __future__ import annotations

import os
import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmring import StateError
from kvmring.host import HostVcpu, RingObserver

ENTRY = struct.Struct("=IIQ")
FREE, DIRTY, RESET = 0, 1, 2


class Ring:
    """KVM's side and the harvester's, in an array of this process."""

    def __init__(self, entries: int, start: int = 0) -> None:
        self.entries = entries
        self.words = array("I", [0] * 4 * entries)
        self.pushed = self.harvested = self.reset = start
        self.page = 0

    def vcpu(self) -> HostVcpu:
        return HostVcpu(id=3, ring_entries=self.entries, ring_address=self.words.buffer_info()[0])

    def _at(self, index: int) -> int:
        return 4 * (index % self.entries)

    def push(self, n: int, page: int | None = None) -> None:
        for _ in range(n):
            assert self.pushed - self.reset < self.entries
            self.page += 1
            offset = self.page if page is None else page
            entry = ENTRY.pack(DIRTY, 7, offset)
            self.words[self._at(self.pushed) : self._at(self.pushed) + 4] = array("I", entry)
            self.pushed += 1

    def harvest(self) -> None:
        while self.harvested < self.pushed:
            self.words[self._at(self.harvested)] = RESET
            self.harvested += 1

    def free(self) -> None:
        while self.reset < self.harvested:
            self.words[self._at(self.reset)] = FREE
            self.reset += 1


@given(
    st.sampled_from([256, 1024]),
    st.integers(0, 5000),
    st.lists(st.tuples(st.integers(0, 100), st.sampled_from(["", "h", "hf", "poll", "hf poll"]))),
)
@settings(max_examples=200, deadline=None)
def test_every_push_harvest_and_reset_is_counted(
    entries: int, start: int, steps: list[tuple[int, str]]
) -> None:
    ring = Ring(entries, start)
    if start:  # the ring of a VM that has run for a while: no entry is as it was made
        ring.push(entries - 64)
        ring.harvest()
        ring.free()
        ring.push(100)
        ring.harvest()
    with RingObserver(os.getpid(), ring.vcpu()) as observer:
        observer.poll()
        pushed, reset = ring.pushed, ring.reset
        since = 0  # pushed since the last poll: fewer than a poll could have lapped
        for n, then in steps:
            room = min(entries - (ring.pushed - ring.reset), entries // 2 - since)
            ring.push(min(n, room))
            since += min(n, room)
            if "h" in then:
                ring.harvest()
            if "f" in then:
                ring.free()
            if "poll" in then:
                view = observer.poll()
                assert not view.lapped
                assert view.pushed == ring.pushed - pushed
                assert view.reset == ring.reset - reset
                assert view.dirty == ring.pushed - ring.harvested
                assert view.harvested == ring.harvested - ring.reset
                assert view.write in (None, ring.pushed % entries)
                pushed, reset, since = ring.pushed, ring.reset, 0


@given(st.integers(1, 9), st.integers(0, 800), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_round_that_was_missed_is_said_and_never_counted_as_less(
    rounds: int, more: int, full: bool
) -> None:
    ring = Ring(1024)
    with RingObserver(os.getpid(), ring.vcpu()) as observer:
        ring.push(10)
        observer.poll()
        before = ring.pushed
        for n in [1000] * rounds + [more]:
            ring.push(n)
            ring.harvest()
            ring.free()
        if full:
            ring.push(5)
        view = observer.poll()
        truth = ring.pushed - before
        assert view.lapped
        assert view.pushed <= truth
        assert view.pushed > 1024 - 128
        # and what comes after is counted again, but for what the ring itself cannot tell
        observer.poll()
        ring.push(20)
        assert observer.poll().pushed == 20


def test_the_pages_that_were_pushed_are_named_the_latest_first() -> None:
    ring = Ring(256)
    with RingObserver(os.getpid(), ring.vcpu(), pages=16) as observer:
        observer.poll()
        ring.push(10)
        view = observer.poll()
        assert [(p.slot, p.vcpu, p.offset) for p in view.pages] == [
            (7, 3, page) for page in range(10, 0, -1)
        ]
        ring.push(100)
        offsets = [page.offset for page in observer.poll().pages]
        assert len(offsets) == 16
        assert set(offsets) <= set(range(11, 111))
        assert max(offsets) == 110
        assert min(offsets) < 20, "from all of them, not from the newest alone"
        assert observer.poll().pages == ()


def test_a_page_pushed_again_and_again_counts_while_its_entries_are_seen_in_use() -> None:
    ring = Ring(256)
    with RingObserver(os.getpid(), ring.vcpu()) as observer:
        observer.poll()
        for _ in range(10):
            ring.push(30, page=5)
            assert observer.poll().pushed == 30
            ring.harvest()
            ring.free()


def test_a_vcpu_without_a_ring_cannot_be_observed() -> None:
    with pytest.raises(StateError, match=r"vCPU 2 .* no dirty ring mapped"):
        RingObserver(os.getpid(), HostVcpu(id=2))


def test_memory_that_is_not_there_is_said_to_be_gone() -> None:
    with (
        RingObserver(os.getpid(), HostVcpu(id=0, ring_entries=256, ring_address=4096)) as observer,
        pytest.raises(ProcessLookupError, match="vCPU 0"),
    ):
        observer.poll()


@pytest.mark.parametrize("entries", [0, 100, 1 << 25])
def test_sizes_that_no_ring_has_are_refused(entries: int) -> None:
    vcpu = HostVcpu(id=0, ring_entries=entries, ring_address=4096)
    with pytest.raises((ValueError, OSError)):
        RingObserver(os.getpid(), vcpu, pages=0)
