"""fork.*: what a child of the process that made a VM may do with it, and what it can break.

A VM belongs to the memory (mm) of the process that made it. Its file descriptors are inherited,
and so are mappings of its rings; fork_share.py has what follows from those.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import socket
import struct
import sys
import threading
from functools import partial

from kvmring.abi import Cap, DeviceType
from kvmring.checks import raw
from kvmring.checks.raw import LOG, Memory, enable_cap, in_child, ioctl, set_region
from kvmring.checks.rules import RAM_GPA, Trial, rule
from kvmring.system import System

VM_IOCTL = "virt/kvm/kvm_main.c, kvm_vm_ioctl(): kvm->mm != current->mm"
VCPU_IOCTL = "virt/kvm/kvm_main.c, kvm_vcpu_ioctl(): vcpu->kvm->mm != current->mm"
ACQ_REL = Cap.DIRTY_LOG_RING_ACQ_REL
MANUAL = Cap.MANUAL_DIRTY_LOG_PROTECT2
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_HAS_DEVICE_ATTR = 0x4018AEE3
UNKNOWN = 0xAEFE  # a request that nobody has given out
PAGES = 100
ALL = (1 << PAGES) - 1


@rule(
    "fork.reset.eio",
    "a child's KVM_RESET_DIRTY_RINGS on its parent's VM is EIO, also when the VM has no ring, "
    "which would be EINVAL: a VM belongs to one mm",
    source=VM_IOCTL,
    needs=[ACQ_REL],
)
def reset_eio(trial: Trial) -> None:
    """Try it with a ring and without."""
    for what, vm in (("a ring", trial.vm(ring=trial.least_entries)), ("no ring", trial.vm())):
        reset = partial(ioctl, vm, raw.KVM_RESET_DIRTY_RINGS)
        trial.expect(f"a child's reset with {what}", in_child(reset), "EIO")


@rule(
    "fork.reset.takes_nothing",
    "a child's KVM_RESET_DIRTY_RINGS that is EIO resets nothing: the parent's still counts every "
    "harvested entry",
    source=VM_IOCTL,
    needs=[ACQ_REL],
    guest=True,
)
def reset_takes_nothing(trial: Trial) -> None:
    """Harvest, let a child try, reset."""
    entries = trial.least_entries
    vm = trial.vm(ring=entries)
    ram = trial.ram(vm, PAGES)
    guest = trial.writer(vm)
    guest.load(0, [ram.gpa + n * trial.page_size for n in range(PAGES)])
    trial.expect("whether the guest is done", guest.is_done(guest.run(0)), True)
    ring = raw.map_vcpu(guest.vcpus[0], entries * 16)
    for index in range(PAGES):
        struct.pack_into("=I", ring, 16 * index, 2)
    reset = partial(ioctl, vm, raw.KVM_RESET_DIRTY_RINGS)
    trial.expect("a child's reset", in_child(reset), "EIO")
    flags = {entry.flags for entry in raw.entries(ring, 0, PAGES)}
    trial.expect("flags of the harvested entries", flags, {2})
    trial.expect("entries that the parent resets", reset(), PAGES)
    ring.close()


@rule(
    "fork.get_clear.eio",
    "a child's KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG are EIO, and the bitmap is left as it is",
    source=VM_IOCTL,
    needs=[MANUAL],
)
def get_clear_eio(trial: Trial) -> None:
    """Try both on a bitmap of ones."""
    if trial.kvm.check_extension(MANUAL) != 3:
        trial.skip("this KVM has no KVM_DIRTY_LOG_INITIALLY_SET")
    vm, memory = trial.vm(), Memory(PAGES * trial.page_size)
    enable_cap(vm, MANUAL, 3)
    set_region(vm, 0, RAM_GPA, memory.num_bytes, memory.address, LOG)
    clear = partial(raw.clear_dirty_log, vm, 0, 0, PAGES, ALL)
    trial.expect("a child's CLEAR", in_child(clear), "EIO")
    enable_cap(vm, MANUAL, 0)  # a GET clears from here on
    get = partial(raw.get_dirty_log, vm, 0, PAGES)
    trial.expect("a child's GET", in_child(get), "EIO")
    trial.expect("the parent's GET", get(), ALL)
    trial.expect("the parent's next GET", get(), 0)


@rule(
    "fork.get.order",
    "EIO comes before every other error of KVM_GET_DIRTY_LOG: a bad pointer, ENXIO, EINVAL, ENOENT",
    source=VM_IOCTL,
    needs=[ACQ_REL],
)
def get_order(trial: Trial) -> None:
    """Compare what parent and child are told."""
    ring, plain = trial.vm(), trial.vm()
    enable_cap(ring, ACQ_REL, trial.least_entries * 16)
    for what, call, answer in (
        ("a bad pointer", partial(ioctl, plain, raw.KVM_GET_DIRTY_LOG, 8), errno.EFAULT),
        ("a ring without bitmap", partial(raw.get_dirty_log, ring, 0, 1), errno.ENXIO),
        ("a slot number past all", partial(raw.get_dirty_log, plain, 65535, 1), errno.EINVAL),
        ("a missing slot", partial(raw.get_dirty_log, plain, 0, 1), errno.ENOENT),
    ):
        trial.errno(f"{what}, in the parent", call, answer)
        trial.expect(f"{what}, in a child", in_child(call), "EIO")


@rule(
    "fork.memslot.eio",
    "a child can neither make, change nor delete a slot of its parent's VM: EIO",
    source=VM_IOCTL,
)
def memslot_eio(trial: Trial) -> None:
    """Try each, and look at the slot."""
    vm, memory = trial.vm(), Memory(PAGES * trial.page_size)
    add = partial(set_region, vm, 0, RAM_GPA, memory.num_bytes, memory.address)
    trial.expect("a child's slot", in_child(partial(add, LOG)), "EIO")
    trial.errno("KVM_GET_DIRTY_LOG", lambda: raw.get_dirty_log(vm, 0, PAGES), errno.ENOENT)
    add(LOG)
    trial.expect("turning logging off in a child", in_child(partial(add, 0)), "EIO")
    delete = partial(set_region, vm, 0, RAM_GPA, 0, memory.address)
    trial.expect("deletion in a child", in_child(delete), "EIO")
    trial.expect("dirty pages of the slot", raw.get_dirty_log(vm, 0, PAGES), 0)


@rule(
    "fork.enable_cap.eio",
    "a child's KVM_ENABLE_CAP is EIO and enables nothing",
    source=VM_IOCTL,
    needs=[ACQ_REL],
)
def enable_cap_eio(trial: Trial) -> None:
    """Try a ring, then enable it here."""
    vm = trial.vm()
    ring = partial(enable_cap, vm, ACQ_REL, trial.least_entries * 16)
    trial.expect("a child's ring", in_child(ring), "EIO")
    reset = partial(ioctl, vm, raw.KVM_RESET_DIRTY_RINGS)
    trial.errno("KVM_RESET_DIRTY_RINGS without a ring", reset, errno.EINVAL)
    trial.errno("the parent's ring", ring, 0)


@rule(
    "fork.vm.eio",
    "every request on the VM's fd is EIO in a child, also KVM_CHECK_EXTENSION, KVM_CREATE_VCPU and "
    "one that the kernel does not know",
    source=VM_IOCTL,
)
def vm_eio(trial: Trial) -> None:
    """Make them in the child, then here."""
    vm = trial.vm()
    unknown = errno.EINVAL if platform.machine() == "aarch64" else errno.ENOTTY
    for what, request, argument, answer in (
        ("KVM_CHECK_EXTENSION", raw.KVM_CHECK_EXTENSION, int(MANUAL), 0),
        ("KVM_CREATE_VCPU", raw.KVM_CREATE_VCPU, 0, 0),
        (f"request {UNKNOWN:#x}", UNKNOWN, 0, unknown),
    ):
        call = partial(ioctl, vm, request, argument)
        trial.expect(f"{what} in a child", in_child(call), "EIO")
        trial.errno(f"{what} in the parent", call, answer)


@rule(
    "fork.vcpu.eio",
    "every request on a vCPU's fd is EIO in a child, KVM_RUN first of all",
    source=VCPU_IOCTL,
)
def vcpu_eio(trial: Trial) -> None:
    """Make them in the child, then here."""
    vcpu = trial.vm().create_vcpu()
    for what, request, argument in (
        ("KVM_RUN with an argument", raw.KVM_RUN, 1),
        (f"request {UNKNOWN:#x}", UNKNOWN, 0),
    ):
        call = partial(ioctl, vcpu, request, argument)
        trial.expect(f"{what} in a child", in_child(call), "EIO")
        trial.errno(f"{what} in the parent", call, errno.EINVAL)
    trial.expect("KVM_RUN in a child", in_child(partial(ioctl, vcpu, raw.KVM_RUN)), "EIO")


@rule(
    "fork.device.eio",
    "requests on a device's fd are EIO in a child",
    source="virt/kvm/kvm_main.c, kvm_device_ioctl(): dev->kvm->mm != current->mm",
    needs=[Cap.DEVICE_CTRL],
)
def device_eio(trial: Trial) -> None:
    """Ask a device for an attribute that it does not have."""
    vm = trial.vm()
    kinds = (DeviceType.ARM_VGIC_V3, DeviceType.ARM_VGIC_V2, DeviceType.VFIO)
    kind = next((kind for kind in kinds if vm.has_device(kind)), None)
    if kind is None:
        trial.skip("this KVM has no device that can be made everywhere")
    trial.note("device", kind.name)
    device = vm.create_device(kind)
    ask = partial(ioctl, device, KVM_HAS_DEVICE_ATTR, struct.pack("=IIQQ", 0, 0xFFFF, 77, 0))
    trial.expect("KVM_HAS_DEVICE_ATTR in a child", in_child(ask), "EIO")
    trial.errno("KVM_HAS_DEVICE_ATTR in the parent", ask, errno.ENXIO)


@rule(
    "fork.system",
    "/dev/kvm itself works in a child, through the inherited fd too: VMs that it makes are its own",
    source="virt/kvm/kvm_main.c, kvm_dev_ioctl(): no mm",
    needs=[ACQ_REL],
)
def system(trial: Trial) -> None:
    """Make a VM with a ring in a child, by both ways."""
    fd, size = trial.kvm.fileno(), trial.least_entries * 16

    def inherited() -> None:
        if ioctl(fd, KVM_GET_API_VERSION) != 12:
            raise OSError(errno.EPROTO, "not API version 12")
        vm = ioctl(fd, KVM_CREATE_VM)
        enable_cap(vm, ACQ_REL, size)
        ioctl(vm, raw.KVM_RESET_DIRTY_RINGS)

    def opened() -> None:
        with System(trial.kvm.path) as kvm, kvm.create_vm() as vm:
            enable_cap(vm, ACQ_REL, size)
            ioctl(vm, raw.KVM_RESET_DIRTY_RINGS)

    trial.expect("a VM by the inherited /dev/kvm", in_child(inherited), "success")
    trial.expect("a VM by /dev/kvm opened anew", in_child(opened), "success")


@rule(
    "fork.passed_back",
    "a VM that a child made and passed to its parent is EIO there: it belongs to the child",
    source=VM_IOCTL,
    meaning="A VMM cannot have its VM made by a helper, nor hand it to a new process.",
)
def passed_back(trial: Trial) -> None:
    """Have a child make a VM and send it."""
    ours, theirs = socket.socketpair()
    kvm = trial.kvm.fileno()

    def send() -> None:
        vm = ioctl(kvm, KVM_CREATE_VM)
        ioctl(vm, raw.KVM_CHECK_EXTENSION, int(MANUAL))
        socket.send_fds(theirs, [b"vm"], [vm])

    trial.expect("a child with its own VM", in_child(send), "success")
    _, fds, _, _ = socket.recv_fds(ours, 16, 1)
    trial.expect("fds received", len(fds), 1)
    trial.errno(
        "KVM_CHECK_EXTENSION on the child's VM",
        lambda: ioctl(fds[0], raw.KVM_CHECK_EXTENSION, int(MANUAL)),
        errno.EIO,
    )
    os.close(fds[0])
    ours.close()
    theirs.close()


# Runs in a new program, which has the fd's number as its argument.
PROGRAM = """
import fcntl, os, sys
try:
    fcntl.ioctl(int(sys.argv[1]), 0xAE03, 168)
except OSError as error:
    os._exit(error.errno)
os._exit(0)
"""


@rule(
    "fork.exec.eio",
    "a process that made a VM and calls execve() has lost it: the fd is inherited and answers EIO, "
    "since the new program has another mm",
    source=VM_IOCTL,
    meaning="A VMM cannot update itself by execve() and keep its VM.",
)
def exec_eio(trial: Trial) -> None:
    """Make a VM in a child, use it, then become another program."""
    path = trial.kvm.path

    def become() -> None:
        fd = os.open(path, os.O_RDWR)
        vm = ioctl(fd, KVM_CREATE_VM)
        ioctl(vm, raw.KVM_CHECK_EXTENSION, int(MANUAL))
        fcntl.fcntl(vm, fcntl.F_SETFD, 0)  # without FD_CLOEXEC
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", PROGRAM, str(vm)])

    trial.expect("KVM_CHECK_EXTENSION after execve()", in_child(become), "EIO")


@rule(
    "fork.thread",
    "threads of the process share its VM: their requests succeed",
    source=VM_IOCTL,
    needs=[ACQ_REL],
)
def thread(trial: Trial) -> None:
    """Make requests from another thread."""
    vm, memory = trial.vm(), Memory(PAGES * trial.page_size)
    done: list[str] = []

    def work() -> None:
        try:
            enable_cap(vm, ACQ_REL, trial.least_entries * 16)
            set_region(vm, 0, RAM_GPA, memory.num_bytes, memory.address, LOG)
            done.append(f"{ioctl(vm, raw.KVM_RESET_DIRTY_RINGS)} entries")
        except OSError as error:
            done.append(errno.errorcode.get(error.errno or 0, "?"))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    trial.expect("a ring, a slot and a reset by a thread", done, ["0 entries"])
