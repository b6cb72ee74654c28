"""The house rules that a reader cannot see being broken: who imports whom, and banned idioms.

Modules stand in an order, and each imports earlier ones only; the C extension has one door,
abi.py; importing the package is cheap. The sources are read with ast, nothing is executed.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TypeGuard

import pytest

import kvmring

PACKAGE = Path(kvmring.__file__).parent

# Each line may import the lines above it. What shares a line may not import each other.
ORDER = [
    {"lazy"},
    {"errors"},
    {"extras"},
    {"abi"},
    {"ioctls"},
    {"owned"},
    {"bitmap"},
    {"target"},
    {"dirtyset"},
    {"memory"},
    {"ring"},
    {"device"},
    {"stats"},
    {"registers"},
    {"vcpu"},
    {"dirtylog"},
    {"vm"},
    {"sources"},
    {"serving"},
    {"pending"},
    {"runner"},
    {"tracker"},
    {"system"},
    {"vgic"},
    {"guests.orders", "guests.arm64", "guests.x86_64", "guests.its"},
    {"guests.writer"},
    {"guests"},
    {""},  # the package itself: kvmring/__init__.py
    {"facts"},
    {"caps"},
    {"demo"},
    {"figures"},
    {"host.procfs"},
    {"host.processes"},
    {"host.tracepoints"},
    {"host.observer", "host.events"},
    {"host.watcher"},
    {"host.verdict"},
    {"host.recording"},
    {"host.tracked", "host.traces"},
    {"host.analysis", "host.forecast"},
    {"host.report"},
    {"host.figures"},
    {"host"},
    {"host.metrics"},
    {"checks.rules", "checks.raw"},
    {"checks.rig", "checks.alarm"},
    {"checks.bits"},
    {"checks.gic"},
    {
        f"checks.{group}"
        for group in (
            "caps",
            "enable_cap",
            "enable_cap_bitmap",
            "memslot",
            "memslot_log",
            "get",
            "get_refused",
            "clear",
            "clear_range",
            "manual_protect",
            "mmap",
            "ring",
            "ring_full",
            "ring_marks",
            "reset",
            "reset_pages",
            "signals",
            "signals_reset",
            "fork",
            "fork_share",
            "bitmap_backup",
            "vgic",
            "truth",
        )
    },
    {"checks"},
    {"checks.process"},
    {"checks.run"},
    {"checks.results"},
    {"checks.report"},
    {"bench"},
    {"bench.measure", "bench.baseline"},
    {"bench.report", "bench.rigs", "bench.numbers"},
    {"bench.advice"},
    {"bench.plots"},
    {"bench.harvest", "bench.cycle", "bench.calls", "bench.bitmap", "bench.modes", "bench.scale"},
    {"commands"},
    {"commands.output"},
    {
        "commands.bench",
        "commands.caps",
        "commands.check",
        "commands.demo",
        "commands.plot",
        "commands.ps",
        "commands.trace",
    },
    {"commands.watch_view"},
    {"commands.watch"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

# Storeys that may speak to C; above them, only what is named here, and why.
C_STOREYS = {"abi", "ioctls", "bitmap", "target", "dirtyset", "memory", "ring", "serving"}
C_ABOVE = {
    "vcpu": {"ffi", "lib"},  # the ring's owner, kick and respond: no ioctls, so not in ioctls.py
    "dirtylog": {"ffi", "lib"},  # the harvest of all rings
    "vm": {"ffi", "lib"},  # the size of a ring
    "tracker": {"lib"},  # the levels of VM.freeze()
    "device": {"lib"},  # constants, and the fd's number
    "host.procfs": {"lib"},  # descriptors of other processes: no ioctls
    "host.processes": {"lib"},  # kcmp(2)
    "host.tracepoints": {"lib"},  # the C code's numbers of the events
    "host.observer": {"ffi", "lib"},  # the copies of a ring: no ioctls
    "host.events": {"ffi", "lib"},  # perf's descriptors and buffers
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def for_type_checkers(node: ast.AST) -> TypeGuard[ast.If]:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imports(tree: ast.AST) -> list[tuple[str, str]]:
    """List what is imported at run time, at any depth, as (module, name or "")."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if for_type_checkers(node):
            found += imports(ast.Module(body=node.orelse, type_ignores=[]))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found += [(node.module or "", alias.name) for alias in node.names]
        else:
            found += imports(node)
    return found


def own_imports(tree: ast.AST) -> set[str]:
    """List the kvmring modules that are imported, without the package's name."""
    found = set()
    for module, name in imports(tree):
        package, _, inside = module.partition(".")
        if package != "kvmring":
            continue
        whole = f"{inside}.{name}".strip(".")
        found.add(whole if whole in SOURCES else inside)
    return found


def test_every_module_has_its_place() -> None:
    assert set(SOURCES) <= set(LEVEL), "a new module: put it into ORDER, as low as it can be"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_go_down_only(name: str) -> None:
    extensions = {"_kvm"} if name == "abi" else {"_buffer"} if name == "bitmap" else set()
    above = {
        other
        for other in own_imports(SOURCES[name]) - extensions
        if LEVEL.get(other, 99) >= LEVEL[name]
    }
    assert not above, f"kvmring.{name} imports what is not below it"


def test_the_reader_of_imports_sees_them() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "import kvmring.vm\n"
        "from kvmring import ioctls, Cap\n"
        "if TYPE_CHECKING:\n    from kvmring.demo import x\n"
        "else:\n    from kvmring.system import y\n"
        "def f():\n    from kvmring.guests import ORDERS\n"
    )
    assert own_imports(tree) == {"vm", "ioctls", "", "system", "guests"}


def test_the_extension_has_one_door() -> None:
    for name, tree in SOURCES.items():
        if name != "abi":
            assert "_kvm" not in own_imports(tree), name
            assert not any("_cffi" in module or module == "cffi" for module, _ in imports(tree))


def names_of_c(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in ("ffi", "lib")}


@pytest.mark.parametrize("name", sorted(set(SOURCES) - C_STOREYS))
def test_c_is_spoken_on_its_storeys_only(name: str) -> None:
    assert names_of_c(SOURCES[name]) == C_ABOVE.get(name, set())


# Banned idioms


def calls(tree: ast.AST) -> list[str]:
    """List the dotted names that are called."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_banned_calls(name: str) -> None:
    found = set(calls(SOURCES[name]))
    assert "ffi.release" not in found, "destructors release; a release under a call is a crash"
    assert "ffi.cast" not in found or name == "abi", "no pointers out of integers"
    assert "time.sleep" not in found, "wait for an event, not for a time"
    assert not found & {"ffi.memmove", "ffi.from_handle", "ffi.dlopen", "ffi.addressof"}
    # cli's standard output is its own; checks ask the kernel what the library refuses
    if name != "cli" and not name.startswith("checks."):
        assert not found & {"os.open", "os.close", "os.dup", "os.dup2", "mmap.mmap"}, "C owns fds"


def test_the_reader_of_calls_sees_them() -> None:
    assert calls(ast.parse("def f():\n    x = ffi.release(p)\n    time.sleep(1)")) == [
        "ffi.release",
        "time.sleep",
    ]


def declarations() -> str:
    """Return the CFFI declarations without comments."""
    csrc = Path(__file__).parents[2] / "csrc"
    text = "".join(path.read_text() for path in sorted(csrc.glob("*.cdef.h")))
    return re.sub(r"/\*.*?\*/", "", text, flags=re.S)


def test_no_pointer_into_mapped_memory_reaches_python() -> None:
    # ffi.buffer() and p[i] of a mapping could outlive it. They cannot be written at all while
    # the mappings' owners are opaque and no function returns a pointer; a bitmap's words are
    # of the heap, and DirtyBitmap.__buffer__ keeps their owner.
    text = declarations()
    assert len(re.findall(r"\bkvr_\w+\(", text)) > 50, "the declarations were found"
    returned = re.findall(r"^[\w ]+\*+\s*(\w+)\(", text, flags=re.M)
    assert returned == ["kvr_bitmap_words"]
    owners = {"obj", "map", "ring", "bitmap", "set", "server", "observer", "events"}
    for owner in (f"kvr_{name}" for name in owners):
        assert re.search(rf"^struct {owner};$", text, flags=re.M), f"{owner} is opaque"
    out = set(re.findall(r"struct (\w+) \*\*out", text))
    # kvr_gfn: entries on the heap, which DirtyGfns keeps as long as a view of them lives
    assert out == {f"kvr_{name}" for name in owners} | {"kvr_gfn"}


def test_no_c_function_takes_an_fd_or_an_address() -> None:
    parameters = re.findall(r"\(([^()]*)\);", declarations())
    for parameter in ",".join(parameters).split(","):
        assert not re.search(r"\b(fd|addr|hva)$", parameter.strip()), parameter


def test_handles_are_never_bound_to_a_variable() -> None:
    # a saved traceback would pin the mapping; they are passed on inline
    kept = set()
    for name, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
                value = node.value
                if isinstance(value, ast.Attribute) and value.attr in ("handle", "_handle"):
                    kept.add((name, ast.unparse(value)))
    # the property's own check; and a bitmap's words, which are not mapped memory
    assert kept == {("owned", "self._handle"), ("bitmap", "self._handle")}


# What importing costs

LOADED = """
import sys
before = set(sys.modules)
from kvmring import VM
import json
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_the_package_pulls_in_no_heavy_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADED],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    loaded = set(json.loads(done.stdout))
    assert {"kvmring", "kvmring.vm", "kvmring._kvm"} <= loaded
    heavy = {"rich", "psutil", "numpy", "cffi", "argparse", "subprocess", "asyncio", "random"}
    assert not {module.partition(".")[0] for module in loaded} & heavy
    assert not loaded & {"kvmring.cli", "kvmring.demo", "kvmring.caps", "kvmring.guests"}
    assert "kvmring.tracker" not in loaded, "a name brings its own module and what that needs"


def test_all_names_what_there_is() -> None:
    assert set(kvmring._HOME) == set(kvmring.__all__) - {"__version__"}
    assert set(kvmring.__all__) <= set(dir(kvmring))
    assert len(set(kvmring.__all__)) == len(kvmring.__all__)
    for name in kvmring.__all__:
        assert getattr(kvmring, name) is not None
