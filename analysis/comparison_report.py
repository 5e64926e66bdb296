"""A comparison as text and as one HTML file with both timelines on one time axis.

Decides what is shown; the numbers are those of ``analysis.comparison``. ``facts`` are the JSON report:
what was run, on what, with which versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.comparison import Both, Comparison, Group
from analysis.page import Chart, axis, bars, figure, render
from analysis.text import plain, seconds
from analysis.timeline import View, lanes, steps_of, timeline, view, windows
from paradiff.graph import ScheduleGraph
from paradiff.trace import Span

LEFT = {"ops", "rank", "furthest apart", "call"}
"""Columns that read better flush left."""
Table = tuple[Sequence[str], list[list[str]]]


def percent(value: float | None, sign: str = "+") -> str:
    """With its sign: of an error too much is ``+``."""
    return "-" if value is None else f"{value:{sign}.1%}"


def _error(times: Both) -> str:
    """Of what is predicted to take no time (work of the host, noise, text) there is none to speak of."""
    return percent(times.error if times.predicted_s else None)


def title(facts: Mapping[str, Any]) -> str:
    size = "{height}x{width}, {steps} steps, batch {batch}, {dtype}".format(**facts["workload"])
    return f"{facts['model']} ({size}): {facts['spec']}, {facts['how']}"


def summary(found: Comparison, facts: Mapping[str, Any]) -> list[str]:
    """The answer in sentences."""
    verdict = "passed" if facts["passed"] else "failed"
    times, repeats = found.latency, len(found.repeats_s)
    many = (
        f"median of {repeats} runs, spread {percent(found.spread, '')}"
        if repeats > 1
        else "one run"
    )
    limit = percent(facts["max_error"], "")
    alone = "One run does not show how far runs lie apart: the verdict is of this one (--repeats)."
    return [
        f"Predicted {seconds(times.predicted_s)}, measured {seconds(times.measured_s)} ({many}):"
        f" {percent(times.error)}, {verdict} at {limit}.",
        f"A single op is missed by {percent(found.median_op_error, '')} in the median. The clocks of the"
        f" ranks agree to {found.clock_residual_s * 1e6:.0f} us.",
        *[alone] * (repeats == 1),
    ]


def failure(found: Comparison, max_error: float) -> str:
    """Why the gate failed, as one message."""
    times = found.latency
    return (
        f"predicted {seconds(times.predicted_s)}, measured {seconds(times.measured_s)}:"
        f" {percent(times.error)}, allowed: {percent(max_error, '')} (--max-error)"
    )


def text(found: Comparison, facts: Mapping[str, Any]) -> str:
    """For a terminal."""
    tables = (kind_table(found), rank_table(found), step_table(found), worst_table(found))
    blocks = ["\n".join(plain(*table, left=LEFT)) for table in tables]
    return "\n\n".join([title(facts), *blocks, "\n".join(summary(found, facts))])


def kind_table(found: Comparison) -> Table:
    """By kind of op, and within transfers by call."""
    header = ("ops", "number", "predicted", "measured", "error", "median of an op")
    rows = []
    for name, group in found.kinds.items():
        rows.append(_group_row(name, group))
        calls = {op.span.call for op in found.ops if op.span.kind == name}
        if len(calls) > 1:
            rows += [_group_row(f"- {call}", found.calls[call]) for call in sorted(calls)]
    return header, rows


def _group_row(name: str, group: Group) -> list[str]:
    times = group.times
    return [
        name, str(group.ops), seconds(times.predicted_s), seconds(times.measured_s),
        _error(times), percent(group.median_error if times.predicted_s else None, ""),
    ]  # fmt: skip


PARTS = {
    "compute_s": "compute",
    "communication_s": "exposed communication",
    "overlapped_s": "overlapped",
    "waiting_s": "waiting",
}


def rank_table(found: Comparison) -> Table:
    """Where each rank's time goes, predicted and measured."""
    rows = [
        [f"{own.rank}, {name}", *(seconds(getattr(each, part)) for part in PARTS)]
        for own, seen in found.ranks
        for name, each in (("predicted", own), ("measured", seen))
    ]
    return ("rank", *PARTS.values()), rows


def step_table(found: Comparison) -> Table:
    header = ("step", "predicted", "measured", "error")
    rows = [
        [str(i), seconds(both.predicted_s), seconds(both.measured_s), percent(both.error)]
        for i, both in enumerate(found.steps)
    ]
    return header, rows


def worst_table(found: Comparison) -> Table:
    header = ("furthest apart", "rank", "call", "bytes", "predicted", "measured", "error")
    rows = [
        [
            op.span.id, str(op.span.rank), op.span.call, f"{op.span.nbytes:,}" * (op.span.nbytes > 0),
            _ms(op.times.predicted_s), _ms(op.times.measured_s), _error(op.times),
        ]
        for op in found.worst()
    ]  # fmt: skip
    return header, rows


def _ms(value_s: float) -> str:
    return f"{value_s * 1e3:.3g} ms"


# ------------------------------------------------------------------------------------------ as a page


def page(graph: ScheduleGraph, found: Comparison, facts: Mapping[str, Any]) -> str:
    """The report as HTML."""
    machine = [*facts["measured"].items()]
    machine += [item for each in facts["machines"] for item in _flat(each)]
    return render(
        "comparison.html.j2",
        _charts(graph, found, facts),
        title=title(facts),
        sentences=summary(found, facts),
        tables=[
            ("By kind of op", kind_table(found)),
            ("By rank", rank_table(found)),
            ("By step", step_table(found)),
            ("Ops that are furthest apart", worst_table(found)),
        ],
        machine="\n".join(f"{name}: {value}" for name, value in machine if value),
    )


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a machine says of itself, a line a fact."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value))
        else:
            yield name, str(value)


def _charts(graph: ScheduleGraph, found: Comparison, facts: Mapping[str, Any]) -> Iterator[Chart]:
    yield Chart(
        "ranks",
        "Where the time of each rank goes",
        "Predicted above measured (median of the repeats).",
        _ranks(found),
        height_rem=9 + 3.2 * len(found.ranks),
    )
    for name, heading, steps in windows(found.predicted, 0):
        shown = view([found.predicted, found.typical], steps)
        runs = _both_within(found, shown)
        rows = sum(len(lanes(spans)) for spans in runs.values())
        yield Chart(
            name,
            f"Timelines: {heading}",
            f"{steps_of(shown.steps).capitalize()} as predicted and below as measured (the run with"
            " the median latency), a row for each rank and stream, both from the begin of these steps"
            f" on.{shown.note}",
            timeline(graph, runs),
            height_rem=9 + 1.4 * rows,
        )


def _both_within(found: Comparison, shown: View) -> dict[str, list[Span]]:
    """What is shown of both runs, each moved so that these steps begin at zero."""
    runs = {}
    for name, trace in (("predicted:", found.predicted), ("measured:", found.typical)):
        begin = min(span.start_s for span in trace.spans if span.step in shown.steps)
        runs[name] = [
            s._replace(start_s=s.start_s - begin, end_s=s.end_s - begin) for s in shown.spans(trace)
        ]
    return runs


def _ranks(found: Comparison) -> dict[str, Any]:
    places = [
        f"rank {own.rank}, {of}" for own, _ in found.ranks for of in ("predicted", "measured")
    ]
    each = [times for pair in found.ranks for times in pair]
    shown = {key: label for key, label in PARTS.items() if key != "overlapped_s"}
    traces = [
        bars(label, places, [getattr(times, key) for times in each], k)
        for k, (key, label) in enumerate(shown.items())
    ]
    drawn = figure(traces, axis("seconds"), {"autorange": "reversed", "type": "category"})
    drawn["layout"] |= {"barmode": "stack"}
    return drawn
