"""``vae=tiled``: which tiles, what they compute, what memory is left, what cannot be tiled."""

from __future__ import annotations

import pytest
from shipped import profile as shipped

from paradiff.dependencies import validate
from paradiff.graph import ScheduleGraph, parse_graph
from paradiff.strategies import Infeasible, SpecError, Workload, build, facts, parse_spec
from simulator.memory import peak_memory

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
    phases = ("decode",)
    profile = shipped("sdxl")
    (tiled,) = peak_memory(graph_of(f"vae=tiled,tile={tile}", side), profile, "bf16", phases=phases)
    (small,) = peak_memory(graph_of("serial", 8 * tile), profile, "bf16", phases=phases)
    (whole,) = peak_memory(graph_of("serial", side), profile, "bf16", phases=phases)
    assert tiled.activations == small.activations
    assert whole.activations == (side / 8 / tile) ** 2 * small.activations
    assert tiled.buffers > whole.buffers


def test_it_goes_with_offload_and_replicas() -> None:
    graph = graph_of("data=2,vae=tiled,offload=vae")
    validate(graph)
    assert len(shapes(graph)) == 2 * 9
    assert not facts(parse_spec("cfg=2,vae=tiled"), Workload(1024, 1024, 1, 2)).exact


def test_what_cannot_be_tiled_is_said() -> None:
    with pytest.raises(Infeasible, match="AutoencoderKLWan"):
        build(parse_spec("vae=tiled"), shipped("wan2.1-1.3b"), Workload(480, 832, 5, 2))
    with pytest.raises(Infeasible, match="at least 4") as caught:
        graph_of("vae=tiled,tile=2")
    assert caught.value.nearest == "tile=64"
    with pytest.raises(SpecError, match="unknown 'tile'"):
        parse_spec("vae=split,tile=64")
