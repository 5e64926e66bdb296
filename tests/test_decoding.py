"""``vae=split``: what crosses links, what memory it takes, who decodes, what cannot be split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from shipped import profile as shipped
from test_planner import request

from paradiff.dependencies import validate
from paradiff.graph import Op, ScheduleGraph, parse_graph
from paradiff.strategies import Infeasible, SpecError, Workload, build, facts, parse_spec
from simulator.costs import CostModel
from simulator.gpu import load_gpu
from simulator.memory import phase_memory
from simulator.planner import plan

E = 2
"""Bytes of a bf16 element."""


def graph_of(name: str, spec: str, side: int = 1024) -> ScheduleGraph:
    frames = shipped(name).defaults["frames"]
    return build(parse_spec(spec), shipped(name), Workload(side, side, frames, 2))


def decode_ops(graph: ScheduleGraph) -> list[Op]:
    (section,) = (s for s in graph.sections if s.name == "decode")
    return list(section.ops)


def kl_decoder_halos(columns: int) -> list[tuple[int, int]]:
    """Channels and columns of what each 3x3 convolution reads, but the first, which reads the latent.

    Two resnets in the middle, then four levels of three (128, 256, 512, 512 channels, two to a block),
    an upsampling convolution between levels, on twice the columns, and the last convolution.
    """
    found, channels = [(512, columns)] * 4, 512
    for level, width in enumerate((512, 512, 256, 128)):
        found += [(channels, columns), *[(width, columns)] * 5]
        channels = width
        if level < 3:
            columns *= 2
            found.append((width, columns))
    return [*found, (128, columns)]


@pytest.mark.parametrize(("spec", "n"), [("cfg=2", 2), ("cfg=2,patch=4", 8)])
def test_bytes_of_each_transfer(spec: str, n: int) -> None:
    """strategies.md 17: a convolution sends C x W_l x e one way to each neighbour, a GroupNorm reduces
    2 x 32 float32, the attention gathers K and V of its rows, the picture's strips go to one rank."""
    ops = decode_ops(graph_of("sdxl", f"{spec},vae=split"))
    calls = Counter(op.call for op in ops)
    halos = kl_decoder_halos(128)
    assert calls["exchange"] == (n - 1) * len(halos)
    sent = [op.nbytes for op in ops if op.call == "exchange"]
    assert sent == [E * c * w for c, w in halos for _ in range(n - 1)]
    # four norms and the attention's in the middle, two in each of twelve resnets, the last
    assert [op.nbytes for op in ops if op.call == "all_reduce"] == [2 * 32 * 4] * (4 + 1 + 24 + 1)
    assert [op.nbytes for op in ops if op.call == "all_gather"] == [2 * 512 * 128 * 128 // n * E]
    assert [op.nbytes for op in ops if op.call == "broadcast"] == [4 * 128 * 128 * E]
    assert [op.nbytes for op in ops if op.kind == "p2p"] == [3 * 1024 * 1024 // n * E] * (n - 1)
    assert calls["image"] == 1


def video_ops(name: str, spec: str) -> list[Op]:
    size = shipped(name).defaults
    workload = Workload(size["height"], size["width"], size["frames"], 2)
    return decode_ops(build(parse_spec(spec), shipped(name), workload))


def test_bytes_of_svd() -> None:
    """The convolutions of an AutoencoderKL on every frame, in its resnets as many over frames alone,
    which have no halo. Norms before the former are of each frame, as those of the attention and at the
    end; before the latter they are of the whole video. 14 frames, 72 x 128 of the latent."""
    ops, n, f = video_ops("svd", "cfg=2,patch=3,vae=split"), 6, 14
    halos = kl_decoder_halos(128)
    sent = [op.nbytes for op in ops if op.call == "exchange"]
    assert sent == [E * c * w * f for c, w in halos for _ in range(n - 1)]
    moments = Counter(op.nbytes for op in ops if op.call == "all_reduce")
    assert moments == {2 * 32 * 4 * f: 2 * 14 + 2, 2 * 32 * 4: 2 * 14}
    assert [op.nbytes for op in ops if op.call == "all_gather"] == [2 * 512 * f * 72 * 128 // n * E]
    assert [op.nbytes for op in ops if op.call == "broadcast"] == [4 * f * 72 * 128 * E]
    assert [op.nbytes for op in ops if op.kind == "p2p"] == [3 * f * 576 * 1024 // n * E] * (n - 1)


def test_bytes_of_mochi() -> None:
    """19 resnets of two convolutions over frames, rows and columns, causal in time: a halo has all
    frames; each is behind a norm of each frame. Levels by channels, columns and frames of 28 of the
    latent, which is 60 x 106. Of 168 frames five are dropped."""
    ops, n = video_ops("mochi", "cfg=2,ulysses=3,vae=split"), 6
    levels = [(768, 1, 1, 3), (768, 1, 1, 6), (512, 2, 3, 4), (256, 4, 6, 3), (128, 8, 6, 3)]
    layers = [(c, 106 * w, 28 * f) for c, w, f, resnets in levels for _ in range(2 * resnets)]
    sent = [op.nbytes for op in ops if op.call == "exchange"]
    assert sent == [E * c * w * f for c, w, f in layers for _ in range(n - 1)]
    reduced = [op.nbytes for op in ops if op.call == "all_reduce"]
    assert reduced == [2 * 32 * 4 * f for _, _, f in layers]
    assert not [op for op in ops if op.call == "all_gather"]
    assert [op.nbytes for op in ops if op.kind == "p2p"] == [3 * 163 * 480 * 848 // n * E] * (n - 1)


def halos(ops: list[Op]) -> list[int]:
    return [op.nbytes for op in ops if op.call == "exchange"]


def test_bytes_of_latte() -> None:
    """An AutoencoderKL on 14 of 16 frames, then on two: everything twice, with so many frames."""
    ops, n = video_ops("latte", "cfg=2,ulysses=2,vae=split"), 4
    chunks = [14, 2]
    sent = [E * c * w * f for f in chunks for c, w in kl_decoder_halos(64) for _ in range(n - 1)]
    assert halos(ops) == sent
    reduced = [op.nbytes for op in ops if op.call == "all_reduce"]
    assert reduced == [2 * 32 * 4 * f for f in chunks for _ in range(30)]
    gathered = [op.nbytes for op in ops if op.call == "all_gather"]
    assert gathered == [2 * 512 * f * 64 * 64 // n * E for f in chunks]
    assert [op.nbytes for op in ops if op.call == "broadcast"] == [4 * 16 * 64 * 64 * E]
    assert [op.nbytes for op in ops if op.kind == "p2p"] == [3 * 16 * 512**2 // n * E] * (n - 1)


def wan_halos(chunk: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """Channels, columns and frames of what a neighbour lends: 384, 384, 192 and 96 channels, three
    resnets a level, of which the first has what is left of the level before.

    The first frame stays one, each other becomes two, then four. A causal convolution sees up to two
    frames before, which it has kept; the one of an upsampler sees its own.
    """
    frames, before = [1, 2, 4, 4] if chunk else [1] * 4, min(chunk, 2)
    levels = [(384, 384), (192, 384), (192, 192), (96, 96)]
    yield from [(384, columns, frames[0] + before)] * 4
    for level, (first, channels) in enumerate(levels):
        wide = columns << level
        for each in [first] + [channels] * 5:
            yield each, wide, frames[level] + before
        if level < 3:
            yield channels, 2 * wide, frames[level + 1]
    yield 96, 8 * columns, frames[3] + before


def test_bytes_of_wan() -> None:
    """21 latent frames one by one, 60 x 104. No norm is of more than a pixel; the attention in the
    middle is of each frame."""
    ops, n = video_ops("wan2.1-1.3b", "cfg=2,ulysses=2,vae=split"), 4
    sent = [c * w * f * E for i in range(21) for c, w, f in wan_halos(i, 104) for _ in range(n - 1)]
    assert halos(ops) == sent
    gathered = [op.nbytes for op in ops if op.call == "all_gather"]
    assert gathered == [2 * 384 * 60 * 104 // n * E] * 21
    assert not [op for op in ops if op.call == "all_reduce"]
    assert [op.nbytes for op in ops if op.call == "broadcast"] == [16 * 21 * 60 * 104 * E]
    assert [op.nbytes for op in ops if op.kind == "p2p"] == [3 * 81 * 480 * 832 // n * E] * (n - 1)


def hunyuan_video_halos(frames: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """Those of an AutoencoderKL on all frames of a tile. The upsamplers after the second and the third
    level double them but for the first; frames before are padding, of which every rank has its own."""
    for channels, wide in kl_decoder_halos(columns):
        times = {1: 1, 2: 1, 4: 2, 8: 4}[wide // columns]
        yield channels, wide, (frames - 1) * times + 1


def test_bytes_of_hunyuanvideo() -> None:
    """33 latent frames of 90 x 160: ten tiles of five from every third, one of three. The attention is
    of all frames of a tile."""
    ops, n = video_ops("hunyuanvideo", "ulysses=3,vae=split"), 3
    tiles = [5] * 10 + [3]
    sent = [c * w * f * E for k in tiles for c, w, f in hunyuan_video_halos(k, 160)]
    assert halos(ops) == [size for size in sent for _ in range(n - 1)]
    reduced = [op.nbytes for op in ops if op.call == "all_reduce"]
    assert reduced == [2 * 32 * 4] * 30 * len(tiles)
    gathered = [op.nbytes for op in ops if op.call == "all_gather"]
    assert gathered == [2 * 512 * f * 90 * 160 // n * E for f in tiles]
    # the mask of the own queries and all keys is made of that of the own keys
    tokens = [f * 90 * 160 for f in tiles for _ in range(n)]
    masks = [op.work for op in ops if op.work and op.work.copies]
    assert [work.joined for work in masks] == [own * own // n * E for own in tokens]
    assert [work.copied - work.joined for work in masks] == [
        own * own // n**2 * E for own in tokens
    ]
    assert [op.nbytes for op in ops if op.call == "broadcast"] == [16 * 33 * 90 * 160 * E]
    assert [op.nbytes for op in ops if op.kind == "p2p"] == [3 * 129 * 720 * 1280 // n * E] * (
        n - 1
    )


@pytest.mark.parametrize(
    ("name", "spec"),
    [("latte", "ulysses=2"), ("hunyuanvideo", "ulysses=3"), ("wan2.1-1.3b", "ulysses=3")],
)
def test_chunks_have_the_work_of_the_whole(name: str, spec: str) -> None:
    """On unit hardware seconds are FLOPs: those of all chunks on all ranks, each priced once, are those
    of the unsplit ops, which are priced as often as their stage repeats."""
    profile = shipped(name)
    costs = CostModel(profile, [load_gpu("unit")])
    alone, split = (
        sum(costs.compute(op.work, 0).device_s for op in video_ops(name, each) if op.work)
        for each in (spec, f"{spec},vae=split")
    )
    assert split == alone > 0


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("svd-xt", "cfg=2"),
        ("mochi", "cfg=2,ulysses=2"),
        ("latte", "data=2,cfg=2"),
        ("hunyuanvideo", "ulysses=2"),
        ("wan2.1-1.3b", "cfg=2,ulysses=2"),
        ("sdxl", "data=2,cfg=2"),
        ("pixart-alpha", "pipefusion=2,patches=4,warmup=1"),
        ("flux1-dev", "ulysses=4,offload=text+vae"),
        ("sd21", "asyncdiff=2,warmup=1,stride=2"),
        ("sd3-medium", "parastep=2,cfg=2,warmup=1"),
    ],
)
def test_graph_is_valid_and_nothing_else_changes(name: str, spec: str) -> None:
    alone, split = graph_of(name, spec), graph_of(name, f"{spec},vae=split")
    validate(split)
    assert parse_graph(split.text()) == split
    assert split.fingerprint() == split.unroll().fingerprint()
    assert split.world_size == alone.world_size
    loops = [[s for s in g.sections if s.name not in ("decode", "encode")] for g in (alone, split)]
    assert loops[0] == loops[1]
    assert split.staleness() == alone.staleness()
    stages = shipped(name).stages
    work = [w for op in decode_ops(alone) if (w := op.work) and any(stages[w.stage].points())]
    strips = [op.work for op in decode_ops(split) if op.call == "decode" and op.work]
    ends = [w for w in strips if w.ranges[0][0] == 0]
    rows = sum(w.shape.r * stages[w.stage].repeat(w.shape._asdict()) for w in work)
    assert sum(w.shape.r for w in ends) == rows


def test_as_many_decode_as_divide_the_rows() -> None:
    """125 latent rows: five of eight ranks, the first of them with the root."""
    ops = decode_ops(graph_of("sdxl", "parastep=8,warmup=1,vae=split", 1000))
    assert {op.ranks[0] for op in ops if op.call == "decode"} == {0, 1, 2, 3, 4}
    assert not facts(parse_spec("parastep=8,warmup=1,vae=split"), Workload(8, 8, 1, 9)).exact
    assert facts(parse_spec("cfg=2,vae=split"), Workload(8, 8, 1, 9)).exact


@pytest.mark.parametrize("n", [2, 4])
def test_activations_are_divided(n: int) -> None:
    """The peak lies in the last level, at a convolution of 256 channels in and out: all that is alive
    is rows of the strip, and one row beside the first in the other layout of its input. Weights are
    whole."""
    spec = {2: "cfg=2", 4: "cfg=2,patch=2"}[n]
    peaks = []
    for each in (spec, f"{spec},vae=split"):
        graph = graph_of("sdxl", each, 4096)
        peaks.append(phase_memory(graph, shipped("sdxl"), "bf16", phases=("decode",))[0][0])
    assert peaks[1].activations == peaks[0].activations / n + 256 * 4096 * 2
    assert peaks[1].vae == peaks[0].vae


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("svd-xt", "cfg=2"),
        ("mochi", "cfg=2,ulysses=2"),
        ("latte", "cfg=2"),
        ("wan2.1-1.3b", "cfg=2"),
    ],
)
def test_frames_are_divided_too(name: str, spec: str) -> None:
    """Mochi's convolutions are given a row more above and below, of each strip as of the whole."""
    peaks = []
    for each in (spec, f"{spec},vae=split"):
        graph = graph_of(name, each)
        peaks.append(phase_memory(graph, shipped(name), "bf16", phases=("decode",))[0][0])
    n = len({op.ranks[0] for op in decode_ops(graph) if op.call == "decode"})
    assert n == graph.world_size
    assert peaks[1].activations == pytest.approx(peaks[0].activations / n, rel=0.01)


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("sdxl", "serial", "one rank"),
        ("sdxl", "data=4", "one rank"),
    ],
)
def test_what_cannot_be_split(name: str, spec: str, words: str) -> None:
    workload = Workload(512, 512, shipped(name).defaults["frames"], 2)
    with pytest.raises(Infeasible, match=words):
        build(parse_spec(f"{spec},vae=split"), shipped(name), workload)
    with pytest.raises(SpecError, match="vae=tiles; expected split"):
        parse_spec("cfg=2,vae=tiles")


def test_a_vae_that_was_not_traced_in_strips() -> None:
    profile = shipped("wan2.1-1.3b")
    vae = profile.stages["vae"]
    whole = tuple(replace(segment, point=None) for segment in vae.segments)
    stages = {**profile.stages, "vae": replace(vae, segments=whole)}
    spec, workload = parse_spec("cfg=2,vae=split"), Workload(480, 832, 81, 2)
    with pytest.raises(Infeasible, match=r"AutoencoderKLWan of wan2\.1-1\.3b was not traced"):
        build(spec, replace(profile, stages=stages), workload)


def test_the_planner_says_what_it_would_save() -> None:
    """What the note says is the difference of the two runs; one GPU and a split decoder get no note."""
    asked = request("sdxl", "pcie8", specs=("cfg=2",))
    (note,) = plan(asked).notes
    seconds = [
        plan(replace(asked, specs=(spec,))).ranked[0].latency_s or 0.0
        for spec in ("cfg=2", "cfg=2,vae=split")
    ]
    saved = float(note.removesuffix(" s earlier").rpartition(" ")[2])
    assert saved == pytest.approx(seconds[0] - seconds[1], rel=0.05)
    for spec in ("serial", "cfg=2,vae=split"):
        assert plan(replace(asked, specs=(spec,))).notes == ()


def test_the_planner_offers_it_where_decoding_does_not_fit() -> None:
    """3072 pixels take 21 GB of activations while decoding; half of that fits beside the weights."""
    asked = replace(
        request("sdxl", "pcie2-3090", specs=("cfg=2",)), workload=Workload(3072, 3072, 1, 2)
    )
    (refused,) = plan(asked).rejected
    assert "while decoding" in str(refused.reason)
    assert refused.nearest == "cfg=2,vae=split"
    (found,) = plan(replace(asked, specs=(refused.nearest,))).ranked
    assert found.exact
