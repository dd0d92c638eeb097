"""From a plot to pictures: SVG for the page in two widths, PNG and CSV for the folder beside it.

The SVG goes into the page itself, so that its text can be selected and its colours follow the page's: colours are drawn
as the light theme's and then replaced by the page's CSS variables. Two widths, because a plot made for a desk is
illegible when it is shrunk to a telephone; the page shows the one that fits.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bytejepa.report.tables import Table

INK, FAINT, GRID, DEAD = "#1c1c1b", "#6b6b67", "#d9d9d4", "#d11a2b"
SERIES = ("#1559c7", "#c2571a", "#2a8f57", "#8e4ec6", "#9a7b0a", "#0f8a9d", "#a8326e", "#5f6b7a")
COLOURS = {INK: "--ink", FAINT: "--faint", GRID: "--line", DEAD: "--dead"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}
"""Colour as drawn: the page's variable for it."""
MARKERS = "osD^vPX*"
PNG_DOTS_PER_INCH = 150


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """For how wide a screen a plot is drawn."""

    name: str
    width_inches: float

    @property
    def is_narrow(self) -> bool:
        """Whether parts have to stand below instead of beside each other."""
        return self.width_inches < 6


WIDE, NARROW = Layout("wide", 9.2), Layout("narrow", 3.9)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A figure of the report."""

    name: str
    """File name without ending, and the anchor in the page."""
    title: str
    caption: str
    """What is seen, in which unit, from how many seeds, and how it was computed."""
    table: Table
    """What is drawn."""
    draw: Callable[[Layout], Any]
    """Gives a matplotlib Figure."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DrawnPlot:
    """A plot with its pictures."""

    plot: Plot
    svgs: dict[str, str]
    """By layout, to stand in HTML."""
    png: bytes


def style_of(index: int) -> dict[str, Any]:
    """Return colour and marker of the configuration number `index`, told apart without colour too."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def new_figure(layout: Layout, height_inches: float) -> Any:
    """Return an empty matplotlib figure of the layout's width."""
    from matplotlib.figure import Figure

    return Figure(figsize=(layout.width_inches, height_inches), layout="constrained")


def plain_numbers(axis: Any) -> None:
    """Label the ticks of an axis with plain numbers, as 0.001 and 2,000, instead of powers in mathematical type."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def label(value: float, _: int | None = None) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"

    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(NullFormatter())


def log_axis(axis: Any) -> None:
    """Make an axis logarithmic with ticks that can be read over any range; call it after drawing."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    # under a decade there may be no power of ten at all
    axis.set_major_locator(MaxNLocator(4) if decades < 1 else LogLocator(subs=(1, 3) if decades < 2 else (1,)))
    axis.set_minor_locator(NullLocator())
    plain_numbers(axis)


def draw_plots(plots: list[Plot]) -> Iterator[DrawnPlot]:
    """Yield every plot with its pictures."""
    import matplotlib as mpl

    settings: Any = {  # matplotlib types each key by name
        "svg.fonttype": "none", "svg.hashsalt": "bytejepa", "font.size": 9.5, "axes.titlesize": 10, "legend.fontsize": 9,
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT, "axes.edgecolor": FAINT,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
        "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False, "lines.linewidth": 1.6,
        "axes.axisbelow": True, "font.family": "DejaVu Sans", "axes.titlelocation": "left", "axes.unicode_minus": True,
    }  # fmt: skip
    with mpl.rc_context(settings):
        for plot in plots:
            wide, narrow = plot.draw(WIDE), plot.draw(NARROW)
            png = io.BytesIO()
            wide.savefig(png, format="png", dpi=PNG_DOTS_PER_INCH, facecolor="white")
            wide.set_layout_engine("none")  # laid out once is enough
            svgs = {layout.name: _svg(figure, plot, layout) for layout, figure in ((WIDE, wide), (NARROW, narrow))}
            yield DrawnPlot(plot=plot, svgs=svgs, png=png.getvalue())


def _svg(figure: Any, plot: Plot, layout: Layout) -> str:
    """Return the figure as an SVG element that can stand in a page: unique ids, no names of schemas, our colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # a style element would hold for the whole page, metadata for nobody
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        for key in list(element.attrib):
            element.attrib[_local(key)] = element.attrib.pop(key)
        _rename(element, f"{plot.name}-{layout.name}-")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": layout.name, "role": "img", "aria-label": plot.title}
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return text


def _local(name: str) -> str:
    return re.sub(r"^\{[^}]*\}", "", name)


def _rename(element: ElementTree.Element, prefix: str) -> None:
    """Put `prefix` before the ids that the element bears or points to: those of two plots may be the same."""
    for key, value in element.attrib.items():
        if key == "id":
            element.attrib[key] = prefix + value
        elif key == "href":
            element.attrib[key] = value.replace("#", f"#{prefix}", 1)
        else:
            element.attrib[key] = value.replace("url(#", f"url(#{prefix}")


def write_plot_files(drawn: list[DrawnPlot], folder: Path) -> list[Path]:
    """Write PNG and CSV of every plot into `folder`, which exists, and return their paths. Raises: OSError."""
    written = []
    for one in drawn:
        contents = {".png": one.png, ".csv": one.plot.table.to_csv().encode(errors="surrogateescape")}
        for ending, content in contents.items():
            path = folder / f"{one.plot.name}{ending}"
            path.write_bytes(content)
            written.append(path)
    return written
