"""The verdict on a process's dirty rings, in words: what an operator should take from figures.

Nothing but RingFigures goes in, so that the rules can be read, and tested, by themselves.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmring.host.procfs import read_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmring.host.watcher import RingFigures

__all__ = ["State", "Verdict", "judge", "reserved_entries"]

LARGEST = 65536  # KVM_DIRTY_RING_MAX_ENTRIES (include/linux/kvm_host.h)
RESERVED = 64  # KVM_DIRTY_RING_RSVD_ENTRIES (include/linux/kvm_dirty_ring.h)
PML_ENTRIES = 512  # what the processor's own log may still hand in
NEARLY_FULL = 0.9


class State(enum.Enum):
    """What is the matter, from harmless to grave."""

    NO_RING = "no ring mapped"
    IDLE = "idle or logging off"
    HEALTHY = "healthy"
    TOO_SMALL = "ring too small"
    TOO_SLOW = "harvester too slow"
    STUCK = "stuck ring"


_ORDER = list(State)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A verdict.

    Attributes:
        state: The gravest state of any ring.
        vcpu: Whose ring that is; None: it holds for all.
        size: TOO_SMALL: entries that would do at this rate.
        text: A sentence that says so.
    """

    state: State
    vcpu: int | None
    size: int | None
    text: str

    def __str__(self) -> str:
        return self.text


def reserved_entries() -> int:
    """Return how many entries this host's KVM keeps back: a ring is full when so few are free."""
    pml = read_text("/sys/module/kvm_intel/parameters/pml").strip() in ("Y", "1")
    return RESERVED + PML_ENTRIES if pml else RESERVED


def judge(rings: Sequence[RingFigures], *, reserved: int | None = None) -> Verdict:
    """Give a verdict on an interval.

    Args:
        rings: What the rings did.
        reserved: Entries that KVM keeps back; this host's without it.
    """
    if not rings:
        return Verdict(
            state=State.NO_RING,
            vcpu=None,
            size=None,
            text="no ring mapped: this VM logs to a bitmap, or not at all; neither can be seen "
            "from outside",
        )
    back = reserved_entries() if reserved is None else reserved
    worst = max((_of(ring, back) for ring in rings), key=lambda v: _ORDER.index(v.state))
    if worst.state is State.IDLE:
        seen = "" if rings[0].exact else " that polling would see"
        return Verdict(
            state=State.IDLE,
            vcpu=None,
            size=None,
            text=f"idle or logging off: nothing was pushed{seen}",
        )
    if worst.state is State.HEALTHY:
        rates = [ring.rate for ring in rings]
        known = [rate for rate in rates if rate is not None]
        share = max(ring.high_water / ring.entries for ring in rings)
        if len(known) == len(rates):
            pace = f"{sum(known):,.0f} pages/s"
        else:
            pace = f">= {sum(ring.pushed / ring.seconds for ring in rings):,.0f} pages/s (lapped)"
        return Verdict(
            state=State.HEALTHY,
            vcpu=None,
            size=None,
            text=f"healthy: {pace}, rings at most {share:.0%} full",
        )
    return worst


def _of(ring: RingFigures, reserved: int) -> Verdict:
    usable = max(1, ring.entries - reserved)
    full = ring.fill >= usable
    if not ring.reset and not ring.lapped and full and (ring.full_exits or not ring.pushed):
        exits = f", {ring.full_exits} full exits" if ring.full_exits else ""
        return _verdict(State.STUCK, ring, f"full{exits}, and nothing was reset")
    if ring.unreset >= usable / 2 and not ring.reset:
        return _verdict(
            State.TOO_SLOW, ring, f"{ring.unreset} entries are harvested and wait for their reset"
        )
    if ring.full_exits:
        return _too_small(ring, reserved, f"{ring.full_exits / ring.seconds:.1f} full exits/s")
    if ring.full_exits is None and ring.high_water >= usable and ring.pushed:
        return _too_small(ring, reserved, "it was seen full (its exits need root to be seen)")
    if ring.high_water >= NEARLY_FULL * usable and ring.pushed:
        return _too_small(ring, reserved, f"{ring.high_water} of {usable} usable entries in use")
    if not ring.pushed and not ring.reset:
        return _verdict(State.IDLE, ring, "nothing was pushed")
    return _verdict(State.HEALTHY, ring, "")


def _too_small(ring: RingFigures, reserved: int, what: str) -> Verdict:
    """Say which size would do; where none would, it is the harvester."""
    rate = ring.pushed / ring.seconds
    # a full exit makes its own harvest: what the ring must bear is the harvester's pace
    period = ring.harvest_period_s
    size = ring.entries * 2
    while size < rate * period + reserved:
        size *= 2
    at = f"at {rate:,.0f} pages/s"
    if size <= LARGEST:
        return _verdict(
            State.TOO_SMALL,
            ring,
            f"{what}; {size} entries would do {at} and a harvest every {period:.2g} s",
            size=size,
        )
    fills = (LARGEST - reserved) / rate
    return _verdict(
        State.TOO_SLOW, ring, f"{what}; {at} the largest ring ({LARGEST}) fills in {fills:.2g} s"
    )


def _verdict(state: State, ring: RingFigures, text: str, size: int | None = None) -> Verdict:
    return Verdict(
        state=state, vcpu=ring.vcpu, size=size, text=f"{state.value} (vCPU {ring.vcpu}): {text}"
    )
