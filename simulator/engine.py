"""The discrete-event engine: when every op of a schedule graph starts and ends on given hardware.

Decides timing only. Edges come from ``Dependencies``, durations from ``Costs``, flows from
``collectives``, their rates from ``network``. SimPy's event loop in callback style: an alarm a phase
of an op, no process per op.

An op goes through these phases:

- *waiting* for its predecessors, then for the *issue*: each rank has a host clock that issues its ops
  in canonical order and runs ahead of the device. An op neither starts before its issue began nor
  ends before its issue ended (on any of its ranks).
- *computing*: at full speed, or slower while a transfer that uses SMs is active on the same rank.
- a transfer's *head*: fixed cost of the call plus latency steps; then *flowing*: all its flows drain
  at max-min fair rates, re-solved whenever a flow that shares a link starts or ends.
- the *tail*: the device is done, the host still issues.

Iterations of a section are fed one by one, the next when any op of the latest starts. An op cannot
start before that in any case: its predecessor on each stream is an op of the latest iteration (only
an op that is the first on its stream in a new section is held back by this).

Determinism and steady state. All instants lie on a grid of 2**-40 s (0.9 ps; exact in floats up to
8192 s), so a history that repeats does so bit by bit, and simultaneous events are simultaneous. When
an iteration begins, the whole state relative to that instant is compared with that of earlier
iterations: progress of every unfinished op, bytes left of every flow, and the lead of every host
(unless it was never felt and cannot shrink). If it repeats, whole periods are skipped: ops in flight
are renamed to later steps, and a ``Repeat`` in the trace stands for the rest.

Of a ``Quotient`` only the representatives are simulated, with the flows of all: a transfer stands for
those of all its members, which must have one latency and drain at one instant, or ``Asymmetric`` is
raised. The trace holds the spans of the representatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, ulp
from typing import NamedTuple, Protocol

from simpy import Environment
from simpy.events import Event, EventPriority

from paradiff.dependencies import Dependencies
from paradiff.graph import Instance, Op, ScheduleGraph, Section, Work
from paradiff.trace import TRANSFERS, Repeat, Span, Trace, meta_of
from simulator.collectives import BACKENDS, Backend, Lowering
from simulator.fluid import Alarm, Bundle, Drain, Fluid, Stretch, on_grid
from simulator.network import Network
from simulator.symmetry import Asymmetric, Members, Quotient, whole
from simulator.topology import Topology

_SAME = 1e-11
"""States are equal if no time in them differs by more than this share of the period (and than a few
units in the last place of the clock, which count once it has passed the exact range)."""
_AFTER_ALL = EventPriority(9)

# Phases of a task; those after ISSUING have begun.
_WAITING, _ISSUING, _COMPUTING, _HEAD, _FLOWING, _TAIL = range(6)
_PHASES = 8


class ComputeTime(Protocol):
    """What a compute op costs, in seconds.

    ``device_s`` with all SMs, ``contended_s`` while a transfer that uses SMs is active all along,
    ``host_s`` for the host to issue the launches, ``placed_s`` until a transfer that is launched
    after it can get an SM.
    """

    @property
    def device_s(self) -> float: ...
    @property
    def contended_s(self) -> float: ...
    @property
    def host_s(self) -> float: ...
    @property
    def placed_s(self) -> float: ...


class Costs(Protocol):
    """Source of every duration that is not a fluid transfer (``simulator.costs``)."""

    def compute(self, work: Work, device: int) -> ComputeTime:
        """Cost of ``work`` on GPU number ``device``."""
        ...

    def transfer_fixed_s(self, op: Op) -> float:
        """Device seconds of one call of a transfer beside latency and bytes."""
        ...

    def transfer_host_s(self, op: Op) -> float:
        """Host seconds to issue one call, on each participant."""
        ...


class Flows(NamedTuple):
    """From ``begin_s`` to ``end_s`` the flows of an op (its id), by route, ran at these rates."""

    op: str
    begin_s: float
    end_s: float
    routes: tuple[int, ...]
    bytes_per_s: tuple[float, ...]


def simulate(
    graph: ScheduleGraph | Quotient,
    topology: Topology | Network,
    costs: Costs,
    *,
    placement: Sequence[int] | None = None,
    periodic: bool = True,
    backend: str | Backend = "nccl",
    flows: list[Flows] | None = None,
) -> Trace:
    """Run ``graph`` with rank r on device ``placement[r]`` (default: device r).

    ``periodic=False`` simulates every iteration; the makespan is the same. A ``Network`` may be
    passed to share its memory between runs. ``flows`` is extended by the flows of each transfer, of the
    iterations that are simulated. Raises ValueError for an impossible placement or an
    unknown back end, InvalidGraph where the graph reads what is not there, Asymmetric for a quotient
    that is none on this network.
    """
    schedule = graph if isinstance(graph, Quotient) else whole(graph)
    network = topology if isinstance(topology, Network) else Network(topology)
    devices = tuple(range(schedule.world_size)) if placement is None else tuple(placement)
    num_devices = len(network.topology.gpus)
    if len(devices) != schedule.world_size or not all(0 <= d < num_devices for d in devices):
        raise ValueError(
            f"placement {devices}: {schedule.world_size} ranks on devices 0 to {num_devices - 1}"
        )
    if isinstance(backend, str) and backend not in BACKENDS:
        raise ValueError(f"back end {backend!r}, one of {', '.join(BACKENDS)}")
    library = BACKENDS[backend] if isinstance(backend, str) else backend
    lowering = Lowering(network, devices, library)
    engine = _Engine(schedule, lowering, costs, periodic, watched=flows is not None)
    try:
        trace = engine.run()
        if flows is not None:
            flows += engine.flows()
    finally:
        vars(engine).clear()  # its parts know it: what it holds would wait for the cyclic collector
    return trace


@dataclass(slots=True)
class _Plan:
    """What is the same for every occurrence of an op of a section."""

    op: Op
    device_s: float
    contended_s: float
    head_s: float
    bundle: Bundle | None
    """The flows of a transfer; None where nothing takes time to drain."""
    host: tuple[tuple[int, float], ...]
    uses_sms: bool
    placed_s: float = 0.0
    edges: tuple[int, ...] = ()
    """Predecessors from the third iteration on: handles relative to the iteration's first."""
    roots: tuple[int, ...] = ()
    """Handles of predecessors older than the section."""


class _Task:
    """One occurrence of an op while it is unfinished."""

    __slots__ = (
        "base", "busy_s", "drain", "due_s", "handle", "issue_begin_s", "issue_end_s", "issue_ends_s",
        "left", "mark_s", "next", "pace_s", "phase", "plan", "ready_s", "start_s", "token", "waiting",
    )  # fmt: skip

    def __init__(self, plan: _Plan, base: int, handle: int) -> None:
        self.plan = plan
        self.base = base
        self.handle = handle
        self.phase = _WAITING
        self.waiting = 0
        self.next: list[_Task] = []
        self.issue_begin_s = self.issue_end_s = 0.0
        self.issue_ends_s: list[tuple[int, float]] = []
        self.token = 0

    # Set when the phase is entered that needs them.
    ready_s: float
    start_s: float
    busy_s: float
    due_s: float
    """When the current phase ends, as things stand."""
    mark_s: float
    """Instant that ``left`` refers to."""
    left: float
    """Share of the computation still to do."""
    pace_s: float
    """Seconds for the whole computation at the current speed."""
    drain: Drain[_Task]
    """Of a transfer whose bytes flow."""


class _State(NamedTuple):
    """Everything that decides the future, relative to the instant ``at_s``, but for ``key``."""

    iteration: int
    at_s: float
    times_s: list[float]
    leads_s: list[float]


def _period_and_slack(earlier: _State, state: _State) -> tuple[float, float]:
    period_s = state.at_s - earlier.at_s
    return period_s, _SAME * period_s + 4 * ulp(state.at_s)


class _Feed:
    """Iterations of the graph's sections, with the edges of their ops, in canonical order.

    Edges of a section's iterations are those of its second, shifted (see ``Dependencies.advance``).
    """

    def __init__(self, schedule: Quotient, engine: _Engine) -> None:
        self._sections = zip(schedule.graph.sections, schedule.members, strict=True)
        self._engine = engine
        self._dependencies = Dependencies()
        self.section: Section | None = None
        self.plans: list[_Plan] = []
        self.iteration = 0
        """Iterations of ``section`` fed or skipped."""
        self.first_handle = 0
        """Of the section."""
        self.handle = 0
        """Next to give."""
        self._skipped = 0
        self._open_next()

    @property
    def left(self) -> int:
        """Iterations of the section still to feed."""
        return 0 if self.section is None else self.section.count - self.iteration

    def skip(self, iterations: int) -> None:
        """Go on ``iterations`` later."""
        self.iteration += iterations
        self._skipped += iterations

    def next(self) -> Iterator[_Task]:
        """Tasks of the next iteration, each linked to its unfinished predecessors."""
        if self.left == 0:
            self._close()
            self._open_next()
        section = self.section
        if section is None:
            return
        base = section.first + self.iteration * section.stride
        fed = self.iteration - self._skipped
        self.iteration += 1
        start, alive = self.handle, self._engine.alive
        for plan in self.plans:
            task = _Task(plan, base, self.handle)
            if fed < 2:
                before = self._dependencies.add(Instance(plan.op, base), self.handle)
                if fed == 1:
                    first = self.first_handle
                    plan.edges = tuple([h - start for h in before if h >= first])
                    plan.roots = tuple([h for h in before if h < first])
            else:
                before = [start + offset for offset in plan.edges]
                before += plan.roots
            for handle in before:
                earlier = alive.get(handle)
                if earlier is not None:
                    earlier.next.append(task)
                    task.waiting += 1
            alive[self.handle] = task
            self.handle += 1
            yield task

    def _open_next(self) -> None:
        self.section, members = next(
            (each for each in self._sections if each[0].count and each[0].ops), (None, ())
        )
        self.iteration = self._skipped = 0
        self.first_handle = self.handle
        if self.section is not None:
            pairs = zip(self.section.ops, members, strict=True)
            self.plans = [self._engine.plan(op, each) for op, each in pairs]

    def _close(self) -> None:
        """Tell ``Dependencies`` of the iterations it was not shown."""
        section = self.section
        if section is None or self.iteration <= 2:
            return
        first = self.first_handle
        handles = (self.iteration - self._skipped - 2) * len(section.ops)
        steps = (self.iteration - 2) * section.stride
        self._dependencies.advance(steps, lambda handle: handle >= first, handles)


class _Record(NamedTuple):
    start_s: float
    handle: int
    plan: _Plan
    base: int
    ready_s: float
    end_s: float
    busy_s: float


class _Engine:
    """One run."""

    def __init__(
        self,
        schedule: Quotient,
        lowering: Lowering,
        costs: Costs,
        periodic: bool,
        *,
        watched: bool = False,
    ) -> None:
        graph = self._graph = schedule.graph
        self._lowering = lowering
        self._costs = costs
        self.backend: Backend = lowering.backend
        self._env = Environment()
        self._stretches: list[Stretch[_Task]] | None = [] if watched else None
        self._fluid: Fluid[_Task] = Fluid(
            self._env, lowering.network, self._device_done, self._stretches
        )
        ranks = range(graph.world_size)
        self._clock_s = [0.0] * graph.world_size
        """Per rank: when its host is free to issue."""
        self._felt_s = [-inf] * graph.world_size
        """Per rank: when its host last delayed an op."""
        self._sms = [0] * graph.world_size
        """Per rank: active transfers that use SMs."""
        self._full_s = [-inf] * graph.world_size
        """Per rank: until when blocks of a computation take every SM that gets free."""
        self._fills = False
        """Whether any computation does."""
        self._computing: list[dict[int, _Task]] = [{} for _ in ranks]
        """Per rank: computations whose speed depends on transfers."""
        self.alive: dict[int, _Task] = {}
        self._records: list[_Record] = []
        self._repeats: list[Repeat] = []
        self._frontier = 0
        """First handle of the latest iteration."""
        self._seen: dict[tuple[int | tuple[int, ...], ...], list[_State]] = {}
        self._host_s = [0.0] * graph.world_size
        """Per rank: host seconds of one iteration of the section."""
        self._watched: Section | None = None
        """The section whose states are compared."""
        self._periodic = periodic and not lowering.network.bucket_bytes
        self._wires: dict[tuple[str, str, int, Members], tuple[float, Bundle | None]] = {}
        """Latency and flows of transfers that were lowered."""
        self._feed = _Feed(schedule, self)

    def run(self) -> Trace:
        self._feed_next()
        self._env.run()
        assert not self.alive, f"{len(self.alive)} ops never ran"
        self._records.sort()
        spans = tuple(
            Span(
                op.name, step, rank, op.stream, op.kind, op.call, ready, start, end, busy, op.nbytes
            )
            for start, _, plan, base, ready, end, busy in self._records
            for op in (plan.op,)
            for step in (None if op.step is None else base + op.step,)
            for rank in op.ranks
        )
        makespan_s = max((record.end_s for record in self._records), default=0.0)
        makespan_s += sum(repeat.copies * repeat.period_s for repeat in self._repeats)
        meta = meta_of(
            self._graph,
            "simulated",
            backend=self.backend.name,
            placement=",".join(map(str, self._lowering.placement)),
            topology=self._lowering.network.topology.name,
        )
        return Trace(spans, makespan_s, tuple(self._repeats), meta)

    def flows(self) -> Iterator[Flows]:
        """In the order in which they ended or changed."""
        for task, begin_s, end_s, routes, rates in self._stretches or ():
            yield Flows(Instance(task.plan.op, task.base).id, begin_s, end_s, routes, rates)

    def plan(self, op: Op, members: Members) -> _Plan:
        """Cost and lowering of ``op``, and of those it stands for."""
        device_s = contended_s = head_s = issue_s = placed_s = 0.0
        bundle = None
        transfer = op.kind in TRANSFERS
        if transfer or (op.kind == "host" and op.nbytes):
            latency_s, bundle = self._wire(op, members)
            # tables hold raw NCCL times: what torch adds to a call comes on top of them too
            head_s = on_grid(self._costs.transfer_fixed_s(op) + latency_s)
            issue_s = on_grid(self._costs.transfer_host_s(op))
        elif op.work is not None:
            cost = self._costs.compute(op.work, self._lowering.placement[op.ranks[0]])
            device_s, contended_s = on_grid(cost.device_s), on_grid(cost.contended_s)
            issue_s = on_grid(cost.host_s)
            placed_s = on_grid(min(cost.placed_s, cost.device_s))
            self._fills = self._fills or placed_s > 0
        return _Plan(
            op=op,
            device_s=device_s,
            contended_s=contended_s,
            head_s=head_s,
            bundle=bundle,
            host=tuple((rank, issue_s) for rank in op.ranks),
            uses_sms=transfer and self.backend.uses_sms,
            placed_s=placed_s,
        )

    def _wire(self, op: Op, members: Members) -> tuple[float, Bundle | None]:
        """Latency of a call and the flows of all its members. Raises Asymmetric."""
        key = (op.kind, op.call, op.nbytes, members)
        known = self._wires.get(key)
        if known is None:
            calls = [self._lowering.lower(replace(op, ranks=ranks)) for ranks in members]
            if len({call.latency_s for call in calls}) > 1:
                raise Asymmetric(op.name)
            bundle = self._fluid.bundle([call.flows for call in calls])
            known = self._wires[key] = calls[0].latency_s, bundle
        return known

    # ---------------------------------------------------------------------------------- hosts

    def _feed_next(self) -> None:
        """Issue the next iteration; what can start, starts once all of it is issued."""
        self._frontier = self._feed.handle
        ready = []
        for task in self._feed.next():
            for rank, seconds in task.plan.host:
                self._issue(task, rank, seconds)
            if not task.waiting:
                ready.append(task)
        if self._feed.handle == self._frontier:
            self._frontier = 1 << 62  # nothing is left to feed
        for task in ready:
            self._ready(task)

    def _issue(self, task: _Task, rank: int, seconds: float) -> None:
        begin = self._clock_s[rank]
        end = self._clock_s[rank] = begin + seconds
        if begin > task.issue_begin_s:
            task.issue_begin_s = begin
        if end > task.issue_end_s:
            task.issue_end_s = end
        task.issue_ends_s.append((rank, end))

    def _host_felt(self, task: _Task) -> None:
        """Some host delays ``task``: not one that had issued it by the time it was ready."""
        for rank, end_s in task.issue_ends_s:
            if end_s > task.ready_s:
                self._felt_s[rank] = self._env.now

    # ---------------------------------------------------------------------------------- phases

    def _ready(self, task: _Task) -> None:
        now = self._env.now
        task.ready_s = now
        if task.issue_begin_s <= now:
            self._launch(task)
            return
        self._host_felt(task)
        task.phase, task.due_s = _ISSUING, task.issue_begin_s
        Alarm(self._env, task.issue_begin_s - now, self._issue_began, task)

    def _issue_began(self, alarm: Alarm) -> None:
        self._host_felt(alarm.subject)
        self._launch(alarm.subject)

    def _launch(self, task: _Task) -> None:
        """Start, but a transfer that needs SMs only after the computations of this instant."""
        if self._fills and task.plan.uses_sms:
            task.phase, task.due_s = _ISSUING, self._env.now
            Alarm(self._env, 0.0, self._place, task)
        else:
            self._start(task)

    def _place(self, alarm: Alarm) -> None:
        """Start a transfer when the blocks that were launched before it have got their SMs. It is ready
        then: what it waits for is no host."""
        task: _Task = alarm.subject
        now = self._env.now
        free_s = max(self._full_s[rank] for rank in task.plan.op.ranks)
        if free_s > now:
            task.ready_s = task.due_s = free_s
            Alarm(self._env, free_s - now, lambda _: self._start(task), task)
        else:
            self._start(task)

    def _start(self, task: _Task) -> None:
        plan = task.plan
        now = task.start_s = self._env.now
        if plan.op.kind not in TRANSFERS and plan.bundle is None:
            rank = plan.op.ranks[0]
            task.phase, task.mark_s, task.left = _COMPUTING, now, 1.0
            task.pace_s = plan.contended_s if self._sms[rank] else plan.device_s
            task.due_s = now + task.pace_s
            if plan.placed_s:
                self._full_s[rank] = now + plan.placed_s
            if plan.contended_s != plan.device_s:
                self._computing[rank][task.handle] = task
            Alarm(self._env, task.pace_s, self._computed, task)
        else:
            task.phase, task.due_s = _HEAD, now + plan.head_s
            if plan.uses_sms:
                for rank in plan.op.ranks:
                    self._sms[rank] += 1
                    if self._sms[rank] == 1 and self._computing[rank]:
                        self._change_speed(rank)
            Alarm(self._env, plan.head_s, self._head_done, task)
        if task.handle >= self._frontier:
            self._iteration_began()

    def _change_speed(self, rank: int) -> None:
        """Transfers that use SMs have come to, or have all left, this rank."""
        now, slow = self._env.now, self._sms[rank] > 0
        for task in self._computing[rank].values():
            if task.pace_s > 0:
                task.left -= (now - task.mark_s) / task.pace_s
            task.mark_s = now
            task.pace_s = task.plan.contended_s if slow else task.plan.device_s
            delay_s = on_grid(max(task.left, 0.0) * task.pace_s)
            task.due_s = now + delay_s
            task.token += 1
            Alarm(self._env, delay_s, self._computed, task)

    def _computed(self, alarm: Alarm) -> None:
        task: _Task = alarm.subject
        if alarm.token == task.token:
            self._computing[task.plan.op.ranks[0]].pop(task.handle, None)
            self._device_done(task)

    def _head_done(self, alarm: Alarm) -> None:
        task: _Task = alarm.subject
        bundle = task.plan.bundle
        if bundle is None:
            self._device_done(task)
        else:
            task.phase = _FLOWING
            task.drain = self._fluid.start(bundle, task)

    def _device_done(self, task: _Task) -> None:
        now = self._env.now
        task.busy_s = now - task.start_s
        if task.phase == _FLOWING:
            del task.drain  # which knows its task
        if task.plan.uses_sms:
            for rank in task.plan.op.ranks:
                self._sms[rank] -= 1
                if not self._sms[rank] and self._computing[rank]:
                    self._change_speed(rank)
        if task.issue_end_s > now:
            self._host_felt(task)
            task.phase, task.due_s = _TAIL, task.issue_end_s
            Alarm(self._env, task.issue_end_s - now, self._issue_ended, task)
        else:
            self._finish(task)

    def _issue_ended(self, alarm: Alarm) -> None:
        self._host_felt(alarm.subject)
        self._finish(alarm.subject)

    def _finish(self, task: _Task) -> None:
        plan, end_s = task.plan, self._env.now
        self._records.append(
            _Record(task.start_s, task.handle, plan, task.base, task.ready_s, end_s, task.busy_s)
        )
        del self.alive[task.handle]
        for follower in task.next:
            follower.waiting -= 1
            if not follower.waiting:
                self._ready(follower)

    # ---------------------------------------------------------------------------------- steady state

    def _iteration_began(self) -> None:
        """The first op of the latest iteration has started: feed another, look at the state."""
        section, first = self._feed.section, self._frontier
        self._feed_next()
        if not self._periodic or section is None or section is not self._feed.section:
            return
        if section is not self._watched:
            self._watched = section
            self._seen.clear()
            self._host_s = [0.0] * self._graph.world_size
            for plan in self._feed.plans:
                for rank, seconds in plan.host:
                    self._host_s[rank] += seconds
        if self._feed.left > 0:
            look = Event(self._env)
            look._ok, look._value = True, None
            look.callbacks = [lambda _: self._look(first)]
            self._env.schedule(look, _AFTER_ALL)

    def _look(self, first: int) -> None:
        """Skip whole periods if the state is that of an earlier iteration.

        ``first`` is the first handle of the iteration that has just begun. Runs after all other
        events of this instant.
        """
        now = self._env.now
        key: list[int | tuple[int, ...]] = []
        times_s: list[float] = []
        for handle, task in self.alive.items():
            key.append((handle - first) * _PHASES + task.phase)
            if task.phase == _FLOWING:
                bundle = task.drain.bundle
                key += [bundle.routes, tuple([piece.place for piece in bundle.later])]
                times_s += task.drain.left_s(now)
            elif task.phase != _WAITING:
                times_s.append(task.due_s - now)
        if self._fills:
            times_s += [max(full_s - now, 0.0) for full_s in self._full_s]
        leads_s = [clock - now for clock in self._clock_s]
        state = _State(self._feed.iteration, now, times_s, leads_s)
        earlier_states = self._seen.setdefault(tuple(key), [])
        for earlier in reversed(earlier_states):
            if self._same(earlier, state):
                self._skip(earlier, state)
                break
        earlier_states.append(state)

    def _same(self, earlier: _State, state: _State) -> bool:
        period_s, slack_s = _period_and_slack(earlier, state)
        if any(abs(a - b) > slack_s for a, b in zip(earlier.times_s, state.times_s, strict=True)):
            return False
        iterations = state.iteration - earlier.iteration
        return all(
            abs(a - b) <= slack_s or self._free(rank, earlier, period_s, iterations)
            for rank, (a, b) in enumerate(zip(earlier.leads_s, state.leads_s, strict=True))
        )

    def _free(self, rank: int, earlier: _State, period_s: float, iterations: int) -> bool:
        """Whether this rank's host, not felt in the last period, can never be felt again."""
        return (
            self._felt_s[rank] < earlier.at_s
            and earlier.leads_s[rank] <= period_s
            and iterations * self._host_s[rank] <= period_s
        )

    def _skip(self, earlier: _State, state: _State) -> None:
        period_s, slack_s = _period_and_slack(earlier, state)
        iterations = state.iteration - earlier.iteration
        count = self._feed.left // iterations
        section = self._feed.section
        if count == 0 or section is None:
            return
        steps = iterations * section.stride
        for task in self.alive.values():
            if task.handle >= self._feed.first_handle:
                task.base += count * steps
        for rank, (a, b) in enumerate(zip(earlier.leads_s, state.leads_s, strict=True)):
            if abs(a - b) > slack_s:
                self._clock_s[rank] += count * (iterations * self._host_s[rank] - period_s)
        self._feed.skip(count * iterations)
        self._repeats.append(Repeat(state.at_s, period_s, count, steps))
