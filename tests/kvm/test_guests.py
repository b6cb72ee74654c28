"""PageWriter, the guest that is the truth of all the other tests: what it takes and refuses."""

from __future__ import annotations

import threading
import time
from array import array

import pytest

from kvmring import ExitReason, StateError, System
from kvmring.guests import ORDERS, PageWriter, page_order

from ..gates import needs_kvm
from .rig import PAGE, Rig, assert_exact, assert_usable, logged

pytestmark = needs_kvm()


def test_it_needs_memory(kvm: System) -> None:
    with kvm.create_vm() as vm:
        with pytest.raises(StateError, match="add the memory"):
            PageWriter(kvm, vm)
        assert vm.vcpus == ()
        assert not vm.slots


@pytest.mark.parametrize("number", [0, -1, 4097, 1 << 70])
def test_numbers_of_vcpus(kvm: System, number: int) -> None:
    with kvm.create_vm() as vm:
        vm.add_memory(0, PAGE)
        with pytest.raises(ValueError, match="num_vcpus must lie between"):
            PageWriter(kvm, vm, num_vcpus=number)
        with pytest.raises(ValueError, match="capacity must lie between"):
            PageWriter(kvm, vm, capacity=min(number, 0))
        assert vm.vcpus == ()


def test_lists_that_are_refused(kvm: System) -> None:
    """Each in words; the command that was loaded before still stands."""
    with Rig(kvm, pages=16) as rig:
        guest = rig.guest
        hole = 16 * PAGE
        guest.load(0, rig.gpas(0, 2))
        for gpas in ([hole], [0, 1 << 40], [15 * PAGE, hole]):
            with pytest.raises(ValueError, match="no memory at"):
                guest.load(0, gpas)
        for gpas in ([1], [0, PAGE + 8]):
            with pytest.raises(ValueError, match="not the address of a page"):
                guest.load(0, gpas)
        for gpas in ([-PAGE], [1 << 64]):
            with pytest.raises(ValueError, match="negative, or has over 64 bits"):
                guest.load(0, gpas)
        with pytest.raises(ValueError, match="capacity is 16"):
            guest.load(0, [0] * 17)
        with pytest.raises(ValueError, match="empty list"):
            guest.load(0, [], rounds=0)
        for rounds in (-1, 1 << 64):
            with pytest.raises(ValueError, match="rounds must lie between"):
                guest.load(0, [0], rounds=rounds)
        for at in (1, 4, 12):
            with pytest.raises(ValueError, match="multiple of 8"):
                guest.load(0, [0], at=at)
        for at in (-8, PAGE, PAGE - 7):
            with pytest.raises(ValueError, match="at must lie between"):
                guest.load(0, [0], at=at)
        for index in (-1, 1):
            with pytest.raises(ValueError, match="index must lie between"):
                guest.load(index, [0])
        with pytest.raises(TypeError):
            guest.load(0, ["x"])  # type: ignore[list-item]
        assert guest.is_done(guest.run(0))
        assert_exact(rig.gpas(0, 2), logged(rig))


def test_run_before_load(kvm: System) -> None:
    with Rig(kvm, pages=16, vcpus=2) as rig:
        for _ in range(2):
            with pytest.raises(StateError, match=r"load\(\)"):
                rig.guest.run(1)
        assert_usable(rig)
        rig.guest.reset(0)
        with pytest.raises(StateError, match=r"load\(\)"):
            rig.guest.run(0)
        assert_usable(rig)


def test_where_in_the_page(kvm: System) -> None:
    """`at` says which word; without it each vCPU has its own, and they do not meet."""
    with Rig(kvm, pages=4, vcpus=2) as rig:
        gpas = rig.gpas()
        rig.write(gpas, 0)
        rig.write(gpas, 1)
        assert list(rig.ram.words(0)) == list(rig.ram.words(8)) == [1, 2, 3, 4]
        rig.guest.load(0, gpas, at=PAGE - 8)
        assert rig.guest.is_done(rig.guest.run(0))
        assert list(rig.ram.words(PAGE - 8)) == [5, 6, 7, 8]
        assert list(rig.ram.words(0)) == [1, 2, 3, 4]
        assert list(rig.guest.values(0)) == [5, 6, 7, 8]


def test_rounds_and_repeated_pages(kvm: System) -> None:
    """The values count the stores; a page twice in a list has the later one."""
    with Rig(kvm, pages=4) as rig:
        rig.guest.load(0, rig.gpas(), rounds=5)
        assert rig.guest.is_done(rig.guest.run(0))
        progress = rig.guest.progress(0)
        assert (progress.stores, progress.rounds, progress.done) == (20, 5, True)
        rig.assert_memory()
        assert list(rig.ram.words()) == [17, 18, 19, 20]
        rig.write([0, PAGE, 0])
        assert list(rig.ram.words()) == [23, 22, 19, 20]
        rig.write([])
        assert rig.guest.progress(0).stores == 0
        assert list(rig.guest.values(0)) == []
        assert rig.guest.in_flight(0) is None


def test_stop(kvm: System) -> None:
    """A command without end ends after the store it is at; the next load() goes on."""
    with Rig(kvm, pages=16) as rig:
        rig.guest.load(0, rig.gpas(), rounds=0)
        ends: list[bool] = []
        runner = threading.Thread(target=lambda: ends.append(rig.guest.is_done(rig.guest.run(0))))
        runner.start()
        while rig.guest.progress(0).stores < 40:
            time.sleep(0.001)
        rig.guest.stop(0)
        runner.join(60)
        assert ends == [True]
        progress = rig.guest.progress(0)
        assert progress.done
        assert progress.rounds == progress.stores // 16 >= 2
        rig.assert_memory()
        assert_usable(rig)
        rig.assert_memory()


def test_stop_before_run(kvm: System) -> None:
    """One store is made, since it is looked at after each."""
    with Rig(kvm, pages=16) as rig:
        rig.guest.load(0, rig.gpas(), rounds=0)
        rig.guest.stop(0)
        assert rig.guest.is_done(rig.guest.run(0))
        assert rig.guest.progress(0).stores == 1
        assert list(rig.guest.written(0)) == [0]
        assert list(rig.guest.values(0)) == [1] + [0] * 15


def test_a_new_command_in_the_middle_of_one(kvm: System) -> None:
    """load() after a kick forgets the old command, not the count."""
    with Rig(kvm, pages=16) as rig:
        rig.guest.load(0, rig.gpas(0, 8), rounds=0)
        timer = threading.Timer(0.005, rig.vm.vcpus[0].kick)
        timer.start()
        assert rig.guest.run(0).reason is ExitReason.INTR
        timer.join()
        logged(rig)
        rig.guest.load(0, rig.gpas(8, 8))
        assert rig.guest.is_done(rig.guest.run(0))
        assert_exact(rig.gpas(8, 8), logged(rig))
        rig.assert_memory()


def test_memory_that_is_added_later(kvm: System) -> None:
    with Rig(kvm, pages=16) as rig:
        more = rig.vm.add_memory(16 * PAGE, 4 * PAGE, log_dirty=True)
        rig.write([more.gpa + 3 * PAGE, 0])
        assert_exact([0, more.gpa + 3 * PAGE], logged(rig))
        assert more.words()[3] == 1


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_permutations(kvm: System, order: str) -> None:
    with Rig(kvm, pages=16) as rig:
        for first, num in ((0, 16), (3, 5), (15, 1), (16, 0)):
            gpas = page_order(rig.ram, order=order, first_page=first, num_pages=num, seed=1)
            assert isinstance(gpas, array)
            assert sorted(gpas) == [page * PAGE for page in range(first, first + num)]
        with pytest.raises(ValueError, match="order must be one of"):
            page_order(rig.ram, order="x")
        with pytest.raises(ValueError, match="num_pages must lie between"):
            page_order(rig.ram, order=order, first_page=1, num_pages=16)
