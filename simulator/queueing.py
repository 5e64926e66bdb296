"""Queues of requests in front of GPUs: when each request starts and when it is done.

Knows units of GPUs, the widths and seconds a class of requests takes on them, batches, routing and
failing nodes; knows nothing of models, planners, prices or service levels.

A *unit* is what serves requests: a replica of fixed width, or a whole node whose GPUs are dealt out
request by request. Requests of one station wait in one queue (``shared``) or in one queue a unit. The
class whose first request is the oldest goes first; no request overtakes another except into a batch.
A request takes the widest of its rungs that fits the unit and is no more than an equal share of the
free GPUs among all that wait, and at least the narrowest. With one rung as wide as its unit that is
plain first come, first served.

``serve`` runs a SimPy event loop in callback style. Where a station has one width, no batches, no
failures and no queue-dependent routing, the start times obey the Kiefer-Wolfowitz recursion (Kiefer
and Wolfowitz 1955, for one server Lindley 1952): request i starts at max(arrival, earliest time that a
unit is free). ``recursion`` computes just that, an order of magnitude faster and to the same bit.

All instants lie on a grid of 2**-20 s (1 us; exact in floats for 270 years), so that simultaneous events
are simultaneous and the event loop's clock, which adds differences, is exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from simpy import Environment
from simpy.events import Event

Routing = Literal["shared", "shortest-queue", "round-robin", "random"]
Floats = NDArray[np.float64]
GRID_PER_S = 2.0**20


def on_grid(seconds: float) -> float:
    """The nearest instant of the grid."""
    return round(seconds * GRID_PER_S) / GRID_PER_S


class Rung(NamedTuple):
    """One way to serve a class: ``width`` GPUs; ``batch_s[i]`` seconds for up to 2**i requests."""

    width: int
    batch_s: tuple[float, ...]

    def seconds(self, requests: int) -> float:
        """Time of one batch; sizes between powers of two are padded up to the next."""
        return on_grid(self.batch_s[(requests - 1).bit_length()])

    @property
    def largest(self) -> int:
        """Requests in the largest batch."""
        return int(2 ** (len(self.batch_s) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """``units_per_node`` equal units of ``gpus`` GPUs on every node, and the classes they serve.

    ``rungs``: class -> ways to serve it, narrowest first.
    """

    units_per_node: int
    gpus: int
    rungs: Mapping[int, tuple[Rung, ...]]

    def __post_init__(self) -> None:
        for kind, rungs in self.rungs.items():
            widths = [rung.width for rung in rungs]
            if not widths or widths != sorted(set(widths)) or not 0 < widths[-1] <= self.gpus:
                raise ValueError(f"class {kind}: widths {widths} on units of {self.gpus} GPUs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Nodes fail and are repaired after exponential times; what they were doing starts again."""

    mtbf_s: float
    repair_s: float

    @property
    def availability(self) -> float:
        """Share of the time that a node is up."""
        return self.mtbf_s / (self.mtbf_s + self.repair_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """``nodes`` equal nodes, each cut into the units of ``stations``; a class has one station.

    ``max_batch`` requests of one class are served together where so many wait, or where the first
    has waited ``window_s``.
    """

    nodes: int
    stations: tuple[Station, ...]
    routing: Routing = "shared"
    max_batch: int = 1
    window_s: float = 0.0
    failures: Failures | None = None

    @property
    def gpus(self) -> int:
        """GPUs of all units of all nodes."""
        return self.nodes * sum(s.units_per_node * s.gpus for s in self.stations)


class Requests(NamedTuple):
    """Arrival times, ascending and on the grid, and class numbers; both of shape (requests,)."""

    arrival_s: Floats
    kinds: NDArray[np.int64]

    @classmethod
    def at(cls, arrival_s: Floats, kinds: NDArray[np.int64]) -> Requests:
        """At the nearest instants of the grid."""
        return cls(np.round(arrival_s * GRID_PER_S) / GRID_PER_S, kinds)


class Served(NamedTuple):
    """What became of the requests, in their order; arrays of shape (requests,).

    ``gpus``: a request's share of the GPUs that served it (width over batch size), so that
    sum(gpus * (finish - start)) is the busy GPU time. ``lost_gpu_s``: the part of it that failures
    threw away, which is not in that sum.
    """

    start_s: Floats
    finish_s: Floats
    gpus: Floats
    lost_gpu_s: float = 0.0
    failures: int = 0


def serve(system: System, requests: Requests, seed: int = 0) -> Served:
    """Serve all requests; by recursion where that is exact, otherwise by events. ``seed``: of random
    routing and failures. Raises ValueError for a class that no station serves."""
    return (
        recursion(system, requests, seed) if is_static(system) else simulate(system, requests, seed)
    )


def is_static(system: System) -> bool:
    """Whether start times follow from arrivals and service times alone, by ``recursion``."""
    fixed = all(
        len(rungs) == 1 and rungs[0].width == station.gpus
        for station in system.stations
        for rungs in station.rungs.values()
    )
    plain = system.max_batch == 1 and system.window_s == 0 and system.failures is None
    return fixed and plain and system.routing != "shortest-queue"


# --------------------------------------------------------------------------------------- recursion


def recursion(system: System, requests: Requests, seed: int = 0) -> Served:
    """Start times of a static system by the Kiefer-Wolfowitz recursion, queue by queue."""
    start, gpus = np.zeros(len(requests.kinds)), np.zeros(len(requests.kinds))
    seconds = np.zeros(len(requests.kinds))
    for station, members in zip(system.stations, _members(system, requests), strict=True):
        units = system.nodes * station.units_per_node
        kinds = requests.kinds[members]
        table = np.zeros(max(station.rungs, default=0) + 1)
        for kind, (rung,) in station.rungs.items():
            table[kind] = rung.seconds(1)
        seconds[members] = table[kinds]
        gpus[members] = station.gpus
        if system.routing == "shared":
            start[members] = _fifo(requests.arrival_s[members], seconds[members], units)
            continue
        chosen = _dealt(system.routing, len(members), units, seed)
        for unit in range(units):
            own = members[chosen == unit]
            start[own] = _fifo(requests.arrival_s[own], seconds[own], 1)
    return Served(start, start + seconds, gpus)


def _members(system: System, requests: Requests) -> list[NDArray[np.int64]]:
    """Indices of the requests of each station."""
    members = [
        np.flatnonzero(np.isin(requests.kinds, list(station.rungs))) for station in system.stations
    ]
    if sum(map(len, members)) != len(requests.kinds):
        raise ValueError("a class must be served by exactly one station")
    return members


def _dealt(routing: Routing, requests: int, units: int, seed: int) -> NDArray[np.int64]:
    """Unit of each request, for routing that does not look at the queues."""
    if routing == "round-robin":
        return np.arange(requests) % units
    return np.random.default_rng((seed, 1)).integers(units, size=requests)


def _fifo(arrival_s: Floats, seconds: Floats, units: int) -> Floats:
    """Start times at ``units`` servers with one queue, first come, first served."""
    free = [0.0] * units
    starts = []
    for arrival, service in zip(arrival_s.tolist(), seconds.tolist(), strict=True):
        earliest = free[0]
        start = arrival if arrival > earliest else earliest
        heapreplace(free, start + service)
        starts.append(start)
    return np.array(starts)


# --------------------------------------------------------------------------------------- events


def simulate(system: System, requests: Requests, seed: int = 0) -> Served:
    """Serve all requests in SimPy's event loop: any system that can be written down."""
    return _Simulation(system, requests, seed).run()


class _Unit:
    """State of one unit."""

    __slots__ = ("free", "gpus", "jobs", "number", "queue", "requests", "up")

    def __init__(self, gpus: int) -> None:
        self.gpus = self.free = gpus
        self.up = True
        self.requests = 0
        """Waiting for it alone or in service."""
        self.jobs: dict[int, _Job] = {}
        self.queue: _Queue
        self.number = 0
        """Its place in the queue's list."""


class _Job(NamedTuple):
    """A batch in service."""

    number: int
    unit: _Unit
    width: int
    requests: list[int]
    start_s: float
    finish_s: float


class _Queue:
    """What waits for some units: a line for each class, and the units by how many GPUs are free."""

    __slots__ = ("free", "full", "idle", "lines", "rungs", "units", "waiting")

    def __init__(
        self, units: Sequence[_Unit], rungs: Mapping[int, tuple[Rung, ...]], max_batch: int
    ) -> None:
        self.units, self.rungs = units, rungs
        self.full = {k: min(max_batch, max(r.largest for r in rs)) for k, rs in rungs.items()}
        self.lines: dict[int, deque[int]] = {kind: deque() for kind in rungs}
        self.waiting = self.free = 0
        self.idle: list[list[int]] = [[] for _ in range(units[0].gpus + 1)]
        for number, unit in enumerate(units):
            unit.queue, unit.number = self, number
            self.free += unit.free
            self.idle[unit.free].append(number)

    def change(self, unit: _Unit, gpus: int) -> None:
        """``unit`` has ``gpus`` more free ones (fewer, where negative)."""
        unit.free += gpus
        self.free += gpus
        heappush(self.idle[unit.free], unit.number)

    def freest(self) -> _Unit | None:
        """The unit with most free GPUs, the first of them; None where all are busy.

        An entry of ``idle`` holds only while its unit still has that many.
        """
        for free in range(len(self.idle) - 1, 0, -1):
            heap = self.idle[free]
            while heap:
                unit = self.units[heap[0]]
                if unit.free == free:
                    return unit
                heappop(heap)
        return None


class _Simulation:
    """One run."""

    def __init__(self, system: System, requests: Requests, seed: int) -> None:
        self.system, self.env = system, Environment()
        self.arrival_s, self.kinds = requests.arrival_s.tolist(), requests.kinds.tolist()
        self.rng = np.random.default_rng((seed, 2))
        self.window_s = on_grid(system.window_s)
        count = len(self.kinds)
        self.start_s, self.finish_s, self.gpus = [0.0] * count, [0.0] * count, [0.0] * count
        self.left, self.jobs, self.lost_gpu_s, self.failures = count, 0, 0.0, 0
        self.done = Event(self.env)
        self.nodes: list[list[_Unit]] = [[] for _ in range(system.nodes)]
        self.queues: list[list[_Queue]] = []
        """Of each station: one for all units, or one for each."""
        self.station = {k: i for i, s in enumerate(system.stations) for k in s.rungs}
        self.chosen: dict[int, int] = {}
        """Request -> queue of its station, where routing does not look at the queues."""
        own = system.routing != "shared"
        for station, members in zip(system.stations, _members(system, requests), strict=True):
            units = [_Unit(station.gpus) for _ in range(system.nodes * station.units_per_node)]
            for number, unit in enumerate(units):
                self.nodes[number // station.units_per_node].append(unit)
            groups = [[unit] for unit in units] if own else [units]
            self.queues.append([_Queue(g, station.rungs, system.max_batch) for g in groups])
            if system.routing in ("round-robin", "random"):
                dealt = _dealt(system.routing, len(members), len(units), seed)
                self.chosen.update(zip(members.tolist(), dealt.tolist(), strict=True))

    def run(self) -> Served:
        """Until the last request is done."""
        if self.system.failures is not None:
            for units in self.nodes:
                self._start_node(units, self.system.failures)
        if self.left:
            self._at(self.arrival_s[0], self._arrive, 0)
            self.env.run(until=self.done)
        return Served(
            np.array(self.start_s), np.array(self.finish_s), np.array(self.gpus),
            self.lost_gpu_s, self.failures,
        )  # fmt: skip

    def _at(self, time_s: float, callback: Callable[[Event], None], value: Any = None) -> None:
        """Call back at ``time_s``."""
        alarm = self.env.timeout(time_s - self.env.now, value)
        alarm.callbacks.append(callback)

    def _arrive(self, event: Event) -> None:
        request = cast(int, event.value)
        if request + 1 < len(self.arrival_s):
            self._at(self.arrival_s[request + 1], self._arrive, request + 1)
        queue = self._queue_of(request)
        queue.lines[self.kinds[request]].append(request)
        queue.waiting += 1
        if self.window_s > 0:
            due_s = self.arrival_s[request] + self.window_s
            self._at(due_s, lambda _: self._dispatch(queue))
        self._dispatch(queue)

    def _queue_of(self, request: int) -> _Queue:
        queues = self.queues[self.station[self.kinds[request]]]
        if len(queues) == 1:
            return queues[0]
        if self.system.routing != "shortest-queue":
            return queues[self.chosen[request]]
        queue = min(queues, key=lambda q: (not q.units[0].up, q.units[0].requests))
        queue.units[0].requests += 1
        return queue

    def _dispatch(self, queue: _Queue) -> None:
        """Start what can start."""
        while queue.waiting:
            kind = self._ready(queue)
            unit = queue.freest()
            if kind is None or unit is None:
                return
            rungs = queue.rungs[kind]
            if unit.free < rungs[0].width:
                return
            share = queue.free // queue.waiting
            rung = rungs[0]
            for wider in rungs[1:]:
                if wider.width <= unit.free and wider.width <= share:
                    rung = wider
            self._start(queue, unit, rung, kind)

    def _ready(self, queue: _Queue) -> int | None:
        """The class to serve next: of those whose batch is full or overdue, the oldest."""
        best, oldest, now = None, len(self.kinds), self.env.now
        for kind, line in queue.lines.items():
            if not line or line[0] > oldest:
                continue
            full = len(line) >= queue.full[kind]
            if full or now >= self.arrival_s[line[0]] + self.window_s:
                best, oldest = kind, line[0]
        return best

    def _start(self, queue: _Queue, unit: _Unit, rung: Rung, kind: int) -> None:
        line = queue.lines[kind]
        batch = [line.popleft() for _ in range(min(len(line), self.system.max_batch, rung.largest))]
        queue.waiting -= len(batch)
        start = self.env.now
        finish = start + rung.seconds(len(batch))
        self.jobs += 1
        job = _Job(self.jobs, unit, rung.width, batch, start, finish)
        unit.jobs[job.number] = job
        queue.change(unit, -rung.width)
        self._at(finish, self._finish, job)

    def _finish(self, event: Event) -> None:
        job = cast(_Job, event.value)
        unit = job.unit
        if unit.jobs.pop(job.number, None) is None:
            return  # its node failed
        share = job.width / len(job.requests)
        for request in job.requests:
            self.start_s[request], self.finish_s[request] = job.start_s, job.finish_s
            self.gpus[request] = share
        unit.requests -= len(job.requests)
        unit.queue.change(unit, job.width)
        self.left -= len(job.requests)
        if self.left:
            self._dispatch(unit.queue)
        else:
            self.done.succeed()

    # ------------------------------------------------------------------------------ failures

    def _start_node(self, units: list[_Unit], failures: Failures) -> None:
        """Up or down as in the long run: exponential times have no memory."""
        if self.rng.random() < failures.availability:
            self._later(failures.mtbf_s, self._fail, units)
        else:
            self._take_down(units)
            self._later(failures.repair_s, self._repair, units)

    def _later(self, mean_s: float, callback: Callable[[Event], None], units: list[_Unit]) -> None:
        self._at(self.env.now + on_grid(self.rng.exponential(mean_s)), callback, units)

    def _take_down(self, units: list[_Unit]) -> None:
        for unit in units:
            unit.up = False
            unit.queue.change(unit, -unit.free)

    def _fail(self, event: Event) -> None:
        """What a node was doing goes back to the head of its queue."""
        units = cast(list[_Unit], event.value)
        assert self.system.failures is not None
        now = self.env.now
        self.failures += 1
        self._take_down(units)
        for unit in units:
            lost = [request for job in unit.jobs.values() for request in job.requests]
            self.lost_gpu_s += sum(j.width * (now - j.start_s) for j in unit.jobs.values())
            unit.jobs.clear()
            for request in sorted(lost, reverse=True):
                unit.queue.lines[self.kinds[request]].appendleft(request)
            unit.queue.waiting += len(lost)
        for queue in dict.fromkeys(unit.queue for unit in units):
            self._dispatch(queue)
        self._later(self.system.failures.repair_s, self._repair, units)

    def _repair(self, event: Event) -> None:
        units = cast(list[_Unit], event.value)
        assert self.system.failures is not None
        for unit in units:
            unit.up = True
            unit.queue.change(unit, unit.gpus)
        for queue in dict.fromkeys(unit.queue for unit in units):
            self._dispatch(queue)
        self._later(self.system.failures.mtbf_s, self._fail, units)
