"""The checks that only some hosts can try, under the faults of tests/kvm/fault_table.py.

This machine may have no backup bitmap, no GIC and one address space only. The library that plays
the kernel is built here, by the lab's compiler, and handed over inside the command.
"""

from __future__ import annotations

import base64
import subprocess
from typing import TYPE_CHECKING

import pytest

from .build import compiler
from .image import TOP
from .lab import Lab
from .test_hosts import passed, run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(2900),
    pytest.mark.filterwarnings("default::tests.lab.test_hosts.LostOnce"),
]

ONLY_THERE = {
    "arm64": "bitmap_backup.* vgic.* truth.ring_bitmap.* enable_cap.bitmap.* caps.*tso",
    "x86_64": "*.address_spaces memslot.as_id.*",
}
FLAGS = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread", "-s"]


def test_the_faults_are_caught(lab_arch: str, tmp_path: Path) -> None:
    library = tmp_path / "faults.so"
    sources = sorted((TOP / "tests" / "c").glob("faults*.c"))
    subprocess.run([compiler(lab_arch), *FLAGS, *sources, "-o", library], check=True)
    result = run(
        Lab(arch=lab_arch),
        f"base64 -d > /tmp/faults.so <<'END'\n"
        f"{base64.encodebytes(library.read_bytes()).decode()}END\n"
        f"KVMRING_FAULTS=/tmp/faults.so KVMRING_FAULTS_RULES='{ONLY_THERE[lab_arch]}' "
        f"python3 -m pytest -q -p no:cacheprovider tests/kvm/test_check_faults.py",
    )
    assert passed(result) > 3
