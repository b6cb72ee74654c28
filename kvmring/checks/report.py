"""What a run of checks says: KTAP lines, sentences of summary, and the exit status.

KTAP is the kernel's (Documentation/dev-tools/ktap.rst, version 1); a known failure is `ok` with
XFAIL, as the kernel's selftests write it. Everything here is text out of results.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

from kvmring.checks.results import KIND, totals
from kvmring.checks.run import Cause, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kvmring.checks.rules import Evidence, Rule
    from kvmring.checks.run import Options, Result
    from kvmring.facts import JsonValue

__all__ = [
    "evidence_lines",
    "host_line",
    "in_order",
    "ktap",
    "ktap_footer",
    "ktap_header",
    "ktap_result",
    "needs",
    "note_lines",
    "nothing_checked",
    "summary",
]

# Evidence may be a whole page list; the JSON has all of it.
LONGEST_VALUE = 160
MOST_EVIDENCE = 12


def in_order(rules: Sequence[Rule], results: Iterable[Result]) -> Iterator[tuple[int, Result]]:
    """Number results as planned, from 1, each given as soon as all before it are there."""
    numbers = {rule.id: number for number, rule in enumerate(rules, start=1)}
    waiting: dict[int, Result] = {}
    following = 1
    for result in results:
        waiting[numbers[result.rule.id]] = result
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def needs(rule: Rule) -> list[str]:
    """List what a rule needs of the host, in words."""
    found = [f"KVM_CAP_{cap.name}" for cap in rule.needs]
    if rule.machine:
        found.append(rule.machine)
    if rule.guest:
        found.append("a guest")
    return found


def host_line(facts: Mapping[str, JsonValue], options: Options) -> str:
    """Say in one line where a run was made, and with which seed."""
    return (
        f"Linux {facts['kernel']} {facts['machine']}, {facts['backend']}, "
        f"{facts['page_size']}-byte pages, seed {options.seed}"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    flat = _one_line(text)
    if len(flat) <= LONGEST_VALUE:
        return flat
    return f"{flat[:LONGEST_VALUE]}... ({len(flat)} characters)"


def _evidence_line(one: Evidence) -> str:
    what = _one_line(one.what)
    if one.holds:
        return f"{what}: {_short(one.got)}, as expected"
    return f"{what}: expected {_short(one.expected)}, got {_short(one.got)}"


def evidence_lines(result: Result) -> list[str]:
    """Say what a check that failed has seen, the rule, and where the kernel has it."""
    lines = [f"rule: {_one_line(result.rule.text)}"]
    seen = [(line, len(list(same))) for line, same in groupby(map(_evidence_line, result.evidence))]
    shown = seen[-MOST_EVIDENCE:]
    if len(shown) < len(seen):
        earlier = sum(times for _, times in seen[:-MOST_EVIDENCE])
        lines.append(f"{earlier} earlier expectations held")
    lines += [line if times == 1 else f"{line}, {times} times" for line, times in shown]
    if result.cause is not Cause.RULE:
        lines.append(_one_line(result.reason))
    lines += note_lines(result)
    lines.append(f"source: {_one_line(result.rule.source)}")
    return lines


def note_lines(result: Result) -> list[str]:
    """Say what a check noted."""
    return [f"noted: {_one_line(name)}: {_short(str(v))}" for name, v in result.notes.items()]


# KTAP


def ktap_header(planned: int, facts: Mapping[str, JsonValue], options: Options) -> list[str]:
    """Return the lines before the first result."""
    return ["KTAP version 1", f"1..{planned}", f"# {KIND}: {host_line(facts, options)}"]


def ktap_result(number: int, result: Result) -> list[str]:
    """Return the lines of one result: diagnostics first, as KTAP has it, then the verdict."""
    id, outcome = result.rule.id, result.outcome
    reason = _short(result.reason)
    if outcome in (Outcome.FAIL, Outcome.XFAIL):
        lines = [f"# {id}: {line}" for line in evidence_lines(result)]
    else:
        lines = [f"# {id}: {line}" for line in note_lines(result)]
    directive = {
        Outcome.SKIP: f" # SKIP {reason}",
        Outcome.XFAIL: f" # XFAIL {reason}",
        Outcome.XPASS: " # XPASS known to fail, and passed",
    }.get(outcome, "")
    if outcome is Outcome.FAIL and result.cause in (Cause.ERROR, Cause.TIMEOUT):
        directive = f" # {result.cause.name} {reason}"
    verdict = "not ok" if outcome is Outcome.FAIL else "ok"
    return [*lines, f"{verdict} {number} {id}{directive}"]


def ktap_footer(results: Sequence[Result], planned: int) -> list[str]:
    """Return the lines after the last result: the count as selftests have it, and the summary."""
    counted = totals(results)
    names = ("pass", "fail", "xfail", "xpass", "skip")
    counts = " ".join(f"{name}:{counted[name]}" for name in names)
    return [
        f"# Totals: {counts} error:0",
        *(f"# {line}".rstrip() for line in summary(results, planned)),
    ]


def ktap(
    results: Sequence[Result], facts: Mapping[str, JsonValue], options: Options, *, planned: int
) -> str:
    """Return a whole run as KTAP; of one that was interrupted, what there is."""
    lines = ktap_header(planned, facts, options)
    for number, result in enumerate(results, start=1):
        lines += ktap_result(number, result)
    lines += ktap_footer(results, planned)
    return "\n".join(lines) + "\n"


# The end


def nothing_checked(results: Sequence[Result]) -> bool:
    """Tell whether no rule was tried: every check was skipped."""
    return all(result.outcome is Outcome.SKIP for result in results)


def _meaning(result: Result) -> str:
    if result.cause is Cause.RULE:
        text = result.rule.meaning or f"this kernel does not keep: {result.rule.text}"
    else:
        text = f"not tried to its end ({result.reason}); nothing is known about: {result.rule.text}"
    return _one_line(text)


def summary(results: Sequence[Result], planned: int, *, width: int = 78) -> list[str]:
    """Say in words how a run ended, and what each failure means to a VMM."""
    counted = totals(results)
    words = {
        "passed": counted["pass"],
        "failed": counted["fail"],
        "failed as known": counted["xfail"],
        "passed though known to fail": counted["xpass"],
        "skipped": counted["skip"],
    }
    said = ", ".join(f"{number} {word}" for word, number in words.items() if number)
    lines = [f"{planned} check{'' if planned == 1 else 's'}: {said or 'none was done'}"]
    if len(results) < planned:
        lines.append(f"interrupted: {planned - len(results)} checks were not done")
    elif results and nothing_checked(results):
        lines.append("NOTHING WAS CHECKED: every check was skipped")

    def block(title: str, chosen: Sequence[tuple[str, str]]) -> None:
        if chosen:
            lines.append(f"{title}:")
        for name, text in chosen:
            lines.append(f"  {name}")
            lines.extend(
                textwrap.wrap(
                    text,
                    width,
                    initial_indent="    ",
                    subsequent_indent="    ",
                    break_on_hyphens=False,
                )
            )

    def those(outcome: Outcome) -> list[Result]:
        return [result for result in results if result.outcome is outcome]

    skips = Counter(_one_line(result.reason) for result in those(Outcome.SKIP))
    block("skipped", [(reason, f"{n} check{'' if n == 1 else 's'}") for reason, n in skips.items()])
    block(
        "known to fail, and passed; --known can go",
        [(result.rule.id, "") for result in those(Outcome.XPASS)],
    )
    block(
        "known failures, and what they mean to a VMM",
        [(result.rule.id, _meaning(result)) for result in those(Outcome.XFAIL)],
    )
    block(
        "failures, and what they mean to a VMM",
        [(result.rule.id, _meaning(result)) for result in those(Outcome.FAIL)],
    )
    return lines
