"""The lab itself: `Lab(arch=...).run("command")` boots a host and says how it went.

Puts together what the other files make: packages, kernel, layers of the
initramfs, the machine. Three outcomes: the command passed, the command failed,
the VM was lost. A lab that cannot be made raises LabError.
"""

from __future__ import annotations

import enum
import secrets
import shutil
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from . import bochs, build, image, qemu, vm
from .cache import Cache, digest, say
from .errors import LabError, from_os_error, run_tool
from .fetch import Apt
from .kernels import Kernel, load_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ARCHES = ("arm64", "x86_64")
MACHINES = ("qemu", "bochs")
DEFAULT_CMD = {
    "qemu": "KVMRING_KVM=1 python3 -m pytest -q tests/kvm",
    # Files, not a mark: only to collect all of tests/kvm takes minutes there.
    "bochs": "KVMRING_KVM=1 python3 -m pytest -q -p no:cacheprovider "
    "tests/kvm/test_pml.py tests/kvm/test_ring_full.py tests/kvm/test_loss.py",
}
DEFAULT_TIMEOUT_S = {"qemu": 1200.0, "bochs": 3600.0}
# Six seconds, and one to three minutes; several labs on two cores take their time.
BOOT_TIMEOUT_S = {"qemu": 60.0, "bochs": 600.0}

# -cpu max emulates pointer authentication on arm64, at a third of the speed.
# cx16=off: Linux's slab allocator uses cmpxchg16b where the CPU has it; 12 of 60 boots were lost
# with it, by double faults, none of 70 without. Likely QEMU 7.2 leaves garbage in EFLAGS after
# it, which an interrupt just then saves.
_CPU = {"arm64": "neoverse-n1", "x86_64": "max,cx16=off"}
_CPU_OF_SID = {"arm64": "neoverse-n1", "x86_64": "EPYC-Rome,cx16=off"}
# The only one of Bochs's with PML.
_CPU_OF_BOCHS = "corei7_skylake_x"
_MEMORY_MIB = {"arm64": 1024, "x86_64": 1536}
_MEMORY_MIB_OF_BOCHS = 1024


class Outcome(enum.Enum):
    """What became of a command in the lab."""

    PASSED = "passed"
    FAILED = "failed"
    LOST = "VM lost"


@dataclass(frozen=True, slots=True)
class LabResult:
    """The end of one run. *status* is None, and *reason* given, when the VM was lost.

    *no_kvm* says why the guest has no /dev/kvm, and is None where it has one.
    """

    outcome: Outcome
    status: int | None
    reason: str | None
    stdout: str
    stderr: str
    console_log: Path
    seconds: float
    boot_seconds: float
    no_kvm: str | None
    kernel_release: str


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A kind of host to boot: architecture, kernel, size. Each `run` boots one anew."""

    arch: str
    machine: str = "qemu"
    kernel: Path | None = None
    modules: Path | None = None
    suite: str = "trixie"
    flavour: str = "cloud"
    cpu: str | None = None
    cpus: int = 2
    memory_mib: int | None = None
    kvmring: bool = True
    kernel_headers: str = "guest"
    boot_timeout_s: float | None = None
    refresh: bool = False
    cache: Cache = field(default_factory=Cache)

    def run(
        self,
        cmd: str | None = None,
        *,
        timeout_s: float | None = None,
        on_stdout: Callable[[bytes], None] | None = None,
        on_stderr: Callable[[bytes], None] | None = None,
    ) -> LabResult:
        """Boot a host, run *cmd* there with sh, and power it off.

        Args:
            cmd: a shell command line; its directory has kvmring and its tests.
                DEFAULT_CMD without it.
            timeout_s: seconds for *cmd* from its start; making the lab and
                booting are not part of them. DEFAULT_TIMEOUT_S without it.
            on_stdout: also called with each piece of output as it comes.
            on_stderr: likewise.

        Raises:
            LabError: the lab could not be made.
        """
        start = time.monotonic()
        out, err = bytearray(), bytearray()
        mark = secrets.token_hex(16).encode()
        cmd = DEFAULT_CMD[self.machine] if cmd is None else cmd
        files = {"cmd": cmd.encode() + b"\n", "mark": mark}
        with self._machine(files) as machine:
            ours = self.kernel is None and self.cpu is None and self.memory_mib is None
            for last in (not ours, True):
                ending = vm.run(
                    machine,
                    mark=mark,
                    on_stdout=_tee(out, on_stdout),
                    on_stderr=_tee(err, on_stderr),
                    boot_timeout_s=self.boot_timeout_s or BOOT_TIMEOUT_S[self.machine],
                    timeout_s=DEFAULT_TIMEOUT_S[self.machine] if timeout_s is None else timeout_s,
                )
                # Emulation of two CPUs loses one boot in a hundred or so. While the
                # command has not begun, nothing is hidden by another try. A kernel or a
                # machine of the user's choice gets none: there it may be the choice.
                if last or ending.lost is None or ending.boot_s:
                    break
                log = machine.console_log
                log.replace(log.with_name("console.first.log"))
                say(f"lost before CMD began ({ending.lost}), trying once more")
        outcome = Outcome.PASSED if ending.status == 0 else Outcome.FAILED
        return LabResult(
            outcome=Outcome.LOST if ending.lost else outcome,
            status=ending.status,
            reason=ending.lost,
            stdout=out.decode(errors="replace"),
            stderr=err.decode(errors="replace"),
            console_log=machine.console_log,
            seconds=time.monotonic() - start,
            boot_seconds=ending.boot_s,
            no_kvm=ending.no_kvm,
            kernel_release=ending.release,
        )

    def make(self) -> None:
        """Make everything that a run needs, and boot nothing.

        Raises:
            LabError: the lab could not be made.
        """
        with self._machine({}):
            pass

    def shell(self) -> int:
        """Boot a host with a shell on this terminal; return QEMU's status."""
        size = shutil.get_terminal_size()
        with self._machine({"shell": f"{size.lines} {size.columns}\n".encode()}) as machine:
            if not isinstance(machine, qemu.QemuMachine):
                raise LabError("a shell needs QEMU: Bochs's serial ports only write")
            return machine.run_interactive()

    @contextmanager
    def _machine(self, files: dict[str, bytes]) -> Iterator[vm.Machine]:
        """Yield a machine that is ready to boot; its initramfs goes, its logs stay."""
        self._check()
        with ExitStack() as stack:
            try:
                run_dir = self.cache.run_dir(self.arch)
                # What can be wrong with the user's own kernel is said before any download.
                kernel = self._kernel(run_dir)
                medium = stack.enter_context(tempfile.TemporaryFile(dir=run_dir))
                log = run_dir / "console.log"
                machine = (self._on_bochs if self.machine == "bochs" else self._on_qemu)(
                    medium, kernel, files, log
                )
            except OSError as error:
                raise from_os_error(error, self.cache.top) from error
            yield machine

    def _check(self) -> None:
        """Refuse what no lab has, before anything is made."""
        if self.arch not in ARCHES:
            raise LabError(f"no lab for architecture {self.arch!r}: one of {', '.join(ARCHES)}")
        if self.machine not in MACHINES:
            raise LabError(f"no machine {self.machine!r}: one of {', '.join(MACHINES)}")
        if self.machine == "qemu":
            qemu.find_qemu(self.arch)
            return
        if self.arch != "x86_64":
            raise LabError(f"Bochs emulates x86_64, not {self.arch}")
        bochs.need_bochs()

    def _on_qemu(
        self, medium: IO[bytes], kernel: Kernel, files: dict[str, bytes], log: Path
    ) -> vm.Machine:
        self._write_initrd(medium, kernel, files)
        return qemu.QemuMachine(
            arch=self.arch,
            kernel=kernel.image,
            initrd=medium.fileno(),
            console_log=log,
            cpu=self.cpu or (_CPU_OF_SID if self.suite == "sid" else _CPU)[self.arch],
            cpus=self.cpus,
            memory_mib=self.memory_mib or _MEMORY_MIB[self.arch],
        )

    def _on_bochs(
        self, medium: IO[bytes], kernel: Kernel, files: dict[str, bytes], log: Path
    ) -> vm.Machine:
        ports = "".join(f"{name} {node}\n" for name, node in bochs.PORTS.items())
        with self.cache.scratch() as scratch:
            initrd = scratch / "initrd"
            with initrd.open("wb") as file:
                self._write_initrd(file, kernel, {**files, "ports": ports.encode()}, slim=True)
            bochs.write_cd(medium, kernel, initrd, scratch, cpus=self.cpus)
        return bochs.BochsMachine(
            cd=medium.fileno(),
            console_log=log,
            cpu=self.cpu or _CPU_OF_BOCHS,
            cpus=self.cpus,
            memory_mib=self.memory_mib or _MEMORY_MIB_OF_BOCHS,
        )

    def _write_initrd(
        self, out: IO[bytes], kernel: Kernel, files: dict[str, bytes], *, slim: bool = False
    ) -> None:
        extension = None
        if self.kvmring:
            extension = build.extension(self.cache, self.arch, kernel_headers=self.kernel_headers)
        base = image.base_image(self.cache, self.arch, slim=slim, refresh=self.refresh)
        with base.open("rb") as layer:
            shutil.copyfileobj(layer, out, 1 << 20)
        image.module_layer(out, kernel)
        image.test_layer(out, extension, files)
        out.flush()

    def _kernel(self, run_dir: Path) -> Kernel:
        if self.modules is not None and not self.modules.is_dir():
            raise LabError(f"modules directory {self.modules} does not exist")
        if self.kernel is not None:
            tops = [self.modules] if self.modules else []
            return load_kernel(self.arch, self.kernel, tops, run_dir / "Image")
        apt = Apt(self.cache, self.suite, image.DEB_ARCH[self.arch])
        debs = apt.kernel(self.flavour, refresh=self.refresh)
        tree = self.cache.dir("kernels") / digest(deb.name for deb in debs)
        with self.cache.lock(f"kernel-{tree.name}"):
            if not tree.is_dir():
                _unpack_kernel(self.cache, self.arch, debs, tree)
        self.cache.used(tree)
        files = sorted(tree.glob("*.ko"))
        modules = [(path.stem.partition("-")[2], path.read_bytes()) for path in files]
        return Kernel(tree / "image", tuple(modules))


def _unpack_kernel(cache: Cache, arch: str, debs: list[Path], tree: Path) -> None:
    """Put Debian's kernel into *tree*: `image`, and the needed modules, numbered."""
    with cache.scratch() as scratch:
        for deb in debs:
            run_tool(["dpkg-deb", "-x", str(deb), str(scratch / "deb")], purpose=deb.name)
        found = sorted(p for p in (scratch / "deb").rglob("vmlinuz*") if p.is_file())
        if not found:
            raise LabError(f"no vmlinuz in {', '.join(deb.name for deb in debs)}")
        draft = scratch / "kernel"
        draft.mkdir()
        kernel = load_kernel(arch, found[0], [scratch / "deb"], draft / "image")
        if kernel.image != draft / "image":
            kernel.image.replace(draft / "image")
        for number, (name, data) in enumerate(kernel.modules):
            (draft / f"{number:02}-{name}.ko").write_bytes(data)
        draft.replace(tree)


def _tee(kept: bytearray, also: Callable[[bytes], None] | None) -> Callable[[bytes], None]:
    def take(data: bytes) -> None:
        kept.extend(data)
        if also is not None:
            also(data)

    return take
