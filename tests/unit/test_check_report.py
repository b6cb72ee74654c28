"""What `kvmring check` says, from results made by hand: KTAP, summary, documents, comparison."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from kvmring.abi import Cap
from kvmring.checks import report, results
from kvmring.checks.rules import RULES, Evidence, Rule
from kvmring.checks.run import Cause, Options, Outcome, Result, known_ids, select

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmring.checks.rules import Trial
    from kvmring.facts import JsonValue

FACTS: dict[str, JsonValue] = {
    "kernel": "6.1.0",
    "machine": "x86_64",
    "backend": "kvm_amd",
    "page_size": 4096,
}
OPTIONS = Options(seed=7)


def nothing(_: Trial) -> None:
    """Stand for a check's function."""


def make_rule(id: str, text: str = "it is so", *, meaning: str = "") -> Rule:
    return Rule(id=id, text=text, source="virt/kvm/x.c, f()", meaning=meaning, function=nothing)


def seen(what: str, expected: str, got: str) -> Evidence:
    return Evidence(what=what, expected=expected, got=got, holds=expected == got)


def passed(id: str) -> Result:
    return Result(rule=make_rule(id), outcome=Outcome.PASS, evidence=(seen("x", "1", "1"),))


def broken(id: str, *, outcome: Outcome = Outcome.FAIL, meaning: str = "") -> Result:
    return Result(
        rule=make_rule(id, "5 comes back", meaning=meaning),
        outcome=outcome,
        cause=Cause.RULE,
        reason="count: expected 5, got 4",
        evidence=(seen("errno", "EINVAL", "EINVAL"), seen("count", "5", "4")),
        notes={"tries": 3},
    )


def skipped(id: str, reason: str = "this KVM lacks KVM_CAP_X") -> Result:
    return Result(rule=make_rule(id), outcome=Outcome.SKIP, reason=reason)


def test_ktap_is_exactly_this() -> None:
    done = [
        passed("a.one"),
        broken("a.two", meaning="pages are lost"),
        skipped("b.one"),
        broken("b.two", outcome=Outcome.XFAIL),
        Result(rule=make_rule("b.three"), outcome=Outcome.XPASS),
        Result(
            rule=make_rule("c.hang"),
            outcome=Outcome.FAIL,
            cause=Cause.TIMEOUT,
            reason="not done after 2 s",
        ),
    ]
    assert report.ktap(done, FACTS, OPTIONS, planned=6) == (
        "KTAP version 1\n"
        "1..6\n"
        "# kvmring check: Linux 6.1.0 x86_64, kvm_amd, 4096-byte pages, seed 7\n"
        "ok 1 a.one\n"
        "# a.two: rule: 5 comes back\n"
        "# a.two: errno: EINVAL, as expected\n"
        "# a.two: count: expected 5, got 4\n"
        "# a.two: noted: tries: 3\n"
        "# a.two: source: virt/kvm/x.c, f()\n"
        "not ok 2 a.two\n"
        "ok 3 b.one # SKIP this KVM lacks KVM_CAP_X\n"
        "# b.two: rule: 5 comes back\n"
        "# b.two: errno: EINVAL, as expected\n"
        "# b.two: count: expected 5, got 4\n"
        "# b.two: noted: tries: 3\n"
        "# b.two: source: virt/kvm/x.c, f()\n"
        "ok 4 b.two # XFAIL count: expected 5, got 4\n"
        "ok 5 b.three # XPASS known to fail, and passed\n"
        "# c.hang: rule: it is so\n"
        "# c.hang: not done after 2 s\n"
        "# c.hang: source: virt/kvm/x.c, f()\n"
        "not ok 6 c.hang # TIMEOUT not done after 2 s\n"
        "# Totals: pass:1 fail:2 xfail:1 xpass:1 skip:1 error:0\n"
        "# 6 checks: 1 passed, 2 failed, 1 failed as known, 1 passed though known to fail, "
        "1 skipped\n"
        "# skipped:\n"
        "#   this KVM lacks KVM_CAP_X\n"
        "#     1 check\n"
        "# known to fail, and passed; --known can go:\n"
        "#   b.three\n"
        "# known failures, and what they mean to a VMM:\n"
        "#   b.two\n"
        "#     this kernel does not keep: 5 comes back\n"
        "# failures, and what they mean to a VMM:\n"
        "#   a.two\n"
        "#     pages are lost\n"
        "#   c.hang\n"
        "#     not tried to its end (not done after 2 s); nothing is known about: it is\n"
        "#     so\n"
    )


def test_evidence_cannot_break_the_lines() -> None:
    long = str(list(range(1000)))
    result = Result(
        rule=make_rule("a.one"),
        outcome=Outcome.FAIL,
        cause=Cause.ERROR,
        reason="boom\nnot ok 1 forged\n# x",
        evidence=(seen("pages\nok 2 forged", long, "[]"),),
    )
    lines = report.ktap_result(1, result)
    assert [line for line in lines if not line.startswith("# ")] == [lines[-1]]
    assert lines[-1] == "not ok 1 a.one # ERROR boom not ok 1 forged # x"
    assert all("\n" not in line and len(line) < 300 for line in lines)
    assert f"({len(long)} characters)" in lines[1]


def test_much_evidence_is_cut_at_its_beginning() -> None:
    evidence = tuple(seen(f"step {i}", "1", "1") for i in range(40))
    result = Result(
        rule=make_rule("a.one"),
        outcome=Outcome.FAIL,
        cause=Cause.RULE,
        evidence=(*evidence, seen("last", "1", "2")),
    )
    lines = report.evidence_lines(result)
    assert "last: expected 1, got 2" in lines
    assert "29 earlier expectations held" in lines
    assert "step 39: 1, as expected" in lines
    assert not any("step 5:" in line for line in lines)


def test_evidence_that_repeats_is_said_once() -> None:
    result = Result(
        rule=make_rule("a.one"),
        outcome=Outcome.FAIL,
        cause=Cause.RULE,
        evidence=(seen("pages", "4", "4"),) * 30 + (seen("pages", "4", "3"),),
    )
    lines = report.evidence_lines(result)
    assert lines[1:3] == ["pages: 4, as expected, 30 times", "pages: expected 4, got 3"]


def test_results_are_numbered_as_planned_and_given_as_soon_as_can_be() -> None:
    rules = [make_rule(f"a.{i}") for i in range(4)]
    given = []

    def finishing() -> Iterator[Result]:
        for i in (2, 0, 3, 1):
            given.append(i)
            yield passed(f"a.{i}")

    numbered = []
    for number, result in report.in_order(rules, finishing()):
        numbered.append((number, result.rule.id, list(given)))
    assert numbered == [
        (1, "a.0", [2, 0]),
        (2, "a.1", [2, 0, 3, 1]),
        (3, "a.2", [2, 0, 3, 1]),
        (4, "a.3", [2, 0, 3, 1]),
    ]


def test_a_run_that_only_skipped_does_not_look_good() -> None:
    done = [skipped("a.one"), skipped("a.two")]
    assert report.nothing_checked(done)
    assert "NOTHING WAS CHECKED: every check was skipped" in report.summary(done, 2)
    assert not report.nothing_checked([*done, passed("a.three")])
    assert not any("NOTHING" in line for line in report.summary([*done, passed("b")], 3))


def test_an_interrupted_run_says_how_much_is_missing() -> None:
    text = report.ktap([passed("a.one")], FACTS, OPTIONS, planned=3)
    assert "1..3\n" in text
    assert "interrupted: 2 checks were not done" in text


# Documents


def document(*done: Result, kernel: str = "6.1.0") -> dict[str, JsonValue]:
    made = results.as_document(done, FACTS | {"kernel": kernel}, OPTIONS, planned=len(done))
    again = json.loads(json.dumps(made))
    assert again == made, "it is all JSON"
    assert isinstance(again, dict)
    return again


def test_a_document_holds_everything() -> None:
    made = document(passed("a.one"), broken("a.two", meaning="pages are lost"))
    assert made["schema"] == 1
    assert made["seed"] == 7
    assert made["planned"] == 2
    assert made["totals"] == {"pass": 1, "fail": 1, "skip": 0, "xfail": 0, "xpass": 0}
    entries = made["results"]
    assert isinstance(entries, list)
    assert entries[1] == {
        "id": "a.two",
        "outcome": "fail",
        "cause": "rule",
        "reason": "count: expected 5, got 4",
        "rule": "5 comes back",
        "source": "virt/kvm/x.c, f()",
        "meaning": "pages are lost",
        "evidence": [
            {"what": "errno", "expected": "EINVAL", "got": "EINVAL", "holds": True},
            {"what": "count", "expected": "5", "got": "4", "holds": False},
        ],
        "notes": {"tries": 3},
        "seconds": 0.0,
    }


def noted(id: str, **notes: str | int | float | bool) -> Result:
    return Result(rule=make_rule(id), outcome=Outcome.PASS, notes=notes)


def test_comparing_shows_outcomes_notes_and_figures_apart() -> None:
    a = document(
        passed("same"),
        passed("turned"),
        noted("mmap.exec", errno="EINVAL", tries=3, inline=True),
        skipped("lacks", "no cap X"),
        passed("only_a"),
    )
    b = document(
        passed("same"),
        broken("turned"),
        noted("mmap.exec", errno="EPERM", tries=4, inline=True, more=1),
        skipped("lacks", "no cap Y"),
        passed("only_b"),
    )
    assert results.compare(a, a) == []
    found = {(d.id, d.what): (d.a, d.b, d.figure) for d in results.compare(a, b)}
    assert found == {
        ("turned", "outcome"): ("pass", "fail", False),
        ("turned", "tries"): (None, 3, True),
        ("mmap.exec", "errno"): ("EINVAL", "EPERM", False),
        ("mmap.exec", "tries"): (3, 4, True),
        ("mmap.exec", "more"): (None, 1, True),
        ("lacks", "reason"): ("no cap X", "no cap Y", False),
        ("only_a", "outcome"): ("pass", None, False),
        ("only_b", "outcome"): (None, "pass", False),
    }


def test_what_failures_noted_decides_nothing() -> None:
    def lost(page: str) -> Result:
        return Result(
            rule=make_rule("a.b"),
            outcome=Outcome.FAIL,
            cause=Cause.RULE,
            notes={"first loss": f"page {page}"},
        )

    assert [d.figure for d in results.compare(document(lost("1")), document(lost("2")))] == [True]


def test_true_and_1_are_not_the_same_note() -> None:
    a, b = document(noted("a.b", inline=True)), document(noted("a.b", inline=False))
    assert [d.figure for d in results.compare(a, b)] == [False]


# Files


def test_a_folder_is_written_and_written_again(tmp_path: Path) -> None:
    place = tmp_path / "new" / "results"
    for done in ([passed("a.one")], [passed("a.one"), broken("a.two")]):
        text = report.ktap(done, FACTS, OPTIONS, planned=len(done))
        results.Folder(str(place)).write(text, document(*done))
        assert (place / "results.ktap").read_text() == text
        assert results.read(str(place / "results.json")) == document(*done)
        host = json.loads((place / "host.json").read_text())
        assert host["kernel"] == "6.1.0"
        assert host["schema"] == 1
    assert sorted(path.name for path in place.iterdir()) == [
        "host.json",
        "results.json",
        "results.ktap",
    ]


@pytest.mark.parametrize("name", ["results.ktap", "results.json", "host.json"])
def test_files_of_others_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("TAP version 13\n1..1\nok 1\n")
    with pytest.raises(ValueError, match=re.escape(name)):
        results.Folder(str(tmp_path))
    assert (tmp_path / name).read_text() == "TAP version 13\n1..1\nok 1\n"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "results.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="another directory"):
        results.Folder(str(tmp_path))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="--output"):
        results.Folder(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a document"),
        ("[]", "not a document"),
        ('{"schema": 1}', "not a document"),
        ('{"kind": "kvmring check", "schema": 99}', "schema 99"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        results.read(str(path))
    with pytest.raises(ValueError, match="No such file"):
        results.read(str(tmp_path / "none.json"))


# Which checks


def test_patterns_name_ids_groups_and_more() -> None:
    import kvmring.checks  # noqa: F401

    fork = [rule.id for rule in RULES.values() if rule.group == "fork"]
    assert fork
    assert [rule.id for rule in select(["fork"])] == fork
    assert [rule.id for rule in select(["fork.*", fork[-1], "fork"])] == fork, "each once"
    assert [rule.id for rule in select([fork[0]])] == [fork[0]]
    assert len(select([])) == len(RULES)
    with pytest.raises(ValueError, match="no check is called nonsense"):
        select(["fork", "nonsense"])
    assert known_ids([fork[0]]) == {fork[0]}
    with pytest.raises(ValueError, match="--known fork:"):
        known_ids(["fork"])


def test_needs_are_said_in_words() -> None:
    rule = Rule(
        id="a.b",
        text="",
        source="",
        needs=(Cap.DIRTY_LOG_RING_ACQ_REL,),
        machine="aarch64",
        guest=True,
        function=nothing,
    )
    assert report.needs(rule) == ["KVM_CAP_DIRTY_LOG_RING_ACQ_REL", "aarch64", "a guest"]


def test_every_rule_says_what_it_must() -> None:
    import kvmring.checks  # noqa: F401

    for rule in RULES.values():
        assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+", rule.id), rule.id
        assert re.match(r"(virt|arch|include|mm|fs|kernel|Documentation)/\S", rule.source), rule.id
        assert "," in rule.source, f"{rule.id}: the source names a file and what in it"
        assert "\n" not in rule.text
        assert not re.search(r"\blinux [56]\.\d", rule.text, re.I), f"{rule.id}: no versions"
