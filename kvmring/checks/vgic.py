"""vgic.*: the commands that make KVM write guest memory outside any vCPU: what they refuse."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from kvmring.abi import Cap, DeviceType
from kvmring.checks.bits import expect_pages, written_for_ever
from kvmring.checks.gic import Gic, new_gic
from kvmring.checks.rules import Trial, rule
from kvmring.vgic import Group, ItsReg

if TYPE_CHECKING:
    from collections.abc import Callable

ARM64 = "aarch64"
NEEDS = (Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING_WITH_BITMAP)
ITS = "arch/arm64/kvm/vgic/vgic-its.c, "
CTRL = f"{ITS}vgic_its_ctrl()"
DEVICE = "arch/arm64/kvm/vgic/vgic-kvm-device.c, vgic_set_common_attr()"
VALID = 1 << 63
NOWHERE = 0x1000_0000  # where the VM has neither memory nor a device
ENTRY = 8  # bytes of a collection table's entry
BUSY = "stop every vCPU, and wait until it has left KVM_RUN, before devices are saved"


def busy(trial: Trial, command: Callable[[Gic], Callable[[], None]], name: str) -> None:
    """Expect EBUSY while a vCPU is in KVM_RUN, nothing written, and success when it is not."""
    host = Gic(trial)
    host.program()
    host.do(host.tables.interrupt(1, 0))
    host.forget()
    pages = host.spare[:8]
    with written_for_ever(trial, host.guest, host.ram, pages):
        for number in (1, 2):
            trial.errno(f"{name} while a vCPU runs, {number}", command(host), errno.EBUSY)
        expect_pages(trial, "pages in the bitmap", host.bitmap(), ())
    expect_pages(trial, "pages in the ring", host.ring(), pages)
    trial.errno(f"{name} with the vCPU stopped", command(host), 0)


@rule(
    "vgic.its.save.ebusy",
    "KVM_DEV_ARM_ITS_SAVE_TABLES while a vCPU runs is EBUSY, and writes nothing",
    source=CTRL,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning=BUSY,
)
def save_busy(trial: Trial) -> None:
    """Twice, then stopped."""
    busy(trial, lambda host: host.its.save_tables, "KVM_DEV_ARM_ITS_SAVE_TABLES")


@rule(
    "vgic.its.restore.ebusy",
    "KVM_DEV_ARM_ITS_RESTORE_TABLES while a vCPU runs is EBUSY, and writes nothing",
    source=CTRL,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning=BUSY,
)
def restore_busy(trial: Trial) -> None:
    """Of tables that are empty in memory: there is nothing to restore when it works."""
    busy(trial, lambda host: host.its.restore_tables, "KVM_DEV_ARM_ITS_RESTORE_TABLES")


@rule(
    "vgic.its.reset.ebusy",
    "KVM_DEV_ARM_ITS_CTRL_RESET while a vCPU runs is EBUSY",
    source=CTRL,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning=BUSY,
)
def reset_busy(trial: Trial) -> None:
    """Twice, then stopped."""
    busy(trial, lambda host: host.its.reset, "KVM_DEV_ARM_ITS_CTRL_RESET")


@rule(
    "vgic.pending.ebusy",
    "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES while a vCPU runs is EBUSY, and writes nothing",
    source=DEVICE,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning=BUSY,
)
def pending_busy(trial: Trial) -> None:
    """With an interrupt pending, so that there is something to write."""
    name = "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES"
    busy(trial, lambda host: host.gic.save_pending_tables, name)


@rule(
    "vgic.its.registers.ebusy",
    "the ITS's registers can be neither read nor written while a vCPU runs: EBUSY",
    source=f"{ITS}vgic_its_attr_regs_access()",
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning=BUSY,
)
def registers_busy(trial: Trial) -> None:
    """GITS_BASER1, which has the collection table's address."""
    busy(trial, lambda host: partial(read, host), "reading GITS_BASER1")
    busy(trial, lambda host: partial(write, host), "writing GITS_BASER1")


def read(host: Gic) -> None:
    """Read a register."""
    host.its.read(ItsReg.BASER1)


def write(host: Gic) -> None:
    """Write a register; ignored while the ITS is enabled."""
    host.its.write(ItsReg.BASER1, 0)


@rule(
    "vgic.pending.enxio",
    "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES of a GIC that is not initialised is ENXIO",
    source="arch/arm64/kvm/vgic/vgic-v3.c, vgic_v3_save_pending_tables()",
    needs=NEEDS,
    machine=ARM64,
)
def pending_enxio(trial: Trial) -> None:
    """Before KVM_DEV_ARM_VGIC_CTRL_INIT, and after."""
    vm = trial.vm(ring=trial.least_entries)
    gic = new_gic(trial, vm)
    vm.create_vcpu()
    name = "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES"
    trial.errno(f"{name} before the GIC is initialised", gic.save_pending_tables, errno.ENXIO)
    gic.init()
    trial.errno(f"{name} of an initialised GIC", gic.save_pending_tables, 0)


@rule(
    "vgic.pending.nothing",
    "without LPIs KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES writes and logs nothing",
    source="arch/arm64/kvm/vgic/vgic-v3.c, vgic_v3_save_pending_tables()",
    needs=NEEDS,
    machine=ARM64,
    guest=True,
)
def pending_nothing(trial: Trial) -> None:
    """None mapped; then mapped, but not pending."""
    host = Gic(trial)
    for when in ("none mapped", "none pending"):
        host.forget()
        name = f"KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, {when}"
        trial.errno(name, host.gic.save_pending_tables, 0)
        expect_pages(trial, f"pages in the bitmap, {when}", host.bitmap(), ())
        expect_pages(trial, f"pages that changed, {when}", host.changed(), ())
        host.program()


@rule(
    "vgic.its.unknown_command",
    "a command that the ITS does not know writes nothing: ENXIO, and on older kernels success",
    source=CTRL,
    needs=NEEDS,
    machine=ARM64,
    guest=True,
)
def unknown_command(trial: Trial) -> None:
    """One that is the GIC's own, and one that is nobody's."""
    host = Gic(trial)
    host.program()
    host.do(host.tables.interrupt(1, 0))
    host.forget()
    for number in (3, 99):
        trial.errno(
            f"command {number}",
            partial(host.its.device.set_attr, Group.CTRL, number),
            errno.ENXIO,
            0,
        )
    expect_pages(trial, "pages in the bitmap", host.bitmap(), ())
    expect_pages(trial, "pages that changed", host.changed(), ())
    host.its.save_tables()
    expect_pages(trial, "pages of a save after it", host.bitmap(), host.tables.saved_pages())


@rule(
    "vgic.gic.unknown_command",
    "a command that the GIC does not know is ENXIO, those of the ITS among them",
    source=DEVICE,
    needs=NEEDS,
    machine=ARM64,
)
def gic_unknown_command(trial: Trial) -> None:
    """Saving and restoring the ITS's tables, resetting it, and nobody's command."""
    host = Gic(trial)
    for number in (1, 2, 4, 99):
        trial.errno(
            f"command {number}", partial(host.gic.device.set_attr, Group.CTRL, number), errno.ENXIO
        )


@rule(
    "vgic.its.reset.writes_nothing",
    "KVM_DEV_ARM_ITS_CTRL_RESET forgets the tables and writes none of them: memory and logs stay",
    source=f"{ITS}vgic_its_reset()",
    needs=NEEDS,
    machine=ARM64,
    guest=True,
)
def reset_writes_nothing(trial: Trial) -> None:
    """After a save; the tables' addresses are not valid any more."""
    host = Gic(trial)
    host.program()
    host.its.save_tables()
    host.forget()
    host.its.reset()
    for reg in (ItsReg.BASER0, ItsReg.BASER1, ItsReg.CBASER):
        trial.expect(f"GITS_{reg.name}'s valid bit", host.its.read(reg) >> 63, 0)
    expect_pages(trial, "pages in the bitmap", host.bitmap(), ())
    expect_pages(trial, "pages that changed", host.changed(), ())


@rule(
    "vgic.its.save.no_tables",
    "without valid tables KVM_DEV_ARM_ITS_SAVE_TABLES succeeds, and writes and logs nothing",
    source=f"{ITS}vgic_its_save_device_tables(), vgic_its_save_collection_table()",
    needs=NEEDS,
    machine=ARM64,
)
def save_no_tables(trial: Trial) -> None:
    """Of an ITS that nobody has set up, then with one table."""
    host = Gic(trial, tables=False)
    name = "KVM_DEV_ARM_ITS_SAVE_TABLES"
    trial.errno(f"{name} without tables", host.its.save_tables, 0)
    expect_pages(trial, "pages in the bitmap", host.bitmap(), ())
    expect_pages(trial, "pages that changed", host.changed(), ())
    host.its.write(ItsReg.BASER1, VALID | host.ram.gpa)
    trial.errno(f"{name} with a collection table", host.its.save_tables, 0)
    expect_pages(trial, "pages in the bitmap: the table's end", host.bitmap(), [0])


@rule(
    "vgic.its.efault",
    "saving and restoring a collection table that does not lie in memory is EFAULT",
    source=f"{ITS}vgic_its_save_collection_table(), vgic_its_restore_cte()",
    needs=NEEDS,
    machine=ARM64,
    meaning="a VMM must tell a guest's bad tables from a failed migration",
)
def efault(trial: Trial) -> None:
    """Where the VM has nothing; then in memory."""
    host = Gic(trial, tables=False)
    for gpa, where, accepted in (
        (NOWHERE, "nowhere", errno.EFAULT),
        (host.ram.gpa, "in memory", 0),
    ):
        host.its.write(ItsReg.BASER1, VALID | gpa)
        trial.errno(f"a save with the table {where}", host.its.save_tables, accepted)
        trial.errno(f"a restore with the table {where}", host.its.restore_tables, accepted)


def entry(collection: int, vcpu: int) -> bytes:
    """Return a collection's entry, as KVM writes it."""
    return (VALID | vcpu << 16 | collection).to_bytes(ENTRY, "little")


@rule(
    "vgic.its.restore.einval",
    "restoring a collection of a vCPU that does not exist is EINVAL; one that is there twice is "
    "EEXIST; nothing is logged",
    source=f"{ITS}vgic_its_restore_cte()",
    needs=NEEDS,
    machine=ARM64,
    meaning="tables that did not arrive whole are found here, if at all",
)
def restore_einval(trial: Trial) -> None:
    """Written by the VMM into the table, then tables that are right."""
    host = Gic(trial)
    at = host.collections_at()
    for content, name, accepted in (
        (entry(0, 7), "a collection of vCPU 7 of 1", errno.EINVAL),
        (entry(3, 0) * 2, "a collection twice", errno.EEXIST),
        (entry(0, 0) + entry(3, 0), "two collections", 0),
    ):
        host.ram.write(at, content + bytes(4 * ENTRY))
        trial.errno(f"restoring {name}", host.its.restore_tables, accepted)
        expect_pages(trial, f"pages in the bitmap after {name}", host.bitmap(), ())


@rule(
    "vgic.its.round_trip",
    "what was saved, reset and restored is saved again byte by byte, and logged again",
    source=f"{ITS}vgic_its_save_tables_v0(), vgic_its_restore_tables_v0()",
    needs=NEEDS,
    machine=ARM64,
    guest=True,
    meaning="a migrated guest does not get its interrupts",
)
def round_trip(trial: Trial) -> None:
    """Two devices, four events, a collection; the memory is cleared before the second save."""
    host = Gic(trial)
    host.program()
    host.its.save_tables()
    saved = host.tables.saved_pages()
    size = trial.page_size
    first = {page: host.ram.read(page * size, size) for page in saved}
    host.its.reset()
    host.new_tables()
    trial.errno("KVM_DEV_ARM_ITS_RESTORE_TABLES", host.its.restore_tables, 0)
    for page in saved:
        host.ram.write(page * size, bytes(size))
    host.forget()
    trial.errno("KVM_DEV_ARM_ITS_SAVE_TABLES", host.its.save_tables, 0)
    expect_pages(trial, "pages in the bitmap", host.bitmap(), saved)
    wrong = [page for page in saved if host.ram.read(page * size, size) != first[page]]
    expect_pages(trial, "saved pages that differ", wrong, ())


@rule(
    "vgic.create.eexist",
    "a VM has one GIC: KVM_CREATE_DEVICE of a second one is EEXIST",
    source="arch/arm64/kvm/vgic/vgic-init.c, kvm_vgic_create()",
    machine=ARM64,
)
def create_eexist(trial: Trial) -> None:
    """Of the same kind."""
    vm = trial.vm()
    new_gic(trial, vm)
    trial.errno(
        "KVM_CREATE_DEVICE of a second GICv3",
        lambda: vm.create_device(DeviceType.ARM_VGIC_V3),
        errno.EEXIST,
    )


@rule(
    "vgic.create.enodev",
    "on x86-64 there is neither a GIC nor an ITS: KVM_CREATE_DEVICE is ENODEV",
    source="virt/kvm/kvm_main.c, kvm_ioctl_create_device()",
    machine="x86_64",
)
def create_enodev(trial: Trial) -> None:
    """Each of them."""
    vm = trial.vm()
    for kind in (DeviceType.ARM_VGIC_V2, DeviceType.ARM_VGIC_V3, DeviceType.ARM_VGIC_ITS):
        trial.errno(
            f"KVM_CREATE_DEVICE of {kind.name}", partial(vm.create_device, kind), errno.ENODEV
        )
