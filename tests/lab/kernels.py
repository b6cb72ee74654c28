"""Kernels for the lab: Debian's, or a file that the user built.

Says before any boot whether a file is a bootable image for the architecture
asked for, unpacks what QEMU cannot load by itself, and picks the few modules
that the lab needs, uncompressed and in load order.
"""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import LabError, need_tool

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# The two channels and KVM. A name that the kernel has built in is not found
# among its modules, which is fine; init says what is missing in the end.
_WANTED = {
    "arm64": ("virtio_pci", "virtio_console", "kvm"),
    "x86_64": ("virtio_pci", "virtio_console", "kvm_amd", "kvm_intel"),
}
_MACHINE = {0x8664: "x86_64", 0xAA64: "arm64", 0x5064: "riscv64", 0x14C: "i386"}
_ELF_MACHINE = {62: "x86_64", 183: "arm64", 243: "riscv64", 3: "i386"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """An image that QEMU can boot and the modules to load, in order."""

    image: Path
    modules: tuple[tuple[str, bytes], ...]


def unpack_image(data: bytes, arch: str, name: str) -> bytes | None:
    """Check that *data* is a kernel for *arch*.

    Returns None when QEMU boots it as it is, the unpacked image when it had
    to be unpacked.

    Raises:
        LabError: it is something else; says what.
    """
    packed = data
    if arch == "arm64":
        data = _decompress(data, name)
    kind = _kind(data)
    if kind != arch:
        hint = {
            "arm64": "give arch/arm64/boot/Image or Image.gz",
            "x86_64": "give arch/x86/boot/bzImage",
        }[arch]
        raise LabError(f"{name} is {kind or 'no kernel image'}, not a kernel for {arch}: {hint}")
    return None if data is packed else data


def _kind(data: bytes) -> str | None:
    """Return the architecture of a bootable image, or a description of what it is."""
    if data[56:60] == b"ARM\x64":
        return "arm64"
    if data[0x202:0x206] == b"HdrS":
        return "x86_64"
    if data[56:60] == b"RSC\x05":
        return "a riscv64 Image"
    if data[:4] == b"\x7fELF":
        machine = _ELF_MACHINE.get(int.from_bytes(data[18:20], "little"), "unknown")
        return f"an ELF file ({machine}; vmlinux cannot be booted here)"
    if data[:2] == b"MZ" and len(data) > 0x40:
        offset = int.from_bytes(data[0x3C:0x40], "little")
        machine = _MACHINE.get(int.from_bytes(data[offset + 4 : offset + 6], "little"), "unknown")
        return f"an EFI program ({machine})"
    return None


def _decompress(data: bytes, name: str) -> bytes:
    """Return the plain Image inside gzip or an EFI zboot wrapper, else *data* itself."""
    if data[:2] == b"\x1f\x8b":
        return _inflate(data, "gzip", name)
    if data[:2] == b"MZ" and data[4:8] == b"zimg":
        offset, size = struct.unpack_from("<II", data, 8)
        method = data[24:56].split(b"\0", 1)[0].decode("ascii", "replace")
        return _inflate(data[offset : offset + size], method, name)
    return data


def _inflate(data: bytes, method: str, name: str) -> bytes:
    try:
        if method == "gzip":
            # Not gzip.decompress: it rejects anything behind the stream.
            return zlib.decompressobj(wbits=31).decompress(data)
        if method in ("lzma", "xz", "xzkern"):
            return lzma.LZMADecompressor().decompress(data)
        if method.startswith("zstd"):
            tool = need_tool("zstd", "zstd")
            done = subprocess.run([tool, "-dcq"], input=data, capture_output=True, check=False)
            # zstd complains of what follows the frame, after it has written it all.
            if done.stdout:
                return done.stdout
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise LabError(f"{name}: {method} data is damaged ({error})") from error
    raise LabError(f"{name} is compressed by {method!r}, which the lab cannot unpack")


def module_files(tops: Iterable[Path], arch: str) -> list[tuple[str, bytes]]:
    """Return (name, contents) of the modules the lab needs, dependencies first.

    *tops* are searched whole, so a directory made by `modules_install`, its
    lib/modules/VERSION and a build tree all do. Names are in the kernel's form
    (kvm_amd, not kvm-amd).
    """
    paths: dict[str, Path] = {}
    for top in tops:
        for path in sorted(top.rglob("*.ko*")):
            stem, _, packing = path.name.partition(".ko")
            if packing in ("", ".xz", ".gz", ".zst"):
                paths.setdefault(stem.replace("-", "_"), path)
    ordered: dict[str, bytes] = {}

    def load(name: str) -> None:
        path = paths.get(name)
        if path is None or name in ordered:
            return
        data = _module_data(path)
        match = re.search(rb"(?:^|\0)depends=([^\0]*)\0", data)
        for needed in (match[1].decode() if match else "").split(","):
            load(needed.strip().replace("-", "_"))
        ordered[name] = data

    for name in _WANTED[arch]:
        load(name)
    return list(ordered.items())


def _module_data(path: Path) -> bytes:
    data = path.read_bytes()
    methods = {".xz": "xz", ".gz": "gzip", ".zst": "zstd"}
    method = methods.get(path.suffix)
    return data if method is None else _inflate(data, method, str(path))


def load_kernel(arch: str, image: Path, module_tops: Iterable[Path], plain: Path) -> Kernel:
    """Return the kernel in file *image*; *plain* is where an unpacked copy may go."""
    try:
        data = image.read_bytes()
        unpacked = unpack_image(data, arch, str(image))
    except OSError as error:
        raise LabError(f"kernel {image}: {error.strerror}") from error
    if unpacked is not None:
        draft = plain.with_suffix(".part")
        draft.write_bytes(unpacked)
        draft.replace(plain)
        image = plain
    return Kernel(image, tuple(module_files(module_tops, arch)))
