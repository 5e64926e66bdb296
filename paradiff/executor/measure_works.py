"""What single pieces of a model's compute take here: segments at their rows and keys, one at a time.

Decides what a piece of work is set up as: it runs among the ops of the shortest schedule that has it,
all ranks in this process, one op after another on its thread. Nothing is sent, nothing runs beside it:
no number holds anything of order, overlap or waiting. Named by ``paradiff.graph.work_text``.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from paradiff.executor.interpreter import _Run
from paradiff.executor.job import Job, Prepared, prepare
from paradiff.executor.loading import Pipeline
from paradiff.executor.measure import PRECISE, Timing, median_error
from paradiff.executor.streams import Step, take_turns
from paradiff.graph import Instance, ScheduleGraph, work_text
from paradiff.trace import Span

LEAST_PASSES, MOST_PASSES = 3, 9
COUNTS = 0.01
"""Works that take less than this share of a pass need not be known precisely."""
Agree = Callable[[bool], bool]
"""Whether all who measure at the same time are done, from whether this process is."""


def works_of(graph: ScheduleGraph) -> set[str]:
    """The distinct works of ``graph``."""
    ops = (op for section in graph.sections for op in section.ops)
    return {work_text(op.work) for op in ops if op.work is not None}


def measure_works(
    job: Job, pipeline: Pipeline, wanted: Collection[str], agree: Agree = bool
) -> dict[str, Timing]:
    """Time ``wanted``, works of the job's own graph, and whatever else its shortest schedule has.

    One pass warms up; passes are then made until the median of every work that counts is known to
    ``PRECISE``, MOST_PASSES at most. Raises RunFailed.
    """
    prepared = shortest(job, pipeline, wanted)
    samples: dict[str, list[float]] = defaultdict(list)
    _pass(prepared, defaultdict(list))
    for number in range(1, MOST_PASSES + 1):
        took_s = _pass(prepared, samples)
        known = number >= LEAST_PASSES and all(
            _is_known(each, COUNTS * took_s * number) for each in samples.values()
        )
        if agree(known or number == MOST_PASSES):
            break
    return {key: _timing(each) for key, each in samples.items()}


def shortest(job: Job, pipeline: Pipeline, wanted: Collection[str]) -> Prepared:
    """The job with as few steps as still have all of ``wanted`` in the schedule."""
    steps = job.steps or pipeline.network.profile.defaults["steps"]
    for fewer in range(1, steps):
        try:
            prepared = prepare(replace(job, steps=fewer, planned=None), pipeline)
        except ValueError:
            continue  # a warm-up that does not fit, a scheduler that needs more steps
        if works_of(prepared.graph) >= set(wanted):
            return prepared
    return prepare(job, pipeline)


def _pass(prepared: Prepared, samples: dict[str, list[float]]) -> float:
    """Run every op once, add what each took to ``samples``; the sum. Wall time, as in the run: what else
    this machine does lengthens both."""
    run = _Run(prepared.graph, prepared.pipeline.network, prepared.request)
    total = 0.0

    def perform(number: int, instance: Instance) -> None:
        nonlocal total
        begin = time.perf_counter()
        run.perform(number, instance)
        took = time.perf_counter() - begin
        total += took
        if instance.op.work is not None:
            samples[work_text(instance.op.work)].append(took)

    def walk(steps: list[Step]) -> list[Span]:
        return take_turns(steps, perform)

    run.run(walk)
    return total


def _is_known(samples: Sequence[float], counts_s: float) -> bool:
    if sum(samples) < counts_s:
        return True
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return median_error(low, high, len(samples)) < PRECISE * middle


def _timing(samples: Sequence[float]) -> Timing:
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, len(samples))
