"""Signals for checks: from a timer, to the thread that makes the ioctl, so that they come in it.

A timer and not a process that sends signals: it needs no second CPU, and its delay decides where
in the ioctl the first signal comes. The process must have this one thread, or the kernel may
choose another for the signal.
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Alarm", "seconds_of"]

LEAST_S = 2e-6  # 0 would turn the timer off


class Alarm:
    """SIGALRM, once or again and again, taken by a handler that counts.

    Attributes:
        came: Signals whose handler has run.
    """

    def __init__(self) -> None:
        self.came = 0
        signal.signal(signal.SIGALRM, self._count)

    def _count(self, _number: int, _frame: object) -> None:
        self.came += 1

    @contextmanager
    def on(self, first_s: float, every_s: float = 0.0) -> Iterator[Self]:
        """Let signals come: the first after so many seconds, more at intervals where given.

        At intervals shorter than a signal's handling nothing else would get done.
        """
        signal.setitimer(signal.ITIMER_REAL, max(first_s, LEAST_S), every_s)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def seconds_of(call: Callable[[], object]) -> float:
    """Measure one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
