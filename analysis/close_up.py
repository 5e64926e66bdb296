"""One spec of a plan looked at closely: what its files and its charts are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from analysis.tracks import memory_over_time, simulated
from paradiff.graph import ScheduleGraph
from paradiff.strategies import build, parse_spec
from paradiff.trace import NO_TRACKS, Trace, Tracks
from simulator.collectives import Lowering, link_bytes
from simulator.engine import Flows, simulate
from simulator.memory import RankMemory, at_peak
from simulator.placement import Placement
from simulator.planner import Request
from simulator.symmetry import Asymmetric, Quotient, whole


def fingerprint(request: Request, spec: str) -> str:
    """The fingerprint of the schedule that ``spec`` means: what all ranks compare before a run."""
    return build(parse_spec(spec), request.profile, request.workload).fingerprint()


WIDE = 16
"""Ranks up to which every one is simulated by itself."""


class CloseUp(NamedTuple):
    """One spec, every step simulated and written down, nothing extrapolated. Of more than WIDE ranks,
    those that do the same at the same time are there once: ``representative[r]`` does what r does.

    ``memory``: of every rank. ``link_bytes``: resource of the network -> bytes that cross it; of a
    call with a measured time, as many as keep the resource busy that long. ``tracks``: of a run that
    was watched; of a wide one without the links of GPUs whose ranks are not drawn.
    """

    graph: ScheduleGraph
    trace: Trace
    representative: tuple[int, ...]
    memory: tuple[RankMemory, ...]
    link_bytes: Mapping[str, float]
    tracks: Tracks


def close_up(
    request: Request, spec: str, placement: Placement, *, watched: bool = False
) -> CloseUp:
    """What there is to see of ``spec`` on ``placement``. Raises Infeasible."""
    runs, parsed = request.runs(), parse_spec(spec)
    network, flows = runs.network, list[Flows]() if watched else None

    def run(schedule: Quotient) -> Trace:
        return simulate(
            schedule, network, runs.costs, placement=placement, periodic=False, flows=flows
        )

    wide = parsed.n_gpus > WIDE
    schedule = runs.built(spec).schedule if wide else whole(runs.graph(parsed))
    try:
        trace = run(schedule)
    except Asymmetric:
        schedule = whole(runs.graph(parsed))
        trace = run(schedule)
    phases, tracks = runs.phases(schedule), NO_TRACKS
    if flows is not None:
        dtype, drawn = request.workload.dtype, {placement[rank] for rank in trace.ranks()}
        memory = memory_over_time(
            schedule.graph, trace, request.profile, dtype, phases, captured=runs.captured
        )
        tracks = simulated(flows, network, schedule, memory, drawn if wide else None)
    return CloseUp(
        schedule.graph,
        trace,
        schedule.representative,
        at_peak(phases),
        link_bytes(schedule.transfers, Lowering(network, placement)),
        tracks,
    )
