"""host/ on a real QEMU: agrees with what QEMU itself counts, and does not disturb it."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import pytest

from kvmring import Cap, host
from kvmring.host import EventKind, State
from tests.gates import needs

from .qemu import FIRST, HOT, LAST, PATIENCE_S, Qemu
from .run import kvmring

pytestmark = [
    needs(Cap.DIRTY_LOG_RING_ACQ_REL),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the firmware is x86"),
]
RING = 4096
MIB_PAGES = 256  # QEMU's unit is MiB/s


def test_ring_and_bitmap_mode_are_told_apart() -> None:
    with Qemu(ring=RING) as ring, Qemu(ring=0) as bitmap:
        found = {process.pid: process for process in host.vms()}
        assert [vcpu.ring_entries for vcpu in found[ring.pid].vcpus] == [RING]
        assert [vcpu.ring_entries for vcpu in found[bitmap.pid].vcpus] == [None]
        assert found[ring.pid].vms == found[bitmap.pid].vms == 1
        with host.Watcher(bitmap.pid) as watcher:
            assert host.judge(watcher.follow(0)).state is State.NO_RING
        done = kvmring("watch", bitmap.pid, "--count", 1, "--interval", 0.1)
        assert done.returncode == 0
        assert "no ring mapped" in done.stdout


def test_threads_are_found_by_name_and_by_system_call() -> None:
    with Qemu(halted=True) as named, Qemu(halted=True, names=False) as nameless:
        (vcpu,) = host.inspect(named.pid).vcpus
        assert vcpu.found_by == "name"
        comm = Path(f"/proc/{named.pid}/task/{vcpu.thread}/comm").read_text()
        assert comm == "CPU 0/KVM\n"
        end = time.monotonic() + PATIENCE_S
        while (vcpu := host.inspect(nameless.pid).vcpus[0]).found_by != "syscall":
            assert time.monotonic() < end  # the guest halts within milliseconds
        assert vcpu.thread != nameless.pid


def test_logging_off_is_silence() -> None:
    with Qemu(ring=RING) as qemu, host.Watcher(qemu.pid, events=False) as watcher:
        figures = watcher.follow(0.3)
        assert [ring.pushed for ring in figures] == [0]
        assert host.judge(figures).state is State.IDLE
        assert qemu.status == "running"


def test_rates_by_events_agree_with_qemus_own(tracefs: Path) -> None:
    with Qemu(ring=RING) as qemu, host.RingEvents(qemu.pid, sample=20, tracefs=tracefs) as events:
        qemu.measure(2)
        found: list[host.RingEvent] = []
        end = time.monotonic() + PATIENCE_S
        while (rate := qemu.measured()) is None:
            assert time.monotonic() < end
            events.wait(0.1)
            found += events.read()
        found += events.read()
        assert events.lost == 0
        assert qemu.status == "running"
    counted = [event for event in found if event.event is EventKind.PUSH]
    first, last = counted[0], counted[-1]
    pushed = (last.dirty_index or 0) - (first.dirty_index or 0)
    ours = pushed / (last.time_ns - first.time_ns) * 1e9
    theirs = rate * MIB_PAGES
    # QEMU rounds down to whole MiB/s
    assert 0.95 * theirs <= ours <= 1.05 * (theirs + MIB_PAGES)


def test_polling_agrees_with_the_kernels_counters_and_knows_the_hot_page(tracefs: Path) -> None:
    with (
        Qemu(ring=RING) as qemu,
        host.Watcher(qemu.pid, events=False, top=3) as polled,
        host.Watcher(qemu.pid, tracefs=tracefs, top=3) as exact,
    ):
        assert exact.exact, exact.why_polling
        qemu.measure(1)
        seen = counted = 0
        lapped = False
        last: tuple[host.RingFigures, ...] = ()
        end = time.monotonic() + PATIENCE_S
        while (rate := qemu.measured()) is None:
            assert time.monotonic() < end
            now = polled.follow(0.1)
            seen += now[0].pushed
            lapped |= now[0].lapped
            (ring,) = exact.follow(0)
            counted += ring.pushed
            last = (ring,) if ring.pushed else last
        seen += polled.follow(0)[0].pushed
        counted += exact.follow(0)[0].pushed
        assert qemu.status == "running"
    assert rate > 0
    assert seen <= counted
    if not lapped:
        assert seen >= 0.99 * counted
    pages = {page for _, page, _ in last[0].hot}
    assert pages <= {*range(FIRST, LAST + 1), HOT}
    assert {slot for slot, _, _ in last[0].hot} == {0}
    if Path("/sys/module/kvm_pvm").is_dir():
        # where every store of real mode is logged, half of them are to the hot page
        (_, page, share) = last[0].hot[0]
        assert page == HOT
        assert 0.4 < share < 0.6


def test_watch_shows_a_busy_qemu(tracefs: Path) -> None:
    with Qemu(ring=RING) as qemu:
        qemu.measure(3)
        done = kvmring("watch", qemu.pid, "--json", "--count", 2, "--interval", 0.5)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout.splitlines()[-1])
        (ring,) = document["rings"]
        assert ring["entries"] == RING
        assert ring["pages_per_second"] > 0
        assert document["verdict"]["state"] in ("healthy", "ring too small", "harvester too slow")
        assert qemu.status == "running"


def test_qemu_ends_while_it_is_watched() -> None:
    with Qemu(ring=RING) as qemu, host.Watcher(qemu.pid, events=False) as watcher:
        qemu.process.kill()
        qemu.process.wait()
        with pytest.raises(ProcessLookupError):
            watcher.follow(0)
