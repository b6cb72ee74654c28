"""The same bitmap operations with numpy, for comparison; numpy is installed or this fails."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmring.bitmap import DirtyBitmap

__all__ = ["Numpy"]

_HAS_COUNT = hasattr(np, "bitwise_count")  # numpy 2


class Numpy:
    """Two bitmaps as numpy sees them.

    Attributes:
        operations: By the names of kvmring.bench.bitmap.OPERATIONS.
        counting: How it counts.
    """

    counting = "bitwise_count" if _HAS_COUNT else "unpackbits().sum()"

    def __init__(self, bitmap: DirtyBitmap, other: DirtyBitmap) -> None:
        self._bytes: NDArray[np.uint8] = np.frombuffer(memoryview(bitmap), "u1")
        self._words = self._bytes.view("u8")
        self._other = np.frombuffer(memoryview(other), "u8")
        self._target = self._words.copy()
        self.operations: dict[str, Callable[[], object]] = {
            "count": self.count,
            "page numbers": self.page_numbers,
            "runs": self.runs,
            "union": partial(np.bitwise_or, self._target, self._other, out=self._target),
        }

    def count(self) -> int:
        """Count the bits."""
        if _HAS_COUNT:
            return int(np.bitwise_count(self._words).sum(dtype="u8"))
        return int(np.unpackbits(self._bytes).sum(dtype="u8"))

    def page_numbers(self) -> NDArray[np.intp]:
        """List the bits that are set."""
        return np.flatnonzero(np.unpackbits(self._bytes, bitorder="little"))

    def runs(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """List the first bits of the runs, and those behind them."""
        bits = np.unpackbits(self._bytes, bitorder="little")
        edges = np.flatnonzero(np.diff(bits, prepend=0, append=0))
        return edges[::2], edges[1::2]
