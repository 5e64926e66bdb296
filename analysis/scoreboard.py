"""Predictions against published runs: every row twice, and what that says about the predictor.

*Zero-shot* knows model, box, workload and spec. *Calibrated* also knows the one-GPU latency that the
same source printed. Definitions (docs/validation.md has them in words):

- **error** of a row: predicted / published - 1; absolute percentage errors are pooled over rows;
- **Kendall tau**: within groups of one model, resolution, number of steps, box and runtime, tau-b of all
  pairs of specs of all groups together, (C - D) / sqrt((P - ties published) (P - ties predicted)), where
  latencies within TIE of each other tie;
- **regret**: among the rows of one source, model, resolution, number of steps, box, number of GPUs
  and runtime, the published latency of the spec that is predicted to be first over that of the best,
  minus one. In both, a spec that is there twice has the mean of its rows;
- **duplicates**: rows of one case (warm-up aside, whose labels differ between prints of one figure)
  whose published latencies are within SAME of each other: the first counts.

Only the usable core is scored: several GPUs, a whole run, its own one-GPU run.
"""

from __future__ import annotations

import math
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import combinations
from typing import Any, NamedTuple

from analysis.attribution import Breakdown, attribute
from analysis.intervals import Factors, Part, factors, parts
from analysis.published import (
    Case,
    NotCovered,
    Row,
    Rules,
    box_sizes,
    understand,
    with_possible_warmup,
)
from paradiff.config import find
from paradiff.graph import ScheduleGraph
from paradiff.profiles import Profile, load_profile
from paradiff.strategies import Infeasible, Workload, build, parse_spec
from simulator.costs import CostModel, Runtime, Scope, StageSeconds
from simulator.engine import simulate
from simulator.gpu import load_gpu
from simulator.network import Network
from simulator.one_number import FAR, OTHER_UNIT, calibrated, times_off
from simulator.symmetry import whole
from simulator.topology import load_topology

SCHEMA = "paradiff.validate/1"
TIE = 0.01
SAME = 0.01
RESAMPLES = 2000
TRIALS = 200
NO_WARMUP = re.compile(r"pipefusion=.*warmup=0\b")
Box = tuple[str, tuple[str, ...]]
"""Topology and overrides."""


class Predicted(NamedTuple):
    """Seconds under the row's clock, with the nominal 90 % interval, and where they go."""

    spec: str
    seconds: float
    low_s: float
    high_s: float
    split: Mapping[Part, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One row and its predictions. ``reason`` says why there is none, or why it does not count."""

    row: Row
    case: Case | None = None
    reason: str | None = None
    zero_shot: Predicted | None = None
    calibrated: Predicted | None = None
    counts: bool = False

    @property
    def covered(self) -> bool:
        return self.zero_shot is not None

    @property
    def error(self) -> float:
        """Calibrated over published, minus one; of a row that counts."""
        assert self.calibrated is not None
        return self.calibrated.seconds / self.measured_s - 1

    @property
    def measured_s(self) -> float:
        assert self.row.latency_s is not None
        return self.row.latency_s

    @property
    def note(self) -> str | None:
        """What of the row was not taken at its word."""
        return "; ".join(self.case.notes) if self.case and self.case.notes else None

    def to_json(self) -> dict[str, Any]:
        """The keys of the contract."""
        best = self.calibrated or self.zero_shot
        return {
            "id": self.row["id"],
            "covered": self.covered,
            "reason": self.reason,
            "measured_s": self.row.latency_s,
            "zero_shot_s": self.zero_shot and self.zero_shot.seconds,
            "calibrated_s": self.calibrated and self.calibrated.seconds,
            "low_s": best and best.low_s,
            "high_s": best and best.high_s,
            "spec": best and best.spec,
            "note": self.note,
        }


# -------------------------------------------------------------------------------------- predictions


class _Profiles(dict[str, Profile]):
    def __missing__(self, name: str) -> Profile:
        self[name] = load_profile(find("models", name, ".json"))
        return self[name]


class Predictor:
    """Predicts cases; graphs, boxes and prices are made once."""

    def __init__(self) -> None:
        self.profiles: Mapping[str, Profile] = _Profiles()
        self._graph = lru_cache(maxsize=64)(self._build)
        self._network = cache(self._load)
        self._costs = cache(self._price)
        self._serial = cache(self._one_gpu)

    def _build(self, model: str, workload: Workload, spec: str) -> ScheduleGraph:
        """The schedule; where rows do not divide, that of the nearest picture whose rows do.

        Engines cut the sequence of tokens, we cut rows: 45 rows of 80 tokens for eight GPUs are 80 rows
        of 45, which is the same work. Where neither divides, shares are uneven and the largest decides:
        rows are rounded up.
        """
        parsed, profile = parse_spec(spec), self.profiles[model]
        unit = profile.geometry.scale * profile.geometry.row_multiple
        turned = replace(workload, height=workload.width, width=workload.height)
        rounded = (replace(workload, height=workload.height + more * unit) for more in range(1, 8))
        try:
            return build(parsed, profile, workload)
        except Infeasible as error:
            refused = error
        for other in (turned, *rounded):
            try:
                return build(parsed, profile, other)
            except Infeasible:
                continue
        raise refused

    @staticmethod
    def _load(topology: str, overrides: tuple[str, ...]) -> Network:
        return Network(load_topology(topology, overrides))

    def _price(
        self, model: str, box: Box, dtype: str, runtime: Runtime, attention: str
    ) -> CostModel:
        names = self._network(*box).topology.profiles
        gpus = {name: load_gpu(name) for name in dict.fromkeys(names)}
        devices = [gpus[name] for name in names]
        return CostModel(self.profiles[model], devices, dtype, runtime, attention)

    def costs(self, case: Case, runtime: Runtime) -> CostModel:
        """Uncalibrated prices of a case's work under ``runtime``."""
        box, dtype = (case.topology, case.overrides), case.workload.dtype
        return self._costs(case.model, box, dtype, runtime, case.attention)

    def predict(self, case: Case, one_gpu_s: float | None = None) -> Predicted:
        """The case, calibrated where its one-GPU latency is given: of several specs, the fastest.

        Raises NotCovered where no spec can be built, or the calibration leaves no time for the loop.
        """
        costs = self.costs(case, case.runtime)
        if one_gpu_s is not None:
            costs = self._calibrated(case, costs, one_gpu_s)
        found: list[Predicted] = []
        refused: Infeasible | None = None
        for spec in case.specs:
            run = self._without_warmup if NO_WARMUP.search(spec) else self._run
            try:
                found.append(run(case, costs, spec))
            except Infeasible as error:
                refused = error
        if not found:
            raise NotCovered(str(refused))
        return min(found, key=lambda each: each.seconds)

    def one_gpu(self, case: Case) -> StageSeconds:
        """The one-GPU run that ``case`` is compared with, uncalibrated."""
        same = replace(case, specs=("serial",), n_gpus=1, runtime=case.baseline_runtime, notes=())
        return self._serial(same)

    def _one_gpu(self, case: Case) -> StageSeconds:
        costs = self.costs(case, case.baseline_runtime)
        graph = self._graph(case.model, case.workload, "serial")
        network = self._network(case.topology, case.overrides)
        serial = attribute(simulate(graph, network, costs))
        return StageSeconds(**asdict(serial.stages), host_s=serial.host_s)

    def _calibrated(self, case: Case, costs: CostModel, seconds: float) -> CostModel:
        """``costs`` with the scales that the one-GPU run, under its own runtime, gives."""
        base = self.costs(case, case.baseline_runtime)
        graph = self._graph(case.model, case.workload, "serial")
        try:
            known, _ = calibrated(base, graph, self.one_gpu(case), seconds, case.scope)
        except ValueError as error:
            raise NotCovered(str(error)) from error
        return replace(
            costs,
            device_scale=known.device_scale,
            host_scale=known.host_scale,
            is_calibrated=True,
        )

    def _run(self, case: Case, costs: CostModel, spec: str) -> Predicted:
        graph = self._graph(case.model, case.workload, spec)
        network = self._network(case.topology, case.overrides)
        breakdown = attribute(simulate(graph, network, costs))
        spread = factors(costs, network, whole(graph), range(graph.world_size), breakdown.rank)
        return _under_the_clock(spec, breakdown, spread, case.scope)

    def _without_warmup(self, case: Case, costs: CostModel, spec: str) -> Predicted:
        """A pipeline whose first step already overlaps, on whatever its cache holds.

        A schedule needs a step that fills the cache, so this is T steady steps: T times what one more
        step adds to a run of T with one warm-up step.
        """
        workload, spec = case.workload, spec.replace("warmup=0", "warmup=1")
        longer = replace(case, workload=replace(workload, steps=workload.steps + 1))
        one, more = (self._run(each, costs, spec) for each in (case, longer))
        split = {
            part: s if part in ("text_encoder", "vae") else workload.steps * (more.split[part] - s)
            for part, s in one.split.items()
        }
        seconds = sum(split.values())
        low, high = (seconds * edge / one.seconds for edge in (one.low_s, one.high_s))
        return Predicted(spec.replace("warmup=1", "warmup=0"), seconds, low, high, split)


def _under_the_clock(
    spec: str, breakdown: Breakdown, spread: Mapping[Part, Factors], scope: Scope
) -> Predicted:
    split = parts(breakdown)
    if scope == "denoise":
        del split["text_encoder"]
    if scope != "pipeline":
        del split["vae"]
    low, high = (sum(s * spread[part][side] for part, s in split.items()) for side in (0, 1))
    return Predicted(spec, sum(split.values()), low, high, split)


def score(
    rows: Sequence[Row],
    rules: Rules,
    predictor: Predictor,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """Every row with its predictions, in order; ``progress`` gets (done, total)."""
    scored, sizes = [], box_sizes(rows)
    for done, row in enumerate(rows, 1):
        scored.append(_score(row, rules, predictor, sizes[row.machine]))
        if progress is not None:
            progress(done, len(rows))
    return _without_duplicates(scored)


def _score(row: Row, rules: Rules, predictor: Predictor, box_gpus: int) -> Scored:
    if row.latency_s is None:
        return Scored(row=row, reason="no latency")
    try:
        case = with_possible_warmup(understand(row, rules, predictor.profiles, box_gpus), row)
    except NotCovered as error:
        return Scored(row=row, reason=str(error))
    try:
        zero_shot = predictor.predict(case)
        _check_unit(row, "latency_s", row.latency_s, zero_shot.seconds)
        if not row.is_core:
            reason = "one GPU: not scored" if row.n_gpus == 1 else "no one-GPU run: not scored"
            return Scored(row=row, case=case, zero_shot=zero_shot, reason=reason)
        case, own = _with_baseline(row, case, predictor)
    except NotCovered as error:
        return Scored(row=row, case=case, reason=str(error))
    return Scored(row=row, case=case, zero_shot=zero_shot, calibrated=own, counts=True)


def _with_baseline(row: Row, case: Case, predictor: Predictor) -> tuple[Case, Predicted]:
    """The calibrated prediction, and the case with a note where the one-GPU latency is far from its own.

    Raises NotCovered with the line of a latency that no such GPU has.
    """
    assert row.baseline_s is not None
    try:
        own = predictor.predict(case, row.baseline_s)
    except NotCovered as error:
        raise NotCovered(f"{row.place}: baseline_latency_s: {error}") from None
    one_gpu_s = predictor.one_gpu(case).under(case.scope)
    _check_unit(row, "baseline_latency_s", row.baseline_s, one_gpu_s)
    if times_off(row.baseline_s, one_gpu_s) > FAR:
        note = f"one GPU is predicted to take {one_gpu_s:.3g} s, not {row.baseline_s:g} s"
        case = replace(case, notes=(*case.notes, note))
    return case, own


def _check_unit(row: Row, column: str, published_s: float, predicted_s: float) -> None:
    """Raises NotCovered where a latency is so far off that it is no number of seconds."""
    if times_off(published_s, predicted_s) > OTHER_UNIT:
        raise NotCovered(
            f"{row.place}: {column}: {published_s:g}, where {predicted_s:.3g} s are predicted; allowed:"
            " seconds"
        )


def _without_duplicates(scored: Sequence[Scored]) -> list[Scored]:
    """The same rows; those that print a number once more do not count."""
    seen: dict[Hashable, list[Scored]] = defaultdict(list)
    out = []
    for each in scored:
        if each.case is not None and each.row.is_core:
            key = (_place(each.case), each.case.n_gpus, *_content(each.case))
            twin = next((o for o in seen[key] if _near(o.measured_s, each.measured_s, SAME)), None)
            if twin is not None:
                each = replace(each, counts=False, reason=f"the same run as {twin.row['id']}")
            seen[key].append(each)
        out.append(each)
    return out


def _place(case: Case) -> tuple[Hashable, ...]:
    """Model, resolution, number of steps and box: what latencies are comparable within."""
    return case.model, replace(case.workload, dtype="fp16"), case.topology, case.overrides


def _content(case: Case) -> tuple[Hashable, ...]:
    """What else makes a case, but for the warm-up."""
    specs = tuple(re.sub(r",warmup=\d+", "", spec) for spec in case.specs)
    return specs, case.runtime, case.baseline_runtime


def _near(a: float, b: float, share: float) -> bool:
    return abs(a - b) <= share * max(a, b)


# ------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Numbers of a set of scored rows; NaN where there is nothing to tell."""

    count: int
    median_ape_calibrated: float
    mape_calibrated: float
    median_ape_zero_shot: float
    mape_zero_shot: float
    kendall_tau: float
    mean_regret: float
    max_regret: float
    interval_coverage: float
    interval_width: float


def scores(scored: Iterable[Scored]) -> Scores:
    """The scores of those rows that count."""
    rows = [each for each in scored if each.counts]
    zero_shot = [
        abs(each.zero_shot.seconds / each.measured_s - 1) for each in rows if each.zero_shot
    ]
    losses = list(regrets(rows).values())
    inside, widths = [], []
    for each in rows:
        assert each.calibrated is not None
        inside.append(each.calibrated.low_s <= each.measured_s <= each.calibrated.high_s)
        widths.append((each.calibrated.high_s - each.calibrated.low_s) / each.calibrated.seconds)
    return Scores(
        count=len(rows),
        median_ape_calibrated=median_error(rows),
        mape_calibrated=mean_error(rows),
        median_ape_zero_shot=_median(zero_shot),
        mape_zero_shot=_mean(zero_shot),
        kendall_tau=kendall_tau(rows),
        mean_regret=_mean(losses),
        max_regret=max(losses, default=math.nan),
        interval_coverage=_mean(inside),
        interval_width=_median(widths),
    )


def median_error(rows: Iterable[Scored]) -> float:
    """Median absolute calibrated error of the rows that count."""
    return _median([abs(each.error) for each in rows if each.counts])


def mean_error(rows: Iterable[Scored]) -> float:
    """Mean absolute calibrated error of the rows that count."""
    return _mean([abs(each.error) for each in rows if each.counts])


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class _Choice(NamedTuple):
    """A spec where several can be compared: means over its rows."""

    predicted_s: float
    published_s: float


def _spec(each: Scored) -> tuple[str, int]:
    assert each.case is not None
    assert each.calibrated is not None
    return each.calibrated.spec, each.case.n_gpus


def _choices(
    rows: Sequence[Scored],
    place: Callable[[Scored], Hashable],
    own: Callable[[Scored], Hashable] = _spec,
) -> dict[tuple[str, ...], list[_Choice]]:
    """Ids of the rows of one place -> its specs, or whatever ``own`` tells apart."""
    groups: dict[Hashable, list[Scored]] = defaultdict(list)
    for each in rows:
        groups[place(each)].append(each)
    found = {}
    for members in groups.values():
        specs: dict[Hashable, list[Scored]] = defaultdict(list)
        for each in members:
            specs[own(each)].append(each)
        found[tuple(each.row["id"] for each in members)] = [
            _Choice(
                _mean([each.calibrated.seconds for each in runs if each.calibrated]),
                _mean([each.measured_s for each in runs]),
            )
            for runs in specs.values()
        ]
    return found


def _comparable(each: Scored) -> Hashable:
    assert each.case is not None
    return _place(each.case), each.case.runtime


def kendall_tau(rows: Sequence[Scored]) -> float:
    """Pooled tau-b within groups of one place; see the module docstring."""
    return _tau(_choices(rows, _comparable).values())


def widest_tau(rows: Sequence[Scored]) -> tuple[float, float]:
    """Kendall tau over all pairs of one model, resolution and box, whatever their numbers of steps and
    runtimes: of specs, and of every row by itself."""

    def place(each: Scored) -> Hashable:
        assert each.case is not None
        size = each.case.workload.height, each.case.workload.width
        return each.case.model, size, each.case.topology, each.case.overrides

    def spec(each: Scored) -> Hashable:
        return _spec(each), _comparable(each)

    def row(each: Scored) -> Hashable:
        return each.row["id"]

    specs, single = (_tau(_choices(rows, place, own).values()) for own in (spec, row))
    return specs, single


def _tau(groups: Iterable[Sequence[_Choice]]) -> float:
    agree = pairs = tied_published = tied_predicted = 0
    for specs in groups:
        for one, other in combinations(specs, 2):
            published = _order(one.published_s, other.published_s)
            predicted = _order(one.predicted_s, other.predicted_s)
            pairs += 1
            agree += published * predicted
            tied_published += published == 0
            tied_predicted += predicted == 0
    spread = math.sqrt((pairs - tied_published) * (pairs - tied_predicted))
    return agree / spread if spread else math.nan


def _order(a: float, b: float) -> int:
    """1 where ``a`` is less, -1 where it is more, 0 within TIE."""
    return 0 if _near(a, b, TIE) else (1 if a < b else -1)


def discordant(rows: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """Pairs of rows that tau counts against the prediction, the least apart as published first; of
    a spec with several rows the first stands for all."""
    groups: dict[Hashable, dict[Hashable, Scored]] = defaultdict(dict)
    for each in rows:
        assert each.calibrated is not None
        assert each.case is not None
        groups[_comparable(each)].setdefault((each.calibrated.spec, each.case.n_gpus), each)
    wrong = [
        (one, other)
        for specs in groups.values()
        for one, other in combinations(specs.values(), 2)
        if _order(one.measured_s, other.measured_s)
        * _order(_calibrated_s(one), _calibrated_s(other))
        < 0
    ]
    return sorted(wrong, key=lambda pair: abs(math.log(pair[0].measured_s / pair[1].measured_s)))


def _calibrated_s(each: Scored) -> float:
    assert each.calibrated is not None
    return each.calibrated.seconds


def repeat_spread(rows: Sequence[Scored]) -> tuple[float, int]:
    """Standard deviation of log(latency) from run to run, and on how many pairs it rests: rows that
    are one spec in one place and not one number printed twice, each pair's squared difference over
    two."""
    runs: dict[Hashable, list[float]] = defaultdict(list)
    for each in rows:
        assert each.calibrated is not None
        assert each.case is not None
        key = _comparable(each), each.calibrated.spec, each.case.n_gpus
        runs[key].append(math.log(each.measured_s))
    squares = [(a - b) ** 2 / 2 for own in runs.values() for a, b in combinations(own, 2)]
    return math.sqrt(_mean(squares)) if squares else math.nan, len(squares)


def tau_of_the_truth(rows: Sequence[Scored], spread: float) -> float:
    """Kendall tau that latencies known without error would have against runs that scatter by ``spread``
    (log-normal): the published ones stand for the truth. Mean of TRIALS, seed 0."""
    draw, groups = random.Random(0), list(_choices(rows, _comparable).values())
    trials = [
        _tau(
            [_Choice(s.published_s, s.published_s * math.exp(draw.gauss(0, spread))) for s in specs]
            for specs in groups
        )
        for _ in range(TRIALS)
    ]
    return _mean(trials)


def regrets(rows: Sequence[Scored]) -> dict[tuple[str, ...], float]:
    """Regret of each choice that a source published; keys are the ids of its rows."""

    def place(each: Scored) -> Hashable:
        assert each.case is not None
        return each.row.source, _comparable(each), each.case.n_gpus

    found = {}
    for ids, specs in _choices(rows, place).items():
        if len(specs) > 1:
            best_s = min(spec.published_s for spec in specs)
            found[ids] = min(specs).published_s / best_s - 1
    return found


def one_gpu(scored: Iterable[Scored]) -> dict[str, list[float]]:
    """GPU -> predicted / published - 1 of its one-GPU runs, zero-shot, each published run once.

    Runs are those with rows of their own and the baselines that other rows name.
    """
    known: dict[Hashable, float] = {}
    found: dict[str, list[float]] = defaultdict(list)
    for each in scored:
        if each.case is None or each.zero_shot is None or each.row.n_gpus != 1:
            continue
        key = (_place(each.case), each.case.runtime, each.case.scope)
        if key in known and _near(known[key], each.measured_s, SAME):
            continue
        known[key] = each.measured_s
        found[each.case.gpu].append(each.zero_shot.seconds / each.measured_s - 1)
    return dict(found)


def by_source(scored: Sequence[Scored]) -> dict[str, tuple[Scores, Scores]]:
    """Source -> (its own scores, the scores of all others)."""
    counted = [each for each in scored if each.counts]
    names = sorted({each.row.source for each in counted})
    return {
        name: (
            scores(e for e in counted if e.row.source == name),
            scores(e for e in counted if e.row.source != name),
        )
        for name in names
    }


def clustered_interval(
    scored: Sequence[Scored], statistic: Callable[[Sequence[Scored]], float]
) -> tuple[float, float]:
    """90 % interval of ``statistic`` under resampling of whole sources (RESAMPLES times, seed 0)."""
    clusters: dict[str, list[Scored]] = defaultdict(list)
    for each in scored:
        if each.counts:
            clusters[each.row.source].append(each)
    draw, names = random.Random(0), sorted(clusters)
    if not names:
        return math.nan, math.nan
    drawn = sorted(
        statistic([each for name in draw.choices(names, k=len(names)) for each in clusters[name]])
        for _ in range(RESAMPLES)
    )
    return drawn[int(0.05 * RESAMPLES)], drawn[int(0.95 * RESAMPLES) - 1]


def worst(scored: Iterable[Scored], count: int = 10) -> Iterator[Scored]:
    """The rows that count with the largest absolute logarithmic errors."""
    rows = [each for each in scored if each.counts]
    yield from sorted(rows, key=lambda each: -abs(math.log1p(each.error)))[:count]


def to_json(scored: Sequence[Scored]) -> dict[str, Any]:
    """The contract: schema, rows, summary."""
    total = scores(scored)
    keys = (
        "median_ape_calibrated", "mape_calibrated", "median_ape_zero_shot", "kendall_tau",
        "mean_regret", "max_regret", "interval_coverage",
    )  # fmt: skip
    known = {key: getattr(total, key) for key in keys}
    return {
        "schema": SCHEMA,
        "rows": [each.to_json() for each in scored],
        "summary": {
            "covered": sum(each.covered for each in scored),
            **{key: None if math.isnan(value) else value for key, value in known.items()},
        },
    }
