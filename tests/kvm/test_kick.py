"""The kick: a vCPU leaves the guest for it, whenever it comes, and for nothing else.

A kick that comes between the decision to run and the guest itself is the one that races; so
they come at 1,000 random moments, and none may be lost, nor leave a run stuck.
"""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

from kvmring import ExitReason, System

from ..gates import needs_kvm
from .rig import Rig, assert_usable

pytestmark = needs_kvm()
KICKS = 1000


class Runner:
    """A thread that runs a vCPU again and again, and counts the exits that a kick caused."""

    def __init__(self, rig: Rig, index: int = 0) -> None:
        self.rig, self.index = rig, index
        self.interrupted = 0
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run)
        rig.guest.load(index, rig.gpas(16 * index, 16), rounds=0)
        self.thread.start()

    def _run(self) -> None:
        while not self.rig.guest.is_done(exit := self.rig.guest.run(self.index)):
            assert exit.reason is ExitReason.INTR, exit
            with self.changed:
                self.interrupted += 1
                self.changed.notify_all()

    def kick_and_wait(self) -> None:
        """Kick once, and fail unless a run ends by it."""
        with self.changed:
            before = self.interrupted
        self.rig.vm.vcpus[self.index].kick()
        with self.changed:
            ended = self.changed.wait_for(lambda: self.interrupted > before, timeout=60)
        assert ended, "a kick was lost: the vCPU runs on"

    def stop(self) -> None:
        self.rig.guest.stop(self.index)
        self.thread.join(60)
        assert not self.thread.is_alive(), "the run is stuck"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_kick_at_any_moment_ends_a_run(kvm: System, seed: int) -> None:
    """1,000 of them at random moments: each is followed by an exit."""
    rng = random.Random(seed)
    with Rig(kvm, pages=16) as rig:
        runner = Runner(rig)
        try:
            for _ in range(KICKS // 2):
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.0005)
                runner.kick_and_wait()
        finally:
            runner.stop()
        assert runner.interrupted >= KICKS // 2
        assert rig.guest.progress(0).done
        rig.assert_memory()


def test_a_kick_at_the_door(kvm: System) -> None:
    """1,000 of them while the vCPU enters and leaves the guest all the time.

    Most come near an entry, where a signal alone would come too early to be seen. The run that
    is under way, or the next, must end by the kick; a third one is too late.
    """
    with Rig(kvm, pages=16) as rig:
        vcpu, end = rig.vm.vcpus[0], threading.Event()
        runs = interrupted = 0
        rig.guest.load(0, rig.gpas(0, 1))  # entered again, the guest does it again

        def run() -> None:
            nonlocal runs, interrupted
            while not end.is_set():
                reason = vcpu.run().reason
                assert reason in (ExitReason.MMIO, ExitReason.INTR)
                interrupted += reason is ExitReason.INTR
                runs += 1

        thread = threading.Thread(target=run)
        thread.start()
        try:
            for number in range(KICKS):
                before = interrupted
                vcpu.kick()
                until = runs + 3
                while interrupted == before and runs < until:
                    time.sleep(0)
                assert interrupted > before, f"kick {number} was lost"
        finally:
            end.set()
            thread.join(60)
        assert not thread.is_alive()


def test_kicks_from_several_threads(kvm: System) -> None:
    """They may share an exit, but the last of them is never lost."""
    with Rig(kvm, pages=32, vcpus=2) as rig:
        runners = [Runner(rig, index) for index in range(2)]

        def kick(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(100):
                rng.choice(rig.vm.vcpus).kick()

        try:
            kickers = [threading.Thread(target=kick, args=(seed,)) for seed in range(3)]
            for thread in kickers:
                thread.start()
            for thread in kickers:
                thread.join(60)
                assert not thread.is_alive()
            for runner in runners:
                runner.kick_and_wait()
        finally:
            for runner in runners:
                runner.stop()
        for index in range(2):
            rig.assert_memory(index)


def test_a_kick_before_the_run(kvm: System) -> None:
    """It ends the next run at once, and that one only, however often it was made."""
    with Rig(kvm, pages=16) as rig:
        vcpu = rig.vm.vcpus[0]
        for kicks in (1, 5):
            rig.guest.load(0, rig.gpas(0, 4))
            for _ in range(kicks):
                vcpu.kick()
            assert rig.guest.run(0).reason is ExitReason.INTR
            assert rig.guest.progress(0).stores == 0
            assert rig.guest.is_done(rig.guest.run(0))
            assert rig.guest.progress(0).stores == 4
        assert_usable(rig)


def test_a_kick_is_the_vcpus_own(kvm: System) -> None:
    """Another vCPU in the same thread is not disturbed by it."""
    with Rig(kvm, pages=32, vcpus=2) as rig:
        rig.vm.vcpus[0].kick()
        rig.write(rig.gpas(16, 4), 1)
        rig.guest.load(0, rig.gpas(0, 4))
        assert rig.guest.run(0).reason is ExitReason.INTR


def test_a_thread_that_blocks_every_signal(kvm: System) -> None:
    """A kick reaches it all the same."""
    with Rig(kvm, pages=16) as rig:
        vcpu = rig.vm.vcpus[0]
        rig.guest.load(0, rig.gpas(), rounds=0)
        seen: list[object] = []

        def run() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            seen.append(rig.guest.run(0).reason)

        thread = threading.Thread(target=run)
        thread.start()
        while not vcpu.running:
            time.sleep(0.001)
        time.sleep(0.01)
        vcpu.kick()
        thread.join(60)
        if thread.is_alive():
            rig.guest.stop(0)
            thread.join(60)
        assert seen == [ExitReason.INTR]


def test_progress_of_a_guest_that_is_kicked_away(kvm: System) -> None:
    """In the middle of a command the counter and the memory differ by the one store in flight."""
    rng = random.Random(3)
    with Rig(kvm, pages=64) as rig:
        gpas = rig.gpas(order="random")
        page_of = {gpa: number for number, gpa in enumerate(sorted(gpas))}
        rig.guest.load(0, gpas, rounds=0)
        for _ in range(100):
            timer = threading.Timer(rng.random() * 0.001, rig.vm.vcpus[0].kick)
            timer.start()
            exit = rig.guest.run(0)
            timer.join()
            assert exit.reason is ExitReason.INTR
            progress, words = rig.guest.progress(0), rig.ram.words()
            assert not progress.done
            assert progress.rounds == progress.stores // 64
            flight = rig.guest.in_flight(0)
            assert flight == gpas[progress.stores % 64]
            for gpa, value in zip(gpas, rig.guest.values(0), strict=True):
                there = words[page_of[gpa]]
                assert there == value or (gpa == flight and there == progress.stores + 1)
            assert list(rig.guest.written(0)) == gpas[: min(progress.stores, 64)]
        rig.guest.stop(0)
        assert rig.guest.is_done(rig.guest.run(0))
        assert rig.guest.in_flight(0) is None
        rig.assert_memory()
