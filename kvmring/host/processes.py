"""vms(): the processes that hold VMs, with their vCPUs, rings and threads.

Nothing but /proc is needed; debugfs, where it is mounted and may be read, says more about
which thread runs which vCPU. What could not be found out is None, never a guess.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmring.abi import lib
from kvmring.errors import StateError, int_between
from kvmring.host import procfs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HostVcpu", "Scan", "VmProcess", "inspect", "scan", "vms"]

# How VMMs name the threads of their vCPUs: QEMU with debug-threads=on; Firecracker, crosvm,
# Cloud Hypervisor and this package.
_THREAD_NAME = re.compile(r"^(?:CPU (\d+)/KVM|(?:fc_vcpu |crosvm_vcpu|vcpu[-_ ]?)(\d+))$")
# A thread that KVM made by copying a vCPU's: its registers show the KVM_RUN of the original.
_KERNEL_HELPER = "kvm-nx-lpage-re"
_SYSCALL_LOOKS = 3  # a thread on a processor shows nothing; a later look may


@dataclass(frozen=True, slots=True, kw_only=True)
class HostVcpu:
    """One vCPU of another process.

    Attributes:
        id: The number that KVM_CREATE_VCPU was given. Two VMs in one process may share it.
        ring_entries: Entries of its dirty ring; None: no ring is mapped.
        ring_address: Where the ring stands in that process.
        thread: The thread that runs it; None: not found.
        found_by: How: "name", "debugfs", "syscall" or "event"; None: not found.
    """

    id: int
    ring_entries: int | None = None
    ring_address: int | None = None
    thread: int | None = None
    found_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmProcess:
    """A process that holds at least one VM.

    Attributes:
        pid: Its id.
        started: When it started, in clock ticks since boot: pid and this are unique.
        name: Its command's name, cut by the kernel to 15 characters.
        uid: Its user's number; `user` is the name, or the number where there is none.
        vms: VMs that it holds; `vms_exact` is false when descriptors could not be told
            apart (kcmp(2) is missing) and duplicates may have been counted.
        vcpus: Its vCPUs, by id.
        memory_bytes: Resident memory.
        uptime_s: Seconds since it started.
    """

    pid: int
    started: int
    name: str
    user: str
    uid: int
    vms: int
    vms_exact: bool
    vcpus: tuple[HostVcpu, ...]
    memory_bytes: int
    uptime_s: float

    @property
    def rings(self) -> tuple[HostVcpu, ...]:
        """The vCPUs whose ring is mapped."""
        return tuple(vcpu for vcpu in self.vcpus if vcpu.ring_entries is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A look at the whole host.

    Attributes:
        processes: Those that hold VMs, by pid.
        unreadable: Pids of processes that may not be looked into; whether they hold VMs is
            not known.
    """

    processes: tuple[VmProcess, ...]
    unreadable: tuple[int, ...]


def vms() -> tuple[VmProcess, ...]:
    """Return the processes of this host that hold VMs and may be looked into, by pid."""
    return scan().processes


def scan() -> Scan:
    """Look at every process of this host.

    A process may be looked into by its own user and by root.
    """
    found, unreadable = [], []
    for pid in sorted(procfs.pids()):
        try:
            fds = procfs.fds_of(pid)
            if fds.vms or fds.vcpus:
                process = _describe(pid, fds)
                if process is not None:
                    found.append(process)
        except PermissionError:
            if not procfs.is_kernel_thread(pid):
                unreadable.append(pid)
    return Scan(processes=tuple(found), unreadable=tuple(unreadable))


def inspect(pid: int) -> VmProcess:
    """Look at one process.

    Raises:
        ProcessLookupError: There is none, or it has ended.
        PermissionError: It may not be looked into.
        StateError: It holds no VM.
    """
    int_between("pid", pid, 1, 1 << 22)  # PID_MAX_LIMIT
    if procfs.identity(pid) is None:
        raise ProcessLookupError(f"there is no process {pid}")
    try:
        fds = procfs.fds_of(pid)
        process = _describe(pid, fds) if fds.vms or fds.vcpus else None
    except PermissionError:
        raise PermissionError(
            f"process {pid} is another user's: run this as that user or as root"
        ) from None
    if procfs.identity(pid) is None:
        raise ProcessLookupError(f"process {pid} has ended")
    if process is None:
        raise StateError(f"process {pid} holds no VM; kvmring ps lists those that do")
    return process


def _describe(pid: int, fds: procfs.Fds) -> VmProcess | None:
    started, status = procfs.identity(pid), procfs.status_of(pid)
    if started is None or status is None:
        return None
    vm_fds, exact = _distinct(pid, fds.vms)
    vcpus = _vcpus(pid, fds)
    # a VM without a descriptor lives on in its vCPUs: as many as share an id
    least = max(Counter(vcpu.id for vcpu in vcpus).values(), default=0)
    return VmProcess(
        pid=pid,
        started=started,
        name=status.name,
        user=_user(status.uid),
        uid=status.uid,
        vms=max(len(vm_fds), least),
        vms_exact=exact,
        vcpus=vcpus,
        memory_bytes=status.memory_bytes,
        uptime_s=max(
            0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
        ),
    )


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _distinct(pid: int, fds: list[int]) -> tuple[list[int], bool]:
    """Drop descriptors that duplicate an earlier one; false: it could not be told."""
    kept: list[int] = []
    exact = True
    for fd in fds:
        for other in kept:
            same = lib.kvr_same_file(pid, other, fd)
            exact &= same >= 0
            if same == 1:
                break
        else:
            kept.append(fd)
    return kept, exact


def _vcpus(pid: int, fds: procfs.Fds) -> tuple[HostVcpu, ...]:
    mapped: dict[int, list[procfs.Mapping]] = {}
    for ring in procfs.rings_of(pid):
        mapped.setdefault(ring.vcpu, []).append(ring)
    files: dict[int, list[int]] = {}
    for fd, vcpu in fds.vcpus:
        files.setdefault(vcpu, []).append(fd)
    threads = _Threads(pid, fds)
    found = []
    for vcpu in sorted(files.keys() | mapped.keys()):
        owned, exact = _distinct(pid, files.get(vcpu, []))
        rings = mapped.get(vcpu, [])
        # more mappings than files: one ring is mapped twice, or a descriptor was closed
        number = len(owned) if exact and owned else max(len(rings), 1)
        for i in range(number):
            mapping = rings[i] if i < len(rings) else None
            thread, how = threads.of(vcpu, next(iter(owned[i:]), None), alone=number == 1)
            found.append(
                HostVcpu(
                    id=vcpu,
                    ring_entries=mapping.entries if mapping else None,
                    ring_address=mapping.address if mapping else None,
                    thread=thread,
                    found_by=how,
                )
            )
    return tuple(found)


class _Threads:
    """Finds the threads that run a process's vCPUs, the cheap ways first."""

    def __init__(self, pid: int, fds: procfs.Fds) -> None:
        self._pid = pid
        self._threads = procfs.threads_of(pid)
        self._by_name: dict[int, list[int]] = {}
        for tid, name in self._threads.items():
            match = _THREAD_NAME.match(name)
            if match:
                self._by_name.setdefault(int(match[1] or match[2]), []).append(tid)
        self._by_debugfs: dict[int, list[int]] | None = None
        self._by_syscall: dict[int, int] | None = None
        self._vcpu_fds = dict(fds.vcpus)

    def of(self, vcpu: int, fd: int | None, *, alone: bool) -> tuple[int | None, str | None]:
        """Find a vCPU's thread, and how; alone: no other vCPU of the process has this id."""
        if alone:
            named = self._by_name.get(vcpu, [])
            if len(named) == 1:
                return named[0], "name"
            told = self._debugfs().get(vcpu, [])
            if len(told) == 1:
                return told[0], "debugfs"
        for other, tid in self._syscalls().items():
            same = other == fd or (alone and self._vcpu_fds.get(other) == vcpu)
            if same or (fd is not None and lib.kvr_same_file(self._pid, other, fd) == 1):
                return tid, "syscall"
        return None, None

    def _debugfs(self) -> dict[int, list[int]]:
        if self._by_debugfs is None:
            self._by_debugfs = {}
            for vcpu, tid in _debugfs_threads():
                if tid in self._threads:
                    self._by_debugfs.setdefault(vcpu, []).append(tid)
        return self._by_debugfs

    def _syscalls(self) -> dict[int, int]:
        """Map descriptors to the threads seen inside KVM_RUN on them."""
        if self._by_syscall is None:
            self._by_syscall = {}
            for _ in range(_SYSCALL_LOOKS):
                for tid, name in self._threads.items():
                    if name.startswith(_KERNEL_HELPER):
                        continue
                    fd = procfs.vcpu_fd_in_ioctl(self._pid, tid)
                    if fd in self._vcpu_fds:
                        self._by_syscall[fd] = tid
                if len(self._by_syscall) >= len(self._vcpu_fds):
                    break
        return self._by_syscall


def _debugfs_threads() -> Iterator[tuple[int, int]]:
    """List (vCPU id, thread) of every VM of the host, where debugfs can be read.

    A VM's folder is kvm/PID-FD, made by the thread that created the VM; each vCPU's file
    `pid` holds the thread that last ran it (virt/kvm/kvm_main.c, arch/*/kvm/debugfs.c).
    """
    for root in mount_points("debugfs"):
        try:
            folders = [entry.path for entry in os.scandir(f"{root}/kvm") if "-" in entry.name]
        except OSError:
            continue  # not readable, or no VM was ever made
        for folder in folders:
            try:
                names = [name for name in os.listdir(folder) if name.startswith("vcpu")]
                for name in names:
                    text = procfs.read_text(f"{folder}/{name}/pid").strip()
                    if text.isdigit() and name[4:].isdigit():
                        yield int(name[4:]), int(text)
            except OSError:
                continue
        return


def mount_points(kind: str) -> list[str]:
    """List where a file system of a kind is mounted, in the order of mounting."""
    lines = procfs.read_text("/proc/self/mounts").splitlines()
    return [words[1] for line in lines if len(words := line.split()) > 2 and words[2] == kind]
