"""What the built-in guests are made of: x86-64 page tables, and the orders of pages.

The tables are walked here as a processor walks them, at addresses where they begin, end and
cross a table's border. page_order() is compared with what its words promise.
"""

from __future__ import annotations

import struct
from array import array
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmring import GuestMemory, page_size
from kvmring.guests import ORDERS, page_order, x86_64

PAGE = page_size()
GIB = 1 << 30
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE = 1, 2, 4, 0x20, 0x40, 0x80
ADDRESS = ((1 << 52) - 1) & ~0xFFF


class NotMapped(Exception):
    """The walk met an entry that is not present."""


def walk(tables: bytes, base: int, address: int) -> tuple[int, list[int]]:
    """Translate a virtual address as the processor does; return it and the entries met."""
    table, met = base, []
    for shift in (39, 30, 21):
        at = table - base + (address >> shift) % 512 * 8
        (entry,) = struct.unpack_from("<Q", tables, at)
        if not entry & PRESENT:
            raise NotMapped
        met.append(entry)
        table = entry & ADDRESS
    return table & ~((2 << 20) - 1) | address % (2 << 20), met


TOPS = [1, 2 << 20, GIB - 1, GIB, GIB + 1, 5 * GIB, 512 * GIB, 513 * GIB]


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("base", [0x1000, 0x4000_0000, 0x12_3456_7000])
def test_every_address_is_mapped_to_itself(top: int, base: int) -> None:
    tables = x86_64.tables(base, top)
    assert len(tables) == x86_64.table_bytes(top)
    assert len(tables) % 4096 == 0
    probes = {0, top - 1, top // 2, top // 3}
    probes |= {edge for n in range(1, 5) for edge in (n * (2 << 20), n * GIB, n * GIB - 1)}
    for address in probes:
        if 0 <= address < top:
            assert walk(tables, base, address)[0] == address


@pytest.mark.parametrize("top", TOPS)
def test_nothing_far_above_is_mapped(top: int) -> None:
    tables = x86_64.tables(0x1000, top)
    for address in (-(-top // GIB) * GIB, (1 << 47) - 1):
        if address < 1 << 47:
            with pytest.raises(NotMapped):
                walk(tables, 0x1000, address)


def test_all_entries_are_accessible_and_need_no_write_by_the_processor() -> None:
    tables = x86_64.tables(0x1000, 3 * GIB)
    for address in range(0, 3 * GIB, 2 << 20):
        _, met = walk(tables, 0x1000, address)
        for entry in met:
            assert entry & (PRESENT | WRITABLE | USER | ACCESSED) == 0x27
        assert [bool(entry & LARGE) for entry in met] == [False, False, True]
        assert met[-1] & DIRTY
        assert not any(entry >> 63 for entry in met), "executable"


def test_the_walk_sees_a_broken_table() -> None:
    tables = bytearray(x86_64.tables(0x1000, 2 * GIB))
    tables[8192 + 4096 : 8192 + 4104] = bytes(8)
    assert walk(bytes(tables), 0x1000, GIB - 1)[0] == GIB - 1
    with pytest.raises(NotMapped):
        walk(bytes(tables), 0x1000, GIB)


# page_order


def memory(num_pages: int, gpa: int = 0) -> GuestMemory:
    """A slot as far as page_order looks at it: where it lies, and its size."""
    return cast("GuestMemory", SimpleNamespace(num_pages=num_pages, gpa=gpa))


@given(
    st.sampled_from(ORDERS),
    st.integers(0, 300),
    st.integers(0, 1 << 30),
    st.integers(0, 1 << 64),
    st.data(),
)
def test_orders_are_permutations(
    order: str, size: int, page: int, seed: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, size))
    num = data.draw(st.none() | st.integers(0, size - first))
    count = size - first if num is None else num
    stride = data.draw(st.integers(1, max(count, 1)))
    gpas = page_order(
        memory(size, page * PAGE),
        order=order,
        first_page=first,
        num_pages=num,
        stride=stride,
        seed=seed,
    )
    assert isinstance(gpas, array)
    assert gpas.typecode == "Q"
    assert sorted(gpas) == [(page + first + i) * PAGE for i in range(count)]


def test_sequential_ascends() -> None:
    assert list(page_order(memory(4, 8 * PAGE))) == [8 * PAGE, 9 * PAGE, 10 * PAGE, 11 * PAGE]


def test_strided_goes_lane_by_lane() -> None:
    gpas = page_order(memory(7), order="strided", stride=3)
    assert [gpa // PAGE for gpa in gpas] == [0, 3, 6, 1, 4, 2, 5]


def test_random_is_reproducible_and_a_seeds_own() -> None:
    def shuffle(seed: int) -> list[int]:
        return list(page_order(memory(1000), order="random", seed=seed))

    assert shuffle(1) == shuffle(1)
    assert shuffle(1) != shuffle(2)
    assert shuffle(0) != sorted(shuffle(0))


def test_a_seed_means_the_same_order_on_every_version() -> None:
    # what a failing run prints must be repeatable elsewhere
    gpas = page_order(memory(8), order="random", seed=42)
    assert [gpa // PAGE for gpa in gpas] == [3, 4, 6, 7, 2, 5, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"order": "zigzag"}, ValueError, "sequential, random, strided"),
        ({"first_page": 11}, ValueError, "first_page"),
        ({"first_page": -1}, ValueError, "first_page"),
        ({"first_page": 5, "num_pages": 6}, ValueError, "num_pages"),
        ({"num_pages": -1}, ValueError, "num_pages"),
        ({"num_pages": 1.5}, TypeError, "num_pages"),
        ({"order": "strided", "stride": 0}, ValueError, "stride"),
        ({"order": "strided", "stride": 1 << 64}, ValueError, "stride"),
        ({"order": "strided", "stride": "2"}, TypeError, "stride"),
    ],
)
def test_refusals(arguments: dict[str, int], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        page_order(memory(10), **arguments)  # type: ignore[arg-type]
