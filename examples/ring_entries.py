"""Show a dirty ring's entries one by one: slot, page, and the vCPU that logged it."""

from kvmring import DirtyGfns, System
from kvmring.guests import PageWriter, page_order


def main() -> None:
    """Let two vCPUs write a few pages each, and print what their rings hold."""
    with System() as kvm, kvm.create_vm() as vm:
        vm.enable_dirty_ring(entries=4096)
        ram = vm.add_memory(gpa=1 << 30, size_bytes=1 << 20, log_dirty=True)
        guest = PageWriter(kvm, vm, num_vcpus=2)
        guest.load(0, page_order(ram, num_pages=5))
        guest.load(1, page_order(ram, first_page=8, num_pages=5, order="strided"))
        for index in range(len(guest)):
            guest.run(index)
        entries = DirtyGfns(capacity=4096)
        print(vm.harvest(entries), "entries")
        for entry in entries:
            print(f"vCPU {entry.vcpu}: slot {entry.slot} page {entry.offset}")
        print(vm.reset_dirty_rings().reset, "reset")


if __name__ == "__main__":
    main()
