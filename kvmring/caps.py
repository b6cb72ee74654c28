"""What this host's KVM offers for dirty logging: capabilities, limits and backend, in words.

Values are asked from KVM, and limits of the ring are found by trying, on VMs made for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmring.abi import PAGE_SIZE, Cap, ExitReason
from kvmring.dirtyset import DirtySet
from kvmring.errors import KvmError
from kvmring.facts import host_facts
from kvmring.guests import PageWriter, page_order

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmring.facts import JsonValue
    from kvmring.system import System

__all__ = ["SCHEMA", "CapAnswer", "Caps", "Mode", "RingLimits", "inspect_host"]

SCHEMA = 1
ENTRY_BYTES = 16
MAX_TRY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class CapAnswer:
    """One capability: what KVM answers on a VM, and what that means."""

    name: str
    number: int
    value: int
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way of dirty logging, and whether this host offers it."""

    name: str
    offered: bool
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RingLimits:
    """Ring sizes that this host takes, in entries, and how many of them a guest can fill.

    Attributes:
        smallest: Smallest accepted ring.
        largest: Largest accepted ring.
        usable_of_smallest: Entries in the smallest ring when KVM said that it is full.
        reserved: What KVM keeps back: smallest - usable_of_smallest.
    """

    smallest: int
    largest: int
    usable_of_smallest: int | None
    reserved: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Everything that `kvmring caps` shows."""

    host: dict[str, JsonValue]
    answers: tuple[CapAnswer, ...]
    modes: tuple[Mode, ...]
    ring: RingLimits | None

    def as_json(self) -> dict[str, JsonValue]:
        """Return it as the document of `kvmring caps --json`."""
        by_name = {a.name: a.value for a in self.answers}
        ring: JsonValue = None
        if self.ring is not None:
            ring = {
                "smallest_entries": self.ring.smallest,
                "largest_entries": self.ring.largest,
                "usable_of_smallest": self.ring.usable_of_smallest,
                "reserved_entries": self.ring.reserved,
            }
        return {
            "schema": SCHEMA,
            "host": self.host,
            "capabilities": [
                {"name": a.name, "number": a.number, "value": a.value, "meaning": a.meaning}
                for a in self.answers
            ],
            "modes": {mode.name: mode.offered for mode in self.modes},
            "ring": ring,
            "limits": {
                "memslots": by_name["NR_MEMSLOTS"],
                "vcpus": by_name["MAX_VCPUS"],
                "vcpus_recommended": by_name["NR_VCPUS"],
                "address_spaces": max(1, by_name["MULTI_ADDRESS_SPACE"]),
            },
        }


def _bytes_as_entries(value: int) -> str:
    return f"{value} bytes: rings of up to {value // ENTRY_BYTES} entries" if value else "no rings"


def _protect2(value: int) -> str:
    parts = [
        text
        for bit, text in ((1, "KVM_CLEAR_DIRTY_LOG re-protects"), (2, "INITIALLY_SET"))
        if value & bit
    ]
    return ", ".join(parts) or "no manual protection"


def _yes_no(yes: str, no: str = "no") -> Callable[[int], str]:
    return lambda value: yes if value else no


def _number(unit: str) -> Callable[[int], str]:
    return lambda value: f"{value} {unit}"


_MEANINGS: dict[Cap, Callable[[int], str]] = {
    Cap.DIRTY_LOG_RING: _bytes_as_entries,
    Cap.DIRTY_LOG_RING_ACQ_REL: _bytes_as_entries,
    Cap.DIRTY_LOG_RING_WITH_BITMAP: _yes_no(
        "rings with a backup bitmap", "no: nothing is dirtied outside a vCPU, or too old"
    ),
    Cap.MANUAL_DIRTY_LOG_PROTECT2: _protect2,
    Cap.MANUAL_DIRTY_LOG_PROTECT: _yes_no("obsolete, of Linux 5.0", "no: obsolete since 5.2"),
    Cap.MULTI_ADDRESS_SPACE: lambda v: f"{v} address spaces" if v > 1 else "one address space",
    Cap.NR_MEMSLOTS: _number("memory slots per address space"),
    Cap.NR_VCPUS: _number("vCPUs recommended"),
    Cap.MAX_VCPUS: _number("vCPUs at most"),
    Cap.MAX_VCPU_ID: lambda v: f"vCPU ids below {v}" if v else "as MAX_VCPUS",
    Cap.USER_MEMORY: _yes_no("memory slots"),
    Cap.USER_MEMORY2: _yes_no("KVM_SET_USER_MEMORY_REGION2"),
    Cap.DESTROY_MEMORY_REGION_WORKS: _yes_no("slots can be deleted"),
    Cap.JOIN_MEMORY_REGIONS_WORKS: _yes_no("a slot can replace a deleted one"),
    Cap.READONLY_MEM: _yes_no("READONLY slots"),
    Cap.SYNC_MMU: _yes_no("follows changes of the host's mapping"),
    Cap.IMMEDIATE_EXIT: _yes_no("race-free kicks"),
    Cap.BINARY_STATS_FD: _yes_no("statistics as a file"),
    Cap.DEVICE_CTRL: _yes_no("device attributes"),
    Cap.VM_ATTRIBUTES: _yes_no("VM attributes"),
    Cap.VCPU_ATTRIBUTES: _yes_no("vCPU attributes"),
    Cap.ONE_REG: _yes_no("registers one by one"),
    Cap.X86_SMM: _yes_no("system management mode"),
    Cap.VM_DISABLE_NX_HUGE_PAGES: _yes_no("can map huge pages executable"),
    Cap.ARM_VM_IPA_SIZE: lambda v: f"{v} bits of guest-physical address" if v else "not arm64",
    Cap.ARM_MTE: _yes_no("memory tagging; tags cannot be copied in while logging"),
    Cap.ARM_EAGER_SPLIT_CHUNK_SIZE: _yes_no("huge pages can be split in advance"),
    Cap.MEMORY_FAULT_INFO: _yes_no("KVM_EXIT_MEMORY_FAULT tells the address"),
    Cap.MEMORY_ATTRIBUTES: _yes_no("private memory, which is never logged"),
    Cap.GUEST_MEMFD: _yes_no("guest_memfd, whose slots cannot log"),
    Cap.VM_TYPES: lambda v: f"bit mask {v:#x} of VM types" if v else "the default type only",
    Cap.PRE_FAULT_MEMORY: _yes_no("memory can be mapped in advance"),
}


def _modes(values: dict[Cap, int]) -> tuple[Mode, ...]:
    ring = values[Cap.DIRTY_LOG_RING_ACQ_REL] or values[Cap.DIRTY_LOG_RING]
    backup = values[Cap.DIRTY_LOG_RING_WITH_BITMAP]
    protect = values[Cap.MANUAL_DIRTY_LOG_PROTECT2]
    modes = (
        ("ring", ring, "a ring per vCPU"),
        ("ring+bitmap", backup, "rings, and a bitmap for what is dirtied outside vCPUs"),
        ("clear-log", protect, "KVM_GET_DIRTY_LOG, then KVM_CLEAR_DIRTY_LOG"),
        ("bitmap", 1, "KVM_GET_DIRTY_LOG, which also clears"),
    )
    return tuple(Mode(name=n, offered=bool(value), meaning=text) for n, value, text in modes)


def ring_limits(kvm: System) -> RingLimits | None:
    """Find by trying which ring sizes this host takes; None when it takes none."""
    accepted = []
    size = ENTRY_BYTES
    while size <= MAX_TRY_BYTES:
        if _takes(kvm, size):
            accepted.append(size // ENTRY_BYTES)
        size *= 2
    if not accepted:
        return None
    usable = _usable(kvm, accepted[0])
    return RingLimits(
        smallest=accepted[0],
        largest=accepted[-1],
        usable_of_smallest=usable,
        reserved=None if usable is None else accepted[0] - usable,
    )


def _ring_cap(kvm: System) -> Cap:
    if kvm.check_extension(Cap.DIRTY_LOG_RING_ACQ_REL):
        return Cap.DIRTY_LOG_RING_ACQ_REL
    return Cap.DIRTY_LOG_RING


def _takes(kvm: System, size: int) -> bool:
    with kvm.create_vm() as vm:
        try:
            vm.enable_cap(_ring_cap(kvm), [size])
        except KvmError:
            return False
    return True


def _usable(kvm: System, entries: int) -> int | None:
    """Count a ring's entries when KVM first calls it full; None when it does not get full."""
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(entries)
        ram = vm.add_memory(0, 2 * entries * PAGE_SIZE, log_dirty=True)
        guest = PageWriter(kvm, vm)
        guest.load(0, page_order(ram))
        exit = guest.run(0)
        while exit.reason == ExitReason.INTR:
            exit = guest.run(0)
        if exit.reason != ExitReason.DIRTY_RING_FULL:
            return None
        return vm.harvest(DirtySet(vm))


def inspect_host(kvm: System) -> Caps:
    """Ask KVM for everything that `kvmring caps` shows."""
    with kvm.create_vm() as vm:
        values = {cap: vm.check_extension(cap) for cap in _MEANINGS}
    answers = tuple(
        CapAnswer(name=cap.name, number=int(cap), value=value, meaning=_MEANINGS[cap](value))
        for cap, value in values.items()
    )
    return Caps(
        host={**host_facts(), "device": kvm.path, "api_version": kvm.api_version},
        answers=answers,
        modes=_modes(values),
        ring=ring_limits(kvm),
    )
