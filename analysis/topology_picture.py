"""A box as one HTML page that needs nothing else: GPUs in a row, what they hang on above, NVLink below.

Decides where things stand and what is written on them. Names and sources come from files, so they are
escaped; a link's colour says what its rate rests on.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import networkx as nx
import plotly.graph_objects as go

from simulator.topology import Link, Topology

COLOURS = {
    "measured": "#1b7f4d",
    "nominal": "#c26a00",
    "spec": "#c26a00",
    "transferred": "#c26a00",
    "imported": "#c26a00",
    "assumed": "#8a8a8a",
}
"""By the first word of a link's source; links that say nothing count as assumed."""
MANY = 16
"""GPUs up to which every link is labelled; beyond, hovering tells."""
LINK_HEIGHT = 0.35
"""How far NVLinks between neighbours sag below the row of GPUs."""

Position = tuple[float, float]


def page(box: Topology) -> str:
    """The whole page, about 5 MB with plotly in it."""
    figure = picture(box)
    title = html.escape(box.name)
    text = figure.to_html(
        full_html=True, include_plotlyjs=True, div_id="box", default_height="95vh"
    )
    return str(text).replace("<head>", f"<head><title>{title}</title>", 1)


def positions(box: Topology) -> dict[str, Position]:
    """Where each vertex stands. GPUs in device order at height 0; a switch at the height of its
    distance from the nearest GPU over links that are not NVLink, in the middle of what is below it;
    switches that only NVLink reaches below the row."""
    graph = nx.Graph([(k.a, k.b) for k in box.links if not k.is_nvlink])
    graph.add_nodes_from((*box.gpus, *box.switches))
    place: dict[str, Position] = {gpu: (float(i), 0.0) for i, gpu in enumerate(box.gpus)}
    height: dict[str, int] = nx.multi_source_dijkstra_path_length(graph, set(box.gpus))
    for switch in sorted(box.switches, key=lambda s: (height.get(s, math.inf), s)):
        level = height.get(switch)
        near = _below(box, switch, height)
        xs = [place[name][0] for name in near if name in place] or [len(box.gpus) / 2]
        place[switch] = (sum(xs) / len(xs), -1.0 if level is None else float(level))
    return _spread(place, box.switches)


def _below(box: Topology, switch: str, height: dict[str, int]) -> list[str]:
    """Neighbours nearer to a GPU; all of them for a switch that NVLink alone reaches."""
    ends = [k.b if k.a == switch else k.a for k in box.links if switch in (k.a, k.b)]
    level = height.get(switch, math.inf)
    return [end for end in ends if height.get(end, math.inf) < level] or ends


def _spread(place: dict[str, Position], switches: Sequence[str]) -> dict[str, Position]:
    """Switches of one height at least 0.8 apart, in their order."""
    rows: dict[float, list[str]] = {}
    for name in switches:
        rows.setdefault(place[name][1], []).append(name)
    for y, names in rows.items():
        names.sort(key=lambda name: (place[name][0], name))
        free = -math.inf
        for name in names:
            x = max(place[name][0], free)
            place[name], free = (x, y), x + 0.8
    return place


def picture(box: Topology) -> go.Figure:
    """The figure: a line a link, a marker a vertex, a label with rate and kind where there is room."""
    place = positions(box)
    figure = go.Figure()
    for link in box.links:
        figure.add_trace(_line(link, place))
    figure.add_trace(_markers(box, place))
    if len(box.gpus) <= MANY:
        for link in box.links:
            figure.add_annotation(**_label(link, place))
    for word, colour in (
        ("measured", "measured"),
        ("nominal", "nominal or transferred"),
        ("assumed", "assumed"),
    ):
        line = {"color": COLOURS[word], "width": 3}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=colour))
    peers = "" if box.peer_to_peer else ", no peer-to-peer (transfers cross host memory)"
    memory = ", ".join(
        f"{html.escape(n.name)}: host memory {n.host_memory_bytes_per_s / 1e9:.4g} GB/s"
        for n in box.nodes[:2]
        if n.host_memory_bytes_per_s < math.inf
    )
    figure.update_layout(
        title={
            "text": f"{html.escape(box.name)}: {len(box.gpus)} GPUs{peers}<br><sub>{memory}</sub>"
        },
        template="plotly_white",
        xaxis={"visible": False},
        yaxis={"visible": False},
        hovermode="closest",
        margin={"l": 20, "r": 20, "t": 70, "b": 20},
    )
    return figure


def path_of(link: Link, place: dict[str, Position]) -> tuple[list[float], list[float]]:
    """A straight line; between two GPUs, which stand in one row, an arc below it."""
    (x0, y0), (x1, y1) = place[link.a], place[link.b]
    if y0 == y1 and link.is_nvlink:
        depth = LINK_HEIGHT * math.sqrt(abs(x1 - x0))
        share = [i / 16 for i in range(17)]
        return [x0 + (x1 - x0) * s for s in share], [y0 - 4 * depth * s * (1 - s) for s in share]
    return [x0, (x0 + x1) / 2, x1], [y0, (y0 + y1) / 2, y1]


def _colour(link: Link) -> str:
    return COLOURS.get(link.source.partition(":")[0], COLOURS["assumed"])


def _words(link: Link) -> str:
    half = ", half duplex" if link.duplex == "half" else ""
    return f"{html.escape(link.kind)}, {link.rate_text}{half}"


def _line(link: Link, place: dict[str, Position]) -> go.Scatter:
    xs, ys = path_of(link, place)
    source = html.escape(" ".join(link.source.split())) or "no source"
    lines = [source[i : i + 90] for i in range(0, len(source), 90)]
    hover = (
        f"<b>{html.escape(link.a)} to {html.escape(link.b)}</b><br>{_words(link)}, "
        f"{link.latency_s * 1e6:.3g} us<br>" + "<br>".join(lines)
    )
    width = (
        1 + max(0.0, math.log2(link.bandwidth_bytes_per_s / 8e9))
        if link.bandwidth_bytes_per_s < math.inf
        else 8
    )
    return go.Scatter(
        x=xs, y=ys, mode="lines", line={"color": _colour(link), "width": width},
        hovertext=hover, hoverinfo="text", showlegend=False,
    )  # fmt: skip


def _markers(box: Topology, place: dict[str, Position]) -> go.Scatter:
    profile = dict(zip(box.gpus, box.profiles, strict=True))
    names = [*box.gpus, *box.switches]
    gpu = [name in profile for name in names]
    return go.Scatter(
        x=[place[name][0] for name in names],
        y=[place[name][1] for name in names],
        mode="markers+text" if len(box.gpus) <= MANY else "markers",
        marker={
            "symbol": ["square" if is_gpu else "circle" for is_gpu in gpu],
            "size": [34 if is_gpu else 26 for is_gpu in gpu],
            "color": ["#dbe9ff" if is_gpu else "#f2f2f2" for is_gpu in gpu],
            "line": {"color": "#333", "width": 1},
            "opacity": 1,
        },
        text=[html.escape(name) for name in names],
        hovertext=[html.escape(f"{name} {profile.get(name, '')}".strip()) for name in names],
        hoverinfo="text",
        textfont={"size": 11},
        textposition=["middle center" if is_gpu else "top center" for is_gpu in gpu],
        showlegend=False,
    )


def _label(link: Link, place: dict[str, Position]) -> dict[str, object]:
    """Rate and kind of a link, at its middle; shifted for cables that fan out of one switch."""
    xs, ys = path_of(link, place)
    middle = len(xs) // 2
    return {
        "x": xs[middle],
        "y": ys[middle],
        "text": f"{link.rate_text}<br>{html.escape(link.kind)}",
        "showarrow": False,
        "font": {"size": 9, "color": _colour(link)},
        "bgcolor": "rgba(255,255,255,0.85)",
    }
