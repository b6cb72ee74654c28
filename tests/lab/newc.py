"""A writer of cpio archives in the kernel's initramfs format (newc, no CRC).

Written here rather than with cpio(1) for three reasons: everything in the
guest belongs to root though the lab runs without it, device nodes can be made,
and the same tree gives the same bytes. The kernel unpacks any number of
such archives one after the other, later ones replacing files of earlier ones;
the lab's images are made of layers that way.
"""

from __future__ import annotations

import os
import stat
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Newc:
    """One archive being written to *out*; `close()` writes its trailer."""

    def __init__(self, out: IO[bytes]) -> None:
        """Write to *out*, which may already hold other archives."""
        self._out = out
        self._ino = 0
        self._dirs: set[str] = set()

    def dir(self, name: str, mode: int = 0o755) -> None:
        """Add directory *name* and its parents; adding one again is fine."""
        name = name.strip("/")
        if not name or name in self._dirs:
            return
        self.dir(os.path.dirname(name))
        self._dirs.add(name)
        self._entry(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file of *data*."""
        self.dir(os.path.dirname(name))
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link *name* to *target*."""
        self.dir(os.path.dirname(name))
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def char_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self.dir(os.path.dirname(name))
        self._entry(name, stat.S_IFCHR | mode, b"", rdev=(major, minor))

    def tree(self, top: Path, prefix: str = "", *, keep: Callable[[str], bool]) -> None:
        """Add what is below *top*, under *prefix*, in sorted order.

        *keep* is asked for the name of each file and directory relative to
        *top*; a directory that is not kept is not entered.
        """
        for here, subdirs, files in os.walk(top):
            relative = os.path.relpath(here, top)
            at = "" if relative == "." else f"{relative}/"
            subdirs.sort()
            # os.walk lists a symlink to a directory among the directories.
            links = [d for d in subdirs if os.path.islink(os.path.join(here, d))]
            subdirs[:] = [d for d in subdirs if d not in links and keep(at + d)]
            for name in subdirs:
                self.dir(prefix + at + name)
            for name in sorted(files + links):
                path = os.path.join(here, name)
                if not keep(at + name):
                    continue
                if os.path.islink(path):
                    self.link(prefix + at + name, os.readlink(path))
                elif os.path.isfile(path):
                    mode = 0o755 if os.access(path, os.X_OK) else 0o644
                    with open(path, "rb") as file:
                        self.file(prefix + at + name, file.read(), mode)

    def close(self) -> None:
        """Write the trailer, padded so that another archive may follow."""
        self._entry("TRAILER!!!", 0, b"")

    def _entry(self, name: str, mode: int, data: bytes, rdev: tuple[int, int] = (0, 0)) -> None:
        raw = name.strip("/").encode() + b"\0"
        self._ino += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        # mode uid gid nlink mtime filesize devmajor devminor rdev... namesize check
        fields = (self._ino, mode, 0, 0, links, 0, len(data), 0, 0, *rdev, len(raw), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields))
        self._out.write(raw + bytes(-(110 + len(raw)) % 4))
        self._out.write(data + bytes(-len(data) % 4))
