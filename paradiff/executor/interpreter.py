"""Carries out the ops of a schedule graph on real modules: of all ranks in one process, or of one rank.

It decides nothing: what runs, where, with whom and on which version comes from the graph. It keeps the
table of values and frees each at its last read; ``streams`` says when ops run and measures them. Text
encoders are outside: the conditioning is given. The latents that the first stage after the loop reads
are the result, decoded there if the request says how.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from paradiff.dependencies import validate
from paradiff.executor.faults import NotFinite
from paradiff.executor.forward import Forward, Router, Task, task_of
from paradiff.executor.measure import made_on
from paradiff.executor.network import Conditioning, Network
from paradiff.executor.payload import (
    Payload,
    Piece,
    branches_of,
    near_edge,
    one_side,
    parse_spans,
    take_rows,
)
from paradiff.executor.schedulers import WITHOUT_MEMORY, GuidanceScale, Schedule, has_memory
from paradiff.executor.streams import Progress, Step, on_cuda, program, take_turns
from paradiff.executor.transfers import transfer
from paradiff.graph import Instance, Op, Ref, ScheduleGraph
from paradiff.models.interception import intercept
from paradiff.models.sharding import shards_of
from paradiff.strategies import parse_spec
from paradiff.strategies.decoding import SPLIT
from paradiff.trace import Span, Trace, meta_of

if TYPE_CHECKING:
    from paradiff.executor.decoding import Decoder

EXECUTABLE = (
    "serial",
    "patch",
    "distrifusion",
    "pcpp",
    "pipefusion",
    "asyncdiff",
    "parastep",
    "batchstep",
    "streambatch",
)
"""Strategies whose every op has a meaning here."""
POINT_KINDS = ("kv", "halo", "moments", "slots")


Transfer = Callable[[Instance, Sequence[tuple[int, Payload]], Sequence[int]], list[Payload]]
"""What an op that moves data writes to each of the target ranks, from (rank, payload) reads."""


Watch = Callable[[int, int, int, Piece], None]
"""Called with replica, step, rank, and rows of the latent after that step."""


class Unexecutable(ValueError):
    """A graph that cannot be executed here; the message says which can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is generated. ``conditioning`` has one entry a data-parallel replica; a replica's initial
    noise is drawn from ``seed`` plus its number, so that every rank of it draws the same. ``decode``
    makes of final latents what the user gets, on the rank that has them; where the graph spreads the
    VAE over ranks, ``strips`` does. ``watch`` sees every latent that a scheduler makes."""

    conditioning: Sequence[Conditioning]
    scheduler: Any
    seed: int = 0
    guidance_scale: GuidanceScale = 5.0
    dtype: torch.dtype = torch.float64
    decode: Callable[[Tensor], Tensor] | None = None
    strips: Decoder | None = None
    watch: Watch | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Final latents (and what they decode to) by replica, and when every op ran."""

    latents: Mapping[int, Tensor]
    trace: Trace
    decoded: Mapping[int, Tensor] = field(default_factory=dict)


Key = tuple[str, int | None, int, int]
"""A version of a buffer or of a part: buffer, part, absolute step, number within the step."""


def run_graph(
    graph: ScheduleGraph,
    network: Network,
    request: Request,
    progress: Progress | None = None,
    *,
    in_turn: bool = False,
) -> Result:
    """Run ``graph`` on ``network``; ``in_turn``: on a GPU too, one op after another. Raises Unexecutable
    before anything runs, InvalidGraph for a graph that breaks the rules, ScheduleMismatch where network
    and graph part."""
    check_executable(graph, network, request)
    validate(graph)
    run = _Run(graph, network, request)
    device = run.blank.device
    if device.type == "cuda":
        return run.run(
            lambda steps: on_cuda(steps, run.perform, device, None, run.tensors, in_turn)
        )
    return run.run(lambda steps: take_turns(steps, run.perform, progress))


def check_executable(graph: ScheduleGraph, network: Network, request: Request) -> None:
    """Raise Unexecutable unless this executor has a meaning for every op of ``graph``."""
    meta = dict(graph.meta)
    spec = parse_spec(meta["spec"])
    if spec.name not in EXECUTABLE:
        raise Unexecutable(
            f"{spec.text!r} cannot be executed yet; executable: {', '.join(EXECUTABLE)}, with cfg,"
            " data, tensor, ulysses and ring as each allows"
        )
    if spec.name == "streambatch" and has_memory(request.scheduler):
        raise Unexecutable(
            f"{spec.text!r}: {type(request.scheduler).__name__} remembers earlier steps, which other"
            f" ranks have made; schedulers that do not: {', '.join(WITHOUT_MEMORY)}"
        )
    if "weights" in spec.options:
        raise Unexecutable(
            f"{spec.text!r}: weights={spec.options['weights']} cannot be executed yet; run the spec"
            " without it, only how weights are stored changes"
        )
    if spec.options.get("vae") == "split" and request.strips is None:
        raise Unexecutable(
            f"{spec.text!r}: vae=split needs a pipeline with a VAE that can be, one of"
            f" {', '.join(SPLIT)}"
        )
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

    stage: str
    ranges: list[tuple[int, int]]
    publishes: set[int] = field(default_factory=set)
    captures: set[str] = field(default_factory=set)
    last: tuple[tuple[int, int], ...] = ()


@dataclass
class _Run:
    """One execution: the table of values and the running forwards of ``rank`` (None: of all ranks)."""

    graph: ScheduleGraph
    network: Network
    request: Request
    rank: int | None = None
    transfer: Transfer = transfer
    values: dict[Key, Payload] = field(default_factory=dict)
    forwards: dict[int, Forward] = field(default_factory=dict)
    guided: dict[int, Tensor] = field(default_factory=dict)
    replica: dict[int, int] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)
    decoded: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        meta = dict(self.graph.meta)
        size = [int(meta[name]) for name in ("height", "width", "frames", "batch")]
        self.shape = self.network.profile.latent_shape(*size)
        self.router = Router()
        self.buffers = {b.id: b for b in self.graph.buffers}
        self.schedule = Schedule(
            self.request.scheduler,
            int(meta["steps"]),
            sigmas=self.network.sigmas(int(meta["steps"])),
            tokens=self.network.scheduled_tokens(self.shape),
            sizes=self.network.latent_sizes(self.shape),
            seed=self.request.seed,
            guidance_scale=self.request.guidance_scale,
        )
        self.steps = program(self.graph, self.rank)
        self.readers = Counter(
            _key(ref, step.instance.base)
            for step in self.steps
            for ref in self._here(step.instance.op.reads)
        )
        self.lock = Lock()
        self.blank = torch.zeros_like(self.initial_latent(0))
        self.plans = self._forwards_ahead()
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.between_chunks: dict[int, dict[str, Any]] = {}
        self.units = list(self.network.unit_ranges) if self._is_partial() else []
        self.handlers: dict[str, Callable[[int, Instance], None]] = {
            "load": self._load,
            "text": self._text,
            "noise": self._noise,
            "forward": self._forward,
            "decode": self._forward,
            "image": self._image,
            "guidance": self._guidance,
            "scheduler": self._scheduler,
        }

    def run(self, walk: Callable[[list[Step]], list[Span]]) -> Result:
        """Everything, under one interception and one ``no_grad``: both must not leak between
        coroutines. ``walk`` says when the ops run."""
        shape = next(i.op.work.shape for i in self.graph.instances() if i.op.call == "forward")
        kv = self.network.kv({**self.shape, "t": shape.t})
        model, units, strips = self.network.model, self.units, self.request.strips
        shards = shards_of(model) if shape.p > 1 else {}
        works = (i.op.work for i in self.graph.instances())
        early = any(work is not None and work.values for work in works)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(
                intercept(
                    model,
                    self.router,
                    kv=kv,
                    units=units,
                    shards=shards,
                    degree=shape.p,
                    projections=early,
                )
            )
            if strips is not None and any(plan.stage != "denoiser" for plan in self.plans.values()):
                stack.enter_context(intercept(strips.model, self.router, kv=strips.kv(self.shape)))
            spans = walk(self.steps)
        end = max((span.end_s for span in spans), default=0.0)
        made = meta_of(self.graph, "real", **made_on(self.blank.device))
        trace = Trace(tuple(spans), end, (), made)
        return Result(self.latents, trace, self.decoded)

    def perform(self, number: int, instance: Instance) -> None:
        """Carry out one op. Threads may do so for ops of different streams at once."""
        op = instance.op
        if op.kind in ("compute", "host"):
            self.handlers.get(op.call, self._outside)(number, instance)
        else:
            self._transfer(instance)
        for ref in self._here(op.reads):
            key = _key(ref, instance.base)
            with self.lock:
                self.readers[key] -= 1
                if not self.readers[key]:
                    del self.readers[key]
                    self.values.pop(key, None)

    def _here(self, refs: Sequence[Ref]) -> Iterator[Ref]:
        """Those of ``refs`` whose buffers this process has."""
        return (r for r in refs if self.rank in (None, self.buffers[r.buffer].rank))

    def tensors(self, instance: Instance) -> Iterator[Tensor]:
        """Every tensor that an op reads."""
        for ref in self._here(instance.op.reads):
            for piece in self.values[_key(ref, instance.base)]:
                yield from (t for t in tree_leaves(piece.value) if isinstance(t, Tensor))

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
        if key in self.readers:
            self.values[key] = payload

    def _transfer(self, instance: Instance) -> None:
        op, tags = instance.op, dict(instance.op.tags)
        reads = [
            (self.buffers[ref.buffer].rank, self.values[_key(ref, instance.base)])
            for ref in self._here(op.reads)
        ]
        if "cached" in tags:  # a block of a ring: what a stage has cached for the one layer
            mine = (None, int(tags["cached"]))
            reads = [(rank, tuple(x for x in own if x.point in mine)) for rank, own in reads]
        if "portion" in tags:  # the edge that the neighbour sees: the lower strip's is its last
            share, frames = float(tags["portion"]), self.network.frames_together(self.shape)
            reads = [
                (rank, tuple(near_edge(x, int(rank == op.ranks[0]), share, frames) for x in own))
                for rank, own in reads
            ]
        writes = list(self._here(op.writes))
        targets = [self.buffers[ref.buffer].rank for ref in writes]
        for ref, payload in zip(writes, self.transfer(instance, reads, targets), strict=True):
            self._write(instance, ref, payload)

    # ---------------------------------------------------------------------------- ops

    def _load(self, _: int, instance: Instance) -> None:
        """Weights stay where the caller has put the model."""
        for ref in instance.op.writes:
            self._write(instance, ref, ())

    def _text(self, _: int, instance: Instance) -> None:
        replica = int(dict(instance.op.tags)["replica"])
        self.replica[instance.op.ranks[0]] = replica
        piece = Piece((0, self.shape["r"]), self.request.conditioning[replica])
        for ref in instance.op.writes:
            self._write(instance, ref, (piece,))

    def _noise(self, _: int, instance: Instance) -> None:
        tags = dict(instance.op.tags)
        replica = int(tags["replica"])
        x = self.initial_latent(replica)
        for ref, span in zip(instance.op.writes, parse_spans(tags["rows"]), strict=True):
            self._write(instance, ref, (Piece(span, x[..., span[0] : span[1], :]),))

    def initial_latent(self, replica: int) -> Tensor:
        """The same on every rank of a replica, whatever the device."""
        device = next(self.network.model.parameters()).device
        return self.schedule.initial(replica).to(device, self.request.dtype)

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
            if op.call == "forward":
                for piece in forward.output:
                    _check_finite("prediction", piece.value)

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
        if buffer.kind == "halo" and ref.part is not None:
            return tuple(one_side(piece, ref.part) for piece in pieces)
        return tuple(pieces)

    def _begin(self, number: int, instance: Instance, task: Task) -> Forward:
        op = instance.op
        assert op.work is not None
        network, strips = self.network, self.request.strips
        if op.work.stage != "denoiser":
            assert strips is not None
            kept = self.between_chunks.setdefault(op.ranks[0], {})
            network = strips.at(op.work.stage, int(task.tags.get("chunk", "0")), kept)
            scale, timestep = self._unscaled, self.schedule.timestep(0)
        else:
            assert op.step is not None
            step = op.step + instance.base
            scale = partial(self.schedule.scaled, step=step)
            timestep = self.schedule.timestep(step + int(task.tags.get("timestep", "0")))
        return Forward(
            network=network,
            total_rows=self.shape["r"],
            halo_rows=op.work.shape.h > 0,
            scale=scale,
            timestep=timestep.to(self.blank.device),
            task=task,
            publishes=self.plans[number].publishes,
            ranges=self.plans[number].ranges,
            captures=self.plans[number].captures,
            kept=self.kept.setdefault(op.ranks[0], {}),
            blank=self.blank,
            frames=self.network.frames_together(self.shape),
        )

    def _unscaled(self, latent: Tensor) -> Tensor:
        """Latent rows as the decoder takes them."""
        assert self.request.strips is not None
        return self.request.strips.unscaled(self._without_filling(latent))

    def _points(self, op: Op, ref: Ref) -> tuple[int, ...]:
        """Exchange points whose tensors a write of a forward takes; none for the network output."""
        buffer = self.buffers[ref.buffer]
        if buffer.kind not in POINT_KINDS:
            return ()
        assert op.work is not None
        packed = buffer.points or (op.work.ranges[-1][1],)
        return packed if ref.part is None or buffer.kind in ("kv", "halo") else (packed[ref.part],)

    def _forwards_ahead(self) -> dict[int, _Plan]:
        """First op of each forward -> what all of its ops together compute and write.

        An op that begins where the last one of its rank has ended goes on with the same forward.
        """
        kv = dict(self.network.profile.denoiser.points("kv"))
        found: dict[int, _Plan] = {}
        running: dict[int, _Plan] = {}
        for number, (op, _) in enumerate(self.graph.instances()):
            if op.call not in ("forward", "decode") or op.work is None:
                continue
            plan, here = running.get(op.ranks[0]), op.work.ranges
            if plan is not None and here == plan.last:
                pass  # another block of a ring
            elif plan is None or plan.ranges[-1][1] != here[0][0]:
                plan = found[number] = running[op.ranks[0]] = _Plan(
                    op.work.stage, list(op.work.ranges)
                )
            else:
                plan.ranges[-1] = plan.ranges[-1][0], here[0][1]
            alone = plan.stage == "denoiser" and here[0][0] in kv and here[0][1] == here[0][0] + 1
            plan.last = here if alone else ()
            for ref in op.writes:
                plan.publishes.update(self._points(op, ref))
                plan.captures.update({self.buffers[ref.buffer].module} - {""})
        return found

    def _is_partial(self) -> bool:
        """Does any forward compute a part of the network only, or keep the output of a module?"""
        end = len(self.network.profile.denoiser.segments)
        return any(b.module for b in self.graph.buffers) or any(
            plan.stage == "denoiser" and list(plan.ranges) != [(0, end)]
            for plan in self.plans.values()
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
        prediction = branches_of(noise)[0] if guided is None else guided
        spans = sorted({piece.span for piece in noise})
        sizes = [last - first for first, last in spans]
        strips = prediction.split(sizes, dim=-2)
        have = [Piece(span, rows) for span, rows in zip(spans, strips, strict=True)]
        step = op.step + instance.base
        for ref, old in zip(op.writes, latent, strict=True):
            rows = take_rows(have, [old.span])
            new = self.schedule.step(
                rank, ref.part, step, rows, old.value, replica=self.replica[rank], rows=old.span
            )
            _check_finite("latent", new)
            self._write(instance, ref, (Piece(old.span, new),))
            if self.request.watch is not None:
                self.request.watch(self.replica[rank], step, rank, Piece(old.span, new))

    def _outside(self, _: int, instance: Instance) -> None:
        """Encoders and the VAE; the first op that reads a latent after the loop has the result. (Those
        of other tiles come after it.)"""
        for ref in instance.op.writes:
            self._write(instance, ref, ())
        pieces = list(chain.from_iterable(self._read(instance, "latent")))
        if not pieces:
            return
        replica = self.replica[instance.op.ranks[0]]
        if replica not in self.latents:
            latent = self.latents[replica] = take_rows(pieces, [(0, self.shape["r"])])
            if self.request.decode is not None:
                self.decoded[replica] = self.request.decode(self._without_filling(latent))

    def _without_filling(self, latent: Tensor) -> Tensor:
        """Of (b, f, c, r, w) not the first frames, which fill patches up: CogVideoX 1.5's pipeline drops
        them before it decodes."""
        extra = -self.shape["f"] % self.network.profile.geometry.frame_multiple
        return latent[:, extra:] if extra else latent

    def _image(self, _: int, instance: Instance) -> None:
        """The final latent, and the picture from the strips that ranks have decoded, frames in order."""
        replica = self.replica[instance.op.ranks[0]]
        latent = chain.from_iterable(self._read(instance, "latent"))
        self.latents[replica] = take_rows(latent, [(0, self.shape["r"])])
        strips: dict[tuple[int, int], list[Tensor]] = {}
        for piece in chain.from_iterable(self._read(instance, "image")):
            strips.setdefault(piece.span, []).append(piece.value)
        assert self.request.strips is not None
        picture = torch.cat([torch.cat(strips[span], dim=-3) for span in sorted(strips)], dim=-2)
        self.decoded[replica] = self.request.strips.finished(picture)


def _check_finite(name: str, x: Tensor) -> None:
    """Raises NotFinite: on the rank that has made ``x``, before another has it."""
    if not torch.isfinite(x).all():
        nans, infinite = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
        raise NotFinite(
            f"the {name} is not finite: {nans} NaN and {infinite} infinite of {x.numel()} values"
        )


def _key(ref: Ref, base: int) -> Key:
    return ref.buffer, ref.part, ref.at(base), ref.sub
