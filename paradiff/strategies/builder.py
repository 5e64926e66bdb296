"""What every strategy builds with: the workload, the mesh, and an emitter of ops.

A strategy decides which rank runs which segments and which versions it reads. This file only keeps
the books: buffers, sections, shapes, byte counts, and the one-forward walk (``Forward``) that turns
"run up to this exchange point" into ops on a group of ranks in lock step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from paradiff.graph import Buffer, BufferKind, Op, OpKind, Ref, ScheduleGraph, Section, Shape, Work
from paradiff.profiles import Expr, Profile, Stage, Total

DTYPE_BYTES: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
Tags = tuple[tuple[str, str], ...]
Options = Mapping[str, str]
"""Key -> value of a spec."""
MOMENT_BYTES = 4
"""GroupNorm moments travel in float32: E[x^2] overflows fp16 (strategies.md 10.2)."""


class Copies(NamedTuple):
    """Kernels that a schedule adds to the network's, the bytes that they read and write, and how many
    of these are what they have laid side by side, which is there while the network's kernel runs."""

    kernels: int
    nbytes: int
    joined: int = 0


NO_COPIES = Copies(0, 0)


class Infeasible(ValueError):
    """A well-formed strategy that this model or mesh cannot run.

    ``reason`` says why, ``nearest`` the closest legal choice (None where there is none).
    """

    def __init__(self, reason: str, nearest: str | None = None) -> None:
        super().__init__(f"{reason}; nearest: {nearest}" if nearest else reason)
        self.reason = reason
        self.nearest = nearest


@dataclass(frozen=True, slots=True)
class Workload:
    """One request: pixels (or mel bins) and frames, ``steps`` denoising steps, ``batch`` images."""

    height: int
    width: int
    frames: int
    steps: int
    batch: int = 1
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r}: one of {', '.join(DTYPE_BYTES)}")
        for name in ("height", "width", "frames", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Degrees of a mesh in xDiT's order, fastest to slowest: tp, ulysses, ring, pp, cfg, step, dp.

    ``pp`` is the axis of the pass (strips of a patch strategy, stages of a pipeline), ``step`` that of
    groups that evaluate different denoising steps (ParaStep).
    """

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    pp: int = 1
    cfg: int = 1
    step: int = 1
    dp: int = 1

    @property
    def sp(self) -> int:
        return self.ulysses * self.ring

    @property
    def size(self) -> int:
        return self.tp * self.sp * self.pp * self.cfg * self.step * self.dp

    def kinds(self) -> tuple[int, ...]:
        """For each rank the lowest at its place of the pass and step axes: of one group that shares
        weights and tokens, of both branches and of all replicas."""
        inner, branches = self.tp * self.sp, self.cfg * self.pp
        return tuple(
            inner * (r // inner % self.pp + branches * (r // inner // branches % self.step))
            for r in range(self.size)
        )

    def group(self, group: int, cfg: int, pp: int) -> tuple[int, ...]:
        """Ranks at the coordinates (``group``: of all step groups of all replicas): ``tp`` is the
        fastest, then ``sp``, inside which the ulysses index is."""
        size = self.tp * self.sp
        first = size * (pp + self.pp * (cfg + self.cfg * group))
        return tuple(range(first, first + size))

    def replicas(self) -> Iterator[tuple[Lane, ...]]:
        """For each data-parallel replica, its guidance branches (those of its first step group)."""
        return (groups[0] for groups in self.step_groups())

    def step_groups(self) -> Iterator[tuple[tuple[Lane, ...], ...]]:
        """For each data-parallel replica, the guidance branches of each of its step groups."""
        for dp in range(self.dp):
            yield tuple(self._lanes(dp * self.step + step, dp) for step in range(self.step))

    def _lanes(self, group: int, replica: int) -> tuple[Lane, ...]:
        return tuple(
            Lane(
                branch=("both", "uncond" if cfg == 0 else "cond")[self.cfg > 1],
                groups=tuple(self.group(group, cfg, pp) for pp in range(self.pp)),
                replica=replica,
            )
            for cfg in range(self.cfg)
        )


@dataclass(frozen=True, slots=True)
class Lane:
    """The ranks that evaluate one guidance branch of one request: ``groups[pp][sp * TP + tp]``."""

    branch: str
    groups: tuple[tuple[int, ...], ...]
    replica: int = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(rank for group in self.groups for rank in group)

    def tags(self, *spans: tuple[int, int]) -> Tags:
        """Tags of a forward over latent rows [first, last) of each span."""
        return (("branch", self.branch), ("rows", "+".join(f"{a}-{b}" for a, b in spans)))


def strip(rows: int, degree: int, i: int) -> tuple[int, int]:
    """Rows of strip i of ``degree`` equal strips."""
    return i * rows // degree, (i + 1) * rows // degree


def widest_strips(rows: int, unit: int, most: int) -> int:
    """The largest number of equal strips up to ``most`` whose rows are a multiple of ``unit``."""
    return max((n for n in range(2, most + 1) if rows % (n * unit) == 0), default=1)


Ranks = tuple[int, ...]


@dataclass
class Builder:
    """Collects buffers and ops. All ``step`` arguments are relative to the section's iteration.

    ``alike``: ranks of one of the mesh's ``kinds`` do the same at the same time, and only the ops of the
    first of each are kept. Transfers of one step and name between ranks of the same kinds are then one
    op, of those ranks of theirs that are kept; ``members`` has, of each section's ops, the ranks of all.
    """

    profile: Profile
    workload: Workload
    mesh: Mesh
    alike: bool = False
    members: list[tuple[tuple[Ranks, ...], ...]] = field(default_factory=list)
    _buffers: dict[str, Buffer] = field(default_factory=dict)
    _sections: list[Section] = field(default_factory=list)
    _ops: list[Op] | None = None
    _stand_for: list[list[Ranks]] = field(default_factory=list)
    _places: dict[tuple[int | None, str, Ranks], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        w = self.workload
        self.kinds = self.mesh.kinds() if self.alike else tuple(range(self.mesh.size))
        self.element_bytes = DTYPE_BYTES[w.dtype]
        self.latent = self.profile.latent_shape(w.height, w.width, w.frames, w.batch)
        self.rows = self.latent["r"]
        self.branches = 2 if self.profile.geometry.guidance == "cfg" else 1
        self.call_batch = w.batch * self.branches // self.mesh.cfg
        self.points = dict(self.denoiser.points())
        self.projections = self.denoiser.projections()
        self.attention = [p for p in self.points.values() if p.kind == "kv"]
        self.joint_text = any(p.joint_text for p in self.attention)

    @property
    def denoiser(self) -> Stage:
        return self.profile.denoiser

    # ------------------------------------------------------------------------------ shapes and bytes

    def shape(
        self,
        rows: int,
        *,
        batch: int | None = None,
        keys: int | None = None,
        halo: int = 0,
        text: int | None = None,
        key_text: int | None = None,
        heads: int = 1,
    ) -> Shape:
        """Binding for ``rows`` latent rows with ``keys`` visible rows (default: all rows).

        ``text`` counts the text tokens computed here (default: all), ``key_text`` those among the
        keys, ``heads`` divides the attention heads, ``halo`` counts neighbours.
        """
        t = self.latent["t"] if text is None else text
        return Shape(
            b=self.call_batch if batch is None else batch,
            f=self.latent["f"],
            r=rows,
            w=self.latent["w"],
            k=self.rows if keys is None else keys,
            t=t,
            s=self.latent["s"],
            h=halo,
            u=heads,
            j=t if key_text is None else key_text,
            p=self.mesh.tp,
        )

    def nbytes(self, expr: Expr, shape: Shape) -> int:
        """Bytes of ``expr`` elements in the network's dtype."""
        return expr(shape._asdict()) * self.element_bytes

    def latent_bytes(self, rows: int, batch: int) -> int:
        """Bytes of ``rows`` latent rows of ``batch`` latents (X of strategies.md 0.1, or a part of it),
        whose frames fill whole patches."""
        g = self.profile.geometry
        frames = -(-self.latent["f"] // g.frame_multiple) * g.frame_multiple
        return batch * g.channels * frames * rows * self.latent["w"] * self.element_bytes

    # ------------------------------------------------------------------------------ emission

    @contextmanager
    def section(self, name: str, first: int, count: int = 1, stride: int = 1) -> Iterator[None]:
        """Ops emitted inside repeat ``count`` times (nothing is kept where that is 0)."""
        self._ops, self._stand_for, self._places = [], [], {}
        yield
        if count > 0 and self._ops:
            self._sections.append(Section(name, first, count, stride, tuple(self._ops)))
            self.members.append(tuple(map(tuple, self._stand_for)))
        self._ops = None

    def keeps(self, rank: int) -> bool:
        """Whether the ops of ``rank`` are kept."""
        return self.kinds[rank] == rank

    def kept(self, ranks: Sequence[int]) -> list[int]:
        """Those of ``ranks`` whose ops are kept."""
        return [rank for rank in ranks if self.kinds[rank] == rank] if self.alike else [*ranks]

    def buffer(
        self,
        name: str,
        rank: int,
        nbytes: int,
        kind: BufferKind,
        points: Sequence[int] = (),
        module: str = "",
    ) -> str:
        """Id of buffer ``name`` on ``rank``, declared at first use, as large as its largest use."""
        key = f"{name}@r{rank}"
        known = self._buffers.get(key)
        if known is None or known.nbytes < nbytes:
            self._buffers[key] = Buffer(key, rank, nbytes, kind, tuple(points), module)
        return key

    def emit(
        self,
        name: str,
        kind: OpKind,
        call: str,
        ranks: Sequence[int],
        stream: str,
        *,
        reads: Iterable[Ref] = (),
        writes: Iterable[Ref] = (),
        step: int | None = 0,
        work: Work | None = None,
        nbytes: int = 0,
        tags: Tags = (),
    ) -> None:
        """Append an op to the section in hand, or let one there stand for it."""
        assert self._ops is not None, "emit inside a section"
        every = tuple(ranks)
        if self.alike:
            ranks = self.kept(every)
            if not ranks and len(every) == 1:
                return
            reads, writes = self._on_kept(reads), self._on_kept(writes)
            key = (step, name.partition("@")[0], tuple([self.kinds[rank] for rank in every]))
            if len(every) > 1 and self._stands(key, every, ranks, reads, writes):
                return
        self._stand_for.append([every])
        self._ops.append(
            Op(
                name=name,
                kind=kind,
                call=call,
                ranks=tuple(ranks),
                stream=stream,
                reads=tuple(reads),
                writes=tuple(writes),
                step=step,
                work=work,
                nbytes=nbytes,
                tags=tags,
            )
        )

    def _on_kept(self, refs: Iterable[Ref]) -> list[Ref]:
        return [ref for ref in refs if self.keeps(self._buffers[ref.buffer].rank)]

    def _stands(
        self,
        key: tuple[int | None, str, Ranks],
        every: Ranks,
        mine: Sequence[int],
        reads: Sequence[Ref],
        writes: Sequence[Ref],
    ) -> bool:
        """Whether an earlier op of the section, of this ``key``, stands for one of the ranks ``every``;
        ``mine`` of them are kept."""
        assert self._ops is not None
        at = self._places.setdefault(key, len(self._ops))
        if at == len(self._ops):
            return False
        self._stand_for[at].append(every)
        if mine:
            op = self._ops[at]
            self._ops[at] = replace(
                op,
                ranks=(*op.ranks, *mine),
                reads=(*op.reads, *reads),
                writes=(*op.writes, *writes),
            )
        return True

    def compute(
        self,
        name: str,
        rank: int,
        stage: str,
        shape: Shape,
        *,
        ranges: tuple[tuple[int, int], ...] | None = None,
        reads: Iterable[Ref] = (),
        writes: Iterable[Ref] = (),
        step: int | None = 0,
        call: str | None = None,
        tags: Tags = (),
        blocks: int = 1,
        copies: Copies = NO_COPIES,
        values: str = "",
    ) -> None:
        """A compute op on ``rank``: the whole stage, or the given segment ranges of it."""
        if not self.keeps(rank):
            return
        whole = ((0, len(self.profile.stages[stage].segments)),)
        self.emit(
            f"{name}@r{rank}",
            "compute",
            call or stage,
            (rank,),
            "compute",
            reads=reads,
            writes=writes,
            step=step,
            work=Work(stage, ranges or whole, shape, "", blocks, *copies, values),
            tags=tags,
        )

    def collective(
        self,
        call: str,
        name: str,
        ranks: Sequence[int],
        nbytes: int,
        reads: Iterable[Ref],
        writes: Iterable[Ref],
        *,
        step: int = 0,
        channel: str = "comm",
        tags: Tags = (),
    ) -> None:
        """A collective of ``ranks`` on the stream of their group."""
        group = "-".join(map(str, ranks))
        self.emit(
            f"{name}@g{group}",
            "collective",
            call,
            ranks,
            f"{channel}.{group}",
            reads=reads,
            writes=writes,
            step=step,
            nbytes=nbytes,
            tags=tags,
        )

    def send(
        self,
        name: str,
        source: int,
        destination: int,
        nbytes: int,
        read: Ref,
        writes: Iterable[Ref],
        *,
        step: int = 0,
    ) -> None:
        """One message on the directed channel between two ranks."""
        self.emit(
            f"{name}@r{source}>r{destination}",
            "p2p",
            "send",
            (source, destination),
            f"p2p.{source}-{destination}",
            reads=(read,),
            writes=writes,
            step=step,
            nbytes=nbytes,
        )

    # ------------------------------------------------------------------------------ around the loop

    def x(self, rank: int, step: int = 0, sub: int = 0, part: int | None = None) -> Ref:
        """The latent that enters ``step``, on ``rank``."""
        size = self.latent_bytes(self.rows, self.workload.batch)
        return Ref(self.buffer("x", rank, size, "latent"), step, part, False, sub)

    def text(self, rank: int) -> Ref:
        """Text embeddings on ``rank``, written once. Their bytes are among the forward's live inputs."""
        return Ref(self.buffer("text", rank, 0, "text"), 0, None, True)

    def stages(self, before: bool) -> list[str]:
        """Stages that run once a request: before the denoising loop (encoders) or after it (VAE)."""
        names = list(self.profile.stages)
        at = names.index("denoiser")
        per_step = ("scheduler", "guidance")
        return [n for n in (names[:at] if before else names[at + 1 :]) if n not in per_step]

    def encode(
        self,
        spans: Callable[[int], Sequence[tuple[int, int]]] | None = None,
        starts: Callable[[int], bool] = lambda rank: True,
    ) -> None:
        """Text encoders and the initial noise, on every rank (each rank owns a whole pipeline).

        ``spans`` splits the latent buffer, where later steps read it patch by patch: rank -> the rows
        of each part that the rank has to do with. ``starts``: whether a rank draws noise at all.
        """
        shape = self.shape(self.rows, batch=self.workload.batch * self.branches)
        with self.section("encode", 0):
            for rank in range(self.mesh.size):
                for stage in self.stages(before=True):
                    self.compute(stage, rank, stage, shape, step=None)
                replica = (("replica", str(rank * self.mesh.dp // self.mesh.size)),)
                rows = [(0, self.rows)] if spans is None else spans(rank)
                whole = [None] if spans is None else range(len(rows))
                tag = ("rows", "+".join(f"{a}-{b}" for a, b in rows))
                for name, writes, tags in (
                    ("text", [self.text(rank)], replica),
                    ("noise", [self.x(rank, part=p) for p in whole], (*replica, tag)),
                )[: 1 + starts(rank)]:
                    self.emit(
                        f"{name}@r{rank}",
                        "host",
                        name,
                        (rank,),
                        "compute",
                        writes=writes,
                        step=None,
                        tags=tags,
                    )

    def decode(self, rank: int, reads: Sequence[Ref]) -> None:
        """VAE (and what follows it) on ``rank``, from the final latent."""
        shape = self.shape(self.rows, batch=self.workload.batch)
        for index, stage in enumerate(self.stages(before=False)):
            self.compute(stage, rank, stage, shape, reads=() if index else reads, step=None)

    def update(
        self,
        rank: int,
        reads: Sequence[Ref],
        writes: Sequence[Ref],
        *,
        rows: int | None = None,
        tag: str = "",
        step: int = 0,
        x: Sequence[Ref] = (),
    ) -> None:
        """Guidance, then the scheduler, on ``rank``: network output and latent (``x``) to the next."""
        if not self.keeps(rank):
            return
        shape = self.shape(self.rows if rows is None else rows, batch=self.workload.batch)
        current = x or [self.x(rank, step)]
        if self.branches == 2 and "guidance" in self.profile.stages:
            self.compute(f"guidance{tag}", rank, "guidance", shape, reads=reads, step=step)
        self.compute(
            f"scheduler{tag}",
            rank,
            "scheduler",
            shape,
            reads=[*reads, *current],
            writes=writes,
            step=step,
        )

    def graph(self, meta: Mapping[str, str]) -> ScheduleGraph:
        """The finished schedule."""
        return ScheduleGraph(
            world_size=self.mesh.size,
            buffers=tuple(b for b in self._buffers.values() if self.keeps(b.rank)),
            sections=tuple(self._sections),
            meta=tuple(sorted(meta.items())),
        )


def nearest_strips(build: Builder, name: str, most: int) -> str:
    """The spec of strip pass ``name`` with the most legal strips; ``serial`` where there are none."""
    n = widest_strips(build.rows, build.profile.geometry.row_multiple, most)
    return f"{name}={n}" if n > 1 else "serial"


def balanced_owners(build: Builder, components: int) -> tuple[int, ...]:
    """Owner of each block, contiguous, with the smallest largest FLOP count (exact, by bisection)."""
    shape = build.shape(build.rows)._asdict()
    segments = build.denoiser.segments
    cost = [
        sum(k.flops(shape) for s in segments[c.lo : c.hi] for k in s.kernels)
        for c in build.denoiser.cuts
    ]

    def assign(limit: int) -> list[int]:
        owners, load, owner = [], 0, 0
        for i, each in enumerate(cost):
            must = len(cost) - i == components - 1 - owner and load
            if load and (load + each > limit or must):
                owner, load = owner + 1, 0
            owners.append(owner)
            load += each
        return owners

    low, high = max(cost), sum(cost)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if assign(middle)[-1] < components else (middle + 1, high)
    return tuple(assign(low))


@dataclass
class Forward:
    """Segments ``[lo, hi)`` of one denoiser call on a group of ranks, emitted in lock step.

    ``run(hi)`` emits what lies between the last stop and segment ``hi``: one compute op a rank, or under
    tensor parallelism one up to each sum, and an all-reduce. Ranks that share the weights lie side by
    side in ``ranks``; ``shapes`` and ``tags`` are given once for them.
    ``copies``: segment -> what the schedule adds to the network's kernels there.
    ``need`` adds refs to the next op of a rank. ``index`` numbers the forwards of one step (patches of
    a pipeline), so that what they write into shared work buffers are different versions.
    """

    build: Builder
    ranks: Sequence[int]
    shapes: Sequence[Shape]
    lo: int
    hi: int
    tags: Sequence[Tags]
    tag: str = ""
    index: int = 0
    step: int = 0
    copies: Mapping[int, Copies] = field(default_factory=dict)
    _reads: dict[int, list[Ref]] = field(default_factory=dict)
    _then: list[Callable[[], None]] = field(default_factory=list)
    _at: int = -1
    _values: str = ""

    def __post_init__(self) -> None:
        self._at = self.lo
        self.kept = self.build.kept(self.ranks)
        tp = self.build.mesh.tp
        self.shapes = [shape for shape in self.shapes for _ in range(tp)]
        if tp > 1:
            self.tags = [(*t, ("tensor", f"{i}/{tp}")) for t in self.tags for i in range(tp)]

    def need(self, rank: int, *refs: Ref) -> None:
        """Refs that the next op on ``rank`` reads."""
        if self.build.keeps(rank):
            self._reads.setdefault(rank, []).extend(refs)

    def then(self, emit: Callable[[], None], *, now: bool) -> None:
        """Call ``emit`` now, or right after the next op: what it emits must follow that op's reads."""
        if now:
            emit()
        else:
            self._then.append(emit)

    def take(self, rank: int) -> list[Ref]:
        """The refs that the next op on ``rank`` was to read, for an op emitted elsewhere."""
        return self._reads.pop(rank, [])

    def skip(self, stop: int) -> None:
        """Segments up to ``stop`` were emitted elsewhere."""
        self._at = stop

    def run(self, stop: int, writes: Mapping[int, Sequence[Ref]] | None = None) -> None:
        """Compute up to segment ``stop`` (exclusive) on all ranks; the last ops write ``writes``."""
        self._add_up_to(stop)
        if stop > self._at or writes:
            self._compute(stop, writes or {})

    def run_until_values(self, at: int, writes: Mapping[int, Sequence[Ref]]) -> None:
        """Compute until V has been projected in segment ``at``; the next op goes on there."""
        self._add_up_to(at)
        self._values = "until"
        self._compute(at, writes)

    def _add_up_to(self, stop: int) -> None:
        if self.build.mesh.tp > 1:
            for at, total in self.build.denoiser.totals():
                if self._at <= at < stop:
                    self._add_up(at + 1, total)

    def _add_up(self, stop: int, total: Total) -> None:
        """Compute up to ``stop`` and all-reduce in place what that leaves in parts; blocking."""
        build, n = self.build, self.build.mesh.tp
        layer = self.index * len(build.denoiser.segments) + stop
        itemsize = MOMENT_BYTES if total.kind == "squares" else build.element_bytes
        size = total.elements(self.shapes[0]._asdict()) * itemsize

        def refs(sub: int) -> dict[int, list[Ref]]:
            buffers = {r: build.buffer("partial", r, size, "hidden") for r in self.kept}
            version = 2 * layer + sub
            return {r: [Ref(b, self.step, None, False, version)] for r, b in buffers.items()}

        parts, sums = refs(0), refs(1)
        name = f"{build.denoiser.segments[stop - 1].name}/{total.kind}{self.tag}"
        self._compute(stop, parts)
        for i in range(0, len(self.ranks), n):
            group = self.ranks[i : i + n]
            build.collective(
                "all_reduce",
                name,
                group,
                size,
                [ref for r in build.kept(group) for ref in parts[r]],
                [ref for r in build.kept(group) for ref in sums[r]],
                step=self.step,
                channel="tensor",
            )
        for rank in self.kept:
            self.need(rank, *sums[rank])

    def _compute(self, stop: int, writes: Mapping[int, Sequence[Ref]]) -> None:
        """One compute op a rank; without work where the last one ended at ``stop`` with a sum."""
        segments = self.build.denoiser.segments
        ended = stop == self._at and not self._values
        added = [self.copies[at] for at in self.copies if self._at <= at < stop]
        copies = Copies(
            sum(c.kernels for c in added),
            sum(c.nbytes for c in added),
            max((c.joined for c in added), default=0),
        )
        name = f"{segments[self._at - 1].name}/end" if ended else segments[self._at].name
        name += "/qk" if self._values == "from" else ""
        for rank, shape, tags in zip(self.ranks, self.shapes, self.tags, strict=True):
            if not self.build.keeps(rank):
                continue
            self.build.compute(
                f"{name}{self.tag}",
                rank,
                "denoiser",
                shape,
                ranges=((self._at, stop),),
                reads=self.take(rank),
                writes=writes.get(rank, ()),
                step=self.step,
                call="forward",
                tags=tags,
                copies=copies,
                values=self._values,
            )
        self._at, self._values = stop, "from" if self._values == "until" else ""
        while self._then:
            self._then.pop(0)()

    def points(self, *kinds: str) -> list[int]:
        """Segment indices of the exchange points inside, in order."""
        return [i for i, _ in self.build.denoiser.points(*kinds) if self.lo <= i < self.hi]
