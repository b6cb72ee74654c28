"""What is done with bitmaps, in gigabytes of bitmap per second, beside numpy and bare reading.

Densities are shares of pages that are dirty, spread at random. numpy is used where it is
installed; the bandwidth of memory needs the C.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import deque
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from kvmring.bench.baseline import Memory
from kvmring.bench.measure import alternate, cpu_ns, ratio, summary, timed
from kvmring.bench.report import Column, Group, Table
from kvmring.bench.rigs import available_bytes
from kvmring.bitmap import DirtyBitmap
from kvmring.errors import KvmringError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmring.bench.baseline import Baseline
    from kvmring.bench.measure import Effort
    from kvmring.bench.numbers import Numpy

__all__ = ["measure", "random_bitmap"]

MIB = 1 << 20
SIZES = (1, 8, 64)  # MiB of bitmap: 32 GiB, 256 GiB and 2 TiB of memory, in 4 KiB pages
QUICK_SIZES = (1,)
LARGE = 64  # MiB, from which on every second density will do: numpy takes seconds for each
DENSITIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
QUICK_DENSITIES = (1e-6, 1e-3, 1e-1, 1.0)
MOST_RUNS = 50_000  # of one sample: runs() makes two Python ints and a tuple of each
MOST_NUMBERS = 1 << 27  # which are a gigabyte already
LEAST_READ = 16 * MIB  # of one sample of the bandwidth
CHUNK = 1 << 20
OPERATIONS = ("count", "page numbers", "runs", "union")

_COLUMNS = (
    Column(name="operation", head="operation"),
    Column(name="mib", head="bitmap\nMiB"),
    Column(name="density", head="dirty\nshare"),
    Column(name="gb_s", head="kvmring\nGB/s"),
    Column(name="numpy_gb_s", head="numpy\nGB/s"),
    Column(name="to_numpy", head="kvmring /\nnumpy"),
    Column(name="to_read", head="kvmring /\nreading"),
)
_READ = (
    Column(name="mib", head="memory\nMiB"),
    Column(name="gb_s", head="reading\nGB/s"),
)


def random_bitmap(num_pages: int, density: float, *, seed: int = 1) -> DirtyBitmap:
    """Make a bitmap in which about this share of pages, taken at random, is dirty."""
    bitmap = DirtyBitmap(num_pages)
    if density >= 1:
        bitmap.set(0, num_pages=num_pages)
        return bitmap
    bits = (num_pages - 1).bit_length()
    # Draws may hit a page twice: so many draws leave 1 - density clean.
    draws = max(1, round(-(1 << bits) * math.log1p(-density)))
    source = random.Random(seed)
    while draws > 0:
        n = min(draws, CHUNK)
        draws -= n
        # n random numbers of 64 bits, cut to those that name a page, all at once
        mask = int.from_bytes(((1 << bits) - 1).to_bytes(8, "little") * n, "little")
        drawn = int.from_bytes(source.randbytes(8 * n), "little") & mask
        pages = array("Q", drawn.to_bytes(8 * n, "little"))
        if num_pages != 1 << bits:
            pages = array("Q", (page for page in pages if page < num_pages))
        bitmap.set_pages(pages)
    return bitmap


def measure(
    kvm: object,
    effort: Effort,
    base: Baseline | None,
    *,
    sizes: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
) -> Group:
    """Measure every operation at every size (MiB) and density; KVM has no part in it."""
    table = Table(name="bitmap", title="Operations on bitmaps", columns=_COLUMNS)
    reading = Table(name="reading", title="Reading memory, as fast as it goes", columns=_READ)
    says = ["GB/s: bytes of bitmap, 10^9, per second of CPU time, whatever is found in it."]
    try:
        from kvmring.bench.numbers import Numpy
    except ImportError:
        numpy: type[Numpy] | None = None
        says.append("numpy is not installed: no figures beside these.")
    else:
        numpy = Numpy
        says.append(
            "numpy: flatnonzero(unpackbits(...)) for page numbers, the same and diff() for runs, "
            f"{Numpy.counting} for count, bitwise_or for union; runs as arrays, where kvmring "
            f"makes a tuple of each, of at most {MOST_RUNS} per sample."
        )
    for size in sizes or (QUICK_SIZES if effort.quick else SIZES):
        usual = QUICK_DENSITIES if effort.quick else DENSITIES[:: 2 if size >= LARGE else 1]
        for density in densities or usual:
            _one(effort, base, numpy, size, density, table, reading)
    table.rows.sort(key=lambda row: OPERATIONS.index(str(row[0])))
    return Group(name="bitmap", tables=[table, reading] if base else [table], says=says)


def _one(
    effort: Effort,
    base: Baseline | None,
    numpy: type[Numpy] | None,
    mib: float,
    density: float,
    table: Table,
    reading: Table,
) -> None:
    size_bytes = int(mib * MIB)
    pages = 8 * size_bytes
    bitmap = random_bitmap(pages, density)
    other = random_bitmap(pages, density, seed=2)
    dirty = bitmap.count()
    # numpy makes a byte of each bit, and eight bytes of each that is set
    if pages + 8 * dirty + 4 * size_bytes > available_bytes() // 2:
        numpy = None
    theirs = None if numpy is None else numpy(bitmap, other)
    if theirs is not None and theirs.count() != dirty:
        raise KvmringError(f"numpy counts {theirs.count()} pages, kvmring {dirty}")
    with ExitStack() as stack:
        read: Callable[[], float] | None = None
        if base is not None:
            memory = stack.enter_context(Memory(base, size_bytes))
            times = max(1, LEAST_READ // size_bytes)
            read = partial(_rate, size_bytes * times, partial(memory.read, times))
        for name, ours in _ours(bitmap, other, size_bytes).items():
            if name == "page numbers" and dirty > MOST_NUMBERS:
                table.add(name, mib, density, None, None, None, None)
                continue
            contestants = {"ours": ours}
            if theirs is not None:
                contestants["numpy"] = partial(
                    _rate, size_bytes, partial(timed, theirs.operations[name], clock=cpu_ns)
                )
            if read is not None:
                contestants["read"] = read
            found = alternate(contestants, effort.scaled(0.25))
            table.add(
                name,
                mib,
                density,
                summary(found["ours"]),
                summary(found["numpy"]) if theirs else None,
                ratio(found["ours"], found["numpy"]) if theirs else None,
                ratio(found["ours"], found["read"]) if read else None,
            )
            if read is not None and mib not in [row[0] for row in reading.rows]:
                reading.add(mib, summary(found["read"]))


def _rate(size_bytes: int, call: Callable[[], float]) -> float:
    """Return gigabytes per second of a call that returns its nanoseconds."""
    return size_bytes / call()


def _ours(
    bitmap: DirtyBitmap, other: DirtyBitmap, size_bytes: int
) -> dict[str, Callable[[], float]]:
    target = bitmap.copy()

    def union() -> None:
        nonlocal target
        target |= other

    def runs() -> object:
        return deque(islice(bitmap.runs(), MOST_RUNS), maxlen=1)

    walked = list(islice(bitmap.runs(), MOST_RUNS))
    # when the walk stops early, it has come so far
    covered = sum(walked[-1]) // 8 if len(walked) == MOST_RUNS else size_bytes
    return {
        "count": partial(_rate, size_bytes, partial(timed, bitmap.count, clock=cpu_ns)),
        "page numbers": partial(
            _rate, size_bytes, partial(timed, bitmap.page_numbers, clock=cpu_ns)
        ),
        "runs": partial(_rate, covered, partial(timed, runs, clock=cpu_ns)),
        "union": partial(_rate, size_bytes, partial(timed, union, clock=cpu_ns)),
    }
