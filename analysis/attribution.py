"""Where the time of a run went: one class for every instant, on the rank that finishes last.

Classes of an instant, the first that applies:

- *compute*: the device works on a compute op;
- *host*: an op is held back by a host that has yet to issue it (before its start, or at its end);
- *communication*: a transfer of this rank is under way and nothing of the above: exposed;
- *bubble*: this rank waits for others.

They partition the denoising loop, so that the four add up to ``denoise_s``. The loop is what lies
between the first start and the last end of an op with a step; before it the request spends
``text_encoder_s`` (text encoders and noise), after it ``vae_s``. Folded traces are read as they are:
what a repeated period contains counts once more for each of its copies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paradiff.trace import TRANSFERS, Span, Trace

CLASSES = ("compute", "host", "communication", "bubble")
"""In order of precedence."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds of the three stages of a request; their sum is its latency."""

    text_encoder_s: float
    denoise_s: float
    vae_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """``compute_s + host_s + communication_s + bubble_s`` of ``rank`` is ``stages.denoise_s``.

    ``exposed_s`` splits ``communication_s`` by call (of several transfers at once, the one that began
    first). ``utilisation`` is each rank's share of the latency in which its device computed.
    """

    rank: int
    stages: Stages
    compute_s: float
    host_s: float
    communication_s: float
    bubble_s: float
    exposed_s: tuple[tuple[str, float], ...]
    utilisation: tuple[tuple[int, float], ...]


def attribute(trace: Trace) -> Breakdown:
    """Break ``trace`` down. Raises ValueError for a trace without a denoising loop."""
    loop = [span for span in trace.spans if span.step is not None]
    if not loop:
        raise ValueError("the trace has no op of a denoising step")
    begin = min(span.start_s for span in loop)
    end = max(span.end_s for span in loop)
    wall = _Wall(trace)
    stages = Stages(
        text_encoder_s=wall.between(0.0, begin),
        denoise_s=wall.between(begin, end),
        vae_s=max(trace.makespan_s - wall.between(0.0, end), 0.0),
    )
    rank = critical_rank(trace)
    compute, host, transfers = _activity(s for s in trace.spans if s.rank == rank)
    host = _minus(host, compute)
    busy = _union([*compute, *host])
    exposed: dict[str, float] = {}
    covered = begin
    for call, (lo, hi) in transfers:
        alone = _minus([(max(lo, covered), min(hi, end))], busy)
        exposed[call] = exposed.get(call, 0.0) + wall.total(alone)
        covered = max(covered, hi)
    compute_s = wall.total(_within(compute, begin, end))
    host_s = wall.total(_within(host, begin, end))
    communication_s = sum(exposed.values())
    return Breakdown(
        rank=rank,
        stages=stages,
        compute_s=compute_s,
        host_s=host_s,
        communication_s=communication_s,
        bubble_s=max(stages.denoise_s - compute_s - host_s - communication_s, 0.0),
        exposed_s=tuple(sorted(exposed.items())),
        utilisation=tuple(_utilisation(trace, wall)),
    )


def critical_rank(trace: Trace) -> int:
    """The rank whose last op ends last; of several, the lowest."""
    last: dict[int, float] = {}
    for span in trace.spans:
        last[span.rank] = max(last.get(span.rank, 0.0), span.end_s)
    return min(last, key=lambda rank: (-last[rank], rank))


class _Wall:
    """Real seconds of intervals on the clock of a folded trace."""

    def __init__(self, trace: Trace) -> None:
        self._repeats = trace.repeats

    def total(self, intervals: Iterable[Interval]) -> float:
        """Their length, once more for each copy of a period they fall into."""
        return sum(self.between(*interval) for interval in intervals)

    def between(self, begin: float, end: float) -> float:
        """Length of ``[begin, end]``, with its part of every repeated period."""
        seconds = end - begin
        for at, period, copies, _ in self._repeats:
            seconds += copies * max(min(end, at) - max(begin, at - period), 0.0)
        return seconds


def _activity(
    spans: Iterable[Span],
) -> tuple[list[Interval], list[Interval], list[tuple[str, Interval]]]:
    """(compute, host) as unions of intervals, and transfers by begin, of the spans of one rank."""
    compute: list[Interval] = []
    host: list[Interval] = []
    transfers: list[tuple[str, Interval]] = []
    for span in spans:
        worked = span.start_s + span.busy_s
        if span.ready_s < span.start_s:
            host.append((span.ready_s, span.start_s))
        if worked < span.end_s:
            host.append((worked, span.end_s))
        if span.kind in TRANSFERS or (span.kind == "host" and span.nbytes):
            transfers.append((span.call, (span.start_s, worked)))
        else:
            compute.append((span.start_s, worked))
    transfers.sort(key=lambda item: item[1][0])
    return _union(compute), _union(host), transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTime:
    """The whole run of one rank: the first three add up to the makespan. ``communication_s`` is what of
    its transfers no compute hides, ``waiting_s`` the rest: for other ranks, or at the end.
    ``overlapped_s`` is what of its transfers compute hides."""

    rank: int
    compute_s: float
    communication_s: float
    waiting_s: float
    overlapped_s: float


def by_rank(trace: Trace) -> Iterable[RankTime]:
    """Where each rank's time went, ascending by rank."""
    wall = _Wall(trace)
    for rank in trace.ranks():
        compute, _, transfers = _activity(s for s in trace.spans if s.rank == rank)
        moving = _union(interval for _, interval in transfers)
        exposed = _minus(moving, compute)
        compute_s, communication_s = wall.total(compute), wall.total(exposed)
        yield RankTime(
            rank=rank,
            compute_s=compute_s,
            communication_s=communication_s,
            waiting_s=max(trace.makespan_s - compute_s - communication_s, 0.0),
            overlapped_s=wall.total(moving) - communication_s,
        )


def _utilisation(trace: Trace, wall: _Wall) -> Iterable[tuple[int, float]]:
    by_rank: Mapping[int, list[Span]] = {rank: [] for rank in trace.ranks()}
    for span in trace.spans:
        by_rank[span.rank].append(span)
    for rank, spans in by_rank.items():
        compute, _, _ = _activity(spans)
        yield rank, wall.total(compute) / trace.makespan_s if trace.makespan_s else 0.0


# ---------------------------------------------------------------------------------------- intervals


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint and ascending."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        elif end > begin:
            merged.append((begin, end))
    return merged


def _minus(intervals: Iterable[Interval], taken: list[Interval]) -> list[Interval]:
    """``intervals`` without ``taken``, which is disjoint and ascending."""
    left: list[Interval] = []
    for begin, end in intervals:
        i = bisect_right(taken, begin, key=lambda other: other[1])
        while i < len(taken) and taken[i][0] < end:
            if taken[i][0] > begin:
                left.append((begin, taken[i][0]))
            begin = taken[i][1]
            i += 1
        if begin < end:
            left.append((begin, end))
    return left


def _within(intervals: Iterable[Interval], begin: float, end: float) -> list[Interval]:
    clipped = [(max(lo, begin), min(hi, end)) for lo, hi in intervals]
    return [(lo, hi) for lo, hi in clipped if lo < hi]
