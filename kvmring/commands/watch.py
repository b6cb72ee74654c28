"""`kvmring watch`: a process's dirty rings live, or every VM's for Prometheus (--listen)."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from kvmring.commands import DONE
from kvmring.commands.watch_view import History, as_json, screen
from kvmring.host import Watcher, judge

if TYPE_CHECKING:
    import argparse

__all__ = ["DESCRIPTION", "USES_DEVICE", "add_arguments", "run"]

DESCRIPTION = (
    "Show what the dirty rings of a process's VMs do: pages per second, how full they get, "
    "harvests, full exits, hot pages, and a verdict. As root the figures are the kernel's own "
    "(tracepoints); otherwise the rings are polled. Nothing is written to the process. With "
    "--listen, serve the figures of every VM of this host as OpenMetrics."
)
USES_DEVICE = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("pid", type=int, nargs="?", metavar="PID", help="a process that holds VMs")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds (%(default)s)"
    )
    parser.add_argument("--count", type=int, metavar="N", help="end after so many intervals")
    parser.add_argument("--vcpu", type=int, metavar="N", help="this vCPU alone")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="hot pages to name (%(default)s)"
    )
    parser.add_argument(
        "--poll", action="store_true", help="poll the rings, also where tracepoints can be had"
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="serve every VM's figures; no host: loopback"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    if (args.pid is None) == (args.listen is None):
        raise ValueError("name either a PID (kvmring ps lists them) or --listen HOST:PORT")
    if not 0.05 <= args.interval <= 3600:
        raise ValueError(f"--interval must lie between 0.05 and 3600 seconds, not {args.interval}")
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count must be at least 1, not {args.count}")
    if not 0 <= args.top <= 100:
        raise ValueError(f"--top must lie between 0 and 100, not {args.top}")
    if args.listen is not None:
        from kvmring.host.metrics import serve

        serve(args.listen, interval_s=args.interval)
    with Watcher(args.pid, vcpu=args.vcpu, top=args.top, events=not args.poll) as watcher:
        if watcher.why_polling is not None and not args.poll:
            print(f"kvmring: polling the rings: {watcher.why_polling}", file=sys.stderr)
        try:
            _watch(watcher, args)
        except ProcessLookupError as error:
            print(f"kvmring: {error}", file=sys.stderr)
    return DONE


def _watch(watcher: Watcher, args: argparse.Namespace) -> None:
    console = Console(highlight=False)
    history = History()
    live = None
    if console.is_terminal and not args.json:
        live = Live(console=console, auto_refresh=False)
        live.start()
    try:
        shown = 0
        while args.count is None or shown < args.count:
            used, began = time.process_time(), time.monotonic()
            rings = watcher.follow(args.interval)
            verdict = judge(rings)
            cost = (time.process_time() - used) / max(1e-9, time.monotonic() - began)
            if args.json:
                print(json.dumps(as_json(watcher, rings, verdict, cost)), flush=True)
            else:
                picture = screen(watcher, rings, history.add(rings), verdict, cost)
                if live is not None:
                    live.update(picture, refresh=True)
                else:
                    console.print(picture)
                    console.print()
            shown += 1
    finally:
        if live is not None:
            live.stop()
