"""A slot with a dirty bitmap, a guest that writes it, and sets of pages compared in words.

What the checks of KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG stand on. The kernel is asked by
raw.py, so that what it answers is seen as it is, bits past the slot's end included.
"""

from __future__ import annotations

import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.rig import Ring, has_pml, reset
from kvmring.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from kvmring.checks.rules import Trial
    from kvmring.guests import PageWriter
    from kvmring.memory import GuestMemory
    from kvmring.vm import VM

__all__ = [
    "BAD",
    "KEEP",
    "LOST",
    "MANUAL",
    "MISSING",
    "Log",
    "as_bits",
    "emptied",
    "expect_pages",
    "first_slot_past_the_limit",
    "pages_of",
    "written_for_ever",
]

KEEP = 1  # KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
MANUAL = Cap.MANUAL_DIRTY_LOG_PROTECT2
BAD = 8  # an address in the page that nobody can map
LOST = "pages can be lost: what the guest wrote is not in the log that a migration copies"
MISSING = 77  # a slot number that is within the limits and not in use


def pages_of(bits: int) -> set[int]:
    """Return the numbers of the bits that are set."""
    return {page for page in range(bits.bit_length()) if bits >> page & 1}


def as_bits(pages: Iterable[int], first: int = 0) -> int:
    """Return a bitmap of pages whose bit 0 is page `first`."""
    return sum({1 << page - first for page in pages})


def in_words(pages: Collection[int]) -> str:
    """Say which pages these are, the first few by number."""
    runs: list[list[int]] = []
    for page in sorted(pages):
        if runs and page == runs[-1][1] + 1:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    named = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs[:6]]
    more = ", ..." if len(runs) > 6 else ""
    return f"{len(pages)} pages" + (f" ({', '.join(named)}{more})" if runs else "")


def expect_pages(trial: Trial, what: str, got: Collection[int], expected: Collection[int]) -> None:
    """Expect exactly these pages; what is missing and what is too much become the evidence."""
    missed, extra = set(expected) - set(got), set(got) - set(expected)
    seen = in_words(got)
    if missed:
        seen += f"; missing {in_words(missed)}"
    if extra:
        seen += f"; too many {in_words(extra)}"
    trial.expect_true(what, not missed and not extra, got=seen, rule=in_words(expected))


def first_slot_past_the_limit(vm: VM) -> int:
    """Return the lowest id that no slot can have: KVM_CAP_NR_MEMSLOTS."""
    return vm.check_extension(Cap.NR_MEMSLOTS)


def emptied(trial: Trial, ram: GuestMemory, vm: VM, ring: Ring) -> set[int]:
    """Take all entries of a VM's only ring, reset them, and return the slot's pages."""
    taken = ring.take()
    trial.expect("entries that KVM reset", reset(vm), len(taken))
    return {logged.page for logged in taken if logged.slot == ram.slot}


class Log:
    """A VM, a slot of so many pages that logs, and the built-in guest.

    Args:
        trial: The trial.
        pages: The slot's size.
        ring: Entries of the vCPUs' rings; 0: none.
        manual: What KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is enabled with; 0: it is left alone.
        log: Whether logging is on from the start.
        vcpus: How many vCPUs.
    """

    def __init__(
        self,
        trial: Trial,
        pages: int = 100,
        *,
        ring: int = 0,
        manual: int = 0,
        log: bool = True,
        vcpus: int = 1,
    ) -> None:
        self.trial = trial
        self.pages = pages
        self.vm = trial.vm(ring=ring)
        if manual:
            raw.enable_cap(self.vm, MANUAL, manual)
        self.ram = trial.ram(self.vm, pages, log=log)
        self.slot = self.ram.slot
        self.guest: PageWriter = trial.writer(self.vm, vcpus=vcpus)
        if ring:
            self.ring = Ring(self.guest.vcpus[0], ring)

    def gpas(self, pages: Iterable[int]) -> list[int]:
        """Return pages' addresses."""
        return [self.ram.gpa + page * self.trial.page_size for page in pages]

    def write(self, pages: Iterable[int], *, vcpu: int = 0) -> None:
        """Have the guest write pages; with a ring, no more than it has room for."""
        self.guest.load(vcpu, self.gpas(pages))
        done = False
        for _ in range(100):  # a signal may come in between
            done = self.guest.is_done(self.guest.run(vcpu))
            if done:
                break
        if not done:
            raise RuntimeError("the guest does not come to its end")

    def some(self, count: int) -> list[int]:
        """Choose so many pages, in random order, the last one always among them."""
        chosen = [self.pages - 1, *self.trial.random.sample(range(self.pages - 1), count - 1)]
        self.trial.random.shuffle(chosen)
        return chosen

    def get(self) -> set[int]:
        """KVM_GET_DIRTY_LOG, as the numbers of the pages."""
        return pages_of(raw.get_dirty_log(self.vm, self.slot, self.pages))

    def harvest(self) -> set[int]:
        """Empty the first vCPU's ring, reset it, and return the slot's pages that were in it."""
        return emptied(self.trial, self.ram, self.vm, self.ring)

    def clear(self, pages: Iterable[int], first: int = 0, num: int | None = None) -> None:
        """KVM_CLEAR_DIRTY_LOG of pages, in a range; to the slot's end without `num`."""
        length = self.pages - first if num is None else num
        raw.clear_dirty_log(self.vm, self.slot, first, length, as_bits(pages, first))

    def clear_with(self, address: int, first: int, num: int) -> None:
        """KVM_CLEAR_DIRTY_LOG with its bitmap at an address."""
        argument = struct.pack("=IIQQ", self.slot, num, first, address)
        raw.ioctl(self.vm, raw.KVM_CLEAR_DIRTY_LOG, argument)


@contextmanager
def written_for_ever(
    trial: Trial, guest: PageWriter, ram: GuestMemory, pages: Collection[int]
) -> Iterator[Rounds]:
    """Keep vCPU 0 in KVM_RUN, writing pages round after round; every one was written once.

    A ring must have room for all of them. The trial's time limit bounds the waiting.
    """
    guest.load(0, [ram.gpa + page * trial.page_size for page in pages], rounds=0)
    runner = Runner(guest.vcpus[:1], lambda vcpu, exit: not guest.is_done(exit))
    with runner:
        rounds = Rounds(guest, runner, batches=has_pml(trial))
        try:
            rounds.wait()
            yield rounds
        finally:
            guest.stop(0)
            runner.join()


class Rounds:
    """The progress of a guest that writes for ever."""

    def __init__(self, guest: PageWriter, runner: Runner, *, batches: bool) -> None:
        self._guest = guest
        self._runner = runner
        self._batches = batches
        self._nothing = threading.Event()

    def wait(self) -> None:
        """Wait until every page has been written since now, and KVM knows of it.

        What the hardware logs in batches (PML) KVM learns when the vCPU leaves the guest; GET
        kicks it, but does not wait for that.
        """
        enough = self._guest.progress(0).rounds + 2
        while self._guest.progress(0).rounds < enough:
            if not self._runner.running:
                self._runner.join()
                raise RuntimeError("the guest ended by itself")
            self._nothing.wait(0.001)
        if self._batches:
            self._runner.pause()
            self._runner.resume()
