"""Fluid transfers on the event loop: bundles of flows that start, share links, and drain.

Decides when a bundle has no bytes left, by asking ``network`` for new rates whenever a bundle that
shares a link, directly or through others, starts or changes. Also home of the time grid: all instants
are multiples of 2**-40 s (0.9 ps), which floats hold exactly up to 8192 s, so that equal histories
have equal times whenever they happen, and simultaneous events are simultaneous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, ulp
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from simpy import Environment
from simpy.events import NORMAL, Event

from simulator.network import Flow, Network
from simulator.symmetry import Asymmetric

_QUANTUM_S = 2.0**-40
_PER_S = 2.0**40

Owner = TypeVar("Owner")


def on_grid(seconds: float) -> float:
    """The nearest multiple of 2**-40 s."""
    return round(seconds * _PER_S) * _QUANTUM_S


class Timed(Protocol):
    """Something whose pending alarms become void when ``token`` changes."""

    token: int


class Alarm(Event):
    """Calls ``action(alarm)`` after ``delay_s``; void if ``subject.token`` is not ``token`` by then."""

    def __init__(
        self, env: Environment, delay_s: float, action: Callable[[Any], None], subject: Timed
    ) -> None:
        self.env = env
        self.callbacks = [action]
        self._value = None
        self._ok = True
        self.subject: Any = subject
        self.token = subject.token
        env.schedule(self, NORMAL, delay_s)


@dataclass(frozen=True, slots=True)
class Bundle:
    """Flows that start together: their routes, their bytes, the resources they cross as bits, and a
    small number for the tuple of routes. ``parts``: which of ``count`` alike calls each flow is of."""

    routes: tuple[int, ...]
    sizes: tuple[float, ...]
    parts: tuple[int, ...]
    count: int
    mask: int
    number: int


class Drain(Generic[Owner]):
    """A bundle under way: ``remaining`` bytes of each live flow as of ``mark_s``."""

    __slots__ = ("bundle", "mark_s", "owner", "rates", "remaining", "token")

    def __init__(self, bundle: Bundle, owner: Owner, now: float) -> None:
        self.bundle = bundle
        self.owner = owner
        self.remaining: Sequence[float] = bundle.sizes
        self.rates: tuple[float, ...] = ()
        self.mark_s = now
        self.token = 0

    def left_s(self, now: float) -> list[float]:
        """Seconds that each live flow still takes at its present rate."""
        elapsed = now - self.mark_s
        flows = zip(self.remaining, self.rates, strict=True)
        return [left / rate - elapsed for left, rate in flows]

    def settle(self, now: float) -> None:
        """Account for the time since ``mark_s``."""
        elapsed = now - self.mark_s
        flows = zip(self.remaining, self.rates, strict=True)
        self.remaining = [left - rate * elapsed for left, rate in flows]
        self.mark_s = now


class Stretch(NamedTuple, Generic[Owner]):
    """From ``begin_s`` to ``end_s`` the flows of one bundle, by route, ran at these rates."""

    owner: Owner
    begin_s: float
    end_s: float
    routes: tuple[int, ...]
    rates: tuple[float, ...]


class Fluid(Generic[Owner]):
    """All bundles under way on a network. Calls ``drained(owner)`` when one has no bytes left, and
    adds every stretch of constant rates to ``log``."""

    def __init__(
        self,
        env: Environment,
        network: Network,
        drained: Callable[[Owner], None],
        log: list[Stretch[Owner]] | None = None,
    ) -> None:
        self._env = env
        self._network = network
        self._drained = drained
        self._log = log
        self._active: dict[Drain[Owner], None] = {}
        self._numbers: dict[tuple[int, ...], int] = {}
        self._masks: dict[int, int] = {}
        self._rates: dict[tuple[int, ...], list[tuple[float, ...]]] = {}

    def bundle(self, calls: Sequence[Sequence[Flow]]) -> Bundle | None:
        """The flows of alike calls prepared; those that cross nothing of finite bandwidth take no
        time. Raises Asymmetric where that holds for some of the calls only."""
        capacities = self._network.capacities
        routes, sizes, parts = [], [], []
        for part, flows in enumerate(calls):
            for flow in flows:
                route = self._network.route(flow.source, flow.destination)
                mask = sum(1 << r for r, _ in route.resources if capacities[r] < inf)
                self._masks[route.id] = mask
                if mask:
                    routes.append(route.id)
                    sizes.append(flow.nbytes)
                    parts.append(part)
        return self._bundle(routes, sizes, parts, len(calls)) if routes else None

    def _bundle(
        self, routes: Sequence[int], sizes: Sequence[float], parts: Sequence[int], count: int
    ) -> Bundle:
        if count > 1 and len(set(parts)) < count:
            raise Asymmetric
        mask = 0
        for route in routes:
            mask |= self._masks[route]
        number = self._numbers.setdefault(tuple(routes), len(self._numbers))
        return Bundle(tuple(routes), tuple(sizes), tuple(parts), count, mask, number)

    def start(self, bundle: Bundle, owner: Owner) -> Drain[Owner]:
        """The flows of ``bundle`` start now."""
        drain = Drain(bundle, owner, self._env.now)
        self._active[drain] = None
        self._solve(bundle.mask)
        return drain

    def _solve(self, mask: int) -> None:
        """New rates for whatever shares a resource, directly or not, with ``mask``."""
        members: list[Drain[Owner]] = []
        rest = list(self._active)
        grown = True
        while grown and rest:
            grown = False
            apart = []
            for drain in rest:
                if drain.bundle.mask & mask:
                    mask |= drain.bundle.mask
                    members.append(drain)
                    grown = True
                else:
                    apart.append(drain)
            rest = apart
        if not members:
            return
        if len(members) > 1:
            members.sort(key=_number)
        key = tuple([drain.bundle.number for drain in members])
        rates = self._rates.get(key)
        if rates is None:
            rates = self._rates[key] = self._share(members)
        for drain, new in zip(members, rates, strict=True):
            if drain.rates != new:
                self._retime(drain, new)

    def _share(self, members: list[Drain[Owner]]) -> list[tuple[float, ...]]:
        flat = self._network.rates(tuple([r for drain in members for r in drain.bundle.routes]))
        shares, at = [], 0
        for drain in members:
            end = at + len(drain.bundle.routes)
            shares.append(flat[at:end])
            at = end
        return shares

    def _retime(self, drain: Drain[Owner], rates: tuple[float, ...]) -> None:
        now = self._env.now
        if drain.mark_s != now:
            self._settle(drain, now)
        drain.rates = rates
        drain.token += 1
        delay_s = min([left / rate for left, rate in zip(drain.remaining, rates, strict=True)])
        Alarm(self._env, on_grid(delay_s) if delay_s > 0 else 0.0, self._some_drained, drain)

    def _settle(self, drain: Drain[Owner], now: float) -> None:
        if self._log is not None and now > drain.mark_s:
            routes = drain.bundle.routes
            self._log.append(Stretch(drain.owner, drain.mark_s, now, routes, drain.rates))
        drain.settle(now)

    def _some_drained(self, alarm: Alarm) -> None:
        drain: Drain[Owner] = alarm.subject
        if alarm.token != drain.token:
            return
        now = self._env.now
        self._settle(drain, now)
        bundle = drain.bundle
        slack_s = 4 * max(_QUANTUM_S, ulp(now))
        live = [
            (route, left, part)
            for route, left, rate, part in zip(
                bundle.routes, drain.remaining, drain.rates, bundle.parts, strict=True
            )
            if left > rate * slack_s
        ]
        if not live:
            del self._active[drain]
            self._solve(bundle.mask)
            self._drained(drain.owner)
            return
        routes, drain.remaining, parts = zip(*live, strict=True)
        drain.bundle, drain.rates = self._bundle(routes, (), parts, bundle.count), ()
        self._solve(bundle.mask)


def _number(drain: Drain[Any]) -> int:
    return drain.bundle.number
