"""The kvmring command as a user meets it: what it prints, its JSON, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmring import (
    VM,
    DirtyGfn,
    DirtyGfns,
    DirtyRing,
    DirtySet,
    ResetResult,
    System,
    cli,
    demo,
    page_size,
)
from tests.gates import needs_kvm

if TYPE_CHECKING:
    from kvmring.target import Target

pytestmark = needs_kvm()

PAGES = 4096


def kvmring(*args: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """Run the command without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "kvmring", *args],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "COLUMNS": str(columns)},
    )


def test_caps_fits_80_columns_and_says_what_the_numbers_mean() -> None:
    done = kvmring("caps")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout
    with System() as kvm:
        most = kvm.check_extension(223)
    assert any(f"{most // 16}" in line for line in lines if "ring sizes taken" in line)


def test_caps_json_agrees_with_kvm() -> None:
    done = kvmring("caps", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert document["host"]["page_size"] == page_size()
    with System() as kvm, kvm.create_vm() as vm:
        for cap in document["capabilities"]:
            assert vm.check_extension(cap["number"]) == cap["value"], cap["name"]
        offered = document["modes"]["ring+bitmap"]
        assert offered == bool(vm.check_extension(225))
    ring = document["ring"]
    assert ring["largest_entries"] * 16 == max(
        c["value"] for c in document["capabilities"] if c["number"] in (192, 223)
    )
    assert ring["smallest_entries"] == ring["usable_of_smallest"] + ring["reserved_entries"]
    assert ring["reserved_entries"] >= 64


@pytest.mark.parametrize("order", ["sequential", "random", "strided"])
def test_demo_finds_exactly_what_was_written(order: str) -> None:
    done = kvmring("demo", "--json", "--pages", str(PAGES), "--rounds", "2", "--order", order)
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert document["missed"] == document["extra"] == document["wrong_contents"] == 0
    in_ring, in_bitmap = document["pages_from_ring"], document["pages_from_bitmap"]
    assert document["pages_written"] == in_ring + in_bitmap
    assert document["pages_written"] >= PAGES
    assert (in_bitmap > 0) == (document["backup_writer"] is not None)
    assert (in_ring == PAGES) == (document["backup_writer"] is None)
    assert document["stores"] == 2 * PAGES
    assert document["entries"] >= 2 * PAGES
    assert document["source"] in ("ring", "ring+bitmap")


def test_demo_fills_its_rings_many_times_with_the_defaults() -> None:
    with System() as kvm:
        result = demo.run(kvm)
    assert result.ok
    assert all(vcpu.ring_full_exits >= 2 for vcpu in result.vcpus)


def test_demo_text_fits_80_columns_and_ends_with_a_verdict() -> None:
    done = kvmring("demo", "--pages", str(PAGES))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("PASS:")


def test_a_collector_that_drops_one_entry_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest = DirtyRing.harvest
    dropped: list[DirtyGfn] = []

    def lossy(ring: DirtyRing, into: Target, *, limit: int | None = None) -> int:
        lost = 0
        if not dropped:
            bin = DirtyGfns(1)
            lost = harvest(ring, bin)
            dropped.extend(bin)
        return lost + harvest(ring, into, limit=limit)

    monkeypatch.setattr(DirtyRing, "harvest", lossy)
    assert cli.main(["demo", "--json", "--pages", str(PAGES), "--vcpus", "1"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert len(dropped) == 1
    assert document["missed"] == 1
    assert document["extra"] == 0


def test_a_reset_left_out_is_caught_in_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # Marked and never reset: the pages stay writable, and the second round's writes unlogged.
    def skipped(vm: VM) -> ResetResult:
        return ResetResult(reset=0, suspects=DirtySet(vm), calls=0, unknown=0)

    monkeypatch.setattr(VM, "reset_dirty_rings", skipped)
    with System() as kvm:
        few = 64  # no ring gets full with so few
        result = demo.run(kvm, pages=few, vcpus=1, rounds=2, entries=demo.default_entries())
    assert result.missed >= few


def test_memory_that_does_not_hold_what_was_written_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collect = demo._Demo.collect

    def spoilt(self: demo._Demo, found: list[DirtySet], commands: list[tuple[int, int]]) -> None:
        self.ram.write(7 * page_size(), b"\xff" * 8)
        collect(self, found, commands)

    monkeypatch.setattr(demo._Demo, "collect", spoilt)
    with System() as kvm:
        result = demo.run(kvm, pages=PAGES, vcpus=1)
    assert not result.ok
    assert result.wrong_contents == 1


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("demo", "--entries", "1000"), 2, "power of two"),
        (("demo", "--entries", "0"), 2, "power of two"),
        (("demo", "--entries", "1048576"), 2, "at most"),
        (("demo", "--entries", str(page_size() // 32)), 2, "page"),
        (("demo", "--pages", "0"), 2, "pages must lie between"),
        (("demo", "--pages", "2000000000"), 2, "available"),
        (("demo", "--vcpus", "0"), 2, "vcpus"),
        (("demo", "--rounds", "-1"), 2, "rounds"),
        (("demo", "--order", "backwards"), 2, "invalid choice"),
        (("nonsense",), 2, "invalid choice"),
        ((), 2, "COMMAND"),
        (("caps", "--device", "/dev/null"), 3, "not KVM"),
        (("caps", "--device", "/nonexistent"), 3, "no such device"),
        (("demo", "--device", "/"), 3, "not KVM"),
    ],
)
def test_bad_input_is_one_line_and_a_status(args: tuple[str, ...], status: int, words: str) -> None:
    done = kvmring(*args)
    assert done.returncode == status
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvmring")
    assert words in last
    assert "Traceback" not in done.stderr


def test_no_permission_is_status_3_with_the_remedy() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody who may not open /dev/kvm")
    if Path("/dev/kvm").stat().st_mode & 0o006:
        pytest.skip("anybody may open /dev/kvm on this machine")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with open(write, "w") as sys.stderr:
            status = cli.main(["caps"])
        os._exit(status)
    os.close(write)
    with open(read) as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert message.count("\n") == 1
    assert "[EACCES]" in message
    assert "group" in message


def _vcpus_mapped(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("anon_inode:kvm-vcpu")


def test_interrupted_demo_ends_with_130() -> None:
    command = [sys.executable, "-m", "kvmring", "demo", "--rounds", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while _vcpus_mapped(process.pid) < 4:  # kvm_run and ring of both vCPUs
            assert process.poll() is None
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130
        assert stderr == b"kvmring: interrupted\n"


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    command = [sys.executable, "-m", "kvmring", "caps"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait(timeout=60)
    assert stderr == b""


def test_help_names_every_option() -> None:
    done = kvmring("demo", "--help")
    assert done.returncode == 0
    for option in ("--pages", "--vcpus", "--entries", "--order", "--rounds", "--json", "--device"):
        assert option in done.stdout


def test_version_is_what_a_bug_report_needs() -> None:
    done = kvmring("--version")
    assert done.returncode == 0
    assert os.uname().release in done.stdout
    assert f"{page_size()}-byte pages" in done.stdout
