"""What the bench prints, writes and draws: layout at 80 columns, JSON, arguments, pictures."""

from __future__ import annotations

import argparse
import io
import json
import sys
from typing import TYPE_CHECKING

import pytest

from kvmring.bench import GROUPS, bitmap, report
from kvmring.bench.measure import Effort, Figure, summary
from kvmring.bench.report import Column, Group, Table
from kvmring.commands import bench
from kvmring.errors import KvmringError

from .bench_groups import figure, modes_group

if TYPE_CHECKING:
    from pathlib import Path

    from kvmring.facts import JsonValue


# The report


def facts() -> dict[str, JsonValue]:
    return report.bench_facts(None, 0)


def wide_group(name: str, columns: tuple[Column, ...]) -> Group:
    """Make a group whose cells are as wide as they come."""
    table = Table(name=name, title="Wide", columns=columns)
    table.add(*("run + exit" if at == 0 else figure(123456.7) for at in range(len(columns))))
    table.add(*(None for _ in columns))
    return Group(name=name, tables=[table], says=["a sentence " * 20])


def all_columns() -> dict[str, tuple[Column, ...]]:
    from kvmring.bench import calls, cycle, harvest, modes, scale

    return {
        "harvest times": harvest._COLUMNS,
        "harvest ratios": harvest._RATIOS,
        "cycle": cycle._COLUMNS,
        "calls": calls._COLUMNS,
        "bitmap": bitmap._COLUMNS,
        "modes": modes._COLUMNS,
        "start": modes._START,
        "vcpus": scale._VCPUS,
        "slots": scale._SLOTS,
    }


@pytest.mark.parametrize("name", list(all_columns()))
def test_the_report_fits_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bench.print_report(facts(), [wide_group(name, all_columns()[name])], "no C beside it")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "no C beside it" in lines


def test_every_number_has_a_unit_in_its_head() -> None:
    units = ("ns", "us", "ms", "GB/s", "MiB", "GiB", "pages", "entries", "bytes", "/", "vCPUs")
    words = ("pages", "order", "call", "operation", "mode", "rings")
    bare = ("dirty\nshare", "resets", "ring\nfull")  # counts and shares
    for columns in all_columns().values():
        for column in columns:
            head = column.head
            assert any(unit in head for unit in units) or head in (*words, *bare), head


def test_cells_as_text() -> None:
    assert bench.text_of(None) == "-"
    assert bench.text_of(summary([1.0, 2.0, 3.0])) == "2 ±25%"
    assert bench.text_of(summary([1.0, 3.0])) == "2 n=2"
    assert bench.text_of(Figure(median=1.0, low=0.0, high=1e9, samples=3)) == "1 ±999%"
    assert bench.text_of(1234.5678) == "1235"
    assert bench.text_of(234567.0) == "235k"
    assert bench.text_of(1e-6) == "1e-06"
    assert bench.text_of(42) == "42"
    assert bench.text_of("random") == "random"


def test_json_holds_every_cell() -> None:
    group = modes_group()
    document = json.loads(json.dumps(group.as_json()))
    rows = document["tables"]["modes"]["rows"]
    assert len(rows) == len(group.table("modes").rows)
    assert rows[0]["mode"] == "ring 1024"
    assert rows[0]["collect_us"]["median"] == 10
    assert set(rows[0]["collect_us"]) == {"median", "low", "high", "samples"}
    assert document["tables"]["modes"]["columns"]["collect_us"] == "collecting\nus/round"
    assert document["says"] == group.says


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        Table(name="t", title="", columns=(Column(name="a", head="a"),)).add(1, 2)


def test_the_facts_say_what_figures_depend_on() -> None:
    found = facts()
    assert found["pinned_cpu"] == 0
    assert found["compiler"] is None
    assert {"kernel", "cpu", "page_size", "load", "numpy", "emulated"} <= set(found)
    assert json.loads(json.dumps(found)) == found


# Arguments and outputs


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def test_arguments() -> None:
    assert parse().group == "all"
    assert parse("cycle", "--json").json == "-"
    assert parse("--json", "-", "cycle").group == "cycle"
    assert parse("--json", "x.json").json == "x.json"
    assert parse().json is None
    for group in GROUPS:
        assert parse(group).group == group


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/x\.json: cannot be written: No such file"):
        bench._outputs(str(tmp_path / "nowhere" / "x.json"), None)
    with pytest.raises(ValueError, match="--json cycle would write a file of a group's name"):
        bench._outputs("cycle", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no files can be written there"):
        bench._outputs(None, str(tmp_path / "file"))
    fine = bench._outputs(str(tmp_path / "x.json"), str(tmp_path / "plots"))
    assert fine.json == str(tmp_path / "x.json")
    assert (tmp_path / "plots").is_dir()
    assert not list((tmp_path / "plots").iterdir())


def test_plots_without_matplotlib_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KvmringError, match=r"pip install 'kvmring\[plot\]'"):
        bench._outputs(None, str(tmp_path))


# Pictures


@pytest.fixture(scope="module")
def fonts() -> None:
    """Have matplotlib open its fonts, which it keeps open, before a test's files are counted."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    for weight in ("normal", "bold"):
        figure.text(0, 0, "x", fontweight=weight)
    figure.savefig(io.BytesIO())


@pytest.mark.usefixtures("fonts")
def test_the_pictures_are_drawn_from_what_was_measured(tmp_path: Path) -> None:
    plots = pytest.importorskip("kvmring.bench.plots")
    effort = Effort(repeat=1, budget_s=0.01, least=1)
    groups = [
        modes_group(),
        bitmap.measure(None, effort, None, sizes=[0.125], densities=[1e-3, 0.1, 1.0]),
    ]
    written = plots.draw(groups, facts(), tmp_path)
    assert [path.name for path in written] == ["bench-modes.png", "bench-bitmap.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("fonts")
def test_a_modes_picture_shows_every_mode_and_the_crossing() -> None:
    plots = pytest.importorskip("kvmring.bench.plots")
    picture = plots._modes(modes_group())
    (axes,) = picture.axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["ring 1024 entries", "ring 65536 entries", "bitmap"]
    assert "pages" in axes.get_xlabel()
    assert "(µs)" in axes.get_ylabel()
    assert any("about 300 pages" in text.get_text() for text in axes.texts)
