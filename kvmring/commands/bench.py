"""`kvmring bench`: the figures of bench/ as text, JSON or pictures."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from rich.console import Console

from kvmring.bench import GROUPS
from kvmring.bench.baseline import compile_baseline
from kvmring.bench.measure import Effort, Figure, quiet
from kvmring.bench.report import SCHEMA, Group, Table, bench_facts
from kvmring.commands import DONE
from kvmring.commands.output import print_json, table
from kvmring.errors import int_between
from kvmring.extras import extra
from kvmring.system import System

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from kvmring.bench.baseline import Baseline
    from kvmring.bench.report import Cell
    from kvmring.facts import JsonValue

__all__ = ["DESCRIPTION", "add_arguments", "print_report", "run", "text_of"]

DESCRIPTION = (
    "Measure what dirty logging costs on this host, with real guests on real rings, beside the "
    "same work in C. Ratios are of pairs measured in turn; figures are medians, and +-% is half "
    "the distance between the quartiles, n= the samples where they are too few. Without a "
    "group, all are measured: some minutes."
)
ALL = "all"
STDOUT = "-"
FEW = 3  # samples, below which quartiles say nothing


class _Group(Protocol):
    """A module of bench/ that measures a group."""

    def measure(self, kvm: System, effort: Effort, base: Baseline | None, /) -> Group: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where the figures go, found usable before they are measured."""

    json: str | None
    plots: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument(
        "group",
        nargs="?",
        choices=(*GROUPS, ALL),
        default=ALL,
        help="; ".join(f"{name}: {what}" for name, what in GROUPS.items()),
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write JSON to a file too; to stdout alone without a name, or with -",
    )
    parser.add_argument("--plot", metavar="DIR", help="draw pictures (needs matplotlib)")
    parser.add_argument("--repeat", type=int, metavar="N", help="most samples of each figure")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, less time: a look")


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    names = list(GROUPS) if args.group == ALL else [args.group]
    repeat = None if args.repeat is None else int_between("--repeat", args.repeat, 1, 10_000)
    effort = Effort.of(quick=args.quick, repeat=repeat)
    with System(args.device) as kvm:
        outputs = _outputs(args.json, args.plot)
        base, why = compile_baseline()
        with quiet() as cpu:
            facts = bench_facts(base, cpu)
            groups = list(_measure(kvm, effort, base, names))
        document: dict[str, JsonValue] = {
            "schema": SCHEMA,
            "host": facts,
            "quick": effort.quick,
            "groups": {group.name: group.as_json() for group in groups},
        }
        if outputs.json == STDOUT:
            print_json(document)
        else:
            print_report(facts, groups, why)
            if outputs.json is not None:
                Path(outputs.json).write_text(json.dumps(document, indent=2) + "\n")
        if outputs.plots is not None:
            from kvmring.bench.plots import draw

            for path in draw(groups, facts, outputs.plots):
                print(f"kvmring: {path}", file=sys.stderr)
    if why and outputs.json == STDOUT:
        print(f"kvmring: {why}", file=sys.stderr)
    return DONE


def _outputs(json_name: str | None, plots: str | None) -> Outputs:
    """Open what will be written, before minutes go into what cannot be."""
    folder = None
    if plots is not None:
        with extra("plot"):
            import matplotlib as _  # noqa: F401
        folder = Path(plots)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".kvmring").touch()
            (folder / ".kvmring").unlink()
        except OSError as error:
            raise ValueError(
                f"--plot {plots}: no files can be written there: {error.strerror}"
            ) from None
    if json_name is None:
        return Outputs(json=None, plots=folder)
    if json_name == STDOUT:
        return Outputs(json=STDOUT, plots=folder)
    if json_name in (*GROUPS, ALL):
        raise ValueError(
            f"--json {json_name} would write a file of a group's name: put the group before "
            f"--json, or write --json=./{json_name}"
        )
    try:
        with Path(json_name).open("a"):
            pass
    except OSError as error:
        raise ValueError(f"--json {json_name}: cannot be written: {error.strerror}") from None
    return Outputs(json=json_name, plots=folder)


def _measure(
    kvm: System, effort: Effort, base: Baseline | None, names: list[str]
) -> Iterator[Group]:
    for number, name in enumerate(names, 1):
        if sys.stderr.isatty():
            print(f"kvmring: {number}/{len(names)} {name} ...", file=sys.stderr)
        module = cast("_Group", importlib.import_module(f"kvmring.bench.{name}"))
        yield module.measure(kvm, effort, base)


def text_of(cell: Cell) -> str:
    """Return a cell as text: three digits that count, and the spread, or how few samples."""
    if cell is None:
        return "-"
    if isinstance(cell, Figure):
        if cell.samples < FEW:
            return f"{_digits(cell.median)} n={cell.samples}"
        return f"{_digits(cell.median)} ±{min(cell.spread, 9.99):.0%}"
    return _digits(cell) if isinstance(cell, float) else str(cell)


def _digits(number: float) -> str:
    size = abs(number)
    if size >= 1e5:
        return f"{number / 1e3:,.0f}k"
    if size >= 100:
        return f"{number:.0f}"
    if size and size < 1e-3:
        return f"{number:.0e}"
    return f"{number:.3g}"


def print_report(facts: dict[str, JsonValue], groups: list[Group], why: str) -> None:
    """Print the figures as tables."""
    console = Console(highlight=False)
    for line in _about(facts):
        console.print(line)
    if why:
        console.print(why)
    for group in groups:
        for found in group.tables:
            console.print()
            console.print(f"[bold]{group.name}: {found.title}[/bold]")
            console.print(_rich(found))
        console.print()
        for sentence in group.says:
            console.print(sentence, markup=False)


def _rich(found: Table) -> object:
    heads = [column.head for column in found.columns]
    words = {
        column.head
        for at, column in enumerate(found.columns)
        if any(isinstance(row[at], str) for row in found.rows)
    }
    result = table(*heads, right=[head for head in heads if head not in words])
    result.padding = (0, 1, 0, 0)
    for row in found.rows:
        result.add_row(*map(text_of, row))
    return result


def _about(facts: dict[str, JsonValue]) -> Iterator[str]:
    yield (
        f"Linux {facts['kernel']} {facts['machine']}, {facts['page_size']}-byte pages, "
        f"{facts['backend']}"
    )
    gib = int(str(facts["memory_bytes"])) / (1 << 30)
    yield f"{facts['cpu']}, {facts['cpus']} CPUs, {gib:.0f} GiB"
    pinned = facts["pinned_cpu"]
    loads = facts["load"]
    load = loads[0] if isinstance(loads, list) else loads
    where = "not pinned" if pinned is None else f"pinned to CPU {pinned}"
    versions = [f"Python {facts['python']}"]
    if facts["numpy"]:
        versions.append(f"numpy {facts['numpy']}")
    yield f"{where}, load {load}; {', '.join(versions)}"
    if facts["compiler"]:
        yield str(facts["compiler"])
    if facts["emulated"]:
        yield "This host is emulated (TCG): the times mean nothing, nor do the ratios."
