"""Stages on GPUs that differ: the dynamic programme against all cuts, and on a real box."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shipped import profile

from analysis.attribution import attribute
from paradiff.strategies import Workload, build, parse_spec
from simulator.costs import CostModel
from simulator.engine import simulate
from simulator.gpu import load_gpu
from simulator.network import Network
from simulator.partition import partition
from simulator.placement import placements
from simulator.planner import Request, plan
from simulator.tailored import tailored_specs
from simulator.topology import load_topology


@settings(max_examples=150)
@given(data=st.data())
def test_dynamic_programme_equals_all_cuts(data: st.DataObject) -> None:
    """Every composition of the blocks into stages times every order of the GPUs' kinds."""
    blocks = data.draw(st.integers(2, 6))
    stages = data.draw(st.integers(2, min(4, blocks)))
    have = {k: data.draw(st.integers(0, 3)) for k in "abc"[: data.draw(st.integers(1, 3))]}
    seconds = st.lists(st.integers(1, 30), min_size=blocks, max_size=blocks)
    block_s = {k: data.draw(seconds) for k in have}
    hops = {
        (j, a, b): data.draw(st.integers(0, 40))
        for j, a, b in itertools.product(range(blocks + 1), have, have)
    }
    room = {k: data.draw(st.integers(1, blocks)) for k in have}

    back = {(a, b): data.draw(st.integers(0, 40)) for a, b in itertools.product(have, have)}
    patches = data.draw(st.sampled_from([None, 1, stages, 2 * stages]))

    def value(counts: tuple[int, ...], kinds: tuple[str, ...]) -> float:
        ends = list(itertools.accumulate(counts))
        starts = [0, *ends[:-1]]
        each = [sum(block_s[k][i:j]) for k, i, j in zip(kinds, starts, ends, strict=True)]
        each += [hops[j, a, b] for j, (a, b) in zip(ends, itertools.pairwise(kinds), strict=False)]
        if patches is None:
            return max(each)
        each.append(back[kinds[-1], kinds[0]])
        return max(patches * max(each), sum(each))

    every = [
        (value(counts, kinds), counts, kinds)
        for counts in itertools.product(range(1, blocks + 1), repeat=stages)
        if sum(counts) == blocks
        for kinds in itertools.product(have, repeat=stages)
        if all(n <= have[k] for k, n in Counter(kinds).items())
        and all(n <= room[k] for k, n in zip(kinds, counts, strict=True))
    ]
    found = partition(
        block_s,
        have,
        stages,
        lambda j, a, b: hops[j, a, b],
        lambda i, j, k: j - i <= room[k],
        patches=patches,
        loop_s=lambda a, b: back[a, b],
    )
    if not every:
        assert found is None
        return
    assert found is not None
    assert found.period_s(patches or 1) == min(every)[0] == value(found.counts, found.kinds)


def test_twice_as_fast_takes_twice_the_blocks() -> None:
    found = partition({"fast": [1.0] * 9, "slow": [2.0] * 9}, {"fast": 1, "slow": 1}, 2)
    assert found is not None
    assert (found.counts, found.kinds, found.slowest_s) == ((6, 3), ("fast", "slow"), 6.0)


@pytest.mark.parametrize(
    ("model", "family", "least"),
    [("pixart-alpha", "pipefusion=4", 1.5), ("sdxl", "asyncdiff=4", 1.3)],
)
def test_by_time_beats_by_flops_on_a_mixed_box(model: str, family: str, least: float) -> None:
    """Two L40S and two L4, the latter 4.5 times slower: each on its best placement."""
    box, p = load_topology("pcie4-l40s-l4"), profile(model)
    size = {key: p.defaults[key] for key in ("height", "width", "frames")}
    workload = Workload(**size, steps=12)
    network, gpus = Network(box), [load_gpu(name) for name in box.profiles]
    costs = CostModel(p, gpus)

    def best_s(spec: str) -> float:
        graph = build(parse_spec(spec), p, workload)
        choices = placements(box, graph.world_size)
        traces = (simulate(graph, network, costs, placement=c) for c in choices)
        return min(attribute(trace).stages.denoise_s for trace in traces)

    tailored = [s for s in tailored_specs(p, workload, costs, network, 4) if s.startswith(family)]
    assert tailored
    for spec in tailored:
        even = re.sub(r"(stages|cuts)=[0-9:]+", r"\1=balanced", spec)
        assert even != spec
        assert best_s(even) > least * best_s(spec), spec


def test_planner_chooses_stages_by_time() -> None:
    p = profile("pixart-alpha")
    result = plan(
        Request(
            profile=p,
            topology=load_topology("pcie4-l40s-l4"),
            workload=Workload(2048, 2048, 1, 6),
            gpus=4,
        )
    )
    piped = [c for c in result.ranked if "pipefusion=4" in c.spec]
    assert "stages=" in piped[0].spec
    assert "balanced" not in piped[0].spec
    counts = [int(c) for c in parse_spec(piped[0].spec).options["stages"].split(":")]
    assert piped[0].placement is not None
    fast = [n for n, d in zip(counts, piped[0].placement, strict=True) if d < 2]
    assert min(fast) > 2 * max(n for n, d in zip(counts, piped[0].placement, strict=True) if d > 1)
