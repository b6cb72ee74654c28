"""What checks with rings and a guest stand on: a VM, its guest, and the rings in memory.

Rings are read and marked here, entry by entry, in memory that the check maps itself: what is
compared is what the kernel wrote, and marks can be wrong on purpose. Only while no vCPU runs:
Python has no acquire loads. Pages are numbers in the slot, and few enough that a ring of any
size has room for them, unless a check wants it full.
"""

from __future__ import annotations

import platform
import struct
from typing import TYPE_CHECKING, NamedTuple

from kvmring.abi import ExitReason
from kvmring.checks import raw
from kvmring.guests import page_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmring.checks.rules import Trial
    from kvmring.memory import GuestMemory
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__all__ = [
    "DIRTY",
    "RESET",
    "X86",
    "Logged",
    "Rig",
    "Ring",
    "RunPage",
    "has_pml",
    "kept_back",
    "no_pml",
    "reset",
    "run_once",
    "set_wall_clock",
]

DIRTY, RESET = 1, 2  # KVM_DIRTY_GFN_F_*
ENTRY_BYTES = 16
RESERVED = 64  # KVM_DIRTY_RING_RSVD_ENTRIES
PML_ENTRIES = 512
X86 = platform.machine() == "x86_64"
KVM_SET_MSRS = 0x4008AE89
MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00


class Logged(NamedTuple):
    """What an entry says: the slot as as_id << 16 | id, and a page of it."""

    slot: int
    page: int


class Ring:
    """A vCPU's ring, mapped once more, with a place of its own up to which it was taken."""

    def __init__(self, vcpu: VCPU, entries: int) -> None:
        self.map = raw.map_vcpu(vcpu, entries * ENTRY_BYTES)
        self.entries = entries
        self.next = 0  # counts on; modulo entries, a position

    def entry(self, index: int) -> raw.Entry:
        """Read the entry that the ring's index names."""
        return raw.entries(self.map, index % self.entries, 1)[0]

    def all(self) -> list[raw.Entry]:
        """Read every entry, by position."""
        return raw.entries(self.map)

    def mark(self, index: int, flags: int = RESET) -> None:
        """Write an entry's flags."""
        struct.pack_into("=I", self.map, index % self.entries * ENTRY_BYTES, flags)

    def overwrite(self, index: int, *, slot: int | None = None, page: int | None = None) -> None:
        """Write what only the kernel may write."""
        at = index % self.entries * ENTRY_BYTES
        if slot is not None:
            struct.pack_into("=I", self.map, at + 4, slot)
        if page is not None:
            struct.pack_into("=Q", self.map, at + 8, page)

    def dirty(self) -> list[Logged]:
        """Read the entries that are dirty from the place on, in order; takes none."""
        found: list[Logged] = []
        while len(found) < self.entries:
            entry = self.entry(self.next + len(found))
            if entry.flags != DIRTY:
                break
            found.append(Logged(entry.slot, entry.offset))
        return found

    def take(self, limit: int | None = None) -> list[Logged]:
        """Mark dirty entries as harvested, in order, and move on; all of them without limit."""
        found = self.dirty()[:limit]
        for _ in found:
            self.mark(self.next)
            self.next += 1
        return found

    def pages(self) -> list[int]:
        """Take all entries; return their pages, in order."""
        return [logged.page for logged in self.take()]


class RunPage:
    """The head of a vCPU's struct kvm_run, mapped once more."""

    def __init__(self, vcpu: VCPU) -> None:
        self.map = raw.map_vcpu(vcpu, raw.PAGE, page=0)

    @property
    def immediate_exit(self) -> int:
        """The flag with which KVM_RUN does not enter the guest."""
        return self.map[1]

    @immediate_exit.setter
    def immediate_exit(self, value: int) -> None:
        self.map[1] = value

    @property
    def exit_reason(self) -> int:
        """Why the last run came back, as it stands there."""
        return int(struct.unpack_from("=I", self.map, 8)[0])


class Rig:
    """A VM with rings, RAM that logs, and the built-in guest.

    Args:
        trial: The trial.
        pages: Pages of the RAM.
        entries: Of each ring; as few as the host takes without it, 0 for no rings.
        vcpus: How many.
        log: Whether the RAM logs from the beginning.
        more: Pages of a second slot that logs, with the highest number that KVM takes.
        with_bitmap: The backup bitmap beside the rings; where the host offers it without this.
    """

    def __init__(
        self,
        trial: Trial,
        pages: int,
        *,
        entries: int | None = None,
        vcpus: int = 1,
        log: bool = True,
        more: int = 0,
        with_bitmap: bool | None = None,
    ) -> None:
        self.trial = trial
        self.entries = trial.least_entries if entries is None else entries
        self.vm: VM = trial.vm(ring=self.entries, with_bitmap=with_bitmap)
        self.ram: GuestMemory = trial.ram(self.vm, pages, log=log)
        self.other: GuestMemory | None = None
        if more:
            last = self.vm.check_extension(10) - 1  # KVM_CAP_NR_MEMSLOTS
            gpa = self.ram.gpa + 2 * self.ram.size_bytes
            size = more * trial.page_size
            self.other = self.vm.add_memory(gpa, size, slot=last, log_dirty=True)
        self.guest = trial.writer(self.vm, vcpus=vcpus)
        self.vcpus = self.guest.vcpus
        self.rings = [Ring(vcpu, self.entries) for vcpu in self.vcpus] if self.entries else []

    @property
    def ring(self) -> Ring:
        """The first vCPU's."""
        return self.rings[0]

    def gpa(self, page: int) -> int:
        """Return the address of a page of the RAM."""
        return self.ram.gpa + page * self.trial.page_size

    def shuffled(self, number: int) -> list[int]:
        """Return the first pages in an order of their own."""
        pages = list(range(number))
        self.trial.random.shuffle(pages)
        return pages

    def load(self, pages: Iterable[int], index: int = 0, *, rounds: int = 1) -> None:
        """Give the guest pages of the RAM to write; run() does it."""
        self.guest.load(index, [self.gpa(page) for page in pages], rounds=rounds)

    def write(self, pages: Iterable[int], index: int = 0, *, rounds: int = 1) -> None:
        """Have pages of the RAM written; the ring must have room for them."""
        self.load(pages, index, rounds=rounds)
        self.finish(index)

    def write_at(self, gpas: Sequence[int], index: int = 0) -> None:
        """Have pages written by address."""
        self.guest.load(index, gpas)
        self.finish(index)

    def finish(self, index: int = 0) -> None:
        """Run the guest to the end of its command, whatever signals come."""
        while True:
            exit = self.guest.run(index)
            if self.guest.is_done(exit):
                return
            if exit.reason is not ExitReason.INTR:
                self.trial.expect("KVM_RUN of a guest that has room in its ring", str(exit), "done")

    def fill(self, index: int = 0) -> int:
        """Run the guest until its ring is full; return the dirty entries."""
        while (exit := self.guest.run(index)).reason is ExitReason.INTR:
            pass
        self.trial.expect("exit reason of KVM_RUN", exit.reason, ExitReason.DIRTY_RING_FULL)
        return len(self.rings[index].dirty())

    def again(self, pages: Iterable[int], index: int = 0) -> list[int]:
        """Write pages, and return those that this logged, in ring order; they are taken."""
        self.write(pages, index)
        return self.rings[index].pages()

    def restart(self) -> None:
        """Empty the rings, and have every page of the RAM logged at its next write."""
        for ring in self.rings:
            ring.take()
        reset(self.vm)
        self.ram.set_log_dirty(False)
        self.ram.set_log_dirty(True)

    def words(self, index: int = 0) -> list[int]:
        """Return what stands in each page of the RAM where a vCPU writes."""
        return list(self.ram.words(8 * index))

    def strided(self, number: int, stride: int) -> list[int]:
        """Return pages at a distance from each other."""
        gpas = page_order(self.ram, order="strided", stride=stride)[:number]
        return [(gpa - self.ram.gpa) // self.trial.page_size for gpa in gpas]


def reset(vm: VM, argument: int = 0) -> int:
    """KVM_RESET_DIRTY_RINGS: entries reset, by the kernel's count."""
    return raw.ioctl(vm, raw.KVM_RESET_DIRTY_RINGS, argument)


def run_once(vcpu: VCPU, argument: int = 0) -> int:
    """KVM_RUN as it is; the exit stands in RunPage."""
    return raw.ioctl(vcpu, raw.KVM_RUN, argument)


def set_wall_clock(vcpu: VCPU, gpa: int) -> int:
    """KVM_SET_MSRS of the address at which KVM writes the time, at once (x86-64): MSRs set."""
    msrs = struct.pack("=IIIIQ", 1, 0, MSR_KVM_WALL_CLOCK_NEW, 0, gpa)
    return raw.ioctl(vcpu, KVM_SET_MSRS, bytearray(msrs))


def has_pml(trial: Trial) -> bool:
    """Tell whether the hardware logs into a buffer of its own (Intel's PML).

    KVM keeps as many more entries of each ring back, and takes no smaller ring.
    """
    return X86 and trial.least_entries > trial.page_size // ENTRY_BYTES


def kept_back(trial: Trial) -> int:
    """Return how far from its end a ring is full."""
    return RESERVED + (PML_ENTRIES if has_pml(trial) else 0)


def no_pml(trial: Trial) -> None:
    """Skip where a buffer of the hardware stands between a write and its entry."""
    if has_pml(trial):
        trial.skip("with PML a page is logged after its write, in batches")
