"""Hardware of a box or a cluster: GPUs, switches, links, measured collectives. No behaviour.

:class:`Topology` is plain data and can be built in code (``uniform``); ``load_topology`` reads the
YAML form, whose schema is :class:`TopologyFile` (described in ``hardware_profiles/README.md``).
A device index is the position of a GPU in ``Topology.gpus``. How transfers use this hardware is
decided in ``simulator.network``.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import networkx as nx
from pydantic import BeforeValidator, Field, model_validator

from paradiff.config import (
    ConfigError,
    Name,
    Path_,
    Strict,
    available,
    find,
    problem,
    read_document,
)  # fmt: skip
from paradiff.units import Bytes, BytesPerSecond, Dollars, PositiveSeconds, Seconds, size_text
from simulator.box_lint import box_problems

Duplex = Literal["full", "half"]
CollectiveKind = Literal["all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter"]

UNKNOWN_GPU = "unit"
"""Profile of GPUs built in code without naming one."""
LATENCY_BYTES = 65536.0
"""Collectives of so few bytes take their latency: 64 KiB cross PCIe 4 in 3 us, as long as a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A cable between two vertices. ``bandwidth`` holds for each direction if ``duplex`` is full,
    for both together if it is half; ``back`` is that from b to a where it is another. Infinite
    bandwidth is allowed in code."""

    a: str
    b: str
    bandwidth_bytes_per_s: float
    latency_s: float = 0.0
    kind: str = "link"
    duplex: Duplex = "full"
    source: str = ""
    back_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        rates = (self.bandwidth_bytes_per_s, self.back_bytes_per_s or self.bandwidth_bytes_per_s)
        if not min(rates) > 0 or not self.latency_s >= 0:
            raise ValueError(f"{self.a}--{self.b}: needs bandwidth > 0 and latency >= 0")

    def rate_from(self, start: str) -> float:
        """Bytes/s that leave ``start`` over this link."""
        back = start == self.b and self.back_bytes_per_s is not None
        return self.back_bytes_per_s if back else self.bandwidth_bytes_per_s  # type: ignore[return-value]

    @property
    def rate_text(self) -> str:
        """Its rate in words, of both directions where they differ."""
        there = f"{self.bandwidth_bytes_per_s / 1e9:.4g} GB/s"
        if self.back_bytes_per_s is None:
            return there
        return f"{there} (back {self.back_bytes_per_s / 1e9:.4g})"

    @property
    def is_nvlink(self) -> bool:
        """Whether transfers cross this link without involving the host."""
        return self.kind.startswith("nv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine: its GPUs and the bandwidth of its memory as DMA engines see it (loads plus
    stores)."""

    name: str
    gpus: tuple[str, ...]
    host_memory_bytes_per_s: float = math.inf
    memory_at: tuple[str, ...] = ()
    """Switches that host memory hangs on (root complexes, sockets): staged transfers pass one of
    them. Empty: not known, they go the direct way."""
    source: str = ""
    """Of the memory's bandwidth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTable:
    """Measured times of one collective at one group size, ``sizes`` ascending.

    Sizes are those of nccl-tests: the gathered buffer for all_gather and reduce_scatter, the buffer
    of one rank otherwise.

    ``scope`` says which groups it holds for: all that sit in one node, any, or the named GPUs.
    """

    kind: CollectiveKind
    ranks: int
    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    scope: Literal["node", "any"] | tuple[str, ...] = "node"
    source: str = ""

    def time_s(self, nbytes: float) -> float:
        """Time of one call, linear in its size between two measured ones: a latency plus bytes over a
        bandwidth is exactly that. Of the NCCL tables of six GPUs, each point left out is missed by 3.1 %
        in the median so, by 5.1 % in log(size), log(time) (``tools/check_collectives.py``).

        Below a smallest size of at most LATENCY_BYTES: the time of that. Kinks are kept: NCCL changes
        protocol and algorithm with size, so times need not be monotone. Raises ValueError for sizes of
        which the table says nothing.
        """
        sizes, seconds = self.sizes, self.seconds
        if not self.covers(nbytes):
            raise ValueError(f"{nbytes:g} bytes: {self.kind} was measured {self.sizes_text}")
        if nbytes <= sizes[0]:
            return seconds[0]
        if nbytes == sizes[-1]:
            return seconds[-1]
        i = bisect_right(sizes, nbytes)
        share = (nbytes - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))

    def covers(self, nbytes: float) -> bool:
        """Whether a call of this size lies between two that were measured, or below one that took its
        latency and little more."""
        reaches_down = nbytes >= self.sizes[0] or self.sizes[0] <= LATENCY_BYTES
        return reaches_down and nbytes <= self.sizes[-1]

    @property
    def sizes_text(self) -> str:
        """Which sizes it has, in words."""
        least, most = (size_text(round(size)) for size in (self.sizes[0], self.sizes[-1]))
        return f"at {least} only" if least == most else f"from {least} to {most}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A set of GPUs and what connects them. Vertices are GPUs and switches, by name."""

    name: str
    gpus: tuple[str, ...]
    profiles: tuple[str, ...]
    """GPU profile name of each GPU."""
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    switches: tuple[str, ...] = ()
    peer_to_peer: bool = True
    """False: transfers that are not NVLink all the way are staged in host memory."""
    collectives: tuple[CollectiveTable, ...] = ()
    price_per_hour: float | None = None
    source: str = ""
    _node_of: Mapping[str, Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        homes = {gpu: node for node in self.nodes for gpu in node.gpus}
        object.__setattr__(self, "_node_of", homes)
        if len(self.profiles) != len(self.gpus):
            raise ValueError(f"{len(self.gpus)} GPUs but {len(self.profiles)} profiles")
        placed = tuple(gpu for node in self.nodes for gpu in node.gpus)
        if sorted(placed) != sorted(self.gpus):
            raise ValueError(f"each GPU belongs to one node: {self.gpus} against {placed}")
        known = {*self.gpus, *self.switches}
        if stray := [end for link in self.links for end in (link.a, link.b) if end not in known]:
            raise ValueError(f"link to {stray[0]!r}, which is neither GPU nor switch")
        if stray := [at for node in self.nodes for at in node.memory_at if at not in self.switches]:
            raise ValueError(f"memory at {stray[0]!r}, which is not a switch")

    def graph(self) -> nx.Graph:
        """Vertices with ``kind`` ("gpu", "switch"), edges with their ``link``."""
        graph = nx.Graph(name=self.name)
        graph.add_nodes_from(self.gpus, kind="gpu")
        graph.add_nodes_from(self.switches, kind="switch")
        graph.add_edges_from((link.a, link.b, {"link": link}) for link in self.links)
        return graph

    def node_of(self, device: int) -> Node:
        """The machine that GPU number ``device`` sits in."""
        return self._node_of[self.gpus[device]]

    def collective_table(self, kind: str, devices: Sequence[int]) -> CollectiveTable | None:
        """The table that holds for a collective over ``devices`` of any size; None where none does.

        One of these very GPUs wins over one of the node, that over one for any group.
        """
        tables = [t for t in self.collectives if t.kind == kind and t.ranks == len(devices)]
        if not tables:
            return None
        names = tuple(sorted(self.gpus[device] for device in devices))
        local = len({self.node_of(device).name for device in devices}) == 1
        scopes = (names, "node", "any") if local else (names, "any")
        for scope in scopes:
            for table in tables:
                if table.scope == scope:
                    return table
        return None

    def measured_collective(
        self, kind: str, devices: Sequence[int], nbytes: float
    ) -> tuple[float, str] | None:
        """Measured time of a collective over ``devices`` and its source; None where no table holds, or
        none that has sizes on both sides of ``nbytes``."""
        table = self.collective_table(kind, devices)
        if table is None or not table.covers(nbytes):
            return None
        return table.time_s(nbytes), table.source

    @classmethod
    def uniform(
        cls,
        num_gpus: int,
        *,
        bandwidth_bytes_per_s: float = 1.0,
        latency_s: float = 0.0,
        profile: str = UNKNOWN_GPU,
        kind: str = "nvlink",
    ) -> Topology:
        """``num_gpus`` GPUs on one ideal switch: unit hardware for tests and closed forms."""
        gpus = tuple(f"gpu{i}" for i in range(num_gpus))
        return cls(
            name=f"uniform{num_gpus}",
            gpus=gpus,
            profiles=(profile,) * num_gpus,
            nodes=(Node(name="host0", gpus=gpus),),
            switches=("switch",),
            links=tuple(
                Link(
                    a=gpu, b="switch", bandwidth_bytes_per_s=bandwidth_bytes_per_s,
                    latency_s=latency_s / 2, kind=kind,
                )
                for gpu in gpus
            ),
        )  # fmt: skip


# The YAML form.

_RANGE = re.compile(r"([A-Za-z_][\w-]*?)(\d+)\.\.\1(\d+)(?:/([1-9]\d*))?", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
MAX_GPUS = 1024
MAX_NAMES = 8 * MAX_GPUS


def expand(text: str) -> tuple[str, ...]:
    """``gpu0..gpu3`` as its names in order, ``nic0..nic56/8`` as every eighth; any other name as
    itself. ValueError if malformed."""
    found = _RANGE.fullmatch(text)
    if found is None:
        if ".." in text or not _NAME.fullmatch(text):
            raise ValueError(f"not a name ({text!r}), allowed: gpu0, or a range gpu0..gpu7")
        return (text,)
    first, last = int(found[2]), int(found[3])
    if not 0 <= last - first < MAX_GPUS:
        raise ValueError(f"not a range ({text!r}), allowed: ascending, {MAX_GPUS} names at most")
    return tuple(f"{found[1]}{i}" for i in range(first, last + 1, int(found[4] or 1)))


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str):
        raise ValueError(f"not a name ({value!r}), allowed: gpu0, or a range gpu0..gpu7")
    return expand(value)


def _gpu_entry(value: Any) -> tuple[tuple[str, str | None], ...]:
    """``gpu0..gpu3`` or ``{gpu7: l40s}`` as (name, profile) pairs."""
    if isinstance(value, dict):
        if not all(isinstance(profile, str) for profile in value.values()):
            raise ValueError(f"not a GPU profile name ({value!r}), allowed: {{gpu7: l40s}}")
        return tuple((n, profile) for names, profile in value.items() for n in _names(names))
    return tuple((name, None) for name in _names(value))


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
GpuEntry = Annotated[tuple[tuple[str, str | None], ...], BeforeValidator(_gpu_entry)]


def _check_runs(longer: int, shorter: int, at: Path_) -> None:
    """Names are dealt out in runs of equal length, one run for each name of the shorter range."""
    if longer % shorter:
        lengths = f"{longer} and {shorter} names"
        raise problem("uneven ranges", lengths, "the longer a multiple of the shorter", at)


class NodeFile(Strict):
    """One machine, or as many as ``name`` has names, each with its run of the GPUs."""

    name: Names
    """What the machine is called."""
    gpus: tuple[GpuEntry, ...] = Field(min_length=1)
    """Its GPUs in device order."""
    host_memory: BytesPerSecond | None = None
    """Loads plus stores, as DMA sees them; without it, no limit."""
    memory_at: tuple[Names, ...] = ()
    """Switches that host memory hangs on."""
    source: str = ""
    """Where ``host_memory`` is from."""

    @model_validator(mode="after")
    def _even(self) -> NodeFile:
        _check_runs(sum(map(len, self.gpus)), len(self.name), ("gpus",))
        _check_runs(sum(map(len, self.memory_at)), len(self.name), ("memory_at",))
        return self

    def nodes(self) -> Iterator[Node]:
        """The machines."""
        gpus = [name for entry in self.gpus for name, _ in entry]
        at = [name for names in self.memory_at for name in names]
        count = len(self.name)
        for i, name in enumerate(self.name):
            yield Node(
                name=name,
                gpus=_run(gpus, i, count),
                host_memory_bytes_per_s=self.host_memory or math.inf,
                memory_at=_run(at, i, count),
                source=self.source,
            )


def _run(names: Sequence[str], i: int, count: int) -> tuple[str, ...]:
    """Run number ``i`` of ``count`` equal ones."""
    return tuple(names[i * len(names) // count : (i + 1) * len(names) // count])


class LinkFile(Strict):
    """Cables, as many as the longer end has names: its names are dealt out in equal runs, one run
    for each name of the other end."""

    ends: tuple[Names, Names]
    """The GPUs and switches that it joins."""
    kind: str
    """Free text; what begins with ``nv`` is NVLink."""
    bandwidth: BytesPerSecond
    """What a large copy reaches: each way, or both together where ``duplex`` is half."""
    latency: Seconds
    """Of a message of no bytes."""
    duplex: Duplex = "full"
    """Whether both ways at once have all of the bandwidth."""
    source: str = ""
    """Where bandwidth and latency are from."""
    bandwidth_back: BytesPerSecond | None = None
    """From the second end to the first, where that is another."""

    @model_validator(mode="after")
    def _even(self) -> LinkFile:
        shorter, longer = sorted(map(len, self.ends))
        _check_runs(longer, shorter, ("ends",))
        if self.duplex == "half" and self.bandwidth_back is not None:
            raise problem("two rates", "half duplex", "duplex: full", ("bandwidth_back",))
        return self


class CollectiveFile(Strict):
    """A measured table, ``[[size, time], ...]``."""

    kind: CollectiveKind
    """The operation."""
    ranks: int = Field(ge=2)
    """GPUs that took part."""
    scope: Literal["node", "any"] | tuple[Names, ...] = "node"
    """Groups it holds for: inside one node, any, or these GPUs."""
    source: str = Field(min_length=1)
    """Who measured it, on what, with what."""
    table: tuple[tuple[Bytes, PositiveSeconds], ...] = Field(min_length=1)
    """Sizes as nccl-tests prints them, ascending, and the time of each."""

    @model_validator(mode="after")
    def _ascending(self) -> CollectiveFile:
        for i, ((smaller, _), (larger, _)) in enumerate(pairwise(self.table)):
            if not smaller < larger:
                raise problem("sizes out of order", larger, "ascending sizes", ("table", i + 1, 0))
        return self


class TopologyFile(Strict):
    """The YAML form of a topology."""

    name: Name
    """What plans and reports call it."""
    gpu: str
    """Profile of every GPU that names none."""
    nodes: tuple[NodeFile, ...] = Field(min_length=1)
    """Its machines."""
    peer_to_peer: bool
    """Whether PCIe transfers go from GPU to GPU; otherwise through host memory."""
    switches: tuple[Names, ...] = ()
    """Whatever shares bandwidth: PCIe switches, sockets, NVSwitches, network adapters."""
    links: tuple[LinkFile, ...] = ()
    """Its cables."""
    collectives: tuple[CollectiveFile, ...] = ()
    """Measured times; they win over the links."""
    price_per_hour: Dollars | None = None
    """Of all of it; left out, the sum of its GPUs' prices."""
    source: str = Field(min_length=1)
    """Where it is from; its first word says what its numbers rest on."""

    @model_validator(mode="after")
    def _consistent(self) -> TopologyFile:
        _check_names(self)
        _check_memory_at(self)
        _check_links(self)
        _check_connected(self)
        _check_profiles(self)
        _check_scopes(self)
        return self

    def gpu_entries(self) -> Iterator[tuple[str, str, Path_]]:
        """Name, profile and place of every GPU, in device order."""
        for i, node in enumerate(self.nodes):
            for j, entry in enumerate(node.gpus):
                for name, profile in entry:
                    yield name, profile or self.gpu, ("nodes", i, "gpus", j)

    def vertices(self) -> tuple[str, ...]:
        """Names that a link may end at."""
        gpus = tuple(name for name, _, _ in self.gpu_entries())
        return gpus + tuple(name for names in self.switches for name in names)

    def cables(self) -> Iterator[tuple[str, str, int]]:
        """Both ends of every cable and the index of its entry in ``links``."""
        for i, link in enumerate(self.links):
            left, right = link.ends
            count = max(len(left), len(right))
            for k in range(count):
                yield left[k * len(left) // count], right[k * len(right) // count], i

    def topology(self) -> Topology:
        """As the program uses it."""
        entries = tuple(self.gpu_entries())
        return Topology(
            name=self.name,
            gpus=tuple(name for name, _, _ in entries),
            profiles=tuple(profile for _, profile, _ in entries),
            nodes=tuple(node for entry in self.nodes for node in entry.nodes()),
            switches=tuple(name for names in self.switches for name in names),
            links=tuple(self._link(a, b, self.links[i]) for a, b, i in self.cables()),
            peer_to_peer=self.peer_to_peer,
            collectives=tuple(_table(entry) for entry in self.collectives),
            price_per_hour=self.price_per_hour,
            source=self.source,
        )

    @staticmethod
    def _link(a: str, b: str, entry: LinkFile) -> Link:
        return Link(
            a=a,
            b=b,
            bandwidth_bytes_per_s=entry.bandwidth,
            latency_s=entry.latency,
            kind=entry.kind,
            duplex=entry.duplex,
            source=entry.source,
            back_bytes_per_s=entry.bandwidth_back,
        )


def _table(entry: CollectiveFile) -> CollectiveTable:
    scope = entry.scope
    return CollectiveTable(
        kind=entry.kind,
        ranks=entry.ranks,
        sizes=tuple(size for size, _ in entry.table),
        seconds=tuple(time for _, time in entry.table),
        scope=scope if isinstance(scope, str) else tuple(sorted(n for ns in scope for n in ns)),
        source=entry.source,
    )


def _check_names(file: TopologyFile) -> None:
    seen: set[str] = set()
    named: list[tuple[str, Path_]] = []
    named += [(n, ("nodes", i, "name")) for i, node in enumerate(file.nodes) for n in node.name]
    named += [(name, place) for name, _, place in file.gpu_entries()]
    named += [(n, ("switches", i)) for i, names in enumerate(file.switches) for n in names]
    gpus = sum(1 for _ in file.gpu_entries())
    if gpus > MAX_GPUS:
        raise problem("too many GPUs", gpus, f"{MAX_GPUS} at most", ("nodes",))
    if len(named) > MAX_NAMES:
        raise problem("too many nodes, GPUs and switches", len(named), f"{MAX_NAMES} at most")
    for name, place in named:
        if name in seen:
            raise problem("duplicate name", name, "each name once", place)
        seen.add(name)


def _check_memory_at(file: TopologyFile) -> None:
    switches = [name for names in file.switches for name in names]
    for i, node in enumerate(file.nodes):
        for j, names in enumerate(node.memory_at):
            for name in names:
                if name not in switches:
                    at: Path_ = ("nodes", i, "memory_at", j)
                    raise problem("unknown switch", name, switches, at)


def _check_links(file: TopologyFile) -> None:
    vertices = frozenset(file.vertices())
    seen: set[frozenset[str]] = set()
    for a, b, i in file.cables():
        for side, end in enumerate((a, b)):
            if end not in vertices:
                raise problem("link to nowhere", end, vertices, ("links", i, "ends", side))
        if a == b or frozenset((a, b)) in seen:
            what = "link from a vertex to itself" if a == b else "duplicate link"
            raise problem(what, f"{a}, {b}", "one link between two vertices", ("links", i, "ends"))
        seen.add(frozenset((a, b)))


def _check_connected(file: TopologyFile) -> None:
    graph = nx.Graph()
    graph.add_nodes_from(file.vertices())
    graph.add_edges_from((a, b) for a, b, _ in file.cables())
    parts = sorted(sorted(part) for part in nx.connected_components(graph))
    if len(parts) > 1:
        shown = "; ".join(", ".join(part) for part in parts)
        what = f"not connected, separate parts: {shown}"
        raise problem(what, allowed="links that join them", at=("links",))


def _check_profiles(file: TopologyFile) -> None:
    used = [(file.gpu, ("gpu",)), *((profile, place) for _, profile, place in file.gpu_entries())]
    checked: set[str] = set()
    for profile, place in used:
        try:
            if profile not in checked:
                find("gpus", profile)
        except ConfigError:
            raise problem("unknown GPU", profile, available("gpus"), place) from None
        checked.add(profile)


def _check_scopes(file: TopologyFile) -> None:
    gpus = [name for name, _, _ in file.gpu_entries()]
    for i, entry in enumerate(file.collectives):
        if isinstance(entry.scope, str):
            continue
        members = [name for names in entry.scope for name in names]
        at: Path_ = ("collectives", i, "scope")
        for name in members:
            if name not in gpus:
                raise problem("unknown GPU", name, gpus, at)
        if len(set(members)) != entry.ranks:
            raise problem("wrong number of GPUs", len(set(members)), f"{entry.ranks} names", at)


def load_topology(name: str | Path, overrides: Sequence[str] = ()) -> Topology:
    """The topology called ``name`` (a path, or a shipped name such as ``pcie8``).

    ``overrides`` are what-ifs on the file, ``links.0.bandwidth=52 GB/s``. Raises ConfigError, also for
    numbers that cannot be (``simulator.box_lint``) where no what-if is about GPUs, links or
    tables.
    """
    document = read_document(find("topologies", str(name)), overrides, TopologyFile)
    file = document.validate(TopologyFile)
    box = file.topology()
    if not any(item.startswith(("gpu", "links.", "collectives")) for item in overrides):
        for at, what in box_problems(file, box):
            raise document.error(at, what)
    return box
