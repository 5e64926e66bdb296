"""Strategies on a laboratory's links: what the simulator predicts, what ranks with timed kernels took.

Decides what a cell is (a strategy on a model, at a size, on a box, with a balance of compute and
communication), what its kernels take, and when the whole agrees. A prediction knows the links' rates,
the headers of TCP, the bucket of tbf, and one calibration on links without a limit; nothing is fitted to
a box.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Literal, NamedTuple

from analysis.comparison import Comparison, compare
from analysis.tracks import modelled_memory, simulated
from paradiff.config import ConfigError
from paradiff.graph import Op, ScheduleGraph, Work, traffic
from paradiff.lab import namespaces
from paradiff.lab.calibration import Calibration
from paradiff.lab.ranks import Progress, Ranks, Run
from paradiff.profiles import Profile
from paradiff.strategies import Workload, build, parse_spec
from paradiff.trace import TRANSFERS, Trace, Tracks
from simulator.costs import CostModel
from simulator.engine import Flows, simulate
from simulator.gpu import load_gpu
from simulator.symmetry import whole
from simulator.tcp import TcpNetwork
from simulator.topology import Topology

Regime = Literal["compute", "communication"]
BALANCE: Mapping[Regime, float] = {"compute": 1.5, "communication": 0.25}
"""Compute of the busiest rank over what the transfers take alone."""
LOOP = ("denoiser", "scheduler", "guidance")
"""Stages whose kernels take time; text encoders and VAE are the same whatever joins the ranks."""
NOISY = 0.03
"""Spread from which on a cell says little about a prediction."""
MOST_NOISY = 0.1
MOST_FIXED = 0.1
"""Of what the transfers of a cell take alone, what may be no bytes: else its links are too fast."""
APART = 0.1
"""Measured times that differ by more must be in the predicted order."""
MEDIAN_SHARE = 0.5
"""Of the error that one cell may have: what half of the cells must stay within."""


class Cell(NamedTuple):
    """A strategy on a model at a size, and how compute and communication balance: in this cell, or
    (``shared``) in the median of all that do the same work on as many ranks, whose kernels are the same.
    """

    model: str
    spec: str
    height: int
    width: int
    steps: int
    regime: Regime
    shared: bool = False

    @property
    def work(self) -> tuple[str, int, int, int]:
        """What is computed, whatever the strategy."""
        return self.model, self.height, self.width, self.steps


@dataclass(frozen=True)
class Kernel:
    """Price of a compute op: of a timed kernel the device takes all."""

    device_s: float
    host_s: float = 0.0
    placed_s: float = 0.0

    @property
    def contended_s(self) -> float:
        return self.device_s


@dataclass(frozen=True)
class TimedCosts:
    """Timed kernels and gloo's calls on this machine, in the simulator's terms. ``stretch`` multiplies
    what kernels take on the box's GPUs; ``link_bytes_per_s`` is the fastest of its links; ``world``
    ranks run."""

    kernels: CostModel
    calibration: Calibration
    link_bytes_per_s: float
    world: int
    stretch: float = 1.0

    def kernel_s(self, work: Work | None, device: int) -> float:
        """How long a timed kernel is asked to sleep."""
        if work is None or work.stage not in LOOP:
            return 0.0
        cost = self.kernels.compute(work, device)
        return self.stretch * max(cost.device_s, cost.host_s)

    def compute(self, work: Work, device: int) -> Kernel:
        return Kernel(self.kernel_s(work, device) + self.calibration.kernel_s)

    def transfer_fixed_s(self, op: Op) -> float:
        most = max(max(sent, received) for sent, received in traffic(op).values())
        rate = self.link_bytes_per_s
        packet_s = namespaces.PACKET_BYTES / rate
        return self.calibration.fixed_s(op, self.world, most / rate, packet_s)

    def transfer_host_s(self, op: Op) -> float:
        return 0.0


@dataclass(frozen=True)
class Prepared:
    """A cell on a box, and what its kernels take. ``fixed_share``: what its calls take with few bytes,
    over what they take alone on its links (some of the former passes while bytes flow)."""

    cell: Cell
    graph: ScheduleGraph
    placement: tuple[int, ...]
    costs: TimedCosts
    fixed_share: float


@dataclass(frozen=True)
class Prediction(Prepared):
    """A cell on a box, before it runs; ``flows``: over the links of ``network``."""

    trace: Trace
    network: TcpNetwork
    flows: tuple[Flows, ...]

    def tracks(self, profile: Profile) -> Tracks:
        """Links and memory, for its trace file."""
        memory = modelled_memory(self.graph, self.trace, profile)
        return simulated(self.flows, self.network, whole(self.graph), memory)

    def seconds(self, op: Op) -> float:
        """What a compute op sleeps."""
        if op.kind in TRANSFERS:
            return 0.0
        return self.costs.kernel_s(op.work, self.placement[op.ranks[0]])


@dataclass(frozen=True)
class Result:
    """A cell on a box, predicted and measured."""

    box: str
    prediction: Prediction
    comparison: Comparison

    @property
    def cell(self) -> Cell:
        return self.prediction.cell

    @property
    def ranks(self) -> int:
        return self.prediction.graph.world_size

    @property
    def error(self) -> float:
        found = self.comparison.latency.error
        assert found is not None
        return found

    @property
    def is_noisy(self) -> bool:
        return self.comparison.spread > NOISY

    @property
    def is_short(self) -> bool:
        """Calls cost more beside their bytes than is promised for."""
        return self.prediction.fixed_share > MOST_FIXED

    @property
    def alike(self) -> tuple[object, ...]:
        """What two results have in common whose order says something: all but the strategy."""
        return self.box, self.ranks, self.cell.regime, self.cell.work, self.prediction.costs.stretch


def graph_of(profile: Profile, cell: Cell) -> ScheduleGraph:
    """Raises Infeasible."""
    size = Workload(cell.height, cell.width, profile.defaults["frames"], cell.steps)
    return build(parse_spec(cell.spec), profile, size)


def check(
    boxes: Sequence[Topology], profiles: Mapping[str, Profile], cells: Sequence[Cell]
) -> None:
    """Before anything is measured. Raises ConfigError where a strategy takes more ranks than a box has
    hosts, Infeasible where it does not go with its model and size."""
    for cell in cells:
        graph = graph_of(profiles[cell.model], cell)
        for box in boxes:
            spread_over(box, graph.world_size)


def spread_over(box: Topology, ranks: int) -> tuple[int, ...]:
    """Devices of ``ranks`` ranks, as far apart in the order of the box as there is room: four of eight
    hosts on two switches are two on each. Raises ConfigError."""
    hosts = len(box.gpus)
    if ranks > hosts:
        raise ConfigError(f"{box.name}: {hosts} hosts, the strategy takes {ranks} ranks")
    return tuple(rank * hosts // ranks for rank in range(ranks))


def network_of(box: Topology, calibration: Calibration) -> TcpNetwork:
    """``box`` as TCP sees it; no link is faster than a host."""
    most = calibration.host_bytes_per_s
    links = tuple(
        replace(
            link,
            bandwidth_bytes_per_s=min(link.bandwidth_bytes_per_s, most),
            back_bytes_per_s=link.back_bytes_per_s and min(link.back_bytes_per_s, most),
        )
        for link in box.links
    )
    return TcpNetwork(replace(box, links=links), namespaces.PACKET_BYTES)


class Oracle:
    """Predicts cells on one box. ``network`` may be given instead of the box's own."""

    def __init__(
        self, box: Topology, calibration: Calibration, network: TcpNetwork | None = None
    ) -> None:
        self.box, self.calibration = box, calibration
        self.network = network or network_of(box, calibration)

    def predict(self, profile: Profile, cell: Cell, stretch: float | None = None) -> Prediction:
        """``stretch``: of the kernels; by default what gives the cell its balance. Raises Infeasible,
        ConfigError for a strategy that moves nothing or more ranks than hosts."""
        return self._timed(self._prepared(profile, cell), stretch)

    def predict_all(
        self, profiles: Mapping[str, Profile], cells: Sequence[Cell]
    ) -> list[Prediction]:
        """Each of ``cells``, the shared ones with one stretch for all that do the same work on as many
        ranks. Raises what ``predict`` raises."""
        found = [self._prepared(profiles[cell.model], cell) for cell in cells]
        own: dict[tuple[object, ...], list[float]] = {}
        for each in found:
            if each.cell.shared:
                own.setdefault(_group(each), []).append(each.costs.stretch)
        return [
            self._timed(each, statistics.median(own[_group(each)]) if each.cell.shared else None)
            for each in found
        ]

    def _prepared(self, profile: Profile, cell: Cell) -> Prepared:
        """With the stretch that gives the cell its balance."""
        graph = graph_of(profile, cell)
        placement = spread_over(self.box, graph.world_size)
        gpus = [load_gpu(name) for name in self.box.profiles]
        fastest = max(
            max(link.rate_from(end) for end in (link.a, link.b)) for link in self.box.links
        )
        kernels = CostModel(profile, gpus, dict(graph.meta)["dtype"])
        costs = TimedCosts(kernels, self.calibration, fastest, graph.world_size)
        alone = self._run(graph, replace(costs, stretch=0.0), placement)
        if not any(span.busy_s > 0 for span in alone.spans if span.kind in TRANSFERS):
            raise ConfigError(
                f"{cell.spec}: moves nothing between ranks, there is nothing to compare"
            )
        stretch = BALANCE[cell.regime] * alone.makespan_s / busiest_s(graph, costs, placement)
        share = fixed_share(graph, alone, self.calibration)
        return Prepared(cell, graph, placement, replace(costs, stretch=stretch), share)

    def _timed(self, of: Prepared, stretch: float | None) -> Prediction:
        costs = of.costs if stretch is None else replace(of.costs, stretch=stretch)
        flows = list[Flows]()
        trace = self._run(of.graph, costs, of.placement, flows)
        return Prediction(
            of.cell,
            of.graph,
            of.placement,
            costs,
            of.fixed_share,
            trace,
            self.network,
            tuple(flows),
        )

    def _run(
        self,
        graph: ScheduleGraph,
        costs: TimedCosts,
        placement: tuple[int, ...],
        flows: list[Flows] | None = None,
    ) -> Trace:
        return simulate(
            graph,
            self.network,
            costs,
            placement=placement,
            periodic=False,
            backend="gloo",
            flows=flows,
        )


def fixed_share(graph: ScheduleGraph, alone: Trace, calibration: Calibration) -> float:
    """Of the time that transfers take without kernels, what they take with few bytes: over all ranks."""
    ops = {instance.id: instance.op for instance in graph.instances()}
    busy_s = fixed_s = 0.0
    for span in alone.expanded().spans:
        if span.kind in TRANSFERS:
            busy_s += span.busy_s
            fixed_s += calibration.call(ops[span.id], graph.world_size)
    return fixed_s / busy_s


def _group(of: Prepared) -> tuple[object, ...]:
    return of.cell.work, of.cell.regime, of.graph.world_size


def busiest_s(graph: ScheduleGraph, costs: TimedCosts, placement: Sequence[int]) -> float:
    """Compute of the rank that has most."""
    total = [0.0] * graph.world_size
    for section in graph.sections:
        for op in section.ops:
            if op.kind not in TRANSFERS:
                total[op.ranks[0]] += section.count * costs.kernel_s(
                    op.work, placement[op.ranks[0]]
                )
    return max(total)


def measure(
    box: Topology,
    predictions: Sequence[Prediction],
    ranks: Ranks,
    repeats: int,
    progress: Progress | None = None,
) -> list[Result]:
    """Run each of ``predictions`` on hosts joined as ``box`` says. Raises LaboratoryFailed."""
    done, total = 0, repeats * len(predictions)
    traces: dict[int, list[Trace]] = {}
    sizes = sorted({p.graph.world_size for p in predictions})
    with namespaces.hosts(box) as hosts:
        for size in sizes:
            numbers = [i for i, p in enumerate(predictions) if p.graph.world_size == size]
            own = [hosts[device] for device in spread_over(box, size)]
            runs = [Run(predictions[i].graph, predictions[i].seconds, repeats) for i in numbers]
            begun = done

            def shown(so_far: int, _: int, begun: int = begun) -> None:
                if progress is not None:
                    progress(begun + so_far, total)

            traces |= dict(zip(numbers, ranks.run(own, runs, shown), strict=True))
            done += repeats * len(numbers)
    return [
        Result(box.name, prediction, compare(prediction.trace, traces[i]))
        for i, prediction in enumerate(predictions)
    ]


# ------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Verdict:
    """All results against what must hold; ``max_error`` is what a quiet cell may be off at most."""

    results: tuple[Result, ...]
    max_error: float

    @cached_property
    def quiet(self) -> tuple[Result, ...]:
        """Results whose repeats agree."""
        return tuple(result for result in self.results if not result.is_noisy)

    @property
    def noisy_share(self) -> float:
        return 1 - len(self.quiet) / len(self.results)

    @property
    def median_error(self) -> float:
        """Median size of the errors; infinite where all cells are noisy."""
        errors = [abs(result.error) for result in self.quiet]
        return statistics.median(errors) if errors else math.inf

    @property
    def worst(self) -> Result | None:
        return max(self.quiet, key=lambda result: abs(result.error), default=None)

    def pairs(self) -> Iterator[tuple[Result, Result, bool]]:
        """Strategies on the same work, box, number of ranks and kernels whose measured times are APART,
        the faster first, and whether they were predicted in that order."""
        for a, b in combinations(self.quiet, 2):
            if a.alike != b.alike:
                continue
            first, second = sorted((a, b), key=lambda r: r.comparison.latency.measured_s)
            fast, slow = first.comparison.latency, second.comparison.latency
            if slow.measured_s > (1 + APART) * fast.measured_s:
                yield first, second, fast.predicted_s < slow.predicted_s

    @cached_property
    def misordered(self) -> tuple[tuple[Result, Result], ...]:
        return tuple((a, b) for a, b, is_right in self.pairs() if not is_right)

    @property
    def failures(self) -> list[str]:
        """What does not hold, in words."""
        found = []
        if self.noisy_share > MOST_NOISY:
            found.append(
                f"{self.noisy_share:.0%} of the cells are noisy, allowed: {MOST_NOISY:.0%}"
            )
        found += [
            f"{each.cell.spec} on {each.box}: calls cost {each.prediction.fixed_share:.0%} of what its"
            f" transfers take, allowed: {MOST_FIXED:.0%} (a larger size, slower links)"
            for each in self.results
            if each.is_short
        ]
        allowed = MEDIAN_SHARE * self.max_error
        if self.median_error > allowed:
            found.append(f"median error {self.median_error:.1%}, allowed: {allowed:.1%}")
        if self.worst is not None and abs(self.worst.error) > self.max_error:
            found.append(
                f"{self.worst.cell.spec} on {self.worst.box} is {self.worst.error:+.1%} off,"
                f" allowed: {self.max_error:.1%}"
            )
        found += [
            f"{a.cell.spec} is faster than {b.cell.spec} on {a.box}, predicted the other way"
            for a, b in self.misordered
        ]
        return found
