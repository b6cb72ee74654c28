"""Names that a package imports when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["lazy"]


def lazy(
    package: str, home: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a package's __getattr__ and __dir__.

    Args:
        package: Its full name.
        home: Each public name to the module of the package that has it.
    """
    own = sys.modules[package].__dict__

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = own[name] = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        return value

    def names() -> list[str]:
        return sorted({*own, *home})

    return get, names
