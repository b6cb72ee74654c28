"""Fixtures of the tests on the real device: the system, and what its rings are like."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from kvmring import System
from kvmring.abi import lib

from .rig import RingFacts, ring_facts

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def one_vm_all_the_time() -> Iterator[None]:
    """Keep an empty VM, so that no test's VM is the first or the last of the host.

    The kernel patches its scheduler's code when the first VM comes and when the last one goes
    (preempt_notifier_key). Thousands of times would be slow, and an emulated x86 machine with
    several processors was seen to die of it: int3 in __schedule.
    """
    fds: list[int] = []
    try:
        fds.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        fds.append(fcntl.ioctl(fds[0], lib.KVM_CREATE_VM, 0))
    except OSError:
        pass  # the gates say so, test by test
    yield
    for fd in fds:
        os.close(fd)


@pytest.fixture
def kvm() -> Iterator[System]:
    """Open /dev/kvm; what was made from it is closed at the end."""
    with System() as system:
        yield system


@pytest.fixture
def facts() -> RingFacts:
    """Return what this host's rings are like."""
    return ring_facts()
