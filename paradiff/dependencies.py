"""Where the edges of a schedule graph come from, and what makes one legal.

Decides the predecessors of every op, from the canonical order alone, and what ``validate`` refuses. What
a graph can say, and its semantics, are in ``paradiff.graph``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from paradiff.graph import COLLECTIVES, Buffer, Instance, InvalidGraph, Op, Ref, ScheduleGraph


@dataclass(slots=True)
class _BufferState:
    """Who last wrote and who has read since, per part (None: the whole buffer)."""

    versions: dict[int | None, tuple[int, int, int]] = field(default_factory=dict)
    readers: dict[int | None, dict[tuple[str, tuple[int, ...]], int]] = field(default_factory=dict)


class Dependencies:
    """Predecessors of each op, from the canonical order alone.

    This is the only place where edges come from. Feed instances in canonical order; ``add`` returns
    the handles of the predecessors.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, _BufferState] = defaultdict(_BufferState)
        self._last: dict[tuple[int, str], int] = {}

    def add(self, instance: Instance, handle: int) -> list[int]:
        """Predecessor handles of ``instance``, each once, in a fixed order. Raises InvalidGraph."""
        op = instance.op
        found: dict[int, None] = {}
        for rank in op.ranks:
            key = (rank, op.stream)
            if key in self._last:
                found[self._last[key]] = None
            self._last[key] = handle
        reader = (op.stream, op.ranks)
        for ref in op.reads:
            state = self._buffers[ref.buffer]
            found[self._producer(state, ref, instance)] = None
            state.readers.setdefault(ref.part, {})[reader] = handle
        for ref in op.writes:
            self._overwrite(self._buffers[ref.buffer], ref, instance, handle, found)
        found.pop(handle, None)
        return list(found)

    @staticmethod
    def _producer(state: _BufferState, ref: Ref, instance: Instance) -> int:
        version = state.versions.get(ref.part)
        if version is None or version[0] != ref.at(instance.base) or version[1] != ref.sub:
            have = "nothing" if version is None else f"version {version[0]}.{version[1]}"
            raise InvalidGraph(
                f"{instance.id} reads {ref.show(instance.base)}, which is not there: "
                f"the buffer holds {have} at that place of the order"
            )
        return version[2]

    @staticmethod
    def _overwrite(
        state: _BufferState, ref: Ref, instance: Instance, handle: int, found: dict[int, None]
    ) -> None:
        step = ref.at(instance.base)
        old = state.versions.get(ref.part)
        if old is not None and old[:2] == (step, ref.sub):
            raise InvalidGraph(f"{instance.id} writes {ref.show(instance.base)} a second time")
        overlapping = list(state.versions) if ref.part is None else [None, ref.part]
        for part in overlapping:
            if part in state.versions:
                found[state.versions[part][2]] = None
        stale = (
            state.readers
            if ref.part is None
            else {p: state.readers.get(p, {}) for p in (None, ref.part)}
        )
        for readers in stale.values():
            found.update(dict.fromkeys(readers.values()))
        if ref.part is None:
            state.versions.clear()
            state.readers.clear()
        else:
            state.versions.pop(None, None)
            state.readers.pop(ref.part, None)
        state.versions[ref.part] = (step, ref.sub, handle)

    def advance(self, steps: int, is_loop: Callable[[int], bool], handles: int = 0) -> None:
        """Behave as if the iterations that follow had been added too, up to ``steps`` later.

        Handles that ``is_loop`` accepts grow by ``handles``, the versions they wrote by ``steps``.
        Right after the second iteration of a section: from there on, every last writer and every
        reader since is an op of the section at a fixed distance, or older than the section. The
        engine calls this instead of adding iterations whose edges it knows.
        """

        def moved(handle: int) -> int:
            return handle + handles if is_loop(handle) else handle

        for state in self._buffers.values():
            for part, (step, sub, handle) in state.versions.items():
                later = step + steps if is_loop(handle) else step
                state.versions[part] = (later, sub, moved(handle))
            for readers in state.readers.values():
                readers.update({who: moved(handle) for who, handle in readers.items()})
        self._last.update({stream: moved(handle) for stream, handle in self._last.items()})


def validate(graph: ScheduleGraph) -> None:
    """Raise InvalidGraph, with a picture, unless every rule of ``paradiff.graph`` holds."""
    known = {b.id: b for b in graph.buffers}
    if len(known) != len(graph.buffers):
        counts = Counter(b.id for b in graph.buffers)
        twice = next(name for name, count in counts.items() if count > 1)
        raise InvalidGraph(f"buffer {twice} is declared twice")
    dependencies, ids = Dependencies(), set()
    for handle, instance in enumerate(graph.instances()):
        op = instance.op
        try:
            _check_op(op, instance.id, known, graph.world_size)
            if instance.id in ids:
                raise InvalidGraph(f"op id {instance.id} occurs twice")
            ids.add(instance.id)
            dependencies.add(instance, handle)
        except InvalidGraph as error:
            picture = _cycle_picture(graph, instance) or _grid(graph, instance.id)
            raise InvalidGraph(f"{error}\n{picture}") from None


def _check_op(op: Op, op_id: str, known: dict[str, Buffer], world_size: int) -> None:
    outside = [r for r in op.ranks if not 0 <= r < world_size]
    if outside or not op.ranks or len(set(op.ranks)) != len(op.ranks):
        raise InvalidGraph(f"{op_id}: ranks {op.ranks} in a world of {world_size}")
    if op.kind == "compute" and len(op.ranks) != 1:
        raise InvalidGraph(f"{op_id}: a compute op runs on one rank, not {op.ranks}")
    if op.kind == "p2p" and len(op.ranks) != 2:
        raise InvalidGraph(f"{op_id}: p2p has a source and a destination, not {op.ranks}")
    if op.kind == "collective" and op.call not in COLLECTIVES:
        raise InvalidGraph(f"{op_id}: collective {op.call!r}, one of {', '.join(COLLECTIVES)}")
    for ref in (*op.reads, *op.writes):
        buffer = known.get(ref.buffer)
        if buffer is None:
            raise InvalidGraph(f"{op_id}: buffer {ref.buffer} is not declared")
        if buffer.rank not in op.ranks:
            raise InvalidGraph(f"{op_id} on ranks {op.ranks} touches {ref.buffer}")


def _grid(graph: ScheduleGraph, focus: str, width: int = 12) -> str:
    """Rank-by-order picture: one row a rank, its ops in canonical order, around ``focus``."""
    rows: dict[int, list[str]] = {rank: [] for rank in range(graph.world_size)}
    mark: dict[int, int] = {}
    for instance in graph.instances():
        for rank in instance.op.ranks:
            if rank in rows:
                rows[rank].append(instance.id)
                if instance.id == focus:
                    mark[rank] = len(rows[rank])
        if instance.id == focus:
            break
    lines = []
    for rank, names in rows.items():
        end = mark.get(rank, len(names))
        shown = names[max(0, end - width) : end]
        dots = "... " if end > width else ""
        arrow = "  <-- here" if rank in mark else ""
        lines.append(f"r{rank}: {dots}{' | '.join(shown)}{arrow}")
    return "\n".join(lines)


def _cycle_picture(graph: ScheduleGraph, culprit: Instance) -> str | None:
    """The cycle through ``culprit``, if it reads what only a later op that needs it would write."""
    ops = list(graph.instances())
    writer = {ref.show(i.base): n for n, i in enumerate(ops) for ref in i.op.writes}
    before: dict[int, list[tuple[int, str]]] = defaultdict(list)
    last: dict[tuple[int, str], int] = {}
    for n, (op, base) in enumerate(ops):
        for rank in op.ranks:
            if (rank, op.stream) in last:
                before[n].append((last[rank, op.stream], f"follows on r{rank}:{op.stream}"))
            last[rank, op.stream] = n
        for ref in op.reads:
            source = writer.get(ref.show(base))
            if source is not None and source != n:
                before[n].append((source, f"reads {ref.show(base)} of"))
    start = next(n for n, i in enumerate(ops) if i.id == culprit.id)
    parent: dict[int, tuple[int, str]] = {}
    queue = [start]
    while queue:
        n = queue.pop(0)
        for m, why in before[n]:
            if m == start:
                return _draw_cycle(ops, parent, start, n, why)
            if m not in parent:
                parent[m] = (n, why)
                queue.append(m)
    return None


def _draw_cycle(
    ops: list[Instance], parent: dict[int, tuple[int, str]], start: int, end: int, why: str
) -> str:
    """``end`` closes the cycle back to ``start``; walk the parents to name each edge."""
    chain = [f"{ops[end].id} {why} {ops[start].id}"]
    while end != start:
        child, reason = parent[end]
        chain.append(f"{ops[child].id} {reason} {ops[end].id}")
        end = child
    return "cycle:\n  " + "\n  ".join(reversed(chain))
