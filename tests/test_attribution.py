"""Classes of time by hand, on small runs in unit hardware."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_hardware import Graph, UnitCosts, exchange, run

from analysis.attribution import CLASSES, Breakdown, attribute, critical_rank
from paradiff.trace import Trace
from simulator.engine import simulate
from simulator.topology import Topology


def classes(breakdown: Breakdown) -> tuple[float, ...]:
    return tuple(getattr(breakdown, f"{name}_s") for name in CLASSES)


def request(steps: int) -> Graph:
    """Encode 2 s; a step: 5 s on rank 0, 3 s on rank 1, swap 4 bytes, 1 s; decode 7 s on rank 0."""
    g = exchange((5, 3), 4, begin=2, into="z")
    for r in range(2):
        g.compute("update", r, 1, reads=["z"], writes=["x"])
    g.section("loop", 0, steps)
    g.compute("decode", 0, 7, reads=[f"x#{steps - 1}"], step=None)
    g.section("decode", 0)
    return g


def test_four_classes_and_three_stages() -> None:
    # A step takes 5 + 4 + 1 = 10 s; rank 0 finishes last (decode), computes 6 of 10 and waits for the
    # wire in the other 4.
    breakdown = attribute(run(request(20).build()))
    assert breakdown.rank == 0
    stages = breakdown.stages
    assert (stages.text_encoder_s, stages.denoise_s, stages.vae_s) == pytest.approx((2, 200, 7))
    assert classes(breakdown) == pytest.approx((120, 0, 80, 0))
    assert dict(breakdown.exposed_s) == pytest.approx({"permute": 80})
    # Rank 1 computes 2 + 20 * 4 of 209 s.
    assert dict(breakdown.utilisation) == pytest.approx({0: 129 / 209, 1: 82 / 209})


def test_waiting_for_another_rank_is_a_bubble() -> None:
    # Rank 1 ends last: 3 s of its own, then it waits until 10 s, 2 s on the wire, 1 s of its own.
    g = Graph(2)
    g.compute("long", 0, 10, writes=["a"])
    g.compute("short", 1, 3)
    g.send("send", 0, 1, 2, "a", "b")
    g.compute("end", 1, 1, reads=["b"])
    breakdown = attribute(run(g.build()))
    assert breakdown.rank == 1
    assert classes(breakdown) == (4, 0, 2, 7)


def test_the_host_comes_before_communication() -> None:
    # Rank 0: the host issues a (3 s), the broadcast (1 s), b (4 s). a works from 0 to 2 and is held
    # to 3; the broadcast runs from 3 (issued) to 9; b is issued from 4: it is ready at 3, waits for
    # the host until 4, works to 5, is held to 8 by its own launches. From 8 to 9 the wire alone.
    g = Graph(2)
    g.compute("a", 0, 2, host=3)
    g.collective("broadcast", "call", (0, 1), 6, "", "out")
    g.compute("b", 0, 1, host=4)
    trace = run(g.build(), costs=UnitCosts(host_s=1.0))
    breakdown = attribute(trace)
    assert breakdown.rank == 0
    assert classes(breakdown) == (3, 5, 1, 0)


def test_of_two_transfers_the_first_counts() -> None:
    # 6 bytes to rank 1 from 0; 2 bytes to rank 2 from 1: both leave rank 0, each at 1/2 from 1 on.
    # The second ends at 5, the first (5 left at 1, 3 left at 5) at 8.
    g = Graph(3)
    g.compute("a", 0, 1, writes=["a"])
    g.op("first", "p2p", "send", (0, 1), "one", nbytes=6)
    g.op("second", "p2p", "other", (0, 2), "two", ["a@r0"], ["a@r2"], nbytes=2)
    breakdown = attribute(run(g.build()))
    assert dict(breakdown.exposed_s) == pytest.approx({"send": 7, "other": 0})
    assert classes(breakdown) == pytest.approx((1, 0, 7, 0))


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="denoising step"):
        attribute(Trace((), 0.0))


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 4), st.integers(3, 40))
def test_classes_add_up_folded_or_not(compute: int, nbytes: int, host: int, steps: int) -> None:
    g = Graph(3)
    for stale in (False, True):
        for layer in range(2):
            for r in range(3):
                g.compute(
                    f"layer{layer}", r, compute + r, writes=[f"own{layer}"], host=host,
                    reads=[f"all{layer}#-1"] if stale else [], contended=2 * compute + r,
                )  # fmt: skip
            g.collective("all_gather", f"g{layer}", range(3), nbytes, f"own{layer}", f"all{layer}")
        g.section("stale" if stale else "first", int(stale), steps if stale else 1)
    graph, costs = g.build(), UnitCosts(host_s=0.5, fixed_s=0.25)
    folded = simulate(graph, Topology.uniform(3), costs)
    full = simulate(graph, Topology.uniform(3), costs, periodic=False)
    a, b = attribute(folded), attribute(full)
    for breakdown in (a, b):
        assert sum(classes(breakdown)) == pytest.approx(breakdown.stages.denoise_s, rel=1e-12)
        assert min(classes(breakdown)) >= 0
    assert (a.rank, critical_rank(folded)) == (b.rank, critical_rank(full))
    near = {"rel": 1e-9, "abs": 1e-9 * full.makespan_s}
    assert classes(a) == pytest.approx(classes(b), **near)
    assert dict(a.utilisation) == pytest.approx(dict(b.utilisation), **near)
    stages = a.stages
    total = stages.text_encoder_s + stages.denoise_s + stages.vae_s
    assert total == pytest.approx(folded.makespan_s, rel=1e-12)
