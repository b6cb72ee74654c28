"""The tests: unit/ without a device, c/ the C alone, kvm/ on /dev/kvm, lab/ in emulated hosts."""
