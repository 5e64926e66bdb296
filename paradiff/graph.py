"""The schedule graph: the one contract between strategies, simulator and executor.

A graph says *what* every rank does, in which order, reading which version of what. It holds no time
and no device. Time comes from ``simulator``, numbers from ``paradiff.executor``; both walk this graph.

Vocabulary
    **buffer**   storage on one rank; **version** of it: what one op wrote, named by a denoising step.
    **ref**      one version of a buffer (or of one part of it).
    **op**       one vertex for all its participants; it reads and writes refs.
    **section**  ops that repeat: ``count`` iterations, each ``stride`` steps further on.

Semantics
    An op starts when its predecessors have finished: the producers of what it reads, the last
    readers of what it overwrites (write after read), and the previous op of its stream on each of its
    ranks. Ops are kept in one canonical total order, and every rank issues its own ops in that order,
    so even a fully blocking back end cannot deadlock. Reading an older version *is* staleness.

Text form (``ScheduleGraph.text`` and ``parse_graph`` round-trip)::

    op 0 p1/stage2@r2 compute forward ranks=2 stream=compute reads=z.p1@r2#t writes=... work=...

    ``#t`` is the iteration's step, ``#t-1`` the one before, ``#3`` step 3 whatever the iteration;
    ``#t.2`` is the version numbered 2 within that step; ``buffer[4]#t`` is part 4 of a buffer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

OpKind = Literal["compute", "collective", "permute", "p2p", "host"]
BufferKind = Literal[
    "latent", "hidden", "kv", "halo", "moments", "slots", "noise", "text", "image", "weights"
]
BROADCAST_PIECE = 1 << 15
"""Bytes after which a rank passes on what it has of a broadcast along a chain of messages (gloo)."""
COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "broadcast")


class InvalidGraph(ValueError):
    """A graph that cannot be executed; the message shows where."""


class Shape(NamedTuple):
    """Shape binding of a compute op; the symbols are those of ``paradiff.profiles``.

    Two more: ``u`` divides attention heads (Ulysses degree) and ``j`` is how many text tokens are among
    the visible keys of a joint attention (a ring sees them in one iteration only).
    """

    b: int
    f: int
    r: int
    w: int
    k: int
    t: int
    s: int
    h: int
    u: int
    j: int
    p: int = 1


class Work(NamedTuple):
    """Segments ``[lo, hi)`` of a profile's stage at a shape. Work, never time.

    ``stored``: how the weights are kept where that is not the network's dtype (``fp8``). ``blocks``:
    of how many blocks of keys this attention is one; their results are merged. ``copies``: kernels that
    the schedule adds to the network's own (K and V laid side by side, tensors packed), which read and
    write ``copied`` bytes; ``joined``: bytes of what lies side by side for an attention or a convolution
    of it, beside the parts, while that runs. ``values``: ``until``: after the ranges also of segment
    ``hi`` what lies before V has been projected; ``from``: of the first segment only what follows that.
    ``once``: one time, not as often as the stage repeats for a request (one chunk of a video's frames).
    """

    stage: str
    ranges: tuple[tuple[int, int], ...]
    shape: Shape
    stored: str = ""
    blocks: int = 1
    copies: int = 0
    copied: int = 0
    joined: int = 0
    values: str = ""
    once: bool = False


@dataclass(frozen=True, slots=True)
class Buffer:
    """Storage of ``nbytes`` on one rank. Its id ends in ``@r<rank>``.

    ``points``: the exchange points (segment indices) whose tensors it packs, in this order; part p of
    it is point p (of a ``kv`` buffer: patch p of all of them). Empty where a buffer holds one thing:
    what lies at the end of the op that writes it. ``module``: the module whose output it is.
    """

    id: str
    rank: int
    nbytes: int
    kind: BufferKind
    points: tuple[int, ...] = ()
    module: str = ""


class Ref(NamedTuple):
    """One version of a buffer: ``step`` relative to the iteration, or absolute where ``fixed``.

    ``sub`` tells versions of one step apart where a step writes the buffer several times (a ring's
    rotating block, a work buffer that every layer uses again).
    """

    buffer: str
    step: int
    part: int | None = None
    fixed: bool = False
    sub: int = 0

    def at(self, base: int) -> int:
        """Absolute step of the version in the iteration that starts at step ``base``."""
        return self.step if self.fixed else base + self.step

    def show(self, base: int) -> str:
        """Text of the absolute version, for messages."""
        return _ref_text(Ref(self.buffer, self.at(base), self.part, True, self.sub))


@dataclass(frozen=True, slots=True)
class Op:
    """One vertex. ``nbytes`` is the payload in the convention of its call (``traffic``).

    ``tags`` tell the executor what costs do not depend on: which latent rows (``rows=8-16``), which
    guidance ``branch``, which ``replica``, how ``moments`` mix, how far ahead the ``timestep`` is.
    Neither names nor values hold any of `` ,;=``.
    """

    name: str
    kind: OpKind
    call: str
    ranks: tuple[int, ...]
    stream: str
    reads: tuple[Ref, ...] = ()
    writes: tuple[Ref, ...] = ()
    step: int | None = None
    work: Work | None = None
    nbytes: int = 0
    tags: tuple[tuple[str, str], ...] = ()

    def id_at(self, base: int) -> str:
        """Unique id: ``t007/<name>`` inside the denoising loop, the bare name outside."""
        return self.name if self.step is None else f"t{base + self.step:03d}/{self.name}"


@dataclass(frozen=True, slots=True)
class Section:
    """``ops`` repeated ``count`` times; iteration i starts at step ``first + i * stride``."""

    name: str
    first: int
    count: int
    stride: int
    ops: tuple[Op, ...]


class Instance(NamedTuple):
    """One occurrence of an op: the iteration's base step makes relative versions absolute."""

    op: Op
    base: int

    @property
    def id(self) -> str:
        return self.op.id_at(self.base)


def traffic(op: Op) -> dict[int, tuple[float, float]]:
    """rank -> (bytes sent, bytes received) of a transfer, in the cost algebra of ring algorithms.

    Payload ``nbytes``: all_gather, local bytes m; all_reduce and broadcast, tensor bytes S;
    reduce_scatter and all_to_all, local input bytes S; permute and p2p, one message.
    """
    n, size = len(op.ranks), op.nbytes
    if op.kind == "p2p":
        source, destination = op.ranks
        return {source: (size, 0), destination: (0, size)}
    if op.kind == "permute":
        return dict.fromkeys(op.ranks, (size, size))
    if op.kind != "collective":
        return {}
    if op.call == "broadcast":
        last = n - 1
        return {r: (size * (i != last), size * (i != 0)) for i, r in enumerate(op.ranks)}
    factor = {
        "all_gather": n - 1,
        "all_reduce": 2 * (n - 1) / n,
        "reduce_scatter": (n - 1) / n,
        "all_to_all": (n - 1) / n,
    }[op.call]
    return dict.fromkeys(op.ranks, (factor * size, factor * size))


def sends(kind: str, call: str, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(source, destination) of a transfer among ``ranks``, in the algebra of ``traffic``: a p2p has one
    message, a broadcast goes down a chain, everything else from each rank to the next, around.

    An all-to-all also sends straight to every other rank, which is left out: n - 1 times as many pairs.
    """
    if kind not in ("p2p", "permute", "collective"):
        return []
    after = [*ranks[1:], *ranks[:1]] if kind != "p2p" and call != "broadcast" else ranks[1:]
    return [pair for pair in zip(ranks, after, strict=False) if pair[0] != pair[1]]


@dataclass(frozen=True)
class ScheduleGraph:
    """A frozen schedule for ``world_size`` ranks. ``meta`` are the (key, value) facts of its making."""

    world_size: int
    buffers: tuple[Buffer, ...]
    sections: tuple[Section, ...]
    meta: tuple[tuple[str, str], ...] = ()

    def instances(self) -> Iterator[Instance]:
        """Every op occurrence in canonical order."""
        for section in self.sections:
            for i in range(section.count):
                base = section.first + i * section.stride
                for op in section.ops:
                    yield Instance(op, base)

    def unroll(self) -> ScheduleGraph:
        """The executor's form: one section, one iteration, absolute versions."""
        ops = tuple(absolute(instance) for instance in self.instances())
        return replace(self, sections=(Section("all", 0, 1, 1, ops),))

    def shortened(self, iterations: int) -> ScheduleGraph:
        """The same schedule with at most ``iterations`` of each section, steps renumbered."""
        sections, shift = [], 0
        for section in self.sections:
            count = min(section.count, iterations)
            sections.append(replace(section, first=section.first - shift, count=count))
            shift += (section.count - count) * section.stride
        return replace(self, sections=tuple(sections))

    # ------------------------------------------------------------------ derived from the graph alone

    def op_count(self) -> int:
        """How many ops all ranks together perform."""
        return sum(section.count * len(section.ops) for section in self.sections)

    def bytes_by_call(self) -> dict[int, dict[str, tuple[float, float]]]:
        """rank -> call -> (bytes sent, bytes received) over the whole run."""
        total: dict[int, dict[str, tuple[float, float]]] = {r: {} for r in range(self.world_size)}
        for section in self.sections:
            for op in section.ops:
                for rank, (sent, received) in traffic(op).items():
                    before = total[rank].get(op.call, (0.0, 0.0))
                    total[rank][op.call] = (
                        before[0] + section.count * sent,
                        before[1] + section.count * received,
                    )
        return total

    def received_bytes(self) -> dict[int, float]:
        """rank -> bytes received over the whole run."""
        calls = self.bytes_by_call()
        return {rank: sum(r for _, r in calls[rank].values()) for rank in calls}

    def staleness(self) -> int:
        """The largest number of steps by which any op reads behind its own step."""
        return max((age for _, _, age in self.stale_reads()), default=0)

    def stale_reads(self) -> Iterator[tuple[Op, Ref, int]]:
        """(op, ref, age in steps) of every read of an older version, once per section.

        The age is the reader's step minus the version's; a version named absolutely ages through the
        section, and its greatest age is given. Text and weights never age.
        """
        ageless = {b.id for b in self.buffers if b.kind in ("text", "weights")}
        for section in self.sections:
            last = section.first + (section.count - 1) * section.stride
            for op in section.ops:
                if op.step is None:
                    continue
                for ref in op.reads:
                    age = op.step + last - ref.at(last)
                    if age > 0 and ref.buffer not in ageless:
                        yield op, ref, age

    def peak_bytes(
        self,
        kinds: Iterable[str] = get_args(BufferKind),
        staged: Sequence[Sequence[int]] = (),
    ) -> dict[int, int]:
        """rank -> most bytes of buffers alive at once, counting buffers (not versions) of ``kinds``.

        A buffer is alive from the op that writes a version to the last op that reads it, in
        canonical order. ``staged[s][i]``: what op i of section s also holds on each of its ranks while
        it is under way, from its start until something first reads what it has written there.
        Three iterations of a section are as good as all: reads reach no further back.
        """
        named = set(kinds)
        wanted = {b.id: b for b in self.buffers if b.kind in named}
        if not wanted:
            return dict.fromkeys(range(self.world_size), 0)
        short = self.shortened(4)
        sizes = staged or [[0] * len(section.ops) for section in short.sections]
        sections = zip(short.sections, sizes, strict=True)
        under_way = [size for s, of_ops in sections for size in [*of_ops] * s.count]
        spans: dict[str, list[tuple[int, int]]] = {buffer_id: [] for buffer_id in wanted}
        changes: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(self.world_size)}
        for version, uses in _uses(short, wanted).items():
            buffer_id, start = version[0], uses[0]
            spans[buffer_id].append((start, uses[-1]))
            if size := under_way[start]:
                end = uses[1] if len(uses) > 1 else start + 1
                changes[wanted[buffer_id].rank] += [(start, size), (end, -size)]
        for buffer_id, buffer in wanted.items():
            for start, end in _merged(spans[buffer_id]):
                changes[buffer.rank] += [(start, buffer.nbytes), (end + 1, -buffer.nbytes)]
        return {rank: _most(of_rank) for rank, of_rank in changes.items()}

    # ------------------------------------------------------------------ text

    def lines(self) -> Iterator[str]:
        """The text form, line by line."""
        yield "paradiff-graph/1"
        yield f"world {self.world_size}"
        yield f"meta {json.dumps(dict(self.meta), sort_keys=True)}"
        for b in self.buffers:
            yield _buffer_text(b)
        for s in self.sections:
            yield f"section {s.name} first={s.first} count={s.count} stride={s.stride}"
            yield from map(_op_text, s.ops)

    def text(self) -> str:
        """The text form; ``parse_graph`` reads it back to an equal graph."""
        return "\n".join(self.lines()) + "\n"

    def fingerprint(self) -> str:
        """SHA-256 of the unrolled text without ``meta``: what all ranks compare before they start."""
        digest = hashlib.sha256(f"world {self.world_size}\n".encode())
        for b in sorted(self.buffers, key=lambda b: b.id):
            digest.update(f"{_buffer_text(b)}\n".encode())
        for s in self.sections:
            forms = [_form(op) for op in s.ops]
            for i in range(s.count):
                base = s.first + i * s.stride
                for form, steps in forms:
                    digest.update((form % tuple([base + step for step in steps])).encode())
        return digest.hexdigest()


def absolute(instance: Instance) -> Op:
    """The op of an instance with its versions and its step made absolute."""
    op, base = instance

    def fix(refs: tuple[Ref, ...]) -> tuple[Ref, ...]:
        return tuple(Ref(r.buffer, r.at(base), r.part, True, r.sub) for r in refs)

    step = None if op.step is None else op.step + base
    return replace(op, step=step, reads=fix(op.reads), writes=fix(op.writes))


def _uses(
    graph: ScheduleGraph, wanted: Container[str]
) -> dict[tuple[str, int | None, int, int], list[int]]:
    """Version of a buffer among ``wanted`` -> positions in canonical order of the op that writes it and
    of those that read it."""
    uses: dict[tuple[str, int | None, int, int], list[int]] = {}
    for position, (op, base) in enumerate(graph.instances()):
        for buffer, step, part, fixed, sub in op.writes:
            if buffer in wanted:
                uses[buffer, part, step if fixed else base + step, sub] = [position]
        for buffer, step, part, fixed, sub in op.reads:
            if buffer in wanted:
                uses[buffer, part, step if fixed else base + step, sub].append(position)
    return uses


def _most(changes: list[tuple[int, int]]) -> int:
    """The largest sum of (position, change) up to any of them."""
    return max(accumulate((change for _, change in sorted(changes)), initial=0))


def _merged(intervals: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Union of closed intervals, in order."""
    start, end = None, -1
    for lo, hi in sorted(intervals):
        if start is None:
            start, end = lo, hi
        elif lo <= end:
            end = max(end, hi)
        else:
            yield start, end
            start, end = lo, hi
    if start is not None:
        yield start, end


# ---------------------------------------------------------------------------------------- text form

_REF = re.compile(
    r"(?P<buffer>[^\[#,]+@r\d+)(?:\[(?P<part>\d+)\])?#(?P<version>t(?:[+-]\d+)?|-?\d+)"
    r"(?:\.(?P<sub>\d+))?"
)
_WORK = re.compile(
    r"(?P<stage>\w+)\[(?P<ranges>[\d:,]*)\]\{(?P<shape>[\d,]+)\}(?P<stored>\w*)(?:/(?P<blocks>\d+))?"
    r"(?:\+(?P<copies>\d+):(?P<copied>\d+)(?::(?P<joined>\d+))?)?(?:@(?P<values>until|from))?"
    r"(?P<once>\*1)?"
)


_COPIES = ("copies", "copied", "joined")


def _ref_text(ref: Ref) -> str:
    version = str(ref.step) if ref.fixed else f"t{ref.step:+d}" if ref.step else "t"
    return _version_text(ref, version)


def _version_text(ref: Ref, version: str) -> str:
    part = "" if ref.part is None else f"[{ref.part}]"
    return f"{ref.buffer}{part}#{version}{f'.{ref.sub}' if ref.sub else ''}"


def _form(op: Op) -> tuple[str, list[int]]:
    """The line of ``op`` with absolute versions, as a form for ``%``, and what to add to the base step
    of an iteration for each number in it."""
    steps = [] if op.step is None else [op.step]

    def ref_text(ref: Ref) -> str:
        if ref.fixed:
            return _ref_text(ref)
        steps.append(ref.step)
        return _version_text(ref, "\0")

    text = _op_text(op, "-" if op.step is None else "\0", ref_text)
    return text.replace("%", "%%").replace("\0", "%d") + "\n", steps


def _buffer_text(b: Buffer) -> str:
    points = f" {','.join(map(str, b.points))}" if b.points else ""
    module = f" of {b.module}" if b.module else ""
    return f"buffer {b.id} {b.nbytes} {b.kind}{points}{module}"


def work_text(work: Work) -> str:
    """``denoiser[0:4]{2,1,8,16,16,77,2,0,1,0,1}``: stage, segments, shape in the order of ``Shape``."""
    ranges = ",".join(f"{lo}:{hi}" for lo, hi in work.ranges)
    shape = ",".join(map(str, work.shape))
    blocks = f"/{work.blocks}" if work.blocks > 1 else ""
    copies = f"+{work.copies}:{work.copied}" if work.copies else ""
    copies += f":{work.joined}" if work.joined else ""
    values = f"@{work.values}" if work.values else ""
    once = "*1" if work.once else ""
    return f"{work.stage}[{ranges}]{{{shape}}}{work.stored}{blocks}{copies}{values}{once}"


def _op_text(op: Op, step: str | None = None, ref_text: Callable[[Ref], str] = _ref_text) -> str:
    """The line of an op; ``step`` and ``ref_text``: in place of its own step and versions."""
    fields = [
        "op",
        step or ("-" if op.step is None else str(op.step)),
        op.name,
        op.kind,
        op.call,
        f"ranks={','.join(map(str, op.ranks))}",
        f"stream={op.stream}",
        f"reads={','.join(map(ref_text, op.reads))}",
        f"writes={','.join(map(ref_text, op.writes))}",
        f"bytes={op.nbytes}",
    ]
    if op.work is not None:
        fields.append(f"work={work_text(op.work)}")
    if op.tags:
        fields.append(f"tags={';'.join(f'{name}={value}' for name, value in op.tags)}")
    return " ".join(fields)


def _parse_ref(text: str) -> Ref:
    found = _REF.fullmatch(text)
    if not found:
        raise ValueError(f"ref {text!r}")
    part = None if found["part"] is None else int(found["part"])
    version, sub = found["version"], int(found["sub"] or 0)
    if version.startswith("t"):
        return Ref(found["buffer"], int(version[1:] or 0), part, False, sub)
    return Ref(found["buffer"], int(version), part, True, sub)


def _parse_op(fields: list[str]) -> Op:
    step, name, kind, call, *rest = fields
    values = dict(item.split("=", 1) for item in rest)
    if kind not in get_args(OpKind):
        raise ValueError(f"kind {kind!r}, one of {', '.join(get_args(OpKind))}")
    work = None
    if "work" in values:
        found = _WORK.fullmatch(values["work"])
        if not found:
            raise ValueError(f"work {values['work']!r}")
        pairs = [p.split(":") for p in found["ranges"].split(",") if p]
        shape = Shape(*map(int, found["shape"].split(",")))
        ranges = tuple((int(lo), int(hi)) for lo, hi in pairs)
        blocks, part = int(found["blocks"] or 1), found["values"] or ""
        copies, copied, joined = (int(found[k] or 0) for k in _COPIES)
        texts = found["stage"], ranges, shape, found["stored"]
        work = Work(*texts, blocks, copies, copied, joined, part, bool(found["once"]))
    return Op(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        call=call,
        ranks=tuple(int(r) for r in values["ranks"].split(",")),
        stream=values["stream"],
        reads=tuple(map(_parse_ref, filter(None, values["reads"].split(",")))),
        writes=tuple(map(_parse_ref, filter(None, values["writes"].split(",")))),
        step=None if step == "-" else int(step),
        work=work,
        nbytes=int(values["bytes"]),
        tags=tuple(_parse_tag(t) for t in values.get("tags", "").split(";") if t),
    )


def _parse_tag(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _parse_buffer(fields: list[str]) -> Buffer:
    name, nbytes, kind, *rest = fields
    points, module = (rest[:-2], rest[-1]) if "of" in rest else (rest, "")
    if kind not in get_args(BufferKind):
        raise ValueError(f"kind {kind!r}, one of {', '.join(get_args(BufferKind))}")
    packed = tuple(int(p) for text in points for p in text.split(","))
    rank = int(name.rpartition("@r")[2])
    return Buffer(name, rank, int(nbytes), kind, packed, module)  # type: ignore[arg-type]


def parse_graph(text: str) -> ScheduleGraph:
    """Read ``ScheduleGraph.text``. Raises InvalidGraph with the line number and the line."""
    world, meta = 0, {}
    buffers: list[Buffer] = []
    sections: list[tuple[str, int, int, int, list[Op]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        word, _, rest = line.partition(" ")
        try:
            if number == 1:
                if line != "paradiff-graph/1":
                    raise ValueError("the first line must be paradiff-graph/1")
            elif word == "world":
                world = int(rest)
            elif word == "meta":
                meta = json.loads(rest)
            elif word == "buffer":
                buffers.append(_parse_buffer(rest.split(" ")))
            elif word == "section":
                name, *numbers = rest.split(" ")
                first, count, stride = (int(n.partition("=")[2]) for n in numbers)
                sections.append((name, first, count, stride, []))
            elif word == "op":
                sections[-1][4].append(_parse_op(rest.split(" ")))
            else:
                raise ValueError(f"unknown word {word!r}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InvalidGraph(f"line {number}: {error}: {line[:120]}") from error
    return ScheduleGraph(
        world_size=world,
        buffers=tuple(buffers),
        sections=tuple(Section(n, f, c, s, tuple(ops)) for n, f, c, s, ops in sections),
        meta=tuple(sorted(meta.items())),
    )
