"""PageWriter: the guest that writes a list of pages, on one or more vCPUs, and counts.

Each vCPU has a list and stores 1, 2, 3, ... into its pages: at every moment the counter tells
which pages were written and what stands in them. csrc/guest_*.S is its code.
"""

from __future__ import annotations

import platform
import struct
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmring.abi import PAGE_SIZE, Exit, ExitReason, guest_code
from kvmring.errors import GuestError, KvmNotSupported, StateError, int_between
from kvmring.guests import arm64, x86_64

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmring.system import System
    from kvmring.vcpu import VCPU
    from kvmring.vm import VM

__all__ = ["PageWriter", "Progress"]

ALIGN = 2 << 20
DEFAULT_GPA = 1 << 30  # of the control slot in a VM without memory
_BLOCK = struct.Struct("=9Q")  # struct kvr_guest_block
_STOP, _STORES = 24, 40
U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a vCPU is.

    Attributes:
        stores: Stores of the present command that are done for certain. While the vCPU is
            inside a command, one more may be: the store and its counting are two steps.
        rounds: Whole rounds of the list.
        done: The command is done, and so the count exact.
    """

    stores: int
    rounds: int
    done: bool


@dataclass(slots=True)
class _Cpu:
    vcpu: VCPU
    block: int  # offset in the control slot
    list: int
    values: int
    gpas: array[int] = field(default_factory=lambda: array("Q"))
    before: int = 0  # stores of earlier commands
    idle: bool = True  # at the doorbell, or not started
    fresh: bool = True  # registers not set yet


class PageWriter:
    """A guest whose vCPUs write given pages.

    It adds one memory slot of its own, without dirty logging, behind the VM's last one, and
    leaves the addresses just below it free as a doorbell. Enable rings before it is made, and
    add the memory that it shall write.

    Args:
        kvm: The system that the VM comes from.
        vm: The VM; it gets num_vcpus new vCPUs.
        num_vcpus: How many.
        capacity: Most pages in one vCPU's list; as many as the VM has without it.

    Threads: each vCPU's methods may be called from a thread of its own.
    """

    def __init__(
        self, kvm: System, vm: VM, *, num_vcpus: int = 1, capacity: int | None = None
    ) -> None:
        number = int_between("num_vcpus", num_vcpus, 1, 4096)
        if not vm.slots:
            raise StateError("add the memory that the guest shall write before the guest")
        have = sum(slot.num_pages for slot in vm.slots.values())
        room = have if capacity is None else int_between("capacity", capacity, 1, 1 << 31)
        top = max(slot.end for slot in vm.slots.values())
        self._vm = vm
        self._doorbell = -(-top // ALIGN) * ALIGN
        base = self._doorbell + ALIGN
        self._arm = platform.machine() == "aarch64"
        if not self._arm and platform.machine() != "x86_64":
            raise KvmNotSupported(f"a built-in guest for {platform.machine()}")
        blocks = PAGE_SIZE
        tables_at = blocks + number * PAGE_SIZE
        # the tables map the control slot too, whose size depends on them: leave it room
        list_bytes = -(-8 * room // PAGE_SIZE) * PAGE_SIZE
        lists = 2 * number * list_bytes  # addresses, and values
        self._top = base + lists + (64 << 20) + number * PAGE_SIZE
        tables = 0 if self._arm else -(-x86_64.table_bytes(self._top) // PAGE_SIZE) * PAGE_SIZE
        lists_at = tables_at + tables
        size = lists_at + lists
        if base + size > self._top and not self._arm:
            raise ValueError("the VM's addresses are too high for the built-in guest")
        self._capacity = room
        self._ram = vm.add_memory(base, size)
        self._code = base
        self._cr3 = base + tables_at
        self._ram.write(0, guest_code())
        if not self._arm:
            self._ram.write(tables_at, x86_64.tables(self._cr3, self._top))
        self._cpus = [
            _Cpu(
                vm.create_vcpu(),
                blocks + i * PAGE_SIZE,
                lists_at + 2 * i * list_bytes,
                lists_at + (2 * i + 1) * list_bytes,
            )
            for i in range(number)
        ]
        if not self._arm:
            cpuid = kvm.get_supported_cpuid()
            for cpu in self._cpus:
                x86_64.prepare(cpu.vcpu, cpuid)
        for i in range(number):
            self.reset(i)

    def __len__(self) -> int:
        return len(self._cpus)

    def __repr__(self) -> str:
        return f"<PageWriter {len(self)} vCPUs>"

    @property
    def vcpus(self) -> tuple[VCPU, ...]:
        """Its vCPUs, by index."""
        return tuple(cpu.vcpu for cpu in self._cpus)

    def _cpu(self, index: int) -> _Cpu:
        return self._cpus[int_between("index", index, 0, len(self._cpus) - 1)]

    def reset(self, index: int) -> None:
        """Bring a vCPU back to its beginning, as after GuestError; load() comes next."""
        cpu = self._cpu(index)
        if not cpu.fresh:
            # an MMIO that is still pending would move the new program counter on (arm64)
            cpu.vcpu.kick()
            cpu.vcpu.run()
        if self._arm:
            arm64.reset(cpu.vcpu, self._vm.arm_preferred_target())
        else:
            x86_64.reset(cpu.vcpu, cr3=self._cr3)
        cpu.fresh = True

    def load(
        self, index: int, gpas: Sequence[int], *, rounds: int = 1, at: int | None = None
    ) -> None:
        """Give a vCPU its next command; run() executes it. The vCPU must not be running.

        Args:
            index: Which vCPU.
            gpas: Addresses of pages in the VM's memory, in the order of writing.
            rounds: How often to write the list; 0 until stop().
            at: Byte offset of the stores within each page, a multiple of 8; by default 8 times
                the index, so that vCPUs do not write over each other.

        Raises:
            ValueError: An address without memory, or too many of them.
        """
        cpu = self._cpu(index)
        # after a page's worth of vCPUs they share words; the pages are what counts
        default = 8 * index % PAGE_SIZE
        offset = default if at is None else int_between("at", at, 0, PAGE_SIZE - 8)
        if offset % 8:
            raise ValueError(f"at must be a multiple of 8, not {offset}")
        try:
            pages = gpas if isinstance(gpas, array) else array("Q", gpas)
        except OverflowError:
            raise ValueError("an address in the list is negative, or has over 64 bits") from None
        self._check_list(pages)
        number = int_between("rounds", rounds, 0, U64)
        if not pages and not number:
            raise ValueError("an empty list cannot be written for ever")
        self._command(cpu, pages, None, number, offset)

    def store(self, index: int, stores: Sequence[tuple[int, int]]) -> None:
        """Give a vCPU single stores as its next command: 64-bit values at any addresses.

        Addresses may be those of devices. written(), values() and the like speak of load()
        only.

        Args:
            index: Which vCPU.
            stores: Pairs of guest-physical byte address, a multiple of 8, and value.

        Raises:
            ValueError: An address is not aligned, a value does not fit, or too many of them.
        """
        cpu = self._cpu(index)
        gpas = array("Q", (int_between("address", gpa, 0, U64) for gpa, _ in stores))
        values = array("Q", (int_between("value", value, 0, U64) for _, value in stores))
        if any(gpa % 8 for gpa in gpas):
            raise ValueError("addresses must be multiples of 8")
        self._require_room(gpas)
        self._command(cpu, gpas, values, 1, 0)

    def _command(
        self, cpu: _Cpu, gpas: array[int], values: array[int] | None, rounds: int, at: int
    ) -> None:
        cpu.gpas = array("Q", gpas)
        self._ram.write(cpu.list, cpu.gpas.tobytes())
        if values is not None:
            self._ram.write(cpu.values, values.tobytes())
        total = self._word(cpu, _STORES)
        base = self._ram.gpa
        block = _BLOCK.pack(
            base + cpu.list,
            len(gpas),
            rounds,
            0,
            at,
            total,
            0,
            self._doorbell,
            0 if values is None else base + cpu.values,
        )
        self._ram.write(cpu.block, block)
        cpu.before = total
        if cpu.fresh or not cpu.idle:
            start = arm64.start if self._arm else x86_64.start
            start(cpu.vcpu, code=self._code, block=base + cpu.block)
            cpu.fresh = False
        cpu.idle = False

    def _require_room(self, gpas: array[int]) -> None:
        if len(gpas) > self._capacity:
            raise ValueError(f"the list has {len(gpas)} addresses; capacity is {self._capacity}")

    def _check_list(self, pages: array[int]) -> None:
        self._require_room(pages)
        spans = [(slot.gpa, slot.end) for slot in self._vm.slots.values()]
        low, high = max(spans, key=lambda span: span[1] - span[0])
        for gpa in pages:
            if gpa % PAGE_SIZE:
                raise ValueError(f"{gpa:#x} is not the address of a page")
            if not low <= gpa < high and not any(a <= gpa < b for a, b in spans):
                raise ValueError(f"the VM has no memory at {gpa:#x}")

    def run(self, index: int) -> Exit:
        """Run a vCPU until its command is done, its ring is full, or it was interrupted.

        Returns:
            The Exit: DIRTY_RING_FULL, INTR, or the doorbell's MMIO (see is_done()).

        Raises:
            GuestError: Any other exit. reset() makes the vCPU usable again.
        """
        cpu = self._cpu(index)
        if cpu.fresh:
            raise StateError("load() gives the vCPU something to do before run()")
        exit = cpu.vcpu.run()
        if self.is_done(exit):
            cpu.idle = True
        elif exit.reason not in (ExitReason.DIRTY_RING_FULL, ExitReason.INTR):
            raise GuestError(f"vCPU {cpu.vcpu.id} of the built-in guest ended with {exit}", exit)
        return exit

    def is_done(self, exit: Exit) -> bool:
        """Tell whether an Exit is the doorbell's: the command is done."""
        return exit.reason == ExitReason.MMIO and exit.phys_addr == self._doorbell

    def stop(self, index: int) -> None:
        """Tell a vCPU to end its command after the store it is at. From any thread."""
        self._ram.write(self._cpu(index).block + _STOP, (1).to_bytes(8, "little"))

    def _word(self, cpu: _Cpu, offset: int) -> int:
        return self._ram.words(cpu.block + offset, stride=8, count=1)[0]

    def progress(self, index: int) -> Progress:
        """Tell how far a vCPU is with its command."""
        cpu = self._cpu(index)
        stores = self._word(cpu, _STORES) - cpu.before
        rounds = stores // len(cpu.gpas) if cpu.gpas else 0
        return Progress(stores=stores, rounds=rounds, done=cpu.idle)

    def written(self, index: int) -> array[int]:
        """Return the pages that the present command has written for certain, in list order."""
        cpu = self._cpu(index)
        return cpu.gpas[: min(self.progress(index).stores, len(cpu.gpas))]

    def in_flight(self, index: int) -> int | None:
        """Return the one page that may have been written beyond written(); None when done."""
        cpu = self._cpu(index)
        progress = self.progress(index)
        if progress.done or not cpu.gpas:
            return None
        return cpu.gpas[progress.stores % len(cpu.gpas)]

    def values(self, index: int) -> array[int]:
        """Return what the present command left in each page of its list; 0: nothing yet."""
        cpu = self._cpu(index)
        n = len(cpu.gpas)
        if not n:
            return array("Q")
        rounds, rest = divmod(self.progress(index).stores, n)
        this_round = cpu.before + rounds * n + 1
        result = array("Q", range(this_round, this_round + rest))
        if rounds:
            result.extend(range(this_round + rest - n, this_round))
        else:
            result.extend([0] * (n - rest))
        return result
