"""Which rank runs on which GPU: what is worth trying on a given box.

Decides which rank maps differ at all, and which of those a schedule could profit from. How fast they
are is for the engine to say.

Two placements are the same where an automorphism of the box takes one to the other: a permutation of
its GPUs, switches and machines that preserves profiles, links, host memory and named tables. GPUs
that can be swapped alone (*twins*: same machine, same neighbours) are pooled first, so a placement
becomes a word, the pool of each rank, and what is left to divide out are the automorphisms of the
small graph of pools. Eight ranks on two sockets of four: 8! = 40320 placements, 70 words, 35 classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, permutations, product
from typing import NamedTuple

import networkx as nx
from networkx.algorithms.isomorphism import GraphMatcher

from paradiff.graph import Op
from simulator.collectives import Lowering
from simulator.network import Network
from simulator.symmetry import Quotient
from simulator.topology import Link, Topology

Placement = tuple[int, ...]
"""Device of each rank."""

MAX_GPUS = 16
MAX_WORDS = 5000
"""Boxes with more GPUs, and rank counts with more words, are searched by axis orders only."""
MAX_AUTOMORPHISMS = 1000
"""More are not looked for; classes then repeat, none is lost."""


def placements(topology: Topology, ranks: int, axes: Sequence[int] = ()) -> tuple[Placement, ...]:
    """Placements of ``ranks`` ranks to choose from, the identity first.

    One of each class where there are few enough. Otherwise one for each order in which the axes of
    the mesh (their sizes, slowest first) can be nested along the device numbers: which axis stays
    inside a machine is what matters on a big box.
    """
    small = len(topology.gpus) <= MAX_GPUS
    if small and _count(_pools(topology), ranks) <= MAX_WORDS:
        return classes(topology, ranks)
    return tuple(dict.fromkeys((tuple(range(ranks)), *axis_orders(axes, ranks))))


@cache
def classes(topology: Topology, ranks: int) -> tuple[Placement, ...]:
    """One placement of each class, the identity first, the others by their words."""
    pools = _pools(topology)
    pool_of = {device: i for i, pool in enumerate(pools) for device in pool}
    images = _pool_automorphisms(topology, pools)
    identity = tuple(range(ranks))
    known = min(_images(tuple(pool_of[device] for device in identity), images))
    chosen = [identity]
    for word in _words([len(pool) for pool in pools], ranks):
        if word != known and word == min(_images(word, images)):
            free = [iter(pool) for pool in pools]
            chosen.append(tuple(next(free[pool]) for pool in word))
    return tuple(chosen)


def axis_orders(axes: Sequence[int], ranks: int) -> Iterator[Placement]:
    """Rank maps that nest the axes in every order: sizes (2, 4) give the identity and, the second
    axis slowest, ranks 0..7 on devices 0, 2, 4, 6, 1, 3, 5, 7."""
    sizes = [size for size in axes if size > 1]
    if math.prod(sizes) != ranks:
        return
    for order in permutations(range(len(sizes))):
        strides = [0] * len(sizes)
        stride = 1
        for axis in reversed(order):
            strides[axis] = stride
            stride *= sizes[axis]
        ranges = (range(size) for size in sizes)
        yield tuple(
            sum(i * s for i, s in zip(index, strides, strict=True)) for index in product(*ranges)
        )


# ------------------------------------------------------------------------------------------- classes


def _look(link: Link, start: str) -> tuple[float, float, float, bool, str]:
    """What of a link decides transfers, as ``start`` sees it."""
    out, back = link.rate_from(start), link.rate_from(link.b if start == link.a else link.a)
    return out, back, link.latency_s, link.is_nvlink, link.duplex


@cache
def _pools(topology: Topology) -> tuple[tuple[int, ...], ...]:
    """Twins together, by their first device."""
    graph = topology.graph()
    around = {
        gpu: {to: _look(edge["link"], gpu) for to, edge in graph.adj[gpu].items()}
        for gpu in topology.gpus
    }
    scopes = [set(t.scope) for t in topology.collectives if not isinstance(t.scope, str)]

    def twins(a: int, b: int) -> bool:
        one, two = topology.gpus[a], topology.gpus[b]
        return (
            topology.profiles[a] == topology.profiles[b]
            and topology.node_of(a) == topology.node_of(b)
            and {k: v for k, v in around[one].items() if k != two}
            == {k: v for k, v in around[two].items() if k != one}
            and around[one].get(two) == around[two].get(one)
            and all((one in scope) == (two in scope) for scope in scopes)
        )

    pools: list[list[int]] = []
    for device in range(len(topology.gpus)):
        mine = next((pool for pool in pools if twins(pool[0], device)), None)
        if mine is None:
            pools.append([device])
        else:
            mine.append(device)
    return tuple(map(tuple, pools))


def _count(pools: Sequence[Sequence[int]], ranks: int) -> int:
    """How many words there are: coefficients of the product of truncated exponentials."""
    ways = [1] + [0] * ranks
    for pool in pools:
        ways = [
            sum(ways[n - k] * math.comb(n, k) for k in range(min(n, len(pool)) + 1))
            for n in range(ranks + 1)
        ]
    return ways[ranks]


def _words(sizes: Sequence[int], length: int) -> Iterator[tuple[int, ...]]:
    """Every word in which pool ``i`` occurs ``sizes[i]`` times at most, in order."""
    if length == 0:
        yield ()
        return
    for pool, size in enumerate(sizes):
        if size:
            rest = [*sizes[:pool], size - 1, *sizes[pool + 1 :]]
            for word in _words(rest, length - 1):
                yield (pool, *word)


def _images(word: tuple[int, ...], maps: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    return (tuple(image[pool] for pool in word) for image in maps)


def _pool_automorphisms(
    topology: Topology, pools: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Where each pool goes, for every automorphism of the graph of pools; the identity among them, and
    alone where a table names its GPUs or a link has two rates (the graph has no directions)."""
    identity = tuple(range(len(pools)))
    named = any(not isinstance(table.scope, str) for table in topology.collectives)
    if named or any(link.back_bytes_per_s is not None for link in topology.links):
        return (identity,)
    graph = _pool_graph(topology, pools)
    matcher = GraphMatcher(
        graph,
        graph,
        node_match=lambda a, b: a["look"] == b["look"],
        edge_match=lambda a, b: a["look"] == b["look"],
    )
    found = islice(matcher.isomorphisms_iter(), MAX_AUTOMORPHISMS)
    maps = {tuple(mapping["pool", i][1] for i in identity) for mapping in found}
    return tuple(sorted(maps | {identity}))


def _pool_graph(topology: Topology, pools: Sequence[Sequence[int]]) -> nx.Graph:
    """Pools, switches and machines, with what makes them differ as ``look``."""
    pool_of = {topology.gpus[d]: ("pool", i) for i, pool in enumerate(pools) for d in pool}
    inside = {
        pool_of[k.a]: _look(k, k.a)
        for k in topology.links
        if pool_of.get(k.a, 0) == pool_of.get(k.b, 1)
    }
    graph = nx.Graph()
    for i, pool in enumerate(pools):
        look = (topology.profiles[pool[0]], len(pool), inside.get(("pool", i)))
        graph.add_node(("pool", i), look=look)
    graph.add_nodes_from((("switch", name) for name in topology.switches), look="switch")
    for node in topology.nodes:
        graph.add_node(("node", node.name), look=node.host_memory_bytes_per_s)
        for gpu in node.gpus:
            graph.add_edge(("node", node.name), pool_of[gpu], look="in")
        for switch in node.memory_at:
            graph.add_edge(("node", node.name), ("switch", switch), look="memory")
    for link in topology.links:
        a, b = (pool_of.get(end, ("switch", end)) for end in (link.a, link.b))
        if a != b:
            graph.add_edge(a, b, look=_look(link, link.a))
    return graph


# --------------------------------------------------------------------------------------------- worth


class Price(NamedTuple):
    """One transfer alone."""

    alone_s: float
    """Its time on an idle box."""
    least_s: float
    """What it takes at least beside any others: latency, and its bytes through its fullest resource."""
    filled_s: Mapping[int, float]
    """For how long it would fill each resource."""


class Wire:
    """What transfers cost on one network, by the devices they join; asked for again and again."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._known: dict[tuple[str, str, int, Placement], Price] = {}

    def price(self, op: Op, placement: Placement) -> Price:
        """What one call costs with rank r on device ``placement[r]``."""
        devices = tuple(placement[rank] for rank in op.ranks)
        ordered = op.kind != "collective" or op.call == "broadcast"
        key = (op.kind, op.call, op.nbytes, devices if ordered else tuple(sorted(devices)))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._price(op, placement)
        return known

    def _price(self, op: Op, placement: Placement) -> Price:
        lowering = Lowering(self._network, placement)
        lowered = lowering.lower(op)
        filled: dict[int, float] = {}
        for flow in lowered.flows:
            for resource, weight in self._network.route(flow.source, flow.destination).resources:
                seconds = weight * flow.nbytes / self._network.capacities[resource]
                filled[resource] = filled.get(resource, 0.0) + seconds
        least_s = lowered.latency_s + max(filled.values(), default=0.0)
        return Price(lowering.alone_s(lowered), least_s, filled)


def promising(
    wire: Wire,
    schedule: Quotient,
    choices: Sequence[Placement],
    limit: int,
    compute_s: Callable[[Placement], float] | None = None,
    slack: float = 1.0,
) -> tuple[Placement, ...]:
    """At most ``limit`` of the placements that score better than ``slack`` times the first of
    ``choices``, the best first.

    The score, in seconds, is what the transfers of a rank take one after another on an idle box (the
    mean over ranks), plus how long the busiest resource is full; on a box of several GPU models the
    compute time of the slowest rank on top (``compute_s``). It orders, and does not predict: groups
    that share a link may drift apart in time, which it does not see.
    """

    def score(placement: Placement) -> float:
        busy_s, filled = 0.0, {0: 0.0}
        for op, count in schedule.transfers:
            price = wire.price(op, placement)
            busy_s += count * len(op.ranks) * price.alone_s
            for resource, share in price.filled_s.items():
                filled[resource] = filled.get(resource, 0.0) + count * share
        total = busy_s / schedule.world_size + max(filled.values())
        return total if compute_s is None else total + compute_s(placement)

    first, *others = ((score(placement), placement) for placement in choices)
    return tuple(p for cost, p in sorted(others) if cost < first[0] * slack * (1 - 1e-9))[:limit]
