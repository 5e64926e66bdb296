"""From a transfer op to flows: what a back end puts on the wire for one call.

Decides the algorithm of each call, its latency steps and its flows between devices. Who shares which
link at what rate is ``simulator.network``; when the op starts is ``simulator.engine``.

Payloads are in the conventions of ``paradiff.graph.traffic``. With n participants, one call alone on
a uniform network of bandwidth B and route latency L takes:

============== ============================ ======================= ==============================
call           bytes out of each rank       latency steps           note
============== ============================ ======================= ==============================
all_gather     (n-1) m                      n-1                     ring, m local bytes
reduce_scatter (n-1)/n S                    n-1                     ring
all_reduce     2 (n-1)/n S                  2 (n-1)                 ring, or
               at most 2 S                  2 ceil(log2 n)          two binary trees, if faster
all_to_all     (n-1)/n S                    n-1                     S/n to each other rank
broadcast      S, last rank 0               n-1                     pipelined chain from the root
permute, p2p   S                            1                       to the next rank; to the peer
============== ============================ ======================= ==============================

That is NCCL's way; gloo's is in ``simulator.gloo``. NCCL lays its rings along the machine, not along
rank order, and so do we: from the first device of a group to the nearest that is left (the lower number
where two are equally near), and so on. Groups of more than 64 go by device number. Algorithm choice:
NCCL's tuner takes the fastest by ``steps x latency + bytes / bandwidth`` (src/graph/tuning.cc); trees
serve all_reduce only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from paradiff.graph import Op
from simulator import gloo
from simulator.network import HOST, Flow, Network, drain_times

MAX_TOUR = 64
"""Larger groups are laid by device number."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """One call: ``latency_s`` of algorithm steps, then all ``flows`` at once, but for those that come
    after others (``Flow.after``).

    ``measured`` names the source of the table whose time the call takes when alone; None where the
    model holds. What the framework adds to a call is in neither (``Costs.transfer_fixed_s``).
    """

    latency_s: float
    flows: tuple[Flow, ...]
    measured: str | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """How a library moves bytes.

    ``uses_sms``: transfers run as kernels and slow the compute beside them. ``algorithm``: its latency
    steps and flows, from the call, the devices by rank, and the payload; None where it is chosen here,
    along the machine.
    """

    name: str
    uses_sms: bool
    algorithm: Callable[[str, Sequence[int], float], tuple[int, tuple[Flow, ...]]] | None = None


BACKENDS: Mapping[str, Backend] = {
    "nccl": Backend("nccl", uses_sms=True),
    "gloo": Backend("gloo", uses_sms=False, algorithm=gloo.flows),
}


class Lowering:
    """Lowers the transfers of one placement on one network; equal calls are lowered once."""

    def __init__(
        self, network: Network, placement: Sequence[int], backend: Backend = BACKENDS["nccl"]
    ) -> None:
        self.network = network
        self.placement = tuple(placement)
        self.backend = backend
        self._known: dict[tuple[str, str, tuple[int, ...], int], Lowered] = {}
        self._tours: dict[tuple[int, ...], list[int]] = {}

    def lower(self, op: Op) -> Lowered:
        """The wire's view of ``op``. A payload of no bytes costs its latency only."""
        key = (op.kind, op.call, op.ranks, op.nbytes)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._lower(op)
        return known

    def alone_s(self, lowered: Lowered) -> float:
        """Seconds of the call on an idle network, without fixed costs."""
        return lowered.latency_s + max(drain_times(self.network, lowered.flows), default=0.0)

    def _lower(self, op: Op) -> Lowered:
        devices = [self.placement[rank] for rank in op.ranks]
        if op.kind == "p2p":
            return self._direct([Flow(devices[0], devices[1], op.nbytes)])
        if op.kind == "permute":
            after = [*devices[1:], devices[0]]
            return self._direct(
                [Flow(a, b, op.nbytes) for a, b in zip(devices, after, strict=True)]
            )
        if op.kind == "host":
            return self._direct([Flow(HOST, devices[0], op.nbytes)])
        if op.kind != "collective":
            raise ValueError(f"{op.name}: {op.kind} is not a transfer")
        modelled = self._modelled(op, op.nbytes)
        table = self.network.topology.collective_table(op.call, devices)
        size = table_bytes(op)
        if table is None or size <= 0 or len(devices) < 2:
            return modelled
        if table.covers(size):
            return self._measured(table.time_s(size), table.source, modelled)
        edge = table.sizes[0] if size < table.sizes[0] else table.sizes[-1]
        there = self._modelled(op, op.nbytes * edge / size)
        return self._meeting(table.time_s(edge), there, modelled)

    def _modelled(self, op: Op, nbytes: float) -> Lowered:
        """A collective of ``nbytes`` in place of the op's own, from the links alone."""
        if self.backend.algorithm is None:
            devices = [self.placement[rank] for rank in op.ranks]
            return self._collective(op.call, devices, nbytes)
        steps, flows = self.backend.algorithm(op.call, self._in_group(op), nbytes)
        return Lowered(steps * self._slowest_s((f.source, f.destination) for f in flows), flows)

    def _direct(self, flows: list[Flow]) -> Lowered:
        return Lowered(self._slowest_s((f.source, f.destination) for f in flows), _kept(flows))

    def _collective(self, call: str, devices: list[int], size: float) -> Lowered:
        n = len(devices)
        ring = self._tour(devices)
        if call == "broadcast":
            root = devices[0]
            return self._chain([root, *(d for d in ring if d != root)], size)
        if call == "all_gather":
            return self._ring(ring, (n - 1) * size, n - 1)
        if call == "reduce_scatter":
            return self._ring(ring, (n - 1) / n * size, n - 1)
        if call == "all_to_all":
            pairs = [(a, b) for a in ring for b in ring if a != b]
            flows = _kept(Flow(a, b, size / n) for a, b in pairs)
            return Lowered((n - 1) * self._slowest_s(pairs), flows)
        candidates = [
            self._ring(ring, 2 * (n - 1) / n * size, 2 * (n - 1)),
            self._trees(ring, size),
        ]
        return min(candidates, key=self.alone_s)

    def _in_group(self, op: Op) -> list[int]:
        """Devices in the order that gloo goes by: of rings that of ranks, of messages that of the op."""
        in_order = op.call in ("broadcast", "all_to_all")
        return [self.placement[rank] for rank in (op.ranks if in_order else sorted(op.ranks))]

    def _tour(self, devices: Sequence[int]) -> list[int]:
        """The order of a ring through ``devices``."""
        key = tuple(sorted(devices))
        if len(key) < 4 or len(key) > MAX_TOUR:
            return list(key)
        known = self._tours.get(key)
        if known is None:
            left = list(key)
            known = [left.pop(0)]
            while left:
                here = known[-1]
                nearest = min(left, key=lambda there: (self.network.message_s(here, there), there))
                left.remove(nearest)
                known.append(nearest)
            self._tours[key] = known
        return known

    def _ring(self, ring: list[int], nbytes: float, steps: int) -> Lowered:
        """Each device sends ``nbytes`` to its successor, in ``steps`` dependent steps."""
        after = [*ring[1:], ring[0]] if len(ring) > 1 else []
        pairs = list(zip(ring, after, strict=False))
        return Lowered(steps * self._slowest_s(pairs), _kept(Flow(a, b, nbytes) for a, b in pairs))

    def _chain(self, chain: list[int], size: float) -> Lowered:
        pairs = list(pairwise(chain))
        flows = _kept(Flow(a, b, size) for a, b in pairs)
        return Lowered(len(pairs) * self._slowest_s(pairs), flows)

    def _trees(self, ring: list[int], size: float) -> Lowered:
        """Two binary trees, one the mirror of the other, each reduces and broadcasts half of S."""
        edges = [
            (order[i], order[(i - 1) // 2])
            for order in (ring, ring[::-1])
            for i in range(1, len(ring))
        ]
        pairs = [pair for a, b in edges for pair in ((a, b), (b, a))]
        steps = 2 * math.ceil(math.log2(max(len(ring), 1)))
        return Lowered(
            steps * self._slowest_s(pairs), _kept(Flow(a, b, size / 2) for a, b in pairs)
        )

    def _slowest_s(self, pairs: Iterable[tuple[int, int]]) -> float:
        return max((self.network.route(a, b).latency_s for a, b in pairs), default=0.0)

    def _measured(self, seconds: float, source: str, modelled: Lowered) -> Lowered:
        """``modelled`` scaled so that the call alone takes the time of the topology's table.

        The flows keep their shape, so that contention with other transfers is still that of the links.
        """
        drain_s = max(drain_times(self.network, modelled.flows), default=0.0)
        latency_s = min(modelled.latency_s, seconds) if drain_s > 0 else seconds
        factor = (seconds - latency_s) / drain_s if drain_s > 0 else 0.0
        scaled = _scaled(modelled, factor)
        return Lowered(latency_s, scaled.flows, source)

    def _meeting(self, seconds: float, edge: Lowered, modelled: Lowered) -> Lowered:
        """``modelled`` corrected by what the model errs at ``edge``, the measured size that is nearest.

        Where the call took less there, latency and bytes are scaled alike; where it took more, the
        larger of the two is stretched: what a table of small messages says is said of latency, what one
        of large messages says of bandwidth.
        """
        latency_s, drain_s = edge.latency_s, self.alone_s(edge) - edge.latency_s
        if not latency_s + drain_s:
            return modelled
        stretched = bytewise = seconds / (latency_s + drain_s)
        if stretched > 1 and drain_s >= latency_s:
            stretched, bytewise = 1.0, (seconds - latency_s) / drain_s
        elif stretched > 1:
            stretched, bytewise = (seconds - drain_s) / latency_s, 1.0
        return Lowered(stretched * modelled.latency_s, _scaled(modelled, bytewise).flows)


def table_bytes(op: Op) -> int:
    """A collective's size as tables (and nccl-tests) have it: the gathered buffer for all_gather."""
    return op.nbytes * (len(op.ranks) if op.call == "all_gather" else 1)


def link_bytes(transfers: Iterable[tuple[Op, int]], lowering: Lowering) -> dict[str, float]:
    """Resource name -> bytes that cross it where each op is done so often, weights of routes
    included."""
    network = lowering.network
    total: dict[str, float] = {}
    for op, count in transfers:
        for flow in lowering.lower(op).flows:
            for index, weight in network.route(flow.source, flow.destination).resources:
                name = network.resources[index].name
                total[name] = total.get(name, 0.0) + count * weight * flow.nbytes
    return dict(sorted(total.items()))


def _kept(flows: Iterable[Flow]) -> tuple[Flow, ...]:
    """Flows that take time: some bytes, between two devices."""
    return tuple(f for f in flows if f.nbytes > 0 and f.source != f.destination)


def _scaled(lowered: Lowered, factor: float) -> Lowered:
    if factor == 0:
        return replace(lowered, flows=())
    flows = tuple(replace(flow, nbytes=flow.nbytes * factor) for flow in lowered.flows)
    return replace(lowered, flows=flows)
