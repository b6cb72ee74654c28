"""Build the extensions: kvmring._kvm (CFFI, API mode) and, for Python 3.11, kvmring._buffer.

setuptools calls BuildExt through pyproject.toml.  Run as a program, it emits the CFFI C
file, or lists the sources that belong to it, for a build that setuptools does not drive
(the lab's cross build): build_ext.py --arch arm64 --emit OUT.c | --list-sources
"""

from __future__ import annotations

import argparse
import platform
import sysconfig
from pathlib import Path

from cffi import FFI
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent
C_SOURCES = (
    "own.c",
    "vm.c",
    "ring.c",
    "lines.c",
    "synthetic.c",
    "bitmap.c",
    "numbers.c",
    "run.c",
    "serve.c",
    "observe.c",
    "events.c",
    "proc.c",
)
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
ARCHES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}


def host_arch() -> str:
    """Return our name of the architecture that is built for, or fail in one sentence."""
    machine = platform.machine().lower()
    if machine not in ARCHES:
        raise SystemExit(f"kvmring: no built-in guest and no register layout for {machine} yet")
    return ARCHES[machine]


def sources(arch: str) -> list[str]:
    """List the hand-written sources of _kvm for an architecture, by file name."""
    return [*C_SOURCES, f"guest_{arch}.S"]


def emit(arch: str, target: Path) -> None:
    """Write the CFFI module's C file."""
    ffi = FFI()
    for name in ("kvmring.cdef.h", f"kvmring.{arch}.cdef.h"):
        ffi.cdef((CSRC / name).read_text())
    ffi.set_source("kvmring._kvm", (CSRC / "kvmring.prelude.c").read_text())
    target.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(target))


class BuildExt(build_ext):
    """Emit the CFFI file first, and let the compiler take assembly."""

    def get_source_files(self) -> list[str]:
        """List what a source distribution needs: all of this folder."""
        ours = [str(path.relative_to(CSRC.parent)) for path in CSRC.iterdir() if path.is_file()]
        return sorted({*super().get_source_files(), *ours})

    def build_extensions(self) -> None:
        """Build each extension; _kvm's generated file is made here."""
        if ".S" not in self.compiler.src_extensions:
            self.compiler.src_extensions.append(".S")
        arch = host_arch()
        for ext in self.extensions:
            if LIMITED_API:
                ext.define_macros.append(("Py_LIMITED_API", "0x030b0000"))
                ext.py_limited_api = True
            ext.extra_compile_args += ["-std=gnu11", "-fvisibility=hidden", "-pthread"]
            ext.extra_link_args += ["-pthread"]
            ext.include_dirs.append("csrc")
            ext.depends += self.get_source_files()
            if ext.name == "kvmring._kvm":
                generated = Path(self.build_temp) / "_kvm.c"
                emit(arch, generated)
                ext.sources = [str(generated), *(f"csrc/{name}" for name in sources(arch))]
        super().build_extensions()


class BdistWheel(bdist_wheel):
    """Name the wheel cp311-abi3, except for a free-threaded Python, which has no stable ABI."""

    def finalize_options(self) -> None:
        """Set the tag before the base class reads it."""
        if LIMITED_API:
            self.py_limited_api = "cp311"
        super().finalize_options()


def main() -> None:
    """Serve the builds that do not go through setuptools."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=sorted(set(ARCHES.values())), default=None)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--emit", type=Path, metavar="OUT.c")
    what.add_argument("--list-sources", action="store_true")
    args = parser.parse_args()
    arch = args.arch or host_arch()
    if args.emit:
        emit(arch, args.emit)
    else:
        print("\n".join(f"csrc/{name}" for name in sources(arch)))


if __name__ == "__main__":
    main()
