"""Runs a command that dies with the process that asked for it: `tether.py PID CMD...`.

QEMU must not outlive the lab, whatever ends the lab, SIGKILL included. The
kernel does that (PR_SET_PDEATHSIG), but it has to be asked between fork and
exec, and Python code there (preexec_fn) is unsafe in a program with threads.
So this small program is executed first: it asks, checks that the parent (PID)
has not already gone, and becomes the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Tie this process to *parent* and become *command*."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("the lab ended before its QEMU started")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
