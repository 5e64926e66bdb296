"""What cannot be true of a box's numbers: links above their kind, tables above their ports or twice.

Asked of a file when it is read (:func:`simulator.topology.load_topology`), of what importers have put
together, and in the tests of what ships. A what-if about links, tables or GPUs (``--set gpu=v100``) is
not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from paradiff.config import Path_
from simulator.gpu import load_gpu
from simulator.importers.machine import pcie_bytes_per_s

if TYPE_CHECKING:
    from simulator.topology import CollectiveTable, Topology, TopologyFile

SLACK = 1.1
"""How far a measured rate may exceed its line's, and a collective its links, which are measured too."""
_PCIE = re.compile(r"pcie([1-6])-x(\d+)", re.ASCII)


def box_problems(file: TopologyFile, box: Topology) -> Iterator[tuple[Path_, str]]:
    """Where a number stands and why it cannot be, for each that cannot; ``box``: what ``file`` says.

    Example: a pcie5-x16 link of 26100 GB/s (GB/s taken for MB/s), which carries 63.
    """
    yield from _links(file)
    yield from _twice(box.collectives)
    if box.collectives:
        yield from _faster_than_ports(box)


def _links(file: TopologyFile) -> Iterator[tuple[Path_, str]]:
    profiles = {name: profile for name, profile, _ in file.gpu_entries()}
    for i, link in enumerate(file.links):
        at_ends = [profiles[name] for names in link.ends for name in names if name in profiles]
        carries = _line_bytes_per_s(link.kind, at_ends)
        if carries is None:
            continue
        carries *= 2 if link.duplex == "half" else 1
        for key in ("bandwidth", "bandwidth_back"):
            rate = getattr(link, key)
            if rate is not None and rate > SLACK * carries:
                yield (
                    ("links", i, key),
                    f"{rate / 1e9:.4g} GB/s, but {link.kind} carries {carries / 1e9:.4g} at most",
                )


def _line_bytes_per_s(kind: str, gpus: Sequence[str]) -> float | None:
    """What a link of this kind carries each way; None where nobody says. NVLinks: all that the GPUs at
    its ends have."""
    pcie = _PCIE.fullmatch(kind)
    if pcie is not None:
        return pcie_bytes_per_s(int(pcie[1]), int(pcie[2]))
    if kind not in ("nvlink", "nvlink-bridge"):
        return None
    known = [load_gpu(name) for name in dict.fromkeys(gpus)]
    rates = [
        gpu.nvlinks.value * gpu.nvlink_bandwidth.value
        for gpu in known
        if gpu.nvlinks is not None and gpu.nvlink_bandwidth is not None
    ]
    return max(rates, default=None)


def _twice(tables: Sequence[CollectiveTable]) -> Iterator[tuple[Path_, str]]:
    """Tables of one call, and one table under two names (but for what says that it is transferred)."""
    for (i, one), (j, other) in combinations(enumerate(tables), 2):
        call = f"{other.kind} over {other.ranks}"
        if (one.kind, one.ranks, one.scope) == (other.kind, other.ranks, other.scope):
            yield ("collectives", j), f"a second table of {call} ({other.scope}), allowed: one"
        elif (
            (one.kind, one.ranks) != (other.kind, other.ranks)
            and len(one.sizes) > 1
            and (one.sizes, one.seconds) == (other.sizes, other.seconds)
            and "transferred" not in one.source + other.source
        ):
            what = f"{call} has the numbers of {one.kind} over {one.ranks} (collectives.{i})"
            yield ("collectives", j), f"{what}, allowed: a source that says transferred"


def _faster_than_ports(box: Topology) -> Iterator[tuple[Path_, str]]:
    """Rows that send more than the links of any GPU carry: whatever the algorithm, (n - 1)/n of the size
    leaves a GPU, or enters one."""
    ports = dict.fromkeys(box.gpus, 0.0)
    for link in box.links:
        for end in (link.a, link.b):
            if end in ports:
                ports[end] += max(link.rate_from(link.a), link.rate_from(link.b))
    for i, table in enumerate(box.collectives):
        named = ports if isinstance(table.scope, str) else table.scope
        port = max(ports[gpu] for gpu in named)
        for row, (size, seconds) in enumerate(zip(table.sizes, table.seconds, strict=True)):
            rate = size * (table.ranks - 1) / table.ranks / seconds
            if rate > SLACK * port:
                yield (
                    ("collectives", i, "table", row),
                    f"{table.kind} of {size:g} bytes in {seconds * 1e6:.4g} us is {rate / 1e9:.4g} GB/s "
                    f"a GPU, whose links carry {port / 1e9:.4g}",
                )
