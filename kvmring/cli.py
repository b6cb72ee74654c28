"""The `kvmring` command: which command, the exit status, and errors as one line.

Data goes to stdout, messages to stderr. Exit status: 0 done, 1 a check failed or a call did,
2 usage, 3 KVM or a capability is missing, 130 interrupted. Each command's arguments and output
are in commands/; only the one that was asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING, Protocol, cast

from kvmring.commands import DONE, FAILED, INTERRUPTED, MISSING, USAGE
from kvmring.errors import KvmError, KvmNotSupported, KvmringError, KvmUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = {
    "bench": "what dirty logging costs here, beside the same work in C",
    "caps": "what this host's KVM offers for dirty logging",
    "check": "the rules of dirty logging, tried one by one on this host's kernel",
    "demo": "the main job: run a guest, read its dirty rings, compare with the truth",
    "ps": "the processes of this host that hold VMs, and their dirty rings",
    "watch": "what a running VM's dirty rings do, live, or for Prometheus",
    "trace": "a running VM's dirty-ring events, one by one",
    "plot": "what a recording of dirty-ring events tells, with a migration forecast",
}


class Command(Protocol):
    """A module of commands/. One with USES_DEVICE = False has no --device."""

    DESCRIPTION: str

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...
    def run(self, args: argparse.Namespace, /) -> int: ...


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from kvmring.facts import version_line

        print(version_line())
        parser.exit(DONE)


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmring",
        description="KVM dirty-page logging on a real /dev/kvm.",
        epilog="Exit status: 0 done, 1 a check failed, 2 usage, 3 KVM or a capability is missing.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="what a bug report needs")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("-v", "--verbose", action="store_true", help="tracebacks for errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        if name != wanted:
            commands.add_parser(name, help=what)
            continue
        module = cast("Command", importlib.import_module(f"kvmring.commands.{name}"))
        # resolve: a command may have its own form of a common option
        chosen = commands.add_parser(
            name,
            parents=[common],
            help=what,
            description=module.DESCRIPTION,
            conflict_handler="resolve",
        )
        if getattr(module, "USES_DEVICE", True):
            chosen.add_argument("--device", default="/dev/kvm", help="the KVM device (%(default)s)")
        module.add_arguments(chosen)
        chosen.set_defaults(run=module.run)
    return parser


def _status(error: Exception) -> int:
    if isinstance(error, KvmUnavailable | KvmNotSupported):
        return MISSING
    if isinstance(error, ValueError | TypeError) and not isinstance(error, KvmringError):
        return USAGE
    return FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    wanted = next((word for word in words if not word.startswith("-")), None)
    args = _parser(wanted).parse_args(words)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("kvmring: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has left; keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KvmringError, OSError, ValueError, TypeError, MemoryError) as error:
        if args.verbose:
            raise
        print(f"kvmring: {_one_line(error)}", file=sys.stderr)
        return _status(error)


def _one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, KvmError):
        return text
    return text.replace("\n", " ")
