"""The `kvmring` command: arguments in, text or JSON out. Each command's work is elsewhere.

Data goes to stdout, messages to stderr. Exit status: 0 done, 1 a check failed or a call did,
2 usage, 3 KVM or a capability is missing, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import kvmring
from kvmring import caps, demo
from kvmring.errors import KvmError, KvmNotSupported, KvmringError, KvmUnavailable
from kvmring.guests import ORDERS
from kvmring.system import System

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmring.caps import JsonValue

__all__ = ["main"]

DONE, FAILED, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130


def _version() -> str:
    facts = caps.host_facts()
    return (
        f"kvmring {kvmring.__version__}, Python {platform.python_version()}, "
        f"Linux {facts['kernel']} {facts['machine']}, {facts['backend']}, "
        f"{facts['page_size']}-byte pages"
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(_version())
        parser.exit(DONE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmring",
        description="KVM dirty-page logging on a real /dev/kvm.",
        epilog="Exit status: 0 done, 1 a check failed, 2 usage, 3 KVM or a capability is missing.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="what a bug report needs")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="/dev/kvm", help="the KVM device (%(default)s)")
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("-v", "--verbose", action="store_true", help="tracebacks for errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser(
        "caps",
        parents=[common],
        help="what this host's KVM offers for dirty logging",
        description="Ask KVM what it offers for dirty logging, and find by trying which ring "
        "sizes it takes.",
    )
    job = commands.add_parser(
        "demo",
        parents=[common],
        help="the main job: run a guest, read its dirty rings, compare with the truth",
        description="Run a guest that writes pages it knows, read the dirty rings until it is "
        "done, and compare the log with what was written and with what changed in memory. Exit "
        "status 1 when a page is missed or logged without a write.",
    )
    job.add_argument("--pages", type=int, default=16384, metavar="N", help="pages (%(default)s)")
    job.add_argument("--vcpus", type=int, default=2, metavar="N", help="vCPUs (%(default)s)")
    job.add_argument(
        "--entries",
        type=int,
        default=None,
        metavar="N",
        help=f"entries of each ring, a power of two ({demo.default_entries()})",
    )
    job.add_argument(
        "--order", choices=ORDERS, default="sequential", help="of the writes (%(default)s)"
    )
    job.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="how often all pages are written, logged and compared (%(default)s)",
    )
    job.add_argument("--seed", type=int, default=0, metavar="N", help="of --order random")
    return parser


def _print_json(document: dict[str, JsonValue]) -> None:
    print(json.dumps(document, indent=2))


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _caps(args: argparse.Namespace) -> int:
    with System(args.device) as kvm:
        found = caps.inspect_host(kvm)
    if args.json:
        _print_json(found.as_json())
        return DONE
    console = Console(highlight=False)
    host = found.host
    parameters = host["parameters"]
    console.print(f"Linux {host['kernel']} {host['machine']}, {host['page_size']}-byte pages")
    console.print(f"{host['device']}: API {host['api_version']}, backend {host['backend']}")
    if isinstance(parameters, dict) and parameters:
        console.print("  ".join(f"{name}={value}" for name, value in parameters.items()))
    console.print()
    modes = _table("mode", "offered", "by")
    for mode in found.modes:
        modes.add_row(mode.name, "yes" if mode.offered else "no", mode.meaning)
    console.print(modes)
    console.print()
    if found.ring is not None:
        ring = found.ring
        console.print(f"ring sizes taken: {ring.smallest} to {ring.largest} entries")
        if ring.reserved is not None:
            console.print(
                f"full at {ring.usable_of_smallest} of {ring.smallest}: "
                f"KVM keeps {ring.reserved} entries back"
            )
        console.print()
    table = _table("capability", "no.", "value", "meaning", right=("no.", "value"))
    for answer in found.answers:
        table.add_row(answer.name, str(answer.number), str(answer.value), answer.meaning)
    console.print(table)
    return DONE


def _demo(args: argparse.Namespace) -> int:
    with System(args.device) as kvm:
        result = demo.run(
            kvm,
            pages=args.pages,
            vcpus=args.vcpus,
            entries=args.entries,
            order=args.order,
            rounds=args.rounds,
            seed=args.seed,
        )
    if args.json:
        _print_json(result.as_json())
        return DONE if result.ok else FAILED
    console = Console(highlight=False)
    console.print(
        f"source {result.source}, vCPUs {len(result.vcpus)}, rings of "
        f"{result.entries_per_ring} entries, {result.order} order, "
        f"{result.rounds} round{'s' if result.rounds > 1 else ''}"
    )
    console.print()
    columns = (
        "vCPU",
        "slot",
        "pages",
        "entries",
        "ring full",
        "harvest ns/entry",
        "reset ns/entry",
    )
    table = _table(*columns, right=columns)
    for v in result.vcpus:
        # entries and times are the ring's, whatever the slots
        rest = (
            v.entries,
            v.ring_full_exits,
            *("-" if t is None else f"{t:.1f}" for t in v.per_entry()),
        )
        for slot, pages in v.pages.items():
            table.add_row(str(v.vcpu), str(slot), str(pages), *map(str, rest))
            rest = ()
    console.print(table)
    console.print()
    console.print(
        f"written: {result.pages_written} pages, with {result.stores} stores by the guest"
    )
    console.print(
        f"logged: {result.pages_from_ring} pages by the rings, "
        f"{result.pages_from_bitmap} by the backup bitmap"
        if result.source == "ring+bitmap"
        else f"logged: {result.pages_from_ring} pages by the rings"
    )
    if result.backup_writer:
        console.print("written outside any vCPU:", result.backup_writer.replace(", ", "\n  "))
    if result.suspects:
        console.print(f"{result.suspects} suspects of interrupted resets, protected anew")
    if result.ok:
        console.print("PASS: no page missed, none extra, and memory holds what was written")
        return DONE
    console.print(
        f"FAIL: {result.missed} missed, {result.extra} extra, "
        f"{result.wrong_contents} pages with wrong contents"
    )
    return FAILED


_COMMANDS = {"caps": _caps, "demo": _demo}


def _status(error: Exception) -> int:
    if isinstance(error, KvmUnavailable | KvmNotSupported):
        return MISSING
    if isinstance(error, ValueError | TypeError) and not isinstance(error, KvmringError):
        return USAGE
    return FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("kvmring: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has left; keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KvmringError, ValueError, TypeError, MemoryError) as error:
        if args.verbose:
            raise
        print(f"kvmring: {_one_line(error)}", file=sys.stderr)
        return _status(error)


def _one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, KvmError):
        return text
    return text.replace("\n", " ")
