"""The kernel's ABI as this build sees it, against numbers written down here.

The compiler has compared the CFFI declarations with the kernel's headers; these tests compare
what came out with literal sizes, offsets, capability and ioctl numbers, so that a header with a
mistake (Linux 6.1's arm64 one has page offset 0) cannot bring it in. The last part compares the
type stub kvmring/_kvm.pyi with the extension that it describes.
"""

from __future__ import annotations

import ast
import platform
import re
from pathlib import Path

import pytest

import kvmring
from kvmring import Cap, DeviceType, ExitReason, page_size
from kvmring.abi import PAGE_SIZE, MemFlag, ffi, guest_code, lib

X86 = platform.machine() == "x86_64"
ARM = platform.machine() == "aarch64"


def row(start: int, step: int, names: str) -> dict[str, int]:
    """Offsets of fields that follow each other at equal distances."""
    return {name: start + step * i for i, name in enumerate(names.split())}


SIZES = {
    "kvm_dirty_gfn": 16,
    "kvm_enable_cap": 104,
    "kvm_dirty_log": 16,
    "kvm_clear_dirty_log": 24,
    "kvm_userspace_memory_region": 32,
    "kvm_userspace_memory_region2": 160,
    "kvm_device_attr": 24,
    "kvm_create_device": 12,
    "kvm_one_reg": 16,
    "kvm_reg_list": 8,
    "kvm_stats_header": 24,
    "kvr_gfn": 16,
    "kvr_fault": 32,
    "kvr_reset_result": 32,
    "kvr_live": 12,
    "kvr_high_water": 8,
    "kvr_served": 72,
    "kvr_guest_block": 72,
    "kvr_kvm_fd": 12,
    "kvr_ring_view": 32,
    "kvr_event_field": 4,
    "kvr_tracepoint": 40,
    "kvr_event": 40,
}
OFFSETS = {
    "kvm_dirty_gfn": {"flags": 0, "slot": 4, "offset": 8},
    "kvm_enable_cap": {"cap": 0, "flags": 4, "args": 8, "pad": 40},
    "kvm_dirty_log": {"slot": 0, "padding1": 4, "dirty_bitmap": 8, "padding2": 8},
    "kvm_clear_dirty_log": {
        "slot": 0,
        "num_pages": 4,
        "first_page": 8,
        "dirty_bitmap": 16,
        "padding2": 16,
    },
    "kvm_userspace_memory_region": {
        "slot": 0,
        "flags": 4,
        "guest_phys_addr": 8,
        "memory_size": 16,
        "userspace_addr": 24,
    },
    "kvm_userspace_memory_region2": {
        "slot": 0,
        "flags": 4,
        "guest_phys_addr": 8,
        "memory_size": 16,
        "userspace_addr": 24,
        "guest_memfd_offset": 32,
        "guest_memfd": 40,
        "pad1": 44,
        "pad2": 48,
    },
    "kvm_device_attr": {"flags": 0, "group": 4, "attr": 8, "addr": 16},
    "kvm_create_device": {"type": 0, "fd": 4, "flags": 8},
    "kvm_one_reg": {"id": 0, "addr": 8},
    "kvm_reg_list": {"n": 0, "reg": 8},
    "kvm_stats_header": {
        "flags": 0,
        "name_size": 4,
        "num_desc": 8,
        "id_offset": 12,
        "desc_offset": 16,
        "data_offset": 20,
    },
    "kvm_run": {
        "immediate_exit": 1,
        "exit_reason": 8,
        "flags": 14,
        "hw": 32,
        "fail_entry": 32,
        "io": 32,
        "mmio": 32,
        "internal": 32,
        "padding": 32,
    },
    "kvr_gfn": {"slot": 0, "vcpu": 4, "offset": 8},
    "kvr_fault": {"taken": 0, "vcpu": 8, "index": 12, "flags": 16, "slot": 20, "offset": 24},
    "kvr_reset_result": {"reset": 0, "expected": 8, "suspects": 16, "calls": 24, "unknown": 28},
    "kvr_live": {"fds": 0, "maps": 4, "rings": 8},
    "kvr_high_water": {"vcpu": 0, "entries": 4},
    "kvr_served": {
        "fulls": 0,
        "full_ns": 8,
        "entries": 16,
        "resets": 24,
        "short_resets": 28,
        "error": 32,
        "pad": 36,
        "last": 40,
    },
    "kvr_ring_view": {
        "time_ns": 0,
        **row(8, 4, "write known pushed lapped dirty harvested"),
    },
    "kvr_kvm_fd": row(0, 4, "number is_vm vcpu"),
    "kvr_event_field": row(0, 2, "offset size"),
    "kvr_tracepoint": {
        **row(0, 4, "id kind"),
        "period": 8,
        **row(16, 4, "vcpu dirty reset slot page"),
    },
    "kvr_event": {
        **row(0, 8, "time_ns page"),
        **row(16, 4, "tid kind vcpu slot dirty_index reset_index"),
    },
    "kvr_guest_block": {
        "list": 0,
        "count": 8,
        "rounds": 16,
        "stop": 24,
        "at": 32,
        "stores": 40,
        "round": 48,
        "doorbell": 56,
        "values": 64,
    },
}
# The members of kvm_run's union have no names of their own: offsets from kvm_run's start.
RUN_FIELDS = {
    ("hw", "hardware_exit_reason"): 32,
    ("fail_entry", "hardware_entry_failure_reason"): 32,
    ("fail_entry", "cpu"): 40,
    ("io", "direction"): 32,
    ("io", "size"): 33,
    ("io", "port"): 34,
    ("io", "count"): 36,
    ("io", "data_offset"): 40,
    ("mmio", "phys_addr"): 32,
    ("mmio", "data"): 40,
    ("mmio", "len"): 48,
    ("mmio", "is_write"): 52,
    ("internal", "suberror"): 32,
    ("internal", "ndata"): 36,
    ("internal", "data"): 40,
}
if X86:
    SIZES |= {
        "kvm_regs": 144,
        "kvm_segment": 24,
        "kvm_dtable": 16,
        "kvm_sregs": 312,
        "kvm_cpuid_entry2": 40,
        "kvm_cpuid2": 8,
    }
    OFFSETS["kvm_regs"] = row(
        0, 8, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"
    )
    OFFSETS["kvm_segment"] = {"base": 0, "limit": 8, "selector": 12} | row(
        14, 1, "type present dpl db s l g avl unusable padding"
    )
    OFFSETS["kvm_dtable"] = {"base": 0, "limit": 8, "padding": 10}
    OFFSETS["kvm_sregs"] = (
        row(0, 24, "cs ds es fs gs ss tr ldt")
        | {"gdt": 192, "idt": 208}
        | row(224, 8, "cr0 cr2 cr3 cr4 cr8 efer apic_base interrupt_bitmap")
    )
    OFFSETS["kvm_cpuid_entry2"] = row(0, 4, "function index flags eax ebx ecx edx padding")
    OFFSETS["kvm_cpuid2"] = {"nent": 0, "padding": 4, "entries": 8}
if ARM:
    SIZES["kvm_vcpu_init"] = 32
    OFFSETS["kvm_vcpu_init"] = {"target": 0, "features": 4}

CAPS = {
    "USER_MEMORY": 3,
    "NR_VCPUS": 9,
    "NR_MEMSLOTS": 10,
    "SYNC_MMU": 16,
    "DESTROY_MEMORY_REGION_WORKS": 21,
    "JOIN_MEMORY_REGIONS_WORKS": 30,
    "MAX_VCPUS": 66,
    "ONE_REG": 70,
    "READONLY_MEM": 81,
    "DEVICE_CTRL": 89,
    "VM_ATTRIBUTES": 101,
    "X86_SMM": 117,
    "MULTI_ADDRESS_SPACE": 118,
    "VCPU_ATTRIBUTES": 127,
    "MAX_VCPU_ID": 128,
    "IMMEDIATE_EXIT": 136,
    "ARM_VM_IPA_SIZE": 165,
    "MANUAL_DIRTY_LOG_PROTECT": 166,
    "MANUAL_DIRTY_LOG_PROTECT2": 168,
    "DIRTY_LOG_RING": 192,
    "BINARY_STATS_FD": 203,
    "ARM_MTE": 205,
    "VM_DISABLE_NX_HUGE_PAGES": 220,
    "DIRTY_LOG_RING_ACQ_REL": 223,
    "DIRTY_LOG_RING_WITH_BITMAP": 225,
    "ARM_EAGER_SPLIT_CHUNK_SIZE": 228,
    "USER_MEMORY2": 231,
    "MEMORY_FAULT_INFO": 232,
    "MEMORY_ATTRIBUTES": 233,
    "GUEST_MEMFD": 234,
    "VM_TYPES": 235,
    "PRE_FAULT_MEMORY": 236,
}
CONSTANTS = {
    "KVM_API_VERSION": 12,
    "KVM_DIRTY_GFN_F_DIRTY": 1,
    "KVM_DIRTY_GFN_F_RESET": 2,
    "KVM_DIRTY_LOG_PAGE_OFFSET": 64,
    "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE": 1,
    "KVM_DIRTY_LOG_INITIALLY_SET": 2,
    "KVM_MEM_LOG_DIRTY_PAGES": 1,
    "KVM_MEM_READONLY": 2,
    "KVM_CREATE_DEVICE_TEST": 1,
    "KVM_EXIT_IO_IN": 0,
    "KVM_EXIT_IO_OUT": 1,
    "KVM_REG_SIZE_MASK": 0x00F0_0000_0000_0000,
    "KVM_REG_SIZE_SHIFT": 52,
    "KVR_ATTR_BYTES": 4096,
}
IOCTLS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_GET_DIRTY_LOG": 0x4010AE42,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_SET_USER_MEMORY_REGION2": 0x40A0AE49,
    "KVM_RUN": 0xAE80,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_GET_ONE_REG": 0x4010AEAB,
    "KVM_SET_ONE_REG": 0x4010AEAC,
    "KVM_GET_REG_LIST": 0xC008AEB0,
    "KVM_CLEAR_DIRTY_LOG": 0xC018AEC0,
    "KVM_RESET_DIRTY_RINGS": 0xAEC7,
    "KVM_GET_STATS_FD": 0xAECE,
    "KVM_CREATE_DEVICE": 0xC00CAEE0,
    "KVM_SET_DEVICE_ATTR": 0x4018AEE1,
    "KVM_GET_DEVICE_ATTR": 0x4018AEE2,
    "KVM_HAS_DEVICE_ATTR": 0x4018AEE3,
}
if X86:
    IOCTLS |= {
        "KVM_GET_REGS": 0x8090AE81,
        "KVM_SET_REGS": 0x4090AE82,
        "KVM_GET_SREGS": 0x8138AE83,
        "KVM_SET_SREGS": 0x4138AE84,
        "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
        "KVM_SET_CPUID2": 0x4008AE90,
    }
if ARM:
    IOCTLS |= {"KVM_ARM_VCPU_INIT": 0x4020AEAE, "KVM_ARM_PREFERRED_TARGET": 0x8020AEAF}

EXITS = {
    "UNKNOWN": 0,
    "EXCEPTION": 1,
    "IO": 2,
    "HYPERCALL": 3,
    "DEBUG": 4,
    "HLT": 5,
    "MMIO": 6,
    "IRQ_WINDOW_OPEN": 7,
    "SHUTDOWN": 8,
    "FAIL_ENTRY": 9,
    "INTR": 10,
    "INTERNAL_ERROR": 17,
    "SYSTEM_EVENT": 24,
    "ARM_NISV": 28,
    "DIRTY_RING_FULL": 31,
    "MEMORY_FAULT": 39,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    assert ffi.sizeof(f"struct {name}") == SIZES[name]


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_of_every_field(name: str) -> None:
    kind = ffi.typeof(f"struct {name}")
    there = dict(kind.fields)
    if "" in there:  # an anonymous union: its members count as the struct's
        there |= dict(there.pop("").type.fields)
    assert set(there) == set(OFFSETS[name]), "a field that no test knows, or one that is gone"
    assert {field: ffi.offsetof(kind, field) for field in there} == OFFSETS[name]


def is_whole(name: str) -> bool:
    try:
        ffi.sizeof(f"struct {name}")
    except (ffi.error, ValueError):
        return False
    return True


def test_every_struct_of_the_declarations_is_measured() -> None:
    _, tags, _ = ffi.list_types()
    whole = {name for name in tags if is_whole(name)}
    assert whole == set(OFFSETS)
    assert whole - {"kvm_run"} == set(SIZES), "kvm_run grows with the kernel's headers"
    opaque = set(tags) - whole
    ours = {"obj", "map", "ring", "bitmap", "set", "server", "observer", "events"}
    assert opaque == {f"kvr_{name}" for name in ours}


@pytest.mark.parametrize(("member", "field"), RUN_FIELDS)
def test_offsets_in_the_union_of_exits(member: str, field: str) -> None:
    assert ffi.offsetof("struct kvm_run", member, field) == RUN_FIELDS[member, field]


def test_capability_numbers() -> None:
    assert {cap.name: cap.value for cap in Cap} == CAPS


def test_exit_reasons() -> None:
    assert {reason.name: reason.value for reason in ExitReason} == EXITS


def test_other_enums() -> None:
    assert {flag.name: flag.value for flag in MemFlag} == {"LOG_DIRTY_PAGES": 1, "READONLY": 2}
    assert {kind.name: kind.value for kind in DeviceType} == {
        "VFIO": 4,
        "ARM_VGIC_V2": 5,
        "ARM_VGIC_V3": 7,
        "ARM_VGIC_ITS": 8,
    }


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name: str) -> None:
    assert getattr(lib, name) == CONSTANTS[name]


@pytest.mark.parametrize("name", IOCTLS)
def test_ioctl_numbers(name: str) -> None:
    assert getattr(lib, name) == IOCTLS[name]


def test_our_own_errors_are_no_errnos() -> None:
    ours = [lib.KVR_EFORKED, lib.KVR_ESIZE, lib.KVR_EINUSE, lib.KVR_ENORING]
    assert len(set(ours)) == len(ours)
    assert all(number > 4095 for number in ours), "MAX_ERRNO is 4095"


def test_the_page_size_is_the_running_kernels() -> None:
    with Path("/proc/self/smaps").open() as smaps:
        line = next(line for line in smaps if line.startswith("KernelPageSize"))
    assert page_size() == PAGE_SIZE == int(line.split()[1]) * 1024


def test_the_guest_code_is_there() -> None:
    code = guest_code()
    assert 20 < len(code) < PAGE_SIZE
    if X86:
        assert code.startswith(bytes.fromhex("488b37")), "mov (%rdi), %rsi"


# _kvm.pyi

ARCHITECTURES = {"x86_64": "x86_64", "aarch64": "arm64"}
CSRC = Path(__file__).parents[2] / "csrc"


def other_architectures_names() -> set[str]:
    """List the constants that only another architecture's declarations have."""
    found: set[str] = set()
    for machine, name in ARCHITECTURES.items():
        names = re.findall(r"#define (\w+)", (CSRC / f"kvmring.{name}.cdef.h").read_text())
        assert names
        if machine != platform.machine():
            found |= set(names)
    return found


def stub() -> tuple[set[str], dict[str, int]]:
    """Read class Lib: names of its constants, and of its functions with their parameter count."""
    path = Path(kvmring.__file__).with_name("_kvm.pyi")
    classes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)]
    (body,) = (node.body for node in classes if node.name == "Lib")
    values = {
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    functions = {
        node.name: len(node.args.posonlyargs) - 1 + len(node.args.args)
        for node in body
        if isinstance(node, ast.FunctionDef)
    }
    return values, functions


def test_the_stub_names_what_the_extension_has() -> None:
    values, functions = stub()
    elsewhere = other_architectures_names()
    assert not elsewhere & set(dir(lib))
    assert values | set(functions) == set(dir(lib)) | elsewhere


def test_the_stub_and_the_extension_agree_on_parameters() -> None:
    _, functions = stub()
    real = {}
    for name in functions:
        kind = ffi.typeof(getattr(lib, name))
        assert kind.kind == "function"
        real[name] = len(kind.args)
    assert functions == real
