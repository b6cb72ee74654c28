"""The lab's command line: `python -m tests.lab --arch arm64 [options] [--] CMD`.

The command's output is passed through, and its status is the exit status. Two
statuses are the lab's own: 97, the VM was lost (panic, hang, time out); 98, the
lab could not be made. Each comes with one line on stderr. 130 is Ctrl-C; 2 is
wrong usage.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import say
from .errors import LabError
from .lab import ARCHES, DEFAULT_TIMEOUT_S, MACHINES, Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

LOST = 97
NOT_MADE = 98
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line *argv*; return the exit status."""
    options = _parser().parse_args(argv)
    cmd = " ".join(options.cmd) or None
    # SIGTERM ends the lab as Ctrl-C does: the emulator first, then what it leaves on disk.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        lab = Lab(
            arch=options.arch,
            machine=options.machine,
            kernel=options.kernel,
            modules=options.modules,
            suite=options.suite,
            flavour=options.flavour,
            cpu=options.cpu,
            cpus=options.cpus,
            memory_mib=options.memory,
            kvmring=options.kvmring,
            kernel_headers=options.headers,
            refresh=options.refresh,
        )
        return _shell(lab) if options.shell else _run(lab, cmd, options.timeout)
    except LabError as error:
        say(f"no lab: {error}")
        return NOT_MADE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


def _run(lab: Lab, cmd: str | None, timeout_s: float | None) -> int:
    result = lab.run(cmd, timeout_s=timeout_s, on_stdout=_to(1), on_stderr=_to(2))
    if result.status is None:
        say(f"VM lost: {result.reason}; console log: {result.console_log}")
        return LOST
    if result.no_kvm is not None:
        say(
            f"no /dev/kvm in the guest, Linux {result.kernel_release}: {result.no_kvm}; "
            f"console log: {result.console_log}"
        )
    return result.status


def _shell(lab: Lab) -> int:
    if not sys.stdin.isatty():
        raise LabError("--shell needs a terminal")
    return lab.shell()


def _to(fd: int) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab",
        description="Boot an emulated KVM host, run CMD there, return its status.",
        epilog=f"Exit status: CMD's own; {LOST}: the VM was lost; {NOT_MADE}: no lab.",
    )
    parser.add_argument("--arch", required=True, choices=ARCHES)
    parser.add_argument(
        "--machine",
        default="qemu",
        choices=MACHINES,
        help="bochs: Intel's VMX with EPT and PML, slow (%(default)s)",
    )
    parser.add_argument("--kernel", type=Path, metavar="FILE", help="Image or bzImage of yours")
    parser.add_argument("--modules", type=Path, metavar="DIR", help="where its modules are")
    parser.add_argument("--suite", default="trixie", help="Debian suite of the kernel")
    parser.add_argument("--flavour", default="cloud", help="cloud, generic, rt, 16k, ...")
    parser.add_argument("--cpu", metavar="MODEL", help="the emulator's CPU model")
    parser.add_argument("--cpus", type=int, default=2, metavar="N")
    parser.add_argument("--memory", type=int, metavar="MIB")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="seconds for CMD "
        + ", ".join(f"({seconds:g} on {name})" for name, seconds in DEFAULT_TIMEOUT_S.items()),
    )
    parser.add_argument(
        "--headers",
        choices=("guest", "compiler"),
        default="guest",
        help="kernel headers kvmring is built with",
    )
    parser.add_argument(
        "--no-kvmring",
        dest="kvmring",
        action="store_false",
        help="boot without kvmring in the guest",
    )
    parser.add_argument("--refresh", action="store_true", help="look for newer packages")
    parser.add_argument("--shell", action="store_true", help="a prompt instead of CMD")
    parser.add_argument(
        "cmd", nargs="*", metavar="CMD", help="default: tests/kvm, or what fits Bochs of it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
