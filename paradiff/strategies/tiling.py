"""The picture decoded tile by tile on one rank, as diffusers' ``enable_tiling`` does.

``vae=tiled`` cuts the latent into overlapping squares and blends what they decode to, so the decoder's
activations are those of one tile. Each tile has GroupNorms and an attention of its own, so the picture
changes a little; ``vae=split`` keeps it and needs several ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paradiff.graph import Buffer, Op, Ref, ScheduleGraph
from paradiff.profiles import Profile
from paradiff.strategies.builder import DTYPE_BYTES, Infeasible

OVERLAP = 4
"""A quarter of a tile overlaps the next (``tile_overlap_factor`` of AutoencoderKL)."""


def tiled_decode(graph: ScheduleGraph, profile: Profile, tile: int, dtype: str) -> ScheduleGraph:
    """``graph`` with its VAE run on tiles of ``tile`` latent rows and columns.

    Raises Infeasible for a VAE that is no AutoencoderKL of pictures: those of videos tile in their own
    ways, in time too.
    """
    kind = profile.source.get("models", {}).get("vae", {}).get("class", "no VAE")
    if kind != "AutoencoderKL" or "vocoder" in profile.stages:
        raise Infeasible(
            f"vae=tiled: {profile.name} has {kind}; an AutoencoderKL of pictures can be"
        )
    if tile < OVERLAP:
        raise Infeasible(
            f"tile={tile}: at least {OVERLAP} latent rows, a quarter overlaps", "tile=64"
        )
    buffers: dict[str, Buffer] = {}
    sections = []
    for section in graph.sections:
        ops: list[Op] = []
        for op in section.ops:
            tiled = op.work is not None and op.work.stage.startswith("vae")
            ops += _tiles(op, profile, tile, DTYPE_BYTES[dtype], buffers) if tiled else [op]
        sections.append(replace(section, ops=tuple(ops)))
    return replace(graph, buffers=(*graph.buffers, *buffers.values()), sections=tuple(sections))


def _tiles(
    whole: Op, profile: Profile, tile: int, element_bytes: int, buffers: dict[str, Buffer]
) -> Iterator[Op]:
    """``whole`` tile by tile, then the blending of all of them; itself if one tile holds everything."""
    assert whole.work is not None
    shape, (rank,) = whole.work.shape, whole.ranks
    if max(shape.r, shape.w) <= tile:
        yield whole
        return
    base, step, pixels = whole.name.rpartition("@r")[0], tile * (OVERLAP - 1) // OVERLAP, 0
    corners = [(r, w) for r in range(0, shape.r, step) for w in range(0, shape.w, step)]
    image = f"{base}.tiles@r{rank}"
    for number, (r, w) in enumerate(corners):
        rows, columns = min(tile, shape.r - r), min(tile, shape.w - w)
        pixels += shape.b * shape.f * rows * columns * profile.geometry.scale**2
        yield replace(
            whole,
            name=f"{base}/{number}@r{rank}",
            writes=(*whole.writes, Ref(image, 0, number, True)),
            work=whole.work._replace(shape=shape._replace(r=rows, k=rows, w=columns)),
        )
    buffers[image] = Buffer(image, rank, 3 * pixels * element_bytes, "image")
    reads = tuple(Ref(image, 0, number, True) for number in range(len(corners)))
    yield Op(f"{base}/blend@r{rank}", "host", "blend", (rank,), "compute", reads=reads)
