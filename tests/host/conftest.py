"""Fixtures of the tests of host/'s commands: tracefs, and a neighbour with two vCPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kvm.other import Neighbour, mounted_tracefs
from tests.kvm.rig import ring_facts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def tracefs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return where tracefs is mounted; the commands find it there too."""
    yield from mounted_tracefs(tmp_path_factory.mktemp("mounts") / "tracing")


@pytest.fixture
def other() -> Iterator[Neighbour]:
    """Return a process with a VM of two vCPUs."""
    entries = 4 * ring_facts().smallest
    with Neighbour({"entries": entries, "vcpus": 2, "pages": 16384}) as neighbour:
        yield neighbour
