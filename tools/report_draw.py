"""Figures of a report drawn by matplotlib: as SVG whose colours the page's style sheet chooses, and as PNG.

The inks below are what a PNG shows. In the SVG each becomes a CSS variable of the same name, so one drawing serves light
and dark pages.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from typing import Any

import numpy as np

from polargrad_dist.errors import ConfigError
from tools.report_figures import GREY, Curve, Figure, Panel

# Light and dark ink of each name; neighbours differ in lightness too, for eyes that do not tell the hues apart.
INKS = {
    "ink": ("#1c2128", "#e6e8eb"),
    "quiet": ("#57606b", "#a3abb5"),
    "grid": ("#dde1e6", "#343b45"),
    "grey": ("#9299a3", "#7d8691"),
    "c0": ("#0067a8", "#5cb8f0"),
    "c1": ("#d45500", "#ff9a52"),
    "c2": ("#00795a", "#3fd0a4"),
    "c3": ("#b0388a", "#f08fcd"),
    "c4": ("#8a6700", "#e6c14a"),
    "c5": ("#5b45b8", "#ad9cff"),
    "c6": ("#a3261f", "#ff8278"),
    "c7": ("#3f8f9e", "#8be0ea"),
}
COLOURS = 8
WIDTH = 11.0  # inches of a full row
LEFT, RIGHT, UNDER, OVER = 0.5, 0.1, 0.4, 0.26  # inches around the axes of a panel
SMALL, TEXT = 8.5, 10.0  # points


def drawable() -> None:
    """Raises ``ConfigError`` where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the report draws its figures with matplotlib, which is not installed: pip install 'polargrad-dist[plots]'"
        ) from None


def colour(number: int) -> str:
    """The name of the ink of a run or phase."""
    return "grey" if number == GREY else f"c{number % COLOURS}"


def draw(figure: Figure, runs: list[str]) -> tuple[str, bytes]:
    """(inline SVG, PNG) of a figure; ``runs`` are the labels that the colours stand for."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    rows = math.ceil(len(figure.panels) / figure.columns)
    columns = min(figure.columns, len(figure.panels))
    panel_width = WIDTH / figure.columns
    width = max(columns * panel_width, WIDTH / 2)
    legend = figure.layers() or (dict(zip(runs, range(len(runs)), strict=True)) if len(runs) > 1 else {})
    entries = legend_columns(list(legend), width)
    head = 0.28 + 0.2 * math.ceil(len(legend) / entries)
    height = head + rows * figure.height
    settings: Any = {
        "font.family": "sans-serif",
        "font.size": SMALL,
        "text.color": INKS["ink"][0],
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": figure.name,
        "path.simplify_threshold": 0.3,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font does not know
        canvas = Canvas(figsize=(width, height))
        title = canvas.text(LEFT / width, 1 - 0.08 / height, shorten(figure.title, 70), va="top")
        title.set(fontsize=TEXT, fontweight="bold")
        note = canvas.text(1 - RIGHT / width, 1 - 0.09 / height, figure.note, va="top", ha="right")
        note.set_color(INKS["quiet"][0])
        if legend:
            draw_legend(canvas, legend, entries, (LEFT / width, 1 - 0.3 / height))
        for i, panel in enumerate(figure.panels):
            row, column = divmod(i, figure.columns)
            under = (rows - 1 - row) * figure.height + UNDER
            left = column * panel_width + LEFT
            if not panel.filled:
                words = canvas.text(
                    left / width,
                    (under + figure.height - UNDER - OVER + 0.06) / height,
                    f"{panel.title}: not recorded",
                )
                words.set_color(INKS["quiet"][0])
                continue
            box = (panel_width - LEFT - RIGHT, figure.height - UNDER - OVER)
            axes = canvas.add_axes((left / width, under / height, box[0] / width, box[1] / height))
            draw_panel(axes, panel, *box)
        drawn, picture = io.StringIO(), io.BytesIO()
        canvas.savefig(drawn, format="svg", transparent=True)
        canvas.savefig(picture, format="png", dpi=130, facecolor="white")
    return inline(
        drawn.getvalue(), f"{figure.title}: {', '.join(p.title for p in figure.panels)}"
    ), picture.getvalue()


def legend_columns(names: list[str], width: float) -> int:
    """As many columns as the widest name leaves room for."""
    widest = max((len(shorten(name, 40)) for name in names), default=0)
    return max(1, min(len(names), int((width - LEFT) / (0.45 + 0.085 * widest))))


def draw_legend(canvas: Any, legend: dict[str, int], columns: int, corner: tuple[float, float]) -> None:
    from matplotlib.lines import Line2D

    names = [name for column in range(columns) for name in list(legend)[column::columns]]  # filled by columns
    canvas.legend(
        [Line2D([], [], color=INKS[colour(legend[name])][0], linewidth=3) for name in names],
        [f"\u200b{shorten(name, 40)}" for name in names],  # before 3.10 matplotlib passes over a leading "_"
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=columns,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.2,
        labelspacing=0.25,
    )


def draw_panel(axes: Any, panel: Panel, width: float, height: float) -> None:
    """Curves, areas and marks with a quiet frame; ``width`` and ``height`` are of the axes, in inches."""
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    for spine in ("left", "bottom"):
        axes.spines[spine].set_color(INKS["grid"][0])
    axes.tick_params(colors=INKS["quiet"][0], labelsize=SMALL - 1, length=0, pad=3)
    axes.grid(True, color=INKS["grid"][0], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(shorten(panel.title, int(width * 14)), loc="left", fontsize=SMALL, pad=4)
    axes.set_xlabel(panel.x_label, color=INKS["quiet"][0], fontsize=SMALL - 1, labelpad=1)
    draw_areas(axes, panel)
    for curve in panel.curves:
        draw_curve(axes, curve)
    for number, places in panel.marks:
        axes.plot(
            places,
            np.full(places.size, 0.03),
            "x",
            color=INKS[colour(number)][0],
            markersize=4,
            transform=axes.get_xaxis_transform(),
        )
    layers = [layer for _, layer in panel.areas]
    set_axis(axes.xaxis, np.concatenate([c.x for c in panel.curves + layers]), False, False, width / 0.42)
    heights = [c.y for c in panel.curves] or [np.array([0.0, *np.sum([layer.y for layer in layers], axis=0)])]
    set_axis(axes.yaxis, np.concatenate(heights), panel.log, panel.zero, height / 0.22)


def draw_curve(axes: Any, curve: Curve) -> None:
    looks: dict[str, dict[str, Any]] = {
        "line": {"linewidth": 1.2},
        "raw": {"linewidth": 0.7, "alpha": 0.45},
        "smooth": {"linewidth": 1.7},
        "dashed": {"linewidth": 1.2, "linestyle": (0, (4, 2))},
        "points": {"linewidth": 0.9, "linestyle": (0, (4, 2)), "marker": "o", "markersize": 2.6},
    }
    look = looks[curve.style]
    if curve.x.size == 1:
        look = look | {"marker": "o", "markersize": 3.5}  # a line of one point cannot be seen
    axes.plot(curve.x, curve.y, color=INKS[colour(curve.colour)][0], **look)


def draw_areas(axes: Any, panel: Panel) -> None:
    if not panel.areas:
        return
    x = panel.areas[0][1].x
    layers = np.array([layer.y for _, layer in panel.areas])
    if x.size == 1:  # an area of one point cannot be seen
        x, layers = np.array([x[0] - 0.5, x[0] + 0.5]), layers.repeat(2, axis=1)
    inks = [INKS[colour(layer.colour)][0] for _, layer in panel.areas]
    axes.stackplot(x, layers, colors=inks, alpha=0.85, linewidth=0)


def set_axis(axis: Any, values: Any, log: bool, zero: bool, room: float) -> None:
    """Limits around the values, and about ``room`` ticks at most, whose labels are short."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    positive = values[values > 0]
    log = log and positive.size > 0
    low, high = limits(positive if log else values, log, zero)
    if log:
        axis.axes.set_yscale("log", nonpositive="mask")
    getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)
    count = max(2, min(6, int(room)))
    whole = MaxNLocator(count, integer=axis.axis_name == "x")
    ticks = log_ticks(low, high, count) if log else whole.tick_values(low, high)
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def limits(values: Any, log: bool, zero: bool) -> tuple[float, float]:
    """A little more than the values take, and never so little that labels would repeat."""
    low, high = float(values.min()), float(values.max())
    if log:
        low, high = math.log10(low), math.log10(high)
        pad = max(0.04 * (high - low), 0.02)
        return 10 ** (low - pad), 10 ** (high + pad)
    if zero and low >= 0:
        return 0.0, 1.05 * high or 1.0
    pad = max(0.04 * (high - low), 0.005 * max(abs(low), abs(high))) or 1.0
    return low - pad, high + pad


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """The coarsest of powers of ten, 1-3 and 1-2-5 steps of which three fit, else equal steps; at most ``count``."""
    from matplotlib.ticker import MaxNLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / count)]
    return list(MaxNLocator(count).tick_values(low, high))


def short(value: float) -> str:
    """A number in few characters: 0.02, 3e-05, 1,500 as 1.5k, 61.44M."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e15:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def shorten(text: str, length: int) -> str:
    """A long text without its middle."""
    half = max(1, (length - 1) // 2)
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def inline(svg: str, description: str) -> str:
    """An SVG file as part of a page: no metadata or outer size, coordinates to 1/100 point, inks as CSS variables."""
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', svg)
    width = re.search(r'width="([\d.]+)pt"', svg)
    assert box is not None
    assert width is not None
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<g id=\"[^\"]*\"/>", "", body)
    body = re.sub(r"<g id=\"[^\"]*\">", "<g>", body)
    body = re.sub(r"font-family: [^;\"]*; ", "", body)
    body = re.sub(r" transform=\"rotate\(-0 [^\"]*\"", "", body)
    body = re.sub(r"\n\s*", "\n", body)
    body = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]).replace("\n", ""), body)
    for name, (ink, _) in INKS.items():
        body = re.sub(rf"((?:fill|stroke): ){ink}\b", rf"\1var(--{name})", body)
    label = html.escape(description)
    pixels = round(float(width[1]) * 4 / 3)
    size = f"max-width:{pixels}px;min-width:{min(pixels, 640)}px"
    return f'<svg {box[0]} style="{size}" role="img" aria-label="{label}">{body}'
