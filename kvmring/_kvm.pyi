"""What the C extension has, for type checkers; tests/unit compares it with the real one.

CData types are opaque: they are passed on, never looked into, outside abi.py and ioctls.py.
"""

from typing import Any, Protocol

class _Owner:
    """One C struct behind a pointer."""

class Obj(_Owner): ...
class Map(_Owner): ...
class Ring(_Owner): ...
class Bitmap(_Owner): ...
class Set(_Owner): ...

# Structs and buffers whose fields are read: cffi checks them at run time.
Out = Any
Pointer = Any
Fault = Any
Gfns = Any

class Lib(Protocol):
    """The constants and functions of csrc/kvmring*.cdef.h."""

    KVM_CAP_USER_MEMORY: int
    KVM_CAP_NR_VCPUS: int
    KVM_CAP_NR_MEMSLOTS: int
    KVM_CAP_SYNC_MMU: int
    KVM_CAP_DESTROY_MEMORY_REGION_WORKS: int
    KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: int
    KVM_CAP_MAX_VCPUS: int
    KVM_CAP_ONE_REG: int
    KVM_CAP_READONLY_MEM: int
    KVM_CAP_DEVICE_CTRL: int
    KVM_CAP_VM_ATTRIBUTES: int
    KVM_CAP_X86_SMM: int
    KVM_CAP_MULTI_ADDRESS_SPACE: int
    KVM_CAP_VCPU_ATTRIBUTES: int
    KVM_CAP_MAX_VCPU_ID: int
    KVM_CAP_IMMEDIATE_EXIT: int
    KVM_CAP_ARM_VM_IPA_SIZE: int
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT: int
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: int
    KVM_CAP_DIRTY_LOG_RING: int
    KVM_CAP_BINARY_STATS_FD: int
    KVM_CAP_ARM_MTE: int
    KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: int
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL: int
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: int
    KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE: int
    KVM_CAP_USER_MEMORY2: int
    KVM_CAP_MEMORY_FAULT_INFO: int
    KVM_CAP_MEMORY_ATTRIBUTES: int
    KVM_CAP_GUEST_MEMFD: int
    KVM_CAP_VM_TYPES: int
    KVM_CAP_PRE_FAULT_MEMORY: int
    KVM_API_VERSION: int
    KVM_DIRTY_GFN_F_DIRTY: int
    KVM_DIRTY_GFN_F_RESET: int
    KVM_DIRTY_LOG_PAGE_OFFSET: int
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: int
    KVM_DIRTY_LOG_INITIALLY_SET: int
    KVM_MEM_LOG_DIRTY_PAGES: int
    KVM_MEM_READONLY: int
    KVM_CREATE_DEVICE_TEST: int
    KVM_EXIT_UNKNOWN: int
    KVM_EXIT_EXCEPTION: int
    KVM_EXIT_IO: int
    KVM_EXIT_HYPERCALL: int
    KVM_EXIT_DEBUG: int
    KVM_EXIT_HLT: int
    KVM_EXIT_MMIO: int
    KVM_EXIT_IRQ_WINDOW_OPEN: int
    KVM_EXIT_SHUTDOWN: int
    KVM_EXIT_FAIL_ENTRY: int
    KVM_EXIT_INTR: int
    KVM_EXIT_INTERNAL_ERROR: int
    KVM_EXIT_SYSTEM_EVENT: int
    KVM_EXIT_ARM_NISV: int
    KVM_EXIT_DIRTY_RING_FULL: int
    KVM_EXIT_MEMORY_FAULT: int
    KVM_EXIT_IO_IN: int
    KVM_EXIT_IO_OUT: int
    KVM_DEV_TYPE_VFIO: int
    KVM_DEV_TYPE_ARM_VGIC_V2: int
    KVM_DEV_TYPE_ARM_VGIC_V3: int
    KVM_DEV_TYPE_ARM_VGIC_ITS: int
    KVM_REG_SIZE_MASK: int
    KVM_REG_SIZE_SHIFT: int
    KVM_GET_API_VERSION: int
    KVM_CHECK_EXTENSION: int
    KVM_GET_VCPU_MMAP_SIZE: int
    KVM_RUN: int
    KVM_GET_REGS: int
    KVM_SET_REGS: int
    KVM_GET_SREGS: int
    KVM_SET_SREGS: int
    KVM_GET_ONE_REG: int
    KVM_SET_ONE_REG: int
    KVM_GET_REG_LIST: int
    KVM_SET_DEVICE_ATTR: int
    KVM_GET_DEVICE_ATTR: int
    KVM_HAS_DEVICE_ATTR: int
    KVM_GET_DIRTY_LOG: int
    KVM_CLEAR_DIRTY_LOG: int
    KVM_RESET_DIRTY_RINGS: int
    KVM_ENABLE_CAP: int
    KVM_SET_USER_MEMORY_REGION: int
    KVM_SET_USER_MEMORY_REGION2: int
    KVM_CREATE_VM: int
    KVM_CREATE_VCPU: int
    KVM_CREATE_DEVICE: int
    KVM_GET_STATS_FD: int
    KVR_EFORKED: int
    KVR_ESIZE: int
    KVR_EINUSE: int
    KVR_ENORING: int
    KVR_EFROZEN: int
    KVR_THAWED: int
    KVR_FROZEN_VCPUS: int
    KVR_FROZEN: int
    KVR_ATTR_BYTES: int
    KVM_GET_SUPPORTED_CPUID: int
    KVM_SET_CPUID2: int
    KVM_ARM_PREFERRED_TARGET: int
    KVM_ARM_VCPU_INIT: int
    KVM_DEV_ARM_VGIC_GRP_ADDR: int
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS: int
    KVM_DEV_ARM_VGIC_GRP_CTRL: int
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS: int
    KVM_DEV_ARM_VGIC_GRP_ITS_REGS: int
    KVM_DEV_ARM_VGIC_CTRL_INIT: int
    KVM_DEV_ARM_ITS_SAVE_TABLES: int
    KVM_DEV_ARM_ITS_RESTORE_TABLES: int
    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES: int
    KVM_DEV_ARM_ITS_CTRL_RESET: int
    KVM_VGIC_V3_ADDR_TYPE_DIST: int
    KVM_VGIC_V3_ADDR_TYPE_REDIST: int
    KVM_VGIC_ITS_ADDR_TYPE: int
    kvr_guest_code: Pointer

    def kvr_open(self, path: bytes, out: Out, /) -> int: ...
    def kvr_create_vm(self, sys: Obj, type: int, out: Out, /) -> int: ...
    def kvr_create_vcpu(self, vm: Obj, id: int, out: Out, /) -> int: ...
    def kvr_create_device(self, vm: Obj, type: int, flags: int, out: Out, /) -> int: ...
    def kvr_stats_open(self, vm_or_vcpu: Obj, out: Out, /) -> int: ...
    def kvr_pread(self, obj: Obj, buf: Pointer, len: int, offset: int, /) -> int: ...
    def kvr_obj_put(self, obj: Obj, /) -> None: ...
    def kvr_fileno(self, obj: Obj, /) -> int: ...
    def kvr_ioctl(self, obj: Obj, request: int, arg: Pointer, /) -> int: ...
    def kvr_ioctl_int(self, obj: Obj, request: int, arg: int, /) -> int: ...
    def kvr_map_new(self, bytes: int, out: Out, /) -> int: ...
    def kvr_map_put(self, map: Map, /) -> None: ...
    def kvr_map_bytes(self, map: Map, /) -> int: ...
    def kvr_map_read(self, map: Map, offset: int, buf: Pointer, len: int, /) -> int: ...
    def kvr_map_write(self, map: Map, offset: int, buf: Pointer, len: int, /) -> int: ...
    def kvr_map_gather(
        self, map: Map, offset: int, stride: int, count: int, out: Pointer, /
    ) -> int: ...
    def kvr_live(self, out: Pointer, /) -> None: ...
    def kvr_kernel_page_size(self, out: Pointer, /) -> None: ...
    def kvr_enable_cap(self, obj: Obj, cap: int, flags: int, args: Pointer, /) -> int: ...
    def kvr_ring_bytes(self, vm: Obj, out: Pointer, /) -> int: ...
    def kvr_set_memory(
        self,
        vm: Obj,
        version: int,
        slot: int,
        flags: int,
        gpa: int,
        bytes: int,
        map: Map,
        map_offset: int,
        /,
    ) -> int: ...
    def kvr_get_dirty_log(self, vm: Obj, slot: int, into: Bitmap, /) -> int: ...
    def kvr_clear_dirty_log(
        self, vm: Obj, slot: int, bits: Bitmap, first: int, num: int, /
    ) -> int: ...
    def kvr_device_attr(
        self, obj: Obj, request: int, group: int, attr: int, buf: Pointer, len: int, /
    ) -> int: ...
    def kvr_one_reg(self, vcpu: Obj, request: int, id: int, buf: Pointer, len: int, /) -> int: ...
    def kvr_vcpu_ring(self, vcpu: Obj, out: Out, /) -> int: ...
    def kvr_ring_put(self, ring: Ring, /) -> None: ...
    def kvr_ring_entries(self, ring: Ring, /) -> int: ...
    def kvr_ring_indices(self, ring: Ring, fetch: Pointer, reset: Pointer, /) -> int: ...
    def kvr_ring_fill(self, ring: Ring, out: Pointer, /) -> int: ...
    def kvr_ring_harvest(
        self, ring: Ring, gfns: Gfns, set: Set, max: int, fault: Fault, /
    ) -> int: ...
    def kvr_vm_harvest(self, vm: Obj, gfns: Gfns, set: Set, max: int, fault: Fault, /) -> int: ...
    def kvr_reset_dirty_rings(
        self, vm: Obj, guarded: int, suspects: Gfns, room: int, out: Pointer, /
    ) -> int: ...
    def kvr_ring_synthetic(self, entries: int, out: Out, /) -> int: ...
    def kvr_synthetic_push(self, ring: Ring, slot: int, first: int, num: int, /) -> int: ...
    def kvr_synthetic_reset(self, ring: Ring, /) -> int: ...
    def kvr_synthetic_poke(self, ring: Ring, index: int, flags: int, /) -> int: ...
    def kvr_bitmap_new(self, num_pages: int, out: Out, /) -> int: ...
    def kvr_bitmap_free(self, bm: Bitmap, /) -> None: ...
    def kvr_bitmap_pages_total(self, bm: Bitmap, /) -> int: ...
    def kvr_bitmap_words(self, bm: Bitmap, /) -> Pointer: ...
    def kvr_bitmap_count(self, bm: Bitmap, /) -> int: ...
    def kvr_bitmap_test(self, bm: Bitmap, page: int, /) -> int: ...
    def kvr_bitmap_set_range(self, bm: Bitmap, first: int, num: int, value: int, /) -> int: ...
    def kvr_bitmap_set_pages(self, bm: Bitmap, pages: Pointer, num: int, /) -> int: ...
    def kvr_bitmap_merge(self, dst: Bitmap, op: int, src: Bitmap, /) -> int: ...
    def kvr_bitmap_equal(self, a: Bitmap, b: Bitmap, /) -> int: ...
    def kvr_bitmap_page_numbers(
        self, bm: Bitmap, next: Pointer, base: int, scale: int, out: Pointer, max: int, /
    ) -> int: ...
    def kvr_bitmap_runs(self, bm: Bitmap, next: Pointer, out: Pointer, max: int, /) -> int: ...
    def kvr_set_new(self, n: int, out: Out, /) -> int: ...
    def kvr_set_free(self, set: Set, /) -> None: ...
    def kvr_set_put(self, set: Set, slot: int, bm: Bitmap, /) -> int: ...
    def kvr_set_strays(self, set: Set, /) -> int: ...
    def kvr_set_fresh(self, set: Set, /) -> int: ...
    def kvr_run(self, vcpu: Obj, out: Pointer, /) -> int: ...
    def kvr_kick(self, vcpu: Obj, /) -> int: ...
    def kvr_leave(self, vcpu: Obj, timeout_ms: int, /) -> int: ...
    def kvr_freeze(self, vm: Obj, level: int, /) -> int: ...
    def kvr_running(self, vcpu: Obj, /) -> int: ...
    def kvr_io_data(self, vcpu: Obj, buf: Pointer, max: int, /) -> int: ...
    def kvr_respond(self, vcpu: Obj, buf: Pointer, len: int, /) -> int: ...
    def kvr_guest_code_bytes(self) -> int: ...

lib: Lib
ffi: Any
