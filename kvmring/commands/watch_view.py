"""How `kvmring watch` shows an interval: a table with a verdict below, or a JSON line."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from kvmring.commands.output import table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from kvmring.facts import JsonValue
    from kvmring.host import RingFigures, Verdict, Watcher

__all__ = ["History", "as_json", "screen"]

_BARS = "▁▂▃▄▅▆▇█"
GRAPH = 12  # columns of the history graph


class History:
    """The last rates of each ring, for the graph."""

    def __init__(self) -> None:
        self._rates: dict[tuple[int, int], deque[float]] = {}

    def add(self, rings: Sequence[RingFigures]) -> list[str]:
        """Take an interval in; return each ring's graph."""
        graphs = []
        seen: dict[int, int] = {}
        for ring in rings:
            nth = seen[ring.vcpu] = seen.get(ring.vcpu, -1) + 1
            rates = self._rates.setdefault((ring.vcpu, nth), deque(maxlen=GRAPH))
            rates.append(ring.pushed / ring.seconds if ring.seconds > 0 else 0.0)
            graphs.append(graph(rates))
        return graphs


def graph(rates: Sequence[float]) -> str:
    """Draw rates as bars, the highest of them a full one; nothing at all is a dot."""
    most = max(rates, default=0.0)
    return "".join(
        "." if rate <= 0 else _BARS[min(7, int(8 * rate / most - 1e-9))] for rate in rates
    )


def screen(
    watcher: Watcher,
    rings: Sequence[RingFigures],
    graphs: Sequence[str],
    verdict: Verdict,
    cost: float,
) -> RenderableType:
    """Draw an interval. cost: processor time that watching took, as a share of one."""
    process = watcher.process
    head = (
        f"{process.name} {process.pid} ({process.user}): {process.vms} "
        f"VM{'' if process.vms == 1 else 's'}, {len(process.vcpus)} vCPUs; watching takes "
        f"{cost:.1%} of a CPU"
    )
    if watcher.why_polling is None:
        source = "exact, from the kernel's counters"
        if watcher.lost:
            source += f"; {watcher.lost} samples lost"
    else:
        source = f"polled: {watcher.why_polling}"
    parts: list[RenderableType] = [Text(head), Text(source)]
    if rings:
        parts += ["", _figures(rings, graphs)]
        hot = table("vCPU", "hot pages (slot:page), share of those looked at")
        for ring in rings:
            pages = "  ".join(f"{s}:{page:#x} {share:.1%}" for s, page, share in ring.hot)
            hot.add_row(str(ring.vcpu), pages or "-")
        parts += ["", hot]
    parts += ["", Text(str(verdict), style="bold")]
    return Group(*parts)


def _figures(rings: Sequence[RingFigures], graphs: Sequence[str]) -> RenderableType:
    names = ("vCPU", "entries", "pages/s", "fill", "most", "harvests/s", "full exits/s")
    rows = table(*names, "history", right=names)
    for ring, bars in zip(rings, graphs, strict=True):
        rows.add_row(
            str(ring.vcpu),
            str(ring.entries),
            _rate(ring),
            f"{ring.fill / ring.entries:.0%}",
            f"{ring.high_water / ring.entries:.0%}",
            _per_second(ring.harvests, ring, at_least=not ring.exact),
            "?" if ring.full_exits is None else _per_second(ring.full_exits, ring),
            bars,
        )
    return rows


def _rate(ring: RingFigures) -> str:
    if ring.rate is None:
        return f"≥ {ring.pushed} (lapped)"  # a count, never a rate
    return f"{ring.rate:,.0f}"


def _per_second(count: int, ring: RingFigures, *, at_least: bool = False) -> str:
    return f"{'≥ ' if at_least and count else ''}{count / ring.seconds:.1f}"


def as_json(
    watcher: Watcher, rings: Sequence[RingFigures], verdict: Verdict, cost: float
) -> dict[str, JsonValue]:
    """Make the document of one interval."""
    return {
        "schema": 1,
        "pid": watcher.process.pid,
        "source": "polling" if watcher.why_polling else "events",
        "why_polling": watcher.why_polling,
        "lost_samples": watcher.lost,
        "cpu_share": round(cost, 4),
        "rings": [
            {
                "vcpu": ring.vcpu,
                "thread": ring.thread,
                "found_by": ring.found_by,
                "entries": ring.entries,
                "seconds": round(ring.seconds, 6),
                "pushed": ring.pushed,
                "lapped": ring.lapped,
                "pages_per_second": None if ring.rate is None else round(ring.rate, 1),
                "reset": ring.reset,
                "fill": ring.fill,
                "unreset": ring.unreset,
                "high_water": ring.high_water,
                "harvests": ring.harvests,
                "harvest_period_s": round(ring.harvest_period_s, 4),
                "full_exits": ring.full_exits,
                "hot": [
                    {"slot": slot, "page": page, "share": round(share, 4)}
                    for slot, page, share in ring.hot
                ],
            }
            for ring in rings
        ],
        "verdict": {
            "state": verdict.state.value,
            "vcpu": verdict.vcpu,
            "size": verdict.size,
            "text": verdict.text,
        },
    }
