"""What the search for nodes and cuts leaves out, against the same search with nothing left out.

``python tools/check_search.py [--cases N] [--requests N] [NAME ...]`` makes N random questions (one to
five classes of any length that scale by Amdahl's law, on nodes of eight GPUs; work for half a node to
four and a half; a p99 of 1.1 to 4 times the longest class on all GPUs) and answers each with one
constant of ``simulator.search`` or ``simulator.outcome`` changed at a time. For each value it prints in
how many questions more nodes are found than with the last value, which leaves nothing out; the highest
tail latency relative to it where as many are; and the CPU seconds. docs/capacity.md shows the table.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from simulator import outcome, search
from simulator.outcome import Budget, Slo
from simulator.search import Demand, Found, Node, Search
from simulator.service import Service
from simulator.traffic import Traffic

EVERYTHING = 10**9
TRIED = {
    "MAX_CUTS": (search, (10, 30, 100, 300, EVERYTHING)),
    "FINALISTS": (search, (1, 2, 3, 6, EVERYTHING)),
    "MEASURED": (search, (0.0, 0.05, 0.2)),
    "CLEARLY": (outcome, (0.9, 0.99, 0.999, 1.0)),
}
"""Constant -> where it is, and values; the last one leaves nothing out."""
NODE = Node(gpus=8, machine=8, memory_bytes=80e9)
WIDTHS = (1, 2, 4, 8)


def service(kind: int, width: int, seconds: float) -> Service:
    """Of a class on so many GPUs."""
    return Service(
        model=f"m{kind}", width=width, spec=f"ulysses={width}", batch_s=(seconds,), low=1.0, high=1.0,
        exact=True, provenance="analytic", resident_bytes=10e9, transient_bytes=5e9,
    )  # fmt: skip


def question(seed: int, requests: int) -> Search:
    """One random question; always the same one for a seed."""
    draw = np.random.default_rng(seed)
    table = []
    for kind in range(1 + seed % 5):
        one_s, serial = 2 ** draw.uniform(0, 4), draw.uniform(0.02, 0.35)
        table.append({w: service(kind, w, one_s * (serial + (1 - serial) / w)) for w in WIDTHS})
    shares = draw.dirichlet([3.0] * len(table))
    work_s = sum(share * each[1].batch_s[0] for share, each in zip(shares, table, strict=True))
    longest_s = max(each[NODE.gpus].batch_s[0] for each in table)
    asked = Demand(
        traffic=Traffic(
            shares=tuple(shares.tolist()),
            rate_per_s=float(draw.uniform(0.5, 4.5) * NODE.gpus / work_s),
        ),
        slo=Slo(quantiles=((0.99, float(draw.uniform(1.1, 4.0) * longest_s)),)),
        budget=Budget(requests=requests),
    )
    return Search(asked, NODE, table, [f"c{kind}" for kind in range(len(table))])


@contextmanager
def changed(module: object, name: str, value: float) -> Iterator[None]:
    """A constant of a module set to ``value`` for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *TRIED], default=list(TRIED))
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--requests", type=int, default=10_000)
    given = parser.parse_args()
    print("| constant | value | more nodes | tail, at most | CPU s |\n|---|---|---|---|---|")
    for name in given.names:
        module, values = TRIED[name]
        best: list[Found | None] = []
        for value in reversed(values):
            begin = time.process_time()
            with changed(module, name, value):
                answers = [question(i, given.requests).best() for i in range(given.cases)]
            seconds = time.process_time() - begin
            found = [each if isinstance(each, Found) else None for each in answers]
            best = best or found
            pairs = [(a, b) for a, b in zip(found, best, strict=True) if b is not None]
            more = sum(a is None or a.nodes > b.nodes for a, b in pairs)
            alike = [(a, b) for a, b in pairs if a is not None and a.nodes == b.nodes]
            tail = max((a.outcome.tail_s / b.outcome.tail_s for a, b in alike), default=math.nan)
            shown = "all" if value == EVERYTHING else f"{value:g}"
            row = (name, shown, f"{more} of {len(pairs)}", f"{tail:.3f}", f"{seconds:.0f}")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
