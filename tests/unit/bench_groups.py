"""Groups of figures, made up, for tests of what is said and drawn about them."""

from __future__ import annotations

from kvmring.bench import advice, modes
from kvmring.bench.measure import Figure, summary
from kvmring.bench.report import Group, Table


def figure(value: float) -> Figure:
    return summary([value * 0.9, value, value * 1.1])


def modes_group() -> Group:
    """Make a modes group whose ring costs a unit per page, and whose log costs 300."""
    table = Table(name="modes", title="One round: write, then collect", columns=modes._COLUMNS)
    for pages in (10, 100, 1000, 10_000):
        for mode, cost in (("ring 1024", pages), ("ring 65536", pages), ("bitmap", 300)):
            stops = pages // 960 if mode == "ring 1024" else 0
            table.add(
                1024, pages, pages / 262144, mode, figure(5.0 * pages), figure(cost), stops, 16
            )
    start = Table(name="start", title="Beginning", columns=modes._START)
    start.add("bitmap", figure(1.0), figure(2.0), 0, figure(3.0))
    return Group(name="modes", tables=[table, start], says=advice.advise(table))
