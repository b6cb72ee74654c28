"""Where a Tracker's dirty pages come from: the four sources, the choice among them, the counts."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.errors import StateError

if TYPE_CHECKING:
    from kvmring.vm import VM

__all__ = ["Source", "TrackerStats", "choose_source", "require_source"]


class Source(enum.Enum):
    """Where dirty pages come from."""

    AUTO = "auto"
    RING_WITH_BITMAP = "ring+bitmap"
    RING = "ring"
    CLEAR_LOG = "clear-log"
    BITMAP = "bitmap"


@dataclass(slots=True, kw_only=True)
class TrackerStats:
    """What a Tracker has seen; counts since start().

    Attributes:
        entries: Ring entries harvested.
        duplicates: Entries whose page was in the same collection already.
        ring_full_exits: Rings that serve() was called for.
        full_ns: Nanoseconds that vCPUs stood still for that.
        resets, short_resets: Resets, and those that KVM did not finish at once.
        suspects: Pages that such may have left unprotected.
        backup_pages: Pages that only the backup bitmap named.
        pages: Pages collected, a page once per collection; suspects are not counted again.
        high_water: By vCPU id, the most entries that one harvest found in its ring.
    """

    entries: int = 0
    duplicates: int = 0
    ring_full_exits: int = 0
    full_ns: int = 0
    resets: int = 0
    short_resets: int = 0
    suspects: int = 0
    backup_pages: int = 0
    pages: int = 0
    collections: int = 0
    high_water: dict[int, int] = field(default_factory=dict)

    @property
    def backup_share(self) -> float:
        """Share of the pages that only the backup bitmap named."""
        return self.backup_pages / self.pages if self.pages else 0.0


def choose_source(vm: VM) -> tuple[Source, str]:
    """Choose the best source that a VM offers as it is, and say why.

    Raises:
        StateError: Its rings would miss pages: arm64 looks at the bitmap to know whether a
            slot logs (memslot_is_logging(), arch/arm64/kvm/mmu.c).
    """
    if vm.ring_entries and vm.with_bitmap:
        return Source.RING_WITH_BITMAP, "the VM has dirty rings, and a bitmap behind them"
    if vm.ring_entries and vm.check_extension(Cap.DIRTY_LOG_RING_WITH_BITMAP):
        raise StateError(
            "the VM has dirty rings without the backup bitmap, and this KVM maps memory in large "
            "blocks then, of which it logs one page each: enable_dirty_ring() with the bitmap"
        )
    if vm.ring_entries:
        return Source.RING, "the VM has dirty rings"
    if vm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) & 1:
        return Source.CLEAR_LOG, "the VM has no dirty rings; KVM offers manual protection"
    return Source.BITMAP, "the VM has no dirty rings, and KVM no manual protection"


def require_source(vm: VM, source: Source) -> None:
    """Refuse a source that would miss pages of this VM."""
    have = choose_source(vm)[0]
    ring = have in (Source.RING, Source.RING_WITH_BITMAP)
    if source in (Source.RING, Source.RING_WITH_BITMAP):
        if not ring:
            raise StateError(f"source {source.value}: enable_dirty_ring() comes before the vCPUs")
        if source is not have:
            raise StateError(f"source {source.value}, but the VM was set up for {have.value}")
    elif ring:
        raise StateError(f"source {source.value}: the VM's vCPUs log into rings, use {have.value}")
    elif source is Source.CLEAR_LOG and have is not Source.CLEAR_LOG:
        raise StateError("source clear-log: KVM offers no manual protection here")
