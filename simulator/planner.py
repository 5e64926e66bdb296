"""From a model, a box and a workload to a ranked list of strategies, with the reasons.

Decides which specs are tried, what puts one out, the order of the rest, and which sentence explains
the order. Building, pricing and simulating happen elsewhere; this file only asks.

Placement. Every spec is simulated with rank r on device r. Those that could become the first (they
would without all their waiting and exposed communication) are then simulated on up to TRIES other
placements: of the classes that the box's automorphisms leave, all where they are FEW, otherwise those
whose transfers (and, on a box of several GPU models, compute) look shorter; for the first itself also
those that look at most SLACK times as long.

Bounds. Where only the ``top`` best are asked for, a candidate is not simulated if its lower bound
(``simulator.bounds``) is worse than the ``top``-th so far, and, if it is exact, than the best exact
one, and if a simulated one is at least as good in latency, memory and staleness, so that it is on no
front. Nothing that was left out could have been any of these.

Intervals: ``analysis.intervals``. Reasons: ``analysis.reasons``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from analysis.attribution import Stages
from analysis.intervals import beyond_tables, parts, provenance, table_of
from analysis.reasons import Contender, separation
from paradiff.profiles import Profile
from paradiff.strategies import (
    Infeasible,
    Spec,
    Workload,
    candidate_specs,
    facts,
    not_compared,
    parse_spec,
)
from paradiff.strategies.places import PLACES
from simulator.bounds import Incumbents, Merit, better, least_latency_s
from simulator.collectives import table_bytes
from simulator.costs import Runtime, Scope
from simulator.gpu import load_gpu
from simulator.memory import RankMemory, misfit
from simulator.one_number import Calibration, doubts
from simulator.placement import MAX_GPUS, Placement, placements, promising
from simulator.price import Price, price_of
from simulator.quality import METRICS, NOTHING_KNOWN, Quality
from simulator.remedies import remedied
from simulator.runs import Run, Runs
from simulator.tailored import tailored_specs
from simulator.topology import CollectiveTable, Topology

Objective = Literal["latency", "throughput", "cost"]
UNITS: Mapping[Objective, str] = {
    "latency": "s",
    "throughput": "s per request",
    "cost": "GPU s per request",
}
"""Of what candidates are ranked by, the least first."""
SCHEMA = "paradiff.plan/1"
CURRENCY = "USD"
TRIES = 6
"""Placements simulated besides the first; one where the ranks are more than MAX_GPUS, as simulating
sixty-four takes seconds."""
FEW = 24
"""Where a box has so few classes of placements, all are simulated: any four GPUs."""
SLACK = 1.2
WORTH = 1e-3
"""Share of the latency that waiting and exposed communication must have for other placements to be
tried."""


NOTABLE = 0.01
"""Share of the latency that is worth a note."""
NEAREST = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What to rank by, and what is out of the question."""

    objective: Objective = "latency"
    exact_only: bool = False
    max_staleness: int | None = None
    max_quality_loss: float | None = None
    """In the unit of ``quality_metric``, one of ``simulator.quality.METRICS``."""
    quality_metric: str = "lpips"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything a plan depends on. ``specs`` empty: enumerate. ``measured``: a one-GPU run's
    seconds and what its clock covered."""

    profile: Profile
    topology: Topology
    workload: Workload
    gpus: int
    runtime: Runtime = "eager"
    specs: tuple[str, ...] = ()
    goal: Goal = Goal()
    quality: Quality = NOTHING_KNOWN
    """What is known of the loss of strategies that change the result."""
    measured: tuple[float, Scope] | None = None
    top: int | None = None
    """Only these many of the best matter, and the Pareto front; None: simulate every candidate."""

    def runs(self) -> Runs:
        """Where its specs are built and simulated. Raises Contradiction."""
        return Runs(self.profile, self.topology, self.workload, self.runtime, self.measured)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The whole request on one GPU. Times are None, with the reason, where one GPU cannot hold it."""

    latency_s: float | None
    peak_memory_bytes: int | None
    stages: Stages | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One spec. The fields are the keys of the JSON contract; None is "not known" or "not run".

    ``pareto``: no other is at least as good in latency, peak memory and staleness and better in one.
    ``bound_s``: the least latency of one that was not simulated because of it. ``quality``: the loss in
    the goal's metric, or the most that it can be, with the words of whoever has measured it.
    ``topology_only_latency_s``: without the box's measured collectives; at least of the ``top`` best
    and the best exact one.
    """

    spec: str
    feasible: bool
    reason: str | None = None
    nearest: str | None = None
    latency_s: float | None = None
    latency_low_s: float | None = None
    latency_high_s: float | None = None
    speedup: float | None = None
    compute_s: float | None = None
    exposed_comm_s: float | None = None
    bubble_s: float | None = None
    host_s: float | None = None
    stages: Stages | None = None
    n_gpus: int | None = None
    synchronous_steps: int | None = None
    throughput_per_s: float | None = None
    cost: float | None = None
    """CURRENCY per request."""
    cost_reason: str | None = None
    """Why there is no cost, of one that was simulated."""
    quality: float | None = None
    quality_source: str | None = None
    comm_bytes_per_gpu: int | None = None
    peak_memory_bytes: int | None = None
    exact: bool | None = None
    max_staleness_steps: int | None = None
    placement: tuple[int, ...] | None = None
    provenance: str | None = None
    pareto: bool | None = None
    bound_s: float | None = None
    topology_only_latency_s: float | None = None

    def weight(self, objective: Objective) -> float:
        """What a second of latency counts in ``objective``, in UNITS."""
        at_once = (self.throughput_per_s or 1.0) * (self.latency_s or 1.0)
        return {"latency": 1.0, "throughput": 1 / at_once, "cost": (self.n_gpus or 1) / at_once}[
            objective
        ]

    def to_json(self) -> dict[str, Any]:
        """The keys of the contract; ``topology_only_latency_s`` only where there is one."""
        out = asdict(self)
        out["placement"] = None if self.placement is None else list(self.placement)
        if self.topology_only_latency_s is None:
            del out["topology_only_latency_s"]
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer. ``ranked`` are the simulated candidates, best first; ``bounded`` those that would
    be behind the asked number of them; ``rejected`` those that cannot run. ``calibration``: what a
    measured latency made of the costs."""

    model: str
    topology: str
    box: Topology
    gpus: int
    gpu_memory_bytes: int
    workload: Workload
    runtime: str
    objective: Objective
    baseline: Baseline
    ranked: tuple[Candidate, ...]
    bounded: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    decided_by: str
    notes: tuple[str, ...]
    quality_metric: str = "lpips"
    calibration: Calibration | None = None

    def to_json(self, top: int | None = None) -> dict[str, Any]:
        """The JSON of the contract, with at most ``top`` of the simulated candidates."""
        shown = (*self.ranked[:top], *self.bounded, *self.rejected)
        return {
            "schema": SCHEMA,
            "model": self.model,
            "topology": self.topology,
            "gpus": self.gpus,
            "runtime": self.runtime,
            "objective": self.objective,
            "currency": CURRENCY,
            "workload": asdict(self.workload),
            "box": {
                "peer_to_peer": self.box.peer_to_peer,
                "measured_collectives": [
                    {key: getattr(t, key) for key in ("kind", "ranks", "source")}
                    for t in self.box.collectives
                ],
            },
            "calibration": self.calibration and asdict(self.calibration),
            "baseline": asdict(self.baseline),
            "candidates": [c.to_json() for c in shown],
            "recommended": self.ranked[0].spec if self.ranked else None,
            "runner_up": self.ranked[1].spec if len(self.ranked) > 1 else None,
            "decided_by": self.decided_by,
            "notes": list(self.notes),
            "quality_metric": self.quality_metric,
        }


@contextmanager
def uncollected() -> Iterator[None]:
    """Work without the cyclic garbage collector: it would walk the million objects of schedules and
    runs, which are freed without it, again and again while they are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def plan(
    request: Request,
    progress: Callable[[int, int], None] | None = None,
    runs: Runs | None = None,
) -> Plan:
    """Rank the asked (or all enumerated) strategies. ``progress`` gets (done, total); ``runs``: where an
    earlier plan of the same model, box and workload has built and simulated.

    Raises Contradiction where a measured latency cannot be. Example: sdxl on pcie8 tries
    some forty specs and keeps those that build, fit in memory and pass the goal's filters.
    """
    planner = _Planner(request, runs or request.runs())
    results = planner.with_better_placements(planner.candidates(progress))
    order = _order(request.goal.objective)
    ranked = _marked(sorted((c for c in results if c.latency_s is not None), key=order))
    return Plan(
        model=request.profile.name,
        topology=request.topology.name,
        box=request.topology,
        gpus=request.gpus,
        gpu_memory_bytes=planner.memory_bytes,
        workload=request.workload,
        runtime=request.runtime,
        objective=request.goal.objective,
        baseline=planner.baseline,
        ranked=ranked,
        bounded=tuple(c for c in results if c.bound_s is not None),
        rejected=tuple(c for c in results if not c.feasible),
        decided_by=planner.decided_by(ranked),
        notes=(
            *(doubts(planner.runs.calibration) if planner.runs.calibration else ()),
            *_notes(request, planner.price),
            *planner.what_fitting_costs(ranked),
            *planner.what_splitting_saves(ranked),
            *planner.what_tables_lack(ranked),
        ),
        quality_metric=request.goal.quality_metric,
        calibration=planner.runs.calibration,
    )


def _order(objective: Objective) -> Callable[[Candidate], tuple[float, ...]]:
    """Sort key of feasible candidates; ties go to the faster, then to fewer GPUs."""

    def key(c: Candidate) -> tuple[float, ...]:
        latency, gpus, rate = c.latency_s or 0.0, c.n_gpus or 0, c.throughput_per_s or 1.0
        first = {"latency": latency, "throughput": -rate, "cost": gpus / rate}[objective]
        return (first, latency, gpus)

    return key


def _marked(ranked: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates with what is on the front of latency, memory and staleness."""
    merits = [_merit(c, c.latency_s or 0.0) for c in ranked]
    return tuple(
        replace(c, pareto=not any(better(other, merit) for other in merits))
        for c, merit in zip(ranked, merits, strict=True)
    )


def _merit(c: Candidate, latency_s: float) -> Merit:
    return latency_s, c.peak_memory_bytes or 0, c.max_staleness_steps or 0


class _Planner:
    """One request in work: prices, networks and the baseline are made once."""

    def __init__(self, request: Request, runs: Runs) -> None:
        self.request = request
        self.runs = runs
        self.memory_bytes = int(min(gpu.memory.value for gpu in self.runs.gpus[: request.gpus]))
        self.found: dict[str, Run] = {}
        """The best run of each spec so far."""
        self.misfits: list[tuple[int, str]] = []
        """Bytes that the fullest rank needs, and the spec, of all that do not fit."""
        self.choices: dict[str, list[Placement]] = {}
        self.incumbents = Incumbents(request.top)
        self.price = price_of(request.topology)
        self.baseline = self._baseline()

    def _baseline(self) -> Baseline:
        try:
            memory = self.runs.built("serial").memory
        except Infeasible as error:
            return Baseline(None, None, None, str(error))
        peak, misfits, fitting = self._memory(memory, [(0,)])
        if misfits is not None:
            return Baseline(None, peak, None, misfits)
        run = self.runs.run("serial", fitting[0])
        return Baseline(run.latency_s, peak, run.breakdown.stages, None)

    # ------------------------------------------------------------------------------ one candidate

    def specs(self) -> tuple[str, ...]:
        """What is worth comparing anywhere, and what this box suggests."""
        profile, workload, gpus = self.request.profile, self.request.workload, self.request.gpus
        tailored = tailored_specs(profile, workload, self.runs.costs, self.runs.network, gpus)
        return tuple(dict.fromkeys((*candidate_specs(profile, workload, gpus), *tailored)))

    def candidates(self, progress: Callable[[int, int], None] | None) -> list[Candidate]:
        """What becomes of each spec; those on most GPUs are tried first, and give bounds something to be
        held against."""
        specs = self.request.specs or self.specs()
        found = {}
        for text in sorted(specs, key=lambda text: -parse_spec(text).n_gpus):
            found[text] = self.candidate(text)
            if progress is not None:
                progress(len(found), len(specs))
        results = [found[text] for text in specs]
        if not self.request.specs and not any(c.feasible for c in results):
            results += self.made_to_fit()
        return results

    def candidate(self, text: str) -> Candidate:
        """What becomes of one spec: its numbers, or why it cannot run or is not wanted."""
        spec = parse_spec(text)
        workload = self.request.workload
        known = facts(spec, workload)
        try:
            if known.n_gpus > self.request.gpus:
                raise Infeasible(
                    f"needs {known.n_gpus} GPUs, there are {self.request.gpus}",
                    spec.narrower(self.request.gpus),
                )
            built = self.runs.built(text)
        except Infeasible as error:
            return Candidate(
                spec=text, feasible=False, reason=str(error), nearest=error.nearest,
                n_gpus=known.n_gpus,
            )  # fmt: skip
        mesh = spec.mesh
        axes = (mesh.dp, mesh.cfg, mesh.pp, mesh.ring, mesh.ulysses)
        choices = placements(self.request.topology, built.schedule.world_size, axes)
        peak, misfits, fitting = self._memory(built.memory, choices)
        metric = self.request.goal.quality_metric
        lost = self.request.quality.of(spec, self.request.profile, workload, metric)
        base = Candidate(
            spec=text,
            feasible=True,
            quality=None if lost is None else lost.loss,
            quality_source=None if lost is None else lost.said,
            n_gpus=known.n_gpus,
            synchronous_steps=known.synchronous_steps,
            exact=known.exact,
            max_staleness_steps=built.schedule.graph.staleness(),
            peak_memory_bytes=peak,
            comm_bytes_per_gpu=round(built.received_bytes()),
            placement=choices[0],
        )
        if misfits is not None:
            self.misfits.append((peak, text))
            near = next(remedied(text, self._fits), None) if self.request.specs else None
            base = replace(base, nearest=near)
            misfits += f"; nearest: {near}" if near else ""
        reason = misfits or self._unwanted(base)
        if reason is not None:
            return replace(base, feasible=False, reason=reason)
        if self.request.top is not None:
            models = [d for d in self.runs.devices_by_model.values() if d < self.request.gpus]
            bound_s = least_latency_s(
                built.schedule, self.runs.costs, self.runs.wire, fitting, models
            )
            value, merit = self._least_value(base, spec, bound_s), _merit(base, bound_s)
            if self.incumbents.rule_out(value, merit, exact=known.exact):
                why = (
                    f"takes at least {bound_s:.3g} s: behind the {self.request.top} that are shown"
                )
                return replace(base, bound_s=bound_s, pareto=False, reason=why)
        self.choices[text] = fitting
        run = self.found[text] = self.runs.run(text, fitting[0])
        timed = self._timed(base, spec, run)
        value, merit = self._counts(timed) * run.latency_s, _merit(timed, run.latency_s)
        self.incumbents.add(value, merit, exact=known.exact)
        if self.incumbents.wanted(value, exact=known.exact):
            timed = self._with_links_only(timed, run)
        if self._least(timed, run) < self.incumbents.first:
            self.runs.kept[text] = built
        return timed

    def _least_value(self, base: Candidate, spec: Spec, bound_s: float) -> float:
        """What a latency of ``bound_s`` counts in the objective at least; nothing is known of requests
        that follow each other through the ranks."""
        objective, each_s = self.request.goal.objective, bound_s / spec.mesh.dp
        if objective != "latency" and spec.strategy.streams:
            return 0.0
        gpus = base.n_gpus or 1
        return {"latency": bound_s, "throughput": each_s, "cost": gpus * each_s}[objective]

    def _counts(self, c: Candidate) -> float:
        return c.weight(self.request.goal.objective)

    def _least(self, c: Candidate, run: Run) -> float:
        """What ``c`` would count in the objective without waiting and exposed communication."""
        waits_s = run.breakdown.communication_s + run.breakdown.bubble_s
        return self._counts(c) * (run.latency_s - waits_s)

    def _fits(self, text: str) -> bool:
        try:
            memory = self.runs.built(text).memory
        except Infeasible:
            return False
        return self._memory(memory, [tuple(range(len(memory)))])[1] is None

    def made_to_fit(self) -> list[Candidate]:
        """Where nothing fits as it is: what does with its weights offloaded, sharded or in fp8.

        Of the NEAREST that need least, as building every variant of a large schedule takes seconds.
        """
        near = [text for _, text in sorted(self.misfits)[:NEAREST]]
        return [self.candidate(spec) for text in near for spec in remedied(text, self._fits)]

    def what_fitting_costs(self, ranked: Sequence[Candidate]) -> Iterator[str]:
        """Seconds that the first pays for weights that are elsewhere: against the run without."""
        parts = ranked[0].spec.split(",") if ranked else []
        places = [part for part in parts if part.partition("=")[0] in PLACES]
        if places:
            plain = ",".join(part for part in parts if part not in places)
            run = self.runs.run(plain, ranked[0].placement or ())
            more = (ranked[0].latency_s or 0.0) - run.latency_s
            yield (
                f"{','.join(places)} costs {more:.3g} s of each request: {plain} would take"
                f" {run.latency_s:.4g} s if it fitted"
            )

    def what_splitting_saves(self, ranked: Sequence[Candidate]) -> Iterator[str]:
        """Seconds that the first would gain if all of its ranks decoded: its picture stays the same."""
        if not ranked or "vae=" in ranked[0].spec or ranked[0].n_gpus == 1:
            return
        best = ranked[0]
        latency_s = best.latency_s or 0.0
        try:
            together = self.runs.run(f"{best.spec},vae=split", best.placement or ())
        except Infeasible:
            return
        saved = latency_s - together.latency_s
        if saved > NOTABLE * latency_s:
            yield (
                "with vae=split its ranks decode the picture together, which stays the same and comes"
                f" {saved:.2g} s earlier"
            )

    def what_tables_lack(self, ranked: Sequence[Candidate]) -> Iterator[str]:
        """Collectives of the first two whose sizes were not measured, though other sizes were."""
        sizes: dict[CollectiveTable, list[int]] = {}
        for c in ranked[:2]:
            schedule, placement = self.runs.built(c.spec).schedule, c.placement or ()
            for op, table in beyond_tables(self.runs.network, schedule, placement):
                sizes.setdefault(table, []).append(table_bytes(op))
        for table, seen in sizes.items():
            least, most = min(seen), max(seen)
            wanted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            yield (
                f"{table.kind} of {wanted} bytes over {table.ranks} GPUs lies outside its measured table"
                f" ({table.sizes_text}): the links decide, scaled to meet it there"
            )

    def _timed(self, base: Candidate, spec: Spec, run: Run) -> Candidate:
        """``base`` with everything that comes from the simulation."""
        split, stages = parts(run.breakdown), run.breakdown.stages
        low, high = (
            sum(seconds * run.factors[part][side] for part, seconds in split.items())
            for side in (0, 1)
        )
        graph, rank = self.runs.built(base.spec).schedule.graph, run.breakdown.rank
        rate = spec.mesh.dp / self._occupied_s(spec, run)
        one_gpu_s = self.baseline.latency_s
        return replace(
            base,
            placement=run.placement,
            latency_s=run.latency_s,
            latency_low_s=low,
            latency_high_s=high,
            speedup=None if one_gpu_s is None else one_gpu_s / run.latency_s,
            compute_s=split["compute"],
            exposed_comm_s=split["comm"],
            bubble_s=split["bubble"],
            host_s=split["host"],
            stages=stages,
            throughput_per_s=rate,
            cost=self._cost(spec.n_gpus, rate),
            cost_reason=no_price(self.price),
            provenance=provenance(self.runs.costs, graph, rank, run.placement[rank]),
        )

    def _occupied_s(self, spec: Spec, run: Run) -> float:
        """Seconds from one request to the next at saturation: the latency, or, where requests follow
        each other through the ranks, what the busiest of them computes."""
        if not spec.strategy.streams:
            return run.latency_s
        return run.latency_s * max(share for _, share in run.breakdown.utilisation)

    def with_better_placements(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, those that could become the first on their best placement."""
        found = {c.spec: c for c in candidates}
        times = {
            c.spec: self._counts(c) * c.latency_s for c in candidates if c.latency_s is not None
        }
        for text in sorted(times, key=lambda text: times[text]):
            run = self.found[text]
            least, first = self._least(found[text], run), min(times.values())
            settled = least > (1 - WORTH) * times[text] or least >= first
            if settled and not self.runs.mixed:
                continue
            slack = SLACK if times[text] == first else 1.0
            best = self._best_placement(text, run, self.choices[text], slack)
            if best is not run:
                self.found[text] = best
                timed = self._timed(found[text], parse_spec(text), best)
                found[text] = self._with_links_only(timed, best)
                times[text] *= best.latency_s / run.latency_s
        return list(found.values())

    def _best_placement(
        self, text: str, first: Run, choices: Sequence[Placement], slack: float
    ) -> Run:
        """The fastest of a run and those of its other placements, of many only the promising ones."""
        best, schedule = first, self.runs.built(text).schedule
        small, others = schedule.world_size <= MAX_GPUS, choices
        if len(choices) > FEW or not small:
            slowest = self.runs.slowest_rank_s(schedule.graph) if self.runs.mixed else None
            limit = TRIES if small else 1
            others = promising(self.runs.wire, schedule, choices, limit, slowest, slack)
        for placement in others:
            other = self.runs.run(text, placement)
            if other.latency_s < best.latency_s * (1 - 1e-9):
                best = other
        return best

    def _cost(self, n_gpus: int, rate: float) -> float | None:
        """USD per request: the GPUs it takes at their share of the box, busy all the time."""
        if self.price.per_hour is None:
            return None
        return self.price.per_hour * n_gpus / len(self.request.topology.gpus) / 3600 / rate

    def _unwanted(self, c: Candidate) -> str | None:
        """Why the goal leaves ``c`` out; None where it does not."""
        goal, stale = self.request.goal, c.max_staleness_steps or 0
        if c.exact:
            return None
        if goal.exact_only:
            return "changes the picture, and --exact-only was asked"
        if goal.max_staleness is not None and stale > goal.max_staleness:
            return f"reads values {stale} steps old, --max-staleness {goal.max_staleness}"
        if goal.max_quality_loss is not None:
            if c.quality is None or c.quality_source is None:
                return (
                    f"no measured {goal.quality_metric} for {self.request.profile.name} at this size and"
                    " number of steps (--max-quality-loss)"
                )
            if c.quality > goal.max_quality_loss:
                return (
                    f"loses {c.quality:.3g} in {goal.quality_metric} ({c.quality_source}),"
                    f" --max-quality-loss {goal.max_quality_loss:g}"
                )
        return None

    def _memory(
        self, used: Sequence[RankMemory], choices: Sequence[Placement]
    ) -> tuple[int, str | None, list[Placement]]:
        """Peak bytes of the fullest rank, why that fits nowhere (None where it does), and where it
        fits."""
        reasons = {
            models: misfit(
                used, [self.runs.gpus[self.runs.devices_by_model[name]] for name in models]
            )
            for models in dict.fromkeys(map(self._models, choices))
        }
        fitting = [p for p in choices if reasons[self._models(p)] is None]
        reason = None if fitting else reasons[self._models(choices[0])]
        return round(max(m.total for m in used)), reason, fitting

    def _models(self, placement: Placement) -> tuple[str, ...]:
        """GPU model of each rank."""
        return tuple(self.request.topology.profiles[device] for device in placement)

    # ------------------------------------------------------------------------------ intervals, basis

    def _with_links_only(self, c: Candidate, run: Run) -> Candidate:
        """``c`` with what the links alone predict, if a measured table has changed its time."""
        transfers = self.runs.built(c.spec).schedule.transfers
        if not any(
            op.kind == "collective" and table_of(self.runs.network, op, run.placement)
            for op, _ in transfers
        ):
            return c
        links_s = self.runs.links_only_s(c.spec, run.placement)
        return replace(c, topology_only_latency_s=links_s)

    # ------------------------------------------------------------------------------ why

    def decided_by(self, ranked: Sequence[Candidate]) -> str:
        """What separates the first from the second, or what measurement would."""
        if not ranked:
            return "nothing can run"
        if len(ranked) == 1:
            return f"{ranked[0].spec} is the only one left"
        first, second = map(self._contender, ranked[:2])
        return separation(first, second, UNITS[self.request.goal.objective])

    def _contender(self, c: Candidate) -> Contender:
        run = self.found[c.spec]
        transfers = [
            (count * op.nbytes, op, tuple(run.placement[rank] for rank in op.ranks))
            for op, count in self.runs.built(c.spec).schedule.transfers
        ]
        return Contender(
            spec=c.spec,
            breakdown=run.breakdown,
            factors=run.factors,
            weight=self._counts(c),
            low_s=c.latency_low_s or 0.0,
            high_s=c.latency_high_s or 0.0,
            largest=max(transfers, key=lambda each: each[0], default=None),
        )


def no_price(price: Price) -> str | None:
    """Why requests on a box of this price have no cost; None where they have."""
    if price.per_hour is not None:
        return None
    return f"{price.source}; --set 'price_per_hour=20 USD' gives it one"


def _notes(request: Request, price: Price) -> Iterator[str]:
    """What the reader should know about how the question was understood."""
    goal = request.goal
    for gpu in map(load_gpu, dict.fromkeys(request.topology.profiles)):
        if gpu.fitted is not None:
            of_all = gpu.fitted.residuals[-1]
            yield (
                f"rates of {gpu.name} are fitted to measured traces: {of_all.n} works are missed by"
                f" {of_all.median:.1%} in the median and {of_all.worst:.1%} at worst, held out by"
                f" {of_all.held_out_median:.1%} and {of_all.held_out_worst:.1%}"
            )
    if not request.specs:
        yield from not_compared(request.profile, request.gpus)
    if goal.max_quality_loss is not None:
        yield (
            f"quality loss is the {METRICS[goal.quality_metric]}, as somebody has measured it on"
            f" {request.profile.name}; what nobody has measured was left out"
        )
    if goal.objective == "cost" and price.per_hour is None:
        yield f"ranked by GPU seconds per request: {no_price(price)}"
    elif goal.objective == "cost":
        yield f"{request.topology.name} is taken at {price.per_hour:g} USD an hour ({price.source})"
