"""Queues against closed forms, against Ciw, against the same queue event by event, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.estimates import Estimate, batch_means, mean_interval, steady, upper_bound
from simulator.queueing import (
    Failures,
    Floats,
    Requests,
    Routing,
    Rung,
    Station,
    System,
    _fifo,
    recursion,
    simulate,
)
from simulator.traffic import Traffic

SEEDS, LENGTH, RHO = 200, 10_000, 0.7


def fixed(units: int, seconds: tuple[float, ...], routing: Routing = "shared") -> System:
    """``units`` servers of one GPU; class k takes ``seconds[k]``."""
    rungs = {kind: (Rung(1, (s,)),) for kind, s in enumerate(seconds)}
    station = Station(units_per_node=units, gpus=1, rungs=rungs)
    return System(nodes=1, stations=(station,), routing=routing)


def waits(arrival_s: Floats, service_s: Floats, servers: int) -> Floats:
    """Waits of requests with service times of their own: each is a class of its own."""
    return _fifo(arrival_s, service_s, servers) - arrival_s


# ------------------------------------------------------------------------------------ closed forms

Draw = Callable[[np.random.Generator, int], Floats]


def erlang_c(servers: int, load: float) -> float:
    """P(wait) of M/M/c; B(k) = a B(k-1) / (k + a B(k-1)), C = B / (1 - rho (1 - B))."""
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = load * blocked / (k + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def exponential(rng: np.random.Generator, count: int) -> Floats:
    return rng.exponential(1, count)


def constant(_: np.random.Generator, count: int) -> Floats:
    return np.ones(count)


def two_models(rng: np.random.Generator, count: int) -> Floats:
    """Three quarters take 0.4 s, a quarter 2.8 s: mean 1, second moment 0.12 + 1.96 = 2.08."""
    return np.where(rng.random(count) < 0.75, 0.4, 2.8)


# Mean waits at load rho per server and mean service 1: M/M/1 rho / (1 - rho); M/M/c C(c, c rho) /
# (c (1 - rho)); M/D/1 half of M/M/1; M/G/1 (Pollaczek-Khinchine) lambda E[S^2] / (2 (1 - rho)).
CLOSED_FORMS: dict[str, tuple[int, Draw, float]] = {
    "M/M/1": (1, exponential, RHO / (1 - RHO)),
    "M/M/4": (4, exponential, erlang_c(4, 4 * RHO) / (4 * (1 - RHO))),
    "M/D/1": (1, constant, RHO / (2 * (1 - RHO))),
    "M/G/1": (1, two_models, RHO * 2.08 / (2 * (1 - RHO))),
}


def covered(intervals: list[Estimate], exact: float) -> float:
    return float(np.mean([(e.low or 0.0) <= exact <= (e.high or 0.0) for e in intervals]))


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_intervals_of_batch_means_cover_the_closed_form(name: str) -> None:
    """Nominally 0.95; batches are not quite independent and 200 seeds not all: 0.90 to 0.98."""
    servers, service, exact = CLOSED_FORMS[name]
    intervals = []
    for seed in range(SEEDS):
        rng = np.random.default_rng((seed, 99))
        arrival_s = np.cumsum(rng.exponential(1 / (RHO * servers), LENGTH))
        intervals.append(batch_means(waits(arrival_s, service(rng, LENGTH), servers)))
    assert 0.90 <= covered(intervals, exact) <= 0.98
    assert np.mean([e.value for e in intervals]) == pytest.approx(exact, rel=0.03)


def test_the_warm_up_of_a_cold_start_is_left_out() -> None:
    """A server that takes 1 s starts idle. 20 gaps of 0.5 s: from each request to the next the wait
    grows by 0.5 s, from 0 to 20 x 0.5 = 10 s. Then gaps of 1 s: it stays there. The first tenth is just
    what is not typical: without it 10 s and no spread, with it (95 + 1800) / 200 = 9.475 s."""
    gaps_s = np.array([0.5] * 20 + [1.0] * 179)
    requests = Requests.at(np.append(0.0, np.cumsum(gaps_s)), np.zeros(200, dtype=np.int64))
    wait_s = recursion(fixed(1, (1.0,)), requests).start_s - requests.arrival_s
    assert wait_s.mean() == pytest.approx(9.475)
    assert steady(wait_s).tolist() == [10.0] * 180
    assert batch_means(wait_s) == Estimate(10.0, 10.0, 10.0)


def test_random_routing_makes_each_server_an_mm1() -> None:
    """A Poisson stream dealt out at random is a Poisson stream at each server (M/D/1 here, S = 1)."""
    system, exact = fixed(4, (1.0,), "random"), RHO / (2 * (1 - RHO))
    traffic = Traffic(shares=(1.0,), rate_per_s=4 * RHO)
    means = []
    for seed in range(60):
        requests = traffic.draw(LENGTH, (seed,))
        served = recursion(system, requests, seed)
        means.append(float(steady(served.start_s - requests.arrival_s).mean()))
    interval = mean_interval(means, 0.999)
    assert interval.low is not None
    assert interval.low <= exact <= (interval.high or 0.0)


def test_a_lone_request_waits_for_the_repair_of_its_node() -> None:
    """Service times near zero, arrivals far apart: an arrival finds the node down with 1 - A, and an
    exponential repair then takes as long again: mean wait (1 - A) R. Up 30, repair 10: 2.5 s."""
    failures = Failures(mtbf_s=30.0, repair_s=10.0)
    system = System(nodes=1, stations=fixed(1, (1e-9,)).stations, failures=failures)
    assert failures.availability == 0.75
    requests = Requests(np.arange(4000) * 200.0, np.zeros(4000, dtype=np.int64))
    served = simulate(system, requests, seed=1)
    interval = batch_means(served.start_s - requests.arrival_s, 0.99)
    assert interval.low is not None
    assert interval.low <= 2.5 <= (interval.high or 0.0)
    assert served.failures == pytest.approx(4000 * 200 / 40, rel=0.05)


def test_one_sided_bound_and_interval() -> None:
    """1, 2, 3: mean 2, standard error 1 / sqrt 3; Student's t with 2 degrees: 4.3027 and 2.9200."""
    two_sided = mean_interval([1.0, 2.0, 3.0])
    assert two_sided.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    assert upper_bound([1.0, 2.0, 3.0]) == pytest.approx(2 + 2.9200 / math.sqrt(3), abs=1e-4)
    assert mean_interval([5.0]) == Estimate(5.0)
    assert upper_bound([5.0]) == 5.0


def test_batch_means_in_closed_form() -> None:
    """200 values: 20 left out, 20 batches of 9. The value k all over batch k: mean 9.5, variance of the
    means (20^2 - 1)/12 x 20/19 = 35, and Student's t with 19 degrees is 2.0930."""
    values = np.concatenate([np.full(20, 1e6), np.repeat(np.arange(20.0), 9)])
    half = 2.0930 * math.sqrt(35 / 20)
    assert batch_means(values) == pytest.approx((9.5, 9.5 - half, 9.5 + half), abs=1e-4)


# ------------------------------------------------------------------------------------ event by event


@pytest.mark.parametrize("routing", ["shared", "round-robin", "random"])
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), units=st.integers(1, 5), pools=st.integers(1, 2))
def test_the_recursion_is_the_event_loop_to_the_bit(
    routing: Routing, seed: int, units: int, pools: int
) -> None:
    """Three classes in one or two stations, loads from idle to overload, continuous and coarse times
    (which make events coincide)."""
    rng = np.random.default_rng(seed)
    seconds = rng.choice([0.25, 0.5, 1.0, 1.75, float(rng.random()) + 0.1], size=3)
    groups = ((0, 1, 2),) if pools == 1 else ((0,), (1, 2))
    system = System(
        nodes=int(rng.integers(1, 4)),
        stations=tuple(
            Station(
                units_per_node=units, gpus=2, rungs={k: (Rung(2, (float(seconds[k]),)),) for k in g}
            )
            for g in groups
        ),
        routing=routing,
    )
    gaps_s = rng.exponential(1 / (units * system.nodes * rng.uniform(0.2, 1.2)), 300)
    arrival_s = np.cumsum(gaps_s if seed % 2 else np.round(gaps_s * 8) / 8)
    requests = Requests.at(arrival_s, rng.integers(0, 3, 300))
    fast, slow = recursion(system, requests, seed), simulate(system, requests, seed)
    for name in ("start_s", "finish_s", "gpus"):
        assert np.array_equal(getattr(fast, name), getattr(slow, name)), name


def test_against_ciw_on_the_same_queue() -> None:
    """Ciw 3, an independent queueing library, fed the same gaps and service times on 3 servers."""
    ciw = pytest.importorskip("ciw", reason="Ciw is not installed (the [dev] extra)")
    rng = np.random.default_rng(5)
    gaps_s, service_s = rng.exponential(0.4, 2000), rng.choice([0.5, 1.0, 2.0], 2000)
    network = ciw.create_network(
        arrival_distributions=[ciw.dists.Sequential([*gaps_s.tolist(), 1e9])],
        service_distributions=[ciw.dists.Sequential(service_s.tolist())],
        number_of_servers=[3],
    )
    simulation = ciw.Simulation(network)
    simulation.simulate_until_max_customers(2000, method="Finish")
    records = sorted(simulation.get_all_records(), key=lambda r: r.arrival_date)[:2000]
    theirs = np.array([record.service_start_date for record in records])
    kinds = np.searchsorted([0.5, 1.0, 2.0], service_s)
    requests = Requests.at(np.cumsum(gaps_s), kinds)
    ours = simulate(fixed(3, (0.5, 1.0, 2.0)), requests)
    assert len(theirs) == 2000
    np.testing.assert_allclose(ours.start_s, theirs, atol=1e-3)  # the grid's microseconds add up
    assert ours.start_s.max() > requests.arrival_s.max()  # there was a queue


# ------------------------------------------------------------------------------------ monotone


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), units=st.integers(1, 4))
def test_no_request_starts_later_with_more_servers_faster_service_or_fewer_arrivals(
    seed: int, units: int
) -> None:
    """Pathwise for first come, first served with one queue (Kiefer-Wolfowitz vectors are monotone)."""
    requests = Traffic(shares=(0.6, 0.4), rate_per_s=1.0).draw(400, (seed,))
    base = recursion(fixed(units, (0.8, 1.6)), requests).start_s
    assert (recursion(fixed(units + 1, (0.8, 1.6)), requests).start_s <= base).all()
    assert (recursion(fixed(units, (0.7, 1.6)), requests).start_s <= base).all()
    slower = Traffic(shares=(0.6, 0.4), rate_per_s=1.0).draw(400, (seed,), load=0.5)
    calm = recursion(fixed(units, (0.8, 1.6)), slower).start_s - slower.arrival_s
    assert (calm <= base - requests.arrival_s + 1e-9).all()


@pytest.mark.parametrize(
    ("better", "worse"), [("shared", "shortest-queue"), ("shortest-queue", "random")]
)
def test_routing_that_knows_more_waits_less(better: Routing, worse: Routing) -> None:
    requests = Traffic(shares=(0.7, 0.3), rate_per_s=3.0).draw(20_000, (3,))
    mean = [
        float((simulate(fixed(4, (0.7, 2.0), r), requests, 3).start_s - requests.arrival_s).mean())
        for r in (better, worse)
    ]
    assert mean[0] < mean[1]


# ------------------------------------------------------------------------------------ by hand

LADDER = {0: (Rung(1, (8.0,)), Rung(2, (5.0,)), Rung(4, (3.0,)))}


def at(times: list[float], kinds: list[int] | None = None) -> Requests:
    return Requests(np.array(times), np.array(kinds or [0] * len(times)))


def test_gpus_dealt_out_are_shared_equally() -> None:
    """Four GPUs. t=0: alone, all four, until 3. t=1, t=2 wait. t=3: two wait, four free: two each,
    until 8. t=4, 5, 6 wait until 8, when two GPUs are free for three: the narrowest, one each, until
    16; then the other two GPUs are free for the one that is left (events at 8 come one by one)."""
    station = Station(units_per_node=1, gpus=4, rungs=LADDER)
    served = simulate(System(nodes=1, stations=(station,)), at([0, 1, 2, 4, 5, 6]))
    assert served.start_s.tolist() == [0, 3, 3, 8, 8, 8]
    assert served.gpus.tolist() == [4, 2, 2, 1, 1, 2]
    assert served.finish_s.tolist() == [3, 8, 8, 16, 16, 13]


def test_a_wide_request_is_not_overtaken() -> None:
    """Two GPUs, one busy until 8; the wide class 1 needs both and waits; so does what came after."""
    rungs = {0: (Rung(1, (8.0,)),), 1: (Rung(2, (5.0,)),)}
    station = Station(units_per_node=1, gpus=2, rungs=rungs)
    served = simulate(System(nodes=1, stations=(station,)), at([0, 1, 2], [0, 1, 0]))
    assert served.start_s.tolist() == [0, 8, 13]


def test_batches_wait_for_company_up_to_the_window() -> None:
    """Batches of up to 2 take 4 s, of one 3 s; window 2 s. The first waits from 0 and is joined at 1:
    full, starts at 1. The third waits from 10 until 12 alone. Class 1 never joins class 0."""
    rungs = {0: (Rung(1, (3.0, 4.0)),), 1: (Rung(1, (3.0, 4.0)),)}
    station = Station(units_per_node=2, gpus=1, rungs=rungs)
    system = System(nodes=1, stations=(station,), max_batch=2, window_s=2.0)
    served = simulate(system, at([0, 1, 10, 10.5], [0, 0, 0, 1]))
    assert served.start_s.tolist() == [1, 1, 12, 12.5]
    assert served.finish_s.tolist() == [5, 5, 15, 15.5]
    assert served.gpus.tolist() == [0.5, 0.5, 1, 1]


def test_what_a_failed_node_did_starts_again_elsewhere() -> None:
    """Every request is served once, whole, and never while its node is down; lost work is counted."""
    station = Station(units_per_node=2, gpus=1, rungs={0: (Rung(1, (4.0,)),)})
    failures = Failures(mtbf_s=40.0, repair_s=15.0)
    system = System(nodes=3, stations=(station,), failures=failures)
    requests = Traffic(shares=(1.0,), rate_per_s=0.6).draw(2000, (4,))
    served = simulate(system, requests, seed=4)
    assert (served.start_s >= requests.arrival_s).all()
    assert (served.finish_s - served.start_s == 4.0).all()
    assert served.failures > 50
    assert 0 < served.lost_gpu_s < 4.0 * 2 * served.failures
    again = simulate(system, requests, seed=4)
    assert np.array_equal(served.start_s, again.start_s)


def test_widths_must_fit_their_unit() -> None:
    with pytest.raises(ValueError, match="widths \\[4\\] on units of 2"):
        Station(units_per_node=1, gpus=2, rungs={0: (Rung(4, (1.0,)),)})
    with pytest.raises(ValueError, match="exactly one station"):
        recursion(fixed(1, (1.0,)), at([0.0], [1]))


# ------------------------------------------------------------------------------------ arrivals


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_as_vllm_bench_defines_burstiness(burstiness: float) -> None:
    """Mean 1 / rate, squared coefficient of variation 1 / burstiness (1 for Poisson)."""
    traffic = Traffic(shares=(1.0,), rate_per_s=5.0, burstiness=burstiness)
    gaps_s = np.diff(traffic.draw(200_000, (1,)).arrival_s)
    assert gaps_s.mean() == pytest.approx(0.2, rel=0.02)
    assert gaps_s.var() / gaps_s.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.05)
