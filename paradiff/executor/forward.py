"""One running forward of a network: a coroutine that pauses where the op in hand ends.

The forward is diffusers' own. At every exchange point it asks here, and gets what the reads of the ops
have bound to that point; without any, the layer works on its own rows. Points must be reached in the
order of the profile's segments, and every op must end where the graph says that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor

from paradiff.executor.network import Conditioning, Network, for_branch
from paradiff.executor.payload import (
    Payload,
    Piece,
    all_keys,
    edges,
    mix_moments,
    moments,
    near_keys,
    neighbours,
    parse_spans,
    take_rows,
)
from paradiff.graph import Op
from paradiff.models.interception import Handler, Site


class ScheduleMismatch(RuntimeError):
    """The network does not do what the graph says; the message names the op and the point."""


@dataclass
class Task:
    """What the op in hand asks of the forward: where it begins and stops."""

    id: str
    lo: int
    hi: int
    tags: Mapping[str, str]


@dataclass(eq=False)
class Forward(Handler):
    """A forward of ``network`` on the rows that the first op's tags name.

    ``publishes`` are the points whose own data some op of this forward writes: computed nowhere else.
    """

    network: Network
    total_rows: int
    halo_rows: bool
    scale: Callable[[Tensor], Tensor]
    timestep: Tensor
    task: Task
    publishes: Collection[int]
    published: dict[int, Piece] = field(default_factory=dict)
    output: Payload = ()
    _bound: dict[int, list[Piece]] = field(default_factory=dict)
    _latent: list[Piece] = field(default_factory=list)
    _given: Conditioning = field(default_factory=dict)
    _at: int = 0

    def __post_init__(self) -> None:
        self.spans = parse_spans(self.task.tags["rows"])
        self.branch = self.task.tags["branch"]
        self._greenlet = greenlet(self._run)
        self._segments = self.network.profile.denoiser.segments

    # ---------------------------------------------------------------------------- for the interpreter

    def bind(self, kind: str, payload: Payload) -> None:
        """Take what an op reads: the latent, the conditioning, or others' data at points."""
        if kind == "latent":
            self._latent.extend(payload)
        elif kind == "text":
            self._given = for_branch(payload[0].value, self.branch)
        else:
            for piece in payload:
                assert piece.point is not None, kind
                self._bound.setdefault(piece.point, []).append(piece)

    def resume(self, task: Task) -> None:
        """Run to the end of ``task``. Raises ScheduleMismatch if the forward ends elsewhere."""
        if task.lo != self._at:
            raise ScheduleMismatch(f"{task.id} begins at {self._name(task.lo)}, not {self.here}")
        self.task = task
        self._greenlet.switch()
        if self._at != task.hi:
            raise ScheduleMismatch(f"{task.id} ends at {self._name(task.hi)}, not {self.here}")

    @property
    def finished(self) -> bool:
        return bool(self._greenlet.dead)

    @property
    def here(self) -> str:
        return self._name(self._at)

    def _name(self, at: int) -> str:
        return self._segments[at].name if at < len(self._segments) else "the end"

    # ---------------------------------------------------------------------------- the coroutine

    def _run(self) -> None:
        x = self._input(self.spans)
        out = self.network.call(x, self._given, self.timestep, self.spans)
        self._at = len(self._segments)
        pieces, at = [], 0
        for first, last in self.spans:
            rows = out[..., at : at + last - first, :]
            pieces.append(Piece((first, last), rows, branch=self.branch))
            at += last - first
        self.output = tuple(pieces)

    def _input(self, spans: Iterable[tuple[int, int]]) -> Tensor:
        spans = list(spans)
        rows = self.scale(take_rows(self._latent, spans))
        return self.network.latent_input(rows, self._given, spans)

    def _reach(self, at: int, own: Callable[[], Any]) -> tuple[Piece | None, list[Piece]]:
        """At a point: publish, pause if the op ends here. Returns own and others' data to be used."""
        if at > self.task.hi:
            raise ScheduleMismatch(
                f"{self.task.id} should end at {self._name(self.task.hi)}; reached {self._name(at)}"
            )
        piece = None
        if at in self.publishes:
            piece = self.published[at] = Piece(self.spans[0], own(), at)
        if at == self.task.hi:
            self._pause(at)
        others = self._bound.pop(at, [])
        if others and piece is None:
            piece = Piece(self.spans[0], own(), at)
        return piece, others

    def _pause(self, at: int) -> None:
        if at <= self._at:
            raise ScheduleMismatch(f"{self._name(at)} comes again after {self.here}")
        self._at = at
        getcurrent().parent.switch()

    # ---------------------------------------------------------------------------- points

    def span(self) -> tuple[int, int] | None:
        return self.spans[0][0], self.total_rows

    def attention(
        self, name: str, call: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        result = call()
        at = self.network.point_of.get(name)
        if at is not None and self.task.hi == at + 1:
            self._pause(at + 1)
        return result

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        at = self.network.point_of[site.name]
        own, others = self._reach(at, lambda: (key, value))
        if own is None or not others:
            return key, value
        if "portion" in self.task.tags:
            return near_keys(own, others, float(self.task.tags["portion"]))
        return all_keys(own, others)

    def halo(self, site: Site, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if site.is_input:
            return self._input_halo(site.rows)
        at = self.network.point_of[site.name]
        _, others = self._reach(at, lambda: edges(x, site.rows))
        return neighbours(self.spans[0], others)

    def _input_halo(self, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """The latent is whole on every rank, so the first convolution needs no exchange."""
        first, last = self.spans[0]
        if not self.halo_rows:
            return None, None
        lent = [(first - rows, first), (last, last + rows)]
        above, below = (
            self._input([s]) if s[0] >= 0 and s[1] <= self.total_rows else None for s in lent
        )
        return _frames_flat(above), _frames_flat(below)

    def moments(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor] | None:
        at = self.network.point_of[site.name]
        own, others = self._reach(at, lambda: moments(x, site.groups))
        if own is None or not others:
            return None
        return mix_moments(own, others, self.task.tags.get("moments") == "corrected")


def _frames_flat(x: Tensor | None) -> Tensor | None:
    """SVD's first convolution takes frames along the batch."""
    return x.flatten(0, 1) if x is not None and x.ndim == 5 else x


def task_of(op: Op, op_id: str) -> Task:
    """The task of a compute op of the denoiser."""
    assert op.work is not None
    return Task(op_id, op.work.ranges[0][0], op.work.ranges[-1][1], dict(op.tags))


class Router(Handler):
    """Hands every call to the forward that is running: all ranks share one module."""

    def __init__(self) -> None:
        self.active: Handler = Handler()

    def attention(self, *args: Any) -> Tensor:
        return self.active.attention(*args)

    def kv(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self.active.kv(*args)

    def halo(self, *args: Any) -> tuple[Tensor | None, Tensor | None]:
        return self.active.halo(*args)

    def moments(self, *args: Any) -> tuple[Tensor, Tensor] | None:
        return self.active.moments(*args)

    def span(self) -> tuple[int, int] | None:
        return self.active.span()
