"""How far off a prediction may be: a low and a high factor for each part of a latency (nominally 90 %).

On the critical rank every instant of the denoising loop has one class: compute, host, exposed
communication, bubble. Each class is scaled by its own low and high factor and the loop is their sum.
Kernels of one model on one GPU err together (one ceiling too high, one too low), so compute is taken as
fully correlated: its factors are the sums of the low and high kernel times over the sum of the central
ones, which the cost model gives. Bubbles follow compute, text encoders and VAE have factors of their
own. Example: 2 s of compute at 0.9 to 1.2 and 1 s of communication at 0.7 to 1.6 give 3 s, 2.5 s to
4.0 s. Not in it: transfers that are hidden at the central estimate and would surface on a much slower
network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from analysis.attribution import Breakdown
from paradiff.graph import Op, ScheduleGraph
from simulator.collectives import table_bytes
from simulator.costs import ComputeCost, CostModel
from simulator.network import Network
from simulator.symmetry import Quotient
from simulator.topology import CollectiveTable

Part = Literal["compute", "host", "comm", "bubble", "text_encoder", "vae"]
Factors = tuple[float, float]
CommBasis = Literal["table", "transferred table", "links", "staged links"]

COMM_SPREAD: Mapping[CommBasis, Factors] = {
    "table": (0.85, 1.2),
    "transferred table": (0.7, 1.5),
    "links": (0.65, 1.7),
    "staged links": (0.65, 4.0),
}
"""Factors of exposed communication by what is known of it. ``table``: every transfer has a measured
one; tables left one out miss by 3 % in the median and 17 % for one in ten. ``transferred table``: one
of them is another box's (PCIe 4 rings of four boxes reach 18 to 26 GB/s). ``links``: boxes of one
description differ by a factor of two in what NCCL reaches; also where a table has other sizes only.
``staged links``: transfers through host memory; on the one node of that kind with a table (eight L40S)
the links alone are twice too fast for the all-to-all of four GPUs and four times for that of eight."""
HOST_SPREAD: Factors = (0.6, 1.8)
"""Launch costs depend on the CPU: published ones range from 5 to 25 us where 8 us is assumed."""


def parts(b: Breakdown) -> dict[Part, float]:
    """The latency in parts that add up to it."""
    return {
        "compute": b.compute_s,
        "host": b.host_s,
        "comm": b.communication_s,
        "bubble": b.bubble_s,
        "text_encoder": b.stages.text_encoder_s,
        "vae": b.stages.vae_s,
    }


def prices(
    costs: CostModel, graph: ScheduleGraph, rank: int, device: int
) -> Iterator[tuple[Part, int, ComputeCost]]:
    """(part of the latency, how often, price on ``device``) of every compute op of ``rank``."""
    for section in graph.sections:
        for op in section.ops:
            if op.work is not None and op.ranks == (rank,):
                cost = costs.compute(op.work, device)
                yield _part_of(op.work.stage), section.count, cost


def _part_of(stage: str) -> Part:
    if stage.startswith("text_encoder"):
        return "text_encoder"
    return "compute" if stage in ("denoiser", "scheduler", "guidance") else "vae"


def factors(
    costs: CostModel, network: Network, schedule: Quotient, placement: Sequence[int], rank: int
) -> dict[Part, Factors]:
    """Low and high factor of each part of the latency, ``rank`` being the critical one."""
    sums: dict[Part, list[float]] = {}
    for part, count, cost in prices(costs, schedule.graph, rank, placement[rank]):
        known = sums.setdefault(part, [0.0, 0.0, 0.0])
        for i, seconds in enumerate((cost.low_s, cost.device_s, cost.high_s)):
            known[i] += count * seconds
    found: dict[Part, Factors] = {
        part: (low / middle, high / middle) if middle > 0 else (1.0, 1.0)
        for part, (low, middle, high) in sums.items()
    }
    compute = found.get("compute", (1.0, 1.0))
    return {
        "text_encoder": (1.0, 1.0),
        "vae": (1.0, 1.0),
        "compute": compute,
        **found,
        "bubble": compute,
        "comm": COMM_SPREAD[comm_basis(network, schedule, placement)],
        "host": HOST_SPREAD,
    }


def provenance(costs: CostModel, graph: ScheduleGraph, rank: int, device: int) -> str:
    """What the kernel times of the denoising loop mostly rest on, the weakest of the large shares."""
    shares: dict[str, float] = {}
    for part, count, cost in prices(costs, graph, rank, device):
        if part == "compute":
            shares[cost.provenance] = shares.get(cost.provenance, 0.0) + count * cost.device_s
    total = sum(shares.values())
    weakest = ("analytic", "transferred", "interpolated", "table", "calibrated")
    return next((p for p in weakest if shares.get(p, 0.0) > 0.1 * total), "analytic")


def comm_basis(network: Network, schedule: Quotient, placement: Sequence[int]) -> CommBasis:
    """What the transfers of ``schedule`` rest on, the weakest of them."""
    transfers = [op for op, _ in schedule.transfers]
    tables = [table_of(network, op, placement) for op in transfers]
    untabled = [op for op, table in zip(transfers, tables, strict=True) if table is None]
    pairs = {(placement[a], placement[b]) for op in untabled for a, b in pairwise(op.ranks)}
    if any(network.route(a, b).staged for a, b in sorted(pairs)):
        return "staged links"
    known = [table for table in tables if table is not None]
    if untabled or not known or any(map(_outside, transfers, tables)):
        return "links"
    lent = any(table.source.startswith("transferred") for table in known)
    return "transferred table" if lent else "table"


def table_of(network: Network, op: Op, placement: Sequence[int]) -> CollectiveTable | None:
    """The table that the topology has for this transfer, whatever its size."""
    return network.topology.collective_table(op.call, [placement[rank] for rank in op.ranks])


def _outside(op: Op, table: CollectiveTable | None) -> bool:
    return table is not None and op.nbytes > 0 and not table.covers(table_bytes(op))


def beyond_tables(
    network: Network, schedule: Quotient, placement: Sequence[int]
) -> Iterator[tuple[Op, CollectiveTable]]:
    """Collectives of other sizes than their table has: they take the links' time, scaled to meet the
    nearest size that was measured."""
    for op, _ in schedule.transfers:
        table = table_of(network, op, placement)
        if table is not None and _outside(op, table):
            yield op, table
