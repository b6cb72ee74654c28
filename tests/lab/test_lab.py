"""The lab's three outcomes, each made to happen on a booted guest.

Nothing here needs kvmring: what is tested is that a command's status and
output arrive whole, and that a lost guest is told from a failed command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .errors import LabError
from .lab import Lab, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[2]
pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

# One boot for all that a command that ends by itself can show.
_ALL_ARRIVES = r"""
test -c /dev/kvm && echo kvm
/bin/sh -c 'pwd >&2'
printf 'a\0b'
seq 1 30000
echo late >/dev/stderr
(sleep 30; echo never) &
exit 7
"""


@pytest.mark.smoke
def test_status_and_both_streams_arrive_whole(lab_arch: str) -> None:
    seen: list[bytes] = []
    result = Lab(arch=lab_arch, kvmring=False).run(_ALL_ARRIVES, on_stdout=seen.append)
    numbers = "".join(f"{n}\n" for n in range(1, 30001))
    assert (result.outcome, result.status, result.reason) == (Outcome.FAILED, 7, None)
    assert result.stdout == f"kvm\na\0b{numbers}"
    assert b"".join(seen).decode() == result.stdout
    assert result.stderr == "/root\nlate\n"
    assert result.no_kvm is None


@pytest.mark.smoke
def test_a_panic_is_a_lost_vm_at_once(lab_arch: str) -> None:
    lab = Lab(arch=lab_arch, kvmring=False)
    result = lab.run("echo before; echo c >/proc/sysrq-trigger; sleep 200", timeout_s=200)
    assert (result.outcome, result.status) == (Outcome.LOST, None)
    assert result.reason == "kernel panic: sysrq triggered crash"
    assert "sysrq triggered crash" in result.console_log.read_text()
    assert result.seconds < 150


@pytest.mark.smoke
def test_a_hang_is_a_lost_vm_in_bounded_time(arm64_lab: Lab) -> None:
    result = arm64_lab.run("echo before; sleep 1000", timeout_s=2)
    assert (result.outcome, result.reason) == (Outcome.LOST, "CMD did not finish in 2 s")
    assert result.stdout == "before\n"


def test_a_killed_command_has_failed(arm64_lab: Lab) -> None:
    result = arm64_lab.run("kill -KILL $$")
    assert (result.outcome, result.status) == (Outcome.FAILED, 128 + signal.SIGKILL)


def test_a_guest_that_powers_off_is_lost(arm64_lab: Lab) -> None:
    result = arm64_lab.run("poweroff -f; sleep 100")
    assert (result.outcome, result.status) == (Outcome.LOST, None)
    assert result.reason == "the guest powered off or restarted by itself"


def test_a_cpu_that_qemu_does_not_know(arm64_lab: Lab) -> None:
    with pytest.raises(LabError, match=r"QEMU did not start: .*nonesuch"):
        Lab(arch=arm64_lab.arch, kvmring=False, cpu="nonesuch").run("true")


@pytest.fixture
def sleeping_lab(arm64_lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """Yield the lab's command line at work, its guest's command known to run."""
    command = [sys.executable, "-m", "tests.lab", "--arch", arm64_lab.arch, "--no-kvmring"]
    with subprocess.Popen(
        [*command, "echo up; sleep 1000"], cwd=TOP, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


@pytest.mark.smoke
def test_qemu_does_not_outlive_a_killed_lab(sleeping_lab: subprocess.Popen[str]) -> None:
    (qemu,) = _children(sleeping_lab.pid)
    sleeping_lab.kill()
    sleeping_lab.wait()
    deadline = time.monotonic() + 10
    while _alive(qemu):
        assert time.monotonic() < deadline, f"QEMU, pid {qemu}, is still there"
        time.sleep(0.05)


def test_sigterm_ends_qemu_first(sleeping_lab: subprocess.Popen[str]) -> None:
    (qemu,) = _children(sleeping_lab.pid)
    sleeping_lab.terminate()
    assert sleeping_lab.wait(30) == 130
    assert not _alive(qemu)


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    """Tell whether *pid* runs; a zombie that nobody has reaped yet does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
