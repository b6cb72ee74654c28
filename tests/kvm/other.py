"""What the tests of host/ stand on: a neighbour process to look at, and tracefs where it can be."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from kvmring.host.processes import mount_points

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(__file__).parent / "neighbour.py"


class Neighbour:
    """A process of neighbour.py; ended with its context."""

    def __init__(self, *plans: dict[str, int]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(PROGRAM), json.dumps(plans)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.pid = self._answer()["pid"]
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _answer(self) -> dict[str, int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the neighbour has died; its last words are on stderr"
        answer: dict[str, int] = json.loads(line)
        return answer

    def order(self, do: str, **what: str | float) -> None:
        """Give an order, and do not wait for it to be done."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.process.stdin.flush()

    def flow(self, **what: str | float) -> None:
        """Have every vCPU's thread made, and waiting for go()."""
        self.do("flow", **what)

    def go(self) -> None:
        """Let them run."""
        self.order("go")

    def done(self) -> dict[str, int]:
        """Wait for an order to be done."""
        return self._answer()

    def do(self, do: str, **what: str | float) -> dict[str, int]:
        """Give an order and wait for its answer."""
        self.order(do, **what)
        return self._answer()

    @property
    def busy(self) -> bool:
        """Whether an order is still being done."""
        assert self.process.stdout is not None
        return not select.select([self.process.stdout], [], [], 0)[0]

    def end(self) -> None:
        """End the process, and wait until it is gone."""
        self.process.kill()
        self.process.communicate()


def mounted_tracefs(place: Path) -> Iterator[Path]:
    """Yield where tracefs is mounted; mount it at a place of the test's own where it is not."""
    if os.geteuid():
        pytest.skip("perf's tracepoints need root")
    found = [Path(path) for path in mount_points("tracefs")]
    if not found:
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tracefs", "tracefs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"tracefs cannot be mounted: {done.stderr.strip()}")
    where = (found or [place])[0]
    try:
        if not (where / "events/kvm/kvm_dirty_ring_push").is_dir():
            pytest.skip("this kernel has no kvm_dirty_ring tracepoints")
        yield where
    finally:
        if not found:
            subprocess.run(["umount", str(place)], check=True)
