"""Tests that need no device: the ring is synthetic, the C is the real one."""
