"""`kvmring ps`: the processes of this host that hold VMs; host/processes.py looks for them."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from kvmring.commands import DONE
from kvmring.host import scan

if TYPE_CHECKING:
    import argparse

    from kvmring.host import HostVcpu, Scan, VmProcess

__all__ = ["DESCRIPTION", "USES_DEVICE", "add_arguments", "run"]

DESCRIPTION = (
    "List every process that holds VMs, with its vCPUs, their dirty rings, and the threads that "
    "run them and how those were found (? when they were not). Other users' processes need root."
)
USES_DEVICE = False


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    found = scan()
    if args.json:
        print(json.dumps(_document(found), indent=2))
    else:
        _print(found)
    if found.unreadable:
        n = len(found.unreadable)
        rest = "; root may" if os.geteuid() else ""
        print(
            f"kvmring: {n} process{'es' if n > 1 else ''} may not be looked into{rest}",
            file=sys.stderr,
        )
    return DONE


def _document(found: Scan) -> dict[str, object]:
    return {
        "schema": 1,
        "processes": [
            {
                "pid": process.pid,
                "user": process.user,
                "uid": process.uid,
                "name": process.name,
                "vms": process.vms,
                "vms_exact": process.vms_exact,
                "memory_bytes": process.memory_bytes,
                "uptime_s": round(process.uptime_s, 2),
                "vcpus": [
                    {
                        "id": vcpu.id,
                        "ring_entries": vcpu.ring_entries,
                        "thread": vcpu.thread,
                        "found_by": vcpu.found_by,
                    }
                    for vcpu in process.vcpus
                ],
            }
            for process in found.processes
        ],
        "unreadable_processes": len(found.unreadable),
    }


def _print(found: Scan) -> None:
    # rich takes longer to import than all the rest takes to run
    from rich.console import Console

    from kvmring.commands.output import table

    rows = table(
        *("pid", "user", "name", "VMs", "vCPUs", "ring", "memory", "uptime", "threads"),
        right=("pid", "VMs", "vCPUs", "memory", "uptime"),
    )
    for process in found.processes:
        rows.add_row(
            str(process.pid),
            process.user,
            process.name,
            str(process.vms) if process.vms_exact else f"<= {process.vms}",
            str(len(process.vcpus)),
            _rings(process),
            f"{process.memory_bytes >> 20} MiB",
            _duration(process.uptime_s),
            _threads(process.vcpus),
        )
    console = Console(highlight=False)
    if found.processes:
        console.print(rows)
    else:
        console.print("no process that may be looked into holds a VM")


def _rings(process: VmProcess) -> str:
    sizes = sorted({vcpu.ring_entries for vcpu in process.vcpus if vcpu.ring_entries is not None})
    words = [str(size) for size in sizes]
    if len(process.rings) < len(process.vcpus) or not words:
        words.append("no ring mapped")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h}h"
    return f"{h}h {m}m" if h else f"{m}m {s}s"


def _threads(vcpus: tuple[HostVcpu, ...]) -> str:
    """Name each vCPU's thread and how it was found; many are counted instead."""
    shown = [
        f"{vcpu.id}:{vcpu.thread} {vcpu.found_by}" if vcpu.thread else f"{vcpu.id}:?"
        for vcpu in vcpus
    ]
    if len(shown) <= 4:
        return ", ".join(shown)
    found = sum(vcpu.thread is not None for vcpu in vcpus)
    return f"{', '.join(shown[:2])}, ... ({found} of {len(vcpus)} found)"
