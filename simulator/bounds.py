"""How long a schedule takes at least, without running it, and whether that is too long.

Decides a number that no placement and no sharing of links can undercut. The derivation is in
``docs/model.md``; in short, for the rank with most compute:

- The ops of its compute stream run one after another, so its iterations do not overlap, and each lasts
  at least as long as the longest path of dependencies from its first to its last compute op.
- Its host issues its ops one after another, and no op ends before it is issued.

A transfer counts with its fixed cost and its latency, plus the time in which its fullest resource
could carry its bytes; on the best of the placements. Computations count as if no transfer took SMs
from them, and on the fastest GPU that the box has.
*Never above the simulation: ``tests/test_bounds.py``.*
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

from paradiff.dependencies import Dependencies
from paradiff.graph import Instance, Op, Section
from paradiff.trace import TRANSFERS
from simulator.engine import Costs
from simulator.fluid import QUANTUM_S, on_grid
from simulator.placement import Placement, Wire
from simulator.symmetry import Members, Quotient

MAX_LOOKUPS = 256
"""Where a transfer has more placements (times alike transfers), its bytes are left out of the bound."""
ROUNDING = 1 - 1e-9
"""For sums of floats. The engine rounds times to its grid, up and down, and many equal ones all the same
way: computations and the host's part are rounded here as there, a transfer (its head and what drains) is
a quantum shorter."""


Merit = tuple[float, float, float]
"""Latency, peak memory and staleness: less is better."""


def better(one: Merit, other: Merit) -> bool:
    """Whether ``one`` is at least as good in everything and better in something."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


class Incumbents:
    """The best of what was simulated so far: what the next must beat to be worth simulating.

    Values are those of the objective; ``top``: how many of the best are wanted (None: all).
    """

    def __init__(self, top: int | None) -> None:
        self._top = None if top is None else max(top, 2)
        self._values: list[float] = []
        self._exact = inf
        self._merits: list[Merit] = []

    @property
    def first(self) -> float:
        """The least value."""
        return self._values[0]

    def wanted(self, value: float, *, exact: bool) -> bool:
        """Whether one of this value is one of the best, or the best exact one, as far as is known."""
        if self._top is None or len(self._values) < self._top:
            return True
        return value <= self._values[self._top - 1] or (exact and value <= self._exact)

    def add(self, value: float, merit: Merit, *, exact: bool) -> None:
        """One that was simulated."""
        insort(self._values, value)
        self._merits.append(merit)
        if exact:
            self._exact = min(self._exact, value)

    def rule_out(self, value: float, merit: Merit, *, exact: bool) -> bool:
        """Whether one with at least this value and merit is none of the best, nor the best exact one,
        nor on the front."""
        if self.wanted(value, exact=exact):
            return False
        return any(better(other, merit) for other in self._merits)


class _Priced(NamedTuple):
    """One op of a section: the least it takes, and its predecessors in the same iteration."""

    op: Op
    seconds: float
    host_s: float
    before: tuple[int, ...]


def least_latency_s(
    schedule: Quotient,
    costs: Costs,
    wire: Wire,
    choices: Sequence[Placement],
    devices: Sequence[int],
) -> float:
    """A lower bound of the makespan on every placement of ``choices``.

    ``devices``: one of each GPU model that an op might run on. Example: ten steps of an op of 2 s and
    an exchange of 1 s that the next needs, then 3 s of decoding: 33 s.
    """
    durations = _Durations(costs, wire, choices, devices)
    sections = list(zip(schedule.graph.sections, _sections(schedule, durations), strict=True))
    compute_s = dict.fromkeys(schedule.ranks, 0.0)
    for section, ops in sections:
        for each in ops:
            if each.op.kind == "compute":
                compute_s[each.op.ranks[0]] += section.count * each.seconds
    rank = max(compute_s, key=lambda r: (compute_s[r], -r))
    stream = next(
        (e.op.stream for _, ops in sections for e in ops if e.op.work and e.op.ranks == (rank,)), ""
    )
    issued_s = bound_s = 0.0
    for section, ops in sections:
        chain = [i for i, e in enumerate(ops) if e.op.stream == stream and rank in e.op.ranks]
        host_s = [e.host_s if rank in e.op.ranks else 0.0 for e in ops]
        if chain:
            so_far = issued_s + (section.count - 1) * sum(host_s) + sum(host_s[: chain[-1] + 1])
            bound_s = max(bound_s + section.count * _longest_s(ops, chain), so_far)
        issued_s += section.count * sum(host_s)
    return bound_s * ROUNDING


def _longest_s(ops: Sequence[_Priced], chain: Sequence[int]) -> float:
    """Length of the longest path from the begin of the first op of ``chain`` to the end of the last."""
    first, last = chain[0], chain[-1]
    ends_s: dict[int, float] = {first: ops[first].seconds}
    for i in range(first + 1, last + 1):
        reached = [ends_s[j] for j in ops[i].before if j in ends_s]
        if reached:
            ends_s[i] = max(reached) + ops[i].seconds
    return ends_s[last]


class _Durations:
    """Least seconds of ops, remembered by what they depend on."""

    def __init__(
        self,
        costs: Costs,
        wire: Wire,
        choices: Sequence[Placement],
        devices: Sequence[int],
    ) -> None:
        self._costs, self._wire, self._choices, self._devices = costs, wire, choices, devices
        self._transfers: dict[tuple[str, str, int, Members], float] = {}

    def of(self, op: Op, members: Members) -> tuple[float, float]:
        """(device seconds, host seconds of each participant)."""
        if op.work is not None:
            prices = [self._costs.compute(op.work, device) for device in self._devices]
            least = min(min(price.device_s, price.contended_s) for price in prices)
            return on_grid(least), on_grid(min(price.host_s for price in prices))
        if op.kind not in TRANSFERS and not op.nbytes:
            return 0.0, 0.0
        key = (op.kind, op.call, op.nbytes, members)
        if key not in self._transfers:
            self._transfers[key] = self._least_wire_s(op, members)
        fixed_s = self._costs.transfer_fixed_s(op)
        least = max(fixed_s + self._transfers[key] - QUANTUM_S, 0.0)
        return least, on_grid(self._costs.transfer_host_s(op))

    def _least_wire_s(self, op: Op, members: Members) -> float:
        if len(self._choices) * len(members) > MAX_LOOKUPS:
            return 0.0
        calls = [replace(op, ranks=ranks, reads=(), writes=()) for ranks in members]
        return min(self._wire.price(call, p).least_s for p in self._choices for call in calls)


def _sections(schedule: Quotient, durations: _Durations) -> Iterator[list[_Priced]]:
    """Each section's ops; edges inside an iteration are those of the first."""
    dependencies, handle = Dependencies(), 0
    for section, members in zip(schedule.graph.sections, schedule.members, strict=True):
        start, ops = handle, []
        for op, each in zip(section.ops, members, strict=True):
            before = dependencies.add(Instance(op, section.first), handle)
            inside = tuple([h - start for h in before if h >= start])
            ops.append(_Priced(op, *durations.of(op, each), inside))
            handle += 1
        handle = _finish(dependencies, section, start, handle)
        yield ops


def _finish(dependencies: Dependencies, section: Section, start: int, handle: int) -> int:
    """Tell ``dependencies`` of the section's other iterations; the next handle."""
    if section.count > 1:
        for op in section.ops:
            dependencies.add(Instance(op, section.first + section.stride), handle)
            handle += 1
    if section.count > 2:
        steps = (section.count - 2) * section.stride
        dependencies.advance(steps, lambda known: known >= start)
    return handle
