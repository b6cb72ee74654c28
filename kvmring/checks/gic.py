"""A VM with a GICv3, an ITS and a guest that programs it: what KVM writes outside any vCPU.

Which pages the saved tables take follows from the layout (guests/its.py); what is logged is
asked of the kernel, and what changed is read from the memory itself.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmring.abi import DeviceType
from kvmring.checks import raw
from kvmring.checks.bits import MANUAL, emptied, pages_of
from kvmring.checks.rig import Ring
from kvmring.errors import KvmError
from kvmring.guests.its import ITS_BYTES, ItsTables
from kvmring.vgic import FRAME, GicV3, Its, ItsReg, RedistReg

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmring.checks.rules import Trial
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__all__ = ["Gic", "new_gic"]

SPARE = 64  # pages behind the tables, for the guest


class Gic:
    """The VM.

    Args:
        trial: The trial; it is skipped where the host has no GICv3 or no ITS.
        ring: Whether the vCPU has a ring.
        with_bitmap: Whether the ring has its backup bitmap.
        manual: What KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is enabled with; 0: it is left alone.
        tables: Whether the ITS gets its tables, and the vCPU its LPIs.

    Attributes:
        spare: The pages behind the tables.
    """

    def __init__(
        self,
        trial: Trial,
        *,
        ring: bool = True,
        with_bitmap: bool = True,
        manual: int = 0,
        tables: bool = True,
    ) -> None:
        self.trial = trial
        entries = trial.least_entries if ring else 0
        self.vm = trial.vm(ring=entries, with_bitmap=with_bitmap if ring else None)
        if manual:
            raw.enable_cap(self.vm, MANUAL, manual)
        self.gic = new_gic(trial, self.vm)
        if not self.vm.has_device(DeviceType.ARM_VGIC_ITS):
            trial.skip("this host has no ITS")
        self.its = Its(self.gic)
        first = ITS_BYTES // trial.page_size
        self.ram = trial.ram(self.vm, first + SPARE)
        self.spare = range(first, first + SPARE)
        self.guest = trial.writer(self.vm)
        if ring:
            self._ring = Ring(self.vcpu, entries)
        self.gic.init()
        self.its.init()
        if tables:
            self.tables = self.new_tables()
            self.tables.enable_lpis(self.gic, self.vcpu)
        self._before = self.ram.read()

    @property
    def vcpu(self) -> VCPU:
        """The vCPU."""
        return self.guest.vcpus[0]

    def new_tables(self) -> ItsTables:
        """Give the ITS its tables, at the same addresses each time."""
        return ItsTables(self.its, self.ram)

    def run(self, what: str) -> None:
        """Have the guest do its command to the end."""
        done = any(self.guest.is_done(self.guest.run(0)) for _ in range(100))
        if not done:
            raise RuntimeError(f"the guest does not come to its end: {what}")

    def do(self, stores: Sequence[tuple[int, int]]) -> None:
        """Have the guest store."""
        self.guest.store(0, stores)
        self.run("single stores")

    def write(self, pages: Iterable[int]) -> None:
        """Have the guest write pages."""
        self.guest.load(0, [self.ram.gpa + page * self.trial.page_size for page in pages])
        self.run("pages")

    def program(self) -> None:
        """Have the guest map a collection and two devices with four events."""
        self.do(
            self.tables.map_collection(0)
            + self.tables.map_device(1, [0, 1, 5])
            + self.tables.map_device(9, [30])
        )

    # What is logged, and what is so

    def ring(self) -> set[int]:
        """Empty the ring, reset it, and return the pages that were in it."""
        return emptied(self.trial, self.ram, self.vm, self._ring)

    def bitmap(self) -> set[int]:
        """KVM_GET_DIRTY_LOG, as the numbers of the pages."""
        return pages_of(raw.get_dirty_log(self.vm, self.ram.slot, self.ram.num_pages))

    def changed(self) -> set[int]:
        """Return the pages whose contents are not those at the last call."""
        before, after = self._before, self.ram.read()
        self._before = after
        size = self.trial.page_size
        return {
            at // size
            for at in range(0, len(after), size)
            if before[at : at + size] != after[at : at + size]
        }

    def forget(self) -> None:
        """Take what is logged and changed by now, to begin with nothing."""
        self.ring()
        if self.vm.with_bitmap:
            self.bitmap()
        self.changed()

    # Where the tables are, as KVM has it

    def collections_at(self) -> int:
        """Return the collection table's offset in the memory: GITS_BASER1."""
        return (self.its.read(ItsReg.BASER1) & (1 << 48) - FRAME) - self.ram.gpa

    def pending_at(self) -> int:
        """Return the pending table's offset in the memory: GICR_PENDBASER."""
        low, high = (self.gic.read_redist(self.vcpu, RedistReg.PENDBASER + part) for part in (0, 4))
        return (high << 32 | low) % (1 << 52) // FRAME * FRAME - self.ram.gpa


def new_gic(trial: Trial, vm: VM) -> GicV3:
    """Make a GICv3, or skip the trial where the host has none."""
    try:
        return GicV3(vm)
    except KvmError as error:
        if error.errno != errno.ENODEV:
            raise
        trial.skip("this host has no GICv3")
