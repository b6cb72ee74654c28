"""The main job, end to end: a guest dirties pages it knows, the log must name exactly those.

Each vCPU runs in a thread of its own; whenever its ring is full, that thread harvests it,
resets and goes on. After each round the pages logged are compared with those that the guest
wrote, and with what changed in memory. kvmring/guests holds the guest.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from kvmring.abi import PAGE_SIZE, ExitReason
from kvmring.bitmap import DirtyBitmap
from kvmring.caps import JsonValue, host_facts
from kvmring.dirtyset import DirtySet
from kvmring.errors import int_between
from kvmring.guests import PageWriter, page_order

if TYPE_CHECKING:
    from array import array

    from kvmring.memory import GuestMemory
    from kvmring.system import System
    from kvmring.vm import VM

__all__ = ["DemoResult", "VcpuResult", "default_entries", "run"]

SCHEMA = 1
RAM_GPA = 1 << 30
MAX_VCPUS = 64


@dataclass(slots=True, kw_only=True)
class VcpuResult:
    """One vCPU's part: counts over all rounds, times in nanoseconds."""

    vcpu: int
    slot: int
    pages: int = 0
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
        pages_written: Distinct pages that the guest wrote.
        pages_from_ring: Distinct pages that the rings named.
        pages_from_bitmap: Distinct pages that the backup bitmap named.
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
                "slot": v.slot,
                "pages": v.pages,
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


class _Demo:
    """One run: the VM, its guest, and what is counted."""

    def __init__(self, kvm: System, vm: VM, ram: GuestMemory, result: DemoResult) -> None:
        self.vm = vm
        self.ram = ram
        self.result = result
        self.guest = PageWriter(kvm, vm, num_vcpus=len(result.vcpus), capacity=ram.num_pages)
        self.turn = threading.Lock()  # one thread at a time harvests and resets
        self.cancelled = threading.Event()
        self.suspects = False
        self.before = ram.words()
        # over all rounds
        self.all_written = DirtyBitmap(ram.num_pages)
        self.all_ring = DirtyBitmap(ram.num_pages)
        self.all_backup = DirtyBitmap(ram.num_pages)

    def one_round(self, lists: list[array[int]], pool: ThreadPoolExecutor) -> None:
        """Write every list once, and judge."""
        for index, gpas in enumerate(lists):
            self.guest.load(index, gpas, at=0)
        futures = [pool.submit(self.one_vcpu, index) for index in range(len(lists))]
        try:
            found = [future.result() for future in futures]
        except BaseException:
            self.cancelled.set()
            while wait(futures, timeout=0.01).not_done:
                for vcpu in self.guest.vcpus:
                    vcpu.kick()
            raise
        self.judge(found)
        if self.suspects:
            # No vCPU runs: this protects every page of the slot anew.
            self.ram.set_log_dirty(False)
            self.ram.set_log_dirty(True)
            self.suspects = False

    def one_vcpu(self, index: int) -> DirtySet:
        """Run one vCPU to the end of its list, emptying its ring whenever it is full."""
        counts = self.result.vcpus[index]
        ring = self.guest.vcpus[index].dirty_ring
        dirty = DirtySet(self.vm)
        while not self.cancelled.is_set():
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
            if done:
                break
        return dirty

    def judge(self, found: list[DirtySet]) -> None:
        """Compare one round's log with what was written, and with memory."""
        result, ram, slot = self.result, self.ram, self.ram.slot
        written = DirtyBitmap(ram.num_pages)
        logged = DirtyBitmap(ram.num_pages)
        after = ram.words()
        changed = DirtyBitmap(ram.num_pages)
        pairs = enumerate(zip(self.before, after, strict=True))
        changed.set_pages([page for page, (old, new) in pairs if old != new])
        for index, dirty in enumerate(found):
            pages = [(gpa - ram.gpa) // PAGE_SIZE for gpa in self.guest.written(index)]
            written.set_pages(pages)
            values = self.guest.values(index)
            result.wrong_contents += sum(
                after[page] != value for page, value in zip(pages, values, strict=True)
            )
            result.stores += self.guest.progress(index).stores
            result.vcpus[index].pages += dirty[slot].count()
            result.extra += dirty.strays
            logged |= dirty[slot]
        self.all_ring |= logged
        if self.vm.with_bitmap:
            backup = self.vm.get_dirty_log(slot)
            self.all_backup |= backup
            logged |= backup
        self.all_written |= written
        result.missed += ((written | changed) - logged).count()
        result.extra += (logged - written).count()
        self.before = after


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
            vcpus=[VcpuResult(vcpu=i, slot=ram.slot) for i in range(num_vcpus)],
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
        result.pages_written = demo.all_written.count()
        result.pages_from_ring = demo.all_ring.count()
        result.pages_from_bitmap = demo.all_backup.count()
    return result
