"""Recordings: what is added comes back, memory stays bounded, broken files are named as such."""

from __future__ import annotations

import json
import sys
import tempfile
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmring import KvmringError, StateError, page_size
from kvmring.facts import host_facts
from kvmring.host.recording import COLUMNS, EVENTS, Recorder, read

from .recorded import Row, write

if TYPE_CHECKING:
    from kvmring.host.recording import Column

I32 = st.integers(-(1 << 31), (1 << 31) - 1)
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
VALUES = {
    "time_ns": I64,
    "pid": st.none() | I32,
    "vcpu": st.none() | I32,
    "event": st.sampled_from(EVENTS),
    "slot": st.none() | I64,
    "page": st.none() | I64,
    "dirty_index": st.none() | I64,
    "reset_index": st.none() | I64,
}
ROWS = st.lists(st.fixed_dictionaries(VALUES), max_size=30)


@settings(max_examples=40)
@given(st.lists(ROWS, max_size=4))
def test_what_is_added_comes_back(parts: list[list[dict[str, int | str | None]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.parquet")
        with Recorder(path) as recorder:
            for rows in parts:
                columns = {name: [row[name] for row in rows] for name in COLUMNS}
                recorder.add(columns)  # type: ignore[arg-type]
        found = read(path)
        assert found.table.to_pylist() == [row for rows in parts for row in rows]
        assert len(found) == sum(map(len, parts))


def test_single_values_and_left_out_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with Recorder(path) as recorder:
        pages = memoryview(array("Q", range(70_000)))
        recorder.add({"time_ns": 7, "event": "push", "slot": 3, "page": pages, "vcpu": None})
        recorder.add({"time_ns": 8, "event": "reset"})
    table = read(path).table.to_pydict()
    assert table["page"] == [*range(70_000), None]
    assert table["slot"] == [3] * 70_000 + [None]
    assert table["time_ns"] == [7] * 70_000 + [8]
    assert table["event"] == ["push"] * 70_000 + ["reset"]
    assert table["vcpu"] == table["pid"] == table["dirty_index"] == [None] * 70_001


def test_the_metadata_say_where_and_how(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with Recorder(path, sampling=500, ring_entries=4096, slots={0: 10, 65536: 3}) as recorder:
        recorder.lost += 17
    found = read(path)
    assert len(found) == 0
    assert (found.sampling, found.ring_entries, found.lost) == (500, 4096, 17)
    assert found.slots == {0: 10, 65536: 3}
    assert found.page_size == page_size()
    assert found.host == host_facts()
    assert found.begin_ns < found.end_ns
    assert found.source == "trace"


def test_rows_are_written_in_groups_and_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    numbers = list(range(1000))
    row: dict[str, Column] = dict.fromkeys(COLUMNS, numbers)
    row["event"] = "push"
    before = pa.total_allocated_bytes()
    most = 0
    with Recorder(path) as recorder:
        for _ in range(1000):
            recorder.add(row)
            most = max(most, pa.total_allocated_bytes() - before)
    assert most < 24 << 20  # a million rows are 52 MB
    metadata = pq.read_metadata(path)
    assert metadata.num_rows == 1_000_000
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert max(groups) <= 1 << 16
    assert min(groups[:-1]) > 1 << 15


def test_many_single_rows_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with Recorder(path) as recorder:
        for i in range(3000):
            recorder.add({"time_ns": [i], "event": [EVENTS[i % 3]]})
    table = read(path).table.to_pydict()
    assert table["time_ns"] == list(range(3000))
    assert table["event"] == [EVENTS[i % 3] for i in range(3000)]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"time_ns": [1], "event": ["push"], "gpa": [1]}, "unknown column gpa"),
        ({"time_ns": [1, 2], "event": ["push"]}, "time_ns has 2 rows, event 1"),
        ({"event": ["push"]}, "time_ns must be given"),
        ({"time_ns": [1]}, "event must be given"),
        ({"time_ns": [1], "event": ["pull"]}, "push, reset, exit, not 'pull'"),
        ({"time_ns": [1], "event": 3}, "event holds words"),
        ({"time_ns": [1], "event": "push", "pid": [1 << 31]}, "column pid"),
        ({"time_ns": [1], "event": "push", "page": 1 << 63}, "column page"),
        ({"time_ns": [1], "event": "push", "page": ["x"]}, "column page"),
        ({"time_ns": [1], "event": "push", "page": memoryview(array("Q", [1 << 63]))}, "page"),
        ({"time_ns": [None], "event": "push"}, "time_ns must be given in every row"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_added(
    tmp_path: Path, columns: dict[str, Column], words: str
) -> None:
    path = tmp_path / "x.parquet"
    with Recorder(path) as recorder:
        with pytest.raises(ValueError, match=words):
            recorder.add(columns)
        recorder.add({"time_ns": [5], "event": "exit"})
    assert read(path).table.to_pydict()["time_ns"] == [5]


def test_a_closed_recorder_takes_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "x.parquet")
    recorder.close()
    recorder.close()
    with pytest.raises(StateError, match="closed"):
        recorder.add({"time_ns": [5], "event": "exit"})


@pytest.mark.parametrize("sampling", [0, -1])
def test_sampling_is_at_least_one(tmp_path: Path, sampling: int) -> None:
    with pytest.raises(ValueError, match="sampling"):
        Recorder(tmp_path / "x.parquet", sampling=sampling)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(KvmringError, match="cannot be written"):
        Recorder(tmp_path / "no" / "x.parquet")


# Files that are no recordings


def good(path: Path) -> None:
    rows: list[Row] = [{"time_ns": n, "event": "push", "slot": 0, "page": n} for n in range(100)]
    write(path, rows, length_ns=200)


def taken_apart(path: Path) -> tuple[pa.Table, dict[str, object]]:
    """Return a good recording's rows, and what its metadata say."""
    good(path)
    metadata = pq.read_metadata(path).metadata
    assert metadata is not None
    about: dict[str, object] = json.loads(metadata[b"kvmring"])
    return pq.read_table(path), about


def put_together(path: Path, table: pa.Table, about: dict[str, object]) -> None:
    pq.write_table(table.replace_schema_metadata({"kvmring": json.dumps(about)}), path)


def with_column(path: Path, name: str, values: pa.Array[pa.Scalar[pa.DataType]]) -> None:
    table, about = taken_apart(path)
    place = table.schema.get_field_index(name)
    put_together(path, table.set_column(place, name, values), about)


def not_parquet(path: Path) -> None:
    path.write_text("time_ns,event\n1,push\n" * 10)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    good(path)
    path.write_bytes(path.read_bytes()[:-100])


def damaged(path: Path) -> None:
    good(path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)


def never_closed(path: Path) -> None:
    recorder = Recorder(path)
    recorder.add({"time_ns": [1] * 70_000, "event": "push"})
    assert recorder._writer is not None
    written = path.read_bytes()  # as if the process had ended here
    recorder.close()
    assert 0 < len(written) < path.stat().st_size
    path.write_bytes(written)


def somebody_elses(path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2]}), path)


def changed_about(path: Path, **changes: object) -> None:
    table, about = taken_apart(path)
    about.update(changes)
    put_together(path, table, {k: v for k, v in about.items() if v != "drop"})


def later_format(path: Path) -> None:
    changed_about(path, schema=2)


def no_sampling(path: Path) -> None:
    changed_about(path, sampling="drop")


def sampling_of_zero(path: Path) -> None:
    changed_about(path, sampling=0)


def slots_of_words(path: Path) -> None:
    changed_about(path, slots={"x": 1})


def unknown_source(path: Path) -> None:
    changed_about(path, source="oracle")


def garbled_about(path: Path) -> None:
    table, _ = taken_apart(path)
    pq.write_table(table.replace_schema_metadata({"kvmring": "{"}), path)


def column_missing(path: Path) -> None:
    table, about = taken_apart(path)
    put_together(path, table.drop_columns(["page"]), about)


def column_of_another_type(path: Path) -> None:
    with_column(path, "page", pa.array([1.5] * 100))


def strange_event(path: Path) -> None:
    codes = pa.array([0] * 100, pa.int8())
    with_column(path, "event", pa.DictionaryArray.from_arrays(codes, pa.array(["pop"])))


def null_time(path: Path) -> None:
    with_column(path, "time_ns", pa.nulls(100, pa.int64()))


def missing(path: Path) -> None:
    assert not path.exists()


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (not_parquet, "not a whole Parquet file"),
        (empty, "not a whole Parquet file"),
        (cut_off, "not a whole Parquet file"),
        (damaged, "not a whole Parquet file"),
        (never_closed, "never closed"),
        (somebody_elses, "no recording of kvmring"),
        (later_format, "format number 2; this kvmring reads number 1"),
        (no_sampling, "'sampling'"),
        (sampling_of_zero, "'sampling'"),
        (slots_of_words, "metadata"),
        (unknown_source, "'source'"),
        (garbled_about, "metadata cannot be read"),
        (column_missing, "column page is missing"),
        (column_of_another_type, "column page is double, not int64"),
        (strange_event, "events 'pop'"),
        (null_time, "time_ns is null"),
        (missing, "No such file"),
        (folder, "x.parquet"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_recording_is_told_in_one_sentence(
    tmp_path: Path, make: object, words: str
) -> None:
    path = tmp_path / "x.parquet"
    assert callable(make)
    make(path)
    with pytest.raises(KvmringError) as caught:
        read(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_what_good_makes_is_a_recording(tmp_path: Path) -> None:
    good(tmp_path / "x.parquet")
    changed_about(tmp_path / "y.parquet")
    assert len(read(tmp_path / "x.parquet")) == len(read(tmp_path / "y.parquet")) == 100


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for action in (lambda: Recorder(tmp_path / "x"), lambda: read(tmp_path / "x")):
        with pytest.raises(KvmringError, match=r"pyarrow.*pip install 'kvmring\[trace\]'"):
            action()
