"""Pass level, displaced patches: DistriFusion (arXiv 2402.19481) and PCPP (arXiv 2412.02962).

Every layer uses its own fresh data and what the other strips published in the step before. Rules as in
the reference implementations: the warm-up parameter w runs w + 1 synchronous steps, published tensors
travel in buckets, and a partial last bucket leaves in the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from paradiff.graph import Ref, Shape
from paradiff.profiles import Segment
from paradiff.strategies.builder import Builder, Forward, Infeasible, Options
from paradiff.strategies.copies import GroupNorm, strip_copies
from paradiff.strategies.passes import (
    Strips,
    check_strips,
    finish_run,
    finish_step,
    point_bytes,
    strip_shapes,
)

MODES = ("corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "no_sync", "full_sync")
NORMS: Mapping[str, GroupNorm] = {"corrected_async_gn": "corrected", "stale_gn": "gathered"}
"""Modes whose moments are gathered; those of the others are all-reduced, or stay local."""
CHANNEL = "bucket"
"""The group of the strips: moments that are all-reduced wait for the buckets that were launched
before, as both are on distrifuser's ``batch_group``; the noise is gathered on another."""

Place = Callable[[int], tuple[list[Ref], list[Ref]] | None]
"""Segment index -> (own, others) refs, one a rank, that outlive the step; None: work buffers do."""


@dataclass
class Buckets:
    """Published tensors in layer order, packed in buckets of ``size`` tensors.

    On each rank ``own.q`` is this rank's flat slot of bucket q and ``slots.q`` the slots of all others.
    A synchronous step writes them part by part, an asynchronous one whole. Both stay allocated, so a
    layer that waits for its bucket reads both (corrected GroupNorm needs the own stale moments).
    """

    build: Builder
    shapes: Sequence[Shape]
    kinds: tuple[str, ...]
    size: int
    members: list[list[int]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    index: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        published = [i for i, _ in self.build.denoiser.points(*self.kinds)]
        points = self.build.points
        for start in range(0, len(published), self.size):
            q = len(self.members)
            self.members.append(published[start : start + self.size])
            self.nbytes.append(
                sum(point_bytes(self.build, points[i], self.shapes[0]) for i in self.members[q])
            )
            self.index.update({i: (q, part) for part, i in enumerate(self.members[q])})

    @property
    def deferred(self) -> int | None:
        """The partial last bucket, launched in the next step; never one that holds the first tensor."""
        last = len(self.members) - 1
        return last if last > 0 and len(self.members[last]) < self.size else None

    def own(self, q: int, rank: int, step: int = 0, part: int | None = None) -> Ref:
        key = self.build.buffer(f"own.{q}", rank, self.nbytes[q], "slots", self.members[q])
        return Ref(key, step, part)

    def slots(self, q: int, rank: int, step: int = 0, part: int | None = None) -> Ref:
        size = (self.build.mesh.pp - 1) * self.nbytes[q]
        key = self.build.buffer(f"slots.{q}", rank, size, "slots", self.members[q])
        return Ref(key, step, part)

    def place(self, ranks: Sequence[int], at: int) -> tuple[list[Ref], list[Ref]] | None:
        """Where a synchronous step keeps what is published at ``at``."""
        if at not in self.index:
            return None
        q, part = self.index[at]
        return (
            [self.own(q, r, 0, part) for r in ranks],
            [self.slots(q, r, 0, part) for r in ranks],
        )

    def before(self, ref: Callable[..., Ref], q: int, rank: int, phase: str) -> list[Ref]:
        """``own`` or ``slots`` of bucket q as the step before left it: in parts if synchronous."""
        if phase == "steady":
            return [ref(q, rank, -1)]
        return [ref(q, rank, -1, part) for part in range(len(self.members[q]))]

    def launch(self, ranks: Sequence[int], q: int, step: int = 0) -> None:
        """The asynchronous all-gather of bucket q as published in ``step``."""
        self.build.collective(
            "all_gather",
            f"bucket{q}",
            ranks,
            self.nbytes[q],
            [self.own(q, r, step) for r in ranks],
            [self.slots(q, r, step) for r in ranks],
            channel=CHANNEL,
        )

    def enqueue(self, forward: Forward, at: int, phase: str) -> None:
        """One published tensor: wait for its bucket of the step before, queue it, launch a full bucket.

        A layer concatenates the slots before it queues, so a gather may overwrite what the op before
        it has read; a bucket of one tensor leaves after the segment that reads it.
        """
        q, part = self.index[at]
        ranks, last = forward.ranks, len(self.members[q]) - 1
        alone = last == 0
        publish = {r: [self.own(q, r)] for r in ranks}
        if part == 0:
            if not alone:
                forward.run(at)
            self.need(forward, q, phase, self.own)
            if alone:
                forward.run(at, publish)
            if q == 0 and phase == "steady" and self.deferred is not None:
                self.launch(ranks, self.deferred, -1)
            self.need(forward, q, phase, self.slots)
        if part == last:
            if not alone:
                forward.run(at, publish)
            if q != self.deferred:
                forward.then(partial(self.launch, ranks, q), now=not alone)

    def need(self, forward: Forward, q: int, phase: str, ref: Callable[..., Ref]) -> None:
        """The next op of each rank reads bucket q of the step before."""
        for rank in forward.ranks:
            forward.need(rank, *self.before(ref, q, rank, phase))


@dataclass
class Neighbours:
    """PCPP's K/V exchange with the two adjacent strips, layer by layer.

    ``portion`` of a neighbour's rows is visible; with ``slice_at_sender`` only that portion travels
    (the paper's saving), otherwise the whole K/V does and the receiver slices (the released code).
    """

    build: Builder
    ranks: Sequence[int]
    shapes: Sequence[Shape]
    portion: float
    slice_at_sender: bool

    def nbytes(self, at: int) -> int:
        """K and V of one strip at segment ``at``."""
        return point_bytes(self.build, self.build.points[at], self.shapes[0])

    def message(self, at: int) -> int:
        """Bytes of one message to one neighbour."""
        if not self.slice_at_sender:
            return self.nbytes(at)
        tokens = frame_tokens(self.build.denoiser.segments[at], self.shapes[0])
        return self.nbytes(at) // tokens * round(self.portion * tokens)

    def own(self, at: int) -> list[Ref]:
        size = self.nbytes(at)
        return [Ref(self.build.buffer(f"kv.{at}", r, size, "kv", [at]), 0) for r in self.ranks]

    def gathered(self, at: int, step: int = 0) -> list[Ref]:
        """K and V of all other strips, as a synchronous step gathers them."""
        size = (len(self.ranks) - 1) * self.nbytes(at)
        return [Ref(self.build.buffer(f"warm.{at}", r, size, "kv", [at]), step) for r in self.ranks]

    def received(self, at: int, i: int, step: int) -> list[Ref]:
        """What strip i holds of its neighbours' K and V (two messages inside, one at the ends)."""
        sides = (["prev"] if i > 0 else []) + (["next"] if i < len(self.ranks) - 1 else [])
        size = self.message(at)
        keys = [self.build.buffer(f"{s}.{at}", self.ranks[i], size, "kv", [at]) for s in sides]
        return [Ref(key, step) for key in keys]

    def place(self, at: int) -> tuple[list[Ref], list[Ref]]:
        return self.own(at), self.gathered(at)

    def swap(self, at: int) -> None:
        """Each pair of neighbours exchanges; the data are for the next step."""
        name = self.build.denoiser.segments[at].name
        own = self.own(at)
        for i in range(len(self.ranks) - 1):
            pair = (self.ranks[i], self.ranks[i + 1])
            self.build.emit(
                f"{name}/kv@g{pair[0]}-{pair[1]}",
                "permute",
                "exchange",
                pair,
                f"nbr.{pair[0]}-{pair[1]}",
                reads=own[i : i + 2],
                writes=[self.received(at, i, 0)[-1], self.received(at, i + 1, 0)[0]],
                nbytes=self.message(at),
                tags=(("portion", str(self.portion)),) if self.slice_at_sender else (),
            )

    def layer(self, forward: Forward, at: int, phase: str, previous: int | None) -> None:
        """One self-attention: publish, read the neighbours of the step before, send.

        Before a layer sends, the code waits for the batch of the layer ``previous``.
        """
        own = self.own(at)
        forward.run(at, {r: [ref] for r, ref in zip(self.ranks, own, strict=True)})
        for i, rank in enumerate(self.ranks):
            if phase == "first":
                forward.need(rank, self.gathered(at, -1)[i])
            else:
                forward.need(rank, *self.received(at, i, -1))
            if previous is not None:
                forward.need(rank, *self.received(previous, i, 0))
        forward.run(at + 1)
        self.swap(at)


def sync_step(strips: Strips, place: Place) -> None:
    """All exchanges fresh and blocking; what ``place`` names is kept for the steps to come."""
    forward = strips.start()
    for at in forward.points():
        kept = place(at)
        if kept is None:
            strips.blocking(forward, at)
        else:
            strips.exchange(forward, at, *kept)
    strips.end(forward)


def stale_step(
    strips: Strips, buckets: Buckets, phase: str, *, reduce_gn: bool, near: Neighbours | None = None
) -> None:
    """Fresh own data, others' data of the step before.

    ``phase`` is ``first`` (the step before was synchronous) or ``steady``. ``near`` takes the K/V
    points where PCPP does; what is in no bucket stays local, or is all-reduced (``reduce_gn``).
    """
    forward, previous = strips.start(), None
    points = strips.build.points
    for at in forward.points():
        if near is not None and points[at].kind == "kv":
            near.layer(forward, at, phase, previous)
            previous = at
        elif at in buckets.index:
            buckets.enqueue(forward, at, phase)
        elif reduce_gn and points[at].kind == "moments":
            strips.blocking(forward, at)
    strips.end(forward)


def frozen_step(strips: Strips, buckets: Buckets, last_sync: int) -> None:
    """``no_sync``: the slots stay as step ``last_sync`` left them; nothing is sent."""
    forward = strips.start()
    for at in forward.points():
        q, part = buckets.index.get(at, (0, None))
        if part == 0:
            forward.run(at)
            for rank in strips.ranks:
                parts = range(len(buckets.members[q]))
                frozen = (buckets.slots(q, rank, last_sync, k) for k in parts)
                forward.need(rank, *(ref._replace(fixed=True) for ref in frozen))
    strips.end(forward)


def phases(steps: int, sync: int) -> list[tuple[str, int, int]]:
    """(name, first step, count) of the synchronous, the first stale and the steady steps."""
    first = min(1, steps - sync)
    return [("sync", 0, sync), ("first", sync, first), ("steady", sync + 1, steps - sync - first)]


def synchronous_steps(options: Mapping[str, str], steps: int) -> int:
    """w + 1 of them, or all in mode full_sync."""
    if options.get("mode") == "full_sync":
        return steps
    return min(steps, int(options.get("warmup", "4")) + 1)


def distrifusion(build: Builder, options: Options) -> None:
    """Displaced patch parallelism in all six modes (Li et al., CVPR 2024, section 4)."""
    _displaced(build, options, "distrifusion", bucket="60")


def pcpp(build: Builder, options: Options) -> None:
    """Partially conditioned patch parallelism: K/V of the two neighbours only."""
    _displaced(build, options, "pcpp", bucket="20")


def _displaced(build: Builder, options: Options, name: str, bucket: str) -> None:
    check_strips(build, name)
    if build.mesh.pp < 2:
        raise Infeasible(f"{name}=1: one strip has nothing to exchange", f"{name}=2")
    steps, mode = build.workload.steps, options.get("mode", MODES[0])
    sync = synchronous_steps(options, steps)
    neighbours = name == "pcpp"
    kinds = ["halo"] if neighbours else ["kv", "halo"]
    if mode in ("corrected_async_gn", "stale_gn"):
        kinds.append("moments")
    shapes = strip_shapes(build)
    buckets = Buckets(build, shapes, tuple(kinds), int(options.get("bucket", bucket)))
    portion = float(options.get("portion", "0.3"))
    stale_shapes = strip_shapes(build, visible_rows(build, portion)) if neighbours else shapes
    stale_tags = (("moments", "corrected"),) if mode == MODES[0] else ()
    if neighbours:
        stale_tags = (*stale_tags, ("portion", str(portion)))
    sender = neighbours and options.get("slice", "receiver") == "sender"
    joined = stale_shapes if sender else shapes
    norm = NORMS.get(mode, "reduced")
    fresh = strip_copies(build, shapes[0], fresh=True, sent=(), norm=norm)
    sent = () if mode == "no_sync" else (*kinds, *(("kv",) if sender else ()))
    steady = None if mode in ("separate_gn", "no_sync") else norm
    stale = strip_copies(build, joined[0], fresh=False, sent=sent, norm=steady)
    build.encode()
    for phase, first, count in phases(steps, sync):
        with build.section(phase, first, count):
            for lanes in build.mesh.replicas():
                for lane in lanes:
                    strips = Strips(build, lane, shapes, copies=fresh, channel=CHANNEL)
                    if phase != "sync":
                        strips = Strips(
                            build, lane, stale_shapes, stale_tags, copies=stale, channel=CHANNEL
                        )
                    near = None
                    if neighbours:
                        near = Neighbours(build, lane.ranks, shapes, portion, sender)
                    if phase == "sync":
                        sync_step(strips, _keeper(strips, buckets, near, keep=sync < steps))
                    elif mode == "no_sync":
                        frozen_step(strips, buckets, sync - 1)
                    else:
                        stale_step(strips, buckets, phase, reduce_gn=mode == "sync_gn", near=near)
                finish_step(build, lanes, build.mesh.pp, world=True)
    finish_run(build, steps)


def _keeper(strips: Strips, buckets: Buckets, near: Neighbours | None, *, keep: bool) -> Place:
    """Where a synchronous step puts what later steps read; nowhere if there are none."""

    def place(at: int) -> tuple[list[Ref], list[Ref]] | None:
        if not keep:
            return None
        if near is not None and strips.build.points[at].kind == "kv":
            return near.place(at)
        return buckets.place(strips.ranks, at)

    return place


def frame_tokens(segment: Segment, shape: Shape) -> int:
    """Image tokens of one frame of a strip of ``shape`` in the attention ``segment`` begins with."""
    queries, frame = segment.kernels[0].dims[2], {**shape._asdict(), "f": 1}
    return queries(frame) - queries({**frame, "r": 0})


def visible_rows(build: Builder, portion: float) -> list[int]:
    """Key rows that each strip sees: its own and ``portion`` of each neighbour's, to whole rows."""
    n = build.mesh.pp
    rows = build.rows // n
    share = round(rows * portion)
    return [rows + share * ((i > 0) + (i < n - 1)) for i in range(n)]
