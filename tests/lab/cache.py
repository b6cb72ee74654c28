"""The lab's cache directory: where it is, locks, atomic writes, pruning.

What the lab downloads or derives is kept under $XDG_CACHE_HOME/kvmring/lab
(~/.cache without the variable). Several labs, of several checkouts, may use it
at once: whoever makes an entry holds that entry's file lock, and an entry
appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_KEEP_SECONDS = 30 * 86400
_KEEP_RUNS = 40


def say(message: str) -> None:
    """Tell the user what takes time, on stderr."""
    print(f"kvmring-lab: {message}", file=sys.stderr, flush=True)


def digest(parts: Iterable[bytes | str]) -> str:
    """Return a short content key of *parts*, each length-delimited."""
    sha = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        sha.update(len(raw).to_bytes(8, "little"))
        sha.update(raw)
    return sha.hexdigest()[:20]


class Cache:
    """One cache directory and the rules for writing into it."""

    def __init__(self, top: Path | None = None) -> None:
        """Use *top*, or the user's cache directory."""
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self.top = top or Path(base) / "kvmring" / "lab"

    def dir(self, name: str) -> Path:
        """Return the subdirectory *name*, made if need be."""
        path = self.top / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the exclusive lock *name*; says so when it has to wait for another lab."""
        path = self.dir("locks") / f"{name}.lock"
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another lab that makes {name}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a new directory on the cache's own disk; it is gone afterwards.

        The same disk, because entries are moved from here to their names by
        rename(2).
        """
        path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self.dir("tmp")))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def run_dir(self, label: str) -> Path:
        """Return a new directory for one VM's logs.

        Beyond the latest few, those of yesterday and before are removed; a
        younger one may belong to a lab that still runs.
        """
        runs = self.dir("runs")
        # Names begin with the time.
        for old in sorted(runs.iterdir())[:-_KEEP_RUNS]:
            _remove_if_unused_for(86400, old)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return Path(tempfile.mkdtemp(prefix=f"{stamp}-{label}-", dir=runs))

    def used(self, path: Path) -> Path:
        """Mark *path* as used today, so that `prune` keeps it; return it."""
        with contextlib.suppress(OSError):
            os.utime(path)
        return path

    def prune(self) -> None:
        """Remove derived entries that nothing used for a month.

        Left-overs of killed labs in tmp/ go after a day. Called when a new
        image is made, the only time the cache grows by much.
        """
        for name, age in (("images", _KEEP_SECONDS), ("kernels", _KEEP_SECONDS), ("tmp", 86400)):
            for path in self.dir(name).iterdir():
                _remove_if_unused_for(age, path)


def _remove_if_unused_for(seconds: float, path: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > seconds:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
