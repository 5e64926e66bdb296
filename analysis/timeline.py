"""Runs as timelines: which steps of one are shown, and a bar for each op in a row for each stream.

Every time comes from a trace, every word from the graph that it is a run of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from analysis.page import COLOURS, Figure, axis, bars, figure, plain
from paradiff.graph import Instance, OpKind, ScheduleGraph
from paradiff.trace import Span, Trace

KINDS: tuple[OpKind, ...] = ("compute", "collective", "permute", "p2p", "host")
MAX_SPANS = 3000
"""Bars of one timeline; a browser takes a second for as many."""
SHOWN_STEPS = 2


def windows(trace: Trace, synchronous: int) -> Iterator[tuple[str, str, range]]:
    """(id, heading, steps) of what is shown of a run: its begin, and its middle once it is steady."""
    steps = 1 + max((s.step for s in trace.spans if s.step is not None), default=0)
    warm = 0 < synchronous < steps
    yield "begin", "warm-up steps" if warm else "first steps", range(min(SHOWN_STEPS, steps))
    first = (synchronous if warm else 0) + (steps - (synchronous if warm else 0)) // 2
    if first >= SHOWN_STEPS:
        yield "steady", "steady steps", range(first, min(first + SHOWN_STEPS, steps))


def within(trace: Trace, steps: range) -> tuple[list[Span], bool]:
    """The spans that overlap ``steps``, and whether that is all of them."""
    own = [span for span in trace.spans if span.step in steps]
    begin, end = min(s.start_s for s in own), max(s.end_s for s in own)
    found = [s for s in trace.spans if s.start_s < end and s.end_s > begin and s.end_s > s.start_s]
    return found[:MAX_SPANS], len(found) <= MAX_SPANS


def lanes(spans: Iterable[Span]) -> list[tuple[int, str]]:
    lanes = {(span.rank, span.stream) for span in spans}
    return sorted(lanes, key=lambda lane: (lane[0], lane[1] != "compute", lane[1]))


def timeline(graph: ScheduleGraph, runs: Mapping[str, Sequence[Span]]) -> Figure:
    """Spans of runs of ``graph`` on one time axis, run below run, a row for each rank and stream.

    ``runs``: what its rows begin with (nothing for a single run) -> spans, by start.
    """
    shown = {span.id for spans in runs.values() for span in spans}
    instances = {each.id: each for each in graph.instances() if each.id in shown}
    traces = []
    for k, kind in enumerate(KINDS):
        group = [(run, span) for run, spans in runs.items() for span in spans if span.kind == kind]
        if group:
            drawn = bars(
                kind, [_row(run, s.rank, s.stream) for run, s in group],
                [1e3 * (s.end_s - s.start_s) for _, s in group], k,
                base=[1e3 * s.start_s for _, s in group],
                text=[_about(s, instances[s.id]) for _, s in group],
                textposition="none", hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
            drawn["marker"] = {"color": COLOURS[k], "line": {"width": 0}}
            traces.append(drawn)
    rows = [_row(run, *lane) for run, spans in runs.items() for lane in lanes(spans)]
    y = {"type": "category", "categoryorder": "array", "categoryarray": rows[::-1]}
    begin = min(s.start_s for spans in runs.values() for s in spans)
    end = max(s.end_s for spans in runs.values() for s in spans)
    x = axis("ms of the request") | {"range": [1e3 * begin, 1e3 * end]}
    whole = figure(traces, x, y)
    whole["layout"] |= {"barmode": "overlay", "bargap": 0.15}
    return whole


def _row(run: str, rank: int, stream: str) -> str:
    return plain(f"{run} rank {rank} {stream}".strip())


def _about(span: Span, instance: Instance) -> str:
    """Op, duration, bytes, and the versions that it reads of what its rank holds."""
    reads = [ref.show(instance.base) for ref in instance.op.reads]
    reads = [name for name in reads if f"@r{span.rank}" in name] or reads
    more = [f"and {len(reads) - 4} more"] * (len(reads) > 4)
    lines = [
        f"{span.id} ({span.call})",
        f"{1e3 * (span.end_s - span.start_s):.4g} ms from {1e3 * span.start_s:.6g} ms",
        *([f"{span.nbytes:,} bytes"] if span.nbytes else []),
        *(f"reads {name}" for name in reads[:4]),
        *more,
    ]
    return "<br>".join(map(plain, lines))
