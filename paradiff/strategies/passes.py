"""Pass level, exact: the whole forward on each rank, and strips that exchange nothing or all.

Each pass is a function ``(build, options)`` that emits the denoising loop. ``Strips`` is shared with the
displaced passes, which differ only in the versions that a layer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from paradiff.graph import Ref, Shape
from paradiff.profiles import Point
from paradiff.strategies.builder import (
    MOMENT_BYTES,
    Builder,
    Copies,
    Forward,
    Infeasible,
    Lane,
    Options,
    Tags,
    nearest_strips,
    strip,
)
from paradiff.strategies.copies import strip_copies
from paradiff.strategies.layers import SequenceParallel, attend, local_shape, plan_sequence

# ---------------------------------------------------------------------------------- output of a step


def noise(build: Builder, rank: int, nbytes: int, step: int = 0, name: str = "eps") -> Ref:
    """The network output of ``step`` on ``rank`` (or the gathered whole of it)."""
    return Ref(build.buffer(name, rank, nbytes, "noise"), step)


def gather_output(
    build: Builder, ranks: Sequence[int], nbytes: int, source: str, target: str, step: int
) -> None:
    """All-gather the pieces of the network output, ``nbytes`` each, over ``ranks``."""
    whole = nbytes * len(ranks)
    build.collective(
        "all_gather",
        target,
        ranks,
        nbytes,
        [noise(build, r, nbytes, step, source) for r in ranks],
        [noise(build, r, whole, step, target) for r in ranks],
        step=step,
    )


def gather_pieces(
    build: Builder, lanes: Sequence[Lane], pieces: int, *, world: bool, step: int = 0
) -> dict[int, Ref]:
    """From the ``eps`` piece on every rank to the whole prediction on every rank.

    ``world``: one gather over patches and branches together (DistriFusion); otherwise over the
    sequence group, then between the ranks of the two branches (xDiT).
    """
    rows = build.rows // pieces
    size = build.latent_bytes(rows, build.call_batch)
    ranks = [r for lane in lanes for r in lane.ranks]
    have = "eps"
    if world and len(ranks) > 1:
        gather_output(build, ranks, size, have, "eps_all", step)
        have, size = "eps_all", size * len(ranks)
    elif not world:
        if pieces > 1:
            for lane in lanes:
                for share in range(build.mesh.tp):
                    group = lane.ranks[share :: build.mesh.tp]
                    gather_output(build, group, size, have, "eps_seq", step)
            have, size = "eps_seq", size * pieces
        if len(lanes) > 1:
            for pair in zip(*(lane.ranks for lane in lanes), strict=True):
                gather_output(build, pair, size, have, "eps_all", step)
            have, size = "eps_all", size * len(lanes)
    return {rank: noise(build, rank, size, step, have) for rank in ranks}


def finish_step(build: Builder, lanes: Sequence[Lane], pieces: int, *, world: bool) -> None:
    """From the ``eps`` piece on every rank to the next latent on every rank."""
    for rank, eps in gather_pieces(build, lanes, pieces, world=world).items():
        build.update(rank, [eps], [build.x(rank, 1)])


def finish_run(build: Builder, steps: int) -> None:
    """Decode on the first rank of each replica."""
    with build.section("decode", steps):
        for lanes in build.mesh.replicas():
            rank = lanes[0].ranks[0]
            build.decode(rank, [build.x(rank)])


# ---------------------------------------------------------------------------------- whole


def whole_rows(build: Builder) -> Tags:
    """Tags of a forward on the whole latent, both branches in one call."""
    return (("branch", "both"), ("rows", f"0-{build.rows}"))


Latent = Callable[[int], Ref]
"""rank -> the latent that it evaluates."""
Predict = Callable[[Sequence[Lane], int, Latent], dict[int, Ref]]
"""(branches of one group, step, latents) -> the whole prediction on each rank of the group."""


def run_whole(
    build: Builder,
    sp: SequenceParallel,
    lane: Lane,
    step: int,
    latent: Latent,
    *,
    start: int = 0,
    reads: Mapping[int, Sequence[Ref]] | None = None,
    writes: Mapping[int, Sequence[Ref]] | None = None,
) -> None:
    """One branch's forward from segment ``start`` on; each rank then holds its piece of ``eps``.

    The first op of a rank also reads ``reads``, the last also writes ``writes``.
    """
    size = build.latent_bytes(build.rows // sp.degree, build.call_batch)
    shapes = [local_shape(build, sp, build.rows)] * sp.degree
    tags = [
        (*lane.tags(strip(build.rows, sp.degree, j)), *sp.tags(j, build.latent["t"]))
        for j in range(sp.degree)
    ]
    end = len(build.denoiser.segments)
    forward = Forward(build, lane.ranks, shapes, start, end, tags, step=step)
    for rank in lane.ranks:
        forward.need(rank, latent(rank), build.text(rank), *(reads or {}).get(rank, ()))
    for at in forward.points("kv") if sp.degree > 1 else ():
        attend(forward, at, sp, build.rows, build.rows)
    eps = {r: [noise(build, r, size, step), *(writes or {}).get(r, ())] for r in lane.ranks}
    forward.run(end, eps)


def whole_pass(build: Builder, options: Options) -> Predict:
    """One evaluation in which every rank sees the whole latent: plain, tensor, Ulysses,
    Ring, USP."""
    sp = plan_sequence(build, options, 1)

    def predict(lanes: Sequence[Lane], step: int, latent: Latent) -> dict[int, Ref]:
        for lane in lanes:
            run_whole(build, sp, lane, step, latent)
        return gather_pieces(build, lanes, sp.degree, world=False, step=step)

    return predict


def every_step(build: Builder, predict: Predict) -> None:
    """The denoising loop of a pass that keeps nothing from step to step."""
    build.encode()
    with build.section("steps", 0, build.workload.steps):
        for lanes in build.mesh.replicas():
            for rank, eps in predict(lanes, 0, build.x).items():
                build.update(rank, [eps], [build.x(rank, 1)])
    finish_run(build, build.workload.steps)


# ---------------------------------------------------------------------------------- strips


def strip_shapes(
    build: Builder, keys: Sequence[int] | None = None, *, halo: bool = True
) -> list[Shape]:
    """Shape of each strip of the pass axis; ``keys`` are its visible rows (default all)."""
    n = build.mesh.pp
    rows = build.rows // n
    return [
        build.shape(
            rows,
            keys=build.rows if keys is None else keys[i],
            halo=((i > 0) + (i < n - 1)) if halo else 0,
        )
        for i in range(n)
    ]


def check_strips(build: Builder, name: str) -> None:
    """Raise Infeasible unless the latent rows divide into equal legal strips."""
    n, unit = build.mesh.pp, build.profile.geometry.row_multiple
    if n > 1 and build.rows % (n * unit):
        raise Infeasible(
            f"{name}={n}: {build.rows} latent rows do not divide into {n} strips of a multiple of"
            f" {unit} rows",
            nearest_strips(build, name, n),
        )


def point_bytes(build: Builder, point: Point, shape: Shape) -> int:
    """What one strip publishes at ``point``."""
    if point.kind == "moments":
        return point.elements(shape._asdict()) * MOMENT_BYTES
    return build.nbytes(point.elements, shape)


@dataclass
class Strips:
    """One forward on equal strips, exchanging at points; shared by all strip passes of a lane.

    ``channel``: the communicator of the exchanges; what else is on it runs before or after them.
    """

    build: Builder
    lane: Lane
    shapes: Sequence[Shape]
    tags: Tags = ()
    step: int = 0
    copies: Mapping[int, Copies] = field(default_factory=dict)
    channel: str = "comm"

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.lane.ranks

    def start(self, latent: Latent | None = None) -> Forward:
        """A forward over all segments that has read the whole latent and the text."""
        build, n, end = self.build, len(self.ranks), len(self.build.denoiser.segments)
        tags = [(*self.lane.tags(strip(build.rows, n, i)), *self.tags) for i in range(n)]
        forward = Forward(
            build, self.ranks, self.shapes, 0, end, tags, step=self.step, copies=self.copies
        )
        for rank in self.ranks:
            forward.need(rank, (latent or build.x)(rank), build.text(rank))
        return forward

    def end(self, forward: Forward) -> None:
        """Run to the end of the network; each rank holds its strip of the output."""
        build = self.build
        size = build.latent_bytes(build.rows // build.mesh.pp, build.call_batch)
        forward.run(forward.hi, {r: [noise(build, r, size, self.step)] for r in self.ranks})

    def exchange(
        self, forward: Forward, at: int, own: Sequence[Ref], others: Sequence[Ref]
    ) -> None:
        """Blocking, fresh exchange of what is published at segment ``at``.

        GroupNorm moments whose result is not kept are all-reduced, the rest is all-gathered.
        """
        build, point = self.build, self.build.points[at]
        forward.run(at, {r: [ref] for r, ref in zip(self.ranks, own, strict=True)})
        reduce = point.kind == "moments" and others[0].part is None
        build.collective(
            "all_reduce" if reduce else "all_gather",
            f"{build.denoiser.segments[at].name}/{point.kind}",
            self.ranks,
            point_bytes(build, point, self.shapes[0]),
            own,
            others,
            step=self.step,
            channel=self.channel,
        )
        for rank, ref in zip(self.ranks, others, strict=True):
            forward.need(rank, ref)

    def blocking(self, forward: Forward, at: int) -> None:
        """``exchange`` through work buffers that the next layer uses again."""
        point = self.build.points[at]
        size = point_bytes(self.build, point, self.shapes[0])
        copies = 1 if point.kind == "moments" else len(self.ranks) - 1

        def refs(name: str, nbytes: int) -> list[Ref]:
            return [
                Ref(self.build.buffer(name, r, nbytes, point.kind), self.step, None, False, at)
                for r in self.ranks
            ]

        self.exchange(
            forward, at, refs(f"own_{point.kind}", size), refs(f"all_{point.kind}", copies * size)
        )


def strip_pass(build: Builder, options: Options) -> Predict:
    """One evaluation on strips: naive (no exchange), or every exchange fresh and blocking."""
    check_strips(build, "patch")
    naive = options.get("mode", "sync") == "naive"
    rows = build.rows // build.mesh.pp
    shapes = strip_shapes(build, [rows] * build.mesh.pp if naive else None, halo=not naive)
    copies = {} if naive else strip_copies(build, shapes[0], fresh=True, sent=(), norm="reduced")

    def predict(lanes: Sequence[Lane], step: int, latent: Latent) -> dict[int, Ref]:
        for lane in lanes:
            strips = Strips(build, lane, shapes, step=step, copies=copies)
            forward = strips.start(latent)
            for at in [] if naive or build.mesh.pp == 1 else forward.points():
                strips.blocking(forward, at)
            strips.end(forward)
        return gather_pieces(build, lanes, build.mesh.pp, world=True, step=step)

    return predict


def patch(build: Builder, options: Options) -> None:
    """Naive or synchronous strips."""
    every_step(build, strip_pass(build, options))
