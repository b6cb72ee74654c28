"""Exceptions: their tree, their text, the hint table, and what a device that is no KVM gives.

A stranger meets these first: no /dev/kvm, no permission, the wrong file. Each must be one line
that says what to do.
"""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kvmring import (
    ClosedError,
    Exit,
    ExitReason,
    ForkedError,
    GuestError,
    KvmError,
    KvmNotSupported,
    KvmringError,
    KvmUnavailable,
    RingError,
    StateError,
    System,
)
from kvmring import errors as module
from kvmring.abi import check, lib
from kvmring.errors import ANY_IOCTL, HINTS, int_between

TREE = {
    KvmringError: Exception,
    KvmError: KvmringError,
    KvmUnavailable: KvmError,
    KvmNotSupported: KvmError,
    ClosedError: KvmringError,
    ForkedError: KvmringError,
    StateError: KvmringError,
    RingError: KvmringError,
    GuestError: KvmringError,
}

EXIT = Exit(reason=ExitReason.SHUTDOWN)
EXAMPLES = [
    KvmError(errno.EINVAL, "KVM_ENABLE_CAP"),
    KvmUnavailable(errno.ENOENT, "/dev/kvm", "no such device"),
    KvmNotSupported("KVM_CAP_DIRTY_LOG_RING"),
    ClosedError("VM is closed"),
    ForkedError("f"),
    StateError("s"),
    RingError("r", vcpu=3, index=7, flags=2, slot=1, offset=99, harvested=5),
    GuestError("g", EXIT),
]


@pytest.mark.parametrize("kind", TREE)
def test_the_tree(kind: type[Exception]) -> None:
    assert kind.__bases__[0] is TREE[kind]
    assert kind.__doc__


def test_the_tree_is_whole() -> None:
    there = {
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Exception)
    }
    assert there == set(TREE)


def test_a_system_calls_failure_is_an_oserror_and_a_closed_handle_a_valueerror() -> None:
    assert issubclass(KvmError, OSError)
    assert issubclass(ClosedError, ValueError)
    assert not issubclass(StateError, ValueError | OSError)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: KvmringError) -> None:
    # as they must to leave a worker process
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)


# Text and attributes


def test_kvmerror_has_errno_ioctl_and_hint() -> None:
    error = KvmError(errno.EINVAL, "KVM_ENABLE_CAP", "a vCPU already exists")
    assert str(error) == "KVM_ENABLE_CAP: Invalid argument [EINVAL] (a vCPU already exists)"
    assert (error.errno, error.ioctl, error.hint) == (
        errno.EINVAL,
        "KVM_ENABLE_CAP",
        "a vCPU already exists",
    )
    assert error.strerror == "Invalid argument"


def test_kvmerror_without_a_hint_has_no_brackets() -> None:
    assert str(KvmError(errno.EPERM, "KVM_RUN", "")) == "KVM_RUN: Operation not permitted [EPERM]"
    assert KvmError(errno.EPERM, "KVM_RUN").hint == ""


def test_kvmerror_finds_its_hint_itself() -> None:
    error = KvmError(errno.EEXIST, "KVM_SET_USER_MEMORY_REGION")
    assert error.hint == HINTS["KVM_SET_USER_MEMORY_REGION", errno.EEXIST]
    assert str(error).endswith(f"[EEXIST] ({error.hint})")


def test_an_errno_without_a_name_is_a_number() -> None:
    assert "[524]" in str(KvmError(524, "KVM_CREATE_VM"))  # ENOTSUPP, the kernel's own


def test_notsupported_names_the_capability() -> None:
    error = KvmNotSupported("KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP")
    assert error.cap == "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP"
    assert error.errno == errno.EOPNOTSUPP
    assert str(error).startswith("KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: ")
    assert "does not offer it" in str(error)


def test_an_exit_reads_like_the_kernels_names() -> None:
    assert str(EXIT) == "KVM_EXIT_SHUTDOWN"
    assert str(Exit(reason=77)) == "KVM_EXIT_77"
    mmio = Exit(reason=ExitReason.MMIO, phys_addr=0x1000, data=b"\1", is_write=True)
    assert str(mmio) == r"KVM_EXIT_MMIO (phys_addr=0x1000, data=b'\x01')"


# The hint table


@pytest.mark.parametrize(("ioctl", "number"), HINTS)
def test_hints_are_about_real_ioctls_and_errnos(ioctl: str, number: int) -> None:
    assert isinstance(getattr(lib, ioctl), int)
    assert number in errno.errorcode
    hint = HINTS[ioctl, number]
    assert hint
    assert hint == hint.strip(" .")
    assert "\n" not in hint
    assert str(KvmError(number, ioctl)).count("(") >= 1


def test_hints_for_every_ioctl_are_about_real_errnos() -> None:
    assert {errno.EIO, errno.ENOTTY, errno.EBADF} <= set(ANY_IOCTL) <= set(errno.errorcode)


# check(): from what C returned to an exception


def test_check_lets_results_pass() -> None:
    assert [check("KVM_RUN", n) for n in (0, 1, 1 << 40)] == [0, 1, 1 << 40]


def test_check_maps_our_own_codes() -> None:
    with pytest.raises(ForkedError, match=r"^KVM_X: .*process that made it"):
        check("KVM_X", -lib.KVR_EFORKED)
    with pytest.raises(ValueError, match=r"^KVM_X: .*slot's size"):
        check("KVM_X", -lib.KVR_ESIZE)
    with pytest.raises(StateError, match=r"^KVM_X: another thread"):
        check("KVM_X", -lib.KVR_EINUSE)
    with pytest.raises(StateError, match=r"^KVM_X: .*no dirty ring; enable_dirty_ring\(\)"):
        check("KVM_X", -lib.KVR_ENORING)


def test_every_one_of_our_codes_is_mapped() -> None:
    for name in dir(lib):
        if name.startswith("KVR_E"):
            with pytest.raises((KvmringError, ValueError)) as caught:
                check("KVM_X", -getattr(lib, name))
            assert not isinstance(caught.value, KvmError), name


@pytest.mark.parametrize(
    ("ioctl", "number", "hint"),
    [
        ("KVM_RESET_DIRTY_RINGS", errno.EINVAL, HINTS["KVM_RESET_DIRTY_RINGS", errno.EINVAL]),
        ("KVM_RESET_DIRTY_RINGS", errno.EIO, ANY_IOCTL[errno.EIO]),
        ("KVM_GET_STATS_FD", errno.ENOTTY, HINTS["KVM_GET_STATS_FD", errno.ENOTTY]),
        ("KVM_RESET_DIRTY_RINGS", errno.EPERM, ""),
    ],
)
def test_check_finds_the_closest_hint(ioctl: str, number: int, hint: str) -> None:
    with pytest.raises(KvmError) as caught:
        check(ioctl, -number)
    error = caught.value
    assert (error.errno, error.ioctl, error.hint) == (number, ioctl, hint)


# int_between()


def test_int_between_takes_what_is_an_integer() -> None:
    class Index:
        def __index__(self) -> int:
            return 5

    assert int_between("n", Index(), 0, 5) == 5
    assert int_between("n", True, 0, 1) == 1
    assert (int_between("n", 0, 0, 9), int_between("n", 9, 0, 9)) == (0, 9)


@pytest.mark.parametrize("value", [-1, 10, 1 << 64, -(1 << 100)])
def test_int_between_says_the_bounds(value: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^n must lie between 0 and 9, not ({value}|{value:#x})$"
    ):
        int_between("n", value, 0, 9)


@pytest.mark.parametrize("value", [1.0, "1", None, b"1", 1j])
def test_int_between_refuses_other_types(value: object) -> None:
    with pytest.raises(TypeError, match=r"^n must be an integer, not \w+$"):
        int_between("n", value, 0, 9)


# No KVM behind the path


class Place(NamedTuple):
    path: str
    number: int
    remedy: str


@pytest.fixture(
    params=["missing", "null", "directory", "file", "fifo", "socket", "not a directory"]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    path = tmp_path / "thing"
    if request.param == "missing":
        return Place(str(path), errno.ENOENT, "load the module")
    if request.param == "null":
        return Place("/dev/null", errno.ENOTTY, "it is not KVM")
    if request.param == "directory":
        return Place(str(tmp_path), errno.ENOTTY, "it is not KVM")
    if request.param == "not a directory":
        path.touch()
        return Place(f"{path}/kvm", errno.ENOTDIR, "")
    if request.param == "socket":
        os.mknod(path, 0o140600)
        return Place(str(path), errno.ENXIO, "firmware")
    if request.param == "fifo":
        os.mkfifo(path)
    else:
        path.write_text("text")
    return Place(str(path), errno.ENOTTY, "it is not KVM")


def test_what_is_not_kvm_is_unavailable_with_a_remedy(place: Place) -> None:
    with pytest.raises(KvmUnavailable) as caught:
        System(place.path)
    error = caught.value
    assert error.errno == place.number
    assert error.ioctl == place.path
    assert place.remedy in error.hint
    assert str(error).startswith(f"{place.path}: {os.strerror(place.number)} [")
    assert "\n" not in str(error)
    assert error.__suppress_context__, "one error, not two"


NO_PERMISSION = """
import os, sys
from kvmring import KvmUnavailable, System
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    System(sys.argv[1])
except KvmUnavailable as error:
    print(error.errno, error)
"""


def test_no_permission_says_how_to_get_it(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    path.touch()
    path.chmod(0)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NO_PERMISSION, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    number, _, text = done.stdout.strip().partition(" ")
    assert int(number) == errno.EACCES
    assert text.startswith(f"{path}: Permission denied [EACCES] (no permission: join the group")
    assert done.stdout.count("\n") == 1


def test_a_path_object_is_a_path() -> None:
    for path in (Path("/dev/null"), b"/dev/null"):
        with pytest.raises(KvmUnavailable, match=r"/dev/null.*it is not KVM"):
            System(path)


@pytest.mark.parametrize(
    ("path", "error"),
    [("/dev/\0null", ValueError), (None, TypeError), (3, TypeError)],
)
def test_what_cannot_be_a_path(path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        System(path)
