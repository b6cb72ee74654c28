"""manual_protect.*: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, what it takes and what it changes."""

from __future__ import annotations

import errno
from functools import partial

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.bits import KEEP, LOST, MANUAL, Log, expect_pages, pages_of, written_for_ever
from kvmring.checks.rules import Trial, rule

ENABLE = "virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_cap_generic()"
GET = "virt/kvm/kvm_main.c, kvm_get_dirty_log_protect()"
BITMAP = "virt/kvm/kvm_main.c, kvm_prepare_memory_region()"
RING = Cap.DIRTY_LOG_RING_ACQ_REL
SET = 3  # KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET


def need_initially_set(trial: Trial) -> None:
    """Skip where KVM offers manual protect without INITIALLY_SET."""
    if not trial.kvm.check_extension(MANUAL) & 2:
        trial.skip("this KVM lacks KVM_DIRTY_LOG_INITIALLY_SET")


# What it takes


@rule(
    "manual_protect.values",
    "it is enabled with 0, with 1, and with 3 where KVM_CHECK_EXTENSION has bit 1",
    source=ENABLE,
    needs=[MANUAL],
)
def values(trial: Trial) -> None:
    """Each on a fresh VM, and one after the other on one."""
    offered = trial.kvm.check_extension(MANUAL)
    third = 0 if offered & 2 else errno.EINVAL
    same = trial.vm()
    for value, accepted in ((KEEP, 0), (SET, third), (0, 0), (KEEP, 0)):
        for name, vm in (("a fresh VM", trial.vm()), ("the same VM again", same)):
            trial.errno(
                f"the capability with {value} on {name}",
                partial(raw.enable_cap, vm, MANUAL, value),
                accepted,
            )


@rule(
    "manual_protect.einval.values",
    "any other value is EINVAL: INITIALLY_SET alone, unknown bits, bits above the 32nd; what "
    "was enabled before stays",
    source=ENABLE,
    needs=[MANUAL],
    guest=True,
)
def einval_values(trial: Trial) -> None:
    """A GET keeps the bits afterwards."""
    log = Log(trial, manual=KEEP)
    log.write(range(9))
    for value in (2, 4, 5, 7, 8, 1 << 31, 1 << 32, 1 << 32 | KEEP, (1 << 64) - 1):
        trial.errno(
            f"the capability with {value:#x}",
            partial(raw.enable_cap, log.vm, MANUAL, value),
            errno.EINVAL,
        )
    for number in (1, 2):
        expect_pages(trial, f"GET number {number} afterwards", log.get(), range(9))


@rule(
    "manual_protect.einval.flags",
    "flags other than 0 are EINVAL",
    source=ENABLE,
    needs=[MANUAL],
)
def einval_flags(trial: Trial) -> None:
    """With values that are taken otherwise."""
    vm = trial.vm()
    for flags in (1, 1 << 31):
        for value in (0, KEEP):
            trial.errno(
                f"the capability with {value} and flags {flags:#x}",
                partial(raw.enable_cap, vm, MANUAL, value, flags=flags),
                errno.EINVAL,
            )


@rule(
    "manual_protect.other_arguments",
    "the second to fourth argument are not looked at",
    source=ENABLE,
    needs=[MANUAL],
    guest=True,
)
def other_arguments(trial: Trial) -> None:
    """Ones in them; a GET keeps the bits afterwards."""
    log, ones = Log(trial), (1 << 64) - 1
    log.write(range(9))
    trial.errno(
        "the capability with 1 and ones behind it",
        lambda: raw.enable_cap(log.vm, MANUAL, KEEP, ones, ones, ones),
        0,
    )
    for number in (1, 2):
        expect_pages(trial, f"GET number {number} afterwards", log.get(), range(9))


@rule(
    "manual_protect.obsolete",
    "its predecessor, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT, is not offered, and EINVAL",
    source=ENABLE,
    needs=[MANUAL],
)
def obsolete(trial: Trial) -> None:
    """Number 166."""
    vm = trial.vm()
    old = Cap.MANUAL_DIRTY_LOG_PROTECT
    trial.expect("KVM_CHECK_EXTENSION of 166", vm.check_extension(old), 0)
    for value in (0, 1):
        trial.errno(f"166 with {value}", partial(raw.enable_cap, vm, old, value), errno.EINVAL)


@rule(
    "manual_protect.any_time",
    "it is enabled and disabled at any time, with slots, with vCPUs, and while one runs",
    source=ENABLE,
    needs=[MANUAL],
    guest=True,
)
def any_time(trial: Trial) -> None:
    """Both ways at each time."""
    log = Log(trial)
    both = (KEEP, 0, KEEP)

    def toggle(when: str) -> None:
        for value in both:
            trial.errno(
                f"the capability with {value} {when}",
                partial(raw.enable_cap, log.vm, MANUAL, value),
                0,
            )

    toggle("with a slot and a vCPU")
    log.write(range(5))
    toggle("after the guest ran")
    with written_for_ever(trial, log.guest, log.ram, range(50)):
        toggle("while a vCPU runs")
        expect_pages(trial, "pages logged", log.get(), range(50))


# What it changes


@rule(
    "manual_protect.keeps",
    "with manual protect a GET leaves the bits: each GET has what was written since the CLEAR",
    source=GET,
    needs=[MANUAL],
    guest=True,
    meaning=LOST,
)
def keeps(trial: Trial) -> None:
    """GET after GET, with writes in between."""
    log = Log(trial, manual=KEEP)
    everything: set[int] = set()
    for _ in range(3):
        more = log.some(20)
        everything |= set(more)
        log.write(more)
        for number in (1, 2):
            expect_pages(trial, f"GET number {number} after a write", log.get(), everything)


@rule(
    "manual_protect.turned_off",
    "it is looked at anew in each GET: turned off, the next one takes the bits",
    source=GET,
    needs=[MANUAL],
    guest=True,
)
def turned_off(trial: Trial) -> None:
    """In the middle of a log."""
    log = Log(trial, manual=KEEP)
    log.write(range(9))
    expect_pages(trial, "a GET with it on", log.get(), range(9))
    raw.enable_cap(log.vm, MANUAL, 0)
    expect_pages(trial, "the first GET with it off", log.get(), range(9))
    expect_pages(trial, "the second GET with it off", log.get(), ())
    log.write(range(4))
    expect_pages(trial, "what was written after that", log.get(), range(4))


@rule(
    "manual_protect.turned_on",
    "it is looked at anew in each GET: turned on, the next one leaves the bits",
    source=GET,
    needs=[MANUAL],
    guest=True,
)
def turned_on(trial: Trial) -> None:
    """In the middle of a log."""
    log = Log(trial)
    log.write(range(9))
    raw.enable_cap(log.vm, MANUAL, KEEP)
    for number in (1, 2):
        expect_pages(trial, f"GET number {number} with it on", log.get(), range(9))
    log.clear(range(100))
    log.write([4])
    expect_pages(trial, "what was written after a CLEAR", log.get(), [4])


# INITIALLY_SET


@rule(
    "manual_protect.initially_set.ones",
    "with INITIALLY_SET a new log has every page of the slot dirty, and no bit past its end",
    source=BITMAP,
    needs=[MANUAL],
)
def ones(trial: Trial) -> None:
    """Of slots that log from the start, and of one where logging is turned on."""
    need_initially_set(trial)
    vm = trial.vm()
    raw.enable_cap(vm, MANUAL, SET)
    gpa = 1 << 30
    for pages in (1, 64, 100):
        ram = trial.ram(vm, pages, gpa=gpa)
        gpa = ram.gpa + 256 * trial.page_size
        logged = pages_of(raw.get_dirty_log(vm, ram.slot, pages))
        expect_pages(trial, f"a new log of {pages} pages", logged, range(pages))
    late = trial.ram(vm, 70, gpa=gpa, log=False)
    late.set_log_dirty(True)
    logged = pages_of(raw.get_dirty_log(vm, late.slot, 70))
    expect_pages(trial, "a log that was turned on", logged, range(70))


@rule(
    "manual_protect.initially_set.off",
    "without INITIALLY_SET a new log has no page dirty, also where it was set before",
    source=BITMAP,
    needs=[MANUAL],
)
def zeros(trial: Trial) -> None:
    """The same slot's logs, one after the other."""
    need_initially_set(trial)
    vm = trial.vm()
    ram = trial.ram(vm, 100, log=False)
    for value, expected in ((KEEP, 0), (SET, 100), (KEEP, 0), (0, 0), (SET, 100)):
        raw.enable_cap(vm, MANUAL, value)
        ram.set_log_dirty(True)
        logged = pages_of(raw.get_dirty_log(vm, ram.slot, 100))
        expect_pages(trial, f"a new log with {value} enabled", logged, range(expected))
        ram.set_log_dirty(False)


@rule(
    "manual_protect.initially_set.existing",
    "INITIALLY_SET does nothing to a log that exists",
    source=BITMAP,
    needs=[MANUAL],
    guest=True,
)
def existing(trial: Trial) -> None:
    """Enabled after a write, then the slot is set to what it is."""
    need_initially_set(trial)
    log = Log(trial, manual=KEEP)
    log.write(range(6))
    raw.enable_cap(log.vm, MANUAL, SET)
    expect_pages(trial, "the log", log.get(), range(6))
    log.ram.set_log_dirty(True)
    expect_pages(trial, "the log after the slot was set as it is", log.get(), range(6))


@rule(
    "manual_protect.initially_set.clear_arms",
    "with INITIALLY_SET pages that are mapped are write-protected by the first CLEAR: what is "
    "written after it is logged",
    source="arch/x86/kvm/x86.c, kvm_mmu_slot_apply_flags(); arch/arm64/kvm/mmu.c, "
    "kvm_arch_commit_memory_region()",
    needs=[MANUAL],
    guest=True,
    meaning=f"{LOST}; enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with 1 instead of 3",
)
def clear_arms(trial: Trial) -> None:
    """All pages mapped before logging; cleared; a part written."""
    need_initially_set(trial)
    log = Log(trial, 200, manual=SET, log=False)
    log.write(range(200))
    log.ram.set_log_dirty(True)
    expect_pages(trial, "the new log", log.get(), range(200))
    log.clear(range(128), 0, 128)
    expect_pages(trial, "after a CLEAR of two words", log.get(), range(128, 200))
    log.write([0, 63, 64, 100, 127, 130])
    left = {0, 63, 64, 100, 127, *range(128, 200)}
    expect_pages(trial, "after writes to cleared pages", log.get(), left)


# With a ring


@rule(
    "manual_protect.ring",
    "with a ring it may be enabled; with 1, turning logging on protects what is mapped already",
    source="arch/x86/kvm/x86.c, kvm_mmu_slot_apply_flags(); arch/arm64/kvm/mmu.c, "
    "kvm_arch_commit_memory_region()",
    needs=[MANUAL, RING],
    guest=True,
    meaning=LOST,
)
def with_ring(trial: Trial) -> None:
    """All pages mapped before logging, then written."""
    log = Log(trial, 100, ring=trial.least_entries, log=False)
    trial.errno("the capability with 1 and a ring", lambda: raw.enable_cap(log.vm, MANUAL, KEEP), 0)
    log.write(range(100))
    expect_pages(trial, "pages in the ring before logging", log.harvest(), ())
    log.ram.set_log_dirty(True)
    log.write(range(100))
    expect_pages(trial, "pages in the ring, of 100 mapped before", log.harvest(), range(100))


@rule(
    "manual_protect.ring.initially_set",
    "with a ring and INITIALLY_SET, turning logging on protects nothing: pages that are mapped "
    "already are not logged; a kernel that logs all of them breaks no one",
    source="arch/x86/kvm/x86.c, kvm_mmu_slot_apply_flags(); arch/arm64/kvm/mmu.c, "
    "kvm_arch_commit_memory_region(): nothing is protected, and there is no bitmap to be set",
    needs=[MANUAL, RING],
    guest=True,
    meaning="never enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with 3 on a VM with rings; kvmring "
    "refuses it",
)
def ring_initially_set(trial: Trial) -> None:
    """None or all; turned off and on without it, all."""
    need_initially_set(trial)
    log = Log(trial, 100, ring=trial.least_entries, log=False)
    trial.errno("the capability with 3 and a ring", lambda: raw.enable_cap(log.vm, MANUAL, SET), 0)
    log.write(range(100))
    log.harvest()
    log.ram.set_log_dirty(True)
    log.write(range(100))
    logged = log.harvest()
    trial.note("pages logged, of 100 mapped before", len(logged))
    if logged:
        expect_pages(trial, "all of the pages mapped before are logged", logged, range(100))
    else:
        expect_pages(trial, "none of the pages mapped before is logged", logged, ())
    raw.enable_cap(log.vm, MANUAL, KEEP)
    log.ram.set_log_dirty(False)
    log.ram.set_log_dirty(True)
    log.write(range(100))
    expect_pages(trial, "with 1, after logging was turned off and on", log.harvest(), range(100))
