"""Fetch a slot's dirty bitmap, and clear only what was taken: manual protection, no ring."""

from kvmring import Cap, System
from kvmring.guests import PageWriter, page_order


def main() -> None:
    """Log without a ring: KVM keeps the bits until KVM_CLEAR_DIRTY_LOG takes them."""
    with System() as kvm, kvm.create_vm() as vm:
        vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, [1])
        ram = vm.add_memory(gpa=1 << 30, size_bytes=4 << 20, log_dirty=True)
        guest = PageWriter(kvm, vm)
        guest.load(0, page_order(ram, num_pages=100))
        while not guest.is_done(guest.run(0)):
            pass
        first = vm.get_dirty_log(ram.slot)
        print(first.count(), "dirty pages;", vm.get_dirty_log(ram.slot).count(), "when asked again")
        vm.clear_dirty_log(ram.slot, first, first_page=0, num_pages=64)
        print(list(vm.get_dirty_log(ram.slot).runs()), "left after clearing pages 0 to 63")


if __name__ == "__main__":
    main()
