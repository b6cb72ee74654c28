"""GICv3 and ITS of arm64: the devices whose tables KVM writes without any vCPU.

What save_tables(), restore_tables() and save_pending_tables() write is not in any ring: it is
what the backup bitmap is for. Rules: Documentation/virt/kvm/devices/arm-vgic-v3.rst and
arm-vgic-its.rst. On other architectures creating a GicV3 raises KvmError ENODEV.
"""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING

from kvmring.abi import DeviceType
from kvmring.errors import KvmError, StateError, int_between

if TYPE_CHECKING:
    from kvmring.device import Device
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__all__ = ["GicV3", "Its", "ItsReg", "RedistReg"]

FRAME = 64 << 10  # frames lie at multiples of it, and tables have pages of it
MAX_ADDRESS = (1 << 52) - 1
U64 = (1 << 64) - 1


class Group(enum.IntEnum):
    """KVM_DEV_ARM_VGIC_GRP_*. Other architectures' headers lack them; a test compares."""

    ADDR = 0
    NR_IRQS = 3
    CTRL = 4
    REDIST_REGS = 5
    ITS_REGS = 8


# KVM_DEV_ARM_VGIC_CTRL_INIT and so on; KVM_VGIC_V3_ADDR_TYPE_* and KVM_VGIC_ITS_ADDR_TYPE
_INIT, _SAVE_TABLES, _RESTORE_TABLES, _SAVE_PENDING, _RESET = 0, 1, 2, 3, 4
_DIST, _REDIST, _ITS = 2, 3, 4


class ItsReg(enum.IntEnum):
    """Byte offsets of the ITS registers that KVM lets the VMM read and write, 64 bits each."""

    CTLR = 0x0000
    IIDR = 0x0004
    TYPER = 0x0008
    CBASER = 0x0080
    CWRITER = 0x0088
    CREADR = 0x0090
    BASER0 = 0x0100
    BASER1 = 0x0108
    BASER2 = 0x0110
    BASER3 = 0x0118
    BASER4 = 0x0120
    BASER5 = 0x0128
    BASER6 = 0x0130
    BASER7 = 0x0138


class RedistReg(enum.IntEnum):
    """Byte offsets of some redistributor registers; 64-bit ones are two of 32 bits."""

    CTLR = 0x0000
    IIDR = 0x0004
    TYPER = 0x0008
    PROPBASER = 0x0070
    PENDBASER = 0x0078


def _command(device: Device, name: str, attr: int, hints: dict[int, str]) -> None:
    """Give a device a command of its CTRL group; errors name the command."""
    try:
        device.set_attr(Group.CTRL, attr)
    except KvmError as error:
        number = error.errno or 0
        raise KvmError(number, name, hints.get(number, error.hint)) from None


_BUSY = "a vCPU is running: stop and kick all of them first"


class GicV3:
    """A GICv3: distributor and redistributors.

    Create the vCPUs between this and init(), which fixes their number.

    Args:
        vm: The VM.
        distributor: Guest-physical address of its 64 KiB, a multiple of 64 KiB.
        redistributors: The same for 128 KiB per vCPU.

    Raises:
        ValueError: An address is not aligned, or frames overlap each other or memory.
        KvmError: ENODEV, not arm64, or a host without GICv3; EEXIST, the VM has a GIC.

    Attributes:
        device: The Device beneath.
    """

    def __init__(
        self, vm: VM, *, distributor: int = 0x0800_0000, redistributors: int = 0x080A_0000
    ) -> None:
        self._vm = vm
        self._frames: list[tuple[str, int, int]] = []
        self._redistributors = redistributors
        self._add_frame("the distributor", distributor, FRAME)
        self._add_frame("the redistributors", redistributors, 2 * FRAME)
        self.device = vm.create_device(DeviceType.ARM_VGIC_V3)
        self.device.set_attr(Group.ADDR, _DIST, distributor)
        self.device.set_attr(Group.ADDR, _REDIST, redistributors)
        self._ready = False

    def _add_frame(self, name: str, start: int, size: int) -> None:
        """Take note of addresses, after checking that nothing else has them."""
        first = int_between(f"address of {name}", start, 0, MAX_ADDRESS)
        if first % FRAME:
            raise ValueError(f"the address of {name}, {first:#x}, is not a multiple of 64 KiB")
        others = [*self._frames]
        others += [(f"memory slot {s.slot}", s.gpa, s.end) for s in self._vm.slots.values()]
        for other, low, high in others:
            if low < first + size and first < high:
                raise ValueError(
                    f"{name} at {first:#x}..{first + size:#x} overlaps {other} "
                    f"at {low:#x}..{high:#x}"
                )
        self._frames.append((name, first, first + size))

    def init(self) -> None:
        """Initialise the GIC; the vCPUs must exist by now.

        Ioctl: KVM_SET_DEVICE_ATTR, KVM_DEV_ARM_VGIC_CTRL_INIT.

        Raises:
            StateError: The VM has no vCPU.
            ValueError: The redistributors of all vCPUs overlap something.
            KvmError: EBUSY, a vCPU ran already.
        """
        number = len(self._vm.vcpus)
        if not number:
            raise StateError("create the vCPUs before init(): it fixes their number")
        self._frames = [frame for frame in self._frames if frame[0] != "the redistributors"]
        self._add_frame("the redistributors", self._redistributors, 2 * FRAME * number)
        _command(
            self.device,
            "KVM_DEV_ARM_VGIC_CTRL_INIT",
            _INIT,
            {
                errno.EBUSY: "a vCPU ran before the GIC was initialised, or runs now",
                errno.ENODEV: "this host has no GICv3",
                errno.ENXIO: "a frame has no address yet",
            },
        )
        self._ready = True

    def read_redist(self, vcpu: VCPU, offset: RedistReg | int) -> int:
        """Read 32 bits of a vCPU's redistributor; the vCPUs must not be running."""
        attr = _affinity(vcpu.id) << 32 | int_between("offset", offset, 0, 2 * FRAME - 4)
        return int.from_bytes(self.device.get_attr(Group.REDIST_REGS, attr, 4), "little")

    def write_redist(self, vcpu: VCPU, offset: RedistReg | int, value: int) -> None:
        """Write 32 bits of a vCPU's redistributor; the vCPUs must not be running."""
        attr = _affinity(vcpu.id) << 32 | int_between("offset", offset, 0, 2 * FRAME - 4)
        data = int_between("value", value, 0, (1 << 32) - 1).to_bytes(4, "little")
        self.device.set_attr(Group.REDIST_REGS, attr, data)

    def save_pending_tables(self) -> None:
        """Write which LPIs are pending into the redistributors' pending tables.

        Ioctl: KVM_SET_DEVICE_ATTR, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES. The pages it writes
        are in the backup bitmap only. A byte that is right already is not written.

        Raises:
            KvmError: EBUSY, a vCPU is running; ENXIO, not initialised.
        """
        _command(
            self.device,
            "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES",
            _SAVE_PENDING,
            {errno.EBUSY: _BUSY, errno.ENXIO: "the GIC is not initialised: init() first"},
        )


def _affinity(vcpu_id: int) -> int:
    """Return MPIDR's affinity as KVM gives it: 16 vCPUs in a cluster, 256 clusters."""
    return (vcpu_id & 0xF) | (vcpu_id >> 4 & 0xFF) << 8 | (vcpu_id >> 12 & 0xFF) << 16


class Its:
    """An interrupt translation service of a GICv3.

    Args:
        gic: The GIC; it may be initialised before or after.
        address: Guest-physical address of its 128 KiB, a multiple of 64 KiB.

    Raises:
        ValueError: The address is not aligned, or overlaps.
        KvmError: ENODEV, this host has no ITS.

    Attributes:
        device: The Device beneath.
        address: As given; GITS_TRANSLATER is at +0x10040.
    """

    def __init__(self, gic: GicV3, *, address: int = 0x0808_0000) -> None:
        gic._add_frame("the ITS", address, 2 * FRAME)
        self.address = address
        self.device = gic._vm.create_device(DeviceType.ARM_VGIC_ITS)
        self.device.set_attr(Group.ADDR, _ITS, address)

    def init(self) -> None:
        """Initialise the ITS. Ioctl: KVM_SET_DEVICE_ATTR, KVM_DEV_ARM_VGIC_CTRL_INIT."""
        _command(self.device, "KVM_DEV_ARM_VGIC_CTRL_INIT", _INIT, {errno.EBUSY: _BUSY})

    def read(self, reg: ItsReg) -> int:
        """Read a register, as 64 bits.

        Raises:
            KvmError: EBUSY, a vCPU is running; ENXIO, the VMM cannot read it, or no address.
        """
        attr = int_between("register", reg, 0, FRAME - 1)
        return int.from_bytes(self.device.get_attr(Group.ITS_REGS, attr, 8), "little")

    def write(self, reg: ItsReg, value: int) -> None:
        """Write a register, as 64 bits. Set CTLR last: enabled, it takes no new tables.

        Raises:
            KvmError: EBUSY, a vCPU is running; ENXIO, the VMM cannot write it, or no address.
        """
        attr = int_between("register", reg, 0, FRAME - 1)
        data = int_between("value", value, 0, U64).to_bytes(8, "little")
        self.device.set_attr(Group.ITS_REGS, attr, data)

    def save_tables(self) -> None:
        """Write devices, events and collections into the tables in guest memory.

        Ioctl: KVM_SET_DEVICE_ATTR, KVM_DEV_ARM_ITS_SAVE_TABLES. The pages it writes are in the
        backup bitmap only.

        Raises:
            KvmError: EBUSY, a vCPU is running; EINVAL, a table does not lie in memory or has no
                room; EACCES, the guest's configuration cannot be saved.
        """
        self._tables("SAVE", _SAVE_TABLES)

    def restore_tables(self) -> None:
        """Read devices, events and collections back from the tables in guest memory.

        Ioctl: KVM_SET_DEVICE_ATTR, KVM_DEV_ARM_ITS_RESTORE_TABLES. It clears what it takes from
        the pending tables: those pages are in the backup bitmap only.

        Raises:
            KvmError: EBUSY, a vCPU is running; EINVAL, the tables contradict themselves.
        """
        self._tables("RESTORE", _RESTORE_TABLES)

    def _tables(self, verb: str, attr: int) -> None:
        _command(
            self.device,
            f"KVM_DEV_ARM_ITS_{verb}_TABLES",
            attr,
            {
                errno.EBUSY: _BUSY,
                errno.ENXIO: "the ITS has no address, or is not initialised: init() first",
                errno.EINVAL: "a table does not lie in memory, is too small, or is not valid",
            },
        )

    def reset(self) -> None:
        """Reset the ITS. Ioctl: KVM_SET_DEVICE_ATTR, KVM_DEV_ARM_ITS_CTRL_RESET."""
        _command(self.device, "KVM_DEV_ARM_ITS_CTRL_RESET", _RESET, {errno.EBUSY: _BUSY})
