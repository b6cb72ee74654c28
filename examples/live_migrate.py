"""Live migration of a VM's memory to another process, while its vCPUs write it.

    live_migrate.py --listen ADDR      the destination: a VM that waits for its memory
    live_migrate.py --connect ADDR     the source: a guest that runs until it has moved
    live_migrate.py [--self-test]      both, the destination as a process of its own

ADDR is HOST:PORT, or the path of a Unix socket. At the end both sides exchange a SHA-256 over all
RAM; the exit status is 0 only when it is the same. Registers and device state are left out: the
guest does not go on at the destination, whose memory is what is proven here.

migration/stream.py is the protocol, migration/machine.py the source's VM. The rest is here:
round 0 sends all RAM; each further round sends what Tracker.collect() names, read after it
returned, so that a page written later is in the next round. What is collected is owed: the set
that ends the rounds goes out together with finish()'s. When the connection breaks at any moment,
the guest runs on under a new Tracker, and the next attempt sends all RAM again.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from migration.machine import Machine
from migration.stream import (
    HASH_RATE,
    MAX_CHUNK,
    PAGE,
    Kind,
    Stream,
    StreamError,
    address_of,
    chunks,
    connect,
    receive_ram,
    sha256_of,
)
from rich.console import Console
from rich.table import Table

from kvmring import KvmNotSupported, KvmringError, KvmUnavailable, System

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvmring import DirtySet


class TooSlow(Exception):
    """The guest dirties memory faster than it can be sent, and --keep-limit forbids a stop."""


@dataclass(slots=True, kw_only=True)
class Round:
    """One round: what it sent, and what the guest dirtied meanwhile (None after the last)."""

    round: int
    pages: int
    seconds: float
    mb_per_s: float
    stores: int
    dirty_pages: int | None = None
    dirty_pages_per_s: float | None = None
    expected_downtime_ms: float | None = None

    def cells(self) -> list[str]:
        """Return a row of the table."""
        numbers = (self.mb_per_s, self.dirty_pages_per_s, self.expected_downtime_ms)
        rest = ["-" if number is None else f"{number:.1f}" for number in numbers]
        return [str(self.round), str(self.pages), f"{self.seconds:.3f}", *rest]


@dataclass(slots=True, kw_only=True)
class Result:
    """What came out."""

    schema: int = 1
    equal: bool = False
    source: str = ""
    sha256: str = ""
    sha256_destination: str = ""
    converged: bool = False
    downtime_ms: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    failures: list[dict[str, str | int]] = field(default_factory=list)


class Display:
    """Lines on stdout; on a terminal also what is going on at the moment."""

    def __init__(self, stack: ExitStack, *, quiet: bool) -> None:
        self._console = Console(highlight=False, quiet=quiet)
        live = self._console.is_terminal and not quiet
        self._status = stack.enter_context(self._console.status("")) if live else None
        self._next = 0.0

    def line(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def working(self, text: str) -> None:
        """Show what is going on, ten times a second at most."""
        if self._status is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            self._status.update(text)

    def end(self) -> None:
        """Nothing goes on any more."""
        if self._status is not None:
            self._status.stop()

    def table(self, rounds: Iterable[Round]) -> None:
        """Print the table of rounds."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("round", "pages", "seconds", "MB/s", "dirty pages/s", "downtime ms"):
            table.add_column(name, justify="right")
        for row in rounds:
            table.add_row(*row.cells())
        self._console.print(table)


class Migration:
    """One attempt: sends a Machine's memory over a stream."""

    def __init__(
        self, machine: Machine, stream: Stream, options: argparse.Namespace, show: Display
    ) -> None:
        self.machine, self.stream, self.options, self.show = machine, stream, options, show
        self.result = Result(source=machine.tracker.source.value)
        cap = options.bandwidth_mbps
        self._rate = cap * 1e6 / 8 if cap else None  # bytes per second
        step = min(MAX_CHUNK, int(self._rate / 10)) if self._rate else MAX_CHUNK
        self._step = stream.batch = max(step // PAGE, 1) * PAGE

    def run(self) -> Result:
        """Do it; the machine stands still, and frozen, after that."""
        stream, tracker, result = self.stream, self.machine.tracker, self.result
        stream.send_hello(self.machine.rams)
        stream.patience_s += sum(ram.size_bytes for ram in self.machine.rams) / HASH_RATE
        tracker.collect()  # all RAM is read after this: round 0 has whatever it names
        owed = self.rounds()
        stopped = time.perf_counter()
        stream.send(Kind.STOPPED)
        owed |= tracker.finish(self.machine.save)
        self.send_round(owed)
        result.downtime_ms = (time.perf_counter() - stopped) * 1e3
        own = sha256_of(self.machine.rams)
        stream.send(Kind.HASH, size=len(own), payload=own)
        theirs = bytes(stream.expect(Kind.HASH).payload)
        result.sha256, result.sha256_destination = own.hex(), theirs.hex()
        result.equal = own == theirs
        return result

    def rounds(self) -> DirtySet:
        """Send rounds until the rest fits into the downtime; returns the rest, still to be sent."""
        options, bandwidth, dirty = self.options, 1.0, None
        limit_ms = options.downtime_ms
        while True:
            begin = time.perf_counter()
            row = self.send_round(dirty)
            if row.pages:
                bandwidth = row.mb_per_s * 1e6
            dirty = self.machine.tracker.collect()
            row.dirty_pages = dirty.count()
            row.dirty_pages_per_s = row.dirty_pages / (time.perf_counter() - begin)
            row.expected_downtime_ms = expected = row.dirty_pages * PAGE / bandwidth * 1e3
            self.show.line(
                f"round {row.round}: sent {row.pages} pages in {row.seconds:.3f} s; "
                f"{row.dirty_pages} are dirty again, which is {expected:.1f} ms of downtime"
            )
            done = row.round + 1
            if done >= options.rounds_min and expected <= limit_ms:
                self.result.converged = True
                return dirty
            if done >= options.rounds_max:
                text = (
                    f"it does not converge: after {done} rounds the expected downtime is "
                    f"{expected / limit_ms:.1f} times the limit of {limit_ms:g} ms"
                )
                if options.keep_limit:
                    raise TooSlow(text)
                self.show.line(f"{text}; the vCPUs are stopped all the same")
                return dirty

    def send_round(self, dirty: DirtySet | None) -> Round:
        """Send what is dirty, or all RAM, and wait until the destination has it."""
        number, pages, begin = len(self.result.rounds), 0, time.perf_counter()
        stores = self.machine.stores()
        for ram in self.machine.rams:
            # slot by slot: a run of dirty.runs() may reach from one slot into the next
            runs = [(0, ram.num_pages)] if dirty is None else dirty[ram.slot].runs()
            for first, length in runs:
                for offset, size in chunks(first, length, self._step):
                    payload = ram.read(offset, size)
                    self.stream.send(Kind.PAGES, ram.gpa + offset, size, payload)
                    pages += size // PAGE
                    self.show.working(f"round {number}: {pages} pages")
                    if self._rate:
                        due = begin + pages * PAGE / self._rate
                        ahead = due - time.perf_counter()
                        if ahead > 0.005:
                            time.sleep(ahead)
        self.stream.send(Kind.END, number, pages)
        answer = self.stream.expect(Kind.ACK)
        if (answer.number, answer.size) != (number, pages):
            raise StreamError(f"the destination has {answer.size} of {pages} pages")
        seconds = time.perf_counter() - begin
        stores = self.machine.stores() - stores
        speed = pages * PAGE / seconds / 1e6
        row = Round(round=number, pages=pages, seconds=seconds, mb_per_s=speed, stores=stores)
        self.result.rounds.append(row)
        return row


def source(options: argparse.Namespace, address: str, show: Display) -> Result:
    """Migrate; an attempt that fails leaves the guest running, and the next begins anew."""
    failures: list[dict[str, str | int]] = []
    with ExitStack() as stack:
        hot = options.hot or max(options.pages // 8, options.vcpus)
        machine = Machine(stack, pages=options.pages, hot=hot, vcpus=options.vcpus)
        show.line(f"tracking by {machine.tracker.source.value}: {machine.tracker.why}")
        while True:
            try:
                with connect(address, options.timeout_s) as sock:
                    stream = Stream(sock, options.timeout_s)
                    result = Migration(machine, stream, options, show).run()
                result.failures = failures
                return result
            except (StreamError, TooSlow) as error:
                before = machine.stores()
                machine.recover()
                machine.await_stores(before, options.timeout_s)
                since = machine.stores() - before
                show.line(f"{error}; the guest runs on, {since} stores since")
                failures.append({"error": str(error), "stores_since": since})
                if isinstance(error, TooSlow) or len(failures) >= options.attempts:
                    raise


def run_source(options: argparse.Namespace, address: str) -> Result:
    """Migrate, and print what is to be seen of it."""
    with ExitStack() as stack:
        show = Display(stack, quiet=options.json)
        result = source(options, address, show)
        show.end()
        show.table(result.rounds)
        show.line(f"downtime {result.downtime_ms:.1f} ms, limit {options.downtime_ms:g} ms")
        show.line(f"sha256 here:  {result.sha256}\nsha256 there: {result.sha256_destination}")
        show.line("PASS: the memory is equal" if result.equal else "FAIL: the memory differs")
    return result


def destination(options: argparse.Namespace) -> int:
    """Wait for one migration, and be its destination."""
    family, where = address_of(options.listen)
    with ExitStack() as stack:
        with socket.socket(family) as listener:
            if family == socket.AF_UNIX:
                stack.callback(lambda: Path(options.listen).unlink(missing_ok=True))
            listener.bind(where)
            listener.listen(1)
            sock = stack.enter_context(listener.accept()[0])
        vm = stack.enter_context(stack.enter_context(System()).create_vm())
        own, theirs = receive_ram(Stream(sock, options.timeout_s), vm)
    if options.json:
        print(json.dumps({"schema": 1, "equal": own == theirs, "sha256": own.hex()}))
    else:
        print(f"sha256 here: {own.hex()}: {'equal' if own == theirs else 'the source differs'}")
    return 0 if own == theirs else 1


def self_test(options: argparse.Namespace) -> Result:
    """Be the source, with a second process as the destination, and compare."""
    with tempfile.TemporaryDirectory() as place:
        address = f"{place}/socket"
        command = [sys.executable, __file__, "--json", "--listen", address]
        command += ["--timeout-s", str(options.timeout_s)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            try:
                result = run_source(options, address)
                said = json.loads(child.communicate(timeout=options.timeout_s)[0])
            finally:
                child.kill()
        result.equal &= said["equal"] and said["sha256"] == result.sha256
    return result


def at_least(least: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """Return a check of a number on the command line."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g}")
        return value

    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Migrate a running VM's memory to another process, and compare.",
        epilog="Exit status: 0 equal, 1 not, or it failed, 2 usage, 3 KVM is missing.",
    )
    role = parser.add_mutually_exclusive_group()
    role.add_argument("--listen", metavar="ADDR", help="be the destination")
    role.add_argument("--connect", metavar="ADDR", help="be the source")
    role.add_argument("--self-test", action="store_true", help="both (without any of the three)")
    for name, kind, default, text in (
        ("--pages", at_least(2), 2048, "pages of RAM"),
        ("--hot", at_least(1), None, "of these, those the guest writes (an eighth)"),
        ("--vcpus", at_least(1), 2, "vCPUs, all of which write for ever"),
        ("--downtime-ms", at_least(0.001, float), 300.0, "longest time without the guest"),
        ("--bandwidth-mbps", at_least(0.001, float), None, "cap, in megabits per second"),
        ("--rounds-min", at_least(1), 3, "rounds before the vCPUs may be stopped"),
        ("--rounds-max", at_least(1), 10, "rounds after which they are stopped anyway"),
        ("--attempts", at_least(1), 1, "how often to begin when the connection breaks"),
        ("--timeout-s", at_least(0.001, float), 30.0, "longest wait for the other side"),
    ):
        shown = text if default is None else f"{text} (%(default)s)"
        parser.add_argument(name, type=kind, default=default, metavar="N", help=shown)
    parser.add_argument(
        "--keep-limit", action="store_true", help="cancel instead, when it does not converge"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        address_of(options.listen or options.connect or "/")
    except ValueError as error:
        parser.error(str(error))
    if not options.vcpus <= (options.hot or options.pages) <= options.pages:
        parser.error("--hot must lie between --vcpus and --pages")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = parse(argv)
    try:
        if options.listen:
            return destination(options)
        result = run_source(options, options.connect) if options.connect else self_test(options)
    except KeyboardInterrupt:
        return 130
    except (StreamError, TooSlow, KvmringError, OSError, ValueError) as error:
        who = "live_migrate, destination" if options.listen else "live_migrate"
        print(f"{who}: {error}", file=sys.stderr)
        return 3 if isinstance(error, KvmUnavailable | KvmNotSupported) else 1
    if options.json:
        print(json.dumps(asdict(result), indent=2))
    return 0 if result.equal else 1


if __name__ == "__main__":
    sys.exit(main())
