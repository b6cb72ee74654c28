"""How checks are run: what hangs, dies, raises, forks or expects nothing is not ok, and no more."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmring import KvmUnavailable, System
from kvmring.abi import Cap
from kvmring.checks.process import kvm_held
from kvmring.checks.rules import Rule
from kvmring.checks.run import Cause, Options, Outcome, Result, run
from tests.conftest import open_fds
from tests.gates import needs_kvm

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmring.checks.rules import Trial

pytestmark = needs_kvm()

PATIENCE_S = 100  # for what ends by itself, also under emulation


def make_rule(
    function: Callable[[Trial], None],
    *,
    id: str = "",
    needs: tuple[Cap, ...] = (),
    machine: str | None = None,
    timeout_s: float = 0.0,
) -> Rule:
    return Rule(
        id=id or f"test.{function.__name__}",
        text="",
        source="",
        needs=needs,
        machine=machine,
        timeout_s=timeout_s,
        function=function,
    )


def holds(trial: Trial) -> None:
    trial.expect("one", 1, 1)
    trial.note("pid", os.getpid())


def does_not_hold(trial: Trial) -> None:
    trial.expect("one", 1, 1)
    trial.expect("two", 3, 2)


def expects_nothing(trial: Trial) -> None:
    trial.note("looked", True)


def skips(trial: Trial) -> None:
    trial.expect("one", 1, 1)
    trial.skip("not today")


def hangs(trial: Trial) -> None:
    trial.expect("one", 1, 1)
    signal.pause()


def hangs_deaf(_: Trial) -> None:
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        if number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_IGN)
    while True:
        signal.pause()


def stops(_: Trial) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def is_killed(_: Trial) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(_: Trial) -> None:
    faulthandler.disable()
    ctypes.memset(16, 1, 1)


def exits(_: Trial) -> None:
    os._exit(0)


def raises_exit(_: Trial) -> None:
    sys.exit(0)


def raises(trial: Trial) -> None:
    trial.expect("one", 1, 1)
    raise LookupError("no\nsuch page")


def call_fails(trial: Trial) -> None:
    trial.vm().create_vcpu(1 << 20)


def prints(trial: Trial) -> None:
    print("ok 1 forged", flush=True)
    os.write(1, b"ok 2 forged\n")
    trial.expect("one", 1, 1)


def leaves_a_child(trial: Trial) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    trial.expect("one", 1, 1)
    trial.note("child", child)


def dies_and_leaves_a_child(_: Trial) -> None:
    if os.fork() == 0:
        signal.pause()
    os.kill(os.getpid(), signal.SIGKILL)


def comes_back_twice(trial: Trial) -> None:
    child = os.fork()
    if child == 0:
        trial.expect("in the child", 1, 2)  # raises, out of the check
    os.waitpid(child, 0)
    trial.expect("one", 1, 1)


def leaves_a_thread(trial: Trial) -> None:
    threading.Thread(target=signal.pause).start()
    trial.expect("one", 1, 1)


def sends_what_cannot_be_sent(trial: Trial) -> None:
    trial.expect("one", 1, 1)
    trial.notes["thread"] = threading.Lock()  # type: ignore[assignment]


def is_one_of_many(trial: Trial) -> None:
    trial.expect("forks of one process share no random numbers", 1, 1)
    trial.note("random", trial.random.random())


EXPECTED = {
    holds: (Outcome.PASS, Cause.NONE, ""),
    does_not_hold: (Outcome.FAIL, Cause.RULE, "two: expected 2, got 3"),
    expects_nothing: (Outcome.FAIL, Cause.ERROR, "expected nothing"),
    skips: (Outcome.SKIP, Cause.NONE, "not today"),
    hangs: (Outcome.FAIL, Cause.TIMEOUT, "not done after 0.5 s"),
    hangs_deaf: (Outcome.FAIL, Cause.TIMEOUT, "not done after 0.5 s"),
    stops: (Outcome.FAIL, Cause.TIMEOUT, "not done after 0.5 s"),
    is_killed: (Outcome.FAIL, Cause.ERROR, "ended early, by SIGKILL"),
    crashes: (Outcome.FAIL, Cause.ERROR, "ended early, by SIGSEGV"),
    exits: (Outcome.FAIL, Cause.ERROR, "ended early, by exit status 0"),
    raises_exit: (Outcome.FAIL, Cause.ERROR, "ended early, by exit status 1"),
    raises: (Outcome.FAIL, Cause.ERROR, "LookupError: no\nsuch page (test_check_run.py, line"),
    call_fails: (Outcome.FAIL, Cause.ERROR, "a call that should work failed: KVM_CREATE_VCPU"),
    prints: (Outcome.PASS, Cause.NONE, ""),
    leaves_a_child: (Outcome.FAIL, Cause.ERROR, "left a process behind"),
    dies_and_leaves_a_child: (Outcome.FAIL, Cause.ERROR, "ended early, by SIGKILL"),
    comes_back_twice: (Outcome.PASS, Cause.NONE, ""),
    leaves_a_thread: (Outcome.PASS, Cause.NONE, ""),
    sends_what_cannot_be_sent: (Outcome.FAIL, Cause.ERROR, "ended early, by exit status 1"),
}


def children() -> set[int]:
    """List this process's children, zombies included."""
    return {int(pid) for pid in Path("/proc/thread-self/children").read_text().split()}


def run_all(rules: list[Rule], options: Options) -> dict[str, Result]:
    before = children()
    done = {result.rule.id: result for result in run(rules, options)}
    assert children() <= before, "every process was reaped"
    assert set(done) == {rule.id for rule in rules}, "each check has a result"
    return done


@pytest.mark.parametrize("jobs", [1, 4])
def test_each_check_gets_its_verdict_whatever_the_others_do(
    jobs: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rules = [
        make_rule(function, timeout_s=0 if cause is Cause.TIMEOUT else PATIENCE_S)
        for function, (_, cause, _) in EXPECTED.items()
    ]
    done = run_all(rules, Options(jobs=jobs, timeout_s=0.5))
    for function, (outcome, cause, reason) in EXPECTED.items():
        result = done[f"test.{function.__name__}"]
        assert (result.outcome, result.cause) == (outcome, cause), result
        assert reason in result.reason, result
    assert "forged" not in capfd.readouterr().out, "what a check prints is no part of the report"
    child = done["test.leaves_a_child"].notes["child"]
    assert not Path(f"/proc/{child}").exists() or zombie(int(child)), "it was killed"
    assert [one.holds for one in done["test.does_not_hold"].evidence] == [True, False]


def zombie(pid: int) -> bool:
    """Tell whether a process has ended; whoever inherited it has to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_check_may_ask_for_more_time() -> None:
    def slow(trial: Trial) -> None:
        threading.Event().wait(0.6)
        trial.expect("one", 1, 1)

    rules = [
        make_rule(slow, id="test.patient", timeout_s=PATIENCE_S),
        make_rule(slow, id="test.hasty"),
    ]
    done = run_all(rules, Options(timeout_s=0.3))
    assert done["test.patient"].outcome is Outcome.PASS
    assert done["test.hasty"].cause is Cause.TIMEOUT


def test_known_failures_are_marked_and_nothing_else_is() -> None:
    functions = (holds, does_not_hold, skips, is_killed)
    rules = [make_rule(function) for function in functions]
    ids = [rule.id for rule in rules]
    done = run_all(rules, Options(known=ids))
    assert [done[id].outcome for id in ids] == [
        Outcome.XPASS,
        Outcome.XFAIL,
        Outcome.SKIP,
        Outcome.XFAIL,
    ]
    assert done[ids[1]].evidence
    done = run_all(rules, Options(known=[ids[0]]))
    assert done[ids[1]].outcome is Outcome.FAIL


def test_what_the_host_lacks_is_a_skip_that_says_so() -> None:
    rules = [
        make_rule(holds, id="test.cap", needs=(Cap.DIRTY_LOG_RING, Cap(166))),
        make_rule(holds, id="test.machine", machine="vax"),
    ]
    done = run_all(rules, Options())
    assert done["test.cap"].outcome is Outcome.SKIP
    assert "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT" in done["test.cap"].reason
    assert done["test.machine"].outcome is Outcome.SKIP
    assert "vax" in done["test.machine"].reason


def test_random_choices_come_from_the_seed_and_the_id() -> None:
    rules = [make_rule(is_one_of_many, id=f"test.{i}") for i in range(3)]
    first = run_all(rules, Options(seed=1, jobs=3))
    again = run_all(rules, Options(seed=1))
    other = run_all(rules, Options(seed=2))
    values = [[done[rule.id].notes["random"] for rule in rules] for done in (first, again, other)]
    assert values[0] == values[1]
    assert len({*values[0], *values[2]}) == 6


def test_checks_run_at_the_same_time_and_each_in_its_own_process() -> None:
    there, back = os.pipe(), os.pipe()

    def meet(ours: int, theirs: int) -> Callable[[Trial], None]:
        def function(trial: Trial) -> None:
            os.write(ours, b"x")  # each waits for the other one
            trial.expect("what the other one wrote", os.read(theirs, 1), b"x")
            trial.note("pid", os.getpid())

        return function

    try:
        rules = [
            make_rule(meet(there[1], back[0]), id="test.a"),
            make_rule(meet(back[1], there[0]), id="test.b"),
        ]
        done = run_all(rules, Options(jobs=2, timeout_s=PATIENCE_S))
    finally:
        for fd in (*there, *back):
            os.close(fd)
    assert [result.outcome for result in done.values()] == [Outcome.PASS] * 2
    assert len({os.getpid(), *(result.notes["pid"] for result in done.values())}) == 3


def test_leaving_early_ends_what_still_runs() -> None:
    before = children()
    rules = [make_rule(holds), make_rule(hangs), make_rule(hangs_deaf)]
    running = run(rules, Options(jobs=3, timeout_s=60))
    assert next(running).rule.id == "test.holds"
    assert len(children() - before) >= 2
    running.close()
    assert children() <= before


def test_the_parent_never_opens_kvm() -> None:
    before = open_fds()
    seen: dict[int, str] = {}

    def look(_: Rule) -> None:
        seen.update(open_fds())

    with kvm_held("/dev/kvm"):
        look(make_rule(holds))
        for result in run([make_rule(holds), make_rule(call_fails)], Options(), started=look):
            look(result.rule)
    new = [what for fd, what in seen.items() if before.get(fd) != what]
    assert new, "pipes, at least"
    assert not [what for what in new if "kvm" in what]


def test_a_vm_is_held_as_long_as_checks_run() -> None:
    before = children()
    with kvm_held("/dev/kvm"):
        (holder,) = children() - before
        links = [os.readlink(path) for path in Path(f"/proc/{holder}/fd").iterdir()]
        assert "anon_inode:kvm-vm" in links
    assert children() <= before


@pytest.mark.parametrize("device", ["/dev/null", "/nonexistent"])
def test_without_kvm_holding_it_says_what_opening_it_says(device: str) -> None:
    before = children()
    with pytest.raises(KvmUnavailable) as expected:
        System(device)
    with pytest.raises(KvmUnavailable) as caught, kvm_held(device):
        pass
    assert str(caught.value) == str(expected.value)
    assert children() <= before


def test_the_held_vm_goes_when_its_parent_is_killed() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with kvm_held("/dev/kvm"):
            (holder,) = children()
            os.write(write, b"%d" % holder)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    holder = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    deadline = time.monotonic() + PATIENCE_S
    while not zombie(holder):
        assert time.monotonic() < deadline
