"""A program for the tests of host/: another process with VMs, which does as it is told and tells.

    python neighbour.py '[{"entries": 1024, "vcpus": 2, "pages": 4096}, ...]'

Orders are lines of JSON on standard input, each answered by one line: what was done, and the
truth about it. A VM with "entries": 0 has no rings.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvmring import DirtyGfns, Exit, ExitReason, Runner, System, Tracker, page_size
from kvmring.guests import PageWriter, page_order

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmring import VCPU

Answer = dict[str, int | list[int]]


class Machine:
    """One VM with a guest."""

    def __init__(self, kvm: System, *, entries: int, vcpus: int, pages: int) -> None:
        self.vm = kvm.create_vm()
        if entries:
            self.vm.enable_dirty_ring(entries)
        self.ram = self.vm.add_memory(0, pages * page_size(), log_dirty=True)
        self.guest = PageWriter(kvm, self.vm, num_vcpus=vcpus)
        self.gfns = DirtyGfns(1 << 20)

    def write(self, vcpu: int, first: int, pages: int) -> Answer:
        """Write pages; a full ring is collected, anything else left in the ring."""
        gpas = page_order(self.ram, first_page=first, num_pages=pages)
        self.guest.load(vcpu, gpas)
        exits = entries = 0
        while not self.guest.is_done(exit := self.guest.run(vcpu)):
            assert exit.reason is ExitReason.DIRTY_RING_FULL
            exits += 1
            entries += self.harvest()
            self.reset()
        return {"exits": exits, "entries": entries}

    def stuck(self, vcpu: int, times: int) -> Answer:
        """Run into the full ring so many times, and reset nothing."""
        self.guest.load(vcpu, page_order(self.ram))
        for _ in range(times):
            assert self.guest.run(vcpu).reason is ExitReason.DIRTY_RING_FULL
        return {"exits": times}

    def harvest(self) -> int:
        self.gfns.clear()
        return self.vm.harvest(self.gfns)

    def reset(self) -> int:
        return self.vm.reset_dirty_rings().reset

    def flow(self, seconds: float, pages: int, every_s: float, name: str) -> Answer:
        """Let every vCPU write its pages over and over in a thread; returns what was logged.

        The threads are there when {} is printed; they begin when a line is read.
        """
        named = threading.local()

        def on_exit(vcpu: VCPU, exit: Exit) -> bool:
            return False

        for index in range(len(self.guest)):
            self.guest.load(
                index, page_order(self.ram, order="random", num_pages=pages, seed=index), rounds=0
            )
        runner = Runner(self.guest.vcpus, on_exit)
        with Tracker(self.vm) as tracker:
            tracker.attach(runner)
            serve = runner.on_full

            def on_full(vcpu: VCPU) -> None:
                if name and not hasattr(named, "done"):
                    named.done = True
                    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
                    comm.write_text(name.format(vcpu.id))
                if serve is not None:
                    serve(vcpu)

            runner.on_full = on_full
            pause = threading.Event()
            runner.pause()
            with runner:
                print("{}", flush=True)
                sys.stdin.readline()
                runner.resume()
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    tracker.collect()
                    pause.wait(every_s)
                for index in range(len(self.guest)):
                    self.guest.stop(index)
                runner.join()
            tracker.collect()
            return {
                "entries": tracker.stats.entries,
                "exits": tracker.stats.ring_full_exits,
                "stores": sum(self.guest.progress(i).stores for i in range(len(self.guest))),
            }


def obey(machines: list[Machine], order: Mapping[str, str | int | float]) -> Answer:
    """Do what one line says."""
    machine = machines[int(order.get("vm", 0))]
    number = {key: int(value) for key, value in order.items() if isinstance(value, int)}
    match order["do"]:
        case "write":
            return machine.write(number.get("vcpu", 0), number["first"], number["pages"])
        case "stuck":
            return machine.stuck(number.get("vcpu", 0), number["times"])
        case "harvest":
            n = machine.harvest()
            return {"entries": n, "pages": [gfn.offset for gfn in machine.gfns]}
        case "reset":
            return {"reset": machine.reset()}
        case "flow":
            return machine.flow(
                float(order["seconds"]),
                number["pages"],
                float(order["every_s"]),
                str(order.get("name", "")),
            )
        case "dup":
            return {"fd": os.dup(machine.vm.fileno()), "vcpu": os.dup(machine.vm.vcpus[0].fileno())}
        case "close":
            machine.vm.close()
            return {}
    raise ValueError(order)


def main() -> None:
    with System() as kvm:
        machines = [Machine(kvm, **plan) for plan in json.loads(sys.argv[1])]
        print(json.dumps({"pid": os.getpid(), "tid": threading.get_native_id()}), flush=True)
        for line in sys.stdin:
            print(json.dumps(obey(machines, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
