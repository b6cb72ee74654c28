"""A program for test_lifetime.py: close handles in random order while threads use them.

    python chaos.py SEED ROUNDS ENTRIES

Each round makes a VM with rings, RAM, a device and a guest, starts threads that run vCPUs,
harvest, reset, read memory and ask, and closes everything under them, in an order that the seed
decides. A thread ends with ClosedError; anything else that it says is an error. The program
prints how many calls were made, and must never end by a signal.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

from kvmring import (
    ClosedError,
    DeviceType,
    DirtyGfns,
    DirtySet,
    StateError,
    System,
    page_size,
)
from kvmring.guests import PageWriter, page_order

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60


class Closable(Protocol):
    """Any handle."""

    def close(self) -> None:
        """Close it."""


class Round:
    """One VM, the threads that use it, and what they came to."""

    def __init__(self, kvm: System, rng: random.Random, entries: int) -> None:
        self.rng = rng
        self.calls = 0
        self.wrong: list[BaseException] = []
        self.vm = kvm.create_vm()
        self.vm.enable_dirty_ring(entries)
        # more pages than its ring takes, for each: a guest stops when nobody resets any more
        self.ram = self.vm.add_memory(0, 2 * entries * page_size(), log_dirty=True)
        self.guest = PageWriter(kvm, self.vm, num_vcpus=2)
        self.handles: list[Closable] = [self.vm, self.ram, *self.vm.vcpus]
        self.handles += [vcpu.dirty_ring for vcpu in self.vm.vcpus]
        if self.vm.has_device(DeviceType.VFIO):
            self.handles.append(self.vm.create_device(DeviceType.VFIO))
        for index in range(2):
            gpas = page_order(
                self.ram, order="random", first_page=index * entries, num_pages=entries
            )
            self.guest.load(index, gpas, rounds=0)

    def until_closed(self, function: Callable[[], object]) -> None:
        """Call again and again, until the handle is closed."""
        try:
            while True:
                self.calls += 1
                try:
                    function()
                except StateError:  # another thread harvests just now
                    continue
        except ClosedError:
            return
        except BaseException as error:
            self.wrong.append(error)

    def users(self) -> list[Callable[[], object]]:
        """What the threads do."""
        vm, ram = self.vm, self.ram
        dirty, gfns = DirtySet(vm), DirtyGfns(64)
        ring = vm.vcpus[1].dirty_ring

        def take_some() -> None:
            gfns.clear()
            ring.harvest(gfns)

        def take_all() -> None:
            vm.harvest(dirty)
            vm.reset_dirty_rings()

        vcpus = vm.vcpus
        return [
            lambda: self.guest.run(0),
            lambda: self.guest.run(1),
            take_some,
            take_all,
            lambda: ram.read(0, page_size()),
            lambda: ram.write(0, bytes(8)),
            lambda: vm.check_extension(0),
            vcpus[0].kick,
            lambda: vcpus[1].running,
        ]

    def play(self) -> None:
        """Let them loose, and close everything under them."""
        threads = [
            threading.Thread(target=self.until_closed, args=(user,), daemon=True)
            for user in self.users()
        ]
        for thread in threads:
            thread.start()
        time.sleep(self.rng.random() * 0.01)
        order = list(self.handles)
        self.rng.shuffle(order)
        for handle in order:
            handle.close()
            if self.rng.random() < 0.5:
                time.sleep(self.rng.random() * 0.002)
        for thread in threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                raise SystemExit("a thread does not end after everything was closed")
        if self.wrong:
            raise self.wrong[0]


def main() -> None:
    """Play so many rounds."""
    seed, rounds, entries = (int(word) for word in sys.argv[1:])
    rng = random.Random(seed)
    calls = 0
    with System() as kvm:
        for _ in range(rounds):
            one = Round(kvm, rng, entries)
            one.play()
            calls += one.calls
    print(calls)


if __name__ == "__main__":
    main()
