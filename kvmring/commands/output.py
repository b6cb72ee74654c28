"""What the commands print with: JSON, and tables without a frame."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmring.facts import JsonValue

__all__ = ["print_json", "table"]


def print_json(document: Mapping[str, JsonValue]) -> None:
    """Print a document, indented."""
    print(json.dumps(document, indent=2))


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Make an empty table without a frame; the columns named in `right` hold numbers."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        result.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return result
