"""The guest's file system: layers of initramfs, made without running the guest.

The base layer (Debian userland for the guest's architecture, byte-compiled) is
made once per set of packages and cached by content; the kernel's modules are a
small layer; what is under test (kvmring, its tests, the command) is a layer
made anew for each run.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .cache import Cache, digest, say
from .errors import LabError, run_tool
from .fetch import Apt
from .newc import Newc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .kernels import Kernel

HERE = Path(__file__).parent
TOP = HERE.parent.parent

DEB_ARCH = {"arm64": "arm64", "x86_64": "amd64"}
TRIPLET = {"arm64": "aarch64-linux-gnu", "x86_64": "x86_64-linux-gnu"}
_LOADER = {"arm64": "usr/lib/ld-linux-aarch64.so.1", "x86_64": "usr/lib64/ld-linux-x86-64.so.2"}
_HOST_ARCH = {"x86_64": "x86_64", "aarch64": "arm64"}

# The userland is Debian stable whatever kernel is under test: a guest differs
# from another by its kernel alone.
USERLAND_SUITE = "trixie"
_USERLAND = (
    "busybox-static",
    "python3",
    "python3-cffi",
    "python3-hypothesis",
    "python3-psutil",
    "python3-pytest",
    "python3-pytest-timeout",
    "python3-rich",
)
HEADERS = ("linux-libc-dev", "libpython3.13-dev")
_PYTHON = ("python3.13-minimal", "libpython3.13-stdlib")
# Pulled in by maintainer scripts that never run here.
_NOT_UNPACKED = ("debconf_", "dpkg_", "tar_", "tzdata_", "gcc-14-base_", "openssl-provider")
_DROPPED = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/doc-base",
    "usr/share/bug",
    "usr/share/pixmaps",
    "usr/share/applications",
    "usr/share/perl5",
    "usr/lib/python3.13/idlelib",
    "usr/lib/python3.13/ensurepip",
    "usr/lib/python3.13/lib2to3",
    "usr/lib/python3.13/turtledemo",
)
# What a slim image leaves out, for an emulator that takes a quarter of a second per MiB: character
# sets, databases, TLS, the highlighting of hundreds of languages, tools for tests that need no KVM.
_NOT_SLIM = re.compile(
    r"usr/lib/[^/]+-linux-gnu/(gconv|ossl-modules|engines-3|lib(crypto|ssl|sqlite3|db-5|mvec"
    r"|zstd|pcre2|selinux|readline|ncurses))"
    r"|usr/lib/python3.13/(asyncio|pydoc_data|_pyrepl|test|xmlrpc|sqlite3|dbm|wsgiref|tkinter)$"
    r"|usr/lib/python3.13/lib-dynload/(_test|_codecs|_ssl|_hashlib|_sqlite|_dbm|_asyncio|readline)"
    r"|usr/lib/python3/dist-packages/(_?hypothesis[^/]*|dateutil|ply|psutil/tests)$"
    r"|usr/lib/python3/dist-packages/pygments/lexers/([a-z]|__pycache__/[a-z])"
    r"|usr/share/|usr/bin/(?!busybox|python3)|usr/sbin/"
)
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost lab\n",
    "etc/hostname": "lab\n",
}
# Part of the base image's key: raise it when what this file puts there changes.
_LAYOUT = 3


def unpack(debs: Sequence[Path], tree: Path) -> None:
    """Unpack *debs* into *tree* and lay Debian's links from /bin etc. to /usr."""
    tree.mkdir(parents=True, exist_ok=True)
    for deb in debs:
        run_tool(["dpkg-deb", "-x", str(deb), str(tree)], purpose=f"unpacking {deb.name}")
    for name in ("bin", "sbin", "lib", "lib64"):
        # Packages of today carry /usr paths only; nothing is there to be merged.
        if not (tree / name).exists() and (tree / "usr" / name).is_dir():
            (tree / name).symlink_to(f"usr/{name}")


def base_image(cache: Cache, arch: str, *, slim: bool = False, refresh: bool = False) -> Path:
    """Return the base layer for *arch*, made if the cache has none of these packages.

    A *slim* one has the same packages without what the tests on the device never touch.
    """
    apt = Apt(cache, USERLAND_SUITE, DEB_ARCH[arch])
    debs = [
        deb
        for deb in apt.userland(_USERLAND, refresh=refresh)
        if not deb.name.startswith(_NOT_UNPACKED)
    ]
    key = digest([arch, str(_LAYOUT), *(_NOT_SLIM.pattern,) * slim, *(deb.name for deb in debs)])
    image = cache.dir("images") / f"base-{arch}-{'slim-' if slim else ''}{key}.cpio"
    if image.is_file():
        return cache.used(image)
    with cache.lock(image.stem):
        if image.is_file():
            return image
        say(f"making the base image for {arch} (once)")
        cache.prune()
        with cache.scratch() as scratch:
            tree = scratch / "tree"
            unpack(debs, tree)
            for name in _DROPPED:
                shutil.rmtree(tree / name, ignore_errors=True)
            _byte_compile(cache, arch, tree)
            draft = scratch / "cpio"
            with draft.open("wb") as file:
                _write_base(file, tree, slim=slim)
            draft.replace(image)
    return image


def _write_base(file: IO[bytes], tree: Path, *, slim: bool) -> None:
    archive = Newc(file)
    # The kernel opens it for init before anything can mount /dev.
    archive.char_device("dev/console", 5, 1)
    archive.tree(tree, keep=lambda name: not (slim and _NOT_SLIM.match(name)))
    for name, text in _FILES.items():
        archive.file(name, text.encode())
    # init puts busybox's programs on PATH; these two are called by their full names.
    archive.link("usr/bin/sh", "busybox")
    archive.link("usr/bin/env", "busybox")
    archive.file("usr/bin/kvmring", b'#!/bin/sh\nexec python3 -m kvmring "$@"\n', 0o755)
    archive.close()


def _byte_compile(cache: Cache, arch: str, tree: Path) -> None:
    """Compile the tree's Python files, which saves an emulated guest 20 s per import of pytest.

    Byte code depends on Python's version, not on the architecture: the same
    Debian Python for the host's architecture does it, started through its own
    dynamic loader. On a host that has no such Python the guest does without.
    """
    host = _HOST_ARCH.get(platform.machine())
    if host is None:
        say(f"no byte code: no Debian Python for a {platform.machine()} host")
        return
    if host != arch:
        python = tree.with_name("python")
        apt = Apt(cache, USERLAND_SUITE, DEB_ARCH[host])
        unpack(apt.userland(_PYTHON), python)
    else:
        python = tree
    done = subprocess.run(
        [
            # Through its own loader: this host's libc may be older.
            *(
                str(python / _LOADER[host]),
                "--library-path",
                str(python / "usr/lib" / TRIPLET[host]),
            ),
            *(str(python / "usr/bin/python3.13"), "-I", "-m", "compileall", "-q"),
            # The guest never compares times, and sees the paths without the tree's.
            *("--invalidation-mode", "unchecked-hash", "-s", str(tree), "-p", "/"),
            *("-x", r"/(test|tests)/"),
            *(str(tree / "usr/lib/python3.13"), str(tree / "usr/lib/python3/dist-packages")),
        ],
        env={"PATH": "/usr/bin:/bin", "PYTHONHOME": str(python / "usr")},
        capture_output=True,
        text=True,
        check=False,
    )
    # Its status is 1 as soon as one file, a template say, is not valid Python.
    if not any((tree / "usr/lib/python3.13/__pycache__").glob("site.*.pyc")):
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise LabError(f"byte-compiling the guest's Python: {last}")


def module_layer(out: IO[bytes], kernel: Kernel) -> None:
    """Append the kernel's modules and the order in which init loads them."""
    archive = Newc(out)
    for name, data in kernel.modules:
        archive.file(f"lab/modules.d/{name}.ko", data)
    archive.file("lab/modules", "".join(f"{name}\n" for name, _ in kernel.modules).encode())
    archive.close()


def test_layer(out: IO[bytes], extension: Path | None, lab_files: dict[str, bytes]) -> None:
    """Append what is under test: the package, its tests, and *lab_files* for init.

    With no *extension* the guest gets no kvmring at all, only the lab's files.
    """
    archive = Newc(out)
    archive.file("init", (HERE / "init").read_bytes(), 0o755)
    for name, data in lab_files.items():
        archive.file(f"lab/{name}", data)
    if extension is not None:
        archive.tree(TOP / "kvmring", "kvmring/kvmring/", keep=_is_source)
        archive.file("kvmring/kvmring/_kvm.abi3.so", extension.read_bytes(), 0o755)
        for name in ("tests", "examples"):
            archive.tree(TOP / name, f"kvmring/{name}/", keep=_is_source)
        archive.tree(TOP / "csrc", "kvmring/csrc/", keep=lambda name: name.endswith(".h"))
        for name in ("pyproject.toml", "README.md"):
            archive.file(f"kvmring/{name}", (TOP / name).read_bytes())
    archive.close()


def _is_source(name: str) -> bool:
    """Tell whether *name* goes into the guest: not what this host compiled."""
    base = name.rsplit("/", 1)[-1]
    return base != "__pycache__" and not base.endswith((".so", ".pyc")) and base[0] != "."
