"""VCPU: run the guest, kick it out, read and write its registers, reach its dirty ring."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmring import ioctls, stats
from kvmring.abi import Exit, check, ffi, lib, out, owner
from kvmring.device import U32, U64, Attributes
from kvmring.errors import StateError, int_between
from kvmring.registers import CpuidEntry, Regs, Sregs
from kvmring.ring import DirtyRing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmring._kvm import Obj
    from kvmring.stats import Statistics

__all__ = ["VCPU"]


class VCPU(Attributes):
    """A virtual CPU; made by VM.create_vcpu().

    Threads: one thread runs it at a time, a second one is refused with StateError; kick() and
        everything else may come from any thread.
    Lifetime: KVM keeps the vCPU as long as the VM, whatever becomes of this handle; it keeps
        the VM and its RAM alive meanwhile.

    Attributes:
        id: vCPU id.
    """

    __slots__ = ("_ring", "id")

    def __init__(self, handle: Obj, vcpu_id: int) -> None:
        super().__init__(handle)
        self.id = vcpu_id
        place = out("struct kvr_ring *")
        ret = lib.kvr_vcpu_ring(handle, place)
        self._ring = None
        if ret != -lib.KVR_ENORING:
            check("vcpu", ret)
            self._ring = DirtyRing(owner(place, lib.kvr_ring_put))

    def _about(self) -> str:
        return f"{self.id}, {'no dirty ring' if self._ring is None else repr(self._ring)}"

    def close(self) -> None:
        """Close the handle, and that of its ring."""
        if self._ring is not None:
            self._ring.close()
        super().close()

    @property
    def dirty_ring(self) -> DirtyRing:
        """The vCPU's dirty ring.

        Raises:
            StateError: The vCPU was created before, or without, enable_dirty_ring().
        """
        self._require_open()
        if self._ring is None:
            raise StateError("the vCPU has no dirty ring: VM.enable_dirty_ring() comes before it")
        return self._ring

    @property
    def has_dirty_ring(self) -> bool:
        """Whether there is a ring."""
        return self._ring is not None

    def run(self) -> Exit:
        """Run the guest until it exits.

        Ioctl: KVM_RUN. A signal or a kick is an Exit with reason INTR, a full ring one with
        reason DIRTY_RING_FULL: neither is an error. MMIO and port reads are answered with
        respond() before the next run.

        Raises:
            KvmError: EFAULT, host memory cannot be had; ENOEXEC, arm64 vCPU not initialised.
            StateError: Another thread is running this vCPU.

        Threads: the GIL is free while the guest runs.
        """
        return ioctls.run(self)

    def kick(self) -> None:
        """Make the vCPU leave the guest.

        The run that is under way in another thread, or else the next one, returns INTR.
        Several kicks may share one such return.
        """
        check("kick", lib.kvr_kick(self.handle))

    def leave_guest(self, *, timeout_s: float = 10.0) -> None:
        """Make the vCPU leave the guest if it is inside, and wait until it has.

        What the hardware had buffered (PML) is in the dirty ring, or the bitmap, then.

        Raises:
            KvmError: ETIMEDOUT.
        """
        millis = int_between("timeout in ms", int(timeout_s * 1000), 0, U32)
        check("leave_guest", lib.kvr_leave(self.handle, millis))

    @property
    def running(self) -> bool:
        """Whether a thread is inside run() at this moment."""
        return bool(check("running", lib.kvr_running(self.handle)))

    def respond(self, data: bytes) -> None:
        """Answer the guest's read of the last Exit (MMIO or IO); the next run() carries it in.

        Raises:
            ValueError: The last exit was no read, or not of this length.
        """
        raw = bytes(data)
        buf = ffi.new("unsigned char[]", raw or b"\0")
        ret = lib.kvr_respond(self.handle, buf, len(raw))
        if ret == -errno.EINVAL:
            raise ValueError(f"the last exit was not a read of {len(raw)} bytes")
        check("respond", ret)

    def get_regs(self) -> Regs:
        """Get the general-purpose registers. Ioctl: KVM_GET_REGS, x86-64."""
        return Regs(**ioctls.get_regs(self))

    def set_regs(self, regs: Regs) -> None:
        """Set the general-purpose registers. Ioctl: KVM_SET_REGS, x86-64."""
        if not isinstance(regs, Regs):
            raise TypeError(f"set_regs takes Regs, not {type(regs).__name__}")
        fields = regs.to_struct().items()
        ioctls.set_regs(self, {name: int_between(name, value, 0, U64) for name, value in fields})

    def get_sregs(self) -> Sregs:
        """Get segments, descriptor tables and control registers. Ioctl: KVM_GET_SREGS, x86-64."""
        return Sregs.from_struct(ioctls.get_sregs(self))

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments, descriptor tables and control registers.

        Ioctl: KVM_SET_SREGS, x86-64. Give the vCPU its CPUID first.

        Raises:
            KvmError: EINVAL, they contradict each other or the CPUID.
            ValueError: A field does not fit.
        """
        if not isinstance(sregs, Sregs):
            raise TypeError(f"set_sregs takes Sregs, not {type(sregs).__name__}")
        try:
            ioctls.set_sregs(self, sregs.to_struct())
        except OverflowError as error:
            raise ValueError(f"a register does not fit its field: {error}") from None

    def set_cpuid2(self, entries: Sequence[CpuidEntry]) -> None:
        """Set what CPUID tells the guest. Ioctl: KVM_SET_CPUID2, x86-64."""
        ioctls.set_cpuid2(self, [entry.to_struct() for entry in entries])

    def arm_vcpu_init(self, target: int, features: Sequence[int] = ()) -> None:
        """Initialise the vCPU. Ioctl: KVM_ARM_VCPU_INIT, arm64.

        Args:
            target: From VM.arm_preferred_target().
            features: Up to seven 32-bit words of feature bits.
        """
        words = [int_between("feature word", word, 0, U32) for word in features]
        if len(words) > 7:
            raise ValueError("at most 7 feature words")
        init = {"target": int_between("target", target, 0, U32), "features": words}
        ioctls.arm_vcpu_init(self, init)

    def get_one_reg(self, reg_id: int) -> int:
        """Get a register by its KVM_REG_* id, as an int. Ioctl: KVM_GET_ONE_REG."""
        number = int_between("reg_id", reg_id, 0, U64)
        return int.from_bytes(ioctls.get_one_reg(self, number), "little")

    def set_one_reg(self, reg_id: int, value: int) -> None:
        """Set a register by its KVM_REG_* id. Ioctl: KVM_SET_ONE_REG.

        Raises:
            KvmError: ENOENT, the vCPU has no such register; EINVAL, it cannot have this value.
            ValueError: The value does not fit the size that the id names.
        """
        number = int_between("reg_id", reg_id, 0, U64)
        size = 1 << ((number & lib.KVM_REG_SIZE_MASK) >> lib.KVM_REG_SIZE_SHIFT)
        data = int_between("value", value, 0, (1 << 8 * size) - 1).to_bytes(size, "little")
        ioctls.set_one_reg(self, number, data)

    def get_reg_list(self) -> list[int]:
        """List the ids that get_one_reg() takes. Ioctl: KVM_GET_REG_LIST."""
        return ioctls.get_reg_list(self)

    def stats(self) -> Statistics:
        """Read the vCPU's statistics: name to int, or to a tuple for histograms.

        Ioctl: KVM_GET_STATS_FD, KVM_CAP_BINARY_STATS_FD, Linux 5.14.
        """
        return stats.read(self)
