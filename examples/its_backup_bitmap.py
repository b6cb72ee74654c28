"""Show what the backup bitmap is for: pages that KVM dirties outside any vCPU (arm64)."""

from kvmring import DirtySet, KvmNotSupported, System
from kvmring.guests import PageWriter
from kvmring.guests.its import ITS_BYTES, ItsTables
from kvmring.vgic import GicV3, Its


def main() -> None:
    """Let a guest program an ITS, save its tables, and print who logged which page."""
    with System() as kvm, kvm.create_vm() as vm:
        # The order that KVM wants: ring, bitmap, then memory; devices, vCPUs, then init.
        vm.enable_dirty_ring(entries=4096, with_bitmap=True)
        gic = GicV3(vm)
        its = Its(gic)
        ram = vm.add_memory(gpa=1 << 30, size_bytes=ITS_BYTES, log_dirty=True)
        guest = PageWriter(kvm, vm)
        gic.init()
        its.init()

        # The guest maps a collection, a device and three events, by commands in its memory.
        tables = ItsTables(its, ram)
        tables.enable_lpis(gic, guest.vcpus[0])
        guest.store(0, tables.map_collection(0) + tables.map_device(5, events=[0, 1, 2]))
        guest.run(0)

        # No vCPU runs any more: rings first, ...
        dirty = DirtySet(vm)
        vm.harvest(dirty)
        vm.reset_dirty_rings()
        print("by the ring:  ", list(dirty[ram.slot]))
        # ... then what KVM writes itself, ...
        its.save_tables()
        print("in the ring after the save:", vm.harvest(dirty))
        # ... and the bitmap last of all.
        backup = vm.get_dirty_log(ram.slot)
        print("by the bitmap:", list(backup))
        print("tables lie in:", sorted(tables.saved_pages()))


if __name__ == "__main__":
    try:
        main()
    except KvmNotSupported as error:
        raise SystemExit(f"this example needs arm64: {error}") from None
