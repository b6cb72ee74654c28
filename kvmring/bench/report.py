"""The form of the bench's figures: tables of cells, and sentences; as JSON for programs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from kvmring.bench.measure import Figure
from kvmring.facts import host_facts

if TYPE_CHECKING:
    from kvmring.bench.baseline import Baseline
    from kvmring.facts import JsonValue

__all__ = ["SCHEMA", "Cell", "Column", "Group", "Table", "bench_facts"]

SCHEMA = 1

Cell = Figure | str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column: its name in JSON, and its head, which tells the unit."""

    name: str
    head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells. None stands for what was not measured."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def add(self, *cells: Cell) -> None:
        """Append a row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)

    def records(self) -> list[dict[str, Cell]]:
        """Return the rows by column name."""
        names = [column.name for column in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def as_json(self) -> dict[str, JsonValue]:
        """Return it as JSON: heads by name, and the rows."""
        heads: dict[str, JsonValue] = {c.name: c.head for c in self.columns}
        rows: list[JsonValue] = [
            {name: _json(cell) for name, cell in record.items()} for record in self.records()
        ]
        return {"title": self.title, "columns": heads, "rows": rows}


def _json(cell: Cell) -> JsonValue:
    if isinstance(cell, Figure):
        return {
            "median": cell.median,
            "low": cell.low,
            "high": cell.high,
            "samples": cell.samples,
        }
    return cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group's figures, and what they say in words."""

    name: str
    tables: list[Table] = field(default_factory=list)
    says: list[str] = field(default_factory=list)

    def table(self, name: str) -> Table:
        """Return a table by its name."""
        return next(table for table in self.tables if table.name == name)

    def as_json(self) -> dict[str, JsonValue]:
        """Return it as JSON."""
        return {
            "tables": {table.name: table.as_json() for table in self.tables},
            "says": list(self.says),
        }


def bench_facts(base: Baseline | None, cpu: int | None) -> dict[str, JsonValue]:
    """Return the facts about this host that the figures depend on."""
    facts = host_facts()
    model = str(facts["cpu"])
    hypervisor = None if base is None else base.hypervisor()
    loads: list[JsonValue] = [round(load, 2) for load in os.getloadavg()]
    return {
        **facts,
        "hypervisor": hypervisor,
        "emulated": "TCG" in model or (hypervisor or "").startswith("TCG"),
        "pinned_cpu": cpu,
        "load": loads,
        "available_bytes": psutil.virtual_memory().available,
        "compiler": None if base is None else base.compiler,
        "numpy": _numpy_version(),
    }


def _numpy_version() -> str | None:
    try:
        import numpy as np
    except ImportError:
        return None
    return np.__version__
