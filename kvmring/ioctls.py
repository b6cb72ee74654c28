"""The raw level: one function per ioctl, by the kernel's name in lower case.

These decide nothing. They take handles (System, VM, VCPU, Device: anything with .handle) and
plain values, and raise KvmError with the ioctl's name. Use them for what has no method yet;
ioctl() at the end takes any request. The rules and errnos are in Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import errno
import operator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvmring.abi import Exit, check, exit_from, ffi, lib, out, owner, uninitialised
from kvmring.errors import KvmNotSupported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Struct = dict[str, Any]


class Handle(Protocol):
    """Anything that owns something in C. Passed on inline, so that no frame pins it."""

    @property
    def handle(self) -> Any:
        """The owner, or ClosedError."""


def _make(name: str, function: Callable[..., int], *args: object) -> Any:
    """Call a C function that makes an owner of an fd."""
    place = out("struct kvr_obj *")
    check(name, function(*args, place))
    return owner(place, lib.kvr_obj_put) if place[0] != ffi.NULL else None


def _arch(ctype: str, init: object = None) -> Any:
    """Allocate a struct that only one architecture's KVM has."""
    try:
        return ffi.new(ctype, init)
    except ffi.error:
        name = ctype.removesuffix(" *")
        raise KvmNotSupported(name, "this architecture's KVM has no such thing") from None


def as_dict(struct: Any) -> Struct:
    """Copy a struct of integers, arrays and such structs into a dict."""
    result: Struct = {}
    for name, field in ffi.typeof(struct).fields:
        value = getattr(struct, name)
        if field.type.kind == "struct":
            result[name] = as_dict(value)
        elif field.type.kind == "array":
            result[name] = list(value)
        else:
            result[name] = int(value)
    return result


# /dev/kvm ---------------------------------------------------------------


def open_kvm(path: bytes) -> Any:
    """Open the device; raises KvmError with ioctl "open", ENOTTY when it is not KVM."""
    return _make("open", lib.kvr_open, path)


def get_api_version(kvm: Handle) -> int:
    """KVM_GET_API_VERSION: 12."""
    return check("KVM_GET_API_VERSION", lib.kvr_ioctl_int(kvm.handle, lib.KVM_GET_API_VERSION, 0))


def check_extension(kvm_or_vm: Handle, cap: int) -> int:
    """KVM_CHECK_EXTENSION: the value as KVM gives it; 0 is "no"."""
    return check(
        "KVM_CHECK_EXTENSION",
        lib.kvr_ioctl_int(kvm_or_vm.handle, lib.KVM_CHECK_EXTENSION, cap),
    )


def get_vcpu_mmap_size(kvm: Handle) -> int:
    """KVM_GET_VCPU_MMAP_SIZE: bytes of kvm_run with what follows it, without the ring."""
    return check(
        "KVM_GET_VCPU_MMAP_SIZE", lib.kvr_ioctl_int(kvm.handle, lib.KVM_GET_VCPU_MMAP_SIZE, 0)
    )


def create_vm(kvm: Handle, vm_type: int) -> Any:
    """KVM_CREATE_VM."""
    return _make("KVM_CREATE_VM", lambda p: lib.kvr_create_vm(kvm.handle, vm_type, p))


# VM ---------------------------------------------------------------------


def enable_cap(vm_or_vcpu: Handle, cap: int, args: Sequence[int] = (), *, flags: int = 0) -> int:
    """KVM_ENABLE_CAP with up to four arguments."""
    padded = (*args, 0, 0, 0, 0)[:4]
    return check(
        "KVM_ENABLE_CAP",
        lib.kvr_enable_cap(vm_or_vcpu.handle, cap, flags, ffi.new("uint64_t[4]", padded)),
    )


def create_vcpu(vm: Handle, vcpu_id: int) -> Any:
    """KVM_CREATE_VCPU, with kvm_run mapped, and the dirty ring where the VM has one."""
    return _make("KVM_CREATE_VCPU", lambda p: lib.kvr_create_vcpu(vm.handle, vcpu_id, p))


def set_user_memory_region(
    vm: Handle, slot: int, flags: int, gpa: int, size_bytes: int, memory: Handle, offset: int
) -> int:
    """KVM_SET_USER_MEMORY_REGION; size_bytes 0 deletes the slot."""
    return check(
        "KVM_SET_USER_MEMORY_REGION",
        lib.kvr_set_memory(vm.handle, 1, slot, flags, gpa, size_bytes, memory.handle, offset),
    )


def set_user_memory_region2(
    vm: Handle, slot: int, flags: int, gpa: int, size_bytes: int, memory: Handle, offset: int
) -> int:
    """KVM_SET_USER_MEMORY_REGION2 (KVM_CAP_USER_MEMORY2, Linux 6.8), without guest_memfd."""
    return check(
        "KVM_SET_USER_MEMORY_REGION2",
        lib.kvr_set_memory(vm.handle, 2, slot, flags, gpa, size_bytes, memory.handle, offset),
    )


def get_dirty_log(vm: Handle, slot: int, bitmap: Handle) -> int:
    """KVM_GET_DIRTY_LOG into a bitmap, whatever was in it."""
    return check("KVM_GET_DIRTY_LOG", lib.kvr_get_dirty_log(vm.handle, slot, bitmap.handle))


def clear_dirty_log(vm: Handle, slot: int, bitmap: Handle, first_page: int, num_pages: int) -> int:
    """KVM_CLEAR_DIRTY_LOG for a range of the slot; the bitmap is of the whole slot."""
    return check(
        "KVM_CLEAR_DIRTY_LOG",
        lib.kvr_clear_dirty_log(vm.handle, slot, bitmap.handle, first_page, num_pages),
    )


class ResetCounts(NamedTuple):
    """What struct kvr_reset_result says, and the suspects as (slot, page)."""

    reset: int
    expected: int
    calls: int
    unknown: int
    suspects: list[tuple[int, int]]

    @classmethod
    def of(cls, result: Any, gfns: Any) -> ResetCounts:
        """Read the struct, and the suspects that came with it."""
        suspects = [(gfns[i].slot, gfns[i].offset) for i in range(result.suspects)]
        return cls(result.reset, result.expected, result.calls, result.unknown, suspects)


def reset_dirty_rings(vm: Handle, *, guarded: bool) -> ResetCounts:
    """KVM_RESET_DIRTY_RINGS, guarded against signals or bare; see kvr_reset_dirty_rings()."""
    result = ffi.new("struct kvr_reset_result *")
    gfns = uninitialised("struct kvr_gfn[]", lib.KVR_SUSPECTS)
    check(
        "KVM_RESET_DIRTY_RINGS",
        lib.kvr_reset_dirty_rings(vm.handle, guarded, gfns, lib.KVR_SUSPECTS, result),
    )
    return ResetCounts.of(result, gfns)


def create_device(vm: Handle, device_type: int, flags: int) -> Any:
    """KVM_CREATE_DEVICE; None with KVM_CREATE_DEVICE_TEST in flags."""
    return _make(
        "KVM_CREATE_DEVICE", lambda p: lib.kvr_create_device(vm.handle, device_type, flags, p)
    )


# Attributes: VMs, vCPUs and devices have them ---------------------------


def set_device_attr(obj: Handle, group: int, attr: int, value: bytes) -> int:
    """KVM_SET_DEVICE_ATTR; an empty value for commands that take none."""
    buf = ffi.new("unsigned char[]", value) if value else ffi.NULL
    return check(
        "KVM_SET_DEVICE_ATTR",
        lib.kvr_device_attr(obj.handle, lib.KVM_SET_DEVICE_ATTR, group, attr, buf, len(value)),
    )


def get_device_attr(obj: Handle, group: int, attr: int, value: bytes) -> bytes:
    """KVM_GET_DEVICE_ATTR; value is what the kernel finds at the address, and how much."""
    buf = ffi.new("unsigned char[]", value)
    check(
        "KVM_GET_DEVICE_ATTR",
        lib.kvr_device_attr(obj.handle, lib.KVM_GET_DEVICE_ATTR, group, attr, buf, len(value)),
    )
    return bytes(ffi.buffer(buf, len(value)))


def has_device_attr(obj: Handle, group: int, attr: int) -> int:
    """KVM_HAS_DEVICE_ATTR: 0, or KvmError ENXIO."""
    return check(
        "KVM_HAS_DEVICE_ATTR",
        lib.kvr_device_attr(obj.handle, lib.KVM_HAS_DEVICE_ATTR, group, attr, ffi.NULL, 0),
    )


def get_stats_fd(vm_or_vcpu: Handle) -> Any:
    """KVM_GET_STATS_FD."""
    return _make("KVM_GET_STATS_FD", lambda p: lib.kvr_stats_open(vm_or_vcpu.handle, p))


def pread(stats: Handle, length: int, offset: int) -> bytes:
    """Read from a statistics fd at an offset; fewer bytes at the end of the file."""
    buf = ffi.new("unsigned char[]", length)
    return bytes(ffi.buffer(buf, check("pread", lib.kvr_pread(stats.handle, buf, length, offset))))


# vCPU -------------------------------------------------------------------


def run(vcpu: Handle) -> Exit:
    """KVM_RUN; EINTR is an Exit with reason INTR."""
    copy = ffi.new("struct kvm_run *")
    return _exit(vcpu, lib.kvr_run(vcpu.handle, copy), copy)


def run_serving(vcpu: Handle, server: Any) -> Exit:
    """KVM_RUN, again and again while a server can serve the full ring that ended it."""
    copy = ffi.new("struct kvm_run *")
    return _exit(vcpu, lib.kvr_run_serving(vcpu.handle, server, copy), copy)


def _exit(vcpu: Handle, ret: int, copy: Struct) -> Exit:
    if ret != -errno.EINTR:
        check("KVM_RUN", ret)
    return exit_from(copy, lambda: io_data(vcpu))


def io_data(vcpu: Handle) -> bytes:
    """Copy the bytes of the last KVM_EXIT_IO."""
    buf = ffi.new("unsigned char[4096]")
    return bytes(ffi.buffer(buf, check("KVM_EXIT_IO", lib.kvr_io_data(vcpu.handle, buf, 4096))))


def get_regs(vcpu: Handle) -> Struct:
    """KVM_GET_REGS (x86-64)."""
    regs = _arch("struct kvm_regs *")
    check("KVM_GET_REGS", lib.kvr_ioctl(vcpu.handle, lib.KVM_GET_REGS, regs))
    return as_dict(regs[0])


def set_regs(vcpu: Handle, regs: Mapping[str, Any]) -> int:
    """KVM_SET_REGS (x86-64); what is left out is 0."""
    struct = _arch("struct kvm_regs *", dict(regs))
    return check("KVM_SET_REGS", lib.kvr_ioctl(vcpu.handle, lib.KVM_SET_REGS, struct))


def get_sregs(vcpu: Handle) -> Struct:
    """KVM_GET_SREGS (x86-64)."""
    sregs = _arch("struct kvm_sregs *")
    check("KVM_GET_SREGS", lib.kvr_ioctl(vcpu.handle, lib.KVM_GET_SREGS, sregs))
    return as_dict(sregs[0])


def set_sregs(vcpu: Handle, sregs: Mapping[str, Any]) -> int:
    """KVM_SET_SREGS (x86-64)."""
    struct = _arch("struct kvm_sregs *", dict(sregs))
    return check("KVM_SET_SREGS", lib.kvr_ioctl(vcpu.handle, lib.KVM_SET_SREGS, struct))


def get_supported_cpuid(kvm: Handle) -> list[Struct]:
    """KVM_GET_SUPPORTED_CPUID (x86-64)."""
    room = 1024  # more than KVM_MAX_CPUID_ENTRIES, so E2BIG cannot come
    cpuid = _arch("struct kvm_cpuid2 *", {"entries": room})
    cpuid.nent = room
    check("KVM_GET_SUPPORTED_CPUID", lib.kvr_ioctl(kvm.handle, lib.KVM_GET_SUPPORTED_CPUID, cpuid))
    return [as_dict(cpuid.entries[i]) for i in range(cpuid.nent)]


def set_cpuid2(vcpu: Handle, entries: Sequence[Mapping[str, Any]]) -> int:
    """KVM_SET_CPUID2 (x86-64)."""
    cpuid = _arch("struct kvm_cpuid2 *", {"entries": [dict(entry) for entry in entries]})
    cpuid.nent = len(entries)
    return check("KVM_SET_CPUID2", lib.kvr_ioctl(vcpu.handle, lib.KVM_SET_CPUID2, cpuid))


def arm_preferred_target(vm: Handle) -> Struct:
    """KVM_ARM_PREFERRED_TARGET (arm64)."""
    init = _arch("struct kvm_vcpu_init *")
    check("KVM_ARM_PREFERRED_TARGET", lib.kvr_ioctl(vm.handle, lib.KVM_ARM_PREFERRED_TARGET, init))
    return as_dict(init[0])


def arm_vcpu_init(vcpu: Handle, init: Mapping[str, Any]) -> int:
    """KVM_ARM_VCPU_INIT (arm64)."""
    struct = _arch("struct kvm_vcpu_init *", dict(init))
    return check("KVM_ARM_VCPU_INIT", lib.kvr_ioctl(vcpu.handle, lib.KVM_ARM_VCPU_INIT, struct))


def get_one_reg(vcpu: Handle, reg_id: int) -> bytes:
    """KVM_GET_ONE_REG: as many bytes as the id says."""
    size = 1 << ((reg_id & lib.KVM_REG_SIZE_MASK) >> lib.KVM_REG_SIZE_SHIFT)
    buf = ffi.new("unsigned char[]", size)
    check(
        "KVM_GET_ONE_REG",
        lib.kvr_one_reg(vcpu.handle, lib.KVM_GET_ONE_REG, reg_id, buf, size),
    )
    return bytes(ffi.buffer(buf, size))


def set_one_reg(vcpu: Handle, reg_id: int, value: bytes) -> int:
    """KVM_SET_ONE_REG: exactly as many bytes as the id says."""
    buf = ffi.new("unsigned char[]", value or b"\0")
    return check(
        "KVM_SET_ONE_REG",
        lib.kvr_one_reg(vcpu.handle, lib.KVM_SET_ONE_REG, reg_id, buf, len(value)),
    )


def get_reg_list(vcpu: Handle) -> list[int]:
    """KVM_GET_REG_LIST: the ids that KVM_GET_ONE_REG takes."""
    room = 8192
    regs = ffi.new("struct kvm_reg_list *", {"reg": room})
    regs.n = room
    check("KVM_GET_REG_LIST", lib.kvr_ioctl(vcpu.handle, lib.KVM_GET_REG_LIST, regs))
    return [int(regs.reg[i]) for i in range(regs.n)]


# Anything else ----------------------------------------------------------


def ioctl(obj: Handle, request: int, arg: int | bytearray = 0, *, name: str = "ioctl") -> int:
    """Make any ioctl. A bytearray is passed by address, and the kernel writes into it.

    Raises:
        ValueError: The bytearray is shorter than the size in the request's number.
    """
    if isinstance(arg, bytearray):
        size = request >> 16 & 0x3FFF
        if len(arg) < size:
            raise ValueError(f"{name}: the request moves {size} bytes, the buffer has {len(arg)}")
        with ffi.from_buffer("unsigned char[]", arg, require_writable=True) as buf:
            return check(name, lib.kvr_ioctl(obj.handle, request, buf))
    return check(name, lib.kvr_ioctl_int(obj.handle, request, operator.index(arg)))
