"""One box: the cut and the fewest nodes that keep a service level, or why none can.

See ``simulator.capacity`` for the question and for how boxes are compared.

Every cut has a least number of nodes: what its traffic keeps busy. Cuts are taken in that order; one
that cannot do with fewer nodes than the best so far is only asked whether it is faster with as many.
For each cut the number is found by doubling and bisection on the same arrivals (common random
numbers), which is exact where more nodes never make a request wait longer, as with one queue, first
come, first served.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from simulator.cuts import Cut, ServiceTable, dynamic_cuts, static_cuts
from simulator.outcome import (
    MAX_LOAD,
    Budget,
    Check,
    Outcome,
    Slo,
    evaluate,
    meets,
    saturation_rate,
)
from simulator.queueing import Failures, Routing, System
from simulator.traffic import Traffic

Sharing = Literal["any", "static", "dynamic"]
MAX_CUTS = 100
"""Cuts of one box that are looked at, those that need the fewest nodes. What this and the next constants
leave out: ``tools/check_search.py``, docs/capacity.md."""
FINALISTS, COMPARED = 3, 50_000
"""Cuts that are compared with more requests than a pilot's, and with how many at most."""
SLACK = 1.05
"""How far above what is out of reach the level lies that is offered instead: room for a short wait."""
SPARE = 1.1
"""Times the nodes that traffic alone keeps busy: how many it is worth to ask for again, 90 % busy."""
BEYOND = 8
"""Times ``max_nodes``: how far is looked for a number of nodes that would do."""
MEASURED = 0.05
"""Allowance for the error of a saturation rate that is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of any box: traffic, service level and how requests are queued."""

    traffic: Traffic
    slo: Slo
    budget: Budget = field(default_factory=Budget)
    sharing: Sharing = "any"
    routing: Routing = "shared"
    max_batch: int = 1
    window_s: float = 0.0
    failures: Failures | None = None
    quantiles: tuple[float, ...] = (0.5, 0.95, 0.99)
    max_nodes: int = 1000


class Node(NamedTuple):
    """What a cut depends on: GPUs of a node and of each machine in it, bytes of its smallest GPU."""

    gpus: int
    machine: int
    memory_bytes: float


class Found(NamedTuple):
    """A cut, its number of nodes, and what they do."""

    cut: Cut
    nodes: int
    outcome: Outcome


class OutOfReach(NamedTuple):
    """Why no number of nodes will do, and what would."""

    reason: str
    nearest: str | None


class Search:
    """One box in work. ``labels``: names of the classes, for messages."""

    def __init__(
        self, demand: Demand, node: Node, table: ServiceTable, labels: Sequence[str]
    ) -> None:
        self.demand, self.node, self.table, self.labels = demand, node, table, labels

    @cached_property
    def cuts(self) -> list[Cut]:
        """Those that are looked at, the fewest nodes first."""
        return heapq.nsmallest(
            MAX_CUTS,
            self._all_cuts(self.node),
            key=lambda c: (self.least(c), not c.is_static, len(c.pools)),
        )

    def _all_cuts(self, node: Node) -> Iterator[Cut]:
        if not all(self.table):
            return
        if self.demand.sharing != "dynamic":
            yield from static_cuts(self.table, node.gpus, node.memory_bytes)
        if self.demand.sharing != "static":
            limits_s = [self.demand.slo.good_within_s(kind) for kind in range(len(self.table))]
            yield from dynamic_cuts(
                self.table, node.gpus, node.machine, node.memory_bytes, limits_s
            )

    def system(self, cut: Cut, nodes: int, factors: Sequence[float] | None = None) -> System:
        """``nodes`` nodes of a cut, service times of class k scaled by ``factors[k]``."""
        demand = self.demand
        scale = factors or [1.0] * len(self.table)
        return System(
            nodes=nodes,
            stations=tuple(pool.station(self.table, scale) for pool in cut.pools),
            routing=demand.routing,
            max_batch=demand.max_batch,
            window_s=demand.window_s,
            failures=demand.failures,
        )

    def least(self, cut: Cut, factors: Sequence[float] | None = None) -> int:
        """Fewest nodes that are far enough from saturation."""
        demand = self.demand
        one = saturation_rate(self.system(cut, 1, factors), demand.traffic)
        allowance = 0.0 if cut.is_static else MEASURED
        return math.ceil((1 - allowance) * demand.traffic.rate_per_s / (MAX_LOAD * one))

    # ------------------------------------------------------------------------------ no queue at all

    def floors_s(
        self, cut: Cut, factors: Sequence[float] | None = None
    ) -> dict[str, tuple[float, float]]:
        """Promise -> (latency of a request that never waits, limit), both in seconds."""
        demand = self.demand
        scale = factors or [1.0] * len(self.table)
        seconds = {
            kind: scale[kind] * min(self.table[kind][w].batch_s[0] for w in widths)
            for pool in cut.pools
            for kind, widths in pool.widths
        }
        floors = {
            f"p{100 * share:g}": (_quantile(seconds, demand.traffic.shares, share), limit_s)
            for share, limit_s in demand.slo.quantiles
        }
        for kind, deadline_s in enumerate(demand.slo.deadlines):
            if deadline_s is not None:
                floors[f"deadline of {self.labels[kind]}"] = (seconds[kind], deadline_s)
        return floors

    def in_reach(self, cut: Cut, factors: Sequence[float] | None = None) -> bool:
        """Whether a request that never waits is fast enough."""
        return all(floor <= limit for floor, limit in self.floors_s(cut, factors).values())

    # ------------------------------------------------------------------------------ number of nodes

    def best(self) -> Found | OutOfReach:
        """The fewest nodes; of the cuts that need no more, the one with the lowest tail."""
        fewest: tuple[Cut, int] | None = None
        reachable = [cut for cut in self.cuts if self.in_reach(cut)]
        for cut in reachable:
            limit = self.demand.max_nodes if fewest is None else fewest[1] - 1
            nodes = self.fewest(cut, limit, beating=fewest is not None)
            fewest = fewest if nodes is None else (cut, nodes)
        if fewest is None:
            return self._out_of_reach(reachable)
        found = self.fastest(fewest[1])
        if found is None or not found.outcome.met:
            found = Found(*fewest, self._evaluate(*fewest, self.demand.budget))
        return found

    def fewest(
        self, cut: Cut, limit: int, factors: Sequence[float] | None = None, *, beating: bool = False
    ) -> int | None:
        """Fewest nodes of a cut, None where more than ``limit`` are needed. ``beating``: another cut
        needs one more than ``limit``, so that is asked first, a pilot before."""
        low = self.least(cut, factors)
        if low > limit:
            return None
        if beating and not self._evaluate(cut, limit, self.demand.budget.pilot()).kept:
            return None
        high, step = (limit, 0) if beating else (low, 1)
        while not self._meets(cut, high, factors):
            if high == limit:
                return None
            low, high, step = high + 1, min(high + step, limit), 2 * step
        while low < high:
            middle = (low + high) // 2
            if self._meets(cut, middle, factors):
                high = middle
            else:
                low = middle + 1
        return high

    def fewest_at(self, cut: Cut, factors: Sequence[float]) -> int | None:
        """``fewest`` at other service times, with no more requests than cuts are compared with."""
        if not self.in_reach(cut, factors):
            return None
        other = self._asking(budget=self.demand.budget.at_most(COMPARED))
        return other.fewest(cut, self.demand.max_nodes, factors)

    def _meets(self, cut: Cut, nodes: int, factors: Sequence[float] | None) -> bool:
        demand = self.demand
        return meets(self.system(cut, nodes, factors), demand.traffic, demand.slo, demand.budget)

    def fastest(self, nodes: int) -> Found | None:
        """Of the cuts that do with ``nodes``, the one with the lowest tail; where none does, the one
        that comes nearest. None where there is no cut."""
        budget = self.demand.budget
        order = [cut for cut in self.cuts if self.least(cut) <= nodes] or self.cuts[:1]
        if len(order) > 1:
            order = self._ranked(order, nodes, budget.pilot())[:FINALISTS]
            order = self._ranked(order, nodes, budget.at_most(COMPARED))
        nearest = None
        for cut in order:
            found = Found(cut, nodes, self._evaluate(cut, nodes, budget))
            if found.outcome.met:
                return found
            nearest = nearest or found
        return nearest

    def _ranked(self, cuts: Sequence[Cut], nodes: int, budget: Budget) -> list[Cut]:
        """Promises kept first, then a low tail, then a high saturation rate."""

        def key(cut: Cut) -> tuple[bool, float, float]:
            outcome = self._evaluate(cut, nodes, budget)
            return (not outcome.met, outcome.tail_s, -outcome.saturation_per_s)

        return sorted(cuts, key=key)

    def _evaluate(self, cut: Cut, nodes: int, budget: Budget) -> Outcome:
        demand = self.demand
        system = self.system(cut, nodes)
        return evaluate(system, demand.traffic, demand.slo, budget, demand.quantiles)

    # ------------------------------------------------------------------------------ out of reach

    def _out_of_reach(self, reachable: Sequence[Cut]) -> OutOfReach:
        if reachable:
            return self._too_many(reachable)
        if not self.cuts:
            return OutOfReach("no cut of a node holds all models in the memory of its GPUs", None)
        cut = min(self.cuts, key=lambda c: max(f / limit for f, limit in self.floors_s(c).values()))
        short = [
            f"{name} is {floor:.3g} s with no queue at all, {floor - limit:.3g} s above {limit:.3g} s"
            for name, (floor, limit) in self.floors_s(cut).items()
            if floor > limit
        ]
        reason = f"{'; '.join(short)} (fastest cut: {cut.text(self.labels)})"
        return OutOfReach(reason, self._instead(cut))

    def _instead(self, cut: Cut) -> str | None:
        """A level just above what no number of nodes can reach, and the nodes that keep it."""
        slo, floors = self.demand.slo, self.floors_s(cut)

        def raised(name: str, limit: float) -> float:
            return max(limit, _up(SLACK * floors[name][0]))

        quantiles = tuple((q, raised(f"p{100 * q:g}", s)) for q, s in slo.quantiles)
        deadlines = tuple(
            None if s is None else raised(f"deadline of {self.labels[k]}", s)
            for k, s in enumerate(slo.deadlines)
        )
        other = self._asking(slo=replace(slo, quantiles=quantiles, deadlines=deadlines))
        nodes = other.fewest(cut, self.demand.max_nodes)
        return None if nodes is None else other._level(nodes)

    def _too_many(self, reachable: Sequence[Cut]) -> OutOfReach:
        limit = self.demand.max_nodes
        cut = min(reachable, key=self.least)
        least = self.least(cut)
        if least > limit:
            reason = f"the traffic alone keeps {least} nodes busy, --max-nodes {limit}"
            return OutOfReach(reason, f"--max-nodes {math.ceil(SPARE * least)}")
        outcome = self._evaluate(cut, limit, self.demand.budget)
        missed = [check.text(self.labels) for check in outcome.checks if not check.met]
        reason = f"not kept by {limit} node{'s' * (limit != 1)}: {'; '.join(missed)}"
        enough = self.fewest(cut, BEYOND * limit)
        kept = None if enough else self._kept(cut, limit, outcome.checks)
        return OutOfReach(reason, f"--max-nodes {enough}" if enough else kept)

    def _kept(self, cut: Cut, nodes: int, checks: Sequence[Check]) -> str | None:
        """The level that ``nodes`` nodes do keep; None where they are down too often for any."""
        slo = self.demand.slo
        bounds = {check.name: check.bound for check in checks}
        in_time = [bound for name, bound in bounds.items() if name.startswith("deadline ")]
        relaxed = replace(
            slo,
            quantiles=tuple((q, max(s, _up(bounds[f"p{100 * q:g}"]))) for q, s in slo.quantiles),
            attainment=min(
                [slo.attainment, *(math.floor(1000 * share) / 1000 for share in in_time)]
            ),
        )
        other = self._asking(slo=relaxed)
        return other._level(nodes) if other._meets(cut, nodes, None) else None

    def _level(self, nodes: int) -> str:
        """What is promised, and by how many nodes it would be kept."""
        slo = self.demand.slo
        levels = [f"p{100 * q:g}={s:g}s" for q, s in slo.quantiles]
        levels += [
            f"{self.labels[k]} deadline={s:g}s"
            for k, s in enumerate(slo.deadlines)
            if s is not None
        ]
        if any(slo.deadlines):
            levels.append(f"in {100 * slo.attainment:.3g} %")
        return f"{' '.join(levels)} would be kept by {nodes} node{'s' * (nodes != 1)}"

    def _asking(self, **changes: Any) -> Search:
        """The same box asked for something else."""
        other = copy(self)
        other.demand = replace(self.demand, **changes)
        return other


def _up(seconds: float) -> float:
    """Three digits, the last one rounded up."""
    digits = 2 - math.floor(math.log10(seconds))
    return math.ceil(seconds * 10.0**digits) / 10.0**digits


def _quantile(seconds: dict[int, float], shares: Sequence[float], share: float) -> float:
    """Latency that ``share`` of the requests of a mix stay below, if none waits."""
    reached = 0.0
    for kind in sorted(seconds, key=lambda k: seconds[k]):
        reached += shares[kind]
        if reached >= share - 1e-12:
            return seconds[kind]
    return max(seconds.values())
