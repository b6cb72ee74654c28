"""A full ring: when KVM_RUN stops, that it goes on after a reset, and by how much.

The kernel keeps 64 entries back, and 512 more with PML. How many it is here is found by
trying (RingFacts); without PML every number is exact.
"""

from __future__ import annotations

import pytest

from kvmring import Cap, DirtyGfns, DirtySet, ExitReason, System

from ..gates import needs
from .rig import Rig, RingFacts, assert_exact, pages_of

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)
FULL = ExitReason.DIRTY_RING_FULL


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_full_at_the_soft_limit(kvm: System, facts: RingFacts, factor: int) -> None:
    """The exit comes when entries - reserved were pushed, and the last write is pending."""
    entries = factor * facts.smallest
    with Rig(kvm, entries=entries, pages=entries) as rig:
        assert rig.ring.entries == rig.vm.ring_entries == entries
        rig.guest.load(0, rig.gpas())
        assert rig.guest.run(0).reason is FULL
        n = rig.ring.fill()
        facts.assert_full(n, entries)
        stores = rig.guest.progress(0).stores
        assert n - 1 <= stores <= n
        gfns = DirtyGfns(entries)
        assert rig.ring.harvest(gfns) == n
        assert_exact(range(n), pages_of(gfns))


def test_one_below_the_limit_is_not_full(kvm: System, facts: RingFacts) -> None:
    """The limit itself is what stops a guest: one page fewer does not."""
    if not facts.exact:
        pytest.skip("PML hands in its pages in batches")
    limit = facts.smallest - facts.reserved
    with Rig(kvm, entries=facts.smallest, pages=limit) as rig:
        rig.write(rig.gpas(0, limit - 1))
        assert rig.ring.fill() == limit - 1
        rig.guest.load(0, rig.gpas(limit - 1, 1))
        assert rig.guest.run(0).reason is FULL


def test_no_progress_without_a_reset(kvm: System, facts: RingFacts) -> None:
    """Neither running again nor harvesting alone makes room."""
    with Rig(kvm, entries=facts.smallest, pages=2 * facts.smallest) as rig:
        rig.guest.load(0, rig.gpas())
        assert rig.guest.run(0).reason is FULL
        n, stores = rig.ring.fill(), rig.guest.progress(0).stores
        for _ in range(3):
            assert rig.guest.run(0).reason is FULL
            assert (rig.ring.fill(), rig.guest.progress(0).stores) == (n, stores)
        gfns = DirtyGfns(facts.smallest)
        assert rig.ring.harvest(gfns) == n
        for _ in range(3):
            assert rig.guest.run(0).reason is FULL
            assert (rig.ring.fill(), rig.guest.progress(0).stores) == (0, stores)
        assert rig.vm.reset_dirty_rings().reset == n
        assert rig.guest.run(0).reason is FULL
        assert rig.guest.progress(0).stores > stores


@pytest.mark.parametrize("n", [1, 2, 100])
def test_n_reset_give_n_more(kvm: System, facts: RingFacts, n: int) -> None:
    """A partial harvest makes room for as much as was taken."""
    with Rig(kvm, entries=facts.smallest, pages=2 * facts.smallest) as rig:
        rig.guest.load(0, rig.gpas(order="random"))
        assert rig.guest.run(0).reason is FULL
        gfns = DirtyGfns(4 * facts.smallest)
        for _ in range(3):
            assert rig.ring.harvest(gfns, limit=n) == n
            rest = rig.ring.fill()
            assert rig.vm.reset_dirty_rings().reset == n
            assert rig.guest.run(0).reason is FULL
            facts.assert_grown(rig.ring.fill() - rest, n)


def test_one_full_ring_does_not_stop_the_others(kvm: System, facts: RingFacts) -> None:
    """Rings are the vCPUs' own; a reset makes room in all of them."""
    each = facts.smallest
    with Rig(kvm, entries=facts.smallest, pages=2 * each, vcpus=2) as rig:
        rig.guest.load(0, rig.gpas(0, each))
        assert rig.guest.run(0).reason is FULL
        rig.write(rig.gpas(each, 10), 1)
        dirty = DirtySet(rig.vm)
        n = rig.vm.harvest(dirty)
        assert rig.vm.reset_dirty_rings().reset == n
        while not rig.guest.is_done(rig.guest.run(0)):
            n = rig.vm.harvest(dirty)
            assert rig.vm.reset_dirty_rings().reset == n
        rig.vm.harvest(dirty)
        assert_exact(rig.gpas(0, each + 10), dirty.gpas())


def test_a_kick_at_a_full_ring_is_no_stale_exit(kvm: System, facts: RingFacts) -> None:
    """KVM leaves the old exit_reason standing; the return code is what counts."""
    with Rig(kvm, entries=facts.smallest, pages=facts.smallest) as rig:
        rig.guest.load(0, rig.gpas())
        assert rig.guest.run(0).reason is FULL
        rig.vm.vcpus[0].kick()
        assert rig.guest.run(0).reason is ExitReason.INTR
        assert rig.guest.run(0).reason is FULL


def test_many_turns_of_a_ring(kvm: System, facts: RingFacts) -> None:
    """The index wraps: a small ring carries many times its size."""
    with Rig(kvm, entries=facts.smallest, pages=facts.smallest // 2) as rig:
        fetched = 0
        for turn in range(12):
            gpas = rig.gpas(0, facts.smallest // 2 - turn, "random")
            rig.guest.load(0, gpas)
            dirty = DirtySet(rig.vm)
            full = rig.collect(dirty)
            assert_exact(gpas, dirty.gpas())
            fetched += len(gpas)
            assert len(full) <= 2
        fetch, reset = rig.ring.indices
        assert fetch == reset >= fetched > facts.smallest
        assert rig.ring.pending == 0
