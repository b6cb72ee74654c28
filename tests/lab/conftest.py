"""Fixtures of the lab's own tests: `lab_arch`, one run per architecture, gated.

KVMRING_LAB decides: unset, the tests run where a lab can be made and are
skipped with the reason where not; 1, a lab that cannot be made is a failure;
0, they are skipped.
"""

from __future__ import annotations

import functools
import os

import pytest

from .errors import LabError
from .lab import ARCHES, Lab


@functools.cache
def _why_no_lab(arch: str, machine: str) -> str | None:
    """Return why no lab of this kind can be made; None, and a filled cache, if it can."""
    try:
        Lab(arch=arch, machine=machine, kvmring=False).make()
    except LabError as error:
        return str(error)
    return None


def gate(arch: str, machine: str = "qemu") -> None:
    """Go on, skip or fail, as KVMRING_LAB and this machine say."""
    state = os.environ.get("KVMRING_LAB") or None
    if state not in (None, "0", "1"):
        pytest.fail(f"KVMRING_LAB={state}: it is unset, 0 or 1")
    if state == "0":
        pytest.skip("KVMRING_LAB=0")
    reason = _why_no_lab(arch, machine)
    if reason is None:
        return
    if state == "1":
        pytest.fail(f"KVMRING_LAB=1 and no lab: {reason}")
    pytest.skip(f"no lab: {reason}; KVMRING_LAB=1 makes this a failure")


@pytest.fixture(params=ARCHES)
def lab_arch(request: pytest.FixtureRequest) -> str:
    """Return each architecture whose lab can be made."""
    arch = str(request.param)
    gate(arch)
    return arch


@pytest.fixture
def arm64_lab() -> Lab:
    """Return the quickest lab, without kvmring in it."""
    gate("arm64")
    return Lab(arch="arm64", kvmring=False)


@pytest.fixture
def bochs_lab() -> Lab:
    """Return the slowest lab, without kvmring in it, and with the one CPU that is quicker."""
    gate("x86_64", "bochs")
    return Lab(arch="x86_64", machine="bochs", kvmring=False, cpus=1)
