"""Transfers between processes: one op of the graph as calls of torch.distributed.

``Channel`` moves bytes, and is all that a run with timed kernels needs. ``Distributed`` moves payloads
over it: what they look like is said once for each op, through the store, and holds for its later
occurrences. Every call blocks the thread that makes it until this rank's part is done; receives are
posted before sends.

Two ranks have one connection on gloo, and what a rank says to the other goes over it in order. Its
``all_to_all`` sends before it posts the receive, and so does its ``all_gather`` between two: if one rank
comes a little later, its word that it is ready waits behind its own payload, and the two directions take
turns (measured: twice and 1.5 times as long). These two are therefore messages here, and so is its
``broadcast``, whose tree takes up to six times as long as a chain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from paradiff.executor.faults import RunFailed
from paradiff.executor.packing import header_of, packed, size_of, unpacked
from paradiff.executor.payload import Payload, Piece
from paradiff.executor.session import Group, Session, on_device
from paradiff.executor.transfers import shares
from paradiff.graph import BROADCAST_PIECE, Instance, Op, ScheduleGraph
from paradiff.trace import TRANSFERS

Reads = Sequence[tuple[int, Payload]]


class HeaderChanged(RunFailed):
    """An op whose payload is not what it was the first time."""


@dataclass
class Channel:
    """The groups of one op's stream, and its calls on flat (bytes,) uint8 buffers."""

    session: Session
    op: Op
    group: Group = None
    onward: Group = None
    backward: Group = None

    @classmethod
    def of(cls, session: Session, op: Op) -> Channel:
        """Make (or find) the groups; every rank of the session calls this for every op, in order.

        A message has a group for its direction; a ring one for each of its directed edges.
        """
        channel = cls(session, op)
        if op.kind == "permute":
            after = (*op.ranks[1:], op.ranks[0])
            for source, destination in zip(op.ranks, after, strict=True):
                name = f"{op.stream}.{source}-{destination}"
                edge = session.group(name, (source, destination), is_message=True)
                if session.rank == source:
                    channel.onward = edge
                if session.rank == destination:
                    channel.backward = edge
        else:
            channel.group = session.group(op.stream, op.ranks, is_message=op.kind == "p2p")
        return channel

    @property
    def index(self) -> int:
        """This rank's place among the op's ranks."""
        return self.op.ranks.index(self.session.rank)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.session.device)

    def all_gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Everybody's buffer, in the order of the op's ranks; shorter ones travel padded."""
        if self._posts_first and len(sizes) == 2:
            return self._exchanged([own, own], sizes)
        most = max(sizes)
        if len(own) < most:
            own = torch.cat((own, own.new_zeros(most - len(own))))
        found = {rank: self.empty(most) for rank in self.op.ranks}
        dist.all_gather([found[rank] for rank in sorted(found)], own, group=self.group)
        return [found[r][:size] for r, size in zip(self.op.ranks, sizes, strict=True)]

    def all_reduce(self, own: Tensor) -> Tensor:
        """Sum of ``own`` (any type) over the ranks, in place."""
        dist.all_reduce(own, group=self.group)
        return own

    def all_to_all(self, own: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """``own[i]`` goes to the i-th of the op's ranks; what each sent here comes back, in order."""
        if self._posts_first:
            return self._exchanged(own, sizes)
        order = sorted(range(len(self.op.ranks)), key=self.op.ranks.__getitem__)
        received = self.empty(sum(sizes))
        inward = [sizes[i] for i in order]
        dist.all_to_all_single(
            received,
            torch.cat([own[i] for i in order]),
            inward,
            [len(own[i]) for i in order],
            group=self.group,
        )
        parts = dict(zip(order, received.split(inward), strict=True))
        return [parts[i] for i in range(len(order))]

    @property
    def _posts_first(self) -> bool:
        return self.session.backend == "gloo"

    def _exchanged(self, own: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Pairwise exchange: in round i to the i-th rank after this one and from the i-th before, the
        next round when both have gone. A receive is posted in its round, not earlier: gloo holds a
        message back until then, so that two never share a rank's link."""
        ranks, n, me = self.op.ranks, len(self.op.ranks), self.index
        found = [own[i] if i == me else self.empty(size) for i, size in enumerate(sizes)]
        for i in range(1, n):
            to, source = (me + i) % n, (me - i) % n
            received = dist.irecv(found[source], ranks[source], group=self.group)
            sent = dist.isend(own[to], ranks[to], group=self.group)
            _wait(received, sent)
        return found

    def broadcast(self, own: Tensor | None, size: int) -> Tensor:
        """The buffer of the op's first rank."""
        buffer = self.empty(size) if own is None else own
        if self._posts_first:
            self._passed_on(buffer)
        else:
            dist.broadcast(buffer, self.op.ranks[0], group=self.group)
        return buffer

    def _passed_on(self, buffer: Tensor) -> None:
        """Along the chain of the op's ranks, in pieces: every link carries the buffer once. gloo's own
        tree sends all of it to several ranks at once, and on only when all of it has come."""
        ranks, me = self.op.ranks, self.index
        pieces = buffer.split(BROADCAST_PIECE)
        came = [dist.irecv(piece, ranks[me - 1], group=self.group) for piece in pieces if me]
        sent: list[dist.Work | None] = []
        for number, piece in enumerate(pieces):
            if me:
                _wait(came[number])
            if me + 1 < len(ranks):
                sent.append(dist.isend(piece, ranks[me + 1], group=self.group))
        _wait(*sent)

    def send(self, own: Tensor) -> None:
        dist.send(own, self.op.ranks[1], group=self.group)

    def receive(self, size: int) -> Tensor:
        buffer = self.empty(size)
        dist.recv(buffer, self.op.ranks[0], group=self.group)
        return buffer

    def rotate(self, own: Tensor, size: int) -> Tensor:
        """To the next rank of the ring, from the one before."""
        ranks = self.op.ranks
        buffer = self.empty(size)
        before = dist.irecv(buffer, ranks[self.index - 1], group=self.backward)
        after = dist.isend(own, ranks[(self.index + 1) % len(ranks)], group=self.onward)
        _wait(before, after)
        return buffer


def _wait(*works: dist.Work | None) -> None:
    for work in works:
        assert work is not None
        work.wait()


def channels(session: Session, graph: ScheduleGraph) -> dict[tuple[str, tuple[int, ...]], Channel]:
    """A channel for each (stream, ranks) that ``graph`` has transfers on, in canonical order."""
    found: dict[tuple[str, tuple[int, ...]], Channel] = {}
    for section in graph.sections:
        for op in section.ops:
            if op.kind in TRANSFERS and (op.stream, op.ranks) not in found:
                found[op.stream, op.ranks] = Channel.of(session, op)
    return found


@dataclass
class Distributed:
    """Carries out transfers on this rank: what it reads goes out, what it writes comes in."""

    session: Session
    graph: ScheduleGraph
    _headers: dict[str, dict[int, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._channels = channels(self.session, self.graph)
        self._round = self.session.next_round()

    def __call__(self, instance: Instance, reads: Reads, targets: Sequence[int]) -> list[Payload]:
        """As ``transfers.transfer``, where ``reads`` and ``targets`` are those of this rank."""
        op = instance.op
        channel = replace(self._channels[op.stream, op.ranks], op=op)
        if op.kind == "p2p":
            return self._message(channel, [payload for _, payload in reads], targets)
        own = tuple(chain.from_iterable(payload for _, payload in reads))
        if op.call == "all_to_all":
            return self._all_to_all(channel, own, targets)
        headers = self._known(op, [own])
        found = self._moved(channel, own, headers)
        return [found] * len(targets)

    def _moved(self, channel: Channel, own: Payload, headers: dict[int, str]) -> Payload:
        op, rank = channel.op, self.session.rank
        sizes = [size_of(headers[r]) for r in op.ranks]
        if op.kind == "permute":
            before = op.ranks[channel.index - 1]
            buffer = channel.rotate(self._out(own), size_of(headers[before]))
            return unpacked(headers[before], buffer)[0]
        if op.call == "all_gather":
            buffers = channel.all_gather(self._out(own), sizes)
            pieces = [unpacked(headers[r], b)[0] for r, b in zip(op.ranks, buffers, strict=True)]
            return tuple(chain.from_iterable(pieces))
        if op.call == "broadcast":
            root = op.ranks[0]
            buffer = channel.broadcast(self._out(own) if rank == root else None, sizes[0])
            return unpacked(headers[root], buffer)[0]
        assert op.call == "all_reduce", f"{op.name}: no strategy emits {op.call}"
        return self._reduced(channel, own, headers)

    def _reduced(self, channel: Channel, own: Payload, headers: dict[int, str]) -> Payload:
        """Sums of the pieces' tensors; their coordinates are as ``payload.reduced`` makes them."""
        values = [piece.value for piece in own]
        total = channel.all_reduce(torch.cat([value.reshape(-1) for value in values]))
        sums = total.split([value.numel() for value in values])
        first, last = (
            unpacked(headers[r], self._blank(headers[r]))[0]
            for r in (channel.op.ranks[0], channel.op.ranks[-1])
        )
        return tuple(
            replace(
                a,
                value=total.view(value.shape),
                span=(a.span[0], b.span[1]),
                weight=len(channel.op.ranks),
            )
            for a, b, total, value in zip(first, last, sums, values, strict=True)
        )

    def _all_to_all(
        self, channel: Channel, own: tuple[Piece, ...], targets: Sequence[int]
    ) -> list[Payload]:
        op = channel.op
        parts = shares(own, len(op.ranks))
        headers = self._known(op, parts)
        theirs = [_part(headers[r], channel.index) for r in op.ranks]
        found = channel.all_to_all([self._out(p) for p in parts], [size_of(h) for h in theirs])
        pieces = [unpacked(h, b)[0] for h, b in zip(theirs, found, strict=True)]
        return [tuple(chain.from_iterable(pieces))] * len(targets)

    def _message(
        self, channel: Channel, payloads: list[Payload], targets: Sequence[int]
    ) -> list[Payload]:
        """What was read in parts arrives in the same parts."""
        source = channel.op.ranks[0]
        headers = self._known(channel.op, payloads)
        if self.session.rank == source:
            channel.send(on_device(packed(payloads), self.session.device))
            return []
        found = unpacked(headers[source], channel.receive(size_of(headers[source])))
        return found if len(found) == len(targets) else found * len(targets)

    def _out(self, payload: Payload) -> Tensor:
        return on_device(packed([payload]), self.session.device)

    @staticmethod
    def _blank(header: str) -> Tensor:
        return torch.empty(size_of(header), dtype=torch.uint8)

    def _known(self, op: Op, payloads: list[Payload]) -> dict[int, str]:
        """Everybody's header: heard at the op's first occurrence, and held to afterwards.

        Raises HeaderChanged where this rank's is another than it was.
        """
        mine = header_of(payloads)
        key = f"{self._round}/{op.name}/{op.nbytes}"
        heard = self._headers.get(key)
        if heard is None:
            heard = self._headers[key] = self.session.agree(f"header/{key}", mine, op.ranks)
        if heard[self.session.rank] != mine:
            raise HeaderChanged(
                f"the payload of {op.name} is no longer what it was at its first time"
            )
        return heard


def _part(header: str, index: int) -> str:
    """The header of one payload of several."""
    return json.dumps([json.loads(header)[index]])
