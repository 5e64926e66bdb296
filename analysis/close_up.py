"""One spec of a plan looked at closely: what its files and its charts are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from paradiff.graph import ScheduleGraph
from paradiff.strategies import build, parse_spec
from paradiff.trace import Trace
from simulator.collectives import Lowering, link_bytes
from simulator.engine import simulate
from simulator.memory import RankMemory
from simulator.placement import Placement
from simulator.planner import Request


def fingerprint(request: Request, spec: str) -> str:
    """The fingerprint of the schedule that ``spec`` means: what all ranks compare before a run."""
    return build(parse_spec(spec), request.profile, request.workload).fingerprint()


class CloseUp(NamedTuple):
    """One spec, every rank by itself and every step written down, nothing extrapolated.

    ``memory``: of every rank. ``link_bytes``: resource of the network -> bytes that cross it; of a
    call with a measured time, as many as keep the resource busy that long.
    """

    graph: ScheduleGraph
    trace: Trace
    memory: tuple[RankMemory, ...]
    link_bytes: Mapping[str, float]


def close_up(request: Request, spec: str, placement: Placement) -> CloseUp:
    """What there is to see of ``spec`` on ``placement``. Raises Infeasible."""
    runs = request.runs()
    graph = runs.graph(parse_spec(spec))
    trace = simulate(graph, runs.network, runs.costs, placement=placement, periodic=False)
    crossing = link_bytes(graph, Lowering(runs.network, placement))
    return CloseUp(graph, trace, runs.built(spec).memory, crossing)
