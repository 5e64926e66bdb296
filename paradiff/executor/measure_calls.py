"""What a transfer takes when the executor makes it: the call with its threads, buffers and wake-ups.

A chain of calls, each between two computations that take no time, run as a schedule with timed kernels:
so a call's time holds all that lies between the end of one computation and the begin of the next.
Sizes are payloads in the convention of ``paradiff.graph.traffic``. How long the library alone takes, and
what it takes from compute beside it: ``measure_network``. What becomes of the numbers: ``simulator``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from paradiff.executor.distributed import run_timed
from paradiff.executor.measure import median_error
from paradiff.executor.packing import header_of, packed, unpacked
from paradiff.executor.payload import Piece
from paradiff.executor.session import Session
from paradiff.graph import Buffer, Op, OpKind, Ref, ScheduleGraph, Section

CHAIN_S = 20e-3
"""A chain is as long as it takes to last about this long."""
LEAST_CALLS, MOST_CALLS = 4, 100
LEAST_CHAINS, MOST_CHAINS = 5, 15
PRECISE = 0.03
MESSAGES = (4**5, 4**11)
"""Least and most bytes of the messages that links are read from."""
PIECES = 2
"""Tensors of a payload whose packing is timed: K and V."""


class Call(NamedTuple):
    """A transfer of ``nbytes`` on ``ranks``, the first of them the root or the source."""

    kind: OpKind
    call: str
    ranks: tuple[int, ...]
    nbytes: int


def calls_for(graph: ScheduleGraph, hosts: Sequence[str]) -> list[Call]:
    """What has to be timed for ``graph`` on ranks of these hosts, in one order on all ranks: its
    collectives at sizes around theirs, and messages and rings of two within a host and between hosts."""
    found: dict[tuple[OpKind, str, tuple[int, ...]], list[int]] = {}
    for op in (op for section in graph.sections for op in section.ops):
        if op.kind == "collective":
            found.setdefault((op.kind, op.call, op.ranks), []).append(op.nbytes)
    same = [(0, r) for r in range(1, len(hosts)) if hosts[r] == hosts[0]][:1]
    apart = [(0, r) for r in range(1, len(hosts)) if hosts[r] != hosts[0]][:1]
    for pair in same + apart:
        found["p2p", "send", pair] = found["permute", "ring", pair] = list(MESSAGES)
    return [
        Call(*key, nbytes)
        for key, sizes in sorted(found.items())
        for nbytes in grid(max(1, min(sizes)), max(1, max(sizes)))
    ]


def grid(least: int, most: int) -> list[int]:
    """Powers of four from the last not above ``least`` to the first not below ``most``."""
    first, last = (least.bit_length() - 1) // 2, ((most - 1).bit_length() + 1) // 2
    return [4**i for i in range(first, last + 1)]


def measure_calls(session: Session, calls: Sequence[Call]) -> Iterator[float]:
    """Seconds of each call; every rank iterates over the same list and gets the same numbers.

    A message is timed there and back, half of it counts.
    """
    for call in calls:
        first = _chain_s(session, call, LEAST_CALLS)
        length = min(MOST_CALLS, max(LEAST_CALLS, round(CHAIN_S / max(first, 1e-6))))
        samples: list[float] = []
        while len(samples) < MOST_CHAINS:
            samples.append(_chain_s(session, call, length))
            if len(samples) >= LEAST_CHAINS:
                low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
                if median_error(low, high, len(samples)) < PRECISE * middle:
                    break
        yield statistics.median(samples)


def _chain_s(session: Session, call: Call, length: int) -> float:
    trace = run_timed(chain(call, session.world_size, length), lambda _: 0.0, session)
    return trace.makespan_s / (length * (2 if call.kind == "p2p" else 1))


def chain(call: Call, world_size: int, length: int) -> ScheduleGraph:
    """``length`` times: every rank computes, then one transfer of what they have computed (a message
    there, a computation, a message back)."""
    ranks = call.ranks
    buffers = [Buffer(f"{name}@r{r}", r, call.nbytes, "hidden") for r in ranks for name in "xy"]
    first = tuple(_compute("begin", r, (), (Ref(f"y@r{r}", -1),), None) for r in ranks)
    if call.kind == "p2p":
        ops = [op for way in (ranks, ranks[::-1]) for op in _message(call, way, way == ranks)]
    else:
        ops = [_compute("c", r, (Ref(f"y@r{r}", -1),), (Ref(f"x@r{r}", 0),)) for r in ranks]
        ops.append(_transfer(call, ranks, "comm", ranks, ranks))
    sections = (Section("begin", 0, 1, 1, first), Section("chain", 0, length, 1, tuple(ops)))
    return ScheduleGraph(world_size, tuple(buffers), sections)


def _message(call: Call, way: tuple[int, ...], is_first: bool) -> tuple[Op, Op]:
    """The source computes from what it has last received, and sends it."""
    source, target = way
    reads = (Ref(f"y@r{source}", -1 if is_first else 0),)
    stream = f"p2p.{source}-{target}"
    return (
        _compute("c", source, reads, (Ref(f"x@r{source}", 0),)),
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


def packing_s(nbytes: int, device: torch.device) -> float:
    """Seconds to make one buffer of a payload of ``nbytes``, say what it looks like, and take a like one
    apart: what a rank does around each call, in this process alone."""
    part = torch.randn(max(1, nbytes // (4 * PIECES)), device=device)
    payload = (Piece((0, 1), tuple(part.clone() for _ in range(PIECES)), point=0),)
    header, buffer = header_of([payload]), packed([payload])

    def once() -> None:
        header_of([payload])
        packed([payload])
        unpacked(header, buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once()
    return statistics.median(_clock(once) for _ in range(15))


def _clock(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
