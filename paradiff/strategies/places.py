"""Where weights live: stored in fp8, sharded over ranks in lock step, or taking turns on the GPU.

Plan axes beside the strategy: they decide whether a schedule fits. What they do goes with any strategy,
so each is a function from a finished schedule to one that also moves weights. Spec parameters:

- ``weights=fp8``: the denoiser's weights are stored in one byte and cast up layer by layer, as
  diffusers' layerwise casting does.
- ``weights=hsdp``: the denoiser's blocks are sharded over the ranks that run the same layers at the same
  time, and gathered block by block, the next one while this one computes (two buffers alternate).
  Replicated over guidance branches and replicas, hence hybrid.
- ``offload=text+vae``: what is named takes turns on the GPU with the denoiser, once a request. Host
  memory keeps a copy of all weights, so only loading takes time. ``text`` are all stages before the
  denoiser, ``vae`` all after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from paradiff.graph import Buffer, Op, Ref, ScheduleGraph, Section
from paradiff.profiles import Profile, Stage
from paradiff.strategies.builder import DTYPE_BYTES

PLACES: Mapping[str, str] = {
    "offload": r"text|vae|text\+vae|vae\+text",
    "weights": r"fp8|hsdp|fp8\+hsdp|hsdp\+fp8",
}
"""Spec parameter -> pattern of its values."""
PER_STEP = ("denoiser", "scheduler", "guidance")


def held_params(stage: Stage, segments: Collection[int]) -> int:
    """Parameters that a rank holds: the whole module if it runs all of it, else its segments' own."""
    if len(segments) == len(stage.segments):
        return stage.params
    return sum(stage.segments[i].weights for i in segments)


def held_bytes(stage: Stage, segments: Collection[int], size: int, dtype: str) -> int:
    """Bytes of what a rank holds at ``size`` bytes a parameter, with what stays in fp32 in a run in
    fp16: 2 B more each for the 1.0 G parameters of a T5-XXL's ``wo``."""
    more = DTYPE_BYTES["fp32"] - size if dtype == "fp16" and segments else 0
    return size * held_params(stage, segments) + more * stage.fp32


def blocks_of(profile: Profile) -> frozenset[int]:
    """Segments of the denoiser's blocks."""
    return frozenset(i for c in profile.denoiser.cuts for i in range(c.lo, c.hi))


def segments_run(graph: ScheduleGraph) -> list[dict[str, set[int]]]:
    """Per rank: stage -> segments that any of its ops computes."""
    used: list[dict[str, set[int]]] = [{} for _ in range(graph.world_size)]
    for section in graph.sections:
        for op in section.ops:
            if op.work is not None:
                here = used[op.ranks[0]].setdefault(op.work.stage, set())
                for lo, hi in op.work.ranges:
                    here.update(range(lo, hi))
    return used


# --------------------------------------------------------------------------------------------- fp8


def stored_in_fp8(graph: ScheduleGraph) -> ScheduleGraph:
    """The same schedule on a denoiser whose weights are stored in one byte."""

    def stored(op: Op) -> Op:
        if op.work is None or op.work.stage != "denoiser":
            return op
        return replace(op, work=op.work._replace(stored="fp8"))

    sections = tuple(replace(s, ops=tuple(map(stored, s.ops))) for s in graph.sections)
    return replace(graph, sections=sections)


# --------------------------------------------------------------------------------------------- turns


def in_turns(
    graph: ScheduleGraph,
    profile: Profile,
    offload: Collection[str],
    sizes: tuple[int, int],
    dtype: str,
) -> ScheduleGraph:
    """Loads before the encoders (``text``), before the loop, and before the decoder (``vae``).

    ``sizes``: bytes of a parameter of the denoiser and of any other stage in ``dtype``. Turns
    overwrite one buffer, so each load waits for the last op that uses what was there before.
    """
    turns = _Turns(graph, profile, frozenset(offload), sizes, dtype)
    first, *others = graph.sections
    encode = Section(first.name, first.first, first.count, first.stride, turns.filled(first.ops))
    loop = tuple(op for rank in range(graph.world_size) for op in turns.load(rank, "denoiser"))
    sections = [replace(encode, ops=(*encode.ops, *loop))]
    sections += [replace(section, ops=turns.filled(section.ops)) for section in others]
    return replace(
        graph, buffers=(*graph.buffers, *turns.buffers.values()), sections=tuple(sections)
    )


@dataclass
class _Turns:
    """What is on each GPU in turn: ``text``, then ``denoiser`` (its shard, where it is sharded, and all
    that is not offloaded but comes after it), then ``vae``."""

    graph: ScheduleGraph
    profile: Profile
    offload: frozenset[str]
    sizes: tuple[int, int]
    dtype: str
    buffers: dict[int, Buffer] = field(default_factory=dict)
    loaded: set[tuple[int, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        names = list(self.profile.stages)
        self.before = names[: names.index("denoiser")]
        self.used = segments_run(self.graph)
        self.shards = {b.rank: b.nbytes for b in self.graph.buffers if b.id == f"shard@r{b.rank}"}
        self.blocks = blocks_of(self.profile) if self.shards else frozenset()

    def turn_of(self, stage: str) -> str | None:
        """When ``stage`` is loaded; None if it never leaves."""
        if stage in self.before:
            return "text" if "text" in self.offload else None
        if stage not in PER_STEP and "vae" in self.offload:
            return "vae"
        return "denoiser" if stage in PER_STEP or "text" in self.offload else None

    def ref(self, rank: int, turn: str) -> Ref:
        buffer = self.buffers.setdefault(rank, Buffer(f"turn@r{rank}", rank, 0, "weights"))
        return Ref(buffer.id, 0, None, True, ("text", "denoiser", "vae").index(turn))

    def load(self, rank: int, turn: str) -> Iterator[Op]:
        """The load of one turn on one rank, if there is something to load and it was not yet."""
        nbytes = self.shards.get(rank, 0) if turn == "denoiser" else 0
        for name, segments in self.used[rank].items():
            if self.turn_of(name) == turn:
                held = segments - self.blocks if name == "denoiser" else segments
                size = self.sizes[name != "denoiser"]
                nbytes += held_bytes(self.profile.stages[name], held, size, self.dtype)
        if nbytes and (rank, turn) not in self.loaded:
            self.loaded.add((rank, turn))
            yield Op(
                name=f"load.{turn}@r{rank}",
                kind="host",
                call="load",
                ranks=(rank,),
                stream="copy",
                writes=(self.ref(rank, turn),),
                nbytes=nbytes,
                tags=(("turn", turn),),
            )

    def filled(self, ops: Sequence[Op]) -> tuple[Op, ...]:
        """``ops`` with the loads that they need, each reading what it runs on."""
        out: list[Op] = []
        for op in ops:
            turn = "denoiser" if op.call == "shard" else None
            if op.work is not None and self.profile.stages[op.work.stage].params:
                turn = self.turn_of(op.work.stage)
            if turn is None:
                out.append(op)
                continue
            out += self.load(op.ranks[0], turn)
            out.append(replace(op, reads=(*op.reads, self.ref(op.ranks[0], turn))))
        return tuple(out)


# ------------------------------------------------------------------------------------------ sharding


def sharded(
    graph: ScheduleGraph, profile: Profile, groups: Sequence[tuple[int, ...]], param_bytes: int
) -> ScheduleGraph:
    """The denoiser's blocks spread over each of ``groups``, which compute the same at the same time.

    A block's weights (its segments' parameters of ``param_bytes`` each) are all-gathered before it
    runs; what belongs to no block stays on every rank. The next gather is issued before this block
    computes, and waits for the block before it, whose buffer it overwrites.
    """
    shards = _Shards(profile, groups, param_bytes)
    sections = [replace(s, ops=tuple(shards.section(s.ops))) for s in graph.sections]
    held = tuple(
        Op(f"shard@r{rank}", "host", "shard", (rank,), "compute", writes=(shards.shard(rank),))
        for rank in shards.visited
    )
    sections[0] = replace(sections[0], ops=(*sections[0].ops, *held))
    return replace(graph, buffers=(*graph.buffers, *shards.buffers()), sections=tuple(sections))


Visit = tuple[int, int]
"""(group, number of the gather within an iteration of a section)."""


@dataclass
class _Shards:
    """Sharding in work: blocks (cuts), who has visited which, sizes of the buffers."""

    profile: Profile
    groups: Sequence[tuple[int, ...]]
    param_bytes: int
    visited: dict[int, set[int]] = field(default_factory=dict)
    _size: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        segments = self.profile.denoiser.segments
        cuts = self.profile.denoiser.cuts
        self.group_of = {rank: g for g, ranks in enumerate(self.groups) for rank in ranks}
        self.nbytes = [
            self.param_bytes * sum(s.weights for s in segments[c.lo : c.hi]) for c in cuts
        ]
        self.block_of = {
            i: b for b, c in enumerate(cuts) if self.nbytes[b] for i in range(c.lo, c.hi)
        }

    def shard(self, rank: int) -> Ref:
        return Ref(f"shard@r{rank}", 0, None, True)

    def buffers(self) -> Iterator[Buffer]:
        """What each rank keeps of the blocks that it runs, and the two that a gather fills."""
        for rank, blocks in self.visited.items():
            n = len(self.groups[self.group_of[rank]])
            kept = sum(-(-self.nbytes[b] // n) for b in blocks)
            yield Buffer(f"shard@r{rank}", rank, kept, "weights")
        for name, size in self._size.items():
            yield Buffer(name, int(name.rpartition("@r")[2]), size, "weights")

    def pieces(self, op: Op) -> list[tuple[int | None, int, int]]:
        """(block, lo, hi) of a denoiser op, cut where the block changes."""
        assert op.work is not None
        found: list[tuple[int | None, int, int]] = []
        for lo, hi in op.work.ranges:
            for block, run in itertools.groupby(range(lo, hi), key=self.block_of.get):
                at = list(run)
                found.append((block, at[0], at[-1] + 1))
        return found

    def section(self, ops: Sequence[Op]) -> Iterator[Op]:
        """``ops`` cut at blocks, with the gathers between them."""
        visits: dict[int, list[tuple[int, int]]] = {}  # group -> (block, step) of each gather
        plan: list[tuple[Visit | None, list[Op], bool]] = []
        for together, group in self.in_lock_step(ops):
            if group is None:
                plan.append((None, together, False))
                continue
            for block, lo, hi in self.pieces(together[0]):
                here = visits.setdefault(group, [])
                fresh = block is not None and (not here or here[-1][0] != block)
                if block is not None and fresh:
                    here.append((block, together[0].step or 0))
                visit = None if block is None else (group, len(here) - 1)
                plan.append((visit, [self.piece(op, lo, hi) for op in together], fresh))
        for visit, piece, fresh in plan:
            if visit is not None:
                group, number = visit
                ahead = range(number and number + 1, number + 2) if fresh else range(0)
                for v in ahead:
                    if v < len(visits[group]):
                        yield self.gather(group, v, *visits[group][v])
                step = visits[group][number][1]
                piece = [
                    replace(op, reads=(*op.reads, self.whole(op.ranks[0], number, step)))
                    for op in piece
                ]
            yield from piece

    def in_lock_step(self, ops: Sequence[Op]) -> Iterator[tuple[list[Op], int | None]]:
        """Runs of ops that a group's ranks do at the same time; any other op alone, without group."""

        def key(numbered: tuple[int, Op]) -> tuple[object, ...]:
            number, op = numbered
            if op.work is None or op.work.stage != "denoiser":
                return (number,)
            name = op.name.rpartition("@r")[0]
            return name, op.step, op.work.ranges, self.group_of[op.ranks[0]]

        for found, run in itertools.groupby(enumerate(ops), key=key):
            yield [op for _, op in run], None if len(found) == 1 else int(str(found[-1]))

    def piece(self, op: Op, lo: int, hi: int) -> Op:
        """Segments [lo, hi) of ``op``: its reads with the first piece, its writes with the last."""
        assert op.work is not None
        first, last = lo == op.work.ranges[0][0], hi == op.work.ranges[-1][1]
        base, _, rank = op.name.rpartition("@r")
        segment = self.profile.denoiser.segments[lo].name
        return replace(
            op,
            name=op.name if first else f"{base}/{segment}@r{rank}",
            reads=op.reads if first else (),
            writes=op.writes if last else (),
            work=op.work._replace(ranges=((lo, hi),)),
        )

    def whole(self, rank: int, number: int, step: int) -> Ref:
        """The gathered block of a visit on one rank."""
        return Ref(f"block{number % 2}@r{rank}", step, None, False, number)

    def gather(self, group: int, number: int, block: int, step: int) -> Op:
        """All-gather of one block over its group."""
        ranks = self.groups[group]
        for rank in ranks:
            self.visited.setdefault(rank, set()).add(block)
            name = self.whole(rank, number, step).buffer
            self._size[name] = max(self._size.get(name, 0), self.nbytes[block])
        place = "-".join(map(str, ranks))
        return Op(
            name=f"weights.{self.profile.denoiser.cuts[block].name}/{number}@g{place}",
            kind="collective",
            call="all_gather",
            ranks=ranks,
            stream=f"weights.{place}",
            reads=tuple(map(self.shard, ranks)),
            writes=tuple(self.whole(rank, number, step) for rank in ranks),
            step=step,
            nbytes=-(-self.nbytes[block] // len(ranks)),
        )
