"""What the bench compares with: tests/c/baseline.c, compiled when it is needed, and plain ctypes.

The one module that uses ctypes. Baseline is the C; RawRing does a harvest with nothing but
Python and ctypes, as a script without this package would. Both need VMs of their own: a ring
has one harvester.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import tempfile
from ctypes import c_char, c_int, c_long, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Self

import kvmring
from kvmring.abi import PAGE_SIZE
from kvmring.errors import KvmError, KvmringError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmring.system import System
    from kvmring.vm import VM

__all__ = ["Baseline", "CProgram", "Memory", "RawRing", "compile_baseline"]

SOURCE = Path(kvmring.__file__).parents[1] / "tests" / "c" / "baseline.c"
FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC")
COMPILE_S = 60
RING_OFFSET = 64 * PAGE_SIZE  # KVM_DIRTY_LOG_PAGE_OFFSET
RESET_DIRTY_RINGS = 0xAEC7  # _IO(KVMIO, 0xc7)
DIRTY, RESET = 1, 2
READ_WRITE, SHARED = 3, 1  # of mmap(2)

NS = ctypes.POINTER(c_uint64)


class _Cycle(ctypes.Structure):
    _fields_ = (("ns", c_uint64), ("entries", c_uint64), ("resets", c_uint64))


# C's functions: what they return, what they take
_FUNCTIONS = {
    "base_new": (c_void_p, (c_int, c_int, c_uint64)),
    "base_free": (None, (c_void_p,)),
    "base_vcpu": (c_long, (c_void_p, c_int)),
    "base_slot": (c_long, (c_void_p, c_uint32, c_uint64)),
    "base_clean": (c_long, (c_void_p,)),
    "base_harvest": (c_long, (c_void_p, c_uint64, NS)),
    "base_mark": (c_long, (c_void_p, NS)),
    "base_cycle": (c_long, (c_void_p, ctypes.POINTER(_Cycle))),
    "base_run": (c_long, (c_void_p, c_int, c_uint64, NS)),
    "base_reset": (c_long, (c_void_p, c_uint64, NS)),
    "base_get_log": (c_long, (c_void_p, c_uint32, c_uint64, NS)),
    "base_clear_log": (c_long, (c_void_p, c_uint32, c_uint64, NS)),
    "base_memory": (c_void_p, (c_uint64,)),
    "base_forget": (None, (c_void_p, c_uint64)),
    "base_read": (c_uint64, (c_void_p, c_uint64, c_uint64, NS)),
    "base_hypervisor": (c_long, (ctypes.POINTER(c_char),)),
}


def compile_baseline(source: Path = SOURCE) -> tuple[Baseline | None, str]:
    """Compile and load the C.

    Returns:
        It and "", or None and one sentence that says why there is none.
    """
    if not source.is_file():
        return None, "no C beside it: tests/c/baseline.c comes with the source tree only"
    wanted = os.environ.get("CC", "gcc")
    compiler = shutil.which(wanted)
    if compiler is None:
        return None, f"no C beside it: there is no compiler {wanted}"
    with tempfile.TemporaryDirectory(prefix="kvmring-") as folder:
        target = str(Path(folder, "baseline.so"))
        done = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", target],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMPILE_S,
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
            return None, f"no C beside it: {wanted} fails: {why}"
        library = ctypes.CDLL(target)
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False, timeout=COMPILE_S
    )
    return Baseline(library, f"{version.stdout.splitlines()[0]}, {FLAGS[1]}"), ""


class Baseline:
    """The compiled C.

    Attributes:
        compiler: Its name and version, and how it optimised.
    """

    def __init__(self, library: ctypes.CDLL, compiler: str) -> None:
        self.functions = library
        self.compiler = compiler
        for name, (result, arguments) in _FUNCTIONS.items():
            function = library[name]
            function.restype = result
            function.argtypes = arguments
            setattr(library, name, function)

    def hypervisor(self) -> str | None:
        """Return what the hypervisor under this kernel calls itself; None where none says so."""
        name = ctypes.create_string_buffer(12)
        if not self.functions.base_hypervisor(name):
            return None
        return name.raw.rstrip(b"\0").decode("ascii", "replace")


class CProgram:
    """The C at work on a VM that kvmring made, and harvests itself no more.

    Close it before the VM: it holds mappings of the vCPUs.

    Args:
        base: The C.
        kvm: The system.
        vm: The VM, with its slots and vCPUs.
    """

    def __init__(self, base: Baseline, kvm: System, vm: VM) -> None:
        self._lib = base.functions
        self._ns = c_uint64()
        self._it: int | None = self._lib.base_new(kvm.fileno(), vm.fileno(), vm.ring_entries)
        if not self._it:
            raise MemoryError("the C program has no memory")
        try:
            for vcpu in vm.vcpus:
                self._check(self._lib.base_vcpu(self._it, vcpu.fileno()), "mmap")
            for slot in vm.slots.values():
                if slot.log_dirty:
                    self._check(self._lib.base_slot(self._it, slot.slot, slot.num_pages), "malloc")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap everything."""
        self._lib.base_free(self._it)
        self._it = None

    @staticmethod
    def _check(result: int, ioctl: str) -> int:
        if result < 0:
            raise KvmError(-result, ioctl, "in the C program of the bench")
        return result

    def clean(self) -> int:
        """Make every page clean, and count those that were dirty."""
        return int(self._lib.base_clean(self._it))

    def harvest(self, times: int = 1) -> tuple[int, float]:
        """Harvest every ring, one entry at a time; returns entries and nanoseconds."""
        n = int(self._lib.base_harvest(self._it, times, self._ns))
        return n, float(self._ns.value)

    def mark(self) -> tuple[int, float]:
        """Mark the first vCPU's entries and do nothing else with them."""
        n = int(self._lib.base_mark(self._it, self._ns))
        return n, float(self._ns.value)

    def cycle(self) -> tuple[int, float]:
        """Run the first vCPU to its doorbell, harvesting and resetting; entries, nanoseconds."""
        count = _Cycle()
        while True:
            result = int(self._lib.base_cycle(self._it, ctypes.byref(count)))
            if result != -errno.EINTR:  # then Python has looked after the signal
                self._check(result, "KVM_RUN")
                return int(count.entries), float(count.ns)

    def run(self, times: int = 1, *, immediate: bool = False) -> float:
        """Call KVM_RUN; returns nanoseconds."""
        self._check(self._lib.base_run(self._it, immediate, times, self._ns), "KVM_RUN")
        return float(self._ns.value)

    def reset(self, times: int = 1) -> tuple[int, float]:
        """Call KVM_RESET_DIRTY_RINGS; returns entries and nanoseconds."""
        n = self._lib.base_reset(self._it, times, self._ns)
        return self._check(n, "KVM_RESET_DIRTY_RINGS"), float(self._ns.value)

    def get_dirty_log(self, slot: int, times: int = 1) -> float:
        """Call KVM_GET_DIRTY_LOG; returns nanoseconds."""
        result = self._lib.base_get_log(self._it, slot, times, self._ns)
        self._check(result, "KVM_GET_DIRTY_LOG")
        return float(self._ns.value)

    def clear_dirty_log(self, slot: int, times: int = 1) -> float:
        """Call KVM_CLEAR_DIRTY_LOG with what get_dirty_log() left; returns nanoseconds."""
        result = self._lib.base_clear_log(self._it, slot, times, self._ns)
        self._check(result, "KVM_CLEAR_DIRTY_LOG")
        return float(self._ns.value)


class Memory:
    """Memory that is read for the bandwidth's sake."""

    def __init__(self, base: Baseline, size_bytes: int) -> None:
        self._lib = base.functions
        self._ns = c_uint64()
        self.size_bytes = size_bytes
        self._words: int | None = self._lib.base_memory(size_bytes)
        if not self._words:
            raise MemoryError(f"no {size_bytes} bytes for the bandwidth of memory")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.base_forget(self._words, self.size_bytes)
        self._words = None

    def read(self, times: int = 1) -> float:
        """Read all of it; returns nanoseconds."""
        self._lib.base_read(self._words, self.size_bytes, times, self._ns)
        return float(self._ns.value)


class _Gfn(ctypes.Structure):
    _fields_ = (("flags", c_uint32), ("slot", c_uint32), ("offset", c_uint64))


class RawRing:
    """A dirty ring in Python and ctypes alone, to show what that costs.

    Python has no acquire and no release. It may be used while the vCPU stands still; a
    collector made so would be wrong.

    Args:
        vm: A VM with one vCPU.
        num_pages: Size of its slot in pages.
    """

    def __init__(self, vm: VM, num_pages: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = c_void_p
        self._libc.mmap.argtypes = (c_void_p, ctypes.c_size_t, c_int, c_int, c_int, c_long)
        self._libc.munmap.argtypes = (c_void_p, ctypes.c_size_t)
        self._vm = vm
        self._bytes = 16 * vm.ring_entries
        fd = vm.vcpus[0].fileno()
        at = self._libc.mmap(None, self._bytes, READ_WRITE, SHARED, fd, RING_OFFSET)
        if at in (None, c_void_p(-1).value):
            raise KvmError(ctypes.get_errno(), "mmap", "in the ctypes program of the bench")
        self._at = int(at)
        self._ring = (_Gfn * vm.ring_entries).from_address(self._at)
        self._fetch = 0
        self.bitmap = bytearray((num_pages + 7) // 8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._libc.munmap(self._at, self._bytes)

    def harvest(self) -> int:
        """Harvest the ring into the bitmap; returns entries."""
        ring, bitmap, fetch = self._ring, self.bitmap, self._fetch
        mask = len(ring) - 1
        begin = fetch
        while True:
            entry = ring[fetch & mask]
            if entry.flags != DIRTY:
                break
            page = entry.offset
            bitmap[page >> 3] |= 1 << (page & 7)
            entry.flags = RESET
            fetch += 1
        self._fetch = fetch
        return fetch - begin

    def pages(self) -> Iterator[int]:
        """Iterate over the pages that are set."""
        return (
            8 * at + i for at, byte in enumerate(self.bitmap) for i in range(8) if byte >> i & 1
        )

    def reset(self) -> int:
        """Call KVM_RESET_DIRTY_RINGS; returns entries."""
        n = int(self._libc.ioctl(self._vm.fileno(), ctypes.c_ulong(RESET_DIRTY_RINGS), 0))
        if n < 0:
            raise KvmringError(f"KVM_RESET_DIRTY_RINGS: errno {ctypes.get_errno()}")
        return n
