"""kvmring: KVM dirty-page logging on a real /dev/kvm, from Python."""

__version__ = "0.1.0"
