"""The one door to the C extension: ffi, lib, the kernel's numbers and what Exit is made of.

Nothing else imports kvmring._kvm. What KVM names with KVM_CAP_, KVM_EXIT_ and so on is an
enum here without the prefix; a number that this version does not know stays an int.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmring._kvm import ffi, lib
from kvmring.errors import ANY_IOCTL, HINTS, ForkedError, KvmError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "PAGE_SIZE",
    "Cap",
    "DeviceType",
    "Exit",
    "ExitReason",
    "MemFlag",
    "check",
    "exit_from",
    "ffi",
    "guest_code",
    "lib",
    "live",
    "out",
    "owner",
    "page_size",
    "uninitialised",
]


class Cap(enum.IntEnum):
    """KVM_CAP_*: dirty logging and its neighbours."""

    USER_MEMORY = lib.KVM_CAP_USER_MEMORY
    NR_VCPUS = lib.KVM_CAP_NR_VCPUS
    NR_MEMSLOTS = lib.KVM_CAP_NR_MEMSLOTS
    SYNC_MMU = lib.KVM_CAP_SYNC_MMU
    DESTROY_MEMORY_REGION_WORKS = lib.KVM_CAP_DESTROY_MEMORY_REGION_WORKS
    JOIN_MEMORY_REGIONS_WORKS = lib.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS
    MAX_VCPUS = lib.KVM_CAP_MAX_VCPUS
    ONE_REG = lib.KVM_CAP_ONE_REG
    READONLY_MEM = lib.KVM_CAP_READONLY_MEM
    DEVICE_CTRL = lib.KVM_CAP_DEVICE_CTRL
    VM_ATTRIBUTES = lib.KVM_CAP_VM_ATTRIBUTES
    X86_SMM = lib.KVM_CAP_X86_SMM
    MULTI_ADDRESS_SPACE = lib.KVM_CAP_MULTI_ADDRESS_SPACE
    VCPU_ATTRIBUTES = lib.KVM_CAP_VCPU_ATTRIBUTES
    MAX_VCPU_ID = lib.KVM_CAP_MAX_VCPU_ID
    IMMEDIATE_EXIT = lib.KVM_CAP_IMMEDIATE_EXIT
    ARM_VM_IPA_SIZE = lib.KVM_CAP_ARM_VM_IPA_SIZE
    MANUAL_DIRTY_LOG_PROTECT = lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT  # obsolete
    MANUAL_DIRTY_LOG_PROTECT2 = lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    DIRTY_LOG_RING = lib.KVM_CAP_DIRTY_LOG_RING
    BINARY_STATS_FD = lib.KVM_CAP_BINARY_STATS_FD
    ARM_MTE = lib.KVM_CAP_ARM_MTE
    VM_DISABLE_NX_HUGE_PAGES = lib.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES
    DIRTY_LOG_RING_ACQ_REL = lib.KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    DIRTY_LOG_RING_WITH_BITMAP = lib.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
    ARM_EAGER_SPLIT_CHUNK_SIZE = lib.KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE
    USER_MEMORY2 = lib.KVM_CAP_USER_MEMORY2
    MEMORY_FAULT_INFO = lib.KVM_CAP_MEMORY_FAULT_INFO
    MEMORY_ATTRIBUTES = lib.KVM_CAP_MEMORY_ATTRIBUTES
    GUEST_MEMFD = lib.KVM_CAP_GUEST_MEMFD
    VM_TYPES = lib.KVM_CAP_VM_TYPES
    PRE_FAULT_MEMORY = lib.KVM_CAP_PRE_FAULT_MEMORY


class ExitReason(enum.IntEnum):
    """KVM_EXIT_*."""

    UNKNOWN = lib.KVM_EXIT_UNKNOWN
    EXCEPTION = lib.KVM_EXIT_EXCEPTION
    IO = lib.KVM_EXIT_IO
    HYPERCALL = lib.KVM_EXIT_HYPERCALL
    DEBUG = lib.KVM_EXIT_DEBUG
    HLT = lib.KVM_EXIT_HLT
    MMIO = lib.KVM_EXIT_MMIO
    IRQ_WINDOW_OPEN = lib.KVM_EXIT_IRQ_WINDOW_OPEN
    SHUTDOWN = lib.KVM_EXIT_SHUTDOWN
    FAIL_ENTRY = lib.KVM_EXIT_FAIL_ENTRY
    INTR = lib.KVM_EXIT_INTR
    INTERNAL_ERROR = lib.KVM_EXIT_INTERNAL_ERROR
    SYSTEM_EVENT = lib.KVM_EXIT_SYSTEM_EVENT
    ARM_NISV = lib.KVM_EXIT_ARM_NISV
    DIRTY_RING_FULL = lib.KVM_EXIT_DIRTY_RING_FULL
    MEMORY_FAULT = lib.KVM_EXIT_MEMORY_FAULT


class DeviceType(enum.IntEnum):
    """KVM_DEV_TYPE_*: what KVM_CREATE_DEVICE makes."""

    VFIO = lib.KVM_DEV_TYPE_VFIO
    ARM_VGIC_V2 = lib.KVM_DEV_TYPE_ARM_VGIC_V2
    ARM_VGIC_V3 = lib.KVM_DEV_TYPE_ARM_VGIC_V3
    ARM_VGIC_ITS = lib.KVM_DEV_TYPE_ARM_VGIC_ITS


class MemFlag(enum.IntFlag):
    """KVM_MEM_*: flags of a memory slot."""

    LOG_DIRTY_PAGES = lib.KVM_MEM_LOG_DIRTY_PAGES
    READONLY = lib.KVM_MEM_READONLY


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """Why KVM_RUN came back. Fields that the reason does not use are None.

    Attributes:
        reason: KVM_EXIT_*; INTR stands for EINTR, a signal or a kick.
        flags: kvm_run.flags.
        phys_addr: MMIO: guest-physical address.
        data: MMIO and IO: bytes written, or as many zeros as a read wants.
        is_write: MMIO and IO: the guest writes.
        port: IO: port number.
        code: FAIL_ENTRY: the hardware's reason; INTERNAL_ERROR: the suberror;
            UNKNOWN: the hardware's exit reason.
    """

    reason: ExitReason | int
    flags: int = 0
    phys_addr: int | None = None
    data: bytes | None = None
    is_write: bool | None = None
    port: int | None = None
    code: int | None = None

    def __str__(self) -> str:
        name = self.reason.name if isinstance(self.reason, ExitReason) else str(self.reason)
        known = [
            f"{field}={value:#x}" if isinstance(value, int) else f"{field}={value!r}"
            for field in ("phys_addr", "port", "data", "code")
            if (value := getattr(self, field)) is not None
        ]
        return f"KVM_EXIT_{name}" + (f" ({', '.join(known)})" if known else "")


# Reasons above the longest prefix of the enum are rare enough for a dict to be slower.
_REASONS = {int(reason): reason for reason in ExitReason}


def exit_from(run: Any, io_data: Callable[[], bytes]) -> Exit:
    """Make an Exit of a copied struct kvm_run; io_data fetches the bytes of port I/O."""
    number = int(run.exit_reason)
    reason = _REASONS.get(number, number)
    if reason is ExitReason.MMIO:
        mmio = run.mmio
        return Exit(
            reason=reason,
            flags=run.flags,
            phys_addr=mmio.phys_addr,
            data=bytes(mmio.data[0 : mmio.len]) if mmio.is_write else bytes(mmio.len),
            is_write=bool(mmio.is_write),
        )
    if reason is ExitReason.IO:
        write = run.io.direction == lib.KVM_EXIT_IO_OUT
        size = run.io.size * run.io.count
        data = io_data() if write else bytes(size)
        return Exit(reason=reason, flags=run.flags, port=run.io.port, data=data, is_write=write)
    code = None
    if reason is ExitReason.FAIL_ENTRY:
        code = run.fail_entry.hardware_entry_failure_reason
    elif reason is ExitReason.INTERNAL_ERROR:
        code = run.internal.suberror
    elif reason is ExitReason.UNKNOWN:
        code = run.hw.hardware_exit_reason
    return Exit(reason=reason, flags=run.flags, code=code)


def check(name: str, ret: int) -> int:
    """Return what a C function returned, or raise what its error means. name: the ioctl's."""
    if ret >= 0:
        return ret
    if ret == -lib.KVR_EFORKED:
        raise ForkedError(f"{name}: the handle belongs to the process that made it; open anew")
    if ret == -lib.KVR_ESIZE:
        raise ValueError(f"{name}: the bitmap is not of the slot's size in pages")
    if ret == -lib.KVR_EINUSE:
        raise StateError(f"{name}: another thread is doing this at the moment")
    if ret == -lib.KVR_ENORING:
        raise StateError(f"{name}: the vCPU has no dirty ring; enable_dirty_ring() comes before it")
    if ret == -lib.KVR_EFROZEN:
        raise StateError(
            f"{name}: a Tracker has declared the VM's dirty state final; close it first"
        )
    hint = HINTS.get((name, -ret), ANY_IOCTL.get(-ret, ""))
    raise KvmError(-ret, name, hint)


def out(ctype: str) -> Any:
    """Return a place for an out-parameter, such as "struct kvr_obj *"."""
    return ffi.new(ctype + "*")


def owner(place: Any, put: Any) -> Any:
    """Own what a C function left in the place; put is called when nobody uses it any more."""
    return ffi.gc(place[0], put)


# Results that C fills whole; clearing them first would cost as much again.
uninitialised = ffi.new_allocator(should_clear_after_alloc=False)


def page_size() -> int:
    """Ask for the running kernel's page size in bytes."""
    place = ffi.new("uint64_t *")
    lib.kvr_kernel_page_size(place)
    return int(place[0])


PAGE_SIZE = page_size()


def guest_code() -> bytes:
    """Copy the built-in guest's machine code."""
    return bytes(ffi.buffer(lib.kvr_guest_code, lib.kvr_guest_code_bytes()))


def live() -> dict[str, int]:
    """Count the fds, mappings and rings that C owns at the moment."""
    place = ffi.new("struct kvr_live *")
    lib.kvr_live(place)
    return {"fds": place.fds, "maps": place.maps, "rings": place.rings}
