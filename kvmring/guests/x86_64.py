"""How a PageWriter is set up on x86-64: 64-bit mode at CPL 3 over identity page tables.

CPL 3 because such code runs natively on every KVM, software ones included, where code at
CPL 0 may be emulated and then logs a page once per store. The accessed and dirty bits of all
tables are set beforehand, so that the processor writes nothing there by itself.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmring.registers import Regs, Segment

if TYPE_CHECKING:
    from kvmring.registers import CpuidEntry
    from kvmring.vcpu import VCPU

TABLE = 4096
LARGE_PAGE = 2 << 20
GIB = 1 << 30
TIB_HALF = 512 * GIB
# present, writable, user, accessed, dirty; and page size for a large page
TABLE_BITS = 0x27
PAGE_BITS = 0xE7

_CODE = Segment(limit=0xFFFFFFFF, selector=0x1B, type=11, present=1, dpl=3, s=1, l=1, g=1)
_DATA = Segment(limit=0xFFFFFFFF, selector=0x23, type=3, present=1, dpl=3, db=1, s=1, g=1)


def table_bytes(top: int) -> int:
    """Return the bytes of the tables that map addresses below top."""
    directories = -(-top // GIB)
    return TABLE * (1 + -(-top // TIB_HALF) + directories)


def tables(base: int, top: int) -> bytes:
    """Make the tables for addresses below top, to lie at base; the first one is CR3's."""
    directories = -(-top // GIB)
    uppers = -(-top // TIB_HALF)
    first_upper = base + TABLE
    first_directory = first_upper + uppers * TABLE
    root = array("Q", (first_upper + i * TABLE | TABLE_BITS for i in range(uppers)))
    root.extend([0] * (512 - uppers))
    upper = array("Q", (first_directory + i * TABLE | TABLE_BITS for i in range(directories)))
    upper.extend([0] * (512 * uppers - directories))
    pages = array("Q", range(PAGE_BITS, directories * GIB, LARGE_PAGE))
    return root.tobytes() + upper.tobytes() + pages.tobytes()


def prepare(vcpu: VCPU, cpuid: list[CpuidEntry]) -> None:
    """Give a new vCPU its CPUID; KVM refuses to change that once the vCPU has run."""
    vcpu.set_cpuid2(cpuid)


def reset(vcpu: VCPU, *, cr3: int) -> None:
    """Bring a vCPU into the guest's mode; also after a triple fault."""
    sregs = vcpu.get_sregs()
    vcpu.set_sregs(
        replace(
            sregs,
            cs=_CODE,
            ds=_DATA,
            es=_DATA,
            fs=_DATA,
            gs=_DATA,
            ss=_DATA,
            cr0=0x80000001,  # paging, protection
            cr3=cr3,
            cr4=0x20,  # PAE
            efer=0x500,  # long mode, enabled and active
        )
    )


def start(vcpu: VCPU, *, code: int, block: int) -> None:
    """Point the vCPU at the code, with the block's address in its first argument register."""
    # Interrupts on: an emulated VMX (Bochs) leaves a guest that masks them for nothing else.
    vcpu.set_regs(Regs(rip=code, rdi=block, rflags=0x202))
