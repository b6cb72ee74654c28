"""Packages that only some features need: how a missing one is told to the user."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmring.errors import KvmringError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a missing package, imported inside, into one sentence that names the extra.

    Args:
        name: The extra of kvmring that brings the package, such as "trace".

    Raises:
        KvmringError: A package that is imported inside is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == "kvmring":
            raise  # a defect of ours, not a missing package
        raise KvmringError(
            f"the package {package} is not installed; pip install 'kvmring[{name}]' brings it"
        ) from error
