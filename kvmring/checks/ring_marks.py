"""ring.*: what KVM makes of the entries of a dirty ring at a reset: right and wrong marks."""

from __future__ import annotations

from kvmring.abi import Cap
from kvmring.checks.rig import DIRTY, RESET, Rig, reset
from kvmring.checks.rules import Trial, rule

DO_RESET = "virt/kvm/dirty_ring.c, kvm_dirty_ring_reset()"
NEEDS = [Cap.DIRTY_LOG_RING_ACQ_REL]
N = 100  # pages: any ring has room for them


@rule(
    "ring.mark.both_flags",
    "an entry with both flags set counts as harvested: only the reset bit is looked at",
    source="virt/kvm/dirty_ring.c, kvm_dirty_gfn_harvested()",
    needs=NEEDS,
    guest=True,
)
def both_flags(trial: Trial) -> None:
    """3 instead of 2."""
    _marked_with(trial, DIRTY | RESET)


@rule(
    "ring.mark.unknown_bits",
    "bits of an entry's flags that have no meaning are ignored",
    source="virt/kvm/dirty_ring.c, kvm_dirty_gfn_harvested()",
    needs=NEEDS,
    guest=True,
)
def unknown_bits(trial: Trial) -> None:
    """The reset bit, and all that are free."""
    _marked_with(trial, 0xFFFFFFFE)


def _marked_with(trial: Trial, flags: int) -> None:
    rig = Rig(trial, N)
    rig.write(range(N))
    for index in range(N):
        rig.ring.mark(index, flags)
    trial.expect(f"entries reset that were marked {flags:#x}", reset(rig.vm), N)
    trial.expect("their flags", {one.flags for one in rig.ring.all()}, {0})
    rig.ring.next = N
    trial.expect("pages logged again", rig.again(range(N)), list(range(N)))


@rule(
    "ring.mark.none",
    "entries without the reset bit stay, whether they are dirty or were set to 0",
    source=DO_RESET,
    needs=NEEDS,
    guest=True,
)
def mark_none(trial: Trial) -> None:
    """Take nothing, then write 0 over the first, then mark it right."""
    rig = Rig(trial, N)
    rig.write(range(N))
    trial.expect("entries reset while all are dirty", reset(rig.vm), 0)
    rig.ring.take()
    rig.ring.mark(0, 0)
    trial.expect("entries reset with 0 in the first", reset(rig.vm), 0)
    rig.ring.mark(0)
    trial.expect("entries reset when it was marked", reset(rig.vm), N)


@rule(
    "ring.gap.first",
    "nothing is reset behind a first entry that was left out; the marks are seen later",
    source=DO_RESET,
    needs=NEEDS,
    guest=True,
    meaning="a VMM must mark entries in order, or its ring never gets empty",
)
def gap_first(trial: Trial) -> None:
    """All but the first."""
    _gap(trial, 0)


@rule(
    "ring.gap.middle",
    "a reset ends at the first entry that was left out, and begins there the next time",
    source=DO_RESET,
    needs=NEEDS,
    guest=True,
)
def gap_middle(trial: Trial) -> None:
    """All but one in the middle."""
    _gap(trial, 37)


def _gap(trial: Trial, gap: int) -> None:
    rig = Rig(trial, N)
    rig.write(range(N))
    for index in range(N):
        if index != gap:
            rig.ring.mark(index)
    trial.expect("entries reset before the gap", reset(rig.vm), gap)
    now = [one.flags for one in rig.ring.all()[:N]]
    trial.expect("flags after it", now, [0] * gap + [DIRTY] + [RESET] * (N - gap - 1))
    rig.ring.mark(gap)
    trial.expect("entries reset when it was filled", reset(rig.vm), N - gap)
    rig.ring.next = N
    trial.expect("pages logged again", rig.again(range(N)), list(range(N)))


LOST = "a VMM that writes an entry's slot or offset loses that page: it may only set the flags"


@rule(
    "ring.overwritten.offset",
    "an entry whose offset was overwritten by one beyond the slot is counted, its page lost",
    source="virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn()",
    needs=NEEDS,
    guest=True,
    meaning=LOST,
)
def overwritten_offset(trial: Trial) -> None:
    """It is read again at the reset."""
    _overwritten(trial, page=1 << 40)


@rule(
    "ring.overwritten.slot",
    "an entry whose slot was overwritten by one that does not exist is counted, its page lost",
    source="virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn()",
    needs=NEEDS,
    guest=True,
    meaning=LOST,
)
def overwritten_slot(trial: Trial) -> None:
    """A slot id that is legal, but has no memory."""
    _overwritten(trial, slot=300)


@rule(
    "ring.overwritten.slot_id",
    "an entry with a slot id beyond KVM's slots is counted, and ignored",
    source="virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn()",
    needs=NEEDS,
    guest=True,
    meaning=LOST,
)
def overwritten_slot_id(trial: Trial) -> None:
    """The highest 16-bit number."""
    _overwritten(trial, slot=0xFFFF)


@rule(
    "ring.overwritten.as_id",
    "an entry with an address space that does not exist is counted, and ignored",
    source="virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn()",
    needs=NEEDS,
    guest=True,
    meaning=LOST,
)
def overwritten_as_id(trial: Trial) -> None:
    """The highest there can be."""
    _overwritten(trial, slot=0x7FFF0000)


def _overwritten(trial: Trial, *, slot: int | None = None, page: int | None = None) -> None:
    rig = Rig(trial, N)
    rig.write(range(N))
    trial.expect("entries at first", len(rig.ring.take()), N)
    rig.ring.overwrite(37, slot=slot, page=page)
    trial.expect("entries reset, with the overwritten one", reset(rig.vm), N)
    before = rig.words()[37]
    logged = set(rig.again(range(N)))
    trial.expect_true("page 37 was written again", rig.words()[37] > before)
    trial.expect("pages not logged when all were written again", set(range(N)) - logged, {37})


@rule(
    "ring.overwritten.other_page",
    "a reset protects the page that the entry names then, not the one KVM had written there",
    source="virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn()",
    needs=NEEDS,
    guest=True,
    meaning=LOST,
)
def overwritten_other_page(trial: Trial) -> None:
    """An entry is pointed at a page that is still dirty further on in the ring."""
    far = 1000
    rig = Rig(trial, far + 1)
    rig.write([*range(10), far])
    rig.ring.take(10)
    rig.ring.overwrite(3, page=far)
    trial.expect("entries reset", reset(rig.vm), 10)
    trial.expect("the entry that was left", rig.ring.pages(), [far])
    logged = set(rig.again([*range(10), far]))
    trial.expect("pages logged again", logged, {*range(10), far} - {3})
