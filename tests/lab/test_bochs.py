"""The Bochs host: what it refuses without a boot, and the three outcomes on booted ones.

The boots take one to two minutes each, so they are not in the smoke selection. What PML does is
tests/kvm/test_pml.py's.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from .bochs import BochsMachine
from .cache import Cache
from .errors import LabError
from .lab import Lab, Outcome

TOP = Path(__file__).parents[2]


def test_without_bochs_every_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"apt-get install bochs bochs-term .* isolinux syslinux"):
        Lab(arch="x86_64", machine="bochs", cache=Cache(tmp_path)).run("true")


@pytest.mark.parametrize(
    ("arch", "machine", "what"),
    [("arm64", "bochs", "Bochs emulates x86_64, not arm64"), ("x86_64", "b", "no machine 'b'")],
)
def test_what_bochs_is_not(tmp_path: Path, arch: str, machine: str, what: str) -> None:
    with pytest.raises(LabError, match=what):
        Lab(arch=arch, machine=machine, cache=Cache(tmp_path)).run("true")


@pytest.mark.parametrize(
    ("words", "guest"),
    [
        ("[ACPI  ] ACPI control: soft power off", True),
        ("[CPU0  ] exception(): 3rd (13) exception with no resolution", True),
        ("[      ] bochsrc:1: cpu directive malformed.", False),
    ],
)
def test_how_bochs_ended_is_in_its_last_words(tmp_path: Path, words: str, guest: bool) -> None:
    line = "=" * 72
    (tmp_path / "bochs.log").write_text(
        f"00i[SIM] noise\n{line}\nBochs is exiting with the following message:\n"
        f"{words}\n{line}\n00i[SIM   ] quit_sim called with exit code 1\n"
    )
    machine = BochsMachine(
        cd=-1, console_log=tmp_path / "console.log", cpu="c", cpus=1, memory_mib=1
    )
    assert machine.last_words() == words
    assert machine.ended_by_guest(1) is guest


@pytest.mark.lab
@pytest.mark.pml
@pytest.mark.timeout(1200)
class TestBooted:
    """Each test boots a host, but for the one whose host does not start."""

    def test_status_and_both_streams_arrive_whole(self, bochs_lab: Lab) -> None:
        script = r"""
            cat /sys/module/kvm_intel/parameters/pml
            /bin/sh -c 'pwd >&2'
            printf 'a\0b\r\n\377\021\023\004\n'
            seq 1 3000
            echo late >/dev/stderr
            exit 7
        """
        seen: list[bytes] = []
        result = bochs_lab.run(script, on_stdout=seen.append)
        numbers = "".join(f"{n}\n" for n in range(1, 3001)).encode()
        assert (result.outcome, result.status, result.reason) == (Outcome.FAILED, 7, None)
        assert b"".join(seen) == b"Y\na\0b\r\n\xff\x11\x13\x04\n" + numbers
        assert result.stderr == "/root\nlate\n"
        assert result.no_kvm is None

    def test_a_panic_is_a_lost_vm_at_once(self, bochs_lab: Lab) -> None:
        result = bochs_lab.run("echo c >/proc/sysrq-trigger; sleep 1000", timeout_s=1000)
        assert (result.outcome, result.status) == (Outcome.LOST, None)
        assert result.reason == "kernel panic: sysrq triggered crash"
        assert "sysrq triggered crash" in result.console_log.read_text()
        assert result.seconds - result.boot_seconds < 300

    @pytest.mark.parametrize("command", ["poweroff -f", "reboot -f"])
    def test_a_guest_that_goes_by_itself_is_lost(self, bochs_lab: Lab, command: str) -> None:
        result = bochs_lab.run(f"{command}; sleep 1000")
        assert (result.outcome, result.status) == (Outcome.LOST, None)
        assert result.reason == "the guest powered off or restarted by itself"

    def test_a_cpu_that_bochs_does_not_know(self, bochs_lab: Lab) -> None:
        other = Lab(arch="x86_64", machine="bochs", kvmring=False, cpu="nonesuch")
        with pytest.raises(LabError, match=r"Bochs did not start: .*cpu directive malformed"):
            other.run("true")

    def test_bochs_does_not_outlive_a_killed_lab(self, bochs_lab: Lab) -> None:
        command = [sys.executable, "-m", "tests.lab", "--arch", "x86_64", "--machine", "bochs"]
        with subprocess.Popen(
            [*command, "--no-kvmring", "--cpus", str(bochs_lab.cpus), "echo up; sleep 1000"],
            cwd=TOP,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            bochs = os.pidfd_open(int(children[0]))
            try:
                process.kill()
                # It is readable when the process has ended.
                ended, _, _ = select.select([bochs], [], [], 10)
                assert ended, f"Bochs, pid {children[0]}, is still there"
            finally:
                os.close(bochs)
