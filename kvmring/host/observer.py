"""RingObserver: another process's dirty ring, followed by copies of it. csrc/observe.c compares.

It needs no privilege over the process's own user, and polls: what it counts is exact as long
as it polls faster than the ring is filled. A poll that may have missed a whole round says so.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmring.abi import check, ffi, lib, out, owner, uninitialised
from kvmring.errors import KvmError, StateError, int_between
from kvmring.host import procfs
from kvmring.owned import Owned
from kvmring.ring import DirtyGfn

if TYPE_CHECKING:
    from kvmring._kvm import Observer
    from kvmring.host.processes import HostVcpu

__all__ = ["RingObserver", "RingView"]

_LOOK_NS = 200_000_000  # ids are not reused faster: the kernel goes round all others first


@dataclass(frozen=True, slots=True, kw_only=True)
class RingView:
    """What one poll saw of a ring.

    Attributes:
        time_ns: CLOCK_MONOTONIC when the copy was made.
        entries: Size of the ring.
        write: Position of the entry that KVM writes next; None: all entries are free, or
            none is, and nothing tells.
        pushed: Entries pushed since the poll before.
        lapped: `pushed` is a lower bound: the ring may have gone round in between.
        dirty: Entries that wait to be harvested.
        harvested: Entries that were harvested and wait for KVM_RESET_DIRTY_RINGS.
        reset: Entries that were reset since the poll before; a lower bound when lapped.
        pages: Entries pushed since the poll before, the latest first, or an even selection
            of them.
    """

    time_ns: int
    entries: int
    write: int | None
    pushed: int
    lapped: bool
    dirty: int
    harvested: int
    reset: int
    pages: tuple[DirtyGfn, ...]

    @property
    def fill(self) -> int:
        """Entries in use: KVM ends KVM_RUN when those come near the ring's size."""
        return self.dirty + self.harvested


def _new(pid: int, address: int, entries: int) -> Observer:
    place = out("struct kvr_observer *")
    check("observe", lib.kvr_observer_new(pid, address, entries, place))
    handle: Observer = owner(place, lib.kvr_observer_free)
    return handle


class RingObserver(Owned["Observer"]):
    """Follows the dirty ring of one vCPU of another process. Nothing of that process is kept.

    The entry of a page that is pushed again at the same position, between two polls that both
    find it reset, leaves no trace: a working set that divides the ring is undercounted when
    it is polled more slowly than it is harvested.

    Args:
        pid: The process.
        vcpu: The vCPU, of vms() or inspect(), with a ring.
        pages: How many of the pages pushed a poll names at most.

    Raises:
        StateError: The vCPU has no ring that is mapped.

    Threads: one poll at a time.
    """

    __slots__ = ("_fresh", "_in_use", "_looked_ns", "_pages", "_started", "_view", "pid", "vcpu")

    def __init__(self, pid: int, vcpu: HostVcpu, *, pages: int = 64) -> None:
        if vcpu.ring_entries is None or vcpu.ring_address is None:
            raise StateError(f"vCPU {vcpu.id} of process {pid} has no dirty ring mapped")
        self.pid = int_between("pid", pid, 1, 1 << 22)
        self.vcpu = vcpu
        self._pages = int_between("pages", pages, 0, vcpu.ring_entries)
        self._started = procfs.identity(pid)
        self._fresh = uninitialised("struct kvr_gfn[]", max(self._pages, 1))
        self._view = ffi.new("struct kvr_ring_view *")
        self._in_use = 0
        self._looked_ns = 0
        super().__init__(_new(self.pid, vcpu.ring_address, vcpu.ring_entries))

    def _about(self) -> str:
        return f"vCPU {self.vcpu.id} of process {self.pid}"

    def _same_process(self, now_ns: int) -> bool:
        """Tell, now and then, whether the id has not gone to another process meanwhile."""
        if now_ns - self._looked_ns >= _LOOK_NS:
            self._looked_ns = now_ns
            return procfs.identity(self.pid) == self._started
        return True

    def poll(self) -> RingView:
        """Copy the ring and compare it with the copy before; the first poll counts nothing.

        Raises:
            ProcessLookupError: The process has ended, or has let go of the ring.
            PermissionError: It may not be read: it is another user's, or protected.
        """
        view = self._view
        n = lib.kvr_observer_poll(self.handle, self.vcpu.id, self._fresh, self._pages, view)
        if n in (-errno.ESRCH, -errno.EFAULT) or not self._same_process(view.time_ns):
            raise ProcessLookupError(
                f"process {self.pid} has ended, or has unmapped the ring of vCPU {self.vcpu.id}"
            )
        if n in (-errno.EPERM, -errno.EACCES):
            raise PermissionError(
                f"the memory of process {self.pid} may not be read: run this as its user or as "
                "root; kernel.yama.ptrace_scope may ask for root"
            )
        if n < 0:
            raise KvmError(-n, "process_vm_readv")
        in_use = view.dirty + view.harvested
        reset = max(0, view.pushed + self._in_use - in_use)
        self._in_use = in_use
        return RingView(
            time_ns=view.time_ns,
            entries=self.vcpu.ring_entries or 0,
            write=view.write if view.known else None,
            pushed=view.pushed,
            lapped=bool(view.lapped),
            dirty=view.dirty,
            harvested=view.harvested,
            reset=reset,
            pages=tuple(DirtyGfn(gfn.slot, gfn.vcpu, gfn.offset) for gfn in self._fresh[0:n]),
        )
