"""ring.*: what KVM writes into a dirty ring, and when; ring_marks.py has what it reads there."""

from __future__ import annotations

from array import array

from kvmring.abi import Cap
from kvmring.checks.rig import DIRTY, Logged, Rig, has_pml, reset, set_wall_clock
from kvmring.checks.rules import Trial, rule

PUSH = "virt/kvm/dirty_ring.c, kvm_dirty_ring_push()"
MARK = "virt/kvm/kvm_main.c, mark_page_dirty_in_slot()"
NEEDS = [Cap.DIRTY_LOG_RING_ACQ_REL]
N = 100  # pages: any ring has room for them


@rule(
    "ring.order",
    "entries stand in the order of the first writes (with PML, of its buffer)",
    source=PUSH,
    needs=NEEDS,
    guest=True,
)
def order(trial: Trial) -> None:
    """Write in a random order."""
    rig = Rig(trial, N)
    written = rig.shuffled(N)
    rig.write(written)
    logged = rig.ring.pages()
    if has_pml(trial):
        trial.note("in the order of writing", logged == written)
        logged, written = sorted(logged), sorted(written)
    trial.expect("pages of the entries, by position", logged, written)


@rule(
    "ring.entry",
    "an entry names its slot as as_id << 16 | id, and the page as its number in that slot",
    source=PUSH,
    needs=NEEDS,
    guest=True,
)
def entry(trial: Trial) -> None:
    """Write to two slots in turn, the second with the highest id there is."""
    rig = Rig(trial, N, more=N)
    assert rig.other is not None
    far = [rig.other.gpa + page * trial.page_size for page in range(40)]
    near = [rig.gpa(page) for page in range(N - 40, N)]
    rig.write_at([gpa for pair in zip(near, far, strict=True) for gpa in pair])
    trial.note("highest slot id", rig.other.slot)
    written = [Logged(rig.ram.slot, page) for page in range(N - 40, N)]
    written += [Logged(rig.other.slot, page) for page in range(40)]
    trial.expect("slot and page of the entries", sorted(rig.ring.take()), sorted(written))


@rule(
    "ring.flags",
    "an entry's flags are 0 while it is free and 1 when it was written, nothing else",
    source="virt/kvm/dirty_ring.c, kvm_dirty_gfn_set_dirtied()",
    needs=NEEDS,
    guest=True,
)
def flags(trial: Trial) -> None:
    """Look at all entries before and after."""
    rig = Rig(trial, N)
    trial.expect("flags in a new ring", {one.flags for one in rig.ring.all()}, {0})
    rig.write(range(N))
    now = [one.flags for one in rig.ring.all()]
    trial.expect("flags of as many entries as pages", set(now[:N]), {DIRTY})
    trial.expect("flags of the others", set(now[N:]), {0})


@rule(
    "ring.once",
    "a page is logged once, however often it is written, until it is reset",
    source=MARK,
    needs=NEEDS,
    guest=True,
)
def once(trial: Trial) -> None:
    """Five rounds, and another command."""
    rig = Rig(trial, N)
    rig.write(range(N), rounds=5)
    rig.write(rig.shuffled(N))
    trial.expect("pages of the entries", sorted(rig.ring.pages()), list(range(N)))


@rule(
    "ring.again",
    "after harvest and reset a page's next write is logged again, once",
    source="virt/kvm/dirty_ring.c, kvm_reset_dirty_gfn()",
    needs=NEEDS,
    guest=True,
    meaning="a VMM's second pass over memory misses what the guest wrote meanwhile",
)
def again(trial: Trial) -> None:
    """Three times."""
    rig = Rig(trial, N)
    for turn in range(3):
        logged = rig.again(rig.shuffled(N))
        trial.expect(f"pages logged by pass {turn}", sorted(logged), list(range(N)))
        trial.expect("entries reset", reset(rig.vm), N)


@rule(
    "ring.not_reset",
    "a page that was harvested but not reset is not logged again",
    source="Documentation/virt/kvm/api.rst, 8.29",
    needs=NEEDS,
    guest=True,
)
def not_reset(trial: Trial) -> None:
    """Which is why what is written before the reset is in no later log."""
    rig = Rig(trial, N)
    trial.expect("pages logged at first", len(rig.again(range(N))), N)
    trial.expect("pages logged by writing them again", rig.again(range(N)), [])
    trial.expect("entries reset", reset(rig.vm), N)
    trial.expect("pages logged after the reset", len(rig.again(range(N))), N)


@rule(
    "ring.wrap",
    "the ring goes on from its last entry to its first; positions are taken in turn",
    source=PUSH,
    needs=NEEDS,
    guest=True,
)
def wrap(trial: Trial) -> None:
    """Write little by little past the end, and a bit more."""
    rig = Rig(trial, N)
    while rig.ring.next < rig.entries + N:
        before = rig.ring.next
        trial.expect(f"entries from index {before} on", len(rig.again(range(N))), N)
        trial.expect("entries reset", reset(rig.vm), N)
    trial.expect("flags at the end", {one.flags for one in rig.ring.all()}, {0})


@rule(
    "ring.first_writer",
    "a page that two vCPUs write before a reset is in the first writer's ring alone",
    source=MARK,
    needs=NEEDS,
    guest=True,
)
def first_writer(trial: Trial) -> None:
    """Each vCPU first in turn."""
    rig = Rig(trial, N, vcpus=2)
    for first, second in ((0, 1), (1, 0)):
        rig.write(range(N), first)
        rig.write(rig.shuffled(N), second)
        trial.expect("the second writer's pages", rig.rings[second].pages(), [])
        trial.expect("the first writer's", sorted(rig.rings[first].pages()), list(range(N)))
        trial.expect("entries reset", reset(rig.vm), N)


@rule(
    "ring.own",
    "each vCPU's pages are in its own ring",
    source=MARK,
    needs=NEEDS,
    guest=True,
)
def own(trial: Trial) -> None:
    """Three vCPUs, one after the other, in two turns."""
    each = N // 3
    rig = Rig(trial, 3 * each, vcpus=3)
    parts = [range(i * each, (i + 1) * each) for i in range(3)]
    for middle in (0, each // 2):
        for index in (2, 0, 1):
            half = parts[index][middle : middle + each // 2]
            rig.write(half, index)
    for index in range(3):
        wanted = list(parts[index][: each // 2 * 2])
        trial.expect(f"pages in ring {index}", sorted(rig.rings[index].pages()), wanted)


@rule(
    "ring.log_off",
    "a slot without KVM_MEM_LOG_DIRTY_PAGES is not logged; turned on, it logs mapped pages too",
    source="arch/x86/kvm/x86.c and arch/arm64/kvm/mmu.c, kvm_arch_commit_memory_region()",
    needs=NEEDS,
    guest=True,
)
def log_off(trial: Trial) -> None:
    """Off, on, off, on."""
    rig = Rig(trial, N, log=False)
    for turn in range(2):
        trial.expect(f"pages logged while it is off, turn {turn}", rig.again(range(N)), [])
        rig.ram.set_log_dirty(True)
        logged = sorted(rig.again(range(N)))
        trial.expect(f"while it is on, turn {turn}", logged, list(range(N)))
        trial.expect("entries reset", reset(rig.vm), N)
        rig.ram.set_log_dirty(False)


@rule(
    "ring.host_writes",
    "what the VMM itself writes to guest memory is not logged",
    source=MARK,
    needs=NEEDS,
    guest=True,
    meaning="a VMM must remember the pages that it writes itself",
)
def host_writes(trial: Trial) -> None:
    """Before the guest's first write of a page, and after its reset."""
    rig = Rig(trial, N)
    for page in range(N):
        rig.ram.write(page * trial.page_size + 2048, b"host")
    trial.expect("pages logged by half of them written", rig.again(range(N // 2)), [*range(N // 2)])
    trial.expect("entries reset", reset(rig.vm), N // 2)
    for page in range(N):
        rig.ram.write(page * trial.page_size + 2048, b"more")
    trial.expect("dirty entries after writes of the VMM", rig.ring.dirty(), [])
    trial.expect("pages logged by the other half", len(rig.again(range(N // 2, N))), N // 2)


@rule(
    "ring.reads",
    "a page that the guest reads is logged at its first touch at most, never once it is mapped",
    source="arch/x86/kvm/mmu/spte.c, make_spte(); arch/arm64/kvm/mmu.c, user_mem_abort()",
    needs=NEEDS,
    guest=True,
    meaning="a VMM sends pages that were read, in each pass over memory",
)
def reads(trial: Trial) -> None:
    """Log the slot from which the guest reads its list, and in which it counts.

    Its page tables lie there too, which the guest does not read itself: the processor does, and
    AMD's takes the nested walk for a write (APM volume 2, 15.25), so they may be logged each time.
    """
    rig = Rig(trial, N, log=False)
    control = next(memory for memory in rig.vm.memory.values() if memory is not rig.ram)
    control.set_log_dirty(True)
    page = trial.page_size
    addresses = array("Q", (rig.gpa(number) for number in range(N))).tobytes()

    def run() -> tuple[set[int], set[int]]:
        """Return the pages whose contents the guest has changed, and those logged."""
        rig.load(range(N))
        before = control.read()
        rig.finish()
        after = control.read()
        starts = range(0, control.size_bytes, page)
        changed = {at // page for at in starts if before[at : at + page] != after[at : at + page]}
        return changed, set(rig.ring.pages())

    changed, logged = run()
    only_read = control.read().find(addresses) // page  # its list
    trial.expect_true("the guest's list was found", only_read > 0, got=only_read)
    trial.expect("changed pages not logged at first", changed - logged, set())
    trial.note("the page read was logged at its first touch", only_read in logged)
    trial.expect("entries reset", reset(rig.vm), len(logged))
    changed, logged = run()
    trial.expect("changed pages not logged when all are mapped", changed - logged, set())
    trial.expect("the page read is logged again", only_read in logged, False)
    trial.note("further pages logged: page tables", len(logged - changed))


@rule(
    "ring.without_run",
    "what a vCPU ioctl writes to guest memory is logged in that vCPU's ring, without KVM_RUN",
    source="arch/x86/kvm/x86.c, kvm_write_wall_clock(); virt/kvm/kvm_main.c",
    needs=NEEDS,
    machine="x86_64",
    guest=True,
    meaning="a VMM harvests after such ioctls too, not only after KVM_RUN",
)
def without_run(trial: Trial) -> None:
    """The wall clock's address: KVM writes the time there when it is set."""
    rig = Rig(trial, N)
    before = rig.ram.read(7 * trial.page_size, 12)
    trial.expect("MSRs set", set_wall_clock(rig.vcpus[0], rig.gpa(7)), 1)
    trial.expect_true("the time stands there", rig.ram.read(7 * trial.page_size, 12) != before)
    logged = rig.ring.take()
    trial.expect("what is logged", set(logged), {Logged(rig.ram.slot, 7)})
    trial.note("entries", len(logged))
    trial.expect("entries reset", reset(rig.vm), len(logged))
