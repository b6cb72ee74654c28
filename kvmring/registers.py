"""Register sets of x86-64, as frozen dataclasses with the kernel's field names.

arm64 has no such sets: its registers go one by one, VCPU.get_one_reg() and set_one_reg().
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmring.ioctls import Struct

__all__ = ["CpuidEntry", "DTable", "Regs", "Segment", "Sregs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regs:
    """struct kvm_regs: the general-purpose registers, 64 bits each."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2  # bit 1 is always set

    def to_struct(self) -> Struct:
        """Return the fields for ioctls.set_regs()."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """struct kvm_segment."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the kernel's name
    g: int = 0
    avl: int = 0
    unusable: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DTable:
    """struct kvm_dtable."""

    base: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sregs:
    """struct kvm_sregs: segments, descriptor tables and control registers."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DTable
    idt: DTable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: tuple[int, ...] = (0, 0, 0, 0)

    @classmethod
    def from_struct(cls, struct: Struct) -> Sregs:
        """Make it of what ioctls.get_sregs() returns."""
        values: Struct = {}
        for field in fields(cls):
            value = struct[field.name]
            if isinstance(value, dict):
                kind = DTable if field.name in ("gdt", "idt") else Segment
                value = kind(**{k: v for k, v in value.items() if k != "padding"})
            elif isinstance(value, list):
                value = tuple(value)
            values[field.name] = value
        return cls(**values)

    def to_struct(self) -> Struct:
        """Return the fields for ioctls.set_sregs()."""
        return {**asdict(self), "interrupt_bitmap": list(self.interrupt_bitmap)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuidEntry:
    """struct kvm_cpuid_entry2."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int

    @classmethod
    def from_struct(cls, struct: Struct) -> CpuidEntry:
        """Make it of one of ioctls.get_supported_cpuid()'s."""
        return cls(**{field.name: struct[field.name] for field in fields(cls)})

    def to_struct(self) -> Struct:
        """Return the fields for ioctls.set_cpuid2()."""
        return asdict(self)
