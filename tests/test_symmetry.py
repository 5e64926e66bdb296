"""The quotient of a schedule runs exactly as the whole, or says that it does not."""

from __future__ import annotations

import pytest
from cases import CASES, DIVIDED, IDS, WORKLOAD, graph_of
from hypothesis import given, settings
from hypothesis import strategies as st
from shipped import profile
from toys import transformer
from unit_hardware import Graph, UnitCosts, random_box

from analysis.attribution import attribute
from paradiff.graph import ScheduleGraph
from paradiff.profiles import Profile
from paradiff.strategies import Workload, build, build_alike, parse_spec
from simulator.costs import CostModel
from simulator.engine import simulate
from simulator.gpu import load_gpu
from simulator.memory import at_peak, phase_memory
from simulator.network import Network
from simulator.symmetry import Asymmetric, Quotient, quotient, whole
from simulator.topology import Link, Topology, load_topology

TOY = Workload(height=16, width=4, frames=1, steps=4)
SPECS = (
    "ulysses=4",
    "ring=4",
    "cfg=2,ulysses=2",
    "ulysses=2,ring=2",
    "pipefusion=2,ulysses=2,patches=2,warmup=1",
    "distrifusion=4,warmup=1",
    "data=4",
    "cfg=2,data=2",
    "ulysses=2,weights=hsdp",
    "ulysses=2,offload=text",
)


def toy(spec: str) -> ScheduleGraph:
    return build(parse_spec(spec), transformer(), TOY)


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [("ulysses=4", 1), ("cfg=2,ulysses=2", 1), ("pipefusion=2,ulysses=2,patches=2,warmup=1", 2)],
)
def test_one_rank_of_each_kind(spec: str, kinds: int) -> None:
    """Branches and Ulysses ranks do the same; stages do not. Rank 0 alone decodes, after the last
    transfer, and therefore stands for the others."""
    assert len(quotient(toy(spec)).ranks) == kinds


def test_ends_of_a_chain_differ_from_its_middle() -> None:
    """Four ranks that send to the next: 0 receives nothing, 3 sends nothing, and 1 hears from one that
    hears from nobody, 2 from one that hears from somebody. All four are told apart."""
    g = Graph(4)
    for rank in range(4):
        g.compute("a", rank, 1, writes=["x"])
    for rank in range(3):
        g.send(f"s{rank}", rank, rank + 1, 1, "x", "y")
    assert quotient(g.build()).ranks == (0, 1, 2, 3)


@pytest.mark.parametrize("model", ["pixart-alpha", "sdxl"])
@pytest.mark.parametrize("box", ["pcie8", "nvlink8-h100"])
def test_the_quotient_runs_as_the_whole(model: str, box: str) -> None:
    """Bit for bit: the makespan, the critical rank and its split; peak memory of every rank."""
    p, topology = profile(model), load_topology(box)
    sizes = {key: p.defaults[key] for key in ("height", "width", "frames")}
    network, costs = Network(topology), CostModel(p, (load_gpu(topology.profiles[0]),) * 8, "bf16")
    specs = {
        "pixart-alpha": ("cfg=2,ulysses=4", "pipefusion=4,ulysses=2,patches=4,warmup=1", "ring=8"),
        "sdxl": ("cfg=2,distrifusion=4,warmup=2", "cfg=2,patch=2", "parastep=4,warmup=2", "data=8"),
    }[model]
    for spec in specs:
        graph = build(parse_spec(spec), p, Workload(**sizes, steps=4))
        small = quotient(graph)
        one, other = (simulate(each, network, costs) for each in (graph, small))
        assert other.makespan_s == one.makespan_s, spec
        a, b = attribute(one), attribute(other)
        assert (a.rank, a.stages, a.exposed_s) == (b.rank, b.stages, b.exposed_s), spec
        assert (a.compute_s, a.host_s, a.bubble_s) == (b.compute_s, b.host_s, b.bubble_s), spec
        peaks = [max(m.total for m in at_peak(phase_memory(g, p, "bf16"))) for g in (graph, small)]
        assert peaks[0] == peaks[1], spec


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), spec=st.sampled_from(SPECS))
def test_on_any_box_it_is_exact_or_refused(seed: int, spec: str) -> None:
    """Random links, bridges and staging; alike ranks may sit on unlike links."""
    box, graph = random_box(seed), toy(spec)
    if graph.world_size > len(box.gpus):
        return
    costs, network = UnitCosts(unit_s=1e-3), Network(box)
    try:
        found = simulate(quotient(graph), network, costs).makespan_s
    except Asymmetric:
        return
    assert found == pytest.approx(simulate(graph, network, costs).makespan_s, rel=1e-11)


def test_unlike_links_are_refused() -> None:
    """Two pairs exchange 4 B, one over 1 B/s and one over 2 B/s: 4 s and 2 s, so no quotient."""
    g = Graph(4)
    for a in (0, 2):
        g.collective("all_gather", f"g{a}", (a, a + 1), 4, "", "y")
    graph = g.build()
    links = [(0, 1, 1.0), (2, 3, 2.0), (1, 2, 1.0)]
    even = Topology.uniform(4)
    uneven = Topology(
        name="uneven",
        gpus=even.gpus,
        profiles=even.profiles,
        nodes=even.nodes,
        links=tuple(
            Link(a=f"gpu{a}", b=f"gpu{b}", bandwidth_bytes_per_s=rate, kind="nvlink")
            for a, b, rate in links
        ),
    )
    assert simulate(quotient(graph), even, UnitCosts()).makespan_s == 4.0
    with pytest.raises(Asymmetric):
        simulate(quotient(graph), uneven, UnitCosts())


@pytest.mark.parametrize(
    "spec", ["data=3", "cfg=2,data=2", "pipefusion=2,patches=2,warmup=1,data=2", "ulysses=2,data=2"]
)
def test_replicas_are_copies(spec: str) -> None:
    """Building one replica and copying it is building all: as long, as large, the same transfers."""
    parsed = parse_spec(spec)
    alone = parse_spec(",".join(i for i in spec.split(",") if "data" not in i) or "serial")
    toy_model: Profile = transformer()
    graph = build(parsed, toy_model, TOY)
    copied = quotient(build(alone, toy_model, TOY)).copies(parsed.degree("data"))
    built = quotient(graph)
    assert copied.world_size == built.world_size == graph.world_size
    key = {(op.call, op.nbytes, op.ranks): n for op, n in whole(graph).transfers}
    assert key == {(op.call, op.nbytes, op.ranks): n for op, n in copied.transfers}
    box, costs = Topology.uniform(graph.world_size), UnitCosts(unit_s=1e-3)
    makespans = {simulate(each, box, costs).makespan_s for each in (graph, built, copied)}
    assert len(makespans) == 1
    peaks = [
        [m.total for m in at_peak(phase_memory(g, toy_model, "bf16"))] for g in (graph, copied)
    ]
    assert max(peaks[0]) == max(peaks[1])


def known(model: Profile, spec: str, workload: Workload = WORKLOAD) -> Quotient | None:
    """What the mesh says of alike ranks."""
    found = build_alike(parse_spec(spec), model, workload)
    return None if found is None else Quotient(*found)


def transfers(schedule: Quotient) -> dict[tuple[object, ...], int]:
    return {(op.kind, op.call, op.nbytes, op.ranks): n for op, n in schedule.transfers}


def check_stands_for(small: Quotient, graph: ScheduleGraph, model: Profile) -> None:
    """As long, to the last bit, as full, and the same transfers as often."""
    box, costs = Topology.uniform(graph.world_size), UnitCosts(unit_s=1e-3, host_s=1e-4)
    assert small.world_size == graph.world_size
    assert transfers(small) == transfers(whole(graph))
    assert simulate(small, box, costs).makespan_s == simulate(graph, box, costs).makespan_s
    peaks = [max(m.total for m in at_peak(phase_memory(g, model, "bf16"))) for g in (graph, small)]
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(("model", "spec"), CASES, ids=IDS)
def test_what_the_mesh_says_is_what_refinement_finds(model: Profile, spec: str) -> None:
    """One of each kind, written without the others, is the quotient of the whole graph. It may be of
    fewer ranks: where the latent is gathered after the loop, by some of a kind, these are told apart."""
    small = known(model, spec)
    if small is None:
        return
    graph = graph_of(model, spec)
    refined = quotient(graph)
    assert set(small.ranks) <= set(refined.ranks)
    if small.ranks == refined.ranks and "data" not in spec:
        assert small == refined
    check_stands_for(small, graph, model)


@settings(max_examples=40)
@given(
    tp=st.sampled_from([1, 2]), u=st.sampled_from([1, 2]), r=st.sampled_from([1, 2]),
    cfg=st.sampled_from([1, 2]), dp=st.sampled_from([1, 2]), seed=st.integers(0, 10**6),
    strategy=st.sampled_from(
        [("", 1), ("cache=2", 1), ("streambatch=2", 2), ("parastep=2,warmup=1", 2),
         ("pipefusion=2,patches=4", 2), ("pipefusion=4,patches=2", 4)]
    ),
)  # fmt: skip
def test_one_of_each_kind_in_any_product(
    tp: int, u: int, r: int, cfg: int, dp: int, seed: int, strategy: tuple[str, int]
) -> None:
    """On equal links exactly, on random ones exactly or refused. A kind for each stage or group."""
    rest, kinds = strategy
    axes = {"cfg": cfg, "data": dp, "tensor": tp, "ulysses": u, "ring": r}
    parts = [f"{axis}={n}" for axis, n in axes.items() if n > 1] + [rest] * (rest != "")
    spec = ",".join(parts) or "serial"
    small = known(DIVIDED, spec)
    if small is None:
        assert tp * u * r * cfg * dp == 1
        return
    assert len(small.ranks) == kinds
    graph = graph_of(DIVIDED, spec)
    check_stands_for(small, graph, DIVIDED)
    box, costs = random_box(seed), UnitCosts(unit_s=1e-3)
    if graph.world_size > len(box.gpus):
        return
    network = Network(box)
    try:
        found = simulate(small, network, costs).makespan_s
    except Asymmetric:
        return
    assert found == pytest.approx(simulate(graph, network, costs).makespan_s, rel=1e-11)
