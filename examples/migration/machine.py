"""The source's VM: a guest that writes for ever, and the devices whose state lies in its RAM."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from kvmring import Cap, DeviceType, GuestError, KvmNotSupported, Runner, System, Tracker
from kvmring.guests import PageWriter, page_order
from kvmring.guests.its import ITS_BYTES, ItsTables
from kvmring.vgic import FRAME, GicV3, Its
from migration.stream import MAX_CHUNK, PAGE, chunks

if TYPE_CHECKING:
    from contextlib import ExitStack

    from kvmring import VCPU, VM, Exit, GuestMemory

RAM_GPA = 1 << 30


class Machine:
    """The source's VM: its guest, the threads that run it, and always a Tracker behind them."""

    def __init__(self, stack: ExitStack, *, pages: int, hot: int, vcpus: int) -> None:
        kvm = stack.enter_context(System())
        self.vm = vm = stack.enter_context(kvm.create_vm())
        if any(map(kvm.check_extension, (Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING))):
            vm.enable_dirty_ring(max(1024, PAGE // 16))  # with the backup bitmap, where there is
        ram = vm.add_memory(RAM_GPA, pages * PAGE)
        for offset, length in chunks(0, pages, MAX_CHUNK):
            ram.write(offset, os.urandom(length))
        its = ItsMachinery(vm, ram) if vm.with_bitmap else None
        self.guest = guest = PageWriter(kvm, vm, num_vcpus=vcpus, capacity=max(hot, 256))
        self.save = None if its is None else its.save
        if its is not None:
            its.program(guest)
        for index in range(vcpus):
            guest.load(index, page_order(ram, order="random")[index:hot:vcpus], rounds=0)
        self.rams = tuple(vm.memory.values())  # the guest's code and counters too
        for memory in self.rams:
            memory.set_log_dirty(True)
        self.runner = Runner(guest.vcpus, self._on_exit)
        self.tracker = Tracker(vm)
        stack.callback(lambda: self.tracker.close())
        self.tracker.start()
        self.tracker.attach(self.runner)
        stack.enter_context(self.runner)

    def _on_exit(self, vcpu: VCPU, exit: Exit) -> bool:
        raise GuestError(f"vCPU {vcpu.id} was to write for ever, and ended with {exit}", exit)

    def stores(self) -> int:
        """Count what the vCPUs have stored so far."""
        return sum(self.guest.progress(index).stores for index in range(len(self.guest)))

    def recover(self) -> None:
        """Let the guest run on, whatever became of an attempt, with a Tracker of its own.

        The old one may have frozen the VM; closed, it cannot serve full rings any more. So the
        vCPUs stand still until the new one can.
        """
        self.runner.pause()
        self.tracker.close()
        self.tracker = Tracker(self.vm)
        self.tracker.start()
        self.tracker.attach(self.runner)
        self.runner.resume()

    def await_stores(self, before: int, timeout_s: float) -> None:
        """Wait until the guest has stored something more; a failed vCPU's error is raised."""
        limit = time.monotonic() + timeout_s
        while self.stores() == before and time.monotonic() < limit:
            self.runner.join(0.01)


class ItsMachinery:
    """An ITS on arm64: KVM writes its tables into RAM in finish(), outside any vCPU."""

    def __init__(self, vm: VM, ram: GuestMemory) -> None:
        if not vm.has_device(DeviceType.ARM_VGIC_ITS):
            raise KvmNotSupported("KVM_DEV_TYPE_ARM_VGIC_ITS")
        self.gic = GicV3(vm)
        self.its = Its(self.gic)
        self.ram = vm.add_memory(-(-(ram.gpa + ram.size_bytes) // FRAME) * FRAME, ITS_BYTES)

    def program(self, guest: PageWriter) -> None:
        """Initialise it, and let the guest map a device and raise one of its interrupts."""
        self.gic.init()
        self.its.init()
        tables = ItsTables(self.its, self.ram)
        tables.enable_lpis(self.gic, guest.vcpus[0])
        commands = tables.map_collection(0) + tables.map_device(1, [0, 1])
        guest.store(0, commands + tables.interrupt(1, 1))
        exit = guest.run(0)
        if not guest.is_done(exit):
            raise GuestError(f"the guest programmed the ITS, and ended with {exit}", exit)

    def save(self) -> None:
        """Have KVM write the tables; only the backup bitmap names their pages."""
        self.its.save_tables()
        self.gic.save_pending_tables()
