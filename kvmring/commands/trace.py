"""`kvmring trace`: a process's dirty-ring events as text, JSON lines or a Parquet file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvmring.commands import DONE
from kvmring.host import EventKind, RingEvents, inspect
from kvmring.host.recording import COLUMNS, Recorder

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from kvmring.host import RingEvent, VmProcess

__all__ = ["DESCRIPTION", "USES_DEVICE", "add_arguments", "run"]

DESCRIPTION = (
    "Print the dirty-ring events of a process as they happen: kvm_dirty_ring_push, _reset and "
    "_exit, through perf. Needs root, or CAP_PERFMON and a readable tracefs. Lost events are "
    "counted. Ends with the process, after --seconds or --count, or at Ctrl-C."
)
USES_DEVICE = False
RESCAN_S = 0.5  # new threads are recorded from then on


class Sink(Protocol):
    """Where events go."""

    def add(self, events: Sequence[RingEvent]) -> None: ...
    def close(self, *, lost: int) -> None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("pid", type=int, metavar="PID", help="a process that holds VMs")
    parser.add_argument(
        "--events",
        default="push,reset,exit",
        metavar="LIST",
        help="which, separated by commas (%(default)s)",
    )
    parser.add_argument(
        "--sample", default="1/1", metavar="1/N", help="record one push in N (%(default)s)"
    )
    parser.add_argument("--vcpu", type=int, metavar="N", help="this vCPU alone")
    parser.add_argument("--seconds", type=float, metavar="S", help="end after so long")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many events")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write there; Parquet if it ends in .parquet"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    kinds = _kinds(args.events)
    sample = _sample(args.sample)
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count must be at least 1, not {args.count}")
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds must be positive, not {args.seconds}")
    process = inspect(args.pid)  # says what is wrong with it
    with RingEvents(args.pid, kinds=kinds, sample=sample, buffer_pages=128) as events:
        sink = _sink(args, process, sample)
        n = len(events.threads)
        print(f"kvmring: recording {n} threads of process {args.pid}", file=sys.stderr, flush=True)
        try:
            _trace(events, sink, args)
        finally:
            sink.close(lost=events.lost)
            print(f"kvmring: {events.lost} events lost", file=sys.stderr)
    return DONE


def _kinds(text: str) -> tuple[EventKind, ...]:
    try:
        return tuple(EventKind(word.strip()) for word in text.split(","))
    except ValueError:
        known = ", ".join(kind.value for kind in EventKind)
        raise ValueError(f"--events takes a list of {known}, not {text!r}") from None


def _sample(text: str) -> int:
    one, _, number = text.partition("/")
    if one != "1" or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"--sample takes 1/N, such as 1/100, not {text!r}")
    return int(number)


def _trace(events: RingEvents, sink: Sink, args: argparse.Namespace) -> None:
    """Record until something ends it."""
    looked = time.monotonic()
    end = float("inf") if args.seconds is None else looked + args.seconds
    left = sys.maxsize if args.count is None else args.count
    while left > 0 and looked < end:
        events.wait(max(0.0, min(looked + RESCAN_S, end) - time.monotonic()))
        found = [event for event in events.read() if args.vcpu in (None, event.vcpu)][:left]
        sink.add(found)
        left -= len(found)
        if time.monotonic() >= min(looked + RESCAN_S, end):
            looked = time.monotonic()
            events.rescan()
            if not events.threads:
                print(f"kvmring: process {args.pid} has ended", file=sys.stderr)
                return


class _Lines:
    """Text or JSON lines, to standard output or a file."""

    def __init__(self, path: Path | None, line: Callable[[RingEvent], str]) -> None:
        self._file = sys.stdout if path is None else path.open("w")
        self._line = line

    def add(self, events: Sequence[RingEvent]) -> None:
        self._file.writelines(self._line(event) for event in events)
        self._file.flush()

    def close(self, *, lost: int) -> None:
        if self._file is not sys.stdout:
            self._file.close()


class _Recording:
    """Parquet, as Tracker's recorder writes it too and `kvmring plot` reads it."""

    def __init__(self, path: Path, process: VmProcess, sample: int) -> None:
        entries = {vcpu.ring_entries for vcpu in process.vcpus if vcpu.ring_entries}
        self._recorder = Recorder(
            path, sampling=sample, ring_entries=entries.pop() if len(entries) == 1 else None
        )
        self._pid = process.pid

    def add(self, events: Sequence[RingEvent]) -> None:
        if not events:
            return
        self._recorder.add(
            {
                "time_ns": [event.time_ns for event in events],
                "pid": self._pid,
                "vcpu": [event.vcpu for event in events],
                "event": [event.event.value for event in events],
                "slot": [event.slot for event in events],
                "page": [event.page for event in events],
                "dirty_index": [event.dirty_index for event in events],
                "reset_index": [event.reset_index for event in events],
            }
        )

    def close(self, *, lost: int) -> None:
        self._recorder.lost = lost
        self._recorder.close()


def _sink(args: argparse.Namespace, process: VmProcess, sample: int) -> Sink:
    path: Path | None = args.output
    if path is not None and path.suffix == ".parquet":
        return _Recording(path, process, sample)
    return _Lines(path, _json_line(args.pid) if args.json else _text_line)


def _json_line(pid: int) -> Callable[[RingEvent], str]:
    def line(event: RingEvent) -> str:
        values = (
            *(event.time_ns, pid, event.vcpu, event.event.value, event.slot, event.page),
            *(event.dirty_index, event.reset_index),
        )
        known = {
            name: value for name, value in zip(COLUMNS, values, strict=True) if value is not None
        }
        return json.dumps({"schema": 1, **known}) + "\n"

    return line


def _text_line(event: RingEvent) -> str:
    seconds, ns = divmod(event.time_ns, 1_000_000_000)
    text = f"{seconds}.{ns:09d} vcpu {event.vcpu} {event.event.value}"
    if event.page is not None:
        text += f" {event.slot}:{event.page:#x}"
    if event.dirty_index is not None:
        text += f" dirty {event.dirty_index} reset {event.reset_index}"
    return text + "\n"
