"""The picture, or the frames of a video, decoded by all ranks of a replica, each a strip of rows
(strategies.md 17).

A plan axis beside the strategy, so a function from a finished schedule to one that decodes in strips:
``vae=split``. It is exact: every convolution gets its neighbours' rows, every GroupNorm the moments of
all strips, the attention in the middle K and V of all rows. Weights are on every rank that decodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from paradiff.graph import Buffer, BufferKind, Op, Ref, ScheduleGraph, Shape
from paradiff.profiles import KERNEL_DIMS, Point, Profile
from paradiff.strategies.builder import (
    DTYPE_BYTES,
    MOMENT_BYTES,
    Infeasible,
    strip,
    widest_strips,
)

DECODE: Mapping[str, str] = {"vae": "split|tiled"}
"""Spec parameter -> pattern of its values."""
DECODE_AT_ONCE = ("AutoencoderKL", "AutoencoderKLTemporalDecoder", "AutoencoderKLMochi")
"""VAEs that decode a picture or a whole video in one call. Others go chunk by chunk, and so does Latte's
pipeline with an AutoencoderKL: it decodes 14 frames at a time."""


def split_decode(
    graph: ScheduleGraph, profile: Profile, replicas: int, dtype: str
) -> ScheduleGraph:
    """``graph`` with the VAE's decoder spread over the ranks of each of ``replicas``.

    As many ranks decode as divide the latent rows evenly. Raises Infeasible where the VAE was not traced
    in strips, and where no two ranks can share the rows.
    """
    vae = profile.stages.get("vae")
    if vae is None or not any(vae.points()):
        kind = profile.source.get("models", {}).get("vae", {}).get("class", "the VAE")
        raise Infeasible(
            f"vae=split: {kind} of {profile.name} does not decode all at once; those that do"
            f" can be split: {', '.join(DECODE_AT_ONCE)}"
        )
    size = graph.world_size // replicas
    split = _Split(profile, DTYPE_BYTES[dtype])
    sections = []
    for section in graph.sections:
        ops: list[Op] = []
        for op in section.ops:
            if op.work is None or op.work.stage != "vae":
                ops.append(op)
            else:
                first = op.ranks[0] // size * size
                ops += split.decode(op, range(first, first + size))
        sections.append(replace(section, ops=tuple(ops)))
    return replace(
        graph, buffers=(*graph.buffers, *split.buffers.values()), sections=tuple(sections)
    )


def _members(root: int, group: Sequence[int], rows: int) -> tuple[int, ...]:
    """The ranks that decode: ``root``, which has the latent, and others of ``group``."""
    n = widest_strips(rows, 1, len(group))
    if n < 2:
        raise Infeasible(
            f"vae=split: {rows} latent rows and {len(group)} ranks of a replica; no two can share them"
            if len(group) > 1
            else "vae=split: one rank of a replica has none to share the rows with"
        )
    return tuple(sorted([root, *[rank for rank in group if rank != root][: n - 1]]))


@dataclass
class _Split:
    """Buffers of decoding in strips; work buffers are used again from point to point."""

    profile: Profile
    element_bytes: int
    buffers: dict[str, Buffer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stage = self.profile.stages["vae"]

    def decode(self, whole: Op, group: Sequence[int]) -> Iterator[Op]:
        """What stands for the op ``whole``, which decodes on one rank of ``group``."""
        assert whole.work is not None
        shape, root = whole.work.shape, whole.ranks[0]
        ranks = _members(root, group, shape.r)
        n = len(ranks)
        strips = [shape._replace(r=shape.r // n, h=(i > 0) + (i < n - 1)) for i in range(n)]
        needs: dict[int, list[Ref]] = {root: list(whole.reads)}
        yield self.share_latent(root, ranks, shape, needs)
        at, end = 0, len(self.stage.segments)
        for stop, point in (*self.stage.points(), (end, None)):
            owns = {
                r: self.image(r, r, s) if point is None else self.own(r, stop, point, s)
                for r, s in zip(ranks, strips, strict=True)
            }
            for i, rank in enumerate(ranks):
                first, last = strip(shape.r, n, i)
                yield Op(
                    f"{self.stage.segments[at].name}@r{rank}",
                    "compute",
                    "decode",
                    (rank,),
                    "compute",
                    reads=tuple(needs.pop(rank)),
                    writes=owns[rank],
                    work=whole.work._replace(ranges=((at, stop),), shape=strips[i]),
                    tags=(("rows", f"{first}-{last}"),),
                )
            needs = {rank: [] for rank in ranks}
            if point is not None:
                yield from self.exchange(ranks, stop, point, strips[0], owns, needs)
            at = stop
        yield from self.collect(whole, ranks, strips[0], owns)

    # ---------------------------------------------------------------------------- values

    def ref(
        self,
        name: str,
        rank: int,
        nbytes: int,
        kind: BufferKind,
        sub: int = 0,
        part: int | None = None,
    ) -> Ref:
        """A value on ``rank``; ``sub`` is the point at which a work buffer is in use."""
        key = f"{name}@r{rank}"
        known = self.buffers.get(key)
        if known is None or known.nbytes < nbytes:
            self.buffers[key] = Buffer(key, rank, nbytes, kind)
        return Ref(key, 0, part, True, sub)

    def nbytes(self, point: Point, shape: Shape) -> int:
        """What one strip publishes at ``point``."""
        size = MOMENT_BYTES if point.kind == "moments" else self.element_bytes
        return point.elements(shape._asdict()) * size

    def own(self, rank: int, at: int, point: Point, shape: Shape) -> tuple[Ref, ...]:
        """What a strip publishes at ``point``: its first and its last rows apart."""
        size = self.nbytes(point, shape)
        parts = (0, 1) if point.kind == "halo" else (None,)
        name = f"vae.own_{point.kind}"
        return tuple(self.ref(name, rank, size, point.kind, at, part) for part in parts)

    def image(self, source: int, rank: int, shape: Shape) -> tuple[Ref]:
        """The strip of the picture that ``source`` has decoded, on ``rank``."""
        size = self.image_elements(shape) * self.element_bytes
        name = "image" if source == rank else f"image.{source}"
        return (self.ref(name, rank, size, "image"),)

    def image_elements(self, shape: Shape) -> int:
        """Pixels of all frames, of as many channels as the last matrix product makes."""
        last = [k for k in self.stage.segments[-1].kernels if k.kind in ("conv", "gemm")][-1]
        channels = last.sizes(shape._asdict())[KERNEL_DIMS[last.kind].index("n")]
        g = self.profile.geometry
        frames = (shape.f - 1) * g.temporal_scale + 1
        return shape.b * frames * shape.r * shape.w * g.scale**2 * channels

    # ---------------------------------------------------------------------------- transfers

    def share_latent(
        self, root: int, ranks: tuple[int, ...], shape: Shape, needs: dict[int, list[Ref]]
    ) -> Op:
        """The latent goes to all: only ``root`` is known to have the authoritative one."""
        channels = self.profile.geometry.channels
        size = shape.b * channels * shape.f * shape.r * shape.w * self.element_bytes
        others = [rank for rank in ranks if rank != root]
        copies = [self.ref("latent", rank, size, "latent") for rank in others]
        order = (root, *others)
        needs |= {rank: [copy] for rank, copy in zip(others, copies, strict=True)}
        return _collective("broadcast", "latent", order, needs[root], copies, size)

    def exchange(
        self,
        ranks: tuple[int, ...],
        at: int,
        point: Point,
        shape: Shape,
        owns: Mapping[int, tuple[Ref, ...]],
        needs: dict[int, list[Ref]],
    ) -> Iterator[Op]:
        """Halos between neighbours, moments summed, K and V gathered; ``needs`` gets what arrives."""
        name, size = f"{self.stage.segments[at].name}/{point.kind}", self.nbytes(point, shape)
        if point.kind == "halo":
            for upper, lower in itertools.pairwise(ranks):
                below = self.ref("vae.below", upper, size // 2, "halo", at)
                above = self.ref("vae.above", lower, size // 2, "halo", at)
                needs[upper].append(below)
                needs[lower].append(above)
                yield Op(
                    f"{name}@g{upper}-{lower}",
                    "permute",
                    "exchange",
                    (upper, lower),
                    f"nbr.{upper}-{lower}",
                    reads=(owns[upper][1], owns[lower][0]),
                    writes=(below, above),
                    nbytes=size // 2,
                )
            return
        reduces = point.kind == "moments"
        copies = 1 if reduces else len(ranks) - 1
        found = [self.ref(f"vae.all_{point.kind}", r, copies * size, point.kind, at) for r in ranks]
        for rank, ref in zip(ranks, found, strict=True):
            needs[rank].append(ref)
        reads = [owns[rank][0] for rank in ranks]
        yield _collective(
            "all_reduce" if reduces else "all_gather", name, ranks, reads, found, size
        )

    def collect(
        self, whole: Op, ranks: tuple[int, ...], shape: Shape, owns: Mapping[int, tuple[Ref, ...]]
    ) -> Iterator[Op]:
        """All strips of the picture, and with them the latent, are the result on one rank."""
        root = whole.ranks[0]
        strips: list[Ref] = []
        for rank in ranks:
            (here,) = self.image(rank, root, shape)
            strips.append(here)
            if rank != root:
                yield Op(
                    f"image@r{rank}>r{root}",
                    "p2p",
                    "send",
                    (rank, root),
                    f"p2p.{rank}-{root}",
                    reads=owns[rank],
                    writes=(here,),
                    nbytes=self.image_elements(shape) * self.element_bytes,
                )
        yield Op(
            f"image@r{root}",
            "host",
            "image",
            (root,),
            "compute",
            reads=(*whole.reads, *strips),
        )


def _collective(
    call: str,
    name: str,
    ranks: tuple[int, ...],
    reads: Sequence[Ref],
    writes: Sequence[Ref],
    nbytes: int,
) -> Op:
    group = "-".join(map(str, ranks))
    return Op(
        f"{name}@g{group}",
        "collective",
        call,
        ranks,
        f"comm.{group}",
        reads=tuple(reads),
        writes=tuple(writes),
        nbytes=nbytes,
    )
