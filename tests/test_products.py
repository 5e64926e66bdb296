"""Products of axes on the mesh: what each pays and what no axis changes, as properties of the graph.

strategies.md 15: tp inside sp = ulysses x ring inside pp inside cfg inside step inside dp. With pp > 1
the result depends on M and w only, so the versions read do; bytes are those of the parts, but a ring
inside a pipeline turns its whole cache in every micro-step and pays M times.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiff.dependencies import validate
from paradiff.graph import ScheduleGraph
from paradiff.strategies import Workload, build, parse_spec
from paradiff.strategies.builder import Mesh

ROWS, WIDTH, BLOCKS, HIDDEN, ELEMENT, STEPS = 16, 4, 4, 8, 2, 6
DIT = toys.divided(toys.transformer(BLOCKS, heads=8))
TOKENS = ROWS * WIDTH
LATENT = 4 * TOKENS * ELEMENT

DEGREES = st.tuples(
    st.sampled_from([1, 2]),  # tensor
    st.sampled_from([1, 2, 4]),  # ulysses
    st.sampled_from([1, 2, 4]),  # ring
    st.sampled_from([2, 4]),  # stages
    st.sampled_from([1, 2]),  # cfg
    st.sampled_from([1, 2]),  # data
    st.sampled_from([1, 2, 4]),  # patches
    st.sampled_from([1, 3, STEPS]),  # warm-up
).filter(lambda d: d[6] * d[1] * d[2] <= ROWS)


def graph_of(spec: str) -> ScheduleGraph:
    return build(parse_spec(spec), DIT, Workload(ROWS, WIDTH, 1, STEPS, 1, "fp16"))


def spec_of(tp: int, u: int, r: int, n: int, cfg: int, dp: int, m: int, w: int) -> str:
    axes = {"cfg": cfg, "data": dp, "tensor": tp, "ulysses": u, "ring": r}
    chosen = [f"{name}={degree}" for name, degree in axes.items() if degree > 1]
    return ",".join([*chosen, f"pipefusion={n},patches={m},warmup={w}"])


def cache_reads(graph: ScheduleGraph) -> set[tuple[int, str, int | None, int]]:
    """(step, patch computed, part of the cache, version) of every read of a K/V cache by a forward."""
    return {
        (base + (op.step or 0), op.name.split("/p")[1].split("/")[0], ref.part, ref.at(base))
        for op, base in graph.instances()
        if op.call == "forward"
        for ref in op.reads
        if ref.buffer.startswith("cache")
    }


@settings(max_examples=60)
@given(degrees=DEGREES)
def test_a_pipeline_in_any_product(degrees: tuple[int, ...]) -> None:
    """Versions read as by two stages alone with the same M and w; memory and bytes of section 15."""
    tp, u, r, n, cfg, dp, m, w = degrees
    graph = graph_of(spec_of(*degrees))
    validate(graph)
    assert graph.world_size == tp * u * r * n * cfg * dp
    assert cache_reads(graph) == cache_reads(graph_of(f"pipefusion=2,patches={m},warmup={w}"))
    assert graph.staleness() == int(m > 1 and w < STEPS)

    sp, batch, layers = u * r, 2 // cfg, BLOCKS // n
    tensor = batch * TOKENS * HIDDEN * ELEMENT
    assert set(graph.peak_bytes(["kv"]).values()) == {2 * layers * tensor // sp // tp}
    micro = w + m * (STEPS - w)
    mesh = Mesh(tp=tp, ulysses=u, ring=r, pp=n, cfg=cfg, dp=dp)
    received = graph.bytes_by_call()
    for replica in mesh.replicas():
        for lane in replica:
            for d, group in enumerate(lane.groups):
                for rank in group:
                    calls = defaultdict(lambda: (0.0, 0.0), received[rank])
                    share = tensor / sp / tp  # of the heads
                    assert calls["all_to_all"][1] == STEPS * layers * 4 * (u - 1) / u * share
                    # two sums a block: after the attention, after the feed-forward
                    summed = STEPS * layers * 2 * tensor / sp
                    assert calls["all_reduce"][1] == summed * 2 * (tp - 1) / tp
                    cached = 2 * share  # K and V of all rows that a ring rank has
                    assert calls["ring"][1] == layers * (r - 1) * micro * cached
                    into = tensor / sp if d else LATENT / sp
                    assert calls["send"][1] == into * (STEPS if d else STEPS - 1)
                    gathered = STEPS * LATENT / sp if cfg == 2 and d == n - 1 else 0
                    ends = _decodes(lane.branch, d, n, sp) and rank % tp == 0
                    final = (sp - 1) * LATENT / sp if ends else 0
                    assert calls["all_gather"][1] == gathered + final


def _decodes(branch: str, d: int, n: int, sp: int) -> bool:
    """The last stage of the first branch gathers the latent over its sequence group (of the ranks that
    share weights the first)."""
    return sp > 1 and d == n - 1 and branch in ("both", "uncond")


@pytest.mark.parametrize("patches", [1, 2, 4])
def test_ring_pays_once_a_patch_and_ulysses_once_a_step(patches: int) -> None:
    def total(axis: str, call: str) -> float:
        spec = f"pipefusion=2,{axis}=2,patches={patches},warmup=1"
        return graph_of(spec).bytes_by_call()[0][call][1]

    assert total("ulysses", "all_to_all") == STEPS * 2 * 4 / 2 * 2 * TOKENS * HIDDEN * ELEMENT / 2
    one_turn = 2 * 2 * (2 * TOKENS * HIDDEN * ELEMENT) / 2
    assert total("ring", "ring") == one_turn * (1 + patches * (STEPS - 1))


@settings(max_examples=40)
@given(
    tp=st.sampled_from([1, 2]), u=st.sampled_from([1, 2, 4]), r=st.sampled_from([1, 2]),
    cfg=st.sampled_from([1, 2]), step=st.sampled_from([1, 2]), dp=st.sampled_from([1, 2]),
)  # fmt: skip
def test_axes_multiply_and_exact_parts_make_exact_products(
    tp: int, u: int, r: int, cfg: int, step: int, dp: int
) -> None:
    """Rank = tp + TP (sp + SP (cfg + CFG (step + STEP dp))); each replica's ranks are its own; sums are
    between the ranks that share weights, everything else between ranks with the same share; nothing is
    stale but what ParaStep reads."""
    axes = {"tensor": tp, "ulysses": u, "ring": r, "cfg": cfg, "data": dp, "parastep": step}
    chosen = [f"{name}={degree}" for name, degree in axes.items() if degree > 1]
    graph = graph_of(",".join(chosen) or "serial")
    validate(graph)
    assert graph.world_size == tp * u * r * cfg * step * dp
    assert (graph.staleness() > 0) == (step > 1)
    size = graph.world_size // dp
    for op, _ in graph.instances():
        assert len({rank // size for rank in op.ranks}) == 1, op.name
        same = {rank // tp if op.call == "all_reduce" else rank % tp for rank in op.ranks}
        assert len(same) == 1, op.name
    branches = {
        (rank, tag[1])
        for op, _ in graph.instances()
        if op.call == "forward"
        for rank in op.ranks
        for tag in op.tags
        if tag[0] == "branch"
    }
    expected = {
        (rank, "both" if cfg == 1 else ("uncond", "cond")[rank // (tp * u * r) % 2])
        for rank in range(graph.world_size)
    }
    assert branches == expected
