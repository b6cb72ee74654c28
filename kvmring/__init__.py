"""kvmring: KVM dirty-page logging on a real /dev/kvm, from Python.

System, VM, VCPU and Device are the four kinds of file descriptor of the KVM manual; DirtyRing,
DirtyBitmap and DirtySet are what dirty logging gives. Names are the kernel's.

A name's module is imported when the name is first used: a short command pays for what it needs.
"""

from typing import TYPE_CHECKING

from kvmring.lazy import lazy

if TYPE_CHECKING:
    from kvmring.abi import Cap, DeviceType, Exit, ExitReason, page_size
    from kvmring.bitmap import DirtyBitmap
    from kvmring.device import Device
    from kvmring.dirtylog import ResetResult
    from kvmring.dirtyset import DirtySet, MemorySlot
    from kvmring.errors import (
        ClosedError,
        ForkedError,
        GuestError,
        KvmError,
        KvmNotSupported,
        KvmringError,
        KvmUnavailable,
        RingError,
        StateError,
    )
    from kvmring.memory import GuestMemory
    from kvmring.registers import CpuidEntry, DTable, Regs, Segment, Sregs
    from kvmring.ring import DirtyGfn, DirtyGfns, DirtyRing
    from kvmring.runner import Runner
    from kvmring.sources import Source, TrackerStats
    from kvmring.system import System
    from kvmring.tracker import Tracker
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__version__ = "0.1.0"

__all__ = [
    "VCPU",
    "VM",
    "Cap",
    "ClosedError",
    "CpuidEntry",
    "DTable",
    "Device",
    "DeviceType",
    "DirtyBitmap",
    "DirtyGfn",
    "DirtyGfns",
    "DirtyRing",
    "DirtySet",
    "Exit",
    "ExitReason",
    "ForkedError",
    "GuestError",
    "GuestMemory",
    "KvmError",
    "KvmNotSupported",
    "KvmUnavailable",
    "KvmringError",
    "MemorySlot",
    "Regs",
    "ResetResult",
    "RingError",
    "Runner",
    "Segment",
    "Source",
    "Sregs",
    "StateError",
    "System",
    "Tracker",
    "TrackerStats",
    "__version__",
    "page_size",
]

_HOME = {
    name: module
    for module, names in {
        "abi": "Cap DeviceType Exit ExitReason page_size",
        "bitmap": "DirtyBitmap",
        "device": "Device",
        "dirtylog": "ResetResult",
        "dirtyset": "DirtySet MemorySlot",
        "errors": "ClosedError ForkedError GuestError KvmError KvmNotSupported KvmUnavailable "
        "KvmringError RingError StateError",
        "memory": "GuestMemory",
        "registers": "CpuidEntry DTable Regs Segment Sregs",
        "ring": "DirtyGfn DirtyGfns DirtyRing",
        "runner": "Runner",
        "sources": "Source TrackerStats",
        "system": "System",
        "tracker": "Tracker",
        "vcpu": "VCPU",
        "vm": "VM",
    }.items()
    for name in names.split()
}

__getattr__, __dir__ = lazy(__name__, _HOME)
