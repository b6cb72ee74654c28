"""What each way of logging costs: the guest's time, the collector's, and the bytes between them.

A guest writes so many pages, the collector then lists them, again and again. In the same VM
lies a second slot, of the same size and without logging: the guest writes the same list there,
in turn, and the difference is the time that it loses. To collect is to know the numbers of the
pages and have them logged anew: harvest and reset; or get, page numbers, and clear. A full ring
stops the guest: what is collected then counts as collecting and as the guest's loss.
"""

from __future__ import annotations

import random
from array import array
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmring.abi import PAGE_SIZE, Cap, ExitReason
from kvmring.bench.advice import advise
from kvmring.bench.measure import alternate, cpu_ns, summary
from kvmring.bench.report import Column, Group, Table
from kvmring.bench.rigs import RAM_GPA, available_bytes, ring_sizes, touched_bytes
from kvmring.bitmap import DirtyBitmap
from kvmring.errors import KvmError, KvmringError
from kvmring.guests import PageWriter
from kvmring.ring import DirtyGfns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmring.bench.measure import Effort
    from kvmring.memory import GuestMemory
    from kvmring.system import System
    from kvmring.vm import VM

__all__ = ["Mode", "measure", "modes_of"]

MIB = 1 << 20
MEMORY = (64, 1024, 16384)  # MiB
QUICK_MEMORY = (64, 4096)
SHARES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
QUICK_SHARES = (1e-4, 1e-3, 1e-2, 1e-1)
MOST_PAGES = 65536  # written in one round
QUICK_PAGES = 4096
LEAST_PAGES = 8
RINGS = (1024, 4096, 65536)
QUICK_RINGS = (1024, 65536)
START_PAGES = 16384  # that the guest has in use when logging begins
MICRO = 1e-3

_COLUMNS = (
    Column(name="memory_mib", head="memory\nMiB"),
    Column(name="pages", head="dirtied\npages"),
    Column(name="share", head="dirty\nshare"),
    Column(name="mode", head="mode"),
    Column(name="lost_us", head="guest loses\nus/round"),
    Column(name="collect_us", head="collecting\nus/round"),
    Column(name="stops", head="ring\nfull"),
    Column(name="bytes", head="moved\nbytes"),
)
_START = (
    Column(name="mode", head="mode"),
    Column(name="on_us", head="turning on\nus"),
    Column(name="first_us", head="1st collect\nus"),
    Column(name="named", head="it names\npages"),
    Column(name="lost_us", head="guest loses\nus/round"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way of logging: a ring of so many entries, or the log, with or without manual clear."""

    name: str
    entries: int = 0
    with_bitmap: bool = False
    manual: int = 0


def modes_of(kvm: System, rings: Sequence[int]) -> list[Mode]:
    """List the modes that this host offers.

    Where KVM has a backup bitmap, no ring is without one: arm64 takes a slot that has no bitmap
    for one that does not log (memslot_is_logging() in arch/arm64/kvm/mmu.c), maps large blocks
    writable, and misses what is written there.
    """
    both = bool(kvm.check_extension(Cap.DIRTY_LOG_RING_WITH_BITMAP))
    kind = "ring+bitmap" if both else "ring"
    modes = [Mode(name=f"{kind} {n}", entries=n, with_bitmap=both) for n in ring_sizes(kvm, rings)]
    modes.append(Mode(name="bitmap"))
    manual = kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2)
    if manual & 1:
        modes.append(Mode(name="clear-log", manual=1))
    if manual & 2:
        modes.append(Mode(name="clear-log, set", manual=3))
    return modes


@dataclass(slots=True)
class _Round:
    """Samples of one mode, in nanoseconds."""

    lost: list[float] = field(default_factory=list)
    collect: list[float] = field(default_factory=list)
    stops: int = 0
    moved: int = 0


class _Vm:
    """A VM in one mode: logged memory, memory of the same size that is not, and the guest."""

    def __init__(self, kvm: System, vm: VM, mode: Mode, size_bytes: int, capacity: int) -> None:
        if mode.entries:
            vm.enable_dirty_ring(mode.entries, with_bitmap=mode.with_bitmap)
        if mode.manual:
            vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, [mode.manual])
        self.vm = vm
        self.mode = mode
        self.logged = vm.add_memory(RAM_GPA, size_bytes)
        self.other = vm.add_memory(RAM_GPA + size_bytes, size_bytes)
        self.guest = PageWriter(kvm, vm, capacity=capacity)
        self.vcpu = vm.vcpus[0]
        # of a whole round: the write that fills a ring is logged again after the reset
        self.gfns = DirtyGfns(2 * (capacity + mode.entries))
        self.bitmap = DirtyBitmap(self.logged.num_pages)
        self.stops = 0
        self.stop_ns = 0

    def write(self, memory: GuestMemory, pages: Sequence[int]) -> float:
        """Let the guest write pages, serving full rings; returns nanoseconds."""
        gpas = array("Q", (memory.gpa + page * PAGE_SIZE for page in pages))
        self.guest.load(0, gpas)
        run, is_done = self.guest.run, self.guest.is_done
        begin = cpu_ns()
        while not is_done(exit := run(0)):
            if exit.reason == ExitReason.DIRTY_RING_FULL:
                self.drain()
        return float(cpu_ns() - begin)

    def drain(self) -> None:
        """Take what is in a full ring."""
        begin = cpu_ns()
        self.vm.harvest(self.gfns)
        self.vm.reset_dirty_rings()
        self.stop_ns += cpu_ns() - begin
        self.stops += 1

    def begin(self) -> None:
        """Begin a round."""
        self.gfns.clear()
        self.stops = self.stop_ns = 0

    def collect(self) -> float:
        """Collect; returns the nanoseconds that this, and collecting at stops, took."""
        slot = self.logged.slot
        begin = cpu_ns()
        if self.mode.entries:
            self.vm.harvest(self.gfns)
            self.vm.reset_dirty_rings()
        if not self.mode.entries:
            self.vm.get_dirty_log(slot, into=self.bitmap)
            self.bitmap.page_numbers()
            if self.mode.manual:
                self.vm.clear_dirty_log(slot, self.bitmap)
        return float(cpu_ns() - begin + self.stop_ns)

    def pages(self) -> set[int]:
        """Return the pages of the round, after collect()."""
        named = set(memoryview(self.gfns).cast("B").cast("Q")[1::2].tolist())
        return named if self.mode.entries else set(self.bitmap)

    def moved(self) -> int:
        """Return the bytes that the round moved between KVM and this process."""
        bits = 0 if self.mode.entries else self.bitmap.nbytes
        return 16 * len(self.gfns) + bits * (2 if self.mode.manual else 1)

    def log(self, on: bool) -> float:
        """Turn logging on or off; returns nanoseconds."""
        begin = cpu_ns()
        self.logged.set_log_dirty(on)
        return float(cpu_ns() - begin)


@contextmanager
def _vm(kvm: System, mode: Mode, size_bytes: int, capacity: int) -> Iterator[_Vm]:
    with kvm.create_vm() as vm:
        yield _Vm(kvm, vm, mode, size_bytes, capacity)


def measure(
    kvm: System,
    effort: Effort,
    base: object = None,
    *,
    memory: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    rings: Sequence[int] | None = None,
    most_pages: int | None = None,
) -> Group:
    """Measure every mode that the host offers, with memory of so many MiB and shares of it."""
    quick = effort.quick
    most = most_pages or (QUICK_PAGES if quick else MOST_PAGES)
    table = Table(name="modes", title="One round: write, then collect", columns=_COLUMNS)
    start = Table(
        name="start",
        title="Beginning to log, and the first round after it",
        columns=_START,
    )
    modes = modes_of(kvm, rings or (QUICK_RINGS if quick else RINGS))
    says = []
    for mib in memory or (QUICK_MEMORY if quick else MEMORY):
        size_bytes = mib * MIB
        total = size_bytes // PAGE_SIZE
        wanted = shares or (QUICK_SHARES if quick else SHARES)
        counts = sorted({round(total * share) for share in wanted})
        counts = [n for n in counts if LEAST_PAGES <= n <= most]
        room = available_bytes() // 4  # for each of the two slots
        if counts != (counts := [n for n in counts if touched_bytes(n, size_bytes) <= room]):
            says.append(f"Memory of {mib} MiB: large shares left out, too little memory here.")
        for mode in modes:
            try:
                _one(kvm, effort, mode, size_bytes, counts, table)
            except KvmError as error:
                says.append(f"Memory of {mib} MiB, {mode.name}: refused: {error}.")
    table.rows.sort(key=lambda row: (row[0], row[1]))
    for mode in modes:
        _start(kvm, effort, mode, most, start)
    says.append(
        "Guest loses: against the same writes to memory that is not logged; a negative figure is "
        "noise. Collecting: until the pages' numbers are known and they are logged anew, at full "
        "rings too, which stop the guest. Times are of the one thread's CPU, guest included. "
        "Moved: entries read, bitmaps copied out and in."
    )
    if any(mode.with_bitmap for mode in modes):
        says.append(
            "ring+bitmap: the bitmap behind the ring is fetched once, at the very end, which is in "
            "no round."
        )
    if any(mode.manual == 3 for mode in modes):
        says.append(
            '"clear-log, set" is KVM_DIRTY_LOG_INITIALLY_SET: every page is dirty at first, and '
            "none is protected before it was cleared."
        )
    return Group(name="modes", tables=[table, start], says=[*says, *advise(table)])


def _one(
    kvm: System, effort: Effort, mode: Mode, size_bytes: int, counts: Sequence[int], table: Table
) -> None:
    with _vm(kvm, mode, size_bytes, max([*counts, 1])) as it:
        it.log(True)
        if mode.manual == 3:
            it.collect()  # the first one names every page
        for count in counts:
            found = _rounds(it, effort, count)
            table.add(
                size_bytes // MIB,
                count,
                count / it.logged.num_pages,
                mode.name,
                summary(found.lost).times(MICRO),
                summary(found.collect).times(MICRO),
                found.stops,
                found.moved,
            )


def _rounds(it: _Vm, effort: Effort, count: int) -> _Round:
    pages = random.Random(count).sample(range(it.logged.num_pages), count)
    wanted = set(pages)
    result = _Round()
    collected: list[float] = []

    def logged() -> float:
        it.begin()
        ns = it.write(it.logged, pages)
        collected.append(it.collect())
        if (named := it.pages()) != wanted:
            raise KvmringError(
                f"{it.mode.name}: {len(named)} pages collected where {count} were written"
            )
        return ns

    found = alternate({"logged": logged, "other": lambda: it.write(it.other, pages)}, effort)
    result.lost = [a - b for a, b in zip(found["logged"], found["other"], strict=True)]
    result.collect = collected[-len(result.lost) :]
    result.moved, result.stops = it.moved(), it.stops
    return result


def _start(kvm: System, effort: Effort, mode: Mode, most: int, table: Table) -> None:
    """Measure what it costs to begin, with memory that the guest has in use."""
    count = min(START_PAGES, most)
    pages = list(range(count))
    firsts: list[float] = []
    lost: list[float] = []
    named = 0
    with _vm(kvm, mode, count * PAGE_SIZE, count) as it:

        def begin() -> float:
            nonlocal named
            it.log(False)
            it.write(it.logged, pages)
            bare = it.write(it.logged, pages)
            ns = it.log(True)
            it.begin()
            firsts.append(it.collect())
            named = len(it.pages())
            it.begin()
            lost.append(it.write(it.logged, pages) - bare)
            it.collect()
            return ns

        found = alternate({"on": begin}, effort)["on"]
    n = len(found)
    table.add(
        mode.name,
        summary(found).times(MICRO),
        summary(firsts[-n:]).times(MICRO),
        named,
        summary(lost[-n:]).times(MICRO),
    )
