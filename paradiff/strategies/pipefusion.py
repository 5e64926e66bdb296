"""Pass level, displaced patch pipeline: PipeFusion (arXiv 2405.14430, section 4.1).

Stages hold consecutive blocks and a K/V cache of full length; patches flow through the stages, and a
patch attends to patches before it of this step and to patches after it of the step before. Long skip
connections (HunyuanDiT) go from the stage that makes them straight to the one that uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paradiff.graph import Ref, Shape
from paradiff.strategies.builder import (
    Builder,
    Forward,
    Infeasible,
    Lane,
    Options,
    Tags,
    balanced_owners,
    nearest_strips,
    strip,
)
from paradiff.strategies.copies import cache_copies
from paradiff.strategies.layers import SequenceParallel, attend, local_shape, plan_sequence
from paradiff.strategies.passes import noise


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Resolved parameters: segment range of each stage, rows of each patch, and the switches.

    ``skips``: (stage that makes, stage that uses) -> blocks whose output goes there by itself.
    """

    stages: tuple[tuple[int, int], ...]
    skips: Mapping[tuple[int, int], Sequence[int]]
    patches: tuple[int, ...]
    sp: SequenceParallel
    text_mode: str | None
    prepost: bool
    warmup: int

    def shares(self, j: int) -> list[tuple[int, int]]:
        """Latent rows of each patch that sequence rank j has: shards lie side by side in a patch."""
        firsts = [sum(self.patches[:p]) for p in range(len(self.patches))]
        shards = [strip(rows, self.sp.degree, j) for rows in self.patches]
        return [(at + a, at + b) for at, (a, b) in zip(firsts, shards, strict=True)]


def stage_ranges(build: Builder, counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Segments of each stage; the first also has what precedes the blocks, the last what follows."""
    cuts, ends, at = build.denoiser.cuts, [], 0
    for count in counts[:-1]:
        at += count
        ends.append(cuts[at - 1].hi)
    return tuple(zip([0, *ends], [*ends, len(build.denoiser.segments)], strict=True))


def block_counts(build: Builder, stages: str | None) -> tuple[int, ...]:
    """Blocks of each stage: given, balanced by FLOPs, or ceil(L/N) for all but the last (default).

    Where the default would leave the last stage empty, the split is as even as it can be.
    """
    n, blocks = build.mesh.pp, len(build.denoiser.cuts)
    even = tuple(blocks * (d + 1) // n - blocks * d // n for d in range(n))
    if stages == "balanced":
        owners = balanced_owners(build, n)
        return tuple(owners.count(d) for d in range(n))
    if stages is None:
        most = -(-blocks // n)
        last = blocks - most * (n - 1)
        return (*[most] * (n - 1), last) if last > 0 else even
    counts = tuple(int(c) for c in stages.split(":"))
    if len(counts) != n or sum(counts) != blocks or min(counts) < 1:
        raise Infeasible(
            f"stages={stages}: {n} positive counts that sum to {blocks} are needed",
            f"stages={':'.join(map(str, even))}",
        )
    return counts


def skip_routes(build: Builder, counts: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Blocks whose outputs cross stages as skips, by the pair of stages (strategies.md 12.2).

    A skip inside one stage is local, and so is one whose source ends the stage before: there it is the
    hidden state, which is sent anyway.
    """
    stage = [d for d, count in enumerate(counts) for _ in range(count)]
    routes: dict[tuple[int, int], list[int]] = {}
    for source, target in build.profile.skips:
        a, b = stage[source], stage[target]
        if a != b and stage[source + 1] != b:
            routes.setdefault((a, b), []).append(source)
    return routes


def check_patches(build: Builder, patches: int) -> None:
    """Raise Infeasible unless the rows make ``patches`` patches for the sequence group to share."""
    unit, sp = build.profile.geometry.row_multiple, build.mesh.sp
    most = build.rows // (unit * sp)
    if not 1 <= patches <= most:
        raise Infeasible(
            f"patches={patches}: {build.rows} latent rows make at most {most} patches of {unit * sp}",
            f"patches={min(max(patches, 1), most)}",
        )


def patch_rows(build: Builder, patches: int) -> tuple[int, ...]:
    """Rows of each patch: ceil(rows / M) rounded up to the legal multiple; the last takes the rest.

    Rounding may leave fewer than M patches, as in the reference.
    """
    unit = build.profile.geometry.row_multiple * build.mesh.sp
    height = -(-build.rows // (patches * unit)) * unit
    rows = [height] * (build.rows // height)
    rest = build.rows - sum(rows)
    return (*rows, rest) if rest else tuple(rows)


def plan_pipeline(build: Builder, options: Options) -> Pipeline:
    """Read and check the options. Raises Infeasible with the nearest legal choice."""
    profile, n, steps = build.profile, build.mesh.pp, build.workload.steps
    blocks = len(build.denoiser.cuts)
    if profile.kind != "transformer":
        raise Infeasible(
            f"pipefusion needs a plain stack of blocks; {profile.name} is a U-Net with skips",
            nearest_strips(build, "distrifusion", n),
        )
    if not 2 <= n <= blocks:
        raise Infeasible(
            f"pipefusion={n}: {profile.name} has {blocks} blocks and a pipeline at least 2 stages",
            f"pipefusion={min(max(n, 2), blocks)}",
        )
    patches = int(options.get("patches", n))
    check_patches(build, patches)
    warmup = int(options.get("warmup", "1"))
    if not 1 <= warmup <= steps:
        raise Infeasible(
            f"warmup={warmup}: the cache is filled by at least one of the {steps} steps",
            f"warmup={min(max(1, warmup), steps)}",
        )
    counts = block_counts(build, options.get("stages"))
    return Pipeline(
        stages=stage_ranges(build, counts),
        skips=skip_routes(build, counts),
        patches=patch_rows(build, patches),
        sp=plan_sequence(build, options, patches),
        text_mode=options.get("text", profile.text_mode),
        prepost=options.get("prepost", "true") == "true",
        warmup=warmup,
    )


def pipefusion(build: Builder, options: Options) -> None:
    """Emit the whole run: warm-up on the whole image, the steady pipeline, a last step without loop."""
    pipe = plan_pipeline(build, options)
    steps, last = build.workload.steps, build.workload.steps - 1
    mesh = build.mesh
    build.encode(lambda rank: pipe.shares(rank // mesh.tp % mesh.sp))
    middle = min(pipe.warmup, last)
    for name, first, count, emit in (
        ("warmup", 0, middle, warmup_step),
        ("warmup_last", middle, pipe.warmup - middle, warmup_step),
        ("steady", pipe.warmup, last - pipe.warmup, patch_step),
        ("last", max(pipe.warmup, last), steps - max(pipe.warmup, last), patch_step),
    ):
        with build.section(name, first, count):
            for lanes in build.mesh.replicas():
                emit(Stages(build, pipe, lanes), loop=name in ("warmup", "steady"))
    with build.section("decode", steps):
        for lanes in build.mesh.replicas():
            collect(Stages(build, pipe, lanes))


def warmup_step(stages: Stages, *, loop: bool) -> None:
    """The whole image through the stages, one after another; nothing overlaps."""
    stages.advance(None)
    stages.finish(None, loop=loop)


def patch_step(stages: Stages, *, loop: bool) -> None:
    """Patch by patch through the stages; canonical order is (patch, stage)."""
    for p in range(len(stages.pipe.patches)):
        stages.advance(p)
        stages.finish(p, loop=loop)


def collect(stages: Stages) -> None:
    """Gather the latent rows over the sequence group of the last stage, then decode there."""
    build, pipe = stages.build, stages.pipe
    group = stages.lanes[0].groups[-1][:: build.mesh.tp]
    parts = range(len(pipe.patches))
    reads = [build.x(group[0], 0, 0, p) for p in parts]
    if len(group) > 1:
        size = build.latent_bytes(build.rows // len(group), build.workload.batch)
        whole = [Ref(build.buffer("x_all", r, size * len(group), "latent"), 0) for r in group]
        local = [build.x(r, 0, 0, p) for r in group for p in parts]
        build.collective("all_gather", "latents", group, size, local, whole)
        reads = whole[:1]
    build.decode(group[0], reads)


@dataclass(frozen=True)
class Stages:
    """One replica's pipeline at one step: what stage d of each branch does with patch p.

    ``p`` is None in the warm-up, where the whole image is one message.
    """

    build: Builder
    pipe: Pipeline
    lanes: tuple[Lane, ...]

    # ------------------------------------------------------------------ refs and sizes

    def rows(self, p: int | None) -> int:
        return self.build.rows if p is None else self.pipe.patches[p]

    def parts(self, p: int | None) -> list[int]:
        return list(range(len(self.pipe.patches))) if p is None else [p]

    def cache(self, d: int, rank: int, parts: Sequence[int], step: int) -> list[Ref]:
        """Rows of the K/V cache of stage d: 2 (L/N) g B s h e bytes in all (section 12.4).

        Under Ulysses a rank keeps its heads of every row, under a ring its part of every patch. None
        where the stage's blocks attend to frames only (Latte).
        """
        shape = self.build.shape(self.build.rows)
        lo, hi = self.pipe.stages[d]
        points = {i: p for i, p in self.build.denoiser.points("kv") if lo <= i < hi}
        each = (self.build.nbytes(p.elements, shape) for p in points.values())
        size = sum(each) // self.pipe.sp.degree
        if not points:
            return []
        buffer = self.build.buffer("cache", rank, size, "kv", list(points))
        return [Ref(buffer, step, part) for part in parts]

    def hidden_bytes(self, d: int, p: int | None, *, text: bool) -> int:
        """Bytes of the activation that stage d sends for patch p: its image or its text stream."""
        block = [c for c in self.build.denoiser.cuts if c.hi <= self.pipe.stages[d][1]][-1]
        shape = local_shape(self.build, self.pipe.sp, self.rows(p))
        words = self.build.nbytes(block.text_out, shape)
        return words if text else self.build.nbytes(block.out, shape) - words

    def label(self, p: int | None) -> str:
        return "/all" if p is None else f"/p{p}"

    def work_buffer(self, name: str, rank: int, p: int | None, size: int) -> Ref:
        """A message buffer. One a patch; a single shared one where receives are posted late.

        With one buffer the next receive waits for the computation that reads the last one, which is
        what an irecv enqueued behind that computation does (section 12.2).
        """
        whole = p is None
        shared = name.endswith("_in") and not self.pipe.prepost
        suffix = "" if shared else ".all" if whole else f".{p}"
        buffer = self.build.buffer(f"{name}{suffix}", rank, size, "hidden")
        return Ref(buffer, 0, None, False, (p or 0) if shared else 0)

    # ------------------------------------------------------------------ ops

    def advance(self, p: int | None) -> None:
        """Patch p through all stages of all branches."""
        for d in range(len(self.pipe.stages)):
            for lane in self.lanes:
                if d:
                    self.transfer(lane, d - 1, p)
                    self.send_skips(lane, d - 1, p)
                self.stage(lane, d, p)

    def skip(self, rank: int, block: int, p: int | None) -> Ref:
        """Output of ``block`` for patch p on a rank of the stage that makes it, or that uses it. One
        buffer a patch: a skip waits while its patch goes through the stages between."""
        cut = self.build.denoiser.cuts[block]
        size = self.build.nbytes(cut.out, self.dense_shape(p))
        name = f"skip{block}.{'all' if p is None else p}"
        return Ref(self.build.buffer(name, rank, size, "hidden", module=cut.name), 0)

    def send_skips(self, lane: Lane, d: int, p: int | None) -> None:
        """What stage d has made for later stages, one message to each, on channels of their own: where
        maker and user are neighbours, the hidden states must not wait for them."""
        for (a, b), blocks in self.pipe.skips.items():
            for source, target in (
                zip(lane.groups[a], lane.groups[b], strict=True) if a == d else ()
            ):
                reads, writes = ([self.skip(r, k, p) for k in blocks] for r in (source, target))
                size = sum(self.build._buffers[ref.buffer].nbytes for ref in reads)
                self.message(f"skip{self.label(p)}", (source, target), size, reads, writes, "skip")

    def message(
        self,
        name: str,
        ends: tuple[int, int],
        nbytes: int,
        reads: Sequence[Ref],
        writes: Sequence[Ref],
        channel: str = "p2p",
    ) -> None:
        """One message that is read, and arrives, in parts."""
        source, target = ends
        self.build.emit(
            f"{name}@r{source}>r{target}",
            "p2p",
            "send",
            ends,
            f"{channel}.{source}-{target}",
            reads=reads,
            writes=writes,
            nbytes=nbytes,
        )

    def transfer(self, lane: Lane, d: int, p: int | None) -> None:
        """Hidden state of patch p from stage d to d + 1; the text stream goes ahead of patch 0."""
        for source, target in zip(lane.groups[d], lane.groups[d + 1], strict=True):
            for name, text in (("text", True), ("z", False)):
                size = self.hidden_bytes(d, p, text=text)
                if not size or (text and p):
                    continue
                self.build.send(
                    f"{name}{self.label(p)}",
                    source,
                    target,
                    size,
                    self.work_buffer(f"{name}_out", source, p, size),
                    [self.arrival(target, d, p, text=text)],
                )

    def arrival(self, rank: int, d: int, p: int | None, *, text: bool) -> Ref:
        """Where stage d + 1 receives: the text of a step once, a patch each time."""
        size = self.hidden_bytes(d, p, text=text)
        if text:
            return Ref(self.build.buffer("text_in", rank, size, "hidden"), 0)
        return self.work_buffer("z_in", rank, p, size)

    def inputs(self, lane: Lane, d: int, j: int, p: int | None) -> list[Ref]:
        """What stage d reads for patch p on rank j of its group, the K/V cache apart."""
        rank = lane.groups[d][j]
        if d == 0:
            latent = [self.build.x(rank, 0, 0, part) for part in self.parts(p)]
            return [*latent, self.build.text(rank)]
        refs = [self.arrival(rank, d - 1, p, text=False), self.build.text(rank)]
        if self.hidden_bytes(d - 1, p, text=True) and self.reads_text(p):
            refs.append(self.arrival(rank, d - 1, p, text=True))
        received = [k for (_, b), blocks in self.pipe.skips.items() if b == d for k in blocks]
        return refs + [self.skip(rank, block, p) for block in received]

    def reads_text(self, p: int | None) -> bool:
        """Later patches read the received text again, unless patch 0's inputs were kept per block."""
        return not p or self.pipe.text_mode == "per_patch"

    def outputs(self, lane: Lane, d: int, j: int, p: int | None) -> list[Ref]:
        """What stage d writes for patch p, the K/V cache apart."""
        rank = lane.groups[d][j]
        if d == len(self.pipe.stages) - 1:
            return [self.eps(rank, p)]
        refs = [self.work_buffer("z_out", rank, p, self.hidden_bytes(d, p, text=False))]
        words = self.hidden_bytes(d, p, text=True)
        if words and not p:
            refs.append(self.work_buffer("text_out", rank, p, words))
        made = [k for (a, _), blocks in self.pipe.skips.items() if a == d for k in blocks]
        return refs + [self.skip(rank, block, p) for block in made]

    def eps(self, rank: int, p: int | None, name: str = "eps", copies: int = 1) -> Ref:
        """Network output of patch p on one rank of the last stage."""
        rows = self.rows(p) // self.pipe.sp.degree
        size = copies * self.build.latent_bytes(rows, self.build.call_batch)
        suffix = "" if p is None else f".{p}"
        return noise(self.build, rank, size, name=f"{name}{suffix}")

    def stage(self, lane: Lane, d: int, p: int | None) -> None:
        """Stage d on patch p: own rows enter the cache first, attention reads all of it."""
        build, pipe, ranks = self.build, self.pipe, lane.groups[d]
        lo, hi = pipe.stages[d]
        shape = self.dense_shape(p)
        shares = [pipe.shares(j) for j in range(pipe.sp.degree)]
        tags = [
            (
                *lane.tags(*(s if p is None else [s[p]])),
                *self.text_tags(p),
                *pipe.sp.tags(j, build.latent["t"]),
            )
            for j, s in enumerate(shares)
        ]
        shapes, label = [shape] * pipe.sp.degree, f"{self.label(p)}/s{d}"
        copies = {} if p is None else cache_copies(build, shape, pipe.sp.degree)
        forward = Forward(build, ranks, shapes, lo, hi, tags, label, p or 0, copies=copies)
        older: dict[int, list[Ref]] = {}
        for j, rank in enumerate(ranks):
            if not build.keeps(rank):
                continue
            forward.need(rank, *self.inputs(lane, d, j, p))
            older[rank] = (
                []
                if p is None
                else [
                    *self.cache(d, rank, range(p), 0),
                    *self.cache(d, rank, range(p + 1, len(pipe.patches)), -1),
                ]
            )
        if pipe.sp.degree == 1:
            for rank in forward.kept:
                forward.need(rank, *older[rank])
        else:
            for at in forward.points("kv"):
                attend(forward, at, pipe.sp, self.rows(p), build.rows, older)
        forward.run(
            hi,
            {
                rank: [*self.outputs(lane, d, j, p), *self.cache(d, rank, self.parts(p), 0)]
                for j, rank in enumerate(ranks)
                if build.keeps(rank)
            },
        )

    def text_tags(self, p: int | None) -> Tags:
        """``patch0_frozen``: each block keeps the text that enters it with patch 0, for the others."""
        if p is None or self.pipe.text_mode != "patch0_frozen":
            return ()
        return (("text", "take" if p else "keep"),)

    def dense_shape(self, p: int | None) -> Shape:
        """Rows of patch p on one sequence rank; the text is computed again with every patch."""
        return local_shape(self.build, self.pipe.sp, self.rows(p))

    def finish(self, p: int | None, *, loop: bool) -> None:
        """On the last stage: guidance (exchanged between twin stages), scheduler, rows to stage 0."""
        build, lanes = self.build, self.lanes
        reads = {r: self.eps(r, p) for lane in lanes for r in lane.groups[-1]}
        if len(lanes) > 1:
            for pair in zip(*(lane.groups[-1] for lane in lanes), strict=True):
                own = [self.eps(r, p) for r in pair]
                both = [self.eps(r, p, "eps_all", 2) for r in pair]
                size = build._buffers[own[0].buffer].nbytes
                build.collective("all_gather", f"eps{self.label(p)}", pair, size, own, both)
                reads.update(zip(pair, both, strict=True))
        rows = self.rows(p) // self.pipe.sp.degree
        for lane in lanes:
            for j, rank in enumerate(lane.groups[-1]):
                self.step(rank, [reads[rank]], rows, p)
                if loop:
                    first = lane.groups[0][j]
                    size = build.latent_bytes(rows, build.workload.batch)
                    self.loop_edge(rank, first, size, p)

    def step(self, rank: int, reads: list[Ref], rows: int, p: int | None) -> None:
        """Guidance and scheduler on the rows of patch p."""
        parts = self.parts(p)
        current = [self.build.x(rank, 0, 0, part) for part in parts]
        self.build.update(
            rank,
            reads,
            [self.build.x(rank, 1, 0, part) for part in parts],
            rows=rows,
            tag=self.label(p),
            x=current,
        )

    def loop_edge(self, last: int, first: int, size: int, p: int | None) -> None:
        """The new latent rows go back to stage 0, where the next step begins."""
        reads, writes = ([self.build.x(r, 1, 0, k) for k in self.parts(p)] for r in (last, first))
        self.message(f"x{self.label(p)}", (last, first), size, reads, writes)
