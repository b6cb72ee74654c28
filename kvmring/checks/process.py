"""Processes of their own for checks: forked, ended with all that they forked, and reaped.

Also the one that holds an empty VM while checks run: the parent of them all never opens KVM.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from errno import ECHILD
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, TypeVar

from kvmring.errors import KvmError, KvmUnavailable
from kvmring.system import System

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["END_WAIT_S", "LEFT_WAIT_S", "Process", "fork", "kvm_held", "undisturbed"]

# How long a process may take to go away once it is done or was killed: it tears down its VMs.
END_WAIT_S = 5.0
# How long what a check killed itself may take.
LEFT_WAIT_S = 0.5

T = TypeVar("T")

# What interrupts a run.
INTERRUPTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put off what interrupts, so that no process is made or reaped without being noted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(slots=True)
class Process:
    """A forked process, leader of a group of its own, and a pipe from it."""

    pid: int
    fd: int  # readable when the process has ended
    ended: bool = False
    status: int = 0

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; returns whether it has come. It stays a zombie until reap()."""
        return self.ended or bool(wait([self.fd], timeout_s))

    def kill(self) -> None:
        """Kill it and what it forked. Only before reap(): until then the id is its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> bool:
        """End the process and its group; returns whether it is gone."""
        with undisturbed():
            if not self.ended:
                self.kill()
                if self.wait(END_WAIT_S):
                    _, status = os.waitpid(self.pid, 0)
                    self.status = os.waitstatus_to_exitcode(status)
                    self.ended = True
            if self.fd >= 0 and self.ended:
                os.close(self.fd)
                self.fd = -1
        return self.ended


def fork(body: Callable[[Connection[T, None]], None]) -> tuple[Process, Connection[None, T]]:
    """Fork a process that runs `body`, and never comes back from it. Call it undisturbed()."""
    ours, theirs = Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)  # what it forks ends with it
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
            os.dup2(2, 1)  # what it prints is no part of the report
            sys.stdout = sys.stderr
            ours.close()
            body(theirs)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            # Not through interpreter shutdown: its threads may be inside KVM_RUN.
            os._exit(status)
    theirs.close()
    with contextlib.suppress(OSError):  # whoever comes first
        os.setpgid(pid, pid)
    return Process(pid, os.pidfd_open(pid)), ours


_Ready = tuple[bool, int, str, str]


def _hold(device: str, pipe: Connection[_Ready, None]) -> None:
    """Open KVM, say how that went, and keep a VM until this process is killed."""
    try:
        system = System(device)
        vm = system.create_vm()
    except KvmError as error:
        unavailable = isinstance(error, KvmUnavailable)
        pipe.send((unavailable, error.errno or 0, error.ioctl, error.hint))
        return
    parent = os.pidfd_open(os.getppid())
    pipe.send((False, 0, "", ""))
    wait([parent])
    vm.close()


@contextlib.contextmanager
def kvm_held(device: str) -> Iterator[None]:
    """Find out whether KVM can be used, and keep one empty VM all the time.

    Both in a process of its own. The VM is there because the kernel patches its code when a
    host's first VM comes and when its last one goes: with a VM per check that is hundreds of
    times, and emulated machines with several processors were seen to die of it.

    Raises:
        KvmUnavailable: The device cannot be opened, or is not KVM.
        KvmError: No VM can be made.
    """
    process: Process | None = None
    try:
        with undisturbed():
            process, pipe = fork(functools.partial(_hold, device))
        try:
            unavailable, errno, call, hint = pipe.recv()
        except EOFError:
            raise KvmUnavailable(ECHILD, device, "the process that opened it died") from None
        if errno:
            raise (KvmUnavailable if unavailable else KvmError)(errno, call, hint)
        yield
    finally:
        if process is not None:
            process.reap()
            pipe.close()
