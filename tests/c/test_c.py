"""Compile the C with sanitizers, together with the programs beside this file, and run them.

Each program is plain C against csrc/: it returns 0 passed, 1 failed, 77 skipped, and says on
stderr what was wrong. They run twice, under the address and undefined-behaviour sanitizers and
under the thread sanitizer. By hand:

    gcc -std=gnu11 -g -fsanitize=thread -pthread tests/c/threads.c csrc/{own,vm,ring}.c ...
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gates import gate

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CC = os.environ.get("CC", "gcc")
SKIPPED = 77
SECONDS = 60

# small chunks, so that small bitmaps have more than one; 16 words are a step of the count
FLAGS = ["-std=gnu11", "-g", "-O1", "-pthread", "-fno-omit-frame-pointer", "-DKVR_CHUNK_WORDS=17"]
STRICT = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
# Not programs: faults*.c are a library (tests/kvm/test_check_faults.py), baseline.c is what
# `kvmring bench` loads (tests/unit/test_bench.py)
NO_PROGRAM = re.compile("faults|baseline")
PROGRAMS = sorted(path.stem for path in HERE.glob("*.c") if not NO_PROGRAM.match(path.stem))


def sources() -> list[Path]:
    """List the extension's own sources; buffer.c alone needs Python, and is not part of them."""
    arch = {"aarch64": "arm64"}.get(platform.machine(), platform.machine())
    found = [path for path in sorted(CSRC.glob("*.c")) if path.name != "buffer.c"]
    found = [path for path in found if not path.name.endswith(".prelude.c")]
    return [*found, CSRC / f"guest_{arch}.S"]


def build(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CC, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=SECONDS
    )


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env={**os.environ, **OPTIONS},
    )


class Build:
    """The objects of csrc/ under one sanitizer, and programs linked with them."""

    def __init__(self, sanitizer: str, folder: Path) -> None:
        self.flags = [*FLAGS, *SANITIZERS[sanitizer]]
        self.folder = folder
        self.problem = self._why_not()
        self.objects: list[Path] = []
        if not self.problem:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self.objects = list(pool.map(self.compile, sources()))

    def _why_not(self) -> str:
        """Return why the sanitizer cannot be used here, or nothing."""
        if not shutil.which(CC):
            return f"no C compiler {CC}"
        probe = self.folder / "probe.c"
        probe.write_text("int main(void) { return 0; }\n")
        done = build(*self.flags, probe, "-o", self.folder / "probe")
        if done.returncode:
            return f"{CC} cannot link it: {done.stderr.strip().splitlines()[-1]}"
        done = run(self.folder / "probe")
        if done.returncode:
            return f"it does not run on this kernel: {done.stderr.strip()[:200]}"
        return ""

    def compile(self, source: Path) -> Path:
        target = self.folder / f"{source.parent.name}_{source.stem}.o"
        done = build(*self.flags, *STRICT, "-c", source, "-o", target)
        assert not done.returncode, done.stderr
        return target

    def link(self, program: str) -> Path:
        target = self.folder / program
        done = build(*self.flags, self.compile(HERE / f"{program}.c"), *self.objects, "-o", target)
        assert not done.returncode, done.stderr
        return target


@pytest.fixture(scope="module", params=SANITIZERS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build csrc/ once per sanitizer."""
    build = Build(request.param, tmp_path_factory.mktemp(request.param))
    if build.problem:
        pytest.skip(f"no {request.param} sanitizer: {build.problem}")
    return build


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(built: Build, program: str) -> None:
    if program.endswith("_kvm"):
        gate()
    done = run(built.link(program), "20240607")
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stderr, "the sanitizer has something to say"


# The sanitizers are awake: what they are there for is seen

WRONG = {
    "address": "int main(void) { volatile char *p = malloc(8); char *q = (char *)p; free(q); "
    "return p[0]; }",
    "thread": "static int n; static void *f(void *p) { n++; return p; } int main(void) "
    "{ pthread_t t; pthread_create(&t, 0, f, 0); n++; pthread_join(t, 0); return 0; }",
}


def test_the_sanitizer_sees_a_mistake(built: Build, tmp_path: Path) -> None:
    kind = "thread" if "-fsanitize=thread" in built.flags else "address"
    source = tmp_path / "wrong.c"
    source.write_text(f"#include <pthread.h>\n#include <stdlib.h>\n{WRONG[kind]}\n")
    assert not build(*built.flags, "-w", source, "-o", tmp_path / "wrong").returncode
    done = run(tmp_path / "wrong")
    assert done.returncode not in (0, 1, SKIPPED) or "Sanitizer" in done.stderr
    assert "Sanitizer" in done.stderr
