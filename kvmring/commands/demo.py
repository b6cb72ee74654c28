"""`kvmring demo`: the main job's result as text or JSON; the work is in demo.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from kvmring import demo
from kvmring.commands import DONE, FAILED
from kvmring.commands.output import print_json, table
from kvmring.guests import ORDERS
from kvmring.system import System

if TYPE_CHECKING:
    import argparse

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Run a guest that writes pages it knows, read the dirty rings until it is done, and "
    "compare the log with what was written and with what changed in memory. Exit status 1 "
    "when a page is missed or logged without a write."
)


def add_arguments(job: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
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


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
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
        print_json(result.as_json())
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
    rows = table(*columns, right=columns)
    for v in result.vcpus:
        # entries and times are the ring's, whatever the slots
        rest = (
            v.entries,
            v.ring_full_exits,
            *("-" if t is None else f"{t:.1f}" for t in v.per_entry()),
        )
        for slot, pages in v.pages.items():
            rows.add_row(str(v.vcpu), str(slot), str(pages), *map(str, rest))
            rest = ()
    console.print(rows)
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
