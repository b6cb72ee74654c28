"""`kvmring check` as a user meets it: what it prints, its files, its exit status, interrupted.

Fast checks of the suite are used; the whole suite runs once, and somebody else's parser reads it.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvmring.checks  # noqa: F401
from kvmring import cli
from kvmring.checks import results
from kvmring.checks.rules import RULES, Rule
from kvmring.checks.run import Outcome, select
from tests.gates import needs_kvm

if TYPE_CHECKING:
    from kvmring.checks.rules import Trial

pytestmark = [needs_kvm(), pytest.mark.timeout(1600)]

# A kernel since Linux 6.17 loses pages here, and the check says so.
KERNELS_OWN = "signals.reset_loss"
QUICK = "caps"
# Emulated hosts take thirty times as long.
TIMEOUT_S = 1500


def kvmring_(*args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "kvmring", "check", *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "COLUMNS": "80", **settings},
    )


@cache
def whole_run() -> tuple[int, str, dict[str, str]]:
    """Run the whole suite once: status, KTAP, and the outcome of each check."""
    done = kvmring_()
    assert "Traceback" not in done.stderr, done.stderr
    verdicts = {}
    for line in done.stdout.splitlines():
        found = re.fullmatch(r"(ok|not ok) \d+ (\S+)(?: # (\w+).*)?", line)
        if found:
            verdicts[found[2]] = found[3] or found[1]
    return done.returncode, done.stdout, verdicts


def test_the_whole_suite_holds_on_this_host() -> None:
    status, text, verdicts = whole_run()
    assert list(verdicts) == list(RULES), "all, in the order of the plan"
    failed = {id for id, verdict in verdicts.items() if verdict not in ("ok", "SKIP")}
    assert failed <= {KERNELS_OWN}, text
    assert status == (1 if failed else 0)
    assert "ok" in verdicts.values()


def test_a_parser_of_others_reads_the_ktap_without_complaint() -> None:
    parser = pytest.importorskip("tap.parser", reason="tap.py is not there").Parser()
    _, text, verdicts = whole_run()
    # TAP's version line is all that KTAP has differently: Documentation/dev-tools/ktap.rst
    assert text.startswith("KTAP version 1\n")
    lines = list(parser.parse_text(text.replace("KTAP version 1", "TAP version 13", 1)))
    assert {line.category for line in lines} == {"version", "plan", "diagnostic", "test"}
    (plan,) = (line for line in lines if line.category == "plan")
    tests = [line for line in lines if line.category == "test"]
    assert plan.expected_tests == len(tests) == len(RULES)
    assert [test.number for test in tests] == list(range(1, len(tests) + 1))
    assert [test.description for test in tests] == list(RULES)
    for test in tests:
        assert test.skip == (verdicts[test.description] == "SKIP")
        assert test.ok == (verdicts[test.description] in ("ok", "SKIP"))
        assert not test.skip or test.directive.reason


def test_json_is_the_same_run_as_a_document(tmp_path: Path) -> None:
    done = kvmring_(QUICK, "--json", "--seed", "5")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert document["seed"] == 5
    assert document["host"]["kernel"] == os.uname().release
    rules = select([QUICK])
    assert [entry["id"] for entry in document["results"]] == [rule.id for rule in rules]
    assert document["planned"] == len(rules) == sum(document["totals"].values())
    for entry in document["results"]:
        assert entry["source"] == RULES[entry["id"]].source
        assert entry["outcome"] != "pass" or all(one["holds"] for one in entry["evidence"])
        assert entry["outcome"] != "pass" or entry["evidence"]
    assert kvmring_(QUICK, "--format", "json", "--seed", "5").returncode == 0


def test_the_list_names_rule_source_and_needs_of_each() -> None:
    done = kvmring_("--list", "--device", "/nonexistent")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    ids = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert ids == list(RULES)
    for field in ("rule:", "source:", "needs:"):
        assert done.stdout.count(f"\n  {field} ") == len(RULES)
    listed = json.loads(kvmring_("--list", "--json", "fork").stdout)
    assert [check["id"] for check in listed["checks"]] == [rule.id for rule in select(["fork"])]


def test_text_fits_80_columns() -> None:
    done = kvmring_(QUICK, "--format", "text", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout
    assert len([line for line in lines if line.startswith("PASS ")]) >= 3
    assert re.search(rf"^{len(select([QUICK]))} checks: \d+ passed", done.stdout, re.M)


def test_jobs_change_nothing_but_the_time() -> None:
    def verdicts(*args: str) -> list[str]:
        done = kvmring_(QUICK, "fork", *args)
        assert done.returncode == 0, done.stdout
        return [line for line in done.stdout.splitlines() if re.match("(not )?ok ", line)]

    assert verdicts("--jobs", "4") == verdicts()


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("nonsense",), 2, "--list"),
        (("--known", "fork"), 2, "--list"),
        (("--jobs", "0"), 2, "--jobs must lie between 1 and 256"),
        (("--timeout", "0"), 2, "--timeout must be more than 0"),
        (("--timeout", "nan"), 2, "--timeout"),
        (("--format", "yaml"), 2, "invalid choice"),
        (("--json", "--format", "ktap"), 2, "contradict"),
        (("--list", "--compare", "a", "b"), 2, "not allowed with"),
        (("--compare", "a.json", "b.json"), 2, "a.json: No such file"),
        (("--compare", "a.json", "b.json", "fork"), 2, "nothing else"),
        (("--output", "/dev/null/x"), 2, "--output"),
        (("--device", "/dev/null"), 3, "not KVM"),
        (("--device", "/nonexistent"), 3, "no such device"),
    ],
)
def test_bad_input_is_one_line_and_a_status(args: tuple[str, ...], status: int, words: str) -> None:
    done = kvmring_(*args)
    assert done.returncode == status
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvmring")
    assert words in last
    assert "Traceback" not in done.stderr


# Rules of the test's own, in this process


def passes(trial: Trial) -> None:
    trial.expect("one", 1, 1)


def fails(trial: Trial) -> None:
    trial.expect("pages logged", 4, 5)


def skips(trial: Trial) -> None:
    trial.skip("not on this host")


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put three rules in the place of the suite's."""
    found = {
        f"own.{function.__name__}": Rule(
            id=f"own.{function.__name__}",
            text="it does what its name says",
            source="virt/kvm/x.c, f()",
            meaning="the VMM loses pages" if function is fails else "",
            function=function,
        )
        for function in (passes, fails, skips)
    }
    monkeypatch.setattr("kvmring.checks.run.RULES", found)


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize(
    ("args", "status"),
    [
        ((), 1),
        (("own.passes",), 0),
        (("own.passes", "own.skips"), 0),
        (("own.fails", "--known", "own.fails"), 0),
        (("own.passes", "--known", "own.passes"), 0),
        (("own.passes", "own.fails", "--known", "own.passes"), 1),
        (("own.skips",), 3),
        (("own.skips", "--known", "own.skips"), 3),
    ],
)
def test_the_exit_status_says_how_it_ended(
    args: tuple[str, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", *args]) == status
    shown = capsys.readouterr()
    assert ("nothing was checked" in shown.err) == (status == 3)
    assert ("NOTHING WAS CHECKED" in shown.out) == (status == 3)


@pytest.mark.usefixtures("own_rules")
def test_a_failure_is_shown_with_its_evidence_and_its_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["check", "--format", "text"]) == 1
    out = capsys.readouterr().out
    for words in (
        "FAIL  own.fails",
        "pages logged: expected 5, got 4",
        "rule: it does what its name says",
        "source: virt/kvm/x.c, f()",
        "SKIP  own.skips",
        "3 checks: 1 passed, 1 failed, 1 skipped",
        "failures, and what they mean to a VMM:\n  own.fails\n    the VMM loses pages\n",
    ):
        assert words in out, words
    assert cli.main(["check", "--known", "own.fails", "--known", "own.passes"]) == 0
    out = capsys.readouterr().out
    assert "ok 2 own.fails # XFAIL pages logged: expected 5, got 4\n" in out
    assert "known to fail, and passed; --known can go:\n#   own.passes\n" in out


@pytest.mark.usefixtures("own_rules")
def test_output_writes_three_files_and_compare_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert cli.main(["check", "--output", str(a)]) == 1
    printed = capsys.readouterr().out
    assert (a / "results.ktap").read_text() == printed
    assert cli.main(["check", "--json", "--output", str(b), "own.passes", "own.skips"]) == 0
    assert json.loads(capsys.readouterr().out) == results.read(str(b / "results.json"))
    files = [str(place / "results.json") for place in (a, b)]
    assert cli.main(["check", "--compare", files[0], files[0]]) == 0
    assert "no outcome and nothing noted differs" in capsys.readouterr().out
    assert cli.main(["check", "--compare", *files]) == 1
    out = capsys.readouterr().out
    assert re.search(r"own\.fails +outcome +fail +-", out)
    assert "own.passes" not in out
    assert cli.main(["check", "--compare", *files, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["same"] is False
    assert document["differences"] == [
        {"id": "own.fails", "what": "outcome", "a": "fail", "b": None, "figure": False}
    ]
    host = json.loads((a / "host.json").read_text())
    assert host["kernel"] == os.uname().release
    (a / "results.json").write_text("{}")
    assert cli.main(["check", "--output", str(a)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "", "before anything was run"
    assert "another directory" in shown.err


# Interrupted, and on a terminal


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvmring", "check", "--output", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("ok "):
            assert line, "it has begun"
        started = children(process.pid)
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert err == "kvmring: interrupted\n"
    assert started, "the process that holds a VM, at least"
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline
    assert "interrupted: " in out
    document = results.read(str(tmp_path / "results.json"))
    entries = document["results"]
    assert isinstance(entries, list)
    assert 0 < len(entries) < len(RULES)
    assert document["planned"] == len(RULES)


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    command = [sys.executable, "-m", "kvmring", "check", "caps"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait(timeout=TIMEOUT_S)
    assert stderr == b""
    assert process.returncode == 1


@pytest.mark.parametrize("settings", [{}, {"NO_COLOR": "1"}])
def test_on_a_terminal_there_is_a_table_and_progress(settings: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x28\x00\x50\x00\x00\x00\x00\x00")
    command = [sys.executable, "-m", "kvmring", "check", QUICK]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **settings}
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, stdin=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
            shown += piece
        os.close(ours)
        process.wait(timeout=TIMEOUT_S)
    assert process.returncode == 0
    text = shown.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    number = len(select([QUICK]))
    assert f"{number}/{number}" in plain, "the progress"
    assert f"{number} checks: " in plain
    assert "PASS  caps." in plain
    assert not plain.startswith("KTAP")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is back"
    assert ("\x1b[32m" in text) == (not settings), "colours, or none"


def test_help_names_every_option_and_every_status() -> None:
    done = kvmring_("--help")
    assert done.returncode == 0
    for word in (
        *("--list", "--format", "--jobs", "--timeout", "--seed", "--known", "--output"),
        *("--compare", "--json", "--device", "PATTERN", "Exit status", "130"),
    ):
        assert word in done.stdout, word


def test_outcomes_have_words() -> None:
    assert {outcome.value for outcome in Outcome} == {"pass", "fail", "skip", "xfail", "xpass"}
