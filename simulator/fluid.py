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

from simulator.network import Flow, Network, Usage
from simulator.symmetry import Asymmetric

QUANTUM_S = 2.0**-40
_PER_S = 2.0**40

Owner = TypeVar("Owner")


def on_grid(seconds: float) -> float:
    """The nearest multiple of 2**-40 s."""
    return round(seconds * _PER_S) * QUANTUM_S


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


class Piece(NamedTuple):
    """One flow of a bundle: its place in it, its route, its bytes, which of the bundle's alike calls it
    is of, and the places of the flows that drain before it starts."""

    place: int
    route: int
    nbytes: float
    part: int
    after: tuple[int, ...]

    def without(self, gone: set[int]) -> Piece:
        """Waiting for those alone that are not ``gone``."""
        return self._replace(after=tuple([each for each in self.after if each not in gone]))


@dataclass(frozen=True, slots=True)
class Bundle:
    """Flows that run together: their pieces, the routes of these, the resources they cross as bits, a
    small number for the tuple of routes; how many alike calls they are of; flows still to start."""

    pieces: tuple[Piece, ...]
    routes: tuple[int, ...]
    count: int
    mask: int
    number: int
    later: tuple[Piece, ...]


class Drain(Generic[Owner]):
    """A bundle under way: ``remaining`` bytes of each live flow as of ``mark_s``."""

    __slots__ = ("bundle", "mark_s", "owner", "rates", "remaining", "token")

    def __init__(self, bundle: Bundle, owner: Owner, now: float) -> None:
        self.bundle = bundle
        self.owner = owner
        self.remaining: Sequence[float] = [piece.nbytes for piece in bundle.pieces]
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
        self._buckets = _Buckets(network) if network.bucket_bytes else None

    def bundle(self, calls: Sequence[Sequence[Flow]]) -> Bundle | None:
        """The flows of alike calls prepared; those that cross nothing of finite bandwidth take no
        time. Raises Asymmetric where that holds for some of the calls only."""
        capacities = self._network.capacities
        pieces: list[Piece] = []
        for part, flows in enumerate(calls):
            places = list[tuple[int, ...]]()
            for flow in flows:
                route = self._network.route(flow.source, flow.destination)
                mask = sum(1 << r for r, _ in route.resources if capacities[r] < inf)
                self._masks[route.id] = mask
                before = tuple([place for other in flow.after for place in places[other]])
                places.append((len(pieces),) if mask else before)
                if mask:
                    pieces.append(Piece(len(pieces), route.id, flow.nbytes, part, before))
        first = tuple(piece for piece in pieces if not piece.after)
        rest = tuple(piece for piece in pieces if piece.after)
        return self._bundle(first, rest, len(calls)) if first else None

    def _bundle(self, pieces: tuple[Piece, ...], later: tuple[Piece, ...], count: int) -> Bundle:
        if count > 1 and len({piece.part for piece in pieces}) < count:
            raise Asymmetric
        mask = 0
        for piece in pieces:
            mask |= self._masks[piece.route]
        routes = tuple([piece.route for piece in pieces])
        number = self._numbers.setdefault(routes, len(self._numbers))
        return Bundle(pieces, routes, count, mask, number, later)

    def start(self, bundle: Bundle, owner: Owner) -> Drain[Owner]:
        """The flows of ``bundle`` start now."""
        drain = Drain(bundle, owner, self._env.now)
        if self._buckets is not None:
            drain.remaining = self._buckets.start(bundle.pieces, self._env.now)
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
        slack_s = 4 * max(QUANTUM_S, ulp(now))
        live, ended = [], []
        for piece, left, rate in zip(bundle.pieces, drain.remaining, drain.rates, strict=True):
            if left > rate * slack_s:
                live.append((piece, left))
            else:
                ended.append(piece)
        gone = {piece.place for piece in ended}
        waiting = [piece.without(gone) for piece in bundle.later]
        begun = tuple([piece for piece in waiting if not piece.after])
        if self._buckets is not None:
            self._buckets.end(ended, now)
            live += zip(begun, self._buckets.start(begun, now), strict=True)
        else:
            live += [(piece, piece.nbytes) for piece in begun]
        if not live:
            del self._active[drain]
            self._solve(bundle.mask)
            self._drained(drain.owner)
            return
        pieces, drain.remaining = zip(*live, strict=True)
        later = tuple([piece for piece in waiting if piece.after])
        drain.bundle, drain.rates = self._bundle(pieces, later, bundle.count), ()
        self._solve(bundle.mask | drain.bundle.mask)


class _Buckets:
    """What idle links may send at once: their buckets fill at their rates, up to the brim.

    A flow that starts takes its share of what is in every bucket on its way, the least of them. What
    runs against the main direction (acknowledgements) is too little to matter.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._users: dict[int, int] = {}
        self._idle_since_s: dict[int, float] = {}

    def start(self, pieces: Sequence[Piece], now: float) -> list[float]:
        """Bytes that each of ``pieces`` still has to send at the rate of its links."""
        ways = [self._way(piece) for piece in pieces]
        sharing: dict[int, float] = {}
        for way in ways:
            for resource, weight in way:
                sharing[resource] = sharing.get(resource, 0.0) + weight
        full = {resource: self._level(resource, now) / sharing[resource] for resource in sharing}
        for way in ways:
            for resource, _ in way:
                self._users[resource] = self._users.get(resource, 0) + 1
        free = [min((full[resource] for resource, _ in way), default=0.0) for way in ways]
        return [max(p.nbytes - f, 1.0) for p, f in zip(pieces, free, strict=True)]

    def end(self, pieces: Sequence[Piece], now: float) -> None:
        for piece in pieces:
            for resource, _ in self._way(piece):
                self._users[resource] -= 1
                self._idle_since_s[resource] = now

    def _level(self, resource: int, now: float) -> float:
        if self._users.get(resource):
            return 0.0
        idle_s = now - self._idle_since_s.get(resource, -inf)
        capacity = self._network.capacities[resource]
        return min(self._network.bucket_bytes, idle_s * capacity)

    def _way(self, piece: Piece) -> Usage:
        """The links of a piece in its direction."""
        usage = self._network.usage(piece.route)
        finite = (u for u in usage if self._network.capacities[u[0]] < inf)
        return tuple(use for use in finite if use[1] >= 1.0)


def _number(drain: Drain[Any]) -> int:
    return drain.bundle.number
