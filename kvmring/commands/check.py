"""`kvmring check`: the rules of dirty logging, tried on this host; the work is in checks/."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import textwrap
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

import kvmring.checks  # noqa: F401  declares the rules
from kvmring.checks import report, results
from kvmring.checks.process import kvm_held
from kvmring.checks.run import Options, Outcome, known_ids, select
from kvmring.checks.run import run as run_checks
from kvmring.commands import DONE, FAILED, INTERRUPTED, MISSING
from kvmring.commands.output import print_json, table
from kvmring.errors import int_between
from kvmring.facts import host_facts

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from kvmring.checks.results import Difference
    from kvmring.checks.rules import Rule
    from kvmring.checks.run import Result
    from kvmring.facts import JsonValue

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Try the kernel's rules of dirty logging on this host, one by one: errnos, rings, bitmaps, "
    "signals, and guests that know what they wrote. Each check runs in a process of its own "
    "with a time limit. Exit status: 0 no check failed (passed, skipped, or failed as --known; "
    "a known failure that passes is shown and is no failure); 1 a check failed; 2 usage; 3 no "
    "KVM, or every check was skipped; 130 interrupted. With --compare: 0 the same, 1 different."
)

FORMATS = ("ktap", "text", "json")
STYLES = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.SKIP: "yellow",
    Outcome.XFAIL: "yellow",
    Outcome.XPASS: "bold yellow",
}


def add_arguments(job: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    job.add_argument(
        "pattern",
        nargs="*",
        metavar="PATTERN",
        help="checks by id, by group, or by shell pattern; all of them without it",
    )
    other = job.add_mutually_exclusive_group()
    other.add_argument(
        "--list", action="store_true", help="print id, rule, source and needs; run nothing"
    )
    other.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="show what differs between two runs: outcomes, and what was noted (an errno that "
        "releases differ in, say); numbers are shown and decide nothing",
    )
    job.add_argument(
        "--format",
        choices=FORMATS,
        help="text on a terminal, otherwise ktap (KTAP version 1); --json is --format json",
    )
    job.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="checks at a time (%(default)s)"
    )
    job.add_argument(
        "--timeout",
        type=float,
        default=20.0,
        metavar="S",
        help="seconds for one check (%(default)g); a check that needs more has its own limit",
    )
    job.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of random choices (%(default)s)"
    )
    job.add_argument(
        "--known",
        action="append",
        default=[],
        metavar="ID",
        help="a check that is known to fail here: XFAIL. May be given several times",
    )
    job.add_argument(
        "--output",
        metavar="DIR",
        help="also write results.ktap, results.json and host.json there",
    )


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    if args.compare:
        return _compare(args)
    rules = select(args.pattern)
    form = _format(args)
    if args.list:
        return _list(rules, form)
    options = Options(
        device=args.device,
        jobs=int_between("--jobs", args.jobs, 1, 256),
        timeout_s=_seconds(args.timeout),
        seed=args.seed,
        known=known_ids(args.known),
    )
    folder = results.Folder(args.output) if args.output else None
    facts = host_facts()
    show = {"ktap": _Ktap, "text": _Text, "json": _Json}[form](rules, facts, options)
    done: list[Result] = []
    interrupted = False
    with _signals_interrupt(), kvm_held(options.device):
        try:
            show.begin()
            running = run_checks(rules, options, started=show.started)
            with contextlib.closing(running):
                for number, result in report.in_order(rules, running):
                    done.append(result)
                    show.result(number, result)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            show.close()
    show.end(done)
    if folder is not None:
        folder.write(
            report.ktap(done, facts, options, planned=len(rules)),
            results.as_document(done, facts, options, planned=len(rules)),
        )
    if interrupted:
        print("kvmring: interrupted", file=sys.stderr)
        return INTERRUPTED
    return _status(done)


def _status(done: Sequence[Result]) -> int:
    if any(result.outcome is Outcome.FAIL for result in done):
        return FAILED
    if report.nothing_checked(done):
        print("kvmring: nothing was checked: every check was skipped", file=sys.stderr)
        return MISSING
    return DONE


def _format(args: argparse.Namespace) -> str:
    if args.json and args.format not in (None, "json"):
        raise ValueError(f"--json and --format {args.format} contradict each other")
    if args.json:
        return "json"
    if args.format:
        return str(args.format)
    return "text" if sys.stdout.isatty() else "ktap"


def _seconds(value: float) -> float:
    if not math.isfinite(value) or not 0 < value <= 86400:
        raise ValueError(f"--timeout must be more than 0 and at most 86400 seconds, not {value:g}")
    return value


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does, so that no process is left."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# How a run is shown


class _Shown:
    """A run's face; this one shows nothing."""

    def __init__(
        self, rules: Sequence[Rule], facts: dict[str, JsonValue], options: Options
    ) -> None:
        self.rules, self.facts, self.options = rules, facts, options

    def begin(self) -> None:
        """Show what comes before the first result."""

    def started(self, rule: Rule) -> None:
        """Show that a check has begun."""

    def result(self, number: int, result: Result) -> None:
        """Show a result."""

    def close(self) -> None:
        """Give the terminal back; also after an error."""

    def end(self, done: Sequence[Result]) -> None:
        """Show what comes after the last one."""


class _Ktap(_Shown):
    def begin(self) -> None:
        self._print(report.ktap_header(len(self.rules), self.facts, self.options))

    def result(self, number: int, result: Result) -> None:
        self._print(report.ktap_result(number, result))

    def end(self, done: Sequence[Result]) -> None:
        self._print(report.ktap_footer(done, len(self.rules)))

    def _print(self, lines: Sequence[str]) -> None:
        # at once, so that a kernel that dies of a check leaves what came before in the log
        print("\n".join(lines), flush=True)


class _Json(_Shown):
    def end(self, done: Sequence[Result]) -> None:
        print_json(results.as_document(done, self.facts, self.options, planned=len(self.rules)))


class _Text(_Shown):
    def __init__(
        self, rules: Sequence[Rule], facts: dict[str, JsonValue], options: Options
    ) -> None:
        super().__init__(rules, facts, options)
        self.console = Console(highlight=False)
        self.width = max(len(rule.id) for rule in rules)
        # No thread for refreshing: this process forks, and a fork copies one thread only.
        self.progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            auto_refresh=False,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=len(rules))

    def begin(self) -> None:
        self.console.print(Text(report.host_line(self.facts, self.options)))
        self.console.print()
        self.progress.start()

    def started(self, rule: Rule) -> None:
        self.progress.update(self.task, description=rule.id)
        self.progress.refresh()

    def result(self, number: int, result: Result) -> None:
        outcome = result.outcome
        line = Text(f"{outcome.name:5} ", style=STYLES[outcome])
        line.append(f"{result.rule.id:{self.width}} {result.seconds * 1e3:7.0f} ms", style="none")
        self.console.print(line)
        said = [result.reason] if outcome is Outcome.SKIP else report.note_lines(result)
        if outcome in (Outcome.FAIL, Outcome.XFAIL):
            said = report.evidence_lines(result)
        for text in said:
            for part in textwrap.wrap(text, max(self.console.width - 8, 40)):
                self.console.print(Text(f"      {part}"))
        self.progress.update(self.task, advance=1)
        self.progress.refresh()

    def close(self) -> None:
        self.progress.stop()

    def end(self, done: Sequence[Result]) -> None:
        self.console.print()
        names = ("group", "checks", *(outcome.value for outcome in Outcome))
        rows = table(*names, right=names[1:])
        groups: dict[str, list[Result]] = {}
        for result in done:
            groups.setdefault(result.rule.group, []).append(result)
        for group, members in groups.items():
            counted = results.totals(members)
            rows.add_row(group, str(len(members)), *(str(n) if n else "" for n in counted.values()))
        self.console.print(rows)
        self.console.print()
        for text in report.summary(done, len(self.rules), width=self.console.width - 1):
            self.console.print(Text(text))


# Without a run


def _list(rules: Sequence[Rule], form: str) -> int:
    if form == "json":
        print_json(
            {
                "schema": results.SCHEMA,
                "checks": [
                    {
                        "id": rule.id,
                        "rule": rule.text,
                        "source": rule.source,
                        "needs": [cap.name for cap in rule.needs],
                        "machine": rule.machine,
                        "guest": rule.guest,
                        "meaning": rule.meaning,
                    }
                    for rule in rules
                ],
            }
        )
        return DONE
    for rule in rules:
        print(rule.id)
        said = {
            "rule": rule.text,
            "source": rule.source,
            "needs": ", ".join(report.needs(rule)) or "KVM",
        }
        for name, text in said.items():
            print(textwrap.fill(text, 80, initial_indent=f"  {name}: ", subsequent_indent="    "))
    return DONE


def _compare(args: argparse.Namespace) -> int:
    if args.pattern or args.output:
        raise ValueError("--compare takes two files and nothing else")
    a, b = (results.read(path) for path in args.compare)
    found = results.compare(a, b)
    decisive = [one for one in found if not one.figure]
    if args.json or args.format == "json":
        print_json(
            {
                "schema": results.SCHEMA,
                "a": a["host"],
                "b": b["host"],
                "same": not decisive,
                "differences": [
                    {"id": d.id, "what": d.what, "a": d.a, "b": d.b, "figure": d.figure}
                    for d in found
                ],
            }
        )
        return FAILED if decisive else DONE
    console = Console(highlight=False)
    for name, path, document in zip("AB", args.compare, (a, b), strict=True):
        host = document["host"]
        facts = host if isinstance(host, dict) else {}
        named = " ".join(str(facts.get(key, "?")) for key in ("kernel", "machine", "backend"))
        console.print(Text(f"{name}: {os.fspath(path)}: Linux {named}"))
    _print_differences(console, "different", decisive)
    _print_differences(console, "figures that differ", [one for one in found if one.figure])
    if not decisive:
        console.print("no outcome and nothing noted differs")
    return FAILED if decisive else DONE


def _print_differences(console: Console, title: str, found: Sequence[Difference]) -> None:
    if not found:
        return
    console.print()
    rows = table(title, "what", "A", "B")
    for one in found:
        sides = ("-" if side is None else str(side) for side in (one.a, one.b))
        rows.add_row(*(Text(text) for text in (one.id, one.what, *sides)))
    console.print(rows)
