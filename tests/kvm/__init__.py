"""Tests on a real /dev/kvm."""
