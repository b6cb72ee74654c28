"""A short soak: tests/soak.py for some episodes, each a copy that must equal RAM, under signals."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from kvmring import VM, Tracker
from kvmring.abi import PAGE_SIZE
from kvmring.serving import RingServer

from .. import soak
from ..gates import needs_kvm

if TYPE_CHECKING:
    from kvmring import DirtySet, GuestMemory, Runner, System

pytestmark = needs_kvm()


def test_a_few_episodes_lose_nothing(kvm: System) -> None:
    totals = soak.soak(kvm, seconds=60, seed=20, episodes=4)
    assert totals.lost == 0
    assert totals.episodes == 4
    assert totals.collections >= 8


def test_a_tracker_that_forgets_a_collection_is_caught(
    kvm: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = Tracker.collect

    def forgetful(tracker: Tracker, *, flush: bool = True) -> DirtySet:
        collect(tracker, flush=flush)
        return collect(tracker, flush=flush)

    monkeypatch.setattr(Tracker, "collect", forgetful)
    # The vCPUs write on, so a page is lost for good only if nobody writes it again: what the
    # VMM wrote itself is.
    monkeypatch.setattr(soak.Episode, "something", write_once)
    assert soak.soak(kvm, seconds=60, seed=21, episodes=2).lost > 0


def test_the_bare_ioctl_is_caught_where_the_kernel_loses(
    kvm: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VM, "reset_dirty_rings", soak.unguarded_reset)
    monkeypatch.setattr(RingServer, "lend", soak.not_lent)
    end = time.monotonic() + 20
    seed = episodes = 0
    while time.monotonic() < end:
        totals = soak.soak(kvm, seconds=20, seed=seed, episodes=1)
        if totals.lost:
            return
        seed += 1
        episodes += totals.episodes
    pytest.skip(f"this kernel's bare reset lost nothing in {episodes} episodes")


def write_once(
    self: soak.Episode, vm: VM, ram: GuestMemory, tracker: Tracker, runner: Runner
) -> None:
    """Write the end of a page that the guest does not write there, and mark it."""
    at = self.rng.randrange(self.pages) * PAGE_SIZE + PAGE_SIZE - 8
    if ram.read(at, 8) == bytes(8):
        ram.write(at, b"not zero")
        tracker.mark(ram.gpa + at, 8)
