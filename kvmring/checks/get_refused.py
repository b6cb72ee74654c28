"""get.*: what KVM_GET_DIRTY_LOG refuses, in which order, and what it takes all the same."""

from __future__ import annotations

import errno
import struct
from functools import partial

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.bits import (
    BAD,
    KEEP,
    LOST,
    MANUAL,
    MISSING,
    Log,
    expect_pages,
    first_slot_past_the_limit,
)
from kvmring.checks.rules import Trial, rule

GET = "virt/kvm/kvm_main.c, kvm_get_dirty_log_protect()"
IOCTL = "virt/kvm/kvm_main.c, kvm_vm_ioctl(), KVM_GET_DIRTY_LOG"


@rule("get.enoent.missing", "a GET of a slot that does not exist is ENOENT", source=GET)
def enoent_missing(trial: Trial) -> None:
    """With another slot there, and after it was removed."""
    vm = trial.vm()
    ram = trial.ram(vm, 64)
    what = "KVM_GET_DIRTY_LOG of a slot that {}"
    trial.errno(what.format("never was"), lambda: raw.get_dirty_log(vm, MISSING, 64), errno.ENOENT)
    trial.errno(what.format("is there"), lambda: raw.get_dirty_log(vm, ram.slot, 64), 0)
    slot = ram.slot
    ram.remove()
    trial.errno(what.format("was deleted"), lambda: raw.get_dirty_log(vm, slot, 64), errno.ENOENT)


@rule(
    "get.enoent.log_off",
    "a GET of a slot without KVM_MEM_LOG_DIRTY_PAGES is ENOENT, also when it has been on",
    source=GET,
)
def enoent_log_off(trial: Trial) -> None:
    """Never on, on, off again."""
    vm = trial.vm()
    ram = trial.ram(vm, 64, log=False)
    for on, accepted in ((False, errno.ENOENT), (True, 0), (False, errno.ENOENT)):
        ram.set_log_dirty(on)
        what = f"KVM_GET_DIRTY_LOG with logging {'on' if on else 'off'}"
        trial.errno(what, lambda: raw.get_dirty_log(vm, ram.slot, 64), accepted)


@rule(
    "get.einval.slot_id",
    "a GET of a slot number of KVM_CAP_NR_MEMSLOTS or more is EINVAL",
    source=GET,
)
def einval_slot_id(trial: Trial) -> None:
    """The first such number, the last, and the last that is allowed."""
    vm = trial.vm()
    past = first_slot_past_the_limit(vm)
    trial.note("KVM_CAP_NR_MEMSLOTS", past)
    for slot, accepted in ((past, errno.EINVAL), (0xFFFF, errno.EINVAL), (past - 1, errno.ENOENT)):
        if slot <= 0xFFFF:
            what = f"KVM_GET_DIRTY_LOG of slot {slot}"
            trial.errno(what, partial(raw.get_dirty_log, vm, slot, 64), accepted)


@rule(
    "get.einval.as_id",
    "a GET in an address space that the VM does not have is EINVAL",
    source=GET,
)
def einval_as_id(trial: Trial) -> None:
    """The first number past them, and the last."""
    vm = trial.vm()
    trial.ram(vm, 64)
    spaces = max(vm.check_extension(Cap.MULTI_ADDRESS_SPACE), 1)
    trial.note("address spaces", spaces)
    for space in (spaces, 0xFFFF):
        what = f"KVM_GET_DIRTY_LOG in address space {space}"
        trial.errno(what, partial(raw.get_dirty_log, vm, space << 16, 64), errno.EINVAL)


@rule(
    "get.enxio.ring",
    "with a ring and no backup bitmap a GET is ENXIO, whatever the slot and the pointer",
    source=GET,
    needs=[Cap.DIRTY_LOG_RING_ACQ_REL],
)
def enxio_ring(trial: Trial) -> None:
    """A slot that logs, one that is not there, one past the limits, a bad pointer."""
    vm = trial.vm(ring=trial.least_entries, with_bitmap=False)
    ram = trial.ram(vm, 64)
    for slot in (ram.slot, MISSING, 0xFFFF, 0xFFFF << 16):
        what = f"KVM_GET_DIRTY_LOG of slot {slot:#x}"
        trial.errno(what, partial(raw.get_dirty_log, vm, slot, 64), errno.ENXIO)
    argument = struct.pack("=IIQ", ram.slot, 0, BAD)
    trial.errno(
        "KVM_GET_DIRTY_LOG into a bad pointer",
        lambda: raw.ioctl(vm, raw.KVM_GET_DIRTY_LOG, argument),
        errno.ENXIO,
    )


@rule(
    "get.efault.argument",
    "an argument that does not point to memory is EFAULT, and takes no bit",
    source=IOCTL,
    guest=True,
)
def efault_argument(trial: Trial) -> None:
    """NULL, and an address that nobody can map; the bits are there afterwards."""
    log = Log(trial)
    log.write(range(9))
    for address in (0, BAD):
        trial.errno(
            f"KVM_GET_DIRTY_LOG with argument {address:#x}",
            partial(raw.ioctl, log.vm, raw.KVM_GET_DIRTY_LOG, address),
            errno.EFAULT,
        )
    expect_pages(trial, "pages logged", log.get(), range(9))


@rule(
    "get.efault.takes_all_or_nothing",
    "without manual protect a GET into a bad pointer is EFAULT, and all the bits are gone; "
    "a kernel that keeps all of them breaks no one",
    source=f"{GET}: the bits are cleared before copy_to_user()",
    guest=True,
    meaning="a VMM that goes on after an EFAULT has part of the log; it must take the whole "
    "slot for dirty",
)
def efault_takes(trial: Trial) -> None:
    """What the GET after it finds."""
    log = Log(trial)
    log.write(range(20))
    argument = struct.pack("=IIQ", log.slot, 0, BAD)
    trial.errno(
        "KVM_GET_DIRTY_LOG into a bad pointer",
        lambda: raw.ioctl(log.vm, raw.KVM_GET_DIRTY_LOG, argument),
        errno.EFAULT,
    )
    left = log.get()
    trial.note("bits left after EFAULT", len(left))
    if left:
        expect_pages(trial, "all the bits are left", left, range(20))
    else:
        expect_pages(trial, "no bit is left", left, ())
    log.write(range(15, 25))
    expect_pages(trial, "pages written after it", log.get(), range(15, 25))


@rule(
    "get.efault.manual_keeps",
    "with manual protect a GET into a bad pointer is EFAULT, and every bit stays",
    source=GET,
    needs=[MANUAL],
    guest=True,
    meaning=LOST,
)
def efault_keeps(trial: Trial) -> None:
    """What the GET after it finds."""
    log = Log(trial, manual=KEEP)
    log.write(range(20))
    argument = struct.pack("=IIQ", log.slot, 0, BAD)
    trial.errno(
        "KVM_GET_DIRTY_LOG into a bad pointer",
        lambda: raw.ioctl(log.vm, raw.KVM_GET_DIRTY_LOG, argument),
        errno.EFAULT,
    )
    expect_pages(trial, "bits left after EFAULT", log.get(), range(20))


@rule(
    "get.order",
    "slot number, slot and log are looked at before the pointer: EINVAL and ENOENT come "
    "before EFAULT",
    source=GET,
)
def order(trial: Trial) -> None:
    """A bad pointer with each of them."""
    vm = trial.vm()
    on, off = trial.ram(vm, 64), trial.ram(vm, 64, gpa=2 << 30, log=False)
    table = {
        "past the limit": (first_slot_past_the_limit(vm), errno.EINVAL),
        "that is missing": (MISSING, errno.ENOENT),
        "that does not log": (off.slot, errno.ENOENT),
        "that logs": (on.slot, errno.EFAULT),
    }
    for name, (slot, accepted) in table.items():
        argument = struct.pack("=IIQ", slot, 0, BAD)
        trial.errno(
            f"a bad pointer and a slot {name}",
            partial(raw.ioctl, vm, raw.KVM_GET_DIRTY_LOG, argument),
            accepted,
        )
