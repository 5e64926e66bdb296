"""When the ops of one process run: each after its predecessors, those of one stream one after another.

Three ways of the same contract. On a CPU all ranks of one process take turns; a rank of its own has a
thread for each stream, so transfers run beside compute and nothing is held up by what it does not need;
on CUDA one thread issues in canonical order and events order the streams. Each gives the measured spans.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from time import perf_counter
from typing import NamedTuple

import torch

from paradiff.dependencies import Dependencies
from paradiff.executor.faults import OpFailed, ScheduleMismatch
from paradiff.graph import Instance, ScheduleGraph
from paradiff.trace import Span

COMPUTE = "compute"
LOOK_S = 0.1
"""How often the device is asked which of the ops that it was given it has done."""


class Step(NamedTuple):
    """An op of this process: its number in canonical order and its predecessors here."""

    number: int
    instance: Instance
    before: tuple[int, ...]


Perform = Callable[[int, Instance], None]
Progress = Callable[[int, int], None]


def program(graph: ScheduleGraph, rank: int | None) -> list[Step]:
    """The ops of ``rank`` (None: of all) in canonical order, with their predecessors among them."""
    dependencies, steps, here = Dependencies(), list[Step](), set[int]()
    for number, instance in enumerate(graph.instances()):
        before = dependencies.add(instance, number)
        if rank is None or rank in instance.op.ranks:
            steps.append(Step(number, instance, tuple(n for n in before if n in here)))
            here.add(number)
    return steps


def spans_of(
    instance: Instance, ranks: Sequence[int], ready_s: float, start_s: float, end_s: float
) -> Iterator[Span]:
    """The span of an op on each of ``ranks``."""
    op = instance.op
    step = None if op.step is None else op.step + instance.base
    for rank in ranks:
        yield Span(
            op.name,
            step,
            rank,
            op.stream,
            op.kind,
            op.call,
            ready_s,
            start_s,
            end_s,
            end_s - start_s,
            op.nbytes,
        )


def take_turns(
    steps: Sequence[Step], perform: Perform, progress: Progress | None = None
) -> list[Span]:
    """One op after another, on the host. ``progress`` gets (ops done, all ops)."""
    spans: list[Span] = []
    start = perf_counter()
    for index, (number, instance, _) in enumerate(steps, 1):
        begin = perf_counter() - start
        _performed(perform, number, instance, instance.op.ranks[0])
        end = perf_counter() - start
        spans += spans_of(instance, instance.op.ranks, begin, begin, end)
        if progress is not None:
            progress(index, len(steps))
    return spans


def _performed(perform: Perform, number: int, instance: Instance, rank: int) -> None:
    try:
        perform(number, instance)
    except (AssertionError, ScheduleMismatch):
        raise  # ours, not the run's
    except Exception as error:
        raise OpFailed(instance, rank, error) from error


@dataclass
class Threads:
    """A thread for each stream of ``rank``; the compute stream is the calling thread.

    ``doing`` says which op each stream has in hand (or had last, between two). The first failure ends
    all of them: the caller gets it raised, though a thread may still wait in a transfer that nobody will
    answer.
    """

    rank: int
    steps: Sequence[Step]
    perform: Perform
    doing: dict[str, str] = field(default_factory=dict)
    failure: BaseException | None = None
    _done: dict[int, Event] = field(default_factory=dict)
    _end_s: dict[int, float] = field(default_factory=dict)
    _spans: dict[int, Span] = field(default_factory=dict)

    def run(self) -> list[Span]:
        """All ops; times are readings of this process's clock. Raises the first failure."""
        lanes: dict[str, list[Step]] = {COMPUTE: []}
        lane_of: dict[int, str] = {}
        for step in self.steps:
            lanes.setdefault(step.instance.op.stream, []).append(step)
            lane_of[step.number] = step.instance.op.stream
        for step in self.steps:
            for earlier in step.before:
                if lane_of[earlier] != step.instance.op.stream:
                    self._done.setdefault(earlier, Event())
        threads = [
            Thread(target=self._lane, args=(name, own), daemon=True, name=name)
            for name, own in lanes.items()
            if name != COMPUTE
        ]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)  # a transfer that is ready should not wait for a long turn
        try:
            for thread in threads:
                thread.start()
            self._lane(COMPUTE, lanes[COMPUTE])
            for thread in threads:
                while thread.is_alive() and self.failure is None:
                    thread.join(0.1)
        finally:
            sys.setswitchinterval(interval)
        if self.failure is not None:
            raise self.failure
        return [self._spans[step.number] for step in self.steps]

    def _lane(self, name: str, steps: Sequence[Step]) -> None:
        try:
            with torch.no_grad():
                for step in steps:
                    if not self._one(name, step):
                        return
            self.doing.pop(name, None)
        except MemoryError as error:  # where an op is noted; its own is an OpFailed already
            self._fail(OpFailed(step.instance, self.rank, error))
        except BaseException as error:
            self._fail(error)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise

    def _one(self, name: str, step: Step) -> bool:
        """Run one op after its predecessors; False if the run has failed meanwhile."""
        number, instance, before = step
        ready = 0.0
        self.doing[name] = instance.id
        for earlier in before:
            if earlier in self._done:
                self._done[earlier].wait()
            if self.failure is not None:
                return False
            ready = max(ready, self._end_s[earlier])
        begin = perf_counter()
        _performed(self.perform, number, instance, self.rank)
        end = perf_counter()
        self._end_s[number] = end
        (self._spans[number],) = spans_of(instance, [self.rank], ready or begin, begin, end)
        if number in self._done:
            self._done[number].set()
        return True

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
        for event in self._done.values():
            event.set()


def on_cuda(
    steps: Sequence[Step],
    perform: Perform,
    device: torch.device,
    rank: int | None,
    tensors: Callable[[Instance], Iterator[torch.Tensor]],
    in_turn: bool = False,
    doing: MutableMapping[str, str] | None = None,
) -> list[Span]:
    """Issue in canonical order, one CUDA stream for each stream of each rank (``in_turn``: one for all,
    so that one op has the device at a time). Times are the device's: of one ``rank``, readings of this
    process's clock (as of ``Threads``), of all ranks, from the start on.

    ``tensors`` gives what an op reads: memory of one stream that another uses must not be reused early.
    ``doing`` is kept at the op that each stream is at, though it was given later ones.
    """
    streams: dict[tuple[int, str], torch.cuda.Stream] = {}
    ends: dict[int, torch.cuda.Event] = {}
    marks: list[tuple[Step, torch.cuda.Event, torch.cuda.Event]] = []
    torch.cuda.synchronize(device)
    origin = torch.cuda.Event(enable_timing=True)
    origin.record(torch.cuda.current_stream(device))
    origin.synchronize()
    zero_s = 0.0 if rank is None else perf_counter()
    with _followed(doing) as given:
        for step in steps:
            op = step.instance.op
            at = op.ranks[0] if rank is None else rank
            lane = (0, "all") if in_turn else (at, op.stream)
            if lane not in streams:
                streams[lane] = torch.cuda.Stream(device)
                streams[lane].wait_event(origin)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(streams[lane]):
                for earlier in step.before:
                    streams[lane].wait_event(ends[earlier])
                for tensor in tensors(step.instance):
                    tensor.record_stream(streams[lane])
                begin.record()
                given(step, end)
                _performed(perform, step.number, step.instance, at)
                end.record()
            ends[step.number] = end
            marks.append((step, begin, end))
        torch.cuda.synchronize(device)
    return list(_cuda_spans(marks, origin, zero_s, rank))


@contextmanager
def _followed(
    doing: MutableMapping[str, str] | None,
) -> Iterator[Callable[[Step, torch.cuda.Event], None]]:
    """Yields what is told each op and the event of its end, just before the op is issued; of those,
    ``doing`` (if there is one) has the first of each stream that the device has not done."""
    given: dict[str, deque[tuple[str, torch.cuda.Event]]] = {}
    over = Event()

    def tell(step: Step, end: torch.cuda.Event) -> None:
        if doing is not None:
            stream, name = step.instance.op.stream, step.instance.id
            given.setdefault(stream, deque()).append((name, end))
            doing.setdefault(stream, name)

    def look(doing: MutableMapping[str, str]) -> None:
        with suppress(RuntimeError):  # the device has failed, which who issues will hear
            while not over.wait(LOOK_S):
                for stream, ops in list(given.items()):
                    while len(ops) > 1 and ops[0][1].query():  # the last may not be recorded yet
                        ops.popleft()
                    doing[stream] = ops[0][0]

    if doing is not None:
        Thread(target=look, args=(doing,), daemon=True).start()
    try:
        yield tell
    finally:
        over.set()


def _cuda_spans(
    marks: Sequence[tuple[Step, torch.cuda.Event, torch.cuda.Event]],
    origin: torch.cuda.Event,
    zero_s: float,
    rank: int | None,
) -> Iterator[Span]:
    def reading_s(event: torch.cuda.Event) -> float:
        return zero_s + origin.elapsed_time(event) / 1e3

    ends: Mapping[int, float] = {step.number: reading_s(end) for step, _, end in marks}
    for step, begin, _ in marks:
        start_s = reading_s(begin)
        end_s = max(ends[step.number], start_s)
        ready_s = max((ends[n] for n in step.before), default=start_s)
        ranks = step.instance.op.ranks if rank is None else (rank,)
        yield from spans_of(step.instance, ranks, min(ready_s, start_s), start_s, end_s)
