"""Target: what a harvest can go into, DirtySet or DirtyGfns, and how a harvest fails.

A harvest is one C call on the way to which little may happen: an empty one is done thousands of
times a second. So the target makes the call itself, and what C tells of a fault goes into a
struct that the target keeps.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol, TypeVar

from kvmring.abi import check, ffi
from kvmring.errors import RingError, int_between

H = TypeVar("H")  # Obj of a VM, or Ring

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmring._kvm import Fault, Gfns, Set
    from kvmring.owned import Owned

    Harvest = Callable[[H, Gfns, Set, int, Fault], int]

__all__ = ["NO_LIMIT", "Target", "failed", "harvest", "new_fault"]

NO_LIMIT = 1 << 40
_STATES = {0: "free", 1: "DIRTY", 2: "RESET", 3: "DIRTY|RESET"}


class Target(Protocol):
    """What a harvest goes into."""

    def _fill(self, function: Harvest[H], source: Owned[H], most: int) -> int:
        """Make the C call under the target's lock; at most so many entries."""


def harvest(into: Target, limit: int | None, function: Harvest[H], source: Owned[H]) -> int:
    """Harvest into a target through one of C's two harvest functions; returns entries."""
    most = NO_LIMIT if limit is None else int_between("limit", limit, 0, NO_LIMIT)
    try:
        fill = into._fill
    except AttributeError:
        kind = type(into).__name__
        raise TypeError(f"harvest into DirtyGfns or a DirtySet, not {kind}") from None
    return fill(function, source, most)


def new_fault() -> Fault:
    """Return a struct for C to describe a fault in."""
    return ffi.new("struct kvr_fault *")


def failed(n: int, fault: Fault) -> tuple[int, Exception]:
    """Return how many entries a failed harvest took all the same, and what to raise."""
    if n != -errno.EPROTO:
        try:
            check("harvest", n)
        except Exception as error:
            return 0, error
    state = _STATES.get(fault.flags, f"flags {fault.flags:#x}")
    return int(fault.taken), RingError(
        f"dirty ring of vCPU {fault.vcpu}: entry {fault.index} is {state}, where only free or "
        "DIRTY can stand; somebody else harvested it, or memory was overwritten",
        vcpu=fault.vcpu,
        index=fault.index,
        flags=fault.flags,
        slot=fault.slot,
        offset=fault.offset,
        harvested=fault.taken,
    )
