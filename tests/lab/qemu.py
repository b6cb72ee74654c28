"""A machine that QEMU emulates: its command line and its channels.

QEMU emulates everything (TCG): that is what gives the guest a hypervisor mode
of its own, EL2 or SVM, and so a real KVM, on any host. What the guest's
command writes comes back over virtio-serial ports, each a socket pair whose
other end QEMU holds.
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import need_tool
from .vm import CHANNELS, Running, tethered

if TYPE_CHECKING:
    from pathlib import Path

_QEMU = {
    "arm64": ("qemu-system-aarch64", "qemu-system-arm"),
    "x86_64": ("qemu-system-x86_64", "qemu-system-x86"),
}
_MACHINE = {
    # The ITS of the virt machine comes with gic-version=3.
    "arm64": ["-M", "virt,virtualization=on,gic-version=3"],
    "x86_64": ["-M", "q35"],
}
_CONSOLE = {"arm64": "ttyAMA0", "x86_64": "ttyS0"}


def find_qemu(arch: str) -> str:
    """Return the path of the emulator for *arch*, or raise with its package."""
    return need_tool(*_QEMU[arch])


@dataclass(frozen=True, slots=True)
class QemuMachine:
    """What to boot and on what."""

    arch: str
    kernel: Path
    initrd: int  # an open file; it has no name, so that nothing can leave it behind
    console_log: Path
    cpu: str
    cpus: int
    memory_mib: int

    @property
    def emulator(self) -> str:
        """What messages call it."""
        return "QEMU"

    def command(self, channel_fds: dict[str, int], *, interactive: bool = False) -> list[str]:
        """Return QEMU's command line; *channel_fds* are its ends of the channels."""
        args = [
            find_qemu(self.arch),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]
        args += ["-accel", "tcg", *_MACHINE[self.arch], "-cpu", self.cpu]
        args += ["-smp", str(self.cpus), "-m", str(self.memory_mib)]
        args += ["-kernel", str(self.kernel), "-initrd", f"/dev/fd/{self.initrd}"]
        # loglevel=5 keeps warnings on the console, so a WARN of KVM is in the log; after an oops
        # the guest would only hang.
        args += ["-append", f"console={_CONSOLE[self.arch]} loglevel=5 oops=panic panic=-1"]
        log = _escape(self.console_log)
        if interactive:
            args += ["-chardev", f"stdio,id=console,signal=off,logfile={log}"]
        else:
            args += ["-chardev", f"file,id=console,path={log}"]
        args += ["-serial", "chardev:console"]
        if channel_fds:
            args += ["-device", "virtio-serial-pci,max_ports=4"]
        for name, fd in channel_fds.items():
            args += ["-chardev", f"socket,id={name},fd={fd}"]
            args += ["-device", f"virtserialport,chardev={name},name=kvmring.{name}"]
        return args

    def start(self) -> Running:
        """Start QEMU; the channels end when it goes, for whatever reason."""
        ours, fds = {}, {}
        for name in CHANNELS:
            near, far = socket.socketpair()
            ours[name], fds[name] = near.detach(), far.detach()
        try:
            with self._log.open("wb") as errors:
                process = tethered(
                    self.command(fds),
                    pass_fds=[self.initrd, *fds.values()],
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                )
        except BaseException:
            for fd in ours.values():
                os.close(fd)
            raise
        finally:
            for fd in fds.values():
                os.close(fd)
        return Running(process, ours)

    def run_interactive(self) -> int:
        """Boot with the console on this terminal; return QEMU's status."""
        command = self.command({}, interactive=True)
        with tethered(command, pass_fds=[self.initrd], own_session=False) as process:
            return process.wait()

    @property
    def _log(self) -> Path:
        return self.console_log.with_name("qemu.log")

    def last_words(self) -> str:
        """Return the last line of what QEMU itself said."""
        said = self._log.read_text(errors="replace").strip()
        return said.splitlines()[-1] if said else "no message"

    def ended_by_guest(self, code: int) -> bool:
        """Tell whether exit status *code* is that of a guest that powered off or restarted."""
        return code == 0


def _escape(path: Path) -> str:
    """Return *path* for use inside a QEMU option, where a comma is doubled."""
    return str(path).replace(",", ",,")
