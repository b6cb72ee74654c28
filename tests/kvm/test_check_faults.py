"""The suite checked: a preloaded library breaks the kernel's rules, and the checks must see it.

fault_table.py says which fault which check must catch; tests/c/faults.c is the library. It needs
a C compiler, or KVMRING_FAULTS with the path of a library built elsewhere: an emulated host has
no compiler. KVMRING_FAULTS_RULES restricts the table to some patterns of ids, for the checks
that only such a host can try. By hand:

    gcc -shared -fPIC -pthread tests/c/faults*.c -o /tmp/faults.so
    LD_PRELOAD=/tmp/faults.so KVMRING_FAULT=get:mode=drop kvmring check truth
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvmring.checks  # noqa: F401
from kvmring import System
from kvmring.checks.rules import RULES, missing
from tests.gates import gate, needs_kvm

from .fault_table import MUST_CATCH, NOT_COUNTED, REQUESTS

pytestmark = [needs_kvm(), pytest.mark.timeout(1600)]

SOURCES = Path(__file__).parents[1] / "c"
CC = os.environ.get("CC", "gcc")
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
BUILT, ONLY = "KVMRING_FAULTS", "KVMRING_FAULTS_RULES"
TABLE = {fault: ids.split() for fault, ids in MUST_CATCH.items()}

# Linux 6.17 and later lose pages here without any fault.
KERNELS_OWN = {"signals.reset_loss"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library."""
    if os.environ.get(BUILT):
        return Path(os.environ[BUILT])
    if not shutil.which(CC):
        pytest.skip(f"no C compiler {CC}; {BUILT} may name a library that is built already")
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    sources = sorted(SOURCES.glob("faults*.c"))
    done = subprocess.run(
        [CC, *FLAGS, "-shared", "-fPIC", "-pthread", *sources, "-o", target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return target


Entry = dict[str, str | list[dict[str, str | bool]]]


def check(library: Path, fault: str, ids: list[str]) -> dict[str, Entry]:
    """Run checks under a fault; returns their entries in the document."""
    setting = re.sub(r"request=([A-Z]\w+)", lambda m: f"request={REQUESTS[m[1]]}", fault)
    done = subprocess.run(
        [sys.executable, "-m", "kvmring", "check", "--json", "--jobs", "2", *ids],
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
        env={**os.environ, "LD_PRELOAD": str(library), "KVMRING_FAULT": setting},
    )
    assert "faults:" not in done.stderr, done.stderr
    assert done.stdout, done.stderr
    return {entry["id"]: entry for entry in json.loads(done.stdout)["results"]}


def wanted(id: str) -> bool:
    """Tell whether the environment restricts the table to other checks."""
    patterns = os.environ.get(ONLY, "*").split()
    return any(fnmatch.fnmatchcase(id, pattern) for pattern in patterns)


def test_every_rule_has_a_fault_that_it_must_catch() -> None:
    caught = {id for ids in TABLE.values() for id in ids}
    assert not caught & set(NOT_COUNTED)
    assert caught | set(NOT_COUNTED) == set(RULES), "the table is of these checks and no others"
    assert len(caught) >= 100


@pytest.mark.parametrize("fault", TABLE)
def test_the_fault_is_caught(library: Path, fault: str) -> None:
    gate()
    with System() as kvm:
        ids = [id for id in TABLE[fault] if wanted(id) and not missing(RULES[id], kvm)]
    if not ids:
        pytest.skip("none of its checks can be tried on this host")
    found = check(library, fault, ids)
    blind = {}
    for id, entry in found.items():
        evidence = entry["evidence"]
        assert isinstance(evidence, list)
        saw = entry["cause"] == "rule" and evidence and not evidence[-1]["holds"]
        if entry["outcome"] != "skip" and not saw:
            blind[id] = f"{entry['outcome']} {entry['reason']}"
    assert not blind, f"these did not see {fault}"
    if all(entry["outcome"] == "skip" for entry in found.values()):
        pytest.skip("; ".join({str(entry["reason"]) for entry in found.values()}))


@pytest.mark.parametrize("fault", ["", "ring:mode=none"])
def test_without_a_fault_the_library_changes_nothing(library: Path, fault: str) -> None:
    found = check(library, fault, [id for id in RULES if wanted(id)])
    wrong = {id: e["reason"] for id, e in found.items() if e["outcome"] not in ("pass", "skip")}
    assert not set(wrong) - KERNELS_OWN, wrong
    assert any(entry["outcome"] == "pass" for entry in found.values())


def test_a_fault_that_is_not_understood_is_no_fault_that_is_caught(library: Path) -> None:
    for fault in ("nonsense", "ioctl:request=x", "ring:colour=3", "ioctl:nth"):
        with pytest.raises(AssertionError, match="is not understood"):
            check(library, fault, ["caps.unknown"])
