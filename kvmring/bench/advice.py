"""What the figures of the modes say in words: where they cross, and what a dirty rate asks for."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from kvmring.bench.measure import Figure

if TYPE_CHECKING:
    from kvmring.bench.report import Cell, Table

__all__ = ["Curve", "advise", "cost_at", "crossing", "curves", "lowest"]

INTERVAL_S = 0.1  # between two collections
RATES = (1_000, 10_000, 100_000, 1_000_000)  # pages per second
MICRO = 1e6
KEPT_BACK = 64 + 512  # entries of a ring: KVM's reserve, and what PML may add at once
CLEARLY = 0.8  # a difference that is more than noise

Curve = list[tuple[int, float]]  # pages of a round, and the median cost in microseconds


def curves(table: Table, column: str = "collect_us") -> dict[int, dict[str, Curve]]:
    """Return memory in MiB -> mode -> cost by pages, ascending."""
    found: dict[int, dict[str, Curve]] = {}
    for row in table.records():
        cost = row[column]
        if isinstance(cost, Figure):
            curve = found.setdefault(_int(row["memory_mib"]), {}).setdefault(str(row["mode"]), [])
            curve.append((_int(row["pages"]), cost.median))
    return found


def _int(cell: Cell) -> int:
    assert isinstance(cell, int)
    return cell


def cost_at(curve: Curve, pages: float) -> float | None:
    """Return the cost at so many pages, along straight lines; None beyond what was measured."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= pages <= x1:
            return y0 + (y1 - y0) * (pages - x0) / (x1 - x0)
    return None


def crossing(one: Curve, other: Curve) -> float | None:
    """Return the pages from which on the first costs more than the other; None if nowhere."""
    costs = dict(other)
    both = [(x, y - costs[x]) for x, y in one if x in costs]
    for (x0, d0), (x1, d1) in pairwise(both):
        if d0 <= 0 < d1:
            return x0 + (x1 - x0) * -d0 / (d1 - d0)
    return None


def lowest(modes: dict[str, Curve]) -> Curve:
    """Return the cost of the best of several modes at each measured number of pages."""
    found: dict[int, float] = {}
    for curve in modes.values():
        for pages, cost in curve:
            found[pages] = min(cost, found.get(pages, math.inf))
    return sorted(found.items())


def advise(table: Table) -> list[str]:
    """Say where ring and log cross, and which mode and ring size a dirty rate asks for."""
    says = []
    losses = curves(table, "lost_us")
    for mib, modes in curves(table).items():
        rings = {name: curve for name, curve in modes.items() if name.startswith("ring")}
        logs = {name: curve for name, curve in modes.items() if name not in rings}
        if rings and logs:
            says.append(_cross(mib, rings, logs))
            says += _rates(mib, modes, losses[mib])
            says += _stops(table, mib)
    return says


def _size(mib: int) -> str:
    return f"{mib >> 10} GiB" if mib >= 1024 else f"{mib} MiB"


def _cross(mib: int, rings: dict[str, Curve], logs: dict[str, Curve]) -> str:
    best_ring, best_log = lowest(rings), lowest(logs)
    at = crossing(best_ring, best_log)
    costs = dict(best_log)
    first, last = best_ring[0][0], best_ring[-1][0]
    if best_ring[0][1] > CLEARLY * costs.get(first, 0.0) and at is not None:
        return (
            f"{_size(mib)}: collecting from the log costs less from about {_round(at)} pages per "
            "round on; with fewer there is no difference that counts."
        )
    if at is not None:
        return (
            f"{_size(mib)}: collecting from a ring costs less up to about {_round(at)} pages per "
            "round, from the log beyond."
        )
    cheaper = [cost <= costs[pages] for pages, cost in best_ring if pages in costs]
    who = "a ring" if all(cheaper) else "the log" if not any(cheaper) else "neither for sure"
    return f"{_size(mib)}: {who} costs less to collect from, at {first:,} to {last:,} pages."


def _round(number: float) -> str:
    """Write a number with the two digits that count."""
    digits = max(0, int(math.log10(number)) - 1) if number >= 1 else 0
    return f"{round(number / 10**digits) * 10**digits:,}"


def _has_room(mode: str, pages: float) -> bool:
    """Tell whether a mode takes so many pages without stopping the guest; logs always do."""
    return not mode.startswith("ring") or int(mode.split()[-1]) - KEPT_BACK >= pages


def _choose(costs: dict[str, float]) -> str:
    """Return the first mode, rings from small to large, that is as good as the best of its kind."""
    best = min(costs, key=lambda name: costs[name])
    ring = best.startswith("ring")
    alike = (name for name in costs if name.startswith("ring") == ring)
    return next(name for name in alike if CLEARLY * costs[name] <= costs[best])


def _stops(table: Table, mib: int) -> list[str]:
    """Say what it costs the guest that a ring is too small, where most pages were written."""
    rows = [
        r for r in table.records() if r["memory_mib"] == mib and str(r["mode"]).startswith("ring")
    ]
    most = max((_int(r["pages"]) for r in rows), default=0)
    rows = [r for r in rows if r["pages"] == most]
    if len(rows) < 2 or rows[-1]["stops"] != 0 or not rows[0]["stops"]:
        return []
    small, large = rows[0]["lost_us"], rows[-1]["lost_us"]
    assert isinstance(small, Figure)
    assert isinstance(large, Figure)
    if small.low <= large.high:
        return []
    times = "once" if rows[0]["stops"] == 1 else f"{rows[0]['stops']} times"
    return [
        f"{_size(mib)}, {most:,} pages in one round: {rows[0]['mode']} stops the guest {times}, "
        f"and costs it {small.median / large.median - 1:.0%} more time than {rows[-1]['mode']}."
    ]


def _rates(mib: int, modes: dict[str, Curve], losses: dict[str, Curve]) -> list[str]:
    """Say for each rate, as far as the guest can reach it, what is best."""
    says = []
    for rate in RATES:
        pages = rate * INTERVAL_S
        # a mode that stops the guest at this rate is no choice
        costs = {
            name: cost
            for name, curve in modes.items()
            if (cost := cost_at(curve, pages)) is not None and _has_room(name, pages)
        }
        if not costs:
            continue
        name = _choose(costs)
        lost = max(0.0, cost_at(losses[name], pages) or 0.0)
        if lost >= INTERVAL_S * MICRO:
            says.append(
                f"{_size(mib)}, {rate:,} pages/s: out of reach here, logging alone would take "
                f"{lost / INTERVAL_S / MICRO:.0%} of the guest's time."
            )
            break
        says.append(
            f"{_size(mib)}, {rate:,} pages/s, collected every {INTERVAL_S * 1000:.0f} ms: "
            f"{name}{' or more' if name.startswith('ring') else ''}; {costs[name]:,.0f} us to "
            f"collect, the guest loses "
            f"{lost / INTERVAL_S / MICRO:.1%} of its time."
        )
    return says
