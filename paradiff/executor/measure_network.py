"""How long transfers between the ranks of a session take: messages, collectives, beside compute.

Decides what is called, how samples are taken and whose clock counts (the slowest rank's). Sizes are
those of nccl-tests and of topology files: the gathered buffer for all_gather and reduce_scatter, the
buffer of one rank for the others. What becomes of the numbers is the caller's business.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paradiff.executor.measure import median_error
from paradiff.executor.session import Group, Session

COLLECTIVES = ("all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter")
WARM_UPS, SAMPLES, MOST_SAMPLES = 2, 9, 45
PRECISE = 0.05
"""Samples are taken, SAMPLES at a time, until their median is known to this share."""
SAMPLE_S = 2e-3
"""A sample repeats the call until it lasts about this long."""
ITEM = 4
"""Bytes of an element (fp32)."""
MATRIX = 512
"""Side of the products that run beside a transfer."""


class Case(NamedTuple):
    """What is measured. ``way``: a message goes one way or both at once, a collective is ``all``."""

    kind: str
    ranks: tuple[int, ...]
    way: str
    nbytes: int


class Timed(NamedTuple):
    """Seconds of one call on the slowest rank: median of samples and quartiles. ``compute_s`` is a piece
    of compute about as long, alone, ``together_s`` both at once."""

    case: Case
    time_s: float
    low_s: float
    high_s: float
    runs: int
    compute_s: float
    together_s: float


def cases(world_size: int, sizes: Sequence[int]) -> list[Case]:
    """Messages from rank 0 to each other rank, one way and both; collectives of the first 2, 4, 8, ...
    ranks and of all. In one order on all ranks."""
    groups = [2**i for i in range(1, world_size.bit_length()) if 2**i < world_size] + [world_size]
    found = [
        Case("p2p", (0, other), way, size)
        for other in range(1, world_size)
        for way in ("one", "both")
        for size in sizes
    ]
    for count in groups:
        for kind in COLLECTIVES:
            whole = sorted({-(-size // (count * ITEM)) * count * ITEM for size in sizes})
            found += [Case(kind, tuple(range(count)), "all", size) for size in whole]
    return found


def measure(session: Session, wanted: Sequence[Case]) -> Iterator[Timed]:
    """Time each case; every rank iterates over the same list and gets the same numbers."""
    groups = {case.ranks: session.group("measure", case.ranks) for case in wanted}
    for case in wanted:
        yield _measured(session, case, groups[case.ranks])


def _measured(session: Session, case: Case, group: Group) -> Timed:
    member = session.rank in case.ranks
    call = _call(session, case, group) if member else _nothing
    first = _slowest(session, [_clock(session, call) for _ in range(WARM_UPS + 1)])[-1]
    times = max(1, math.ceil(SAMPLE_S / max(first, 1e-6)))
    samples: list[float] = []
    while len(samples) < MOST_SAMPLES:
        samples += [s / times for s in _samples(session, _repeated(call, times))]
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        if median_error(low, high, len(samples)) < PRECISE * middle:
            break
    compute = _compute(session, middle * times) if member else _nothing
    alone = statistics.median(_samples(session, compute))
    both = statistics.median(_samples(session, _beside(call, times, compute)))
    return Timed(case, middle, low, high, len(samples), alone / times, both / times)


Action = Callable[[], list["dist.Work"]]
"""Issues something and returns what has to be waited for."""


def _nothing() -> list[dist.Work]:
    return []


def _call(session: Session, case: Case, group: Group) -> Action:
    """One asynchronous call on random buffers."""
    count, elements = len(case.ranks), max(1, case.nbytes // ITEM)
    full = torch.randn(elements, device=session.device)
    part = torch.randn(max(1, elements // count), device=session.device)
    out = torch.empty_like(full)
    if case.kind == "p2p":
        return _message(session, case, group, full, out)
    if case.kind == "all_gather":
        return lambda: [dist.all_gather(list(out.chunk(count)), part, group=group, async_op=True)]
    if case.kind == "all_reduce":
        return lambda: [dist.all_reduce(full, group=group, async_op=True)]
    if case.kind == "all_to_all":
        return lambda: [dist.all_to_all_single(out, full, group=group, async_op=True)]
    if case.kind == "broadcast":
        return lambda: [dist.broadcast(full, case.ranks[0], group=group, async_op=True)]
    parts = list(full.chunk(count))
    received = torch.empty_like(parts[0])
    return lambda: [dist.reduce_scatter(received, parts, group=group, async_op=True)]


def _message(session: Session, case: Case, group: Group, full: Tensor, out: Tensor) -> Action:
    """Receives are posted first: gloo is full duplex only then."""
    source, destination = case.ranks
    other = destination if session.rank == source else source
    receives = case.way == "both" or session.rank == destination
    sends = case.way == "both" or session.rank == source

    def exchange() -> list[dist.Work]:
        posted = [dist.irecv(out, other, group=group)] if receives else []
        posted += [dist.isend(full, other, group=group)] if sends else []
        return [work for work in posted if work is not None]

    return exchange


def _repeated(call: Action, times: int) -> Action:
    """``times`` calls, each finished before the next."""

    def repeat() -> list[dist.Work]:
        for _ in range(times):
            for work in call():
                work.wait()
        return []

    return repeat


def _compute(session: Session, seconds: float) -> Action:
    """Matrix products that take about ``seconds`` alone."""
    a, b = (torch.randn(MATRIX, MATRIX, device=session.device) for _ in range(2))

    def products(count: int) -> Action:
        def run() -> list[dist.Work]:
            for _ in range(count):
                torch.mm(a, b)
            return []

        return run

    one = min(_timed(session, products(4)) for _ in range(3)) / 4
    return products(max(1, round(seconds / one)))


def _beside(call: Action, times: int, compute: Action) -> Action:
    """The calls issued, then the compute, then the wait."""

    def both() -> list[dist.Work]:
        pending = [work for _ in range(times) for work in call()]
        compute()
        return pending

    return both


def _timed(session: Session, action: Action) -> float:
    start = time.perf_counter()
    for work in action():
        work.wait()
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    return time.perf_counter() - start


def _clock(session: Session, action: Action) -> float:
    """Seconds of ``action`` here, all ranks having begun together."""
    dist.barrier()
    return _timed(session, action)


def _samples(session: Session, action: Action) -> list[float]:
    return _slowest(session, [_clock(session, action) for _ in range(SAMPLES)])


def _slowest(session: Session, own: Sequence[float]) -> list[float]:
    """Each sample as the slowest rank saw it, on every rank."""
    every = [
        [float(x) for x in text.split()] for text in session.gather_text(" ".join(map(repr, own)))
    ]
    return [max(column) for column in zip(*every, strict=True)]
