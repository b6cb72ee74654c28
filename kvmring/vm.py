"""VM: capabilities, memory slots, vCPUs, devices, and dirty logging over all of them."""

from __future__ import annotations

import errno
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmring import ioctls, stats
from kvmring.abi import PAGE_SIZE, Cap, DeviceType, check, ffi, lib
from kvmring.device import U32, U64, Device
from kvmring.dirtylog import DirtyLog
from kvmring.dirtyset import MemorySlot
from kvmring.errors import KvmError, KvmNotSupported, StateError, int_between
from kvmring.memory import MAX_GPA, MAX_SIZE, MAX_SLOT, GuestMemory, new_map
from kvmring.vcpu import VCPU

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmring._kvm import Map, Obj
    from kvmring.owned import Owned
    from kvmring.stats import Statistics

__all__ = ["VM"]

ENTRY_BYTES = 16
MAX_ENTRIES = 65536  # KVM_DIRTY_RING_MAX_ENTRIES; what this host takes is asked from KVM
_TOO_SMALL = "possibly too few entries: KVM keeps 64 of them back, and with PML 512 more"
INITIALLY_SET = 3  # KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET


def require_entries(entries: int, most: int) -> int:
    """Return a ring size in entries, or refuse it with the nearest that are allowed."""
    number = int_between("entries", entries, -(1 << 63), (1 << 64) - 1)
    if number <= 0 or number & (number - 1):
        below = 1 << (number.bit_length() - 1) if number > 0 else 0
        near = [str(n) for n in (below, 2 * below or 256) if 0 < n <= most]
        nearest = " or ".join(near)
        raise ValueError(f"entries must be a power of two, not {number}; nearest: {nearest}")
    if number > most:
        raise ValueError(f"entries must be at most {most} on this host, not {number}")
    if number * ENTRY_BYTES < PAGE_SIZE:
        least = PAGE_SIZE // ENTRY_BYTES
        raise ValueError(f"entries must fill a page of {PAGE_SIZE} bytes: at least {least}")
    return number


class VM(DirtyLog):
    """A virtual machine; made by System.create_vm().

    Lifetime: KVM keeps the VM until this handle and those of its vCPUs and devices are closed;
        closing this one closes them all.
    """

    __slots__ = (
        "_devices",
        "_manual_protect",
        "_memory",
        "_removed",
        "_table",
        "_vcpus",
        "_with_bitmap",
    )

    def __init__(self, handle: Obj) -> None:
        super().__init__(handle)
        self._vcpus: list[VCPU] = []
        self._memory: dict[int, GuestMemory] = {}
        self._removed: list[GuestMemory] = []  # of slots whose number was used again
        self._devices: list[Device] = []
        self._with_bitmap = False
        self._manual_protect = 0

    def _about(self) -> str:
        ring = f"ring of {self.ring_entries} entries" if self.ring_entries else "no ring"
        return f"{len(self._vcpus)} vCPUs, {len(self.slots)} slots, {ring}"

    def close(self) -> None:
        """Close the VM, its vCPUs, devices and memory. A vCPU that runs is not interrupted."""
        children: list[Owned[Obj] | Owned[Map]] = [*self._vcpus, *self._devices]
        for child in [*children, *self._memory.values(), *self._removed]:
            child.close()
        super().close()

    # Capabilities

    def check_extension(self, cap: Cap | int) -> int:
        """Ask KVM about a capability: the value as KVM gives it, 0 for "no".

        Ioctl: KVM_CHECK_EXTENSION on the VM. DIRTY_LOG_RING and DIRTY_LOG_RING_ACQ_REL answer
        with the largest ring in bytes.
        """
        return ioctls.check_extension(self, int_between("cap", cap, 0, U32 >> 1))

    def enable_cap(self, cap: Cap | int, args: Sequence[int] = (), *, flags: int = 0) -> None:
        """Enable a capability. Sizes are bytes here, as KVM has them.

        Ioctl: KVM_ENABLE_CAP.

        Args:
            cap: KVM_CAP_*.
            args: Up to four 64-bit arguments.
            flags: 32 bits.

        Raises:
            KvmError: EINVAL and others as the kernel says.
            StateError: INITIALLY_SET together with a dirty ring, which loses every page that
                is mapped already.
        """
        number = int_between("cap", cap, 0, U32)
        values = [int_between("argument", arg, 0, U64) for arg in args]
        if len(values) > 4:
            raise ValueError("KVM_ENABLE_CAP takes at most 4 arguments")
        if (
            number == Cap.MANUAL_DIRTY_LOG_PROTECT2
            and values[:1] == [INITIALLY_SET]
            and self.ring_entries
        ):
            raise StateError(
                "INITIALLY_SET with a dirty ring: pages that are mapped already would never be "
                "logged; use a ring, or INITIALLY_SET, not both"
            )
        ring = number in (Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_ACQ_REL)
        if ring and self._manual_protect == INITIALLY_SET:
            raise StateError(
                "a dirty ring with INITIALLY_SET: pages that are mapped already would never be "
                "logged; enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with 0 or 1 first"
            )
        ioctls.enable_cap(self, number, values, flags=int_between("flags", flags, 0, U32))
        if number == Cap.MANUAL_DIRTY_LOG_PROTECT2:
            self._manual_protect = values[0] if values else 0
        if number == Cap.DIRTY_LOG_RING_WITH_BITMAP:
            self._with_bitmap = True

    def enable_dirty_ring(self, entries: int = 4096, *, with_bitmap: bool | None = None) -> None:
        """Give every vCPU that is created from now on a dirty ring.

        Ioctl: KVM_ENABLE_CAP with KVM_CAP_DIRTY_LOG_RING_ACQ_REL (Linux 6.1) or
        KVM_CAP_DIRTY_LOG_RING (5.11, x86); then KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP (6.2, arm64).

        Args:
            entries: Size of each ring, a power of two of 16-byte entries. 64 of them, and with
                PML 512 more, are kept back by KVM.
            with_bitmap: Whether the backup bitmap is enabled too, for what is dirtied outside
                any vCPU. None: where KVM offers it. False is for experiments: without the
                bitmap arm64 does not split large blocks, and one page of each is logged
                (memslot_is_logging(), arch/arm64/kvm/mmu.c).

        Raises:
            ValueError: Not a power of two, or a size that this host does not take.
            StateError: A vCPU or a ring exists; with the bitmap, also when a slot exists.
            KvmNotSupported: No dirty ring here; or with_bitmap=True where KVM has none.
            KvmError: EINVAL, fewer entries than the hardware's own buffers need.
        """
        cap = Cap.DIRTY_LOG_RING_ACQ_REL
        most = self.check_extension(cap)
        if not most:
            cap = Cap.DIRTY_LOG_RING
            most = self.check_extension(cap)
        if not most:
            raise KvmNotSupported("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
        number = require_entries(entries, most // ENTRY_BYTES)
        offered = bool(self.check_extension(Cap.DIRTY_LOG_RING_WITH_BITMAP))
        if with_bitmap and not offered:
            raise KvmNotSupported(
                "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP",
                "arm64 has it; elsewhere nothing is dirtied outside a vCPU, and a ring is enough",
            )
        bitmap = offered if with_bitmap is None else with_bitmap
        if self.ring_entries:
            raise StateError(f"the VM has a dirty ring of {self.ring_entries} entries already")
        if self._vcpus:
            raise StateError("a vCPU exists: enable_dirty_ring() comes before the first one")
        if bitmap and self.slots:
            raise StateError("a memory slot exists: the backup bitmap is enabled before the first")
        try:
            self.enable_cap(cap, [number * ENTRY_BYTES])
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            # All that KVM checks was checked, but for what hardware buffers need.
            raise KvmError(errno.EINVAL, "KVM_ENABLE_CAP", _TOO_SMALL) from None
        if bitmap:
            self.enable_cap(Cap.DIRTY_LOG_RING_WITH_BITMAP)

    @property
    def ring_entries(self) -> int:
        """Entries of each vCPU's dirty ring; 0 without rings."""
        place = ffi.new("uint64_t *")
        check("vm", lib.kvr_ring_bytes(self.handle, place))
        return int(place[0]) // ENTRY_BYTES

    @property
    def with_bitmap(self) -> bool:
        """Whether the backup bitmap was enabled."""
        return self._with_bitmap

    # vCPUs and devices

    def create_vcpu(self, vcpu_id: int | None = None) -> VCPU:
        """Create a vCPU; without an id, the lowest that is free.

        Ioctl: KVM_CREATE_VCPU; maps kvm_run and, where the VM has one, the dirty ring.

        Raises:
            KvmError: EEXIST, the id is taken; EINVAL, beyond the limits; ENOMEM, no room for
                the ring.
        """
        if vcpu_id is None:
            taken = {vcpu.id for vcpu in self._vcpus}
            number = next(n for n in range(len(taken) + 1) if n not in taken)
        else:
            number = int_between("vcpu_id", vcpu_id, 0, U32 >> 1)
        vcpu = VCPU(ioctls.create_vcpu(self, number), number)
        self._vcpus.append(vcpu)
        return vcpu

    @property
    def vcpus(self) -> tuple[VCPU, ...]:
        """The vCPUs, in the order of their creation."""
        return tuple(self._vcpus)

    def create_device(self, device_type: DeviceType | int) -> Device:
        """Create a device of KVM's own.

        Ioctl: KVM_CREATE_DEVICE.

        Raises:
            KvmError: ENODEV, this architecture or kernel has none of the kind; EEXIST, the VM
                has it already.
        """
        number = int_between("device_type", device_type, 0, U32)
        device = Device(ioctls.create_device(self, number, 0), device_type)
        self._devices.append(device)
        return device

    def has_device(self, device_type: DeviceType | int) -> bool:
        """Tell whether create_device() knows a type. Ioctl: KVM_CREATE_DEVICE, test only."""
        number = int_between("device_type", device_type, 0, U32)
        try:
            ioctls.create_device(self, number, lib.KVM_CREATE_DEVICE_TEST)
        except KvmError as error:
            if error.errno != errno.ENODEV:
                raise
            return False
        return True

    def arm_preferred_target(self) -> int:
        """Return the CPU target for arm_vcpu_init(). Ioctl: KVM_ARM_PREFERRED_TARGET, arm64."""
        return int(ioctls.arm_preferred_target(self)["target"])

    # Memory

    def add_memory(
        self,
        gpa: int,
        size_bytes: int | None = None,
        *,
        log_dirty: bool = False,
        readonly: bool = False,
        slot: int | None = None,
        as_id: int = 0,
        backing: GuestMemory | None = None,
        region2: bool = False,
    ) -> GuestMemory:
        """Add a memory slot, with RAM of its own or another slot's.

        Ioctl: KVM_SET_USER_MEMORY_REGION, or KVM_SET_USER_MEMORY_REGION2 (Linux 6.8).

        Args:
            gpa: Guest-physical byte address, page-aligned.
            size_bytes: Bytes, a multiple of the page size; that of backing without it.
            log_dirty: KVM_MEM_LOG_DIRTY_PAGES.
            readonly: KVM_MEM_READONLY: guest writes exit as MMIO.
            slot: Slot id within the address space; the lowest free one without it.
            as_id: Address space; 1 is x86's SMM, where KVM has it.
            backing: Memory to show here too.
            region2: Use the second of the two ioctls.

        Raises:
            ValueError: Not aligned, empty, or overlapping another slot of the address space.
            StateError: The slot exists.
            KvmError: As the kernel says; ENOMEM from mmap.
        """
        start = int_between("gpa", gpa, 0, MAX_GPA)
        if size_bytes is None:
            if backing is None:
                raise TypeError("add_memory needs size_bytes, or backing")
            size_bytes = backing.size_bytes
        size = int_between("size_bytes", size_bytes, 1, MAX_SIZE)
        if start % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(
                f"gpa {start:#x} and size_bytes {size:#x} must be multiples of the page size, "
                f"{PAGE_SIZE}"
            )
        if backing is not None and size > backing.size_bytes:
            raise ValueError(f"backing has {backing.size_bytes} bytes, fewer than {size}")
        number = self._slot_number(slot, as_id)
        record = MemorySlot(
            slot=number,
            gpa=start,
            num_pages=size // PAGE_SIZE,
            log_dirty=bool(log_dirty),
            readonly=bool(readonly),
        )
        self._refuse_overlap(record)
        handle = new_map(size) if backing is None else backing.handle
        memory = GuestMemory(self._table, number, record.num_pages, handle)
        del handle
        try:
            self._table.set_region(record, memory, 0, region2=region2)
        except BaseException:
            memory.close()
            raise
        old = self._memory.get(number)
        if old is not None and not old.closed:
            self._removed.append(old)
        self._memory[number] = memory
        return memory

    @property
    def memory(self) -> Mapping[int, GuestMemory]:
        """The memory handles, by slot."""
        return MappingProxyType(self._memory)

    def _slot_number(self, slot: int | None, as_id: int) -> int:
        space = int_between("as_id", as_id, 0, MAX_SLOT >> 16)
        if slot is None:
            return self._table.next_free(space)
        number = space << 16 | int_between("slot", slot, 0, 0xFFFF)
        if number in self.slots:
            raise StateError(f"slot {number} exists; remove() it first, or choose another")
        return number

    def _refuse_overlap(self, new: MemorySlot) -> None:
        for old in self.slots.values():
            if old.as_id == new.as_id and old.gpa < new.end and new.gpa < old.end:
                raise ValueError(
                    f"memory at {new.gpa:#x}..{new.end:#x} overlaps slot {old.slot} "
                    f"at {old.gpa:#x}..{old.end:#x}"
                )

    def stats(self) -> Statistics:
        """Read the VM's statistics: name to int, or to a tuple for histograms.

        Ioctl: KVM_GET_STATS_FD, KVM_CAP_BINARY_STATS_FD, Linux 5.14.
        """
        return stats.read(self)
