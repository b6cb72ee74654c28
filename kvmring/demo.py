"""The main job, end to end: a guest dirties pages it knows, the log must name exactly those.

Each vCPU runs in a thread of its own; whenever its ring is full, that thread harvests it,
resets and goes on. With a backup bitmap (arm64), the guest also programs an ITS, whose tables
KVM then saves without any vCPU. After each round the pages logged are compared with those
that the guest and KVM wrote, and with what changed in memory. kvmring/guests holds the guest.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from kvmring.abi import PAGE_SIZE, DeviceType, ExitReason
from kvmring.bitmap import DirtyBitmap
from kvmring.dirtyset import DirtySet
from kvmring.errors import int_between
from kvmring.facts import JsonValue, host_facts
from kvmring.guests import PageWriter, page_order
from kvmring.guests.its import ITS_BYTES, MAX_DEVICES, ItsTables
from kvmring.vgic import FRAME, GicV3, Its

if TYPE_CHECKING:
    from array import array

    from kvmring.memory import GuestMemory
    from kvmring.system import System
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__all__ = ["DemoResult", "VcpuResult", "default_entries", "run"]

SCHEMA = 1
RAM_GPA = 1 << 30
MAX_VCPUS = 64
MIN_STORES = 256  # room for a round's ITS commands


@dataclass(slots=True, kw_only=True)
class VcpuResult:
    """One vCPU's part: counts over all rounds, times in nanoseconds."""

    vcpu: int
    pages: dict[int, int] = field(default_factory=dict)  # by slot
    entries: int = 0
    ring_full_exits: int = 0
    harvest_ns: int = 0
    reset: int = 0
    reset_ns: int = 0

    def per_entry(self) -> tuple[float | None, float | None]:
        """Return nanoseconds per entry of harvest and of reset; None where there were none."""
        return (
            self.harvest_ns / self.entries if self.entries else None,
            self.reset_ns / self.reset if self.reset else None,
        )


@dataclass(slots=True, kw_only=True)
class DemoResult:
    """What came out.

    Attributes:
        source: "ring" or "ring+bitmap".
        pages_written: Distinct pages that the guest, or KVM for it, wrote.
        pages_from_ring: Distinct pages that the rings named.
        pages_from_bitmap: Distinct pages that the backup bitmap named.
        backup_writer: What wrote those, outside any vCPU; None when nothing does on this host.
        missed: Pages written, or changed in memory, that no log named; over all rounds.
        extra: Pages logged that were not written, and entries that name no page.
        wrong_contents: Pages whose contents are not what the guest stored last.
        resets: Calls of reset_dirty_rings().
        suspects: Pages that a reset may have left unprotected (see ResetResult).
    """

    source: str
    entries_per_ring: int
    order: str
    rounds: int
    pages_written: int = 0
    stores: int = 0
    pages_from_ring: int = 0
    pages_from_bitmap: int = 0
    backup_writer: str | None = None
    missed: int = 0
    extra: int = 0
    wrong_contents: int = 0
    resets: int = 0
    suspects: int = 0
    seconds: float = 0.0
    vcpus: list[VcpuResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every page was logged, none beside, and the memory agrees."""
        return not (self.missed or self.extra or self.wrong_contents)

    def as_json(self) -> dict[str, JsonValue]:
        """Return it as the document of `kvmring demo --json`."""
        vcpus: list[JsonValue] = [
            {
                "vcpu": v.vcpu,
                "pages": {str(slot): pages for slot, pages in v.pages.items()},
                "entries": v.entries,
                "ring_full_exits": v.ring_full_exits,
                "harvest_ns": v.harvest_ns,
                "reset": v.reset,
                "reset_ns": v.reset_ns,
            }
            for v in self.vcpus
        ]
        return {
            "schema": SCHEMA,
            "host": host_facts(),
            "source": self.source,
            "entries_per_ring": self.entries_per_ring,
            "order": self.order,
            "rounds": self.rounds,
            "pages_written": self.pages_written,
            "stores": self.stores,
            "pages_from_ring": self.pages_from_ring,
            "pages_from_bitmap": self.pages_from_bitmap,
            "backup_writer": self.backup_writer,
            "missed": self.missed,
            "extra": self.extra,
            "wrong_contents": self.wrong_contents,
            "entries": sum(v.entries for v in self.vcpus),
            "ring_full_exits": sum(v.ring_full_exits for v in self.vcpus),
            "resets": self.resets,
            "suspects": self.suspects,
            "harvest_ns": sum(v.harvest_ns for v in self.vcpus),
            "reset_ns": sum(v.reset_ns for v in self.vcpus),
            "milliseconds": round(self.seconds * 1000),
            "vcpus": vcpus,
        }


def default_entries() -> int:
    """Return the demo's ring size: 1024 entries, or a page's worth where pages are larger."""
    return max(1024, PAGE_SIZE // 16)


class _Tally:
    """One slot: what was written and what was logged, in this round and over all."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.total_written = DirtyBitmap(memory.num_pages)
        self.total_ring = DirtyBitmap(memory.num_pages)
        self.total_backup = DirtyBitmap(memory.num_pages)
        self.begin()

    def begin(self) -> None:
        """Begin a round."""
        pages = self.memory.num_pages
        self.by_vcpus = DirtyBitmap(pages)
        self.by_kvm = DirtyBitmap(pages)
        self.changed = DirtyBitmap(pages)
        self.ring = DirtyBitmap(pages)
        self.backup = DirtyBitmap(pages)

    def judge(self) -> tuple[int, int]:
        """Return how many pages were missed, and how many logged without reason."""
        self.total_written |= self.by_vcpus | self.by_kvm
        self.total_ring |= self.ring
        self.total_backup |= self.backup
        written = self.by_vcpus | self.by_kvm | self.changed
        missed = written - (self.ring | self.backup)
        extra = (self.ring - self.by_vcpus) | (self.backup - self.by_kvm)
        return missed.count(), extra.count()


class _Its:
    """The part that KVM dirties without a vCPU: an ITS that the guest programs."""

    writer = "KVM_DEV_ARM_ITS_SAVE_TABLES, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES"

    def __init__(self, vm: VM, ram: GuestMemory) -> None:
        self.gic = GicV3(vm)
        self.its = Its(self.gic)
        end = ram.gpa + ram.size_bytes
        self.memory = vm.add_memory(-(-end // FRAME) * FRAME, ITS_BYTES, log_dirty=True)
        self.round = 0

    def init(self, vcpu: VCPU) -> None:
        """Initialise the devices, now that the vCPUs exist."""
        self.gic.init()
        self.its.init()
        self.tables = ItsTables(self.its, self.memory)
        self.tables.enable_lpis(self.gic, vcpu)
        self.before = self.memory.read()

    def stores(self) -> list[tuple[int, int]]:
        """Map another device, with two events, and raise one of them."""
        device = self.round % MAX_DEVICES
        stores = [] if self.round else self.tables.map_collection(0)
        if self.round < MAX_DEVICES:
            stores += self.tables.map_device(device, [0, 1])
            stores += self.tables.interrupt(device, 1)
        self.round += 1
        return stores

    def save(self, tally: _Tally) -> None:
        """Let KVM write the tables, and note which pages it, and the guest, wrote."""
        pending = self.tables.pending_pages()
        self.its.save_tables()
        self.gic.save_pending_tables()
        tally.by_kvm.set_pages(self.tables.saved_pages() | pending)
        after = self.memory.read()
        spans = [slice(at, at + PAGE_SIZE) for at in range(0, len(after), PAGE_SIZE)]
        tally.changed.set_pages(
            [page for page, span in enumerate(spans) if after[span] != self.before[span]]
        )
        self.before = after


class _Demo:
    """One run: the VM, its guest, and what is counted."""

    def __init__(self, kvm: System, vm: VM, ram: GuestMemory, result: DemoResult) -> None:
        self.vm = vm
        self.ram = ram
        self.result = result
        self.its: _Its | None = None
        tallies = [_Tally(ram)]
        if vm.with_bitmap and vm.has_device(DeviceType.ARM_VGIC_ITS):
            self.its = _Its(vm, ram)
            tallies.append(_Tally(self.its.memory))
            result.backup_writer = _Its.writer
        self.tallies = {tally.memory.slot: tally for tally in tallies}
        room = max(ram.num_pages, MIN_STORES)
        self.guest = PageWriter(kvm, vm, num_vcpus=len(result.vcpus), capacity=room)
        if self.its is not None:
            self.its.init(self.guest.vcpus[0])
        self.turn = threading.Lock()  # one thread at a time harvests and resets
        self.cancelled = threading.Event()
        self.suspects = False
        self.before = ram.words()

    def one_round(self, lists: list[array[int]], pool: ThreadPoolExecutor) -> None:
        """Write every list once, let KVM write what it does, collect, and judge."""
        for tally in self.tallies.values():
            tally.begin()
        commands = self.its.stores() if self.its is not None else []
        futures = [pool.submit(self.one_vcpu, i, gpas, commands) for i, gpas in enumerate(lists)]
        try:
            found = [future.result() for future in futures]
        except BaseException:
            self.cancelled.set()
            while wait(futures, timeout=0.01).not_done:
                for vcpu in self.guest.vcpus:
                    vcpu.kick()
            raise
        self.collect(found, commands)
        for tally in self.tallies.values():
            missed, extra = tally.judge()
            self.result.missed += missed
            self.result.extra += extra
        if self.suspects:
            # No vCPU runs: this protects every page of the slots anew.
            for tally in self.tallies.values():
                tally.memory.set_log_dirty(False)
                tally.memory.set_log_dirty(True)
            self.suspects = False

    def one_vcpu(self, index: int, gpas: array[int], commands: list[tuple[int, int]]) -> DirtySet:
        """Run one vCPU through its work; the first one programs the ITS before."""
        dirty = DirtySet(self.vm)
        if commands and index == 0:
            self.guest.store(index, commands)
            self.to_the_end(index, dirty)
        self.guest.load(index, gpas, at=0)
        self.to_the_end(index, dirty)
        return dirty

    def to_the_end(self, index: int, dirty: DirtySet) -> None:
        """Run one vCPU's command, emptying its ring whenever it is full, and at the end."""
        counts = self.result.vcpus[index]
        ring = self.guest.vcpus[index].dirty_ring
        done = False
        while not done and not self.cancelled.is_set():
            exit = self.guest.run(index)
            done = self.guest.is_done(exit)
            counts.ring_full_exits += exit.reason == ExitReason.DIRTY_RING_FULL
            with self.turn:
                begin = time.perf_counter_ns()
                counts.entries += ring.harvest(dirty)
                middle = time.perf_counter_ns()
                reset = self.vm.reset_dirty_rings()
                counts.reset_ns += time.perf_counter_ns() - middle
                counts.harvest_ns += middle - begin
                counts.reset += reset.reset
                self.result.resets += 1
                if reset.suspects:
                    self.result.suspects += reset.suspects.count()
                    self.suspects = True

    def collect(self, found: list[DirtySet], commands: list[tuple[int, int]]) -> None:
        """Gather one round's log, the backup bitmap last, and beside it the truth."""
        result, ram = self.result, self.ram
        own = self.tallies[ram.slot]
        after = ram.words()
        pairs = enumerate(zip(self.before, after, strict=True))
        own.changed.set_pages([page for page, (old, new) in pairs if old != new])
        self.before = after
        for index, dirty in enumerate(found):
            pages = [(gpa - ram.gpa) // PAGE_SIZE for gpa in self.guest.written(index)]
            own.by_vcpus.set_pages(pages)
            values = self.guest.values(index)
            result.wrong_contents += sum(
                after[page] != value for page, value in zip(pages, values, strict=True)
            )
            result.stores += self.guest.progress(index).stores
            result.extra += dirty.strays
            counts = result.vcpus[index].pages
            for slot, tally in self.tallies.items():
                counts[slot] = counts.get(slot, 0) + dirty[slot].count()
                tally.ring |= dirty[slot]
        if self.its is not None:
            tables = self.tallies[self.its.memory.slot]
            first, last = self.its.memory.gpa, self.its.memory.gpa + ITS_BYTES
            queue = [(gpa - first) // PAGE_SIZE for gpa, _ in commands if first <= gpa < last]
            tables.by_vcpus.set_pages(queue)
            self.its.save(tables)
        if self.vm.with_bitmap:
            for slot, tally in self.tallies.items():
                self.vm.get_dirty_log(slot, into=tally.backup)


def _require_room(pages: int) -> None:
    """Refuse a guest that this machine has no memory for, rather than let it swap or be killed."""
    need = pages * (PAGE_SIZE + 64)  # RAM, lists, and the lists' copies here
    have = psutil.virtual_memory().available
    if need > have:
        raise ValueError(
            f"{pages} pages need {need >> 20} MiB, and {have >> 20} MiB are available; "
            f"use at most {have // (PAGE_SIZE + 64)}"
        )


def run(
    kvm: System,
    *,
    pages: int = 16384,
    vcpus: int = 2,
    entries: int | None = None,
    order: str = "sequential",
    rounds: int = 1,
    seed: int = 0,
) -> DemoResult:
    """Do the main job and return what came out.

    Args:
        kvm: The system.
        pages: Pages that the guest writes, divided among the vCPUs.
        vcpus: vCPUs, each in a thread.
        entries: Size of each ring.
        order: One of guests.ORDERS.
        rounds: How often everything is written, logged and compared.
        seed: For order "random".

    Raises:
        ValueError: An argument is out of range, or the machine has no memory for it.
        KvmNotSupported: KVM has no dirty ring here.
    """
    num_vcpus = int_between("vcpus", vcpus, 1, MAX_VCPUS)
    num_pages = int_between("pages", pages, num_vcpus, 1 << 31)
    num_rounds = int_between("rounds", rounds, 1, 1 << 31)
    _require_room(num_pages)
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(default_entries() if entries is None else entries)
        ram = vm.add_memory(RAM_GPA, num_pages * PAGE_SIZE, log_dirty=True)
        result = DemoResult(
            source="ring+bitmap" if vm.with_bitmap else "ring",
            entries_per_ring=vm.ring_entries,
            order=order,
            rounds=num_rounds,
            vcpus=[VcpuResult(vcpu=i) for i in range(num_vcpus)],
        )
        bounds = [num_pages * i // num_vcpus for i in range(num_vcpus + 1)]
        lists = [
            page_order(ram, order=order, first_page=a, num_pages=b - a, seed=seed)
            for a, b in itertools.pairwise(bounds)
        ]
        demo = _Demo(kvm, vm, ram, result)
        begin = time.perf_counter()
        with ThreadPoolExecutor(num_vcpus, thread_name_prefix="vcpu") as pool:
            for _ in range(num_rounds):
                demo.one_round(lists, pool)
        result.seconds = time.perf_counter() - begin
        for tally in demo.tallies.values():
            result.pages_written += tally.total_written.count()
            result.pages_from_ring += tally.total_ring.count()
            result.pages_from_bitmap += tally.total_backup.count()
    return result
