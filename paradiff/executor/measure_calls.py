"""What a transfer takes when the executor makes it: the call with its threads, buffers and wake-ups.

A chain of calls, each between two computations, of payloads over the transport of a run: a call's time
is all that lies between the end of one computation and the begin of the next, packing included. The
computations compute, for as long as lies between two calls of the schedule at hand: threads, caches and
cores that have just made a call make the next in another time (with none between, one of few bytes took
twice as long here; packing alone, over and over, a fraction of what it takes in a run).
Sizes are payloads in the convention of ``paradiff.graph.traffic``. How long the library alone takes, and
what it takes from compute beside it: ``measure_network``. What becomes of the numbers: ``simulator``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch

from paradiff.executor.distributed import run_with
from paradiff.executor.measure import median_error
from paradiff.executor.payload import Payload, Piece
from paradiff.executor.session import Session
from paradiff.executor.transports import Distributed
from paradiff.graph import Buffer, Instance, Op, OpKind, Ref, ScheduleGraph, Section, Work
from paradiff.trace import TRANSFERS

CHAIN_S = 20e-3
"""A chain is as long as it takes to last about this long."""
LEAST_CALLS, MOST_CALLS = 4, 100
LEAST_CHAINS, MOST_CHAINS = 5, 15
PRECISE = 0.03
SOME_BYTES = 4**8
"""Of messages where the schedule has none, and links have to be something."""
MOST_BETWEEN_S = 3e-3
"""Computations of a chain: beyond this, calls take what they take."""
SIDE = 64
BETWEEN = "between"
"""Name of the computations."""
PIECES = 2
"""Tensors of a payload: K and V."""


class Call(NamedTuple):
    """A transfer of ``nbytes`` on ``ranks``, the first of them the root or the source."""

    kind: OpKind
    call: str
    ranks: tuple[int, ...]
    nbytes: int


def calls_for(graph: ScheduleGraph, hosts: Sequence[str]) -> list[Call]:
    """What has to be timed for ``graph`` on ranks of these hosts, in one order on all ranks: collectives
    at sizes around theirs, messages and rings of two within a host and between hosts at sizes around
    those of messages: two or more, which tell a latency and a rate."""
    found: dict[tuple[OpKind, str, tuple[int, ...]], list[int]] = {}
    messages: list[int] = []
    for op in (op for section in graph.sections for op in section.ops):
        if op.kind == "collective":
            found.setdefault((op.kind, op.call, op.ranks), []).append(max(1, op.nbytes))
        elif op.kind in TRANSFERS:
            messages.append(max(1, op.nbytes))
    messages = messages or [SOME_BYTES]
    messages.append(4 * min(messages))
    pairs = list(combinations(range(len(hosts)), 2))
    same = [(a, b) for a, b in pairs if hosts[a] == hosts[b]][:1]
    apart = [(a, b) for a, b in pairs if hosts[a] != hosts[b]][:1]
    for pair in same + apart:
        found["p2p", "send", pair] = found["permute", "ring", pair] = messages
    return [
        Call(*key, nbytes)
        for key, sizes in sorted(found.items())
        for nbytes in grid(min(sizes), max(sizes))
    ]


def grid(least: int, most: int) -> list[int]:
    """Powers of four from the last not above ``least`` to the first not below ``most``."""
    first, last = (least.bit_length() - 1) // 2, ((most - 1).bit_length() + 1) // 2
    return [4**i for i in range(first, last + 1)]


def between_s(graph: ScheduleGraph, work_s: Callable[[Work, int], float]) -> float:
    """What a rank computes from one transfer to the next in the mean, MOST_BETWEEN_S at the most, where
    a work takes ``work_s`` on a rank."""
    total, transfers = 0.0, 0
    for section in graph.sections:
        for op in section.ops:
            if op.kind in TRANSFERS:
                transfers += section.count * len(op.ranks)
            elif op.work is not None:
                total += section.count * work_s(op.work, op.ranks[0])
    return min(total / transfers, MOST_BETWEEN_S) if transfers else MOST_BETWEEN_S


def measure_calls(session: Session, calls: Sequence[Call], between_s: float) -> Iterator[float]:
    """Seconds of each call between computations of ``between_s``; every rank iterates over the same list
    and gets the same numbers.

    A message is timed there and back, half of it counts.
    """
    for call in calls:
        transport = Distributed(session, chain(call, session.world_size, LEAST_CALLS))
        chain_s = partial(_chain_s, transport, call, _payload(call, session.device), between_s)
        first = chain_s(LEAST_CALLS) + between_s
        length = min(MOST_CALLS, max(LEAST_CALLS, round(CHAIN_S / max(first, 1e-6))))
        samples: list[float] = []
        while len(samples) < MOST_CHAINS:
            samples.append(chain_s(length))
            if len(samples) >= LEAST_CHAINS:
                low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
                if median_error(low, high, len(samples)) < PRECISE * middle:
                    break
        yield statistics.median(samples)


def _chain_s(
    transport: Distributed, call: Call, payload: Payload, between_s: float, length: int
) -> float:
    """Seconds of a call in a chain: its time less that of the computations, which ranks of one call make
    at the same time, those of a message in turn."""
    session = transport.session
    graph = chain(call, session.world_size, length)

    def perform(_: int, instance: Instance) -> None:
        op, rank = instance.op, session.rank
        if op.name.startswith(BETWEEN):
            _compute_for(between_s)
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


def _compute_for(seconds: float) -> None:
    """Multiply small matrices for that long."""
    a, end = torch.ones(SIDE, SIDE), time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)


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
