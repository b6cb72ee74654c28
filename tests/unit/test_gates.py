"""The tests' own machinery: the gate of KVMRING_KVM, and the check that nothing is left behind.

A gate that never skips or a check that never fails would make every other test worth less.
"""

from __future__ import annotations

import os

import pytest

from kvmring import abi
from tests.conftest import left_behind, open_fds
from tests.gates import VARIABLE, gate, verdict

from .synthetic import SyntheticRing

REASON = "no such device"


@pytest.mark.parametrize(
    ("state", "reason", "what", "words"),
    [
        (None, None, "run", ""),
        (None, REASON, "skip", f"{REASON}; {VARIABLE}=1 makes this a failure"),
        ("1", None, "run", ""),
        ("1", REASON, "fail", f"{VARIABLE}=1, and KVM cannot be used: {REASON}"),
        ("0", None, "skip", f"{VARIABLE}=0"),
        ("0", REASON, "skip", f"{VARIABLE}=0"),
        ("yes", None, "fail", "it is unset, 0 or 1"),
        ("", None, "fail", "it is unset, 0 or 1"),
    ],
)
def test_three_states(state: str | None, reason: str | None, what: str, words: str) -> None:
    verdict_is, message = verdict(state, reason)
    assert verdict_is == what
    assert words in message


def test_the_variable_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    with pytest.raises(pytest.skip.Exception, match=rf"{VARIABLE}=0"):
        gate()
    monkeypatch.setenv(VARIABLE, "maybe")
    with pytest.raises(pytest.fail.Exception, match="maybe"):
        gate()


def test_what_is_left_behind_is_named() -> None:
    fds, live = open_fds(), abi.live()
    assert left_behind(fds, live) == []
    with SyntheticRing():
        assert left_behind(fds, live) == ["1 of the C code's rings"]
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert left_behind(fds, live) == [f"fd {fd}: /dev/null"]
    finally:
        os.close(fd)
    assert left_behind(fds, live) == []
