"""truth.*: guests that know what they wrote, in every mode of dirty logging that the host offers.

Nothing that was written may be missing. Beyond it a log may name: the page of the store that the
guest is at; the page at which a ring got full, whose store comes later; and with
INITIALLY_SET, in the first bitmap, every page of the slot.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kvmring.abi import Cap, ExitReason
from kvmring.checks.rig import Rig, has_pml
from kvmring.checks.rules import Trial, rule
from kvmring.ring import DirtyGfns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

RING_CAP, BITMAP_CAP = Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING_WITH_BITMAP
MANUAL_CAP = Cap.MANUAL_DIRTY_LOG_PROTECT2
COLLECTIONS = 20
PATIENCE_S = 60.0


class Mode(ABC):
    """A way to log dirty pages, and a guest under it.

    Args:
        trial: The trial.
        pages: Pages of the RAM.
        vcpus: How many.
        entries: Of each ring, where there are rings: as few as the host takes without it.
    """

    name = ""
    words = ""
    needs: tuple[Cap, ...] = ()
    rings = False
    with_bitmap: bool | None = None

    def __init__(
        self, trial: Trial, pages: int, *, vcpus: int = 1, entries: int | None = None
    ) -> None:
        self.trial = trial
        self.lock = threading.Lock()
        if entries is None:
            entries = trial.least_entries if self.rings else 0
        self.rig = Rig(
            trial,
            pages,
            vcpus=vcpus,
            entries=entries,
            log=False,
            with_bitmap=self.with_bitmap,
        )
        self.slot = self.rig.ram.slot
        self.begin()

    def begin(self) -> None:
        """Have the RAM logged."""
        self.rig.ram.set_log_dirty(True)

    @abstractmethod
    def collect(self) -> set[int]:
        """Return what was logged since the last time, and have it logged again from now on."""

    def serve(self) -> None:
        """Make room where a ring is full."""
        raise AssertionError("only rings get full")


class RingMode(Mode):
    """A ring per vCPU, and no bitmap."""

    name, words, rings = "ring", "by the rings", True
    needs: tuple[Cap, ...] = (RING_CAP,)
    with_bitmap: bool | None = False

    def begin(self) -> None:
        """Have the RAM logged."""
        super().begin()
        self.pending: set[int] = set()
        self.gfns = DirtyGfns(2 * self.rig.entries * len(self.rig.vcpus))

    def serve(self) -> None:
        """Harvest and reset all rings."""
        with self.lock:
            self.gfns.clear()
            taken = self.rig.vm.harvest(self.gfns)
            done = self.rig.vm.reset_dirty_rings().reset
            self.trial.expect("entries reset of those harvested", done, taken)
            self.pending |= {gfn.offset for gfn in self.gfns}

    def collect(self) -> set[int]:
        """Return what was harvested."""
        self.serve()
        with self.lock:
            found, self.pending = self.pending, set()
        return found


class RingBitmapMode(RingMode):
    """Rings, and a bitmap for what is written outside any vCPU: nothing, here."""

    name, words = "ring_bitmap", "by the rings, and none by the backup bitmap"
    needs = (RING_CAP, BITMAP_CAP)
    with_bitmap = True

    def collect(self) -> set[int]:
        """Return what was harvested, and expect the bitmap to be empty."""
        found = super().collect()
        bitmap = self.rig.vm.get_dirty_log(self.slot)
        self.trial.expect("pages in the backup bitmap", list(bitmap.page_numbers()), [])
        return found


class BitmapMode(Mode):
    """KVM_GET_DIRTY_LOG, which clears what it returns."""

    name, words = "bitmap", "by KVM_GET_DIRTY_LOG"

    def collect(self) -> set[int]:
        """Return a bitmap's pages."""
        return set(self.rig.vm.get_dirty_log(self.slot).page_numbers())


class ClearLogMode(Mode):
    """KVM_GET_DIRTY_LOG, and KVM_CLEAR_DIRTY_LOG for what it returned."""

    name, words = "clear_log", "by KVM_GET_DIRTY_LOG with KVM_CLEAR_DIRTY_LOG"
    needs = (MANUAL_CAP,)
    protect = 1

    def begin(self) -> None:
        """Turn manual protection on first."""
        if self.protect & ~self.rig.vm.check_extension(MANUAL_CAP):
            self.trial.skip(f"this KVM has no manual protection of kind {self.protect}")
        self.rig.vm.enable_cap(MANUAL_CAP, [self.protect])
        super().begin()

    def collect(self) -> set[int]:
        """Return a bitmap's pages, which were cleared before."""
        bitmap = self.rig.vm.get_dirty_log(self.slot)
        self.rig.vm.clear_dirty_log(self.slot, bitmap)
        return set(bitmap.page_numbers())


class InitiallySetMode(ClearLogMode):
    """The same, where every page counts as dirty at first."""

    name, words = "initially_set", "by KVM_CLEAR_DIRTY_LOG after bitmaps that begin all set"
    protect = 3

    def begin(self) -> None:
        """Expect the first bitmap to name every page."""
        super().begin()
        extra = set(range(self.rig.ram.num_pages)) - self.collect()
        self.trial.expect("pages not set in the first bitmap", extra, set())


MODES: tuple[type[Mode], ...] = (
    RingMode,
    RingBitmapMode,
    BitmapMode,
    ClearLogMode,
    InitiallySetMode,
)


# What guests do, and what is expected then


def compare(trial: Trial, what: str, logged: set[int], written: Iterable[int]) -> None:
    """Expect a log to name just what was written."""
    truth = set(written)
    trial.expect(f"{what}: pages written and not logged", truth - logged, set())
    trial.expect(f"{what}: pages logged and not written", logged - truth, set())


def contents(mode: Mode, index: int = 0) -> None:
    """Expect the guest's pages to hold what it says it left there."""
    rig = mode.rig
    words = rig.words(index)
    page = mode.trial.page_size
    there = [words[(gpa - rig.ram.gpa) // page] for gpa in rig.guest.written(index)]
    left = list(rig.guest.values(index))[: len(there)]
    mode.trial.expect("pages whose contents are not the guest's", _differing(there, left), 0)


def _differing(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def in_passes(mode: Mode, passes: Iterable[Sequence[int]]) -> None:
    """Write lists of pages, one after the other, and collect after each."""
    for number, pages in enumerate(passes):
        mode.rig.write(pages)
        compare(mode.trial, f"pass {number}", mode.collect(), pages)
        contents(mode)
    compare(mode.trial, "a pass without writes", mode.collect(), ())


def sequential(trial: Trial, make: type[Mode]) -> None:
    """Ranges that overlap, one page alone, and both ends of the slot."""
    mode = make(trial, 300)
    ranges = [range(150), range(100, 250), range(63, 66), [0], [299], range(0, 300, 2)]
    in_passes(mode, [list(pages) for pages in ranges])


def at_random(trial: Trial, make: type[Mode]) -> None:
    """Ten random choices of pages, in random orders."""
    mode = make(trial, 1000)
    sizes = [trial.random.randint(1, 150) for _ in range(10)]
    in_passes(mode, [trial.random.sample(range(1000), size) for size in sizes])


def several_vcpus(trial: Trial, make: type[Mode]) -> None:
    """Three vCPUs that run at the same time, on pages of their own and on shared ones."""
    mode = make(trial, 240, vcpus=3)
    for turn in range(5):
        lists = [trial.random.sample(range(240), 50) for _ in range(3)]
        for index, pages in enumerate(lists):
            mode.rig.load(pages, index, rounds=2)
        in_threads([_to_end(mode, index) for index in range(3)])
        compare(trial, f"turn {turn}", mode.collect(), set().union(*lists))
        for index in range(3):
            contents(mode, index)


def collecting(trial: Trial, make: type[Mode]) -> None:
    """Two vCPUs write for ever, each its pages; a copy is kept from what the log names."""
    size = 150
    mode = make(trial, 2 * size + 50, vcpus=2)
    rig = mode.rig
    written = set(range(2 * size))  # the last 50 are never written
    for index in range(2):
        pages = trial.random.sample(range(index * size, (index + 1) * size), size)
        rig.load(pages, index, rounds=0)
    copies = [[0] * rig.ram.num_pages for _ in range(2)]
    seen: set[int] = set()

    def take() -> None:
        logged = mode.collect()  # first: what is written after it is logged again
        trial.expect("pages logged that nobody writes", logged - written, set())
        for index, copy in enumerate(copies):
            words = rig.words(index)
            for page in logged:
                copy[page] = words[page]
        seen.update(logged)

    def collector() -> None:
        try:
            turns = 0
            while turns < COLLECTIONS or rig.guest.progress(0).rounds < 3:
                take()
                turns += 1
        finally:
            for index in range(2):
                rig.guest.stop(index)

    in_threads([*(_to_end(mode, index) for index in range(2)), collector])
    take()
    trial.note("stores", sum(rig.guest.progress(index).stores for index in range(2)))
    stored: set[int] = set()
    for index in range(2):
        wrong = _differing(copies[index], rig.words(index))
        trial.expect(f"pages of vCPU {index} that the copy has wrong", wrong, 0)
        contents(mode, index)
        stored |= {(gpa - rig.ram.gpa) // trial.page_size for gpa in rig.guest.written(index)}
    compare(trial, "all collections", seen, stored)


def ring_full(trial: Trial, make: type[Mode]) -> None:
    """More pages than the ring has entries; only the last entry of a full one comes twice."""
    mode = make(trial, trial.least_entries + 200)
    rig = mode.rig
    number = rig.ram.num_pages
    rig.load(rig.shuffled(number))
    seen: list[int] = []
    twice: set[int] = set()
    turns = 0
    while True:
        exit = rig.guest.run(0)
        logged = rig.ring.dirty()  # in order; collect() takes them
        trial.expect("pages collected", mode.collect(), {entry.page for entry in logged})
        seen += [entry.page for entry in logged]
        if rig.guest.is_done(exit):
            break
        trial.expect("exit reason", exit.reason, ExitReason.DIRTY_RING_FULL)
        twice.add(logged[-1].page)
        rig.ring.next += len(logged)
        turns += 1
    trial.expect_true("the ring was full at least once", turns > 0, got=turns)
    compare(trial, "all harvests", set(seen), range(number))
    again = sorted(page for page in set(seen) if seen.count(page) > 1)
    trial.note("entries beyond one for each page", len(seen) - number)
    if not has_pml(trial):
        trial.expect("pages logged twice", again, sorted(twice))
    contents(mode)


def rings_full_together(trial: Trial, make: type[Mode]) -> None:
    """Two vCPUs share pages, and each serves full rings in its own thread."""
    number = trial.least_entries + 100
    mode = make(trial, number, vcpus=2)
    rig = mode.rig
    for index in range(2):
        rig.load(rig.shuffled(number), index, rounds=2)
    in_threads([_to_end(mode, index) for index in range(2)])
    compare(trial, "all harvests", mode.collect(), range(number))
    for index in range(2):
        contents(mode, index)


# Threads


def _to_end(mode: Mode, index: int) -> Callable[[], None]:
    """Return what runs a vCPU to the end of its command, and serves it."""

    def run() -> None:
        while not mode.rig.guest.is_done(exit := mode.rig.guest.run(index)):
            if exit.reason is ExitReason.DIRTY_RING_FULL:
                mode.serve()

    return run


def in_threads(bodies: Sequence[Callable[[], None]]) -> None:
    """Run functions at the same time; what the first of them that failed raised is raised."""
    errors: list[Exception] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(b,), daemon=True) for b in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:
            thread.join(0.1)
    if errors:
        raise errors[0]


PATTERNS: dict[str, tuple[str, Callable[[Trial, type[Mode]], None]]] = {
    "sequential": ("a guest that writes in order", sequential),
    "random": ("a guest that writes at random", at_random),
    "several_vcpus": ("several vCPUs that write shared pages at the same time", several_vcpus),
    "collecting": ("vCPUs that write while the log is collected", collecting),
}
FULL_PATTERNS: dict[str, tuple[str, Callable[[Trial, type[Mode]], None]]] = {
    "full": ("a guest that fills its ring", ring_full),
    "full_together": ("two vCPUs that fill their rings", rings_full_together),
}


def _declare() -> None:
    for make in MODES:
        for name, (words, pattern) in (PATTERNS | (FULL_PATTERNS if make.rings else {})).items():

            def check(
                trial: Trial,
                make: type[Mode] = make,
                pattern: Callable[[Trial, type[Mode]], None] = pattern,
            ) -> None:
                pattern(trial, make)

            rule(
                f"truth.{make.name}.{name}",
                f"what {words} has written is named {make.words}, and nothing else is",
                source="virt/kvm/kvm_main.c, mark_page_dirty_in_slot()",
                needs=make.needs,
                guest=True,
                meaning="pages that the guest wrote are missing in the log: a copy by it is wrong",
                timeout_s=PATIENCE_S,
            )(check)


_declare()
