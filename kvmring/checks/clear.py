"""clear.*: what KVM_CLEAR_DIRTY_LOG clears, and what it protects."""

from __future__ import annotations

from functools import partial

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.bits import KEEP, LOST, MANUAL, Log, expect_pages, pages_of, written_for_ever
from kvmring.checks.rules import Trial, rule

CLEAR = "virt/kvm/kvm_main.c, kvm_clear_dirty_log_protect()"


@rule(
    "clear.clears",
    "a CLEAR takes the bits that are set in its bitmap, and leaves the others",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
    meaning=LOST,
)
def clears_bits(trial: Trial) -> None:
    """A random part of what was written, in several words."""
    log = Log(trial, 300, manual=KEEP)
    written = set(log.some(200))
    log.write(written)
    some = set(trial.random.sample(sorted(written), 90))
    log.clear(some)
    expect_pages(trial, "pages left after a CLEAR", log.get(), written - some)


@rule(
    "clear.relogs",
    "a CLEAR write-protects what it clears: the next write is logged",
    source=f"{CLEAR}: kvm_arch_mmu_enable_log_dirty_pt_masked()",
    needs=[MANUAL],
    guest=True,
    meaning=f"{LOST}; do not migrate on this kernel with manual protect",
)
def relogs(trial: Trial) -> None:
    """Everything cleared and written again, then a part."""
    log = Log(trial, 200, manual=KEEP)
    log.write(range(200))
    for pages in ([*range(200)], log.some(70), log.some(1)):
        log.clear(range(200))
        expect_pages(trial, "pages left after a CLEAR", log.get(), ())
        log.write(pages)
        expect_pages(trial, "what was written after a CLEAR", log.get(), pages)


@rule(
    "clear.neighbours",
    "a CLEAR of some pages of a word loses nothing of the others, whether protected or not",
    source="arch/arm64/kvm/mmu.c, kvm_arch_mmu_enable_log_dirty_pt_masked(): protects the span",
    needs=[MANUAL],
    guest=True,
    meaning=LOST,
)
def neighbours(trial: Trial) -> None:
    """The ends of a word cleared; what lies between stays, and is logged when written again."""
    log = Log(trial, 128, manual=KEEP)
    log.write(range(128))
    log.clear([64, 127])
    between = {*range(64), *range(65, 127)}
    expect_pages(trial, "pages left after a CLEAR of the ends", log.get(), between)
    log.clear(range(65, 127))
    log.write(range(90, 100))
    left = {*range(64), *range(90, 100)}
    expect_pages(trial, "after a CLEAR of what lies between, and a write", log.get(), left)
    log.write([64, 127])
    expect_pages(trial, "and the ends written", log.get(), {*left, 64, 127})


@rule(
    "clear.late_write",
    "a page written between GET and CLEAR is cleared with the others: CLEAR comes before the "
    "contents are read",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
    meaning="a VMM that reads a page and clears it afterwards loses what was written in between",
)
def late_write(trial: Trial) -> None:
    """Its bit is one bit, whenever it was written."""
    log = Log(trial, manual=KEEP)
    log.write(range(10))
    expect_pages(trial, "the GET", log.get(), range(10))
    log.write(range(5, 15))
    log.clear(range(10))
    expect_pages(trial, "after the CLEAR of what that GET had", log.get(), range(10, 15))
    log.write([5])
    expect_pages(trial, "a write after the CLEAR", log.get(), [5, *range(10, 15)])


@rule(
    "clear.extra_bits",
    "bits of pages that are not dirty, and bits past the slot's end, do nothing",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
    meaning=LOST,
)
def extra_bits(trial: Trial) -> None:
    """Ones for everything; what is written later is logged."""
    log = Log(trial, 100, manual=KEEP)
    log.write([3, 99])
    raw.clear_dirty_log(log.vm, log.slot, 64, 36, (1 << 64) - 1)
    expect_pages(trial, "after a CLEAR of the last word, all ones", log.get(), [3])
    log.write(range(90, 100))
    log.write([50])
    expect_pages(trial, "pages written afterwards", log.get(), [3, 50, *range(90, 100)])


@rule(
    "clear.offset",
    "bit 0 of CLEAR's bitmap is page first_page, not page 0",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
    meaning="a VMM that gives the whole slot's bitmap clears pages that it has not copied",
)
def offset(trial: Trial) -> None:
    """One bit in the bitmap of a range that begins with the third word."""
    log = Log(trial, 256, manual=KEEP)
    log.write(range(256))
    raw.clear_dirty_log(log.vm, log.slot, 128, 64, 1 << 5)
    expect_pages(trial, "pages left", log.get(), set(range(256)) - {133})


@rule(
    "clear.range",
    "a CLEAR touches the pages of its range alone",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
    meaning=LOST,
)
def only_the_range(trial: Trial) -> None:
    """The middle of a slot, with ones behind what counts in the bitmap."""
    log = Log(trial, 256, manual=KEEP)
    log.write(range(256))
    memory = raw.Memory(64)
    memory.map[:] = b"\xff" * 64
    log.clear_with(memory.address, 64, 128)
    expect_pages(trial, "pages left", log.get(), {*range(64), *range(192, 256)})


@rule(
    "clear.length",
    "KVM reads one bit per page of the range, rounded up to whole 64-bit words, and no more",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
)
def length(trial: Trial) -> None:
    """From a buffer that ends where mapped memory ends."""
    log = Log(trial, 200, manual=KEEP)
    log.write(range(200))
    for first, num in ((0, 64), (64, 128), (192, 8)):
        size = -(-num // 64) * 8
        with raw.at_edge(b"\xff" * size) as address:
            trial.errno(
                f"a CLEAR of {num} pages from {first}, with {size} bytes of bitmap",
                partial(log.clear_with, address, first, num),
                0,
            )
    expect_pages(trial, "pages left", log.get(), ())


@rule(
    "clear.without_manual_protect",
    "a CLEAR works without manual protect: it clears what was written since the last GET",
    source=CLEAR,
    needs=[MANUAL],
    guest=True,
)
def without_manual(trial: Trial) -> None:
    """Before any GET, and after one."""
    log = Log(trial)
    log.write(range(20))
    log.clear(range(5, 10))
    expect_pages(trial, "a GET after a CLEAR", log.get(), {*range(5), *range(10, 20)})
    log.write(range(20))
    log.clear(range(100))
    expect_pages(trial, "a GET after a CLEAR of everything", log.get(), ())
    log.write([7])
    expect_pages(trial, "a write after the CLEAR", log.get(), [7])


@rule(
    "clear.running",
    "what a vCPU writes after a CLEAR is logged also while it runs: its TLB was flushed",
    source=f"{CLEAR}: kvm_flush_remote_tlbs_memslot()",
    needs=[MANUAL],
    guest=True,
    meaning=f"{LOST}; stop the vCPUs around each CLEAR",
)
def running(trial: Trial) -> None:
    """Cleared while the guest writes round after round; a round later all are back."""
    log = Log(trial, 100, manual=KEEP)
    pages = log.some(60)
    with written_for_ever(trial, log.guest, log.ram, pages) as rounds:
        for _ in range(5):
            log.clear(range(100))
            rounds.wait()
            expect_pages(trial, "pages written since the CLEAR", log.get(), pages)
    log.clear(range(100))
    expect_pages(trial, "after a CLEAR with the vCPU stopped", log.get(), ())


@rule(
    "clear.address_spaces",
    "a CLEAR in one address space leaves the bitmap of the same addresses in another",
    source=CLEAR,
    needs=[MANUAL, Cap.MULTI_ADDRESS_SPACE],
    guest=True,
    meaning=LOST,
)
def address_spaces(trial: Trial) -> None:
    """Both show the same memory."""
    if trial.kvm.check_extension(Cap.MULTI_ADDRESS_SPACE) < 2:
        trial.skip("this VM has one address space")
    log = Log(trial, manual=KEEP)
    other = log.vm.add_memory(log.ram.gpa, backing=log.ram, as_id=1, log_dirty=True)
    log.write(range(30))
    raw.clear_dirty_log(log.vm, other.slot, 0, 100, (1 << 128) - 1)
    expect_pages(trial, "pages left in address space 0", log.get(), range(30))
    left = pages_of(raw.get_dirty_log(log.vm, other.slot, 100))
    expect_pages(trial, "pages left in address space 1", left, ())
