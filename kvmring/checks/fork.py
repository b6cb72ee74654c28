"""fork.*: what a child of the process that made a VM may do with it."""

from __future__ import annotations

import errno
import os

from kvmring.abi import Cap
from kvmring.checks.raw import ioctl
from kvmring.checks.rules import Trial, rule

KVM_RESET_DIRTY_RINGS = 0xAEC7


@rule(
    "fork.reset.eio",
    "a child's KVM_RESET_DIRTY_RINGS on its parent's VM is EIO: a VM belongs to one mm",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl(): kvm->mm != current->mm",
    needs=[Cap.DIRTY_LOG_RING_ACQ_REL],
)
def reset_eio(trial: Trial) -> None:
    """Try it."""
    vm = trial.vm(ring=trial.least_entries)
    child = os.fork()
    if child == 0:
        code = 0
        try:
            ioctl(vm, KVM_RESET_DIRTY_RINGS)
        except OSError as error:
            code = error.errno or 255
        os._exit(code)
    _, status = os.waitpid(child, 0)
    trial.expect("errno in the child", os.waitstatus_to_exitcode(status), errno.EIO)
