"""KVM_SET_USER_MEMORY_REGION by the raw level: the kernel's own rules, and their errnos.

The package refuses most of this in words first. What the raw level is refused must leave no
trace: the table that keeps RAM mapped and knows the size of each slot's log has to agree with
the kernel after every error.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, DirtyBitmap, KvmError, MemorySlot, System, ioctls
from kvmring.abi import MemFlag

from ..gates import has, needs_kvm
from .rig import PAGE, Rig, assert_exact, assert_usable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmring import VM, GuestMemory

    Region = Callable[[VM, int, int, int, int, GuestMemory, int], int]

pytestmark = needs_kvm()
FAR = 1 << 30
LOG, READONLY = int(MemFlag.LOG_DIRTY_PAGES), int(MemFlag.READONLY)
REGION = [ioctls.set_user_memory_region, ioctls.set_user_memory_region2]


def check(function: Callable[[], int], number: int) -> None:
    with pytest.raises(KvmError) as caught:
        function()
    assert caught.value.errno == number, caught.value


@pytest.fixture(params=REGION, ids=["region", "region2"])
def region(request: pytest.FixtureRequest) -> Region:
    """Each of the two ioctls."""
    if request.param is REGION[1] and not has(Cap.USER_MEMORY2):
        pytest.skip("this host's KVM lacks USER_MEMORY2")
    function: Region = request.param
    return function


def test_new_slots(kvm: System, region: Region) -> None:
    with Rig(kvm, pages=64) as rig:
        vm, ram = rig.vm, rig.ram
        slots = vm.check_extension(Cap.NR_MEMSLOTS)
        spaces = max(vm.check_extension(Cap.MULTI_ADDRESS_SPACE), 1)
        bad = {
            "unknown flag": (9, 1 << 31, FAR, PAGE, 0, errno.EINVAL),
            "unaligned address": (9, 0, FAR + 1, PAGE, 0, errno.EINVAL),
            "unaligned size": (9, 0, FAR, PAGE + 8, 0, errno.EINVAL),
            "unaligned memory": (9, 0, FAR, PAGE, 8, errno.EINVAL),
            "wraps round": (9, 0, (1 << 64) - PAGE, 2 * PAGE, 0, errno.EINVAL),
            "slot number": (slots, 0, FAR, PAGE, 0, errno.EINVAL),
            "address space": (spaces << 16, 0, FAR, PAGE, 0, errno.EINVAL),
            "overlaps": (9, 0, 63 * PAGE, PAGE, 0, errno.EEXIST),
            "deletes nothing": (9, 0, 0, 0, 0, errno.EINVAL),
            # ours: it would let the guest write behind the memory
            "past the memory": (9, 0, FAR, 2 * PAGE, 63 * PAGE, errno.EFAULT),
            "behind the memory": (9, 0, FAR, PAGE, 1 << 63, errno.EFAULT),
        }
        for what, (slot, flags, gpa, size, offset, number) in bad.items():
            with pytest.raises(KvmError) as caught:
                region(vm, slot, flags, gpa, size, ram, offset)
            assert caught.value.errno == number, what
        assert_usable(rig)
        assert region(vm, 9, LOG, FAR, 63 * PAGE, ram, PAGE) == 0
        assert region(vm, 9, 0, 0, 0, ram, 0) == 0


def test_changes(kvm: System, region: Region) -> None:
    """Size, backing and READONLY of a slot stay; flags and address may change."""
    with Rig(kvm, pages=64) as rig:
        vm, ram = rig.vm, rig.ram
        other = vm.add_memory(FAR, 64 * PAGE)
        assert region(vm, 9, LOG, 2 * FAR, 32 * PAGE, ram, 0) == 0
        same = (vm, 9, LOG, 2 * FAR, 32 * PAGE, ram, 0)
        assert region(*same) == 0
        check(lambda: region(vm, 9, LOG, 2 * FAR, 16 * PAGE, ram, 0), errno.EINVAL)
        check(lambda: region(vm, 9, LOG, 2 * FAR, 64 * PAGE, ram, 0), errno.EINVAL)
        check(lambda: region(vm, 9, LOG, 2 * FAR, 32 * PAGE, ram, PAGE), errno.EINVAL)
        check(lambda: region(vm, 9, LOG, 2 * FAR, 32 * PAGE, other, 0), errno.EINVAL)
        if has(Cap.READONLY_MEM):
            flags = LOG | READONLY
            check(lambda: region(vm, 9, flags, 2 * FAR, 32 * PAGE, ram, 0), errno.EINVAL)
        assert region(vm, 9, LOG, 3 * FAR, 32 * PAGE, ram, 0) == 0
        assert region(vm, 9, 0, 3 * FAR, 32 * PAGE, ram, 0) == 0
        assert region(*same) == 0
        assert region(vm, 9, 0, 0, 0, ram, 0) == 0
        check(lambda: region(vm, 9, 0, 0, 0, ram, 0), errno.EINVAL)
        assert_usable(rig)


def test_a_slot_made_by_the_raw_level_is_known(kvm: System, region: Region) -> None:
    """Its size is the kernel's, so that a bitmap of another is refused before it is written."""
    with Rig(kvm, pages=64) as rig:
        raw = rig.vm.add_memory(FAR, 200 * PAGE)
        assert region(rig.vm, 9, LOG, 2 * FAR, 200 * PAGE, raw, 0) == 0
        for pages in (0, 64, 199, 256):
            with pytest.raises(ValueError, match="not of the slot's size"):
                ioctls.get_dirty_log(rig.vm, 9, DirtyBitmap(pages))
        bitmap = DirtyBitmap(200)
        bitmap.set(0, num_pages=200)
        assert ioctls.get_dirty_log(rig.vm, 9, bitmap) == 0
        assert bitmap.count() == 0
        assert region(rig.vm, 9, 0, 0, 0, raw, 0) == 0


def test_memory_lives_as_long_as_its_slot(kvm: System, region: Region) -> None:
    """Closing the handle of the RAM leaves the guest its memory."""
    with Rig(kvm, pages=64) as rig:
        raw = rig.vm.add_memory(FAR, 8 * PAGE)
        assert region(rig.vm, 9, LOG, 64 * PAGE, 8 * PAGE, raw, 0) == 0
        raw.remove()
        raw.close()
        # the page writer goes by the package's table of slots: tell it
        rig.vm._table.slots[9] = MemorySlot(slot=9, gpa=64 * PAGE, num_pages=8, log_dirty=True)
        rig.write([66 * PAGE])
        assert_exact([2], rig.vm.get_dirty_log(9))
