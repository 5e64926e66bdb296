"""Score the model of collectives on NCCL tables: ``python tools/check_collectives.py``.

Twice: each point of a table predicted from its neighbours at half and at twice the size (what a lookup
between measured sizes is worth), and every table predicted from its box's links alone (what a box
without tables gets). By box: a box decides more than its GPU.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from paradiff.config import find
from paradiff.graph import Op
from simulator.collectives import Lowering
from simulator.network import Network
from simulator.topology import CollectiveTable, load_topology

BOXES = {
    "L40S": ("pcie8-l40s-alltoall", ["gpu=l40s"]),
    "A100-SXM": ("nvlink8-a100", []),
    "H100-SXM": ("nvlink8-h100", []),
    "H200-SXM": ("nvlink8-h200", []),
    "B200-SXM": ("nvl72", ["gpu=b200"]),
}
"""Box of each GPU that has tables; RTX PRO 6000 has no profile."""


def tables() -> dict[str, list[CollectiveTable]]:
    """GPU -> its shipped NCCL tables."""
    points: dict[tuple[str, str, int], list[tuple[float, float]]] = defaultdict(list)
    with find("published", "nccl", ".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["gpu"], row["kind"], int(row["ranks"])
            points[key].append((float(row["size_bytes"]), float(row["time_us"]) * 1e-6))
    found: dict[str, list[CollectiveTable]] = defaultdict(list)
    for (gpu, kind, ranks), pairs in sorted(points.items()):
        sizes, seconds = zip(*sorted(pairs), strict=True)
        found[gpu].append(CollectiveTable(kind=kind, ranks=ranks, sizes=sizes, seconds=seconds))
    return found


def left_out(table: CollectiveTable) -> Iterator[float]:
    """predicted / measured - 1 of each point whose neighbours are at half and twice its size."""
    for i in range(1, len(table.sizes) - 1):
        before, size, after = table.sizes[i - 1 : i + 2]
        if size == 2 * before and after == 2 * size:
            rest = replace(
                table,
                sizes=table.sizes[:i] + table.sizes[i + 1 :],
                seconds=table.seconds[:i] + table.seconds[i + 1 :],
            )
            yield rest.time_s(size) / table.seconds[i] - 1


def from_links(gpu: str, table: CollectiveTable) -> Iterator[float]:
    """predicted / measured - 1 of each point of at least 1 MiB, from the links of the GPU's box."""
    name, overrides = BOXES[gpu]
    network = Network(replace(load_topology(name, overrides), collectives=()))
    lowering = Lowering(network, range(table.ranks))
    group = tuple(range(table.ranks))
    for size, seconds in zip(table.sizes, table.seconds, strict=True):
        if size >= 2**20:
            nbytes = size / table.ranks if table.kind == "all_gather" else size
            op = Op("x", "collective", table.kind, group, "comm", nbytes=round(nbytes))
            yield lowering.alone_s(lowering.lower(op)) / seconds - 1


def line(name: str, errors: list[float]) -> str:
    sizes = [abs(math.log1p(error)) for error in errors]
    middle = math.expm1(statistics.median(map(math.log1p, errors)))
    return (
        f"{name:24} {len(errors):4} points  median error {math.expm1(statistics.median(sizes)):6.1%}"
        f"  largest {math.expm1(max(sizes)):7.1%}  bias {middle:+7.1%}"
    )


def main() -> None:
    known = tables()
    print("between measured sizes: each point from its neighbours at half and twice the size")
    every: list[float] = []
    for gpu, own in known.items():
        errors = [error for table in own for error in left_out(table)]
        every += errors
        print(" ", line(gpu, errors))
    print(" ", line("all", every))
    print("from links alone, 1 MiB and more")
    for gpu in BOXES:
        for kind in sorted({table.kind for table in known[gpu]}):
            chosen = [table for table in known[gpu] if table.kind == kind]
            errors = [error for table in chosen for error in from_links(gpu, table)]
            print(" ", line(f"{gpu} {kind}", errors))


if __name__ == "__main__":
    main()
