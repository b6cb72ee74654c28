"""After fork(): the child has handles that it may not use, and the parent loses nothing.

By the API every call is ForkedError; by the descriptor alone the kernel says EIO; the ring and
the RAM are not mapped in the child at all, so that it cannot take a page from its parent.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from typing import TYPE_CHECKING

from kvmring import Cap, DirtySet, ForkedError, KvmNotSupported, System
from kvmring.abi import lib

from ..gates import needs, needs_kvm
from .handles import CLASSES, OTHER_ARCH, TABLE, is_local, make, use
from .rig import Rig, RingFacts, assert_exact, assert_usable

if TYPE_CHECKING:
    from collections.abc import Callable

RING = needs(Cap.DIRTY_LOG_RING_ACQ_REL)
# these show what the object holds; nothing reaches the kernel
STATE = {"handle", "fileno", "slots", "dirty_ring"}


def in_child(function: Callable[[], object]) -> object:
    """Run a function in a forked child; return what it returned, by way of JSON."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            try:
                result = function()
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            os.write(write, json.dumps(result).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return json.loads(text)


def outcome(function: Callable[[], object]) -> str:
    """Name what a call raised."""
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "nothing"


@RING
def test_every_method_in_the_child(kvm: System, facts: RingFacts) -> None:
    """ForkedError from each; the child may close what it inherited."""
    fixture = make(kvm, facts)

    def child() -> dict[str, str]:
        return {
            f"{cls.__name__}.{name}": outcome(lambda cls=cls, name=name: use(fixture, cls, name))  # type: ignore[misc]
            for cls in CLASSES
            if cls in fixture.handles
            for name in TABLE[cls]
            if not is_local(cls, name) and name not in STATE
        }

    found = in_child(child)
    assert isinstance(found, dict)
    other = {KvmNotSupported.__name__}
    wrong = {
        name: error
        for name, error in found.items()
        if error != ForkedError.__name__
        and not (name.split(".")[1] in OTHER_ARCH and error in other)
    }
    assert wrong == {}
    assert len(found) > 40
    for handle in fixture.handles.values():
        assert not handle.closed
    kvm.close()


@needs_kvm()
def test_the_kernel_says_eio_in_the_child(kvm: System) -> None:
    """Whatever the package does: a VM belongs to the process that made it."""
    with Rig(kvm, pages=16) as rig:
        fds = {"vm": rig.vm.fileno(), "vcpu": rig.vm.vcpus[0].fileno()}

        def number(fd: int, request: int) -> int:
            try:
                fcntl.ioctl(fd, request, 0)
            except OSError as error:
                return error.errno or 0
            return 0

        def child() -> list[int]:
            return [
                number(fds["vm"], lib.KVM_CHECK_EXTENSION),
                number(fds["vm"], lib.KVM_RESET_DIRTY_RINGS),
                number(fds["vm"], lib.KVM_GET_DIRTY_LOG),
                number(fds["vm"], lib.KVM_CREATE_VCPU),
                number(fds["vcpu"], lib.KVM_RUN),
                number(fds["vcpu"], lib.KVM_GET_REG_LIST),
            ]

        assert in_child(child) == [errno.EIO] * 6
        # not of the VM's: /dev/kvm itself may be used, and a VM of the child's own
        kvm_fd = kvm.fileno()
        assert in_child(lambda: fcntl.ioctl(kvm_fd, lib.KVM_GET_API_VERSION, 0)) == 12
        assert_usable(rig)


def mappings(what: str) -> int:
    """Count the mappings of this process whose line has a word."""
    with open("/proc/self/maps") as maps:
        return sum(what in line for line in maps)


@RING
def test_nothing_of_it_is_mapped_in_the_child(kvm: System, facts: RingFacts) -> None:
    """Neither kvm_run nor the ring nor the RAM: there is nothing to steal from."""
    with Rig(kvm, entries=facts.smallest, pages=64) as rig:
        assert mappings("kvm-vcpu") >= 2
        assert in_child(lambda: mappings("kvm-vcpu")) == 0
        assert "ForkedError" in str(in_child(lambda: rig.ram.read(0, 8).hex()))
        assert "ForkedError" in str(in_child(rig.ring.fill))


@RING
def test_the_parent_goes_on(kvm: System, facts: RingFacts) -> None:
    """A child that tries, closes, drops everything and ends takes no entry, VM or page."""
    with Rig(kvm, entries=facts.smallest, pages=64) as rig:
        rig.write(rig.gpas(0, 40))

        def child() -> str:
            dirty = DirtySet(rig.vm)
            said = outcome(lambda: rig.vm.harvest(dirty))
            said += outcome(rig.vm.reset_dirty_rings)
            rig.vm.vcpus[0].close()
            rig.vm.close()
            kvm.close()
            return said

        for _ in range(3):
            assert in_child(child) == "ForkedError" * 2
        dirty = DirtySet(rig.vm)
        assert rig.vm.harvest(dirty) == 40
        assert_exact(rig.gpas(0, 40), dirty.gpas())
        assert rig.vm.reset_dirty_rings().reset == 40
        for _ in range(2):
            assert_usable(rig)
        rig.assert_memory()


@RING
def test_a_child_with_a_vm_of_its_own(facts: RingFacts) -> None:
    """Forking forbids the parent's handles, not the package."""

    def child() -> str:
        with System() as kvm, Rig(kvm, entries=facts.smallest, pages=16) as rig:
            assert_usable(rig)
        return "works"

    with System() as kvm, Rig(kvm, entries=facts.smallest, pages=16) as rig:
        assert in_child(child) == "works"
        assert_usable(rig)
