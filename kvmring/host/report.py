"""Report: all that `kvmring plot` tells of a recording, as one value; text and JSON show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmring.host import analysis, forecast, traces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmring.facts import JsonValue
    from kvmring.host.analysis import WorkingSet
    from kvmring.host.forecast import Forecast
    from kvmring.host.recording import Recording
    from kvmring.host.traces import Trace

__all__ = ["BINS", "SCHEMA", "Report", "rate_words", "report", "time_words"]

SCHEMA = 1
BINS = 200  # stretches of time of which rates and fills are given


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a recording tells.

    Attributes:
        recording, trace: What it is about.
        working_sets: By window length.
        forecasts: By bandwidth.
        converging_bandwidth: See forecast.converging_bandwidth().
        memory_pages: Of the VM; what the first round sends.
        memory_known: Whether that is its memory, or at least what the recording names.
        downtime_ns: The limit.
    """

    recording: Recording
    trace: Trace
    working_sets: Sequence[WorkingSet]
    forecasts: Sequence[Forecast]
    converging_bandwidth: int | None
    memory_pages: int
    memory_known: bool
    downtime_ns: int

    def heading(self) -> str:
        """Return in one line what was recorded, and where."""
        host = self.recording.host
        trace = self.trace
        return (
            f"{self.recording.path.name}: {trace.seconds:.3f} s, {len(self.recording):,} events, "
            f"{trace.page_size}-byte pages; Linux {host.get('kernel')} {host.get('machine')}, "
            f"{host.get('backend')}"
        )

    def notes(self) -> list[str]:
        """Return what a reader of the numbers must know about how they were come by."""
        trace = self.trace
        found = []
        if not trace.exact_times:
            found.append(
                "By a Tracker: pages carry the time of their collection, at most "
                f"{time_words(trace.resolution_ns / traces.NS)} after the write, and count "
                "once in each; the forecast counts a collection whole in every round it meets."
            )
        if trace.sampling > 1:
            found.append(
                f"Sampled, 1 push in {trace.sampling}: rates are scaled; working sets are at "
                "least the pages seen; the forecast takes every push left out for another page."
            )
        if trace.lost:
            found.append(
                f"{trace.lost:,} events were lost: working sets and forecast may be too low."
            )
        if trace.unrecorded:
            found.append(
                f"The rings' counters tell of {trace.unrecorded:,} pushes that are not recorded: "
                "rates count them; working sets and forecast cannot."
            )
        if not self.memory_known:
            found.append(
                "The VM's memory is not known: the forecast takes it to end with the highest "
                "page seen in each slot; --memory says better."
            )
        return found

    def as_json(self) -> dict[str, JsonValue]:
        """Return the report as a JSON document."""
        trace, recording = self.trace, self.recording
        edges, rate = analysis.dirty_rate(trace, BINS)
        fills = analysis.ring_fill(trace, BINS)
        return {
            "schema": SCHEMA,
            "file": str(recording.path),
            "source": recording.source,
            "host": dict(recording.host),
            "notes": list(self.notes()),
            "seconds": trace.seconds,
            "events": len(recording),
            "page_size": trace.page_size,
            "sampling": trace.sampling,
            "lost": trace.lost,
            "unrecorded": trace.unrecorded,
            "ring_entries": trace.ring_entries,
            "pushes": trace.pushes,
            "distinct_pages": trace.distinct,
            "ring_full_exits": len(trace.exit_ns),
            "slots": [
                {"slot": s.slot, "pages": s.pages, "first": s.first, "last": s.last}
                for s in trace.slots
            ],
            "dirty_rate": {
                "mean_pages_per_s": trace.pushes / trace.seconds,
                "peak_pages_per_s": float(rate.max()),
                "edges_s": [float(second) for second in edges],
                "pages_per_s": [float(value) for value in rate],
            },
            "ring_fill": [
                {
                    "pid": fill.pid,
                    "vcpu": fill.vcpu,
                    "entries": [None if n != n else int(n) for n in fill.most.tolist()],
                }
                for fill in fills
            ],
            "working_set": [
                {
                    "window_s": s.seconds,
                    "windows": s.windows,
                    "mean_pages": s.mean_pages,
                    "max_pages": s.max_pages,
                    "max_pages_bound": s.max_pages_bound,
                }
                for s in self.working_sets
            ],
            "forecast": {
                "memory_pages": self.memory_pages,
                "memory_known": self.memory_known,
                "downtime_limit_ms": self.downtime_ns / 1e6,
                "max_rounds": forecast.MAX_ROUNDS,
                "converging_bandwidth_bytes_per_s": self.converging_bandwidth,
                "bandwidths": [
                    {
                        "bandwidth_bytes_per_s": f.bandwidth,
                        "converges": f.converges,
                        "rounds": f.rounds,
                        "downtime_ms": None if f.downtime_s is None else f.downtime_s * 1e3,
                        "total_s": f.total_s,
                        "sent_pages": f.sent_pages,
                        "remaining_pages": list(f.remaining),
                    }
                    for f in self.forecasts
                ],
            },
        }


def report(
    recording: Recording,
    *,
    bandwidths: Sequence[int],
    downtime_ns: int,
    memory_bytes: int | None = None,
    windows_s: Sequence[float] | None = None,
) -> Report:
    """Analyse a recording.

    Args:
        recording: What was read.
        bandwidths: Of the forecast, bytes per second.
        downtime_ns: The most that a migration may stop the VM.
        memory_bytes: The VM's memory; without it what the recording tells of its slots.
        windows_s: Lengths of the working set's windows, seconds; a series without it.

    Raises:
        ValueError: A window that does not fit, or less memory than pages.
    """
    trace = traces.load(recording)
    memory = trace.memory_pages
    if memory_bytes is not None:
        memory = -(-memory_bytes // trace.page_size)
        if memory < trace.distinct:
            raise ValueError(
                f"the VM's memory would be {memory} pages, but the recording names "
                f"{trace.distinct} different ones"
            )
    windows = analysis.default_windows(trace) if windows_s is None else windows_s

    def replay(bandwidth: int) -> Forecast:
        return forecast.forecast(trace, bandwidth, memory_pages=memory, downtime_ns=downtime_ns)

    return Report(
        recording=recording,
        trace=trace,
        working_sets=analysis.working_set(trace, windows),
        forecasts=[replay(bandwidth) for bandwidth in bandwidths],
        converging_bandwidth=forecast.converging_bandwidth(
            trace, memory_pages=memory, downtime_ns=downtime_ns
        ),
        memory_pages=memory,
        memory_known=memory_bytes is not None or trace.memory_known,
        downtime_ns=downtime_ns,
    )


def rate_words(bytes_per_s: float) -> str:
    """Write a bandwidth as networks are named: 10 Gbit/s."""
    bits = 8 * bytes_per_s
    for factor, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits >= factor:
            return f"{bits / factor:.3g} {unit}"
    return f"{bits:.3g} bit/s"


def time_words(seconds: float) -> str:
    """Write a time in s, ms or us, with three digits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:,.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} us"
