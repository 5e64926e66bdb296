"""What would change a plan: other links, faster GPUs, fewer GPUs, other sizes.

Decides what is varied and which candidates are looked at; every number is a simulation of the same
schedules, each on the placement that it has in the plan. Those that a change might bring to the front
are looked at: the best as they are, the best without their exposed communication, and the best that
keeps the picture.

Numbers are what the plan is ranked by, in ``simulator.planner.UNITS``: a candidate's latency times its
``weight``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from paradiff.strategies import AXES, STRATEGIES, Infeasible, Workload, candidate_specs, parse_spec
from simulator import planner
from simulator.memory import misfit
from simulator.network import Network
from simulator.planner import Candidate, Plan, Request
from simulator.runs import Runs
from simulator.topology import CollectiveTable, Topology

FRONT, UNHINDERED = 3, 2
"""Candidates looked at: of the best of each kind as they are, and of the best without exposed
communication; of two of one kind the first."""
WIDE = 16
"""GPUs up to which candidates are looked at in any case; wider ones only where they are the first."""
SIDES = (0.5, 1.0, 1.5, 2.0)
"""Sizes that are looked at: height and width times these,"""
MULTIPLE = 64
"""rounded to pixels that every model can cut."""


class Change(NamedTuple):
    """Something that one might buy or repair. ``speed``: of all kernels."""

    name: str
    topology: Topology
    speed: float = 1.0


class Effect(NamedTuple):
    """What the plan counts with a change: the first choice as it is, and the best of those looked at."""

    change: str
    first: float
    best: float
    best_spec: str


class Size(NamedTuple):
    """Spec -> what it counts at one height and width; ``serial`` is one GPU."""

    height: int
    width: int
    counts: Mapping[str, float]


class Width(NamedTuple):
    """The best that takes no more than ``gpus``, and the best of those that keeps the picture."""

    gpus: int
    best: Candidate | None
    exact: Candidate | None


class Outlook(NamedTuple):
    """All of it; ``looked_at`` candidates. The first effect is that of no change."""

    looked_at: int
    effects: tuple[Effect, ...]
    widths: tuple[Width, ...]
    sizes: tuple[Size, ...]


def outlook(request: Request, plan: Plan) -> Outlook:
    """What would change ``plan``, the answer to ``request``."""
    return Outlook(
        len(looked_at(plan)), effects(request, plan), by_gpus(request, plan), by_size(request, plan)
    )


def changes(box: Topology) -> Iterator[Change]:
    """What is asked of every box."""
    yield Change("half the bandwidth", scaled(box, 0.5))
    yield Change("twice the bandwidth", scaled(box, 2.0))
    if not box.peer_to_peer:
        yield Change("peer-to-peer", replace(box, peer_to_peer=True))
    yield Change("a network without limits", unlimited(box))
    yield Change("GPUs twice as fast", box, speed=2.0)


def scaled(box: Topology, factor: float) -> Topology:
    """Links, host memory and what measured collectives take beyond their least time, ``factor`` times
    as fast."""

    def faster(table: CollectiveTable) -> CollectiveTable:
        least = min(table.seconds)
        return replace(table, seconds=tuple(least + (s - least) / factor for s in table.seconds))

    return replace(
        box,
        links=tuple(
            replace(k, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s * factor) for k in box.links
        ),
        nodes=tuple(
            replace(n, host_memory_bytes_per_s=n.host_memory_bytes_per_s * factor)
            for n in box.nodes
        ),
        collectives=tuple(map(faster, box.collectives)),
    )


def unlimited(box: Topology) -> Topology:
    """Bytes take no time; what the calls themselves cost stays."""
    return replace(
        box,
        links=tuple(replace(k, bandwidth_bytes_per_s=math.inf, latency_s=0.0) for k in box.links),
        nodes=tuple(replace(n, host_memory_bytes_per_s=math.inf) for n in box.nodes),
        collectives=(),
        peer_to_peer=True,
    )


def looked_at(plan: Plan) -> tuple[Candidate, ...]:
    """The candidates that a change might bring to the front, best first."""
    narrow = [c for c in plan.ranked if (c.n_gpus or 0) <= WIDE]
    weights = {c.spec: c.weight(plan.objective) for c in narrow}

    def unhindered(c: Candidate) -> float:
        return weights[c.spec] * ((c.latency_s or 0.0) - (c.exposed_comm_s or 0.0))

    best_of_kinds = {_kind(c): c for c in reversed(narrow)}
    leading = sorted(best_of_kinds.values(), key=narrow.index)[:FRONT]
    free = sorted(narrow, key=unhindered)[:UNHINDERED]
    chosen: dict[Hashable, Candidate] = {}
    for c in (plan.ranked[0], *leading, *free, *[c for c in narrow if c.exact][:1]):
        chosen.setdefault(_kind(c), c)
    return tuple(c for c in plan.ranked if c in chosen.values())


def _kind(c: Candidate) -> Hashable:
    """The ways in which it divides the work, whatever the degrees, and whether it keeps the picture."""
    return frozenset(parse_spec(c.spec).options.keys() & {*STRATEGIES, *AXES}), c.exact


def effects(request: Request, plan: Plan) -> tuple[Effect, ...]:
    """What each change does, in the order of ``changes``; first of all that of none."""
    runs, chosen = request.runs(), looked_at(plan)
    asked = list(changes(request.topology))
    costs = {change.name: replace(runs.costs, speed=change.speed) for change in asked}
    networks = {change.name: Network(change.topology) for change in asked}
    counts: dict[str, dict[str, float]] = {change.name: {} for change in asked}
    counts = {"as it is": {c.spec: _known(c, plan) for c in chosen}, **counts}
    for c in chosen:
        for change in asked:
            runs.costs = costs[change.name]
            seconds = runs.trace(c.spec, c.placement or (), networks[change.name]).makespan_s
            counts[change.name][c.spec] = c.weight(plan.objective) * seconds
    return tuple(
        Effect(name, of[chosen[0].spec], min(of.values()), min(of, key=lambda spec: of[spec]))
        for name, of in counts.items()
    )


def _known(c: Candidate, plan: Plan) -> float:
    """What a candidate counts in the plan itself."""
    return c.weight(plan.objective) * (c.latency_s or 0.0)


def by_gpus(request: Request, plan: Plan) -> tuple[Width, ...]:
    """Every width that is a power of two, and all of the GPUs.

    What the plan has not simulated because
    it is far behind with all GPUs is, where it could be the best with fewer.
    """
    widths = sorted({*(2**i for i in range(request.gpus.bit_length())), request.gpus})
    known = {c.spec for c in (*plan.ranked, *plan.bounded, *plan.rejected)}
    fewer = [] if request.specs else [w for w in widths[1:] if w < request.gpus]
    missing = [
        spec
        for width in fewer
        for spec in candidate_specs(request.profile, request.workload, width)
        if spec not in known
    ]
    missing += [c.spec for c in plan.bounded if _could_lead(c, plan)]
    found = list(plan.ranked)
    if missing:
        found += planner.plan(
            replace(request, specs=tuple(dict.fromkeys(missing)), top=None)
        ).ranked
    found.sort(key=lambda c: c.weight(plan.objective) * (c.latency_s or 0.0))
    points = []
    for width in widths:
        within = [c for c in found if (c.n_gpus or 0) <= width]
        exact = [c for c in within if c.exact]
        points.append(Width(width, next(iter(within), None), next(iter(exact), None)))
    return tuple(points)


def _could_lead(c: Candidate, plan: Plan) -> bool:
    """Whether nothing simulated that takes no more GPUs, and keeps the picture if ``c`` does, is ahead
    of the least latency of ``c``."""
    return not any(
        (other.n_gpus or 0) <= (c.n_gpus or 0)
        and (other.exact or not c.exact)
        and (other.latency_s or 0.0) <= (c.bound_s or 0.0)
        for other in plan.ranked
    )


def by_size(request: Request, plan: Plan) -> tuple[Size, ...]:
    """What the candidates looked at, and one GPU, count at other heights and widths; those that do not
    fit there, or cannot run, are left out."""
    chosen = looked_at(plan)
    points = []
    for workload in _sizes(request.workload):
        if workload == request.workload:
            counts = {c.spec: _known(c, plan) for c in chosen}
            if plan.baseline.latency_s is not None:
                counts.setdefault("serial", plan.baseline.latency_s)
            points.append(Size(workload.height, workload.width, counts))
            continue
        runs = Runs(request.profile, request.topology, workload, request.runtime)
        if request.measured is not None:
            costs = request.runs().costs
            runs.costs = replace(
                runs.costs, device_scale=costs.device_scale, host_scale=costs.host_scale
            )
        counts = {}
        for c in chosen:
            seconds = _seconds(runs, c.spec, c.placement or ())
            if seconds is not None:
                counts[c.spec] = c.weight(plan.objective) * seconds
        alone = _seconds(runs, "serial", (0,))
        if alone is not None:
            counts.setdefault("serial", alone)
        points.append(Size(workload.height, workload.width, counts))
    return tuple(points)


def _sizes(workload: Workload) -> Iterator[Workload]:
    """Sizes with the shape of the asked one, which is among them as it is."""
    for side in SIDES:
        height, width = (
            max(MULTIPLE, round(side * each / MULTIPLE) * MULTIPLE)
            for each in (workload.height, workload.width)
        )
        yield workload if side == 1 else replace(workload, height=height, width=width)


def _seconds(runs: Runs, spec: str, placement: Sequence[int]) -> float | None:
    """Latency; None where it cannot run or does not fit."""
    try:
        memory = runs.built(spec).memory
    except Infeasible:
        return None
    if misfit(memory, [runs.gpus[device] for device in placement]) is not None:
        return None
    return runs.trace(spec, tuple(placement), runs.network).makespan_s
