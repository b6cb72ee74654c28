"""host.vms(): what is found out about another process's VMs, and what is not claimed."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest

from kvmring import Cap, StateError, host
from kvmring.host import procfs

from ..gates import needs
from .other import Neighbour

if TYPE_CHECKING:
    from .rig import RingFacts

pytestmark = needs(Cap.DIRTY_LOG_RING_ACQ_REL)


def find(pid: int) -> host.VmProcess:
    (found,) = [process for process in host.vms() if process.pid == pid]
    return found


def test_a_process_with_a_vm_is_found_and_described(facts: RingFacts) -> None:
    entries = 4 * facts.smallest
    with Neighbour({"entries": entries, "vcpus": 2, "pages": 64}) as other:
        found = find(other.pid)
        assert found.user == pwd.getpwuid(os.getuid()).pw_name
        assert found.name in os.path.realpath(sys.executable)
        assert (found.vms, found.vms_exact) == (1, True)
        assert [(vcpu.id, vcpu.ring_entries) for vcpu in found.vcpus] == [
            (0, entries),
            (1, entries),
        ]
        assert found.memory_bytes > 1 << 20
        assert 0 <= found.uptime_s < 600
        assert host.inspect(other.pid).started == found.started
    assert all(process.pid != other.pid for process in host.vms())


def test_a_vm_without_rings_has_none_mapped() -> None:
    with Neighbour({"entries": 0, "vcpus": 1, "pages": 64}) as other:
        found = host.inspect(other.pid)
        assert [vcpu.ring_entries for vcpu in found.vcpus] == [None]
        assert found.rings == ()


def test_two_vms_in_one_process(facts: RingFacts) -> None:
    small, large = facts.smallest, 2 * facts.smallest
    with Neighbour(
        {"entries": small, "vcpus": 2, "pages": 64}, {"entries": large, "vcpus": 1, "pages": 64}
    ) as other:
        found = host.inspect(other.pid)
        assert found.vms == 2
        sizes = sorted((vcpu.id, vcpu.ring_entries or 0) for vcpu in found.vcpus)
        assert sizes == [(0, small), (0, large), (1, small)]


def test_duplicated_descriptors_are_counted_once(facts: RingFacts) -> None:
    with Neighbour({"entries": facts.smallest, "vcpus": 1, "pages": 64}) as other:
        other.do("dup")
        other.do("dup")
        assert len(procfs.fds_of(other.pid).vms) == 3
        found = host.inspect(other.pid)
        assert found.vms == 1
        assert len(found.vcpus) == 1


def test_a_thread_is_found_by_its_name(facts: RingFacts) -> None:
    with Neighbour({"entries": facts.smallest, "vcpus": 2, "pages": 4096}) as other:
        other.flow(seconds=3.0, pages=4096, every_s=0.01, name="CPU {}/KVM")
        other.go()
        named: list[host.HostVcpu] = []
        while len(named) < 2 and other.busy:
            named = [v for v in host.inspect(other.pid).vcpus if v.found_by == "name"]
        other.done()
    assert len({vcpu.thread for vcpu in named}) == 2


def test_a_thread_that_cannot_be_found_is_not_guessed(facts: RingFacts) -> None:
    with Neighbour({"entries": facts.smallest, "vcpus": 1, "pages": 64}) as other:
        (vcpu,) = host.inspect(other.pid).vcpus  # that no thread runs
        assert (vcpu.thread, vcpu.found_by) == (None, None)


def test_no_such_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(ProcessLookupError, match=f"no process {child.pid}"):
        host.inspect(child.pid)
    with pytest.raises(ValueError, match="pid must lie between"):
        host.inspect(0)


def test_a_process_without_vms() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            with pytest.raises(StateError, match="holds no VM"):
                host.inspect(child.pid)
        finally:
            child.kill()


def test_a_zombie_is_no_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()
    end = time.monotonic() + 30
    while procfs.stat_fields(child.pid)[0] != "Z":
        assert time.monotonic() < end
    with pytest.raises(ProcessLookupError):
        host.inspect(child.pid)
    assert child.pid not in {process.pid for process in host.vms()}
    child.wait()
    child.stdout.close()


AS_NOBODY = textwrap.dedent("""
    import os, sys
    from kvmring.host import RingObserver, inspect, scan, vms
    pid = int(sys.argv[1])
    (process,) = [p for p in vms() if p.pid == pid]  # as root
    os.setgid(65534), os.setuid(65534)
    for call in (
        lambda: inspect(pid),
        lambda: RingObserver(pid, process.vcpus[0]).poll(),
    ):
        try:
            call()
        except PermissionError as error:
            print(error)
    found = scan()
    print(pid in found.unreadable, [p for p in found.processes if p.pid == pid])
""")


def test_another_users_process_is_refused_in_words(facts: RingFacts) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    with Neighbour({"entries": facts.smallest, "vcpus": 1, "pages": 64}) as other:
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(other.pid)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    inspect, poll, listed = done.stdout.splitlines()
    assert "another user's" in inspect
    assert "may not be read" in poll
    assert listed == "True []"


def test_processes_that_come_and_go_while_they_are_read() -> None:
    churn = "import subprocess\nwhile True: subprocess.run(['true'])"
    with subprocess.Popen([sys.executable, "-c", churn]) as child:
        try:
            for _ in range(50):
                host.scan()
        finally:
            child.kill()
