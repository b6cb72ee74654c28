"""kvmring bench on the real device: its figures are complete, and what it counts is right.

Sizes are tiny, and no time is judged: the groups themselves refuse a figure whose pages or
entries are not those that the guest wrote.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, System, page_size
from kvmring.bench import GROUPS, baseline, calls, cycle, harvest, modes, rigs, scale
from kvmring.bench.measure import Effort, Figure
from kvmring.errors import KvmringError
from tests.gates import needs

if TYPE_CHECKING:
    from pathlib import Path

    from kvmring.bench.baseline import Baseline
    from kvmring.bench.report import Cell, Table

    from .rig import RingFacts

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)

EFFORT = Effort(repeat=2, budget_s=0.01, least=1, quick=True)


@pytest.fixture(scope="module")
def base() -> Baseline | None:
    return baseline.compile_baseline()[0]


def kvmring(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "kvmring", "bench", *args],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


def median(cell: Cell) -> float:
    assert isinstance(cell, Figure)
    assert cell.low <= cell.median <= cell.high
    return cell.median


def require_complete(table: Table, *but: str) -> None:
    """Require that every cell was measured, and every figure above zero; `but` is for noise."""
    assert table.rows
    for record in table.records():
        for name, cell in record.items():
            assert cell is not None, (table.name, name)
            if isinstance(cell, Figure):
                assert cell.samples >= 1
                if name not in but:
                    assert median(cell) > 0, (table.name, name)


def sizes(facts: RingFacts) -> list[int]:
    return [facts.smallest, 2 * facts.smallest]


def test_harvest_finds_what_the_rings_hold(
    kvm: System, facts: RingFacts, base: Baseline | None
) -> None:
    group = harvest.measure(kvm, EFFORT, base, sizes=sizes(facts))
    ratios = group.table("ratios").records()
    assert [(r["entries"], r["order"]) for r in ratios] == [
        (size, order) for size in sizes(facts) for order in harvest.ORDERS
    ]
    for record in ratios:
        entries, harvested = record["entries"], record["harvested"]
        assert isinstance(entries, int)
        assert isinstance(harvested, int)
        assert entries - facts.reserved <= harvested <= entries
        assert harvested == entries - facts.reserved or not facts.exact
    if base is None:
        pytest.skip("no C to compare with")
    require_complete(group.table("times"))
    require_complete(group.table("ratios"))


def test_harvest_without_c_leaves_its_columns_open(kvm: System, facts: RingFacts) -> None:
    group = harvest.measure(kvm, EFFORT, None, sizes=[facts.smallest], orders=["random"])
    (record,) = group.table("times").records()
    assert record["c_floor_ns"] is record["c_plain_ns"] is None
    for name in ("gfns_ns", "set_ns", "ctypes_ns"):
        assert median(record[name]) > 0
    (record,) = group.table("ratios").records()
    assert record["gfns_to_floor"] is record["set_to_plain"] is None


def test_the_c_and_the_ctypes_harvest_name_the_guests_pages(
    kvm: System, facts: RingFacts, base: Baseline | None
) -> None:
    entries = facts.smallest
    wanted = entries // 4
    with rigs.rig(kvm, size_bytes=4 << 20, entries=entries, capacity=wanted) as it:
        pages = rigs.spread_pages(it.ram.num_pages, wanted, order="random")
        it.guest.load(0, it.gpas(pages))
        it.finish()
        with baseline.RawRing(it.vm, it.ram.num_pages) as ring:
            assert ring.harvest() == wanted
            assert sorted(ring.pages()) == sorted(pages)
            assert ring.reset() == wanted
    if base is None:
        pytest.skip("no C to compare with")
    with rigs.rig(kvm, size_bytes=4 << 20, entries=entries, capacity=wanted, base=base) as it:
        assert it.c is not None
        it.guest.load(0, it.gpas(pages))
        it.finish()
        n, ns = it.c.harvest()
        assert (n, it.c.clean()) == (wanted, wanted)
        assert ns > 0
        assert it.c.reset()[0] == wanted
        assert it.c.harvest()[0] == 0
        it.finish()
        assert it.c.mark()[0] == wanted
        assert it.c.reset()[0] == wanted


def test_the_c_program_reports_errors_by_errno(kvm: System, base: Baseline | None) -> None:
    if base is None:
        pytest.skip("no C to compare with")
    with rigs.rig(kvm, size_bytes=1 << 20, base=base) as it:
        assert it.c is not None
        with pytest.raises(OSError, match="KVM_RESET_DIRTY_RINGS: Invalid argument"):
            it.c.reset()


def test_cycle_counts_the_same_pages_in_python_and_in_c(
    kvm: System, facts: RingFacts, base: Baseline | None
) -> None:
    group = cycle.measure(kvm, EFFORT, base, sizes=sizes(facts), pages=1000)
    for record in group.table("cycle").records():
        pages, entries, resets = (record[name] for name in ("pages", "entries", "cycles"))
        assert isinstance(pages, int)
        assert isinstance(entries, int)
        assert isinstance(resets, int)
        assert pages >= max(1000, entries)
        assert resets * entries >= pages
        assert median(record["python"]) > 0
    if base is not None:
        require_complete(group.table("cycle"))


def test_calls_are_measured_for_one_and_for_many_vcpus(kvm: System, base: Baseline | None) -> None:
    group = calls.measure(kvm, EFFORT, base, vcpus=[1, 3], slots={"1 MiB": 1 << 20})
    records = group.table("calls").records()
    names = [str(record["call"]) for record in records]
    for wanted in ("1 vCPU,", "3 vCPUs,", "get_dirty_log, 1 MiB", "run + exit", "kick + run"):
        assert any(wanted in name for name in names), wanted
    for record in records:
        assert median(record["python_us"]) > 0
        assert (record["c_us"] is None) == (base is None)
        compared = base is not None and "harvest" not in str(record["call"])
        assert (record["python_to_c"] is not None) == compared


def test_modes_measures_every_mode_that_the_host_offers(kvm: System, facts: RingFacts) -> None:
    group = modes.measure(
        kvm, EFFORT, memory=[16], shares=[0.01, 0.25], rings=sizes(facts), most_pages=2048
    )
    offered = {mode.name for mode in modes.modes_of(kvm, sizes(facts))}
    records = group.table("modes").records()
    assert {str(r["mode"]) for r in records} == offered
    assert any(name.startswith("ring+bitmap") for name in offered) == bool(
        kvm.check_extension(Cap.DIRTY_LOG_RING_WITH_BITMAP)
    )
    require_complete(group.table("modes"), "lost_us")
    require_complete(group.table("start"), "lost_us")
    for record in records:
        pages, moved, stops = (record[name] for name in ("pages", "bytes", "stops"))
        assert isinstance(pages, int)
        assert isinstance(moved, int)
        assert isinstance(stops, int)
        ring = str(record["mode"]).startswith("ring")
        assert moved >= (16 * pages if ring else (16 << 20) // page_size() // 8)
        usable = max(sizes(facts)) - facts.reserved
        if not ring:
            assert stops == 0
        elif facts.exact and f" {max(sizes(facts))}" in str(record["mode"]):
            assert (stops > 0) == (pages > usable)
    named = {str(r["mode"]): r["named"] for r in group.table("start").records()}
    assert all((n == 2048) == (mode == "clear-log, set") for mode, n in named.items()), named
    assert any("16 MiB" in sentence for sentence in group.says)


def test_a_collector_that_loses_a_page_gives_no_figure(
    kvm: System, facts: RingFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = modes._Vm.pages
    monkeypatch.setattr(modes._Vm, "pages", lambda it: set(sorted(pages(it))[1:]))
    with pytest.raises(KvmringError, match="pages collected where"):
        modes.measure(kvm, EFFORT, memory=[16], shares=[0.01], rings=[facts.smallest])


def test_scale_goes_from_few_to_many(kvm: System) -> None:
    group = scale.measure(kvm, EFFORT, vcpus=[1, 4], slots=[1])
    require_complete(group.table("vcpus"))
    entries = {(r["vcpus"], r["rings"]): r["entries"] for r in group.table("vcpus").records()}
    assert entries[(4, "busy")] == 4 * scale.BUSY_PAGES
    assert entries[(4, "idle")] == entries[(1, "busy")] == scale.BUSY_PAGES
    assert group.table("slots").rows or any("1 GiB" in sentence for sentence in group.says)


def test_a_slot_that_is_too_large_is_said_to_be(
    kvm: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "available_bytes", lambda: 1 << 20)
    group = scale.measure(kvm, EFFORT, vcpus=[1], slots=[1, 2])
    assert not group.table("slots").rows
    assert any("A slot of 1 GiB: not tried" in sentence for sentence in group.says)


# The command


def test_the_command_prints_tables_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = kvmring("cycle", "--quick", "--repeat", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "pages/s" in done.stdout
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert list(document["groups"]) == ["cycle"]
    assert document["quick"] is True
    assert document["host"]["kernel"] == os.uname().release


def test_json_alone_goes_to_stdout() -> None:
    done = kvmring("bitmap", "--quick", "--repeat", "1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document["groups"]["bitmap"]["tables"]) >= {"bitmap"}


def test_without_a_compiler_it_works_and_says_so() -> None:
    done = kvmring("cycle", "--quick", "--repeat", "1", CC="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C beside it: there is no compiler no-such-compiler" in done.stdout
    assert re.search(r"n=\d +- +-", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["nonsense"], 2, "invalid choice: 'nonsense'"),
        (["cycle", "--device", "/nowhere/kvm"], 3, "/nowhere/kvm"),
        (["cycle", "--json", "/nowhere/x.json"], 2, "/nowhere/x.json: cannot be written"),
        (["--json", "cycle"], 2, "put the group before --json"),
        (["cycle", "--repeat", "0"], 2, "--repeat must lie between 1 and"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments: list[str], status: int, says: str) -> None:
    done = kvmring(*arguments)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_the_groups_of_the_help_are_those_there_are() -> None:
    done = kvmring("--help")
    assert done.returncode == 0
    for name in GROUPS:
        assert f"{name}:" in re.sub(r"\s+", " ", done.stdout)
