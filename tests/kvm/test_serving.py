"""RingServer: full rings served in C while others collect, and what it leaves to Python."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from kvmring import DirtyGfns, DirtySet, ExitReason, ForkedError, Runner, StateError, Tracker
from kvmring.guests import page_order
from kvmring.serving import RingServer

from ..gates import needs_kvm
from .rig import PAGE, Rig, RingFacts, assert_exact

if TYPE_CHECKING:
    from kvmring import VCPU, Exit, System

pytestmark = needs_kvm()


def fill_ring(rig: Rig) -> None:
    rig.guest.load(0, page_order(rig.ram))
    assert rig.guest.run(0).reason is ExitReason.DIRTY_RING_FULL


def ended(vcpu: VCPU, exit: Exit) -> bool:
    assert exit.reason is ExitReason.MMIO, exit
    return False


def test_full_rings_never_come_to_python(
    kvm: System, facts: RingFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = 4 * facts.smallest

    def never(self: Tracker, vcpu: VCPU) -> None:
        raise AssertionError("a ring was served in Python")

    monkeypatch.setattr(Tracker, "serve", never)
    with (
        Rig(kvm, pages=pages, vcpus=2, entries=facts.smallest) as rig,
        Tracker(rig.vm) as tracker,
    ):
        runner = Runner(rig.guest.vcpus, ended)
        tracker.attach(runner)
        halves = page_order(rig.ram, order="random", seed=3)
        rig.guest.load(0, halves[: pages // 2])
        rig.guest.load(1, halves[pages // 2 :])
        runner.start()
        assert runner.join(60)
        assert_exact(range(pages), list(tracker.collect()[rig.ram.slot]))
        stats = tracker.stats
        assert stats.ring_full_exits >= 2
        assert stats.full_ns > 0
        assert stats.entries == pages + stats.duplicates
        assert stats.pages == pages
        assert max(stats.high_water.values()) >= facts.smallest - facts.reserved


def test_collecting_all_the_time_loses_nothing(kvm: System, facts: RingFacts) -> None:
    # The set goes back and forth between C and Python as often as it can; each round writes
    # every page, so a page that was not protected anew when its set was taken is missed.
    pages, rounds = 2 * facts.smallest, 40
    with (
        Rig(kvm, pages=pages, vcpus=2, entries=facts.smallest) as rig,
        Tracker(rig.vm) as tracker,
    ):
        shadow = bytearray(pages * PAGE)

        def copy(dirty: DirtySet) -> None:
            for page in dirty[rig.ram.slot]:
                shadow[page * PAGE : (page + 1) * PAGE] = rig.ram.read(page * PAGE, PAGE)

        runner = Runner(rig.guest.vcpus, ended)
        tracker.attach(runner)
        halves = page_order(rig.ram, order="random", seed=4)
        rig.guest.load(0, halves[: pages // 2], rounds=rounds)
        rig.guest.load(1, halves[pages // 2 :], rounds=rounds)
        with runner:
            while runner.running:
                copy(tracker.collect(flush=False))
            assert runner.join()
        copy(tracker.finish())
        assert bytes(shadow) == rig.ram.read(0, pages * PAGE)


def test_a_ring_that_was_not_reset_is_left_to_the_caller(kvm: System, facts: RingFacts) -> None:
    # A server that went on would spin here for ever.
    with Rig(kvm, pages=2 * facts.smallest, entries=facts.smallest) as rig:
        server, dirty = RingServer(), DirtySet(rig.vm)
        fill_ring(rig)
        taken = rig.ring.harvest(DirtyGfns(facts.smallest))
        server.lend(dirty)
        assert server.run(rig.guest.vcpus[0]).reason is ExitReason.DIRTY_RING_FULL
        served = server.take_back()
        assert (served.fulls, served.entries) == (0, 0)
        assert rig.vm.reset_dirty_rings().reset == taken


def test_without_a_set_nothing_is_served(kvm: System, facts: RingFacts) -> None:
    with Rig(kvm, pages=2 * facts.smallest, entries=facts.smallest) as rig:
        server, dirty = RingServer(), DirtySet(rig.vm)
        fill_ring(rig)
        assert server.run(rig.guest.vcpus[0]).reason is ExitReason.DIRTY_RING_FULL
        server.lend(dirty)
        with pytest.raises(StateError, match="another thread"):
            server.lend(dirty)
        assert rig.guest.is_done(server.run(rig.guest.vcpus[0]))
        served = server.take_back()
        assert served.fulls >= 1
        assert served.entries >= dirty.count() > 0
        rig.vm.harvest(dirty)
        assert_exact(range(2 * facts.smallest), list(dirty[rig.ram.slot]))
        assert server.take_back().fulls == 0


def test_a_vcpu_without_a_ring_just_runs(kvm: System) -> None:
    with Rig(kvm, pages=8, entries=0) as rig:
        server = RingServer()
        rig.guest.load(0, page_order(rig.ram))
        assert rig.guest.is_done(server.run(rig.guest.vcpus[0]))


def test_a_kick_ends_it(kvm: System, facts: RingFacts) -> None:
    with Rig(kvm, pages=2 * facts.smallest, entries=facts.smallest) as rig:
        server, dirty = RingServer(), DirtySet(rig.vm)
        server.lend(dirty)
        rig.guest.load(0, page_order(rig.ram), rounds=0)
        exits: list[Exit] = []

        def run() -> None:
            while not exits or exits[-1].reason is ExitReason.DIRTY_RING_FULL:  # was not lent
                exits.append(server.run(rig.guest.vcpus[0]))

        thread = threading.Thread(target=run)
        thread.start()
        while server.take_back().fulls == 0:  # until it is at work
            server.lend(dirty)
        server.lend(dirty)
        rig.guest.vcpus[0].kick()
        thread.join(60)
        assert exits[-1].reason is ExitReason.INTR


def test_a_child_may_not_use_it(kvm: System) -> None:
    server = RingServer()
    child = os.fork()
    if child == 0:
        try:
            server.take_back()
        except ForkedError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
