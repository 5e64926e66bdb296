"""The picture, or the frames of a video, decoded by all ranks of a replica, each a strip of rows
(strategies.md 17).

A plan axis beside the strategy, so a function from a finished schedule to one that decodes in strips:
``vae=split``. It is exact: every convolution gets its neighbours' rows, every GroupNorm the moments of
all strips, the attention in the middle K and V of all rows. Weights are on every rank that decodes.
A decoder that goes through a video chunk by chunk does so on every strip, with exchanges in each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from paradiff.graph import Buffer, BufferKind, Op, Ref, ScheduleGraph, Shape, Work
from paradiff.profiles import KERNEL_DIMS, Point, Profile, Stage
from paradiff.strategies.builder import (
    DTYPE_BYTES,
    MOMENT_BYTES,
    Infeasible,
    strip,
    widest_strips,
)

DECODE: Mapping[str, str] = {"vae": "split|tiled"}
"""Spec parameter -> pattern of its values."""
SPLIT = (
    "AutoencoderKL",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLMochi",
    "AutoencoderKLTemporalDecoder",
    "AutoencoderKLWan",
)
"""VAEs that can be decoded in strips."""
MASKED = ("AutoencoderKLHunyuanVideo",)
"""Of them those whose attention has a mask, which a strip needs as wide as the keys that it sees."""


def split_decode(
    graph: ScheduleGraph, profile: Profile, replicas: int, dtype: str
) -> ScheduleGraph:
    """``graph`` with the VAE's decoder spread over the ranks of each of ``replicas``.

    As many ranks decode as divide the latent rows evenly. Raises Infeasible where the VAE was not traced
    in strips, and where no two ranks can share the rows.
    """
    vae, kind = profile.stages.get("vae"), _class_of_vae(profile)
    if vae is None or not any(vae.points()):
        raise Infeasible(
            f"vae=split: {kind} of {profile.name} was not traced in strips; those that can be:"
            f" {', '.join(SPLIT)}"
        )
    size = graph.world_size // replicas
    split = _Split(profile, DTYPE_BYTES[dtype])
    sections = []
    for section in graph.sections:
        ops: list[Op] = []
        for (in_strips, ranks), run in itertools.groupby(
            section.ops, key=lambda op: (split.spreads(op), op.ranks)
        ):
            whole, first = [*run], ranks[0] // size * size
            ops += split.decode(whole, range(first, first + size)) if in_strips else whole
        sections.append(replace(section, ops=tuple(ops)))
    return replace(
        graph, buffers=(*graph.buffers, *split.buffers.values()), sections=tuple(sections)
    )


def _class_of_vae(profile: Profile) -> str:
    return str(profile.source.get("models", {}).get("vae", {}).get("class", "the VAE"))


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


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One call of the decoder: ``work`` of ``stage`` on whole rows. ``number`` is its place among those
    of the video, None where there is one; ``first`` tells its points from those of the others."""

    work: Work
    stage: Stage
    number: int | None
    first: int

    def name(self, at: int) -> str:
        """That of segment ``at``."""
        name = self.stage.segments[at].name
        return name if self.number is None else f"{name}/{self.number}"

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        return () if self.number is None else (("chunk", str(self.number)),)


@dataclass
class _Split:
    """Buffers of decoding in strips; work buffers are used again from point to point."""

    profile: Profile
    element_bytes: int
    buffers: dict[str, Buffer] = field(default_factory=dict)

    def spreads(self, op: Op) -> bool:
        """Is ``op`` a stage of the decoder that was traced in strips?"""
        return (
            op.work is not None
            and op.work.stage.startswith("vae")
            and any(self.profile.stages[op.work.stage].points())
        )

    def decode(self, whole: Sequence[Op], group: Sequence[int]) -> Iterator[Op]:
        """What stands for the ops ``whole``, which decode on one rank of ``group``."""
        assert whole[0].work is not None
        shape, root = whole[0].work.shape, whole[0].ranks[0]
        ranks = _members(root, group, shape.r)
        n = len(ranks)
        strips = [shape._replace(r=shape.r // n, h=(i > 0) + (i < n - 1)) for i in range(n)]
        latent = {root: whole[0].reads}
        yield self.share_latent(root, ranks, shape, latent)
        pictures: dict[int, list[Ref]] = {rank: [] for rank in ranks}
        for chunk in self.chunks(whole):
            yield from self.one_chunk(
                chunk, dict(zip(ranks, strips, strict=True)), latent, pictures
            )
        yield from self.collect(whole[0], ranks, strips[0], pictures)

    def chunks(self, whole: Sequence[Op]) -> list[_Chunk]:
        """The calls of the decoder, one after another: of each stage as many as it repeats."""
        found: list[_Chunk] = []
        first = 0
        for work in (op.work for op in whole if op.work is not None):
            stage = self.profile.stages[work.stage]
            times = stage.repeat(work.shape._asdict())
            for _ in range(times):
                found.append(_Chunk(work._replace(once=times > 1), stage, len(found), first))
                first += len(stage.segments)
        return [replace(found[0], number=None)] if len(found) == 1 else found

    def one_chunk(
        self,
        chunk: _Chunk,
        strips: Mapping[int, Shape],
        latent: Mapping[int, tuple[Ref, ...]],
        pictures: Mapping[int, list[Ref]],
    ) -> Iterator[Op]:
        """One call of the decoder on the ``strips`` of all ranks; its part of each picture is added."""
        ranks, inner = tuple(strips), next(iter(strips.values()))
        needs = {rank: [*latent[rank]] for rank in ranks}
        at, end = 0, len(chunk.stage.segments)
        for stop, point in (*chunk.stage.points(), (end, None)):
            owns = {
                r: self.image(r, r, s, chunk.number)
                if point is None
                else self.own(r, chunk, stop, point, s)
                for r, s in strips.items()
            }
            for i, (rank, strip_shape) in enumerate(strips.items()):
                first, last = strip(inner.r * len(ranks), len(ranks), i)
                yield Op(
                    f"{chunk.name(at)}@r{rank}",
                    "compute",
                    "decode",
                    (rank,),
                    "compute",
                    reads=tuple(needs.pop(rank)),
                    writes=owns[rank],
                    work=self.work(chunk, at, stop, strip_shape),
                    tags=(("rows", f"{first}-{last}"), *chunk.tags),
                )
            needs = {rank: [] for rank in ranks}
            if point is not None:
                yield from self.exchange(ranks, chunk, stop, point, inner, owns, needs)
            at = stop
        for rank in ranks:
            pictures[rank].extend(owns[rank])

    def work(self, chunk: _Chunk, at: int, stop: int, shape: Shape) -> Work:
        """Segments ``at`` to ``stop`` on a strip; a mask of its own tokens is repeated for all keys."""
        work = chunk.work._replace(ranges=((at, stop),), shape=shape)
        first = chunk.stage.segments[at].kernels[0]
        if first.kind != "attention" or _class_of_vae(self.profile) not in MASKED:
            return work
        batch, _, q, keys, *_ = first.sizes(chunk.stage.bind(shape._asdict()))
        own, wide = (batch * q * width * self.element_bytes for width in (q, keys))
        return work._replace(copies=1, copied=own + wide, joined=wide)

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

    def nbytes(self, chunk: _Chunk, point: Point, shape: Shape) -> int:
        """What one strip publishes at ``point``."""
        size = MOMENT_BYTES if point.kind == "moments" else self.element_bytes
        return point.elements(chunk.stage.bind(shape._asdict())) * size

    def own(self, rank: int, chunk: _Chunk, at: int, point: Point, shape: Shape) -> tuple[Ref, ...]:
        """What a strip publishes at ``point``: its first and its last rows apart."""
        size, sub = self.nbytes(chunk, point, shape), chunk.first + at
        parts = (0, 1) if point.kind == "halo" else (None,)
        name = f"vae.own_{point.kind}"
        return tuple(self.ref(name, rank, size, point.kind, sub, part) for part in parts)

    def image(self, source: int, rank: int, shape: Shape, part: int | None) -> tuple[Ref]:
        """What chunk ``part`` adds to the strip of the picture that ``source`` decodes, on ``rank``."""
        size = self.image_elements(shape) * self.element_bytes
        name = "image" if source == rank else f"image.{source}"
        return (self.ref(name, rank, size, "image", part=part),)

    def image_elements(self, shape: Shape) -> int:
        """Pixels of all frames, of as many channels as the last matrix product makes."""
        tail = self.profile.stages["vae"].segments[-1]
        last = [k for k in tail.kernels if k.kind in ("conv", "gemm")][-1]
        channels = last.sizes(shape._asdict())[KERNEL_DIMS[last.kind].index("n")]
        g = self.profile.geometry
        frames = (shape.f - 1) * g.temporal_scale + 1
        return shape.b * frames * shape.r * shape.w * g.scale**2 * channels

    # ---------------------------------------------------------------------------- transfers

    def share_latent(
        self, root: int, ranks: tuple[int, ...], shape: Shape, latent: dict[int, tuple[Ref, ...]]
    ) -> Op:
        """The latent goes to all: only ``root`` is known to have the authoritative one."""
        g = self.profile.geometry
        frames = -(-shape.f // g.frame_multiple) * g.frame_multiple
        size = shape.b * g.channels * frames * shape.r * shape.w * self.element_bytes
        others = [rank for rank in ranks if rank != root]
        copies = [self.ref("latent", rank, size, "latent") for rank in others]
        order = (root, *others)
        latent |= {rank: (copy,) for rank, copy in zip(others, copies, strict=True)}
        return _collective("broadcast", "latent", order, latent[root], copies, size)

    def exchange(
        self,
        ranks: tuple[int, ...],
        chunk: _Chunk,
        at: int,
        point: Point,
        shape: Shape,
        owns: Mapping[int, tuple[Ref, ...]],
        needs: dict[int, list[Ref]],
    ) -> Iterator[Op]:
        """Halos between neighbours, moments summed, K and V gathered; ``needs`` gets what arrives."""
        name, size = f"{chunk.name(at)}/{point.kind}", self.nbytes(chunk, point, shape)
        sub = chunk.first + at
        if point.kind == "halo":
            for upper, lower in itertools.pairwise(ranks):
                below = self.ref("vae.below", upper, size // 2, "halo", sub)
                above = self.ref("vae.above", lower, size // 2, "halo", sub)
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
        found = [
            self.ref(f"vae.all_{point.kind}", r, copies * size, point.kind, sub) for r in ranks
        ]
        for rank, ref in zip(ranks, found, strict=True):
            needs[rank].append(ref)
        reads = [owns[rank][0] for rank in ranks]
        yield _collective(
            "all_reduce" if reduces else "all_gather", name, ranks, reads, found, size
        )

    def collect(
        self,
        whole: Op,
        ranks: tuple[int, ...],
        shape: Shape,
        pictures: Mapping[int, Sequence[Ref]],
    ) -> Iterator[Op]:
        """All strips of the picture, and with them the latent, are the result on one rank."""
        root = whole.ranks[0]
        strips: list[Ref] = []
        for rank in ranks:
            here = [
                ref for own in pictures[rank] for ref in self.image(rank, root, shape, own.part)
            ]
            strips += here
            if rank != root:
                yield Op(
                    f"image@r{rank}>r{root}",
                    "p2p",
                    "send",
                    (rank, root),
                    f"p2p.{rank}-{root}",
                    reads=tuple(pictures[rank]),
                    writes=tuple(here),
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
