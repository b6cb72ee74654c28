"""Nanoseconds per entry of a harvest: the whole Python call, beside loops in C and in ctypes.

A real guest fills a real ring; then one harvest is timed, and the ring is handed back. Sets
and bitmaps are empty and warm before each. The C works on a VM of its own that is alike.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmring.bench.baseline import RawRing
from kvmring.bench.measure import alternate, pool, ratio, summary
from kvmring.bench.report import Column, Group, Table
from kvmring.bench.rigs import fitting, rig, ring_sizes, sparse_bytes, spread_pages
from kvmring.dirtyset import DirtySet
from kvmring.errors import KvmringError
from kvmring.ring import DirtyGfns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmring.bench.baseline import Baseline
    from kvmring.bench.measure import Effort
    from kvmring.bench.rigs import Rig
    from kvmring.system import System

__all__ = ["measure"]

SIZES = (1024, 4096, 16384, 65536)
QUICK_SIZES = (4096, 65536)
ORDERS = ("sequential", "random")
MOST_RAW = 4096  # entries of the ctypes loop's ring: it takes a microsecond for each

_COLUMNS = (
    Column(name="entries", head="ring\nentries"),
    Column(name="order", head="pages"),
    Column(name="gfns_ns", head="DirtyGfns\nns/entry"),
    Column(name="set_ns", head="DirtySet\nns/entry"),
    Column(name="c_floor_ns", head="C marks\nns/entry"),
    Column(name="c_plain_ns", head="C bitmap\nns/entry"),
    Column(name="ctypes_ns", head="ctypes\nns/entry"),
)
_RATIOS = (
    Column(name="entries", head="ring\nentries"),
    Column(name="order", head="pages"),
    Column(name="harvested", head="harvested\nentries"),
    Column(name="gfns_to_floor", head="DirtyGfns /\nC marks"),
    Column(name="set_to_plain", head="DirtySet /\nC bitmap"),
    Column(name="ctypes_to_set", head="ctypes /\nDirtySet"),
)


def measure(
    kvm: System,
    effort: Effort,
    base: Baseline | None,
    *,
    sizes: Sequence[int] | None = None,
    orders: Sequence[str] = ORDERS,
) -> Group:
    """Measure every ring size that the host takes, in every order."""
    times = Table(name="times", title="Harvest of a full ring, per entry", columns=_COLUMNS)
    ratios = Table(name="ratios", title="The same as ratios, pair by pair", columns=_RATIOS)
    taken = ring_sizes(kvm, sizes or (QUICK_SIZES if effort.quick else SIZES))
    fit, left_out = fitting(taken)
    for entries in fit:
        for order in orders:
            _one(kvm, effort, base, entries, order, times, ratios)
    says = [
        "DirtyGfns and DirtySet: kvmring, the whole call of vm.harvest().",
        "C marks: a loop in C that marks entries and drops their pages: the floor. C bitmap: "
        "one entry at a time into its slot's bitmap, as VMMs do it.",
        f"ctypes: a loop in Python over a ring of at most {MOST_RAW} entries mapped by ctypes.",
        *left_out,
    ]
    return Group(name="harvest", tables=[times, ratios], says=says)


def _one(
    kvm: System,
    effort: Effort,
    base: Baseline | None,
    entries: int,
    order: str,
    times: Table,
    ratios: Table,
) -> None:
    parts = []
    harvested = set()
    for fold in range(effort.folds):
        with ExitStack() as stack:
            make = _maker(stack, kvm, order, fold)
            ours = _Ours(make(entries, None))
            contestants: dict[str, Callable[[], float]] = {"gfns": ours.gfns, "set": ours.set}
            if base is not None:
                theirs = _Theirs(make(entries, base))
                contestants |= {"floor": theirs.floor, "plain": theirs.plain}
            raw_rig = make(min(entries, MOST_RAW), None)
            raw_ring = RawRing(raw_rig.vm, raw_rig.ram.num_pages)
            contestants["ctypes"] = _Raw(raw_rig, stack.enter_context(raw_ring)).take
            parts.append(alternate(contestants, effort.scaled(4).fold()))
            harvested.add(ours.harvested)
    found = pool(parts)
    times.add(
        entries,
        order,
        *(
            summary(found[name]) if name in found else None
            for name in ("gfns", "set", "floor", "plain", "ctypes")
        ),
    )
    ratios.add(
        entries,
        order,
        max(harvested),
        ratio(found["gfns"], found["floor"]) if base else None,
        ratio(found["set"], found["plain"]) if base else None,
        ratio(found["ctypes"], found["set"]),
    )


def _maker(
    stack: ExitStack, kvm: System, order: str, seed: int
) -> Callable[[int, Baseline | None], Rig]:
    def make(entries: int, base: Baseline | None) -> Rig:
        it = stack.enter_context(
            rig(kvm, size_bytes=sparse_bytes(), entries=entries, capacity=entries, base=base)
        )
        pages = spread_pages(it.ram.num_pages, entries, order=order, seed=seed)
        it.guest.load(0, it.gpas(pages), rounds=0)
        return it

    return make


def _require(found: int, wanted: int, who: str) -> None:
    if found != wanted or not found:
        raise KvmringError(f"{who} found {found} where there were {wanted}; its time means nothing")


class _Ours:
    """kvmring's own harvests."""

    def __init__(self, it: Rig) -> None:
        self.rig = it
        self.into_gfns = DirtyGfns(it.vm.ring_entries)
        self.into_set = DirtySet(it.vm)
        self.ring = it.vm.vcpus[0].dirty_ring
        self.harvested = 0

    def gfns(self) -> float:
        """Harvest into DirtyGfns; returns ns per entry."""
        self.into_gfns.clear()
        return self._take(self.into_gfns)

    def set(self) -> float:
        """Harvest into a DirtySet that is empty; returns ns per entry."""
        for bitmap in self.into_set.values():
            bitmap.clear()
        per_entry = self._take(self.into_set)
        _require(self.into_set.count(), self.harvested, "the harvest into a DirtySet")
        return per_entry

    def _take(self, into: DirtyGfns | DirtySet) -> float:
        harvest = self.rig.vm.harvest
        self.rig.fill()
        begin = time.perf_counter_ns()
        taken = harvest(into)
        ns = time.perf_counter_ns() - begin
        _require(taken, taken + self.ring.fill(), "a harvest")
        self.harvested = taken
        self.rig.vm.reset_dirty_rings()
        return ns / taken


class _Theirs:
    """The loops in C."""

    def __init__(self, it: Rig) -> None:
        assert it.c is not None
        self.rig = it
        self.c = it.c

    def floor(self) -> float:
        """Mark entries; returns ns per entry."""
        self.rig.fill()
        n, ns = self.c.mark()
        self._reset(n)
        return ns / n

    def plain(self) -> float:
        """Harvest into a bitmap that is empty; returns ns per entry."""
        self.rig.fill()
        n, ns = self.c.harvest()
        _require(self.c.clean(), n, "the loop in C")
        self._reset(n)
        return ns / n

    def _reset(self, taken: int) -> None:
        reset, _ = self.c.reset()
        _require(reset, taken, "the reset after the loop in C")


class _Raw:
    """The loop in Python."""

    def __init__(self, it: Rig, ring: RawRing) -> None:
        self.rig = it
        self.ring = ring

    def take(self) -> float:
        """Harvest into a bitmap; returns ns per entry."""
        self.rig.fill()
        begin = time.perf_counter_ns()
        taken = self.ring.harvest()
        ns = time.perf_counter_ns() - begin
        _require(self.ring.reset(), taken, "the reset after the loop in Python")
        return ns / taken
