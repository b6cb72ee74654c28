"""Memory slots: what may be made, changed and removed, and what logging does meanwhile."""

from __future__ import annotations

import pytest

from kvmring import Cap, DirtySet, ExitReason, GuestError, KvmError, StateError, System

from ..gates import has, needs, needs_kvm
from .rig import PAGE, Rig, RingFacts, assert_exact, assert_usable, logged

pytestmark = needs_kvm()
FAR = 1 << 30


MODES = pytest.mark.parametrize(
    "ring", [pytest.param(True, marks=needs(Cap.DIRTY_LOG_RING_ACQ_REL)), False]
)


def rig_of(kvm: System, facts: RingFacts, ring: bool, pages: int) -> Rig:
    return Rig(kvm, pages=pages, entries=facts.smallest if ring else 0)


@MODES
def test_both_structs(kvm: System, facts: RingFacts, ring: bool) -> None:
    """A slot made by the second ioctl logs like one made by the first."""
    versions = [False, True] if has(Cap.USER_MEMORY2) else [False]
    with rig_of(kvm, facts, ring, 16) as rig:
        for number, region2 in enumerate(versions):
            gpa = 16 * PAGE * (number + 1)
            ram = rig.vm.add_memory(gpa, 16 * PAGE, log_dirty=True, region2=region2)
            gpas = [gpa + page * PAGE for page in (0, 5, 15)]
            rig.write(gpas)
            assert_exact(gpas, logged(rig))
            assert (ram.gpa, ram.num_pages, ram.log_dirty) == (gpa, 16, True)


@needs(Cap.USER_MEMORY2)
def test_the_second_struct_is_offered(kvm: System) -> None:
    with kvm.create_vm() as vm:
        ram = vm.add_memory(0, PAGE, region2=True)
        assert list(vm.slots) == [ram.slot]


def test_the_second_struct_where_it_is_missing(kvm: System) -> None:
    if has(Cap.USER_MEMORY2):
        pytest.skip("this host's KVM has USER_MEMORY2")
    with kvm.create_vm() as vm:
        with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION2"):
            vm.add_memory(0, PAGE, region2=True)
        assert not vm.slots
        vm.add_memory(0, PAGE)


@MODES
def test_logging_off_and_on(kvm: System, facts: RingFacts, ring: bool) -> None:
    """Off, nothing is logged; on again, also pages that the guest had mapped writable."""
    with rig_of(kvm, facts, ring, 64) as rig:
        for _ in range(3):
            rig.write(rig.gpas())
            assert_exact(rig.gpas(), logged(rig))
            rig.ram.set_log_dirty(False)
            assert not rig.ram.log_dirty
            rig.write(rig.gpas(0, 32))
            assert logged(rig) == []
            rig.ram.set_log_dirty(True)
            rig.ram.set_log_dirty(True)
            rig.write(rig.gpas(16, 32))
            assert_exact(rig.gpas(16, 32), logged(rig))


@MODES
def test_a_slot_that_does_not_log_beside_one_that_does(
    kvm: System, facts: RingFacts, ring: bool
) -> None:
    with rig_of(kvm, facts, ring, 16) as rig:
        silent = rig.vm.add_memory(16 * PAGE, 16 * PAGE)
        rig.write([*rig.gpas(0, 4), silent.gpa, silent.gpa + PAGE])
        assert_exact(rig.gpas(0, 4), logged(rig))


def test_a_move_keeps_the_log(kvm: System) -> None:
    """Bits count from the slot's start, and go with it to another address."""
    with Rig(kvm, pages=64) as rig:
        top = rig.vm.add_memory(64 * PAGE, 16 * PAGE, log_dirty=True)
        rig.write([top.gpa + page * PAGE for page in (3, 9)])
        there = 96 * PAGE  # below the guest's own slot, also with 16 KiB pages
        version = rig.vm.slots_version
        top.move(there)
        assert top.gpa == there == rig.vm.slots[top.slot].gpa
        assert rig.vm.slots_version > version
        rig.write([there + 15 * PAGE])
        assert_exact([3, 9, 15], rig.vm.get_dirty_log(top.slot))
        with pytest.raises(KvmError, match="EEXIST"):
            top.move(rig.ram.gpa)
        with pytest.raises(KvmError, match="EINVAL"):
            top.move(there + 1)
        for gpa in (-1, 1 << 60):
            with pytest.raises(ValueError, match="gpa"):
                top.move(gpa)
        assert top.gpa == there
        rig.write([there])
        assert_exact([0], rig.vm.get_dirty_log(top.slot))


@needs(Cap.READONLY_MEM)
def test_a_write_to_readonly_memory_is_mmio(kvm: System) -> None:
    """The guest's write exits, the memory keeps what it has, and nothing is logged."""
    with Rig(kvm, pages=16) as rig:
        rom = rig.vm.add_memory(16 * PAGE, 4 * PAGE, readonly=True, log_dirty=True)
        assert rom.readonly
        rom.write(0, b"rom")
        rig.guest.load(0, [rom.gpa + 2 * PAGE])
        with pytest.raises(GuestError, match="MMIO") as caught:
            rig.guest.run(0)
        exit = caught.value.exit
        assert (exit.reason, exit.phys_addr) == (ExitReason.MMIO, rom.gpa + 2 * PAGE)
        assert exit.is_write
        assert exit.data == (1).to_bytes(8, "little")
        assert rom.read(0, 3) == b"rom"
        assert rom.words()[2] == 0
        assert not rig.vm.get_dirty_log(rom.slot)
        rig.guest.reset(0)
        assert_usable(rig)


@MODES
def test_removed_memory(kvm: System, facts: RingFacts, ring: bool) -> None:
    """The guest finds nothing there; the host still reads it; the number is free again."""
    with rig_of(kvm, facts, ring, 16) as rig:
        extra = rig.vm.add_memory(16 * PAGE, 4 * PAGE, log_dirty=True)
        rig.write([extra.gpa])
        assert_exact([extra.gpa], logged(rig))
        rig.guest.load(0, [extra.gpa + PAGE])
        extra.remove()
        with pytest.raises(GuestError) as caught:
            rig.guest.run(0)
        assert caught.value.exit.phys_addr == 17 * PAGE
        assert extra.words()[0] == 1
        for use in (extra.remove, lambda: extra.gpa, lambda: extra.set_log_dirty(True)):
            with pytest.raises(StateError, match="removed"):
                use()
        assert "removed" in repr(extra)
        again = rig.vm.add_memory(16 * PAGE, 4 * PAGE, log_dirty=True, slot=extra.slot)
        assert again.slot == extra.slot
        assert extra.words()[0] == 1
        assert again.words()[0] == 0
        rig.guest.reset(0)
        rig.write([again.gpa + PAGE])
        assert_exact([again.gpa + PAGE], logged(rig))


def test_one_memory_in_two_slots(kvm: System) -> None:
    """Both show the same bytes; each logs what was written through it."""
    with Rig(kvm, pages=16) as rig:
        twin = rig.vm.add_memory(16 * PAGE, backing=rig.ram, log_dirty=True)
        half = rig.vm.add_memory(32 * PAGE, 8 * PAGE, backing=rig.ram, log_dirty=True)
        rig.write([rig.ram.gpa, twin.gpa + PAGE, half.gpa + 2 * PAGE])
        assert list(rig.ram.words()[:3]) == [1, 2, 3]
        assert list(twin.words()[:3]) == [1, 2, 3]
        assert_exact([0], rig.vm.get_dirty_log(rig.ram.slot))
        assert_exact([1], rig.vm.get_dirty_log(twin.slot))
        assert_exact([2], rig.vm.get_dirty_log(half.slot))
        rig.ram.remove()
        rig.ram.close()
        rig.guest.load(0, [twin.gpa])
        assert rig.guest.is_done(rig.guest.run(0))
        assert twin.words()[0] == 4


def test_address_spaces(kvm: System) -> None:
    """Where there are several, a slot of each may lie at the same address."""
    with Rig(kvm, pages=16) as rig:
        spaces = rig.vm.check_extension(Cap.MULTI_ADDRESS_SPACE)
        if spaces > 1:
            other = rig.vm.add_memory(0, 16 * PAGE, as_id=1, log_dirty=True)
            assert other.slot == 1 << 16
            rig.write(rig.gpas(0, 3))
            assert_exact(range(3), rig.vm.get_dirty_log(rig.ram.slot))
            assert not rig.vm.get_dirty_log(other.slot)
            dirty = DirtySet(rig.vm)
            for slot in (rig.ram.slot, other.slot):
                dirty[slot].set(0, num_pages=4)
            assert dirty.count() == 4
        with pytest.raises(KvmError, match="EINVAL"):
            rig.vm.add_memory(FAR, PAGE, as_id=max(spaces, 1))
        assert_usable(rig)


# What is refused


def test_refusals_of_add_memory(kvm: System) -> None:
    """Each is said in words before the kernel is asked, and leaves the VM as it was."""
    with Rig(kvm, pages=16) as rig:
        vm, before, version = rig.vm, dict(rig.vm.slots), rig.vm.slots_version
        for gpa, size in ((FAR + 1, PAGE), (FAR, PAGE + 1), (FAR, PAGE // 2), (FAR + 8, 1)):
            with pytest.raises(ValueError, match="multiples of the page size"):
                vm.add_memory(gpa, size)
        for size in (0, -PAGE, 1 << 70, (1 << 31) * PAGE):
            with pytest.raises(ValueError, match="size_bytes must lie between"):
                vm.add_memory(FAR, size)
        for gpa in (-PAGE, 1 << 52, 1 << 70):
            with pytest.raises(ValueError, match="gpa must lie between"):
                vm.add_memory(gpa, PAGE)
        for start, pages in ((0, 1), (15, 1), (15, 2), (0, 16)):
            with pytest.raises(ValueError, match="overlaps slot 0"):
                vm.add_memory(start * PAGE, pages * PAGE)
        with pytest.raises(StateError, match="slot 0 exists"):
            vm.add_memory(FAR, PAGE, slot=0)
        with pytest.raises(ValueError, match="backing has"):
            vm.add_memory(FAR, 17 * PAGE, backing=rig.ram)
        with pytest.raises(TypeError, match="size_bytes, or backing"):
            vm.add_memory(FAR)
        for slot in (-1, 1 << 16):
            with pytest.raises(ValueError, match="slot must lie between"):
                vm.add_memory(FAR, PAGE, slot=slot)
        for as_id in (-1, 1 << 16):
            with pytest.raises(ValueError, match="as_id must lie between"):
                vm.add_memory(FAR, PAGE, as_id=as_id)
        for bad in ("x", None, 1.0):
            with pytest.raises(TypeError, match="must be an integer"):
                vm.add_memory(bad, PAGE)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="size_bytes must be an integer"):
            vm.add_memory(FAR, "x")  # type: ignore[arg-type]
        assert dict(vm.slots) == before
        assert vm.slots_version == version
        assert_usable(rig)


def test_a_slot_number_that_only_the_kernel_refuses(kvm: System) -> None:
    """Past KVM_CAP_NR_MEMSLOTS: EINVAL, nothing kept."""
    with Rig(kvm, pages=16) as rig:
        most = rig.vm.check_extension(Cap.NR_MEMSLOTS)
        before = dict(rig.vm.slots)
        with pytest.raises(KvmError, match="EINVAL"):
            rig.vm.add_memory(FAR, PAGE, slot=most)
        assert dict(rig.vm.slots) == before
        rig.vm.add_memory(FAR, PAGE, slot=most - 1)
        assert_usable(rig)


def test_reading_and_writing_memory(kvm: System) -> None:
    """Ranges are checked; what the host writes is not logged."""
    with Rig(kvm, pages=16) as rig:
        ram = rig.ram
        ram.write(PAGE - 1, b"abc")
        assert ram.read(PAGE - 1, 3) == b"abc"
        assert ram.read(16 * PAGE) == b""
        for offset, length in ((16 * PAGE, 1), (-1, 1), (0, 16 * PAGE + 1), (0, -1)):
            with pytest.raises(ValueError, match="must lie between"):
                ram.read(offset, length)
        with pytest.raises(ValueError, match="length"):
            ram.write(16 * PAGE - 1, b"ab")
        for offset, stride in ((4, 8), (0, 12)):
            with pytest.raises(ValueError, match="multiples of 8"):
                ram.words(offset, stride=stride)
        with pytest.raises(ValueError, match="stride"):
            ram.words(stride=0)
        with pytest.raises(ValueError, match="count"):
            ram.words(count=17)
        assert not rig.vm.get_dirty_log(ram.slot)
