"""Unit hardware and hand-written graphs for closed forms: 1 B/s links, seconds as work.

``Shape.r`` of a compute op is its device time in seconds, ``Shape.w`` its time while a transfer that
uses SMs is active (0: the same), ``Shape.h`` the host's time to issue it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import pytest

from paradiff.dependencies import validate
from paradiff.graph import Buffer, Op, OpKind, Ref, ScheduleGraph, Section, Shape, Work
from paradiff.trace import Span, Trace, check_trace
from simulator.engine import simulate
from simulator.topology import Link, Node, Topology


@dataclass(frozen=True)
class UnitCompute:
    device_s: float
    contended_s: float
    host_s: float
    placed_s: float = 0.0


@dataclass(frozen=True)
class UnitCosts:
    """Work is seconds times ``unit_s``; transfers have constant fixed and host costs."""

    unit_s: float = 1.0
    fixed_s: float = 0.0
    host_s: float = 0.0

    def compute(self, work: Work, device: int) -> UnitCompute:
        shape, unit = work.shape, self.unit_s
        return UnitCompute(shape.r * unit, (shape.w or shape.r) * unit, shape.h * unit)

    def transfer_fixed_s(self, op: Op) -> float:
        return self.fixed_s

    def transfer_host_s(self, op: Op) -> float:
        return self.host_s


@dataclass
class Graph:
    """Writes small graphs: refs are ``"name"`` (this step), ``"name-1"`` (the step before)."""

    world: int
    buffers: dict[str, Buffer] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def ref(self, text: str, rank: int) -> Ref:
        name, _, rest = text.partition("#")
        name = name if "@r" in name else f"{name}@r{rank}"
        at = int(name.rpartition("@r")[2])
        self.buffers.setdefault(name, Buffer(name, at, 1, "hidden"))
        return Ref(name, int(rest or 0))

    def op(
        self,
        name: str,
        kind: OpKind,
        call: str,
        ranks: Sequence[int],
        stream: str,
        reads: Iterable[str] = (),
        writes: Iterable[str] = (),
        *,
        step: int | None = 0,
        work: tuple[int, int, int] | None = None,
        nbytes: int = 0,
    ) -> None:
        shape = work and Shape(1, 1, work[0], work[1], 1, 0, 0, work[2], 1, 0)
        self.ops.append(
            Op(
                name,
                kind,
                call,
                tuple(ranks),
                stream,
                tuple(self.ref(r, ranks[0]) for r in reads),
                tuple(self.ref(r, ranks[0]) for r in writes),
                step,
                Work("forward", ((0, 1),), shape) if shape else None,
                nbytes,
            )
        )

    def compute(
        self, name: str, rank: int, seconds: int, reads: Iterable[str] = (),
        writes: Iterable[str] = (), *, contended: int = 0, host: int = 0, step: int | None = 0,
        stream: str = "compute",
    ) -> None:  # fmt: skip
        work = (seconds, contended, host)
        self.op(f"{name}@r{rank}", "compute", "forward", (rank,), stream, reads, writes,
                step=step, work=work)  # fmt: skip

    def send(
        self, name: str, source: int, target: int, nbytes: int, read: str, write: str, *,
        step: int = 0,
    ) -> None:  # fmt: skip
        self.op(name, "p2p", "send", (source, target), f"p2p.{source}-{target}",
                [_on(read, source)], [_on(write, target)], step=step, nbytes=nbytes)  # fmt: skip

    def collective(
        self, call: str, name: str, ranks: Sequence[int], nbytes: int, read: str, write: str, *,
        step: int = 0,
    ) -> None:  # fmt: skip
        reads = [] if not read else [_on(read, r) for r in ranks]
        writes = [] if not write else [_on(write, r) for r in ranks]
        kind: OpKind = "permute" if call == "permute" else "collective"
        self.op(name, kind, call, ranks, "comm", reads, writes, step=step, nbytes=nbytes)

    def section(self, name: str, first: int, count: int = 1, stride: int = 1) -> None:
        self.sections.append(Section(name, first, count, stride, tuple(self.ops)))
        self.ops = []

    def build(self) -> ScheduleGraph:
        if self.ops:
            self.section("main", 0)
        graph = ScheduleGraph(self.world, tuple(self.buffers.values()), tuple(self.sections))
        validate(graph)
        return graph


def exchange(
    net: Sequence[int], nbytes: int, *, call: str = "permute", begin: int = 1, into: str = "x"
) -> Graph:
    """Two ranks: each computes ``begin`` before the loop; in a step rank r computes ``net[r]``, then
    both exchange. The section of the loop is open: ``g.section("loop", 0, steps)`` ends it."""
    g = Graph(2)
    for r in range(2):
        g.compute("begin", r, begin, writes=["x#-1"], step=None)
    g.section("begin", 0)
    for r in range(2):
        g.compute("net", r, net[r], reads=["x#-1"], writes=["y"])
    g.collective(call, "swap", (0, 1), nbytes, "y", into)
    return g


def _on(text: str, rank: int) -> str:
    """``kv#-1`` on rank 2 is ``kv@r2#-1``."""
    name, mark, version = text.partition("#")
    return f"{name}@r{rank}{mark}{version}"


def run(
    graph: ScheduleGraph,
    topology: Topology | None = None,
    costs: UnitCosts | None = None,
    backend: str = "nccl",
) -> Trace:
    """Simulate folded and in full, check both traces, insist that they agree; the folded one."""
    topology = topology or Topology.uniform(graph.world_size)
    costs = costs or UnitCosts()
    folded = simulate(graph, topology, costs, backend=backend)
    full = simulate(graph, topology, costs, backend=backend, periodic=False)
    check_trace(graph, folded)
    check_trace(graph, full)
    assert not full.repeats
    assert folded.makespan_s == pytest.approx(full.makespan_s, rel=1e-9)
    slack_s = 1e-9 * full.makespan_s
    for a, b in zip(by_id(folded.expanded()), by_id(full), strict=True):
        assert a[:6] == b[:6]
        assert a[6:] == pytest.approx(b[6:], rel=0, abs=slack_s), f"{a}\n{b}"
    return folded


def by_id(trace: Trace) -> list[Span]:
    """Spans in an order that does not depend on time."""
    return sorted(trace.spans, key=lambda span: (span.id, span.rank))


def random_box(seed: int) -> Topology:
    """Two to five GPUs of one or two models on one to three joined switches, some pairs bridged."""
    rng = random.Random(seed)
    gpus = tuple(f"gpu{i}" for i in range(rng.randint(2, 5)))
    switches = tuple(f"rc{i}" for i in range(rng.randint(1, 3)))
    speeds = (1.0, 2.0, 4.0)
    ends = [(gpu, rng.choice(switches)) for gpu in gpus]
    ends += [(switches[i], switches[rng.randrange(i)]) for i in range(1, len(switches))]
    links = [Link(a=a, b=b, bandwidth_bytes_per_s=rng.choice(speeds), kind="pcie") for a, b in ends]
    bridged = [pair for pair in combinations(gpus, 2) if rng.random() < 0.2]
    links += [Link(a=a, b=b, bandwidth_bytes_per_s=8.0, kind="nvlink") for a, b in bridged]
    return Topology(
        name=f"random{seed}",
        gpus=gpus,
        profiles=tuple(rng.choice(("unit", "l40")) for _ in gpus),
        nodes=(Node(name="host", gpus=gpus, host_memory_bytes_per_s=rng.choice((3.0, 9.0))),),
        switches=switches,
        links=tuple(links),
        peer_to_peer=rng.random() < 0.5,
    )
