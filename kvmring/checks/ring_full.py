"""ring_full.*: KVM_RUN with a ring that has no room left.

KVM keeps 64 entries of each ring back, with PML 512 more. Without PML a ring is full at exactly
that distance from its end; with it a whole buffer may come at once, and the ring be fuller.
"""

from __future__ import annotations

import errno
from functools import partial

from kvmring.abi import Cap, ExitReason
from kvmring.checks.rig import (
    RESERVED,
    Logged,
    Rig,
    RunPage,
    kept_back,
    no_pml,
    reset,
    run_once,
    set_wall_clock,
)
from kvmring.checks.rules import Trial, rule

CHECK = "virt/kvm/dirty_ring.c, kvm_dirty_ring_check_request()"
RUN = "virt/kvm/kvm_main.c, kvm_vcpu_ioctl(), KVM_RUN"
NEEDS = [Cap.DIRTY_LOG_RING_ACQ_REL]
FULL = ExitReason.DIRTY_RING_FULL


def full(trial: Trial, *, vcpus: int = 1, entries: int | None = None) -> Rig:
    """Make a rig whose first vCPU's ring is full, of pages in order."""
    number = trial.least_entries if entries is None else entries
    rig = Rig(trial, number + 64, vcpus=vcpus, entries=number)
    rig.load(range(number + 64))
    rig.fill()
    return rig


def expect_full(trial: Trial, what: str, got: int, entries: int, reserved: int) -> None:
    """Expect a full ring's entries: up to the limit, or with PML up to the ring's end."""
    least = entries - reserved
    most = least if reserved == RESERVED else entries
    wanted = str(least) if most == least else f"{least} to {most}"
    trial.expect_true(what, least <= got <= most, got=got, rule=wanted)


@rule(
    "ring_full.soft_limit",
    "KVM_RUN ends with KVM_EXIT_DIRTY_RING_FULL at 64 entries from the end (with PML, 576)",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_soft_full()",
    needs=NEEDS,
    guest=True,
)
def soft_limit(trial: Trial) -> None:
    """The smallest ring, and the next two sizes."""
    reserved = kept_back(trial)
    trial.note("entries kept back", reserved)
    for shift in range(3 if trial.page_size <= 4096 else 1):
        entries = trial.least_entries << shift
        got = len(full(trial, entries=entries).ring.dirty())
        expect_full(trial, f"entries of a full ring of {entries}", got, entries, reserved)


@rule(
    "ring_full.returns_0",
    "of a full ring KVM_RUN returns 0, with exit_reason 31",
    source=CHECK,
    needs=NEEDS,
    guest=True,
)
def returns_0(trial: Trial) -> None:
    """The bare ioctl."""
    rig = full(trial)
    page = RunPage(rig.vcpus[0])
    trial.expect("exit_reason", page.exit_reason, 31)
    trial.expect("KVM_RUN", run_once(rig.vcpus[0]), 0)
    trial.expect("exit_reason", page.exit_reason, 31)


@rule(
    "ring_full.no_progress",
    "run again without a reset, a vCPU whose ring is full does nothing and exits with 31 again",
    source=CHECK,
    needs=NEEDS,
    guest=True,
)
def no_progress(trial: Trial) -> None:
    """Three times; neither the ring nor memory nor the guest's counter moves."""
    rig = full(trial)
    entries, stores, words = rig.ring.dirty(), rig.guest.progress(0).stores, rig.words()
    for _ in range(3):
        trial.expect("exit reason", rig.guest.run(0).reason, FULL)
        trial.expect("the ring's entries are as before", rig.ring.dirty() == entries, True)
        trial.expect("stores", rig.guest.progress(0).stores, stores)
        trial.expect("memory is as before", rig.words() == words, True)


@rule(
    "ring_full.harvest_is_not_enough",
    "a ring that was harvested but not reset is still full",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_used()",
    needs=NEEDS,
    guest=True,
)
def harvest_is_not_enough(trial: Trial) -> None:
    """Run between the two."""
    rig = full(trial)
    taken = len(rig.ring.take())
    trial.expect("exit reason after the harvest", rig.guest.run(0).reason, FULL)
    trial.expect("new entries", rig.ring.dirty(), [])
    trial.expect("entries reset", reset(rig.vm), taken)
    rig.finish()
    trial.expect_true("entries after the reset", len(rig.ring.dirty()) > 0)


@rule(
    "ring_full.reset_of_1",
    "when one entry was reset, one more is written before the ring is full again",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_soft_full()",
    needs=NEEDS,
    guest=True,
)
def reset_of_1(trial: Trial) -> None:
    """Take one."""
    _reset_of(trial, 1)


@rule(
    "ring_full.reset_of_some",
    "when n entries were reset, n more are written before the ring is full again",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_soft_full()",
    needs=NEEDS,
    guest=True,
)
def reset_of_some(trial: Trial) -> None:
    """Take 50."""
    _reset_of(trial, 50)


def _reset_of(trial: Trial, number: int) -> None:
    no_pml(trial)  # there the ring may be beyond the limit, and stay full
    rig = full(trial)
    before = len(rig.ring.dirty())
    trial.expect("entries taken", len(rig.ring.take(number)), number)
    trial.expect("entries reset", reset(rig.vm), number)
    trial.expect("entries when it is full again", rig.fill(), before)


@rule(
    "ring_full.again",
    "a ring that was emptied gets as full as the first time",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_soft_full()",
    needs=NEEDS,
    guest=True,
)
def again(trial: Trial) -> None:
    """Three fillings, so that the end of the ring comes at different places."""
    rig = Rig(trial, trial.least_entries)
    rig.load(range(trial.least_entries), rounds=4)
    reserved = kept_back(trial)
    for turn in range(3):
        got = rig.fill()
        expect_full(trial, f"entries, filling {turn}", got, rig.entries, reserved)
        rig.ring.take()
        trial.expect("entries reset", reset(rig.vm), got)


@rule(
    "ring_full.not_retired",
    "the last entry of a full ring names a page that still has its old contents: the write "
    "comes when the vCPU runs on",
    source="arch/x86/kvm/mmu/mmu.c, fast_page_fault(); arch/arm64/kvm/mmu.c, user_mem_abort()",
    needs=NEEDS,
    guest=True,
    meaning="a VMM that copies this page takes old contents; it is logged again if it was reset",
)
def not_retired(trial: Trial) -> None:
    """Compare memory, then let it run on."""
    no_pml(trial)
    rig = full(trial)
    logged = rig.ring.pages()
    words = rig.words()
    unwritten = [page for page in logged if not words[page]]
    trial.expect("pages logged and not written yet", unwritten, logged[-1:])
    trial.expect("entries reset", reset(rig.vm), len(logged))
    rig.finish()
    trial.expect_true("it is written afterwards", rig.words()[logged[-1]] != 0)


@rule(
    "ring_full.last_again",
    "the page of the last entry is logged again if it was reset before its write retired",
    source="virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn()",
    needs=NEEDS,
    guest=True,
    meaning="entries exceed pages by one for each full ring",
)
def last_again(trial: Trial) -> None:
    """It comes first in the next harvest."""
    no_pml(trial)
    rig = full(trial)
    last = rig.ring.pages()[-1]
    reset(rig.vm)
    rig.finish()
    trial.expect("the next entries", rig.ring.pages(), list(range(last, rig.ram.num_pages)))


@rule(
    "ring_full.last_not_again",
    "the page of the last entry is not logged again if its entry was not reset",
    source="virt/kvm/dirty_ring.c, kvm_dirty_ring_reset()",
    needs=NEEDS,
    guest=True,
)
def last_not_again(trial: Trial) -> None:
    """All but the last one are reset."""
    no_pml(trial)
    rig = full(trial)
    number = len(rig.ring.dirty())
    last = rig.ring.dirty()[-1].page
    rig.ring.take(number - 1)
    trial.expect("entries reset", reset(rig.vm), number - 1)
    rig.finish()
    trial.expect("what is dirty", rig.ring.pages(), list(range(last, rig.ram.num_pages)))
    trial.expect_true("the last page is written", rig.words()[last] != 0)


@rule(
    "ring_full.others_run",
    "a vCPU whose ring is full does not keep others from running",
    source=CHECK,
    needs=NEEDS,
    guest=True,
)
def others_run(trial: Trial) -> None:
    """The second vCPU writes while the first cannot."""
    rig = full(trial, vcpus=2)
    pages = range(rig.ram.num_pages - 40, rig.ram.num_pages)
    trial.expect("pages of the other vCPU", sorted(rig.again(pages, 1)), list(pages))
    trial.expect("exit reason of the first", rig.guest.run(0).reason, FULL)


@rule(
    "ring_full.others_reset",
    "resetting another vCPU's entries makes no room in a full ring",
    source=CHECK,
    needs=NEEDS,
    guest=True,
)
def others_reset(trial: Trial) -> None:
    """Only the second vCPU's ring is harvested."""
    rig = full(trial, vcpus=2)
    rig.again(range(rig.ram.num_pages - 40, rig.ram.num_pages), 1)
    trial.expect("entries reset", reset(rig.vm), 40)
    before = rig.ring.dirty()
    trial.expect("exit reason of the first", rig.guest.run(0).reason, FULL)
    trial.expect("its entries are as before", rig.ring.dirty() == before, True)


@rule(
    "ring_full.immediate_exit",
    "with immediate_exit KVM_RUN of a full ring is EINTR, and exit_reason stands as it was",
    source="arch/x86/kvm/x86.c and arch/arm64/kvm/arm.c, kvm_arch_vcpu_ioctl_run()",
    needs=NEEDS,
    guest=True,
    meaning="a VMM looks at KVM_RUN's result before it looks at exit_reason",
)
def immediate_exit(trial: Trial) -> None:
    """The bare ioctl."""
    rig = full(trial)
    page = RunPage(rig.vcpus[0])
    reset_entries = len(rig.ring.take())
    trial.expect("entries reset", reset(rig.vm), reset_entries)
    page.immediate_exit = 1
    trial.errno("KVM_RUN with immediate_exit", lambda: run_once(rig.vcpus[0]), errno.EINTR)
    trial.expect("exit_reason, though there is room now", page.exit_reason, 31)
    trial.expect("new entries", rig.ring.dirty(), [])
    page.immediate_exit = 0
    rig.finish()


@rule(
    "ring_full.argument",
    "KVM_RUN with an argument that is not 0 is EINVAL, with a full ring too",
    source=RUN,
    needs=NEEDS,
    guest=True,
)
def argument(trial: Trial) -> None:
    """1, and -1."""
    rig = full(trial)
    for value in (1, -1):
        call = partial(run_once, rig.vcpus[0], value)
        trial.errno(f"KVM_RUN with {value}", call, errno.EINVAL)
    trial.expect("KVM_RUN with 0", run_once(rig.vcpus[0]), 0)


@rule(
    "ring_full.reserve",
    "entries that come without KVM_RUN still fit into a full ring: some are kept back for them",
    source="include/linux/kvm_dirty_ring.h, KVM_DIRTY_RING_RSVD_ENTRIES",
    needs=NEEDS,
    machine="x86_64",
    guest=True,
    meaning="a VMM may find more entries in a full ring than the limit",
)
def reserve(trial: Trial) -> None:
    """KVM writes the time when it is told the wall clock's address."""
    rig = full(trial)
    before = len(rig.ring.dirty())
    last = rig.ram.num_pages - 1
    trial.expect("MSRs set", set_wall_clock(rig.vcpus[0], rig.gpa(last)), 1)
    more = rig.ring.dirty()[before:]
    trial.note("entries beyond the limit", len(more))
    trial.expect("what the further entries name", set(more), {Logged(rig.ram.slot, last)})
    trial.expect("exit reason", rig.guest.run(0).reason, FULL)
    taken = len(rig.ring.take())
    trial.expect("entries reset", reset(rig.vm), taken)
