"""Every strategy: a valid graph, each segment computed once, its byte formulas."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import pytest
from cases import CASES, DIT, DIVIDED, IDS, JOINT, SKIPS, UNET, WORKLOAD, graph_of

from paradiff.dependencies import validate
from paradiff.graph import parse_graph
from paradiff.profiles import Profile
from paradiff.strategies import facts, parse_spec


@pytest.mark.parametrize(("profile", "spec"), CASES, ids=IDS)
def test_graph_is_valid_round_trips_and_unrolls(profile: Profile, spec: str) -> None:
    graph = graph_of(profile, spec)

    validate(graph)

    assert graph.world_size == facts(parse_spec(spec), WORKLOAD).n_gpus
    assert parse_graph(graph.text()) == graph
    unrolled = graph.unroll()
    assert parse_graph(unrolled.text()) == unrolled
    assert graph.fingerprint() == unrolled.fingerprint()
    assert graph.op_count() == unrolled.op_count()
    assert graph.received_bytes() == unrolled.received_bytes()
    assert graph.staleness() == unrolled.staleness()
    assert graph.peak_bytes() == unrolled.peak_bytes()


SHARED = [
    (p, s)
    for p, s in CASES
    if not any(
        each in s for each in ("asyncdiff", "parastep", "batchstep", "data", "ring", "cache")
    )
]


@pytest.mark.parametrize(("profile", "spec"), SHARED, ids=[f"{p.name}-{s}" for p, s in SHARED])
def test_every_segment_is_computed_once_a_step(profile: Profile, spec: str) -> None:
    """Rows x segments summed over the ranks that share a forward make one whole forward.

    Not where ranks repeat a forward (step strategies, data) or attend block by block (ring).
    """
    rows: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
    for op, base in graph_of(profile, spec).instances():
        if op.work is None or op.work.stage != "denoiser" or op.step is None:
            continue
        for lo, hi in op.work.ranges:
            for segment in range(lo, hi):
                shape = op.work.shape
                rows[op.step + base, segment] += Fraction(shape.r * shape.b, shape.u * shape.p)

    segments, branches = len(profile.denoiser.segments), 2
    assert rows == {(t, s): 16 * branches for t in range(9) for s in range(segments)}


# ------------------------------------------------------------------------------------- bytes

TOKENS, HIDDEN, BLOCKS, ELEMENT, STEPS = 64, 8, 4, 2, 9
LATENT = 4 * 16 * 4 * ELEMENT  # one latent X: channels x rows x columns


def received(spec: str, call: str, profile: Profile = DIT) -> float:
    """Bytes that rank 0 receives in one step by ``call``, the whole run divided by its steps."""
    return graph_of(profile, spec).bytes_by_call()[0].get(call, (0, 0))[1] / STEPS


@pytest.mark.parametrize("n", [2, 4])
def test_ulysses_bytes(n: int) -> None:
    """4 exchanges a layer, each (n-1)/n of b (s/n) h e (section 5.3); b = 2 with guidance."""
    assert received(f"ulysses={n}", "all_to_all") == BLOCKS * 4 * (n - 1) / n * (
        2 * TOKENS // n * HIDDEN * ELEMENT
    )
    assert received(f"ulysses={n}", "all_gather") == (n - 1) * 2 * LATENT // n


@pytest.mark.parametrize("n", [2, 4, 8])
def test_ring_bytes(n: int) -> None:
    """2 b (s/n) h e (n-1) a layer, by P2P or by one all-gather (section 6.3)."""
    wanted = BLOCKS * 2 * 2 * TOKENS // n * HIDDEN * ELEMENT * (n - 1)
    assert received(f"ring={n}", "ring") == wanted
    gathered = received(f"ring={n},rotate=allgather", "all_gather")
    assert gathered - (n - 1) * 2 * LATENT // n == wanted


def test_usp_bytes() -> None:
    """4(u-1)/u b (s/n) h e + 2(r-1) b (s/n) h e a layer (section 7.3), u = r = 2."""
    share = 2 * TOKENS // 4 * HIDDEN * ELEMENT
    assert received("ulysses=2,ring=2", "all_to_all") == BLOCKS * 4 * share / 2
    assert received("ulysses=2,ring=2", "ring") == BLOCKS * 2 * share


def test_tensor_ranks_are_the_fastest_axis() -> None:
    """Mesh order tp, sp, pp, cfg (section 15): each sum is between neighbours, and every other exchange
    between ranks with the same share of the weights."""
    graph = graph_of(DIVIDED, "cfg=2,tensor=2,pipefusion=2,ulysses=2,patches=2")
    ops = {o.name: o for o in graph.sections[1].ops if len(o.ranks) > 1}.values()
    groups = {(o.call, o.ranks) for o in ops}
    assert {g for call, g in groups if call == "all_reduce"} == {
        (r, r + 1) for r in range(0, 16, 2)
    }
    assert ("all_to_all", (0, 2)) in groups
    assert ("send", (0, 4)) in groups
    assert ("all_gather", (4, 12)) in groups
    assert all(len({r % 2 for r in g}) == 1 for call, g in groups if call != "all_reduce")


def test_joint_text_is_split_or_gathered() -> None:
    """6 text tokens: 2 ranks split them (3 each); 4 ranks replicate and gather their heads."""
    split = 2 * (TOKENS + 6) // 2 * HIDDEN * ELEMENT
    assert received("ulysses=2", "all_to_all", JOINT) == BLOCKS * 4 * split / 2
    image = 2 * TOKENS // 4 * HIDDEN * ELEMENT
    heads = 2 * 6 * HIDDEN // 4 * ELEMENT
    assert received("ulysses=4", "all_to_all", JOINT) == BLOCKS * 4 * image * 3 / 4
    gathered = received("ulysses=4", "all_gather", JOINT) - 3 * 2 * LATENT // 4
    assert gathered == BLOCKS * 3 * heads


def test_cfg_bytes() -> None:
    """Each branch sends its prediction X e to its twin (section 2.3)."""
    assert received("cfg=2", "all_gather") == LATENT


def test_distrifusion_bytes_and_buffers() -> None:
    """(n-1) e sum(published) a step; gathered buffers n e sum (sections 10.3, 10.4).

    U-Net, b = 2, n = 4, e = 2: K/V 16 b (r/4) w = 512, halo 16 b w = 128 elements a layer and one
    for conv_out, moments 4 b = 8 numbers of 4 bytes; 3 layers.
    """
    published = 3 * (512 * 2 + 128 * 2 + 8 * 4) + 128 * 2
    graph = graph_of(UNET, "distrifusion=4,warmup=0,bucket=2")
    buckets = [
        op.nbytes for op, _ in graph.instances() if op.name.startswith("bucket") and op.nbytes
    ]
    # 10 tensors in buckets of 2: none deferred; 8 steps send all of them
    assert sum(buckets) == 8 * published
    assert graph.peak_bytes(["slots"])[0] == 4 * published


def test_pcpp_saves_70_percent() -> None:
    """Interior strip: 2 portion / (n-1) of DistriFusion's K/V with sender slicing (section 11.3).

    In whole tokens: of the 16 of a strip (r = 4, w = 4) round(0.3 x 16) = 5 travel.
    """
    token = 2 * 16 * ELEMENT  # K and V: 16 b r w with b = 2
    graph = graph_of(DIT, "pcpp=4,warmup=0,slice=sender,portion=0.3")
    inside = graph.bytes_by_call()[1]["exchange"][1]
    assert inside == 8 * BLOCKS * 2 * 5 * token


@pytest.mark.parametrize("patches", [2, 4])
def test_pipefusion_bytes_and_cache(patches: int) -> None:
    """Forward link g B s h e a step whatever M, loop link X e; cache 2 (L/N) g B s h e (12.3, 12.4)."""
    graph = graph_of(DIT, f"pipefusion=2,patches={patches}")
    sent = graph.bytes_by_call()
    assert sent[1]["send"][1] == STEPS * 2 * TOKENS * HIDDEN * ELEMENT
    assert sent[0]["send"][1] == (STEPS - 1) * LATENT
    assert graph.peak_bytes(["kv"]) == dict.fromkeys((0, 1), 2 * 2 * 2 * TOKENS * HIDDEN * ELEMENT)


@pytest.mark.parametrize("patches", [1, 4])
@pytest.mark.parametrize(
    ("counts", "blocks"),
    [
        ("3:3", {(0, 1): 2}),
        ("2:2:2", {(0, 2): 2}),
        ("1:1:2:1:1", {(0, 4): 1, (1, 3): 1}),
        ("1:4:1", {(0, 2): 1}),  # from block 1 to block 4: inside stage 1
        ("2:4", {(0, 1): 1}),  # from block 1 on: it is the hidden state that stage 1 gets
        ("5:1", {(0, 1): 1}),
    ],
)
def test_skips_go_from_the_stage_that_makes_them_to_the_one_that_uses_them(
    counts: str, blocks: dict[tuple[int, int], int], patches: int
) -> None:
    """g B s h e a step for each skip that crosses stages, whatever M, in M messages of all that go the
    same way, on channels of their own (section 12.2). Skips go from block 0 to 5 and from 1 to 4."""
    graph = graph_of(SKIPS, f"pipefusion={len(counts) // 2 + 1},patches={patches},stages={counts}")
    sent: dict[tuple[int, ...], int] = defaultdict(int)
    messages: dict[tuple[int, ...], int] = defaultdict(int)
    for op, _ in graph.instances():
        if op.stream.startswith("skip."):
            sent[op.ranks] += op.nbytes
            messages[op.ranks] += 1
    assert sent == {ends: STEPS * n * 2 * TOKENS * HIDDEN * ELEMENT for ends, n in blocks.items()}
    assert messages == dict.fromkeys(blocks, 1 + (STEPS - 1) * patches)


def test_asyncdiff_broadcasts_what_skips_over_a_boundary() -> None:
    """Blocks 0 1 | 2 3 | 4 5: the hidden states after 1 and 3, and of the skips 0 to 5 and 1 to 4 the
    first; the second is the hidden state after 1."""
    graph = graph_of(SKIPS, "asyncdiff=3,warmup=1,cuts=2:4")
    names = {op.name.split("@")[0] for op, _ in graph.instances() if "bcast" in op.name}
    assert names == {"bcast.block0", "bcast.block1", "bcast.block3", "bcast.eps"}


@pytest.mark.parametrize("stride", [1, 2])
def test_asyncdiff_bytes_of_each_branch(stride: int) -> None:
    """A branch of its own halves what is broadcast, boundary and prediction; then the twins send each
    other X e before every scheduler step. Replicas add nothing."""
    rest = f"asyncdiff=2,warmup=1,stride={stride}"
    alone, both, many = (
        graph_of(DIT, f"{mesh}{rest}").bytes_by_call() for mesh in ("", "cfg=2,", "data=3,cfg=2,")
    )
    ranks = 1 + stride
    for rank in range(6 * ranks):
        assert many[rank] == both[rank % (2 * ranks)]
        calls = both[rank % (2 * ranks)]
        assert calls["broadcast"][1] == alone[rank % ranks]["broadcast"][1] / 2
        assert calls["all_gather"][1] == STEPS * LATENT
        assert set(calls) == {"broadcast", "all_gather"}


def test_ring_inside_pipefusion_pays_once_a_patch() -> None:
    """The ring turns the whole local cache in every micro-step (section 15.2)."""
    whole = graph_of(DIT, "pipefusion=2,ring=2,patches=1,warmup=1").bytes_by_call()[0]["ring"][1]
    cut = graph_of(DIT, "pipefusion=2,ring=2,patches=4,warmup=1").bytes_by_call()[0]["ring"][1]
    assert cut == whole / STEPS * (1 + 8 * 4)


def test_parastep_bytes() -> None:
    """A cycle of p: (p-1) g X e into rank 0 and one latent broadcast to the others (14.3)."""
    sent = graph_of(DIT, "parastep=4,warmup=1").bytes_by_call()
    assert sent[0]["send"][1] == 2 * 3 * 2 * LATENT
    assert sent[3]["broadcast"][1] == 2 * LATENT


def test_asyncdiff_unet_broadcasts_whole_blocks_where_it_can() -> None:
    """Owners 0 0 0 | 0 1 ...: a block inside one component sends its tuple, a cut one its parts."""
    graph = graph_of(UNET, "asyncdiff=2,warmup=1,cuts=4")
    size = 2 * 16 * 4 * ELEMENT
    sizes = {op.name.split("@")[0]: op.nbytes for op, _ in graph.instances() if "bcast" in op.name}
    assert sizes == {
        "bcast.conv_in": 8 * size,
        "bcast.down.0": 24 * size,
        "bcast.down.1.0": 8 * size,
        "bcast.down.1.1": 8 * size,
        "bcast.down.2": 24 * size,
        "bcast.conv_out": 4 * size,
        "bcast.eps": 2 * LATENT,
    }


def test_what_a_cached_step_holds() -> None:
    """The hidden state after the last block but one, b (s/n + text) h e; 6 words are on each of 4."""
    for spec, words in (("cache=2", 6), ("ulysses=2,cache=2", 3), ("ulysses=4,cache=2", 6)):
        n = parse_spec(spec).n_gpus
        graph = graph_of(JOINT, spec)
        sizes = {b.nbytes for b in graph.buffers if b.id.startswith("cache.")}
        assert sizes == {2 * (TOKENS // n + words) * HIDDEN * ELEMENT}
