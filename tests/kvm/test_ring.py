"""The dirty ring on a real KVM: what vCPUs wrote is what is harvested, page by page.

The guest knows which pages it wrote and what stands in them; the ring must say the same, for
every order of writing, for several vCPUs, by way of each of the harvest's targets.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmring import Cap, DirtyGfns, DirtySet, ExitReason, StateError, System
from kvmring.guests import ORDERS

from ..gates import needs
from .rig import PAGE, Rig, RingFacts, assert_exact, pages_of

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vcpus", [1, 2, 3])
def test_disjoint_pages_of_several_vcpus(
    kvm: System, facts: RingFacts, order: str, vcpus: int
) -> None:
    """Each page is logged by the vCPU that wrote it, though its ring fills several times."""
    each = 2 * facts.smallest
    with Rig(kvm, entries=facts.smallest, pages=vcpus * each, vcpus=vcpus) as rig:
        gfns = DirtyGfns(4 * vcpus * each)
        for index in range(vcpus):
            rig.guest.load(index, rig.gpas(index * each, each, order))
            assert rig.collect(gfns, index), "the ring never got full"
        for index in range(vcpus):
            truth = range(index * each, (index + 1) * each)
            assert_exact(truth, [gfn.offset for gfn in gfns if gfn.vcpu == index])
            rig.assert_memory(index)
        assert {gfn.slot for gfn in gfns} == {rig.ram.slot}


@pytest.mark.parametrize("order", ORDERS)
def test_entries_come_in_the_order_of_writing(kvm: System, facts: RingFacts, order: str) -> None:
    """Without PML the ring is the sequence of first writes."""
    if not facts.exact:
        pytest.skip("PML hands in its pages in batches")
    n = facts.smallest - facts.reserved - 1
    with Rig(kvm, entries=facts.smallest, pages=facts.smallest) as rig:
        gpas = rig.gpas(0, n, order)
        rig.write(gpas)
        gfns = DirtyGfns(n)
        assert rig.ring.harvest(gfns) == n
        assert pages_of(gfns) == [gpa // PAGE for gpa in gpas]


def test_vcpus_that_run_at_the_same_time(kvm: System, facts: RingFacts) -> None:
    """Nothing is lost when rings are harvested and reset while other vCPUs write."""
    each, rounds = facts.smallest, 3
    with Rig(kvm, entries=facts.smallest, pages=3 * each, vcpus=3) as rig:
        dirty, lock = DirtySet(rig.vm), threading.Lock()

        def run(index: int) -> int:
            full = 0
            while not rig.guest.is_done(exit := rig.guest.run(index)):
                assert exit.reason is ExitReason.DIRTY_RING_FULL, exit
                full += 1
                with lock:
                    n = rig.vm.harvest(dirty)
                    assert rig.vm.reset_dirty_rings().reset == n
            return full

        for index in range(3):
            rig.guest.load(index, rig.gpas(index * each, each, "random"), rounds=rounds)
        with ThreadPoolExecutor(3) as pool:
            # whoever is full empties all rings: of the others some may never get full
            assert any(list(pool.map(run, range(3), timeout=100)))
        rig.vm.harvest(dirty)
        assert_exact(rig.gpas(), dirty.gpas())
        for index in range(3):
            rig.assert_memory(index)


def test_shared_pages_are_the_first_writers(kvm: System, facts: RingFacts) -> None:
    """A page that two vCPUs write before a reset is in the first one's ring alone."""
    n = facts.smallest - facts.reserved - 1
    with Rig(kvm, entries=facts.smallest, pages=n, vcpus=2) as rig:
        for first, second in ((0, 1), (1, 0)):
            rig.write(rig.gpas(), first)
            rig.write(rig.gpas(order="random"), second)
            mine, others = DirtyGfns(2 * n), DirtyGfns(2 * n)
            rig.vm.vcpus[first].dirty_ring.harvest(mine)
            assert rig.vm.vcpus[second].dirty_ring.harvest(others) == 0
            assert_exact(range(n), pages_of(mine))
            assert len(mine) == n
            rig.vm.reset_dirty_rings()


def test_a_page_is_logged_once_between_resets(kvm: System, facts: RingFacts) -> None:
    """Rounds add nothing until the page was reset; then it is logged again, once."""
    n = facts.smallest - facts.reserved - 1
    with Rig(kvm, entries=facts.smallest, pages=n) as rig:
        for _ in range(3):
            rig.guest.load(0, rig.gpas(order="random"), rounds=4)
            assert rig.guest.is_done(rig.guest.run(0))
            gfns = DirtyGfns(2 * n)
            assert rig.ring.harvest(gfns) == n
            assert_exact(range(n), pages_of(gfns))
            assert rig.vm.reset_dirty_rings().reset == n
        rig.assert_memory()


def test_only_the_last_entry_of_a_full_ring_comes_twice(kvm: System, facts: RingFacts) -> None:
    """The write that met the full ring had not retired; it is logged again when it does."""
    pages = 4 * facts.smallest
    with Rig(kvm, entries=facts.smallest, pages=pages) as rig:
        rig.guest.load(0, rig.gpas(order="random"))
        every, last = Counter[int](), set()
        while True:
            exit, gfns = rig.guest.run(0), DirtyGfns(facts.smallest)
            rig.ring.harvest(gfns)
            rig.vm.reset_dirty_rings()
            every.update(pages_of(gfns))
            if rig.guest.is_done(exit):
                break
            last.add(gfns[-1].offset)
        assert_exact(range(pages), every)
        twice = {page for page, times in every.items() if times > 1}
        assert twice <= last
        assert max(every.values()) <= 2


def test_one_harvest_of_all_rings_and_one_by_one_agree(kvm: System, facts: RingFacts) -> None:
    """VM.harvest() takes the rings in the order of creation; a ring is taken once."""
    n = facts.smallest // 4
    with Rig(kvm, entries=facts.smallest, pages=3 * n, vcpus=3) as rig:
        for index in (2, 0, 1):
            rig.write(rig.gpas(index * n, n), index)
        assert [vcpu.dirty_ring.fill() for vcpu in rig.vm.vcpus] == [n, n, n]
        gfns = DirtyGfns(4 * n)
        assert rig.vm.harvest(gfns) == 3 * n
        assert [gfn.vcpu for gfn in gfns] == [0] * n + [1] * n + [2] * n
        assert rig.vm.harvest(gfns) == 0
        assert rig.vm.vcpus[1].dirty_ring.harvest(gfns) == 0
        assert [vcpu.dirty_ring.pending for vcpu in rig.vm.vcpus] == [n, n, n]
        rig.vm.reset_dirty_rings()

        single = DirtyGfns(4 * n)
        for index in range(3):
            rig.write(rig.gpas(index * n, n), index)
            assert rig.vm.vcpus[index].dirty_ring.harvest(single) == n
        assert_exact(pages_of(gfns), pages_of(single))


def test_limit(kvm: System, facts: RingFacts) -> None:
    """A limit takes so many and leaves the rest, over one ring or over all."""
    n = facts.smallest // 4
    with Rig(kvm, entries=facts.smallest, pages=2 * n, vcpus=2) as rig:
        for index in range(2):
            rig.write(rig.gpas(index * n, n), index)
        gfns, dirty = DirtyGfns(2 * n), DirtySet(rig.vm)
        assert rig.ring.harvest(gfns, limit=0) == 0
        assert rig.ring.harvest(gfns, limit=3) == 3
        assert rig.vm.harvest(gfns, limit=n) == n
        assert [gfn.vcpu for gfn in gfns] == [0] * n + [1] * 3
        assert rig.ring.fill() == 0
        assert rig.vm.vcpus[1].dirty_ring.fill() == n - 3
        assert rig.vm.harvest(dirty, limit=1) == 1
        assert rig.vm.harvest(dirty) == n - 4
        everything = {gfn.offset for gfn in gfns} | {gpa // PAGE for gpa in dirty.gpas()}
        assert_exact(range(2 * n), everything)


def test_a_full_target_takes_no_more(kvm: System, facts: RingFacts) -> None:
    """DirtyGfns takes what it has room for; full, it refuses, and the entries stay."""
    with Rig(kvm, entries=facts.smallest, pages=10) as rig:
        rig.write(rig.gpas())
        gfns = DirtyGfns(4)
        assert rig.vm.harvest(gfns) == 4
        with pytest.raises(ValueError, match="full"):
            rig.vm.harvest(gfns)
        with pytest.raises(ValueError, match="full"):
            rig.ring.harvest(gfns)
        first = pages_of(gfns)
        gfns.clear()
        assert rig.ring.harvest(gfns) == 4
        rest = DirtyGfns(4)
        assert rig.ring.harvest(rest) == 2
        assert_exact(range(10), first + pages_of(gfns) + pages_of(rest))


def test_wrong_targets_and_limits(kvm: System, facts: RingFacts) -> None:
    """A bad argument is refused in words, and nothing is taken."""
    with Rig(kvm, entries=facts.smallest, pages=5) as rig:
        rig.write(rig.gpas())
        gfns = DirtyGfns(8)
        for source in (rig.ring, rig.vm):
            with pytest.raises(TypeError, match="DirtyGfns or a DirtySet"):
                source.harvest([])  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="limit"):
                source.harvest(gfns, limit=-1)
            with pytest.raises(ValueError, match="limit"):
                source.harvest(gfns, limit=1 << 70)
            with pytest.raises(TypeError, match="limit"):
                source.harvest(gfns, limit="x")  # type: ignore[arg-type]
        assert rig.vm.harvest(gfns) == 5
        assert_exact(range(5), pages_of(gfns))


def test_entries_of_a_closed_vcpu(kvm: System, facts: RingFacts) -> None:
    """The ring outlives the vCPU's handle, so what it holds is not lost."""
    with Rig(kvm, entries=facts.smallest, pages=20, vcpus=2) as rig:
        rig.write(rig.gpas(0, 10), 0)
        rig.write(rig.gpas(10, 10), 1)
        rig.vm.vcpus[0].close()
        dirty = DirtySet(rig.vm)
        assert rig.vm.harvest(dirty) == 20
        assert_exact(rig.gpas(), dirty.gpas())
        assert rig.vm.reset_dirty_rings().reset == 20


def test_entries_of_a_removed_slot_are_strays(kvm: System, facts: RingFacts) -> None:
    """They are counted, harvested and reset, and land in no slot's pages."""
    with Rig(kvm, entries=facts.smallest, pages=16) as rig:
        other = rig.vm.add_memory(1 << 32, 16 * PAGE, log_dirty=True)
        rig.write(rig.gpas())
        rig.ram.remove()
        dirty = DirtySet(rig.vm)
        assert rig.vm.harvest(dirty) == 16
        assert dirty.strays == 16
        assert dirty.count() == 0
        assert not dirty[other.slot]
        assert rig.vm.reset_dirty_rings().reset == 16


def test_a_ring_comes_before_the_vcpu(kvm: System) -> None:
    """A vCPU without a ring says what should have come first."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        assert not vcpu.has_dirty_ring
        with pytest.raises(StateError, match="enable_dirty_ring"):
            _ = vcpu.dirty_ring
        assert vm.harvest(DirtyGfns(1)) == 0


@pytest.mark.parametrize("slot", [1, 7, 300])
def test_entries_name_their_slot(kvm: System, facts: RingFacts, slot: int) -> None:
    """Offsets count from the slot's start, wherever in the guest it lies."""
    with Rig(kvm, entries=facts.smallest, pages=8) as rig:
        far = rig.vm.add_memory(8 * PAGE, 8 * PAGE, slot=slot + 10, log_dirty=True)
        gpas = [rig.ram.gpa + 3 * PAGE, far.gpa + 2 * PAGE, far.gpa + 7 * PAGE]
        rig.write(gpas)
        gfns = DirtyGfns(8)
        rig.vm.harvest(gfns)
        assert {(g.slot, g.offset) for g in gfns} == {
            (rig.ram.slot, 3),
            (far.slot, 2),
            (far.slot, 7),
        }
        dirty = DirtySet(rig.vm)
        rig.vm.reset_dirty_rings()
        rig.write(gpas)
        rig.vm.harvest(dirty)
        assert_exact(gpas, dirty.gpas())
