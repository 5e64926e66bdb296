"""What a call of gloo and a timed kernel cost on this machine beside the wire: one calibration, on links
without a limit, for all topologies.

Decides what is measured and what is kept: the fixed cost of each kind of call at each number of ranks,
the time that a kernel takes beyond its own, and the rate at which a host moves bytes when no link
holds it up. How these become a prediction is ``paradiff.lab.laboratory``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
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
    """``call_s[call, ranks]``: seconds of a call of few bytes; ``kernel_s``: of a kernel beyond its own;
    ``host_bytes_per_s``: of a message without a link's limit."""

    call_s: Mapping[tuple[str, int], float]
    kernel_s: float
    host_bytes_per_s: float

    def fixed_s(self, op: Op, bytes_s: float, caught_up_s: float) -> float:
        """What a transfer takes beside its bytes, which take ``bytes_s`` at least.

        A message, a shift, a broadcast: all that such a call of few bytes takes. In gloo's rings two
        messages are under way, so all rounds but the first go on while bytes flow: one round of as many
        ranks, or what bytes do not hide. The rounds of an exchange wait for one another: each takes its
        share, but a link makes up for ``caught_up_s`` of idling before every round but the first.
        """
        call, n = call_of(op), len(op.ranks)
        own_s = self._of(call, n)
        if call in PIPELINED:
            return max(self._of("permute", n), own_s - bytes_s)
        if call == "all_to_all" and n > 1:
            round_s = own_s / (n - 1)
            return round_s + (n - 2) * max(0.0, round_s - caught_up_s)
        return own_s

    def call(self, op: Op) -> float:
        """What ``op`` takes with few bytes, in seconds."""
        return self._of(call_of(op), len(op.ranks))

    def _of(self, call: str, n: int) -> float:
        """Of a number of ranks between measured ones: linear between them."""
        known = sorted((ranks, s) for (name, ranks), s in self.call_s.items() if name == call)
        below = [point for point in known if point[0] <= n] or known[:1]
        above = [point for point in known if point[0] >= n] or known[-1:]
        (n0, s0), (n1, s1) = below[-1], above[0]
        return s0 if n1 == n0 else s0 + (s1 - s0) * (n - n0) / (n1 - n0)

    def to_json(self) -> dict[str, Any]:
        return {
            "call_s": {f"{call} {n}": s for (call, n), s in sorted(self.call_s.items())},
            "kernel_s": self.kernel_s,
            "host_bytes_per_s": self.host_bytes_per_s,
        }


FREE = Calibration({(call, 2): 0.0 for call in CALLS}, 0.0, math.inf)
"""Calls and kernels that cost nothing beside bytes and their own time."""


def call_of(op: Op) -> str:
    """What a transfer is calibrated as."""
    return op.call if op.kind == "collective" else op.kind


def calibrate(ranks: Ranks, sizes: Iterable[int], progress: Progress | None = None) -> Calibration:
    """Measure calls of each number of ranks in ``sizes``, and of two, on a star without limits.

    Between two calls each rank computes for KERNEL_S, so that what it takes to pass from one thread to
    another and to wait for the last rank is in a call's cost. Raises LaboratoryFailed.
    """
    groups = sorted({2, *sizes})
    wanted = [("p2p", 2), ("permute", 2)]
    wanted += [
        (call, n) for call in CALLS if call != "p2p" for n in groups if (call, n) not in wanted
    ]
    graphs = {key: chain(*key, SMALL_BYTES, max(groups)) for key in wanted}
    graphs["kernel", 0] = chain("", 0, 0, max(groups))
    graphs["large", 2] = chain("p2p", 2, LARGE_BYTES, max(groups))
    runs = [Run(graph, _kernel_s, 1) for graph in graphs.values()]
    with hosts(star(max(groups))) as found:
        traces = ranks.run(found, runs, progress)
    turn_s = {
        key: _round_s(trace) / (key[1] if key[0] in ONE_WAY else 1)
        for key, (trace,) in zip(graphs, traces, strict=True)
    }
    kernel_s = max(0.0, turn_s["kernel", 0] - KERNEL_S)
    call_s = {key: max(0.0, turn_s[key] - KERNEL_S - kernel_s) for key in wanted}
    moved_s = turn_s["large", 2] / 2 - turn_s["p2p", 2]
    return Calibration(call_s, kernel_s, (LARGE_BYTES - SMALL_BYTES) / max(moved_s, 1e-9))


def _kernel_s(op: Op) -> float:
    return KERNEL_S if op.kind == "compute" else 0.0


def _round_s(trace: Trace) -> float:
    """Median time from the end of a round to that of the next, on the slowest rank."""
    ends: dict[int, float] = {}
    for span in trace.spans:
        if span.step is not None:
            ends[span.step] = max(ends.get(span.step, 0.0), span.end_s)
    times = [ends[step] for step in sorted(ends)]
    return statistics.median(b - a for a, b in pairwise(times))


def chain(call: str, n: int, nbytes: int, world: int) -> ScheduleGraph:
    """ROUNDS times: the first ``n`` of ``world`` ranks compute, then call; from what comes the next
    kernel computes. A message and a broadcast have a turn from each rank in a round, so that no round
    begins before the one before has arrived. Without a ``call`` rank 0 computes alone."""
    members = range(n) if call else range(1)
    turns = n if call in ONE_WAY else 1
    buffers = [
        Buffer(f"{name}{turn}@r{r}", r, nbytes, "hidden")
        for turn in range(turns)
        for r in members
        for name in "xy"
    ]
    last = turns - 1
    first = [_kernel("start", r, (), Ref(f"y{last}@r{r}", 0)) for r in members]
    ops: list[Op] = []
    for turn in range(turns):
        before = Ref(f"y{last}", -1) if turn == 0 else Ref(f"y{turn - 1}", 0)
        silent = (turn - 1) % turns if call in ONE_WAY else None
        for r in members:
            came = (
                ()
                if r == silent or not call
                else (before._replace(buffer=f"{before.buffer}@r{r}"),)
            )
            ops.append(_kernel(f"kernel{turn}", r, came, Ref(f"x{turn}@r{r}", 0)))
        if call:
            ops.append(_call(call, turn, members, nbytes))
    sections = (
        Section("start", 0, 1, 1, tuple(first)),
        Section("rounds", 1, ROUNDS, 1, tuple(ops)),
    )
    return ScheduleGraph(world, tuple(buffers), sections)


def _kernel(name: str, rank: int, reads: tuple[Ref, ...], write: Ref) -> Op:
    return Op(f"{name}@r{rank}", "compute", name, (rank,), "compute", reads, (write,), 0)


def _call(call: str, turn: int, members: Sequence[int], nbytes: int) -> Op:
    """One call; of a message and a broadcast, the one that starts at rank ``turn``."""
    kinds: Mapping[str, OpKind] = {"p2p": "p2p", "permute": "permute"}
    ranks = (*members[turn:], *members[:turn])
    one_way = call in ONE_WAY
    return Op(
        f"call{turn}",
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
