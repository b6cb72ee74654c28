"""Run the command as a user does."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["ENV", "KVMRING", "kvmring"]

KVMRING = [sys.executable, "-W", "error", "-m", "kvmring"]
ENV = {**os.environ, "COLUMNS": "80"}


def kvmring(*args: object) -> subprocess.CompletedProcess[str]:
    """Run a command without a terminal, 80 columns wide."""
    return subprocess.run(
        [*KVMRING, *map(str, args)], capture_output=True, text=True, timeout=60, env=ENV
    )
