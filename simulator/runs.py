"""Schedules of one request built, priced and simulated; what they share is made once.

Knows the model, the box, the workload and how kernels are launched. Which specs are worth a run, and
what their times mean for a choice, is for the planner to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from analysis.attribution import Breakdown, attribute
from analysis.intervals import Factors, Part, factors, prices
from paradiff.graph import ScheduleGraph, traffic
from paradiff.profiles import Profile
from paradiff.strategies import Spec, Workload, build, build_alike, parse_spec
from paradiff.trace import Trace
from simulator.costs import CostModel, Runtime, Scope, StageSeconds
from simulator.engine import simulate
from simulator.gpu import load_gpu
from simulator.memory import RankMemory, at_peak, memory_on
from simulator.network import Network
from simulator.one_number import Calibration, calibrated
from simulator.placement import Placement, Wire
from simulator.symmetry import Asymmetric, Quotient, quotient, whole
from simulator.topology import Topology


class Contradiction(ValueError):
    """A measured latency that no such GPU reaches, or that leaves no time for the denoising loop."""


@dataclass(frozen=True)
class Built:
    """One spec: its schedule, one rank of each kind, and what follows from the graph alone.
    ``phases``: memory of every rank of a schedule, in each phase."""

    schedule: Quotient
    phases: Callable[[Quotient], tuple[tuple[RankMemory, ...], ...]]

    @cached_property
    def memory(self) -> tuple[RankMemory, ...]:
        """Of every rank at its peak."""
        return at_peak(self.phases(self.schedule))

    def received_bytes(self) -> float:
        """Bytes that the rank receives that receives most."""
        received = dict.fromkeys(self.schedule.ranks, 0.0)
        for op, count in self.schedule.transfers:
            for rank, (_, size) in traffic(op).items():
                if rank in received:
                    received[rank] += count * size
        return max(received.values())


class Run(NamedTuple):
    """One spec simulated on one placement."""

    placement: Placement
    breakdown: Breakdown
    factors: Mapping[Part, Factors]

    @property
    def latency_s(self) -> float:
        stages = self.breakdown.stages
        return stages.text_encoder_s + stages.denoise_s + stages.vae_s


class Runs:
    """Where a request's specs are built and run. ``measured``: a one-GPU run's seconds, and what its
    clock covered; raises Contradiction where they cannot be. ``schedules``: remembers those built of
    this model and workload, also for other boxes of one GPU model each."""

    def __init__(
        self,
        profile: Profile,
        topology: Topology,
        workload: Workload,
        runtime: Runtime,
        measured: tuple[float, Scope] | None = None,
        schedules: MutableMapping[str, Quotient] | None = None,
    ) -> None:
        self.profile, self.topology, self.workload = profile, topology, workload
        names = topology.profiles
        gpus = {name: load_gpu(name) for name in dict.fromkeys(names)}
        self.gpus = tuple(gpus[name] for name in names)
        self.devices_by_model = {name: names.index(name) for name in gpus}
        """The first device of each GPU model."""
        self.mixed = len(gpus) > 1
        self.network = Network(topology)
        self.costs = CostModel(profile, self.gpus, workload.dtype, runtime)
        self.wire = Wire(self.network)
        self.captured = runtime == "cuda-graph"
        """Whether the denoiser is replayed from CUDA graphs."""
        self.kept: dict[str, Built] = {}
        """Schedules to remember beside the last two."""
        self._latest = lru_cache(maxsize=2)(self._make)
        self._schedules = schedules
        self._done: dict[tuple[str, Placement], Run] = {}
        self._links_only_s: dict[tuple[str, Placement], float] = {}
        self.calibration: Calibration | None = None
        if measured is not None:
            self.costs, self.calibration = self._calibrated(*measured)
            self._done.clear()

    @cached_property
    def _links_only(self) -> Network:
        """The box without its measured collectives."""
        return Network(replace(self.topology, collectives=()))

    def _calibrated(self, seconds: float, scope: Scope) -> tuple[CostModel, Calibration]:
        serial = self.run("serial", (0,)).breakdown
        stages = StageSeconds(**asdict(serial.stages), host_s=serial.host_s)
        graph = self.built("serial").schedule.graph
        try:
            return calibrated(self.costs, graph, stages, seconds, scope)
        except ValueError as error:
            raise Contradiction(str(error)) from error

    def graph(self, spec: Spec) -> ScheduleGraph:
        """Every rank's ops. Raises Infeasible."""
        return build(spec, self.profile, self.workload)

    def built(self, text: str) -> Built:
        """The schedule of a spec. Raises Infeasible."""
        return self.kept.get(text) or self._latest(text)

    def _make(self, text: str) -> Built:
        schedule = None if self._schedules is None else self._schedules.get(text)
        if schedule is None:
            schedule = self._schedule(parse_spec(text))
            if self._schedules is not None:
                self._schedules[text] = schedule
        return Built(schedule, self.phases)

    def phases(self, schedule: Quotient) -> tuple[tuple[RankMemory, ...], ...]:
        """Memory of every rank in each phase; of one that stands for others, also theirs."""
        dtype = self.workload.dtype
        return memory_on(self.gpus[0], schedule, self.profile, dtype, captured=self.captured)

    def _schedule(self, spec: Spec) -> Quotient:
        """Replicas are built once."""
        if self.mixed:
            return whole(self.graph(spec))
        replicas = 1
        if "data" in spec.strategy.axes:
            replicas = spec.degree("data")
            spec = replace(spec, options={k: v for k, v in spec.options.items() if k != "data"})
        found = build_alike(spec, self.profile, self.workload)
        schedule = quotient(self.graph(spec)) if found is None else Quotient(*found)
        return schedule if replicas == 1 else schedule.copies(replicas)

    def trace(self, text: str, placement: Placement, network: Network) -> Trace:
        """The run of a spec; rank by rank where its ranks are not alike on this placement."""
        try:
            return simulate(self.built(text).schedule, network, self.costs, placement=placement)
        except Asymmetric:
            graph = self.graph(parse_spec(text))
            return simulate(graph, network, self.costs, placement=placement)

    def run(self, text: str, placement: Placement) -> Run:
        """One spec on one placement: where its time goes, and how sure that is."""
        known = self._done.get((text, placement))
        if known is None:
            breakdown = attribute(self.trace(text, placement, self.network))
            schedule, rank = self.built(text).schedule, breakdown.rank
            spread = factors(self.costs, self.network, schedule, placement, rank)
            known = self._done[text, placement] = Run(placement, breakdown, spread)
        return known

    def links_only_s(self, text: str, placement: Placement) -> float:
        """The makespan of a spec on the box without its measured collectives."""
        known = self._links_only_s.get((text, placement))
        if known is None:
            known = self.trace(text, placement, self._links_only).makespan_s
            self._links_only_s[text, placement] = known
        return known

    def slowest_rank_s(self, graph: ScheduleGraph) -> Callable[[Placement], float]:
        """Compute seconds of the rank that has most of them, by placement."""
        work = {
            (rank, name): sum(
                n * cost.device_s for _, n, cost in prices(self.costs, graph, rank, device)
            )
            for name, device in self.devices_by_model.items()
            for rank in range(graph.world_size)
        }
        names = self.topology.profiles
        return lambda placement: max(work[r, names[d]] for r, d in enumerate(placement))
