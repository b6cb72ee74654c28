"""signals.*: signals during KVM_RESET_DIRTY_RINGS, and the pages that a kernel may lose by them.

Each trial times one signal into the reset. The guest writes every page again afterwards: one
that memory shows as written and the ring does not name was lost by the reset before. On a kernel
that loses pages so, most trials whose signal came inside the reset do.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmring import ioctls
from kvmring.abi import Cap
from kvmring.checks.alarm import Alarm, seconds_of
from kvmring.checks.rig import RESET, Rig, reset
from kvmring.checks.rules import Trial, rule
from kvmring.ring import DirtyGfns

if TYPE_CHECKING:
    from collections.abc import Callable

DO_RESET = "virt/kvm/dirty_ring.c, kvm_dirty_ring_reset()"
IOCTL = "virt/kvm/kvm_main.c, kvm_vm_ioctl_reset_dirty_pages()"
NEEDS = [Cap.DIRTY_LOG_RING_ACQ_REL]

PAGES = 400  # a reset long enough for a signal to come inside
ENTRIES = 1024  # has room for them on any host
BATCH = 64  # pages that KVM protects at once, at most
IN_ORDER = 4  # one write of so many is in order: then up to 64 pages can be lost at once
INSIDE = 100  # trials whose signal came inside the reset, after which no more are needed
TRIALS = 300  # at most
ENOUGH = 20  # trials with a loss, after which no more are needed
TURNS = 15
FEWEST = 30  # trials whose signal came inside, without which nothing can be said
LOG_OFF_ON = "turning KVM_MEM_LOG_DIRTY_PAGES off and on"

# Resets what was harvested; returns the entries reset, calls made, and pages named as suspect.
Reset = tuple[int, int, set[int]]


@dataclass(slots=True)
class Tally:
    """What the trials came to."""

    trials: int = 0
    inside: int = 0  # whose signal came between call and return
    short: int = 0
    losing: int = 0
    losing_full: int = 0  # though every count was full
    pages: int = 0
    named: int = 0  # pages lost that the reset had named as suspect
    incomplete: int = 0  # where further calls did not make up for a short count
    example: list[str] = field(default_factory=list)

    def note(self, trial: Trial) -> None:
        """Put the figures into the report."""
        trial.note("trials", self.trials)
        trial.note("signals that came inside the reset", self.inside)
        trial.note("resets with a short count", self.short)
        trial.note("trials that lost pages", self.losing)
        trial.note("of these, with a full count", self.losing_full)
        trial.note("pages lost", self.pages)
        if self.named:
            trial.note("of these, named as suspect", self.named)


class Arena:
    """A guest that writes all its pages, logs that are compared, and timed signals."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.rig = Rig(trial, PAGES, entries=max(ENTRIES, trial.least_entries))
        self.gfns = DirtyGfns(self.rig.entries)
        self.alarm = Alarm()
        self.writes = 0

    def write(self) -> set[int]:
        """Have all pages written and harvested; return those that were logged."""
        self.writes += 1
        ordered = self.writes % IN_ORDER == 0
        self.rig.write(range(PAGES) if ordered else self._scattered())
        self.gfns.clear()
        self.rig.vm.harvest(self.gfns)
        return {gfn.offset for gfn in self.gfns}

    def _scattered(self) -> list[int]:
        """List all pages, each at least a batch away from the one before.

        So each is a batch of its own: the reset takes longest, and no loss is made up for by
        arm64, which protects whatever lies between the pages of a batch.
        """
        steps = [step for step in range(BATCH, PAGES - BATCH) if math.gcd(step, PAGES) == 1]
        step, first = self.trial.random.choice(steps), self.trial.random.randrange(PAGES)
        return [(first + step * number) % PAGES for number in range(PAGES)]

    def restart(self) -> None:
        """Have every page logged at its next write, lost ones too."""
        ioctls.reset_dirty_rings(self.rig.vm, guarded=True)
        self.rig.ram.set_log_dirty(False)
        self.rig.ram.set_log_dirty(True)
        self.trial.expect(f"pages logged after {LOG_OFF_ON}", len(self.write()), PAGES)

    def length(self, call: Callable[[], Reset]) -> float:
        """Measure a reset without signals: the middle one of several, in seconds."""
        times = []
        for _ in range(9):
            times.append(seconds_of(call))
            logged = len(self.write())
            self.trial.expect("pages logged after a reset without signals", logged, PAGES)
        return sorted(times)[len(times) // 2]

    def run(self, call: Callable[[], Reset]) -> Tally:
        """Make the trials; the pages are written, and the harvest not reset, before and after."""
        tally = Tally()
        self.trial.expect("pages logged at first", len(self.write()), PAGES)
        length = self.length(call)
        while tally.trials < TRIALS and tally.inside < INSIDE and tally.losing < ENOUGH:
            self._one(call, length, tally)
        return tally

    def _one(self, call: Callable[[], Reset], length: float, tally: Tally) -> None:
        wanted = len(self.gfns)
        before = self.alarm.came
        with self.alarm.on(length * self.trial.random.random()):
            early = self.alarm.came > before
            got, calls, suspects = call()
            inside = self.alarm.came > before and not early
        tally.trials += 1
        short = got < wanted or calls > 1
        tally.short += short
        tally.inside += inside
        done = got
        while done < wanted:
            more, _, again = call()
            done += more
            suspects |= again
            if not more:
                tally.incomplete += 1
                break
        old = self.rig.words()
        logged = self.write()
        new = self.rig.words()
        lost = {page for page in range(PAGES) if new[page] != old[page]} - logged
        if not lost:
            return
        tally.losing += 1
        tally.losing_full += not short
        tally.pages += len(lost)
        tally.named += len(lost & suspects)
        if not tally.example:
            page = min(lost)
            tally.example = [
                f"the reset with a signal returned {got} of {wanted}, with further calls {done}",
                f"page {page} held {old[page]} then and {new[page]} now, and no entry names it",
                f"{len(lost)} of {PAGES} pages written were not logged",
            ]
            self.stays_lost(lost)
        self.restart()

    def stays_lost(self, lost: set[int]) -> None:
        """See whether another reset and another write make up for it."""
        ioctls.reset_dirty_rings(self.rig.vm, guarded=True)
        still = lost - self.write()
        self.trial.note("of the first pages lost, not logged by a further write either", len(still))


@rule(
    "signals.reset_loss",
    "a signal that comes during KVM_RESET_DIRTY_RINGS takes no page out of the log",
    source=DO_RESET + ": signal_pending(); " + IOCTL,
    needs=NEEDS,
    guest=True,
    meaning="pages can be lost when signals arrive during KVM_RESET_DIRTY_RINGS; block all "
    "signals round it, or use kvmring's guarded reset",
    timeout_s=120,
)
def reset_loss(trial: Trial) -> None:
    """By the bare ioctl, called again where its count is short."""
    arena = Arena(trial)

    def bare() -> Reset:
        return ioctls.reset_dirty_rings(arena.rig.vm, guarded=False).reset, 1, set()

    tally = arena.run(bare)
    tally.note(trial)
    for number, line in enumerate(tally.example):
        trial.note(f"first loss, {number + 1}", line)
    trial.expect("pages written after a reset and not logged", tally.pages, 0)
    if tally.inside < FEWEST:
        trial.skip(f"only {tally.inside} of {tally.trials} signals came inside the reset")
    # No loss in n trials: with a confidence of 95 % the probability is below 3/n.
    bound = 3 / tally.inside
    trial.note("probability of a loss per signal, at 95 % confidence", f"below {bound:.2%}")


@rule(
    "signals.guarded_reset",
    "with all signals of the thread blocked round KVM_RESET_DIRTY_RINGS no page is lost",
    source=DO_RESET + ": signal_pending()",
    needs=NEEDS,
    guest=True,
    meaning="blocking signals is not enough on this kernel: pages can be lost all the same",
    timeout_s=120,
)
def guarded_reset(trial: Trial) -> None:
    """The package's own reset, under the same signals, as often; it completes short counts."""
    arena = Arena(trial)

    def guarded() -> Reset:
        result = arena.rig.vm.reset_dirty_rings()
        return result.reset, result.calls, set(result.suspects[arena.rig.ram.slot].page_numbers())

    tally = arena.run(guarded)
    tally.note(trial)
    trial.expect("resets whose count stayed short", tally.incomplete, 0)
    trial.expect("pages lost that it did not name as suspect", tally.pages - tally.named, 0)
    if tally.inside < FEWEST:
        trial.skip(f"only {tally.inside} of {tally.trials} signals came inside the reset")


@rule(
    "signals.blocked",
    "a signal that is blocked, pending before the reset or come inside, disturbs no reset",
    source=DO_RESET + ": signal_pending()",
    needs=NEEDS,
    guest=True,
    meaning="blocking signals is not enough on this kernel: pages can be lost all the same",
)
def blocked(trial: Trial) -> None:
    """The bare ioctl, with the signal blocked by the thread."""
    arena = Arena(trial)
    arena.write()
    length = arena.length(
        lambda: (ioctls.reset_dirty_rings(arena.rig.vm, guarded=False).reset, 1, set())
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGUSR1})
    signal.raise_signal(signal.SIGUSR1)
    for turn in range(30):
        wanted = len(arena.gfns)
        with arena.alarm.on(length * trial.random.random()):
            got = ioctls.reset_dirty_rings(arena.rig.vm, guarded=False).reset
        trial.expect(f"entries reset, turn {turn}", got, wanted)
        logged = arena.write()
        trial.expect("pages written and not logged", set(range(PAGES)) - logged, set())
    pending = signal.sigpending()
    trial.expect("signals pending", pending, {signal.SIGALRM, signal.SIGUSR1})


@rule(
    "signals.reset_count",
    "interrupted or not, KVM_RESET_DIRTY_RINGS is never EINTR: it returns what it reset, and "
    "calls add up to what was harvested",
    source=IOCTL,
    needs=NEEDS,
    guest=True,
    meaning="a VMM cannot tell how far an interrupted reset has come",
)
def reset_count(trial: Trial) -> None:
    """Under signals, until nothing is left."""
    _interrupted(trial, check_prefix=False)


@rule(
    "signals.reset_prefix",
    "an interrupted reset has freed just the entries that it counted, ring by ring in the order "
    "of vCPUs; the others stay harvested for the next call",
    source=IOCTL,
    needs=NEEDS,
    guest=True,
    meaning="a VMM cannot tell which pages an interrupted reset has protected",
)
def reset_prefix(trial: Trial) -> None:
    """Look at every entry after each call."""
    _interrupted(trial, check_prefix=True)


def _interrupted(trial: Trial, *, check_prefix: bool) -> None:
    """Reset two rings under signals, and expect counts to agree with the entries."""
    rig = Rig(trial, PAGES, entries=max(ENTRIES, trial.least_entries), vcpus=2)
    alarm, half = Alarm(), PAGES // 2
    length, short = 0.0, 0
    for turn in range(TURNS):
        for index, ring in enumerate(rig.rings):
            rig.write(range(index * half, (index + 1) * half), index)
            ring.take()
        if not turn:
            length = seconds_of(lambda: reset(rig.vm))
            continue
        done, calls = 0, 0
        while done < PAGES and calls < 100:
            calls += 1
            with alarm.on(length * trial.random.random()):
                got = _reset_or_errno(trial, rig)
            done += got
            if check_prefix:
                left = [sum(e.flags == RESET for e in ring.all()) for ring in rig.rings]
                first = min(done, half)
                trial.expect(
                    f"harvested entries left in each ring after {done} were reset",
                    left,
                    [half - first, half - (done - first)],
                )
        short += calls > 1
        trial.expect(f"entries reset by all calls, turn {turn}", done, PAGES)
        trial.expect("entries reset by a further call", reset(rig.vm), 0)
        rig.restart()
    trial.note("resets that took more than one call", short)


def _reset_or_errno(trial: Trial, rig: Rig) -> int:
    try:
        return reset(rig.vm)
    except OSError as error:
        trial.expect("errno of KVM_RESET_DIRTY_RINGS", error.errno, 0)
        raise
