"""get.*: KVM_GET_DIRTY_LOG, what it answers, what it takes, and which pages it names."""

from __future__ import annotations

import errno
import struct
from functools import partial

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.bits import (
    KEEP,
    LOST,
    MANUAL,
    MISSING,
    Log,
    expect_pages,
    pages_of,
    written_for_ever,
)
from kvmring.checks.rules import Trial, rule

GET = "virt/kvm/kvm_main.c, kvm_get_dirty_log_protect()"
IOCTL = "virt/kvm/kvm_main.c, kvm_vm_ioctl(), KVM_GET_DIRTY_LOG"


@rule(
    "get.exact",
    "the bitmap names exactly the pages that the guest wrote, the slot's last one included",
    source="virt/kvm/kvm_main.c, mark_page_dirty_in_slot()",
    guest=True,
    meaning=f"{LOST}; do not migrate on this kernel with the dirty log",
)
def exact(trial: Trial) -> None:
    """Three times, of a slot that is no multiple of 64 pages."""
    log = Log(trial, 331)
    for count in (1, 40, 331):
        written = log.some(count)
        log.write(written)
        expect_pages(trial, f"pages logged after {count} were written", log.get(), written)


@rule(
    "get.takes",
    "without manual protect a GET clears the bits that it returns",
    source=GET,
    guest=True,
    meaning="every round of a migration copies again what it copied before",
)
def takes(trial: Trial) -> None:
    """A second GET must have nothing."""
    log = Log(trial)
    log.write(range(10, 90))
    expect_pages(trial, "the first GET", log.get(), range(10, 90))
    expect_pages(trial, "the second GET", log.get(), ())


@rule(
    "get.relogs",
    "without manual protect a GET write-protects what it returns: the next write is logged",
    source=f"{GET}: kvm_arch_mmu_enable_log_dirty_pt_masked()",
    guest=True,
    meaning=LOST,
)
def relogs(trial: Trial) -> None:
    """The same pages three times, others in between."""
    log = Log(trial)
    log.write(range(100))
    log.get()
    for pages in (range(100), log.some(30), log.some(7)):
        log.write(pages)
        expect_pages(trial, "what was written after a GET", log.get(), pages)


@rule(
    "get.once",
    "a page that is written many times between two GETs is one bit",
    source="virt/kvm/kvm_main.c, mark_page_dirty_in_slot()",
    guest=True,
)
def once(trial: Trial) -> None:
    """Two vCPUs write overlapping halves, twice."""
    log = Log(trial, vcpus=2)
    for _ in range(2):
        log.write(range(60), vcpu=0)
        log.write(range(40, 100, 2), vcpu=1)
    expect_pages(trial, "pages logged", log.get(), {*range(60), *range(60, 100, 2)})


@rule(
    "get.one_slot",
    "a GET takes the bits of its slot and of no other",
    source=GET,
    guest=True,
    meaning=LOST,
)
def one_slot(trial: Trial) -> None:
    """Two slots that log, both written, fetched one after the other."""
    vm = trial.vm()
    first = trial.ram(vm, 70)
    second = trial.ram(vm, 70, gpa=first.gpa + 128 * trial.page_size)
    guest = trial.writer(vm)
    page = trial.page_size
    guest.load(0, [*(first.gpa + n * page for n in range(5)), *(second.gpa + 69 * page,)])
    trial.expect("the guest is done", guest.is_done(guest.run(0)), True)
    for memory, expected in ((first, range(5)), (second, [69]), (first, ()), (second, ())):
        logged = pages_of(raw.get_dirty_log(vm, memory.slot, 70))
        expect_pages(trial, f"pages of slot {memory.slot}", logged, expected)


@rule(
    "get.host_writes",
    "what the VMM writes into guest memory itself is in no log",
    source="virt/kvm/kvm_main.c, mark_page_dirty_in_slot(): called for writes by KVM alone",
    guest=True,
)
def host_writes(trial: Trial) -> None:
    """The VMM writes fifty pages, the guest one."""
    log = Log(trial)
    log.ram.write(0, b"written" * (50 * trial.page_size // 7))
    log.write([60])
    log.ram.write(70 * trial.page_size, b"x")
    expect_pages(trial, "pages logged", log.get(), [60])


@rule(
    "get.running",
    "a GET while a vCPU runs has every page whose write was done before the call; with PML, "
    "before the vCPU last left the guest",
    source="virt/kvm/kvm_main.c, kvm_get_dirty_log_protect(); arch/x86/kvm/x86.c, "
    "kvm_arch_sync_dirty_log(): kicks the vCPUs, does not wait for them",
    guest=True,
    meaning=f"{LOST}; stop the vCPUs before each GET",
)
def running(trial: Trial) -> None:
    """The guest writes round after round; each GET comes after a whole round."""
    log = Log(trial, 100)
    pages = log.some(60)
    with written_for_ever(trial, log.guest, log.ram, pages) as rounds:
        for number in range(5):
            if number:
                rounds.wait()
            expect_pages(trial, "pages of a vCPU that runs", log.get(), pages)


# The buffer


@rule(
    "get.length",
    "KVM writes one bit per page, rounded up to whole 64-bit words, and not a byte more",
    source="include/linux/kvm_host.h, kvm_dirty_bitmap_bytes()",
    guest=True,
)
def length(trial: Trial) -> None:
    """Into a buffer that ends where mapped memory ends, and into one of filled memory."""
    for pages in (1, 64, 65, 100, 128):
        log = Log(trial, pages, manual=KEEP if trial.kvm.check_extension(MANUAL) else 0)
        log.write([pages - 1])
        size = (pages + 63) // 64 * 8
        with raw.at_edge(bytes(size)) as address:
            argument = struct.pack("=IIQ", log.slot, 0, address)
            what = f"a GET of {pages} pages with room for {size} bytes"
            trial.errno(what, partial(raw.ioctl, log.vm, raw.KVM_GET_DIRTY_LOG, argument), 0)
        log.write([pages - 1])
        memory = raw.Memory(size + 64)
        memory.map[:] = b"\xa5" * memory.num_bytes
        argument = struct.pack("=IIQ", log.slot, 0, memory.address)
        raw.ioctl(log.vm, raw.KVM_GET_DIRTY_LOG, argument)
        left = memory.map[size:] == b"\xa5" * 64
        trial.expect(f"bytes past {size} left alone", left, True)
        trial.expect(f"bitmap of {pages} pages", memory.map[size - 8 : size].hex(), last(pages))


def last(pages: int) -> str:
    """Return the last word of a bitmap, in memory, that has the slot's last page alone."""
    return (1 << (pages - 1) % 64).to_bytes(8, "little").hex()


@rule(
    "get.overwrites",
    "a GET overwrites the buffer: bits that stood in it before do not stay",
    source=f"{GET}: copy_to_user()",
    guest=True,
)
def overwrites(trial: Trial) -> None:
    """Into a buffer of ones."""
    log = Log(trial, 128)
    log.write([3, 127])
    memory = raw.Memory(16)
    memory.map[:] = b"\xff" * 16
    argument = struct.pack("=IIQ", log.slot, 0, memory.address)
    raw.ioctl(log.vm, raw.KVM_GET_DIRTY_LOG, argument)
    got = pages_of(int.from_bytes(memory.map[:], "little"))
    expect_pages(trial, "bits after a GET into a buffer of ones", got, [3, 127])


@rule(
    "get.padding",
    "the padding in struct kvm_dirty_log is not looked at",
    source=IOCTL,
    guest=True,
)
def padding(trial: Trial) -> None:
    """Ones in it."""
    log = Log(trial)
    log.write([5])
    got: list[int] = []

    def get() -> None:
        got.append(raw.get_dirty_log(log.vm, log.slot, 100, padding=0xFFFF_FFFF))

    trial.errno("KVM_GET_DIRTY_LOG with padding of ones", get, 0)
    expect_pages(trial, "pages logged", pages_of(got[0]), [5])


@rule(
    "get.address_spaces",
    "each address space has bitmaps of its own: a page that two of them show is logged in the "
    "one through which it was written",
    source="virt/kvm/kvm_main.c, mark_page_dirty_in_slot()",
    needs=[Cap.MULTI_ADDRESS_SPACE],
    guest=True,
    meaning="a VMM must ask for the slots of every address space, and merge them by address",
)
def address_spaces(trial: Trial) -> None:
    """The same memory in both; the guest is not in SMM, so it writes through the first."""
    spaces = trial.kvm.check_extension(Cap.MULTI_ADDRESS_SPACE)
    if spaces < 2:
        trial.skip("this VM has one address space")
    log = Log(trial)
    other = log.vm.add_memory(log.ram.gpa, backing=log.ram, as_id=1, log_dirty=True)
    log.write(range(30, 40))
    logged = pages_of(raw.get_dirty_log(log.vm, other.slot, 100))
    expect_pages(trial, "pages logged in address space 1", logged, ())
    expect_pages(trial, "pages logged in address space 0", log.get(), range(30, 40))
    missing = 1 << 16 | MISSING
    trial.errno(
        "a missing slot of address space 1",
        lambda: raw.get_dirty_log(log.vm, missing, 64),
        errno.ENOENT,
    )
