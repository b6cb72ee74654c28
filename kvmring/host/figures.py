"""The picture of `kvmring plot`: heat maps, dirty rate, ring fill, working set, forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmring.figures import by_thousands, log_ticks, new_figure, title
from kvmring.host import analysis
from kvmring.host.report import BINS, rate_words, time_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvmring.host.analysis import WorkingSet
    from kvmring.host.report import Report
    from kvmring.host.traces import Trace

__all__ = ["draw"]

HEAT_ROWS = 128
MAX_SLOTS = 4  # heat maps; those with the most pushes
MAX_RINGS = 4  # lines of their own; of more, the fullest
_MIB = 1 << 20


def draw(report: Report) -> Figure:
    """Draw all panels; inside kvmring.figures.style()."""
    trace = report.trace
    slots = sorted(trace.slots, key=lambda s: -s.pushes)[:MAX_SLOTS]
    maps, curves = max(len(slots), 1), 1 + bool(trace.rings)
    heights = [1.6] * maps + [1.0] * curves
    figure = new_figure(height_inches=1.0 + 1.7 * (sum(heights) + 1.8))
    lines = [report.heading(), *report.notes()]
    if len(trace.slots) > MAX_SLOTS:
        lines.append(
            f"Of {len(trace.slots)} slots, the {MAX_SLOTS} with the most pushes are drawn."
        )
    title(figure, "\n".join(lines))
    # two parts, each with a layout of its own: a legend below takes no room above
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[sum(heights), 1.8])
    above, below = parts[0, 0], parts[1, 0]
    grid = above.add_gridspec(len(heights), 1, height_ratios=heights)
    panels: list[Axes] = []
    for row in range(len(heights)):
        panels.append(above.add_subplot(grid[row, 0], sharex=panels[0] if panels else None))
        panels[-1].tick_params(labelbottom=row == len(heights) - 1)
    for panel, slot in zip(panels, sorted(s.slot for s in slots), strict=False):
        _heat(panel, trace, slot)
    if not slots:
        _nothing(panels[0], "Pages over time", "page in slot", "no pages were dirtied")
    _rate(panels[maps], trace)
    if trace.rings:
        _fill(panels[-1], trace)
    panels[-1].set_xlabel("time since recording began [s]")
    panels[0].set_xlim(0, trace.seconds)
    above.align_ylabels(panels)
    left, right = below.subplots(1, 2, width_ratios=[1.0, 1.35])
    _working_set(left, trace, report.working_sets)
    _forecast(right, report)
    return figure


def _nothing(panel: Axes, heading: str, label: str, why: str) -> None:
    panel.set_title(heading)
    panel.set_ylabel(label)
    panel.set_yticks([])
    panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", va="center")


def _heat(panel: Axes, trace: Trace, slot: int) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    heat = analysis.heat_map(trace, slot, columns=BINS, rows=HEAT_ROWS)
    step = int(heat.pages[1] - heat.pages[0])
    most = max(float(heat.pushes.max()), 2.0)
    shown = np.ma.masked_equal(heat.pushes, 0)
    mesh = panel.pcolormesh(
        heat.seconds,
        heat.pages,
        shown,
        norm=LogNorm(float(trace.sampling), max(most, trace.sampling * 2.0)),
        cmap="viridis_r",
        rasterized=True,  # thousands of cells would make an SVG of megabytes
    )
    what = "pushes" if trace.exact_times else "pages collected"
    tall = "1 page" if step == 1 else f"{step:,} pages"
    bar = panel.figure.colorbar(mesh, ax=panel, label=f"{what} per cell", pad=0.01, aspect=15)
    log_ticks(bar.ax.yaxis)
    bar.ax.minorticks_off()
    where = f"slot {slot}" if slot >= 0 else "pages of no known slot"
    collections = not trace.exact_times and len(heat.seconds) <= BINS
    wide = "one collection" if collections else time_words(trace.seconds / BINS)
    panel.set_title(f"Pages over time, {where} (a cell: {tall}, {wide})")
    panel.set_ylabel("page in slot")
    panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    by_thousands(panel.yaxis)
    panel.grid(False)


def _rate(panel: Axes, trace: Trace) -> None:
    edges, rate = analysis.dirty_rate(trace, BINS)
    panel.stairs(rate, edges, fill=True, color="#3b6fb6", alpha=0.35)
    panel.stairs(rate, edges, color="#3b6fb6")
    mean = trace.pushes / trace.seconds
    panel.axhline(mean, color="#222222", linewidth=0.9, linestyle="--", label=f"mean {mean:,.0f}")
    panel.legend(loc="upper right", bbox_to_anchor=(1.0, 1.22), ncols=2)
    panel.set_title("Dirty rate")
    panel.set_ylabel("pages/s")
    panel.set_ylim(0, max(float(rate.max()) * 1.08, 1.0))
    by_thousands(panel.yaxis)


def _fill(panel: Axes, trace: Trace) -> None:
    fills = analysis.ring_fill(trace, BINS)
    if len(fills) > MAX_RINGS:
        all_rings = np.stack([fill.most for fill in fills])
        most = np.where(np.isnan(all_rings).all(axis=0), np.nan, np.fmax.reduce(all_rings))
        panel.stairs(most, fills[0].seconds, baseline=None, label=f"fullest of {len(fills)} vCPUs")
    else:
        for fill in fills:
            panel.stairs(fill.most, fill.seconds, baseline=None, label=f"vCPU {fill.vcpu}")
    if trace.ring_entries is not None:
        panel.axhline(
            trace.ring_entries, color="#b02a2a", linewidth=0.9, linestyle="--", label="ring size"
        )
    if len(trace.exit_ns):
        panel.plot(
            trace.exit_ns / 1e9,
            np.full(len(trace.exit_ns), 0.0),
            "|",
            color="#b02a2a",
            markersize=7,
            clip_on=False,
            label=f"ring-full exits ({len(trace.exit_ns):,})",
        )
    panel.legend(loc="upper right", bbox_to_anchor=(1.0, 1.24), ncols=MAX_RINGS + 2)
    panel.set_title("Ring fill, highest")
    panel.set_ylabel("entries")
    panel.set_ylim(bottom=0)
    by_thousands(panel.yaxis)


def _working_set(panel: Axes, trace: Trace, sets: Sequence[WorkingSet]) -> None:
    if not any(s.max_pages for s in sets):
        why = "no pages were dirtied" if sets else "the recording is too short"
        _nothing(panel, "Working set", "pages", why)
        panel.set_xlabel("window [s]")
        return
    seconds = [s.seconds for s in sets]
    panel.plot(seconds, [s.max_pages for s in sets], "o-", markersize=3, label="most")
    panel.plot(seconds, [s.mean_pages for s in sets], "s--", markersize=3, label="mean")
    if trace.sampling > 1:
        bound = [s.max_pages_bound for s in sets]
        panel.plot(
            seconds, bound, ":", color="#888888", label="at most, counting what sampling left out"
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    log_ticks(panel.xaxis)
    log_ticks(panel.yaxis)
    panel.set_title("Working set: different pages in a window")
    panel.set_xlabel("window [s]")
    panel.set_ylabel("pages")
    mib = panel.secondary_yaxis(
        "right",
        functions=(
            lambda pages: np.asarray(pages) * trace.page_size / _MIB,
            lambda size: np.asarray(size) * _MIB / trace.page_size,
        ),
    )
    mib.set_ylabel("MiB")
    log_ticks(mib.yaxis)
    panel.legend(loc="best")


def _forecast(panel: Axes, report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    for one in report.forecasts:
        shown = one.remaining[:20]
        time = [pages * report.trace.page_size / one.bandwidth for pages in shown]
        rounds = f"{one.rounds} round{'s' if one.rounds > 1 else ''}"
        end = (
            f"{rounds}, then {time_words(one.downtime_s or 0.0)}"
            if one.converges
            else "does not converge"
        )
        panel.plot(
            range(len(shown)),
            np.maximum(time, 1e-6),
            "o-" if one.converges else "x--",
            markersize=4,
            label=f"{rate_words(one.bandwidth)}: {end}",
        )
    limit = report.downtime_ns / 1e9
    label = f"downtime limit: {time_words(limit)}"
    panel.axhline(limit, color="#222222", linewidth=0.9, linestyle=":", label=label)
    panel.set_yscale("log")
    log_ticks(panel.yaxis)
    panel.set_title("Pre-copy forecast")
    panel.set_xlabel("rounds done")
    panel.set_ylabel("time to send what is left [s]")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
