"""Traces: when each op of a graph ran, simulated or measured, in one schema.

Holds spans and nothing derived from them (that is ``analysis.attribution``). ``check_trace`` restates
the semantics of a graph independently of the engine and of the executor, and judges both.

A simulated trace of a periodic schedule is **folded**: a steady state appears once, followed by a
``Repeat`` that says how many further copies of the period the engine did not write down. Span times
are then on the folded clock, in which a repeat takes no time; ``makespan_s`` always counts it.
``expanded`` gives the full trace. Example: a period of 2 s that ends at 5 s and repeats 10 times; a
span that starts at 6 s on the folded clock really starts at 26 s.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from paradiff import __version__
from paradiff.dependencies import Dependencies
from paradiff.graph import OpKind, ScheduleGraph

TRANSFERS = ("collective", "permute", "p2p")
"""Op kinds that move bytes between ranks."""

Kernels = Literal["real", "timed", "simulated"]
"""What made the times of a trace: modules that computed, sleeps as long as modelled, or the engine."""

_SLACK = 1e-9
"""Relative to the makespan: how much a measured clock or a sum of floats may be off."""


class TraceMismatch(ValueError):
    """A trace that is no run of the graph it is compared with, or a file that is no trace."""


class Span(NamedTuple):
    """One op on one of its ranks. All times in seconds since the start of the run.

    The device could have started at ``ready_s`` (predecessors finished) but for the host, which had
    not issued the op before ``start_s``. It worked for ``busy_s`` from ``start_s`` on; what remains
    until ``end_s`` is the host issuing the last launches.
    """

    name: str
    step: int | None
    rank: int
    stream: str
    kind: OpKind
    call: str
    ready_s: float
    start_s: float
    end_s: float
    busy_s: float
    nbytes: int

    @property
    def id(self) -> str:
        """The op id of the graph: ``t007/<name>`` inside the denoising loop."""
        return self.name if self.step is None else f"t{self.step:03d}/{self.name}"


class Repeat(NamedTuple):
    """The ``period_s`` that ends at ``at_s`` (folded clock) happens ``copies`` more times there.

    Each further copy is ``steps`` denoising steps later.
    """

    at_s: float
    period_s: float
    copies: int
    steps: int


class LinkUse(NamedTuple):
    """What one op takes of one link (or of host memory), at a constant rate from ``begin_s`` on.

    ``op``: its id in the graph.
    """

    link: str
    op: str
    begin_s: float
    end_s: float
    bytes_per_s: float


class Counter(NamedTuple):
    """A number over time: (seconds, value), each until the next. Of a rank, or (None) of the box."""

    name: str
    rank: int | None
    unit: str
    points: Sequence[tuple[float, float]]


class Arrow(NamedTuple):
    """Rank ``source`` sends to rank ``destination`` in ``op`` (its id in the graph)."""

    op: str
    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class Tracks:
    """What is seen of a run beside its spans (``analysis.tracks``). No link is used twice by one op.

    ``note``: what a reader of the links must know, or why there are none.
    """

    arrows: Sequence[Arrow] = ()
    links: Sequence[LinkUse] = ()
    counters: Sequence[Counter] = ()
    note: str = ""


NO_TRACKS = Tracks()


@dataclass(frozen=True, slots=True)
class Trace:
    """A run. ``spans`` by start, then by canonical order of the graph, then by rank.

    ``meta`` (``meta_of``): what its graph is of, ``kernels`` and ``paradiff``; of a run also ``device``
    (of several, by ``; ``), ``torch`` and other versions, ``date``, and of several processes
    ``clock_residual_s``.
    """

    spans: tuple[Span, ...]
    makespan_s: float
    repeats: tuple[Repeat, ...] = ()
    meta: tuple[tuple[str, str], ...] = ()

    def ranks(self) -> tuple[int, ...]:
        """Ranks that ran anything, ascending."""
        return tuple(sorted({span.rank for span in self.spans}))

    def expanded(self) -> Trace:
        """The same run with every repeated period written out; no repeats are left.

        What ended within the period before a repeat ends again once per copy; what ended later is
        the continuation of the last copy (the engine has named it so) and moves by all of them. The
        states at both ends of a period are equal, but not how they came about: an op that was
        running at the begin of the period has in each copy the start of the one running at its end.
        """
        spans = list(self.spans)
        for repeat in reversed(self.repeats):
            spans = list(_unfold(spans, repeat))
        spans.sort(key=lambda span: span.start_s)
        return replace(self, spans=tuple(spans), repeats=())


def meta_of(graph: ScheduleGraph, kernels: Kernels, **facts: str) -> tuple[tuple[str, str], ...]:
    """What a trace says of its making: the graph's own facts, what took its times, and ``facts``."""
    own = {**dict(graph.meta), "kernels": kernels, "paradiff": __version__}
    return tuple(sorted((own | facts).items()))


def _unfold(spans: list[Span], repeat: Repeat) -> Iterator[Span]:
    at, period, copies, steps = repeat
    later = (copies + 1) * steps
    open_at_end: dict[tuple[str, int, int | None], Span] = {
        (span.name, span.rank, span.step - later): span
        for span in spans
        if span.ready_s <= at < span.end_s and span.step is not None
    }
    for span in spans:
        if span.end_s > at:
            yield _moved(span, copies * period, 0)
            continue
        yield span
        if span.end_s > at - period:
            first = _moved(span, period, steps)
            head = open_at_end.get((span.name, span.rank, span.step))
            if head is not None and span.ready_s <= at - period:
                first = _joined(head, first, at)
            for i in range(copies):
                yield _moved(first, i * period, i * steps)


def _joined(head: Span, tail: Span, at: float) -> Span:
    """A span that was ready, and may have begun, as ``head`` did before ``at``; then as ``tail``."""
    start = head.start_s if head.start_s <= at else tail.start_s
    busy_until = tail.start_s + tail.busy_s
    busy = busy_until - start if busy_until > at else head.busy_s
    return tail._replace(ready_s=head.ready_s, start_s=start, busy_s=busy)


def _moved(span: Span, seconds: float, steps: int) -> Span:
    return span._replace(
        step=span.step if span.step is None else span.step + steps,
        ready_s=span.ready_s + seconds,
        start_s=span.start_s + seconds,
        end_s=span.end_s + seconds,
    )


# ------------------------------------------------------------------------------------------- checking


def check_trace(graph: ScheduleGraph, trace: Trace) -> None:
    """Raise TraceMismatch unless ``trace`` is a legal run of ``graph``.

    Every op runs once on each of its ranks; on each rank it starts after all its predecessors there
    have ended; ops of one stream run in canonical order without overlap; the last op ends at the
    makespan. Judges folded traces by their expansion. Only times of one rank are compared, so clocks
    of different ranks may be apart (and a receiver may be ready before its sender).
    """
    spans = _by_op(trace.expanded())
    slack = _SLACK * max(trace.makespan_s, 1e-9)
    dependencies, last = Dependencies(), dict[tuple[int, str], Span]()
    done: list[dict[int, Span]] = []
    for handle, instance in enumerate(graph.instances()):
        op = instance.op
        runs = spans.pop(instance.id, {})
        if sorted(runs) != sorted(op.ranks):
            raise TraceMismatch(
                f"{instance.id} belongs to ranks {sorted(op.ranks)}, ran on {sorted(runs)}"
            )
        before = [done[earlier] for earlier in dependencies.add(instance, handle)]
        for rank, run in runs.items():
            for earlier in before:
                if rank in earlier and earlier[rank].end_s > run.start_s + slack:
                    raise TraceMismatch(
                        f"{run.id} started at {run.start_s:.9g} s on rank {rank}, its predecessor "
                        f"{earlier[rank].id} ended at {earlier[rank].end_s:.9g} s"
                    )
            _check_span(run, last.get((rank, op.stream)), op.stream, trace.makespan_s, slack)
            last[rank, op.stream] = run
        done.append(runs)
    if spans:
        raise TraceMismatch(f"{next(iter(spans))} is not an op of the graph")
    latest = max((run.end_s for runs in done for run in runs.values()), default=0.0)
    if abs(latest - trace.makespan_s) > slack:
        raise TraceMismatch(f"makespan {trace.makespan_s:.9g} s, the last op ended {latest:.9g} s")


def _by_op(trace: Trace) -> dict[str, dict[int, Span]]:
    spans: dict[str, dict[int, Span]] = {}
    for span in trace.spans:
        runs = spans.setdefault(span.id, {})
        if span.rank in runs:
            raise TraceMismatch(f"{span.id} ran twice on rank {span.rank}")
        runs[span.rank] = span
    return spans


def _check_span(
    run: Span, before: Span | None, stream: str, makespan_s: float, slack: float
) -> None:
    if run.stream != stream:
        raise TraceMismatch(f"{run.id} ran on stream {run.stream}, belongs to {stream}")
    if not run.ready_s - slack <= run.start_s <= run.end_s <= makespan_s + slack:
        raise TraceMismatch(f"{run.id} on rank {run.rank}: times out of order: {run}")
    if not -slack <= run.busy_s <= run.end_s - run.start_s + slack:
        raise TraceMismatch(f"{run.id} on rank {run.rank}: busy {run.busy_s:.9g} s of {run}")
    if before is not None and before.end_s > run.start_s + slack:
        raise TraceMismatch(
            f"rank {run.rank}, stream {stream}: {run.id} started at {run.start_s:.9g} s, "
            f"inside {before.id}, which ended at {before.end_s:.9g} s"
        )


# ---------------------------------------------------------------------------------------- Chrome JSON


LINKS, LINK = "links", "link"
"""Name of the process whose threads are the links, category of its slices."""


def write_chrome_trace(trace: Trace, path: Path, tracks: Tracks = NO_TRACKS) -> None:
    """Write ``trace`` (expanded) for Perfetto and chrome://tracing; gzip if ``path`` ends in ``.gz``.

    A process per rank, a thread per stream, categories by op kind. Of ``tracks``: arrows from the begin
    of a transfer on one rank to its end on another; a process of the links, a thread for each (more
    where ops share it), a mark with the note at its begin; counters. Equal traces give equal bytes; a
    reader never sees half a file.
    """
    text = "\n".join(_chrome_lines(trace.expanded(), tracks)) + "\n"
    data = text.encode()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=packed, mtime=0) as file:
            file.write(data)
        data = packed.getvalue()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _chrome_lines(trace: Trace, tracks: Tracks) -> Iterator[str]:
    """One event a line, so that a trace can be read with text tools.

    Perfetto wants processes and threads numbered from one: rank r is process r + 1. It keeps whole
    nanoseconds and drops a slice that begins before its neighbour has ended, so begins and ends are
    rounded, not lengths.
    """
    streams = sorted({(span.rank, span.stream) for span in trace.spans})
    ranks = sorted({rank for rank, _ in streams})
    threads = {key: number for number, key in enumerate(streams, 1)}
    yield '{"displayTimeUnit": "ms", "traceEvents": ['
    for rank in ranks:
        first = next(tid for (of, _), tid in threads.items() if of == rank)
        yield from _process_lines(rank + 1, first, f"rank {rank}")
    for (rank, stream), tid in threads.items():
        yield _event(ph="M", name="thread_name", pid=rank + 1, tid=tid, args={"name": stream}) + ","
    box = ranks[-1] + 2 if ranks else 1
    yield from _link_lines(tracks, box, len(threads) + 1)
    out, into = _arrow_ends(tracks.arrows)
    for span in trace.spans:
        tid = threads[span.rank, span.stream]
        args = {
            "step": span.step,
            "call": span.call,
            "bytes": span.nbytes,
            "ready_s": span.ready_s,
            "start_s": span.start_s,
            "end_s": span.end_s,
            "busy_s": span.busy_s,
        }
        pid, begin, end = span.rank + 1, _us(span.start_s), _us(span.end_s)
        yield _event(
            ph="X", name=span.name, cat=span.kind, pid=pid, tid=tid,
            ts=begin, dur=round(end - begin, 3), args=args,
        ) + ","  # fmt: skip
        # an end belongs to the slice that is open there: the one written last, if another begins then
        arrow = {"name": span.call, "cat": "transfer", "pid": pid, "tid": tid}
        for number in out.get((span.id, span.rank), ()):
            yield _event(ph="s", id=number, ts=begin, **arrow) + ","
        for number in into.get((span.id, span.rank), ()):
            yield _event(ph="f", bp="e", id=number, ts=end, **arrow) + ","
    other = {"makespan_s": trace.makespan_s, "meta": dict(trace.meta)}
    yield _event(ph="M", name="paradiff", pid=ranks[0] + 1 if ranks else 1, tid=1, args=other)
    yield "]}"


def _process_lines(pid: int, tid: int, name: str) -> Iterator[str]:
    """Name of a process and its place, which is that of its number; ``tid``: one of its threads."""
    yield _event(ph="M", name="process_name", pid=pid, tid=tid, args={"name": name}) + ","
    yield (
        _event(ph="M", name="process_sort_index", pid=pid, tid=tid, args={"sort_index": pid}) + ","
    )


def _us(seconds: float) -> float:
    """Microseconds with three digits."""
    return round(seconds * 1e6, 3)


def _arrow_ends(
    arrows: Iterable[Arrow],
) -> tuple[dict[tuple[str, int], list[int]], dict[tuple[str, int], list[int]]]:
    """Numbers of the arrows that leave, and of those that reach, an op (its id) on a rank."""
    out: dict[tuple[str, int], list[int]] = {}
    into: dict[tuple[str, int], list[int]] = {}
    for number, arrow in enumerate(arrows):
        out.setdefault((arrow.op, arrow.source), []).append(number)
        into.setdefault((arrow.op, arrow.destination), []).append(number)
    return out, into


def _link_lines(tracks: Tracks, box: int, tid: int) -> Iterator[str]:
    """Links as threads of process ``box``, numbered from ``tid`` on; counters of it and of the ranks."""
    if tracks.note or tracks.links or any(counter.rank is None for counter in tracks.counters):
        yield from _process_lines(box, tid, LINKS)
    if tracks.note:
        yield _event(ph="M", name="thread_name", pid=box, tid=tid, args={"name": "note"}) + ","
        yield _event(ph="i", s="t", name=tracks.note, pid=box, tid=tid, ts=0) + ","
        tid += 1
    for link, lanes in _lanes(tracks.links).items():
        for lane in lanes:
            yield _event(ph="M", name="thread_name", pid=box, tid=tid, args={"name": link}) + ","
            for use in lane:
                begin, end = _us(use.begin_s), _us(use.end_s)
                nbytes = round((use.end_s - use.begin_s) * use.bytes_per_s)
                yield (
                    f'{{"ph": "X", "name": {json.dumps(use.op)}, "cat": "{LINK}", "pid": {box}, '
                    f'"tid": {tid}, "ts": {begin}, "dur": {end - begin:.3f}, '
                    f'"args": {{"bytes": {nbytes}}}}},'
                )
            tid += 1
    for counter in tracks.counters:
        pid = box if counter.rank is None else counter.rank + 1
        head = f'{{"ph": "C", "name": {json.dumps(counter.name)}, "pid": {pid}, "ts": '
        unit = json.dumps(counter.unit)
        for at, value in counter.points:
            yield f'{head}{_us(at)}, "args": {{{unit}: {value:.6g}}}}},'


def _lanes(uses: Iterable[LinkUse]) -> dict[str, list[list[LinkUse]]]:
    """Link -> as few rows as hold its uses without overlap."""
    lanes: dict[str, list[list[LinkUse]]] = {}
    for use in sorted(uses, key=lambda use: (use.link, use.begin_s)):
        rows = lanes.setdefault(use.link, [])
        free = next((row for row in rows if row[-1].end_s <= use.begin_s), None)
        if free is None:
            rows.append([use])
        else:
            free.append(use)
    return lanes


def _event(**fields: Any) -> str:
    return json.dumps(fields, separators=(", ", ": "))


def read_chrome_trace(path: Path) -> Trace:
    """Read what ``write_chrome_trace`` wrote. Raises TraceMismatch for any other file."""
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        events = json.loads(data)["traceEvents"]
        other = next(event["args"] for event in events if event["name"] == "paradiff")
        streams = {
            event["tid"]: event["args"]["name"]
            for event in events
            if event["name"] == "thread_name" and event["ph"] == "M"
        }
        spans = tuple(
            _span(event, streams) for event in events if event["ph"] == "X" and event["cat"] != LINK
        )
        makespan_s = float(other["makespan_s"])
        meta = {str(key): str(value) for key, value in other["meta"].items()}
    except (
        ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, StopIteration
    ) as error:  # fmt: skip
        raise TraceMismatch(f"{path} is no paradiff trace: {error!r}") from error
    return Trace(spans, makespan_s, (), tuple(sorted(meta.items())))


def _span(event: Mapping[str, Any], streams: Mapping[int, str]) -> Span:
    args = event["args"]
    return Span(
        name=event["name"],
        step=args["step"],
        rank=event["pid"] - 1,
        stream=streams[event["tid"]],
        kind=event["cat"],
        call=args["call"],
        ready_s=args["ready_s"],
        start_s=args["start_s"],
        end_s=args["end_s"],
        busy_s=args["busy_s"],
        nbytes=args["bytes"],
    )
