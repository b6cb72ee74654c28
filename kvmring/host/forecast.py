"""Pre-copy forecast: what a live migration would do, by replaying a recording.

Round 1 sends all memory; each later round sends the pages that the recording names in the time
that the round before took. The migration begins where the recording begins. A recording that
is too short is repeated: after its end it begins anew, and a round as long as the recording or
longer dirties every page that it names. When what is left can be sent within the downtime limit,
the VM is stopped and that is sent. Only page contents count, and the bandwidth is constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmring.host.traces import NS

if TYPE_CHECKING:
    from kvmring.host.traces import Trace

__all__ = ["MAX_ROUNDS", "Forecast", "converging_bandwidth", "dirtied", "forecast"]

MAX_ROUNDS = 100
_STEPS = 4  # of the search, to an octave
_FINE = 5  # halvings of the last step: to within 1 %
_OCTAVES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What pre-copy would do at one bandwidth.

    Attributes:
        bandwidth: Bytes per second.
        converges: Whether what was left came to fit the downtime limit.
        remaining: Pages left to send before each round, all memory first, and at the end.
        total_s: Seconds of the rounds, and of the downtime if it converges.
        downtime_s: Seconds to send what was left at the end; None if it does not converge.
    """

    bandwidth: int
    converges: bool
    remaining: tuple[int, ...]
    total_s: float
    downtime_s: float | None

    @property
    def rounds(self) -> int:
        """Rounds sent while the VM runs."""
        return len(self.remaining) - 1

    @property
    def sent_pages(self) -> int:
        """Pages sent in all; without the last ones if it does not converge."""
        return sum(self.remaining if self.converges else self.remaining[:-1])


def dirtied(trace: Trace, begin_ns: int, length_ns: int, *, memory_pages: int) -> int:
    """Count the different pages dirtied in [begin, begin + length) of the repeated recording.

    Of a sampled recording it is the most that they may be: every push stands for as many pages
    as pushes, as far as there are memory_pages. Of a Tracker's, a page counts wherever it may
    have been dirtied, from the collection before to its own.
    """
    if length_ns >= trace.length_ns:
        return _bounded(trace, memory_pages, trace.distinct, len(trace.time_ns))
    begin = begin_ns % trace.length_ns
    end = begin + length_ns
    side = "left" if trace.exact_times else "right"
    low = int(np.searchsorted(trace.time_ns, begin, side))  # type: ignore[call-overload]
    high = int(np.searchsorted(trace.since_ns, end, "left"))
    if end <= trace.length_ns:
        return _bounded(trace, memory_pages, trace.count(low, high), high - low)
    # from `low` to the end, then from the beginning up to `again`
    again = int(np.searchsorted(trace.since_ns, end - trace.length_ns, "left"))
    early = trace.last[trace.key[:again]] < low  # pages that do not come in the first part
    fresh = np.count_nonzero(early & (trace.previous[:again] < 0))
    rows = len(trace.time_ns) - low + again
    return _bounded(trace, memory_pages, trace.count(low, len(trace.time_ns)) + int(fresh), rows)


def _bounded(trace: Trace, memory_pages: int, seen: int, rows: int) -> int:
    if trace.sampling == 1:
        return seen
    return max(seen, min(trace.sampling * rows, memory_pages))


def forecast(trace: Trace, bandwidth: int, *, memory_pages: int, downtime_ns: int) -> Forecast:
    """Replay a migration at one bandwidth.

    Args:
        trace: What is repeated.
        bandwidth: Bytes per second.
        memory_pages: Pages of the VM's memory; the first round sends them.
        downtime_ns: The most that the VM may stand still.

    A migration that has not converged after MAX_ROUNDS rounds does not; nor does one whose
    rounds came to last as long as the whole recording, for they cannot get shorter.
    """
    now, left = 0, memory_pages
    remaining = [left]
    while True:
        length = -(-left * trace.page_size * NS // bandwidth)
        if len(remaining) > MAX_ROUNDS or (len(remaining) > 1 and length >= trace.length_ns):
            return Forecast(
                bandwidth=bandwidth,
                converges=False,
                remaining=tuple(remaining),
                total_s=now / NS,
                downtime_s=None,
            )
        left = dirtied(trace, now, length, memory_pages=memory_pages)
        now += length
        remaining.append(left)
        rest = left * trace.page_size * NS
        if rest <= downtime_ns * bandwidth:
            return Forecast(
                bandwidth=bandwidth,
                converges=True,
                remaining=tuple(remaining),
                total_s=now / NS + rest / bandwidth / NS,
                downtime_s=rest / bandwidth / NS,
            )


def converging_bandwidth(trace: Trace, *, memory_pages: int, downtime_ns: int) -> int | None:
    """Return a bandwidth in bytes per second at which it converges, the lowest within 1 %.

    More bandwidth is not always better: rounds then meet other parts of the recording. The one
    returned converges, and so do all quarter-octave steps above it that were tried.

    Returns:
        None when nothing is dirtied, or the downtime limit is 0: then it is any, or none.
    """
    most = dirtied(trace, 0, trace.length_ns, memory_pages=memory_pages)
    if not most or not downtime_ns:
        return None

    def converges(bandwidth: int) -> bool:
        done = forecast(trace, bandwidth, memory_pages=memory_pages, downtime_ns=downtime_ns)
        return done.converges

    good = -(-most * trace.page_size * NS // downtime_ns)  # all it can dirty, within the limit
    bad = 0
    for _ in range(_STEPS * _OCTAVES):
        lower = int(good / 2 ** (1 / _STEPS))
        if lower < 1 or not converges(lower):
            bad = lower
            break
        good = lower
    for _ in range(_FINE):
        middle = (good + bad) // 2
        if middle in (good, bad):
            break
        if converges(middle):
            good = middle
        else:
            bad = middle
    return good
