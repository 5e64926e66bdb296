"""What a call of gloo and a timed kernel cost on this machine beside the wire: one calibration, on links
without a limit, for all topologies.

Decides what is measured and what is kept: the fixed cost of each kind of call at each number of ranks,
while all other ranks are in calls as well, the time that a kernel takes beyond its own, and the rate at
which a host moves bytes when no link holds it up. How these become a prediction is
``paradiff.lab.laboratory``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from paradiff.graph import Buffer, Op, OpKind, Ref, ScheduleGraph, Section
from paradiff.lab.namespaces import hosts, star
from paradiff.lab.ranks import Progress, Ranks, Run
from paradiff.trace import Trace

CALLS = ("p2p", "permute", "all_gather", "all_reduce", "all_to_all", "broadcast")
PIPELINED = ("all_gather", "all_reduce")
ONE_WAY = ("p2p", "broadcast")
SMALL_BYTES, LARGE_BYTES = 4096, 1 << 20
KERNEL_S = 2e-3
ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Calibration:
    """``call_s[call, ranks, world]``: seconds of a call of few bytes between ``ranks`` of ``world``, the
    others of which are in such calls of their own: all share the machine's cores. ``kernel_s``: of a
    kernel beyond its own; ``host_bytes_per_s``: of a message without a link's limit."""

    call_s: Mapping[tuple[str, int, int], float]
    kernel_s: float
    host_bytes_per_s: float

    def fixed_s(self, op: Op, world: int, bytes_s: float, packet_s: float) -> float:
        """What a transfer takes beside its bytes, which take ``bytes_s`` at least.

        A message, a shift, a broadcast: all that such a call of few bytes takes. In gloo's rings two
        messages are under way, so all rounds but the first go on while bytes flow: one round of as many
        ranks, or what bytes do not hide. Of a gather's ring the last rank to come sends before it says
        that it can receive (allgather.cc), so that this word waits behind a packet, of ``packet_s``, and
        with it the link to that rank: the period of a ring that gathers again and again. The rounds of
        an exchange wait for one another: each takes its share, but a link makes up for a packet's
        idling, its bucket, before every round but the first.
        """
        call, n = call_of(op), len(op.ranks)
        own_s = self._of(call, n, world)
        if call in PIPELINED:
            shown_s = max(self._of("permute", n, world), own_s - bytes_s)
            if call == "all_gather" and n > 2:
                first_s = bytes_s / (2 * (n - 1))
                return shown_s + min(packet_s, max(0.0, first_s - packet_s))
            return shown_s
        if call == "all_to_all" and n > 1:
            round_s = own_s / (n - 1)
            return round_s + (n - 2) * max(0.0, round_s - packet_s)
        return own_s

    def call(self, op: Op, world: int) -> float:
        """What ``op`` takes with few bytes, in seconds."""
        return self._of(call_of(op), len(op.ranks), world)

    def _of(self, call: str, n: int, world: int) -> float:
        """Of a number of ranks between measured ones: linear between them. Of a world that was not
        measured: the next larger one, or the largest."""
        worlds = sorted({w for name, _, w in self.call_s if name == call})
        own = next((w for w in worlds if w >= world), worlds[-1])
        known = sorted(
            (ranks, s) for (name, ranks, w), s in self.call_s.items() if (name, w) == (call, own)
        )
        below = [point for point in known if point[0] <= n] or known[:1]
        above = [point for point in known if point[0] >= n] or known[-1:]
        (n0, s0), (n1, s1) = below[-1], above[0]
        return s0 if n1 == n0 else s0 + (s1 - s0) * (n - n0) / (n1 - n0)

    def to_json(self) -> dict[str, Any]:
        return {
            "call_s": {f"{call} {n} of {w}": s for (call, n, w), s in sorted(self.call_s.items())},
            "kernel_s": self.kernel_s,
            "host_bytes_per_s": self.host_bytes_per_s,
        }


FREE = Calibration({(call, 2, 2): 0.0 for call in CALLS}, 0.0, math.inf)
"""Calls and kernels that cost nothing beside bytes and their own time."""


def call_of(op: Op) -> str:
    """What a transfer is calibrated as."""
    return op.call if op.kind == "collective" else op.kind


def calibrate(ranks: Ranks, sizes: Iterable[int], progress: Progress | None = None) -> Calibration:
    """Measure calls on a star without limits, for each number of ranks in ``sizes``: between two of
    them, and between all that divide them.

    Between two calls each rank computes for KERNEL_S, so that what it takes to pass from one thread to
    another and to wait for the last rank is in a call's cost. Raises LaboratoryFailed.
    """
    worlds = sorted(set(sizes))
    graphs = {
        (call, n, world): chain(call, n, SMALL_BYTES, world)
        for world in worlds
        for call in CALLS
        for n in range(2, world + 1)
        if n == 2 or (world % n == 0 and call != "p2p")
    }
    wanted, most = list(graphs), worlds[-1]
    graphs["kernel", 1, most] = chain("", 1, 0, most)
    graphs["large", 2, most] = chain("p2p", 2, LARGE_BYTES, most)
    turn_s: dict[tuple[str, int, int], float] = {}
    with hosts(star(most)) as found:
        for world in worlds:
            keys = [key for key in graphs if key[2] == world]
            runs = [Run(graphs[key], _kernel_s, 1) for key in keys]
            begun = len(turn_s)

            def shown(so_far: int, _: int, begun: int = begun) -> None:
                if progress is not None:
                    progress(begun + so_far, len(graphs))

            for key, (trace,) in zip(keys, ranks.run(found[:world], runs, shown), strict=True):
                turn_s[key] = _round_s(trace) / (key[1] if key[0] in ONE_WAY else 1)
    kernel_s = max(0.0, turn_s["kernel", 1, most] - KERNEL_S)
    call_s = {key: max(0.0, turn_s[key] - KERNEL_S - kernel_s) for key in wanted}
    moved_s = turn_s["large", 2, most] / 2 - turn_s["p2p", 2, most]
    return Calibration(call_s, kernel_s, (LARGE_BYTES - SMALL_BYTES) / max(moved_s, 1e-9))


def _kernel_s(op: Op) -> float:
    return KERNEL_S if op.kind == "compute" else 0.0


def _round_s(trace: Trace) -> float:
    """Median time, of all ranks, from the end of a round to that of the next."""
    ends: dict[int, dict[int, float]] = {}
    for span in trace.spans:
        if span.step is not None:
            own = ends.setdefault(span.rank, {})
            own[span.step] = max(own.get(span.step, 0.0), span.end_s)
    return statistics.median(
        own[b] - own[a] for own in ends.values() for a, b in pairwise(sorted(own))
    )


def chain(call: str, n: int, nbytes: int, world: int) -> ScheduleGraph:
    """ROUNDS times, in every group of ``n`` ranks that ``world`` has room for: all compute, then call;
    from what comes the next kernel computes. A message and a broadcast have a turn from each rank in a
    round, so that no round begins before the one before has arrived. Without a ``call`` all ranks
    compute alone."""
    groups = [range(first, first + n) for first in range(0, world - n + 1, n)]
    turns = n if call in ONE_WAY else 1
    buffers = [
        Buffer(f"{name}{turn}@r{r}", r, nbytes, "hidden")
        for turn in range(turns)
        for members in groups
        for r in members
        for name in "xy"
    ]
    last = turns - 1
    first = [_kernel("start", r, (), Ref(f"y{last}@r{r}", 0)) for own in groups for r in own]
    ops = [op for own in groups for turn in range(turns) for op in _turn(call, turn, own, nbytes)]
    sections = (
        Section("start", 0, 1, 1, tuple(first)),
        Section("rounds", 1, ROUNDS, 1, tuple(ops)),
    )
    return ScheduleGraph(world, tuple(buffers), sections)


def _turn(call: str, turn: int, members: Sequence[int], nbytes: int) -> Iterator[Op]:
    """Kernels of all ``members``, from what the turn before brought them, and the call."""
    turns = len(members) if call in ONE_WAY else 1
    before = Ref(f"y{turns - 1}", -1) if turn == 0 else Ref(f"y{turn - 1}", 0)
    silent = members[(turn - 1) % turns] if call in ONE_WAY else None
    for r in members:
        waits = call and r != silent
        came = (before._replace(buffer=f"{before.buffer}@r{r}"),) if waits else ()
        yield _kernel(f"kernel{turn}", r, came, Ref(f"x{turn}@r{r}", 0))
    if call:
        yield _call(call, turn, members, nbytes)


def _kernel(name: str, rank: int, reads: tuple[Ref, ...], write: Ref) -> Op:
    return Op(f"{name}@r{rank}", "compute", name, (rank,), "compute", reads, (write,), 0)


def _call(call: str, turn: int, members: Sequence[int], nbytes: int) -> Op:
    """One call; of a message and a broadcast, the one that starts at rank ``turn``."""
    kinds: Mapping[str, OpKind] = {"p2p": "p2p", "permute": "permute"}
    ranks = (*members[turn:], *members[:turn])
    one_way = call in ONE_WAY
    return Op(
        f"call{turn}.{members[0]}",
        kinds.get(call, "collective"),
        call,
        ranks,
        f"wire{turn}",
        tuple(Ref(f"x{turn}@r{r}", 0) for r in (ranks[:1] if one_way else ranks)),
        tuple(Ref(f"y{turn}@r{r}", 0) for r in (ranks[1:] if one_way else ranks)),
        0,
        None,
        nbytes,
    )
