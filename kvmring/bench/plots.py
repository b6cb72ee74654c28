"""The bench's pictures: where the modes cross, cost against density, and how it scales.

They are drawn from the groups' tables, so each shows what was measured and nothing else.
matplotlib is the extra `plot`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmring import figures
from kvmring.bench.advice import crossing, curves, lowest
from kvmring.bench.measure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

    from kvmring.bench.report import Cell, Group
    from kvmring.facts import JsonValue

__all__ = ["draw"]

PANEL_INCHES = (4.4, 4.2)
# blue for rings, warm for logs: light is small, dark is large
_RINGS = ("#9ecae1", "#4292c6", "#084594", "#3f007d")
_LOGS = {"bitmap": "#e6550d", "clear-log": "#a63603", "clear-log, set": "#fdae6b"}
_MARKS = ("o", "s", "^", "D")


def draw(groups: list[Group], facts: dict[str, JsonValue], folder: Path) -> list[Path]:
    """Draw what the groups have; returns the files.

    Raises:
        KvmringError: A file cannot be written.
    """
    drawers = {"modes": _modes, "bitmap": _bitmap, "scale": _scale, "harvest": _harvest}
    written = []
    for group in groups:
        if group.name not in drawers:
            continue
        path = folder / f"bench-{group.name}.png"
        with figures.style():
            picture = drawers[group.name](group)
            picture.text(0.01, 0.925, _host(facts), fontsize=8, color="#555555", va="top")
            figures.save(picture, path)
        written.append(path)
    return written


def _host(facts: dict[str, JsonValue]) -> str:
    memory = int(str(facts["memory_bytes"])) / (1 << 30)
    text = (
        f"{facts['cpu']}, {facts['cpus']} CPUs, {memory:.0f} GiB, Linux {facts['kernel']} "
        f"{facts['machine']}, {facts['backend']}, {int(str(facts['page_size'])) >> 10} KiB pages"
    )
    return text + (" (emulated: times mean nothing)" if facts["emulated"] else "")


def _picture(panels: int, title: str) -> tuple[Picture, list[Axes]]:
    from matplotlib.figure import Figure as Picture

    width, height = PANEL_INCHES if panels < 4 else (3.7, PANEL_INCHES[1])
    picture = Picture(figsize=(width * panels, height), dpi=figures.DPI, layout="constrained")
    picture.get_layout_engine().set(rect=(0, 0, 1, 0.89))  # type: ignore[union-attr,call-arg]
    picture.text(0.01, 0.985, title, va="top", fontsize=12, fontweight="bold")
    axes = picture.subplots(1, panels, squeeze=False)
    return picture, list(axes[0])


def _number(cell: Cell) -> float:
    if isinstance(cell, Figure):
        return cell.median
    assert isinstance(cell, int | float)
    return float(cell)


def _plain(axes: Axes, *, at: Iterable[float] = (), percent: bool = False) -> None:
    """Write the numbers of logarithmic axes as numbers: 1,000 and not a power of ten.

    Args:
        axes: What was drawn.
        at: Where the x axis has its marks; at powers of ten without it.
        percent: Whether x are shares, to be written as per cent.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    factor, sign = (100, "%") if percent else (1, "")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value * factor:,.6f}".rstrip("0").rstrip(".") + sign)
    )
    if marks := sorted(set(at)):
        axes.xaxis.set_major_locator(FixedLocator(marks))
        axes.xaxis.set_minor_locator(FixedLocator([]))


def _size(mib: float) -> str:
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB"


# Modes


def _modes(group: Group) -> Picture:
    table = group.table("modes")
    found = curves(table)
    costs = {(r["memory_mib"], r["mode"], r["pages"]): r["collect_us"] for r in table.records()}
    picture, panels = _picture(len(found), "What a collection costs, by way of logging")
    for axes, (mib, modes) in zip(panels, found.items(), strict=True):
        rings = [name for name in modes if name.startswith("ring")]
        for name, curve in modes.items():
            ring = name in rings
            colour = _RINGS[rings.index(name) % len(_RINGS)] if ring else _LOGS.get(name, "#444444")
            at = [pages for pages, _ in curve]
            label = f"{name} entries" if ring else name.replace(", set", ", initially set")
            axes.plot(
                at,
                [cost for _, cost in curve],
                "o-" if ring else "s--",
                color=colour,
                label=label,
            )
            boxes = [costs[(mib, name, pages)] for pages in at]
            quartiles = [b for b in boxes if isinstance(b, Figure)]
            axes.fill_between(
                at,
                [b.low for b in quartiles],
                [b.high for b in quartiles],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        axes.set(xscale="log", yscale="log", title=f"Memory of {_size(mib)}")
        axes.set_xlabel("pages dirtied between two collections")
        _cross(axes, modes, rings)
        _plain(axes)
    panels[0].set_ylabel("to list the pages and log them anew (µs)")
    panels[0].legend(loc="upper left")
    low = min(axes.get_ylim()[0] for axes in panels)
    for axes in panels:
        axes.set_ylim(low / 3, None)  # room for the crossings' words
    _share_y(panels)
    return picture


def _cross(axes: Axes, modes: dict[str, list[tuple[int, float]]], rings: list[str]) -> None:
    """Mark where the best ring begins to cost more than the best log."""
    best_ring = lowest({name: modes[name] for name in rings})
    best_log = lowest({name: curve for name, curve in modes.items() if name not in rings})
    at = crossing(best_ring, best_log)
    if at is None:
        return
    axes.axvline(at, color="#888888", linewidth=1, linestyle=":")
    low, high = axes.get_xlim()
    right = at * at < low * high  # on the side that has more room
    axes.annotate(
        f"the log costs less\nfrom about {float(f'{at:.2g}'):,.0f} pages",
        (at, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(6 if right else -6, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        fontsize=8,
        color="#555555",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9},
    )


def _share_y(panels: list[Axes]) -> None:
    low = min(axes.get_ylim()[0] for axes in panels)
    high = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, high)


# Bitmaps


def _bitmap(group: Group) -> Picture:
    records = group.table("bitmap").records()
    operations = list(dict.fromkeys(str(r["operation"]) for r in records))
    sizes = sorted({_number(r["mib"]) for r in records})
    picture, panels = _picture(len(operations), "Bitmap operations against density")
    blues, warm = ("#9ecae1", "#4292c6", "#084594"), ("#fdae6b", "#e6550d", "#a63603")
    for axes, operation in zip(panels, operations, strict=True):
        for index, size in enumerate(sizes):
            mine = [r for r in records if r["operation"] == operation and r["mib"] == size]
            for column, who, colours, style in (
                ("gb_s", "kvmring", blues, "-"),
                ("numpy_gb_s", "numpy", warm, "--"),
            ):
                points = [
                    (_number(r["density"]), _number(r[column]))
                    for r in mine
                    if r[column] is not None
                ]
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    _MARKS[index % len(_MARKS)] + style,
                    color=colours[index % len(colours)],
                    label=f"{who}, {_size(size)}",
                )
        axes.set(xscale="log", yscale="log", title=operation)
        axes.set_xlabel("pages that are dirty")
        _plain(axes, percent=True)
        axes.tick_params(axis="x", labelrotation=30)
    panels[0].set_ylabel("bitmap gone through (GB/s)")
    panels[0].legend(loc="lower left")
    _share_y(panels)
    return picture


# Scale


def _scale(group: Group) -> Picture:
    picture, (left, right) = _picture(2, "How collecting scales")
    records = group.table("vcpus").records()
    for column, what, colour in (
        ("harvest_us", "harvest", "#084594"),
        ("reset_us", "reset", "#e6550d"),
    ):
        for kind, style in (("busy", "o-"), ("idle", "s--")):
            mine = [r for r in records if r["rings"] == kind]
            entries = "256 entries in each" if kind == "busy" else "256 entries in the first"
            left.plot(
                [_number(r["vcpus"]) for r in mine],
                [_number(r[column]) for r in mine],
                style,
                color=colour,
                label=f"{what}, {entries}",
            )
    left.set(xscale="log", yscale="log", title="Rings of many vCPUs", ylabel="one call (µs)")
    left.set_xlabel("vCPUs")
    slots = group.table("slots").records()
    for column, what, style, colour in (
        ("harvest_us", "ring: harvest into a DirtySet", "o-", "#084594"),
        ("numbers_us", "ring: page numbers of the set", "s-", "#4292c6"),
        ("get_us", "log: KVM_GET_DIRTY_LOG", "^--", "#e6550d"),
        ("count_us", "log: count of the bitmap", "D--", "#fdae6b"),
    ):
        right.plot(
            [_number(r["gib"]) for r in slots],
            [_number(r[column]) for r in slots],
            style,
            color=colour,
            label=what,
        )
    right.set(xscale="log", yscale="log", title="Sparse slots, 1,000 dirty pages in each")
    right.set_xlabel("size of the slot (GiB)")
    for axes in (left, right):
        axes.set_ylim(top=axes.get_ylim()[1] * 8)  # room for the legend
        axes.legend(loc="upper left")
    _plain(left, at=[_number(r["vcpus"]) for r in records])
    _plain(right, at=[_number(r["gib"]) for r in slots])
    return picture


# Harvest


def _harvest(group: Group) -> Picture:
    records = group.table("times").records()
    orders = list(dict.fromkeys(str(r["order"]) for r in records))
    picture, panels = _picture(len(orders), "Harvest of a full ring, per entry")
    for axes, order in zip(panels, orders, strict=True):
        for column, what, style, colour in (
            ("set_ns", "kvmring into a DirtySet", "o-", "#084594"),
            ("gfns_ns", "kvmring into DirtyGfns", "s-", "#4292c6"),
            ("c_plain_ns", "plain C into a bitmap", "^--", "#e6550d"),
            ("c_floor_ns", "C that only marks entries", "D--", "#fdae6b"),
        ):
            mine = [r for r in records if r["order"] == order and r[column] is not None]
            axes.plot(
                [_number(r["entries"]) for r in mine],
                [_number(r[column]) for r in mine],
                style,
                color=colour,
                label=what,
            )
        axes.set(xscale="log", yscale="log", title=f"{order} pages")
        axes.set_xlabel("entries of the ring")
        _plain(axes, at=[_number(r["entries"]) for r in records])
    panels[0].set_ylabel("the whole call, per entry (ns)")
    panels[-1].legend(loc="upper right")
    _share_y(panels)
    return picture
