"""Facts about this host that every report carries: kernel, KVM backend, CPU, memory, versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

import kvmring
from kvmring.abi import PAGE_SIZE

__all__ = ["JsonValue", "host_facts", "version_line"]

JsonValue = str | int | float | bool | None | list["JsonValue"] | dict[str, "JsonValue"]

_BACKENDS = ("kvm_intel", "kvm_amd", "kvm_pvm", "kvm_hv", "kvm_pr", "kvm")
_PARAMETERS = ("ept", "npt", "pml", "nested", "tdp_mmu", "eager_page_split", "enable_pml")


def host_facts() -> dict[str, JsonValue]:
    """Return what a report about this host must say: kernel, page size, KVM backend, CPU, RAM."""
    uname = os.uname()
    modules = [name for name in _BACKENDS if Path("/sys/module", name).is_dir()]
    parameters: dict[str, JsonValue] = {}
    for module in modules:
        for name in _PARAMETERS:
            path = Path("/sys/module", module, "parameters", name)
            try:
                parameters[f"{module}.{name}"] = path.read_text().strip()
            except OSError:
                continue  # this backend has no such parameter, or root alone may read it
    return {
        "kernel": uname.release,
        "machine": uname.machine,
        "page_size": PAGE_SIZE,
        "backend": next((m for m in modules if m != "kvm"), "kvm" if modules else "built in"),
        "parameters": parameters,
        "cpu": _cpu_model(),
        "cpus": psutil.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "CPU part"):
            return value.strip()
    return "unknown"


def version_line() -> str:
    """Return what a bug report needs, in one line."""
    facts = host_facts()
    return (
        f"kvmring {kvmring.__version__}, Python {facts['python']}, "
        f"Linux {facts['kernel']} {facts['machine']}, {facts['backend']}, "
        f"{facts['page_size']}-byte pages"
    )
