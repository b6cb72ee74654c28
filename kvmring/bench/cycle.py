"""Pages per second of the whole job, run, harvest and reset: in Python, and in a C program.

The same guest writes the same pages, on two VMs in turn, until it is done.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmring.abi import PAGE_SIZE, ExitReason
from kvmring.bench.measure import alternate, cpu_ns, pool, ratio, summary
from kvmring.bench.report import Column, Group, Table
from kvmring.bench.rigs import fitting, rig, ring_sizes, sparse_bytes, spread_pages
from kvmring.dirtyset import DirtySet
from kvmring.errors import KvmringError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmring.bench.baseline import Baseline
    from kvmring.bench.measure import Effort
    from kvmring.bench.rigs import Rig
    from kvmring.system import System

__all__ = ["measure"]

SIZES = (256, 1024, 4096, 16384, 65536)
QUICK_SIZES = (1024, 4096)
PAGES = 8192  # of one sample; more where the ring is larger
QUICK_PAGES = 4096
SECOND = 1e9

_COLUMNS = (
    Column(name="entries", head="ring\nentries"),
    Column(name="pages", head="pages\nwritten"),
    Column(name="cycles", head="resets"),
    Column(name="python", head="kvmring\npages/s"),
    Column(name="c", head="C program\npages/s"),
    Column(name="python_to_c", head="kvmring /\nC program"),
)


def measure(
    kvm: System,
    effort: Effort,
    base: Baseline | None,
    *,
    sizes: Sequence[int] | None = None,
    pages: int | None = None,
) -> Group:
    """Measure every ring size that the host takes."""
    table = Table(name="cycle", title="Run, harvest into a set, reset", columns=_COLUMNS)
    least = pages or (QUICK_PAGES if effort.quick else PAGES)
    taken = ring_sizes(kvm, sizes or (QUICK_SIZES if effort.quick else SIZES))
    fit, left_out = fitting(taken)
    for entries in fit:
        # a little more than a ring holds, so that it is full at least once
        number = min(max(least, entries + entries // 4), sparse_bytes() // PAGE_SIZE)
        parts = []
        for fold in range(effort.folds):
            with ExitStack() as stack:
                make = _maker(stack, kvm, entries, number)
                ours = _Cycle(make(None), number, fold)
                contestants: dict[str, Callable[[], float]] = {"python": ours.python}
                if base is not None:
                    contestants["c"] = _Cycle(make(base), number, fold).c
                parts.append(alternate(contestants, effort.scaled(3).fold()))
        found = pool(parts)
        table.add(
            entries,
            number,
            ours.resets,
            summary(found["python"]),
            summary(found["c"]) if base else None,
            ratio(found["python"], found["c"]) if base else None,
        )
    says = [
        "Both run the guest until its ring is full, harvest, reset and run on, in one thread. "
        "kvmring's reset blocks the thread's signals around the ioctl; the C program's does not. "
        "Seconds are of the thread's CPU time, guest included.",
        *left_out,
    ]
    return Group(name="cycle", tables=[table], says=says)


def _maker(
    stack: ExitStack, kvm: System, entries: int, capacity: int
) -> Callable[[Baseline | None], Rig]:
    return lambda base: stack.enter_context(
        rig(kvm, size_bytes=sparse_bytes(), entries=entries, capacity=capacity, base=base)
    )


class _Cycle:
    """One VM and its guest's list, written once per sample."""

    def __init__(self, it: Rig, pages: int, seed: int) -> None:
        self.rig = it
        self.pages = pages
        self.gpas = it.gpas(spread_pages(it.ram.num_pages, pages, order="random", seed=seed))
        self.dirty = DirtySet(it.vm)
        self.entries = self.resets = 0

    def python(self) -> float:
        """Do it with kvmring; returns pages per second."""
        for bitmap in self.dirty.values():
            bitmap.clear()
        self.rig.guest.load(0, self.gpas)
        begin = cpu_ns()
        self._loop()
        ns = cpu_ns() - begin
        self._require(self.dirty.count(), self.entries)
        vcpu = self.rig.vm.vcpus[0]
        vcpu.kick()  # the write to the doorbell is completed by the next entry
        vcpu.run()
        return self.pages / ns * SECOND

    def _loop(self) -> None:
        vm, dirty = self.rig.vm, self.dirty
        vcpu = vm.vcpus[0]
        self.entries = self.resets = 0
        while True:
            reason = vcpu.run().reason
            if reason is ExitReason.INTR:
                continue
            self.entries += vm.harvest(dirty)
            vm.reset_dirty_rings()
            self.resets += 1
            if reason is ExitReason.MMIO:
                return

    def c(self) -> float:
        """Do it in C; returns pages per second."""
        assert self.rig.c is not None
        self.rig.guest.load(0, self.gpas)
        entries, ns = self.rig.c.cycle()
        self._require(self.rig.c.clean(), entries)
        return self.pages / ns * SECOND

    def _require(self, pages: int, entries: int) -> None:
        """Refuse a time of a job that was not done."""
        if pages != self.pages or entries < pages:
            raise KvmringError(
                f"{pages} pages and {entries} entries logged where {self.pages} were written"
            )
