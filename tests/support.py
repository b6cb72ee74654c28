"""Write README's support table from runs of tests/kvm: here, and in every lab.

`make support-table` calls it. A place that cannot be run keeps no row: what was not run is not
claimed. `python -m tests.support --row` runs the tests in one place and prints its row as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import pytest

from kvmring import System, caps

from .lab.errors import LabError
from .lab.lab import Lab

TOP = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- support-table: begin -->", "<!-- support-table: end -->"
ROW = "support-row: "
PLACES: dict[str, dict[str, str] | None] = {
    "this machine": None,
    "lab": {"arch": "x86_64"},
    "lab (arm64)": {"arch": "arm64"},
    "lab (16 KiB)": {"arch": "arm64", "suite": "sid", "flavour": "16k"},
    "Bochs": {"arch": "x86_64", "machine": "bochs"},
}
# what fits its speed
SELECTION = {"Bochs": " ".join(f"tests/kvm/test_{n}.py" for n in ("pml", "ring_full", "loss"))}
COLUMNS = ("architecture", "kernel", "backend", "page size", "ring", "ring + bitmap")
TESTS = ("bitmap, clear-log", "tests passed", "failed", "not for this host")


class Row(TypedDict):
    """One place's run."""

    machine: str
    kernel: str
    backend: str
    page_size: int
    modes: dict[str, bool]
    bitmap_run: bool  # the tests of the bitmap were among those that ran
    passed: int
    failed: int
    skipped: int


class Counter:
    """A pytest plugin that counts outcomes of whole tests."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst outcome of a test's phases."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def count(self, outcome: str) -> int:
        return list(self.outcomes.values()).count(outcome)


def run_here(args: list[str]) -> Row:
    """Run the tests on this host; their own output goes to stderr."""
    counter = Counter()
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(["-q", "-p", "no:cacheprovider", *args], plugins=[counter])
    with System() as kvm:
        found = caps.inspect_host(kvm)
    host = found.host
    parameters = host["parameters"]
    pml = isinstance(parameters, dict) and parameters.get("kvm_intel.pml") == "Y"
    return {
        "machine": str(host["machine"]),
        "kernel": str(host["kernel"]),
        "backend": str(host["backend"]) + (" with PML" if pml else ""),
        "page_size": int(str(host["page_size"])),
        "modes": {mode.name: mode.offered for mode in found.modes},
        "bitmap_run": any("test_dirty_log" in test for test in counter.outcomes),
        "passed": counter.count("passed"),
        "failed": counter.count("failed"),
        "skipped": counter.count("skipped"),
    }


def pass_on(data: bytes) -> None:
    """Show the guest's messages as they come."""
    sys.stderr.buffer.write(data)
    sys.stderr.flush()


def run_place(name: str, options: dict[str, str] | None) -> Row | None:
    """Run the tests in one place; None, with the reason on stderr, where that is impossible."""
    selection = SELECTION.get(name, "tests/kvm")
    command = f"-m tests.support --row -- {selection}"
    if options is None:
        here = [sys.executable, *command.split()]
        done = subprocess.run(here, stdout=subprocess.PIPE, text=True, check=False)
        output, why = done.stdout, f"status {done.returncode}"
    else:
        try:
            result = Lab(**options).run(  # type: ignore[arg-type]
                f"KVMRING_KVM=1 python3 {command}", timeout_s=3000, on_stderr=pass_on
            )
        except LabError as error:
            print(f"no row for {name}: {error}", file=sys.stderr)
            return None
        output = result.stdout
        why = f"{result.reason or result.status}; console log: {result.console_log}"
    for line in output.splitlines():
        if line.startswith(ROW):
            row: Row = json.loads(line.removeprefix(ROW))
            return row
    print(f"no row for {name}: {why}", file=sys.stderr)
    return None


def cells(row: Row) -> list[str]:
    """Return one row of the table."""
    run = "fails" if row["failed"] else "runs"
    modes = row["modes"]
    ring = run if modes["ring"] else "KVM has none"
    both = run if modes["ring+bitmap"] else "KVM has none"
    log = run if modes["clear-log"] else f"{run}; no clear-log"
    if not row["bitmap_run"]:
        log = "not run"
    kernel = re.match(r"\d+\.\d+(\.\d+)?", row["kernel"])
    return [
        row["machine"],
        kernel.group() if kernel else row["kernel"],
        row["backend"],
        f"{row['page_size'] >> 10} KiB",
        ring,
        both,
        log,
        *(str(row[key]) for key in ("passed", "failed", "skipped")),
    ]


def table(rows: list[Row]) -> str:
    """Format the rows as Markdown."""
    lines = [list(COLUMNS + TESTS), ["---"] * len(COLUMNS + TESTS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(text: str, readme: Path) -> None:
    """Put the table between its marks."""
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    """Run everywhere and write the table, or run here and print a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="store_true", help="run here only, and print the row")
    parser.add_argument("args", nargs="*", help="for pytest, with --row")
    options = parser.parse_args()
    if options.row:
        print(ROW + json.dumps(run_here(options.args)))
        return 0
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda item: run_place(*item), PLACES.items())
        rows = [row for row in found if row is not None]
    write(table(rows), TOP / "README.md")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
