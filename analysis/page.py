"""What every HTML report shares: the frame of its page, how figures are written into it, colours.

A report is one file that needs nothing else: no network, no folder beside it. Text from files goes
through jinja2's escaping, data for figures through JSON that cannot leave its script element.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import paradiff

Figure = dict[str, Any]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; dashes and symbols differ too."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")
NEUTRAL = "#8a8a8a"
COLOURS = (*PALETTE, NEUTRAL)
PATTERNS = ("", "/", "\\", "x", "-", ".", "|")
"""Of bars, beside their colours."""


class Chart(NamedTuple):
    """A figure and what is said of it. ``id``: of its element, an identifier of JavaScript too.

    ``narrow``: what its layout has instead on a phone. ``height_rem``: None, that of every chart.
    """

    id: str
    title: str
    note: str
    figure: Figure
    narrow: Figure = {}  # noqa: RUF012
    height_rem: float | None = None


def render(template: str, charts: Iterable[Chart], **values: Any) -> str:
    """The page of ``template``, which fills the frame."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        charts=[(c, _script_json({**c.figure, "narrow": c.narrow})) for c in charts],
        plotly=Markup(get_plotlyjs()),
        version=paradiff.__version__,
        **values,
    )


def _script_json(data: Any) -> Markup:
    """JSON for a script element: ``<`` is escaped, so nothing can close the element or open one."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def plain(text: str) -> str:
    """For plotly, which reads a few HTML tags in names."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def line(name: str, x: Sequence[float], y: Sequence[float], k: int, **more: Any) -> Figure:
    return {
        "type": "scatter",
        "name": plain(name),
        "x": list(x),
        "y": list(y),
        "mode": "lines",
        "line": {"color": PALETTE[k % len(PALETTE)], "dash": DASHES[k % len(DASHES)], "width": 2},
        "marker": {"symbol": SYMBOLS[k % len(SYMBOLS)], "size": 8},
    } | more


def bars(name: str, y: Sequence[Any], x: Sequence[float], k: int, **more: Any) -> Figure:
    """Horizontal bars of one part."""
    marker = {
        "color": COLOURS[k % len(COLOURS)],
        "pattern": {
            "shape": PATTERNS[k % len(PATTERNS)], "fillmode": "overlay", "fgcolor": "#ffffff",
            "fgopacity": 0.5, "size": 6,
        },
    }  # fmt: skip
    shape = {"type": "bar", "orientation": "h", "name": name, "y": list(y), "x": list(x)}
    return shape | {"marker": marker, "hovertemplate": "%{y}: " + name + " %{x:.3g}"} | more


def rule(axis: str, at: float, text: str) -> Figure:
    """A thin line across the plot, its name at the top or at the left."""
    other = "y" if axis == "x" else "x"
    return {
        "shape": {
            "type": "line", f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1,
            f"{other}ref": "paper", "line": {"width": 1, "dash": "longdash"},
        },
        "annotation": {
            axis: at, other: 1 if axis == "x" else 0, f"{other}ref": "paper", "text": plain(text),
            "showarrow": False, "xanchor": "left", "yanchor": "top" if axis == "x" else "bottom",
        },
    }  # fmt: skip


def figure(traces: Sequence[Figure], x: Figure, y: Figure, rules: Sequence[Figure] = ()) -> Figure:
    """``rules`` on a logarithmic axis are placed at the logarithm, as plotly wants annotations; its
    ticks are ``ticks`` where it has none."""
    for name, scale in (("x", x), ("y", y)):
        if scale.get("type") == "log" and "tickvals" not in scale:
            scale |= ticks([value for trace in traces for value in trace[name]])
    for each in rules:
        note = each["annotation"]
        for name, scale in (("x", x), ("y", y)):
            if scale.get("type") == "log" and note.get(f"{name}ref") != "paper":
                note[name] = math.log10(note[name])
    return {
        "data": list(traces),
        "layout": {
            "xaxis": x,
            "yaxis": y,
            "shapes": [each["shape"] for each in rules],
            "annotations": [each["annotation"] for each in rules],
        },
    }


def ticks(values: Iterable[float]) -> Figure:
    """Of a logarithmic axis: 1, 2 and 5 times the powers of ten around ``values``; over more than three
    decades the powers alone, within one or two also 3 and 7."""
    powers = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    digits = {1: (1, 2, 3, 5, 7), 2: (1, 2, 3, 5, 7), 3: (1, 2, 5)}.get(max(high - low, 1), (1,))
    places = [digit * 10.0**power for power in range(low, high + 1) for digit in digits]
    return {"tickvals": places, "ticktext": [f"{place:g}" for place in places]}


def axis(text: str) -> Figure:
    return {"title": {"text": text}}
