"""clear.*: which ranges and slots KVM_CLEAR_DIRTY_LOG takes, and what it says to others."""

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

CLEAR = "virt/kvm/kvm_main.c, kvm_clear_dirty_log_protect()"


def clears(trial: Trial, log: Log, first: int, num: int, accepted: int) -> None:
    """Expect what KVM says to a range, with a bitmap of ones."""
    ones = raw.Memory(256)
    ones.map[:] = b"\xff" * 256
    trial.errno(
        f"KVM_CLEAR_DIRTY_LOG of {num:#x} pages from {first:#x}, of {log.pages}",
        lambda: log.clear_with(ones.address, first, num),
        accepted,
    )


@rule(
    "clear.einval.first_page",
    "a first_page that is no multiple of 64 is EINVAL",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
)
def einval_first_page(trial: Trial) -> None:
    """Near the words' edges; nothing is cleared."""
    log = Log(trial, 256, manual=KEEP)
    log.write([1, 64, 255])
    for first, num in ((1, 64), (63, 64), (65, 64), (32, 224), (255, 1), (1, 0)):
        clears(trial, log, first, num, errno.EINVAL)
    expect_pages(trial, "pages left", log.get(), [1, 64, 255])


@rule(
    "clear.einval.range",
    "a range that leaves the slot is EINVAL",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
)
def einval_range(trial: Trial) -> None:
    """By its start, by its end, by a word; nothing is cleared."""
    log = Log(trial, 256, manual=KEEP)
    log.write([0, 255])
    for first, num in ((0, 320), (256, 64), (192, 128), (320, 0), (320, 64), (0, 257)):
        clears(trial, log, first, num, errno.EINVAL)
    expect_pages(trial, "pages left", log.get(), [0, 255])


@rule(
    "clear.einval.wrap",
    "a range whose end wraps around is EINVAL: first_page and num_pages are compared one by one",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
)
def einval_wrap(trial: Trial) -> None:
    """The largest numbers that the struct holds."""
    log = Log(trial, 256, manual=KEEP)
    log.write([0, 255])
    largest = (1 << 64) - 64
    for first, num in ((largest, 64), (largest, 128), (1 << 63, 64), (1 << 32, 64)):
        clears(trial, log, first, num, errno.EINVAL)
    for num in (0xFFFF_FFFF, 0xFFFF_FFC0, 0x8000_0000):
        clears(trial, log, 64, num, errno.EINVAL)
    expect_pages(trial, "pages left", log.get(), [0, 255])


@rule(
    "clear.einval.tail",
    "a num_pages that is no multiple of 64 is EINVAL unless the range ends with the slot",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
)
def einval_tail(trial: Trial) -> None:
    """A slot of 100 pages; nothing is cleared."""
    log = Log(trial, 100, manual=KEEP)
    log.write([0, 99])
    for first, num in ((0, 1), (0, 63), (0, 65), (0, 99), (64, 1), (64, 35), (64, 64)):
        clears(trial, log, first, num, errno.EINVAL)
    expect_pages(trial, "pages left", log.get(), [0, 99])


@rule(
    "clear.tail",
    "a range that ends with the slot may have any length",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
)
def tail(trial: Trial) -> None:
    """Slots of 100 pages, of 64 and of 1."""
    for pages, first, num in ((100, 64, 36), (100, 0, 100), (64, 0, 64), (1, 0, 1)):
        log = Log(trial, pages, manual=KEEP)
        log.write(range(pages))
        clears(trial, log, first, num, 0)
        expect_pages(trial, "pages left", log.get(), range(first))


@rule(
    "clear.nothing",
    "a CLEAR of no pages is done, whatever the pointer, also at the end of the slot",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
)
def nothing(trial: Trial) -> None:
    """NULL; the bits stay."""
    log = Log(trial, 256, manual=KEEP)
    log.write([0, 255])
    for first in (0, 64, 256):
        trial.errno(
            f"a CLEAR of no pages from {first}, without a bitmap",
            partial(log.clear_with, 0, first, 0),
            0,
        )
    expect_pages(trial, "pages left", log.get(), [0, 255])


# What it refuses


@rule(
    "clear.efault.bitmap",
    "a bitmap that cannot be read is EFAULT, and nothing is cleared",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
    meaning=LOST,
)
def efault_bitmap(trial: Trial) -> None:
    """NULL, an address that nobody can map, and one whose second word is missing."""
    log = Log(trial, 100, manual=KEEP)
    log.write(range(100))
    for address in (0, BAD):
        trial.errno(
            f"a CLEAR with its bitmap at {address:#x}",
            partial(log.clear_with, address, 0, 100),
            errno.EFAULT,
        )
    with raw.at_edge(b"\xff" * 8) as address:
        trial.errno(
            "a CLEAR with half its bitmap", lambda: log.clear_with(address, 0, 100), errno.EFAULT
        )
    expect_pages(trial, "pages left", log.get(), range(100))


@rule(
    "clear.efault.argument",
    "an argument that does not point to memory is EFAULT",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl(), KVM_CLEAR_DIRTY_LOG",
    needs=[MANUAL],
)
def efault_argument(trial: Trial) -> None:
    """NULL, and an address that nobody can map."""
    vm = trial.vm()
    trial.ram(vm, 64)
    for address in (0, BAD):
        trial.errno(
            f"KVM_CLEAR_DIRTY_LOG with argument {address:#x}",
            partial(raw.ioctl, vm, raw.KVM_CLEAR_DIRTY_LOG, address),
            errno.EFAULT,
        )


@rule(
    "clear.enoent",
    "a CLEAR of a slot that does not exist, or does not log, is ENOENT",
    source=CLEAR,
    needs=[MANUAL],
)
def enoent(trial: Trial) -> None:
    """Missing, off, on, off again."""
    vm = trial.vm()
    ram = trial.ram(vm, 64, log=False)
    trial.errno(
        "KVM_CLEAR_DIRTY_LOG of a slot that is missing",
        lambda: raw.clear_dirty_log(vm, MISSING, 0, 64, (1 << 64) - 1),
        errno.ENOENT,
    )
    for on, accepted in ((False, errno.ENOENT), (True, 0), (False, errno.ENOENT)):
        ram.set_log_dirty(on)
        what = f"KVM_CLEAR_DIRTY_LOG with logging {'on' if on else 'off'}"
        trial.errno(what, lambda: raw.clear_dirty_log(vm, ram.slot, 0, 64, 1), accepted)


@rule(
    "clear.einval.slot",
    "a slot number of KVM_CAP_NR_MEMSLOTS or more, or an address space too many, is EINVAL",
    source=CLEAR,
    needs=[MANUAL],
)
def einval_slot(trial: Trial) -> None:
    """The first past each limit, and the last below."""
    vm = trial.vm()
    past = first_slot_past_the_limit(vm)
    spaces = max(vm.check_extension(Cap.MULTI_ADDRESS_SPACE), 1)
    table = {past: errno.EINVAL, 0xFFFF: errno.EINVAL, past - 1: errno.ENOENT}
    table |= {spaces << 16: errno.EINVAL, 0xFFFF << 16: errno.EINVAL}
    for slot, accepted in table.items():
        what = f"KVM_CLEAR_DIRTY_LOG of slot {slot:#x}"
        trial.errno(what, partial(raw.clear_dirty_log, vm, slot, 0, 64, 1), accepted)


@rule(
    "clear.enxio.ring",
    "with a ring and no backup bitmap a CLEAR is ENXIO, whatever the slot and the range",
    source=CLEAR,
    needs=[MANUAL, Cap.DIRTY_LOG_RING_ACQ_REL],
)
def enxio_ring(trial: Trial) -> None:
    """A slot that logs, missing ones, a range that is refused otherwise."""
    vm = trial.vm(ring=trial.least_entries, with_bitmap=False)
    ram = trial.ram(vm, 64)
    for slot, first in ((ram.slot, 0), (ram.slot, 3), (MISSING, 0), (0xFFFF, 0)):
        trial.errno(
            f"KVM_CLEAR_DIRTY_LOG of slot {slot:#x} from page {first}",
            partial(raw.clear_dirty_log, vm, slot, first, 64, 1),
            errno.ENXIO,
        )


@rule(
    "clear.order",
    "KVM looks at the slot number, at first_page, at the slot, at the range, at the pointer, "
    "in this order",
    source=CLEAR,
    needs=[MANUAL],
)
def order(trial: Trial) -> None:
    """Each pair of neighbours in the order wrong at once."""
    vm = trial.vm()
    on = trial.ram(vm, 256)
    table = {
        "a missing slot, misaligned": (MISSING, 3, 64, errno.EINVAL),
        "a missing slot, aligned, past the range": (MISSING, 1 << 20, 64, errno.ENOENT),
        "a range that leaves the slot, with a bad pointer": (on.slot, 256, 64, errno.EINVAL),
        "a legal range with a bad pointer": (on.slot, 0, 64, errno.EFAULT),
    }
    for name, (slot, first, num, accepted) in table.items():
        argument = struct.pack("=IIQQ", slot, num, first, BAD)
        trial.errno(name, partial(raw.ioctl, vm, raw.KVM_CLEAR_DIRTY_LOG, argument), accepted)
