"""A plan as one HTML file: what to run, how sure that is, where the time goes, why not the others.

Decides which figures are drawn and how; every number comes from the plan and from the close-up of its
first choice. The frame, and how text and data are kept harmless: ``analysis.page``.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from analysis import sources
from analysis import text as words
from analysis import what_if_charts as what_if
from analysis.close_up import CloseUp
from analysis.page import (
    NEUTRAL,
    PALETTE,
    SYMBOLS,
    Chart,
    Figure,
    axis,
    bars,
    figure,
    plain,
    render,
)
from analysis.timeline import lanes, steps_of, timeline, view, windows
from analysis.topology_picture import path_of, positions
from analysis.what_if import Outlook
from simulator.network import Network
from simulator.planner import Candidate, Plan, Request
from simulator.topology import Link, Topology

PARTS: Mapping[str, str] = {
    "compute_s": "compute",
    "exposed_comm_s": "exposed communication",
    "bubble_s": "waiting for other ranks",
    "host_s": "waiting for launches",
}
BANDS = (
    (0.001, "#8a8a8a", "below 0.1 %"),
    (0.1, "#56B4E9", "0.1 to 10 %"),
    (0.25, "#0072B2", "10 to 25 %"),
    (0.5, "#E69F00", "25 to 50 %"),
    (math.inf, "#D55E00", "50 % and more"),
)
"""Utilisation below which a link has this colour; the lines also grow wider."""
NAMED = 16
"""GPUs up to which every one is named in the picture."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def page(
    request: Request,
    plan: Plan,
    seen: Sequence[CloseUp],
    outlook: Outlook | None,
    arguments: Sequence[str],
) -> str:
    """The report. ``seen``: the first of the plan, and its runner-up where there is one; neither it nor
    an outlook where nothing can run. ``arguments``: of the command that made it."""
    options = arguments[1:] if arguments[:1] == ["plan"] else arguments
    model = request.runs().costs
    sentences, charts, shares = [_nothing(plan)], list[Chart](), dict[str, float]()
    if outlook is not None:
        sentences = words.recommendation(plan).splitlines()
        sentences.append(what_if.advice(outlook.effects, plan.objective))
        charts += _charts(request, plan, seen, outlook)
        shares = sources.shares(model, seen[0], plan.ranked[0].placement or ())
    return render(
        "plan.html.j2",
        charts,
        title=words.title(plan),
        baseline=words.baseline_line(plan),
        sentences=sentences,
        ranked=words.table(plan, len(plan.ranked)),
        left=words.LEFT,
        unable=[(c.spec, *_why_not(c)) for c in plan.rejected],
        bounded=[(c.spec, words.seconds(c.bound_s)) for c in plan.bounded],
        shares=[f"{share:.1%} {basis}" for basis, share in shares.items()],
        kernels=list(sources.kernel_tables(model)),
        constants=list(sources.constants()),
        figures=list(sources.gpu_figures(request.topology)),
        links=list(sources.links(request.topology)),
        tables=[(t.kind, str(t.ranks), t.source) for t in request.topology.collectives],
        model=", ".join(
            f"{key} {value}"
            for key, value in request.profile.source.items()
            if isinstance(value, str)
        ),
        command=shlex.join(["paradiff-plan", *options]),
    )


def _why_not(candidate: Candidate) -> tuple[str, str]:
    """The reason without the nearest that can run, and that."""
    reason, nearest = candidate.reason or "", candidate.nearest or ""
    return reason.removesuffix(f"; nearest: {nearest}"), nearest


def _nothing(plan: Plan) -> str:
    """Of a plan without any candidate that can run: so much, and what would."""
    near = "; ".join(dict.fromkeys(c.nearest for c in plan.rejected if c.nearest))
    found = f" Nearest that can: {near}." if near else ""
    return f"Nothing can run: {plan.model} on {plan.topology}.{found}"


def _charts(
    request: Request, plan: Plan, seen: Sequence[CloseUp], outlook: Outlook
) -> Iterator[Chart]:
    first, best = plan.ranked[0], seen[0]
    ticks = {"yaxis": _ranks_axis(plan.ranked, [str(n + 1) for n in range(len(plan.ranked))])}
    yield Chart(
        "time",
        "Where the time goes",
        "The denoising loop of the rank that finishes last, between the text encoders and the VAE; the "
        "whole bar is the latency, the line its 90 % interval. On a narrow screen bars are numbered as "
        "in the table.",
        _time(plan.ranked),
        ticks,
        6 + 1.6 * len(plan.ranked),
    )
    yield Chart(
        "pareto",
        "Latency against memory",
        "Left and low is better; the mark says how old the values are that are read. What is on the "
        "front of latency, memory and staleness is filled.",
        _front(plan, "memory of the fullest GPU, GB", lambda c: (c.peak_memory_bytes or 0) / 1e9),
    )
    yield Chart(
        "staleness",
        "Latency against staleness",
        "Left and low is better; 0: what is read is of the same step. Filled as above.",
        _front(plan, "staleness, denoising steps", lambda c: c.max_staleness_steps or 0),
    )
    yield from what_if.charts(plan, outlook)
    yield Chart(
        "memory",
        "Memory per GPU",
        f"{first.spec}: every rank at its peak, by part, of {words.gigabytes(plan.gpu_memory_bytes)}.",
        _memory(best, first, plan.gpu_memory_bytes),
        height_rem=9 + 1.6 * len(best.memory),
    )
    for place, candidate, each in zip(("", "second_"), plan.ranked, seen, strict=False):
        yield from _timelines(place, candidate, each)
    used = _utilisation(request.topology, best)
    memory = [
        f"{node.name} {used[f'{node.name}.memory']:.1%}"
        for node in request.topology.nodes
        if used.get(f"{node.name}.memory")
    ]
    yield Chart(
        "topology",
        "Use of the links",
        f"{first.spec}: share of the whole latency in which its transfers keep a link busy, the busier "
        f"direction. {'Host memory: ' * bool(memory)}{', '.join(memory)}",
        _topology(request.topology, used, first.placement or ()),
    )


# ------------------------------------------------------------------------------------------ candidates


def _ranks_axis(ranked: Sequence[Candidate], names: Sequence[str]) -> Figure:
    """One place for each candidate, the best at the top."""
    places = list(range(len(ranked)))
    return {
        "tickvals": places,
        "ticktext": [plain(name) for name in names],
        "range": [len(ranked) - 0.5, -0.5],
    }


def _time(ranked: Sequence[Candidate]) -> Figure:
    places = range(len(ranked))
    named = [plain(c.spec) for c in ranked]
    staged = {
        "text encoders": [c.stages.text_encoder_s if c.stages else 0.0 for c in ranked],
        **{label: [getattr(c, key) or 0.0 for c in ranked] for key, label in PARTS.items()},
        "VAE": [c.stages.vae_s if c.stages else 0.0 for c in ranked],
    }
    order = ("compute", *PARTS.values(), "text encoders", "VAE")
    traces = [
        bars(
            label, places, staged[label], k,
            text=named, textposition="none", hovertemplate="%{text}: " + label + " %{x:.3g} s",
        )
        for k, label in enumerate(dict.fromkeys(order))
    ]  # fmt: skip
    traces.append(
        {
            "type": "scatter", "mode": "markers", "name": "latency, 90 % interval",
            "x": [c.latency_s for c in ranked], "y": list(places), "text": named,
            "marker": {"color": NEUTRAL, "symbol": "line-ns-open", "size": 10},
            "error_x": {
                "type": "data", "symmetric": False, "color": NEUTRAL, "thickness": 1.5,
                "array": [(c.latency_high_s or 0.0) - (c.latency_s or 0.0) for c in ranked],
                "arrayminus": [(c.latency_s or 0.0) - (c.latency_low_s or 0.0) for c in ranked],
            },
            "hovertemplate": "%{text}: %{x:.3g} s",
        }
    )  # fmt: skip
    drawn = figure(traces, axis("seconds"), _ranks_axis(ranked, [c.spec for c in ranked]))
    drawn["layout"] |= {"barmode": "stack"}
    return drawn


def _front(plan: Plan, label: str, value: Callable[[Candidate], float]) -> Figure:
    """Latency against ``value``."""
    traces = []
    for k, output in enumerate(sorted({words.output_of(c) for c in plan.ranked})):
        group = [(n, c) for n, c in enumerate(plan.ranked, 1) if words.output_of(c) == output]
        symbols = [SYMBOLS[k % len(SYMBOLS)] + ("" if c.pareto else "-open") for _, c in group]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": output,
                "x": [c.latency_s for _, c in group],
                "y": [value(c) for _, c in group],
                "text": [plain(f"{n} {c.spec}") for n, c in group],
                "marker": {"color": PALETTE[k % len(PALETTE)], "symbol": symbols, "size": 11},
                "hovertemplate": "%{text}: %{x:.3g} s, %{y:.3g}, " + output + "<extra></extra>",
            }
        )  # fmt: skip
    return figure(traces, axis("latency, s"), axis(label))


def _memory(best: CloseUp, first: Candidate, capacity_bytes: int) -> Figure:
    gpus = first.placement or ()
    ranks = [f"rank {r}, GPU {gpu}" for r, gpu in enumerate(gpus)]
    parts = {name: [m.parts()[name] / 1e9 for m in best.memory] for name in best.memory[0].parts()}
    traces = [
        bars(name.replace("_", " ").replace("vae", "VAE"), ranks, values, k)
        for k, (name, values) in enumerate(parts.items())
        if any(values)
    ]
    x = axis("GB") | {"range": [0, 1.02 * capacity_bytes / 1e9]}
    drawn = figure(traces, x, {"autorange": "reversed", "type": "category"})
    drawn["layout"] |= {"barmode": "stack"}
    return drawn


# ------------------------------------------------------------------------------------------ timeline


def _timelines(place: str, candidate: Candidate, seen: CloseUp) -> Iterator[Chart]:
    """``place``: what their ids begin with."""
    for name, heading, steps in windows(seen.trace, candidate.synchronous_steps or 0):
        shown = view([seen.trace], steps)
        spans, alike = shown.spans(seen.trace), _alike(seen.representative)
        yield Chart(
            place + name,
            f"Timeline{' of the runner-up' * bool(place)}: {heading}",
            f"{candidate.spec}, {steps_of(shown.steps)}, a row for each rank and stream."
            f"{shown.note}{alike}",
            timeline(seen.graph, {"": spans}),
            height_rem=9 + 1.4 * len(lanes(spans)),
        )


def _alike(representative: Sequence[int]) -> str:
    """Which ranks are drawn once, for all that do the same at the same time."""
    drawn = Counter(representative)
    if len(drawn) == len(representative):
        return ""
    told = [f"{words.count_of(count, 'rank')} as rank {rank}" for rank, count in drawn.items()]
    if len(set(drawn.values())) == 1:
        told = [f"each stands for {drawn[representative[0]]} of {len(representative)}"]
    return f" Ranks that do the same at the same time are drawn once: {', '.join(told)}."


# ------------------------------------------------------------------------------------------ topology


def _utilisation(box: Topology, best: CloseUp) -> dict[str, float]:
    """Resource of the network -> share of the latency in which the transfers keep it busy."""
    capacity = {r.name: r.capacity_bytes_per_s for r in Network(box).resources}
    seconds = {name: nbytes / capacity[name] for name, nbytes in best.link_bytes.items()}
    return {name: busy / best.trace.makespan_s for name, busy in seconds.items()}


def _topology(box: Topology, used: Mapping[str, float], placement: Sequence[int]) -> Figure:
    place = positions(box)
    traces = []
    for below, links in _banded(box, used):
        k = next(i for i, band in enumerate(BANDS) if band[0] == below)
        lines: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
        for link in links:
            xs, ys = path_of(link, place)
            lines["x"] += [*xs, None]
            lines["y"] += [*ys, None]
            lines["text"] += [_link_note(link, used)] * len(xs) + [""]
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": BANDS[k][2], **lines,
                "line": {"color": BANDS[k][1], "width": 1.5 + 1.5 * k},
                "hovertemplate": "%{text}<extra></extra>",
            }
        )  # fmt: skip
    traces += [_vertices(box, place, placement)]
    hidden = {"visible": False}
    drawn = figure(traces, hidden, hidden)
    drawn["layout"]["legend"] = {"y": 1.05}
    return drawn


def _share(link: Link, used: Mapping[str, float]) -> float:
    """Of the busier direction."""
    names = (f"{link.a}->{link.b}", f"{link.b}->{link.a}", f"{link.a}--{link.b}")
    return max(used.get(name, 0.0) for name in names)


def _banded(box: Topology, used: Mapping[str, float]) -> Iterator[tuple[float, list[Link]]]:
    for lowest, (below, _, _) in zip((0.0, *(b[0] for b in BANDS)), BANDS, strict=False):
        links = [link for link in box.links if lowest <= _share(link, used) < below]
        if links:
            yield below, links


def _link_note(link: Link, used: Mapping[str, float]) -> str:
    share = f"{_share(link, used):.1%}"
    return plain(f"{link.a} to {link.b}: busy {share} ({link.kind}, {link.rate_text})")


def _vertices(box: Topology, place: Mapping[str, Any], placement: Sequence[int]) -> Figure:
    """GPUs as squares with the rank they run, switches as circles."""
    rank = {box.gpus[device]: f"rank {r}" for r, device in enumerate(placement)}
    names = [*box.gpus, *box.switches]
    is_gpu = [name in box.gpus for name in names]
    return {
        "type": "scatter",
        "mode": "markers+text" if len(box.gpus) <= NAMED else "markers",
        "x": [place[name][0] for name in names],
        "y": [place[name][1] for name in names],
        "text": [plain(name) for name in names],
        "hovertext": [plain(f"{name} {rank.get(name, '')}") for name in names],
        "hoverinfo": "text",
        "textposition": ["bottom center" if gpu else "top center" for gpu in is_gpu],
        "showlegend": False,
        "cliponaxis": False,
        "marker": {
            "color": [PALETTE[2] if name in rank else NEUTRAL for name in names],
            "symbol": ["square" if gpu else "circle" for gpu in is_gpu],
            "size": [18 if gpu else 14 for gpu in is_gpu],
        },
    }
