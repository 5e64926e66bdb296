"""Capacity: cuts, memory, the number of nodes against brute force, what is out of reach, saturation."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dying import die_once
from hypothesis import given, settings
from hypothesis import strategies as st
from shipped import profile

from paradiff.config import ConfigError
from paradiff.dependencies import validate
from paradiff.strategies import Workload, build, parse_spec
from simulator import planner
from simulator.capacity import PARTS, Box, Option, Question, answer
from simulator.cuts import dynamic_cuts, static_cuts
from simulator.estimates import upper_bound
from simulator.outcome import (
    Budget,
    Outcome,
    Slo,
    evaluate,
    outage_share,
    replication,
    saturation_rate,
    settling,
)
from simulator.parallel import results
from simulator.queueing import Failures, Rung, Station, System
from simulator.search import Demand, Found, Node, OutOfReach, Search
from simulator.service import Job, Service, services, side_by_side
from simulator.topology import load_topology
from simulator.traffic import RequestClass, Traffic, load_mix, load_trace, parse_mix, traffic_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import check_search

SMALL = Budget(requests=1500, replications=5)


def service(model: str, width: int, seconds: float, gigabytes: float = 1.0) -> Service:
    return Service(
        model=model, width=width, spec=f"ulysses={width}", batch_s=(seconds,), low=0.8, high=1.3,
        exact=True, provenance="analytic", resident_bytes=gigabytes * 1e9, transient_bytes=1e9,
    )  # fmt: skip


def table(*times: Mapping[int, float], gigabytes: float = 1.0) -> tuple[dict[int, Service], ...]:
    """One mapping of width to seconds a class."""
    return tuple(
        {w: service(f"m{k}", w, s, gigabytes) for w, s in each.items()}
        for k, each in enumerate(times)
    )


SHORT, LONG = {1: 1.0, 2: 0.7, 4: 0.6}, {1: 8.0, 2: 4.4, 4: 2.5}
NODE = Node(gpus=4, machine=4, memory_bytes=80e9)


def demand(rate: float, *quantiles: tuple[float, float], **changes: object) -> Demand:
    base = Demand(
        traffic=Traffic(shares=(0.8, 0.2), rate_per_s=rate),
        slo=Slo(quantiles=quantiles),
        budget=SMALL,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def search(asked: Demand, node: Node = NODE) -> Search:
    return Search(asked, node, table(SHORT, LONG), ("short", "long"))


# ----------------------------------------------------------------------------------------- cuts


def test_static_cuts_of_one_class_are_the_widths() -> None:
    cuts = [cut.text(["m"]) for cut in static_cuts(table(SHORT), 4, 80e9)]
    assert cuts == ["4x1", "2x2", "1x4"]


def test_static_cuts_of_two_classes_are_pools_without_room_to_spare() -> None:
    """Together: three. Apart on four GPUs (short + long): widths 1+1 as 1-3, 2-2, 3-1; 1+2 as 2-1 (one
    GPU beside one pair leaves room for another single); 2+1 as 1-2; 2+2 as 1-1; a 4 leaves nothing."""
    texts = {cut.text(["s", "l"]) for cut in static_cuts(table(SHORT, LONG), 4, 80e9)}
    apart = {"1x1 s + 3x1 l", "2x1 s + 2x1 l", "3x1 s + 1x1 l", "2x1 s + 1x2 l", "1x2 s + 2x1 l"}
    assert texts == {"4x1", "2x2", "1x4", "1x2 s + 1x2 l"} | apart


def test_dynamic_cuts_give_longer_classes_no_lower_cap() -> None:
    cuts = list(dynamic_cuts(table(SHORT, LONG), 4, 4, 80e9, (None, None)))
    caps = {tuple(widths[-1] for _, widths in cut.pools[0].widths) for cut in cuts}
    assert caps == {(1, 2), (1, 4), (2, 2), (2, 4), (4, 4)}


def test_a_width_that_alone_misses_the_limit_is_not_dealt_out() -> None:
    cuts = list(dynamic_cuts(table(SHORT, LONG), 4, 4, 80e9, (None, 5.0)))
    assert {cut.pools[0].widths[1][1][0] for cut in cuts} == {2}


def test_models_that_do_not_fit_together_are_put_in_pools() -> None:
    """50 GB each and 1 GB at work: two are 101 GB of 80."""
    heavy = table(SHORT, LONG, gigabytes=50)
    cuts = list(static_cuts(heavy, 4, 80e9))
    assert cuts
    assert all(len(cut.pools) == 2 for cut in cuts)
    assert not list(dynamic_cuts(heavy, 4, 4, 80e9, (None, None)))
    same_model = tuple({w: replace(s, model="m") for w, s in each.items()} for each in heavy)
    assert any(len(cut.pools) == 1 for cut in static_cuts(same_model, 4, 80e9))
    found = Search(demand(1.0, (0.99, 20.0)), Node(4, 4, 40e9), heavy, ("s", "l")).best()
    assert isinstance(found, OutOfReach)
    assert "memory" in found.reason


# ----------------------------------------------------------------------------------------- nodes


@pytest.mark.parametrize("sharing", ["static", "any"])
@pytest.mark.parametrize("limit_s", [4.0, 6.0, 12.0])
@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_the_number_of_nodes_is_that_of_brute_force(
    sharing: str, limit_s: float, rate: float
) -> None:
    """Every cut and every number from one on, evaluated in full; the first number any cut does with."""
    asked = demand(rate, (0.95, limit_s), sharing=sharing)
    found = search(asked).best()
    assert isinstance(found, Found)
    assert found.outcome.met
    every = search(asked)

    def kept(nodes: int) -> bool:
        return any(
            evaluate(every.system(cut, nodes), asked.traffic, asked.slo, asked.budget).met
            for cut in every.cuts
        )

    assert found.nodes == next(nodes for nodes in range(1, 50) if kept(nodes))


def test_with_nothing_left_out_as_many_nodes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes, 136 cuts; ``tools/check_search.py`` asks more, about one constant at a time."""
    found = check_search.question(7, 4000).best()
    for name, (module, values) in check_search.TRIED.items():
        monkeypatch.setattr(module, name, values[-1])
    everything = check_search.question(7, 4000).best()
    assert isinstance(found, Found)
    assert isinstance(everything, Found)
    assert found.nodes == everything.nodes
    assert everything.outcome.tail_s <= found.outcome.tail_s


def test_more_traffic_or_a_tighter_level_never_needs_fewer_nodes() -> None:
    def nodes(rate: float, limit_s: float) -> int:
        found = search(demand(rate, (0.95, limit_s), sharing="static")).best()
        assert isinstance(found, Found)
        return found.nodes

    by_rate = [nodes(rate, 6.0) for rate in (0.5, 2.0, 5.0, 9.0)]
    by_limit = [nodes(4.0, limit_s) for limit_s in (20.0, 6.0, 3.0)]
    assert by_rate == sorted(by_rate)
    assert by_limit == sorted(by_limit)
    assert by_rate[0] < by_rate[-1]


def test_a_level_below_the_service_time_is_out_of_reach_by_how_much() -> None:
    """A fifth of the requests are long, so p95 is at least 2.5 s, four GPUs, whatever the number."""
    found = search(demand(1.0, (0.95, 2.0))).best()
    assert isinstance(found, OutOfReach)
    assert "2.5 s with no queue at all, 0.5 s above 2 s" in found.reason
    assert found.nearest is not None
    assert "p95=2.63s would be kept by" in found.nearest
    assert isinstance(search(demand(1.0, (0.75, 2.0))).best(), Found), "p75 is of short requests"


def test_more_nodes_than_allowed_is_said_with_the_least() -> None:
    """4 requests/s keep 4 (0.8 x 1 + 0.2 x 8) = 9.6 GPUs busy: three nodes of four."""
    found = search(demand(4.0, (0.95, 20.0), max_nodes=2, sharing="static")).best()
    assert isinstance(found, OutOfReach)
    assert "keeps 3 nodes busy" in found.reason
    assert found.nearest == "--max-nodes 4"


def test_where_more_nodes_would_do_it_is_said_how_many() -> None:
    """A node of four GPUs has time to spare, but not for a burst: p95 has a wait there."""
    asked = demand(1.0, (0.95, 4.0), sharing="static")
    enough = search(asked).best()
    assert isinstance(enough, Found)
    assert enough.nodes > 1
    found = search(replace(asked, max_nodes=1)).best()
    assert isinstance(found, OutOfReach)
    assert found.reason.startswith("not kept by 1 node: p95 missed: ")
    assert "s; asked 4 s)" in found.reason
    assert found.nearest == f"--max-nodes {enough.nodes}"


def test_where_no_number_would_do_the_level_that_is_kept_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("simulator.search.BEYOND", 1)
    asked = demand(1.0, (0.95, 4.0), sharing="static", max_nodes=1)
    found = search(asked).best()
    assert isinstance(found, OutOfReach)
    assert found.nearest is not None
    kept = re.fullmatch(r"p95=(.*)s would be kept by 1 node", found.nearest)
    assert kept is not None
    level = float(kept[1])
    assert level > 4.0
    again = search(replace(asked, slo=Slo(quantiles=((0.95, level),)))).best()
    assert isinstance(again, Found)


@pytest.mark.parametrize(("share", "nodes"), [(0.9, 1), (0.99, 2), (0.9999, 3)])
def test_a_promise_is_not_kept_by_nodes_that_are_down_together_too_often(
    share: float, nodes: int
) -> None:
    """Up 98 h of 100, any one node is enough, 60 s against repairs of 2 h: n nodes are down together for
    a share of 0.02^n, which no run of a few hours sees: 0.02 is less than 0.1 and more than 0.01; 0.0004
    is less than 0.01 and more than 0.0001; 8e-6 is less."""
    failures = Failures(mtbf_s=98 * 3600.0, repair_s=2 * 3600.0)
    found = search(demand(0.3, (share, 60.0), sharing="static", failures=failures)).best()
    assert isinstance(found, Found)
    assert found.nodes == nodes
    late = 0.02**nodes * math.exp(-nodes * 60 / 7200)
    assert found.outcome.checks[0].outage == pytest.approx(late, rel=1e-6)
    if nodes > 1:
        cut = found.cut
        fewer = search(demand(0.3, (share, 60.0), failures=failures))
        assert fewer.system(cut, nodes - 1).failures is not None
        outcome = evaluate(
            fewer.system(cut, nodes - 1), fewer.demand.traffic, fewer.demand.slo, SMALL
        )
        assert outcome.checks[0].bound < 60, "no run saw it"
        assert not outcome.met


@pytest.mark.parametrize(("nodes", "rate"), [(1, 0.01), (3, 1.5)])
def test_requests_that_meet_an_outage_are_as_many_as_simulated(nodes: int, rate: float) -> None:
    """One unit of a second a node. One node down for a tenth: (1 - A) exp(-L / R) = 0.1 exp(-10 / 100).
    Of three nodes one alone cannot do 1.5 requests/s, nor none: down together for 3 x 0.01 x 0.9 and
    0.001, of which exp(-(2/100 + 1/900) x 10 x 3/0.5) and exp(-3/100 x 10 x 3/1.5), or exp(-0.3), count.
    Two nodes then take long to work off what has come meanwhile: a bound from below, here by far."""
    failures = Failures(mtbf_s=900.0, repair_s=100.0)
    station = Station(units_per_node=1, gpus=1, rungs={0: (Rung(width=1, batch_s=(1.0,)),)})
    system = System(nodes=nodes, stations=(station,), failures=failures)
    traffic = Traffic(shares=(1.0,), rate_per_s=rate)
    share = outage_share(system, traffic, rate, 10.0)
    two, all_down = 0.027 * math.exp(-(2 / 100 + 1 / 900) * 60), 0.001 * math.exp(-0.3)
    exact = {1: 0.1 * math.exp(-0.1), 3: two + all_down}
    assert share == pytest.approx(exact[nodes])
    runs = [
        replication(system, traffic, Budget(requests=60_000, replications=6), i) for i in range(6)
    ]
    late = [float((run.latency_s > 10.0).mean()) for run in runs]
    assert share < upper_bound(late, 0.999)
    assert np.mean(late) < {1: 1.2, 3: 10}[nodes] * share


def test_deadlines_count_their_own_class() -> None:
    slo = Slo(deadlines=(None, 5.0), attainment=0.95)
    found = search(demand(2.0, slo=slo)).best()
    assert isinstance(found, Found)
    (check,) = found.outcome.checks
    assert check.name == "deadline 1"
    assert check.bound >= 0.95


# ----------------------------------------------------------------------------------------- saturation


def test_a_saturated_system_has_no_latency() -> None:
    """4 GPUs, 2.4 s of work a request: 1.667 requests/s."""
    asked = demand(1.7, (0.95, 20.0), sharing="static")
    one = search(asked)
    system = one.system(next(c for c in one.cuts if c.text("sl") == "4x1"), 1)
    assert saturation_rate(system, asked.traffic) == pytest.approx(4 / 2.4)
    outcome = evaluate(system, asked.traffic, asked.slo, SMALL)
    assert outcome.saturated
    assert (outcome.latency, outcome.quantiles_s, outcome.utilisation) == (None, (), None)
    assert not outcome.met
    below = evaluate(system, asked.traffic, asked.slo, SMALL, load=0.9)
    assert not below.saturated
    down = replace(system, failures=Failures(mtbf_s=9.0, repair_s=1.0))
    assert saturation_rate(down, asked.traffic) == pytest.approx(0.9 * 4 / 2.4)


def test_near_saturation_a_run_is_long_enough_to_forget_its_beginning() -> None:
    """M/D/1 at 0.95: 0.95 / (2 x 0.05) = 9.5 services of wait. Runs of 400 requests that began empty
    would say half of it."""
    rung = {0: (Rung(1, (1.0,)),)}
    system = System(nodes=1, stations=(Station(units_per_node=1, gpus=1, rungs=rung),))
    traffic = Traffic(shares=(1.0,), rate_per_s=0.95)
    assert settling(traffic, 0.95) == 800
    budget = Budget(requests=60_000, replications=150, confidence=0.999)
    wait = evaluate(system, traffic, Slo(), budget).wait
    assert wait is not None
    assert wait.low is not None
    assert wait.low < 9.5 < (wait.high or 0.0)
    cold = [replication(system, traffic, budget, i).wait_s.mean() for i in range(150)]
    assert sum(cold) / 150 < 0.8 * 9.5


def test_fewer_requests_ahead_are_the_last_of_more() -> None:
    """The same requests count, at the same distances, so that more nodes never look worse for it."""
    traffic = Traffic(shares=(0.5, 0.5), rate_per_s=2.0, burstiness=0.5)
    many, few = (traffic.draw(50, (3,), ahead=n) for n in (40, 7))
    assert many.kinds[33:].tolist() == few.kinds.tolist()
    shift = many.arrival_s[33] - few.arrival_s[0]
    assert (many.arrival_s[33:] - shift).tolist() == pytest.approx(few.arrival_s.tolist(), abs=1e-4)


def test_gpus_dealt_out_saturate_where_measured_and_no_later_than_their_work_allows() -> None:
    """At saturation everybody takes the narrowest width (but the very first, which is alone): 1 GPU for
    1 s and for 8 s. Where long requests need pairs, a GPU may idle beside a pair that waits."""
    asked = demand(1.0, (0.95, 20.0), sharing="dynamic")
    one = search(asked)
    cut = next(c for c in one.cuts if c.text("sl") == "4 dealt out: s 1-4, l 1-4")
    assert saturation_rate(one.system(cut, 1), asked.traffic) == pytest.approx(4 / 2.4, rel=0.003)
    wide = search(replace(asked, slo=Slo(quantiles=((0.95, 5.0),))))
    cut = next(c for c in wide.cuts if c.text("sl") == "4 dealt out: s 1-2, l 2-4")
    ideal = 4 / (0.8 * 1 + 0.2 * 2 * 4.4)
    assert 0.85 * ideal < saturation_rate(wide.system(cut, 1), asked.traffic) <= ideal


# ----------------------------------------------------------------------------------------- services


def test_services_are_the_planner_s_with_every_replica_of_a_machine_at_work() -> None:
    """With 40 GB/s of host memory two GPUs with strips are faster than one while alone. Four such
    pairs share it and are slower: eight single GPUs serve better, and their time is the planner's."""
    p, box = profile("sdxl"), load_topology("pcie8", ["nodes.0.host_memory=40 GB/s"])
    workload = Workload(height=1024, width=1024, frames=1, steps=6)
    asked = planner.Request(
        profile=p, topology=box, workload=workload, gpus=2, specs=("serial", "patch=2", "cfg=2")
    )
    alone_s = {c.spec: c.latency_s or 0.0 for c in planner.plan(asked).ranked}
    job = Job(
        profile=p, topology=box, workload=workload, widths=(1, 2), specs=("serial", "patch=2"),
        max_batch=2,
    )  # fmt: skip
    strips = services(job).by_width
    assert alone_s["patch=2"] < alone_s["serial"]
    assert (strips[1].spec, strips[2].spec) == ("serial", "serial")
    assert strips[1].batch_s[0] == pytest.approx(alone_s["serial"])
    assert strips[1].batch_s[1] == pytest.approx(
        2 * strips[1].batch_s[0], rel=0.05
    )  # 1024 px fill it
    branches = services(replace(job, specs=("serial", "cfg=2"), max_batch=1)).by_width[2]
    assert branches.spec == "cfg=2"
    assert alone_s["cfg=2"] < branches.batch_s[0] < alone_s["serial"]


def test_side_by_side_is_a_valid_graph_of_the_same_ops() -> None:
    p = profile("pixart-alpha")
    workload = Workload(height=512, width=512, frames=1, steps=4)
    graph = build(parse_spec("cfg=2,pipefusion=2,patches=4"), p, workload)
    twice = side_by_side(graph, 2)
    validate(twice)
    assert (twice.world_size, twice.op_count()) == (8, 2 * graph.op_count())
    assert twice.peak_bytes()[5] == graph.peak_bytes()[1]


def test_progress_goes_up_to_all_of_it_one_by_one() -> None:
    """Two boxes: service times of one class on each, then a search and five parts of each that has a
    cut; the box that cannot hold the model is done with at once."""
    box, small = load_topology("pcie8", []), load_topology("pcie4-t4", [])
    p, entry = profile("flux1-dev"), parse_mix(["flux1-dev"])
    asked = Question(
        boxes=tuple(
            Box(topology=b, gpus=1, price_per_hour=1.0, price_source="") for b in (box, small)
        ),
        classes=entry, profiles=(p,), workloads=(Workload(512, 512, 1, 2),),
        demand=replace(demand(0.1, (0.95, 60.0)), traffic=traffic_of(entry, 0.1, 1.0, None)),
        specs=("serial",),
    )  # fmt: skip
    seen: list[tuple[int, int]] = []
    found = answer(asked, 1, lambda done, total: seen.append((done, total)))
    assert [option.cut is None for option in found.options] == [False, True]
    total = 2 + 2 * (1 + len(PARTS))
    assert {of for _, of in seen} == {total}
    steps = [done for done, _ in seen]
    assert steps == [*range(1, total - len(PARTS) + 1), total]


def test_results_survive_dying_workers(tmp_path: Path) -> None:
    """Each input kills its worker the first time it is seen; every result arrives all the same."""
    inputs = [(i, str(tmp_path / str(i))) for i in range(2)]
    assert dict(results(die_once, inputs, 2)) == {0: 0, 1: 1}


# ----------------------------------------------------------------------------------- money, traffic


def test_money() -> None:
    """2 nodes at 9.12 USD an hour: 18.24 an hour, 13,315.20 a month of 730 hours. 3600 requests of two
    images an hour: 18.24 / 7.2 USD per 1000. 300 W for 12 s of GPU: 1 Wh a request, half an image."""
    box = load_topology("pcie8")
    outcome = Outcome(
        saturated=False, saturation_per_s=2.0, rate_per_s=1.0, busy_gpu_s_per_request=12.0
    )
    option = Option(
        box=Box(topology=box, gpus=8, price_per_hour=9.12, price_source=""),
        nodes=2, outcome=outcome, tdp_w=300.0,
    )  # fmt: skip
    assert option.cost_per_month == pytest.approx(13315.20)
    assert option.cost_per_1000_images(2.0) == pytest.approx(18.24 / 7.2)
    assert option.energy_wh_per_image(2.0) == pytest.approx(0.5)


def test_mix_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(
        "models:\n  - {model: sdxl, weight: 3, height: 512, deadline: 8 s}\n"
        "  - {model: sdxl, name: big, steps: 30}\n"
    )
    assert load_mix(file) == parse_mix(["sdxl:3,height=512,deadline=8s", "sdxl,name=big,steps=30"])
    assert traffic_of(load_mix(file), 1.0).shares == (0.75, 0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column arrival_s"),
        ("arrival_s\n", "0 arrivals"),
        ("arrival_s\n1\n", "1 arrivals"),
        ("arrival_s\n1\n3\n2\n", "trace.csv:4: arrival_s goes back"),
        ("arrival_s\n1\nsoon\n", "trace.csv:3: arrival_s is not a number"),
        ("arrival_s\n1\ninf\n", "trace.csv:3: arrival_s is not a number"),
        ("arrival_s,model\n1,sdxl\n2,sd15\n", "trace.csv:3: model is not in the mix"),
        ("arrival_s,model\n1,sdxl\n2\n", "trace.csv:3: model is not in the mix"),
        ("time\n1\n", "no column arrival_s"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_trace(file, [RequestClass(model="sdxl")])


@settings(max_examples=20)
@given(gaps=st.lists(st.floats(0.001, 100.0), min_size=2, max_size=30))
def test_a_trace_is_replayed(tmp_path_factory: pytest.TempPathFactory, gaps: list[float]) -> None:
    times = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    file = tmp_path_factory.mktemp("t") / "trace.csv"
    file.write_text("model,arrival_s\n" + "".join(f"sdxl,{t!r}\n" for t in times))
    trace = load_trace(file, [RequestClass(model="sdxl")])
    traffic = traffic_of([RequestClass(model="sdxl")], trace=trace)
    assert traffic.draw(5, (0,)).arrival_s.tolist() == pytest.approx(times, abs=1e-6)
    assert traffic.draw(5, (0,), load=2.0).arrival_s[-1] == pytest.approx(times[-1] / 2, abs=1e-6)
    assert traffic.rate_per_s == pytest.approx(len(gaps) / times[-1])
    assert not traffic.is_random
    assert math.isclose(sum(traffic.shares), 1.0)
