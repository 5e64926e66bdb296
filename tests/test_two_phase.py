"""CoCoDiff's two-phase exchange: bytes by level, time in closed form, what it wins on real boxes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import toys
from shipped import profile
from test_closed_forms import BLOCKS, ROWS, WIDTH, X, exactly

from paradiff.graph import ScheduleGraph, Section
from paradiff.strategies import Infeasible, SpecError, Workload, build, parse_spec
from simulator.collectives import Lowering, link_bytes
from simulator.costs import CostModel
from simulator.engine import simulate
from simulator.gpu import load_gpu
from simulator.network import Network
from simulator.symmetry import whole
from simulator.tailored import tailored_specs
from simulator.topology import Link, Node, Topology, load_topology

PLAIN = toys.plain(BLOCKS, heads=8)
INSIDE_S, ACROSS_S, UPLINK = 3.0, 50.0, 0.25
"""Latency inside a machine, further latency of an uplink (two of them across), its bytes a second."""


def machines(m: int, k: int, local: float = float("inf")) -> Topology:
    """``k`` machines of ``m`` GPUs on an ideal switch each, an uplink from every switch to one more."""
    gpus = tuple(f"gpu{i}" for i in range(m * k))
    own = [Link(a=g, b=f"switch{i // m}", bandwidth_bytes_per_s=local, latency_s=INSIDE_S / 2)
           for i, g in enumerate(gpus)]  # fmt: skip
    up = [Link(a=f"switch{o}", b="spine", bandwidth_bytes_per_s=UPLINK, latency_s=ACROSS_S / 2)
          for o in range(k)]  # fmt: skip
    return Topology(
        name="two-level",
        gpus=gpus,
        profiles=("unit",) * len(gpus),
        nodes=tuple(Node(name=f"host{o}", gpus=gpus[o * m : (o + 1) * m]) for o in range(k)),
        switches=(*(f"switch{o}" for o in range(k)), "spine"),
        links=(*own, *up),
    )


def graph_of(spec: str, steps: int = 1) -> ScheduleGraph:
    return build(parse_spec(spec), PLAIN, Workload(ROWS, WIDTH, 1, steps, 1, "fp16"))


def step_s(spec: str, topology: Topology) -> float:
    costs = CostModel(PLAIN, [load_gpu("unit")] * len(topology.gpus), "fp16")
    runs = [simulate(graph_of(spec, t), topology, costs).makespan_s for t in (2, 4)]
    return (runs[1] - runs[0]) / 2


@pytest.mark.parametrize("spec", ["ulysses=4", "ulysses=4,exchange=2x2"])
def test_bytes_by_level(spec: str) -> None:
    """S bytes a rank in each of 4 L exchanges, m = k = 2: across, m (k-1)/k S leave a machine either
    way; out of a GPU, (n-1)/n S at once and (m-1)/m S + (k-1)/k S in two phases."""
    box, size = machines(2, 2), X / 4
    graph = graph_of(spec)
    ops = tuple(op for s in graph.sections for op in s.ops if op.call == "all_to_all")
    exchanges = replace(graph, sections=(Section("exchanges", 0, 1, 1, ops),))
    found = link_bytes(whole(exchanges).transfers, Lowering(Network(box), range(4)))
    assert found["switch0->spine"] == exactly(4 * BLOCKS * 2 * size / 2)
    leaves = 3 / 4 if spec == "ulysses=4" else 1 / 2 + 1 / 2
    assert found["gpu0->switch0"] == exactly(4 * BLOCKS * leaves * size)


@pytest.mark.parametrize("m", [2, 4])
def test_it_wins_what_the_closed_form_says(m: int) -> None:
    """Two machines, ideal switches inside, n = 2 m.

    Latency a = (m-1) l inside and b = L + m/2 S / B across; flat: n - 1 latencies of a path across,
    then the same bytes over the uplink. A layer's three exchanges go one after another, so the phases
    of Q, K and V overlap where they can: a + 3 b (b > a), O adds a + b; flat: 4 exchanges.
    """
    n = 2 * m
    path, size = INSIDE_S + ACROSS_S, X / n
    drain = m * size / 2 / UPLINK
    inside, across = (m - 1) * INSIDE_S, path + drain
    assert across > inside
    flat = 4 * ((n - 1) * path + drain)
    phases = 2 * inside + 4 * across
    box = machines(m, 2)
    won = step_s(f"ulysses={n}", box) - step_s(f"ulysses={n},exchange={m}x2", box)
    assert won == exactly(BLOCKS * (flat - phases))
    assert won > 0


def test_slow_links_inside_cost_what_they_carry_twice() -> None:
    """Calls alone: (m-1) l + (m-1)/m S / b inside; (k-1) L + (k-1)/k S / B across, of which a machine
    has m on its uplink at once."""
    m, k, local = 4, 2, 2.0
    lowering = Lowering(Network(machines(m, k, local)), range(m * k))
    ops = {op.name.partition("@")[0]: op for s in graph_of("ulysses=8,exchange=4x2").sections
           for op in s.ops if op.call == "all_to_all"}  # fmt: skip
    inside, across = (
        lowering.alone_s(lowering.lower(ops[f"block0.attn/q/{phase}"]))
        for phase in ("inside", "across")
    )
    size = X / (m * k)
    assert inside == exactly((m - 1) * INSIDE_S + (m - 1) / m * size / local)
    assert across == exactly((INSIDE_S + ACROSS_S) + (k - 1) / k * size / UPLINK)


@pytest.mark.parametrize("box", ["nvlink8x8-h100", "pcie8x2"])
def test_it_wins_on_real_boxes(box: str) -> None:
    """PixArt, 16 GPUs on two machines; the planner is offered it."""
    topology, p = load_topology(box), profile("pixart-alpha")
    network, gpus = Network(topology), [load_gpu(name) for name in topology.profiles]
    costs, workload = CostModel(p, gpus), Workload(1024, 1024, 1, 3)

    def seconds(spec: str) -> float:
        return simulate(build(parse_spec(spec), p, workload), network, costs).makespan_s

    assert seconds("ulysses=16,exchange=8x2") < 0.95 * seconds("ulysses=16")
    offered = list(tailored_specs(p, workload, costs, network, 16))
    assert "ulysses=16,exchange=8x2" in offered
    assert "ulysses=16,exchange=8x2,order=v-first" not in offered  # nothing to hide V behind


def test_what_it_needs_is_said() -> None:
    with pytest.raises(SpecError, match="expected ranks x machines such as 8x2"):
        parse_spec("ulysses=4,exchange=two")
    with pytest.raises(SpecError, match="unknown 'exchange'"):
        parse_spec("ring=4,exchange=2x2")
    for spec, nearest in (
        ("ulysses=4,exchange=4x2", "exchange=2x2"),
        ("ulysses=8,exchange=8x1", "exchange=4x2"),
        ("ulysses=2,exchange=1x2", "ulysses=4,exchange=2x2"),
    ):
        with pytest.raises(Infeasible, match="that make the") as caught:
            graph_of(spec)
        assert caught.value.nearest == nearest
