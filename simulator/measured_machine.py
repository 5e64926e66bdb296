"""A machine as it was measured for one model and one group of ranks: its works, its calls, its links.

Decides how measured numbers become what the simulator asks for: costs of compute ops and of calls, and a
topology. Nothing here was seen in the run that is predicted: works were timed alone, calls between
made-up computations. How they were timed: ``paradiff.executor.measure_works`` and ``measure_calls``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, cast, get_args

import numpy as np

from paradiff.config import ConfigError
from paradiff.graph import Op, ScheduleGraph, Work, work_text
from paradiff.trace import Span, Trace, meta_of
from simulator.collectives import BACKENDS, Backend
from simulator.engine import Costs
from simulator.measured import Key, Row
from simulator.topology import CollectiveKind, CollectiveTable, Link, Node, Topology

HERE = "measured here"
SCHEMA = "paradiff.measured-machine/3"
FASTEST = 0.02
"""Share of its speed that compute keeps beside a transfer at the least."""
BOTH_WAYS = 1.5
"""A ring of two that takes so many times a message's time shares one direction at a time."""


class CallTime(NamedTuple):
    """Seconds of a transfer of ``nbytes`` (in the convention of ``paradiff.graph.traffic``) after
    computations of ``between_s``, shortest first: evenly spaced quantiles."""

    kind: str
    call: str
    ranks: tuple[int, ...]
    nbytes: int
    between_s: tuple[float, ...]
    time_s: float


class WorkTime(NamedTuple):
    """A compute op as the engine wants it."""

    device_s: float
    contended_s: float
    host_s: float
    placed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MeasuredMachine:
    """``works[key][rank]``: seconds of a work (``work_text``); ``hosts[rank]``: where each rank lives.

    ``lost``: share of a transfer's time that compute beside it loses; None where it was not measured.
    ``kernels``: of a GPU, in place of works.
    """

    about: Mapping[str, str]
    hosts: tuple[str, ...]
    works: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    calls: tuple[CallTime, ...] = ()
    lost: float | None = None
    kernels: Mapping[Key, Row] = field(default_factory=dict)

    def costs(self) -> MeasuredCosts:
        """Where the engine gets its durations."""
        return MeasuredCosts(self)

    def backend(self, name: str) -> Backend:
        """The library ``name`` here: its transfers take time from compute if they were seen to."""
        own = BACKENDS[name]
        return replace(own, uses_sms=own.uses_sms or bool(self.lost))

    def topology(self) -> Topology:
        """One switch for each host, a trunk between them; rates from messages, tables of the calls."""
        hosts = tuple(dict.fromkeys(self.hosts))
        names = tuple(f"rank{r}" for r in range(len(self.hosts)))
        nodes = tuple(
            Node(
                name=host,
                gpus=tuple(n for n, at in zip(names, self.hosts, strict=True) if at == host),
            )
            for host in hosts
        )
        if len(names) < 2:
            return Topology(name=HERE, gpus=names, profiles=(HERE,), nodes=nodes, links=())
        near = [r for r in self._pairs() if self.hosts[r[0]] == self.hosts[r[1]]]
        far = [r for r in self._pairs() if r not in near]
        # where each rank is alone on its host, what lies between hosts is all that there is
        local = self._link(near) if near else replace(self._link(far), latency_s=0.0)
        links = [
            replace(local, a=name, b=f"switch{hosts.index(host)}", latency_s=local.latency_s / 2)
            for name, host in zip(names, self.hosts, strict=True)
        ]
        if len(hosts) > 1:
            apart = self._link(far)
            trunk = replace(apart, latency_s=max(apart.latency_s - local.latency_s, 0.0) / 2)
            links += [replace(trunk, a=f"switch{i}", b="trunk") for i in range(len(hosts))]
        return Topology(
            name=HERE,
            gpus=names,
            profiles=(HERE,) * len(names),
            nodes=nodes,
            switches=(*(f"switch{i}" for i in range(len(hosts))), *(["trunk"] * (len(hosts) > 1))),
            links=tuple(links),
            collectives=tuple(self._tables(names)),
            source=", ".join(f"{key} {value}" for key, value in self.about.items()),
        )  # fmt: skip

    def _pairs(self) -> list[tuple[int, ...]]:
        return sorted({c.ranks for c in self.calls if c.kind == "p2p"})

    def _link(self, pairs: Sequence[tuple[int, ...]]) -> Link:
        """Latency and rate of messages between ``pairs``: the line through their times that has the
        least relative error."""
        seen = {c.nbytes: c.time_s for c in self.calls if c.kind == "p2p" and c.ranks in pairs}
        latency_s, rate_s = _line(sorted(seen.items()))
        ring = {c.nbytes: c.time_s for c in self.calls if c.kind == "permute" and c.ranks in pairs}
        most = max(seen.keys() & ring.keys(), default=None)
        is_half = most is not None and ring[most] > BOTH_WAYS * seen[most]
        return Link(
            a="", b="", bandwidth_bytes_per_s=1 / rate_s, latency_s=latency_s,
            duplex="half" if is_half else "full",
        )  # fmt: skip

    def _tables(self, names: Sequence[str]) -> Iterable[CollectiveTable]:
        groups: dict[tuple[str, tuple[int, ...]], list[CallTime]] = {}
        for call in self.calls:
            if call.kind == "collective":
                groups.setdefault((call.call, call.ranks), []).append(call)
        for (kind, ranks), rows in sorted(groups.items()):
            assert kind in get_args(CollectiveKind), kind
            share = len(ranks) if kind == "all_gather" else 1  # tables have the gathered size
            sizes = sorted((row.nbytes * share, row.time_s) for row in rows)
            yield CollectiveTable(
                kind=cast(CollectiveKind, kind),
                ranks=len(ranks),
                sizes=tuple(float(size) for size, _ in sizes),
                seconds=tuple(seconds for _, seconds in sizes),
                scope=tuple(sorted(names[r] for r in ranks)),
                source=HERE,
            )

    def to_json(self) -> dict[str, Any]:
        kernels = [[*key, *row] for key, row in self.kernels.items()]
        return {"schema": SCHEMA, **asdict(replace(self, kernels={})), "kernels": kernels}

    @classmethod
    def from_json(cls, text: str, where: str) -> MeasuredMachine:
        """Raises ConfigError for anything but what ``to_json`` gave."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"not of schema {SCHEMA}")
            return cls(
                about={str(k): str(v) for k, v in data["about"].items()},
                hosts=tuple(map(str, data["hosts"])),
                works={str(k): tuple(map(float, v)) for k, v in data["works"].items()},
                calls=tuple(
                    CallTime(
                        str(k), str(c), tuple(map(int, r)), int(n), tuple(map(float, b)), float(s)
                    )
                    for k, c, r, n, b, s in data["calls"]
                ),
                lost=None if data["lost"] is None else float(data["lost"]),
                kernels={Key(k, tuple(dims)): Row(*row) for k, dims, *row in data["kernels"]},
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{where}: no measurements of a machine ({error!r})") from None


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(seconds at no bytes, seconds a byte), neither negative: least squares of relative errors."""
    sizes, seconds = (np.array(column, float) for column in zip(*points, strict=True))
    design = np.column_stack([1 / seconds, sizes / seconds])
    fixed_s, byte_s = np.linalg.lstsq(design, np.ones(len(points)), rcond=None)[0]
    return max(float(fixed_s), 0.0), max(float(byte_s), 1e-12)


@dataclass(frozen=True)
class MeasuredCosts:
    """Durations of a measured machine (``simulator.engine.Costs``)."""

    machine: MeasuredMachine

    def compute(self, work: Work, device: int) -> WorkTime:
        """Seconds of ``work`` on rank ``device``. Raises KeyError where it was not measured."""
        seconds = self.machine.works[work_text(work)][device]
        return WorkTime(seconds, seconds / max(1 - (self.machine.lost or 0.0), FASTEST), 0.0)

    def transfer_fixed_s(self, op: Op) -> float:
        """None: a call with all that belongs to it is in the topology."""
        return 0.0

    def transfer_host_s(self, op: Op) -> float:
        return 0.0


def in_turn(graph: ScheduleGraph, costs: Costs) -> Trace:
    """All ranks of ``graph`` in one process on its first device, one op after another in canonical
    order, as ``paradiff.executor`` takes turns there. Payloads change hands without a copy: no time."""
    spans: list[Span] = []
    device_s = host_s = 0.0
    for instance in graph.instances():
        op = instance.op
        cost = WorkTime(0.0, 0.0, 0.0) if op.work is None else costs.compute(op.work, 0)
        ready, start = device_s, max(device_s, host_s)
        host_s += cost.host_s
        device_s = max(start + cost.device_s, host_s)
        step = None if op.step is None else op.step + instance.base
        spans += [
            Span(
                op.name, step, rank, op.stream, op.kind, op.call, ready, start, device_s,
                cost.device_s, op.nbytes,
            )
            for rank in op.ranks
        ]  # fmt: skip
    return Trace(tuple(spans), device_s, (), meta_of(graph, "simulated"))
