"""What a transfer takes when the executor makes it: the call with its threads, buffers and wake-ups.

A chain of calls, each between two computations, of payloads over the transport of a run: a call's time
is all that lies between the end of one computation and the begin of the next, packing included.

Computations take as long as what lies before calls of that size in the schedule at hand, short and long
ones in the same shares. Where a process has one core, gloo's thread that was waiting may take it from
the one that holds what it waits for, and both stand until the scheduler's next tick (4 ms here). How
often depends on what ran before: an all-reduce of a few bytes took 0.8 ms after 1.3 ms of computing,
2.3 ms after 0.3. They are as many kernels as fill the time, not a wait for its end: ranks that meet
wait for the slower, here as in a run.

Sizes are payloads in the convention of ``paradiff.graph.traffic``. How long the library alone takes, and
what it takes from compute beside it: ``measure_network``. What becomes of the numbers: ``simulator``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, cycle, islice
from typing import NamedTuple

import torch

from paradiff.executor.distributed import run_with
from paradiff.executor.measure import mean_of
from paradiff.executor.payload import Payload, Piece
from paradiff.executor.session import Session
from paradiff.executor.transports import Distributed
from paradiff.graph import Buffer, Instance, Op, OpKind, Ref, ScheduleGraph, Section, Work
from paradiff.trace import TRANSFERS

CHAIN_S = 20e-3
"""A chain lasts about this long (of messages, there and back, twice), with PACES calls at the least."""
PACES = 8
"""Different computations of a chain: evenly spaced quantiles of those of the schedule."""
STRIDE = 3
"""They come in this order, short and long in turns; it and PACES have no common divisor."""
MOST_ROUNDS = 12
"""Times that all of them come in a chain."""
LEAST_CHAINS, MOST_CHAINS = 5, 25
PRECISE = 0.02
"""LEAST_CHAINS are made, then more until a call's mean is known (one standard error) to this share of
the time from one call to the next, MOST_CHAINS at the most."""
SOME_BYTES = 4**8
"""Of messages where the schedule has none, and links have to be something."""
MOST_BETWEEN_S = 10e-3
"""Computations of a chain: beyond this, calls take what they take."""
ROWS, WIDTH, WEIGHTS = 16, 256, 32
"""Of the matrices that the computations multiply: some tens of microseconds each."""
BETWEEN = "between"
"""Name of the computations."""
PIECES = 2
"""Tensors of a payload: K and V."""


class Call(NamedTuple):
    """A transfer of ``nbytes`` on ``ranks``, the first of them the root or the source.

    ``between_s``: computations before it, PACES of them, shortest first.
    """

    kind: OpKind
    call: str
    ranks: tuple[int, ...]
    nbytes: int
    between_s: tuple[float, ...]


WorkSeconds = Callable[[Work, int], float]
"""What a work takes on a rank."""


def calls_for(graph: ScheduleGraph, hosts: Sequence[str], work_s: WorkSeconds) -> list[Call]:
    """What has to be timed for ``graph`` on ranks of these hosts, in one order on all ranks: collectives
    at sizes around theirs, messages and rings of two within a host and between hosts at sizes around
    those of messages: two or more, which tell a latency and a rate."""
    before, messages = _before(graph, work_s)
    if not messages:
        messages = [(SOME_BYTES, seconds) for seen in before.values() for _, seconds in seen]
    messages = messages or [(SOME_BYTES, MOST_BETWEEN_S)]
    pairs = list(combinations(range(len(hosts)), 2))
    same = [(a, b) for a, b in pairs if hosts[a] == hosts[b]][:1]
    apart = [(a, b) for a, b in pairs if hosts[a] != hosts[b]][:1]
    for pair in same + apart:
        before["p2p", "send", pair] = before["permute", "ring", pair] = messages
    return [
        Call(*key, nbytes, paces(seen, nbytes))
        for key, seen in sorted(before.items())
        for nbytes in _grid_of(key[0], [nbytes for nbytes, _ in seen])
    ]


Seen = list[tuple[int, float]]
"""Bytes of a transfer, and seconds that its ranks computed before it."""


def _before(
    graph: ScheduleGraph, work_s: WorkSeconds
) -> tuple[dict[tuple[OpKind, str, tuple[int, ...]], Seen], Seen]:
    """The transfers of a schedule: collectives by what they are, and messages."""
    collectives: dict[tuple[OpKind, str, tuple[int, ...]], Seen] = {}
    messages: Seen = []
    since = [0.0] * graph.world_size
    for op in (instance.op for instance in graph.instances()):
        if op.work is not None:
            since[op.ranks[0]] += work_s(op.work, op.ranks[0])
        if op.kind not in TRANSFERS:
            continue
        seen = messages
        if op.kind == "collective":
            seen = collectives.setdefault((op.kind, op.call, op.ranks), [])
        seen.append((max(1, op.nbytes), math.fsum(since[r] for r in op.ranks) / len(op.ranks)))
        for rank in op.ranks:
            since[rank] = 0.0
    return collectives, messages


def paces(seen: Seen, nbytes: int) -> tuple[float, ...]:
    """Computations before transfers of about ``nbytes`` (within a factor of four, else all), as evenly
    spaced quantiles, MOST_BETWEEN_S at the most."""
    near = [s for size, s in seen if nbytes < 4 * size and size < 4 * nbytes]
    every = sorted(near or [s for _, s in seen])
    at = [(2 * i + 1) * len(every) // (2 * PACES) for i in range(PACES)]
    return tuple(min(every[i], MOST_BETWEEN_S) for i in at)


def _grid_of(kind: OpKind, sizes: Sequence[int]) -> list[int]:
    most = max(sizes) if kind == "collective" else max(*sizes, 4 * min(sizes))
    return grid(min(sizes), most)


def grid(least: int, most: int) -> list[int]:
    """Powers of four from the last not above ``least`` to the first not below ``most``."""
    first, last = (least.bit_length() - 1) // 2, ((most - 1).bit_length() + 1) // 2
    return [4**i for i in range(first, last + 1)]


def measure_calls(session: Session, calls: Sequence[Call]) -> Iterator[float]:
    """Mean seconds of each call; every rank iterates over the same list and gets the same numbers.

    A message is timed there and back, half of it counts.
    """
    load = Load()
    for call in calls:
        transport = Distributed(session, chain(call, session.world_size, PACES))
        chain_s = partial(_chain_s, transport, call, _payload(call, session.device), load)
        between_s = statistics.fmean(call.between_s)
        round_s = max(PACES * (chain_s(PACES) + between_s), CHAIN_S / MOST_ROUNDS)
        length = PACES * max(1, round(CHAIN_S / round_s))
        samples: list[float] = []
        while len(samples) < MOST_CHAINS:
            samples.append(chain_s(length))
            if len(samples) >= LEAST_CHAINS:
                mean_s, error_s = mean_of(samples)
                if error_s < PRECISE * (mean_s + between_s):
                    break
        yield mean_s


def _chain_s(
    transport: Distributed, call: Call, payload: Payload, load: Load, length: int
) -> float:
    """Seconds of a call in a chain: its time less that of the computations, which ranks of one call make
    at the same time, those of a message in turn."""
    session = transport.session
    graph = chain(call, session.world_size, length)

    def perform(_: int, instance: Instance) -> None:
        op, rank = instance.op, session.rank
        if op.name.startswith(BETWEEN):
            load(call.between_s[STRIDE * instance.base % PACES])
        elif op.kind in TRANSFERS:
            sends, takes = (
                any(ref.buffer.endswith(f"@r{rank}") for ref in refs)
                for refs in (op.reads, op.writes)
            )
            transport(instance, [(rank, payload)] * sends, [rank] * takes)

    trace = run_with(graph, perform, session)
    computed_s = math.fsum(s.busy_s for s in trace.spans if s.name.startswith(BETWEEN))
    is_message = call.kind == "p2p"
    if not is_message:
        computed_s /= len(call.ranks)
    return max(float(trace.makespan_s) - computed_s, 0.0) / (length * (2 if is_message else 1))


def _payload(call: Call, device: torch.device) -> Payload:
    """``call.nbytes`` (a few floats at the least); an all-to-all has a piece for each rank."""
    count = len(call.ranks) if call.call == "all_to_all" else PIECES
    size = max(1, call.nbytes // (4 * count))
    return tuple(Piece((0, 1), torch.randn(size, device=device), point=i) for i in range(count))


class Load:
    """Computes for about as long as it is told to: multiplies by one matrix after another."""

    def __init__(self) -> None:
        self._rows = torch.randn(ROWS, WIDTH)
        self._weights = cycle(torch.randn(WEIGHTS, WIDTH, WIDTH))
        self._one_s = min(self._seconds(WEIGHTS) for _ in range(3)) / WEIGHTS

    def __call__(self, seconds: float) -> None:
        self._multiply(round(seconds / self._one_s))

    def _multiply(self, times: int) -> None:
        for weight in islice(self._weights, times):
            torch.mm(self._rows, weight)

    def _seconds(self, times: int) -> float:
        begin = time.perf_counter()
        self._multiply(times)
        return time.perf_counter() - begin


def chain(call: Call, world_size: int, length: int) -> ScheduleGraph:
    """``length`` times: every rank computes (``BETWEEN``), then one transfer of what they have computed
    (a message there, a computation, a message back)."""
    ranks = call.ranks
    buffers = [Buffer(f"{name}@r{r}", r, call.nbytes, "hidden") for r in ranks for name in "xy"]
    first = tuple(_compute("begin", r, (), (Ref(f"y@r{r}", -1),), None) for r in ranks)
    if call.kind == "p2p":
        ops = [op for way in (ranks, ranks[::-1]) for op in _message(call, way, way == ranks)]
    else:
        ops = [_compute(BETWEEN, r, (Ref(f"y@r{r}", -1),), (Ref(f"x@r{r}", 0),)) for r in ranks]
        ops.append(_transfer(call, ranks, "comm", ranks, ranks))
    sections = (Section("begin", 0, 1, 1, first), Section("chain", 0, length, 1, tuple(ops)))
    return ScheduleGraph(world_size, tuple(buffers), sections)


def _message(call: Call, way: tuple[int, ...], is_first: bool) -> tuple[Op, Op]:
    """The source computes from what it has last received, and sends it."""
    source, target = way
    reads = (Ref(f"y@r{source}", -1 if is_first else 0),)
    stream = f"p2p.{source}-{target}"
    return (
        _compute(BETWEEN, source, reads, (Ref(f"x@r{source}", 0),)),
        _transfer(call, way, stream, (source,), (target,)),
    )


def _compute(
    name: str, rank: int, reads: tuple[Ref, ...], writes: tuple[Ref, ...], step: int | None = 0
) -> Op:
    return Op(f"{name}@r{rank}", "compute", "none", (rank,), "compute", reads, writes, step)


def _transfer(
    call: Call, ranks: tuple[int, ...], stream: str, senders: Sequence[int], takers: Sequence[int]
) -> Op:
    reads = tuple(Ref(f"x@r{r}", 0) for r in senders)
    writes = tuple(Ref(f"y@r{r}", 0) for r in takers)
    name = f"{stream}@g{'-'.join(map(str, ranks))}"
    return Op(name, call.kind, call.call, ranks, stream, reads, writes, 0, nbytes=call.nbytes)
