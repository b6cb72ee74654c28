"""Orders in which a guest writes pages: lists of guest-physical addresses, made from a seed."""

from __future__ import annotations

import random
from array import array
from typing import TYPE_CHECKING

from kvmring.abi import PAGE_SIZE
from kvmring.errors import int_between

if TYPE_CHECKING:
    from kvmring.memory import GuestMemory

__all__ = ["ORDERS", "page_order"]

ORDERS = ("sequential", "random", "strided")


def page_order(
    memory: GuestMemory,
    *,
    order: str = "sequential",
    first_page: int = 0,
    num_pages: int | None = None,
    stride: int = 2,
    seed: int = 0,
) -> array[int]:
    """List pages of a slot, each once, in an order; as guest-physical byte addresses.

    Args:
        memory: The slot.
        order: "sequential", "random" (a shuffle that the seed decides) or "strided": every
            stride-th page, then those after them, until all were listed.
        first_page: The first page of the range, in the slot.
        num_pages: Pages in the range; to the slot's end without it.
        stride: Distance in pages, for "strided".
        seed: For "random".
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    first = int_between("first_page", first_page, 0, memory.num_pages)
    rest = memory.num_pages - first
    number = rest if num_pages is None else int_between("num_pages", num_pages, 0, rest)
    start = memory.gpa + first * PAGE_SIZE
    end = start + number * PAGE_SIZE
    if order == "strided":
        step = int_between("stride", stride, 1, 1 << 31)
        gpas: array[int] = array("Q")
        for lane in range(min(step, number)):
            gpas.extend(array("Q", range(start + lane * PAGE_SIZE, end, step * PAGE_SIZE)))
        return gpas
    gpas = array("Q", range(start, end, PAGE_SIZE))
    if order == "random":
        random.Random(seed).shuffle(gpas)
    return gpas
