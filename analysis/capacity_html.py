"""A capacity answer as one HTML file that needs nothing else: no network, no folder beside it.

Decides which curves are drawn and how; every number comes from the answer. Text from files goes
through jinja2's escaping, data for the curves through JSON that cannot leave its script element.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import paradiff
from analysis import capacity as words
from simulator.capacity import HOURS_PER_MONTH, Answer, Curves, Option

Figure = dict[str, Any]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; dashes and symbols differ too."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")


def page(answer: Answer, arguments: Sequence[str]) -> str:
    """The report. ``arguments``: of the command that made it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best = answer.options[0]
    return environment.get_template("capacity.html.j2").render(
        title=words.title(answer),
        sentences=list(words.recommendation(answer)),
        block="\n".join(words.block(answer, best)),
        header=words.HEADER,
        rows=words.rows(answer),
        unable=list(words.unable(answer)),
        figures=[
            {"id": name, "title": heading, "note": note, "json": _script_json(figure)}
            for name, heading, note, figure in _figures(answer, best)
        ],
        command=shlex.join(["paradiff", *arguments]),
        version=paradiff.__version__,
        energy=best.tdp_source,
        idle=words.IDLE_POWER,
        plotly=Markup(get_plotlyjs()),
    )


def _script_json(data: Any) -> Markup:
    """JSON for a script element: ``<`` is escaped, so nothing can close the element or open one."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _figures(answer: Answer, best: Option) -> Iterable[tuple[str, str, str, Figure]]:
    if best.curves is None:
        return
    curves, labels = best.curves, answer.question.labels
    if curves.latencies_s:
        yield (
            "distribution",
            "Latency distribution",
            "Share of the requests of each class that are done within a time. Steps at the service time "
            "are requests that did not wait.",
            _distribution(answer, curves, labels),
        )
    yield (
        "load",
        "Latency against load",
        f"{best.box.topology.name}, {best.nodes} nodes. Right of the saturation rate there is no steady "
        "state, so there is no latency to draw.",
        _load(answer, best, curves),
    )
    cost = _cost(answer)
    if any(trace["x"] for trace in cost["data"]):
        yield (
            "cost",
            "Cost against latency",
            "Each mark is a number of nodes, cut as recommended for its box; left and low is better.",
            cost,
        )
    if curves.utilisation:
        yield (
            "utilisation",
            "Busy GPUs over time",
            "One replication, from the first arrival to the last; each interval is a mean.",
            _utilisation(curves),
        )


def _text(text: str) -> str:
    """For plotly, which reads a few HTML tags in names."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(name: str, x: Sequence[float], y: Sequence[float], k: int, **more: Any) -> Figure:
    return {
        "type": "scatter",
        "name": _text(name),
        "x": list(x),
        "y": list(y),
        "mode": "lines",
        "line": {"color": PALETTE[k % len(PALETTE)], "dash": DASHES[k % len(DASHES)], "width": 2},
        "marker": {"symbol": SYMBOLS[k % len(SYMBOLS)], "size": 8},
    } | more


def _rule(axis: str, at: float, text: str) -> Figure:
    """A thin line across the plot, its name at the top or at the left."""
    other = "y" if axis == "x" else "x"
    return {
        "shape": {
            "type": "line", f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1,
            f"{other}ref": "paper", "line": {"width": 1, "dash": "longdash"},
        },
        "annotation": {
            axis: at, other: 1 if axis == "x" else 0, f"{other}ref": "paper", "text": _text(text),
            "showarrow": False, "xanchor": "left", "yanchor": "top" if axis == "x" else "bottom",
        },
    }  # fmt: skip


def _figure(traces: Sequence[Figure], x: Figure, y: Figure, rules: Sequence[Figure] = ()) -> Figure:
    """``rules`` on a logarithmic axis are placed at the logarithm, as plotly wants annotations."""
    for rule in rules:
        note = rule["annotation"]
        for name, axis in (("x", x), ("y", y)):
            if axis.get("type") == "log" and note.get(f"{name}ref") != "paper":
                note[name] = math.log10(note[name])
    return {
        "data": list(traces),
        "layout": {
            "xaxis": x,
            "yaxis": y,
            "shapes": [rule["shape"] for rule in rules],
            "annotations": [rule["annotation"] for rule in rules],
        },
    }


def _title(text: str) -> Figure:
    return {"title": {"text": text}}


def _distribution(answer: Answer, curves: Curves, labels: Sequence[str]) -> Figure:
    traces = []
    for k, (label, latencies) in enumerate(zip(labels, curves.latencies_s, strict=True)):
        if latencies:
            shares = [100 * (i + 1) / len(latencies) for i in range(len(latencies))]
            hover = "%{y:.1f} % within %{x:.3g} s"
            traces.append(_line(label, latencies, shares, k, hovertemplate=hover))
    rules = [
        _rule("x", limit, f"p{100 * share:g} {limit:g} s")
        for share, limit in answer.question.demand.slo.quantiles
    ]
    x = _title("latency, s") | {"type": "log"}
    return _figure(traces, x, _title("requests, %") | {"range": [0, 101]}, rules)


def _load(answer: Answer, best: Option, curves: Curves) -> Figure:
    points = [(share, outcome) for share, outcome in curves.load if outcome.quantiles_s]
    traces = []
    for k, quantile in enumerate(answer.question.demand.quantiles):
        y = [dict(outcome.quantiles_s)[quantile].value for _, outcome in points]
        traces.append(
            _line(
                f"p{100 * quantile:g}", [o.rate_per_s for _, o in points], y, k,
                mode="lines+markers", text=[f"{100 * share:.0f} % of saturation" for share, _ in points],
                hovertemplate="%{x:.3g} requests/s, %{text}: %{y:.3g} s",
            )
        )  # fmt: skip
    assert best.outcome is not None
    rules = [
        _rule("x", best.outcome.saturation_per_s, "saturation"),
        _rule("x", best.outcome.rate_per_s, "asked"),
    ]
    rules += [
        _rule("y", limit, f"p{100 * share:g} {limit:g} s")
        for share, limit in answer.question.demand.slo.quantiles
    ]
    x = _title("requests per second") | {"range": [0, 1.08 * best.outcome.saturation_per_s]}
    return _figure(traces, x, _title("latency, s") | {"type": "log"}, rules)


def _cost(answer: Answer) -> Figure:
    slo, quantiles = answer.question.demand.slo, answer.question.demand.quantiles
    share = max((q for q, _ in slo.quantiles if q in quantiles), default=quantiles[-1])
    priced = any(option.cost_per_month is not None for option in answer.options)
    traces = []
    for k, option in enumerate(answer.options):
        if option.curves is None or (priced and option.box.price_per_hour is None):
            continue
        points = [(nodes, o) for nodes, o in option.curves.ladder if o.quantiles_s]
        price = (option.box.price_per_hour or 0.0) * HOURS_PER_MONTH
        unit = price if priced else option.box.gpus
        traces.append(
            _line(
                option.box.topology.name,
                [dict(o.quantiles_s)[share].value for _, o in points],
                [nodes * unit for nodes, _ in points],
                k,
                mode="lines+markers",
                text=[f"{nodes} nodes" for nodes, _ in points],
                hovertemplate="%{text}: %{x:.3g} s, %{y:,.0f}",
            )
        )
    rules = [_rule("x", limit, f"asked {limit:g} s") for q, limit in slo.quantiles if q == share]
    x = _title(f"p{100 * share:g} latency, s") | {"type": "log"}
    y = _title("USD per month" if priced else "GPUs (no price is known)") | {"rangemode": "tozero"}
    return _figure(traces, x, y, rules)


def _utilisation(curves: Curves) -> Figure:
    x = [t for t, _ in curves.utilisation]
    y = [100 * busy for _, busy in curves.utilisation]
    hover = "%{x:.3g} s: %{y:.0f} %"
    trace = _line(
        "busy GPUs", x, y, 0, hovertemplate=hover, line={"color": PALETTE[0], "shape": "hv"}
    )
    return _figure([trace], _title("time, s"), _title("busy GPUs, %") | {"range": [0, 103]})
