"""kvmring's extension, built from this tree for the guest's architecture.

The same C that a user's build compiles, by a cross compiler where host and
guest differ. Cached by the contents of csrc/ and of the compiler's version, so
that a run without changes builds nothing.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from typing import TYPE_CHECKING

from .cache import Cache, digest, say
from .errors import LabError, need_tool, run_tool
from .fetch import Apt
from .image import DEB_ARCH, HEADERS, TOP, TRIPLET, USERLAND_SUITE, unpack

if TYPE_CHECKING:
    from pathlib import Path

# csrc/build_ext.py's own, and what setuptools adds to them.
_FLAGS = (
    *("-shared", "-fPIC", "-O2", "-g", "-pthread"),
    *("-std=gnu11", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030b0000"),
)


def compiler(arch: str) -> str:
    """Return the C compiler for *arch*: the host's own or Debian's cross compiler."""
    triplet = TRIPLET[arch]
    if platform.machine() == triplet.split("-", 1)[0]:
        packages = "gcc libc6-dev"
        cc = need_tool("gcc", packages)
    else:
        packages = f"gcc-{triplet.replace('_', '-')} libc6-dev-{DEB_ARCH[arch]}-cross"
        cc = need_tool(f"{triplet}-gcc", packages)
    # The C library's files are only recommended by the compiler's package.
    if run_tool([cc, "-print-file-name=crt1.o"], purpose=cc).strip() == "crt1.o":
        raise LabError(f"{cc} has no C library for {arch}", remedy=f"apt-get install {packages}")
    return cc


def headers(cache: Cache, arch: str) -> Path:
    """Return a tree with the guest's Python and kernel headers."""
    debs = Apt(cache, USERLAND_SUITE, DEB_ARCH[arch]).exactly(HEADERS)
    tree = cache.dir("headers") / f"{arch}-{digest(deb.name for deb in debs)}"
    with cache.lock(tree.name):
        if not tree.is_dir():
            with cache.scratch() as scratch:
                unpack(debs, scratch / "tree")
                (scratch / "tree").replace(tree)
    return tree


def extension(cache: Cache, arch: str, *, kernel_headers: str = "guest") -> Path:
    """Return the built `_kvm.abi3.so` for *arch*.

    Args:
        cache: where headers and results are kept.
        arch: the guest's architecture.
        kernel_headers: "guest", the kernel headers of the guest's suite, or
            "compiler", those that came with the compiler, which are older.
    """
    builder = TOP / "csrc" / "build_ext.py"
    if not builder.is_file():
        raise LabError(f"there is no {builder.relative_to(TOP)} in {TOP}: nothing to build")
    sources = sorted(p for p in (TOP / "csrc").iterdir() if p.is_file())
    cc = compiler(arch)
    version = run_tool([cc, "--version"], purpose=cc).splitlines()[0]
    contents = [part for p in sources for part in (p.name, p.read_bytes())]
    key = digest([arch, kernel_headers, version, *_FLAGS, *contents])
    built = cache.dir("images") / f"kvm-{arch}-{key}.so"
    if built.is_file():
        return cache.used(built)
    with cache.lock(built.stem):
        if not built.is_file():
            say(f"building kvmring for {arch}")
            with cache.scratch() as scratch:
                draft = scratch / "_kvm.abi3.so"
                _compile(cc, arch, headers(cache, arch), kernel_headers, scratch, draft)
                draft.replace(built)
    return built


def _compile(cc: str, arch: str, tree: Path, kernel_headers: str, scratch: Path, out: Path) -> None:
    build = [sys.executable, str(TOP / "csrc" / "build_ext.py"), "--arch", arch]
    emitted = scratch / "_kvm.c"
    _run_builder([*build, "--emit", str(emitted)])
    listed = _run_builder([*build, "--list-sources"]).split()
    include = tree / "usr" / "include"
    python = next(iter(sorted(include.glob("python3.*"))), None)
    if python is None:
        raise LabError(f"{include} has no Python headers")
    # Two copies of pyconfig.h would do; Debian's <pyconfig.h> includes <TRIPLET/python3.13/...>.
    paths = [f"-I{TOP / 'csrc'}", f"-I{python}"]
    if kernel_headers == "guest":
        paths += ["-isystem", str(include / TRIPLET[arch]), "-isystem", str(include)]
    else:
        multiarch = scratch / "python-only"
        (multiarch / TRIPLET[arch]).mkdir(parents=True)
        (multiarch / TRIPLET[arch] / python.name).symlink_to(include / TRIPLET[arch] / python.name)
        paths += [f"-I{multiarch}"]
    sources = [str(emitted), *(str(TOP / name) for name in listed)]
    run_tool(
        [cc, *_FLAGS, *paths, *sources, "-o", str(out)], purpose=f"building kvmring for {arch}"
    )


def _run_builder(command: list[str]) -> str:
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = None
        if re.search(r"cffi|setuptools", last):
            remedy = f"{sys.executable} -m pip install 'cffi>=2.1' 'setuptools>=80'"
        raise LabError(f"csrc/build_ext.py: {last}", remedy=remedy)
    return done.stdout
