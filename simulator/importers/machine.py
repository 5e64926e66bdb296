"""What the files say of one machine, in one vocabulary: a tree of PCIe, NVLinks, measured numbers.

Plain data. The readers (``smi``, ``nccl``, ``lstopo``, ``bandwidth``) fill it; ``assemble`` makes a
topology of it; the box doctor looks at it for evidence. Every number says which line it stands on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from paradiff.config import ConfigError

Kind = Literal["socket", "root", "switch", "gpu", "nic"]
Pair = tuple[int, int]
"""Two device indices, source first."""

GT_PER_S = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
"""Transfers per second and lane -> PCIe generation."""
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 8e9 / 8 * 128 / 130, 4: 16e9 / 8 * 128 / 130}
_LANE_BYTES_PER_S |= {5: 32e9 / 8 * 128 / 130, 6: 64e9 / 8 * 242 / 256}


def pcie_bytes_per_s(generation: int, width: int) -> float:
    """What a PCIe link carries in each direction after line coding: 31.5 GB/s for 4, 16.

    8b/10b up to generation 2, 128b/130b to 5, 242 of 256 bytes of a flit in 6. Raises KeyError for a
    generation it does not know.
    """
    return _LANE_BYTES_PER_S[generation] * width


@dataclass(frozen=True, slots=True)
class Reading:
    """A number that a file states, in base units, and where: ``file:line``."""

    value: float
    at: str


def pci_address(text: str) -> tuple[int, int, int] | None:
    """``0000:1b:00.0``, or ``0x1b`` for its bus alone, as (domain, bus, device); None if neither."""
    try:
        parts = [int(part, 16) for part in text.partition(".")[0].split(":")]
    except ValueError:
        return None
    if len(parts) == 1:
        return 0, parts[0], 0
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU as a file names it: ``model`` ("NVIDIA L40S", empty where it says none) and PCI address."""

    model: str
    address: tuple[int, int, int] | None
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pcie:
    """A PCIe link as a file describes it. Some say generation and width, some only the rate."""

    bytes_per_s: float
    at: str
    generation: int | None = None
    width: int | None = None

    @property
    def kind(self) -> str:
        """``pcie4-x16``, or ``pcie`` where only the rate is known."""
        return "pcie" if self.generation is None else f"pcie{self.generation}-x{self.width}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vertex:
    """A part of the machine and the link to what it hangs on (``parent``; None for sockets)."""

    name: str
    kind: Kind
    parent: str | None
    at: str
    pcie: Pcie | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvlinks:
    """NVLinks between two GPUs (device indices), or from a GPU to the NVSwitches (``b`` None).

    ``bytes_per_s`` where the file states the rate of all together.
    """

    a: int
    b: int | None
    count: int | None
    at: str
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine as one file describes it. GPUs are named ``gpu0`` on, in device order.

    ``cpu`` is (vendor, model) where known. ``pairs``: what a file that gives pairs only says of each.
    """

    vertices: tuple[Vertex, ...]
    nvlinks: tuple[Nvlinks, ...]
    at: str
    cpu: tuple[str, int] | None = None
    nics: tuple[tuple[str, Reading | None], ...] = ()
    """Network adapters and their bytes/s, where stated."""
    between_sockets: Reading | None = None
    """Bytes/s of what joins the sockets, where stated."""
    cards: Mapping[int, Card] = field(default_factory=dict)
    """GPUs by device index, where named."""
    tells_nvlinks: bool = True
    """Whether the file would say so if there were NVLinks."""

    @property
    def gpus(self) -> tuple[str, ...]:
        """Names in device order."""
        return tuple(f"gpu{i}" for i in range(sum(v.kind == "gpu" for v in self.vertices)))

    def above(self, name: str) -> Iterator[Vertex]:
        """The vertex called ``name`` and all that it hangs on, upward."""
        by_name = {vertex.name: vertex for vertex in self.vertices}
        here: str | None = name
        while here is not None:
            yield by_name[here]
            here = by_name[here].parent

    def pruned(self) -> Machine:
        """Without what no GPU hangs on, and without bridges that join nothing: a bridge with one
        child is spliced out, and the slower of its two links is kept. What remains is numbered anew.

        Raises ConfigError where a GPU is missing or hangs on no socket: in a file that was cut, say.
        """
        known = {vertex.name for vertex in self.vertices}
        for gpu in self.gpus:
            if gpu not in known or [*self.above(gpu)][-1].kind != "socket":
                what = f"{gpu} is on no socket, allowed: the whole file of one machine"
                raise ConfigError(f"{self.at}: {what}")
        wanted = {v.name for gpu in self.gpus for v in self.above(gpu)}
        vertices = {v.name: v for v in self.vertices if v.name in wanted}
        for name in [n for n, v in vertices.items() if v.kind in ("root", "switch")][::-1]:
            children = [v for v in vertices.values() if v.parent == name]
            if len(children) == 1:
                bridge, child = vertices.pop(name), children[0]
                link = _slower(bridge.pcie, child.pcie)
                vertices[child.name] = replace(child, parent=bridge.parent, pcie=link)
        kept = list(vertices.values())
        names = {
            vertex.name: f"{prefix}{i}"
            for kind, prefix in (("socket", "socket"), ("root", "rc"), ("switch", "plx"))
            for i, vertex in enumerate(v for v in kept if v.kind == kind)
        }
        renamed = (
            replace(v, name=names.get(v.name, v.name), parent=names.get(v.parent or "", v.parent))
            for v in kept
        )
        return replace(self, vertices=tuple(renamed))


def _slower(a: Pcie | None, b: Pcie | None) -> Pcie | None:
    known = [link for link in (b, a) if link is not None]
    return min(known, key=lambda link: link.bytes_per_s) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Measured copies, bytes/s.

    ``peer``: one direction between two GPUs with peer access; ``staged``: without; ``both``: both
    directions together, without peer access; ``host``: host to GPU or back, the slower of the two;
    ``host_memory``: host memory with all GPUs at once, loads plus stores, at least.
    """

    peer: Mapping[Pair, Reading] = field(default_factory=dict)
    staged: Mapping[Pair, Reading] = field(default_factory=dict)
    both: Mapping[Pair, Reading] = field(default_factory=dict)
    host: Mapping[int, Reading] = field(default_factory=dict)
    host_memory: Reading | None = None
    access: Mapping[Pair, tuple[bool, str]] = field(default_factory=dict)
    """Whether two GPUs reach each other's memory, and who says so."""
    cards: Mapping[int, Card] = field(default_factory=dict)
    gpus: int = 0
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRun:
    """One table of nccl-tests, out of place. ``devices`` are device indices on the first host (all 0
    where each process saw one GPU; none where ``assemble`` cannot tell), ``cards`` what ran there."""

    kind: str
    ranks: int
    devices: tuple[int, ...]
    cards: tuple[Card, ...]
    hosts: tuple[str, ...]
    table: tuple[tuple[int, float], ...]
    """(size in bytes, seconds), ascending."""
    busbw: Reading
    """Bus bandwidth of the largest size, bytes/s."""
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that was given of one box, by kind of file; None where there was none."""

    machine: Machine
    access: Mapping[Pair, tuple[bool, str]]
    bandwidths: tuple[Bandwidths, ...]
    runs: tuple[CollectiveRun, ...]
    mig_at: str | None = None
    """Where a file says that GPUs are partitioned (MIG)."""
    notes: tuple[str, ...] = ()
    """What of the files is not used, and why."""

    @property
    def cards(self) -> Mapping[int, Card]:
        """GPUs by device index, as the first file that names them does."""
        named = [self.machine.cards, *(b.cards for b in self.bandwidths)]
        return next((cards for cards in named if cards), {})
