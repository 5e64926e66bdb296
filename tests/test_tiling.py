"""``vae=tiled``: which tiles, what they compute, what memory is left, what cannot be tiled."""

from __future__ import annotations

import pytest
from shipped import profile as shipped

from paradiff.dependencies import validate
from paradiff.graph import ScheduleGraph, parse_graph
from paradiff.strategies import Infeasible, SpecError, Workload, build, facts, parse_spec
from simulator.gpu import load_gpu
from simulator.memory import misfit, phase_memory

E = 2


def graph_of(spec: str, side: int = 1024, name: str = "sdxl") -> ScheduleGraph:
    return build(parse_spec(spec), shipped(name), Workload(side, side, 1, 2))


def shapes(graph: ScheduleGraph) -> list[tuple[int, int]]:
    return [(op.work.shape.r, op.work.shape.w)
            for s in graph.sections for op in s.ops if op.work and op.work.stage == "vae"]  # fmt: skip


def test_tiles_overlap_by_a_quarter() -> None:
    """AutoencoderKL.tiled_decode: corners every 3/4 of a tile, cut at the border; 128 latent rows make
    tiles at 0, 48 and 96, the last 32 rows high."""
    graph = graph_of("vae=tiled")
    validate(graph)
    assert parse_graph(graph.text()) == graph
    assert shapes(graph) == [(r, w) for r in (64, 64, 32) for w in (64, 64, 32)]
    assert shapes(graph_of("vae=tiled,tile=128")) == shapes(graph_of("serial")) == [(128, 128)]
    corners = -(-128 // int(6 * 0.75))  # what 3/4 of six leaves is cut, as diffusers does
    assert len(shapes(graph_of("vae=tiled,tile=6"))) == corners**2
    image = next(b for b in graph.buffers if b.id == "vae.tiles@r0")
    assert image.nbytes == 3 * (8 * (64 + 64 + 32)) ** 2 * E


@pytest.mark.parametrize(("side", "tile"), [(1024, 64), (2048, 64), (2048, 128)])
def test_activations_are_those_of_one_tile(side: int, tile: int) -> None:
    """As large as a whole picture of the tile's size needs; its own phase apart."""
    profile = shipped("sdxl")
    tiled, small, whole = (
        phase_memory(graph_of(spec, pixels), profile, "bf16", phases=("decode",))[0][0]
        for spec, pixels in (
            (f"vae=tiled,tile={tile}", side), ("serial", 8 * tile), ("serial", side),
        )
    )  # fmt: skip
    assert tiled.activations == small.activations
    assert whole.activations == (side / 8 / tile) ** 2 * small.activations
    assert tiled.buffers > whole.buffers


def test_it_goes_with_offload_and_replicas() -> None:
    graph = graph_of("data=2,vae=tiled,offload=vae")
    validate(graph)
    assert len(shapes(graph)) == 2 * 9
    assert not facts(parse_spec("cfg=2,vae=tiled"), Workload(1024, 1024, 1, 2)).exact


def video(spec: str, name: str) -> ScheduleGraph:
    """At the model's own size."""
    d = shipped(name).defaults
    return build(parse_spec(spec), shipped(name), Workload(d["height"], d["width"], d["frames"], 2))


@pytest.mark.parametrize(
    ("name", "rows", "columns", "steps"),
    [  # latents of 60 x 106, 60 x 90, 96 x 170, 90 x 160, 60 x 104
        ("mochi", 32, 32, (24, 24)),
        ("cogvideox-2b", 30, 45, (25, 36)),  # 5/6 of 30, 4/5 of 45
        ("cogvideox1.5-5b", 30, 45, (25, 36)),
        ("hunyuanvideo", 32, 32, (24, 24)),
        ("wan2.1-1.3b", 32, 32, (24, 24)),
    ],
)
def test_tiles_of_videos(name: str, rows: int, columns: int, steps: tuple[int, int]) -> None:
    """Every stage of the VAE runs on each tile with its own frames, in the stages' order, before the
    next tile; all are blended once, and what joins a video in time comes after that."""
    graph, profile = video("vae=tiled", name), shipped(name)
    validate(graph)
    d = profile.defaults
    high, wide = d["height"] // 8, d["width"] // 8
    corners = [(r, w) for r in range(0, high, steps[0]) for w in range(0, wide, steps[1])]
    stages = [s for s in profile.stages if s.startswith("vae") and s != "vae_join"]
    decode = graph.sections[-1].ops
    found = [(op.work.stage, op.work.shape.r, op.work.shape.w, op.work.shape.f)
             for op in decode if op.work and op.work.stage in stages]  # fmt: skip
    frames = (d["frames"] - 1) // profile.geometry.temporal_scale + 1
    assert found == [
        (stage, min(rows, high - r), min(columns, wide - w), frames)
        for r, w in corners
        for stage in stages
    ]
    after = [op.call for op in decode][len(found) :]
    assert after == ["blend", *["vae_join"] * ("vae_join" in profile.stages)]
    pixels = sum(64 * min(rows, high - r) * min(columns, wide - w) for r, w in corners)
    image = next(b for b in graph.buffers if b.id == "vae.tiles@r0")
    assert image.nbytes == 3 * d["frames"] * pixels * E


def test_mochi_fits_boxes_of_eight() -> None:
    """Its decoder keeps all frames: 140 GB of activations whole, in tiles those of 256 x 256 pixels."""
    whole, tiled = (
        phase_memory(video(spec, "mochi"), shipped("mochi"), "bf16", phases=("decode",))[0][0]
        for spec in ("serial", "vae=tiled,offload=text+vae")
    )
    small = build(parse_spec("serial"), shipped("mochi"), Workload(256, 256, 163, 2))
    ((alone,),) = phase_memory(small, shipped("mochi"), "bf16", phases=("decode",))
    assert tiled.activations == alone.activations
    assert whole.activations == pytest.approx(alone.activations * 60 * 106 / 32**2, rel=0.01)
    assert misfit([whole], [load_gpu("h200")]) is not None
    assert misfit([tiled], [load_gpu("l40")]) is None


def test_what_cannot_be_tiled_is_said() -> None:
    with pytest.raises(Infeasible, match="svd has AutoencoderKLTemporalDecoder; diffusers tiles"):
        build(parse_spec("vae=tiled"), shipped("svd"), Workload(576, 1024, 14, 2))
    with pytest.raises(Infeasible, match="AutoencoderKL and a vocoder"):
        build(parse_spec("vae=tiled"), shipped("audioldm2-large"), Workload(1024, 64, 1, 2))
    with pytest.raises(Infeasible, match="at least 4") as caught:
        graph_of("vae=tiled,tile=2")
    assert caught.value.nearest == "tile=64"
    with pytest.raises(SpecError, match="unknown 'tile'"):
        parse_spec("vae=split,tile=64")
