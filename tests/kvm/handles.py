"""Every public method and property of the handles, with arguments for a call of each.

test_closed.py and test_fork.py call them all on handles that may not be used any more. A method
that is missing here fails test_closed.py: whoever adds one says what it does after close().
"""

from __future__ import annotations

import enum
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmring import (
    VCPU,
    VM,
    Cap,
    Device,
    DeviceType,
    DirtyBitmap,
    DirtyGfns,
    DirtyRing,
    DirtySet,
    DTable,
    GuestMemory,
    Regs,
    Segment,
    Sregs,
    System,
)

from .rig import PAGE, X86, RingFacts

if TYPE_CHECKING:
    from collections.abc import Callable

    Handle = System | VM | VCPU | Device | GuestMemory | DirtyRing
    Arguments = Callable[["Fixture"], tuple[object, ...]]
    Table = dict[str, "How | Arguments"]

CLASSES: tuple[type, ...] = (System, VM, VCPU, Device, GuestMemory, DirtyRing)
# KvmNotSupported comes first for what only the other architecture has
OTHER_ARCH = (
    {"arm_preferred_target", "arm_vcpu_init"}
    if X86
    else {"get_supported_cpuid", "set_cpuid2", "get_regs", "set_regs", "get_sregs", "set_sregs"}
)
SREGS = Sregs(
    cs=Segment(),
    ds=Segment(),
    es=Segment(),
    fs=Segment(),
    gs=Segment(),
    ss=Segment(),
    tr=Segment(),
    ldt=Segment(),
    gdt=DTable(),
    idt=DTable(),
    cr0=0,
    cr2=0,
    cr3=0,
    cr4=0,
    cr8=0,
    efer=0,
    apic_base=0,
)


@dataclass(frozen=True, slots=True)
class Fixture:
    """One handle of each class, and things to pass to their methods."""

    handles: dict[type, Handle]
    dirty: DirtySet
    gfns: DirtyGfns
    bitmap: DirtyBitmap


class How(enum.Enum):
    """How a member is used, where it is no method with arguments."""

    PROPERTY = enum.auto()
    LOCAL = enum.auto()  # needs nothing of the kernel, and works in every state


PROPERTY, LOCAL = How.PROPERTY, How.LOCAL


def make(kvm: System, facts: RingFacts) -> Fixture:
    """Make a VM with everything in it; a host without devices has no Device."""
    vm = kvm.create_vm()
    vm.enable_dirty_ring(facts.smallest)
    ram = vm.add_memory(0, 64 * PAGE, log_dirty=True)
    vcpu = vm.create_vcpu()
    handles: dict[type, Handle] = {
        System: kvm,
        VM: vm,
        VCPU: vcpu,
        GuestMemory: ram,
        DirtyRing: vcpu.dirty_ring,
    }
    for kind in DeviceType:
        if vm.has_device(kind):
            handles[Device] = vm.create_device(kind)
            break
    return Fixture(handles=handles, dirty=DirtySet(vm), gfns=DirtyGfns(8), bitmap=DirtyBitmap(64))


def public(cls: type) -> set[str]:
    """Name the public methods and properties; plain attributes hold no kernel state."""
    return {
        name
        for name, member in inspect.getmembers(cls)
        if not name.startswith("_")
        and (inspect.isroutine(member) or isinstance(member, property))
        and not inspect.ismemberdescriptor(member)
    }


def use(fixture: Fixture, cls: type, name: str) -> object:
    """Call a method, or read a property, with the arguments of the table."""
    member: object = getattr(fixture.handles[cls], name)
    arguments = TABLE[cls][name]
    if not callable(member):
        return member
    result: object = member(*([] if isinstance(arguments, How) else arguments(fixture)))
    return result


def call(*args: object) -> Arguments:
    """Return arguments that are the same for every handle."""
    return lambda _: args


OWNED: Table = {"handle": PROPERTY, "closed": LOCAL, "close": LOCAL}
FD: Table = {**OWNED, "fileno": call()}
ATTRIBUTES: Table = {
    "has_attr": call(0, 0),
    "get_attr": call(0, 0),
    "set_attr": call(0, 0, 0),
}
TABLE: dict[type, Table] = {
    System: {
        **FD,
        "api_version": PROPERTY,
        "check_extension": call(Cap.NR_MEMSLOTS),
        "create_vm": call(),
        "get_supported_cpuid": call(),
        "get_vcpu_mmap_size": call(),
    },
    VM: {
        **FD,
        **ATTRIBUTES,
        "add_memory": call(1 << 30, PAGE),
        "arm_preferred_target": call(),
        "check_extension": call(Cap.NR_MEMSLOTS),
        "clear_dirty_log": lambda f: (0, f.bitmap),
        "create_device": call(DeviceType.VFIO),
        "create_vcpu": call(5),
        "enable_cap": call(Cap.MANUAL_DIRTY_LOG_PROTECT2, [0]),
        "enable_dirty_ring": call(),
        "freeze": call(0),
        "get_dirty_log": call(0),
        "harvest": lambda f: (f.dirty,),
        "has_device": call(DeviceType.VFIO),
        "memory": LOCAL,
        "reset_dirty_rings": call(),
        "ring_entries": PROPERTY,
        "slots": PROPERTY,
        "slots_version": LOCAL,
        "stats": call(),
        "vcpus": LOCAL,
        "with_bitmap": LOCAL,
    },
    VCPU: {
        **FD,
        **ATTRIBUTES,
        "arm_vcpu_init": call(0),
        "dirty_ring": PROPERTY,
        "get_one_reg": call(0x6030_0000_0010_0000),
        "get_reg_list": call(),
        "get_regs": call(),
        "get_sregs": call(),
        "has_dirty_ring": LOCAL,
        "kick": call(),
        "leave_guest": call(),
        "respond": call(b"x"),
        "run": call(),
        "running": PROPERTY,
        "set_cpuid2": call(()),
        "set_one_reg": call(0x6030_0000_0010_0000, 0),
        "set_regs": call(Regs()),
        "set_sregs": call(SREGS),
        "stats": call(),
    },
    Device: {**FD, **ATTRIBUTES},
    GuestMemory: {
        **OWNED,
        "gpa": LOCAL,
        "log_dirty": LOCAL,
        "move": call(1 << 31),
        "read": call(0, 1),
        "readonly": LOCAL,
        "remove": call(),
        "set_log_dirty": call(False),
        "size_bytes": LOCAL,
        "slot": LOCAL,
        "words": call(0),
        "write": call(0, b"x"),
    },
    DirtyRing: {
        **OWNED,
        "fill": call(),
        "harvest": lambda f: (f.gfns,),
        "indices": PROPERTY,
        "pending": PROPERTY,
    },
}


def is_local(cls: type, name: str) -> bool:
    """Tell whether a member works in every state."""
    return TABLE[cls][name] is LOCAL
