"""RingServer: serves full rings while their vCPUs run, without leaving C.

A Tracker lends it the DirtySet that entries go into, and takes that back before it looks at it.
csrc/serve.c says what holds then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmring import ioctls
from kvmring.abi import check, ffi, lib, out, owner, uninitialised

if TYPE_CHECKING:
    from kvmring._kvm import Server, Set
    from kvmring.abi import Exit
    from kvmring.dirtyset import DirtySet
    from kvmring.ioctls import ResetCounts
    from kvmring.vcpu import VCPU

__all__ = ["RingServer", "Served"]


class Served(NamedTuple):
    """What was done since the set was lent: struct kvr_served. last: the last reset."""

    fulls: int
    full_ns: int
    entries: int
    resets: int
    short_resets: int
    last: ResetCounts


class RingServer:
    """Serves the full rings of any vCPU that is run through it.

    Threads: run() in each vCPU's thread; lend() and take_back() in any, one at a time.
    """

    __slots__ = ("__weakref__", "_lent", "_server", "_suspects")

    def __init__(self) -> None:
        place = out("struct kvr_server *")
        check("server", lib.kvr_server_new(place))
        self._server: Server = owner(place, lib.kvr_server_free)
        self._suspects = uninitialised("struct kvr_gfn[]", lib.KVR_SUSPECTS)
        self._lent: tuple[DirtySet, Set] | None = None  # alive for as long as C may write to it

    def lend(self, dirty: DirtySet) -> None:
        """Have full rings served into a set; nobody may use it until take_back()."""
        lent = dirty, dirty.c_set()
        self._lent = lent
        check("server", lib.kvr_server_lend(self._server, lent[1]))

    def take_back(self) -> Served:
        """Wait for a service under way, and get the set back; also when none is lent."""
        served = ffi.new("struct kvr_served *")
        gfns = self._suspects
        check(
            "server",
            lib.kvr_server_take_back(self._server, served, gfns, lib.KVR_SUSPECTS),
        )
        self._lent = None
        return Served(
            served.fulls,
            served.full_ns,
            served.entries,
            served.resets,
            served.short_resets,
            ioctls.ResetCounts.of(served.last, gfns),
        )

    def run(self, vcpu: VCPU) -> Exit:
        """Run a vCPU as VCPU.run() does, but go on after each full ring that could be served."""
        return ioctls.run_serving(vcpu, self._server)
