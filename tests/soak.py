"""Soak the Tracker: random guests, rings, moments, slot changes and signal floods, for a time.

Each episode is a small migration under fire: RAM is copied by what collect() and finish() name,
and the copy must equal RAM byte by byte. `make soak SECONDS=60` runs it. Everything an episode
does comes from its seed, which is printed when something differs; the kernel's timing does
not, so a seed may need `--episodes` of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmring import VM, Cap, DirtySet, ResetResult, Runner, Source, System, Tracker, ioctls
from kvmring.abi import PAGE_SIZE
from kvmring.guests import ORDERS, PageWriter, page_order
from kvmring.serving import RingServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmring import VCPU, Exit, GuestMemory

SPARE_GPA = 1 << 35  # of slots that come and go, behind everything else


@dataclass(slots=True)
class Totals:
    """What was seen over all episodes."""

    episodes: int = 0
    collections: int = 0
    pages: int = 0
    resets: int = 0
    short_resets: int = 0
    lost: int = 0


@contextlib.contextmanager
def signal_flood() -> Iterator[None]:
    """Have a child process send SIGUSR1 to every thread of this one, without pause.

    Another process, since a thread of this one would wait for the GIL.
    """
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            while os.getppid() == parent:
                for name in os.listdir(f"/proc/{parent}/task"):
                    with contextlib.suppress(ProcessLookupError):
                        _tgkill(parent, int(name))
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        signal.signal(signal.SIGUSR1, old)


_LIBC = ctypes.CDLL(None)


def _tgkill(pid: int, tid: int) -> None:
    """Signal one thread; os.kill() would let the kernel choose among them."""
    if _LIBC.tgkill(pid, tid, int(signal.SIGUSR1)):
        raise ProcessLookupError


def unguarded_reset(vm: VM) -> ResetResult:
    """Reset by the bare ioctl, as a VMM without the guard would: for comparison."""
    done = 0
    while True:
        result = ioctls.reset_dirty_rings(vm, guarded=False)
        done += result.reset
        if result.reset >= result.expected or not result.reset:
            return ResetResult(reset=done, suspects=DirtySet(vm), calls=1, unknown=0)


def not_lent(server: RingServer, dirty: DirtySet) -> None:
    """Lend nothing: full rings come to Python then, and to unguarded_reset()."""


class Episode:
    """One VM's life, decided by a seed."""

    def __init__(self, kvm: System, seed: int) -> None:
        self.kvm = kvm
        self.rng = random.Random(seed)
        rng = self.rng
        offered = bool(kvm.check_extension(Cap.DIRTY_LOG_RING_ACQ_REL))
        self.ring = offered and rng.random() < 0.8
        self.entries = max(PAGE_SIZE // 16, 1024) << rng.randrange(3)
        self.pages = rng.choice([64, 256, 1024, 4096])
        self.vcpus = rng.randint(1, 4)
        self.log = [Source.CLEAR_LOG, Source.BITMAP][rng.randrange(2)]

    def run(self, totals: Totals) -> int:
        """Do it; return how many pages the copy has wrong at the end."""
        rng = self.rng
        with self.kvm.create_vm() as vm:
            if self.ring:
                vm.enable_dirty_ring(self.entries)
            ram = vm.add_memory(1 << 30, self.pages * PAGE_SIZE, log_dirty=True)
            guest = PageWriter(self.kvm, vm, num_vcpus=self.vcpus)
            for index in range(self.vcpus):
                first = rng.randrange(self.pages)
                gpas = page_order(
                    ram,
                    order=rng.choice(ORDERS),
                    first_page=first,
                    num_pages=rng.randint(1, self.pages - first),
                    stride=rng.randint(1, 64),
                    seed=rng.randrange(1 << 30),
                )
                guest.load(index, gpas, rounds=0)

            def on_exit(vcpu: VCPU, exit: Exit) -> bool:
                if not guest.is_done(exit):
                    raise AssertionError(f"vCPU {vcpu.id}: {exit}")
                return False

            runner = Runner(guest.vcpus, on_exit)
            source = Source.AUTO if self.ring else self.log
            with Tracker(vm, source) as tracker, contextlib.ExitStack() as stack:
                tracker.attach(runner)
                stack.enter_context(runner)
                if self.ring and rng.random() < 0.3:
                    stack.enter_context(tracker.reaper(interval_s=rng.choice([0.0005, 0.005])))
                copy = bytearray(ram.size_bytes)
                for _ in range(rng.randint(1, 12)):
                    self.something(vm, ram, tracker, runner)
                    take(ram, tracker.collect(flush=rng.random() < 0.5), copy)
                take(ram, tracker.finish(), copy)
                wrong = differing(bytes(copy), ram.read())
                stats = tracker.stats
                totals.collections += stats.collections
                totals.pages += stats.pages
                totals.resets += stats.resets
                totals.short_resets += stats.short_resets
                tracker.close()
                for index in range(self.vcpus):
                    guest.stop(index)
                runner.resume()
                runner.join()
                if rng.random() < 0.3:
                    self.close_in_some_order(vm)
        totals.episodes += 1
        totals.lost += wrong
        return wrong

    def something(self, vm: VM, ram: GuestMemory, tracker: Tracker, runner: Runner) -> None:
        """Do one of the things that go on around a migration."""
        what = self.rng.randrange(8)
        if what == 0:
            spare = vm.add_memory(SPARE_GPA, 64 * PAGE_SIZE, log_dirty=True)
            tracker.mark(spare.gpa, PAGE_SIZE)
            if self.rng.random() < 0.5:
                spare.move(SPARE_GPA << 1)
            spare.remove()
            spare.close()
        elif what == 1:
            runner.pause()
            page = self.rng.randrange(self.pages)
            at = page * PAGE_SIZE + PAGE_SIZE - 8
            ram.write(at, self.rng.randbytes(8))
            tracker.mark(ram.gpa + at, 8)
            if self.rng.random() < 0.5:
                tracker.rearm()
            runner.resume()
        elif what == 2:
            runner.kick()
        elif what == 3:
            runner.pause()
            ram.set_log_dirty(False)
            ram.set_log_dirty(True)
            runner.resume()
        else:
            threading.Event().wait(self.rng.random() * 0.02)

    def close_in_some_order(self, vm: VM) -> None:
        closes = [handle.close for handle in (vm, *vm.vcpus)]
        closes += [memory.close for memory in vm.memory.values()]
        self.rng.shuffle(closes)
        for close in closes:
            close()


def take(ram: GuestMemory, dirty: DirtySet, copy: bytearray) -> None:
    """Copy the pages of a collection, as they are now."""
    for first, length in dirty[ram.slot].runs():
        at, size = first * PAGE_SIZE, length * PAGE_SIZE
        copy[at : at + size] = ram.read(at, size)


def differing(a: bytes, b: bytes) -> int:
    """Count pages that differ."""
    if a == b:
        return 0
    spans = (slice(at, at + PAGE_SIZE) for at in range(0, len(a), PAGE_SIZE))
    return sum(a[span] != b[span] for span in spans)


def soak(kvm: System, *, seconds: float, seed: int, episodes: int | None = None) -> Totals:
    """Run episodes until the time is up, or so many of one seed."""
    totals = Totals()
    end = time.monotonic() + seconds
    number = 0
    with signal_flood():
        while time.monotonic() < end and (episodes is None or number < episodes):
            this = seed if episodes is not None else seed + number
            wrong = Episode(kvm, this).run(totals)
            number += 1
            if wrong:
                print(f"{wrong} pages lost; again: --seed {this} --episodes 100", flush=True)
    return totals


def main() -> int:
    """Soak, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="random without it")
    parser.add_argument("--episodes", type=int, default=None, help="that many, all of --seed")
    parser.add_argument("--unguarded", action="store_true", help="reset by the bare ioctl")
    args = parser.parse_args()
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    if args.unguarded:
        VM.reset_dirty_rings = unguarded_reset  # type: ignore[method-assign,assignment]
        RingServer.lend = not_lent  # type: ignore[method-assign,assignment]
    with System() as kvm:
        totals = soak(kvm, seconds=args.seconds, seed=seed, episodes=args.episodes)
    print(
        f"seed {seed}: {totals.episodes} episodes, {totals.collections} collections, "
        f"{totals.pages} pages, {totals.resets} resets ({totals.short_resets} short), "
        f"{totals.lost} lost"
    )
    return 1 if totals.lost else 0


if __name__ == "__main__":
    sys.exit(main())
