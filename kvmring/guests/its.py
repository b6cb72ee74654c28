"""ITS tables in guest memory: where they lie, the commands that fill them, and what a save writes.

A guest maps devices, collections and events by commands in a queue (Arm GIC specification,
IHI 0069, 5.3). KVM keeps the result to itself until the tables are saved: then it writes
them to memory, outside any vCPU. Which pages that are follows from the layout, and is the truth
that the backup bitmap is compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmring.abi import PAGE_SIZE
from kvmring.errors import StateError, int_between
from kvmring.vgic import FRAME, ItsReg, RedistReg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmring.memory import GuestMemory
    from kvmring.vcpu import VCPU
    from kvmring.vgic import GicV3, Its

__all__ = ["ITS_BYTES", "ItsTables"]

VALID = 1 << 63
FIRST_LPI = 8192
ENTRY = 8  # bytes of a device, collection or event entry in KVM's tables, version 0
COMMAND = 32
MAX_DEVICES = 16
MAX_EVENTS = 32  # of a device
ID_BITS = 14  # LPIs 8192 to 16383

# GITS commands
_INT, _SYNC, _MAPD, _MAPC, _MAPTI = 0x03, 0x05, 0x08, 0x09, 0x0A

# offsets from the start: each a frame, but for the event tables, which have a page each
_DEVICES, _COLLECTIONS, _QUEUE, _CONFIG, _PENDING, _EVENTS = (i * FRAME for i in range(6))
ITS_BYTES = _EVENTS + MAX_DEVICES * FRAME

Stores = list[tuple[int, int]]


class ItsTables:
    """The tables of one ITS, in a slot's memory, and the guest's commands to it.

    Methods that return stores leave their execution to the guest: PageWriter.store().

    Args:
        its: The ITS, initialised.
        ram: The memory; ITS_BYTES of it are used.
        offset: Where in the memory; its address must be a multiple of 64 KiB.
    """

    def __init__(self, its: Its, ram: GuestMemory, offset: int = 0) -> None:
        start = int_between("offset", offset, 0, ram.size_bytes - ITS_BYTES)
        if (ram.gpa + start) % FRAME:
            raise ValueError(
                f"the tables' address {ram.gpa + start:#x} is not a multiple of 64 KiB"
            )
        self._its = its
        self._ram = ram
        self._start = start
        self._written = 0  # bytes of commands so far; the queue is a ring
        self._events: dict[int, list[int]] = {}
        self._collections: set[int] = set()
        self._lpis = False
        self._pending: set[int] = set()  # raised, and not saved yet
        base = ram.gpa + start
        its.write(ItsReg.BASER0, VALID | base + _DEVICES)
        its.write(ItsReg.BASER1, VALID | base + _COLLECTIONS)
        its.write(ItsReg.CBASER, VALID | base + _QUEUE | FRAME // 4096 - 1)
        its.write(ItsReg.CTLR, 1)

    def enable_lpis(self, gic: GicV3, vcpu: VCPU) -> None:
        """Give a vCPU configuration and pending tables, and let it take LPIs.

        Comes before map_device(): KVM reads an LPI's configuration when it is mapped, and
        drops a mapping whose configuration it cannot read.
        """
        prop = self._ram.gpa + self._start + _CONFIG | ID_BITS - 1
        pend = self._ram.gpa + self._start + _PENDING
        for reg, value in ((RedistReg.PROPBASER, prop), (RedistReg.PENDBASER, pend)):
            gic.write_redist(vcpu, reg, value & 0xFFFF_FFFF)
            gic.write_redist(vcpu, reg + 4, value >> 32)
        gic.write_redist(vcpu, RedistReg.CTLR, 1)
        self._lpis = True

    def map_collection(self, collection: int, vcpu_index: int = 0) -> Stores:
        """MAPC: send a collection's interrupts to a vCPU."""
        number = int_between("collection", collection, 0, 255)
        self._collections.add(number)
        target = int_between("vcpu_index", vcpu_index, 0, 0xFFFF) << 16
        return self._queue([(_MAPC, 0, VALID | target | number, 0), (_SYNC, 0, target, 0)])

    def map_device(self, device: int, events: Sequence[int], collection: int = 0) -> Stores:
        """MAPD and MAPTI: a device with events, each an LPI of its own, sent to a collection."""
        number = int_between("device", device, 0, MAX_DEVICES - 1)
        ids = [int_between("event", event, 0, MAX_EVENTS - 1) for event in events]
        if not self._lpis:
            raise StateError("enable_lpis() comes before map_device()")
        if collection not in self._collections:
            raise StateError(f"map collection {collection} before device {number}")
        table = self._ram.gpa + self._start + _EVENTS + number * FRAME
        size = MAX_EVENTS.bit_length() - 2  # bits of the event id, less one
        commands = [(_MAPD | number << 32, size, VALID | table, 0)]
        for event in ids:
            lpi = self.lpi(number, event)
            commands.append((_MAPTI | number << 32, event | lpi << 32, collection, 0))
        self._events.setdefault(number, []).extend(ids)
        return self._queue(commands)

    def interrupt(self, device: int, event: int) -> Stores:
        """INT: make an event pending."""
        if event not in self._events.get(device, ()):
            raise StateError(f"map event {event} of device {device} before it can be raised")
        self._pending.add(self.lpi(device, event))
        return self._queue([(_INT | device << 32, event, 0, 0)])

    @staticmethod
    def lpi(device: int, event: int) -> int:
        """Return the interrupt number that map_device() gives an event."""
        return FIRST_LPI + device * MAX_EVENTS + event

    def _queue(self, commands: list[tuple[int, int, int, int]]) -> Stores:
        """Write commands behind the last ones, then say so: GITS_CWRITER."""
        queue = self._ram.gpa + self._start + _QUEUE
        stores = []
        for command in commands:
            at = self._written % FRAME
            stores += [(queue + at + 8 * i, word) for i, word in enumerate(command)]
            self._written += COMMAND
        stores.append((self._its.address + ItsReg.CWRITER, self._written % FRAME))
        return stores

    def _page(self, offset: int) -> int:
        return (self._start + offset) // PAGE_SIZE

    def saved_pages(self) -> set[int]:
        """Return the pages, as numbers in the slot, that Its.save_tables() writes."""
        pages = set()
        for device, events in self._events.items():
            pages.add(self._page(_DEVICES + device * ENTRY))
            pages |= {self._page(_EVENTS + device * FRAME + event * ENTRY) for event in events}
        # one entry each, in order, and an invalid one that ends them
        last = len(self._collections) * ENTRY
        pages |= {self._page(_COLLECTIONS + at) for at in range(0, last + 1, ENTRY)}
        return pages

    def pending_pages(self) -> set[int]:
        """Return the pages that GicV3.save_pending_tables() writes, and expect it to.

        KVM writes a byte only when it changes: what a call returned is left out of the next.
        """
        pages = {self._page(_PENDING + lpi // 8) for lpi in self._pending}
        self._pending.clear()
        return pages

    def queue_pages(self) -> set[int]:
        """Return the pages of the command queue that the guest has written by now."""
        used = min(self._written, FRAME)
        return {self._page(_QUEUE + at) for at in range(0, used, COMMAND)}
