"""A real QEMU to look at: a 64 KiB firmware that writes pages for ever, and its monitor.

The guest stays in real mode. It writes one word into each page of the lower memory in turn, and
after each of them into one page more, the hot one; some forty instructions lie between two
stores, so that a ring that gets full stops it in time on hosts that emulate real mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from qemu.qmp import QMPClient

if TYPE_CHECKING:
    from collections.abc import Mapping

PROGRAM = "qemu-system-x86_64"
FIRST, LAST, HOT = 0x01, 0x96, 0x98  # pages; 150 of them and the hot one: no power of two
PATIENCE_S = 60


def firmware(delay: int = 40) -> bytes:
    """Assemble the guest; it stands at the end of the first MiB."""
    code = bytes.fromhex(
        "fa"  # cli
        "bb0001"  # mov bx, 0x0100: the segment of page 1
        # next:
        "8edb"  # mov ds, bx
        "ff060000"  # inc word [0]
    )
    wait = bytes([0xB9, delay & 0xFF, delay >> 8, 0xE2, 0xFE])  # mov cx, delay; loop $
    code += wait
    code += bytes.fromhex(
        "b80098"  # mov ax, 0x9800: the segment of the hot page
        "8ed8"  # mov ds, ax
        "ff060000"  # inc word [0]
    )
    code += wait
    code += bytes.fromhex(
        "81c30001"  # add bx, 0x0100
        "81fb0097"  # cmp bx, 0x9700
    )
    back = 4 - (len(code) + 2)
    code += bytes([0x72, back & 0xFF])  # jb next
    code += bytes([0xEB, (1 - (len(code) + 2)) & 0xFF])  # jmp to the mov before it
    image = code.ljust(0xFFF0, b"\xf4")
    return (image + bytes.fromhex("ea000000f0")).ljust(0x10000, b"\x00")  # jmp f000:0000


class Qemu:
    """QEMU with the firmware and a monitor; ended with its context.

    Args:
        ring: Entries of the dirty rings; 0: bitmap mode.
        halted: The guest halts instead.
        names: Threads are named.
    """

    def __init__(self, *, ring: int = 4096, halted: bool = False, names: bool = True) -> None:
        if shutil.which(PROGRAM) is None:
            pytest.skip(f"{PROGRAM} is not installed (Debian: qemu-system-x86)")
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        bios = firmware()
        if halted:
            bios = bytes.fromhex("faf4ebfd").ljust(0xFFF0, b"\xf4") + bios[0xFFF0:]
        (folder / "bios").write_bytes(bios)
        accel = f"kvm,dirty-ring-size={ring}" if ring else "kvm"
        socket = folder / "qmp"
        self._loop = asyncio.new_event_loop()
        self.process = subprocess.Popen(
            [
                *(PROGRAM, "-nodefaults", "-display", "none", "-m", "16", "-accel", accel),
                *("-bios", str(folder / "bios")),
                *("-name", f"test,debug-threads={'on' if names else 'off'}"),
                *("-qmp", f"unix:{socket},server=on,wait=off"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        self._client = QMPClient("test")
        try:
            self._connect(socket)
        except BaseException:
            self._end()
            raise

    def _connect(self, socket: Path) -> None:
        end = time.monotonic() + PATIENCE_S
        while not socket.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                assert self.process.stderr is not None
                pytest.fail(f"{PROGRAM} has not started: {self.process.stderr.read()}")
        self._loop.run_until_complete(self._client.connect(str(socket)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # it may have been killed by the test
            self._loop.run_until_complete(self._client.disconnect())
        self._end()

    def _end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._loop.close()
        self._folder.cleanup()

    def ask(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Have the monitor do something."""
        return self._loop.run_until_complete(
            self._client.execute(command, dict(arguments or {}) or None)
        )

    @property
    def status(self) -> str:
        """What query-status says."""
        answer = self.ask("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])

    def measure(self, seconds: int) -> None:
        """Have QEMU log, and measure its dirty rate from its rings, for so long."""
        self.ask("calc-dirty-rate", {"calc-time": seconds, "mode": "dirty-ring"})

    def measured(self) -> int | None:
        """Return the rate in MiB/s; None: not done yet."""
        answer = self.ask("query-dirty-rate")
        assert isinstance(answer, dict)
        return int(answer["dirty-rate"]) if answer["status"] == "measured" else None
