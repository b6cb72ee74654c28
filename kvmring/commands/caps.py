"""`kvmring caps`: what this host's KVM offers, as tables or JSON; the work is in caps.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from kvmring import caps
from kvmring.commands import DONE
from kvmring.commands.output import print_json, table
from kvmring.system import System

if TYPE_CHECKING:
    import argparse

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Ask KVM what it offers for dirty logging, and find by trying which ring sizes it takes."
)


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    with System(args.device) as kvm:
        found = caps.inspect_host(kvm)
    if args.json:
        print_json(found.as_json())
        return DONE
    console = Console(highlight=False)
    host = found.host
    parameters = host["parameters"]
    console.print(f"Linux {host['kernel']} {host['machine']}, {host['page_size']}-byte pages")
    console.print(f"{host['device']}: API {host['api_version']}, backend {host['backend']}")
    if isinstance(parameters, dict) and parameters:
        console.print("  ".join(f"{name}={value}" for name, value in parameters.items()))
    console.print()
    modes = table("mode", "offered", "by")
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
    answers = table("capability", "no.", "value", "meaning", right=("no.", "value"))
    for answer in found.answers:
        answers.add_row(answer.name, str(answer.number), str(answer.value), answer.meaning)
    console.print(answers)
    return DONE
