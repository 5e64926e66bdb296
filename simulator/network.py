"""Transfers as fluid flows: which links a transfer crosses and how flows share them.

Decides routes and rates; knows nothing of collectives, streams or ops. The model:

- A *resource* is something that bytes per second are taken from: each direction of a full-duplex
  link, a half-duplex link as a whole, the memory of a node.
- A *route* is a weighted set of resources plus a latency. A flow of rate ``x`` takes ``weight * x``
  from each resource of its route.
- Rates are weighted max-min fair: no rate can be raised without lowering one that is smaller or
  equal. This is what SimGrid calls its raw model; TCP effects are left out, as PCIe and NVLink
  have credit-based flow control.
- A transfer that is not NVLink all the way, on a box without GPU peer-to-peer, is staged: one DMA
  writes it to host memory, another reads it back. It takes twice its rate from ``host_memory``
  (stored once, loaded once) of each node it touches and pays the latency of the route twice, once
  per copy; the copies are pipelined, so the links are crossed once. Where a node says what its
  memory hangs on, the route goes up to there: a PCIe switch below cannot turn the transfer around.
- A load from host memory takes its rate once from there, and from the links down to the GPU.
- Latency is paid at the end of a route and occupies nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from simulator.topology import Link, Topology

ROUTING_BYTES = 2.0**20
"""Routes minimise the time of a message of this size, so that wide links beat near ones."""

HOST = -1
"""Source of a flow that loads from the memory of its destination's node."""
HOST_LINK_BYTES_PER_S = 26e9
"""A GPU's own link to host memory where the topology does not say what that hangs on: PCIe 4 x16
(NVIDIA/nvbandwidth README, host to device); twice as much on PCIe 5."""

_CACHE_LIMIT = 1 << 17
_SEARCHES = 64
"""Searches for paths remembered, one a source; on 1,024 GPUs each may hold half a megabyte."""
_SAME = 1 + 1e-12
"""Factor within which levels and times count as equal: rounding may not part what is symmetric."""

_Path = tuple[int, float, tuple[str, ...]]
"""GPUs passed through, time of a routing message, names of the vertices: less is better."""
Usage = tuple[tuple[int, float], ...]
"""Resources of a flow and what it takes of each per unit of rate, by ascending resource index."""


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that flows share: ``a->b``, ``a--b`` (half duplex) or ``host.memory`` by name."""

    name: str
    capacity_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """How bytes go from one device to another. ``path`` lists vertices, both ends included."""

    id: int
    resources: Usage
    latency_s: float
    path: tuple[str, ...]
    staged: bool


@dataclass(frozen=True, slots=True)
class Flow:
    """``nbytes`` from device ``source`` to device ``destination``, ready at ``start_s``, and not before
    those of the numbers ``after``, earlier ones of those that are given together, have drained."""

    source: int
    destination: int
    nbytes: float
    start_s: float = 0.0
    after: tuple[int, ...] = ()


def max_min_rates(
    flows: Sequence[Usage], capacities: Mapping[int, float] | Sequence[float]
) -> tuple[float, ...]:
    """Weighted max-min fair rates by progressive filling, in the order of ``flows``.

    All rates grow together until a resource is full; the flows that cross it stop there; the others
    go on. Two flows over a 1 B/s resource, one with weight 2: rates 1/3 and 1/3. A flow without a
    finite resource gets ``inf``.
    """
    return _fill(flows, [1] * len(flows), capacities)


def _fill(
    flows: Sequence[Usage],
    counts: Sequence[int],
    capacities: Mapping[int, float] | Sequence[float],
) -> tuple[float, ...]:
    """Progressive filling where ``counts[i]`` flows share the usage ``flows[i]``."""
    rates = [math.inf] * len(flows)
    free: dict[int, float] = {}
    load: dict[int, float] = {}
    members: dict[int, list[int]] = {}
    for i, usage in enumerate(flows):
        for resource, weight in usage:
            if capacities[resource] < math.inf:
                free[resource] = capacities[resource]
                load[resource] = load.get(resource, 0.0) + weight * counts[i]
                members.setdefault(resource, []).append(i)
    pending = {i for group in members.values() for i in group}
    while pending:
        levels = {r: free[r] / load[r] for r in load}
        level = min(levels.values())
        full = [r for r in load if levels[r] <= level * _SAME]
        stopped = sorted(pending.intersection(i for r in full for i in members[r]))
        pending.difference_update(stopped)
        for i in stopped:
            rates[i] = level
            for resource, weight in flows[i]:
                if resource in load:
                    free[resource] -= weight * counts[i] * level
                    load[resource] -= weight * counts[i]
        for resource in [r for r in load if not pending.intersection(members[r])]:
            del load[resource]
    return tuple(rates)


class Network:
    """Routes and rates of one topology. Pure: equal questions get equal answers, remembered."""

    bucket_bytes = 0.0
    """What an idle link sends at once (``simulator.tcp``)."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        vertices = (*topology.gpus, *topology.switches)
        self._links: dict[str, dict[str, Link]] = {vertex: {} for vertex in vertices}
        for link in topology.links:
            self._links[link.a][link.b] = self._links[link.b][link.a] = link
        self.resources = _resources(topology)
        """Everything that flows share; a resource's index is its position here."""
        self.capacities = tuple(resource.capacity_bytes_per_s for resource in self.resources)
        self._index = {resource.name: i for i, resource in enumerate(self.resources)}
        self._gpus = frozenset(topology.gpus)
        self._search = lru_cache(maxsize=_SEARCHES)(self._new_search)
        self._routes: dict[tuple[int, int], Route] = {}
        self._by_id: list[Route] = []
        self._masks: list[int] = []
        self._alone: dict[int, float] = {}
        self._rates: dict[tuple[int, ...], tuple[float, ...]] = {}
        self._shares: dict[tuple[tuple[int, int], ...], tuple[float, ...]] = {}

    def route(self, source: int, destination: int) -> Route:
        """The route between two devices; of a device to itself: no resources, no latency."""
        known = self._routes.get((source, destination))
        if known is None:
            known = self._new_route(source, destination)
            self._routes[source, destination] = known
            self._by_id.append(known)
            finite = [r for r, _ in known.resources if self.capacities[r] < math.inf]
            self._masks.append(sum(1 << r for r in finite))
        return known

    def usage(self, route_id: int) -> Usage:
        """What a flow on a known route takes of each resource."""
        return self._by_id[route_id].resources

    def message_s(self, source: int, destination: int, nbytes: float = ROUTING_BYTES) -> float:
        """Seconds of one message between two devices on idle links."""
        route = self.route(source, destination)
        rate = self._alone.get(route.id)
        if rate is None:
            rate = self._alone[route.id] = self.rates((route.id,))[0]
        return route.latency_s + nbytes / rate

    def rates(self, route_ids: tuple[int, ...]) -> tuple[float, ...]:
        """Rates in bytes/s of flows that run together, one per entry of ``route_ids``."""
        known = self._rates.get(route_ids)
        if known is None:
            share = self._solve(route_ids)
            known = tuple([share[i] for i in route_ids])
            if len(self._rates) >= _CACHE_LIMIT:
                self._rates.clear()
            self._rates[route_ids] = known
        return known

    def _solve(self, route_ids: tuple[int, ...]) -> dict[int, float]:
        """Rate per route id. Groups of flows that share no resource are solved (and remembered)
        apart, so a flow that comes or goes re-solves only what it touches."""
        counts: dict[int, int] = {}
        for i in sorted(route_ids):
            counts[i] = counts.get(i, 0) + 1
        groups: list[tuple[int, list[int]]] = []
        for i in counts:
            mask, merged = self._masks[i], [i]
            apart = []
            for other_mask, other in groups:
                if other_mask & mask:
                    mask |= other_mask
                    merged += other
                else:
                    apart.append((other_mask, other))
            groups = [*apart, (mask, merged)]
        share: dict[int, float] = {}
        for _, group in groups:
            key = tuple([(i, counts[i]) for i in sorted(group)])
            rates = self._shares.get(key)
            if rates is None:
                usages = [self._by_id[i].resources for i, _ in key]
                rates = _fill(usages, [count for _, count in key], self.capacities)
                if len(self._shares) >= _CACHE_LIMIT:
                    self._shares.clear()
                self._shares[key] = rates
            share.update(zip([i for i, _ in key], rates, strict=True))
        return share

    def _new_route(self, source: int, destination: int) -> Route:
        if source == HOST:
            return self._host_route(destination)
        gpus = self.topology.gpus
        path = self._path(gpus[source], gpus[destination])[2]
        staged = not self.topology.peer_to_peer and not all(k.is_nvlink for k in self._along(path))
        if staged:
            path = self._staged_path(source, destination)
        links = self._along(path)
        latency_s = sum(link.latency_s for link in links)
        usage: dict[int, float] = {}
        for link, a in zip(links, path, strict=False):
            resource = self._index[_direction(link, a)]
            usage[resource] = usage.get(resource, 0.0) + 1.0
        if staged:
            latency_s *= 2
            for device in (source, destination):
                usage[self._index[f"{self.topology.node_of(device).name}.memory"]] = 2.0
        return Route(len(self._by_id), tuple(sorted(usage.items())), latency_s, path, staged)

    def _host_route(self, device: int) -> Route:
        """From host memory to a device of the same node: loaded once, over the links between."""
        node, gpu = self.topology.node_of(device), self.topology.gpus[device]
        usage = {self._index[f"{node.name}.memory"]: 1.0}
        if not node.memory_at:
            usage[self._index[f"{gpu}.host"]] = 1.0
            return Route(len(self._by_id), tuple(sorted(usage.items())), 0.0, (gpu,), False)
        path = min(self._path(at, gpu) for at in node.memory_at)[2]
        links = self._along(path)
        usage |= {self._index[_direction(k, a)]: 1.0 for k, a in zip(links, path, strict=False)}
        latency_s = sum(link.latency_s for link in links)
        return Route(len(self._by_id), tuple(sorted(usage.items())), latency_s, path, False)

    def _along(self, path: Sequence[str]) -> list[Link]:
        return [self._links[a][b] for a, b in pairwise(path)]

    def _staged_path(self, source: int, destination: int) -> tuple[str, ...]:
        """The best path through host memory of the source's node, and of the destination's where
        that is another. Direct where the nodes do not say what their memory hangs on."""
        here, there = self.topology.node_of(source), self.topology.node_of(destination)
        ends = self.topology.gpus[source], self.topology.gpus[destination]
        stops: list[tuple[str, ...]] = [()]
        for node in dict.fromkeys((here, there)):
            if node.memory_at:
                stops = [(*before, at) for before in stops for at in node.memory_at]
        routes = []
        for between in stops:
            legs = [self._path(a, b) for a, b in pairwise((ends[0], *between, ends[1]))]
            path = (ends[0], *(vertex for leg in legs for vertex in leg[2][1:]))
            routes.append((sum(leg[0] for leg in legs), sum(leg[1] for leg in legs), path))
        return min(routes)[2]

    def _path(self, source: str, destination: str) -> _Path:
        found = self._search(source).to(destination)
        if found is None:
            raise ValueError(f"{self.topology.name}: no route from {source} to {destination}")
        return found

    def _new_search(self, source: str) -> _Search:
        return _Search(source, self._gpus, self._links)


class _Search:
    """Best paths from one vertex, found no further than they are asked for (Dijkstra's algorithm)."""

    def __init__(
        self, source: str, gpus: frozenset[str], links: Mapping[str, Mapping[str, Link]]
    ) -> None:
        self._source, self._gpus, self._links = source, gpus, links
        self._heap: list[_Path] = [(0, 0.0, (source,))]
        self._found: dict[str, _Path] = {}

    def to(self, destination: str) -> _Path | None:
        """The best path to ``destination``; None where there is none."""
        heap, found = self._heap, self._found
        while destination not in found and heap:
            best = heapq.heappop(heap)
            transits, cost, path = best
            here = path[-1]
            if here in found:
                continue
            found[here] = best
            through = transits + (here in self._gpus and here != self._source)
            for there, link in self._links[here].items():
                if there not in found:
                    step = link.latency_s + ROUTING_BYTES / link.rate_from(here)
                    heapq.heappush(heap, (through, cost + step, (*path, there)))
        return found.get(destination)


def _direction(link: Link, start: str) -> str:
    """Name of the resource that a transfer leaving ``start`` over ``link`` uses."""
    if link.duplex == "half":
        return f"{link.a}--{link.b}"
    return f"{link.a}->{link.b}" if start == link.a else f"{link.b}->{link.a}"


def _resources(topology: Topology) -> tuple[Resource, ...]:
    capacity: dict[str, float] = {}
    for link in topology.links:
        for start in (link.a, link.b):
            capacity[_direction(link, start)] = link.rate_from(start)
    for node in topology.nodes:
        capacity[f"{node.name}.memory"] = node.host_memory_bytes_per_s
        if not node.memory_at:
            capacity |= {f"{gpu}.host": HOST_LINK_BYTES_PER_S for gpu in node.gpus}
    return tuple(Resource(name, value) for name, value in capacity.items())


def simulate_flows(topology: Topology | Network, flows: Sequence[Flow]) -> tuple[float, ...]:
    """When each flow has arrived, in seconds: the end of its fluid transfer plus its latency.

    Two flows of 1 byte over one shared 1 B/s link, both from time 0: (2.0, 2.0). A flow of no bytes
    arrives one latency after its start.
    """
    network = topology if isinstance(topology, Network) else Network(topology)
    ends = drain_times(network, flows)
    return tuple(
        end + network.route(flow.source, flow.destination).latency_s
        for end, flow in zip(ends, flows, strict=True)
    )


def drain_times(network: Network, flows: Sequence[Flow]) -> list[float]:
    """When the last byte of each flow has left, in seconds: ``simulate_flows`` without latency."""
    routes = [network.route(flow.source, flow.destination) for flow in flows]
    waits = [len(flow.after) for flow in flows]
    first = (i for i, flow in enumerate(flows) if not flow.after)
    waiting = sorted(first, key=lambda i: (-flows[i].start_s, -i))
    then: dict[int, list[int]] = {}
    for i, flow in enumerate(flows):
        for before in flow.after:
            then.setdefault(before, []).append(i)
    left: dict[int, float] = {}
    ends = [0.0] * len(flows)
    now = 0.0
    while waiting or left:
        if not left:
            now = flows[waiting[-1]].start_s
        while waiting and flows[waiting[-1]].start_s <= now:
            i = waiting.pop()
            left[i] = flows[i].nbytes
        rates = network.rates(tuple(routes[i].id for i in left))
        need = {
            i: nbytes / rate if nbytes > 0 else 0.0
            for (i, nbytes), rate in zip(left.items(), rates, strict=True)
        }
        step = min(need.values())
        if waiting and flows[waiting[-1]].start_s - now < step:
            step = flows[waiting[-1]].start_s - now
        now += step
        for (i, seconds), rate in zip(need.items(), rates, strict=True):
            if seconds <= step * _SAME:
                ends[i] = now
                del left[i]
                for later in then.get(i, ()):
                    waits[later] -= 1
                    if not waits[later]:
                        left[later] = flows[later].nbytes
            else:
                left[i] -= rate * step
    return ends
