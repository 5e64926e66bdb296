"""Closed forms of single calls on unit hardware: n ranks on one switch, 1 B/s each way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit_hardware import Graph, UnitCosts, run

from paradiff.graph import ScheduleGraph, traffic
from simulator.collectives import BACKENDS, Lowering, link_bytes
from simulator.network import Network
from simulator.symmetry import whole
from simulator.topology import CollectiveTable, Link, Node, Topology

EXACT = 1e-9


def one_call(call: str, n: int, nbytes: int) -> ScheduleGraph:
    g = Graph(n)
    g.collective(call, "call", range(n), nbytes, "", "out")
    return g.build()


def uniform(n: int, latency_s: float = 0.0) -> Topology:
    return Topology.uniform(n, latency_s=latency_s)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_ring_calls_take_their_outgoing_bytes(n: int) -> None:
    size = 24 * n
    # Each rank sends to its successor at 1 B/s, all at once: seconds = bytes out of a rank.
    for call, seconds in [
        ("all_gather", (n - 1) * size),
        ("reduce_scatter", (n - 1) * size / n),
        ("all_reduce", 2 * (n - 1) * size / n),
        ("broadcast", size),
        ("permute", size),
    ]:
        assert run(one_call(call, n, size)).makespan_s == pytest.approx(seconds, rel=EXACT), call


@pytest.mark.parametrize("n", [2, 4, 8])
def test_all_to_all_sends_a_share_to_each_other_rank(n: int) -> None:
    # n-1 flows of S/n leave each rank over its own 1 B/s link.
    assert run(one_call("all_to_all", n, 16)).makespan_s == pytest.approx(16 * (n - 1) / n)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(
    ("call", "steps"),
    [
        ("all_gather", lambda n: n - 1),
        ("reduce_scatter", lambda n: n - 1),
        ("all_to_all", lambda n: n - 1),
        ("broadcast", lambda n: n - 1),
        ("permute", lambda n: 1),
    ],
)
def test_without_bytes_only_latency_steps_and_fixed_cost_remain(call, n, steps) -> None:
    trace = run(one_call(call, n, 0), uniform(n, latency_s=0.5), UnitCosts(fixed_s=3.0))
    assert trace.makespan_s == pytest.approx(3.0 + 0.5 * steps(n))


def test_small_all_reduce_takes_a_tree_large_a_ring() -> None:
    # n = 16, latency 1: ring 30 steps, tree 2 log2 16 = 8. At 1 byte the latency decides; at
    # 10,000 bytes 2 (n-1)/n S = 18,750 + 30 of the ring against the tree's inner rank. In each of the
    # two mirrored binary trees an inner rank sends S/2 to two children and its parent, so that the
    # best tree takes no less than 1.5 S = 15,000; ranks 1..6 are inner in one and leaf in the other
    # (S/2 up): 2 S = 20,000.
    small, large = one_call("all_reduce", 16, 1), one_call("all_reduce", 16, 10_000)
    assert run(small, uniform(16, 1.0)).makespan_s == pytest.approx(8 + 2 * 1)
    assert run(large, uniform(16, 1.0)).makespan_s == pytest.approx(30 + 18_750)


def test_lowered_bytes_are_those_of_the_cost_algebra() -> None:
    network = Network(uniform(4))
    lowering = Lowering(network, range(4))
    for call in (
        "all_gather",
        "reduce_scatter",
        "all_reduce",
        "all_to_all",
        "broadcast",
        "permute",
    ):
        op = one_call(call, 4, 4000).sections[0].ops[0]
        sent = dict.fromkeys(range(4), 0.0)
        received = dict(sent)
        for flow in lowering.lower(op).flows:
            sent[flow.source] += flow.nbytes
            received[flow.destination] += flow.nbytes
        for rank, (out, into) in traffic(op).items():
            assert (sent[rank], received[rank]) == pytest.approx((out, into)), call


def test_rings_follow_the_machine_not_the_rank_order() -> None:
    # Devices 0, 1 on one switch, 2, 3 on another, one link between. Ranks are placed 0, 2, 1, 3: a
    # ring in rank order crosses the middle four times, one along the machine twice, once each way.
    links = [Link(a=f"gpu{i}", b=f"s{i // 2}", bandwidth_bytes_per_s=1.0) for i in range(4)]
    links.append(Link(a="s0", b="s1", bandwidth_bytes_per_s=1.0))
    gpus = tuple(f"gpu{i}" for i in range(4))
    topology = Topology(
        name="two", gpus=gpus, profiles=("unit",) * 4, nodes=(Node(name="host0", gpus=gpus),),
        links=tuple(links), switches=("s0", "s1"),
    )  # fmt: skip
    network = Network(topology)
    graph = one_call("all_gather", 4, 5)
    crossing = link_bytes(whole(graph).transfers, Lowering(network, (0, 2, 1, 3)))
    assert crossing["s0->s1"] == crossing["s1->s0"] == 3 * 5


def test_a_measured_table_wins_and_contention_remains() -> None:
    # 8 bytes all-gathered by two ranks are 16 gathered: 40 s by the table, 8 s by the model.
    table = CollectiveTable(kind="all_gather", ranks=2, sizes=(16.0,), seconds=(40.0,), source="x")
    plain = uniform(4)
    topology = Topology(
        name="t", gpus=plain.gpus, profiles=plain.profiles, nodes=plain.nodes, links=plain.links,
        switches=plain.switches, collectives=(table,),
    )  # fmt: skip
    one = Graph(4)
    one.op("a", "collective", "all_gather", (0, 1), "a", nbytes=8)
    assert run(one.build(), topology).makespan_s == pytest.approx(40)
    # A table holds what NCCL takes; what the framework adds to a call comes on top: 40 + 7 s.
    assert run(one.build(), topology, UnitCosts(fixed_s=7.0)).makespan_s == pytest.approx(47)
    # Beside a message of 40 bytes on one of its links each gets half until both end at 80.
    both = Graph(4)
    both.op("a", "collective", "all_gather", (0, 1), "a", nbytes=8)
    both.op("b", "p2p", "send", (0, 2), "b", nbytes=40)
    assert run(both.build(), topology).makespan_s == pytest.approx(80)


@pytest.mark.parametrize(
    ("latency_s", "measured_s", "seconds"),
    [
        # Half of what the model says of 8 units (2 + 8): half of it everywhere.
        (2.0, 5.0, {1: 1.5, 4: 3.0, 80: 41.0}),
        # 16 s more, bytes the larger part: they take (26 - 2) / 8 = 3 times as long, latency its 2.
        (2.0, 26.0, {1: 5.0, 4: 14.0, 80: 242.0}),
        # 30 s more, latency the larger part: (58 - 8) / 20 = 2.5 times as long, bytes as they were.
        (20.0, 58.0, {1: 51.0, 4: 54.0, 80: 130.0}),
    ],
)
def test_outside_its_sizes_a_table_is_met_by_the_links(
    latency_s: float, measured_s: float, seconds: dict[int, float]
) -> None:
    """Two ranks gather: one step and the bytes of one rank, of which a table measured 8 units (16
    gathered) of a second each. A single size may lie above or below what a model sends: it is neither a
    latency nor a bandwidth."""
    unit = 10_000
    table = CollectiveTable(kind="all_gather", ranks=2, sizes=(16.0 * unit,), seconds=(measured_s,))
    box = Topology.uniform(2, bandwidth_bytes_per_s=unit, latency_s=latency_s)
    box = replace(box, collectives=(table,))
    took = {m: run(one_call("all_gather", 2, m * unit), box).makespan_s for m in (8, *seconds)}
    assert took == pytest.approx({8: measured_s} | seconds)
    assert run(one_call("all_gather", 2, 0), box).makespan_s == pytest.approx(latency_s)


def test_a_group_of_one_costs_no_wire() -> None:
    for call in (
        "all_gather",
        "all_reduce",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
        "permute",
    ):
        op = one_call(call, 1, 100).sections[0].ops[0]
        lowered = Lowering(Network(uniform(1)), (0,)).lower(op)
        assert (lowered.latency_s, lowered.flows) == (0.0, ()), call


def test_back_ends_differ_in_what_they_hold() -> None:
    assert BACKENDS["nccl"].uses_sms
    assert not BACKENDS["gloo"].uses_sms
