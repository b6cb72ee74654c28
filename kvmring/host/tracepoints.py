"""KVM's three dirty-ring tracepoints, as tracefs describes them on this kernel.

Their numbers and the places of their fields are read from the format files: both differ from
kernel to kernel. tracefs is looked for where it is mounted, and never mounted from here.
"""

from __future__ import annotations

import enum
import os
import re
from pathlib import Path
from typing import NamedTuple

from kvmring.abi import lib
from kvmring.errors import KvmNotSupported
from kvmring.host.processes import mount_points

__all__ = ["EventKind", "Field", "Tracepoint", "find_tracefs", "parse", "tracepoint"]


class EventKind(enum.Enum):
    """A dirty-ring tracepoint: kvm_dirty_ring_*."""

    PUSH = "push"
    RESET = "reset"
    EXIT = "exit"

    @property
    def number(self) -> int:
        """The C code's number of it."""
        return _NUMBERS[self]


_NUMBERS = {
    EventKind.PUSH: lib.KVR_ON_PUSH,
    EventKind.RESET: lib.KVR_ON_RESET,
    EventKind.EXIT: lib.KVR_ON_EXIT,
}
# Our word -> the kernel's, of include/trace/events/kvm.h. A vCPU has another name in each.
_FIELDS = {
    EventKind.PUSH: {
        "vcpu": "index",
        "dirty": "dirty_index",
        "reset": "reset_index",
        "slot": "slot",
        "page": "offset",
    },
    EventKind.RESET: {"vcpu": "index", "dirty": "dirty_index", "reset": "reset_index"},
    EventKind.EXIT: {"vcpu": "vcpu_id"},
}
REMEDY = "as root: mount -t tracefs tracefs /sys/kernel/tracing"


class Field(NamedTuple):
    """Where a field stands in an event, in bytes."""

    offset: int
    size: int


class Tracepoint(NamedTuple):
    """One tracepoint of this kernel."""

    kind: EventKind
    id: int
    fields: dict[str, Field]


_ID = re.compile(r"^ID: (\d+)$", re.MULTILINE)
_FIELD = re.compile(r"^\tfield:[^;]*?(\w+);\toffset:(\d+);\tsize:(\d+);", re.MULTILINE)


def parse(kind: EventKind, text: str) -> Tracepoint:
    """Read a format file.

    Raises:
        KvmNotSupported: A field that is needed is not there, or not of 4 or 8 bytes.
    """
    number = _ID.search(text)
    there = {name: Field(int(at), int(size)) for name, at, size in _FIELD.findall(text)}
    wanted = _FIELDS[kind]
    missing = [name for name in wanted.values() if name not in there]
    odd = [name for name in wanted.values() if name in there and there[name].size not in (4, 8)]
    if number is None or missing or odd:
        raise KvmNotSupported(
            f"tracepoint kvm_dirty_ring_{kind.value}",
            f"this kernel's format of it is unknown here: {', '.join(missing + odd) or 'no ID'}",
        )
    return Tracepoint(kind, int(number[1]), {ours: there[name] for ours, name in wanted.items()})


def find_tracefs() -> Path:
    """Find where tracefs is mounted.

    Raises:
        KvmNotSupported: Nowhere.
    """
    for place in mount_points("tracefs"):
        return Path(place)
    for place in mount_points("debugfs"):  # which mounts it when it is looked at
        if os.path.isdir(f"{place}/tracing/events"):  # no error where it is root's
            return Path(place, "tracing")
    raise KvmNotSupported("tracefs", f"it is not mounted where it can be read; {REMEDY}")


def tracepoint(kind: EventKind, tracefs: Path) -> Tracepoint:
    """Read a tracepoint's format.

    Raises:
        KvmNotSupported: It may not be read, or KVM is not loaded or lacks it.
    """
    path = tracefs / "events" / "kvm" / f"kvm_dirty_ring_{kind.value}" / "format"
    try:
        return parse(kind, path.read_text())
    except PermissionError:
        raise KvmNotSupported("tracepoints", f"{tracefs} is root's to read") from None
    except FileNotFoundError:
        raise KvmNotSupported(
            f"tracepoint kvm_dirty_ring_{kind.value}",
            f"{tracefs} has none: Linux 5.11 brought it, and kvm must be loaded",
        ) from None
