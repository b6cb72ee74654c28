"""A machine that Bochs emulates: the only emulator with VMX, EPT and PML, so Intel's KVM.

It runs some 100 million instructions a second and has an older idea of a PC: the guest
boots from a CD, which isolinux makes bootable; its serial ports are the
console and the channels (Bochs has no virtio). Bochs wants a terminal, which it
gets and nobody reads, and Debian's build waits in its debugger until it is
told to continue.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .errors import LabError, need_tool
from .vm import CHANNELS, Running, tethered

if TYPE_CHECKING:
    from .kernels import Kernel

_PACKAGES = "bochs bochs-term bochsbios vgabios xorriso isolinux syslinux-common"
_BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
_VGA_BIOS = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
_ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
_LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
_TERM_PLUGIN = "*/bochs/plugins/libbx_term_gui.so"

# The first port is the console; init finds the others by this list.
PORTS = {name: f"/dev/ttyS{number}" for number, name in enumerate(CHANNELS, 1)}

# loglevel, oops, panic: as under QEMU. reboot=t: a restart is a triple fault, which ends Bochs
# (see reset_on_triple_fault), where QEMU has -no-reboot. The TSC counts instructions, some 100
# million a second, but CPUID says 3.5 GHz: with tsc_early_khz a sleep of one second takes two or
# three, not ten. Mitigations for what Bochs does not speculate only take time.
_APPEND = (
    "console=ttyS0 loglevel=5 oops=panic panic=-1 reboot=t "
    "tsc=reliable clocksource=tsc tsc_early_khz=200000 mitigations=off"
)
_ISOLINUX_CFG = """\
DEFAULT lab
PROMPT 0
LABEL lab
 KERNEL /vmlinuz
 INITRD /initrd
 APPEND {append}
"""
# Paths are relative: Bochs starts in the directory of its logs. ips is not its speed but how much
# of the time of its devices an instruction takes; sync=none lets the guest's clock follow from it.
_BOCHSRC = """\
cpu: model={cpu}, count={cpus}, ips=50000000, reset_on_triple_fault=0
megs: {memory_mib}
romimage: file={bios}
vgaromimage: file={vga_bios}
ata0-master: type=cdrom, path=/dev/fd/{cd}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={console}
{channels}
display_library: term
clock: sync=none
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
"""
_EXITING = "Bochs is exiting with the following message:\n"
_GUESTS_END = "soft power off|3rd .* exception"


def need_bochs() -> str:
    """Return the path of Bochs, or raise with all the packages that a Bochs host needs."""
    for tool in ("bochs-bin", "xorriso"):
        need_tool(tool, _PACKAGES)
    for file in (_BIOS, _VGA_BIOS, _ISOLINUX, _LDLINUX):
        if not file.is_file():
            raise LabError(f"{file} is missing", remedy=f"apt-get install {_PACKAGES}")
    if not any(Path("/usr/lib").glob(_TERM_PLUGIN)):
        raise LabError("Bochs's terminal is missing", remedy=f"apt-get install {_PACKAGES}")
    # Not "bochs": that is a script.
    return need_tool("bochs-bin", _PACKAGES)


def write_cd(out: IO[bytes], kernel: Kernel, initrd: Path, scratch: Path, *, cpus: int) -> None:
    """Write to *out* a CD that boots *kernel* with *initrd*; *scratch* takes what is passing."""
    config = scratch / "isolinux.cfg"
    append = f"{_APPEND} nosmp" if cpus == 1 else _APPEND
    config.write_text(_ISOLINUX_CFG.format(append=append))
    files = {
        "isolinux.bin": _ISOLINUX,
        "ldlinux.c32": _LDLINUX,
        "isolinux.cfg": config,
        "vmlinuz": kernel.image,
        "initrd": initrd,
    }
    done = subprocess.run(
        [
            *("xorriso", "-as", "mkisofs", "-quiet", "-o", "-", "-b", "isolinux.bin"),
            *("-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"),
            *("-graft-points", *(f"{name}={path}" for name, path in files.items())),
        ],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise LabError(f"xorriso, making the CD for Bochs: {last}")


@dataclass(frozen=True, slots=True)
class BochsMachine:
    """What to boot and on what."""

    cd: int  # an open file; it has no name, so that nothing can leave it behind
    console_log: Path
    cpu: str
    cpus: int
    memory_mib: int

    @property
    def emulator(self) -> str:
        """What messages call it."""
        return "Bochs"

    def start(self) -> Running:
        """Start Bochs; the channels end when it goes, for whatever reason."""
        command = [need_bochs(), "-q", "-f", "bochsrc", "-rc", "debugger"]
        ours, fds = {}, {}
        for name in CHANNELS:
            ours[name], fds[name] = os.pipe()
        ours["terminal"], terminal = _terminal()
        try:
            self._write_config(fds)
            with self._log.open("wb") as errors:
                process = tethered(
                    command,
                    pass_fds=[self.cd, *fds.values()],
                    stdin=terminal,
                    stdout=terminal,
                    stderr=errors,
                    cwd=self._dir,
                    env={**os.environ, "TERM": "vt100"},
                )
        except BaseException:
            for fd in ours.values():
                os.close(fd)
            raise
        finally:
            for fd in (*fds.values(), terminal):
                os.close(fd)
        return Running(process, ours)

    def _write_config(self, fds: dict[str, int]) -> None:
        ports = [
            f"com{number}: enabled=1, mode=file, dev=/dev/fd/{fds[name]}"
            for number, name in enumerate(PORTS, 2)
        ]
        config = _BOCHSRC.format(
            cpu=self.cpu,
            cpus=self.cpus,
            memory_mib=self.memory_mib,
            bios=_BIOS,
            vga_bios=_VGA_BIOS,
            cd=self.cd,
            console=self.console_log.name,
            channels="\n".join(ports),
        )
        (self._dir / "bochsrc").write_text(config)
        # Continue; and if the debugger gets the word again, quit.
        (self._dir / "debugger").write_text("c\nq\n")

    @property
    def _dir(self) -> Path:
        return self.console_log.parent

    @property
    def _log(self) -> Path:
        return self.console_log.with_name("bochs.log")

    def last_words(self) -> str:
        """Return why Bochs says it ended."""
        said = self._log.read_text(errors="replace").rpartition(_EXITING)[2]
        return said.strip().splitlines()[0] if said.strip() else "no message"

    def ended_by_guest(self, code: int) -> bool:
        """Tell whether the guest powered off or restarted; *code* is 1 however Bochs ends."""
        return code == 1 and re.search(_GUESTS_END, self.last_words()) is not None


def _terminal() -> tuple[int, int]:
    """Return a new terminal: the end that shows what is on it, and the program's."""
    shown, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    return shown, inner
