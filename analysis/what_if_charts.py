"""What would change a plan, as charts and sentences. Every number comes from ``analysis.what_if``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from analysis.page import PALETTE, Chart, Figure, axis, bars, figure, line, plain, rule
from analysis.text import count_of, listed
from analysis.what_if import Effect, Outlook, Size, Width
from simulator.planner import UNITS, Candidate, Objective, Plan

AXES: Mapping[Objective, str] = {
    "latency": "latency, s",
    "throughput": "s per request",
    "cost": "GPU s per request",
}
NOTABLE = 0.01
"""Share below which a change is not worth a number."""


def advice(effects: Sequence[Effect], objective: Objective) -> str:
    """Which change would pay, and what the others would do."""
    now, *others = effects
    paying = [e for e in others if e.best < (1 - NOTABLE) * now.best]
    dear = [e for e in others if e.best > (1 + NOTABLE) * now.best]
    same = [e.change for e in others if e not in paying and e not in dear]

    def told(e: Effect) -> str:
        spec = "" if e.best_spec == now.best_spec else f", then with {e.best_spec}"
        return f"{e.change} ({e.best:.3g} {UNITS[objective]} instead of {now.best:.3g}{spec})"

    parts = []
    if paying:
        parts.append(listed([told(e) for e in sorted(paying, key=lambda e: e.best)]))
    else:
        parts.append("none that was simulated")
    if dear:
        parts.append(f"{listed([told(e) for e in dear])} would cost")
    if same:
        parts.append(f"{listed(same)} would change less than {100 * NOTABLE:g} %")
    return f"Which change would pay: {'; '.join(parts)}."


def charts(plan: Plan, seen: Outlook) -> Iterator[Chart]:
    """In the order of the page; none where there is nothing to compare."""
    yield Chart(
        "what_if",
        "What if",
        f"{advice(seen.effects, plan.objective)} Bars: the best of the "
        f"{count_of(seen.looked_at, 'candidate')} that a change is most likely to bring to the front; "
        "diamonds: the first of the table, kept.",
        _effects(seen.effects, plan.objective),
        height_rem=9 + 2.2 * len(seen.effects),
    )
    if len(seen.widths) > 1:
        yield Chart(
            "gpus",
            "Number of GPUs",
            "The best on this box that takes no more GPUs. Dotted: one GPU, scaled perfectly.",
            _widths(seen.widths, plan.objective),
        )
    sizes = [size for size in seen.sizes if size.counts]
    if len(sizes) > 1:
        yield Chart(
            "sizes",
            "Height and width",
            f"{_leaders(sizes)} The same candidates as above, and one GPU; where one ends, it cannot "
            "run or does not fit.",
            _sizes(sizes, plan),
            {"xaxis": _sizes_axis(sizes) | {"tickangle": -90}},
        )


def _effects(effects: Sequence[Effect], objective: Objective) -> Figure:
    names = [plain(e.change) for e in effects]
    unit = UNITS[objective]
    best = bars(
        "best", names, [e.best for e in effects], 0,
        text=[plain(e.best_spec) for e in effects], textposition="none",
        hovertemplate="%{y}: %{x:.3g} " + unit + ", %{text}<extra></extra>",
    )  # fmt: skip
    kept = {
        "type": "scatter", "mode": "markers", "name": plain(f"{effects[0].best_spec}, kept"),
        "y": names, "x": [e.first for e in effects],
        "marker": {"color": PALETTE[1], "symbol": "diamond", "size": 12},
        "hovertemplate": "%{y}: %{x:.3g} " + unit + "<extra></extra>",
    }  # fmt: skip
    y = {"type": "category", "autorange": "reversed"}
    return figure([best, kept], axis(AXES[objective]) | {"rangemode": "tozero"}, y)


def _widths(widths: Sequence[Width], objective: Objective) -> Figure:
    def count(c: Candidate) -> float:
        return c.weight(objective) * (c.latency_s or 0.0)

    traces = []
    for k, (name, chosen) in enumerate(
        (
            ("best", [(w.gpus, w.best) for w in widths]),
            ("best that keeps the picture", [(w.gpus, w.exact) for w in widths]),
        )
    ):
        known = [(gpus, c) for gpus, c in chosen if c is not None]
        traces.append(
            line(
                name, [gpus for gpus, _ in known], [count(c) for _, c in known], k,
                mode="lines+markers", text=[plain(c.spec) for _, c in known],
                hovertemplate="%{x} GPUs: %{y:.3g}, %{text}<extra></extra>",
            )
        )  # fmt: skip
    numbers = [w.gpus for w in widths]
    alone = widths[0].exact
    if alone is not None and objective != "cost":
        perfect = [count(alone) / gpus for gpus in numbers]
        traces.append(line("perfect scaling", numbers, perfect, 2, hovertemplate="%{y:.3g}"))
    x = axis("GPUs") | {"type": "log", "tickvals": numbers, "ticktext": [str(n) for n in numbers]}
    return figure(traces, x, axis(AXES[objective]) | {"type": "log"})


def _leaders(sizes: Sequence[Size]) -> str:
    """The best at each size, sizes with the same best together."""
    best = [
        (min(s.counts, key=lambda spec: s.counts[spec]), f"{s.width}x{s.height}") for s in sizes
    ]
    told = [
        f"{spec} ({listed([size for _, size in group])})"
        for spec, group in groupby(best, key=lambda pair: pair[0])
    ]
    return f"Best: {listed(told)}."


def _sizes(sizes: Sequence[Size], plan: Plan) -> Figure:
    traces = []
    for k, spec in enumerate(dict.fromkeys(spec for size in sizes for spec in size.counts)):
        own = [size for size in sizes if spec in size.counts]
        traces.append(
            line(
                "one GPU" if spec == "serial" else spec,
                [size.height * size.width / 1e6 for size in own],
                [size.counts[spec] for size in own],
                k,
                mode="lines+markers",
                text=[f"{size.width}x{size.height}" for size in own],
                hovertemplate="%{text}: %{y:.3g} " + UNITS[plan.objective],
            )
        )
    asked = plan.workload.height * plan.workload.width / 1e6
    y = axis(AXES[plan.objective]) | {"type": "log"}
    return figure(traces, _sizes_axis(sizes), y, [rule("x", asked, "asked")])


def _sizes_axis(sizes: Sequence[Size]) -> Figure:
    places = [size.height * size.width / 1e6 for size in sizes]
    return axis("width x height, by pixels") | {
        "type": "log",
        "tickvals": places,
        "ticktext": [f"{size.width}x{size.height}" for size in sizes],
        "range": [math.log10(places[0]) - 0.05, math.log10(places[-1]) + 0.05],
    }
