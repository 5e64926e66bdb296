"""A capacity answer as one HTML file. Decides which curves are drawn and how; every number comes from
the answer. The frame, and how text and data are kept harmless: ``analysis.page``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from analysis import capacity as words
from analysis.page import PALETTE, Chart, Figure, axis, figure, line, render, rule
from analysis.text import count_of
from simulator.capacity import HOURS_PER_MONTH, Answer, Curves, Option


def page(answer: Answer, arguments: Sequence[str]) -> str:
    """The report. ``arguments``: of the command that made it."""
    best = answer.options[0]
    return render(
        "capacity.html.j2",
        _charts(answer, best),
        title=words.title(answer),
        sentences=list(words.recommendation(answer)),
        block="\n".join(words.block(answer, best)),
        header=words.HEADER,
        rows=words.rows(answer),
        unable=list(words.unable(answer)),
        command=shlex.join(["paradiff", *arguments]),
        energy=best.tdp_source,
        idle=words.IDLE_POWER,
    )


def _charts(answer: Answer, best: Option) -> Iterator[Chart]:
    if best.curves is None:
        return
    curves, labels = best.curves, answer.question.labels
    if curves.latencies_s:
        yield Chart(
            "distribution",
            "Latency distribution",
            "Share of the requests of each class that are done within a time. Steps at the service time "
            "are requests that did not wait.",
            _distribution(answer, curves, labels),
        )
    yield Chart(
        "load",
        "Latency against load",
        f"{best.box.topology.name}, {count_of(best.nodes or 0, 'node')}. Right of the saturation rate "
        "there is no steady state, so there is no latency to draw.",
        _load(answer, best, curves),
    )
    cost = _cost(answer)
    if any(trace["x"] for trace in cost["data"]):
        yield Chart(
            "cost",
            "Cost against latency",
            "Each mark is a number of nodes, cut as recommended for its box; left and low is better.",
            cost,
        )
    if curves.utilisation:
        yield Chart(
            "utilisation",
            "Busy GPUs over time",
            "One replication, from the first arrival to the last; each interval is a mean.",
            _utilisation(curves),
        )


def _distribution(answer: Answer, curves: Curves, labels: Sequence[str]) -> Figure:
    traces = []
    for k, (label, latencies) in enumerate(zip(labels, curves.latencies_s, strict=True)):
        if latencies:
            shares = [100 * (i + 1) / len(latencies) for i in range(len(latencies))]
            hover = "%{y:.1f} % within %{x:.3g} s"
            traces.append(line(label, latencies, shares, k, hovertemplate=hover))
    rules = [
        rule("x", limit, f"p{100 * share:g} {limit:g} s")
        for share, limit in answer.question.demand.slo.quantiles
    ]
    x = axis("latency, s") | {"type": "log"}
    return figure(traces, x, axis("requests, %") | {"range": [0, 101]}, rules)


def _load(answer: Answer, best: Option, curves: Curves) -> Figure:
    points = [(share, outcome) for share, outcome in curves.load if outcome.quantiles_s]
    traces = []
    for k, quantile in enumerate(answer.question.demand.quantiles):
        y = [dict(outcome.quantiles_s)[quantile].value for _, outcome in points]
        traces.append(
            line(
                f"p{100 * quantile:g}", [o.rate_per_s for _, o in points], y, k,
                mode="lines+markers", text=[f"{100 * share:.0f} % of saturation" for share, _ in points],
                hovertemplate="%{x:.3g} requests/s, %{text}: %{y:.3g} s",
            )
        )  # fmt: skip
    assert best.outcome is not None
    rules = [
        rule("x", best.outcome.saturation_per_s, "saturation"),
        rule("x", best.outcome.rate_per_s, "asked"),
    ]
    rules += [
        rule("y", limit, f"p{100 * share:g} {limit:g} s")
        for share, limit in answer.question.demand.slo.quantiles
    ]
    x = axis("requests per second") | {"range": [0, 1.08 * best.outcome.saturation_per_s]}
    return figure(traces, x, axis("latency, s") | {"type": "log"}, rules)


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
            line(
                option.box.topology.name,
                [dict(o.quantiles_s)[share].value for _, o in points],
                [nodes * unit for nodes, _ in points],
                k,
                mode="lines+markers",
                text=[count_of(nodes, "node") for nodes, _ in points],
                hovertemplate="%{text}: %{x:.3g} s, %{y:,.0f}",
            )
        )
    rules = [rule("x", limit, f"asked {limit:g} s") for q, limit in slo.quantiles if q == share]
    x = axis(f"p{100 * share:g} latency, s") | {"type": "log"}
    y = axis("USD per month" if priced else "GPUs (no price is known)") | {"rangemode": "tozero"}
    return figure(traces, x, y, rules)


def _utilisation(curves: Curves) -> Figure:
    x = [t for t, _ in curves.utilisation]
    y = [100 * busy for _, busy in curves.utilisation]
    hover = "%{x:.3g} s: %{y:.0f} %"
    trace = line(
        "busy GPUs", x, y, 0, hovertemplate=hover, line={"color": PALETTE[0], "shape": "hv"}
    )
    return figure([trace], axis("time, s"), axis("busy GPUs, %") | {"range": [0, 103]})
