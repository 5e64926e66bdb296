"""How long a node takes for one request: the planner's answer for every width a node can be cut into.

Knows models, boxes and strategies, no queues. A node of G GPUs that is cut into replicas of w runs
G // w of them at once, and they share links and host memory. So a strategy that communicates is priced
with as many copies side by side as one machine holds, all at work: the slowest counts. That is what a
full node takes; a lone request on an idle node may be faster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from paradiff.graph import Op, Ref, ScheduleGraph
from paradiff.profiles import Profile
from paradiff.strategies import Infeasible, Workload, build, candidate_specs, parse_spec
from paradiff.trace import TRANSFERS
from simulator import planner
from simulator.costs import CostModel, Runtime
from simulator.engine import simulate
from simulator.gpu import load_gpu
from simulator.memory import RankMemory, at_peak, memory_on, misfit
from simulator.network import Network
from simulator.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One class on ``width`` GPUs. ``batch_s[i]``: seconds for 2**i requests at once, as many as fit.

    ``low`` and ``high`` are the planner's 90 % interval as factors of it. Bytes of the fullest rank:
    ``resident`` stays while the replica runs something else, ``transient`` does not.
    """

    model: str
    width: int
    spec: str
    batch_s: tuple[float, ...]
    low: float
    high: float
    exact: bool
    provenance: str
    resident_bytes: float
    transient_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked of one class on one box. ``max_batch``: requests served together at most."""

    profile: Profile
    topology: Topology
    workload: Workload
    widths: tuple[int, ...]
    runtime: Runtime = "eager"
    specs: tuple[str, ...] = ()
    goal: planner.Goal = field(default_factory=planner.Goal)
    max_batch: int = 1


@dataclass(frozen=True, slots=True)
class Services:
    """The answer: width -> service, and why a width has none."""

    by_width: Mapping[int, Service]
    reasons: Mapping[int, str]


def services(job: Job) -> Services:
    """The fastest strategy of every width of ``job``, all copies of it on a node at work."""
    gpus = max(job.widths)
    specs = job.specs or tuple(candidate_specs(job.profile, job.workload, gpus))
    plan = planner.plan(
        planner.Request(
            profile=job.profile, topology=job.topology, workload=job.workload, gpus=gpus,
            runtime=job.runtime, goal=job.goal,
            specs=tuple(spec for spec in specs if parse_spec(spec).mesh.dp == 1),
        )
    )  # fmt: skip
    bench = _Bench(job)
    found: dict[int, Service] = {}
    reasons: dict[int, str] = {}
    for width in job.widths:
        fitting = [c for c in plan.ranked if (c.n_gpus or 0) <= width]
        if fitting:
            found[width] = bench.best(width, fitting)
        else:
            reasons[width] = _why(plan, width)
    return Services(found, reasons)


def _why(plan: planner.Plan, width: int) -> str:
    """The reason of the first strategy that was out on ``width`` GPUs."""
    out = [c for c in plan.rejected if (c.n_gpus or 0) <= width]
    if not out:
        return f"no strategy for {width} GPUs was asked for"
    return f"{out[0].spec}: {out[0].reason}"


class _Bench:
    """One job's box and prices, made once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.network = Network(job.topology)
        box = job.topology
        self.machine = [box.gpus.index(name) for name in box.node_of(0).gpus]
        """Devices of one machine."""
        loaded = {name: load_gpu(name) for name in dict.fromkeys(box.profiles)}
        self.gpus = tuple(loaded[name] for name in box.profiles)
        self.costs = CostModel(job.profile, self.gpus, job.workload.dtype, job.runtime)

    def best(self, width: int, candidates: list[planner.Candidate]) -> Service:
        """The fastest on a full node. ``candidates``: fastest alone first, which bounds the rest."""
        best, best_s = candidates[0], float("inf")
        order = sorted(candidates, key=lambda c: c.latency_s or 0.0)
        for candidate in order:
            assert candidate.latency_s is not None
            if candidate.latency_s >= best_s:
                break
            seconds = self._seconds(self._graph(candidate.spec, 1), width)
            if seconds < best_s:
                best, best_s = candidate, seconds
        return self._service(width, best, best_s)

    def _service(self, width: int, c: planner.Candidate, seconds: float) -> Service:
        assert c.latency_s is not None
        assert c.latency_low_s is not None
        assert c.latency_high_s is not None
        memory = self._memory(self._graph(c.spec, 1))
        resident = max(m.weights + m.text_encoders + m.vae + m.communicator for m in memory)
        return Service(
            model=self.job.profile.name,
            width=width,
            spec=c.spec,
            batch_s=(seconds, *self._batches(c.spec, width)),
            low=c.latency_low_s / c.latency_s,
            high=c.latency_high_s / c.latency_s,
            exact=bool(c.exact),
            provenance=c.provenance or "analytic",
            resident_bytes=resident,
            transient_bytes=max(m.total for m in memory) - resident,
        )

    def _batches(self, spec: str, width: int) -> Iterator[float]:
        """Seconds of batches of 2, 4, ... requests, as long as they fit."""
        size = 2
        while size < 2 * self.job.max_batch:
            try:
                graph = self._graph(spec, size)
            except Infeasible:
                return
            memory = self._memory(graph)
            if misfit(memory, self.gpus[: len(memory)]) is not None:
                return
            yield self._seconds(graph, width)
            size *= 2

    def _graph(self, spec: str, requests: int) -> ScheduleGraph:
        workload = replace(self.job.workload, batch=requests * self.job.workload.batch)
        return build(parse_spec(spec), self.job.profile, workload)

    def _memory(self, graph: ScheduleGraph) -> tuple[RankMemory, ...]:
        job, captured = self.job, self.job.runtime == "cuda-graph"
        dtype = job.workload.dtype
        return at_peak(memory_on(self.gpus[0], graph, job.profile, dtype, captured=captured))

    def _seconds(self, graph: ScheduleGraph, width: int) -> float:
        """Seconds of ``graph`` while every other run of ``width`` GPUs of the machine does the same."""
        ranks, copies = graph.world_size, max(1, len(self.machine) // width)
        communicates = any(op.kind in TRANSFERS for s in graph.sections for op in s.ops)
        mixed = len(set(self.job.topology.profiles)) > 1
        if copies > 1 and (communicates or mixed):
            graph = side_by_side(graph, copies)
            starts = range(0, copies * width, width)
            placement = [self.machine[start + rank] for start in starts for rank in range(ranks)]
        else:
            placement = list(range(ranks))
        return simulate(graph, self.network, self.costs, placement=placement).makespan_s


_RANK = re.compile(r"@r(\d+)$")


def side_by_side(graph: ScheduleGraph, copies: int) -> ScheduleGraph:
    """``copies`` requests of one schedule at once, copy k on ranks k * world size and on, its ops
    prefixed ``qk/``."""
    shifts = [copy * graph.world_size for copy in range(copies)]

    def name(text: str, shift: int) -> str:
        return _RANK.sub(lambda found: f"@r{int(found[1]) + shift}", text)

    def moved(refs: tuple[Ref, ...], shift: int) -> tuple[Ref, ...]:
        return tuple(ref._replace(buffer=name(ref.buffer, shift)) for ref in refs)

    def op_of(op: Op, copy: int, shift: int) -> Op:
        return replace(
            op,
            name=f"q{copy}/{op.name}",
            ranks=tuple(rank + shift for rank in op.ranks),
            reads=moved(op.reads, shift),
            writes=moved(op.writes, shift),
        )

    return replace(
        graph,
        world_size=copies * graph.world_size,
        buffers=tuple(
            replace(b, id=name(b.id, shift), rank=b.rank + shift)
            for shift in shifts
            for b in graph.buffers
        ),
        sections=tuple(
            replace(s, ops=tuple(op_of(op, k, sh) for k, sh in enumerate(shifts) for op in s.ops))
            for s in graph.sections
        ),
    )
