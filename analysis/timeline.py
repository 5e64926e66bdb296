"""Runs as timelines: which steps of one are shown, and a bar for each op in a row for each stream.

Every time comes from a trace, every word from the graph that it is a run of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from analysis.page import COLOURS, Figure, axis, bars, figure, plain
from paradiff.graph import Instance, OpKind, ScheduleGraph
from paradiff.trace import Span, Trace

KINDS: tuple[OpKind, ...] = ("compute", "collective", "permute", "p2p", "host")
MAX_SPANS = 3000
"""Bars of one timeline, unless a rank has more in a step; a browser takes a second for as many."""
SHOWN_STEPS = 2


def windows(trace: Trace, synchronous: int) -> Iterator[tuple[str, str, range]]:
    """(id, heading, steps) of what is shown of a run: its begin, and its middle once it is steady."""
    steps = 1 + max((s.step for s in trace.spans if s.step is not None), default=0)
    warm = 0 < synchronous < steps
    yield "begin", "warm-up steps" if warm else "first steps", range(min(SHOWN_STEPS, steps))
    first = (synchronous if warm else 0) + (steps - (synchronous if warm else 0)) // 2
    if first >= SHOWN_STEPS:
        yield "steady", "steady steps", range(first, min(first + SHOWN_STEPS, steps))


class View(NamedTuple):
    """Whole steps of a run, of all its ranks or of the first ones."""

    steps: range
    ranks: tuple[int, ...]
    note: str = ""
    """What is left out, as a sentence."""

    def spans(self, trace: Trace) -> list[Span]:
        """What its ranks do while any rank is in its steps."""
        own = [span for span in trace.spans if span.step in self.steps]
        begin, end = min(s.start_s for s in own), max(s.end_s for s in own)
        return [
            s
            for s in trace.spans
            if s.start_s < end and s.end_s > begin and s.end_s > s.start_s and s.rank in self.ranks
        ]


def view(traces: Sequence[Trace], steps: range) -> View:
    """``steps`` of all ranks where that is few enough bars for each of ``traces``, which are runs of one
    graph; else the first of them, of as many ranks as that is few enough for, one at least."""
    ranks = tuple(sorted({span.rank for trace in traces for span in trace.spans}))
    whole = View(steps, ranks)
    if all(len(whole.spans(trace)) <= MAX_SPANS for trace in traces):
        return whole
    one = View(steps[:1], ranks)
    bars_of = [Counter(span.rank for span in one.spans(trace)) for trace in traces]
    most = [
        sum(max(bars[r] for bars in bars_of) for r in ranks[: n + 1]) for n in range(len(ranks))
    ]
    room = max(1, sum(total <= MAX_SPANS for total in most))
    if room == len(ranks):
        return one
    drawn = f"rank {ranks[0]} is" if room == 1 else f"the first {room} are"
    return View(steps[:1], ranks[:room], f" Of {len(ranks)} ranks {drawn} drawn.")


def steps_of(steps: range) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


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
