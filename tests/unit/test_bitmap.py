"""DirtyBitmap against a Python set: every operation, at sizes around multiples of 64.

Hypothesis chooses sizes, pages and sequences of operations; the model is a set of page numbers,
and the layout that KVM uses is computed from it with int.to_bytes().
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from array import array
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvmring import DirtyBitmap

if TYPE_CHECKING:
    from collections.abc import Callable

Pages = set[int]

EDGES = [0, 1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 191, 192, 193, 640, 4095, 4096, 4097]
sizes = st.sampled_from(EDGES) | st.integers(0, 700)


def make(size: int, pages: Pages) -> DirtyBitmap:
    bitmap = DirtyBitmap(size)
    for page in pages:
        bitmap.set(page)
    return bitmap


def runs_of(pages: Pages) -> list[tuple[int, int]]:
    starts = sorted(page for page in pages if page - 1 not in pages)
    ends = sorted(page for page in pages if page + 1 not in pages)
    return [(start, end - start + 1) for start, end in zip(starts, ends, strict=True)]


def layout(size: int, pages: Pages) -> bytes:
    """What KVM_GET_DIRTY_LOG writes for these pages."""
    return sum(1 << page for page in pages).to_bytes((size + 63) // 64 * 8, "little")


def agree(bitmap: DirtyBitmap, size: int, pages: Pages) -> None:
    """Look at a bitmap in every way there is."""
    ordered = sorted(pages)
    assert len(bitmap) == bitmap.num_pages == size
    assert bitmap.count() == len(pages)
    assert bool(bitmap) == bool(pages)
    assert list(bitmap) == ordered
    assert list(bitmap.runs()) == runs_of(pages)
    assert bitmap.page_numbers().tolist() == ordered
    assert bytes(memoryview(bitmap)) == layout(size, pages)
    assert bitmap.nbytes == len(layout(size, pages))
    assert all(page in bitmap for page in pages)
    assert repr(bitmap) == f"<DirtyBitmap {len(pages)} of {size} pages>"


@st.composite
def sized(draw: st.DrawFn, count: int = 1) -> tuple[int, list[Pages]]:
    """A size, and sets of pages that fit it."""
    size = draw(sizes)
    if not size:
        return 0, [set() for _ in range(count)]
    page = st.integers(0, size - 1)
    span = st.tuples(page, st.integers(0, 200)).map(
        lambda pair: set(range(pair[0], min(pair[0] + pair[1], size)))
    )
    some = st.sets(page, max_size=60) | span | st.just(set(range(size)))
    return size, [draw(some) for _ in range(count)]


@given(sized())
def test_every_view_agrees_with_the_model(case: tuple[int, list[Pages]]) -> None:
    size, (pages,) = case
    agree(make(size, pages), size, pages)


@given(sized(), st.data())
def test_set_and_clear_ranges(case: tuple[int, list[Pages]], data: st.DataObject) -> None:
    size, (pages,) = case
    bitmap = make(size, pages)
    first = data.draw(st.integers(0, size))
    num = data.draw(st.integers(0, size - first))
    span = set(range(first, first + num))
    bitmap.set(first, num_pages=num)
    agree(bitmap, size, pages | span)
    bitmap.clear(first, num_pages=num)
    agree(bitmap, size, pages - span)
    bitmap.set(0, num_pages=size)
    bitmap.clear(first)
    agree(bitmap, size, set(range(first)))
    bitmap.clear()
    agree(bitmap, size, set())


@given(sized())
def test_set_pages_takes_lists_and_arrays(case: tuple[int, list[Pages]]) -> None:
    size, (pages,) = case
    for given_as in (list(pages), iter(pages), array("Q", pages), memoryview(array("Q", pages))):
        bitmap = DirtyBitmap(size)
        bitmap.set_pages(given_as)
        agree(bitmap, size, pages)
        for bad in ([*pages, size], array("Q", [*pages, size]), array("Q", [(1 << 64) - 1])):
            empty = DirtyBitmap(size)
            with pytest.raises(ValueError, match=f"{size}"):
                empty.set_pages(bad)
            agree(empty, size, set())


@given(sized(2))
def test_operators(case: tuple[int, list[Pages]]) -> None:
    size, (left, right) = case
    a, b = make(size, left), make(size, right)
    agree(a | b, size, left | right)
    agree(a & b, size, left & right)
    agree(a - b, size, left - right)
    agree(a, size, left)
    agree(b, size, right)
    for wanted, function in (
        (left | right, DirtyBitmap.__ior__),
        (left & right, DirtyBitmap.__iand__),
        (left - right, DirtyBitmap.__isub__),
    ):
        target = make(size, left)
        assert function(target, b) is target
        agree(target, size, wanted)
        agree(b, size, right)
    assert (a == b) == (left == right)
    assert (a != b) == (left != right)


@given(sized())
def test_operators_with_itself(case: tuple[int, list[Pages]]) -> None:
    size, (pages,) = case
    bitmap = make(size, pages)
    bitmap |= bitmap
    bitmap &= bitmap
    assert bitmap == bitmap
    agree(bitmap, size, pages)
    bitmap -= bitmap
    agree(bitmap, size, set())


@given(sized())
def test_a_copy_is_its_own(case: tuple[int, list[Pages]]) -> None:
    size, (pages,) = case
    bitmap = make(size, pages)
    twin = bitmap.copy()
    assert twin == bitmap
    bitmap.clear()
    agree(twin, size, pages)


@given(sized(), st.integers(-5, 1000))
def test_in(case: tuple[int, list[Pages]], page: int) -> None:
    size, (pages,) = case
    assert (page in make(size, pages)) == (page in pages)


@settings(stateful_step_count=40, max_examples=50)
class Sequences(RuleBasedStateMachine):
    """Two bitmaps and two sets go through the same operations."""

    @initialize(size=sizes)
    def begin(self, size: int) -> None:
        self.size = size
        self.bitmaps = [DirtyBitmap(size), DirtyBitmap(size)]
        self.models: list[Pages] = [set(), set()]

    @precondition(lambda self: self.size > 0)
    @rule(which=st.integers(0, 1), data=st.data(), value=st.booleans())
    def change(self, which: int, data: st.DataObject, value: bool) -> None:
        first = data.draw(st.integers(0, self.size - 1))
        num = data.draw(st.integers(0, min(self.size - first, 130)))
        if value:
            self.bitmaps[which].set(first, num_pages=num)
            self.models[which] |= set(range(first, first + num))
        else:
            self.bitmaps[which].clear(first, num_pages=num)
            self.models[which] -= set(range(first, first + num))

    @rule(which=st.integers(0, 1), op=st.sampled_from("|&-"))
    def merge(self, which: int, op: str) -> None:
        a, b = which, 1 - which
        if op == "|":
            self.bitmaps[a] |= self.bitmaps[b]
            self.models[a] |= self.models[b]
        elif op == "&":
            self.bitmaps[a] &= self.bitmaps[b]
            self.models[a] &= self.models[b]
        else:
            self.bitmaps[a] -= self.bitmaps[b]
            self.models[a] -= self.models[b]

    @rule(which=st.integers(0, 1))
    def replace(self, which: int) -> None:
        self.bitmaps[which] = self.bitmaps[1 - which].copy()
        self.models[which] = set(self.models[1 - which])

    @invariant()
    def same(self) -> None:
        for bitmap, model in zip(self.bitmaps, self.models, strict=True):
            agree(bitmap, self.size, model)


test_sequences = Sequences.TestCase


def test_more_runs_than_are_fetched_at_once() -> None:
    size = 5000
    for n in (511, 512, 513, 1024, 2500):
        pages = set(range(0, 2 * n, 2))
        agree(make(size, pages), size, pages)


def test_a_large_sparse_bitmap() -> None:
    size = (1 << 31) - 1  # KVM's largest slot
    bitmap = DirtyBitmap(size)
    pages = [0, 1 << 20, size - 1]
    for page in pages:
        bitmap.set(page)
    assert list(bitmap) == pages
    assert size not in bitmap


# The buffer


def test_numpy_sees_the_words() -> None:
    bitmap = make(130, {0, 63, 64, 129})
    words = np.frombuffer(bitmap, "u8")  # type: ignore[call-overload]
    assert words.tolist() == [1 << 63 | 1, 1, 2]
    assert not words.flags.writeable
    bits = np.unpackbits(np.frombuffer(memoryview(bitmap), "u1"), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [0, 63, 64, 129]
    numbers = np.asarray(bitmap.page_numbers())
    assert numbers.dtype == np.uint64
    assert numbers.tolist() == [0, 63, 64, 129]


def test_numpy_integers_are_integers() -> None:
    bitmap = DirtyBitmap(100)
    bitmap.set(np.uint32(7), num_pages=np.int64(2))  # type: ignore[arg-type]
    assert all(page in bitmap for page in np.asarray(bitmap.page_numbers()))
    assert np.uint64(9) not in bitmap


def test_the_view_is_read_only_and_live() -> None:
    bitmap = DirtyBitmap(64)
    view = memoryview(bitmap)
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    bitmap.set(3)
    assert view[0] == 8, "the view shows the bits as they are now"


def test_the_view_keeps_the_bits_alive() -> None:
    views, size = [], 64 * 100
    for i in range(200):
        bitmap = DirtyBitmap(size)
        bitmap.set(i, num_pages=40)
        views.append(memoryview(bitmap))
    del bitmap
    gc.collect()
    others = [make(size, {5000}) for _ in range(200)]  # would reuse the memory, were it free
    for i, view in enumerate(views):
        assert bytes(view) == layout(size, set(range(i, i + 40)))
    assert len(others) == 200


OUTLIVE = """
import gc
from kvmring import DirtyBitmap
bitmap = DirtyBitmap(1 << 12)
bitmap.set(0, num_pages=1 << 12)
views = [memoryview(bitmap), bitmap.page_numbers(), memoryview(memoryview(bitmap))[8:]]
before = [bytes(view) for view in views]
del bitmap
gc.collect()
assert [bytes(view) for view in views] == before
assert set(before[0]) == {255}
print("kept")
"""


def test_views_do_not_read_freed_memory() -> None:
    # glibc overwrites what is freed, so a view of it could not go unnoticed
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OUTLIVE],
        env={**os.environ, "MALLOC_PERTURB_": "165", "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "kept\n", "")


@given(sized(2))
def test_bits_past_the_end_stay_zero(case: tuple[int, list[Pages]]) -> None:
    size, (left, right) = case
    bitmap = DirtyBitmap(size)
    bitmap.set(0, num_pages=size)
    bitmap -= make(size, left)
    bitmap |= make(size, right)
    bitmap.set(0, num_pages=size)
    value = int.from_bytes(memoryview(bitmap), "little")
    assert value == (1 << size) - 1


# Refusals

NOT_INTS = [1.0, "1", None, b"1", [1], object()]
OUT_OF_RANGE = [-1, 101, 1 << 32, 1 << 63, 1 << 64, 1 << 200, -(1 << 64)]


@pytest.mark.parametrize("bad", NOT_INTS)
def test_wrong_types_are_type_errors(bad: int) -> None:
    bitmap = make(100, {5})
    with pytest.raises(TypeError, match="num_pages must be an integer"):
        DirtyBitmap(bad)
    with pytest.raises(TypeError, match="page must be an integer"):
        bitmap.set(bad)
    with pytest.raises(TypeError, match="num_pages must be an integer"):
        bitmap.set(0, num_pages=bad)
    with pytest.raises(TypeError, match="page must be an integer"):
        bitmap.clear(bad)
    with pytest.raises(TypeError, match="page must be an integer"):
        bitmap.set_pages([1, bad])
    assert bad not in bitmap
    agree(bitmap, 100, {5})


@pytest.mark.parametrize("bad", OUT_OF_RANGE)
def test_ranges_that_leave_the_slot_are_value_errors(bad: int) -> None:
    bitmap = make(100, {5})
    uses: list[Callable[[], None]] = [
        lambda: bitmap.set(bad),
        lambda: bitmap.set(0, num_pages=bad),
        lambda: bitmap.set(50, num_pages=51),
        lambda: bitmap.clear(bad),
        lambda: bitmap.clear(0, num_pages=bad),
        lambda: bitmap.set_pages([1, bad]),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"must lie between|not below 100"):
            use()
    assert bad not in bitmap
    agree(bitmap, 100, {5})


@pytest.mark.parametrize("bad", [-1, (1 << 40) + 1, 1 << 64, 1 << 200])
def test_sizes_that_cannot_be(bad: int) -> None:
    with pytest.raises(ValueError, match="num_pages must lie between"):
        DirtyBitmap(bad)


@given(sized(), sizes)
def test_other_sizes_do_not_mix(case: tuple[int, list[Pages]], size: int) -> None:
    own, (pages,) = case
    if size == own:
        size += 1
    bitmap, other = make(own, pages), DirtyBitmap(size)
    for function in (
        DirtyBitmap.__ior__,
        DirtyBitmap.__iand__,
        DirtyBitmap.__isub__,
        DirtyBitmap.__or__,
        DirtyBitmap.__and__,
        DirtyBitmap.__sub__,
    ):
        with pytest.raises(ValueError, match=f"{own} pages here, {size} there"):
            function(bitmap, other)
    assert bitmap != other
    agree(bitmap, own, pages)


@pytest.mark.parametrize("other", [set(), 0, None, b"", [1]])
def test_other_types_do_not_mix(other: DirtyBitmap) -> None:
    bitmap = make(10, {1})
    with pytest.raises(TypeError, match="unsupported operand"):
        bitmap |= other
    with pytest.raises(TypeError, match="unsupported operand"):
        bitmap &= other
    with pytest.raises(TypeError, match="unsupported operand"):
        bitmap -= other
    with pytest.raises(TypeError, match="unsupported operand"):
        bitmap | other
    with pytest.raises(TypeError, match="unsupported operand"):
        bitmap & other
    with pytest.raises(TypeError, match="unsupported operand"):
        bitmap - other
    assert bitmap != other
    agree(bitmap, 10, {1})


def test_a_mutable_thing_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(DirtyBitmap(1))


def test_the_copy_module_shares_no_bits() -> None:
    bitmap = make(10, {1})
    for function in (copy.copy, copy.deepcopy):
        twin = function(bitmap)
        twin.set(2)
        agree(twin, 10, {1, 2})
        agree(bitmap, 10, {1})


def test_a_bitmap_cannot_be_pickled() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(DirtyBitmap(1))


def test_threads_exclude_each_other() -> None:
    size = 64 * 500
    ours, theirs = DirtyBitmap(size), DirtyBitmap(size)

    def work(start: int) -> None:
        for page in range(start, size, 4):
            ours.set(page)  # neighbours share a word
            if page % 400 == start:  # both orders of two locks
                theirs.__ior__(ours)
                ours.__ior__(theirs)

    threads = [threading.Thread(target=work, args=(start,), daemon=True) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ours.count() == size
