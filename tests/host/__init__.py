"""Tests of kvmring.host's commands, and of what it says about a real QEMU; not run in the labs."""
