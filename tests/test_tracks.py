"""Links and memory over time: what the engine shares out, what a measured run shows, what files hold."""

from __future__ import annotations

import json
from collections import Counter as Tally
from collections.abc import Collection
from pathlib import Path
from typing import get_args

import pytest
from cases import DIT, graph_of
from shipped import profile
from unit_hardware import Graph, UnitCosts

from analysis.close_up import close_up
from analysis.tracks import (
    NO_LINKS,
    UNWATCHED,
    arrows,
    in_one_process,
    joined,
    levels,
    measured,
    simulated,
)
from paradiff.graph import ScheduleGraph
from paradiff.strategies import Workload, build, parse_spec
from paradiff.trace import (
    Arrow,
    LinkUse,
    Span,
    Trace,
    Tracks,
    read_chrome_trace,
    write_chrome_trace,
)
from simulator.costs import Runtime
from simulator.engine import Flows, simulate
from simulator.memory import at_peak, phase_memory
from simulator.network import Network
from simulator.planner import Request
from simulator.symmetry import quotient, whole
from simulator.topology import Topology, load_topology


@pytest.fixture
def graph() -> ScheduleGraph:
    """Rank 0 sends 4 bytes to rank 1 and 2 bytes to rank 2 at once."""
    g = Graph(3)
    g.compute("net", 0, 1, writes=["x"])
    g.send("long", 0, 1, 4, "x", "y")
    g.send("short", 0, 2, 2, "x", "y")
    return g.build()


def run(graph: ScheduleGraph, devices: Collection[int] | None = None) -> tuple[Trace, Tracks]:
    network, flows = Network(Topology.uniform(3)), list[Flows]()
    trace = simulate(graph, network, UnitCosts(), periodic=False, flows=flows)
    return trace, simulated(flows, network, whole(graph), (), devices)


def test_two_sends_share_a_link_until_the_shorter_is_done(graph: ScheduleGraph) -> None:
    """From 1 s both run at 1/2 B/s; 2 bytes take 4 s; of the 4 bytes 2 are left, alone at 1 B/s until
    7 s. The link of the sender is full all the time, that of rank 1 half full until 5 s."""
    trace, tracks = run(graph)
    assert trace.makespan_s == 7
    found = {c.name: c.points for c in tracks.counters}
    assert found == {
        "gpu0->switch": ((0, 0), (1, 100), (7, 0)),
        "switch->gpu1": ((0, 0), (1, 50), (5, 100), (7, 0)),
        "switch->gpu2": ((0, 0), (1, 50), (5, 0)),
    }
    assert LinkUse("switch->gpu1", "t000/long", 1, 7, 4 / 6) in tracks.links
    assert LinkUse("gpu0->switch", "t000/short", 1, 5, 1 / 2) in tracks.links
    _, narrow = run(graph, devices=[0, 2])
    assert [c.name for c in narrow.counters] == ["gpu0->switch", "switch->gpu2"]


def test_a_measured_run_shows_what_ranks_send_while_their_transfers_run() -> None:
    """Any trace of the graph is one; here every op takes a second, one after another. cfg=2: both ranks
    send their half of the guidance to each other in every step."""
    p, workload = profile("sdxl"), Workload(512, 512, 1, 4)
    graph = build(parse_spec("cfg=2"), p, workload)
    spans = tuple(
        Span(op.name, None if op.step is None else base + op.step, rank, op.stream, op.kind, op.call,
             float(at), float(at), at + 1.0, 1.0, op.nbytes)
        for at, (op, base) in enumerate(graph.instances())
        for rank in op.ranks
    )  # fmt: skip
    tracks = measured(graph, Trace(spans, float(graph.op_count())), p)
    assert tracks.note == UNWATCHED
    swaps = {span.id for span in spans if len(graph_ranks(graph)[span.id]) == 2}
    assert set(tracks.arrows) == {Arrow(op, *pair) for op in swaps for pair in ((0, 1), (1, 0))}
    assert len(swaps) == workload.steps
    latent = 4 * 64 * 64 * 2
    (sends, receives) = (
        next(c for c in tracks.counters if c.name == f"rank 0 {way}")
        for way in ("sends", "receives")
    )
    assert sends.points == receives.points
    assert max(value for _, value in sends.points) == pytest.approx(latent / 1e9)
    assert sum(value > 0 for _, value in sends.points) == workload.steps
    moved = sum(u.bytes_per_s * (u.end_s - u.begin_s) for u in tracks.links)
    assert moved == pytest.approx(2 * 2 * workload.steps * latent)
    peaks = [max(v for _, v in c.points) for c in tracks.counters if c.rank is not None]
    assert peaks == pytest.approx([m.total / 1e9 for m in at_peak(phase_memory(graph, p, "bf16"))])
    together = in_one_process(graph, Trace(spans, float(graph.op_count())), p)
    assert (together.arrows, together.links, together.note) == (tracks.arrows, (), NO_LINKS)
    assert together.counters == tuple(c for c in tracks.counters if c.rank is not None)


def graph_ranks(graph: ScheduleGraph) -> dict[str, tuple[int, ...]]:
    return {each.id: each.op.ranks for each in graph.instances()}


@pytest.mark.parametrize(
    ("spec", "drawn"),
    [
        ("patch=4", 2),
        ("pipefusion=2,ulysses=2,patches=2", 2),
        ("pipefusion=4,ulysses=2,patches=4", 4),
    ],
)
def test_alike_ranks_send_where_those_that_they_stand_for_send(spec: str, drawn: int) -> None:
    """One rank of each kind is drawn, and an arrow between two where the whole graph has one between
    ranks that they stand for."""
    graph = graph_of(DIT, spec)
    schedule = quotient(graph)
    alike = schedule.representative
    assert len(set(alike)) == drawn
    every = {(alike[a.source], alike[a.destination]) for a in arrows(whole(graph))}
    found = arrows(schedule)
    assert {(a.source, a.destination) for a in found} == {(a, b) for a, b in every if a != b}
    ranks = graph_ranks(schedule.graph)
    assert all({a.source, a.destination} <= set(ranks[a.op]) for a in found)


def test_levels_add_up_and_return_to_nothing() -> None:
    assert levels([(1, 3, 0.1), (2, 4, 0.2), (4, 5, 0.2)]) == (
        (0, 0), (1, 0.1), (2, pytest.approx(0.3)), (3, pytest.approx(0.2)), (5, 0),
    )  # fmt: skip


@pytest.mark.parametrize("runtime", get_args(Runtime))
def test_memory_peaks_where_the_planner_says_and_links_carry_what_it_counts(
    runtime: Runtime,
) -> None:
    """Of every rank: the counter's maximum is the peak of ``RankMemory``, which rank 0 has while it
    decodes and the others in the loop; what CUDA graphs work on is there from the start. Of every link:
    the integral of its utilisation is the bytes that cross it over its capacity."""
    request = Request(
        profile=profile("sdxl"), topology=load_topology("pcie8"),
        workload=Workload(512, 512, 1, 6), gpus=4, runtime=runtime,
    )  # fmt: skip
    seen = close_up(request, "cfg=2,distrifusion=2,warmup=2", (0, 1, 2, 3), watched=True)
    peaks = {
        c.rank: max(value for _, value in c.points)
        for c in seen.tracks.counters
        if c.name == "modelled memory"
    }
    assert peaks == pytest.approx({r: m.total / 1e9 for r, m in enumerate(seen.memory)})
    if runtime != "cuda-graph":
        assert [m.phase for m in seen.memory] == ["decode", "denoise", "denoise", "denoise"]
    assert seen.memory[1].vae == 0 < seen.memory[0].vae
    capacity = {r.name: r.capacity_bytes_per_s for r in Network(request.topology).resources}
    for counter in seen.tracks.counters:
        if counter.rank is None:
            ends = [at for at, _ in counter.points[1:]]
            seconds = sum(
                value / 100 * (end - at)
                for (at, value), end in zip(counter.points, ends, strict=False)
            )
            nbytes = seconds * capacity[counter.name]
            assert nbytes == pytest.approx(seen.link_bytes[counter.name], rel=1e-6)
    assert {c.name for c in seen.tracks.counters if c.rank is None} == set(seen.link_bytes)


def test_the_file_has_a_thread_for_each_link_and_counters(
    graph: ScheduleGraph, tmp_path: Path
) -> None:
    """Slices of one thread never overlap; a link that two ops share has two threads; the spans are read
    back as they were."""
    trace, tracks = run(graph)
    path = tmp_path / "trace.json"
    write_chrome_trace(trace, path, tracks)
    assert read_chrome_trace(path) == trace
    events = json.loads(path.read_text())["traceEvents"]
    (box,) = [e["pid"] for e in events if e["ph"] == "M" and e["args"].get("name") == "links"]
    assert box - 1 not in trace.ranks()
    threads = Tally(
        e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == box
    )
    assert threads == {"gpu0->switch": 2, "switch->gpu1": 1, "switch->gpu2": 1}
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in events:
        if e["ph"] == "X":
            rows.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for slices in rows.values():
        assert all(
            a[1] <= b[0] + 1e-6 for a, b in zip(sorted(slices), sorted(slices)[1:], strict=False)
        )
    counters = [e for e in events if e["ph"] == "C"]
    assert {(e["name"], e["pid"]) for e in counters} == {(name, box) for name in threads}
    assert [(e["ts"], e["args"]) for e in counters if e["name"] == "switch->gpu2"] == [
        (0, {"%": 0}), (1e6, {"%": 50}), (5e6, {"%": 0}),
    ]  # fmt: skip


def test_uses_of_one_op_are_joined() -> None:
    uses = [
        LinkUse("a", "x", 0, 2, 3.0),
        LinkUse("a", "x", 4, 5, 3.0),
        LinkUse("b", "x", 0, 1, 1.0),
    ]
    assert joined(uses) == (LinkUse("a", "x", 0, 5, 9 / 5), LinkUse("b", "x", 0, 1, 1.0))
    assert Tracks().links == ()
