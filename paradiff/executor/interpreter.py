"""Walks a schedule graph in canonical order and runs it on real modules, all ranks in one process.

It decides nothing: what runs, where, with whom and on which version comes from the graph. It keeps the
table of values, frees each at its last read, and records a span for every op. Text encoders and the VAE
are outside: the conditioning is given, and the latents that the first stage after the loop would read
are the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from paradiff.executor.forward import Forward, Router, Task, task_of
from paradiff.executor.network import CLASSES, Conditioning, Network
from paradiff.executor.payload import (
    Payload,
    Piece,
    branches_of,
    parse_spans,
    take_rows,
)
from paradiff.executor.schedulers import Schedule
from paradiff.executor.transfers import transfer
from paradiff.graph import Instance, Op, Ref, ScheduleGraph
from paradiff.models.interception import intercept
from paradiff.strategies import parse_spec
from paradiff.trace import Span, Trace

EXECUTABLE = (
    "serial",
    "patch",
    "distrifusion",
    "pcpp",
    "pipefusion",
    "asyncdiff",
    "parastep",
    "batchstep",
)
"""Strategies whose every op has a meaning here."""
POINT_KINDS = ("kv", "halo", "moments", "slots")


class Unexecutable(ValueError):
    """A graph that cannot be executed here; the message says which can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is generated. ``conditioning`` has one entry a data-parallel replica; a replica's initial
    noise is drawn from ``seed`` plus its number, so that every rank of it draws the same."""

    conditioning: Sequence[Conditioning]
    scheduler: Any
    seed: int = 0
    guidance_scale: float = 5.0
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, slots=True)
class Result:
    """Final latents by replica, and when every op ran."""

    latents: Mapping[int, Tensor]
    trace: Trace


Key = tuple[str, int | None, int, int]
"""A version of a buffer or of a part: buffer, part, absolute step, number within the step."""


def run_graph(graph: ScheduleGraph, network: Network, request: Request) -> Result:
    """Run ``graph`` on ``network``. Raises Unexecutable before anything runs, InvalidGraph for a graph
    that breaks the rules, ScheduleMismatch where network and graph part."""
    check_executable(graph, network, request)
    graph.validate()
    return _Run(graph, network, request).run()


def check_executable(graph: ScheduleGraph, network: Network, request: Request) -> None:
    """Raise Unexecutable unless this executor has a meaning for every op of ``graph``."""
    meta = dict(graph.meta)
    spec = parse_spec(meta["spec"])
    if spec.name not in EXECUTABLE:
        raise Unexecutable(
            f"{spec.text!r} cannot be executed yet; executable: {', '.join(EXECUTABLE)}, with cfg,"
            " data, ulysses and ring as each allows"
        )
    if network.class_name not in CLASSES:
        raise Unexecutable(f"{network.class_name}: executable are {', '.join(CLASSES)}")
    if meta["model"] != network.profile.name:
        raise Unexecutable(f"graph of {meta['model']}, network of {network.profile.name}")
    if len(request.conditioning) != spec.degree("data"):
        raise Unexecutable(
            f"{spec.degree('data')} replicas need as many conditionings, not"
            f" {len(request.conditioning)}"
        )


@dataclass
class _Plan:
    """A forward to come: its segments, points that it publishes, modules whose output it keeps."""

    ranges: list[tuple[int, int]]
    publishes: set[int] = field(default_factory=set)
    captures: set[str] = field(default_factory=set)
    last: tuple[tuple[int, int], ...] = ()


@dataclass
class _Run:
    """One execution: the table of values, the running forwards, the clock."""

    graph: ScheduleGraph
    network: Network
    request: Request
    values: dict[Key, Payload] = field(default_factory=dict)
    forwards: dict[int, Forward] = field(default_factory=dict)
    guided: dict[int, Tensor] = field(default_factory=dict)
    replica: dict[int, int] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        meta = dict(self.graph.meta)
        size = [int(meta[name]) for name in ("height", "width", "frames", "batch")]
        self.shape = self.network.profile.latent_shape(*size)
        self.router = Router()
        self.buffers = {b.id: b for b in self.graph.buffers}
        self.schedule = Schedule(
            self.request.scheduler,
            int(meta["steps"]),
            self.network.scheduled_tokens(self.shape),
            self.request.guidance_scale,
        )
        self.last_read = {
            _key(ref, i.base): n for n, i in enumerate(self.graph.instances()) for ref in i.op.reads
        }
        self.blank = torch.zeros_like(self.initial_latent(0))
        self.plans = self._forwards_ahead()
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.units = list(self.network.unit_ranges) if self._is_partial() else []
        self.handlers: dict[str, Callable[[int, Instance], None]] = {
            "text": self._text,
            "noise": self._noise,
            "forward": self._forward,
            "guidance": self._guidance,
            "scheduler": self._scheduler,
        }

    def run(self) -> Result:
        """Everything, under one interception and one ``no_grad``: both must not leak between
        coroutines."""
        words = next(i.op.work.shape.t for i in self.graph.instances() if i.op.call == "forward")
        kv = self.network.kv({**self.shape, "t": words})
        model, units = self.network.model, self.units
        with torch.no_grad(), intercept(model, self.router, kv=kv, units=units):
            start = perf_counter()
            for number, instance in enumerate(self.graph.instances()):
                self._execute(number, instance, start)
        end = max((span.end_s for span in self.spans), default=0.0)
        return Result(self.latents, Trace(tuple(self.spans), end, (), self.graph.meta))

    def _execute(self, number: int, instance: Instance, start: float) -> None:
        op = instance.op
        begin = perf_counter() - start
        if op.kind in ("compute", "host"):
            self.handlers.get(op.call, self._outside)(number, instance)
        else:
            self._transfer(instance)
        for ref in op.reads:
            key = _key(ref, instance.base)
            if self.last_read[key] == number:
                self.values.pop(key, None)
        end = perf_counter() - start
        step = None if op.step is None else op.step + instance.base
        for rank in op.ranks:
            self.spans.append(
                Span(
                    op.name,
                    step,
                    rank,
                    op.stream,
                    op.kind,
                    op.call,
                    begin,
                    begin,
                    end,
                    end - begin,
                    op.nbytes,
                )
            )

    # ---------------------------------------------------------------------------- values

    def _read(self, instance: Instance, *kinds: str) -> list[Payload]:
        """Payloads of the op's reads, of buffers of ``kinds`` if any are given."""
        return [
            self.values[_key(ref, instance.base)]
            for ref in instance.op.reads
            if not kinds or self.buffers[ref.buffer].kind in kinds
        ]

    def _write(self, instance: Instance, ref: Ref, payload: Payload) -> None:
        key = _key(ref, instance.base)
        if key in self.last_read:
            self.values[key] = payload

    def _transfer(self, instance: Instance) -> None:
        op = instance.op
        reads = [
            (self.buffers[ref.buffer].rank, self.values[_key(ref, instance.base)])
            for ref in op.reads
        ]
        targets = [self.buffers[ref.buffer].rank for ref in op.writes]
        for ref, payload in zip(op.writes, transfer(op, reads, targets), strict=True):
            self._write(instance, ref, payload)

    # ---------------------------------------------------------------------------- ops

    def _text(self, _: int, instance: Instance) -> None:
        replica = int(dict(instance.op.tags)["replica"])
        piece = Piece((0, self.shape["r"]), self.request.conditioning[replica])
        for ref in instance.op.writes:
            self._write(instance, ref, (piece,))

    def _noise(self, _: int, instance: Instance) -> None:
        tags = dict(instance.op.tags)
        replica = int(tags["replica"])
        self.replica[instance.op.ranks[0]] = replica
        x = self.initial_latent(replica)
        for ref, span in zip(instance.op.writes, parse_spans(tags["rows"]), strict=True):
            self._write(instance, ref, (Piece(span, x[..., span[0] : span[1], :]),))

    def initial_latent(self, replica: int) -> Tensor:
        """The same on every rank of a replica, whatever the device."""
        generator = torch.Generator().manual_seed(self.request.seed + replica)
        sizes = self.network.latent_sizes(self.shape, self.shape["b"])
        noise = torch.randn(sizes, generator=generator, dtype=torch.float64)
        device = next(self.network.model.parameters()).device
        return (noise * self.schedule.noise_scale).to(device, self.request.dtype)

    def _batch(self, number: int, instance: Instance, ahead: str) -> None:
        """A call on several latents, each at the timestep of its own step: one after another here."""
        op = instance.op
        latents = [ref for ref in op.reads if self.buffers[ref.buffer].kind == "latent"]
        others = tuple(ref for ref in op.reads if ref not in latents)
        tags = tuple(tag for tag in op.tags if tag[0] != "timesteps")
        assert op.step is not None
        for later, x, write in zip(ahead.split("+"), latents, op.writes, strict=True):
            alone = replace(
                op, step=op.step + int(later), reads=(x, *others), writes=(write,), tags=tags
            )
            self._forward(number, Instance(alone, instance.base))

    def _forward(self, number: int, instance: Instance) -> None:
        op, rank = instance.op, instance.op.ranks[0]
        ahead = dict(op.tags).get("timesteps")
        if ahead is not None:
            self._batch(number, instance, ahead)
            return
        task = task_of(op, instance.id)
        forward = self.forwards.get(rank)
        if forward is None:
            forward = self.forwards[rank] = self._begin(number, instance, task)
        for ref in op.reads:
            forward.bind(self.buffers[ref.buffer], self.values[_key(ref, instance.base)])
        self.router.active = forward
        forward.resume(task)
        streams = iter(forward.streams)
        for ref in op.writes:
            self._write(instance, ref, self._written(op, ref, forward, streams))
        for at in chain.from_iterable(self._points(op, ref) for ref in op.writes):
            forward.published.pop(at, None)
        if forward.finished:
            forward.close()
            del self.forwards[rank]

    def _written(self, op: Op, ref: Ref, forward: Forward, streams: Iterator[Payload]) -> Payload:
        """What a forward gives for one of its writes."""
        buffer = self.buffers[ref.buffer]
        if buffer.module:
            return forward.captured[buffer.module]
        if buffer.kind == "hidden":
            return next(streams)
        if buffer.kind not in POINT_KINDS:
            return forward.output
        pieces = chain.from_iterable(forward.published[p] for p in self._points(op, ref))
        if buffer.kind == "kv" and ref.part is not None and len(forward.rows) > 1:
            return tuple(p for p in pieces if p.span == forward.rows[ref.part])
        return tuple(pieces)

    def _begin(self, number: int, instance: Instance, task: Task) -> Forward:
        op = instance.op
        assert op.work is not None
        assert op.step is not None
        step = op.step + instance.base
        ahead = int(task.tags.get("timestep", "0"))
        return Forward(
            network=self.network,
            total_rows=self.shape["r"],
            halo_rows=op.work.shape.h > 0,
            scale=lambda x: self.schedule.scaled(x, step),
            timestep=self.schedule.timestep(step + ahead),
            task=task,
            publishes=self.plans[number].publishes,
            ranges=self.plans[number].ranges,
            captures=self.plans[number].captures,
            kept=self.kept.setdefault(op.ranks[0], {}),
            blank=self.blank,
            frames=self.network.frames_together(self.shape),
        )

    def _points(self, op: Op, ref: Ref) -> tuple[int, ...]:
        """Exchange points whose tensors a write of a forward takes; none for the network output."""
        buffer = self.buffers[ref.buffer]
        if buffer.kind not in POINT_KINDS:
            return ()
        assert op.work is not None
        packed = buffer.points or (op.work.ranges[-1][1],)
        return packed if ref.part is None or buffer.kind == "kv" else (packed[ref.part],)

    def _forwards_ahead(self) -> dict[int, _Plan]:
        """First op of each forward -> what all of its ops together compute and write.

        An op that begins where the last one of its rank has ended goes on with the same forward.
        """
        kv = dict(self.network.profile.denoiser.points("kv"))
        found: dict[int, _Plan] = {}
        running: dict[int, _Plan] = {}
        for number, (op, _) in enumerate(self.graph.instances()):
            if op.call != "forward" or op.work is None:
                continue
            plan, here = running.get(op.ranks[0]), op.work.ranges
            if plan is not None and here == plan.last:
                pass  # another block of a ring
            elif plan is None or plan.ranges[-1][1] != here[0][0]:
                plan = found[number] = running[op.ranks[0]] = _Plan(list(op.work.ranges))
            else:
                plan.ranges[-1] = plan.ranges[-1][0], here[0][1]
            plan.last = here if here[0][0] in kv and here[0][1] == here[0][0] + 1 else ()
            for ref in op.writes:
                plan.publishes.update(self._points(op, ref))
                plan.captures.add(self.buffers[ref.buffer].module)
        return found

    def _is_partial(self) -> bool:
        """Does any forward compute a part of the network only, or keep the output of a module?"""
        end = len(self.network.profile.denoiser.segments)
        return any(b.module for b in self.graph.buffers) or any(
            list(plan.ranges) != [(0, end)] for plan in self.plans.values()
        )

    def _guidance(self, _: int, instance: Instance) -> None:
        pieces = list(chain.from_iterable(self._read(instance, "noise")))
        self.guided[instance.op.ranks[0]] = self.schedule.guided(branches_of(pieces))

    def _scheduler(self, _: int, instance: Instance) -> None:
        """The next latent of the rows that the op writes, part by part."""
        op, rank = instance.op, instance.op.ranks[0]
        assert op.step is not None
        noise = list(chain.from_iterable(self._read(instance, "noise")))
        latent = list(chain.from_iterable(self._read(instance, "latent")))
        guided = self.guided.pop(rank, None)
        out = branches_of(noise)[0] if guided is None else guided
        prediction = self.network.prediction(out)
        spans = sorted({piece.span for piece in noise})
        sizes = [last - first for first, last in spans]
        strips = prediction.split(sizes, dim=-2)
        have = [Piece(span, rows) for span, rows in zip(spans, strips, strict=True)]
        step = op.step + instance.base
        for ref, old in zip(op.writes, latent, strict=True):
            rows = take_rows(have, [old.span])
            new = self.schedule.step(rank, ref.part, step, rows, old.value)
            self._write(instance, ref, (Piece(old.span, new),))

    def _outside(self, _: int, instance: Instance) -> None:
        """Encoders and the VAE; the first op that reads a latent after the loop has the result."""
        pieces = list(chain.from_iterable(self._read(instance, "latent")))
        if pieces:
            replica = self.replica[instance.op.ranks[0]]
            self.latents[replica] = take_rows(pieces, [(0, self.shape["r"])])


def _key(ref: Ref, base: int) -> Key:
    return ref.buffer, ref.part, ref.at(base), ref.sub
