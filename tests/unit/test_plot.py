"""`kvmring plot`: text, JSON and pictures of recordings, and what it says when it cannot."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest

from kvmring import figures, page_size
from kvmring.host.figures import MAX_RINGS, MAX_SLOTS, draw
from kvmring.host.report import Report, rate_words, report, time_words

from .recorded import Row, collections, pushes, recording_of, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes

    from kvmring.host.recording import Recording

MS = 1_000_000
SECOND = 1000 * MS
PAGE = page_size()


@pytest.fixture(scope="module", autouse=True)
def fonts_are_open() -> None:
    """Have matplotlib open its fonts, which it keeps open, before a test looks at its files."""
    with figures.style():
        draw(report_of(ordinary())).draw_without_rendering()


def events(*, seconds: int = 3, slots: int = 2, vcpus: int = 2, number: int = 4000) -> list[Row]:
    """Make up what vCPUs push, with resets now and then, and full rings."""
    rng = random.Random(1)
    rows: list[Row] = []
    dirty, reset = [0] * vcpus, [0] * vcpus
    for time in sorted(rng.randrange(seconds * SECOND) for _ in range(number)):
        vcpu = rng.randrange(vcpus)
        counters: Row = {"time_ns": time, "pid": 3, "vcpu": vcpu}
        if rng.random() < 0.01 or dirty[vcpu] - reset[vcpu] == 192:
            if dirty[vcpu] - reset[vcpu] == 192:
                rows.append({**counters, "event": "exit"})
            reset[vcpu] = dirty[vcpu]
            row: Row = {**counters, "event": "reset"}
        else:
            dirty[vcpu] += 1
            slot = rng.randrange(slots)
            page = rng.randrange(100_000) if slot else rng.randrange(100)
            row = {**counters, "event": "push", "slot": slot, "page": page}
        rows.append({**row, "dirty_index": dirty[vcpu], "reset_index": reset[vcpu]})
    return rows


def ordinary() -> Recording:
    return recording_of(
        events(), length_ns=3 * SECOND, ring_entries=256, slots={0: 512, 1: 200_000}
    )


def sampled_and_lossy() -> Recording:
    return recording_of(events(), length_ns=3 * SECOND, sampling=100, lost=12_345)


def with_gaps() -> Recording:
    return recording_of(events()[::2], length_ns=3 * SECOND, lost=3)


def many_slots_and_vcpus() -> Recording:
    return recording_of(events(slots=9, vcpus=40), length_ns=3 * SECOND, ring_entries=256)


def eight_vcpus() -> Recording:
    return recording_of(events(slots=1, vcpus=8), length_ns=3 * SECOND, ring_entries=256)


def of_a_tracker() -> Recording:
    rng = random.Random(2)
    taken = [
        (n * 100 * MS, sorted({(0, rng.randrange(3000)) for _ in range(400)})) for n in range(1, 20)
    ]
    rows = collections(taken)
    return recording_of(rows, length_ns=2 * SECOND, source="tracker", slots={0: 65536})


def empty() -> Recording:
    return recording_of([], length_ns=SECOND)


def one_page() -> Recording:
    return recording_of(pushes([(5, 0, 7)]), length_ns=1000)


def far_pages() -> Recording:
    far = [(n * MS, 65536, (1 << 40) + n % 50) for n in range(500)]
    return recording_of(pushes(far), length_ns=SECOND)


RECORDINGS = [
    ordinary,
    sampled_and_lossy,
    with_gaps,
    many_slots_and_vcpus,
    eight_vcpus,
    of_a_tracker,
    empty,
    one_page,
    far_pages,
]


def report_of(recording: Recording) -> Report:
    return report(recording, bandwidths=[10**6, 125 * 10**6, 1250 * 10**6], downtime_ns=300 * MS)


# The picture


@pytest.mark.parametrize("make", RECORDINGS, ids=lambda make: make.__name__)
def test_panels_are_labelled_and_nothing_overlaps(make: Callable[[], Recording]) -> None:
    found = report_of(make())
    with figures.style():
        figure = draw(found)
        figure.draw_without_rendering()
    panels = figure.get_axes()
    bars = [panel for panel in panels if panel.get_label() == "<colorbar>"]
    titled = [panel for panel in panels if panel not in bars]
    maps = min(len(found.trace.slots), MAX_SLOTS)
    assert len(bars) == maps
    assert len(titled) == max(maps, 1) + 1 + bool(found.trace.rings) + 2
    for panel in titled:
        assert panel.get_title(loc="left")
        assert panel.get_ylabel()
        assert panel.get_xlabel() or not panel.xaxis.get_tick_params()["labelbottom"]
    units = {panel.get_ylabel() for panel in titled}
    assert {"page in slot", "pages/s", "pages", "time to send what is left [s]"} <= units
    assert ("entries" in units) == bool(found.trace.rings)
    xlabels = {panel.get_xlabel() for panel in titled}
    assert {"time since recording began [s]", "window [s]", "rounds done"} <= xlabels
    assert all(bar.get_ylabel().endswith("per cell") for bar in bars)

    for panel in titled:
        legend = panel.get_legend()
        heading = panel._left_title if hasattr(panel, "_left_title") else panel.title
        if legend is not None:
            assert not legend.get_window_extent().overlaps(heading.get_window_extent())
    boxes = {
        panel.get_title(loc="left") or f"bar {i}": panel.get_tightbbox()
        for i, panel in enumerate(panels)
    }
    assert len(boxes) == len(panels)
    whole = figure.bbox.padded(1)
    for name, box in boxes.items():
        assert box is not None
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, f"{name} leaves the picture"
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, f"{name} leaves the picture"
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert a is not None
        assert b is not None
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide <= 1 or high <= 1, f"{one} overlaps {other}"
    heading = figure.get_suptitle()
    for note in found.notes():
        assert note in heading.replace("\n", " ")


def test_what_the_panels_show_is_what_the_numbers_say() -> None:
    found = report_of(ordinary())
    with figures.style():
        figure = draw(found)
    by_title = {panel.get_title(loc="left"): panel for panel in figure.get_axes()}
    working = by_title["Working set: different pages in a window"]
    most, mean = working.get_lines()
    assert np.asarray(most.get_ydata()).tolist() == [s.max_pages for s in found.working_sets]
    assert np.asarray(mean.get_ydata()).tolist() == [s.mean_pages for s in found.working_sets]
    labels = legend_of(by_title["Pre-copy forecast"])
    assert labels[-1] == "downtime limit: 300 ms"
    for one, label in zip(found.forecasts, labels, strict=False):
        assert label.startswith(rate_words(one.bandwidth))
        assert ("does not converge" in label) != one.converges
    fill = legend_of(by_title["Ring fill, highest"])
    assert fill[:3] == ["vCPU 0", "vCPU 1", "ring size"]


def test_more_rings_than_colours_are_one_line() -> None:
    found = report_of(many_slots_and_vcpus())
    assert len(found.trace.rings) > MAX_RINGS
    with figures.style():
        figure = draw(found)
    panels, heading = figure.get_axes(), figure.get_suptitle()
    (fill,) = [panel for panel in panels if panel.get_title(loc="left") == "Ring fill, highest"]
    assert legend_of(fill)[0] == "fullest of 40 vCPUs"
    shown = [p.get_title(loc="left") for p in panels if "slot" in p.get_title(loc="left")]
    assert len(shown) == MAX_SLOTS
    assert "Of 9 slots, the 4 with the most pushes are drawn." in heading


def legend_of(panel: Axes) -> list[str]:
    legend = panel.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


# The command


def kvmring(*args: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command without a terminal, 80 columns wide, after some Python of ours."""
    program = f"import sys\n{before}\nfrom kvmring.cli import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "plot", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "COLUMNS": "80"},
    )


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "x.parquet"
    write(path, events(), length_ns=3 * SECOND, ring_entries=256, slots={0: 512, 1: 200_000})
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.parquet"
    path.write_text("not a recording")
    return path


def test_text_fits_80_columns(recorded: Path, tmp_path: Path) -> None:
    done = kvmring(recorded)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout
    for words in ("dirty rate:", "ring of vCPU 1:", "working set:", "pre-copy forecast:"):
        assert any(line.startswith(words) for line in lines), words
    assert list(tmp_path.iterdir()) == [recorded], "no picture was asked for"


def test_sampled_text_fits_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write(path, events(), length_ns=3 * SECOND, sampling=500, lost=7)
    done = kvmring(path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    text = " ".join(done.stdout.split())
    for words in ("Sampled, 1 push in 500", "7 events were lost", "--memory", "at most"):
        assert words in text


def test_json_is_what_the_api_says(recorded: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.svg"
    options = ("--bandwidth", "8Mbit,1GiB", "--memory", "2GiB", "--window", "0.5,3", "--json")
    done = kvmring(recorded, *options, "--downtime", "20", "--output", picture)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert document["distinct_pages"] == sum(slot["pages"] for slot in document["slots"])
    assert document["pushes"] == sum(row["event"] == "push" for row in events())
    assert [s["window_s"] for s in document["working_set"]] == [0.5, 3.0]
    rate = document["dirty_rate"]
    width = rate["edges_s"][1]
    assert sum(rate["pages_per_s"]) * width == pytest.approx(document["pushes"])
    told = document["forecast"]
    assert (told["memory_pages"], told["memory_known"]) == ((2 << 30) // PAGE, True)
    assert told["downtime_limit_ms"] == 20
    bandwidths = told["bandwidths"]
    assert [b["bandwidth_bytes_per_s"] for b in bandwidths] == [10**6, 1 << 30]
    assert [b["converges"] for b in bandwidths] == [False, True]
    assert bandwidths[1]["downtime_ms"] <= 20
    assert 10**6 < told["converging_bandwidth_bytes_per_s"] <= 1 << 30
    assert picture.exists()


@pytest.mark.parametrize("name", ["x.png", "x.svg", "X.PNG"])
def test_pictures(recorded: Path, tmp_path: Path, name: str) -> None:
    picture = tmp_path / name
    done = kvmring(recorded, "--output", picture)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"written: {picture}"
    data = picture.read_bytes()
    if name.endswith("svg"):
        words = " ".join(ElementTree.fromstring(data).itertext())
        assert "Pages over time, slot 1" in words
        assert "time since recording began [s]" in words
    else:
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 20_000


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["no.parquet"], 1, "No such file"),
        (["bad.parquet"], 1, "not a whole Parquet file"),
        ([], 2, "FILE"),
        (["x.parquet", "--output", "x.pdf"], 2, ".png or .svg"),
        (["x.parquet", "--output", "no/x.png"], 1, "cannot be written"),
        (["x.parquet", "--bandwidth", "fast"], 2, "a number and a unit"),
        (["x.parquet", "--bandwidth", "0Gbit"], 2, "1 byte"),
        (["x.parquet", "--bandwidth", "1Gbit,"], 2, "a number and a unit"),
        (["x.parquet", "--memory", "4iB"], 2, "a number and a unit"),
        (["x.parquet", "--memory", "1MiB"], 2, "different ones"),
        (["x.parquet", "--downtime", "-1"], 2, "--downtime"),
        (["x.parquet", "--downtime", "nan"], 2, "--downtime"),
        (["x.parquet", "--window", "1,x"], 2, "write seconds"),
        (["x.parquet", "--window", "inf"], 2, "write seconds"),
        (["x.parquet", "--window", "4"], 2, "as long as the recording"),
        (["x.parquet", "--window", "1e-9"], 2, "fit into the recording"),
    ],
)
def test_bad_input_is_one_line_and_a_status(
    recorded: Path, bad: Path, options: list[str], status: int, words: str
) -> None:
    at = [str(recorded.parent / word) if "." in word else word for word in options]
    if "--window" in options:
        at[-1] = options[-1]
    done = kvmring(*at)
    assert done.returncode == status
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvmring")
    assert words in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "extra", "output"),
    [("pyarrow", "trace", False), ("numpy", "trace", False), ("matplotlib", "plot", True)],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    recorded: Path, tmp_path: Path, package: str, extra: str, output: bool
) -> None:
    options = ["--output", str(tmp_path / "x.png")] if output else []
    done = kvmring(recorded, *options, before=f"sys.modules[{package!r}] = None")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kvmring: the package {package} is not installed")
    assert f"pip install 'kvmring[{extra}]'" in line


def test_tables_need_no_matplotlib(recorded: Path) -> None:
    plain = kvmring(recorded, "--json")
    without = kvmring(recorded, "--json", before="sys.modules['matplotlib'] = None")
    assert without.returncode == 0, without.stderr
    assert json.loads(without.stdout) == json.loads(plain.stdout)


def test_words() -> None:
    assert [rate_words(n) for n in (1.25e9, 312.5e6, 125, 1)] == [
        "10 Gbit/s",
        "2.5 Gbit/s",
        "1 kbit/s",
        "8 bit/s",
    ]
    assert [time_words(s) for s in (12345, 12.34, 0.3, 0.0000021, 0)] == [
        "12,345 s",
        "12.3 s",
        "300 ms",
        "2.1 us",
        "0 us",
    ]
