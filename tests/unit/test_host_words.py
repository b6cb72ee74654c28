"""What host/ says and reads without a device: verdicts, format files, graphs, addresses."""

from __future__ import annotations

import dataclasses

import pytest

from kvmring import KvmNotSupported
from kvmring.commands.watch_view import graph
from kvmring.host import EventKind, RingFigures, State, judge
from kvmring.host.metrics import address
from kvmring.host.tracepoints import parse

QUIET = RingFigures(
    vcpu=0,
    thread=None,
    found_by=None,
    entries=4096,
    seconds=1.0,
    pushed=0,
    lapped=False,
    reset=0,
    fill=0,
    unreset=0,
    high_water=0,
    harvests=0,
    harvest_period_s=1.0,
    full_exits=0,
    hot=(),
    exact=True,
)
BUSY = dataclasses.replace(QUIET, pushed=10_000, reset=10_000, high_water=1000, harvests=10)


def state_of(ring: RingFigures) -> State:
    return judge([ring], reserved=64).state


def test_verdicts() -> None:
    assert judge([]).state is State.NO_RING
    assert state_of(QUIET) is State.IDLE
    assert state_of(BUSY) is State.HEALTHY
    stuck = dataclasses.replace(QUIET, fill=4032, high_water=4032)
    assert state_of(stuck) is State.STUCK, "full, and nothing moves"
    assert state_of(dataclasses.replace(stuck, pushed=40, full_exits=90_000)) is State.STUCK
    assert state_of(dataclasses.replace(BUSY, high_water=4000)) is State.TOO_SMALL
    kept = dataclasses.replace(QUIET, pushed=100, fill=3000, unreset=2900, high_water=3000)
    assert state_of(kept) is State.TOO_SLOW, "harvested and never reset"


def test_a_ring_too_small_names_the_size_that_would_do() -> None:
    # 30,000 pages/s, and one harvest of its own a second
    full = dataclasses.replace(BUSY, pushed=30_000, high_water=4032, harvests=8, full_exits=7)
    verdict = judge([full], reserved=64)
    assert verdict.state is State.TOO_SMALL
    assert verdict.size == 32768
    assert "32768" in verdict.text
    assert "7.0 full exits/s" in verdict.text
    often = dataclasses.replace(full, harvest_period_s=0.1)  # 3,000 pages each
    assert judge([often], reserved=64).size == 8192, "the next size at least: this one got full"
    fast = dataclasses.replace(full, pushed=900_000)
    assert judge([fast], reserved=64).state is State.TOO_SLOW, "no ring would do"


def test_polling_does_not_call_what_it_cannot_see_an_exit() -> None:
    seen = dataclasses.replace(BUSY, full_exits=None, exact=False, high_water=4032)
    verdict = judge([seen], reserved=64)
    assert verdict.state is State.TOO_SMALL
    assert "full exits/s" not in verdict.text
    lapped = dataclasses.replace(BUSY, lapped=True, full_exits=None, exact=False)
    assert lapped.rate is None
    assert ">= 10,000 pages/s (lapped)" in judge([lapped], reserved=64).text
    idle = dataclasses.replace(QUIET, full_exits=None, exact=False)
    assert "polling" in judge([idle], reserved=64).text


def test_the_gravest_ring_decides() -> None:
    stuck = dataclasses.replace(QUIET, vcpu=3, fill=4032, high_water=4032)
    verdict = judge([BUSY, stuck, QUIET], reserved=64)
    assert verdict.state is State.STUCK
    assert verdict.vcpu == 3


FORMAT = """name: kvm_dirty_ring_reset
ID: 1234
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;

\tfield:int index;\toffset:16;\tsize:4;\tsigned:1;
\tfield:u32 dirty_index;\toffset:24;\tsize:4;\tsigned:0;
\tfield:u32 reset_index;\toffset:20;\tsize:4;\tsigned:0;

print fmt: "ring %d: dirty 0x%x reset 0x%x (used %u)", REC->index, REC->dirty_index
"""


def test_a_format_file_says_where_the_fields_are() -> None:
    found = parse(EventKind.RESET, FORMAT)
    assert found.id == 1234
    assert found.fields == {"vcpu": (16, 4), "dirty": (24, 4), "reset": (20, 4)}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (FORMAT.replace("ID: 1234", ""), "no ID"),
        (FORMAT.replace("u32 dirty_index", "u32 other"), "dirty_index"),
        (FORMAT.replace("offset:20;\tsize:4", "offset:20;\tsize:2"), "reset_index"),
    ],
)
def test_a_format_that_is_not_the_known_one_is_refused(text: str, names: str) -> None:
    with pytest.raises(KvmNotSupported, match=names):
        parse(EventKind.RESET, text)


def test_graphs() -> None:
    assert graph([]) == ""
    assert graph([0, 0]) == ".."
    assert graph([0, 1, 50, 100]) == ".▁▄█"


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("9100", ("127.0.0.1", 9100)),
        (":9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:9100", ("::1", 9100)),
    ],
)
def test_addresses(text: str, there: tuple[str, int]) -> None:
    assert address(text) == there


@pytest.mark.parametrize("text", ["", "host", "host:", "host:http", ":70000", ":-1"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        address(text)
