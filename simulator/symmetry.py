"""Ranks that do the same at the same time: a schedule graph with one rank of each kind.

Decides which ranks of a graph cannot be told apart from inside it, and writes the graph of one
representative of each. Knows nothing of time and of links: whether transfers of alike ranks also take
equally long is for the engine to see, which drains all of them and raises ``Asymmetric`` if they do
not.

Ranks are coloured by what they hold and do (colour refinement, also 1-dimensional Weisfeiler-Leman;
that it yields the quotient of a linear program is Grohe, Kersting, Mladenov, Selman, "Dimension
reduction via colour refinement", ESA 2014). At first a rank's colour is the sequence of its ops: kind,
call, work, bytes, stream, and the versions of its own buffers that they read and write. Then, until no
colour splits, the colours of those who take part in its transfers and at which place of their own
sequences.

Why times are equal. Every edge of the dependency graph comes from a stream or a buffer of one rank
(``Dependencies``). So ops at one place of the sequences of ranks of one colour have predecessors at
the same places of the same colours, and hosts issue them at the same instants. By induction over
time, all of them start together, computations also end together, and transfers do if all members of
a class drain at one instant; the engine solves the rates of all their flows and checks exactly that.
The times then satisfy every rule of the whole graph, and there is only one such run. What ranks do alone
after the last transfer concerns nobody else: those of one colour that stop there are represented by
one that goes on (rank 0 decodes, the others are done).
*Against the whole graph, exactly: ``tests/test_symmetry.py``.*
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from paradiff.graph import Op, Ref, ScheduleGraph
from paradiff.trace import TRANSFERS

Ranks = tuple[int, ...]
Members = tuple[Ranks, ...]
"""Participants of every op that one op of the quotient stands for."""
_Key = tuple[tuple[int, int], ...]


class Asymmetric(Exception):
    """Transfers of ranks of one colour do not take equally long on this network."""


@dataclass(frozen=True)
class Quotient:
    """``graph`` of the representatives; its transfers name only those of their ranks.

    ``members[s][i]``: ranks of every op that op i of section s stands for, its own first.
    ``representative[r]``: a rank that does what rank r does, and perhaps goes on alone after it; of
    several the lowest, so that representatives represent themselves.
    """

    graph: ScheduleGraph
    members: tuple[tuple[Members, ...], ...]
    representative: Ranks

    @property
    def world_size(self) -> int:
        """Ranks of the whole graph."""
        return len(self.representative)

    @cached_property
    def ranks(self) -> Ranks:
        """The representatives, ascending."""
        return tuple(sorted(set(self.representative)))

    @cached_property
    def transfers(self) -> tuple[tuple[Op, int], ...]:
        """Every transfer of the whole graph that differs, without what it reads and writes, and how
        often it is made."""
        counts: dict[tuple[str, str, int, Ranks], tuple[Op, int]] = {}
        for section, members in zip(self.graph.sections, self.members, strict=True):
            for op, each in zip(section.ops, members, strict=True):
                if op.kind not in TRANSFERS:
                    continue
                for ranks in each:
                    key = (op.kind, op.call, op.nbytes, ranks)
                    call, count = counts.get(key) or (_call(op, ranks), 0)
                    counts[key] = (call, count + section.count)
        return tuple(counts.values())

    def copies(self, count: int) -> Quotient:
        """``count`` replicas that share nothing but links, one after another in rank order."""
        size = self.world_size
        members = tuple(
            tuple(
                tuple(tuple(r + size * k for r in ranks) for k in range(count) for ranks in each)
                for each in section
            )
            for section in self.members
        )
        return Quotient(self.graph, members, self.representative * count)


def _call(op: Op, ranks: Ranks) -> Op:
    return replace(op, ranks=ranks, reads=(), writes=())


def whole(graph: ScheduleGraph) -> Quotient:
    """Every rank for itself."""
    members = tuple(tuple((op.ranks,) for op in section.ops) for section in graph.sections)
    return Quotient(graph, members, tuple(range(graph.world_size)))


def quotient(graph: ScheduleGraph, kinds: Sequence[Hashable] | None = None) -> Quotient:
    """One rank of each kind. ``kinds[r]``: what tells rank r from others beforehand (its GPU)."""
    looks = _Looks(graph)
    colours, chosen = looks.classes(kinds or [None] * graph.world_size)
    if len(chosen) == graph.world_size:
        return whole(graph)
    return _written(graph, looks, colours, chosen)


class _Looks:
    """What the ops of a graph look like from each of their ranks."""

    def __init__(self, graph: ScheduleGraph) -> None:
        self._ids: dict[Hashable, int] = {}
        self.owner = {buffer.id: buffer.rank for buffer in graph.buffers}
        ranks = range(graph.world_size)
        self._names: list[dict[str, int]] = [{} for _ in ranks]
        """Per rank: its buffers and streams, numbered in the order in which it meets them."""
        self._held = [0] * graph.world_size
        """Per rank: a number for the sizes of its buffers."""
        for buffer in graph.buffers:
            look = (self._held[buffer.rank], buffer.nbytes, buffer.kind)
            self._held[buffer.rank] = self._id(look)
        self._sequence = [0] * graph.world_size
        """Per rank: a number for the sequence of its ops; equal numbers, equal sequences."""
        self._lengths = [0] * graph.world_size
        self.joint: list[tuple[Ranks, Ranks]] = []
        """Ranks of each op that moves bytes, and its place in the sequence of each."""
        self._states: list[list[int]] = []
        """Per rank: the numbers of its sequence at the last transfer of all and after each op since."""
        last = _last_transfer(graph)
        for number, section in enumerate(graph.sections):
            begin = self._id((number, section.first, section.count, section.stride))
            cut = last[1] if number == last[0] else None
            self._add(section.ops[:cut], begin)
            if cut is not None:
                self._states = [[state] for state in self._sequence]
                self._add(section.ops[cut:], begin)

    def _id(self, key: Hashable) -> int:
        return self._ids.setdefault(key, len(self._ids))

    def _add(self, ops: Iterable[Op], begin: int) -> None:
        sequence, lengths, names = self._sequence, self._lengths, self._names
        active: dict[int, None] = {}
        for op in ops:
            what = (op.kind, op.call, op.step, op.nbytes, op.work, len(op.ranks))
            refs: dict[int, tuple[Iterable[Ref], Iterable[Ref]]]
            if _moves(op):
                self.joint.append((op.ranks, tuple([lengths[r] for r in op.ranks])))
                refs = self._by_rank(op)
            else:
                refs = {op.ranks[0]: (op.reads, op.writes)}
            kind = self._id(what)
            for rank, (reads, writes) in refs.items():
                if rank not in active:
                    active[rank] = None
                    sequence[rank] = self._id((sequence[rank], begin))
                local = names[rank]
                look = (
                    sequence[rank],
                    kind,
                    local.setdefault(op.stream, len(local)),
                    tuple([(local.setdefault(ref[0], len(local)), ref[1:]) for ref in reads]),
                    tuple([(local.setdefault(ref[0], len(local)), ref[1:]) for ref in writes]),
                )
                sequence[rank] = self._id(look)
                lengths[rank] += 1
                if self._states:
                    self._states[rank].append(sequence[rank])

    def _by_rank(self, op: Op) -> dict[int, tuple[Iterable[Ref], Iterable[Ref]]]:
        refs: dict[int, tuple[list[Ref], list[Ref]]] = {rank: ([], []) for rank in op.ranks}
        for ref in op.reads:
            refs[self.owner[ref.buffer]][0].append(ref)
        for ref in op.writes:
            refs[self.owner[ref.buffer]][1].append(ref)
        return {**refs}

    def classes(self, kinds: Sequence[Hashable]) -> tuple[list[int], dict[int, int]]:
        """Colour of each rank, and the representative of each colour.

        Ranks that stop early are not told from one that goes on alone.
        """
        kinds = list(zip(kinds, self._held, strict=True))
        colours = self._refined(zip(kinds, (states[0] for states in self._states), strict=True))
        chosen: dict[int, int] = {}
        for rank in sorted(range(len(colours)), key=lambda r: -len(self._states[r])):
            chosen.setdefault(colours[rank], rank)
        pairs = zip(self._states, colours, strict=True)
        if not all(states[-1] in self._states[chosen[colour]] for states, colour in pairs):
            colours = self._refined(zip(kinds, self._sequence, strict=True))
            chosen = {colour: r for r, colour in reversed(list(enumerate(colours)))}
        return colours, chosen

    def _refined(self, looks: Iterable[tuple[Hashable, int]]) -> list[int]:
        colours = [self._id(look) for look in looks]
        number = len(set(colours))
        while number < len(colours):
            around = list(colours)
            for ranks, places in self.joint:
                seen = self._id(company(ranks, places, colours))
                for rank, place in zip(ranks, places, strict=True):
                    around[rank] = self._id((around[rank], place, seen))
            if len(set(around)) == number:
                break
            colours, number = around, len(set(around))
        return colours


def _moves(op: Op) -> bool:
    """Whether an op takes part of links that others use too: a transfer, a load from host memory."""
    return len(op.ranks) > 1 or op.nbytes > 0


def _last_transfer(graph: ScheduleGraph) -> tuple[int, int]:
    """(section, index) after which every rank is alone; of a section that repeats, its end."""
    for number, section in reversed(list(enumerate(graph.sections))):
        for index, op in reversed(list(enumerate(section.ops))):
            if _moves(op):
                return number, index + 1 if section.count == 1 else len(section.ops)
    return 0, 0


def company(ranks: Ranks, places: Ranks, colours: Sequence[int]) -> _Key:
    """Who takes part in an op: colours, and at which place of their sequences."""
    return tuple(sorted({(colours[r], place) for r, place in zip(ranks, places, strict=True)}))


def _written(
    graph: ScheduleGraph, looks: _Looks, colours: Sequence[int], chosen: dict[int, int]
) -> Quotient:
    """The graph of one rank of each colour.

    A class of ops stands where its first member stood. In the sequence of each of its ranks the
    classes then come in the order of the ops: where one op precedes another on some rank, so do
    theirs on all ranks of that colour.
    """
    kept = set(chosen.values())
    joint = iter(looks.joint)
    sections, members = [], []
    for section in graph.sections:
        ops: list[Op] = []
        stands_for: list[list[Ranks]] = []
        found: dict[_Key, int] = {}
        for op in section.ops:
            if not _moves(op):
                if op.ranks[0] in kept:
                    ops.append(op)
                    stands_for.append([op.ranks])
                continue
            key = company(*next(joint), colours)
            at = found.get(key)
            if at is None:
                at = found[key] = len(ops)
                ops.append(replace(op, ranks=(), reads=(), writes=()))
                stands_for.append([])
            stands_for[at].append(op.ranks)
            mine = tuple([rank for rank in op.ranks if rank in kept])
            if mine:
                ops[at] = _with(ops[at], op, mine, looks.owner)
        sections.append(replace(section, ops=tuple(ops)))
        members.append(tuple(tuple(each) for each in stands_for))
    buffers = tuple(buffer for buffer in graph.buffers if buffer.rank in kept)
    small = replace(graph, buffers=buffers, sections=tuple(sections))
    return Quotient(small, tuple(members), tuple(chosen[colour] for colour in colours))


def _with(known: Op, op: Op, mine: Ranks, owner: dict[str, int]) -> Op:
    """``known`` joined by the ranks ``mine`` of its fellow ``op``."""
    return replace(
        known,
        ranks=(*known.ranks, *mine),
        reads=(*known.reads, *(ref for ref in op.reads if owner[ref.buffer] in mine)),
        writes=(*known.writes, *(ref for ref in op.writes if owner[ref.buffer] in mine)),
    )
