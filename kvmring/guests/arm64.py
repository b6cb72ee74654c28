"""How a PageWriter is set up on arm64: EL1 with the MMU off, as a vCPU comes out of reset.

With the MMU off the guest's accesses are Device accesses, which bypass caches on machines
without FEAT_S2FWB: there the VMM may read stale contents, though the log is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmring.vcpu import VCPU

# KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE; below it, a 32-bit index in kvm_regs
_CORE = 0x6030_0000_0010_0000
REG_X0 = _CORE
REG_PC = _CORE | 64
REG_PSTATE = _CORE | 66
EL1H_MASKED = 0x3C5  # EL1 with its own stack pointer, interrupts masked


def table_bytes(top: int) -> int:
    """Return 0: there are no page tables."""
    return 0


def tables(base: int, top: int) -> bytes:
    """Return nothing: there are no page tables."""
    return b""


def reset(vcpu: VCPU, target: int) -> None:
    """Initialise the vCPU; also after it was shut down."""
    vcpu.arm_vcpu_init(target)


def start(vcpu: VCPU, *, code: int, block: int) -> None:
    """Point the vCPU at the code, with the block's address in its first argument register."""
    vcpu.set_one_reg(REG_PSTATE, EL1H_MASKED)
    vcpu.set_one_reg(REG_PC, code)
    vcpu.set_one_reg(REG_X0, block)
