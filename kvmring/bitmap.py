"""DirtyBitmap: one bit per page of a slot, in the layout of KVM_GET_DIRTY_LOG.

The bits live in C; every operation is one call there. Objects per page are made only by
iterating. DirtySet (dirtyset.py) is a VM's worth of these.
"""

from __future__ import annotations

import operator
import sys
import threading
from array import array
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvmring.abi import check, ffi, lib, out, owner, uninitialised
from kvmring.errors import int_between

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmring._kvm import Bitmap

if sys.version_info >= (3, 12):

    class Buffer:
        """Classes may define __buffer__ themselves (PEP 688)."""

        __slots__ = ()
else:
    from kvmring._buffer import Buffer

__all__ = ["Buffer", "DirtyBitmap"]

_CHUNK = 512  # pairs or numbers fetched at once while iterating
MAX_PAGES = 1 << 40


class DirtyBitmap(Buffer):
    """The dirty pages of one memory slot.

    len() is the slot's size in pages, count() the number of dirty ones; iteration gives page
    numbers relative to the slot. The buffer protocol gives KVM's own layout, read-only:
    64-bit words, little-endian bits, the length rounded up to whole words
    (`numpy.frombuffer(bitmap, "u8")`).

    Args:
        num_pages: Size of the slot in pages of the running kernel.
        lock: A lock to share with other bitmaps; one of its own without it.

    Threads:
        Operations exclude each other; a long one (count, |=) does not hold the GIL.
    """

    __slots__ = ("__weakref__", "_handle", "lock", "num_pages")
    _handle: Bitmap

    def __init__(self, num_pages: int, *, lock: threading.Lock | None = None) -> None:
        self.num_pages = int_between("num_pages", num_pages, 0, MAX_PAGES)
        self.lock = threading.Lock() if lock is None else lock
        place = out("struct kvr_bitmap *")
        check("bitmap", lib.kvr_bitmap_new(self.num_pages, place))
        self._handle = owner(place, lib.kvr_bitmap_free)

    @property
    def handle(self) -> Bitmap:
        """The C bitmap, for kvmring.ioctls."""
        return self._handle

    @property
    def nbytes(self) -> int:
        """Bytes of the bits: whole 64-bit words."""
        return (self.num_pages + 63) // 64 * 8

    def __buffer__(self, flags: int, /) -> memoryview:
        handle = self._handle
        # The words belong to the bitmap: whoever has the view keeps the bitmap too.
        words = ffi.gc(lib.kvr_bitmap_words(handle), lambda _: handle)
        return memoryview(ffi.buffer(words, self.nbytes)).toreadonly()

    def __len__(self) -> int:
        return self.num_pages

    def __bool__(self) -> bool:
        """Whether any page is dirty."""
        return next(self.runs(), None) is not None

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.count()} of {self.num_pages} pages>"

    def count(self) -> int:
        """Count the dirty pages."""
        with self.lock:
            return lib.kvr_bitmap_count(self._handle)

    def __contains__(self, page: object) -> bool:
        try:
            number = operator.index(page)  # type: ignore[arg-type]
        except TypeError:
            return False
        return number >= 0 and self._test(number)

    def _test(self, page: int) -> bool:
        return page < self.num_pages and bool(lib.kvr_bitmap_test(self._handle, page))

    def __iter__(self) -> Iterator[int]:
        for first, length in self.runs():
            yield from range(first, first + length)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Iterate over runs of dirty pages as (first page, length in pages), ascending.

        Bits that change meanwhile may or may not be seen.
        """
        buf = uninitialised("uint64_t[]", 2 * _CHUNK)
        position = ffi.new("uint64_t *")
        while True:
            with self.lock:
                n = lib.kvr_bitmap_runs(self._handle, position, buf, _CHUNK)
            flat = ffi.unpack(buf, 2 * n)
            yield from zip(flat[::2], flat[1::2], strict=True)
            if n < _CHUNK:
                return

    def page_numbers(self) -> memoryview:
        """Return the dirty pages' numbers, ascending, as a memoryview of unsigned 64-bit ints.

        No Python object is made per page; `.tolist()` makes them, `numpy.asarray` does not.
        """
        return self._numbers(0, 1)

    def _numbers(self, base: int, scale: int) -> memoryview:
        with self.lock:
            n = lib.kvr_bitmap_count(self._handle)
            buf = uninitialised("uint64_t[]", n or 1)
            lib.kvr_bitmap_page_numbers(self._handle, ffi.new("uint64_t *"), base, scale, buf, n)
        return memoryview(ffi.buffer(buf, 8 * n)).cast("B").cast("Q")

    def set(self, page: int, *, num_pages: int = 1) -> None:
        """Mark pages [page, page + num_pages) dirty.

        Raises:
            ValueError: The range leaves the slot.
        """
        self._set_range(page, num_pages, 1)

    def set_pages(self, pages: Iterable[int]) -> None:
        """Mark the pages of a list dirty; an array or a view of unsigned 64-bit ints is quickest.

        Raises:
            ValueError: One of them is not in the slot; none was marked.
        """
        if not (isinstance(pages, array | memoryview) and memoryview(pages).format == "Q"):
            pages = array("Q", (int_between("page", page, 0, MAX_PAGES) for page in pages))
        with self.lock, ffi.from_buffer("uint64_t[]", pages) as numbers:
            if lib.kvr_bitmap_set_pages(self._handle, numbers, len(numbers)) < 0:
                raise ValueError(f"a page is not below {self.num_pages}, the slot's size in pages")

    def clear(self, page: int = 0, *, num_pages: int | None = None) -> None:
        """Mark pages [page, page + num_pages) clean; without num_pages, to the slot's end.

        Raises:
            ValueError: The range leaves the slot.
        """
        first = int_between("page", page, 0, self.num_pages)
        self._set_range(first, self.num_pages - first if num_pages is None else num_pages, 0)

    def _set_range(self, page: int, num_pages: int, value: int) -> None:
        first = int_between("page", page, 0, self.num_pages)
        num = int_between("num_pages", num_pages, 0, self.num_pages - first)
        with self.lock:
            check("bitmap", lib.kvr_bitmap_set_range(self._handle, first, num, value))

    def copy(self) -> DirtyBitmap:
        """Return a bitmap of its own with the same pages dirty."""
        twin = DirtyBitmap(self.num_pages)
        twin._merge(b"=", self)
        return twin

    __copy__ = copy

    def __deepcopy__(self, memo: object) -> DirtyBitmap:
        return self.copy()

    def _merge(self, op: bytes, other: DirtyBitmap) -> None:
        if len(other) != len(self):
            raise ValueError(
                f"bitmaps of different slots: {len(self)} pages here, {len(other)} there"
            )
        with ExitStack() as stack:
            _lock_both(stack, self.lock, other.lock)
            check("bitmap", lib.kvr_bitmap_merge(self._handle, ord(op), other._handle))

    def __ior__(self, other: DirtyBitmap) -> DirtyBitmap:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        self._merge(b"|", other)
        return self

    def __iand__(self, other: DirtyBitmap) -> DirtyBitmap:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        self._merge(b"&", other)
        return self

    def __isub__(self, other: DirtyBitmap) -> DirtyBitmap:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        self._merge(b"-", other)
        return self

    def __or__(self, other: DirtyBitmap) -> DirtyBitmap:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        result = self.copy()
        result |= other
        return result

    def __and__(self, other: DirtyBitmap) -> DirtyBitmap:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        result = self.copy()
        result &= other
        return result

    def __sub__(self, other: DirtyBitmap) -> DirtyBitmap:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        result = self.copy()
        result -= other
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        with ExitStack() as stack:
            _lock_both(stack, self.lock, other.lock)
            return bool(lib.kvr_bitmap_equal(self._handle, other._handle))

    __hash__ = None  # type: ignore[assignment]


def _lock_both(stack: ExitStack, one: threading.Lock, other: threading.Lock) -> None:
    """Take two locks in an order that all agree on; they may be the same."""
    stack.enter_context(min(one, other, key=id))
    if one is not other:
        stack.enter_context(max(one, other, key=id))
