"""RingEvents: kvm_dirty_ring_push, _reset and _exit of another process, through perf.

Every push and reset carries the ring's own counters, so that a sample of them gives exact
counts. It needs root (or CAP_PERFMON) and tracefs. csrc/events.c owns the descriptors.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from kvmring.abi import check, ffi, lib, out, owner, uninitialised
from kvmring.errors import KvmNotSupported, int_between
from kvmring.host import procfs
from kvmring.host.tracepoints import EventKind, find_tracefs, tracepoint
from kvmring.owned import Owned

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kvmring._kvm import Events

__all__ = ["EventKind", "RingEvent", "RingEvents"]

_BATCH = 8192
_EVENT = struct.Struct("=QQIIIIII")  # struct kvr_event
_KINDS = {kind.number: kind for kind in EventKind}
_REFUSED = (errno.EACCES, errno.EPERM)


class RingEvent(NamedTuple):
    """One event. What its kind does not carry is None.

    Attributes:
        time_ns: CLOCK_MONOTONIC.
        tid: The thread in which it happened: the vCPU's own for a push and an exit.
        vcpu: The vCPU's id.
        event: Which tracepoint.
        slot, page: PUSH: the memory slot, and the page within it. Where the slot stands in
            the guest's memory cannot be seen from outside.
        dirty_index: PUSH and RESET: entries pushed to this ring so far, modulo 2**32.
        reset_index: PUSH and RESET: entries of it that were reset so far, modulo 2**32.
    """

    time_ns: int
    tid: int
    vcpu: int
    event: EventKind
    slot: int | None
    page: int | None
    dirty_index: int | None
    reset_index: int | None


def _new(kinds: tuple[EventKind, ...], sample: int, tracefs: Path) -> Events:
    points = ffi.new("struct kvr_tracepoint[]", len(kinds))
    for point, kind in zip(points, kinds, strict=True):
        found = tracepoint(kind, tracefs)
        point.id = found.id
        point.kind = kind.number
        point.period = sample if kind is EventKind.PUSH else 1
        for name, (offset, size) in found.fields.items():
            field = getattr(point, name)
            field.offset, field.size = offset, size
    place = out("struct kvr_events *")
    check("perf_event_open", lib.kvr_events_new(points, len(kinds), place))
    handle: Events = owner(place, lib.kvr_events_free)
    return handle


class RingEvents(Owned["Events"]):
    """Records the dirty-ring events of a process's threads from now on.

    No event says which VM it belongs to: of two VMs in one process, vCPUs with the same id
    differ by their thread only.

    Args:
        pid: The process.
        kinds: Which events.
        sample: One push in so many is recorded; resets and exits always are.
        buffer_pages: Pages of each thread's buffer, a power of two.
        tracefs: Where tracefs is mounted; found without it.

    Raises:
        KvmNotSupported: No tracefs, no such tracepoints, or perf is not allowed; says which.
        ProcessLookupError: There is no such process.

    Threads: one read or wait at a time; another is StateError.
    """

    __slots__ = ("_buffer", "_lost", "_tids", "buffer_pages", "kinds", "lost", "pid")

    def __init__(
        self,
        pid: int,
        *,
        kinds: Iterable[EventKind] = tuple(EventKind),
        sample: int = 1,
        buffer_pages: int = 64,
        tracefs: Path | None = None,
    ) -> None:
        self.pid = int_between("pid", pid, 1, 1 << 22)
        self.kinds = tuple(dict.fromkeys(kinds))
        if not self.kinds:
            raise ValueError("name at least one kind of event")
        period = int_between("sample", sample, 1, 1 << 30)
        self.buffer_pages = int_between("buffer_pages", buffer_pages, 1, 1 << 16)
        if self.buffer_pages & (self.buffer_pages - 1):
            raise ValueError(f"buffer_pages must be a power of two, not {buffer_pages}")
        self.lost = 0
        self._tids: set[int] = set()
        self._buffer = uninitialised("struct kvr_event[]", _BATCH)
        self._lost = ffi.new("uint64_t *")
        super().__init__(_new(self.kinds, period, tracefs or find_tracefs()))
        try:
            self.rescan()
            if not self._tids:
                raise ProcessLookupError(f"there is no process {pid}")
        except BaseException:
            self.close()
            raise

    def _about(self) -> str:
        return f"process {self.pid}, {len(self._tids)} threads"

    @property
    def threads(self) -> frozenset[int]:
        """The threads that are recorded."""
        return frozenset(self._tids)

    def rescan(self) -> None:
        """Record threads that were made since, and let go of those that ended.

        Raises:
            KvmNotSupported: perf is not allowed.
        """
        now: set[int] = set()
        with suppress(*procfs.GONE):
            now = {int(name) for name in os.listdir(f"/proc/{self.pid}/task")}
        for tid in self._tids - now:
            lib.kvr_events_detach(self.handle, tid)
        self._tids &= now
        for tid in sorted(now - self._tids):
            got = lib.kvr_events_attach(self.handle, tid, self.buffer_pages)
            if -got in _REFUSED:
                raise KvmNotSupported(
                    "perf_event_open", "root or CAP_PERFMON is needed to record another process"
                )
            if got == -errno.ESRCH:
                continue  # ended meanwhile
            check("perf_event_open", got)
            self._tids.add(tid)

    def wait(self, timeout_s: float) -> bool:
        """Wait until a buffer is a quarter full; false when the time is up, or a signal came."""
        ms = int_between("timeout in ms", round(timeout_s * 1000), 0, 1 << 30)
        got = lib.kvr_events_wait(self.handle, ms)
        return check("poll", 0 if got == -errno.EINTR else got) > 0

    def read(self) -> list[RingEvent]:
        """Take what was recorded since the last read, in the order of time.

        Events that found no room are counted in `lost`.
        """
        rows: list[tuple[int, ...]] = []
        while True:
            self._lost[0] = 0
            n = check("perf", lib.kvr_events_read(self.handle, self._buffer, _BATCH, self._lost))
            self.lost += self._lost[0]
            rows.extend(_EVENT.iter_unpack(ffi.buffer(self._buffer, n * _EVENT.size)[:]))
            if n < _BATCH:
                break
        rows.sort()
        return [_event(row) for row in rows]


def _event(row: tuple[int, ...]) -> RingEvent:
    time_ns, page, tid, number, vcpu, slot, dirty, reset = row
    kind = _KINDS[number]
    if kind is EventKind.PUSH:
        return RingEvent(time_ns, tid, vcpu, kind, slot, page, dirty, reset)
    if kind is EventKind.RESET:
        return RingEvent(time_ns, tid, vcpu, kind, None, None, dirty, reset)
    return RingEvent(time_ns, tid, vcpu, kind, None, None, None, None)
