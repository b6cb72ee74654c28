"""What the README and examples/ show is run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmring import Cap
from tests.gates import gate, needs_kvm

pytestmark = needs_kvm()

TOP = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((TOP / "examples").glob("*.py"))


def run_python(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *args],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_readme_example_runs_and_counts_right() -> None:
    readme = TOP / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not here")
    [code] = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 20
    output = run_python("-c", code)
    assert output.startswith("4000 pages are dirty\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path) -> None:
    if path.stem == "its_backup_bitmap":
        gate(Cap.DIRTY_LOG_RING_WITH_BITMAP)
    assert run_python(str(path)).strip()


def test_clear_log_example_keeps_what_was_not_cleared() -> None:
    output = run_python(str(TOP / "examples" / "clear_log.py"))
    assert "[(64, 36)] left" in output
