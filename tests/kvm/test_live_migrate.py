"""examples/live_migrate.py: equal memory at the end, and a guest that outlives every failure.

The last test loses one page of one round on purpose, and sees the hashes differ.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, DirtyBitmap, System

from ..gates import gate, needs_kvm
from .rig import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from live_migrate import Migration, Round
    from migration.stream import Frame, Stream

    from kvmring import VM, DirtySet, GuestMemory

    Dies = Callable[[Frame], bool]

pytestmark = needs_kvm()
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ("--pages", "256", "--hot", "64", "--bandwidth-mbps", "400", "--timeout-s", "50")
TIMEOUT_S = 100
RAM = 1 << 30


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests import what the example is made of, as the example does."""
    monkeypatch.syspath_prepend(EXAMPLES)


@contextmanager
def example(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Run the example in a process of its own."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / "live_migrate.py"), *args]
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def ending(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """Wait for the end; returns what was said to stdout and stderr."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err


def test_the_self_test_ends_with_equal_memory() -> None:
    with example("--self-test", "--json", "--vcpus", "2", *SMALL) as process:
        out, err = ending(process)
    assert err == ""
    result = json.loads(out)
    assert result["equal"]
    assert result["sha256"] == result["sha256_destination"]
    assert result["failures"] == []
    *before, last = result["rounds"]
    assert len(before) >= 3
    assert before[0]["pages"] >= 256
    for row in before:
        assert row["dirty_pages"] > 0  # the vCPUs wrote meanwhile
        assert row["stores"] > 0
    assert last["pages"] >= before[-1]["dirty_pages"]  # what was collected is owed
    assert last["stores"] == 0
    assert last["dirty_pages"] is None


def test_two_processes_over_tcp_that_do_not_converge() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    limits = ("--downtime-ms", "0.001", "--rounds-max", "2")
    with (
        example("--listen", address, "--timeout-s", "50") as there,
        example("--connect", address, *limits, *SMALL) as here,
    ):
        out, err = ending(here)
        said, _ = ending(there)
    assert err == ""
    assert "it does not converge: after 2 rounds the expected downtime is " in out
    assert " times the limit of 0.001 ms; the vCPUs are stopped all the same" in out
    assert "PASS" in out
    assert "equal" in said


def test_a_limit_that_is_kept_leaves_the_guest_running() -> None:
    limits = ("--downtime-ms", "0.001", "--rounds-max", "2", "--keep-limit")
    with example("--self-test", *limits, *SMALL) as process:
        out, err = ending(process, 1)
    assert "; the guest runs on, " in out
    assert "live_migrate: it does not converge" in err


@contextmanager
def dying_destination(path: Path, dies: Dies) -> Iterator[threading.Thread]:
    """Be a destination that is gone, listener and all, once dies() says so of a frame."""
    from migration.stream import Kind, Stream

    def serve() -> None:
        sock, _ = listener.accept()
        listener.close()  # who comes again shall not find this one
        path.unlink()
        with sock:
            stream = Stream(sock, TIMEOUT_S)
            stream.receive_hello()
            while True:
                frame = stream.receive()
                if dies(frame):
                    return
                if frame.kind is Kind.END:
                    stream.send(Kind.ACK, frame.number, frame.size)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(TIMEOUT_S)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield thread
        thread.join(TIMEOUT_S)


def moments() -> dict[str, Dies]:
    """Name the moments at which a destination may die."""
    from migration.stream import Kind

    stopped = []

    def after_the_stop(frame: Frame) -> bool:
        stopped.append(frame.kind is Kind.STOPPED)
        return frame.kind is Kind.PAGES and any(stopped)

    return {
        "in round 0": lambda frame: frame.kind is Kind.PAGES and frame.number >= RAM + 8 * PAGE,
        "in round 1": lambda frame: frame.kind is Kind.END and frame.number == 1,
        "in the stop-and-copy": after_the_stop,
    }


@pytest.mark.parametrize("moment", ["in round 0", "in round 1", "in the stop-and-copy"])
def test_the_guest_outlives_a_destination_and_moves_to_the_next(
    tmp_path: Path, moment: str
) -> None:
    path = tmp_path / "socket"
    with (
        dying_destination(path, moments()[moment]) as first,
        example("--connect", str(path), "--json", "--attempts", "2", *SMALL) as here,
    ):
        first.join(TIMEOUT_S)
        assert not first.is_alive()
        with example("--listen", str(path), "--timeout-s", "50") as there:
            out, err = ending(here)
            said, _ = ending(there)
    assert err == ""
    assert "equal" in said
    result = json.loads(out)
    assert result["equal"]
    [failure] = result["failures"]
    assert failure["stores_since"] > 0
    assert result["rounds"][0]["pages"] >= 256  # all of it once more
    assert all(row["dirty_pages"] > 0 for row in result["rounds"][:-1])


def test_without_another_attempt_a_failure_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with (
        dying_destination(path, moments()["in the stop-and-copy"]),
        example("--connect", str(path), *SMALL) as here,
    ):
        out, err = ending(here, 1)
    assert "; the guest runs on, " in out
    [line] = err.splitlines()
    assert line.startswith("live_migrate: ")


def test_a_destination_with_other_memory_is_a_failure(tmp_path: Path) -> None:
    from migration.stream import Kind, Stream

    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(TIMEOUT_S)
        with example("--connect", str(path), *SMALL) as here:
            sock, _ = listener.accept()
            with sock:
                stream = Stream(sock, TIMEOUT_S)
                stream.receive_hello()
                while (frame := stream.receive()).kind is not Kind.HASH:
                    if frame.kind is Kind.END:
                        stream.send(Kind.ACK, frame.number, frame.size)
                stream.send(Kind.HASH, size=32, payload=bytes(32))
                out, _ = ending(here, 1)
    assert "FAIL" in out


def hello(regions: int = 1, page: int = PAGE, magic: bytes = b"KVRMIGR\0") -> bytes:
    from migration.stream import HELLO, REGION

    return HELLO.pack(magic, 1, regions, page) + REGION.pack(RAM, 4 * PAGE) * min(regions, 1)


def head(kind: bytes, number: int, size: int) -> bytes:
    from migration.stream import FRAME_HEAD

    return FRAME_HEAD.pack(kind, number, size)


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "ended after 0 of 16 bytes of the hello"),
    "no hello": (lambda: b"GET / HTTP/1.1\r\n\r\n", "no stream of version 1"),
    "another page size": (lambda: hello(page=PAGE // 2), "pages of"),
    "no regions": (lambda: hello(regions=0), "0 regions"),
    "too many regions": (lambda: hello(regions=65535), "65535 regions"),
    "no end": (hello, "ended after 0 of 20 bytes of a frame's header"),
    "half a header": (lambda: hello() + b"PAGE", "ended after 4 of 20"),
    "half a page": (
        lambda: hello() + head(b"PAGE", RAM, PAGE) + bytes(100),
        f"ended after 100 of {PAGE} bytes of a PAGES frame",
    ),
    "no frame": (lambda: hello() + bytes(range(200)), "no frame is called"),
    "too long": (lambda: hello() + head(b"PAGE", RAM, 1 << 40), "frame of 1099511627776 bytes"),
    "not RAM": (lambda: hello() + head(b"PAGE", 0, PAGE) + bytes(PAGE), "at 0x0 are no pages"),
    "past the RAM": (
        lambda: hello() + head(b"PAGE", RAM + 3 * PAGE, 2 * PAGE) + bytes(2 * PAGE),
        "are no pages of RAM",
    ),
    "no whole page": (lambda: hello() + head(b"PAGE", RAM, 8) + bytes(8), "are no pages of RAM"),
    "no page": (lambda: hello() + head(b"PAGE", RAM, 0), "0 bytes at 0x40000000"),
    "a page too few": (lambda: hello() + head(b"ENDR", 0, 1), "0 pages came in round 0"),
    "a wrong round": (lambda: hello() + head(b"ENDR", 1, 0), "says 0 in round 1"),
    "an answer": (lambda: hello() + head(b"ACKR", 0, 0), "only the source receives"),
}


@contextmanager
def destination_stream(timeout_s: float) -> Iterator[tuple[socket.socket, Stream, VM]]:
    from migration.stream import Stream

    ours, theirs = socket.socketpair()
    with ours, theirs, System() as kvm, kvm.create_vm() as vm:
        yield ours, Stream(theirs, timeout_s), vm


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_stream_is_one_clear_error(damage: str) -> None:
    from migration.stream import StreamError, receive_ram

    data, said = DAMAGED[damage]
    with destination_stream(TIMEOUT_S) as (sock, stream, vm):
        sock.sendall(data())
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises(StreamError, match=said):
            receive_ram(stream, vm)


def test_silence_has_an_end() -> None:
    from migration.stream import StreamError, receive_ram

    with destination_stream(0.05) as (sock, stream, vm):
        sock.sendall(hello() + b"PA")
        with pytest.raises(StreamError, match="nothing moved for"):
            receive_ram(stream, vm)


def test_a_receiver_that_takes_nothing_has_an_end() -> None:
    from migration.stream import Kind, StreamError

    with destination_stream(0.05) as (_, stream, _), pytest.raises(StreamError, match="moved"):
        stream.send(Kind.PAGES, RAM, 1 << 20, bytes(1 << 20))


@pytest.mark.parametrize("damage", ["half a page", "no frame"])
def test_the_destination_says_it_in_one_line(tmp_path: Path, damage: str) -> None:
    from migration.stream import connect

    data, said = DAMAGED[damage]
    path = tmp_path / "socket"
    with example("--listen", str(path)) as there, connect(str(path), TIMEOUT_S) as sock:
        sock.sendall(data())
        sock.shutdown(socket.SHUT_WR)
        out, err = ending(there, 1)
    [line] = err.splitlines()
    assert line.startswith("live_migrate, destination: ")
    assert said in line
    assert out == ""
    assert not path.exists()


def a_page_that_differs(here: GuestMemory, there: VM, dirty: DirtySet) -> int | None:
    """Find a page of a set whose contents the destination does not have yet."""
    [copy] = [memory for memory in there.memory.values() if memory.gpa == here.gpa]
    for page in dirty[here.slot]:
        if here.read(page * PAGE, PAGE) != copy.read(page * PAGE, PAGE):
            return page
    return None


@pytest.mark.parametrize("loses", ["nothing", "a page", "a page that only the bitmap names"])
def test_one_page_of_one_round_makes_the_hashes_differ(
    loses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import live_migrate
    from migration.machine import Machine
    from migration.stream import Stream, receive_ram

    if "bitmap" in loses:
        gate(Cap.DIRTY_LOG_RING_WITH_BITMAP)
    send_round = live_migrate.Migration.send_round
    lost: list[int] = []

    def lossy(attempt: Migration, dirty: DirtySet | None) -> Round:
        if dirty is not None and attempt.machine.tracker.state.value == "finished":
            # the destination has acknowledged all before: its memory is still
            ram = attempt.machine.rams[1 if "bitmap" in loses else 0]  # 1: the ITS's tables
            page = a_page_that_differs(ram, vm, dirty)
            assert page is not None
            lost.append(page)
            one = DirtyBitmap(ram.num_pages)
            one.set(page)
            bitmap = dirty[ram.slot]
            bitmap -= one
        return send_round(attempt, dirty)

    if loses != "nothing":
        monkeypatch.setattr(live_migrate.Migration, "send_round", lossy)
    options = live_migrate.parse([*SMALL])
    with destination_stream(TIMEOUT_S) as (sock, theirs, vm), ExitStack() as stack:
        receiver = threading.Thread(target=functools.partial(receive_ram, theirs, vm))
        receiver.start()
        machine = Machine(stack, pages=options.pages, hot=options.hot, vcpus=2)
        show = live_migrate.Display(stack, quiet=True)
        result = live_migrate.Migration(machine, Stream(sock, TIMEOUT_S), options, show).run()
        receiver.join(TIMEOUT_S)
    assert len(lost) == (loses != "nothing")
    assert result.equal is (loses == "nothing")
