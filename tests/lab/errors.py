"""The one exception of the lab: it could not be made.

Everything that stands between the caller and a running guest (no QEMU, no
network and an empty cache, a kernel for another architecture, a full disk)
ends in a LabError: one line that says what is missing and, where there is
one, the command that supplies it. A guest that ran and was lost is not an
error of this kind; it is a LabResult.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class LabError(Exception):
    """The lab could not be made; `str()` is one line for the user."""

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        """Keep *what* is wrong and the command that puts it right."""
        self.what = " ".join(what.split())
        self.remedy = remedy
        super().__init__(f"{self.what} (try: {remedy})" if remedy else self.what)


def from_os_error(error: OSError, where: Path) -> LabError:
    """Return the LabError for an OSError met while filling the cache at *where*."""
    name = error.filename or where
    if error.errno == errno.ENOSPC:
        return LabError(f"no space left on the disk that holds {name}", remedy=f"rm -r {where}")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return LabError(
            f"{name}: {error.strerror}", remedy="set XDG_CACHE_HOME to a writable directory"
        )
    return LabError(f"{name}: {error.strerror or error}")


def need_tool(name: str, package: str) -> str:
    """Return the path of program *name*, or raise with the package that has it."""
    path = shutil.which(name)
    if path is None:
        raise LabError(f"{name} is not installed", remedy=f"apt-get install {package}")
    return path


def run_tool(
    command: Sequence[str],
    *,
    purpose: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run *command* and return its stdout; a failure becomes one line.

    A full disk is looked for first: dpkg-deb's own complaint of it does not
    say what tar, below it, has said. Otherwise apt-get, dpkg-deb and gcc put
    the cause in the first line that carries an error mark; the last line is
    often only "compilation terminated".
    """
    done = subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        full = [x for x in lines if os.strerror(errno.ENOSPC) in x]
        marked = [x for x in lines if x.startswith(("E:", "dpkg")) or "rror:" in x]
        cause = (full or marked or lines[-1:] or [f"exit status {done.returncode}"])[0]
        raise LabError(f"{purpose}: {cause}", remedy="df -h" if full else None)
    return done.stdout
