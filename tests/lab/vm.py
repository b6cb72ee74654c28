"""A running machine of any emulator: its channels, and how it ended.

qemu.py and bochs.py start one; here the three channels that come out of the
guest are read, up to the command's status or to whatever ended the machine
before. The channels end when the emulator goes, for whatever reason, and the
emulator goes when the lab does.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from .errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TETHER = Path(__file__).with_name("tether.py")
# The command's status and progress, its stdout, its stderr.
CHANNELS = ("ctl", "out", "err")
# After the guest's last word the emulator gets this long to end by itself.
_POWER_OFF_S = 3.0


@dataclass(frozen=True, slots=True)
class Running:
    """A started emulator and our ends of its channels, to be closed by who got it.

    There may be channels beyond CHANNELS; they are read, and not looked at.
    """

    process: subprocess.Popen[bytes]
    channels: dict[str, int]


class Machine(Protocol):
    """What an emulator's own file provides."""

    @property
    def emulator(self) -> str:
        """What messages call it."""

    @property
    def console_log(self) -> Path:
        """Where the guest's console is written."""

    def start(self) -> Running:
        """Start the emulator."""

    def last_words(self) -> str:
        """Return the last line of what the emulator itself said."""

    def ended_by_guest(self, code: int) -> bool:
        """Tell whether exit status *code* is that of a guest that powered off or restarted."""


def tethered(
    command: Sequence[str],
    *,
    pass_fds: Sequence[int],
    stdin: int | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    own_session: bool = True,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start an emulator that dies with this process.

    In a session of its own Ctrl-C does not reach it: that is for the lab, which then ends the
    emulator in its own way.
    """
    return subprocess.Popen(
        [sys.executable, "-IS", str(TETHER), str(os.getpid()), *command],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=own_session,
        cwd=cwd,
        env=env,
    )


@dataclass(frozen=True, slots=True)
class Ending:
    """How a machine ended: *status* of the command, or None and why it was *lost*.

    *no_kvm* is None where the guest has a /dev/kvm, else why it has none.
    """

    status: int | None
    lost: str | None
    no_kvm: str | None
    release: str
    boot_s: float


class Stream:
    """One output stream: passes on everything up to the mark that ends it."""

    def __init__(self, mark: bytes, sink: Callable[[bytes], None]) -> None:
        self._mark = b"\0" + mark + b"\0"
        self._sink = sink
        self._held = b""
        self.ended = False

    def feed(self, data: bytes) -> None:
        if self.ended:
            return
        data = self._held + data
        body, found, _ = data.partition(self._mark)
        if found:
            self.ended = True
            self._held = b""
        else:
            # The tail may be the beginning of the mark.
            most = min(len(self._mark) - 1, len(body))
            held = next((n for n in range(most, 0, -1) if body.endswith(self._mark[:n])), 0)
            body, self._held = body[: len(body) - held], body[len(body) - held :]
        if body:
            self._sink(body)

    def flush(self) -> None:
        """Pass on what was held back: no mark will come."""
        if self._held:
            self._sink(self._held)
            self._held = b""


def run(
    machine: Machine,
    *,
    mark: bytes,
    on_stdout: Callable[[bytes], None],
    on_stderr: Callable[[bytes], None],
    boot_timeout_s: float,
    timeout_s: float,
) -> Ending:
    """Boot *machine*, pass on the command's output as it comes, wait for the end.

    Raises:
        LabError: the emulator refused what it was told, or init said that this kernel
            cannot be a lab.
    """
    running = machine.start()
    try:
        watch = _Watch(machine, running, mark, on_stdout, on_stderr)
        return watch.until_end(boot_timeout_s, timeout_s)
    finally:
        running.process.kill()
        running.process.wait()
        for fd in running.channels.values():
            os.close(fd)


class _Watch:
    """The loop that reads a running machine's channels until there is an Ending."""

    def __init__(
        self,
        machine: Machine,
        running: Running,
        mark: bytes,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
    ) -> None:
        self._machine = machine
        self._running = running
        self._streams = {"out": Stream(mark, on_stdout), "err": Stream(mark, on_stderr)}
        self._ctl = b""
        self._up: str | None = None
        self._status: int | None = None
        self._start = time.monotonic()
        self._boot_s = 0.0

    def until_end(self, boot_timeout_s: float, timeout_s: float) -> Ending:
        deadline = self._start + boot_timeout_s
        with selectors.DefaultSelector() as selector:
            for name, fd in self._running.channels.items():
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ, name)
            open_channels = len(self._running.channels)
            while open_channels:
                was_up, was_done = self._up, self._complete()
                left = deadline - time.monotonic()
                events = selector.select(left) if left > 0 else []
                if not events:
                    break
                for key, _ in events:
                    try:
                        data = os.read(key.fd, 1 << 16)
                    except BlockingIOError:
                        continue
                    except OSError:  # how a socket, or a terminal, ends when the other end died
                        data = b""
                    if data:
                        self._take(key.data, data)
                    else:
                        selector.unregister(key.fileobj)
                        open_channels -= 1
                if self._up is not None and was_up is None:
                    deadline = time.monotonic() + timeout_s
                if self._complete() and not was_done:
                    deadline = time.monotonic() + _POWER_OFF_S
        for stream in self._streams.values():
            stream.flush()
        return self._ending(boot_timeout_s, timeout_s, timed_out=bool(open_channels))

    def _take(self, name: str, data: bytes) -> None:
        if name in self._streams:
            self._streams[name].feed(data)
        if name != "ctl":
            return
        self._ctl += data
        *lines, self._ctl = self._ctl.split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "up":
                self._up = rest
                self._boot_s = time.monotonic() - self._start
            elif word == "exit":
                self._status = int(rest)

    def _complete(self) -> bool:
        return self._status is not None and all(s.ended for s in self._streams.values())

    def _ending(self, boot_timeout_s: float, timeout_s: float, *, timed_out: bool) -> Ending:
        facts = dict(pair.partition("=")[::2] for pair in (self._up or "").split())
        lost = None
        if self._status is None:
            if not timed_out:
                lost = self._why_gone()
            elif self._up is None:
                lost = f"the guest did not get to its init in {boot_timeout_s:g} s"
                if not self._console():
                    lost += " and wrote nothing to its console"
            else:
                lost = f"CMD did not finish in {timeout_s:g} s"
        no_kvm = None if facts.get("kvm") == "1" else self._why_no_kvm()
        return Ending(self._status, lost, no_kvm, facts.get("kernel", ""), self._boot_s)

    def _console(self) -> str:
        try:
            return self._machine.console_log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _why_no_kvm(self) -> str:
        notes = re.findall(r"^kvmring-lab-note: (.*?)\r?$", self._console(), re.MULTILINE)
        return "; ".join(notes) or "the kernel's messages may say why"

    def _why_gone(self) -> str:
        """Say why the emulator is gone although no status came."""
        name = self._machine.emulator
        try:
            code = self._running.process.wait(_POWER_OFF_S)
        except subprocess.TimeoutExpired:
            return f"{name} closed its channels"
        console = self._console()
        if match := re.search(r"^kvmring-lab: (.*?)\r?$", console, re.MULTILINE):
            raise LabError(f"{match[1]} (console log: {self._machine.console_log})")
        if match := re.search(r"Kernel panic - not syncing: (.*?)\r?$", console, re.MULTILINE):
            return f"kernel panic: {match[1]}"
        if code < 0:
            return f"{name} was ended by {signal.Signals(-code).name}"
        if self._machine.ended_by_guest(code):
            return "the guest powered off or restarted by itself"
        if not console:
            raise LabError(f"{name} did not start: {self._machine.last_words()}")
        return f"{name} ended with status {code}: {self._machine.last_words()}"
