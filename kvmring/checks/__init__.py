"""The kernel's rules of dirty logging as checks that run on any host: `kvmring check`.

rules.py says what a check is; one module per group declares them; run.py gives each a process
and a time limit; report.py prints them. Importing this package declares every rule.
"""

from kvmring.checks import (
    bitmap_backup,
    caps,
    clear,
    clear_range,
    enable_cap,
    enable_cap_bitmap,
    fork,
    fork_share,
    get,
    get_refused,
    manual_protect,
    memslot,
    memslot_log,
    mmap,
    reset,
    reset_pages,
    ring,
    ring_full,
    ring_marks,
    signals,
    signals_reset,
    truth,
    vgic,
)
from kvmring.checks.rules import RULES, Rule, Trial

__all__ = [
    "RULES",
    "Rule",
    "Trial",
    "bitmap_backup",
    "caps",
    "clear",
    "clear_range",
    "enable_cap",
    "enable_cap_bitmap",
    "fork",
    "fork_share",
    "get",
    "get_refused",
    "manual_protect",
    "memslot",
    "memslot_log",
    "mmap",
    "reset",
    "reset_pages",
    "ring",
    "ring_full",
    "ring_marks",
    "signals",
    "signals_reset",
    "truth",
    "vgic",
]
