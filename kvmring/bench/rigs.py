"""The VMs that are measured: memory, a ring or a log, and a guest that writes pages for ever."""

from __future__ import annotations

import random
from array import array
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from kvmring.abi import PAGE_SIZE, Cap, ExitReason
from kvmring.bench.baseline import CProgram
from kvmring.errors import KvmError, KvmNotSupported, KvmringError
from kvmring.guests import PageWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmring.bench.baseline import Baseline
    from kvmring.memory import GuestMemory
    from kvmring.system import System
    from kvmring.vm import VM

__all__ = [
    "Rig",
    "available_bytes",
    "fitting",
    "rig",
    "ring_sizes",
    "sparse_bytes",
    "spread_pages",
    "touched_bytes",
]

RAM_GPA = 1 << 30
SPARSE_BYTES = 1 << 30
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = 512 * PAGE_SIZE


class Rig:
    """A VM with logged memory and a guest on each vCPU.

    Attributes:
        c: The C program at work on the VM, where one was asked for; then kvmring's own
            harvests must not be used.
    """

    def __init__(self, vm: VM, ram: GuestMemory, guest: PageWriter, c: CProgram | None) -> None:
        self.vm = vm
        self.ram = ram
        self.guest = guest
        self.c = c

    def gpas(self, pages: Sequence[int]) -> array[int]:
        """Return the addresses of pages of the logged memory."""
        return array("Q", (self.ram.gpa + page * PAGE_SIZE for page in pages))

    def fill(self, index: int = 0) -> None:
        """Run a vCPU until its ring is full."""
        exit = self.guest.run(index)
        while exit.reason == ExitReason.INTR:
            exit = self.guest.run(index)
        if exit.reason != ExitReason.DIRTY_RING_FULL:
            raise KvmringError(f"the guest was to fill its ring and ended with {exit}")

    def finish(self, index: int = 0) -> None:
        """Run a vCPU to the end of its command, without rings."""
        while not self.guest.is_done(exit := self.guest.run(index)):
            if exit.reason == ExitReason.DIRTY_RING_FULL:
                raise KvmringError("the guest's ring is full where it was to have room")


@contextmanager
def rig(
    kvm: System,
    *,
    size_bytes: int,
    entries: int = 0,
    vcpus: int = 1,
    capacity: int = 1,
    manual: int = 0,
    base: Baseline | None = None,
) -> Iterator[Rig]:
    """Make a VM.

    Args:
        kvm: The system.
        size_bytes: Of its logged memory.
        entries: Size of each ring; 0: a dirty log instead.
        vcpus: How many, each with a guest.
        capacity: Most pages in a guest's list.
        manual: The argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
        base: The C, to be put to work on the VM.
    """
    with ExitStack() as stack:
        vm = stack.enter_context(kvm.create_vm())
        if entries:
            vm.enable_dirty_ring(entries)
        if manual:
            vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, [manual])
        ram = vm.add_memory(RAM_GPA, size_bytes, log_dirty=True)
        guest = PageWriter(kvm, vm, num_vcpus=vcpus, capacity=capacity)
        c = None if base is None else stack.enter_context(CProgram(base, kvm, vm))
        yield Rig(vm, ram, guest, c)


def ring_sizes(kvm: System, wanted: Sequence[int]) -> list[int]:
    """Return those of the ring sizes that this host takes.

    Raises:
        KvmNotSupported: It has no rings.
    """
    taken = []
    for entries in wanted:
        with kvm.create_vm() as vm:
            try:
                vm.enable_dirty_ring(entries)
            except (KvmNotSupported, ValueError):
                continue
            except KvmError:  # fewer than the hardware's own buffers need
                continue
            taken.append(entries)
    if not taken:
        raise KvmNotSupported("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    return taken


def available_bytes() -> int:
    """Return the bytes of memory that can be had without swapping."""
    return psutil.virtual_memory().available


def sparse_bytes() -> int:
    """Return the size of a guest whose pages are written at random: 1 GiB, or less.

    Three of them fit into this machine's memory even when large pages back all of them.
    """
    size = SPARSE_BYTES
    while size > psutil.virtual_memory().total // 6:
        size //= 2
    return size


def fitting(sizes: Sequence[int]) -> tuple[list[int], list[str]]:
    """Return the ring sizes that such a guest can fill, and what is to be said of the others."""
    fit = [entries for entries in sizes if entries * PAGE_SIZE <= sparse_bytes()]
    left = [str(entries) for entries in sizes if entries not in fit]
    says = [f"Rings of {', '.join(left)} entries: left out, too little memory to fill them."]
    return fit, says if left else []


def touched_bytes(pages: int, size_bytes: int) -> int:
    """Return the most memory that writing so many pages of a slot may take."""
    try:
        large = "[always]" in LARGE_PAGES.read_text()
    except OSError:
        large = False
    return min(size_bytes, pages * (LARGE if large else PAGE_SIZE))


def spread_pages(total: int, count: int, *, order: str, seed: int = 1) -> list[int]:
    """List `count` pages of `total`: the first ones in a row, or any in a random order."""
    if order == "sequential":
        return list(range(count))
    return random.Random(seed).sample(range(total), count)
