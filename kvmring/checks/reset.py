"""reset.*: what KVM_RESET_DIRTY_RINGS counts and protects; reset_pages.py has more on pages."""

from __future__ import annotations

import errno
import threading
from functools import partial

from kvmring.abi import Cap
from kvmring.checks import raw
from kvmring.checks.rig import DIRTY, RESET, X86, Rig, reset
from kvmring.checks.rules import Trial, rule

IOCTL = "virt/kvm/kvm_main.c, kvm_vm_ioctl_reset_dirty_pages()"
DO_RESET = "virt/kvm/dirty_ring.c, kvm_dirty_ring_reset()"
NEEDS = [Cap.DIRTY_LOG_RING_ACQ_REL]
N = 100  # pages: any ring has room for them


@rule(
    "reset.no_ring",
    "KVM_RESET_DIRTY_RINGS of a VM without a ring is EINVAL",
    source=IOCTL,
)
def no_ring(trial: Trial) -> None:
    """Also when it has a vCPU."""
    vm = trial.vm()
    trial.errno("without a vCPU", lambda: reset(vm), errno.EINVAL)
    vm.create_vcpu()
    trial.errno("with one", lambda: reset(vm), errno.EINVAL)


@rule(
    "reset.no_vcpu",
    "KVM_RESET_DIRTY_RINGS of a VM with rings but no vCPU is 0",
    source=IOCTL,
    needs=NEEDS,
)
def no_vcpu(trial: Trial) -> None:
    """Nothing is there to be reset."""
    trial.expect("entries reset", reset(trial.vm(ring=trial.least_entries)), 0)


@rule(
    "reset.wrong_fd",
    "a vCPU and /dev/kvm have no KVM_RESET_DIRTY_RINGS: EINVAL or ENOTTY",
    source="arch/*/kvm, kvm_arch_vcpu_ioctl(); virt/kvm/kvm_main.c, kvm_dev_ioctl()",
    needs=NEEDS,
)
def wrong_fd(trial: Trial) -> None:
    """Neither is a VM."""
    vm = trial.vm(ring=trial.least_entries)
    vcpu = vm.create_vcpu()
    trial.expect("on the VM", reset(vm), 0)
    for what, handle in (("on the vCPU", vcpu), ("on /dev/kvm", trial.kvm)):
        call = partial(raw.ioctl, handle, raw.KVM_RESET_DIRTY_RINGS)
        trial.errno(what, call, errno.EINVAL, errno.ENOTTY)


@rule(
    "reset.nothing",
    "KVM_RESET_DIRTY_RINGS is 0 while nothing was harvested, and changes nothing",
    source=DO_RESET,
    needs=NEEDS,
    guest=True,
)
def nothing(trial: Trial) -> None:
    """With an empty ring, and with one whose entries are all dirty."""
    rig = Rig(trial, N)
    trial.expect("with an empty ring", reset(rig.vm), 0)
    rig.write(range(N))
    before = rig.ring.all()
    trial.expect("with dirty entries", reset(rig.vm), 0)
    trial.expect("the ring is as before", rig.ring.all() == before, True)


@rule(
    "reset.argument",
    "KVM_RESET_DIRTY_RINGS ignores its argument",
    source="virt/kvm/kvm_main.c, kvm_vm_ioctl(), KVM_RESET_DIRTY_RINGS",
    needs=NEEDS,
    guest=True,
)
def argument(trial: Trial) -> None:
    """Numbers that would be odd as pointers or counts."""
    rig = Rig(trial, N)
    for value in (1, 7, 0x7FFFFFFF, -1):
        trial.expect("pages logged", sorted(rig.again(range(N))), list(range(N)))
        trial.expect(f"entries reset, argument {value}", reset(rig.vm, value), N)


@rule(
    "reset.count",
    "KVM_RESET_DIRTY_RINGS returns what it reset, over all vCPUs, once",
    source=IOCTL,
    needs=NEEDS,
    guest=True,
    meaning="a VMM cannot tell a complete reset from a short one",
)
def count(trial: Trial) -> None:
    """Different numbers from three rings."""
    rig = Rig(trial, 3 * N, vcpus=3)
    for index, ring in enumerate(rig.rings):
        rig.write(range(index * N, (index + 1) * N), index)
        ring.take(20 + 30 * index)
    trial.expect("entries reset of 20 + 50 + 80", reset(rig.vm), 150)
    trial.expect("entries reset by a second call", reset(rig.vm), 0)
    for ring in rig.rings:
        ring.take()
    trial.expect("entries reset of the other 80 + 50 + 20", reset(rig.vm), 150)


@rule(
    "reset.one_vcpu",
    "entries of one vCPU are reset also when others, before and after it, have none to reset",
    source=IOCTL,
    needs=NEEDS,
    guest=True,
)
def one_vcpu(trial: Trial) -> None:
    """Each of three in turn; the others' entries stay dirty."""
    rig = Rig(trial, 3 * N, vcpus=3)
    for index in range(3):
        rig.write(range(index * N, (index + 1) * N), index)
    for index, ring in enumerate(rig.rings):
        ring.take()
        trial.expect(f"entries reset of vCPU {index}", reset(rig.vm), N)
        left = [len(other.dirty()) for other in rig.rings]
        trial.expect("dirty entries of each", left, [0] * (index + 1) + [N] * (2 - index))


@rule(
    "reset.entries",
    "a reset sets the flags of entries to 0, and leaves slot and offset standing",
    source="virt/kvm/dirty_ring.c, kvm_dirty_gfn_set_invalid()",
    needs=NEEDS,
    guest=True,
)
def entries(trial: Trial) -> None:
    """Half of them."""
    rig = Rig(trial, N)
    rig.write(rig.shuffled(N))
    before = rig.ring.all()[:N]
    rig.ring.take(N // 2)
    trial.expect("entries reset", reset(rig.vm), N // 2)
    after = rig.ring.all()[:N]
    trial.expect("flags", [one.flags for one in after], [0] * (N // 2) + [DIRTY] * (N // 2))
    same = [(one.slot, one.offset) for one in after] == [(b.slot, b.offset) for b in before]
    trial.expect("slots and offsets are as before", same, True)


@rule(
    "reset.protects",
    "exactly the pages whose entries were reset are logged again; on arm64 also such as lie "
    "between them in 64 pages",
    source="arch/*/kvm, kvm_arch_mmu_enable_log_dirty_pt_masked()",
    needs=NEEDS,
    guest=True,
    meaning="pages that were handed back are written without being logged",
)
def protects(trial: Trial) -> None:
    """Even pages are reset, odd ones are not."""
    rig = Rig(trial, N)
    even, odd = list(range(0, N, 2)), list(range(1, N, 2))
    rig.write([*even, *odd])
    # with PML the ring need not be in this order
    taken = {logged.page for logged in rig.ring.take(N // 2)}
    trial.expect("entries reset", reset(rig.vm), N // 2)
    rig.ring.take()
    logged = set(rig.again(range(N)))
    trial.expect("pages not logged again of those reset", taken - logged, set())
    if X86:
        trial.expect("pages logged again that were not reset", logged - taken, set())
    else:
        trial.note("neighbours logged again", len(logged - taken))


@rule(
    "reset.before_reading",
    "what is written between harvest and reset is in no later log; what is written after it is",
    source="Documentation/virt/kvm/api.rst, 8.29",
    needs=NEEDS,
    guest=True,
    meaning="a VMM resets first and reads pages then; the other way round it sends old contents",
)
def before_reading(trial: Trial) -> None:
    """The contents show it."""
    rig = Rig(trial, N)
    rig.write(range(N))
    rig.ring.take()
    early = rig.words()
    rig.write(range(N))
    trial.expect("entries reset", reset(rig.vm), N)
    late = rig.words()
    trial.expect("entries of the writes in between", rig.ring.dirty(), [])
    changed = sum(a != b for a, b in zip(early, late, strict=True))
    trial.expect("pages whose contents changed in between", changed, N)
    trial.expect("pages logged after the reset", sorted(rig.again(range(N))), list(range(N)))


@rule(
    "reset.closed_vcpu",
    "closing a vCPU's fd does not keep its ring from being reset",
    source=IOCTL,
    needs=NEEDS,
    guest=True,
)
def closed_vcpu(trial: Trial) -> None:
    """Harvested before it is closed."""
    rig = Rig(trial, N)
    rig.write(range(N))
    trial.expect("entries taken", len(rig.ring.take()), N)
    rig.ring.map.close()
    rig.vcpus[0].close()
    trial.expect("entries reset", reset(rig.vm), N)
    trial.expect("entries reset by a second call", reset(rig.vm), 0)


@rule(
    "reset.other_vm",
    "a reset is about one VM's rings; those of others stay as they are",
    source=IOCTL,
    needs=NEEDS,
    guest=True,
)
def other_vm(trial: Trial) -> None:
    """Two VMs, both harvested."""
    one, two = Rig(trial, N), Rig(trial, N)
    for rig in (one, two):
        rig.write(range(N))
        rig.ring.take()
    trial.expect("entries reset of the first", reset(one.vm), N)
    flags = {entry.flags for entry in two.ring.all()[:N]}
    trial.expect("flags in the second's ring", flags, {RESET})
    trial.expect("entries reset of the second", reset(two.vm), N)


@rule(
    "reset.two_threads",
    "two threads that reset at the same time count each entry once",
    source=IOCTL,
    needs=NEEDS,
    guest=True,
)
def two_threads(trial: Trial) -> None:
    """Twenty times, from a barrier on."""
    rig = Rig(trial, 2 * N, vcpus=2)
    for turn in range(20):
        for index in range(2):
            rig.write(range(index * N, (index + 1) * N), index)
            rig.rings[index].take()
        start = threading.Barrier(2)
        counts: list[int] = []

        def one(start: threading.Barrier = start, counts: list[int] = counts) -> None:
            start.wait()
            counts.append(reset(rig.vm))

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        trial.expect(f"entries both have reset, turn {turn}", sum(counts), 2 * N)
        trial.expect("entries reset by a third call", reset(rig.vm), 0)
