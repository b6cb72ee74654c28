"""signals.*: signals during KVM_RUN and the bitmap's ioctls; signals_reset.py has the reset's."""

from __future__ import annotations

import errno
import os
import signal
import struct
from functools import partial
from typing import TYPE_CHECKING

from kvmring.abi import Cap, ExitReason
from kvmring.bitmap import DirtyBitmap
from kvmring.checks import raw
from kvmring.checks.alarm import Alarm, seconds_of
from kvmring.checks.rig import Rig, RunPage, reset, run_once
from kvmring.checks.rules import Trial, rule

if TYPE_CHECKING:
    from collections.abc import Callable

RUN = "arch/x86/kvm/x86.c and arch/arm64/kvm/arm.c, kvm_arch_vcpu_ioctl_run()"
NEEDS = [Cap.DIRTY_LOG_RING_ACQ_REL]
KVM_SET_SIGNAL_MASK = 0x4004AE8B
KVM_EXIT_MMIO, KVM_EXIT_INTR = 6, 10
N = 100
EVERY_S = 0.002  # between signals during KVM_RUN: there is time for other things


@rule(
    "signals.run.interrupted",
    "a signal ends KVM_RUN with EINTR, and exit_reason is KVM_EXIT_INTR",
    source=RUN,
    guest=True,
)
def interrupted(trial: Trial) -> None:
    """A guest that runs for ever."""
    rig = Rig(trial, N, entries=0)
    rig.load(range(N), rounds=0)
    page, alarm = RunPage(rig.vcpus[0]), Alarm()
    for _ in range(5):
        with alarm.on(EVERY_S, EVERY_S):
            trial.errno("KVM_RUN", lambda: run_once(rig.vcpus[0]), errno.EINTR)
        trial.expect("exit_reason", page.exit_reason, KVM_EXIT_INTR)
    trial.expect_true("signals came", alarm.came >= 5, got=alarm.came)
    trial.expect_true("the guest ran", rig.guest.progress(0).stores > 0)


@rule(
    "signals.run.immediate_exit",
    "with immediate_exit KVM_RUN is EINTR without a step of the guest; exit_reason stands as it "
    "was, and the flag stays set",
    source=RUN,
    guest=True,
    meaning="a VMM looks at KVM_RUN's result before it looks at exit_reason",
)
def immediate_exit(trial: Trial) -> None:
    """After an exit for MMIO, three times; then without the flag."""
    rig = Rig(trial, N, entries=0)
    rig.write(range(N))
    page = RunPage(rig.vcpus[0])
    trial.expect("exit_reason of the last run", page.exit_reason, KVM_EXIT_MMIO)
    words = rig.words()
    rig.load(range(N))
    page.immediate_exit = 1
    for _ in range(3):
        trial.errno("KVM_RUN", lambda: run_once(rig.vcpus[0]), errno.EINTR)
        trial.expect("exit_reason", page.exit_reason, KVM_EXIT_MMIO)
        trial.expect("immediate_exit", page.immediate_exit, 1)
    trial.expect("stores of the guest", rig.guest.progress(0).stores, 0)
    trial.expect("memory is as before", rig.words() == words, True)
    page.immediate_exit = 0
    rig.finish()
    trial.expect("stores without the flag", rig.guest.progress(0).stores, N)


@rule(
    "signals.run.blocked",
    "a signal that the thread blocks does not end KVM_RUN",
    source=RUN,
    guest=True,
)
def blocked(trial: Trial) -> None:
    """One is pending all the time."""
    rig = Rig(trial, N, entries=0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.raise_signal(signal.SIGUSR1)
    rig.load(range(N), rounds=20)
    exit = rig.guest.run(0)
    trial.expect("exit reason of the first KVM_RUN", exit.reason, ExitReason.MMIO)
    trial.expect("stores", rig.guest.progress(0).stores, 20 * N)
    trial.expect("signals pending", signal.sigpending(), {signal.SIGUSR1})


@rule(
    "signals.run.signal_mask",
    "a signal that is blocked by the thread and not by KVM_SET_SIGNAL_MASK ends KVM_RUN before "
    "the guest takes a step, and stays pending",
    source="virt/kvm/kvm_main.c, kvm_sigset_activate()",
    guest=True,
    meaning="a VMM that kicks its vCPUs this way cannot stop them before a last harvest",
)
def signal_mask(trial: Trial) -> None:
    """The older way to kick a vCPU without a race."""
    rig = Rig(trial, N, entries=0)
    page, vcpu = RunPage(rig.vcpus[0]), rig.vcpus[0]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.raise_signal(signal.SIGUSR1)
    raw.ioctl(vcpu, KVM_SET_SIGNAL_MASK, struct.pack("=IQ", 8, 0))
    rig.load(range(N))
    for _ in range(3):
        trial.errno("KVM_RUN", lambda: run_once(vcpu), errno.EINTR)
        trial.expect("exit_reason", page.exit_reason, KVM_EXIT_INTR)
        trial.expect("signals pending", signal.sigpending(), {signal.SIGUSR1})
    trial.expect("stores of the guest", rig.guest.progress(0).stores, 0)
    raw.ioctl(vcpu, KVM_SET_SIGNAL_MASK, 0)
    rig.finish()
    trial.expect("stores without a mask of its own", rig.guest.progress(0).stores, N)


@rule(
    "signals.run.mask_size",
    "KVM_SET_SIGNAL_MASK with a length that is not the kernel's 8 bytes is EINVAL",
    source="virt/kvm/kvm_main.c, kvm_vcpu_ioctl(), KVM_SET_SIGNAL_MASK",
)
def mask_size(trial: Trial) -> None:
    """Such as the C library's 128."""
    vcpu = trial.vm().create_vcpu()
    for length in (0, 4, 16, 128):
        argument = struct.pack("=I128x", length)
        call = partial(raw.ioctl, vcpu, KVM_SET_SIGNAL_MASK, argument)
        trial.errno(f"a mask of {length} bytes", call, errno.EINVAL)
    raw.ioctl(vcpu, KVM_SET_SIGNAL_MASK, struct.pack("=IQ", 8, 0))


@rule(
    "signals.run.log",
    "when a signal has ended KVM_RUN, the ring names all that the guest has written by then",
    source="arch/x86/kvm/vmx/vmx.c, vmx_flush_pml_buffer(); virt/kvm/dirty_ring.c",
    needs=NEEDS,
    guest=True,
    meaning="a VMM that has kicked its vCPUs misses pages in its last harvest",
)
def run_log(trial: Trial) -> None:
    """Interrupted again and again; one page may be beyond the guest's own count."""
    rig = Rig(trial, N)
    order = rig.shuffled(N)
    rig.load(order, rounds=0)
    alarm = Alarm()
    done, previous = 0, set[int]()
    for turn in range(20):
        with alarm.on(EVERY_S, EVERY_S):
            exit = rig.guest.run(0)
        trial.expect("exit reason", exit.reason, ExitReason.INTR)
        before, done = done, rig.guest.progress(0).stores
        written = {order[at % N] for at in range(before, min(done, before + N))}
        flying = order[done % N]
        if order[before % N] in previous and done - before < N:
            written.discard(order[before % N])  # its store may have come before its counting
        logged = set(rig.ring.pages())
        trial.expect(f"pages written and not logged, turn {turn}", written - logged, set())
        extra = logged - written - {flying, order[before % N]}
        trial.expect("pages logged and not written", extra, set())
        trial.expect("entries reset", reset(rig.vm) >= len(logged), True)
        previous = logged
    trial.note("stores", done)


def _around(trial: Trial, call: Callable[[], object], what: str) -> Callable[[], None]:
    """Return a function that makes a call with a signal timed into it, and expects it to work."""
    alarm = Alarm()
    length = max(seconds_of(call), 1e-5)

    def interrupted_call() -> None:
        with alarm.on(length * trial.random.random()):
            trial.errno(what, call, 0)

    return interrupted_call


@rule(
    "signals.get",
    "a signal during KVM_GET_DIRTY_LOG neither makes it fail nor takes a page out of it",
    source="virt/kvm/kvm_main.c, kvm_get_dirty_log_protect()",
    guest=True,
    meaning="pages can be lost when signals arrive during KVM_GET_DIRTY_LOG",
)
def get(trial: Trial) -> None:
    """Without manual protect: what is got is cleared and protected anew."""
    rig = Rig(trial, 1024, entries=0)
    bitmap = DirtyBitmap(1024)
    slot = rig.ram.slot
    one = _around(trial, lambda: rig.vm.get_dirty_log(slot, into=bitmap), "KVM_GET_DIRTY_LOG")
    for turn in range(20):
        pages = trial.random.sample(range(1024), N)
        rig.write(pages)
        one()
        trial.expect(f"pages got, turn {turn}", list(bitmap.page_numbers()), sorted(pages))


@rule(
    "signals.clear",
    "a signal during KVM_CLEAR_DIRTY_LOG neither makes it fail nor takes a page out of the log",
    source="virt/kvm/kvm_main.c, kvm_clear_dirty_log_protect()",
    needs=[Cap.MANUAL_DIRTY_LOG_PROTECT2],
    guest=True,
    meaning="pages can be lost when signals arrive during KVM_CLEAR_DIRTY_LOG",
)
def clear(trial: Trial) -> None:
    """With manual protect."""
    rig = Rig(trial, 1024, entries=0)
    rig.vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, [1])
    bitmap = DirtyBitmap(1024)
    slot = rig.ram.slot
    one = _around(trial, lambda: rig.vm.clear_dirty_log(slot, bitmap), "KVM_CLEAR_DIRTY_LOG")
    for turn in range(20):
        pages = trial.random.sample(range(1024), N)
        rig.write(pages)
        rig.vm.get_dirty_log(slot, into=bitmap)
        trial.expect(f"pages got, turn {turn}", list(bitmap.page_numbers()), sorted(pages))
        one()
        left = rig.vm.get_dirty_log(slot)
        trial.expect("pages left when they were cleared", list(left.page_numbers()), [])


@rule(
    "signals.ignored",
    "a signal that is ignored disturbs neither KVM_RUN nor a reset",
    source="kernel/signal.c, sig_ignored()",
    needs=NEEDS,
    guest=True,
)
def ignored(trial: Trial) -> None:
    """From a timer, all the time, and just before each run."""
    rig = Rig(trial, N)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, EVERY_S, EVERY_S)
    try:
        for turn in range(20):
            os.kill(os.getpid(), signal.SIGALRM)
            rig.load(range(N))
            exit = rig.guest.run(0)
            trial.expect(f"exit reason, turn {turn}", exit.reason, ExitReason.MMIO)
            trial.expect("pages logged", sorted(rig.ring.pages()), list(range(N)))
            trial.expect("entries reset", reset(rig.vm), N)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
