"""reset.*: every page is protected anew, whatever the order of entries or the fate of slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmring.abi import Cap
from kvmring.checks.rig import Rig, reset
from kvmring.checks.rules import Trial, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

DO_RESET = "virt/kvm/dirty_ring.c, kvm_dirty_ring_reset()"
PROTECT = "virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn()"
NEEDS = [Cap.DIRTY_LOG_RING_ACQ_REL]
N = 100  # pages: any ring has room for them


# KVM collects entries of one slot within 64 pages, in either direction, and protects them at once.


def _batches(trial: Trial, orders: Sequence[Sequence[int]]) -> None:
    top = max(max(pages) for pages in orders) + 1
    rig = Rig(trial, top)
    for pages in orders:
        rig.write(pages)
        trial.expect("pages logged", sorted(rig.ring.pages()), sorted(pages))
        trial.expect("entries reset", reset(rig.vm), len(pages))
        trial.expect("pages logged again", sorted(rig.again(pages)), sorted(pages))
        trial.expect("entries reset", reset(rig.vm), len(pages))


def _declare_orders() -> None:
    orders: dict[str, tuple[str, list[list[int]]]] = {
        "ascending": ("ascending order", [list(range(150)), list(range(13, 140))]),
        "descending": ("descending order", [list(range(149, -1, -1)), list(range(139, 12, -1))]),
        "strides": (
            "steps of 1, 2, 31, 32, 63, 64, 65 and 127 pages",
            [list(range(5, 5 + step * 12, step)) for step in (1, 2, 31, 32, 63, 64, 65, 127)],
        ),
        "edges": (
            "steps to and fro around 64 pages",
            [[64, 1, 127, 0], [63, 0, 127, 64], [0, 64, 63, 1], [200, 137, 136, 263, 264]],
        ),
        "zigzag": (
            "turns between both ends of a range",
            [[i // 2 if i % 2 else 99 - i // 2 for i in range(100)]],
        ),
    }
    for name, (words, lists) in orders.items():

        def check(trial: Trial, lists: list[list[int]] = lists) -> None:
            _batches(trial, lists)

        rule(
            f"reset.batch.{name}",
            f"every page is protected when entries come in {words}",
            source=DO_RESET,
            needs=NEEDS,
            guest=True,
            meaning="pages of a batch stay writable, and their next writes are not logged",
        )(check)


_declare_orders()


@rule(
    "reset.batch.random",
    "every page is protected when entries come in a random order",
    source=DO_RESET,
    needs=NEEDS,
    guest=True,
    meaning="pages of a batch stay writable, and their next writes are not logged",
)
def batch_random(trial: Trial) -> None:
    """Dense and sparse."""
    lists = [trial.random.sample(range(span), 100) for span in (100, 150, 400, 1500) * 2]
    _batches(trial, lists)


@rule(
    "reset.batch.slots",
    "every page is protected when entries of two slots take turns",
    source=DO_RESET,
    needs=NEEDS,
    guest=True,
    meaning="pages of a batch stay writable, and their next writes are not logged",
)
def batch_slots(trial: Trial) -> None:
    """One by one, and in runs, with the same page numbers in both."""
    rig = Rig(trial, 64, more=64)
    assert rig.other is not None
    near = [rig.gpa(page) for page in range(64)]
    far = [rig.other.gpa + page * trial.page_size for page in range(64)]
    turns = [gpa for pair in zip(near, far, strict=True) for gpa in pair]
    runs = [gpa for at in range(0, 64, 8) for gpa in (*near[at : at + 8], *far[at : at + 8])]
    every = sorted((memory.slot, page) for memory in (rig.ram, rig.other) for page in range(64))
    for gpas in (turns, runs, turns):
        rig.write_at(gpas)
        trial.expect("slots and pages logged", sorted(tuple(e) for e in rig.ring.take()), every)
        trial.expect("entries reset", reset(rig.vm), 128)


@rule(
    "reset.log_off",
    "entries of a slot that does not log any more are reset and counted",
    source=PROTECT,
    needs=NEEDS,
    guest=True,
)
def log_off(trial: Trial) -> None:
    """Turned off between the write and the harvest."""
    rig = Rig(trial, N)
    rig.write(range(N))
    rig.ram.set_log_dirty(False)
    trial.expect("entries after logging was turned off", len(rig.ring.take()), N)
    trial.expect("entries reset", reset(rig.vm), N)
    trial.expect("pages logged while it is off", rig.again(range(N)), [])


@rule(
    "reset.slot_deleted",
    "entries of a deleted slot stay in the ring, and are reset and counted",
    source=PROTECT,
    needs=NEEDS,
    guest=True,
)
def slot_deleted(trial: Trial) -> None:
    """Between the write and the harvest."""
    rig = Rig(trial, N)
    rig.write(range(N))
    before = rig.ring.dirty()
    rig.ram.remove()
    trial.expect("the entries are as before", rig.ring.dirty() == before, True)
    rig.ring.take()
    trial.expect("entries reset", reset(rig.vm), N)


@rule(
    "reset.slot_made_anew",
    "entries of a deleted slot count as those of a new slot of the same number",
    source=PROTECT,
    needs=NEEDS,
    guest=True,
    meaning="a VMM empties the rings before it deletes a slot, or it sends pages nobody wrote",
)
def slot_made_anew(trial: Trial) -> None:
    """The new slot is smaller: entries beyond it are ignored, and counted."""
    rig = Rig(trial, N)
    rig.write(range(N))
    number, gpa = rig.ram.slot, rig.ram.gpa
    rig.ram.remove()
    rig.vm.add_memory(gpa, N // 2 * trial.page_size, slot=number, log_dirty=True)
    trial.expect("entries that name it", {e.slot for e in rig.ring.take()}, {number})
    trial.expect("entries reset", reset(rig.vm), N)
    rig.guest.load(0, [gpa + page * trial.page_size for page in range(N // 2)])
    rig.finish()
    trial.expect("pages of the new slot logged", sorted(rig.ring.pages()), list(range(N // 2)))


@rule(
    "reset.slot_moved",
    "entries of a slot that was moved protect its pages where they are now",
    source=PROTECT,
    needs=NEEDS,
    guest=True,
)
def slot_moved(trial: Trial) -> None:
    """Offsets are the slot's, whatever its address."""
    rig = Rig(trial, N)
    rig.write(range(N))
    rig.ram.move(rig.ram.gpa - 2 * rig.ram.size_bytes)
    trial.expect("pages logged at the new place", len(rig.ring.take()), N)
    trial.expect("entries reset", reset(rig.vm), N)
    # a move drops all mappings, so whether they are logged now says nothing of the reset
    rig.again(range(N))
    trial.expect("entries reset", reset(rig.vm), N)
    trial.expect("pages logged again there", sorted(rig.again(range(N))), list(range(N)))
