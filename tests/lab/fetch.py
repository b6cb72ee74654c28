"""Debian packages for another architecture, through an apt of the lab's own.

apt-get does the resolving, downloading and checking of signatures, with every
path (configuration, sources, lists, status, cache) pointed into the lab's
cache: the system's apt is neither read nor changed, except that its mirror and
its Acquire settings (proxies, timeouts) are used, and root is not needed. A
manifest remembers what a request resolved to, so that the same request is
answered from the cache without any network.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .cache import Cache, digest, say
from .errors import LabError, need_tool, run_tool

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_FALLBACK_MIRROR = "http://deb.debian.org/debian"
_LISTS_MAX_AGE_S = 24 * 3600
_KERNEL_PACKAGE = re.compile(r"linux-(image|binary|modules)-")


def system_mirror(etc: Path = Path("/etc/apt")) -> str:
    """Return the Debian mirror that the system's own apt sources name.

    Security and third-party archives are told apart by the path: a full
    mirror's ends in /debian. KVMRING_LAB_MIRROR overrides; without any such
    source (another distribution) Debian's own address is used.
    """
    if mirror := os.environ.get("KVMRING_LAB_MIRROR"):
        return mirror
    files = [etc / "sources.list"]
    parts = etc / "sources.list.d"
    if parts.is_dir():
        files += sorted(p for p in parts.iterdir() if p.suffix in (".list", ".sources"))
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            if not line.startswith(("deb ", "URIs:")):
                continue
            for word in line.split():
                url = urlsplit(word)
                if url.scheme in ("http", "https") and url.path.rstrip("/").endswith("/debian"):
                    return word
    return _FALLBACK_MIRROR


@dataclass(frozen=True, slots=True)
class Package:
    """One .deb as apt resolved it: its name, version, file name and size."""

    name: str
    version: str
    file: str
    size_bytes: int


class Apt:
    """The isolated apt for one Debian suite and one architecture."""

    def __init__(self, cache: Cache, suite: str, deb_arch: str) -> None:
        """Name the *suite* (trixie, sid, trixie-backports, ...) and Debian architecture."""
        self._cache = cache
        self._suite = suite
        self._arch = deb_arch
        self._key = f"{suite}-{deb_arch}"

    def userland(self, names: Sequence[str], *, refresh: bool = False) -> list[Path]:
        """Return the .deb files of *names* and of all they depend on."""
        return self._fetch("userland", names, refresh)

    def exactly(self, names: Sequence[str], *, refresh: bool = False) -> list[Path]:
        """Return the .deb files of *names* alone."""
        return self._fetch("exactly", names, refresh)

    def kernel(self, flavour: str, *, refresh: bool = False) -> list[Path]:
        """Return the .deb files that hold the current kernel of *flavour*.

        The meta package names it; since Linux 7 image and modules are
        packages of their own.
        """
        return self._fetch("kernel", [flavour], refresh)

    def _fetch(self, how: str, names: Sequence[str], refresh: bool) -> list[Path]:
        manifest = self._cache.dir("manifests") / f"{self._key}-{how}-{digest(names)}.json"
        if not refresh and (found := self.from_cache(manifest)) is not None:
            return found
        with self._cache.lock(f"apt-{self._key}"):
            if not refresh and (found := self.from_cache(manifest)) is not None:
                return found
            return self._from_network(manifest, how, names, refresh)

    def from_cache(self, manifest: Path) -> list[Path] | None:
        """Return the files that *manifest* lists, or None if any is not there whole."""
        try:
            packages = [Package(**entry) for entry in json.loads(manifest.read_text())]
        except (FileNotFoundError, ValueError, TypeError):
            return None
        debs = self._cache.dir("debs")
        files = [debs / package.file for package in packages]
        for file, package in zip(files, packages, strict=True):
            if not file.is_file() or file.stat().st_size != package.size_bytes:
                return None
        return files

    def _from_network(
        self, manifest: Path, how: str, names: Sequence[str], refresh: bool
    ) -> list[Path]:
        need_tool("apt-get", "apt (the lab's packages come through it: Debian or a derivative)")
        need_tool("dpkg-deb", "dpkg")
        if not KEYRING.is_file():
            raise LabError(f"{KEYRING} is missing", remedy="apt-get install debian-archive-keyring")
        env = self._environment()
        self._update(env, refresh)
        packages = self._resolve(env, how, names)
        debs = self._cache.dir("debs")
        missing = [
            p
            for p in packages
            if not (debs / p.file).is_file() or (debs / p.file).stat().st_size != p.size_bytes
        ]
        if missing:
            total = sum(p.size_bytes for p in missing)
            say(f"fetching {len(missing)} packages of {self._key}, {total / 1e6:.1f} MB")
            with self._cache.scratch() as scratch:
                run_tool(
                    ["apt-get", "-qq", "download"] + [f"{p.name}={p.version}" for p in missing],
                    purpose=f"packages of {self._key}",
                    env=env,
                    cwd=scratch,
                )
                for package in missing:
                    (scratch / package.file).replace(debs / package.file)
        fields = [{n: getattr(p, n) for n in Package.__slots__} for p in packages]
        draft = manifest.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(fields, indent=1))
        draft.replace(manifest)
        return [debs / p.file for p in packages]

    def _update(self, env: dict[str, str], refresh: bool) -> None:
        stamp = self._cache.dir(f"apt/{self._key}") / "updated"
        if (
            not refresh
            and stamp.is_file()
            and time.time() - stamp.stat().st_mtime < (_LISTS_MAX_AGE_S)
        ):
            return
        say(f"fetching the package lists of {self._key}")
        # "any": apt-get's default calls an update that failed a success.
        run_tool(
            ["apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update"],
            purpose=f"package lists of {self._key}",
            env=env,
        )
        stamp.touch()

    def _resolve(self, env: dict[str, str], how: str, names: Sequence[str]) -> list[Package]:
        wanted = self._kernel_packages(env, names[0]) if how == "kernel" else list(names)
        verb = "install" if how == "userland" else "download"
        out = run_tool(
            ["apt-get", "-qq", "--print-uris", verb, *wanted],
            purpose=f"packages of {self._key}",
            env=env,
        )
        packages = []
        for line in out.splitlines():
            # 'URI' name_version_arch.deb size hash; a colon in the version is escaped.
            match = re.match(r"'(\S+)' (\S+\.deb) (\d+)", line)
            if match is None:
                continue
            file = match[2]
            name, version, _ = file.split("_", 2)
            packages.append(Package(name, version.replace("%3a", ":"), file, int(match[3])))
        if not packages:
            raise LabError(f"apt resolved {' '.join(wanted)} of {self._key} to nothing")
        return packages

    def _kernel_packages(self, env: dict[str, str], flavour: str) -> list[str]:
        # Debian writes cloud and rt before the architecture, page sizes behind it.
        if flavour == "generic":
            metas = [f"linux-image-{self._arch}"]
        else:
            metas = [f"linux-image-{flavour}-{self._arch}", f"linux-image-{self._arch}-{flavour}"]
        for meta in metas:
            try:
                self._depends(env, meta)
            except LabError:
                continue
            break
        else:
            raise LabError(f"{self._key} has no kernel package {' or '.join(metas)}")
        found: list[str] = []
        todo = [meta]
        while todo:
            name = todo.pop()
            if name not in found:
                found.append(name)
                todo += [d for d in self._depends(env, name) if _KERNEL_PACKAGE.match(d)]
        return [name for name in found if name != meta or len(found) == 1]

    def _depends(self, env: dict[str, str], name: str) -> Iterable[str]:
        out = run_tool(["apt-cache", "depends", "-i", name], purpose=name, env=env)
        return re.findall(r"^\s+\|?(?:Pre)?Depends: (\S+)$", out, re.MULTILINE)

    def _environment(self) -> dict[str, str]:
        """Write the isolated apt's files; return an environment that makes apt use them."""
        top = self._cache.dir(f"apt/{self._key}")
        for name in ("lists/partial", "cache/archives/partial"):
            (top / name).mkdir(parents=True, exist_ok=True)
        (top / "status").touch()
        # A backports suite lacks what its packages depend on.
        base = self._suite.removesuffix("-backports")
        suites = base if base == self._suite else f"{base} {self._suite}"
        (top / "lab.sources").write_text(
            f"Types: deb\nURIs: {system_mirror()}\nSuites: {suites}\nComponents: main\n"
            f"Signed-By: {KEYRING}\n"
        )
        # As root, apt would drop to the user _apt, which cannot enter a home directory.
        (top / "apt.conf").write_text(
            _system_acquire()
            + f"""
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
APT::Architecture "{self._arch}";
APT::Architectures "{self._arch}";
APT::Default-Release "{self._suite}";
APT::Get::AllowUnauthenticated "false";
APT::Install-Recommends "false";
APT::Sandbox::User "{_user()}";
Dir::Etc::parts "/dev/null";
Dir::Etc::main "/dev/null";
Dir::Etc::sourcelist "{top}/lab.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{top}";
Dir::State::lists "{top}/lists";
Dir::State::status "{top}/status";
Dir::Cache "{top}/cache";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "{top}";
"""
        )
        return {**os.environ, "APT_CONFIG": str(top / "apt.conf"), "LC_ALL": "C"}


def _system_acquire() -> str:
    """Return the system's Acquire settings: how this machine gets at the network."""
    dump = run_tool(["apt-config", "dump", "Acquire"], purpose="apt-config")
    lines = [x for x in dump.splitlines() if not x.startswith("Acquire::IndexTargets")]
    return "\n".join(lines)


def _user() -> str:
    return "root" if os.geteuid() == 0 else "_apt"
