"""The lab's parts that need no guest: kernel images, archives, streams, sources.

They run everywhere and take no time; what a wrong kernel file is told is here.
"""

from __future__ import annotations

import gzip
import io
import lzma
from typing import TYPE_CHECKING

import pytest

from . import __main__ as cli
from .cache import Cache
from .errors import LabError
from .fetch import Apt, system_mirror
from .kernels import module_files, unpack_image
from .lab import Lab
from .newc import Newc
from .vm import Stream

if TYPE_CHECKING:
    from pathlib import Path

_ARM64 = bytes(56) + b"ARM\x64" + bytes(1000)
_X86 = bytes(0x202) + b"HdrS" + bytes(1000)
_EFI = b"MZ" + bytes(0x3A) + (0x40).to_bytes(4, "little") + b"PE\0\0\x64\x86" + bytes(0x400)
_ELF = b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little") + bytes(0x400)


def _zboot(method: bytes, payload: bytes) -> bytes:
    header = b"MZ\0\0zimg" + (64).to_bytes(4, "little") + len(payload).to_bytes(4, "little")
    return header.ljust(24, b"\0") + method.ljust(40, b"\0") + payload + b"behind"


def test_a_bootable_image_is_taken_as_it_is() -> None:
    assert unpack_image(_ARM64, "arm64", "Image") is None
    assert unpack_image(_X86, "x86_64", "bzImage") is None


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(_ARM64),
        _zboot(b"gzip", gzip.compress(_ARM64)),
        _zboot(b"xzkern", lzma.compress(_ARM64)),
        _zboot(b"lzma", lzma.compress(_ARM64, lzma.FORMAT_ALONE)),
    ],
)
def test_a_packed_arm64_image_is_unpacked(packed: bytes) -> None:
    assert unpack_image(packed, "arm64", "vmlinuz") == _ARM64


@pytest.mark.parametrize(
    ("data", "arch", "what"),
    [
        (_X86, "arm64", "is x86_64, not a kernel for arm64"),
        (_ARM64, "x86_64", "is arm64, not a kernel for x86_64"),
        (_ELF, "arm64", r"an ELF file \(arm64; vmlinux"),
        (_EFI, "arm64", r"an EFI program \(x86_64\)"),
        (gzip.compress(b"text"), "arm64", "no kernel image"),
        (b"", "x86_64", "no kernel image"),
        (b"\x1f\x8b damaged", "arm64", "damaged"),
        (_zboot(b"brotli", b"?"), "arm64", "'brotli', which the lab cannot unpack"),
    ],
)
def test_another_file_is_named_for_what_it_is(data: bytes, arch: str, what: str) -> None:
    with pytest.raises(LabError, match=what):
        unpack_image(data, arch, "file")


@pytest.mark.usefixtures("qemu_stand_in")
def test_a_wrong_kernel_file_is_status_98(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "bzImage"
    wrong.write_bytes(_X86)
    status = cli.main(["--arch", "arm64", "--kernel", str(wrong), "true"])
    assert status == cli.NOT_MADE
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"kvmring-lab: no lab: {wrong} is x86_64")
    assert cli.main(["--arch", "arm64", "--kernel", str(tmp_path / "none"), "true"]) == cli.NOT_MADE


@pytest.fixture
def qemu_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the lab find programs of QEMU's names: these tests stop before they would run."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("qemu-system-aarch64", "qemu-system-x86_64"):
        (programs / name).touch(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_without_qemu_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"apt-get install qemu-system-arm\)"):
        Lab(arch="arm64", cache=Cache(tmp_path)).run("true")


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    (tmp_path / "kvm-amd.ko.xz").write_bytes(lzma.compress(b"\0depends=kvm,ccp\0"))
    (tmp_path / "kvm.ko").write_bytes(b"\0depends=irqbypass\0")
    (tmp_path / "irqbypass.ko.gz").write_bytes(gzip.compress(b"\0depends=\0"))
    (tmp_path / "unrelated.ko").write_bytes(b"\0depends=kvm\0")
    names = [name for name, _ in module_files([tmp_path], "x86_64")]
    assert names == ["irqbypass", "kvm", "kvm_amd"]


def test_an_archive_holds_what_was_added(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "d/sub").mkdir(parents=True)
    (tree / "d/sub/file").write_bytes(b"12345")
    (tree / "d/link").symlink_to("sub")
    (tree / "d/skip").touch()
    out = io.BytesIO()
    archive = Newc(out)
    archive.tree(tree, "at/", keep=lambda name: not name.endswith("skip"))
    archive.file("d", b"x" * 7, 0o755)
    archive.char_device("dev/console", 5, 1)
    archive.close()
    assert _read_newc(out.getvalue()) == {
        "at": (0o40755, b""),
        "at/d": (0o40755, b""),
        "at/d/link": (0o120777, b"sub"),
        "at/d/sub": (0o40755, b""),
        "at/d/sub/file": (0o100644, b"12345"),
        "d": (0o100755, b"xxxxxxx"),
        "dev": (0o40755, b""),
        "dev/console": (0o20600, b""),
        "TRAILER!!!": (0, b""),
    }
    assert len(out.getvalue()) % 4 == 0


def _read_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    entries = {}
    at = 0
    while at < len(data):
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) & ~3
        entries[name] = (fields[1], data[start : start + fields[6]])
        at = (start + fields[6] + 3) & ~3
    return entries


@pytest.mark.parametrize("piece", range(1, 12))
@pytest.mark.parametrize("body", [b"", b"text\n", b"a\0b\0", b"\0\0mar\0mar", b"\0"])
def test_a_stream_ends_at_its_mark_however_it_is_cut(body: bytes, piece: int) -> None:
    passed = bytearray()
    stream = Stream(b"mark", passed.extend)
    data = body + b"\0mark\0"
    for at in range(0, len(data), piece):
        assert not stream.ended
        stream.feed(data[at : at + piece])
    assert stream.ended
    assert bytes(passed) == body


def test_a_stream_without_its_mark_keeps_nothing_back() -> None:
    passed = bytearray()
    stream = Stream(b"mark", passed.extend)
    stream.feed(b"text\0mar")
    assert bytes(passed) == b"text"
    stream.flush()
    assert bytes(passed) == b"text\0mar"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "sources.list",
            "# deb http://no/debian x main\ndeb [arch=amd64] http://a/debian/ x main\n",
        ),
        (
            "sources.list.d/d.sources",
            "Types: deb\nURIs: http://s/debian-security http://a/debian/\n",
        ),
    ],
)
def test_the_mirror_is_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.delenv("KVMRING_LAB_MIRROR", raising=False)
    assert system_mirror(tmp_path) == "http://deb.debian.org/debian"
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / name).write_text(text)
    assert system_mirror(tmp_path) == "http://a/debian/"


def test_a_manifest_without_its_packages_is_not_an_answer(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    apt = Apt(cache, "trixie", "arm64")
    manifest = tmp_path / "m.json"
    assert apt.from_cache(manifest) is None
    manifest.write_text('[{"name": "a", "version": "1", "file": "a.deb", "size_bytes": 3}]')
    assert apt.from_cache(manifest) is None
    (cache.dir("debs") / "a.deb").write_bytes(b"12")
    assert apt.from_cache(manifest) is None
    (cache.dir("debs") / "a.deb").write_bytes(b"123")
    assert apt.from_cache(manifest) == [tmp_path / "debs/a.deb"]
    manifest.write_text("[{")
    assert apt.from_cache(manifest) is None
