"""Recordings of dirty-ring events: Parquet files that trace and Tracker write and plot reads.

A row is one event. `push`: an entry was put into a vCPU's ring; `reset`: entries were given
back; `exit`: a vCPU left the guest because its ring was full. dirty_index and reset_index are
the ring's free-running 32-bit counters after the event, as the tracepoints of
virt/kvm/dirty_ring.c carry them: their difference is the ring's fill. What is not known is null.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self

from kvmring.abi import PAGE_SIZE
from kvmring.errors import KvmringError, StateError, int_between
from kvmring.extras import extra
from kvmring.facts import host_facts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import pyarrow as pa

    from kvmring.facts import JsonValue

    # None where a value is not known; a single value stands for every row
    Column = Sequence[int] | Sequence[int | None] | Sequence[str] | memoryview | int | str | None

__all__ = ["COLUMNS", "EVENTS", "SCHEMA", "Recorder", "Recording", "read"]

SCHEMA = 1
EVENTS = ("push", "reset", "exit")
COLUMNS = {
    "time_ns": "int64",
    "pid": "int32",
    "vcpu": "int32",
    "event": "dictionary",
    "slot": "int64",
    "page": "int64",
    "dirty_index": "int64",
    "reset_index": "int64",
}
_REQUIRED = ("time_ns", "event")
_KEY = "kvmring"
_BATCH_ROWS = 1 << 16  # rows of a row group, and what a Recorder holds at most
_BATCH_PIECES = 1024  # small add()s are joined: an Arrow batch of one row costs kilobytes


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds: dict[str, pa.DataType] = {
        "int32": pa.int32(),
        "int64": pa.int64(),
        "dictionary": pa.dictionary(pa.int8(), pa.string()),
    }
    return pa.schema(
        [pa.field(name, kinds[kind], name not in _REQUIRED) for name, kind in COLUMNS.items()]
    )


class Recorder:
    """Writes events to a Parquet file, a row group at a time.

    It holds at most 65,536 rows and what one add() brought. The file is whole only after
    close(); its metadata say what the host was like, and how the rows were come by.

    Args:
        path: The file; one that exists is replaced.
        sampling: N where only one push in N is recorded; resets and exits never are sampled.
        source: Who records: "trace" has the time of each event, "tracker" that of the
            collection a page came with.
        ring_entries: Size of the vCPUs' rings, when it is known.
        slots: Pages of each memory slot, when they are known.
        begin_ns: When recording began, CLOCK_MONOTONIC as all times here; now without it.

    Attributes:
        lost: Events that came and could not be recorded, to be counted by whoever adds.

    Raises:
        KvmringError: pyarrow is missing, or the file cannot be written.

    Threads: one at a time.
    """

    def __init__(
        self,
        path: Path,
        *,
        sampling: int = 1,
        source: str = "trace",
        ring_entries: int | None = None,
        slots: Mapping[int, int] | None = None,
        begin_ns: int | None = None,
    ) -> None:
        int_between("sampling", sampling, 1, 1 << 32)
        if source not in ("trace", "tracker"):
            raise ValueError(f'source must be "trace" or "tracker", not {source!r}')
        self.path = path
        self.lost = 0
        self.slots = dict(slots or {})
        self._about: dict[str, JsonValue] = {
            "schema": SCHEMA,
            "source": source,
            "sampling": sampling,
            "page_size": PAGE_SIZE,
            "ring_entries": ring_entries,
            "host": host_facts(),
        }
        with extra("trace"):
            import pyarrow.parquet as pq
        self._schema = _schema()
        self._pieces: list[pa.RecordBatch] = []
        self._rows = 0
        try:
            self._writer: pq.ParquetWriter | None = pq.ParquetWriter(
                path, self._schema, compression="zstd"
            )
        except OSError as error:
            raise KvmringError(f"{path} cannot be written: {error.strerror or error}") from error
        # last: what came before this may have taken a second, which is nobody's dirty rate
        self._about["begin_ns"] = time.monotonic_ns() if begin_ns is None else begin_ns
        self._about["unix_time_s"] = time.time()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, columns: Mapping[str, Column]) -> None:
        """Add rows; a thousand at a time cost a hundredth of what they cost one by one.

        Args:
            columns: Values by the columns' names, all of one length. A single int or str
                stands for every row; None, or a column left out, for values not known.

        Raises:
            ValueError: An unknown column or event, lengths that differ, time_ns or event
                missing, or a value that does not fit. Nothing was added.
            StateError: The recorder is closed.
        """
        if self._writer is None:
            raise StateError("the recorder is closed")
        rows = _length(columns)
        for first in range(0, rows, _BATCH_ROWS):
            number = min(_BATCH_ROWS, rows - first)
            piece = self._piece(columns, first, number)
            if self._rows + number > _BATCH_ROWS:
                self._flush()
            self._pieces.append(piece)
            self._rows += number
            if len(self._pieces) >= _BATCH_PIECES:
                self._join()

    def _piece(self, columns: Mapping[str, Column], first: int, number: int) -> pa.RecordBatch:
        import pyarrow as pa

        arrays: list[pa.Array[pa.Scalar[pa.DataType]]] = []
        for field in self._schema:
            value = columns.get(field.name)
            try:
                if field.name == "event":
                    arrays.append(_event_codes(value, first, number))
                elif value is None:
                    arrays.append(pa.nulls(number, field.type))
                elif isinstance(value, memoryview) and value.format in ("Q", "q"):
                    arrays.append(_from_words(value[first : first + number]))
                elif isinstance(value, int):
                    arrays.append(pa.repeat(pa.scalar(value, field.type), number))
                else:
                    arrays.append(pa.array(value[first : first + number], field.type))
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise ValueError(f"column {field.name}: {error}") from None
            if arrays[-1].null_count and not field.nullable:
                raise ValueError(f"column {field.name} must be given in every row")
        return pa.record_batch(arrays, schema=self._schema)

    def _join(self) -> None:
        import pyarrow as pa

        table = pa.Table.from_batches(self._pieces, self._schema).combine_chunks()
        self._pieces = table.to_batches()

    def _flush(self) -> None:
        """Write what is held as one row group."""
        if self._writer is not None and self._rows:
            self._join()
            for batch in self._pieces:
                self._writer.write_batch(batch)
        self._pieces, self._rows = [], 0

    def close(self) -> None:
        """Write the rest and the metadata; again it does nothing."""
        if self._writer is None:
            return
        writer = self._writer
        try:
            self._flush()
            about: dict[str, JsonValue] = {
                **self._about,
                "end_ns": time.monotonic_ns(),
                "lost": self.lost,
                "slots": {str(slot): pages for slot, pages in self.slots.items()},
            }
            writer.add_key_value_metadata({_KEY: json.dumps(about)})
        finally:
            self._writer = None
            writer.close()


def _length(columns: Mapping[str, Column]) -> int:
    """Return the columns' one length, after checking their names."""
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise ValueError(f"unknown column {unknown[0]}; a recording has {', '.join(COLUMNS)}")
    for name in _REQUIRED:
        if columns.get(name) is None:
            raise ValueError(f"column {name} must be given")
    lengths = {
        name: len(value)
        for name, value in columns.items()
        if value is not None and not isinstance(value, int | str)
    }
    for (one, a), (other, b) in pairwise(lengths.items()):
        if a != b:
            raise ValueError(f"columns of different lengths: {one} has {a} rows, {other} {b}")
    return next(iter(lengths.values()), 1)


def _from_words(values: memoryview) -> pa.Array[pa.Scalar[pa.DataType]]:
    """Take 64-bit integers over without a Python object for each."""
    import pyarrow as pa

    kind = pa.uint64() if values.format == "Q" else pa.int64()
    words = pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
    return words.cast(pa.int64())  # refused where one has more than 63 bits


def _event_codes(value: Column, first: int, number: int) -> pa.Array[pa.Scalar[pa.DataType]]:
    import pyarrow as pa

    if value is None or isinstance(value, int):
        raise ValueError("column event holds words")
    words = [value] if isinstance(value, str) else value[first : first + number]
    for word in words:
        if word not in EVENTS:
            raise ValueError(f"event must be one of {', '.join(EVENTS)}, not {word!r}")
    if isinstance(value, str):
        codes = pa.repeat(pa.scalar(EVENTS.index(value), pa.int8()), number)
    else:
        codes = pa.array([EVENTS.index(str(word)) for word in words], pa.int8())
    return pa.DictionaryArray.from_arrays(codes, pa.array(EVENTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recording, as read.

    Attributes:
        path: The file.
        table: The rows, in the order in which they were added.
        schema: Number of the format.
        source: "trace" or "tracker", see Recorder.
        sampling: N where only one push in N was recorded.
        page_size: Bytes of a page on the host where it was made.
        ring_entries: Size of the rings; None when it was not known.
        slots: Pages of each memory slot, as far as they were known.
        begin_ns, end_ns: When recording began and ended, CLOCK_MONOTONIC.
        lost: Events that could not be recorded.
        host: What facts.host_facts() said there.
    """

    path: Path
    table: pa.Table
    schema: int
    source: str
    sampling: int
    page_size: int
    ring_entries: int | None
    slots: Mapping[int, int]
    begin_ns: int
    end_ns: int
    lost: int
    host: Mapping[str, JsonValue]

    def __len__(self) -> int:
        return self.table.num_rows


def read(path: Path) -> Recording:
    """Read a recording into memory: 52 bytes per event.

    Raises:
        KvmringError: pyarrow is missing, or the file is not a recording; the message says in
            which way.
    """
    with extra("trace"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            schema = file.schema_arrow
            metadata = file.metadata.metadata or {}
            about = _about(path, schema, metadata)
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise KvmringError(f"{path} cannot be read: {error.strerror}") from error
        raise KvmringError(
            f"{path} is not a whole Parquet file: it is another kind of file, was cut off, or "
            "its recorder was never closed"
        ) from error
    for name in _REQUIRED:
        if table.column(name).null_count:
            raise KvmringError(f"{path} is not a recording of kvmring: {name} is null in places")
    strange = [word for word in table.column("event").unique().to_pylist() if word not in EVENTS]
    if strange:
        raise KvmringError(f"{path} is not a recording of kvmring: it has events {strange[0]!r}")
    try:
        return _recording(path, table, about)
    except (KeyError, TypeError, ValueError) as error:
        raise KvmringError(
            f"{path} is not a recording of kvmring: its metadata lack or garble {error}"
        ) from error


def _about(path: Path, schema: pa.Schema, metadata: Mapping[bytes, bytes]) -> dict[str, JsonValue]:
    """Return a file's metadata, after checking that it is a recording of this format."""
    text = metadata.get(_KEY.encode())
    if text is None:
        raise KvmringError(f"{path} is a Parquet file, but no recording of kvmring")
    try:
        about = json.loads(text)
    except ValueError:
        about = None
    number = about.get("schema") if isinstance(about, dict) else None
    if not isinstance(about, dict) or not isinstance(number, int):
        raise KvmringError(f"{path} is not a recording of kvmring: its metadata cannot be read")
    if number != SCHEMA:
        raise KvmringError(
            f"{path} has the format number {number}; this kvmring reads number {SCHEMA}"
        )
    wanted = _schema()
    for field in wanted:
        index = schema.get_field_index(field.name)
        if index < 0:
            raise KvmringError(
                f"{path} is not a recording of kvmring: the column {field.name} is missing"
            )
        kind = schema.field(index).type
        if kind != field.type:
            raise KvmringError(
                f"{path} is not a recording of kvmring: the column {field.name} is {kind}, "
                f"not {field.type}"
            )
    return about


def _recording(path: Path, table: pa.Table, about: Mapping[str, JsonValue]) -> Recording:
    def number(name: str, low: int) -> int:
        value = about[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"'{name}'")
        return value

    slots, host, source = about["slots"], about["host"], about["source"]
    if not isinstance(slots, dict) or not all(isinstance(n, int) for n in slots.values()):
        raise ValueError("'slots'")
    if not isinstance(host, dict):
        raise ValueError("'host'")
    if source not in ("trace", "tracker"):
        raise ValueError("'source'")
    return Recording(
        path=path,
        table=table,
        schema=number("schema", 1),
        source=str(source),
        sampling=number("sampling", 1),
        page_size=number("page_size", 1),
        ring_entries=None if about["ring_entries"] is None else number("ring_entries", 1),
        slots={int(slot): n for slot, n in slots.items() if isinstance(n, int)},
        begin_ns=number("begin_ns", 0),
        end_ns=number("end_ns", 0),
        lost=number("lost", 0),
        host=host,
    )
