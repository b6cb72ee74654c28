"""kvmring watch --listen: the metrics, and a real Prometheus server that scrapes them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from kvmring import Cap
from kvmring.host import metrics
from tests.gates import needs
from tests.kvm.other import Neighbour
from tests.kvm.rig import ring_facts

from .run import ENV, KVMRING, kvmring

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)
PATIENCE_S = 60


@contextlib.contextmanager
def listener(*args: str) -> Iterator[str]:
    """Run the listener on a port of the system's choice; yields its address."""
    command = [*KVMRING, "watch", "--listen", "127.0.0.1:0", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV)
    with process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            match = re.search(r"http://\S+", line)
            assert match, line + process.stderr.read()
            yield match[0]
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 130


def scrape(url: str) -> dict[tuple[str, str, str], float]:
    """Return (name, pid, vcpu) -> value."""
    request = urllib.request.Request(
        url, headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        text = answer.read().decode()
    return {
        (sample.name, sample.labels.get("pid", ""), sample.labels.get("vcpu", "")): sample.value
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


@pytest.mark.parametrize("exact", [True, False])
def test_the_figures_are_served(
    other: Neighbour, exact: bool, request: pytest.FixtureRequest
) -> None:
    if exact:
        request.getfixturevalue("tracefs")
    with listener("--interval", "0.1") as url:
        pid = str(other.pid)
        first = scrape(url)
        assert first["kvmring_vms", pid, ""] == 1
        assert first["kvmring_vcpus", pid, ""] == 2
        entries = first["kvmring_ring_entries", pid, "0"]
        before = first["kvmring_ring_pushed_total", pid, "0"]
        other.do("write", first=0, pages=100)
        now = scrape(url)
        assert now["kvmring_ring_pushed_total", pid, "0"] - before == 100
        assert now["kvmring_ring_fill_entries", pid, "0"] == 100
        assert now["kvmring_ring_entries", pid, "0"] == entries
        other.do("harvest")
        other.do("reset")
        assert scrape(url)["kvmring_ring_high_water_entries", pid, "0"] >= 100
        assert scrape(url)["kvmring_ring_reset_total", pid, "0"] == 100
        if exact:
            assert now["kvmring_exact", pid, ""] == 1
        assert now["kvmring_cpu_seconds_total", "", ""] > 0
        names = {name for name, of, _ in now if of == pid}
        other.end()
        gone = scrape(url)
    assert len(names) >= 12
    assert not any(of == pid and "_ring_" in name for name, of, _ in gone)


def test_series_are_bounded(other: Neighbour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_RINGS", 1)
    fleet = metrics.Fleet()
    try:
        families = {family.name: family for family in fleet.collect()}
    finally:
        fleet.close()
    assert len(families["kvmring_ring_entries"].samples) == 1
    (left,) = families["kvmring_rings_not_shown"].samples
    assert left.value >= 1
    for family in families.values():
        for sample in family.samples:
            assert sample.labels.keys() <= {"pid", "name", "vcpu"}


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = kvmring("watch", "--listen", f":{taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def query(base: str, what: str) -> list[dict[str, list[str]]]:
    with urllib.request.urlopen(f"{base}/api/v1/query?query={what}", timeout=PATIENCE_S) as answer:
        found: list[dict[str, list[str]]] = json.load(answer)["data"]["result"]
        return found


def test_a_real_prometheus_scrapes_it(tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    entries = ring_facts().smallest
    with (
        Neighbour({"entries": entries, "vcpus": 1, "pages": 256}) as other,
        listener("--interval", "0.2") as url,
    ):
        other.do("write", first=0, pages=50)
        target = url.removeprefix("http://").removesuffix("/metrics")
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "kvmring", "static_configs": [{"targets": [target]}]}],
        }
        path = tmp_path / "prometheus.yml"
        path.write_text(json.dumps(config))  # which is YAML too
        server = subprocess.Popen(
            [
                program,
                f"--config.file={path}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=error",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            base = f"http://127.0.0.1:{port}"
            found: list[dict[str, list[str]]] = []
            end = time.monotonic() + PATIENCE_S
            what = f'kvmring_ring_entries{{pid="{other.pid}"}}'.replace('"', "%22")
            while not found:
                assert server.poll() is None, "prometheus has ended"
                assert time.monotonic() < end
                with contextlib.suppress(urllib.error.URLError):
                    found = query(base, what.replace("{", "%7B").replace("}", "%7D"))
            assert float(found[0]["value"][1]) == entries
            (up,) = query(base, "up")
            assert up["value"][1] == "1"
        finally:
            server.terminate()
            server.wait(PATIENCE_S)
