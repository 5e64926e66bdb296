"""How a node can be cut: replicas of one width, pools for short and long requests, or GPUs dealt out
request by request.

Decides which cuts are worth a simulation and which hold their models in memory. How long requests wait
is decided in ``simulator.queueing``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, pairwise, product

from simulator.queueing import Rung, Station
from simulator.service import Service

ServiceTable = Sequence[Mapping[int, Service]]
"""Of each class: width -> service."""
MAX_POOLS = 3
"""Pools of a static cut: short, middle and long requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """``units`` of ``gpus`` GPUs on every node; ``widths``: class -> widths it may take, ascending."""

    units: int
    gpus: int
    widths: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def is_fixed(self) -> bool:
        """Whether every request takes the whole unit."""
        return all(widths == (self.gpus,) for _, widths in self.widths)

    def station(self, table: ServiceTable, factors: Sequence[float]) -> Station:
        """As the queue sees it; service times of class k scaled by ``factors[k]``."""
        return Station(
            units_per_node=self.units,
            gpus=self.gpus,
            rungs={
                kind: tuple(
                    Rung(w, tuple(s * factors[kind] for s in table[kind][w].batch_s))
                    for w in widths
                )
                for kind, widths in self.widths
            },
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """Pools that share out a node; every class is in one of them."""

    pools: tuple[Pool, ...]

    @property
    def is_static(self) -> bool:
        """Whether every request of a class takes the same width."""
        return all(pool.is_fixed for pool in self.pools)

    def text(self, labels: Sequence[str]) -> str:
        """``4x2``; ``4x1 sdxl + 1x4 flux1-dev``; ``8 dealt out: sdxl 1, flux1-dev 1-4``."""
        return " + ".join(self._pool_text(pool, labels) for pool in self.pools)

    def _pool_text(self, pool: Pool, labels: Sequence[str]) -> str:
        if not pool.is_fixed:
            taken = ", ".join(
                f"{labels[kind]} {widths[0]}" + (f"-{widths[-1]}" if len(widths) > 1 else "")
                for kind, widths in pool.widths
            )
            machines = f"{pool.units} x " if pool.units > 1 else ""
            return f"{machines}{pool.gpus} dealt out: {taken}"
        members = "" if len(self.pools) == 1 else " " + ", ".join(labels[k] for k, _ in pool.widths)
        return f"{pool.units}x{pool.gpus}{members}"


def static_cuts(table: ServiceTable, gpus: int, memory_bytes: float) -> Iterator[Cut]:
    """All cuts into one pool, and into pools for shorter and longer classes, that hold their models.

    Classes are taken in the order of their service times, and a pool serves neighbours in that order.
    Cuts with room for one more replica are left out: the one with it is better.
    """
    order = by_length(table)
    for groups in _neighbours(order):
        choices = [_common_widths(table, group) for group in groups]
        for widths in product(*choices):
            if not all(
                _holds(table, [(k, (w,)) for k in group], memory_bytes)
                for group, w in zip(groups, widths, strict=True)
            ):
                continue
            for units in _shares(widths, gpus):
                yield Cut(
                    tuple(
                        Pool(units=u, gpus=w, widths=tuple((k, (w,)) for k in sorted(group)))
                        for group, w, u in zip(groups, widths, units, strict=True)
                    )
                )


def dynamic_cuts(
    table: ServiceTable,
    gpus: int,
    machine: int,
    memory_bytes: float,
    limits_s: Sequence[float | None],
) -> Iterator[Cut]:
    """The GPUs of each machine of a node dealt out request by request.

    A class may take its narrowest width that alone is no longer than its limit, and wider ones up to a
    cap; longer classes have no lower a cap than shorter ones. Widths that gain nothing over a narrower
    one are left out.
    """
    order = by_length(table)
    machine = min(machine, gpus)
    useful = [
        _useful(services, machine, limit_s)
        for services, limit_s in zip(table, limits_s, strict=True)
    ]
    if not all(useful):
        return
    caps = sorted({w for widths in useful for w in widths})
    seen: set[Cut] = set()
    for chosen in combinations_with_replacement(caps, len(order)):
        limits = dict(zip(order, chosen, strict=True))
        widths = tuple(
            (k, tuple(w for w in useful[k] if w <= limits[k]) or useful[k][:1])
            for k in range(len(table))
        )
        cut = Cut((Pool(units=gpus // machine, gpus=machine, widths=widths),))
        if cut in seen or len({ws for _, ws in widths}) == 1 == len(widths[0][1]):
            continue  # one width for all: a static cut
        seen.add(cut)
        if _holds(table, widths, memory_bytes):
            yield cut


def by_length(table: ServiceTable) -> list[int]:
    """Classes by the time they take on their narrowest width, shortest first."""
    return sorted(range(len(table)), key=lambda k: (table[k][min(table[k])].batch_s[0], k))


def _neighbours(order: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """``order`` cut into one, two, ... MAX_POOLS runs."""
    for pieces in range(1, min(MAX_POOLS, len(order)) + 1):
        for cuts in combinations(range(1, len(order)), pieces - 1):
            ends = (0, *cuts, len(order))
            yield tuple(tuple(order[a:b]) for a, b in pairwise(ends))


def _common_widths(table: ServiceTable, group: Sequence[int]) -> list[int]:
    return sorted(set.intersection(*(set(table[k]) for k in group)))


def _shares(widths: Sequence[int], gpus: int) -> Iterator[tuple[int, ...]]:
    """Replicas of each pool, at least one each, with no room for another."""
    *others, last = widths
    for units in product(*(range(1, gpus // w + 1) for w in others)):
        room = gpus - sum(u * w for u, w in zip(units, others, strict=True))
        if room >= last and room % last < min(widths):
            yield (*units, room // last)


def _useful(
    services: Mapping[int, Service], machine: int, limit_s: float | None
) -> tuple[int, ...]:
    """Widths that are faster than every narrower one, without those over the limit if one is not."""
    best, useful = math.inf, []
    for width in sorted(w for w in services if w <= machine):
        if services[width].batch_s[0] < best:
            best = services[width].batch_s[0]
            useful.append(width)
    within = [w for w in useful if limit_s is None or services[w].batch_s[0] <= limit_s]
    return tuple(within or useful)


def _holds(
    table: ServiceTable, widths: Sequence[tuple[int, tuple[int, ...]]], memory_bytes: float
) -> bool:
    """Whether a GPU holds the weights of all these classes and what the largest adds while it runs.

    Classes that run one strategy of one model share its weights.
    """
    used = [table[k][w] for k, ws in widths for w in ws]
    resident: dict[tuple[str, str], float] = {}
    for s in used:
        key = (s.model, s.spec)
        resident[key] = max(resident.get(key, 0.0), s.resident_bytes)
    return sum(resident.values()) + max(s.transient_bytes for s in used) <= memory_bytes
