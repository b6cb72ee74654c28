"""KVM_RESET_DIRTY_RINGS: its counts, and that a signal takes no page away.

Since Linux 6.17 the kernel leaves the reset when a signal is pending and forgets to protect up
to 64 pages (virt/kvm/dirty_ring.c). VM.reset_dirty_rings() blocks signals around it; here it is
flooded with them, and each page's next write must be logged all the same.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import pytest

from kvmring import Cap, DirtyGfns, DirtySet, KvmError, System, ioctls

from ..gates import needs, needs_kvm
from .rig import Rig, RingFacts, assert_exact

if TYPE_CHECKING:
    from collections.abc import Iterator

RING = needs(Cap.DIRTY_LOG_RING_ACQ_REL)


@RING
def test_counts(kvm: System, facts: RingFacts) -> None:
    """What was harvested is reset, over all vCPUs, once."""
    n = facts.smallest // 4
    with Rig(kvm, entries=facts.smallest, pages=3 * n, vcpus=3) as rig:
        assert rig.vm.reset_dirty_rings().reset == 0
        for index in range(3):
            rig.write(rig.gpas(index * n, n), index)
        assert rig.vm.reset_dirty_rings().reset == 0, "nothing was harvested"
        gfns = DirtyGfns(3 * n)
        rig.vm.vcpus[1].dirty_ring.harvest(gfns, limit=7)
        rig.vm.vcpus[2].dirty_ring.harvest(gfns)
        assert [vcpu.dirty_ring.pending for vcpu in rig.vm.vcpus] == [0, 7, n]
        result = rig.vm.reset_dirty_rings()
        assert result.reset == n + 7
        assert result.calls == 1
        assert (result.unknown, result.suspects.count()) == (0, 0)
        assert [vcpu.dirty_ring.pending for vcpu in rig.vm.vcpus] == [0, 0, 0]
        assert rig.vm.reset_dirty_rings().reset == 0


@RING
def test_without_a_vcpu(kvm: System, facts: RingFacts) -> None:
    """A VM with rings but no vCPU has nothing to reset."""
    with kvm.create_vm() as vm:
        vm.enable_dirty_ring(facts.smallest)
        assert vm.reset_dirty_rings().reset == 0


@needs_kvm()
@pytest.mark.parametrize("guarded", [True, False])
def test_without_a_ring(kvm: System, guarded: bool) -> None:
    """EINVAL, with a hint at what should have come first."""
    with kvm.create_vm() as vm:
        with pytest.raises(KvmError, match="enable_dirty_ring") as caught:
            ioctls.reset_dirty_rings(vm, guarded=guarded)
        assert caught.value.errno == errno.EINVAL
        assert caught.value.ioctl == "KVM_RESET_DIRTY_RINGS"
        with pytest.raises(KvmError, match="KVM_RESET_DIRTY_RINGS: Invalid argument"):
            vm.reset_dirty_rings()


@RING
def test_while_a_vcpu_runs(kvm: System, facts: RingFacts) -> None:
    """Harvest and reset do not need a vCPU to stand still."""
    n = facts.smallest // 2
    with Rig(kvm, entries=facts.smallest, pages=n) as rig:
        dirty = DirtySet(rig.vm)
        rig.guest.load(0, rig.gpas(), rounds=0)
        stop = threading.Event()

        def run() -> None:
            while not rig.guest.is_done(rig.guest.run(0)):
                stop.wait(0.001)

        runner = threading.Thread(target=run)
        runner.start()
        try:
            taken = 0
            for _ in range(200):
                k = rig.vm.harvest(dirty)
                assert rig.vm.reset_dirty_rings().reset == k
                taken += k
        finally:
            rig.guest.stop(0)
            rig.vm.reset_dirty_rings()
            stop.set()
            _join(runner, rig, dirty)
        rig.vm.harvest(dirty)
        assert_exact(rig.gpas()[: min(n, rig.guest.progress(0).stores)], dirty.gpas())
        rig.assert_memory()


def _join(runner: threading.Thread, rig: Rig, dirty: DirtySet) -> None:
    """Wait for a stopped guest, and make room in its ring meanwhile."""
    for _ in range(600):
        runner.join(0.1)
        if not runner.is_alive():
            return
        rig.vm.harvest(dirty)
        rig.vm.reset_dirty_rings()
    raise AssertionError("the guest does not stop")


class Flood:
    """A child process that sends SIGUSR1 to this one, as fast as it can, while it is on.

    A thread would not do: it waits for the GIL, and a reset is over by then.
    """

    OFF, ON, END = 0, 1, 2

    def __init__(self) -> None:
        self.came = 0
        self._word = mmap.mmap(-1, 1)  # shared with the child
        self._old = signal.signal(signal.SIGUSR1, self._count)
        parent, word = os.getpid(), self._word
        self._pid = os.fork()
        if not self._pid:
            while word[0] != self.END and os.getppid() == parent:
                if word[0] == self.ON:
                    os.kill(parent, signal.SIGUSR1)
            os._exit(0)

    def _count(self, _number: int, _frame: object) -> None:
        self.came += 1

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let signals come; they do when this begins."""
        before = self.came
        self._word[0] = self.ON
        try:
            while self.came == before:
                pass
            yield
        finally:
            self._word[0] = self.OFF

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._word[0] = self.END
        os.waitpid(self._pid, 0)
        signal.signal(signal.SIGUSR1, self._old)


def write_through(rig: Rig, gpas: list[int]) -> None:
    """Have the pages written, whatever signals still arrive."""
    rig.guest.load(0, gpas)
    for _ in range(10_000):
        if rig.guest.is_done(rig.guest.run(0)):
            return
    raise AssertionError("the guest does not get on")


@RING
@pytest.mark.parametrize("pages", [1, 60, 130])
def test_no_page_is_lost_under_a_flood_of_signals(
    kvm: System, facts: RingFacts, pages: int
) -> None:
    """The count is always full, in one call, and each page is logged again afterwards."""
    with Flood() as flood, Rig(kvm, entries=facts.smallest, pages=pages) as rig:
        for turn in range(30):
            gpas = rig.gpas(order="random")
            write_through(rig, gpas)
            dirty = DirtySet(rig.vm)
            n = rig.vm.harvest(dirty)
            assert n >= pages
            try:
                assert_exact(gpas, dirty.gpas())
            except AssertionError as error:
                raise AssertionError(f"turn {turn}: {error}") from None
            with flood.on():
                result = rig.vm.reset_dirty_rings()
            assert (result.reset, result.calls) == (n, 1)
            assert result.suspects.count() == 0


@RING
def test_the_bare_ioctl_under_the_same_flood(kvm: System, facts: RingFacts) -> None:
    """It may stop short; what it counts adds up, never to more than was harvested."""
    pages = 60
    with Flood() as flood, Rig(kvm, entries=facts.smallest, pages=pages) as rig:
        for _ in range(20):
            write_through(rig, rig.gpas())
            expected = rig.vm.harvest(DirtySet(rig.vm))
            counts: list[int] = []
            with flood.on():
                while sum(counts) < expected and len(counts) < 50:
                    counts.append(ioctls.reset_dirty_rings(rig.vm, guarded=False).reset)
            while sum(counts) < expected and len(counts) < 100:
                counts.append(ioctls.reset_dirty_rings(rig.vm, guarded=False).reset)
            assert sum(counts) == expected
            assert rig.ring.pending == 0
            # a short count loses pages, where it happens; start afresh
            rig.ram.set_log_dirty(False)
            rig.ram.set_log_dirty(True)


@RING
def test_signals_that_came_meanwhile_are_delivered(kvm: System, facts: RingFacts) -> None:
    """Blocking ends with the reset: the mask is what it was, and handlers run."""
    seen: list[int] = []
    old = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        with Rig(kvm, entries=facts.smallest, pages=4) as rig:
            rig.write(rig.gpas())
            rig.vm.harvest(DirtyGfns(4))
            assert rig.vm.reset_dirty_rings().reset == 4
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGALRM}
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        assert seen == [signal.SIGUSR2]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGUSR2, old)
