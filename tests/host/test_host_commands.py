"""kvmring ps, watch and trace as a user meets them, on a process whose truth is known."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, page_size
from kvmring.host.recording import read
from tests.gates import needs

from .run import ENV, KVMRING, kvmring

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvm.other import Neighbour

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)


def fits(text: str, columns: int = 80) -> bool:
    return max(map(len, text.splitlines())) <= columns


# ps


def test_ps_json_names_the_process_and_its_rings(other: Neighbour) -> None:
    done = kvmring("ps", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    (found,) = [p for p in document["processes"] if p["pid"] == other.pid]
    assert found["vms"] == 1
    assert [v["id"] for v in found["vcpus"]] == [0, 1]
    assert len({v["ring_entries"] for v in found["vcpus"]}) == 1
    assert found["memory_bytes"] % page_size() == 0


def test_ps_table(other: Neighbour) -> None:
    done = kvmring("ps")
    assert done.returncode == 0
    assert fits(done.stdout)
    assert "\x1b" not in done.stdout
    assert re.search(rf"^ *{other.pid} ", done.stdout, flags=re.MULTILINE)


def test_ps_has_no_device_and_the_others_still_do() -> None:
    assert kvmring("ps", "--device", "/dev/kvm").returncode == 2
    assert "--device" in kvmring("caps", "--help").stdout


def test_ps_imports_no_more_than_it_needs() -> None:
    code = (
        "import sys\nfrom kvmring.cli import main\nmain(['ps', '--json'])\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "kvmring" in loaded
    assert not loaded & {"rich", "psutil", "asyncio", "subprocess"}


# watch


def pushed(lines: list[str]) -> int:
    rings = [ring for line in lines for ring in json.loads(line)["rings"]]
    assert not any(ring["lapped"] for ring in rings)
    return sum(ring["pushed"] for ring in rings)


def test_watch_by_events_counts_every_push(other: Neighbour, tracefs: Path) -> None:
    other.flow(seconds=1.0, pages=3000, every_s=0.01)
    watch = subprocess.Popen(
        [*KVMRING, "watch", str(other.pid), "--json", "--interval", "0.3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    assert watch.stdout is not None
    lines = [watch.stdout.readline()]  # it watches; now there may be something to see
    other.go()
    truth = other.done()["entries"]
    for _ in range(20):  # until it has told all; were it too much or too little, it stays so
        if pushed(lines) == truth:
            break
        lines.append(watch.stdout.readline())
    watch.send_signal(signal.SIGINT)
    rest, errors = watch.communicate(timeout=60)
    assert watch.returncode == 130, errors
    assert pushed([*lines, *rest.splitlines()]) == truth
    assert {document["source"] for document in map(json.loads, lines)} == {"events"}


def test_watch_without_a_terminal_prints_a_table_per_interval(
    other: Neighbour, tracefs: Path
) -> None:
    other.do("write", first=0, pages=100)
    done = kvmring("watch", other.pid, "--interval", "0.1", "--count", "2")
    assert done.returncode == 0, done.stderr
    assert fits(done.stdout)
    assert "\x1b" not in done.stdout
    assert done.stdout.count("idle or logging off: nothing was pushed") == 2
    assert done.stdout.count("exact, from the kernel's counters") == 2
    assert "% of a CPU" in done.stdout, "its own cost"


def test_watch_on_a_terminal_is_live_and_fits(other: Neighbour) -> None:
    primary, secondary = pty.openpty()
    try:
        watch = subprocess.Popen(
            [*KVMRING, "watch", str(other.pid), "--interval", "0.1", "--count", "3"],
            stdout=secondary,
            stderr=subprocess.PIPE,
            env={**ENV, "TERM": "xterm", "LINES": "24"},
        )
        os.close(secondary)
        text = b""
        while select.select([primary], [], [], 60)[0]:
            try:
                text += os.read(primary, 65536)
            except OSError:  # the last writer has gone
                break
        _, errors = watch.communicate(timeout=60)
    finally:
        os.close(primary)
    assert watch.returncode == 0, errors
    screen = text.decode()
    assert "\x1b[" in screen, "redrawn in place"
    lines = re.sub(r"\r|\x1b\[[0-9]*[AK]", "\n", screen)  # the cursor goes to another line
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", lines)
    assert fits(plain)
    assert plain.count("idle or logging off") >= 3


def test_watch_falls_back_to_polling_and_says_so(other: Neighbour) -> None:
    hidden = ["unshare", "-m", "sh", "-c", 'umount -a -t tracefs,debugfs; exec "$@"', "sh"]
    command = [*KVMRING, "watch", str(other.pid), "--json", "--count", "1", "--interval", "0.1"]
    done = subprocess.run(
        [*([] if os.geteuid() else hidden), *command],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    assert "kvmring: polling the rings: " in done.stderr
    document = json.loads(done.stdout)
    assert document["source"] == "polling"
    assert "trac" in str(document["why_polling"])


def test_watch_shows_a_lap_as_a_lower_bound(other: Neighbour) -> None:
    watch = subprocess.Popen(
        [*KVMRING, "watch", str(other.pid), "--poll", "--interval", "0.5", "--vcpu", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    assert watch.stdout is not None
    try:
        shown = ""
        for _ in range(20):
            os.kill(watch.pid, signal.SIGSTOP)  # so that it polls too late, whatever its pace
            other.do("write", first=0, pages=16384)
            os.kill(watch.pid, signal.SIGCONT)
            while not (line := watch.stdout.readline()).startswith(("healthy", "ring", "idle")):
                shown += line
                if not line:
                    break
            if "(lapped)" in shown:
                break
    finally:
        watch.kill()
        watch.communicate()
    assert re.search(r"≥ \d+ \(lapped\)", shown), shown


def test_watch_ends_with_the_process(other: Neighbour) -> None:
    watch = subprocess.Popen(
        [*KVMRING, "watch", str(other.pid), "--json", "--interval", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    assert watch.stdout is not None
    watch.stdout.readline()
    other.end()
    _, errors = watch.communicate(timeout=60)
    assert watch.returncode == 0
    assert f"process {other.pid} has ended" in errors


# trace


def test_trace_prints_every_event(other: Neighbour, tracefs: Path) -> None:
    trace = subprocess.Popen(
        [*KVMRING, "trace", str(other.pid), "--json", "--count", "202"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    assert trace.stderr is not None
    assert "recording" in trace.stderr.readline()
    other.do("write", first=1000, pages=100)
    other.do("write", first=2000, pages=100, vcpu=1)
    other.do("harvest")
    other.do("reset")
    output, errors = trace.communicate(timeout=60)
    assert trace.returncode == 0
    assert "0 events lost" in errors
    events = [json.loads(line) for line in output.splitlines()]
    assert all(event["schema"] == 1 and event["pid"] == other.pid for event in events)
    pushes, resets = events[:200], events[200:]
    assert [push["page"] for push in pushes] == [*range(1000, 1100), *range(2000, 2100)]
    assert [push["vcpu"] for push in pushes] == [0] * 100 + [1] * 100
    assert [push["dirty_index"] for push in pushes] == [*range(1, 101)] * 2
    assert {(push["slot"], push["reset_index"]) for push in pushes} == {(0, 0)}
    assert [(reset["vcpu"], reset["dirty_index"], reset["reset_index"]) for reset in resets] == [
        (0, 100, 100),
        (1, 100, 100),
    ]
    assert {"page", "slot"}.isdisjoint(resets[0]), "a reset has none"


def test_trace_as_text_for_a_while(other: Neighbour, tracefs: Path) -> None:
    other.do("stuck", times=1)
    trace = subprocess.Popen(
        [*KVMRING, "trace", str(other.pid), "--events", "exit", "--count", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    while trace.poll() is None:
        other.do("stuck", times=1)
    output, errors = trace.communicate(timeout=60)
    assert trace.returncode == 0, errors
    assert len(output.splitlines()) == 3
    assert re.match(r"^\d+\.\d{9} vcpu 0 exit$", output, flags=re.MULTILINE)


@pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="the extra trace is not installed"
)
def test_trace_into_parquet(other: Neighbour, tracefs: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra trace is not installed")
    target = tmp_path / "x.parquet"
    trace = subprocess.Popen(
        [*KVMRING, "trace", str(other.pid), "--count", "101", "--output", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    assert trace.stderr is not None
    assert "recording" in trace.stderr.readline()
    other.do("write", first=1000, pages=100)
    other.do("harvest")
    other.do("reset")
    output, errors = trace.communicate(timeout=60)
    assert trace.returncode == 0, errors
    assert output == ""
    found = read(target)
    assert (found.source, found.lost, found.sampling) == ("trace", 0, 1)
    rows = found.table.to_pylist()
    assert [row["event"] for row in rows] == ["push"] * 100 + ["reset"]
    assert [row["page"] for row in rows] == [*range(1000, 1100), None]
    assert [row["dirty_index"] for row in rows] == [*range(1, 101), 100]
    assert {row["pid"] for row in rows} == {other.pid}
    plotted = kvmring("plot", target, "--json")
    assert plotted.returncode == 0, plotted.stderr
    assert json.loads(plotted.stdout)["schema"] == 1


def test_trace_into_a_file(other: Neighbour, tracefs: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    done = kvmring("trace", other.pid, "--seconds", "0.1", "--sample", "1/10", "--output", target)
    assert done.returncode == 0, done.stderr
    assert target.read_text() == done.stdout == ""


# What is refused


@pytest.mark.parametrize("command", ["watch", "trace"])
def test_what_is_no_vmm_is_refused_in_one_line(command: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            for pid, words in ((ended.pid, "no process"), (sleeper.pid, "holds no VM")):
                done = kvmring(command, pid)
                assert done.returncode == 1
                (line,) = done.stderr.splitlines()
                assert line.startswith("kvmring: ")
                assert words in line
        finally:
            sleeper.kill()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["watch"], "either a PID"),
        (["watch", "1", "--listen", ":0"], "either a PID"),
        (["watch", "1", "--interval", "0"], "--interval"),
        (["watch", "1", "--count", "0"], "--count"),
        (["watch", "1", "--top", "1000"], "--top"),
        (["watch", "--listen", "nowhere"], "HOST:PORT"),
        (["trace", "1", "--events", "push,pull"], "push, reset, exit"),
        (["trace", "1", "--sample", "2/3"], "1/N"),
        (["trace", "1", "--sample", "1/0"], "1/N"),
        (["trace", "1", "--seconds", "0"], "--seconds"),
        (["trace", "-1"], "pid"),
    ],
)
def test_usage(args: list[str], words: str) -> None:
    done = kvmring(*args)
    assert done.returncode == 2
    assert words in done.stderr


def test_trace_needs_tracepoints_and_names_the_remedy(other: Neighbour) -> None:
    if os.geteuid():
        done = kvmring("trace", other.pid, "--seconds", "0.1")
    else:
        hidden = ["unshare", "-m", "sh", "-c", 'umount -a -t tracefs,debugfs; exec "$@"', "sh"]
        done = subprocess.run(
            [*hidden, *KVMRING, "trace", str(other.pid), "--seconds", "0.1"],
            capture_output=True,
            text=True,
            timeout=60,
            env=ENV,
        )
        assert "mount -t tracefs" in done.stderr
    assert done.returncode == 3
