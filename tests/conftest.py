"""What every test gets: the KVM gate of gates.py, and a check that nothing was left behind.

After each test that passed, the open file descriptors of this process and the owners that the C
code counts (fds, mappings, rings) must be no more than before it. A handle that a test forgets
to close is a failure of that test, by name.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import pytest

from kvmring import abi

from .gates import gate_item

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kvm(*caps): needs /dev/kvm, and these capabilities of it")


def pytest_runtest_setup(item: pytest.Item) -> None:
    gate_item(item)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        item.stash[FAILED] = True


def open_fds() -> dict[int, str]:
    """Map each open descriptor of this process to what it is."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


def left_behind(fds: dict[int, str], live: dict[str, int]) -> list[str]:
    """Name what there is now and was not before."""
    now = open_fds()
    found = [f"fd {fd}: {what}" for fd, what in now.items() if fds.get(fd) != what]
    found += [
        f"{n - live[kind]} of the C code's {kind}"
        for kind, n in abi.live().items()
        if n > live[kind]
    ]
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves descriptors or mappings behind."""
    fds, live = open_fds(), abi.live()
    yield
    if request.node.stash.get(FAILED, False):
        return  # the traceback that pytest keeps holds the test's handles
    if left_behind(fds, live):
        gc.collect()  # cycles may hold handles; only looked for when there is something to find
        found = left_behind(fds, live)
        if found:
            pytest.fail("left behind: " + "; ".join(found), pytrace=False)
