"""The bench without a device: statistics, turns, words, bitmaps, and whether there is C."""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
from typing import TYPE_CHECKING

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmring.bench import advice, baseline, bitmap, measure
from kvmring.bench.measure import Effort, Figure, alternate, pool, quiet, ratio, summary
from kvmring.bench.report import Table

from .bench_groups import figure, modes_group

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


NUMBERS = st.lists(st.floats(0.001, 1e9), min_size=2, max_size=30)


# Statistics


@given(NUMBERS)
def test_a_summary_is_the_median_and_the_quartiles(values: list[float]) -> None:
    figure = summary(values)
    assert figure.median == statistics.median(values)
    assert min(values) <= figure.low <= figure.median <= figure.high <= max(values)
    assert figure.samples == len(values)
    halves = sum(figure.low <= value <= figure.high for value in values)
    assert halves >= len(values) / 2 - 1


def test_quartiles_of_known_samples() -> None:
    figure = summary([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (figure.low, figure.median, figure.high) == (2.0, 3.0, 4.0)
    assert figure.spread == pytest.approx(1 / 3)
    assert figure.times(10).high == 40.0


def test_one_sample_is_its_own_median_without_spread() -> None:
    figure = summary([7.0])
    assert (figure.low, figure.median, figure.high, figure.samples) == (7.0, 7.0, 7.0, 1)
    assert figure.spread == 0


def test_a_ratio_is_of_pairs() -> None:
    # the host became ten times slower in the middle: of unpaired medians the ratio would be 20
    assert ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]).median == 2.0
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


# Turns


def recorded(names: str, effort: Effort, clock: Callable[[], float]) -> list[str]:
    calls: list[str] = []

    def contestant(name: str) -> Callable[[], float]:
        def take() -> float:
            calls.append(name)
            return float(len(calls))

        return take

    found = alternate({name: contestant(name) for name in names}, effort, clock=clock)
    assert {len(samples) for samples in found.values()} == {len(calls) // len(names) - 1}
    # what the warm-up returned is in no sample
    assert min(min(samples) for samples in found.values()) > len(names)
    return calls


def test_contestants_take_turns_and_every_place() -> None:
    calls = recorded("abc", Effort(repeat=3, budget_s=1e9), lambda: 0.0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


def test_the_time_allowed_ends_it_but_not_before_the_least() -> None:
    ticks = iter(range(1000))
    calls = recorded("ab", Effort(repeat=50, budget_s=4, least=3), lambda: float(next(ticks)))
    assert 2 * (1 + 3) <= len(calls) < 2 * 50
    spent = iter([0.0, 0.1, 0.1, *[100.0] * 50])
    calls = recorded("ab", Effort(repeat=50, budget_s=4, least=3), lambda: next(spent))
    assert len(calls) == 2 * (1 + 3)


def test_a_first_round_that_used_up_the_time_is_followed_by_one() -> None:
    ticks = iter(range(0, 100_000, 100))
    calls = recorded("ab", Effort(repeat=50, budget_s=4, least=3), lambda: float(next(ticks)))
    assert len(calls) == 2 * (1 + 1)


def test_folds_share_the_effort_and_are_pooled() -> None:
    effort = Effort.of(quick=False)
    part = effort.fold()
    assert effort.folds * part.repeat <= effort.repeat
    assert part.least >= 1
    assert Effort.of(quick=True, repeat=1).fold().repeat == 1
    assert pool([{"a": [1.0], "b": [2.0]}, {"a": [3.0], "b": [4.0]}]) == {
        "a": [1.0, 3.0],
        "b": [2.0, 4.0],
    }


def test_quiet_puts_everything_back() -> None:
    before = psutil.Process().cpu_affinity()
    assert gc.isenabled()

    def fail_inside() -> None:
        with quiet() as cpu:
            assert not gc.isenabled()
            assert cpu is None or psutil.Process().cpu_affinity() == [cpu]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert gc.isenabled()
    assert psutil.Process().cpu_affinity() == before


def test_a_call_is_repeated_until_it_can_be_measured() -> None:
    assert measure.per_call(lambda: None) > 100
    assert measure.per_call(lambda: sum(range(1_000_000))) < 10


# Words


def test_a_crossing_lies_where_the_lines_meet() -> None:
    ring = [(10, 10.0), (100, 100.0), (1000, 1000.0)]
    flat = [(10, 55.0), (100, 55.0), (1000, 55.0)]
    found = advice.crossing(ring, flat)
    assert found == pytest.approx(55)
    assert advice.crossing(flat, ring) is None
    assert advice.crossing([(10, 1.0), (100, 2.0)], flat) is None


def test_a_ring_that_is_too_small_is_named_with_its_price() -> None:
    slow = Table(name="m", title="", columns=modes_group().table("modes").columns)
    for mode, lost, stops in (
        ("ring 256", 1500.0, 5),
        ("ring 4096", 1000.0, 0),
        ("bitmap", 9.0, 0),
    ):
        slow.add(64, 1000, 0.1, mode, figure(lost), figure(9.0), stops, 16)
    (said,) = (s for s in advice.advise(slow) if "stops the guest" in s)
    assert "1,000 pages" in said
    assert "5 times" in said
    assert "50% more time than ring 4096" in said


def test_costs_between_measured_points_lie_on_the_line() -> None:
    assert advice.cost_at([(10, 1.0), (20, 2.0)], 15) == pytest.approx(1.5)
    assert advice.cost_at([(10, 1.0), (20, 2.0)], 21) is None
    assert advice.lowest({"a": [(1, 5.0), (2, 1.0)], "b": [(1, 2.0), (2, 3.0)]}) == [
        (1, 2.0),
        (2, 1.0),
    ]


def test_advice_names_the_crossing_and_no_ring_that_would_stop_the_guest() -> None:
    says = modes_group().says
    assert any("1 GiB" in s and "up to about 300 pages" in s for s in says)
    by_rate = {s.split(",")[1] + s.split(",")[2]: s for s in says if "pages/s" in s}
    assert "ring" in by_rate[" 1000 pages/s"]
    assert "bitmap; 300 us" in by_rate[" 10000 pages/s"]
    assert "5.0%" in by_rate[" 10000 pages/s"]
    slow = Table(name="m", title="", columns=modes_group().table("modes").columns)
    for pages in (10, 1000):
        for mode, stops in (("ring 1024", 1), ("bitmap", 0)):
            slow.add(64, pages, 0.1, mode, figure(2e5), figure(9.0), stops, 16)
    assert any("out of reach" in s for s in advice.advise(slow))
    assert not any("; ring" in s for s in advice.advise(slow))


# Random bitmaps


@pytest.mark.parametrize("density", [1e-4, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("pages", [1 << 16, 100_000])
def test_random_bitmaps_have_their_density(pages: int, density: float) -> None:
    found = bitmap.random_bitmap(pages, density)
    expected = pages * density
    assert abs(found.count() - expected) <= 6 * (expected**0.5) + 1
    assert found == bitmap.random_bitmap(pages, density)
    if density < 1:
        assert found != bitmap.random_bitmap(pages, density, seed=2)
        assert max(found.page_numbers()) > pages // 2


def test_every_operation_agrees_with_numpy() -> None:
    numpy = pytest.importorskip("kvmring.bench.numbers")
    one, other = (bitmap.random_bitmap(1 << 16, 0.03, seed=seed) for seed in (1, 2))
    theirs = numpy.Numpy(one, other)
    assert theirs.count() == one.count()
    assert theirs.page_numbers().tolist() == one.page_numbers().tolist()
    firsts, ends = theirs.runs()
    runs = [(first, end - first) for first, end in zip(firsts.tolist(), ends.tolist(), strict=True)]
    assert runs == list(one.runs())
    assert set(theirs.operations) == set(bitmap.OPERATIONS)


def test_the_bitmap_group_is_complete() -> None:
    effort = Effort(repeat=1, budget_s=0.01, least=1)
    group = bitmap.measure(None, effort, None, sizes=[0.125], densities=[1e-3, 1.0])
    records = group.table("bitmap").records()
    assert [r["operation"] for r in records] == [op for op in bitmap.OPERATIONS for _ in "ab"]
    for record in records:
        found = record["gb_s"]
        assert isinstance(found, Figure)
        assert found.median > 0
        assert record["to_read"] is None, "reading is measured in C"


# The C


def test_the_c_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler gcc")
    strict = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
    source = str(baseline.SOURCE)
    done = subprocess.run(
        [compiler, *baseline.FLAGS, *strict, source, "-o", str(tmp_path / "base.so")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_c_reads_memory_and_names_the_hypervisor() -> None:
    compiled, why = baseline.compile_baseline()
    if compiled is None:
        pytest.skip(why)
    assert compiled.compiler.endswith("-O2")
    with baseline.Memory(compiled, 1 << 20) as memory:
        assert memory.read(3) > 0
    name = compiled.hypervisor()
    assert name is None or name.isprintable()


def test_without_source_or_compiler_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, why = baseline.compile_baseline(tmp_path / "baseline.c")
    assert found is None
    assert "source tree" in why
    broken = tmp_path / "baseline.c"
    broken.write_text("this is no C\n")
    if shutil.which("gcc"):
        found, why = baseline.compile_baseline(broken)
        assert found is None
        assert "fails" in why
    monkeypatch.setenv("CC", "no-such-compiler")
    found, why = baseline.compile_baseline(broken)
    assert found is None
    assert "no-such-compiler" in why
    assert "\n" not in why
