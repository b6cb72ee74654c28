"""How a rule of the kernel becomes a check: @rule declares it, a Trial is what it is tried with.

    @rule("reset.no_ring", "KVM_RESET_DIRTY_RINGS of a VM without a ring is EINVAL",
          source="virt/kvm/kvm_main.c, kvm_vm_ioctl_reset_dirty_pages()")
    def no_ring(trial: Trial) -> None:
        trial.errno("KVM_RESET_DIRTY_RINGS", lambda: reset(trial.vm()), errno.EINVAL)

A check runs in a process of its own (run.py), which may die of it. It says what it expects before
it looks, and every expectation becomes evidence in the report.
"""

from __future__ import annotations

import errno as errnos
import os
import platform
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from kvmring.errors import KvmError
from kvmring.guests import PageWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmring.abi import Cap
    from kvmring.memory import GuestMemory
    from kvmring.system import System
    from kvmring.vm import VM

    Function = Callable[["Trial"], None]

__all__ = ["RULES", "Evidence", "Failed", "Rule", "Skipped", "Trial", "rule"]

RAM_GPA = 1 << 30


class Failed(Exception):
    """The rule does not hold; the trial's last evidence says how."""


class Skipped(Exception):
    """The rule cannot be tried here, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One expectation: what was looked at, what the rule says, what came."""

    what: str
    expected: str
    got: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of the kernel, and how it is tried.

    Attributes:
        id: Group and name, with dots.
        text: The rule in one sentence.
        source: Where the kernel says so: file and function.
        needs: Capabilities without which it is skipped.
        machine: The architecture that it is about, as uname has it; None: any.
        guest: Whether a guest runs.
        meaning: What it means to a VMM when the rule does not hold; may be empty.
        timeout_s: More than the usual time limit, where it needs it.
        function: The check itself.
    """

    id: str
    text: str
    source: str
    needs: tuple[Cap, ...] = ()
    machine: str | None = None
    guest: bool = False
    meaning: str = ""
    timeout_s: float = 0.0
    function: Function

    @property
    def group(self) -> str:
        """The part of the id before the first dot."""
        return self.id.partition(".")[0]


RULES: dict[str, Rule] = {}


def rule(
    id: str,
    text: str,
    *,
    source: str,
    needs: Iterable[Cap] = (),
    machine: str | None = None,
    guest: bool = False,
    meaning: str = "",
    timeout_s: float = 0.0,
) -> Callable[[Function], Function]:
    """Declare a check; the arguments are those of Rule."""

    def declare(function: Function) -> Function:
        if id in RULES:
            raise ValueError(f"two rules are called {id}")
        RULES[id] = Rule(
            id=id,
            text=text,
            source=source,
            needs=tuple(needs),
            machine=machine,
            guest=guest,
            meaning=meaning,
            timeout_s=timeout_s,
            function=function,
        )
        return function

    return declare


def errno_name(number: int) -> str:
    """Return an errno by its name; 0 is success."""
    return "success" if number == 0 else errnos.errorcode.get(number, f"errno {number}")


@dataclass(slots=True)
class Trial:
    """One run of one check: the device, a random generator of its own, and the evidence so far.

    What it makes is closed by the end of the process.
    """

    kvm: System
    seed: str = ""
    evidence: list[Evidence] = field(default_factory=list)
    notes: dict[str, str | int | float | bool] = field(default_factory=dict)
    random: random.Random = field(init=False)
    _vms: list[VM] = field(default_factory=list)  # open until the system is closed

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    # What is expected

    def expect(self, what: str, got: object, expected: object) -> None:
        """Expect a value; anything else ends the trial."""
        self._judge(what, repr(expected), repr(got), got == expected)

    def expect_true(self, what: str, holds: bool, *, got: object = None, rule: str = "") -> None:
        """Expect a condition that is no equality; `rule` and `got` put it into words."""
        self._judge(what, rule or "true", repr(holds if got is None else got), holds)

    def errno(self, what: str, call: Callable[[], object], *accepted: int) -> int:
        """Expect a call to fail with one of these errnos (0: to succeed); return which.

        With more than one, releases differ: the one seen is noted in the report.
        """
        seen = 0
        try:
            call()
        except OSError as error:
            seen = error.errno or 0
        names = " or ".join(errno_name(number) for number in accepted)
        self._judge(what, names, errno_name(seen), seen in accepted)
        if len(accepted) > 1:
            self.note(what, errno_name(seen))
        return seen

    def _judge(self, what: str, expected: str, got: str, holds: bool) -> None:
        self.evidence.append(Evidence(what=what, expected=expected, got=got, holds=holds))
        if not holds:
            raise Failed(f"{what}: expected {expected}, got {got}")

    def note(self, name: str, value: str | int | float | bool) -> None:
        """Put a figure or an observation into the report; it decides nothing."""
        self.notes[name] = value

    def skip(self, reason: str) -> NoReturn:
        """End the trial: it cannot be made here."""
        raise Skipped(reason)

    # What it is tried with

    @property
    def page_size(self) -> int:
        """Bytes of a page of the running kernel."""
        return os.sysconf("SC_PAGESIZE")

    @property
    def least_entries(self) -> int:
        """The smallest ring that this host takes, in entries; found by trying."""
        entries = max(self.page_size // 16, 128)
        while True:
            vm = self.kvm.create_vm()
            try:
                vm.enable_dirty_ring(entries, with_bitmap=False)
            except KvmError as error:
                if error.errno != errnos.EINVAL or entries > 1 << 16:
                    raise
                entries *= 2
            else:
                return entries
            finally:
                vm.close()

    def vm(self, *, ring: int = 0, with_bitmap: bool | None = None) -> VM:
        """Make a VM; with `ring` entries per vCPU where that is not 0."""
        vm = self.kvm.create_vm()
        self._vms.append(vm)
        if ring:
            vm.enable_dirty_ring(ring, with_bitmap=with_bitmap)
        return vm

    def ram(self, vm: VM, num_pages: int, *, gpa: int = RAM_GPA, log: bool = True) -> GuestMemory:
        """Add a memory slot that logs, of so many pages."""
        return vm.add_memory(gpa, num_pages * self.page_size, log_dirty=log)

    def writer(self, vm: VM, *, vcpus: int = 1) -> PageWriter:
        """Make the built-in guest; call it after ram()."""
        return PageWriter(self.kvm, vm, num_vcpus=vcpus)


def missing(found: Rule, kvm: System) -> str:
    """Return why a rule cannot be tried on this host; empty where it can."""
    machine = platform.machine()
    if found.machine and found.machine != machine:
        return f"it is about {found.machine}, this is {machine}"
    with kvm.create_vm() as vm:
        lacking = [cap.name for cap in found.needs if not vm.check_extension(cap)]
    if lacking:
        return "this KVM lacks " + ", ".join(f"KVM_CAP_{name}" for name in lacking)
    return ""
