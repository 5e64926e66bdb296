"""One rank of a run: the ops of the graph that are its own, in threads or CUDA streams, and one trace.

The kernels are real, or **timed**: each compute op then takes the time it is given by sleeping, while
every transfer moves as many bytes as the graph says over the real links.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from paradiff.dependencies import validate
from paradiff.executor.interpreter import Request, Result, _Run, check_executable
from paradiff.executor.measure import made_on
from paradiff.executor.network import Network
from paradiff.executor.packing import header_of, packed, unpacked
from paradiff.executor.payload import Piece
from paradiff.executor.session import Session
from paradiff.executor.streams import Step, Threads, on_cuda, program
from paradiff.executor.transports import Channel, Distributed, channels
from paradiff.graph import Instance, Op, ScheduleGraph
from paradiff.trace import TRANSFERS, Kernels, Span, Trace, meta_of

Doing = MutableMapping[str, str]
Perform = Callable[[int, Instance], None]


def run_rank(
    graph: ScheduleGraph,
    network: Network,
    request: Request,
    session: Session,
    doing: Doing | None = None,
    transport: Distributed | None = None,
) -> Result:
    """Run this rank's ops of ``graph``. The result is the same on all ranks: the latents of every
    replica, wherever it ended, and the trace of all ranks on rank 0's clock.

    ``doing`` is kept at the op that each stream has in hand. ``transport``: of an earlier run of the
    same graph, which knows what payloads look like (all ranks give one, or none). Raises Unexecutable
    and InvalidGraph before anything runs, RunFailed.
    """
    check_executable(graph, network, request)
    validate(graph)
    transport = transport or Distributed(session, graph)
    session.compare_clocks()
    run = _Run(graph, network, request, session.rank, transport)

    def walk(steps: list[Step]) -> list[Span]:
        if session.device.type == "cuda":
            dist.barrier()
            rank, device = session.rank, session.device
            return on_cuda(steps, run.perform, device, rank, run.tensors, doing=doing)
        return _threads(steps, run.perform, session, doing)

    result = run.run(walk)
    session.arrive("ran")  # a rank may still decode
    session.follow_clocks()
    return Result(
        _collected(session, result.latents),
        merged_trace(session, graph, result.trace.spans, "real"),
        _collected(session, result.decoded),
    )


def run_timed(
    graph: ScheduleGraph,
    seconds: Callable[[Instance], float],
    session: Session,
    doing: Doing | None = None,
) -> Trace:
    """Run ``graph`` with timed kernels: a compute op takes ``seconds`` of it. Raises RunFailed."""
    _sleep_exactly()
    timed = _Timed(session, channels(session, graph), seconds)
    return run_with(graph, timed.perform, session, doing)


def run_with(
    graph: ScheduleGraph, perform: Perform, session: Session, doing: Doing | None = None
) -> Trace:
    """Run this rank's ops of ``graph``, each by ``perform``. Raises RunFailed."""
    validate(graph)
    spans = _threads(program(graph, session.rank), perform, session, doing)
    session.arrive("ran")
    return merged_trace(session, graph, tuple(spans), "timed")


def _sleep_exactly() -> None:
    """Linux lets this thread, and those it starts, sleep 50 us longer than asked: take that back."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)


def _threads(
    steps: list[Step], perform: Perform, session: Session, doing: Doing | None
) -> list[Span]:
    lanes = Threads(session.rank, steps, perform, {} if doing is None else doing)
    dist.barrier()
    return lanes.run()


class _Timed:
    """Ops without their mathematics: sleeping, and bytes of the right number."""

    def __init__(
        self,
        session: Session,
        known: dict[tuple[str, tuple[int, ...]], Channel],
        seconds: Callable[[Instance], float],
    ) -> None:
        self._session, self._channels, self._seconds = session, known, seconds
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def perform(self, _: int, instance: Instance) -> None:
        op = instance.op
        if op.kind not in TRANSFERS:
            time.sleep(self._seconds(instance))
            return
        channel = replace(self._channels[op.stream, op.ranks], op=op)
        n = len(op.ranks)
        if op.kind == "p2p":
            if channel.index == 0:
                channel.send(self._bytes(op, op.nbytes))
            else:
                channel.receive(op.nbytes)
        elif op.kind == "permute":
            channel.rotate(self._bytes(op, op.nbytes), op.nbytes)
        elif op.call == "all_gather":
            channel.all_gather(self._bytes(op, op.nbytes), [op.nbytes] * n)
        elif op.call == "all_reduce":
            channel.all_reduce(self._bytes(op, -(-op.nbytes // 4) * 4).view(torch.float32))
        elif op.call == "broadcast":
            own = self._bytes(op, op.nbytes) if channel.index == 0 else None
            channel.broadcast(own, op.nbytes)
        else:
            assert op.call == "all_to_all", f"{op.name}: no strategy emits {op.call}"
            share = [(i + 1) * op.nbytes // n - i * op.nbytes // n for i in range(n)]
            mine = share[channel.index]
            channel.all_to_all([self._bytes(op, size) for size in share], [mine] * n)

    def _bytes(self, op: Op, size: int) -> torch.Tensor:
        """Zeros, made once for each stream: memory that is touched for the first time is no transfer."""
        key = op.stream, size
        if key not in self._made:
            self._made[key] = torch.zeros(size, dtype=torch.uint8, device=self._session.device)
        return self._made[key]


def merged_trace(
    session: Session, graph: ScheduleGraph, own: tuple[Span, ...], kernels: Kernels
) -> Trace:
    """The spans of all ranks on rank 0's clock, from zero on.

    A transfer has begun when the last of its ranks has come to it: until then a rank waits, which is
    the time between ``ready_s`` and ``start_s``.
    """
    rows, made = [[*span] for span in own], made_on(session.device)
    mine = {
        "offset_s": session.offset_s,
        "residual_s": session.residual_s,
        "device": made["device"],
        "spans": rows,
    }
    parts = [json.loads(text) for text in session.gather_text(json.dumps(mine))]
    spans = [_shifted(Span(*row), part["offset_s"]) for part in parts for row in part["spans"]]
    arrival: dict[str, float] = {}
    for span in spans:
        if span.kind in TRANSFERS:
            arrival[span.id] = max(arrival.get(span.id, span.start_s), span.start_s)
    spans = [_begun(span, arrival[span.id]) if span.id in arrival else span for span in spans]
    origin = min((span.ready_s for span in spans), default=0.0)
    order = {instance.id: n for n, instance in enumerate(graph.instances())}
    spans = [_shifted(span, -origin) for span in spans]
    spans.sort(key=lambda span: (span.start_s, order[span.id], span.rank))
    end = max((span.end_s for span in spans), default=0.0)
    residual = max(float(part["residual_s"]) for part in parts)
    made |= {
        "device": "; ".join(dict.fromkeys(part["device"] for part in parts)),
        "clock_residual_s": f"{residual:.2e}",
    }
    return Trace(tuple(spans), end, (), meta_of(graph, kernels, **made))


def _shifted(span: Span, seconds: float) -> Span:
    return span._replace(
        ready_s=span.ready_s + seconds, start_s=span.start_s + seconds, end_s=span.end_s + seconds
    )


def _begun(span: Span, arrival_s: float) -> Span:
    """A transfer whose last rank came at ``arrival_s``; a buffered send may have ended before."""
    start = min(max(span.start_s, arrival_s), span.end_s)
    return span._replace(start_s=start, busy_s=span.end_s - start)


def _collected(session: Session, own: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Tensors by replica, each of which one rank has, on all ranks."""
    payload = tuple(Piece((0, 0), value.cpu(), point=replica) for replica, value in own.items())
    headers = session.gather_text(header_of([payload]))
    buffers = session.gather(packed([payload]))
    found: dict[int, Tensor] = {}
    for header, buffer in zip(headers, buffers, strict=True):
        (pieces,) = unpacked(header, buffer)
        found |= {piece.point: piece.value for piece in pieces if piece.point is not None}
    return found
