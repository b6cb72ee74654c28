"""Lifetime: no order of closing crashes, nothing is left behind, and close() never blocks."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest

from kvmring import (
    Cap,
    ClosedError,
    DeviceType,
    DirtyGfns,
    DirtySet,
    ExitReason,
    System,
    abi,
)
from kvmring.abi import lib

from ..gates import needs, needs_kvm
from .rig import PAGE, Rig, RingFacts, assert_exact

if TYPE_CHECKING:
    from collections.abc import Callable

RING = needs(Cap.DIRTY_LOG_RING_ACQ_REL)
VMS = 1000


@RING
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(4))
def test_closing_in_random_order_under_threads(facts: RingFacts, seed: int) -> None:
    """In a process of its own, which must end by itself and never by a signal."""
    program = Path(__file__).with_name("chaos.py")
    command = [sys.executable, "-W", "error", "-X", "faulthandler", str(program)]
    done = subprocess.run(
        [*command, str(seed), "8", str(facts.smallest)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    assert done.stderr == ""
    assert int(done.stdout) > 100


# Calls in flight


def ends(function: Callable[[], object]) -> Callable[[], None]:
    """Repeat a call until the handle is closed."""

    def repeat() -> None:
        while True:
            try:
                function()
            except ClosedError:
                return

    return repeat


@RING
def test_close_while_the_guest_runs(kvm: System, facts: RingFacts) -> None:
    """close() returns at once; the run goes on, on memory that is still there, to its end."""
    with Rig(kvm, entries=facts.smallest, pages=facts.smallest // 4) as rig:
        vcpu = rig.vm.vcpus[0]
        rig.guest.load(0, rig.gpas(), rounds=0)
        reasons: list[object] = []
        runner = threading.Thread(target=lambda: reasons.append(rig.guest.run(0).reason))
        runner.start()
        while not vcpu.running:
            time.sleep(0.001)
        keep = vcpu.handle
        rings = abi.live()["rings"]
        rig.vm.close()
        kvm.close()
        with pytest.raises(ClosedError):
            vcpu.kick()
        assert abi.live()["rings"] == rings > 0, "the ring went away under a running vCPU"
        assert runner.is_alive()
        assert lib.kvr_kick(keep) == 0
        del keep
        runner.join(60)
        assert not runner.is_alive()
        assert reasons == [ExitReason.INTR]


@RING
@pytest.mark.parametrize("who", ["ring", "vm"])
def test_close_while_entries_are_harvested(kvm: System, facts: RingFacts, who: str) -> None:
    """A harvest that is under way finishes; the next one is refused."""
    for _ in range(20):
        with Rig(kvm, entries=facts.smallest, pages=64) as rig:
            rig.write(rig.gpas())
            dirty, handle = DirtySet(rig.vm), rig.ring if who == "ring" else rig.vm
            harvest = handle.harvest
            thread = threading.Thread(target=ends(partial(harvest, dirty)))
            thread.start()
            time.sleep(random.random() * 0.001)
            handle.close()
            thread.join(60)
            assert not thread.is_alive()


@needs_kvm()
def test_close_while_a_log_is_fetched(kvm: System) -> None:
    for _ in range(20):
        with Rig(kvm, pages=4096) as rig:
            slot = rig.ram.slot
            threads = [
                threading.Thread(target=ends(partial(rig.vm.get_dirty_log, slot))) for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            time.sleep(random.random() * 0.001)
            rig.vm.close()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()


# Nothing left behind


def footprint() -> tuple[int, int, int]:
    """Count this process's descriptors, mappings and resident bytes."""
    gc.collect()
    with open("/proc/self/maps") as maps, open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * PAGE
        return len(os.listdir("/proc/self/fd")), len(maps.readlines()), resident


def make_and_drop(kvm: System, entries: int, number: int) -> None:
    """Make a VM, with more and less in it, and drop it in one of several ways."""
    vm = kvm.create_vm()
    parts: list[object] = []
    if number % 2:
        vm.enable_dirty_ring(entries)
    if number % 3:
        ram = vm.add_memory(0, 64 * PAGE, log_dirty=True)
        ram.write(0, bytes(PAGE))
        parts.append(ram)
    if number % 5:
        vcpu = vm.create_vcpu()
        if vcpu.has_dirty_ring:
            vcpu.dirty_ring.harvest(DirtyGfns(1))
        parts.append(vcpu)
    if number % 7 == 0 and vm.has_device(DeviceType.VFIO):
        parts.append(vm.create_device(DeviceType.VFIO))
    parts.append(DirtySet(vm))
    if number % 4 == 0:
        vm.close()
    elif number % 4 == 1:
        del vm, parts


@RING
@pytest.mark.timeout(900)
def test_a_thousand_vms_leave_nothing(kvm: System, facts: RingFacts) -> None:
    """Closed or only dropped, with or without vCPU, ring, RAM and device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for number in range(60):
            make_and_drop(kvm, facts.smallest, number)
        gc.collect()
        live, before = abi.live(), footprint()
        for number in range(VMS):
            make_and_drop(kvm, facts.smallest, number)
        gc.collect()
    after = footprint()
    assert abi.live() == live
    assert after[0] == before[0]
    # far below one per VM; the allocator takes and gives back a mapping now and then
    assert after[1] - before[1] < VMS // 50
    assert after[2] - before[2] < VMS * 2048


@RING
def test_what_is_not_closed_is_reported(kvm: System, facts: RingFacts) -> None:
    """A ResourceWarning names each handle; what it owned goes all the same."""
    live = abi.live()
    said: list[str] = []

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        assert category is ResourceWarning
        said.append(str(message))

    # recording the warnings themselves would keep what they are about alive
    with warnings.catch_warnings():
        warnings.simplefilter("always", ResourceWarning)
        warnings.showwarning = note
        vm = kvm.create_vm()
        vm.enable_dirty_ring(facts.smallest)
        vm.add_memory(0, PAGE)
        vm.create_vcpu()
        del vm
        gc.collect()
        System()
        gc.collect()
    kinds = sorted(text.removeprefix("unclosed <").split()[0] for text in said)
    assert kinds == ["DirtyRing", "GuestMemory", "System", "VCPU", "VM"], said
    assert abi.live() == live


@RING
def test_children_keep_what_they_need(kvm: System, facts: RingFacts) -> None:
    """Dropping the names of parents first leaves a vCPU that runs."""
    rig = Rig(kvm, entries=facts.smallest, pages=16)
    guest, vcpus, vm, gpas = rig.guest, rig.vm.vcpus, rig.vm, rig.gpas(0, 4)
    rig.ram.close()
    guest.load(0, gpas)
    del rig
    gc.collect()
    assert guest.is_done(vcpus[0].run())
    gfns = DirtyGfns(8)
    assert vcpus[0].dirty_ring.harvest(gfns) == 4
    assert_exact(range(4), [gfn.offset for gfn in gfns])
    vm.close()


@needs_kvm()
def test_no_copies(kvm: System) -> None:
    """A handle owns kernel state: it can be neither copied nor pickled."""
    with Rig(kvm, pages=16) as rig:
        for handle in (kvm, rig.vm, rig.ram, rig.vm.vcpus[0]):
            for function in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="cannot be copied or pickled"):
                    function(handle)
