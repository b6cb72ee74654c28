"""Recordings for tests: written by Recorder to a file, read back, made a Trace."""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict
from unittest.mock import patch

from kvmring.host import traces
from kvmring.host.recording import Recorder, read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmring.host.recording import Column, Recording
    from kvmring.host.traces import Trace

BEGIN = 5_000_000_000


class Row(TypedDict, total=False):
    """One event; what is left out is null. Times count from BEGIN."""

    time_ns: int
    pid: int
    vcpu: int
    event: str
    slot: int
    page: int
    dirty_index: int
    reset_index: int


@contextmanager
def until(length_ns: int) -> Iterator[None]:
    """Have a Recorder that is closed inside end length_ns after BEGIN."""
    with patch.object(time, "monotonic_ns", return_value=BEGIN + length_ns):
        yield


def write(
    path: Path,
    rows: Sequence[Row],
    *,
    length_ns: int,
    sampling: int = 1,
    source: str = "trace",
    ring_entries: int | None = None,
    slots: dict[int, int] | None = None,
    lost: int = 0,
) -> None:
    """Write a recording."""
    with (
        until(length_ns),
        Recorder(
            path,
            sampling=sampling,
            source=source,
            ring_entries=ring_entries,
            slots=slots,
            begin_ns=BEGIN,
        ) as recorder,
    ):
        recorder.lost = lost
        if rows:
            columns: dict[str, Column] = {
                name: [row.get(name) for row in rows]  # type: ignore[misc]
                for name in Row.__annotations__
            }
            columns["time_ns"] = [BEGIN + row["time_ns"] for row in rows]
            recorder.add(columns)


def recording_of(
    rows: Sequence[Row],
    *,
    length_ns: int,
    sampling: int = 1,
    source: str = "trace",
    slots: dict[int, int] | None = None,
    ring_entries: int | None = None,
    lost: int = 0,
) -> Recording:
    """Write a recording and read it back; its file is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.parquet")
        write(
            path,
            rows,
            length_ns=length_ns,
            sampling=sampling,
            source=source,
            slots=slots,
            ring_entries=ring_entries,
            lost=lost,
        )
        return read(path)


def trace_of(
    rows: Sequence[Row],
    *,
    length_ns: int,
    sampling: int = 1,
    source: str = "trace",
    slots: dict[int, int] | None = None,
) -> Trace:
    """Make a Trace of rows."""
    return traces.load(
        recording_of(rows, length_ns=length_ns, sampling=sampling, source=source, slots=slots)
    )


def pushes(events: Sequence[tuple[int, int, int]]) -> list[Row]:
    """Make rows of (time, slot, page)."""
    return [
        {"time_ns": time, "event": "push", "slot": slot, "page": page}
        for time, slot, page in events
    ]


def collections(taken: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> list[Row]:
    """Make rows as a Tracker's recorder does, of (time, [(slot, page), ...])."""
    rows: list[Row] = []
    for moment, pages in taken:
        rows += pushes([(moment, slot, page) for slot, page in pages])
        rows.append({"time_ns": moment, "event": "reset"})
    return rows
