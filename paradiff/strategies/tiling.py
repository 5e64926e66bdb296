"""The picture or video decoded tile by tile on one rank, as diffusers' ``enable_tiling`` does.

``vae=tiled`` cuts the latent into overlapping tiles and blends what they decode to, so the decoder's
activations are those of one tile. Each tile has norms and attentions of its own, so the picture changes
a little; ``vae=split`` keeps it and needs several ranks. A tile of a video has all its frames, which
each class decodes in batches of its own as it does without tiles: those are the stages of its profile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from paradiff.graph import Buffer, Op, Ref, ScheduleGraph
from paradiff.profiles import Profile
from paradiff.strategies.builder import DTYPE_BYTES, Infeasible

SMALLEST = 4
"""Latent rows of the smallest tile: a whole row of it overlaps the next."""
QUARTER = (0.25, 0.25)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of ``rows`` x ``columns`` latent pixels; ``overlap``: shares of both in the next tile."""

    rows: int
    columns: int
    overlap: tuple[float, float]

    @property
    def steps(self) -> tuple[int, int]:
        """From one tile to the next, in latent rows and columns. In floats, as diffusers counts."""
        down, right = self.overlap
        return int(self.rows * (1 - down)), int(self.columns * (1 - right))


TILINGS: Mapping[str, Tiling] = {
    "AutoencoderKL": Tiling(64, 64, QUARTER),
    "AutoencoderKLCogVideoX": Tiling(30, 45, (1 / 6, 1 / 5)),
    "AutoencoderKLHunyuanVideo": Tiling(32, 32, QUARTER),
    "AutoencoderKLMochi": Tiling(32, 32, QUARTER),
    "AutoencoderKLWan": Tiling(32, 32, QUARTER),
}
"""Class of a VAE -> how its ``enable_tiling()`` cuts latents (diffusers 0.42, ``models/autoencoders``;
an AutoencoderKL takes the size that it was trained at, here that of SD 1 and 2)."""
WHOLE = ("vae_join",)
"""Stages of a VAE that work on what its tiles have become."""


def tiling(profile: Profile, tile: int | None) -> Tiling:
    """How the VAE of ``profile`` is tiled, in squares of ``tile`` latent pixels if that is given.

    Raises Infeasible for a VAE that diffusers cannot tile, and for tiles that are too small.
    """
    kind = profile.source.get("models", {}).get("vae", {}).get("class", "no VAE")
    own = TILINGS.get(kind)
    if own is None or "vocoder" in profile.stages:
        raise Infeasible(
            f"vae=tiled: {profile.name} has {kind}"
            + (" and a vocoder" if own else "")
            + f"; diffusers tiles {', '.join(TILINGS)}"
        )
    if tile is None:
        return own
    if tile < SMALLEST:
        raise Infeasible(
            f"tile={tile}: at least {SMALLEST} latent rows, of which a part overlaps",
            f"tile={own.rows}",
        )
    return Tiling(tile, tile, own.overlap)


def tiled_decode(
    graph: ScheduleGraph, profile: Profile, tile: int | None, dtype: str
) -> ScheduleGraph:
    """``graph`` with its VAE run on tiles. Raises Infeasible as ``tiling`` does."""
    how = tiling(profile, tile)
    buffers: dict[str, Buffer] = {}
    sections = []
    for section in graph.sections:
        ops: list[Op] = []
        for (tiled, _), run in groupby(section.ops, key=lambda op: (_is_tiled(op), op.ranks)):
            whole = [*run]
            ops += _tiles(whole, profile, how, DTYPE_BYTES[dtype], buffers) if tiled else whole
        sections.append(replace(section, ops=tuple(ops)))
    return replace(graph, buffers=(*graph.buffers, *buffers.values()), sections=tuple(sections))


def _is_tiled(op: Op) -> bool:
    return op.work is not None and op.work.stage.startswith("vae") and op.work.stage not in WHOLE


def _tiles(
    whole: Sequence[Op],
    profile: Profile,
    how: Tiling,
    element_bytes: int,
    buffers: dict[str, Buffer],
) -> Iterator[Op]:
    """The stages ``whole`` of a rank tile by tile, then the blending of all; unchanged if one tile
    holds everything."""
    assert whole[0].work is not None
    shape, (rank,), geometry = whole[0].work.shape, whole[0].ranks, profile.geometry
    if shape.r <= how.rows and shape.w <= how.columns:
        yield from whole
        return
    down, right = how.steps
    corners = [(r, w) for r in range(0, shape.r, down) for w in range(0, shape.w, right)]
    image, pixels = f"vae.tiles@r{rank}", 0
    frames = (shape.f - 1) * geometry.temporal_scale + 1
    for number, (r, w) in enumerate(corners):
        rows, columns = min(how.rows, shape.r - r), min(how.columns, shape.w - w)
        pixels += shape.b * frames * rows * columns * geometry.scale**2
        part = shape._replace(r=rows, k=rows, w=columns)
        for op in whole:
            assert op.work is not None
            yield replace(
                op,
                name=f"{op.name.rpartition('@r')[0]}/{number}@r{rank}",
                writes=(*op.writes, Ref(image, 0, number, True)) if op is whole[-1] else op.writes,
                work=op.work._replace(shape=part),
            )
    buffers[image] = Buffer(image, rank, 3 * pixels * element_bytes, "image")
    reads = tuple(Ref(image, 0, number, True) for number in range(len(corners)))
    yield Op(f"vae/blend@r{rank}", "host", "blend", (rank,), "compute", reads=reads)
