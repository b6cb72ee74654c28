"""Run checks: each in a process of its own, with a time limit, several at a time.

The processes are forked from one that has never opened KVM, so a check inherits nothing, and
starting one costs milliseconds also where Python starts slowly. A check that hangs, is killed,
leaves a process behind or wedges a vCPU has failed; the others go on.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import pickle
import signal
import time
import traceback
from dataclasses import dataclass, field, replace
from enum import Enum
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from kvmring.checks.process import END_WAIT_S, LEFT_WAIT_S, Process, fork, undisturbed
from kvmring.checks.rules import RULES, Evidence, Failed, Rule, Skipped, Trial, missing
from kvmring.errors import KvmError
from kvmring.system import System

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Sequence

__all__ = ["Cause", "Options", "Outcome", "Result", "known_ids", "run", "select"]

Notes = dict[str, str | int | float | bool]


class Outcome(Enum):
    """What became of a check."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    XFAIL = "xfail"  # failed, and was known to
    XPASS = "xpass"  # was known to fail, and passed


class Cause(Enum):
    """Why a check failed: the rule does not hold, or the check was not brought to its end."""

    NONE = ""
    RULE = "rule"
    ERROR = "error"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check's result.

    Attributes:
        rule: The rule.
        outcome: What became of it.
        cause: Of a failure, also of a known one.
        reason: Why it was skipped, or how it failed; empty when it passed.
        evidence: Every expectation, in order; of a broken rule the last one does not hold.
        notes: Figures and observations of the check.
        seconds: How long it took.
    """

    rule: Rule
    outcome: Outcome
    cause: Cause = Cause.NONE
    reason: str = ""
    evidence: tuple[Evidence, ...] = ()
    notes: Notes = field(default_factory=dict)
    seconds: float = 0.0


_Answer = tuple[Outcome, Cause, str, tuple[Evidence, ...], Notes, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run.

    Attributes:
        device: The KVM device.
        jobs: How many checks at a time.
        timeout_s: The time limit of one check; one that needs more has its own.
        seed: Of the checks' random choices.
        known: Ids of checks whose failure is known.
    """

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
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        found = {
            id
            for id in RULES
            if fnmatch.fnmatchcase(id, pattern) or id.startswith(f"{pattern.removesuffix('.')}.")
        }
        if not found:
            raise ValueError(f"no check is called {pattern}; `kvmring check --list` names them")
        chosen |= found
    return [rule for rule in RULES.values() if rule.id in chosen]


def known_ids(ids: Sequence[str]) -> frozenset[str]:
    """Return the ids of failures that are known; one that names no check is refused.

    Raises:
        ValueError: There is no such check.
    """
    for id in ids:
        if id not in RULES:
            raise ValueError(f"--known {id}: no check has this id; `kvmring check --list` does")
    return frozenset(ids)


# In the check's process


def _try(rule: Rule, options: Options) -> Result:
    """Try one rule, in this process."""
    begin = time.monotonic()
    evidence: list[Evidence] = []
    notes: Notes = {}
    outcome, cause, reason = Outcome.FAIL, Cause.ERROR, ""
    try:
        with System(options.device) as kvm:
            lacking = missing(rule, kvm)
            if lacking:
                raise Skipped(lacking)
            trial = Trial(kvm, f"{options.seed}/{rule.id}", evidence, notes)
            rule.function(trial)
        if evidence:
            outcome, cause = Outcome.PASS, Cause.NONE
        else:
            reason = "the check expected nothing"
    except Skipped as skipped:
        outcome, cause, reason = Outcome.SKIP, Cause.NONE, str(skipped)
    except Failed as failed:
        cause, reason = Cause.RULE, str(failed)
    except KvmError as error:
        reason = f"a call that should work failed: {error}{_where(error)}"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}{_where(error)}"
    return Result(
        rule=rule,
        outcome=outcome,
        cause=cause,
        reason=reason,
        evidence=tuple(evidence),
        notes=notes,
        seconds=time.monotonic() - begin,
    )


def _where(error: Exception) -> str:
    """Name the place in the check that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.name != "_try"]
    if not own:
        return ""
    return f" ({os.path.basename(own[0].filename)}, line {own[0].lineno})"


def _check(rule: Rule, options: Options, pipe: Connection[_Answer, None]) -> None:
    """Be a check's process."""
    me = os.getpid()
    result = _try(rule, options)
    if os.getpid() != me:
        return  # a child of the check that came back out of it; its parent reports
    pipe.send(
        (
            result.outcome,
            result.cause,
            result.reason,
            result.evidence,
            result.notes,
            result.seconds,
        )
    )


# In the parent


@dataclass(slots=True)
class _Running:
    rule: Rule
    process: Process
    pipe: Connection[None, _Answer]
    begin: float
    limit: float

    def result(self) -> Result:
        """Take what it sent, or find out how it ended."""
        if not self.pipe.poll(0):
            return self._died()  # and a process that it forked holds the pipe open
        try:
            outcome, cause, reason, evidence, notes, seconds = self.pipe.recv()
        except EOFError:
            return self._died()
        except (OSError, pickle.UnpicklingError, ValueError, TypeError) as error:
            return self._failed(Cause.ERROR, f"the check's answer could not be read: {error}")
        result = Result(
            rule=self.rule,
            outcome=outcome,
            cause=cause,
            reason=reason,
            evidence=evidence,
            notes=notes,
            seconds=seconds,
        )
        left = self._left()
        if left and outcome is not Outcome.FAIL:
            result = replace(result, outcome=Outcome.FAIL, cause=Cause.ERROR, reason=left)
        return result

    def _left(self) -> str:
        """Say what a check that is done has left behind; nothing is the rule."""
        if not self.process.wait(END_WAIT_S):
            return "its process does not end: a vCPU may be wedged"
        # The pipe's other end was inherited by whatever the check forked.
        if not self.pipe.poll(LEFT_WAIT_S):
            return "the check left a process behind"
        return ""

    def _died(self) -> Result:
        self.process.reap()
        status = self.process.status
        how = f"exit status {status}"
        if status < 0:
            try:
                how = signal.Signals(-status).name
            except ValueError:
                how = f"signal {-status}"
        return self._failed(Cause.ERROR, f"the check's process ended early, by {how}")

    def overdue(self) -> Result:
        """End it, and say so."""
        left = "" if self.process.reap() else "; it cannot be killed: a vCPU may be wedged"
        return self._failed(Cause.TIMEOUT, f"not done after {self.limit:g} s{left}")

    def _failed(self, cause: Cause, reason: str) -> Result:
        return Result(
            rule=self.rule,
            outcome=Outcome.FAIL,
            cause=cause,
            reason=reason,
            seconds=time.monotonic() - self.begin,
        )

    def close(self) -> None:
        """Leave nothing behind."""
        self.process.reap()
        self.pipe.close()


def _start(rule: Rule, options: Options) -> _Running:
    process, pipe = fork(functools.partial(_check, rule, options))
    limit = max(options.timeout_s, rule.timeout_s)
    return _Running(rule, process, pipe, time.monotonic(), limit)


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
) -> Generator[Result, None, None]:
    """Run rules and give each one's Result as soon as it is done, in any order.

    Close the generator when it is left early: that ends what still runs.

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
                with undisturbed():
                    running.append(_start(found, options))
            now = time.monotonic()
            soonest = min(one.begin + one.limit for one in running)
            # the pipe for the answer; the process for an end without one
            looked_at = [end for one in running for end in (one.pipe, one.process.fd)]
            ready = wait(looked_at, max(0.0, soonest - now))
            now = time.monotonic()
            for one in list(running):
                if one.pipe in ready or one.process.fd in ready:
                    result = one.result()
                elif now >= one.begin + one.limit:
                    result = one.overdue()
                else:
                    continue
                one.close()
                running.remove(one)
                yield _judged(result, options.known)
    finally:
        for one in running:
            one.close()
