"""What grows with the number of vCPUs, and with the size of a slot: time and memory.

Busy rings hold so many entries each; of mostly idle ones, the first alone does. Slots are
sparse: the guest writes a thousand pages of each, anywhere, and KVM and the log are all that
grows with its size.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil

from kvmring.abi import PAGE_SIZE
from kvmring.bench.measure import Figure, alternate, cpu_ns, summary
from kvmring.bench.report import Column, Group, Table
from kvmring.bench.rigs import available_bytes, rig, ring_sizes, spread_pages, touched_bytes
from kvmring.bitmap import DirtyBitmap
from kvmring.dirtyset import DirtySet
from kvmring.errors import KvmError, KvmringError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmring.bench.measure import Effort
    from kvmring.bench.rigs import Rig
    from kvmring.system import System

__all__ = ["measure"]

VCPUS = (1, 2, 4, 8, 16, 32, 64)
QUICK_VCPUS = (1, 8, 64)
BUSY_PAGES = 256  # of each vCPU, per round
RINGS = (1024, 4096)  # the first that the host takes
GIB = 1 << 30
SLOTS = (1, 4, 16, 64, 256, 1024)  # GiB
QUICK_SLOTS = (1, 64)
SLOT_PAGES = 1000
# What KVM keeps for each page of a slot: a reverse mapping where it shadows page tables, and
# counters. It is the kernel's memory, which cannot be swapped: do not ask for half the machine.
KERNEL_BYTES = 12
MICRO = 1e-3
MIB = 1 << 20

_VCPUS = (
    Column(name="vcpus", head="vCPUs"),
    Column(name="rings", head="rings"),
    Column(name="entries", head="entries\nin all"),
    Column(name="harvest_us", head="harvest\nus"),
    Column(name="harvest_ns", head="harvest\nns/entry"),
    Column(name="reset_us", head="reset\nus"),
    Column(name="rss_mib", head="RSS\n+ MiB"),
)
_SLOTS = (
    Column(name="gib", head="slot\nGiB"),
    Column(name="made_ms", head="VM made\nms"),
    Column(name="harvest_us", head="ring\nharvest us"),
    Column(name="numbers_us", head="numbers\nof set us"),
    Column(name="get_us", head="get log\nus"),
    Column(name="count_us", head="count\nus"),
    Column(name="rss_mib", head="RSS\n+ MiB"),
)


def measure(
    kvm: System,
    effort: Effort,
    base: object = None,
    *,
    vcpus: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
) -> Group:
    """Measure rings of so many vCPUs, and slots of so many GiB."""
    many = Table(name="vcpus", title="Rings of many vCPUs, one harvest and reset", columns=_VCPUS)
    large = Table(
        name="slots",
        title=f"Sparse slots, at most {SLOT_PAGES} pages dirty in each",
        columns=_SLOTS,
    )
    says = []
    entries = ring_sizes(kvm, RINGS)[0]
    for number in vcpus or (QUICK_VCPUS if effort.quick else VCPUS):
        try:
            _vcpus(kvm, effort, number, entries, many)
        except KvmError as error:
            says.append(f"{number} vCPUs: refused: {error}.")
            break
    for size in slots or (QUICK_SLOTS if effort.quick else SLOTS):
        need = size * GIB // PAGE_SIZE * KERNEL_BYTES + touched_bytes(SLOT_PAGES, size * GIB)
        if need > available_bytes() // 2:
            says.append(
                f"A slot of {size} GiB: not tried: KVM and the guest may take {need >> 20} MiB "
                f"for it, and {available_bytes() >> 20} MiB are available."
            )
            break
        try:
            _slot(kvm, effort, size, entries, large)
        except (KvmError, ValueError) as error:
            refused = isinstance(error, KvmError) and error.errno != errno.ENOMEM
            why = "refused" if refused else "not possible here"
            says.append(f"A slot of {size} GiB: {why}: {error}.")
            break
    says.append(
        "RSS + MiB: what the VM, its guests and the collector add to this process. The kernel's "
        "own memory for a slot is not in it. Times are of the thread's CPU."
    )
    return Group(name="scale", tables=[many, large], says=says)


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


def _require(found: int, wanted: int) -> None:
    if found != wanted:
        raise KvmringError(f"{found} pages were logged where {wanted} were written")


def _vcpus(kvm: System, effort: Effort, number: int, entries: int, table: Table) -> None:
    before = _rss()
    with rig(
        kvm,
        size_bytes=number * BUSY_PAGES * PAGE_SIZE,
        entries=entries,
        vcpus=number,
        capacity=BUSY_PAGES,
    ) as it:
        for index in range(number):
            first = index * BUSY_PAGES
            it.guest.load(index, it.gpas(range(first, first + BUSY_PAGES)))
            it.finish(index)
        it.vm.harvest(DirtySet(it.vm))
        it.vm.reset_dirty_rings()
        for name, busy in (("idle", 1), ("busy", number)):
            rounds = _Rounds(it, busy)
            # harvest and reset of one round; the second contestant only hands on what was kept
            found = alternate(
                {"harvest": rounds.harvest, "reset": rounds.reset}, effort.scaled(0.5)
            )
            count = busy * BUSY_PAGES
            harvest = summary(found["harvest"])
            table.add(
                number,
                name,
                count,
                harvest.times(MICRO),
                harvest.times(1 / count),
                summary(found["reset"]).times(MICRO),
                round((_rss() - before) / MIB, 1),
            )


class _Rounds:
    """Rounds in which the first vCPUs write, and all rings are harvested and reset."""

    def __init__(self, it: Rig, busy: int) -> None:
        self.rig = it
        self.busy = busy
        self.dirty = DirtySet(it.vm)
        self.harvest_ns = self.reset_ns = 0.0
        self.fresh = False

    def _round(self) -> None:
        for bitmap in self.dirty.values():
            bitmap.clear()
        for index in range(self.busy):
            # entered again after the doorbell, the guest does its command once more
            self.rig.finish(index)
        begin = cpu_ns()
        taken = self.rig.vm.harvest(self.dirty)
        middle = cpu_ns()
        self.rig.vm.reset_dirty_rings()
        self.reset_ns = float(cpu_ns() - middle)
        self.harvest_ns = float(middle - begin)
        _require(taken, self.busy * BUSY_PAGES)
        _require(self.dirty.count(), taken)

    def _either(self) -> None:
        if not self.fresh:
            self._round()
        self.fresh = not self.fresh

    def harvest(self) -> float:
        """Return the nanoseconds of a round's harvest."""
        self._either()
        return self.harvest_ns

    def reset(self) -> float:
        """Return the nanoseconds of the same round's reset."""
        self._either()
        return self.reset_ns


def _slot(kvm: System, effort: Effort, gib: int, entries: int, table: Table) -> None:
    before = _rss()
    cells: dict[str, Figure] = {}
    size = gib * GIB
    count = min(SLOT_PAGES, entries // 2)  # the ring has room for a round
    with ExitStack() as stack:
        begin = cpu_ns()
        ringed = stack.enter_context(rig(kvm, size_bytes=size, entries=entries, capacity=count))
        added = cpu_ns() - begin
        pages = spread_pages(ringed.ram.num_pages, count, order="random")
        ringed.guest.load(0, ringed.gpas(pages))
        dirty = DirtySet(ringed.vm)
        numbers: list[float] = []

        def harvest() -> float:
            for bitmap in dirty.values():
                bitmap.clear()
            ringed.finish()
            begin = cpu_ns()
            taken = ringed.vm.harvest(dirty)
            middle = cpu_ns()
            found = len(dirty[ringed.ram.slot].page_numbers())
            numbers.append(float(cpu_ns() - middle))
            ringed.vm.reset_dirty_rings()
            _require(taken, count)
            _require(found, count)
            return float(middle - begin)

        cells["harvest"] = summary(alternate({"harvest": harvest}, effort.scaled(0.5))["harvest"])
        cells["numbers"] = summary(numbers[1:])
        ring_rss = _rss() - before
    with ExitStack() as stack:
        logged = stack.enter_context(rig(kvm, size_bytes=size, capacity=count))
        logged.guest.load(0, logged.gpas(pages))
        bitmap = DirtyBitmap(logged.ram.num_pages)
        counts: list[float] = []

        def get() -> float:
            logged.finish()
            begin = cpu_ns()
            logged.vm.get_dirty_log(logged.ram.slot, into=bitmap)
            middle = cpu_ns()
            found = bitmap.count()
            counts.append(float(cpu_ns() - middle))
            _require(found, count)
            return float(middle - begin)

        cells["get"] = summary(alternate({"get": get}, effort.scaled(0.5))["get"])
        cells["count"] = summary(counts[1:])
        grown = max(ring_rss, _rss() - before)
    table.add(
        gib,
        round(added / 1e6, 1),
        *(cells[name].times(MICRO) for name in ("harvest", "numbers", "get", "count")),
        round(grown / MIB, 1),
    )
