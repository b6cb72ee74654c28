"""How kvmring's figures look: size, grid, colours, units; without a display or global state.

Every figure is made inside style() and written by save(). matplotlib is the extra `plot`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmring.errors import KvmringError
from kvmring.extras import extra

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "FORMATS",
    "by_thousands",
    "log_ticks",
    "new_figure",
    "require_format",
    "save",
    "style",
    "title",
]

FORMATS = (".png", ".svg")
WIDTH_INCHES = 11.0
DPI = 120
_STYLE: dict[str, object] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # words stay words: they can be searched and edited
    "svg.hashsalt": "kvmring",  # the same figure is the same file
}


def require_format(path: Path) -> None:
    """Refuse a file name whose ending is no picture's.

    Raises:
        ValueError: It is neither .png nor .svg.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a figure's name ends in {' or '.join(FORMATS)}")


@contextmanager
def style() -> Iterator[None]:
    """Apply the style to what is made and saved inside.

    Raises:
        KvmringError: matplotlib is not installed.
    """
    with extra("plot"):
        import matplotlib as mpl
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def new_figure(*, height_inches: float) -> Figure:
    """Make a figure that lays itself out so that nothing overlaps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout="constrained")


def title(figure: Figure, text: str) -> None:
    """Put a line above everything, at the left like the panels' titles."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=9, color="#444444")


def by_thousands(axis: Axis) -> None:
    """Write an axis' numbers with separators, and without powers of ten: 1,234,567."""
    from matplotlib.ticker import FuncFormatter

    def words(value: float, _: int | None) -> str:
        whole = value == round(value) and abs(value) < 1e15
        return f"{value:,.0f}" if whole else f"{value:.6g}"

    axis.set_major_formatter(FuncFormatter(words))


def log_ticks(axis: Axis) -> None:
    """Give a logarithmic axis plain numbers; call it when the data are drawn.

    Within two decades 1, 2 and 5 are ticks; over more the powers of ten.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    narrow = high / low < 100
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axis.set_minor_formatter(NullFormatter())
    by_thousands(axis)


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the name's ending says as what.

    Raises:
        ValueError: The ending is neither .png nor .svg.
        KvmringError: The file cannot be written.
    """
    require_format(path)
    svg = path.suffix.lower() == ".svg"
    try:
        figure.savefig(path, metadata={"Date": None} if svg else None)
    except OSError as error:
        raise KvmringError(f"{path} cannot be written: {error.strerror or error}") from error
