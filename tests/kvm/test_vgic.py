"""The GICv3 and its ITS (arm64), and what they dirty outside any vCPU: the backup bitmap.

The guest programs the ITS by commands in its memory, so which pages the tables take follows from
the layout (guests/its.py). The bitmap must hold those and the ring none of them; both
together must be every page that changed.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, DeviceType, DirtySet, KvmError, StateError, System, page_size, vgic
from kvmring.abi import lib
from kvmring.guests import PageWriter, page_order
from kvmring.guests.its import ITS_BYTES, ItsTables
from kvmring.vgic import GicV3, Its, ItsReg

from ..gates import needs
from .rig import skip_with

if TYPE_CHECKING:
    from collections.abc import Iterator

WITH_BITMAP = Cap.DIRTY_LOG_RING_WITH_BITMAP
needs_its = needs(Cap.DIRTY_LOG_RING_ACQ_REL, WITH_BITMAP)
PAGE = page_size()
ENTRIES = 4096
GPA = 1 << 30


class Host:
    """A VM with ring and bitmap, a GIC, an ITS, memory for tables, and a guest."""

    def __init__(self, kvm: System, *, vcpus: int = 1) -> None:
        self.vm = kvm.create_vm()
        self.vm.enable_dirty_ring(ENTRIES, with_bitmap=True)
        self.gic = GicV3(self.vm)
        self.its = Its(self.gic)
        self.ram = self.vm.add_memory(GPA, ITS_BYTES + (1 << 20), log_dirty=True)
        self.guest = PageWriter(kvm, self.vm, num_vcpus=vcpus, capacity=4096)
        self.gic.init()
        self.its.init()
        self.tables = ItsTables(self.its, self.ram)
        self.tables.enable_lpis(self.gic, self.guest.vcpus[0])
        self.before = self.ram.read()

    def do(self, stores: list[tuple[int, int]]) -> None:
        self.guest.store(0, stores)
        assert self.guest.is_done(self.guest.run(0))

    def program(self) -> None:
        """Map a collection and two devices."""
        self.do(
            self.tables.map_collection(0)
            + self.tables.map_device(1, [0, 1, 5])
            + self.tables.map_device(9, [30])
        )

    def ring_pages(self) -> set[int]:
        dirty = DirtySet(self.vm)
        self.vm.harvest(dirty)
        self.vm.reset_dirty_rings()
        return set(dirty[self.ram.slot])

    def backup_pages(self) -> set[int]:
        return set(self.vm.get_dirty_log(self.ram.slot))

    def changed_pages(self) -> set[int]:
        """Return the pages whose contents differ from those at the last call."""
        before, after = self.before, self.ram.read()
        self.before = after
        spans = (slice(at, at + PAGE) for at in range(0, len(after), PAGE))
        return {page for page, span in enumerate(spans) if before[span] != after[span]}


@pytest.fixture
def host(kvm: System) -> Iterator[Host]:
    host = Host(kvm)
    with host.vm:
        yield host


@needs_its
def test_the_numbers_are_those_of_the_kernels_header() -> None:
    assert vgic.Group.ADDR == lib.KVM_DEV_ARM_VGIC_GRP_ADDR
    assert vgic.Group.NR_IRQS == lib.KVM_DEV_ARM_VGIC_GRP_NR_IRQS
    assert vgic.Group.CTRL == lib.KVM_DEV_ARM_VGIC_GRP_CTRL
    assert vgic.Group.REDIST_REGS == lib.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
    assert vgic.Group.ITS_REGS == lib.KVM_DEV_ARM_VGIC_GRP_ITS_REGS
    assert vgic._INIT == lib.KVM_DEV_ARM_VGIC_CTRL_INIT
    assert vgic._SAVE_TABLES == lib.KVM_DEV_ARM_ITS_SAVE_TABLES
    assert vgic._RESTORE_TABLES == lib.KVM_DEV_ARM_ITS_RESTORE_TABLES
    assert vgic._SAVE_PENDING == lib.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES
    assert vgic._RESET == lib.KVM_DEV_ARM_ITS_CTRL_RESET
    assert vgic._DIST == lib.KVM_VGIC_V3_ADDR_TYPE_DIST
    assert vgic._REDIST == lib.KVM_VGIC_V3_ADDR_TYPE_REDIST
    assert vgic._ITS == lib.KVM_VGIC_ITS_ADDR_TYPE


@needs_its
def test_save_tables_is_in_the_bitmap_and_in_no_ring(host: Host) -> None:
    host.program()
    by_ring = host.ring_pages()
    assert by_ring == host.tables.queue_pages()
    assert host.backup_pages() == set()
    host.its.save_tables()
    assert host.ring_pages() == set()
    by_bitmap = host.backup_pages()
    assert by_bitmap == host.tables.saved_pages()
    assert len(by_bitmap) >= 4  # devices, collections, and an event table of each device
    assert host.changed_pages() <= by_ring | by_bitmap
    assert host.changed_pages() == set()


@needs_its
def test_without_the_bitmap_the_tables_would_be_lost(host: Host) -> None:
    """What a collector that trusts the ring alone misses is exactly the tables."""
    host.program()
    host.its.save_tables()
    by_ring = host.ring_pages()
    lost = host.changed_pages() - by_ring
    assert lost
    assert lost <= host.tables.saved_pages()
    # and read too early, the bitmap has none of a later save either
    too_early = host.backup_pages()
    host.do(host.tables.map_device(3, [7]))
    host.its.save_tables()
    late = host.ring_pages() | too_early
    assert host.changed_pages() - late


@needs_its
def test_a_second_save_is_logged_again(host: Host) -> None:
    host.program()
    host.its.save_tables()
    assert host.backup_pages() == host.tables.saved_pages()
    assert host.backup_pages() == set()
    host.do(host.tables.map_device(4, [2]))
    host.its.save_tables()
    assert host.backup_pages() == host.tables.saved_pages()


@needs_its
def test_pending_tables_are_in_the_bitmap(host: Host) -> None:
    host.program()
    host.do(host.tables.interrupt(1, 5) + host.tables.interrupt(9, 30))
    host.ring_pages()
    host.changed_pages()
    host.gic.save_pending_tables()
    expected = host.tables.pending_pages()
    assert expected
    assert host.backup_pages() == expected
    assert host.changed_pages() == expected
    assert host.ring_pages() == set()
    # nothing changed since: no byte is written again
    host.gic.save_pending_tables()
    assert host.backup_pages() == set()


@needs_its
def test_restore_tables_clears_pending_bits_in_the_bitmap_only(host: Host) -> None:
    host.program()
    host.do(host.tables.interrupt(1, 5))
    host.its.save_tables()
    host.gic.save_pending_tables()
    pending = host.tables.pending_pages()
    host.ring_pages()
    host.backup_pages()
    host.changed_pages()
    host.its.reset()
    for reg in (ItsReg.BASER0, ItsReg.BASER1):
        assert not host.its.read(reg) >> 63
    ItsTables(host.its, host.ram)  # the same addresses again
    host.its.restore_tables()
    assert host.backup_pages() == pending
    assert host.changed_pages() == pending
    assert host.ring_pages() == set()


@needs_its
def test_vcpus_and_tables_together_are_every_page_that_changed(host: Host) -> None:
    host.program()
    gpas = page_order(host.ram, first_page=ITS_BYTES // PAGE, order="random", seed=3)
    host.guest.load(0, gpas)
    assert host.guest.is_done(host.guest.run(0))
    by_ring = host.ring_pages()
    host.its.save_tables()
    by_bitmap = host.backup_pages()
    assert not by_ring & by_bitmap
    assert by_ring | by_bitmap >= host.changed_pages()
    written = {(gpa - GPA) // PAGE for gpa in gpas}
    assert by_ring == written | host.tables.queue_pages()


@needs_its
def test_registers_by_name(host: Host) -> None:
    assert host.its.read(ItsReg.CTLR) & 1
    assert host.its.read(ItsReg.BASER0) >> 63
    assert host.its.read(ItsReg.CBASER) >> 63
    assert host.its.read(ItsReg.CREADR) == 0
    host.program()
    assert host.its.read(ItsReg.CREADR) == host.its.read(ItsReg.CWRITER) > 0
    iidr = host.its.read(ItsReg.IIDR)
    host.its.write(ItsReg.IIDR, iidr)
    assert host.its.read(ItsReg.IIDR) == iidr


@needs_its
def test_saving_while_a_vcpu_runs_is_ebusy(host: Host) -> None:
    host.program()
    host.ring_pages()
    host.guest.load(0, page_order(host.ram, num_pages=8), rounds=0)
    ended = threading.Event()

    def run() -> None:
        while not host.guest.is_done(host.guest.run(0)):
            pass
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    while host.guest.progress(0).stores < 100:
        assert thread.is_alive()
    try:
        for save, name in (
            (host.its.save_tables, "KVM_DEV_ARM_ITS_SAVE_TABLES"),
            (host.its.restore_tables, "KVM_DEV_ARM_ITS_RESTORE_TABLES"),
            (host.gic.save_pending_tables, "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES"),
        ):
            with pytest.raises(KvmError, match="vCPU is running") as caught:
                save()
            assert (caught.value.errno, caught.value.ioctl) == (errno.EBUSY, name)
        assert not ended.is_set()
    finally:
        host.guest.stop(0)
        thread.join(60)
    assert ended.is_set()
    host.its.save_tables()  # stopped, it works
    assert host.tables.saved_pages() <= host.backup_pages()


@needs_its
def test_before_init_is_said(kvm: System) -> None:
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(ENTRIES)
        gic = GicV3(vm)
        with pytest.raises(StateError, match="vCPUs before init"):
            gic.init()
        vm.create_vcpu()
        with pytest.raises(KvmError, match=r"init\(\) first") as caught:
            gic.save_pending_tables()
        assert caught.value.errno == errno.ENXIO


@needs_its
@pytest.mark.parametrize(
    ("distributor", "redistributors", "its", "words"),
    [
        (0x0800_1000, 0x080A_0000, 0x0808_0000, "multiple of 64 KiB"),
        (0x0800_0000, 0x080A_8000, 0x0808_0000, "multiple of 64 KiB"),
        (0x0800_0000, 0x080A_0000, 0x0808_0001, "multiple of 64 KiB"),
        (0x0800_0000, 0x0800_0000, 0x0808_0000, "overlaps the distributor"),
        (0x0800_0000, 0x080A_0000, 0x0800_0000, "overlaps the distributor"),
        (0x0800_0000, 0x080A_0000, 0x080B_0000, "overlaps the redistributors"),
        (GPA, 0x080A_0000, 0x0808_0000, "overlaps memory slot 0"),
        (0x0800_0000, GPA + 0x1_0000, 0x0808_0000, "overlaps memory slot 0"),
        (-1, 0x080A_0000, 0x0808_0000, "must lie between"),
    ],
)
def test_refused_addresses(
    kvm: System, distributor: int, redistributors: int, its: int, words: str
) -> None:
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(ENTRIES)
        vm.add_memory(GPA, 1 << 20)
        with pytest.raises(ValueError, match=words):
            Its(GicV3(vm, distributor=distributor, redistributors=redistributors), address=its)


@needs_its
def test_redistributors_of_many_vcpus_must_fit(kvm: System) -> None:
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(ENTRIES)
        gic = GicV3(vm, distributor=0x0810_0000)  # two frames of redistributors below it: 3 vCPUs
        for _ in range(4):
            vm.create_vcpu()
        with pytest.raises(ValueError, match="overlaps the distributor"):
            gic.init()


@needs_its
def test_one_gic_is_enough(host: Host) -> None:
    with pytest.raises(KvmError) as caught:
        host.vm.create_device(DeviceType.ARM_VGIC_V3)
    assert caught.value.errno == errno.EEXIST


@needs(Cap.DIRTY_LOG_RING_ACQ_REL)
def test_elsewhere_there_is_none(kvm: System) -> None:
    skip_with(WITH_BITMAP)
    with kvm.create_vm() as vm:
        assert not vm.has_device(DeviceType.ARM_VGIC_ITS)
        with pytest.raises(KvmError) as caught:
            GicV3(vm)
        assert caught.value.errno == errno.ENODEV
