"""What only Intel's PML shows: the CPU logs pages by itself, and hands them in when it leaves.

A page written again after a reset costs no fault there: the CPU puts it into a buffer of 512,
which KVM empties into the ring at each exit. So the smallest ring is larger, a ring is full a
little late, and what a vCPU inside the guest wrote is not in its ring: kick it, then harvest.

Few hosts of the lab have PML; `--machine bochs` does. Whether this one has is found by trying.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import pytest

from kvmring import Cap, DirtyGfns, ExitReason, KvmError, System, ioctls

from ..gates import needs
from .rig import ENTRY_BYTES, PAGE, Rig, RingFacts, assert_exact, logged, pages_of

if TYPE_CHECKING:
    from types import TracebackType

pytestmark = [needs(Cap.DIRTY_LOG_RING_ACQ_REL), pytest.mark.pml]

BUFFER = 512  # entries of the CPU's own
RESERVED = 64 + BUFFER
SMALLEST = 1024


@pytest.fixture(autouse=True)
def _pml(facts: RingFacts) -> None:
    """Skip where KVM keeps back nothing for a CPU's own buffer."""
    if facts.smallest * ENTRY_BYTES <= PAGE:
        pytest.skip("no PML: this host's KVM takes a dirty ring of one page")


def warm(rig: Rig) -> None:
    """Write each page once, and reset: the next write of it is the CPU's to log.

    The first one is a fault, which KVM logs.
    """
    rig.guest.load(0, rig.gpas())
    rig.collect(DirtyGfns(rig.ram.num_pages + 2 * SMALLEST))


def exits(rig: Rig) -> int:
    """How often the vCPU has left the guest, by KVM's own count."""
    number = rig.vm.vcpus[0].stats()["exits"]
    assert isinstance(number, int)
    return number


class Loop:
    """A thread whose vCPU writes the RAM round and round, and stays out after each exit."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.gpas = rig.gpas()
        rig.guest.load(0, self.gpas, rounds=0)
        # Bochs 2.7: a guest with interrupts off never leaves for an interrupt of its host
        regs = rig.vm.vcpus[0].get_regs()
        rig.vm.vcpus[0].set_regs(replace(regs, rflags=regs.rflags | 1 << 9))
        self.go, self.out = threading.Semaphore(1), threading.Semaphore(0)
        self.reasons: list[ExitReason | int] = []
        self.ended = False
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while self.go.acquire() and not self.ended:
            self.reasons.append(self.rig.guest.run(0).reason)
            self.out.release()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None
    ) -> None:
        self.ended = True
        self.go.release()
        self.rig.vm.vcpus[0].kick()
        self.thread.join(60)
        assert not self.thread.is_alive(), "the run is stuck"

    @property
    def stores(self) -> int:
        return self.rig.guest.progress(0).stores

    def wait_for(self, stores: int) -> None:
        """Return when the guest has done so many; it is counted in memory, by the guest."""
        while self.stores < stores:
            time.sleep(0)

    def kick(self) -> None:
        """Have the vCPU leave the guest, and stay out."""
        self.rig.vm.vcpus[0].kick()
        assert self.out.acquire(timeout=60), "the kick was lost"
        assert self.reasons[-1] is ExitReason.INTR


def test_the_smallest_ring_has_room_for_the_cpus_buffer(kvm: System, facts: RingFacts) -> None:
    """One page and two are EINVAL, 64 + 512 entries do not fit; the next power of two does."""
    assert (facts.smallest, facts.reserved) == (SMALLEST, RESERVED)
    for size in (4096, 8192):
        with kvm.create_vm() as vm:
            with pytest.raises(KvmError) as caught:
                ioctls.enable_cap(vm, Cap.DIRTY_LOG_RING_ACQ_REL, [size])
            assert caught.value.errno == errno.EINVAL
    with kvm.create_vm() as vm:
        ioctls.enable_cap(vm, Cap.DIRTY_LOG_RING_ACQ_REL, [16384])
        assert vm.ring_entries == SMALLEST


@pytest.mark.parametrize("entries", [256, 512])
def test_a_ring_too_small_is_refused_in_a_sentence(kvm: System, entries: int) -> None:
    """It says what is kept back and why; the VM takes a larger ring afterwards."""
    with kvm.create_vm() as vm:
        with pytest.raises(
            KvmError, match=r"too few entries: KVM keeps 64 .* with PML 512 more"
        ) as e:
            vm.enable_dirty_ring(entries)
        assert e.value.errno == errno.EINVAL
        assert "\n" not in str(e.value)
        vm.enable_dirty_ring(SMALLEST)
        assert vm.ring_entries == SMALLEST


def test_pages_are_logged_without_an_exit_for_each(kvm: System) -> None:
    """The entries of many stores come with few exits: they were not there at the store.

    Where a page is logged by a fault, its entry is in the ring when the store retires, and costs
    an exit.
    """
    with Rig(kvm, entries=SMALLEST, pages=400) as rig:
        warm(rig)
        gpas = rig.gpas(order="random")
        before = exits(rig)
        rig.write(gpas)
        spent = exits(rig) - before
        gfns = DirtyGfns(SMALLEST)
        assert rig.ring.harvest(gfns) == len(gpas)
        assert_exact(gpas, (page * PAGE for page in pages_of(gfns)))
        assert spent < len(gpas) // 4, f"{spent} exits for {len(gpas)} pages"


def test_a_ring_is_full_up_to_a_buffer_late(kvm: System) -> None:
    """What the CPU holds comes on top of the limit; the 512 kept back are for that."""
    with Rig(kvm, entries=SMALLEST, pages=2 * SMALLEST) as rig:
        warm(rig)
        gpas = rig.gpas(order="random")
        rig.guest.load(0, gpas)
        gfns = DirtyGfns(4 * SMALLEST)
        full = rig.collect(gfns)
        assert full
        limit = SMALLEST - RESERVED
        assert all(limit <= n < limit + BUFFER for n in full), full
        assert_exact(gpas, (page * PAGE for page in pages_of(gfns)))
        rig.assert_memory()


def test_inside_the_guest_nothing_is_in_the_ring_until_a_kick(kvm: System) -> None:
    """The guest's own count says that every page was written, and the ring is empty.

    An interrupt of the host, some hundred a second, makes the vCPU leave too and ends one
    attempt; a ring that is empty once proves it.
    """
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: whoever looks at the ring has made the vCPU leave the guest")
    with Rig(kvm, entries=SMALLEST, pages=64) as rig, Loop(rig) as loop:
        loop.wait_for(64)
        for _ in range(1000):
            logged(rig)  # and the reset has the vCPU's TLB flushed: it left, and is inside again
            loop.wait_for(loop.stores + 2 * 64)
            if rig.ring.fill() == 0:
                break
        else:
            pytest.fail("1,000 times entries were there while the vCPU was inside the guest")
        loop.kick()
        assert_exact(loop.gpas, logged(rig))


@pytest.mark.parametrize("pages", [64, 600])
def test_none_is_lost_when_the_vcpu_is_kicked_first(kvm: System, pages: int) -> None:
    """Kick, harvest, reset, go on: each time the log is what the guest wrote since the last.

    The store that a kick interrupts may be done and not counted yet, or neither.
    """
    with Rig(kvm, entries=4 * SMALLEST, pages=pages) as rig, Loop(rig) as loop:
        before = 0
        for number in range(30):
            # from a part of a round to some rounds
            loop.wait_for(before + 1 + number * pages // 10)
            loop.kick()
            after = loop.stores
            found = set(logged(rig))
            certain = {loop.gpas[n % pages] for n in range(before + 1, after)[-pages:]}
            edges = {loop.gpas[n % pages] for n in (before, after)}
            assert_exact(certain, found - (edges - certain))
            before = after
            loop.go.release()
        loop.kick()
