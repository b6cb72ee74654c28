"""What /proc says about one process: its KVM descriptors, its rings, its threads.

The functions answer "nothing" for a process that ends while it is read, and raise
PermissionError for one that may not be looked into. They read; they open nothing for longer.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from typing import NamedTuple

from kvmring.abi import PAGE_SIZE, lib, uninitialised

__all__ = [
    "Fds",
    "Mapping",
    "fds_of",
    "identity",
    "is_kernel_thread",
    "pids",
    "read_text",
    "rings_of",
    "status_of",
    "threads_of",
    "vcpu_fd_in_ioctl",
]

VCPU_LINK = "anon_inode:kvm-vcpu:"
RING_OFFSET = lib.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
ENTRY_BYTES = 16
PF_KTHREAD = 0x00200000  # include/linux/sched.h
GONE = (FileNotFoundError, ProcessLookupError, NotADirectoryError)


class Fds(NamedTuple):
    """A process's KVM descriptors: those of VMs, and those of vCPUs with the vCPU's id."""

    vms: list[int]
    vcpus: list[tuple[int, int]]  # (descriptor, vCPU id)


class Mapping(NamedTuple):
    """A dirty ring's mapping: vCPU id, address in that process, entries."""

    vcpu: int
    address: int
    entries: int


def pids() -> list[int]:
    """List the host's processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_text(path: str) -> str:
    """Read a file of /proc; empty when what it speaks of is gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except GONE:
        return ""


def fds_of(pid: int) -> Fds:
    """Find a process's KVM descriptors.

    The link of each descriptor is read: it is the cheapest test that misses no VM. A VM
    need not have a vCPU yet, and reading a large process's maps costs more.

    Raises:
        PermissionError: It is another user's.
    """
    room = uninitialised("struct kvr_kvm_fd[]", 64)  # enough for most
    n = lib.kvr_kvm_fds(pid, room, len(room))
    while n > len(room):
        room = uninitialised("struct kvr_kvm_fd[]", 2 * n)
        n = lib.kvr_kvm_fds(pid, room, len(room))
    found = Fds([], [])
    if -n in (errno.EACCES, errno.EPERM):
        raise PermissionError(-n, f"/proc/{pid}/fd may not be read")
    for fd in room[0 : max(n, 0)]:  # a process that is gone has none
        if fd.is_vm:
            found.vms.append(fd.number)
        else:
            found.vcpus.append((fd.number, fd.vcpu))
    return found


_RING = re.compile(
    rf"^([0-9a-f]+)-([0-9a-f]+) \S+ {RING_OFFSET:08x} .* {VCPU_LINK}([0-9]+)", re.MULTILINE
)


def rings_of(pid: int) -> list[Mapping]:
    """Find the dirty rings that a process has mapped, by address.

    A ring is mapped at the vCPU's file offset of KVM_DIRTY_LOG_PAGE_OFFSET pages
    (Documentation/virt/kvm/api.rst, 8.29).
    """
    found = []
    for start, end, vcpu in _RING.findall(read_text(f"/proc/{pid}/maps")):
        first = int(start, 16)
        found.append(Mapping(int(vcpu), first, (int(end, 16) - first) // ENTRY_BYTES))
    return found


def stat_fields(pid: int | str) -> list[str]:
    """Return /proc/PID/stat from its third field on; the second may hold anything."""
    return read_text(f"/proc/{pid}/stat").rpartition(") ")[2].split()


def identity(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; with the pid it is unique.

    None when there is no such process, or when it is dead and not waited for.
    """
    fields = stat_fields(pid)
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else None


def is_kernel_thread(pid: int) -> bool:
    """Tell whether a process is a kernel thread, which holds no VM; also when it is gone."""
    fields = stat_fields(pid)
    return len(fields) < 7 or bool(int(fields[6]) & PF_KTHREAD)


class Status(NamedTuple):
    """From /proc/PID/status: the command's name, the real uid, resident memory in bytes."""

    name: str
    uid: int
    memory_bytes: int


def status_of(pid: int) -> Status | None:
    """Read a process's status; None when it is gone."""
    found = dict(
        line.split(":\t", 1)
        for line in read_text(f"/proc/{pid}/status").splitlines()
        if ":\t" in line
    )
    if "Uid" not in found:
        return None
    # a zombie has no memory, and no line about it
    resident = int(found.get("VmRSS", "0").split()[0]) * 1024
    return Status(found["Name"], int(found["Uid"].split()[0]), resident)


def threads_of(pid: int) -> dict[int, str]:
    """Map a process's thread ids to their names."""
    found = {}
    with suppress(*GONE):
        for name in os.listdir(f"/proc/{pid}/task"):
            found[int(name)] = read_text(f"/proc/{pid}/task/{name}/comm").rstrip("\n")
    return found


def vcpu_fd_in_ioctl(pid: int, tid: int) -> int | None:
    """Return the descriptor on which a thread is inside KVM_RUN; None when nothing is seen.

    A thread that is on a processor at this moment shows nothing.
    """
    try:
        words = read_text(f"/proc/{pid}/task/{tid}/syscall").split()
    except PermissionError:
        return None
    # number, arguments...; which number ioctl has is the architecture's, its request is not
    if len(words) > 3 and words[2] == hex(lib.KVM_RUN):
        return int(words[1], 16)
    return None
