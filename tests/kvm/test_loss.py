"""Collectors that are broken on purpose: each of them loses pages, and the truth shows it.

The other tests say "none lost" by comparing a log with what the guest knows. Here the same
comparison fails, once for every known way to lose a page, so that it is known to be able to.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, DirtyGfns, DirtySet, RingError, System, ioctls
from kvmring.abi import lib

from ..gates import needs
from .rig import ENTRY_BYTES, PAGE, Rig, RingFacts, assert_exact, skip_with

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)
DIRTY, RESET = 1, 2
N = 40


@contextmanager
def loses(number: int) -> Iterator[None]:
    """Expect the comparison with the truth to miss so many pages."""
    with pytest.raises(AssertionError, match=f"^{number} pages missed"):
        yield


def map_ring(fd: int, entries: int) -> mmap.mmap:
    """Map a vCPU's ring once more, without anyone to look after it."""
    return mmap.mmap(fd, entries * ENTRY_BYTES, offset=lib.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE)


def raw_ring(rig: Rig) -> mmap.mmap:
    """Map the first vCPU's ring once more."""
    return map_ring(rig.vm.vcpus[0].fileno(), rig.vm.ring_entries)


def flags(ring: mmap.mmap, index: int) -> int:
    return int(struct.unpack_from("=I", ring, index * ENTRY_BYTES)[0])


def steal_in_child(rig: Rig) -> int:
    """Have a forked child harvest: mark every dirty entry as taken; return how many."""
    fd, entries = rig.vm.vcpus[0].fileno(), rig.vm.ring_entries
    pid = os.fork()
    if not pid:
        n = 0
        try:
            with map_ring(fd, entries) as ring:
                while flags(ring, n) == DIRTY:
                    struct.pack_into("=I", ring, n * ENTRY_BYTES, RESET)
                    n += 1
        finally:
            os._exit(n)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def logged(rig: Rig) -> DirtySet:
    dirty = DirtySet(rig.vm)
    rig.vm.harvest(dirty)
    return dirty


def test_the_comparison_itself() -> None:
    """It sees a page that is missing, and one that nobody wrote."""
    assert_exact([1, 2], [2, 1, 1])
    with loses(1):
        assert_exact([1, 2], [1])
    with pytest.raises(AssertionError, match="1 pages too many"):
        assert_exact([1], [1, 2])


def test_no_reset(kvm: System, facts: RingFacts) -> None:
    """Harvested but not reset: the page stays writable, and its next write is not logged."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        assert_exact(rig.gpas(), logged(rig).gpas())
        rig.write(rig.gpas())
        with loses(N):
            assert_exact(rig.gpas(), logged(rig).gpas())
        rig.assert_memory()  # the guest did write
        assert rig.vm.reset_dirty_rings().reset == N
        rig.write(rig.gpas())
        assert_exact(rig.gpas(), logged(rig).gpas())


def test_reset_after_reading_the_contents(kvm: System, facts: RingFacts) -> None:
    """What is written between the reading and the reset is in no later log."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        sent = {gpa: rig.ram.words()[gpa // PAGE] for gpa in logged(rig).gpas()}
        rig.write(rig.gpas())
        rig.vm.reset_dirty_rings()
        sent.update({gpa: rig.ram.words()[gpa // PAGE] for gpa in logged(rig).gpas()})
        assert list(rig.ram.words()) != [sent[gpa] for gpa in rig.gpas()]


def test_a_child_that_harvests(kvm: System, facts: RingFacts) -> None:
    """The next harvest sees entries that it did not take, and says so."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        assert steal_in_child(rig) == N
        dirty = DirtySet(rig.vm)
        with pytest.raises(RingError, match="somebody else") as caught:
            rig.vm.harvest(dirty)
        error = caught.value
        assert (error.vcpu, error.index, error.flags) == (0, 0, RESET)
        assert (error.slot, error.harvested) == (rig.ram.slot, 0)
        with loses(N):
            assert_exact(rig.gpas(), dirty.gpas())


def test_a_thief_between_two_harvests(kvm: System, facts: RingFacts) -> None:
    """What came before the stolen entries is in the target, and counted."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        with raw_ring(rig) as ring:
            struct.pack_into("=I", ring, 10 * ENTRY_BYTES, RESET)
        gfns = DirtyGfns(N)
        with pytest.raises(RingError) as caught:
            rig.ring.harvest(gfns)
        assert (caught.value.index, caught.value.offset, caught.value.harvested) == (10, 10, 10)
        with loses(N - 10):
            assert_exact(range(N), [gfn.offset for gfn in gfns])


def test_a_child_that_harvests_before_somebody_resets(kvm: System, facts: RingFacts) -> None:
    """When KVM has the entries back, nothing in the ring tells; only the truth does."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        assert steal_in_child(rig) == N
        assert ioctls.ioctl(rig.vm, lib.KVM_RESET_DIRTY_RINGS) == N
        with loses(N):
            assert_exact(rig.gpas(), logged(rig).gpas())


def test_a_reset_counts_what_was_stolen(kvm: System, facts: RingFacts) -> None:
    """KVM resets more than was harvested here: the guarded reset does not believe it."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        assert steal_in_child(rig) == N
        with pytest.raises(RingError, match="another harvester"):
            rig.vm.reset_dirty_rings()


def test_an_entry_that_was_written_over(kvm: System, facts: RingFacts) -> None:
    """KVM reads the entry again: another offset, and the page is counted but not protected."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        assert_exact(rig.gpas(), logged(rig).gpas())
        with raw_ring(rig) as ring:
            struct.pack_into("=Q", ring, 5 * ENTRY_BYTES + 8, 1 << 40)
        assert rig.vm.reset_dirty_rings().reset == N
        rig.write(rig.gpas())
        with loses(1):
            assert_exact(rig.gpas(), logged(rig).gpas())


def test_an_entry_that_was_skipped(kvm: System, facts: RingFacts) -> None:
    """KVM resets in order: behind an entry that was not taken nothing is reset."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        with raw_ring(rig) as ring:
            for index in range(1, N):
                struct.pack_into("=I", ring, index * ENTRY_BYTES, RESET)
            assert ioctls.ioctl(rig.vm, lib.KVM_RESET_DIRTY_RINGS) == 0
            struct.pack_into("=I", ring, 0, RESET)
        assert ioctls.ioctl(rig.vm, lib.KVM_RESET_DIRTY_RINGS) == N


def test_logging_off_meanwhile(kvm: System, facts: RingFacts) -> None:
    """A slot that does not log is silent; turned on again, it logs every page."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.ram.set_log_dirty(False)
        rig.write(rig.gpas())
        with loses(N):
            assert_exact(rig.gpas(), logged(rig).gpas())
        rig.ram.set_log_dirty(True)
        rig.write(rig.gpas())
        assert_exact(rig.gpas(), logged(rig).gpas())


@needs(Cap.MANUAL_DIRTY_LOG_PROTECT2)
def test_a_ring_with_initially_set(kvm: System, facts: RingFacts) -> None:
    """Why the package refuses it: pages that are mapped already are not logged."""
    skip_with(Cap.DIRTY_LOG_RING_WITH_BITMAP)
    with Rig(kvm, entries=facts.smallest, pages=N, log_dirty=False) as rig:
        ioctls.enable_cap(rig.vm, Cap.MANUAL_DIRTY_LOG_PROTECT2, [3])
        rig.write(rig.gpas())
        rig.ram.set_log_dirty(True)
        rig.write(rig.gpas())
        with loses(N):
            assert_exact(rig.gpas(), logged(rig).gpas())


def test_a_slot_remade_under_its_number(kvm: System, facts: RingFacts) -> None:
    """Entries of a deleted slot are read as the new slot's: pages that nobody wrote there."""
    with Rig(kvm, entries=facts.smallest, pages=N) as rig:
        rig.write(rig.gpas())
        rig.ram.remove()
        again = rig.vm.add_memory(0, N * PAGE, log_dirty=True, slot=rig.ram.slot)
        with pytest.raises(AssertionError, match=f"^{N} pages too many"):
            assert_exact([], logged(rig)[again.slot])
