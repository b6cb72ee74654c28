"""DirtySet over slots that come, go and move: what it holds per slot and in guest-physical terms.

A set asks its VM for nothing but the slots, so plain data stands in for the VM here; filling a
set from a ring is in test_ring.py. The model is a set of guest-physical page numbers.
"""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmring import DirtyBitmap, DirtyGfns, DirtySet, MemorySlot, StateError, page_size

from .synthetic import Geometry, SyntheticRing, one_slot

PAGE = page_size()


def slot(number: int, page: int, num_pages: int) -> MemorySlot:
    return MemorySlot(slot=number, gpa=page * PAGE, num_pages=num_pages)


def agree(dirty: DirtySet, pages: set[int]) -> None:
    """Compare every guest-physical view of a set with page numbers."""
    ordered = sorted(pages)
    assert dirty.count() == len(pages)
    assert bool(dirty) == bool(pages)
    assert dirty.gpas().tolist() == [page * PAGE for page in ordered]
    runs = list(dirty.runs())
    assert [g for gpa, n in runs for g in range(gpa, gpa + n, PAGE)] == [p * PAGE for p in ordered]
    ends = [gpa + n for gpa, n in runs]
    starts = [gpa for gpa, _ in runs]
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False)), "runs joined"
    assert all(dirty.has_gpa(page * PAGE) for page in pages)
    assert all(dirty.has_gpa(page * PAGE + PAGE - 1) for page in pages)
    assert repr(dirty) == f"<DirtySet {len(pages)} pages in {len(dirty)} slots>"


class Case:
    """Slots, dirty pages of each, and what that is in guest-physical pages."""

    def __init__(self, slots: list[MemorySlot], pages: dict[int, set[int]]) -> None:
        self.vm = Geometry(*slots)
        self.pages = pages
        self.truth = {
            lies.gpa // PAGE + page for lies in slots for page in pages.get(lies.slot, ())
        }

    def fill(self) -> DirtySet:
        dirty = DirtySet(self.vm)
        for number, pages in self.pages.items():
            for page in pages:
                dirty[number].set(page)
        return dirty


@st.composite
def cases(draw: st.DrawFn, overlap: bool = True) -> Case:
    """Make up to five slots in two address spaces, which may show the same addresses."""
    slots: list[MemorySlot] = []
    ends = {0: 0, 1: 0}
    for number in range(draw(st.integers(0, 5))):
        as_id = draw(st.integers(0, 1)) if overlap else 0
        page = ends[as_id] + draw(st.integers(0, 3))
        size = draw(st.sampled_from([1, 3, 63, 64, 65, 130]))
        ends[as_id] = page + size
        slots.append(slot(as_id << 16 | number, page, size))
    draw(st.randoms()).shuffle(slots)  # numbers need not ascend with addresses
    pages = {
        lies.slot: draw(st.sets(st.integers(0, lies.num_pages - 1), max_size=30)) for lies in slots
    }
    return Case(slots, pages)


@given(cases())
def test_all_views_agree(case: Case) -> None:
    dirty = case.fill()
    agree(dirty, case.truth)
    assert list(dirty) == sorted(case.pages)
    assert {number: set(bits) for number, bits in dirty.items()} == case.pages
    assert all(dirty.slot_of(number) == case.vm.slots[number] for number in dirty)


@given(cases(overlap=False))
def test_has_gpa_knows_the_edges(case: Case) -> None:
    dirty = case.fill()
    for page in range(max((s.end // PAGE for s in case.vm.slots.values()), default=0) + 3):
        assert dirty.has_gpa(page * PAGE) == (page in case.truth)
    assert not dirty.has_gpa(-1)
    assert not dirty.has_gpa(1 << 70)


@given(cases(), st.data())
def test_union_copy_and_clear(case: Case, data: st.DataObject) -> None:
    one = case.fill()
    other = Case(list(case.vm.slots.values()), {})
    for lies in case.vm.slots.values():
        page = data.draw(st.integers(0, lies.num_pages - 1))
        other.pages[lies.slot] = {page}
        other.truth.add(lies.gpa // PAGE + page)
    two = other.fill()
    twin = one.copy()
    assert twin == one
    before = one
    one |= two
    assert one is before
    agree(one, case.truth | other.truth)
    agree(two, other.truth)
    agree(twin, case.truth)
    assert (one == twin) == (other.truth <= case.truth)
    one |= one
    agree(one, case.truth | other.truth)
    one.clear()
    agree(one, set())
    agree(twin, case.truth)


def test_a_page_that_two_address_spaces_show_counts_once() -> None:
    vm = Geometry(slot(0, 100, 10), slot(1 << 16, 105, 10))
    dirty = DirtySet(vm)
    dirty[0].set(5, num_pages=3)
    dirty[1 << 16].set(1, num_pages=4)
    agree(dirty, {105, 106, 107, 108, 109})
    assert list(dirty.runs()) == [(105 * PAGE, 5 * PAGE)]
    assert (dirty[0].count(), dirty[1 << 16].count()) == (3, 4)


def test_equality_is_about_guest_physical_memory() -> None:
    one, other = DirtySet(Geometry(slot(0, 0, 64))), DirtySet(Geometry(slot(7, 32, 64)))
    assert one == other
    one[0].set(40)
    assert one != other
    other[7].set(8)
    assert one == other
    assert one != {0: one[0]}
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_a_vm_without_slots() -> None:
    dirty = DirtySet(Geometry())
    agree(dirty, set())
    assert len(dirty) == 0
    assert 0 not in dirty
    with pytest.raises(KeyError):
        dirty[0]


def test_slots_that_are_added_later_are_taken_in() -> None:
    vm = Geometry(slot(0, 0, 8))
    dirty = DirtySet(vm)
    dirty[0].set(1)
    vm.put(slot(5, 100, 8))
    dirty[5].set(2)
    agree(dirty, {1, 102})
    vm.put(slot(6, 200, 8))
    with SyntheticRing() as ring:
        ring.push(1, first=3, slot=6)
        ring.ring.harvest(dirty)
    agree(dirty, {1, 102, 203})
    assert dirty.strays == 0


def test_union_with_itself_takes_in_new_slots() -> None:
    vm = Geometry(slot(0, 0, 8))
    dirty = DirtySet(vm)
    dirty[0].set(1)
    vm.put(slot(1, 100, 8))
    dirty |= dirty
    agree(dirty, {1})


def test_a_deleted_slots_pages_stay_until_clear() -> None:
    vm = Geometry(slot(0, 0, 8), slot(1, 100, 8))
    dirty = DirtySet(vm)
    dirty[0].set(1)
    dirty[1].set(2)
    vm.delete(1)
    agree(dirty, {1, 102})
    vm.put(slot(2, 200, 8))
    dirty[2].set(0)
    agree(dirty, {1, 102, 200})
    fresh = DirtySet(vm)
    fresh |= dirty  # knows slot 1 no longer; the pages come all the same
    agree(fresh, {1, 102, 200})
    dirty.clear()
    agree(dirty, set())
    assert sorted(dirty) == [0, 2]


def test_a_moved_slot_must_not_reinterpret_its_pages() -> None:
    vm = Geometry(slot(0, 0, 8), slot(1, 100, 8))
    dirty = DirtySet(vm)
    dirty[0].set(3)
    vm.put(slot(0, 50, 8))
    with SyntheticRing() as ring:
        ring.push(1, first=1)
        with pytest.raises(StateError, match=r"slot 0 was moved or made anew.*clear\(\)"):
            ring.ring.harvest(dirty)
        assert ring.ring.fill() == 1, "nothing was taken"
        agree(dirty, {3})
        agree(dirty.copy(), {3})
        dirty.clear()
        ring.ring.harvest(dirty)
    agree(dirty, {51})


def test_a_clean_slot_may_move_or_change_its_size() -> None:
    vm = Geometry(slot(0, 0, 8), slot(1, 100, 8))
    dirty = DirtySet(vm)
    dirty[1].set(1)
    vm.put(slot(0, 50, 99))
    with SyntheticRing() as ring:
        ring.push(1, first=98)
        ring.ring.harvest(dirty)
    agree(dirty, {101, 148})


def test_a_slot_that_moves_back_is_the_old_one() -> None:
    vm = Geometry(slot(0, 0, 8), slot(1, 100, 8))
    dirty = DirtySet(vm)
    dirty[1].set(1)
    vm.put(slot(0, 50, 9))  # clean: replaced, before the next one is refused
    vm.put(slot(1, 200, 8))
    with SyntheticRing() as ring:
        ring.push(1, first=8)
        for _ in range(2):
            with pytest.raises(StateError, match="slot 1"):
                ring.ring.harvest(dirty)
        vm.put(slot(1, 100, 8))
        ring.ring.harvest(dirty)
    agree(dirty, {58, 101})


def test_sets_of_other_slots_do_not_mix() -> None:
    one, other = DirtySet(Geometry(slot(0, 0, 8))), DirtySet(Geometry(slot(0, 4, 8)))
    one[0].set(1)
    other[0].set(1)
    with pytest.raises(ValueError, match="slot 0 lies elsewhere"):
        one |= other
    agree(one, {1})


def test_a_union_brings_slots_that_only_the_other_has() -> None:
    one, other = DirtySet(Geometry(slot(0, 0, 8))), DirtySet(Geometry(slot(1, 10, 8)))
    other[1].set(7)
    one |= other
    agree(one, {17})
    other.clear()
    agree(one, {17})


def test_a_union_adds_up_strays() -> None:
    one, other = one_slot(8), one_slot(8)
    with SyntheticRing() as ring:
        for target, strays in ((one, 2), (other, 3)):
            ring.push(strays, slot=9)
            ring.ring.harvest(target)
    one |= other
    assert (one.strays, other.strays) == (5, 3)
    one |= one
    assert one.strays == 5
    one.clear()
    assert one.strays == 0


def test_add_merges_one_slots_bitmap() -> None:
    dirty = one_slot(100)
    bitmap = DirtyBitmap(100)
    bitmap.set(40, num_pages=2)
    dirty[0].set(1)
    dirty.add(0, bitmap)
    agree(dirty, {1, 40, 41})
    with pytest.raises(ValueError, match="100 pages here, 99 there"):
        dirty.add(0, DirtyBitmap(99))
    with pytest.raises(KeyError):
        dirty.add(1, bitmap)
    for bad in (None, {1}, b"\xff"):
        with pytest.raises(TypeError):
            dirty.add(0, bad)  # type: ignore[arg-type]
    agree(dirty, {1, 40, 41})


@pytest.mark.parametrize("bad", [None, {}, set(), 1])
def test_union_with_other_types_is_a_type_error(bad: DirtySet) -> None:
    dirty = one_slot(8)
    with pytest.raises(TypeError, match="unsupported operand"):
        dirty |= bad


def test_it_is_a_mapping_that_cannot_be_assigned_to() -> None:
    dirty = one_slot(8)
    with pytest.raises(TypeError):
        dirty[0] = DirtyBitmap(8)  # type: ignore[index]
    assert dirty.get(3) is None
    assert [len(bits) for bits in dirty.values()] == [8]


def test_bitmaps_of_a_set_share_its_lock_and_still_merge() -> None:
    vm = Geometry(slot(0, 0, 64), slot(1, 100, 64))
    dirty = DirtySet(vm)
    dirty[0].set(5)
    bitmap = dirty[1]
    bitmap |= dirty[0]  # one lock, taken once
    assert list(bitmap) == [5]
    agree(dirty, {5, 105})


def test_copies_share_no_pages_and_pickling_is_refused() -> None:
    dirty = one_slot(8)
    dirty[0].set(1)
    for function in (copy.copy, copy.deepcopy):
        twin = function(dirty)
        twin[0].set(2)
        agree(twin, {1, 2})
    agree(dirty, {1})
    for thing in (dirty, DirtyGfns(capacity=1)):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
    with pytest.raises(TypeError):
        copy.copy(DirtyGfns(capacity=1))


def test_large_addresses_survive() -> None:
    page = (1 << 52) // PAGE - 8
    dirty = DirtySet(Geometry(slot(0, page, 8)))
    dirty[0].set(7)
    agree(dirty, {page + 7})
