"""Attention spread over a group: Ulysses, Ring and USP are exact, alone and inside a pipeline."""

from __future__ import annotations

import itertools
from functools import partial

import plain_loops as plain
import pytest
import torch
import torch.nn.functional as F
import toys
from test_executor_strips import graph_of, latent, reference, without_guidance

from paradiff.executor.payload import Piece
from paradiff.executor.sequence import attend, merged
from paradiff.executor.transfers import transfer
from paradiff.graph import Instance
from paradiff.strategies import Infeasible, Workload, build, parse_spec

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("device"),
]

DITS = ("pixart-alpha", "sd3-medium", "flux1-dev", "cogvideox-2b")
SPREAD = [
    # six words of text: spread over 2 ranks, whole on each of 4
    "ulysses=2",
    "ring=2",
    "ring=2,rotate=allgather",
    "ring=4",
    "ring=4,rotate=allgather",
    "ulysses=4,exchange=2x2",
    "ulysses=2,ring=2",
    "ulysses=2,ring=2,rotate=allgather",
    "cfg=2,ulysses=2",
    "cfg=2,ulysses=2,ring=2",
]


CASES = [
    *itertools.product(DITS, SPREAD),
    *itertools.product(plain.OTHERS, ["ulysses=2", "ring=4", "cfg=2,ulysses=2,ring=2"]),
    ("hunyuanvideo", "ring=2,rotate=allgather"),
    ("wan2.1-14b", "ulysses=4"),
    ("sd3.5-large", "ulysses=2"),
]


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_spread_attention_is_exact(name: str, spec: str) -> None:
    assert plain.relative(latent(name, without_guidance(name, spec)), reference(name)) < 1e-10


V_FIRST = [
    # a norm over all heads, joint projections, those of the text apart, tables given, and a mask
    *itertools.product(["flux1-dev", "sd3.5-large", "wan2.1-1.3b"], ["ulysses=2"]),
    *itertools.product(["cogvideox-2b", "hunyuandit", "hunyuanvideo", "mochi"], ["ulysses=2"]),
    ("flux1-dev", "ulysses=4,exchange=2x2"),
    ("flux1-dev", "cfg=2,ulysses=2,ring=2"),
    ("wan2.1-1.3b", "tensor=2,ulysses=2"),
    ("flux1-dev", "tensor=2,ulysses=2"),
    ("cogvideox-2b", "pipefusion=2,patches=2,ulysses=2"),
    ("flux1-dev", "pipefusion=2,patches=2,ulysses=2,ring=2"),
]


@pytest.mark.parametrize(("name", "spec"), V_FIRST)
def test_v_first_changes_no_bit(name: str, spec: str) -> None:
    spec = without_guidance(name, spec)
    assert torch.equal(latent(name, f"{spec},order=v-first"), latent(name, spec))


def test_both_ways_of_having_text_occur() -> None:
    def words(model: str, spec: str) -> set[str]:
        ops = (i.op for i in graph_of(model, spec).instances())
        return {value for op in ops for name, value in op.tags if name == "words"}

    assert words("sd3-medium", "ulysses=2") == words("sd3-medium", "ring=2") == {"0-3", "3-6"}
    assert words("sd3-medium", "ring=4") == set()
    assert words("hunyuanvideo", "ulysses=2") == set()  # refined before it joins the image's
    assert words("mochi", "ulysses=2") == set()  # pooled


def test_prompts_are_padded() -> None:
    """So masks of the text matter where the class has any."""
    for name in ("hunyuanvideo", "mochi", "pixart-alpha"):
        assert not plain.given(name)["encoder_attention_mask"].all()


@pytest.mark.parametrize("name", DITS)
@pytest.mark.parametrize(("stages", "patches"), [(2, 1), (2, 2), (4, 4), (2, 3)])
def test_degree_inside_a_pipeline_changes_nothing(name: str, stages: int, patches: int) -> None:
    """16 rows: patches of 16, 8, 4 rows, or of 8 and 8 where 3 are wanted (6 is no multiple of 4)."""
    alone = f"pipefusion={stages},patches={2 if patches == 3 else patches}"
    spread = f"pipefusion={stages},patches={patches},ulysses=2"
    assert plain.relative(latent(name, spread), latent(name, alone)) < 1e-10


@pytest.mark.parametrize(("m", "k"), [(2, 2), (4, 2), (2, 3)])
def test_two_phases_bring_what_one_brings(m: int, k: int) -> None:
    """The phases of a graph, by their own groups: every rank ends with one piece of each, in order."""
    profile = toys.transformer(blocks=1, heads=m * k)
    graph = build(
        parse_spec(f"ulysses={m * k},exchange={m}x{k}"), profile, Workload(m * k, 4, 1, 1)
    )
    held = {r: tuple(Piece((r, d), None) for d in range(m * k)) for r in range(m * k)}
    for op, base in graph.instances():
        if op.name.partition("@")[0] in ("block0.attn/q/inside", "block0.attn/q/across"):
            reads = [(r, held[r]) for r in op.ranks]
            found = transfer(Instance(op, base), reads, op.ranks)
            held.update(zip(op.ranks, found, strict=True))
    assert held == {d: tuple(Piece((r, d), None) for r in range(m * k)) for d in range(m * k)}


@pytest.mark.parametrize("name", plain.OTHERS)
@pytest.mark.parametrize("axis", ["ulysses=2", "ring=2"])
def test_tokens_spread_inside_a_pipeline_of_any_class(name: str, axis: str) -> None:
    spread = latent(name, f"pipefusion=3,patches=4,stages=balanced,{axis}")
    alone = latent(name, "pipefusion=3,patches=4,stages=balanced")
    assert plain.relative(spread, alone) < 1e-10


@pytest.mark.parametrize("name", ["pixart-alpha", "cogvideox-2b", "hunyuandit"])
def test_branches_stages_and_heads_together(name: str) -> None:
    together = latent(name, "cfg=2,pipefusion=2,patches=4,ulysses=2")
    assert plain.relative(together, latent(name, "pipefusion=2,patches=4")) < 1e-10


@pytest.mark.parametrize("name", DITS)
@pytest.mark.parametrize("rotate", ["p2p", "allgather"])
@pytest.mark.parametrize("patches", [1, 2, 4])
def test_a_ring_inside_a_pipeline_carries_the_cache(name: str, rotate: str, patches: int) -> None:
    alone = latent(name, f"pipefusion=2,patches={patches}")
    ring = f"pipefusion=2,patches={patches},ring=2,rotate={rotate}"
    assert plain.relative(latent(name, ring), alone) < 1e-10
    if patches == 2:
        both = latent(name, f"{ring},ulysses=2")
        assert plain.relative(both, alone) < 1e-10


def test_convolutions_cannot_be_spread() -> None:
    with pytest.raises(Infeasible, match="halos"):
        graph_of("sd21", "ulysses=2")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_blocks_of_keys_merge_to_attention_over_all(
    dtype: torch.dtype, error: float, masked: bool
) -> None:
    """Of three blocks of keys, the first of each is seen where the mask hides some."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, 2, 3, generator=generator, dtype=torch.float64)
    query, key, value = (draw(n, 8).to(dtype) for n in (5, 12, 12))
    seen = torch.rand(2, 1, 1, 12, generator=generator) > 0.4 if masked else None
    found = None
    for block in torch.arange(12).split([3, 4, 5]):
        if seen is not None:
            seen[..., block[0]] = True
        mask = None if seen is None else seen[..., block]
        found = merged(found, attend(query, key[:, :, block], value[:, :, block], mask))
    whole = F.scaled_dot_product_attention(query, key, value, seen)
    torch.testing.assert_close(found[0].to(dtype), whole, rtol=error, atol=error)
