"""KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG without a ring: exact pages, and every rule.

With and without manual protect, down to the tail of a slot that is no multiple of 64 pages.
"""

from __future__ import annotations

import errno
import struct
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, DirtyBitmap, KvmError, System, ioctls
from kvmring.abi import lib
from kvmring.guests import ORDERS

from ..gates import has, needs, needs_kvm
from .rig import PAGE, Rig, assert_exact, assert_usable

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_kvm()
MANUAL = Cap.MANUAL_DIRTY_LOG_PROTECT2
# a slot without, and one with, a tail shorter than a word
SIZES = pytest.mark.parametrize("pages", [1, 63, 64, 100, 256])
PROTECT = pytest.mark.parametrize("manual", [False, pytest.param(True, marks=needs(MANUAL))])


def rig_of(kvm: System, pages: int, *, manual: bool) -> Rig:
    rig = Rig(kvm, pages=pages)
    if manual:
        rig.vm.enable_cap(MANUAL, [1])
    return rig


def refused(number: int, function: Callable[[], object]) -> None:
    with pytest.raises(KvmError) as caught:
        function()
    assert caught.value.errno == number, caught.value


@PROTECT
@SIZES
@pytest.mark.parametrize("order", ORDERS)
def test_exact_pages(kvm: System, pages: int, order: str, manual: bool) -> None:
    """The bitmap is what the guest wrote, round after round, the last page included."""
    with rig_of(kvm, pages, manual=manual) as rig:
        slot = rig.ram.slot
        for num in (pages, pages // 2, 1):
            rig.write(rig.gpas(pages - num, num, order))
            log = rig.vm.get_dirty_log(slot)
            assert len(log) == pages
            assert_exact(range(pages - num, pages), log)
            if manual:
                rig.vm.clear_dirty_log(slot, log)
            assert not rig.vm.get_dirty_log(slot)
            rig.assert_memory()


def test_without_manual_protect_get_takes_the_bits(kvm: System) -> None:
    with rig_of(kvm, 100, manual=False) as rig:
        rig.write(rig.gpas(10, 80))
        assert rig.vm.get_dirty_log(rig.ram.slot).count() == 80
        assert rig.vm.get_dirty_log(rig.ram.slot).count() == 0
        rig.write(rig.gpas(10, 80))
        assert rig.vm.get_dirty_log(rig.ram.slot).count() == 80


@needs(MANUAL)
def test_with_manual_protect_get_leaves_the_bits(kvm: System) -> None:
    """And the pages stay writable: what is written twice shows once."""
    with rig_of(kvm, 100, manual=True) as rig:
        slot = rig.ram.slot
        rig.write(rig.gpas(0, 50))
        for _ in range(2):
            assert_exact(range(50), rig.vm.get_dirty_log(slot))
        rig.write(rig.gpas(40, 20))
        assert_exact(range(60), rig.vm.get_dirty_log(slot))


@needs(MANUAL)
def test_what_was_cleared_is_logged_again(kvm: System) -> None:
    with rig_of(kvm, 256, manual=True) as rig:
        slot = rig.ram.slot
        rig.write(rig.gpas())
        log = rig.vm.get_dirty_log(slot)
        rig.vm.clear_dirty_log(slot, log, first_page=64, num_pages=128)
        assert_exact([*range(64), *range(192, 256)], rig.vm.get_dirty_log(slot))
        rig.write(rig.gpas(100, 3))
        assert_exact([*range(64), 100, 101, 102, *range(192, 256)], rig.vm.get_dirty_log(slot))


@PROTECT
def test_clear_takes_the_bits_that_are_set(kvm: System, manual: bool) -> None:
    """Only those of the bitmap, only in the range; bits that KVM has not set do no harm."""
    with rig_of(kvm, 128, manual=manual) as rig:
        slot = rig.ram.slot
        rig.write(rig.gpas(0, 20))
        some = DirtyBitmap(128)
        some.set(5, num_pages=3)
        some.set(70, num_pages=50)  # nobody wrote there
        rig.vm.clear_dirty_log(slot, some)
        rig.write(rig.gpas(90, 2))
        assert_exact([*range(5), *range(8, 20), 90, 91], rig.vm.get_dirty_log(slot))


@PROTECT
def test_pages_cleared_without_a_get(kvm: System, manual: bool) -> None:
    """CLEAR works in both modes, and the page's next write shows."""
    with rig_of(kvm, 64, manual=manual) as rig:
        slot = rig.ram.slot
        everything = DirtyBitmap(64)
        everything.set(0, num_pages=64)
        rig.write(rig.gpas(0, 8))
        rig.vm.clear_dirty_log(slot, everything)
        assert not rig.vm.get_dirty_log(slot)
        rig.write(rig.gpas(4, 8))
        assert_exact(range(4, 12), rig.vm.get_dirty_log(slot))


@needs(MANUAL)
def test_changing_manual_protect_meanwhile(kvm: System) -> None:
    """KVM looks at it anew at each GET."""
    with rig_of(kvm, 64, manual=True) as rig:
        slot = rig.ram.slot
        rig.write(rig.gpas(0, 9))
        assert rig.vm.get_dirty_log(slot).count() == 9
        rig.vm.enable_cap(MANUAL, [0])
        assert rig.vm.get_dirty_log(slot).count() == 9
        assert rig.vm.get_dirty_log(slot).count() == 0


@needs(MANUAL)
def test_initially_set(kvm: System) -> None:
    """Every page of a new log counts as dirty, and none past the slot's end."""
    if kvm.check_extension(MANUAL) != 3:
        pytest.skip("INITIALLY_SET is not offered")
    with Rig(kvm, pages=100, log_dirty=False) as rig:
        rig.vm.enable_cap(MANUAL, [3])
        rig.ram.set_log_dirty(True)
        log = rig.vm.get_dirty_log(rig.ram.slot)
        assert_exact(range(100), log)
        assert bytes(memoryview(log))[12:] == bytes([0x0F, 0, 0, 0])
        rig.vm.clear_dirty_log(rig.ram.slot, log)
        rig.write(rig.gpas(50, 50))
        assert_exact(range(50, 100), rig.vm.get_dirty_log(rig.ram.slot))


def test_into_a_bitmap_that_was_used(kvm: System) -> None:
    """GET overwrites what was in it; merging is the caller's choice."""
    with rig_of(kvm, 100, manual=False) as rig:
        slot = rig.ram.slot
        log = DirtyBitmap(100)
        log.set(0, num_pages=100)
        rig.write(rig.gpas(7, 3))
        assert rig.vm.get_dirty_log(slot, into=log) is log
        assert_exact(range(7, 10), log)
        total = log.copy()
        rig.write(rig.gpas(97, 3))
        total |= rig.vm.get_dirty_log(slot, into=log)
        assert_exact([7, 8, 9, 97, 98, 99], total)


# Refusals


@PROTECT
def test_a_bitmap_of_another_size(kvm: System, manual: bool) -> None:
    """Refused before KVM hears of it, so no bit is taken."""
    with rig_of(kvm, 100, manual=manual) as rig:
        slot = rig.ram.slot
        rig.write(rig.gpas(0, 30))
        for pages in (0, 64, 99, 101, 128):
            with pytest.raises(ValueError, match="slot 0 has 100 pages"):
                rig.vm.get_dirty_log(slot, into=DirtyBitmap(pages))
            with pytest.raises(ValueError, match="slot 0 has 100 pages"):
                rig.vm.clear_dirty_log(slot, DirtyBitmap(pages))
            with pytest.raises(ValueError, match="not of the slot's size"):
                ioctls.get_dirty_log(rig.vm, slot, DirtyBitmap(pages))
        for bad in (bytearray(16), None, {1, 2}):
            with pytest.raises(TypeError, match="DirtyBitmap"):
                rig.vm.clear_dirty_log(slot, bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="DirtyBitmap"):
            rig.vm.get_dirty_log(slot, into=bytearray(16))  # type: ignore[arg-type]
        assert_exact(range(30), rig.vm.get_dirty_log(slot))


def test_ranges_of_clear(kvm: System) -> None:
    """Alignment and tail are said in words, and nothing is cleared."""
    with rig_of(kvm, 100, manual=False) as rig:
        slot = rig.ram.slot
        rig.write(rig.gpas())
        log = DirtyBitmap(100)
        log.set(0, num_pages=100)
        for first, num in ((3, None), (1, 64), (63, 1), (99, 1)):
            with pytest.raises(ValueError, match="first_page must be a multiple of 64"):
                rig.vm.clear_dirty_log(slot, log, first_page=first, num_pages=num)
        for first, num in ((0, 99), (0, 1), (0, 63), (64, 35)):
            with pytest.raises(ValueError, match="num_pages must be a multiple of 64"):
                rig.vm.clear_dirty_log(slot, log, first_page=first, num_pages=num)
        for first in (-64, 101, 128, 1 << 70):
            with pytest.raises(ValueError, match="first_page must lie between"):
                rig.vm.clear_dirty_log(slot, log, first_page=first)
        for num in (-1, 101, 128, 1 << 70):
            with pytest.raises(ValueError, match="num_pages must lie between"):
                rig.vm.clear_dirty_log(slot, log, num_pages=num)
        with pytest.raises(TypeError, match="first_page must be an integer"):
            rig.vm.clear_dirty_log(slot, log, first_page="x")  # type: ignore[arg-type]
        rig.vm.clear_dirty_log(slot, log, first_page=0, num_pages=0)
        rig.vm.clear_dirty_log(slot, log, first_page=64, num_pages=0)
        assert rig.vm.get_dirty_log(slot).count() == 100
        assert_usable(rig)


@pytest.mark.parametrize(("first", "num"), [(0, 100), (64, 36), (0, 64)])
def test_ranges_that_clear_takes(kvm: System, first: int, num: int) -> None:
    with rig_of(kvm, 100, manual=False) as rig:
        rig.write(rig.gpas())
        log = DirtyBitmap(100)
        log.set(0, num_pages=100)
        rig.vm.clear_dirty_log(rig.ram.slot, log, first_page=first, num_pages=num)
        left = set(range(100)) - set(range(first, first + num))
        assert_exact(left, rig.vm.get_dirty_log(rig.ram.slot))


def test_slots_without_a_log(kvm: System) -> None:
    """ENOENT for a slot that does not log, or is not there; EINVAL past the limits."""
    with Rig(kvm, pages=64, log_dirty=False) as rig:
        vm, bitmap = rig.vm, DirtyBitmap(64)
        refused(errno.ENOENT, lambda: vm.get_dirty_log(rig.ram.slot))
        refused(errno.ENOENT, lambda: vm.clear_dirty_log(rig.ram.slot, bitmap))
        refused(errno.ENOENT, lambda: vm.get_dirty_log(77))
        refused(errno.ENOENT, lambda: vm.clear_dirty_log(77, bitmap))
        most = vm.check_extension(Cap.NR_MEMSLOTS)
        spaces = max(vm.check_extension(Cap.MULTI_ADDRESS_SPACE), 1)
        for slot in (most, 65535, spaces << 16, (1 << 32) - 1):
            refused(errno.EINVAL, partial(vm.get_dirty_log, slot))
            refused(errno.EINVAL, partial(vm.clear_dirty_log, slot, bitmap))
        for slot in (-1, 1 << 32):
            with pytest.raises(ValueError, match="slot must lie between"):
                vm.get_dirty_log(slot)
            with pytest.raises(ValueError, match="slot must lie between"):
                vm.clear_dirty_log(slot, bitmap)
        rig.ram.set_log_dirty(True)
        assert_usable(rig)
        rig.ram.set_log_dirty(False)
        refused(errno.ENOENT, lambda: vm.get_dirty_log(rig.ram.slot))


# The raw level: in which order the kernel looks


def test_the_kernels_order_of_checks(kvm: System) -> None:
    """CLEAR: number, alignment, slot, range. GET: number, slot, pointer."""
    with Rig(kvm, pages=256) as rig:
        vm, slot = rig.vm, rig.ram.slot
        most = vm.check_extension(Cap.NR_MEMSLOTS)
        rig.write(rig.gpas())

        def clear(number: int, first: int, num: int, pages: int = 256) -> int:
            return ioctls.clear_dirty_log(vm, number, DirtyBitmap(pages), first, num)

        refused(errno.EINVAL, lambda: clear(most, 0, 64))
        refused(errno.EINVAL, lambda: clear(77, 3, 64))
        refused(errno.ENOENT, lambda: clear(77, 0, 64))
        for first, num in ((3, 64), (320, 0), (256, 64), (192, 128), (0, 63), (64, 191)):
            refused(errno.EINVAL, partial(clear, slot, first, num))
        for first, num in ((256, 0), (0, 0), (192, 64), (0, 256)):
            assert clear(slot, first, num) == 0
        # a range that the kernel takes, but our bitmap does not hold: it gets no pointer
        refused(errno.EFAULT, lambda: clear(slot, 0, 256, 64))
        assert rig.vm.get_dirty_log(slot).count() == 256


@PROTECT
def test_a_bad_pointer(kvm: System, manual: bool) -> None:
    """Without manual protect GET has taken the bits when it fails: why sizes are checked."""
    with rig_of(kvm, 64, manual=manual) as rig:
        rig.write(rig.gpas(0, 10))
        log = bytearray(struct.pack("=IIQ", rig.ram.slot, 0, PAGE // 2))
        refused(errno.EFAULT, lambda: ioctls.ioctl(rig.vm, lib.KVM_GET_DIRTY_LOG, log))
        left = rig.vm.get_dirty_log(rig.ram.slot)
        assert left.count() == (10 if manual else 0)
        with pytest.raises(ValueError, match="the request moves 16 bytes"):
            ioctls.ioctl(rig.vm, lib.KVM_GET_DIRTY_LOG, bytearray(8))


@needs(Cap.DIRTY_LOG_RING_ACQ_REL)
def test_a_ring_without_bitmap_has_no_log(kvm: System) -> None:
    """ENXIO before anything else is looked at, and a hint that says why."""
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(with_bitmap=False)
        if has(Cap.DIRTY_LOG_RING_WITH_BITMAP):
            assert not vm.with_bitmap
        slot = vm.add_memory(0, 64 * PAGE, log_dirty=True).slot
        for number in (slot, 77, (1 << 32) - 1):
            with pytest.raises(KvmError, match="WITH_BITMAP") as caught:
                vm.get_dirty_log(number)
            assert caught.value.errno == errno.ENXIO
            refused(errno.ENXIO, partial(vm.clear_dirty_log, number, DirtyBitmap(64)))
