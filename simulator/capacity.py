"""What to buy: for every box the fewest nodes that keep a service level, what they cost, and the
cheapest box.

A *node* is one instance of a topology, as one buys it. Service times come from ``simulator.service``
(the planner), the number of nodes from ``simulator.search``, waiting from ``simulator.outcome``. This
file puts them together and turns nodes into money and energy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from paradiff.profiles import Profile
from paradiff.strategies import Workload
from simulator.costs import Runtime
from simulator.cuts import Cut, ServiceTable
from simulator.gpu import Gpu, load_gpu
from simulator.outcome import Outcome, Run, evaluate, replication, settling
from simulator.parallel import results
from simulator.planner import Goal
from simulator.queueing import Floats
from simulator.search import Demand, Found, Node, OutOfReach, Search
from simulator.service import Job, Services, services
from simulator.topology import Topology
from simulator.traffic import RequestClass

HOURS_PER_MONTH = 730.0
"""A twelfth of 365 days."""
LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Shares of the saturation rate at which the load-latency curve is computed."""
LADDER = 12
"""Numbers of nodes on the curve of cost against latency."""
BINS = 120
"""Intervals of the curve of utilisation over time."""
SAMPLE = 400
"""Latencies that are kept of a class, to draw their distribution."""
PARTS = ("nodes_low", "nodes_high", "load", "ladder", "sample")
"""What is told of a number of nodes beside its outcome, each worked out by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A topology, how many GPUs of it are used, and what one instance costs: USD per hour and where
    that number is from; None where nobody says."""

    topology: Topology
    gpus: int
    price_per_hour: float | None
    price_source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything an answer depends on; class k has ``profiles[k]`` and ``workloads[k]``.

    ``nodes``: look at that many instead of searching.
    """

    boxes: tuple[Box, ...]
    classes: tuple[RequestClass, ...]
    profiles: tuple[Profile, ...]
    workloads: tuple[Workload, ...]
    demand: Demand
    nodes: int | None = None
    max_width: int = 8
    runtime: Runtime = "eager"
    specs: tuple[str, ...] = ()
    goal: Goal = field(default_factory=Goal)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(entry.label for entry in self.classes)

    @property
    def images_per_request(self) -> float:
        """Images or clips of a request, on average over the mix."""
        shares = self.demand.traffic.shares
        return sum(p * w.batch for p, w in zip(shares, self.workloads, strict=True))


class Curves(NamedTuple):
    """What is drawn of an option."""

    load: tuple[tuple[float, Outcome], ...]
    """(share of the saturation rate, outcome)."""
    ladder: tuple[tuple[int, Outcome], ...]
    """(nodes, outcome)."""
    utilisation: tuple[tuple[float, float], ...]
    """(seconds, busy share of the GPUs) of one replication."""
    latencies_s: tuple[tuple[float, ...], ...]
    """Of each class: latencies of one replication, at most SAMPLE of them, evenly chosen from the
    sorted ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One box. Without ``cut`` it cannot do what is asked: ``reason``, and ``nearest`` that can."""

    box: Box
    cut: Cut | None = None
    nodes: int | None = None
    nodes_low: int | None = None
    nodes_high: int | None = None
    """Nodes that the same cut needs at both ends of the planner's intervals of the service times (all
    at once); None where more than the allowed number."""
    outcome: Outcome | None = None
    table: ServiceTable = ()
    curves: Curves | None = None
    tdp_w: float = 0.0
    """Of one GPU, on average over the box."""
    tdp_source: str = ""
    reason: str | None = None
    nearest: str | None = None

    @property
    def met(self) -> bool:
        """Whether it keeps the service level."""
        return self.outcome is not None and self.outcome.met

    @property
    def cost_per_hour(self) -> float | None:
        """USD, of all nodes."""
        if self.box.price_per_hour is None or self.nodes is None:
            return None
        return self.box.price_per_hour * self.nodes

    @property
    def cost_per_month(self) -> float | None:
        """USD, of all nodes, all the time."""
        return None if self.cost_per_hour is None else self.cost_per_hour * HOURS_PER_MONTH

    def cost_per_1000_images(self, images_per_request: float) -> float | None:
        """USD, at the arrival rate; None where it is saturated."""
        if self.cost_per_hour is None or self.outcome is None or self.outcome.saturated:
            return None
        return 1000 * self.cost_per_hour / 3600 / (self.outcome.rate_per_s * images_per_request)

    def energy_wh_per_image(self, images_per_request: float) -> float | None:
        """Of busy GPUs at their TDP; what idle ones and hosts draw is not in it."""
        if self.outcome is None or self.outcome.busy_gpu_s_per_request is None:
            return None
        return self.tdp_w * self.outcome.busy_gpu_s_per_request / 3600 / images_per_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """``options`` that do what is asked, cheapest first; then the others."""

    question: Question
    options: tuple[Option, ...]

    @property
    def best(self) -> Option | None:
        """The cheapest that keeps the service level."""
        first = self.options[0]
        return first if first.met else None


def answer(
    question: Question, processes: int = 1, progress: Callable[[int, int], None] | None = None
) -> Answer:
    """Compare the boxes; the same answer on any number of ``processes``. ``progress`` gets (done,
    total): of service times, searches, and what is told of the number that was found."""
    number, kinds = len(question.boxes), len(question.classes)
    jobs = [_job(question, box, kind) for box in question.boxes for kind in range(kinds)]
    done, total = 0, len(jobs) + number * (1 + len(PARTS))

    def advance(by: int = 1) -> None:
        nonlocal done
        done += by
        if progress is not None:
            progress(done, total)

    def all_of(function: Callable[[Any], Any], inputs: Sequence[Any]) -> list[Any]:
        found: dict[int, Any] = {}
        for index, output in results(function, inputs, processes):
            found[index] = output
            advance()
        return [found[i] for i in range(len(inputs))]

    tables: list[Services] = all_of(services, jobs)
    tasks = [
        (question, box, tuple(tables[b * kinds : (b + 1) * kinds]))
        for b, box in enumerate(question.boxes)
    ]
    options: list[Option] = all_of(searched, tasks)
    able = [option for option in options if option.cut is not None]
    parts: list[dict[str, Any]] = all_of(part, [(question, o, p) for o in able for p in PARTS])
    told = [
        _with_parts(option, parts[i * len(PARTS) : (i + 1) * len(PARTS)])
        for i, option in enumerate(able)
    ]
    unable = [option for option in options if option.cut is None]
    if unable:
        advance(len(unable) * len(PARTS))
    return Answer(question=question, options=tuple(sorted([*told, *unable], key=_order)))


def _order(option: Option) -> tuple[bool, bool, float, float]:
    """Those that keep the level first, then by price (by GPUs where there is none), then by tail."""
    cost = option.cost_per_hour
    size = cost if cost is not None else float((option.nodes or 0) * option.box.gpus)
    tail_s = option.outcome.tail_s if option.outcome is not None else math.inf
    return (not option.met, cost is None, size, tail_s)


def _job(question: Question, box: Box, kind: int) -> Job:
    widest = min(question.max_width, box.gpus)
    powers = [2**i for i in range(widest.bit_length())]
    return Job(
        profile=question.profiles[kind],
        topology=box.topology,
        workload=question.workloads[kind],
        widths=tuple(sorted({*powers, widest})),
        runtime=question.runtime,
        specs=question.specs,
        goal=question.goal,
        max_batch=question.demand.max_batch,
    )


def searched(task: tuple[Question, Box, tuple[Services, ...]]) -> Option:
    """What one box can do, given the service times of every class on it; without its PARTS."""
    question, box, tables = task
    used = _gpus(box)
    base = Option(
        box=box,
        table=tuple(known.by_width for known in tables),
        tdp_w=sum(gpu.tdp.value for gpu in used) / len(used),
        tdp_source="; ".join(
            f"{gpu.name} {gpu.tdp.value:g} W, {gpu.tdp.kind}: {gpu.tdp.source}"
            for gpu in {gpu.name: gpu for gpu in used}.values()
        ),
    )
    for label, known in zip(question.labels, tables, strict=True):
        if not known.by_width:
            why = known.reasons[max(known.reasons)]
            return replace(base, reason=f"{label} cannot run: {why}")
    search = _search(question, base)
    found = search.best() if question.nodes is None else search.fastest(question.nodes)
    if found is None:
        found = OutOfReach("no cut of a node holds all models in the memory of its GPUs", None)
    if isinstance(found, OutOfReach):
        return replace(base, reason=found.reason, nearest=found.nearest)
    return replace(base, cut=found.cut, nodes=found.nodes, outcome=found.outcome)


def _gpus(box: Box) -> list[Gpu]:
    """Of a node, those that are used."""
    known = {name: load_gpu(name) for name in dict.fromkeys(box.topology.profiles[: box.gpus])}
    return [known[name] for name in box.topology.profiles[: box.gpus]]


def _search(question: Question, option: Option) -> Search:
    box = option.box
    machine = min(box.gpus, len(box.topology.node_of(0).gpus))
    node = Node(box.gpus, machine, min(gpu.memory.value for gpu in _gpus(box)))
    return Search(question.demand, node, option.table, question.labels)


def part(task: tuple[Question, Option, str]) -> dict[str, Any]:
    """One of PARTS of an option that has a cut, by the names of what it fills in."""
    question, option, name = task
    search, cut = _search(question, option), option.cut
    nodes, outcome = option.nodes, option.outcome
    assert cut is not None
    assert nodes is not None
    assert outcome is not None
    found = Found(cut, nodes, outcome)
    if name in ("nodes_low", "nodes_high"):
        factors = _ends(cut, option.table)[name == "nodes_high"]
        return {name: search.fewest_at(cut, factors) if question.nodes is None else None}
    if name == "load":
        return {name: _load(search, found)}
    if name == "ladder":
        return {name: _ladder(search, found)}
    return _sample(search, found)


def _with_parts(option: Option, parts: Sequence[Mapping[str, Any]]) -> Option:
    known = {key: value for each in parts for key, value in each.items()}
    low, high = known.pop("nodes_low"), known.pop("nodes_high")
    return replace(option, nodes_low=low, nodes_high=high, curves=Curves(**known))


def _ends(cut: Cut, table: ServiceTable) -> tuple[list[float], list[float]]:
    """Factors of every class at the low and the high end of its interval, that of its widest way."""
    widest = {kind: table[kind][widths[-1]] for pool in cut.pools for kind, widths in pool.widths}
    kinds = sorted(widest)
    return [widest[k].low for k in kinds], [widest[k].high for k in kinds]


def _load(search: Search, found: Found) -> tuple[tuple[float, Outcome], ...]:
    """Outcomes from an idle system up to saturation."""
    demand, system = search.demand, search.system(found.cut, found.nodes)
    per_load = _per_load(search, found)
    budget = demand.budget.pilot()
    return tuple(
        (
            share,
            evaluate(
                system, demand.traffic, demand.slo, budget, demand.quantiles, share * per_load
            ),
        )
        for share in LOADS
    )


def _per_load(search: Search, found: Found) -> float:
    """Saturation over the arrival rate."""
    return found.outcome.saturation_per_s / search.demand.traffic.rate_per_s


def _ladder(search: Search, found: Found) -> tuple[tuple[int, Outcome], ...]:
    """Outcomes of numbers of nodes around the one that was found."""
    demand, cut = search.demand, found.cut
    budget = demand.budget.pilot()
    first = min(search.least(cut), found.nodes)
    last = max(found.nodes + 2, 2 * found.nodes - first)
    numbers = sorted({*np.linspace(first, last, LADDER).round().astype(int).tolist(), found.nodes})
    return tuple(
        (
            nodes,
            evaluate(
                search.system(cut, nodes), demand.traffic, demand.slo, budget, demand.quantiles
            ),
        )
        for nodes in numbers
    )


def _sample(search: Search, found: Found) -> dict[str, Any]:
    """Utilisation and latencies of one replication; none where it is saturated."""
    if found.outcome.saturated:
        return {"utilisation": (), "latencies_s": ()}
    demand, system = search.demand, search.system(found.cut, found.nodes)
    ahead = settling(demand.traffic, 1 / _per_load(search, found))
    run = replication(system, demand.traffic, demand.budget, 0, ahead=ahead)
    latencies = tuple(
        _evenly(np.sort(run.latency_s[run.requests.kinds == kind]))
        for kind in range(len(search.table))
    )
    return {"utilisation": _utilisation(run, system.gpus), "latencies_s": latencies}


def _evenly(values: Floats) -> tuple[float, ...]:
    """At most SAMPLE of the sorted ``values``, evenly spaced, both ends among them."""
    if len(values) <= SAMPLE:
        return tuple(values.tolist())
    return tuple(values[np.linspace(0, len(values) - 1, SAMPLE).round().astype(int)].tolist())


def _utilisation(run: Run, gpus: int) -> tuple[tuple[float, float], ...]:
    """(end of an interval, busy share of the GPUs in it) while requests arrive."""
    first, last = float(run.requests.arrival_s[0]), float(run.requests.arrival_s[-1])
    edges_s = np.linspace(first, last, BINS + 1)
    served = run.served
    done = [
        float((served.gpus * np.clip(t - served.start_s, 0.0, run.service_s)).sum())
        for t in edges_s
    ]
    busy = np.diff(done) / np.diff(edges_s) / gpus
    return tuple(zip((edges_s[1:] - first).tolist(), busy.tolist(), strict=True))
