"""Microseconds per call: kvmring's methods, beside the same ioctl in a loop of C.

What a call costs when it has nothing to do: empty rings, clean logs. A harvest is no system
call; beside it stands a loop in C that looks at each ring once.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.bench.measure import alternate, per_call, ratio, summary, timed
from kvmring.bench.report import Column, Group, Table
from kvmring.bench.rigs import rig, ring_sizes
from kvmring.bitmap import DirtyBitmap
from kvmring.dirtyset import DirtySet
from kvmring.errors import KvmError
from kvmring.ring import DirtyGfns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmring.bench.baseline import Baseline
    from kvmring.bench.measure import Effort
    from kvmring.bench.rigs import Rig
    from kvmring.system import System

__all__ = ["measure"]

SMALL = 1 << 20
SLOTS = {"64 MiB": 64 << 20, "4 GiB": 4 << 30}
VCPUS = (1, 64)
RINGS = (1024, 4096)  # the first that the host takes
MICRO = 1e-3

_COLUMNS = (
    Column(name="call", head="call"),
    Column(name="python_us", head="kvmring\nus/call"),
    Column(name="c_us", head="C\nus/call"),
    Column(name="python_to_c", head="kvmring /\nC"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A row: the call in Python, and in C so many times, which returns nanoseconds."""

    name: str
    python: Callable[[], object]
    c: Callable[[int], float] | None
    comparable: bool = True  # whether a ratio says something


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What the VMs of some calls are like."""

    size_bytes: int
    entries: int = 0
    vcpus: int = 1
    manual: int = 0


def measure(
    kvm: System,
    effort: Effort,
    base: Baseline | None,
    *,
    vcpus: Sequence[int] = VCPUS,
    slots: dict[str, int] | None = None,
) -> Group:
    """Measure every call."""
    table = Table(name="calls", title="Calls with nothing to do", columns=_COLUMNS)
    says = []
    for number in vcpus:
        _measure(table, effort, _rings(kvm, base, number))
    for name, size in (SLOTS if slots is None else slots).items():
        try:
            _measure(table, effort, _logs(kvm, base, name, size))
        except KvmError as error:
            says.append(f"A slot of {name}: this host refuses it: {error}.")
    _measure(table, effort, _runs(kvm, base))
    says.append(
        "harvest in C: a loop that looks at the next entry of each ring. reset: kvmring also "
        "blocks the thread's signals around the ioctl, two further system calls."
    )
    says.append("run + exit: into the guest, and out by its store to a device; kick + run: not in.")
    return Group(name="calls", tables=[table], says=says)


def _measure(table: Table, effort: Effort, calls: Iterator[_Call]) -> None:
    for call in calls:
        times = per_call(call.python)
        contestants: dict[str, Callable[[], float]] = {"python": partial(timed, call.python, times)}
        if call.c is not None:
            contestants["c"] = partial(call.c, times)
        found = alternate(contestants, effort.scaled(0.5))
        one = MICRO / times
        table.add(
            call.name,
            summary(found["python"]).times(one),
            summary(found["c"]).times(one) if call.c else None,
            ratio(found["python"], found["c"]) if call.c and call.comparable else None,
        )


def _make(stack: ExitStack, kvm: System, base: Baseline | None, wanted: _Wanted) -> list[Rig]:
    """Make a VM for kvmring, and where there is C one for it that is alike."""
    return [
        stack.enter_context(
            rig(
                kvm,
                size_bytes=wanted.size_bytes,
                entries=wanted.entries,
                vcpus=wanted.vcpus,
                manual=wanted.manual,
                base=own,
            )
        )
        for own in ([None] if base is None else [None, base])
    ]


def _rings(kvm: System, base: Baseline | None, vcpus: int) -> Iterator[_Call]:
    wanted = _Wanted(size_bytes=SMALL, entries=ring_sizes(kvm, RINGS)[0], vcpus=vcpus)
    of = f"{vcpus} vCPU{'s' if vcpus > 1 else ''}"
    with ExitStack() as stack:
        rigs = _make(stack, kvm, base, wanted)
        vm, c = rigs[0].vm, rigs[-1].c
        look = None if c is None else lambda times: c.harvest(times)[1]
        into: list[DirtyGfns | DirtySet] = [DirtyGfns(wanted.entries), DirtySet(vm)]
        for target in into:
            yield _Call(
                name=f"harvest, {of}, {type(target).__name__}",
                python=partial(vm.harvest, target),
                c=look,
                comparable=False,  # with a loop that is inlined
            )
        yield _Call(
            name=f"reset, {of}",
            python=vm.reset_dirty_rings,
            c=None if c is None else lambda times: c.reset(times)[1],
        )


def _logs(kvm: System, base: Baseline | None, name: str, size_bytes: int) -> Iterator[_Call]:
    with ExitStack() as stack:
        rigs = _make(stack, kvm, base, _Wanted(size_bytes=size_bytes))
        slot, c = rigs[0].ram.slot, rigs[-1].c
        into = DirtyBitmap(rigs[0].ram.num_pages)
        yield _Call(
            name=f"get_dirty_log, {name}",
            python=partial(rigs[0].vm.get_dirty_log, slot, into=into),
            c=None if c is None else partial(c.get_dirty_log, slot),
        )
    if not kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) & 1:
        return
    with ExitStack() as stack:
        rigs = _make(stack, kvm, base, _Wanted(size_bytes=size_bytes, manual=1))
        c = rigs[-1].c
        yield _Call(
            name=f"clear_dirty_log, {name}",
            python=partial(rigs[0].vm.clear_dirty_log, slot, into),
            c=None if c is None else partial(c.clear_dirty_log, slot),
        )


def _runs(kvm: System, base: Baseline | None) -> Iterator[_Call]:
    with ExitStack() as stack:
        rigs = _make(stack, kvm, base, _Wanted(size_bytes=SMALL))
        vcpu, c = rigs[0].vm.vcpus[0], rigs[-1].c
        for it in rigs:
            it.guest.load(0, [])  # without stores, it goes to its doorbell at once, every time
        yield _Call(name="run + exit", python=vcpu.run, c=None if c is None else c.run)

        def kick_and_run() -> None:
            vcpu.kick()
            vcpu.run()

        yield _Call(
            name="kick + run",
            python=kick_and_run,
            c=None if c is None else partial(c.run, immediate=True),
        )
