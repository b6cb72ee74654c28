"""Run checks: each in a process of its own, with a time limit, several at a time.

The processes are forked from one that has never opened KVM, so a check inherits nothing, and
starting one costs milliseconds also where Python starts slowly. A check that hangs, is killed or
leaves its vCPU wedged has failed; the others go on.
"""

from __future__ import annotations

import fnmatch
import multiprocessing
import os
import signal
import time
import traceback
from dataclasses import dataclass, field, replace
from enum import Enum
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from kvmring.checks.rules import RULES, Evidence, Failed, Rule, Skipped, Trial, missing
from kvmring.errors import KvmError
from kvmring.system import System

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from multiprocessing.context import ForkProcess

__all__ = ["Options", "Outcome", "Result", "run", "select"]

KILL_WAIT_S = 5.0

Notes = dict[str, str | int | float | bool]


class Outcome(Enum):
    """What became of a check."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    XFAIL = "xfail"  # failed, and was known to
    XPASS = "xpass"  # was known to fail, and passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check's result.

    Attributes:
        rule: The rule.
        outcome: What became of it.
        reason: Why it was skipped, or how it failed; empty when it passed.
        evidence: Every expectation, in order; of a failure the last one does not hold.
        notes: Figures and observations of the check.
        seconds: How long it took.
    """

    rule: Rule
    outcome: Outcome
    reason: str = ""
    evidence: tuple[Evidence, ...] = ()
    notes: Notes = field(default_factory=dict)
    seconds: float = 0.0


_Answer = tuple[Outcome, str, tuple[Evidence, ...], Notes, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run: the device, how many at a time, the time limit of one check, the seed."""

    device: str = "/dev/kvm"
    jobs: int = 1
    timeout_s: float = 20.0
    seed: int = 0
    known: Collection[str] = ()


def select(patterns: Sequence[str]) -> list[Rule]:
    """Return the rules that any pattern names: an id, a group, or a shell pattern.

    Raises:
        ValueError: A pattern that names none.
    """
    chosen: dict[str, Rule] = {}
    for pattern in patterns or ["*"]:
        found = [
            rule
            for rule in RULES.values()
            if fnmatch.fnmatchcase(rule.id, pattern) or rule.id.startswith(f"{pattern}.")
        ]
        if not found:
            raise ValueError(f"no check is called {pattern}; `kvmring check --list` names them")
        chosen |= {rule.id: rule for rule in found}
    return [rule for rule in RULES.values() if rule.id in chosen]


def _try(rule: Rule, options: Options) -> Result:
    """Try one rule, in this process."""
    begin = time.monotonic()
    evidence: list[Evidence] = []
    notes: Notes = {}
    outcome, reason = Outcome.PASS, ""
    try:
        with System(options.device) as kvm:
            lacking = missing(rule, kvm)
            if lacking:
                raise Skipped(lacking)
            trial = Trial(kvm, f"{options.seed}/{rule.id}", evidence, notes)
            rule.function(trial)
        if not evidence:
            outcome, reason = Outcome.FAIL, "the check expected nothing"
    except Skipped as skipped:
        outcome, reason = Outcome.SKIP, str(skipped)
    except Failed as failed:
        outcome, reason = Outcome.FAIL, str(failed)
    except KvmError as error:
        outcome, reason = Outcome.FAIL, f"a call that should work failed: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        outcome = Outcome.FAIL
    return Result(
        rule=rule,
        outcome=outcome,
        reason=reason,
        evidence=tuple(evidence),
        notes=notes,
        seconds=time.monotonic() - begin,
    )


def _child(rule_id: str, options: Options, pipe: Connection[_Answer, None]) -> None:
    os.setpgid(0, 0)  # what the check forks ends with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = _try(RULES[rule_id], options)
    answer: _Answer = (
        result.outcome,
        result.reason,
        result.evidence,
        result.notes,
        result.seconds,
    )
    pipe.send(answer)
    pipe.close()
    # Not through interpreter shutdown: a check's threads may be inside KVM_RUN.
    os._exit(0)


@dataclass(slots=True)
class _Running:
    rule: Rule
    process: ForkProcess
    pipe: Connection[None, _Answer]
    begin: float
    limit: float

    def result(self) -> Result:
        """Take what it sent, or find out how it died."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join(KILL_WAIT_S)
            code = self.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            return self._failed(f"the check's process ended early, by {how}")
        except OSError as error:
            return self._failed(f"the check's answer could not be read: {error}")
        outcome, reason, evidence, notes, seconds = answer
        return Result(
            rule=self.rule,
            outcome=outcome,
            reason=reason,
            evidence=evidence,
            notes=notes,
            seconds=seconds,
        )

    def overdue(self) -> Result:
        """End it, and say so."""
        left = "" if self._end() else "; its process cannot be killed: a vCPU may be wedged"
        return self._failed(f"not done after {self.limit:g} s{left}")

    def _failed(self, reason: str) -> Result:
        return Result(
            rule=self.rule,
            outcome=Outcome.FAIL,
            reason=reason,
            seconds=time.monotonic() - self.begin,
        )

    def _end(self) -> bool:
        pid = self.process.pid
        if pid is not None:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()
        self.process.join(KILL_WAIT_S)
        return self.process.exitcode is not None

    def close(self) -> None:
        """Leave nothing behind."""
        self._end()
        self.pipe.close()


def _start(rule: Rule, options: Options) -> _Running:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(rule.id, options, theirs), daemon=False)
    process.start()
    theirs.close()
    limit = max(options.timeout_s, rule.timeout_s)
    return _Running(rule, process, ours, time.monotonic(), limit)


def _judged(result: Result, known: Collection[str]) -> Result:
    if result.rule.id not in known or result.outcome is Outcome.SKIP:
        return result
    outcome = Outcome.XFAIL if result.outcome is Outcome.FAIL else Outcome.XPASS
    return replace(result, outcome=outcome)


def run(
    rules: Sequence[Rule],
    options: Options,
    *,
    started: Callable[[Rule], None] = lambda rule: None,
) -> Iterator[Result]:
    """Run rules and give each one's Result as soon as it is done, in any order.

    Args:
        rules: From select().
        options: How.
        started: Called when a check begins.
    """
    waiting = list(rules)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                found = waiting.pop(0)
                started(found)
                running.append(_start(found, options))
            now = time.monotonic()
            soonest = min(one.begin + one.limit for one in running)
            ready = wait([one.pipe for one in running], max(0.0, soonest - now))
            now = time.monotonic()
            for one in list(running):
                if one.pipe in ready:
                    result = one.result()
                elif now >= one.begin + one.limit:
                    result = one.overdue()
                else:
                    continue
                running.remove(one)
                one.close()
                yield _judged(result, options.known)
    finally:
        for one in running:
            one.close()
