"""What the tests on the real device stand on: a VM with a guest in it, and the truth.

The guest is kvmring's PageWriter: it knows, by construction, which pages it wrote and what
stands in them. assert_exact() compares a log with that; test_loss.py shows that it can fail.
Sizes are pages of the running kernel; what a host's ring looks like is found by trying.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import pytest

from kvmring import (
    Cap,
    DirtyGfn,
    DirtyGfns,
    DirtySet,
    ExitReason,
    KvmError,
    System,
    ioctls,
    page_size,
)
from kvmring.guests import PageWriter, page_order

from ..gates import has

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmring import DirtyRing
    from kvmring.target import Target

PAGE = page_size()
ENTRY_BYTES = 16
X86 = platform.machine() == "x86_64"
only_x86 = pytest.mark.skipif(not X86, reason="x86-64 only")
only_arm64 = pytest.mark.skipif(platform.machine() != "aarch64", reason="arm64 only")


def skip_with(cap: Cap) -> None:
    """Skip a test of what happens where a capability is missing."""
    if has(cap):
        pytest.skip(f"this host's KVM has {cap.name}")


class Rig:
    """A VM with RAM at address 0 and a PageWriter; with rings when entries is not 0."""

    def __init__(
        self,
        kvm: System,
        *,
        pages: int,
        entries: int = 0,
        vcpus: int = 1,
        log_dirty: bool = True,
    ) -> None:
        self.vm = kvm.create_vm()
        try:
            if entries:
                self.vm.enable_dirty_ring(entries)
            self.ram = self.vm.add_memory(0, pages * PAGE, log_dirty=log_dirty)
            self.guest = PageWriter(kvm, self.vm, num_vcpus=vcpus)
        except BaseException:
            self.vm.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.vm.close()

    @property
    def ring(self) -> DirtyRing:
        """The first vCPU's ring."""
        return self.vm.vcpus[0].dirty_ring

    def gpas(self, first: int = 0, num: int | None = None, order: str = "sequential") -> list[int]:
        """List pages of the RAM by address."""
        return list(page_order(self.ram, order=order, first_page=first, num_pages=num, seed=7))

    def write(self, gpas: Sequence[int], index: int = 0) -> None:
        """Have a vCPU write pages; its ring must have room for them."""
        self.guest.load(index, gpas)
        exit = self.guest.run(index)
        assert self.guest.is_done(exit), exit

    def collect(self, into: Target, index: int = 0) -> list[int]:
        """Run a loaded command to its end; return the entries of each ring-full exit."""
        full: list[int] = []
        while True:
            exit = self.guest.run(index)
            n = self.vm.harvest(into)
            assert self.vm.reset_dirty_rings().reset == n
            if self.guest.is_done(exit):
                return full
            assert exit.reason is ExitReason.DIRTY_RING_FULL, exit
            full.append(n)

    def assert_memory(self, index: int = 0) -> None:
        """Compare what stands in the pages with what the guest must have put there."""
        words = self.ram.words(8 * index)
        gpas = self.guest.written(index)
        there = [words[(gpa - self.ram.gpa) // PAGE] for gpa in gpas]
        assert there == list(self.guest.values(index))[: len(gpas)]


def pages_of(gfns: Iterable[DirtyGfn]) -> list[int]:
    """Return the page numbers of entries, in their order."""
    return [gfn.offset for gfn in gfns]


def assert_exact(truth: Iterable[int], logged: Iterable[int]) -> None:
    """Fail unless a log names exactly the pages that were written."""
    written, found = set(truth), set(logged)
    missed, extra = sorted(written - found), sorted(found - written)
    assert not missed, f"{len(missed)} pages missed, the first {missed[0]:#x}"
    assert not extra, f"{len(extra)} pages too many, the first {extra[0]:#x}"


def assert_usable(rig: Rig) -> None:
    """Fail unless the rig's VM still runs its guest and logs exactly what that writes."""
    gpas = rig.gpas(0, 8)
    logged(rig)
    rig.write(gpas)
    assert_exact(gpas, logged(rig))


def logged(rig: Rig) -> list[int]:
    """Return what a VM logged since the last time, ring or not, as addresses."""
    dirty = DirtySet(rig.vm)
    if rig.vm.ring_entries:
        n = rig.vm.harvest(dirty)
        assert rig.vm.reset_dirty_rings().reset == n
    else:
        for slot in rig.vm.slots.values():
            if slot.log_dirty:
                dirty.add(slot.slot, rig.vm.get_dirty_log(slot.slot))
    return list(dirty.gpas())


@dataclass(frozen=True, slots=True, kw_only=True)
class RingFacts:
    """What this host's rings are like, found by trying.

    Attributes:
        smallest: Entries of the smallest ring that KVM takes.
        largest: Entries of the largest.
        reserved: Entries kept back: a full ring has at least entries - reserved.
    """

    smallest: int
    largest: int
    reserved: int

    @property
    def exact(self) -> bool:
        """Whether a ring is full at the limit exactly: where no PML hands in its own 512."""
        return self.reserved == 64

    def assert_full(self, n: int, entries: int) -> None:
        """Fail unless n entries make a ring of a size full."""
        if self.exact:
            assert n == entries - self.reserved
        else:
            assert entries - self.reserved <= n <= entries

    def assert_grown(self, n: int, by: int) -> None:
        """Fail unless n more entries came after that many were reset."""
        if self.exact:
            assert n == by
        else:
            assert by <= n <= by + self.reserved


@functools.cache
def ring_facts() -> RingFacts:
    """Find out about rings; after the gate only."""
    with System() as kvm:
        largest = kvm.check_extension(Cap.DIRTY_LOG_RING_ACQ_REL) // ENTRY_BYTES
        smallest = next(n for n in (1 << k for k in range(17)) if _takes(kvm, n))
        with Rig(kvm, entries=smallest, pages=smallest) as rig:
            rig.guest.load(0, rig.gpas())
            assert rig.guest.run(0).reason is ExitReason.DIRTY_RING_FULL
            gfns = DirtyGfns(smallest)
            n = rig.ring.harvest(gfns)
    reserved = 64 if n == smallest - 64 else 64 + 512
    return RingFacts(smallest=smallest, largest=largest, reserved=reserved)


def _takes(kvm: System, entries: int) -> bool:
    with kvm.create_vm() as vm:
        try:
            ioctls.enable_cap(vm, Cap.DIRTY_LOG_RING_ACQ_REL, [entries * ENTRY_BYTES])
        except KvmError:
            return False
        return True
