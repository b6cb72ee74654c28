"""`kvmring plot`: a recording as tables, JSON and a picture; the work is in host/."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kvmring import figures
from kvmring.commands import DONE
from kvmring.commands.output import print_json, table
from kvmring.extras import extra
from kvmring.host import recording

if TYPE_CHECKING:
    import argparse

    from kvmring.host.report import Report

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Say what a recording of dirty-ring events tells: dirty rate, ring fill, working set, and "
    "how a live migration would go at given bandwidths. The forecast replays the recording: "
    "round 1 sends all memory, each later one the pages dirtied while the one before was sent. "
    "A recording that is too short is repeated from its beginning."
)

BANDWIDTHS = "1Gbit,2.5Gbit,10Gbit,25Gbit,40Gbit,100Gbit"
SLOTS = ("slot", "pages", "first", "last", "MiB")
_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:([kKMGT]?)(i?)(bit|B))?(?:/s)?")
_MIB = 1 << 20


def add_arguments(job: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    job.add_argument("file", type=Path, metavar="FILE", help="a recording (Parquet)")
    job.add_argument(
        "--output", type=Path, metavar="FILE", help="draw a picture: a name ending in .png or .svg"
    )
    job.add_argument(
        "--bandwidth",
        default=BANDWIDTHS,
        metavar="LIST",
        help="of the migration, per second: 10Gbit, 1.2GB, 500MiB, ... (%(default)s)",
    )
    job.add_argument(
        "--downtime", type=float, default=300.0, metavar="MS", help="limit, in ms (%(default)g)"
    )
    job.add_argument(
        "--memory",
        metavar="SIZE",
        help="of the VM: 4GiB, ...; without it what the recording tells of its slots",
    )
    job.add_argument(
        "--window", metavar="LIST", help="working-set windows in seconds: 0.1,1,10 (1, 2, 5, ...)"
    )


def _bytes(name: str, text: str) -> int:
    """Read an amount such as 10Gbit, 1.5GiB or 4096 as bytes."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{name} {text!r}: write a number and a unit, as in 10Gbit or 1.5GiB")
    base = 1024 if found[3] else 1000
    power = _POWERS[str(found[2] or "").replace("K", "k")]
    amount = float(found[1]) * float(base**power) / (8 if found[4] == "bit" else 1)
    if not 1 <= amount < 1 << 60:
        raise ValueError(f"{name} {text!r} is not between 1 byte and 1 EiB")
    return round(amount)


def _windows(text: str) -> list[float]:
    try:
        seconds = [float(word) for word in text.split(",")]
    except ValueError:
        seconds = [math.nan]
    if not all(0 < s < math.inf for s in seconds):
        raise ValueError(f"--window {text!r}: write seconds, as in 0.1,1,10")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    bandwidths = [_bytes("--bandwidth", word) for word in args.bandwidth.split(",")]
    memory = None if args.memory is None else _bytes("--memory", args.memory)
    windows = None if args.window is None else _windows(args.window)
    if not 0 <= args.downtime <= 3.6e6:
        raise ValueError(f"--downtime must lie between 0 ms and an hour, not {args.downtime:g}")
    if args.output is not None:
        figures.require_format(args.output)
        if args.output.resolve() == args.file.resolve():
            raise ValueError("--output would replace the recording")
    with extra("trace"):
        from kvmring.host.report import report
    found = report(
        recording.read(args.file),
        bandwidths=bandwidths,
        downtime_ns=round(args.downtime * 1e6),
        memory_bytes=memory,
        windows_s=windows,
    )
    if args.output is not None:
        _draw(found, args.output)
    if args.json:
        print_json(found.as_json())
        return DONE
    _print(found)
    if args.output is not None:
        print(f"\nwritten: {args.output}")
    return DONE


def _draw(found: Report, path: Path) -> None:
    with figures.style():
        from kvmring.host.figures import draw

        figures.save(draw(found), path)


def _print(found: Report) -> None:
    from kvmring.host.analysis import dirty_rate
    from kvmring.host.report import BINS

    console = Console(highlight=False)
    trace = found.trace
    console.print(found.heading())
    for note in found.notes():
        console.print(note)
    console.print()
    slots = table(*SLOTS, right=SLOTS)
    for s in trace.slots:
        size = f"{s.pages * trace.page_size / _MIB:,.1f}"
        slots.add_row(
            str(s.slot) if s.slot >= 0 else "?", f"{s.pages:,}", str(s.first), str(s.last), size
        )
    console.print(slots)
    console.print()
    _, rate = dirty_rate(trace, BINS)
    mean, peak = trace.pushes / trace.seconds, float(rate.max())
    console.print(
        f"dirty rate: {mean:,.0f} pages/s ({mean * trace.page_size / _MIB:,.1f} MiB/s); "
        f"peak {peak:,.0f} in {trace.seconds / BINS:.3g} s"
    )
    for ring in trace.rings:
        known = ring.fill[ring.fill >= 0]
        if len(known):
            of = "" if trace.ring_entries is None else f" of {trace.ring_entries}"
            console.print(f"ring of vCPU {ring.vcpu}: at most {int(known.max())} entries{of}")
    if len(trace.exit_ns):
        console.print(f"ring-full exits: {len(trace.exit_ns):,}")
    console.print()
    _print_working_sets(console, found)
    console.print()
    _print_forecasts(console, found)


def _print_working_sets(console: Console, found: Report) -> None:
    trace = found.trace
    columns = ["window s", "windows", "mean pages", "most pages", "most MiB"]
    if trace.sampling > 1:
        columns.append("at most")
    sets = table(*columns, right=columns)
    for s in found.working_sets:
        cells = [f"{s.seconds:g}", str(s.windows), f"{s.mean_pages:,.1f}", f"{s.max_pages:,}"]
        cells.append(f"{s.max_pages * trace.page_size / _MIB:,.1f}")
        if trace.sampling > 1:
            cells.append(f"{s.max_pages_bound:,}")
        sets.add_row(*cells)
    console.print("working set: different pages dirtied in a window")
    console.print(sets)


def _print_forecasts(console: Console, found: Report) -> None:
    from kvmring.host.report import rate_words, time_words

    page_size = found.trace.page_size
    console.print(
        f"pre-copy forecast: {found.memory_pages * page_size / _MIB:,.1f} MiB of memory, "
        f"at most {time_words(found.downtime_ns / 1e9)} of downtime"
    )
    columns = ("bandwidth", "rounds", "downtime", "total", "sent MiB")
    rows = table(*columns, right=columns)
    for f in found.forecasts:
        rate = rate_words(f.bandwidth)
        if f.converges:
            sent = f"{f.sent_pages * page_size / _MIB:,.1f}"
            down, total = time_words(f.downtime_s or 0.0), time_words(f.total_s)
            rows.add_row(rate, str(f.rounds), down, total, sent)
        else:
            rows.add_row(rate, "-", "does not converge", "-", "-")
    console.print(rows)
    if found.converging_bandwidth is not None:
        console.print(f"lowest that converges: {rate_words(found.converging_bandwidth)}")
