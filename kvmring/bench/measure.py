"""How the bench measures: contestants in turn, within one run, on one CPU; median and quartiles.

Machines have neighbours and change their speed. So nothing here is compared across runs: what
is compared is measured alternately, sample by sample, and the ratio is taken of each pair.
Samples that are longer than a scheduler's turn are taken with cpu_ns().
"""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = [
    "Effort",
    "Figure",
    "alternate",
    "cpu_ns",
    "per_call",
    "pool",
    "quiet",
    "ratio",
    "summary",
    "timed",
]

TOO_LONG = 4  # times the time allowed
SAMPLE_NS = 1_000_000  # what one sample of a short call is stretched to


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured quantity, in the unit of the column that it stands in.

    Attributes:
        median: Of all samples.
        low, high: The first and the third quartile: half of the samples lie between.
        samples: How many there were.
    """

    median: float
    low: float
    high: float
    samples: int

    def times(self, factor: float) -> Figure:
        """Return it in another unit."""
        return Figure(
            median=self.median * factor,
            low=self.low * factor,
            high=self.high * factor,
            samples=self.samples,
        )

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / abs(self.median) if self.median else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        repeat: Most samples of each contestant.
        budget_s: Seconds after which one comparison takes no further samples.
        least: Samples that are taken whatever the time.
        quick: Fewer sizes.
    """

    repeat: int
    budget_s: float
    least: int = 3
    quick: bool = False

    @property
    def folds(self) -> int:
        """How often VMs are made anew within one comparison: where their memory lies matters."""
        return 2 if self.quick else 4

    def fold(self) -> Effort:
        """Return the part of the effort that one of the folds takes."""
        return replace(
            self,
            repeat=max(1, self.repeat // self.folds),
            budget_s=self.budget_s / self.folds,
            least=-(-self.least // self.folds),
        )

    def scaled(self, by: float) -> Effort:
        """Return an effort with more time, or with less where there are many comparisons."""
        return replace(self, budget_s=self.budget_s * by)

    @classmethod
    def of(cls, *, quick: bool, repeat: int | None = None) -> Effort:
        """Return the effort of a quick look, or of a report."""
        return cls(
            repeat=repeat or (5 if quick else 25), budget_s=0.25 if quick else 1.5, quick=quick
        )


def summary(values: Sequence[float]) -> Figure:
    """Return median and quartiles of samples; there must be one at least."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(median=statistics.median(values), low=low, high=high, samples=len(values))


def ratio(values: Sequence[float], to: Sequence[float]) -> Figure:
    """Return the ratio of two contestants, taken pair by pair."""
    return summary([a / b for a, b in zip(values, to, strict=True) if b])


def alternate(
    contestants: Mapping[str, Callable[[], float]],
    effort: Effort,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Let every contestant take one sample per round, each in every place equally often.

    Args:
        contestants: Name to a function that takes one sample and returns it.
        effort: How many rounds; one more, first, warms everything up and is thrown away.
        clock: Seconds, for the time allowed. A first round that has taken several times as
            long is followed by a single one.

    Returns:
        Name to samples; those of one index are of one round.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = clock()
    for name in names:
        contestants[name]()
    end = clock() + effort.budget_s
    least = effort.least if clock() < begin + TOO_LONG * effort.budget_s else 1
    for number in range(effort.repeat):
        if number >= least and clock() >= end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(contestants[name]())
    return samples


def pool(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Join what several alternate() of the same contestants returned."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


# The CPU time of this thread, guests that it runs included: who never waits measures with it
# what the clock on the wall would say without neighbours.
cpu_ns = time.thread_time_ns


def timed(
    call: Callable[[], object], times: int = 1, *, clock: Callable[[], int] = time.perf_counter_ns
) -> float:
    """Make a call a number of times; returns the nanoseconds of all of them."""
    begin = clock()
    for _ in repeat(None, times):
        call()
    return float(clock() - begin)


def per_call(call: Callable[[], object]) -> int:
    """Return how often a call is to be made so that one sample is long enough to be measured."""
    once = min(timed(call) for _ in range(3))
    return max(1, min(100_000, int(SAMPLE_NS / max(once, 10))))


@contextmanager
def quiet() -> Iterator[int | None]:
    """Stay on one CPU, where that is allowed, and keep the garbage collector out.

    Yields:
        The CPU's number; None where it cannot be chosen. Both are as before at the end.
    """
    me = psutil.Process()
    before: list[int] = []
    chosen: int | None = None
    try:
        before = me.cpu_affinity() or []
        chosen = before[-1]  # the first one is the busiest with interrupts, by habit
        me.cpu_affinity([chosen])
    except (psutil.Error, OSError, IndexError):
        chosen = None
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield chosen
    finally:
        if collecting:
            gc.enable()
        if chosen is not None:
            me.cpu_affinity(before)
