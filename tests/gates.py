"""What a test needs of the machine, as marks: needs_kvm() and needs(Cap.X, ...).

The environment variable KVMRING_KVM has three states. Unset: tests that need /dev/kvm run where
it can be used, and are skipped with the reason where not. 1: a machine without it fails them.
0: they are skipped. A capability that the host's KVM lacks is a skip in every state, because
hosts differ; ask for capabilities, never for kernel versions.

    @needs_kvm()                             # any KVM
    @needs(Cap.DIRTY_LOG_RING_ACQ_REL)       # a KVM that has this, and what it implies

They work on functions, on classes, and as `pytestmark = needs(...)` of a module. Fixtures of
wider scope call gate() themselves.
"""

from __future__ import annotations

import functools
import os

import pytest

from kvmring import Cap, KvmError, System

VARIABLE = "KVMRING_KVM"


def needs_kvm() -> pytest.MarkDecorator:
    """Mark a test that needs a usable /dev/kvm."""
    return pytest.mark.kvm()


def needs(*caps: Cap) -> pytest.MarkDecorator:
    """Mark a test that needs a usable /dev/kvm with every one of these capabilities."""
    # not .kvm(*caps): a mark called with one callable argument would decorate it
    return pytest.mark.kvm.with_args(*caps)


@functools.cache
def why_no_kvm() -> str | None:
    """Return why KVM cannot be used here, in one sentence; None where it can."""
    try:
        with System() as kvm, kvm.create_vm():
            return None
    except KvmError as error:
        return str(error)


@functools.cache
def has(cap: Cap) -> bool:
    """Tell whether this KVM has a capability; call it after gate() only.

    A VM is asked, because some capabilities are the VM's.
    """
    with System() as kvm, kvm.create_vm() as vm:
        return vm.check_extension(cap) > 0


def verdict(state: str | None, reason: str | None) -> tuple[str, str]:
    """Decide what the gate does: "run", "skip" or "fail", and what it says.

    Args:
        state: The variable's value; None when it is unset.
        reason: Why KVM cannot be used; None where it can.
    """
    if state not in (None, "0", "1"):
        return "fail", f"{VARIABLE}={state}: it is unset, 0 or 1"
    if state == "0":
        return "skip", f"{VARIABLE}=0"
    if reason is None:
        return "run", ""
    if state == "1":
        return "fail", f"{VARIABLE}=1, and KVM cannot be used: {reason}"
    return "skip", f"KVM cannot be used: {reason}; {VARIABLE}=1 makes this a failure"


def gate(*caps: Cap) -> None:
    """Go on, skip or fail, as the variable and this machine's KVM say."""
    state = os.environ.get(VARIABLE)
    asks = state in (None, "1")
    what, message = verdict(state, why_no_kvm() if asks else None)
    if what == "skip":
        pytest.skip(message)
    if what == "fail":
        pytest.fail(message, pytrace=False)
    missing = [cap.name for cap in caps if not has(cap)]
    if missing:
        pytest.skip(f"this host's KVM lacks {', '.join(missing)}")


def gate_item(item: pytest.Item) -> None:
    """Apply the marks of one test, those of its class and module included."""
    marks = list(item.iter_markers("kvm"))
    if marks:
        gate(*(cap for mark in marks for cap in mark.args))
