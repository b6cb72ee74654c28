"""Every VM's dirty-ring figures for Prometheus: `kvmring watch --listen` serves them.

One Watcher per process, looked after at a steady pace and brought up to date at each scrape.
Labels are the process and the vCPU, nothing that a guest could multiply, and their number is
bounded. prometheus_client (the extra `metrics`) writes the format and speaks HTTP.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from kvmring.errors import KvmringError
from kvmring.extras import extra
from kvmring.host.processes import scan
from kvmring.host.watcher import BUDGET, Watcher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from kvmring.host.processes import VmProcess
    from kvmring.host.watcher import RingFigures

__all__ = ["MAX_RINGS", "Fleet", "address", "serve"]

MAX_RINGS = 2048  # rings that get series of their own; the others are counted
RESCAN_S = 5.0
_SHORTEST_S = 0.01


@dataclass(slots=True)
class _Totals:
    """One ring's counters since it was first seen, and its latest state."""

    figures: RingFigures
    pushed: int = 0
    reset: int = 0
    harvests: int = 0
    full_exits: int = 0
    lapped: int = 0
    high_water: int = 0  # since the last scrape

    def add(self, ring: RingFigures) -> None:
        self.figures = ring
        self.pushed += ring.pushed
        self.reset += ring.reset
        self.harvests += ring.harvests
        self.full_exits += ring.full_exits or 0
        self.lapped += ring.lapped
        self.high_water = max(self.high_water, ring.high_water)


@dataclass(slots=True)
class _Member:
    """One process."""

    process: VmProcess
    watcher: Watcher | None  # None: no ring, or not to be read
    rings: dict[str, _Totals] = field(default_factory=dict)

    def step(self) -> None:
        """Add what happened since the last step."""
        if self.watcher is None:
            return
        seen: dict[int, int] = {}
        for ring in self.watcher.follow(0):
            nth = seen[ring.vcpu] = seen.get(ring.vcpu, 0) + 1
            name = str(ring.vcpu) if nth == 1 else f"{ring.vcpu}#{nth}"
            if name not in self.rings:
                self.rings[name] = _Totals(ring)
            self.rings[name].add(ring)


class Fleet:
    """The VMs of this host, as a collector of prometheus_client.

    Threads: any; one at a time is let in.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: dict[tuple[int, int], _Member] = {}
        self._unreadable = 0
        self._scanned = float("-inf")

    def close(self) -> None:
        """Let go of every process."""
        with self._lock:
            for member in self._members.values():
                if member.watcher is not None:
                    member.watcher.close()
            self._members.clear()

    @property
    def polls(self) -> bool:
        """Whether a ring is polled, and so wants frequent steps."""
        return any(
            member.watcher is not None and not member.watcher.exact
            for member in list(self._members.values())
        )

    def step(self) -> float:
        """Bring every figure up to date; return the processor time that it took, in seconds."""
        began = time.thread_time()
        with self._lock:
            self._step()
        return time.thread_time() - began

    def _step(self) -> None:
        if time.monotonic() - self._scanned >= RESCAN_S:
            self._rescan()
        for key, member in list(self._members.items()):
            try:
                member.step()
            except (OSError, KvmringError):  # it has ended, or changed its user
                self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        member = self._members.pop(key)
        if member.watcher is not None:
            member.watcher.close()

    def _rescan(self) -> None:
        found = scan()
        self._scanned = time.monotonic()
        self._unreadable = len(found.unreadable)
        now = {(process.pid, process.started): process for process in found.processes}
        for key in self._members.keys() - now.keys():
            self._drop(key)
        for key, process in now.items():
            member = self._members.get(key)
            if member is None:
                self._members[key] = _Member(process, self._watch(process))
            else:
                member.process = process
                if member.watcher is None:
                    member.watcher = self._watch(process)

    @staticmethod
    def _watch(process: VmProcess) -> Watcher | None:
        if not process.rings:
            return None
        try:
            return Watcher(process.pid, top=0)
        except (OSError, KvmringError):
            return None

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; prometheus_client calls it at each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            self._step()
            members = list(self._members.values())
            of_process = ["pid", "name"]
            vms = GaugeMetricFamily("kvmring_vms", "VMs of a process", labels=of_process)
            vcpus = GaugeMetricFamily("kvmring_vcpus", "vCPUs of a process", labels=of_process)
            memory = GaugeMetricFamily(
                "kvmring_memory_bytes", "Resident memory of a process", labels=of_process
            )
            exact = GaugeMetricFamily(
                "kvmring_exact",
                "1: figures from tracepoints; 0: polled, lower bounds where lapped",
                labels=of_process,
            )
            rings: list[tuple[list[str], _Totals]] = []
            for member in members:
                labels = [str(member.process.pid), member.process.name]
                vms.add_metric(labels, member.process.vms)
                vcpus.add_metric(labels, len(member.process.vcpus))
                memory.add_metric(labels, member.process.memory_bytes)
                if member.watcher is not None:
                    exact.add_metric(labels, member.watcher.exact)
                rings += [([*labels, name], totals) for name, totals in member.rings.items()]
            yield from (vms, vcpus, memory, exact)
            shown = rings[:MAX_RINGS]
            for name, about, kind in _RING_METRICS:
                family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
                metric = family(f"kvmring_ring_{name}", about, labels=[*of_process, "vcpu"])
                for labels, totals in shown:
                    if name == "full_exits" and totals.figures.full_exits is None:
                        continue  # polling does not see them
                    metric.add_metric(labels, _VALUES[name](totals))
                yield metric
            for _, totals in shown:
                totals.high_water = totals.figures.fill
            yield GaugeMetricFamily(
                "kvmring_rings_not_shown",
                f"Rings beyond the {MAX_RINGS} that have series",
                value=len(rings) - len(shown),
            )
            yield GaugeMetricFamily(
                "kvmring_unreadable_processes",
                "Processes that may not be looked into",
                value=self._unreadable,
            )
            yield CounterMetricFamily(
                "kvmring_cpu_seconds", "Processor time of this exporter", value=time.process_time()
            )


_RING_METRICS = (
    ("entries", "Size of a dirty ring", "gauge"),
    ("fill_entries", "Entries in use", "gauge"),
    ("high_water_entries", "Most entries seen in use since the last scrape", "gauge"),
    ("pushed", "Entries pushed", "counter"),
    ("reset", "Entries given back to KVM", "counter"),
    ("harvests", "Resets that gave entries back; polled: those that were seen", "counter"),
    ("full_exits", "KVM_RUN calls that ended because the ring was full", "counter"),
    ("lapped", "Polls that may have missed a round of the ring", "counter"),
)
_VALUES = {
    "entries": lambda totals: totals.figures.entries,
    "fill_entries": lambda totals: totals.figures.fill,
    "high_water_entries": lambda totals: totals.high_water,
    "pushed": lambda totals: totals.pushed,
    "reset": lambda totals: totals.reset,
    "harvests": lambda totals: totals.harvests,
    "full_exits": lambda totals: totals.full_exits,
    "lapped": lambda totals: totals.lapped,
}


def address(text: str) -> tuple[str, int]:
    """Read HOST:PORT, :PORT, PORT or [IPv6]:PORT; no host is the loopback.

    Raises:
        ValueError: It is none of these.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"--listen takes HOST:PORT, with a port up to 65535, not {text!r}")
    return host or "127.0.0.1", int(port)


def serve(listen: str, *, interval_s: float) -> NoReturn:
    """Serve until interrupted.

    Args:
        listen: As address() takes it.
        interval_s: Seconds between two looks at every VM; polled rings are looked at more
            often.

    Raises:
        KvmringError: prometheus_client is not installed.
        OSError: The address cannot be had.
    """
    host, port = address(listen)
    with extra("metrics"):
        from prometheus_client import CollectorRegistry, start_http_server
    _allow_many_descriptors()
    fleet = Fleet()
    try:
        fleet.step()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(fleet)
        server, thread = start_http_server(port, addr=host, registry=registry)
        try:
            where = f"[{host}]" if ":" in host else host
            url = f"http://{where}:{server.server_port}/metrics"
            print(f"kvmring: serving {url}", file=sys.stderr, flush=True)
            _look_after(fleet, interval_s)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
    finally:
        fleet.close()


def _look_after(fleet: Fleet, interval_s: float) -> NoReturn:
    woken = threading.Event()  # never set: its wait is one that signals can end
    while True:
        cost = fleet.step()
        gap = max(_SHORTEST_S, cost / BUDGET) if fleet.polls else interval_s
        woken.wait(min(gap, interval_s))


def _allow_many_descriptors() -> None:
    """Raise the soft limit: perf takes three descriptors for each thread of each VM."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
