"""CoCoDiff's V-first order: the same bytes, and what it hides in closed form."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import toys
from shipped import profile
from test_closed_forms import BLOCKS, ELEMENT, ROWS, WIDTH, X, step_s

from paradiff.config import available
from paradiff.graph import parse_graph
from paradiff.profiles import Profile, profile_from_json, profile_to_json
from paradiff.strategies import Infeasible, SpecError, Workload, build, parse_spec


def normed(norms: int) -> Profile:
    """The plain transformer, whose Q and K pass ``norms`` FLOPs a token after V has been projected."""
    base = toys.plain(BLOCKS)
    segments = tuple(
        replace(s, kernels=s.kernels + toys.work(f"{norms}*b*r*w"), projected=(1, 0))
        if s.name.endswith(".qkv")
        else s
        for s in base.denoiser.segments
    )
    denoiser = replace(base.denoiser, segments=segments)
    return replace(base, name="normed-dit", stages={**base.stages, "denoiser": denoiser})


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("bandwidth", [0.05, 0.5, 7.0, 1000.0])
def test_it_hides_the_lesser_of_exchange_and_norms(n: int, bandwidth: float) -> None:
    """A layer of plain Ulysses: projections, norms, then Q, K and V one after another: P + N + 3 E.
    V first: P, then E beside N, then Q and K when both are over: P + max(N, E) + 2 E. So it wins
    min(N, E) a layer, N = 2 x 5 s / n FLOPs at 1 FLOP/s, E = (n-1)/n X/n bytes."""
    toy = normed(5)
    norms = 2 * 5 * ROWS * WIDTH / n
    exchange = (n - 1) / n * X / n / bandwidth
    won = step_s(f"ulysses={n}", bandwidth, toy) - step_s(
        f"ulysses={n},order=v-first", bandwidth, toy
    )
    assert won == pytest.approx(BLOCKS * min(norms, exchange), rel=1e-6)


def test_a_third_of_the_bytes_goes_first() -> None:
    """Of Q, K and V, b (s/n) h e bytes each; in all as much as without."""
    moved = {}
    for order in ("qkv", "v-first"):
        graph = build(
            parse_spec(f"ulysses=4,order={order}"),
            normed(5),
            Workload(ROWS, WIDTH, 1, 1, 1, "fp16"),
        )
        assert parse_graph(graph.text()) == graph
        moved[order] = Counter(
            {op.name: op.nbytes for s in graph.sections for op in s.ops if op.call == "all_to_all"}
        )
        first = [op.name.partition("@")[0] for op in graph.sections[1].ops if op.nbytes][:3]
        roles = [name.rpartition("/")[2] for name in first]
        assert roles == (["q", "k", "v"] if order == "qkv" else ["v", "q", "k"])
    assert moved["qkv"] == moved["v-first"]
    token = 8 * ROWS * WIDTH / 4 * ELEMENT
    assert set(moved["v-first"].values()) == {token}


def test_work_in_two_parts_is_the_work() -> None:
    """Kernel by kernel and weight by weight, at every attention of every transformer but PixArt and
    Latte: these, like U-Nets, attend to Q and K as they are projected."""
    for name in available("models", ".json"):
        model = profile(name)
        stage, plain = model.denoiser, name in ("pixart-alpha", "latte")
        attentions = {at for at, _ in stage.points("kv")}
        marked = model.kind == "transformer" and not plain
        assert stage.projections().keys() == (attentions if marked else set()), name
        for at, mark in stage.projections().items():
            until = list(stage.covered([(mark, mark)], "until"))
            then = list(stage.covered([(mark, at)], "from"))
            both: Counter[object] = Counter()
            for segment in (*until, *then):
                both.update({(k.kind, k.dims): k.count for k in segment.kernels})
            whole: Counter[object] = Counter()
            for segment in stage.segments[mark:at]:
                whole.update({(k.kind, k.dims): k.count for k in segment.kernels})
            assert both == whole
            assert sum(s.weights for s in (*until, *then)) == sum(
                s.weights for s in stage.segments[mark:at]
            )


def test_what_it_needs_is_said() -> None:
    with pytest.raises(SpecError, match=r"expected qkv\|v-first"):
        parse_spec("ulysses=4,order=vqk")
    with pytest.raises(SpecError, match="unknown 'order'"):
        parse_spec("ring=4,order=v-first")
    workload = Workload(1024, 1024, 1, 2)
    for model, spec, reason in (
        ("pixart-alpha", "ulysses=4,order=v-first", "nothing is done to Q and K"),
        ("flux1-dev", "ulysses=4,order=v-first,weights=hsdp", "where segments begin"),
    ):
        with pytest.raises(Infeasible, match=reason) as caught:
            build(parse_spec(spec), profile(model), workload)
        assert caught.value.nearest == "order=qkv"


def test_profiles_keep_the_mark() -> None:
    toy = normed(5)
    assert profile_from_json(profile_to_json(toy)) == toy
