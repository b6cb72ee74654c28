"""Tracker: dirty tracking of a running VM in the one order that loses nothing.

States go one way: new, tracking, finished. collect() may be called as often as one likes while
vCPUs run; finish() stops them, resets their rings, lets devices save, fetches the bitmaps
last, and from then on refuses whatever could dirty memory.
"""

from __future__ import annotations

import enum
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from kvmring.abi import PAGE_SIZE, Cap, lib
from kvmring.device import U64
from kvmring.dirtyset import DirtySet
from kvmring.errors import StateError, int_between
from kvmring.pending import Pending
from kvmring.runner import Reaper
from kvmring.sources import Source, choose_source, require_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from kvmring.dirtyset import MemorySlot
    from kvmring.runner import Runner
    from kvmring.sources import TrackerStats
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__all__ = ["State", "Tracker"]

CLEAR_CHUNK_PAGES = 1 << 18  # KVM holds its MMU lock for a whole KVM_CLEAR_DIRTY_LOG
BACKUP_SHARE_WARNING = 0.03


class State(enum.Enum):
    """Where a Tracker is in its life."""

    NEW = "new"
    TRACKING = "tracking"
    FINISHED = "finished"
    CLOSED = "closed"


class Tracker:
    """Dirty tracking of one VM.

    Args:
        vm: The VM. Slots that log dirty pages are tracked, also such as come later.
        source: Where the pages come from; AUTO chooses, and `why` says for what reason.

    Threads: any; collections and the service of full rings exclude each other.

    Attributes:
        source: The source in use.
        why: The reason for it, in words.
    """

    def __init__(self, vm: VM, source: Source = Source.AUTO) -> None:
        if not isinstance(source, Source):
            raise TypeError(f"source must be a Source, not {type(source).__name__}")
        if source is Source.AUTO:
            self.source, self.why = choose_source(vm)
        else:
            require_source(vm, source)
            self.source, self.why = source, "it was asked for"
        self.vm = vm
        self.state = State.NEW
        self._rings = self.source in (Source.RING, Source.RING_WITH_BITMAP)
        self._pending = Pending(vm, rings=self._rings)
        self._runners: list[Runner] = []
        self._backup_warned = False

    def __repr__(self) -> str:
        return f"<Tracker {self.state.value}, {self.source.value}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _require(self, *states: State) -> None:
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise StateError(f"the Tracker is {self.state.value}; this needs it {wanted}")

    @property
    def stats(self) -> TrackerStats:
        """Counts since start(); a copy."""
        return self._pending.stats

    def start(self) -> None:
        """Begin: what is dirtied from now on is collected.

        What rings and bitmaps held before counts as dirty too.
        """
        with self._pending.own():
            self._require(State.NEW)
            if self.source is Source.CLEAR_LOG:
                self.vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, [1])
            self.vm._watch_slots(self._slot_changes)
            self._pending.note_high_water(clear=True)
            self._pending.serving = self._rings
            self.state = State.TRACKING

    def close(self) -> None:
        """Stop tracking. What finish() had frozen may be written again.

        An attached Runner stays as it is: after finish() it is paused, and resume() lets the
        guest go on here.
        """
        with self._pending.own():
            if self.state in (State.TRACKING, State.FINISHED) and not self.vm.closed:
                self.vm._watch_slots(None)
                if self.state is State.FINISHED:
                    self.vm.freeze(lib.KVR_THAWED)
                self._pending.note_high_water()
            self._pending.serving = False
            self.state = State.CLOSED

    def attach(self, runner: Runner) -> None:
        """Let a Runner's threads have their full rings served here, and finish() pause it."""
        self._runners.append(runner)
        if self._rings:
            runner.on_full = self.serve
            runner.run_vcpu = self._pending.server.run

    # What fills the pending set

    def serve(self, vcpu: VCPU) -> None:
        """Empty a vCPU's full ring, in its own thread; then it can run on.

        Also before start(), whose first collection has it then, and after close(), when nobody
        wants the pages any more but the guest goes on.
        """
        with self._pending.own():
            if self.state is State.CLOSED:
                self._pending.forget()
            self._pending.serve(vcpu)

    def _fetch(self, slot: MemorySlot) -> None:
        """Take a slot's bitmap from KVM into the pending set."""
        bitmap = self.vm.get_dirty_log(slot.slot)
        self._pending.add(slot.slot, bitmap)  # ours before it is cleared in KVM
        if self.source is not Source.CLEAR_LOG or not bitmap:
            return
        for first in range(0, slot.num_pages, CLEAR_CHUNK_PAGES):
            num = min(CLEAR_CHUNK_PAGES, slot.num_pages - first)
            self.vm.clear_dirty_log(slot.slot, bitmap, first_page=first, num_pages=num)

    def _logging(self) -> list[MemorySlot]:
        return [slot for slot in self.vm.slots.values() if slot.log_dirty]

    def _take_all(self) -> None:
        """Bring what KVM holds at this moment into the pending set."""
        if self._rings:
            self._pending.reap()
        else:
            for slot in self._logging():
                self._fetch(slot)

    @contextmanager
    def _slot_changes(self, number: int) -> Iterator[None]:
        """Entered around every change of a slot: take what it has logged, then follow it.

        A slot's bitmap goes with its logging, and a ring's entries name it by a number that a
        later slot may get. Pages that were not collected yet move with their slot, and go
        when it is deleted.
        """
        with self._pending.own():
            if self.state is State.TRACKING:
                if self._rings:
                    self._pending.reap()
                slot = self.vm.slots.get(number)
                if slot is not None and slot.log_dirty and self.source is not Source.RING:
                    self._fetch(slot)
            yield
            self._pending.follow_slots()

    # What takes from it

    def mark(self, gpa: int, length: int) -> None:
        """Note memory that the VMM wrote itself: KVM never logs that.

        Args:
            gpa: Guest-physical byte address.
            length: Bytes; pages that are touched in part count whole.

        Raises:
            ValueError: The range is not memory of the VM throughout.
        """
        start = int_between("gpa", gpa, 0, U64)
        end = start + int_between("length", length, 0, U64)
        with self._pending.own():
            self._require(State.TRACKING)
            pieces = [
                (slot, max(start, slot.gpa), min(end, slot.end))
                for slot in self.vm.slots.values()
                if slot.gpa < end and start < slot.end
            ]
            at = start
            for _, low, high in sorted(pieces, key=lambda piece: piece[1]):
                if low > at:
                    break
                at = max(at, high)
            if at < end:
                raise ValueError(f"the VM has no memory at {at:#x}")
            for slot, low, high in pieces:
                first = (low - slot.gpa) // PAGE_SIZE
                last = -(-(high - slot.gpa) // PAGE_SIZE)
                self._pending.mark(slot.slot, first, last - first)

    def flush(self) -> None:
        """Make every vCPU leave the guest once: then its ring has what the hardware buffered.

        Raises:
            KvmError: ETIMEDOUT, a vCPU did not leave within 10 seconds.
        """
        for vcpu in self.vm.vcpus:
            if not vcpu.closed:
                vcpu.leave_guest()

    def collect(self, *, flush: bool = True) -> DirtySet:
        """Return the pages dirtied since the last collection, and begin a new one.

        Read their contents after this: what is written later is in the next collection.

        Args:
            flush: Make every vCPU leave the guest first. Without it, pages that the hardware
                still buffers (PML) come with a later collection; none is lost.

        Raises:
            StateError: Not started, or finished.
        """
        with self._pending.own():
            self._require(State.TRACKING)
        if flush and self._rings:
            self.flush()  # not under the lock: a vCPU that leaves may want serve()
        with self._pending.own():
            self._require(State.TRACKING)
            self._take_all()
            return self._hand_over()

    def _hand_over(self) -> DirtySet:
        taken = self._pending.hand_over()
        self._warn_about_backup()
        return taken

    def _warn_about_backup(self) -> None:
        counts = self._pending.counts
        share = counts.backup_share
        if not self._backup_warned and share > BACKUP_SHARE_WARNING and counts.pages > 1000:
            self._backup_warned = True
            warnings.warn(
                f"{share:.0%} of the pages came from the backup bitmap: a plain bitmap serves "
                "such a VM better than rings",
                RuntimeWarning,
                stacklevel=4,
            )

    @property
    def suspects(self) -> DirtySet:
        """Pages that stay dirty in every collection until rearm()."""
        with self._pending.own():
            return self._pending.suspects.copy()

    def rearm(self) -> None:
        """Protect suspect pages anew, by turning logging of their slots off and on.

        Raises:
            StateError: A vCPU is running; pause all of them first.
        """
        with self._pending.own():
            self._require(State.TRACKING)
            running = [vcpu.id for vcpu in self.vm.vcpus if not vcpu.closed and vcpu.running]
            if running:
                raise StateError(f"vCPU {running[0]} is running: pause all vCPUs, then rearm()")
            if not self._rings:
                return  # bitmaps have no suspects
            self._pending.reap()
            for number, bitmap in self._pending.suspects.items():
                slot = self.vm.slots.get(number)
                if bitmap and slot is not None and slot.log_dirty:
                    self._pending.dirty.add(number, bitmap)
                    self.vm.memory[number].set_log_dirty(False)
                    self.vm.memory[number].set_log_dirty(True)
            self._pending.suspects = DirtySet(self.vm)

    def finish(self, save: Callable[[], object] | None = None) -> DirtySet:
        """Do the last collection, in the only legal order, and freeze the VM's memory.

        vCPUs are paused and kept out of the guest, rings harvested and reset; then save() is
        called, which may give devices their save commands; KVM_GET_DIRTY_LOG of every slot
        comes last. After it, running a vCPU, changing slots, device commands and writes to
        guest memory raise StateError, until close().

        Args:
            save: Saves device state that lies in guest memory, such as Its.save_tables.

        Returns:
            The last DirtySet. If save() raises, so does this: nothing is lost, tracking goes
            on, and an attached Runner goes on too.
        """
        with self._pending.own():
            self._require(State.TRACKING)
        for runner in self._runners:
            runner.pause()
        self.vm.freeze(lib.KVR_FROZEN_VCPUS)
        try:
            self.flush()
            with self._pending.own():
                self._require(State.TRACKING)
                if self._rings:
                    self._pending.reap()
                if save is not None:
                    save()
                if self._rings:
                    self._pending.reap()  # what a save wrote with a vCPU loaded
                self.vm.freeze(lib.KVR_FROZEN)
                if self.source is not Source.RING:
                    for slot in self._logging():
                        self._fetch(slot)
                self.state = State.FINISHED
                self._pending.serving = False
                return self._hand_over()
        except BaseException:
            self.vm.freeze(lib.KVR_THAWED)
            for runner in self._runners:
                runner.resume()
            raise

    def reaper(self, *, interval_s: float = 0.01) -> Reaper:
        """Return a context in which a thread harvests every interval_s seconds.

        It keeps rings from filling up between collections; it loses and returns nothing.
        """
        if not self._rings:
            raise StateError(f"source {self.source.value} has no rings to reap")
        return Reaper(self._reap_while_tracking, interval_s)

    def _reap_while_tracking(self) -> bool:
        with self._pending.own():
            if self.state is not State.TRACKING:
                return False
            self._pending.reap()
            return True
