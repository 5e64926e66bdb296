"""A predicted run against measured ones of the same graph: a join by op id and rank, and what it shows.

Decides how several repeats become one number (the median) and what an error is: predicted over measured,
minus one. How long anything takes was decided elsewhere; what the times mean (exposed, overlapped,
waiting) is ``analysis.attribution``. Knows no clock: a measured trace is on the clock of one rank, and
says how far the others may be off (``clock_residual_s`` of its meta).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from analysis.attribution import RankTime, Stages, attribute, by_rank
from paradiff.trace import Span, Trace, TraceMismatch

SCHEMA = "paradiff.validate-run/1"
NEGLIGIBLE = 1e-4
"""Share of a run: ops that take less, predicted and measured, are in the sums but not in the medians."""
WORST = 12
"""Ops that are listed with both times."""

Times = TypeVar("Times", RankTime, Stages)


@dataclass(frozen=True, slots=True)
class Both:
    """Seconds of the same thing, predicted and measured (median of the repeats)."""

    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus one; None where nothing was measured."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s > 0 else None


@dataclass(frozen=True, slots=True)
class OpTime:
    """One op on one rank: how long it worked (a transfer: from when its last rank had come to it)."""

    span: Span
    times: Both

    @property
    def miss_s(self) -> float:
        """How far apart the two times are."""
        return abs(self.times.predicted_s - self.times.measured_s)


@dataclass(frozen=True, slots=True)
class Group:
    """Ops of one kind or call: how many on how many ranks, their sum, their median error."""

    ops: int
    times: Both
    median_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prediction against the repeats of one run.

    ``spread``: distance of the quartiles of the repeats' latencies over their median. ``typical``: the
    repeat whose latency is the (lower) median. ``steps[i]`` is from the end of step i - 1 to the end of
    step i, over all ranks, so that they add up to the denoising loop.
    """

    latency: Both
    repeats_s: tuple[float, ...]
    spread: float
    stages: tuple[Stages, Stages]
    steps: tuple[Both, ...]
    kinds: Mapping[str, Group]
    calls: Mapping[str, Group]
    ranks: tuple[tuple[RankTime, RankTime], ...]
    ops: tuple[OpTime, ...]
    clock_residual_s: float
    predicted: Trace
    typical: Trace

    @property
    def median_op_error(self) -> float | None:
        """Median size of the errors of single ops."""
        return _median_error(self.ops, self.latency)

    def worst(self, count: int = WORST) -> list[OpTime]:
        """The ops that are furthest apart, in seconds."""
        return sorted(self.ops, key=lambda op: -op.miss_s)[:count]

    def within(self, max_error: float) -> bool:
        """The gate: is the latency's error at most ``max_error``, either way?"""
        return self.latency.error is not None and abs(self.latency.error) <= max_error


def compare(predicted: Trace, measured: Sequence[Trace]) -> Comparison:
    """Join ``predicted`` (folded or not) with the repeats ``measured``.

    Raises ValueError without any repeat, TraceMismatch where the traces are not of the same ops.
    """
    if not measured:
        raise ValueError("no measured run to compare with")
    whole = predicted.expanded()
    joined = _joined(whole, measured)
    latency = Both(predicted.makespan_s, statistics.median(m.makespan_s for m in measured))
    ops = tuple(
        OpTime(span, Both(span.busy_s, statistics.median(s.busy_s for s in seen)))
        for span, seen in joined
    )
    typical = sorted(measured, key=lambda m: m.makespan_s)[(len(measured) - 1) // 2]
    return Comparison(
        latency=latency,
        repeats_s=tuple(m.makespan_s for m in measured),
        spread=_spread([m.makespan_s for m in measured]),
        stages=(
            attribute(predicted).stages,
            _typical(Stages, [attribute(m).stages for m in measured]),
        ),
        steps=_both(_steps(whole), [_steps(m) for m in measured]),
        kinds=_grouped(ops, latency, lambda span: span.kind),
        calls=_grouped(ops, latency, lambda span: span.call),
        ranks=tuple(
            (own, _typical(RankTime, seen))
            for own, *seen in zip(
                by_rank(predicted), *(by_rank(m) for m in measured), strict=True
            )
        ),
        ops=ops,
        clock_residual_s=max(float(dict(m.meta).get("clock_residual_s", 0.0)) for m in measured),
        predicted=whole,
        typical=typical,
    )  # fmt: skip


def _joined(predicted: Trace, measured: Sequence[Trace]) -> list[tuple[Span, list[Span]]]:
    """Each predicted span with the measured ones of the same op and rank. Raises TraceMismatch."""
    runs = [{(span.id, span.rank): span for span in m.spans} for m in measured]
    wanted = {(span.id, span.rank) for span in predicted.spans}
    for number, run in enumerate(runs, 1):
        if apart := sorted(wanted ^ run.keys()):
            name, rank = apart[0]
            where = "predicted, but not measured" if apart[0] in wanted else "was not predicted"
            raise TraceMismatch(
                f"repeat {number}: {name} on rank {rank} {where}"
                f" ({len(apart)} ops differ): not runs of the same graph"
            )
    return [(s, [run[s.id, s.rank] for run in runs]) for s in predicted.spans]


def _spread(latencies_s: Sequence[float]) -> float:
    """Distance of the quartiles over the median; 0 for a single run."""
    if len(latencies_s) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(latencies_s, n=4, method="inclusive")
    return (high - low) / middle


def _typical(kind: type[Times], repeats: Sequence[Times]) -> Times:
    """Field by field, the median of the repeats."""
    names = [field.name for field in fields(kind)]
    return kind(**{n: statistics.median(getattr(each, n) for each in repeats) for n in names})


def _steps(trace: Trace) -> list[float]:
    """Seconds of each denoising step: between the ends of one and the next."""
    ends: dict[int, float] = {}
    for span in trace.spans:
        if span.step is not None:
            ends[span.step] = max(ends.get(span.step, 0.0), span.end_s)
    begin = min(span.start_s for span in trace.spans if span.step is not None)
    latest = accumulate((ends[step] for step in sorted(ends)), max, initial=begin)
    return [after - before for before, after in pairwise(latest)]


def _both(predicted: Sequence[float], measured: Sequence[Sequence[float]]) -> tuple[Both, ...]:
    columns = zip(predicted, *measured, strict=True)
    return tuple(Both(own, statistics.median(seen)) for own, *seen in columns)


def _grouped(ops: Sequence[OpTime], latency: Both, key: Callable[[Span], str]) -> dict[str, Group]:
    groups: dict[str, list[OpTime]] = {}
    for op in ops:
        groups.setdefault(key(op.span), []).append(op)
    return {name: _group(own, latency) for name, own in sorted(groups.items())}


def _group(ops: Sequence[OpTime], latency: Both) -> Group:
    total = Both(sum(o.times.predicted_s for o in ops), sum(o.times.measured_s for o in ops))
    return Group(len(ops), total, _median_error(ops, latency))


def _median_error(ops: Iterable[OpTime], latency: Both) -> float | None:
    least_s = NEGLIGIBLE * latency.measured_s
    errors = [
        abs(op.times.error)
        for op in ops
        if op.times.error is not None and max(op.times.predicted_s, op.times.measured_s) > least_s
    ]
    return statistics.median(errors) if errors else None


# ------------------------------------------------------------------------------------------ as JSON


def to_json(found: Comparison, max_error: float) -> dict[str, Any]:
    """The comparison under its schema, gated at ``max_error``."""
    return {
        "schema": SCHEMA,
        **_times(found.latency),
        "measured_spread": found.spread,
        "max_error": max_error,
        "passed": found.within(max_error),
        "repeats_s": list(found.repeats_s),
        "clock_residual_s": found.clock_residual_s,
        "median_op_error": found.median_op_error,
        "stages": dict(zip(("predicted", "measured"), map(asdict, found.stages), strict=True)),
        "steps": [{"step": i, **_times(both)} for i, both in enumerate(found.steps)],
        "by_kind": {name: _group_json(group) for name, group in found.kinds.items()},
        "by_call": {name: _group_json(group) for name, group in found.calls.items()},
        "ranks": [
            {"rank": own.rank, "predicted": _rank_json(own), "measured": _rank_json(seen)}
            for own, seen in found.ranks
        ],
        "worst_ops": [
            {
                "id": op.span.id,
                "rank": op.span.rank,
                "kind": op.span.kind,
                "call": op.span.call,
                "bytes": op.span.nbytes,
                **_times(op.times),
            }
            for op in found.worst()
        ],
    }


def _times(both: Both) -> dict[str, float | None]:
    return {**asdict(both), "error": both.error}


def _group_json(group: Group) -> dict[str, Any]:
    return {"ops": group.ops, **_times(group.times), "median_error": group.median_error}


def _rank_json(times: RankTime) -> dict[str, float]:
    return {name: value for name, value in asdict(times).items() if name != "rank"}
