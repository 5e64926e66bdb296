"""The engine against closed forms in unit hardware, an independent recurrence, and an oracle."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_hardware import Graph, UnitCompute, UnitCosts, run

from paradiff.dependencies import Dependencies
from paradiff.graph import ScheduleGraph, Work
from paradiff.trace import Span, Trace
from simulator.engine import simulate
from simulator.topology import Topology


def spans(trace: Trace) -> dict[tuple[str, int], Span]:
    return {(span.id, span.rank): span for span in trace.expanded().spans}


# ------------------------------------------------------------------------------------------- patterns


def ring_attention(n: int, chunks: list[tuple[int, int]]) -> ScheduleGraph:
    """Per ring step i: attend ``chunks[i][0]`` seconds while the block moves ``chunks[i][1]`` bytes.

    Two buffers take turns: a block arrives where the block before the present one was.
    """
    g = Graph(n)
    for r in range(n):
        g.compute("qkv", r, 0, writes=["even"])
    for i, (seconds, nbytes) in enumerate(chunks):
        here, there = ("odd", "even") if i % 2 else ("even", "odd")
        if i < len(chunks) - 1:
            g.collective(
                "permute", f"rotate{i}", range(n), nbytes, f"{here}#{i}", f"{there}#{i + 1}"
            )
        for r in range(n):
            g.compute(f"attend{i}", r, seconds, reads=[f"{here}#{i}"])
    return g.build()


def pipefusion(stages: int, patches: int, steps: int, tau: list[int], hop: int) -> ScheduleGraph:
    """Asynchronous steps only: patch p of step t goes through the stages, then back to stage 0."""
    g = Graph(stages)
    last = stages - 1

    def one_step(first: bool) -> None:
        for p in range(patches):
            for d in range(stages):
                source = f"x{p}@r0" if d == 0 else f"z{p}@r{d}"
                out = f"y{p}@r{last}#1" if d == last else f"h{p}@r{d}"
                g.compute(
                    f"p{p}", d, tau[d], reads=[] if first and d == 0 else [source], writes=[out]
                )
                if d < last:
                    g.send(f"hop{p}.{d}", d, d + 1, hop, f"h{p}", f"z{p}")
        for p in range(patches):  # back to stage 0, for the next step
            g.send(f"loop{p}", last, 0, hop, f"y{p}#1", f"x{p}#1")

    one_step(first=True)
    g.section("first", 0)
    one_step(first=False)
    g.section("steady", 1, steps - 1)
    return g.build()


def displaced(n: int, compute: int, nbytes: int, steps: int, layers: int = 3) -> ScheduleGraph:
    """DistriFusion's pattern: each layer reads what the others gathered in the step before."""
    g = Graph(n)
    for stale in (False, True):
        for layer in range(layers):
            for r in range(n):
                g.compute(
                    f"layer{layer}", r, compute, writes=[f"own{layer}"],
                    reads=[f"all{layer}#-1"] if stale else [],
                )  # fmt: skip
            g.collective("all_gather", f"gather{layer}", range(n), nbytes,
                         f"own{layer}", f"all{layer}")  # fmt: skip
        g.section("stale" if stale else "first", int(stale), steps - 1 if stale else 1)
    return g.build()


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("chunks", [[(5, 3)] * 4, [(3, 5)] * 4, [(5, 3), (2, 7), (4, 4), (1, 0)]])
def test_ring_attention_hides_the_shorter(chunks: list[tuple[int, int]]) -> None:
    # While block i is attended, block i+1 arrives: max of both, but the last step moves nothing.
    expected = sum(max(c, b) for c, b in chunks[:-1]) + chunks[-1][0]
    assert run(ring_attention(4, chunks)).makespan_s == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stages", "patches", "tau", "hop"),
    [
        (2, 4, 1, 0),
        (4, 4, 1, 0),
        (4, 2, 3, 1),
        (4, 8, 2, 1),
        (2, 8, 1, 2),
        (3, 4, 5, 2),
        (4, 4, 2, 2),
    ],
)
def test_pipefusion_period_and_makespan(stages: int, patches: int, tau: int, hop: int) -> None:
    # strategies.md 12.3: a stage works M tau, a link M c a step; patch 0 goes around in N (tau + c).
    period = max(patches * tau, patches * hop, stages * (tau + hop))
    if (stages, patches, tau, hop) == (2, 8, 1, 2):
        assert period == 16
    steps = 9
    # Fill: patch 0 through N stages and N-1 hops, the others behind it at the pace of the slower of
    # stage and link; then one period per further step. Loop hops after the last step are not in the
    # formula: the last one leaves with the last patch and arrives a hop later.
    expected = stages * tau + (stages - 1) * hop + (patches - 1) * max(tau, hop)
    expected += (steps - 1) * period
    graph = pipefusion(stages, patches, steps, [tau] * stages, hop)
    trace = run(graph)
    ends = [s.end_s for s in trace.expanded().spans if s.kind == "compute"]
    assert max(ends) == pytest.approx(expected)
    assert trace.repeats


def recurrence(graph_steps: int, patches: int, tau: list[int], hop: int) -> float:
    """End of the last patch on the last stage, by hand: no engine, no graph."""
    stages = len(tau)
    free = [0.0] * stages
    link = [0.0] * stages  # link d: d -> d+1, the last one back to 0
    arrived = [0.0] * patches  # patch at stage 0, for the step at hand
    for _ in range(graph_steps):
        done = [0.0] * patches
        for p in range(patches):
            at = arrived[p]
            for d in range(stages):
                free[d] = max(free[d], at) + tau[d]
                at = free[d]
                if d < stages - 1:
                    link[d] = max(link[d], at) + hop
                    at = link[d]
            done[p] = at
        for p in range(patches):
            link[-1] = max(link[-1], done[p]) + hop
            arrived[p] = link[-1]
    return free[-1]


@pytest.mark.parametrize("tau", [[1, 2, 1], [3, 1, 1], [2, 2, 5], [1, 1, 4, 2]])
@pytest.mark.parametrize("hop", [0, 1, 3])
@pytest.mark.parametrize("patches", [2, 3, 5])
def test_uneven_stages_follow_the_recurrence(tau: list[int], hop: int, patches: int) -> None:
    trace = run(pipefusion(len(tau), patches, 11, tau, hop))
    ends = [s.end_s for s in trace.expanded().spans if s.kind == "compute"]
    assert max(ends) == pytest.approx(recurrence(11, patches, tau, hop))


def test_displaced_gather_is_free_until_it_paces() -> None:
    # 4 ranks, 3 layers of 60 s: a step of 180 s. A gather of 10 bytes takes 3 * 10 = 30 s, hidden.
    steps = 12
    assert run(displaced(4, 60, 10, steps)).makespan_s == pytest.approx(60 * 3 * steps + 30)
    # 30 bytes take 90 s: the first starts at 60, then one after the other, 3 a step.
    assert run(displaced(4, 60, 30, steps)).makespan_s == pytest.approx(60 + 90 * 3 * steps)


@pytest.mark.parametrize("percent", [98, 102, 110])
@pytest.mark.parametrize("steps", [6, 60, 200])
def test_displaced_near_balance_folds_without_error(percent: int, steps: int) -> None:
    # Layers of 300 units, gathers of 3 * percent units: in the run above 1 the ranks advance evenly
    # at the pace of compute while the lag of the gathers grows; only then the gathers pace.
    graph = displaced(4, 300, percent, steps)
    makespan_s = run(graph, costs=UnitCosts()).makespan_s  # run() compares folded and full
    busy = max(300, 3 * percent)
    # Every layer and every gather in a row on its stream; the other side shows once, at an end.
    expected = 300 + busy * (3 * steps - 1) + 3 * percent
    assert makespan_s == pytest.approx(expected)


def test_even_advance_with_a_growing_lag_is_not_folded() -> None:
    # Lag grows by 18 units a step and stalls compute once it passes 2 layers' worth of slack.
    folded = simulate(displaced(4, 300, 102, 100), Topology.uniform(4), UnitCosts())
    (repeat,) = folded.repeats
    per_step = 3 * 3 * 102
    assert repeat.period_s == pytest.approx(per_step * repeat.steps)
    assert repeat.at_s > 10 * per_step


@pytest.mark.parametrize("unit_s", [1e-7, 1e-3, 1.0, 1234.567])
def test_folding_at_any_scale(unit_s: float) -> None:
    # From 30 microseconds a step to 10 days: far below and far beyond the exact range of the clock.
    topology = Topology.uniform(4, bandwidth_bytes_per_s=1 / unit_s)
    trace = run(displaced(4, 300, 110, 60), topology, UnitCosts(unit_s=unit_s))
    assert trace.makespan_s == pytest.approx((300 + 330 * 180) * unit_s, rel=1e-7)
    assert sum(repeat.copies for repeat in trace.repeats) > 40


def asyncdiff(
    components: int, stride: int, seconds: int, nbytes: int, rounds: int
) -> ScheduleGraph:
    """Rounds of all components at once, each on the input that its neighbour broadcast before."""
    n = components
    g = Graph(n)
    for r in range(n):
        g.compute("warm", r, seconds, writes=["out"])
    g.section("warm", 0)
    for m in range(n):
        g.op(f"bcast{m}", "collective", "broadcast", (m, *(r for r in range(n) if r != m)), "comm",
             [f"out@r{m}#-{stride}"], [f"in{m}@r{r}" for r in range(n)], nbytes=nbytes)  # fmt: skip
    for r in range(n):
        g.compute("component", r, seconds, writes=["out"],
                  reads=[f"in{max(r - 1, 0)}@r{r}"])  # fmt: skip
    g.section("rounds", stride, rounds, stride)
    return g.build()


def test_asyncdiff_round() -> None:
    # A round broadcasts what the three components wrote in the last, 2 s each in a row, and rank r
    # computes for 7 s once its own output has left (it writes over it). From a round that starts at
    # 0: broadcasts end at 2, 4, 6; ranks 0, 1, 2 work until 9, 11, 13. The next broadcast 0 needs
    # rank 0 (9) and writes over what rank 1 reads until 11: it starts at 11, broadcast 1 when rank 2
    # is through at 13. The period is 11 s: two broadcasts and a component.
    trace = run(asyncdiff(3, 1, 7, 2, 10))
    starts = [s.start_s for s in trace.expanded().spans if s.name == "component@r2"]
    assert starts[0] == pytest.approx(7 + 6)
    assert [b - a for a, b in pairwise(starts)] == pytest.approx([11.0] * 9)


def test_parastep_cycle() -> None:
    # p ranks take turns: in a cycle of p steps every rank computes once, all at once (rank k starts
    # from its own approximate latent), sends eps to rank 0, which broadcasts its latent at the end.
    p, seconds, nbytes, cycles = 4, 10, 3, 5
    g = Graph(p)
    for r in range(p):
        g.compute("start", r, 0, writes=["x#-1"])
    g.section("start", 0)
    for k in range(p):
        g.compute(f"net{k}", k, seconds, reads=["x#-1"], writes=["eps"], step=k)
        if k:
            g.send(f"eps{k}", k, 0, nbytes, "eps", f"eps{k}", step=k)
    g.compute("last", 0, 0, reads=["eps", *(f"eps{k}" for k in range(1, p))], writes=["new"])
    g.op("bcast", "collective", "broadcast", range(p), "comm", ["new@r0"],
         [f"x@r{r}#{p - 1}" for r in range(p)], nbytes=nbytes, step=p - 1)  # fmt: skip
    g.section("cycles", 0, cycles, p)
    # The p-1 messages meet on the link into rank 0: (p-1) * 3 s together; the chain takes 3 s.
    cycle = seconds + (p - 1) * nbytes + nbytes
    trace = run(g.build())
    assert trace.makespan_s == pytest.approx(cycles * cycle)
    assert sum(repeat.copies for repeat in trace.repeats) > 0


def test_a_write_waits_for_the_readers_of_what_it_overwrites() -> None:
    # Rank 0 makes block 0 (1 s) and sends it (5 s); block 1 goes into the same buffer, and so waits
    # until 6 s although the compute stream is free at 1 s. Into another buffer: done at 2 s.
    for second, end in [("block#1", 7.0), ("other", 2.0)]:
        g = Graph(2)
        g.compute("make0", 0, 1, writes=["block"])
        g.send("send", 0, 1, 5, "block", "got")
        g.compute("make1", 0, 1, writes=[second])
        assert spans(run(g.build()))["t000/make1@r0", 0].end_s == end


# -------------------------------------------------------------------------------- hosts, interference


def test_the_host_sets_a_floor() -> None:
    # 4 ops of 1 s on the device that take 3 s each to issue: op i is issued during [3i, 3i+3] and
    # cannot end before. The device works from 3i on and waits for the last launch.
    g = Graph(1)
    for i in range(4):
        g.compute(f"op{i}", 0, 1, host=3)
    trace = run(g.build())
    assert [s.end_s for s in trace.spans] == [3.0, 6.0, 9.0, 12.0]
    assert [s.busy_s for s in trace.spans] == [1.0] * 4


def test_the_host_runs_ahead() -> None:
    # 10 s on the device hide the issue of the next three ops (1 s each).
    g = Graph(1)
    g.compute("long", 0, 10, host=1)
    for i in range(3):
        g.compute(f"op{i}", 0, 1, host=1)
    assert run(g.build()).makespan_s == 13.0


def test_a_transfer_starts_when_all_participants_have_issued_it() -> None:
    # Rank 1's host issues a 5 s op first: the broadcast starts at 5, its issue (2 s) ends at 7,
    # the 1 byte has arrived at 6.
    g = Graph(2)
    g.compute("other", 1, 1, host=5)
    g.collective("broadcast", "call", (0, 1), 1, "", "out")
    trace = run(g.build(), costs=UnitCosts(host_s=2.0))
    call = spans(trace)["t000/call", 0]
    assert (call.ready_s, call.start_s, call.busy_s, call.end_s) == (0.0, 5.0, 1.0, 7.0)


@pytest.mark.parametrize(("host", "period"), [(1, 9), (2, 9), (4, 12), (5, 15)])
def test_steady_state_of_hosts(host: int, period: int) -> None:
    # Three ops of 3 s a step: the device paces at 9 s a step, or the host at 3 * host.
    g = Graph(1)
    for layer in range(3):
        g.compute(f"op{layer}", 0, 3, host=host)
    g.section("steps", 0, 30)
    trace = run(g.build())
    (repeat,) = trace.repeats
    assert (repeat.period_s, repeat.steps) == (period, 1)


def test_ranks_that_drift_apart_are_not_folded() -> None:
    # Two ranks that never meet, at 3 s and 4 s a step: no state occurs twice.
    g = Graph(2)
    for r in range(2):
        g.compute("op", r, 3 + r)
    g.section("steps", 0, 30)
    trace = run(g.build())
    assert (trace.makespan_s, trace.repeats) == (120.0, ())


def test_a_host_that_loses_its_lead_is_felt_late() -> None:
    # A first section builds the host a lead of 10 * (30 - 1) s. In the second the device needs 2 s a
    # step, the host 3 s: the lead melts by 1 s a step, and folding must not overlook the end of it.
    g = Graph(1)
    g.compute("slow", 0, 30, host=1)
    g.section("lead", 0, 10)
    g.compute("fast", 0, 2, host=3)
    g.section("melt", 10, 1000)
    # Issued at 10 + 3 * 1000; the device could have finished at 300 + 2000.
    assert run(g.build()).makespan_s == 3010.0


def test_a_period_in_which_a_host_was_felt_is_not_copied() -> None:
    # Rank 0 paces at 10 s a step and sends to rank 1 early: there, an op is ready at 2 s of the step.
    # In the first step rank 1's host needs until 4 s to issue it; it was felt, but nothing of that is
    # left at the end of the step, and from then on the host is ahead: the op ends at 2 s.
    g = Graph(2)
    g.compute("a", 0, 1, writes=["a"])
    g.send("send", 0, 1, 1, "a", "b")
    g.compute("late", 1, 0, reads=["b"], host=4)
    g.compute("b", 0, 9)
    g.section("loop", 0, 30)
    trace = run(g.build())  # compares every span with the full run
    late = [s.end_s for s in trace.expanded().spans if s.name == "late@r1"]
    assert late == [4.0] + [2.0 + 10 * i for i in range(1, 30)]
    assert trace.repeats


def test_a_host_that_gains_on_one_that_paces_does_not_prevent_folding() -> None:
    # Rank 0's host needs 4 s a step and holds the swap back, rank 1's host 1 s: it gains 3 s a step,
    # is felt at first and never again once it is ahead.
    g = Graph(2)
    for r in range(2):
        g.compute("start", r, 1, writes=["x#-1"])
    g.section("start", 0)
    for r in range(2):
        g.compute("step", r, 1, reads=["x#-1"], writes=["y"], host=0 if r else 3)
    g.collective("permute", "swap", (0, 1), 1, "y", "x")
    g.section("loop", 0, 60)
    trace = run(g.build(), costs=UnitCosts(host_s=1.0))
    (repeat,) = trace.repeats
    assert repeat.period_s == 4.0
    assert repeat.copies > 40


def test_hosts_run_ahead_on_gloo_too() -> None:
    # A thread issues for each stream (docs/adr/0009), nothing waits for compute: rank 0 computes 4 s,
    # the send of 5 bytes goes on beside its second computation, which starts at once.
    g = Graph(2)
    g.compute("first", 0, 4, writes=["a"])
    g.send("send", 0, 1, 5, "a", "b")
    g.compute("second", 0, 4)
    g.compute("use", 1, 2, reads=["b"])
    trace = spans(run(g.build(), backend="gloo"))
    assert trace["t000/second@r0", 0].start_s == trace["t000/send", 0].start_s == 4.0
    assert trace["t000/send", 1].end_s == 9.0
    assert trace["t000/use@r1", 1].end_s == 11.0


def test_transfers_that_use_sms_slow_compute_down() -> None:
    # 10 s alone, 20 s beside a transfer. The transfer of 4 bytes runs from 3 s to 7 s: by then
    # 3/10 + 4/20 = 1/2 is done; the rest takes 5 s: 12 s. On gloo: 10 s.
    g = Graph(2)
    g.compute("prepare", 1, 3, writes=["a"])
    g.send("send", 1, 0, 4, "a", "b")
    g.compute("work", 0, 10, contended=20)
    graph = g.build()
    assert spans(run(graph))["t000/work@r0", 0].end_s == pytest.approx(12)
    assert spans(run(graph, backend="gloo"))["t000/work@r0", 0].end_s == pytest.approx(10)


def test_compute_that_starts_beside_a_transfer_is_slow_at_once() -> None:
    # Transfer from 0 to 4 s; work starts at 0: 4/20 done at 4 s, then 0.8 * 10 s: 12 s.
    g = Graph(2)
    g.op("send", "p2p", "send", (1, 0), "p2p", nbytes=4)
    g.compute("work", 0, 10, contended=20)
    assert spans(run(g.build()))["t000/work@r0", 0].end_s == pytest.approx(12)


class Filling(UnitCosts):
    """The blocks of a computation take every SM for 0.6 of it."""

    def compute(self, work: Work, device: int) -> UnitCompute:
        return replace(super().compute(work, device), placed_s=0.6 * work.shape.r)


def test_a_send_waits_until_blocks_launched_before_it_have_their_sms() -> None:
    # Both are ready at 0, the send first in order. Its 4 bytes run from 6 to 10 s; by then work has done
    # 6/10 + 4/20, and the rest takes 2 s: 12 s. gloo needs no SM: from 0 to 4 s.
    g = Graph(2)
    g.op("send", "p2p", "send", (0, 1), "p2p", nbytes=4)
    g.compute("work", 0, 10, contended=20)
    graph, costs = g.build(), Filling()
    found = spans(run(graph, costs=costs))
    assert (found["t000/send", 0].start_s, found["t000/send", 0].end_s) == pytest.approx((6, 10))
    assert found["t000/send", 0].ready_s == found["t000/send", 0].start_s
    assert found["t000/work@r0", 0].end_s == pytest.approx(12)
    assert spans(run(graph, costs=costs, backend="gloo"))["t000/send", 0].end_s == pytest.approx(4)


# ------------------------------------------------------------------------------------- shared links


def test_flows_share_a_link_and_speed_up_when_one_leaves() -> None:
    # Both leave rank 0: 1/2 B/s each. The 2-byte message ends at 4 s, then the other has 4 left: 8 s.
    g = Graph(3)
    g.op("short", "p2p", "send", (0, 1), "a", nbytes=2)
    g.op("long", "p2p", "send", (0, 2), "b", nbytes=6)
    trace = spans(run(g.build()))
    assert trace["t000/short", 0].end_s == pytest.approx(4)
    assert trace["t000/long", 0].end_s == pytest.approx(8)


def test_flows_of_one_call_leave_one_by_one() -> None:
    # A 3-chain broadcast of 6 bytes beside a message of 2 on the second hop: both hops of the call
    # start at 0; hop two gets 1/2 until the message ends at 4 s, has 4 left and ends at 8 s.
    g = Graph(4)
    g.op("bcast", "collective", "broadcast", (0, 1, 2), "a", nbytes=6)
    g.op("message", "p2p", "send", (1, 3), "b", nbytes=2)
    trace = spans(run(g.build()))
    assert trace["t000/message", 1].end_s == pytest.approx(4)
    assert trace["t000/bcast", 0].end_s == pytest.approx(8)


# ------------------------------------------------------------------------------------ order and trace


def test_simultaneous_events_keep_canonical_order() -> None:
    # All four end at 3 s, by different sums of floats; the followers share one instant.
    g = Graph(4)
    for r, parts in enumerate([(3,), (1, 2), (2, 1), (1, 1, 1)]):
        for i, seconds in enumerate(parts):
            g.compute(f"part{i}", r, seconds, writes=["x"] if i == len(parts) - 1 else [])
    for r in range(4):
        g.compute("after", r, 1, reads=["x"])
    trace = simulate(g.build(), Topology.uniform(4), UnitCosts(unit_s=0.1))
    after = [span for span in trace.spans if span.name.startswith("after")]
    assert [span.rank for span in after] == [0, 1, 2, 3]
    assert trace == simulate(g.build(), Topology.uniform(4), UnitCosts(unit_s=0.1))


def test_runs_are_equal_and_placement_matters() -> None:
    graph = displaced(4, 60, 30, 8)
    topology = Topology.uniform(4)
    assert simulate(graph, topology, UnitCosts()) == simulate(graph, topology, UnitCosts())
    moved = simulate(graph, topology, UnitCosts(), placement=(3, 1, 0, 2))
    assert moved.makespan_s == simulate(graph, topology, UnitCosts()).makespan_s
    assert dict(moved.meta)["placement"] == "3,1,0,2"


@pytest.mark.parametrize("placement", [(0, 1), (0, 1, 2, 4), (0, 1, 2, -1)])
def test_an_impossible_placement_is_refused(placement: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4 ranks on devices 0 to 3"):
        simulate(displaced(4, 1, 1, 2), Topology.uniform(4), UnitCosts(), placement=placement)


def test_an_unknown_back_end_is_refused() -> None:
    with pytest.raises(ValueError, match="nccl, gloo"):
        simulate(displaced(4, 1, 1, 2), Topology.uniform(4), UnitCosts(), backend="mpi")


def test_sections_after_a_fold_read_the_right_versions() -> None:
    # A tail reads the loop's last version and writes over buffers that the loop reads.
    g = Graph(2)
    for r in range(2):
        g.compute("start", r, 1, writes=["x#-1"])
    g.section("start", 0)
    for r in range(2):
        g.compute("step", r, 5, reads=["x#-1"], writes=["y"])
    g.collective("permute", "swap", (0, 1), 2, "y", "x")
    g.section("loop", 0, 50)
    for r in range(2):
        g.compute("tail", r, 1, reads=["x#-1", "y#-1"], writes=["x"])
    g.section("tail", 50)
    trace = run(g.build())
    assert trace.makespan_s == pytest.approx(1 + 50 * 7 + 1)
    assert trace.repeats


# ------------------------------------------------------------------------------------------- oracle


@st.composite
def random_graphs(draw: st.DrawFn) -> ScheduleGraph:
    ranks = draw(st.integers(1, 4))
    g = Graph(ranks)
    written: list[str] = []
    for i in range(draw(st.integers(1, 25))):
        if ranks > 1 and draw(st.integers(0, 3)) == 0:
            pair = draw(st.permutations(range(ranks)))[:2]
            read = [w for w in written if w.endswith(f"@r{pair[0]}")]
            if read:
                name = f"m{i}"
                g.op(f"send{i}", "p2p", "send", tuple(pair), f"s{draw(st.integers(0, 1))}",
                     [draw(st.sampled_from(read))], [f"{name}@r{pair[1]}"], nbytes=1000)  # fmt: skip
                written.append(f"{name}@r{pair[1]}")
                continue
        rank = draw(st.integers(0, ranks - 1))
        here = [w for w in written if w.endswith(f"@r{rank}")]
        reads = draw(st.lists(st.sampled_from(here), max_size=3, unique=True)) if here else []
        g.compute(f"c{i}", rank, draw(st.integers(0, 9)), reads, [f"b{i}"],
                  stream=f"compute{draw(st.integers(0, 1))}")  # fmt: skip
        written.append(f"b{i}@r{rank}")
    return g.build()


@settings(max_examples=60)
@given(random_graphs(), st.floats(1e-3, 1e3))
def test_without_contention_the_makespan_is_the_longest_path(
    graph: ScheduleGraph, unit_s: float
) -> None:
    free = Topology.uniform(graph.world_size, bandwidth_bytes_per_s=float("inf"))
    dag, dependencies = nx.DiGraph(), Dependencies()
    for handle, instance in enumerate(graph.instances()):
        work = instance.op.work
        seconds = work.shape.r * unit_s if work else 0.0
        dag.add_edge(("begin", handle), ("end", handle), weight=seconds)
        for before in dependencies.add(instance, handle):
            dag.add_edge(("end", before), ("begin", handle), weight=0.0)
    longest = nx.dag_longest_path_length(dag)
    trace = run(graph, free, UnitCosts(unit_s=unit_s))
    assert trace.makespan_s == pytest.approx(longest, rel=1e-9, abs=1e-9)


@settings(max_examples=40)
@given(
    st.integers(2, 4), st.integers(1, 9), st.integers(0, 9), st.integers(2, 40), st.integers(0, 5),
    st.integers(0, 20),
)  # fmt: skip
def test_folded_equals_full(
    n: int, compute: int, nbytes: int, steps: int, host: int, contended: int
) -> None:
    g = Graph(n)
    for stale in (False, True):
        for layer in range(2):
            for r in range(n):
                g.compute(
                    f"layer{layer}", r, compute + r, writes=[f"own{layer}"], host=host,
                    reads=[f"all{layer}#-1"] if stale else [], contended=compute + r + contended,
                )  # fmt: skip
            g.collective("all_gather", f"gather{layer}", range(n), nbytes + layer,
                         f"own{layer}", f"all{layer}")  # fmt: skip
        g.op("eps", "p2p", "send", (0, 1), "eps", ["own0@r0"], ["e@r1"], nbytes=nbytes)
        g.section("stale" if stale else "first", int(stale), steps if stale else 1)
    run(g.build(), costs=UnitCosts(unit_s=0.37, fixed_s=0.11, host_s=0.07))


def test_streams_are_in_order() -> None:
    trace = run(pipefusion(3, 4, 5, [1, 2, 3], 1)).expanded()
    last: dict[tuple[int, str], float] = defaultdict(float)
    for span in trace.spans:
        assert span.start_s >= last[span.rank, span.stream] - 1e-9
        last[span.rank, span.stream] = span.end_s
