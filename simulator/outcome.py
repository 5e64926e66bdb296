"""What a system does to its traffic: latencies, goodput, utilisation, and whether it keeps its promises.

Runs several replications with random numbers of their own and reports every statistic as its mean over
them with a confidence interval. Knows queues and service levels; no models, boxes and prices.

A system that gets more work than it can do has no steady state: its queue grows as long as one looks.
It is reported as saturated, without latencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from simulator.estimates import WARMUP, Estimate, batch_means, mean_interval, upper_bound
from simulator.queueing import (
    Floats,
    Requests,
    Rung,
    Served,
    Station,
    System,
    serve,
    simulate,
)
from simulator.traffic import Traffic

BACKLOG, UNITS = 2000, 4
"""Requests of the run that measures a rate at saturation, and 20 more for each GPU; its units."""
PILOT_MIN, PILOT_MAX = 2_000, 20_000
"""Requests of a pilot, which drops what clearly fails."""
MAX_LOAD = 0.985
"""Share of the saturation rate above which no promise counts as kept: what a queue does there shows only
in runs of many ten thousand requests, and no one operates there."""
SELDOM = 1e-9
"""Share of requests in an outage that is not worth a word."""
CLEARLY = 0.999
"""Confidence with which the first replications must fail to spare the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """``quantiles``: (share of requests, latency in seconds that they stay below). ``deadlines``: of
    each class, which ``attainment`` of its requests must meet; None where it has none."""

    quantiles: tuple[tuple[float, float], ...] = ()
    deadlines: tuple[float | None, ...] = ()
    attainment: float = 0.99

    @property
    def is_empty(self) -> bool:
        """Whether nothing is promised."""
        return not self.quantiles and not any(self.deadlines)

    @property
    def promises(self) -> tuple[tuple[float, float], ...]:
        """Every (share of requests, seconds within which they are served)."""
        due = (s for s in self.deadlines if s is not None)
        return (*self.quantiles, *((self.attainment, s) for s in due))

    def good_within_s(self, kind: int) -> float | None:
        """Latency up to which a request of a class counts as goodput: its deadline, else the largest
        quantile's limit."""
        deadline = self.deadlines[kind] if self.deadlines else None
        return deadline or (max(self.quantiles)[1] if self.quantiles else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much is simulated: ``requests`` over all ``replications``."""

    requests: int = 50_000
    replications: int = 10
    seed: int = 0
    confidence: float = 0.95

    def at_most(self, requests: int) -> Budget:
        """The same with no more than ``requests``."""
        return replace(self, requests=min(self.requests, requests))

    def pilot(self) -> Budget:
        """A tenth of it, PILOT_MIN to PILOT_MAX requests."""
        return self.at_most(min(max(PILOT_MIN, self.requests // 10), PILOT_MAX))


class Check(NamedTuple):
    """One promise. ``bound``: what the value is below (a share: above) with the asked confidence.
    ``outage``: share of requests that are late as too few nodes are up, seen in a run or not."""

    name: str
    limit: float
    value: float
    bound: float
    met: bool
    outage: float = 0.0

    def text(self, labels: Sequence[str]) -> str:
        """A sentence without its full stop. ``labels``: names of the classes."""
        word = "kept" if self.met else "missed"
        down = f"; {100 * self.outage:.2g} % meet an outage" if self.outage > SELDOM else ""
        if self.name.startswith("deadline "):
            label = labels[int(self.name.removeprefix("deadline "))]
            return (
                f"Deadline of {label} {word}: {100 * self.value:.2f} % in time (at least "
                f"{100 * self.bound:.2f} %; asked {100 * self.limit:g} %{down})"
            )
        return (
            f"{self.name} {word}: {self.value:.3g} s (at most {self.bound:.3g} s; "
            f"asked {self.limit:g} s{down})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Statistics of one system under one traffic; times in seconds, None where it is saturated."""

    saturated: bool
    saturation_per_s: float
    rate_per_s: float
    utilisation: float | None = None
    latency: Estimate | None = None
    wait: Estimate | None = None
    service: Estimate | None = None
    quantiles_s: tuple[tuple[float, Estimate], ...] = ()
    class_quantiles_s: tuple[tuple[tuple[float, float], ...], ...] = ()
    """Of each class: (share, latency); empty for a class without requests."""
    checks: tuple[Check, ...] = ()
    goodput_share: float | None = None
    busy_gpu_s_per_request: float | None = None
    requests: int = 0
    duration_s: float = 0.0
    failures: int = 0

    @property
    def settled(self) -> bool:
        """Whether it is far enough from saturation to say anything about its latencies."""
        return self.rate_per_s <= MAX_LOAD * self.saturation_per_s

    @property
    def met(self) -> bool:
        """Whether every promise is kept."""
        return self.settled and all(check.met for check in self.checks)

    @property
    def kept(self) -> bool:
        """Whether the promises are kept by the estimates themselves, whatever their intervals."""
        above = (
            c.value <= c.limit if c.bound >= c.value else c.value >= c.limit for c in self.checks
        )
        return self.settled and all(above)

    @property
    def tail_s(self) -> float:
        """The highest quantile's latency; infinite where saturated."""
        return self.quantiles_s[-1][1].value if self.quantiles_s else np.inf


class Run(NamedTuple):
    """One replication, its warm-up left out (a trace has none: it began as it begins)."""

    requests: Requests
    served: Served

    @property
    def latency_s(self) -> Floats:
        return self.served.finish_s - self.requests.arrival_s

    @property
    def wait_s(self) -> Floats:
        return self.served.start_s - self.requests.arrival_s

    @property
    def service_s(self) -> Floats:
        return self.served.finish_s - self.served.start_s


def evaluate(
    system: System,
    traffic: Traffic,
    slo: Slo,
    budget: Budget,
    quantiles: Sequence[float] = (0.5, 0.95, 0.99),
    load: float = 1.0,
) -> Outcome:
    """What ``system`` does to ``traffic`` at ``load`` times its rate."""
    rate, limit = traffic.rate_per_s * load, saturation_rate(system, traffic)
    if rate >= limit:
        return Outcome(saturated=True, saturation_per_s=limit, rate_per_s=rate)
    ahead = settling(traffic, rate / limit)
    number = count(traffic, budget, system)
    runs = [replication(system, traffic, budget, i, load, ahead) for i in range(number)]
    checks = _checks(runs, slo, budget.confidence, partial(outage_share, system, traffic, rate))
    return _summary(system, runs, checks, slo, budget, quantiles, rate, limit)


def meets(system: System, traffic: Traffic, slo: Slo, budget: Budget) -> bool:
    """Whether ``system`` keeps its promises: ``evaluate(...).met``, given up as soon as the
    replications so far (of a pilot first) clearly fail."""
    limit = saturation_rate(system, traffic)
    if traffic.rate_per_s > MAX_LOAD * limit:
        return False
    outage = partial(outage_share, system, traffic, traffic.rate_per_s)
    if any(outage(limit_s) > 1 - share for share, limit_s in slo.promises):
        return False
    ahead = settling(traffic, traffic.rate_per_s / limit)
    number = count(traffic, budget, system)
    pilot = budget.pilot()
    stages = [pilot, budget] if number > 1 and 2 * pilot.requests <= budget.requests else [budget]
    for stage in stages:
        runs: list[Run] = []
        for i in range(number):
            runs.append(replication(system, traffic, stage, i, ahead=ahead))
            if len(runs) > 2 and any(map(_clearly_failed, _checks(runs, slo, CLEARLY, outage))):
                return False
    return all(check.met for check in _checks(runs, slo, budget.confidence, outage))


def _clearly_failed(check: Check) -> bool:
    """Whether the value is beyond the limit by more than its distance to its bound."""
    beyond = abs(check.limit - check.value) > abs(check.bound - check.value)
    return (
        beyond and not check.met and (check.value - check.limit) * (check.bound - check.value) > 0
    )


def count(traffic: Traffic, budget: Budget, system: System) -> int:
    """Replications that differ: one where nothing is random."""
    random = traffic.is_random or system.failures is not None or system.routing == "random"
    return budget.replications if random else 1


def settling(traffic: Traffic, load: float) -> int:
    """Requests to send ahead of a run at ``load`` of saturation, until its beginning is forgotten.

    In heavy traffic that takes in the order of (c_a^2 + c_s^2) / (1 - load)^2 requests, c_a and c_s the
    coefficients of variation of gaps and service times (Whitt, Planning queueing simulations, Management
    Science 35, 1989); c_s is taken as 1. Poisson at load 0.9: 200 requests, at 0.98: 5000.
    """
    return math.ceil((1 / traffic.burstiness + 1) / (1 - min(load, MAX_LOAD)) ** 2)


def replication(
    system: System, traffic: Traffic, budget: Budget, number: int, load: float = 1.0, ahead: int = 0
) -> Run:
    """Replication ``number``, after ``ahead`` requests that do not count; the same one meets the same
    requests on every system."""
    each = max(10, budget.requests // budget.replications)
    requests = traffic.draw(each, (budget.seed, number), load, ahead)
    served = serve(system, requests, seed=budget.seed + 7919 * number)
    if traffic.trace is not None:
        return Run(requests, served)
    first = ahead + int(WARMUP * each)
    kept = Served(
        served.start_s[first:], served.finish_s[first:], served.gpus[first:],
        served.lost_gpu_s * (1 - first / (each + ahead)), served.failures,
    )  # fmt: skip
    return Run(Requests(requests.arrival_s[first:], requests.kinds[first:]), kept)


def _summary(
    system: System, runs: Sequence[Run], checks: Sequence[Check], slo: Slo, budget: Budget,
    quantiles: Sequence[float], rate: float, limit: float,
) -> Outcome:  # fmt: skip
    def mean(values: Sequence[Floats]) -> Estimate:
        if len(runs) == 1:
            return batch_means(values[0], budget.confidence)
        return mean_interval([float(v.mean()) for v in values], budget.confidence)

    latencies = [run.latency_s for run in runs]
    kinds = np.concatenate([run.requests.kinds for run in runs])
    together = np.concatenate(latencies)
    busy_gpu_s = sum(
        float((run.served.gpus * run.service_s).sum()) + run.served.lost_gpu_s for run in runs
    )
    spans_s = [float(r.requests.arrival_s[-1] - r.requests.arrival_s[0]) for r in runs]
    good = [slo.good_within_s(kind) for kind in range(int(kinds.max()) + 1)]
    within = np.array([np.inf if g is None else g for g in good])
    return Outcome(
        saturated=False,
        saturation_per_s=limit,
        rate_per_s=rate,
        utilisation=min(1.0, busy_gpu_s / (system.gpus * sum(spans_s))),
        latency=mean(latencies),
        wait=mean([run.wait_s for run in runs]),
        service=mean([run.service_s for run in runs]),
        quantiles_s=tuple(
            (q, mean_interval([float(np.quantile(v, q)) for v in latencies], budget.confidence))
            for q in quantiles
        ),
        class_quantiles_s=tuple(
            _class_quantiles(together[kinds == kind], quantiles) for kind in range(len(good))
        ),
        checks=tuple(checks),
        goodput_share=None if slo.is_empty else float((together <= within[kinds]).mean()),
        busy_gpu_s_per_request=busy_gpu_s / len(together),
        requests=len(together),
        duration_s=sum(spans_s),
        failures=sum(run.served.failures for run in runs),
    )


def _class_quantiles(
    latency_s: Floats, quantiles: Sequence[float]
) -> tuple[tuple[float, float], ...]:
    return tuple((q, float(np.quantile(latency_s, q))) for q in quantiles if len(latency_s))


def _checks(
    runs: Sequence[Run], slo: Slo, confidence: float, outage: Callable[[float], float]
) -> list[Check]:
    """``outage``: share of requests that are later than so many seconds for want of nodes."""
    checks = []
    for share, limit_s in slo.quantiles:
        values = [float(np.quantile(run.latency_s, share)) for run in runs]
        bound, out = upper_bound(values, confidence), outage(limit_s)
        met = bound <= limit_s and out <= 1 - share
        checks.append(Check(f"p{100 * share:g}", limit_s, float(np.mean(values)), bound, met, out))
    for kind, deadline_s in enumerate(slo.deadlines):
        if deadline_s is None:
            continue
        own = [run.latency_s[run.requests.kinds == kind] for run in runs]
        late = [float((latency > deadline_s).mean()) for latency in own if len(latency)]
        if late:
            bound, out = 1 - upper_bound(late, confidence), outage(deadline_s)
            met = bound >= slo.attainment and out <= 1 - slo.attainment
            value = 1 - float(np.mean(late))
            checks.append(Check(f"deadline {kind}", slo.attainment, value, bound, met, out))
    return checks


# ------------------------------------------------------------------------------------------- outages


def outage_share(system: System, traffic: Traffic, rate_per_s: float, within_s: float) -> float:
    """Share of requests that are not served ``within_s`` seconds as too few nodes are up: a bound from
    below, in the fluid limit, which needs no run that is long enough to see an outage.

    With k of n nodes down (binomial, each down for a share 1 - A of the time) the others serve
    c = (n - k) / n of what n can. Where that is less than what arrives, the queue has grown by
    (rate - c) a when the state has lasted for a, and a request that comes then waits for at least
    (rate - c) a / (n's rate), however soon nodes return. The age of a state is exponential as its length
    is, at k repairs and n - k failures in their mean times. And while no node is up none is served, for
    an exponential time at n repairs. Only what keeps every station of the nodes from serving counts.
    """
    failures, n = system.failures, system.nodes
    if failures is None:
        return 0.0
    rates = [_station_rate(system, station, traffic.shares) for station in system.stations]
    full = max(rate for rate in rates if rate < np.inf)
    down = binom.pmf(np.arange(n + 1), n, 1 - failures.availability)
    share = 0.0
    for k in range(n, -1, -1):
        behind = rate_per_s - full * (n - k) / n
        if behind <= 0:
            break
        leaving = k / failures.repair_s + (n - k) / failures.mtbf_s
        late = math.exp(-leaving * within_s * full / behind)
        if k == n:
            late = max(late, math.exp(-n * within_s / failures.repair_s))
        share += late * float(down[k])
    return share


# --------------------------------------------------------------------------------------- saturation


def saturation_rate(system: System, traffic: Traffic) -> float:
    """Requests per second above which some queue of ``system`` grows without end.

    A station of u units whose requests take the whole unit, shares p_k of them in S_k seconds (of a
    full batch of B: S_k(B) / B), takes u / sum(p_k S_k). Where GPUs are dealt out it is measured, see
    ``_dealt_rate``. Nodes that fail count by their availability.
    """
    up = 1.0 if system.failures is None else system.failures.availability
    return up * min(_station_rate(system, station, traffic.shares) for station in system.stations)


def _station_rate(system: System, station: Station, shares: Sequence[float]) -> float:
    if not any(shares[kind] for kind in station.rungs):
        return np.inf
    if any(len(rungs) > 1 or rungs[0].width < station.gpus for rungs in station.rungs.values()):
        ways = tuple(sorted(station.rungs.items()))
        per_gpu = _dealt_rate(station.gpus, ways, system.max_batch, tuple(shares))
        return system.nodes * station.units_per_node * station.gpus * per_gpu
    work_s = 0.0
    for kind, (rung,) in station.rungs.items():
        batch = min(system.max_batch, rung.largest)
        work_s += shares[kind] * rung.seconds(batch) / batch
    return system.nodes * station.units_per_node / work_s


@lru_cache(maxsize=1024)
def _dealt_rate(
    gpus: int,
    ways: tuple[tuple[int, tuple[Rung, ...]], ...],
    max_batch: int,
    shares: Sequence[float],
) -> float:
    """Requests per second and GPU where requests wait all the time: busy share of the GPUs over GPU
    seconds of a request. GPUs idle where the next request is wider than what a unit has free; of UNITS
    units, as more of them leave less idle."""
    weights = np.zeros(len(shares))
    for kind, _ in ways:
        weights[kind] = shares[kind]
    count = BACKLOG + 20 * gpus * UNITS
    kinds = np.random.default_rng(0).choice(len(shares), size=count, p=weights / weights.sum())
    crowded = System(
        nodes=1,
        stations=(Station(units_per_node=UNITS, gpus=gpus, rungs=dict(ways)),),
        max_batch=max_batch,
    )
    served = simulate(crowded, Requests(np.zeros(count), kinds))
    until_s = float(served.start_s.max())
    busy_s = np.minimum(served.finish_s, until_s) - served.start_s
    busy = float((served.gpus * busy_s).sum()) / (until_s * gpus * UNITS)
    work_gpu_s = served.gpus * (served.finish_s - served.start_s)
    crowd = served.start_s < until_s
    needed = sum(
        p * float(work_gpu_s[(kinds == kind) & crowd].mean()) for kind, p in enumerate(weights) if p
    )
    return float(busy / needed)
