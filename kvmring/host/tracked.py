"""TrackerRecorder: a recording of what a Tracker of this process collects.

It stands between the Tracker and whoever takes its collections, and costs nothing when it is
not there. `kvmring plot` reads its files like those of `kvmring trace`.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Self

from kvmring.host.recording import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from kvmring.dirtyset import DirtySet
    from kvmring.tracker import Tracker

__all__ = ["TrackerRecorder"]


class TrackerRecorder:
    """Records what a Tracker's collections hand over.

    Call its collect() and finish() instead of the Tracker's. Each gives one `push` row per
    page, with the time of the collection and neither vCPU nor counters, and one `reset` row
    after them, also when no page was dirty. A page that was written several times between two
    collections is one row: these are pages per collection, not entries of a ring.

    Args:
        tracker: The Tracker; it is neither started nor closed here.
        path: The file; one that exists is replaced.

    Raises:
        KvmringError: pyarrow is missing, or the file cannot be written.

    Threads: one at a time.
    """

    def __init__(self, tracker: Tracker, path: Path) -> None:
        self._tracker = tracker
        self._pid = os.getpid()
        self._recorder = Recorder(
            path, source="tracker", ring_entries=tracker.vm.ring_entries or None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Make the file whole. The Tracker goes on as it is."""
        self._recorder.close()

    def collect(self, *, flush: bool = True) -> DirtySet:
        """Collect by the Tracker, record the pages, and return them."""
        return self._record(self._tracker.collect(flush=flush))

    def finish(self, save: Callable[[], object] | None = None) -> DirtySet:
        """Finish by the Tracker, record the pages, and return them."""
        return self._record(self._tracker.finish(save))

    def _record(self, dirty: DirtySet) -> DirtySet:
        now = time.monotonic_ns()
        row = {"time_ns": now, "pid": self._pid}
        for slot, bitmap in dirty.items():
            pages = bitmap.page_numbers()
            if pages:
                self._recorder.add({**row, "event": "push", "slot": slot, "page": pages})
            if dirty.slot_of(slot).log_dirty:
                self._recorder.slots[slot] = len(bitmap)
        self._recorder.add({**row, "event": "reset"})
        return dirty
