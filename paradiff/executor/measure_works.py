"""What single pieces of a model's compute take here: segments at their rows and keys, one at a time.

Decides what a piece of work is set up as: it runs among the ops of the shortest schedule that has it,
all ranks in this process, one op after another on its thread. Nothing is sent, nothing runs beside it:
no number holds anything of order or overlap. Two things that slow compute in a run are there: a transfer
leaves the core for ``AWAY_S``, after which compute starts colder; and what follows the same segments of
another rank, whose weights it finds in the caches, counts only where all do. Works are named by
``paradiff.graph.work_text``.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from paradiff.executor.interpreter import _Run
from paradiff.executor.job import Job, Prepared, prepare
from paradiff.executor.loading import Pipeline
from paradiff.executor.measure import PRECISE, mean_of
from paradiff.executor.streams import Step, take_turns
from paradiff.graph import Instance, ScheduleGraph, work_text
from paradiff.trace import TRANSFERS, Span

LEAST_PASSES, MOST_PASSES = 3, 9
COUNTS = 0.01
"""Works that take less than this share of a pass need not be known precisely."""
AWAY_S = 0.5e-3
"""As long as calls of few bytes take between two processes (longer made no difference)."""
Samples = defaultdict[str, list[float]]
"""Seconds by ``work_text``."""
Agree = Callable[[bool], bool]
"""Whether all who measure at the same time are done, from whether this process is."""


def works_of(graph: ScheduleGraph) -> set[str]:
    """The distinct works of ``graph``."""
    ops = (op for section in graph.sections for op in section.ops)
    return {work_text(op.work) for op in ops if op.work is not None}


def measure_works(
    job: Job, pipeline: Pipeline, wanted: Collection[str], agree: Agree = bool
) -> dict[str, float]:
    """Mean seconds (what is slow now and then lengthens a sum) of ``wanted``, works of the job's own
    graph, and of whatever else its shortest schedule has.

    One pass warms up; passes are then made until the mean of every work that counts is known to
    ``PRECISE`` (one standard error), MOST_PASSES at most. Raises RunFailed.
    """
    prepared = shortest(job, pipeline, wanted)
    cold, warm = Samples(list), Samples(list)
    _pass(prepared, Samples(list), Samples(list))
    for number in range(1, MOST_PASSES + 1):
        took_s = _pass(prepared, cold, warm)
        samples = {**warm, **cold}
        known = number >= LEAST_PASSES and all(
            _is_known(each, COUNTS * took_s * number) for each in samples.values()
        )
        if agree(known or number == MOST_PASSES):
            break
    return {key: mean_of(each)[0] for key, each in samples.items()}


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


def _pass(prepared: Prepared, cold: Samples, warm: Samples) -> float:
    """Run every op once, add what each took to ``warm`` where the one before ran the same segments, else
    to ``cold``; the sum. Wall time, as in the run: what else this machine does lengthens both."""
    run = _Run(prepared.graph, prepared.pipeline.network, prepared.request)
    total, before = 0.0, None

    def perform(number: int, instance: Instance) -> None:
        nonlocal total, before
        if instance.op.kind in TRANSFERS:
            time.sleep(AWAY_S)
        begin = time.perf_counter()
        run.perform(number, instance)
        took = time.perf_counter() - begin
        total += took
        work = instance.op.work
        if work is not None:
            segments = work.stage, work.ranges
            (warm if segments == before else cold)[work_text(work)].append(took)
            before = segments

    def walk(steps: list[Step]) -> list[Span]:
        return take_turns(steps, perform)

    run.run(walk)
    return total


def _is_known(samples: Sequence[float], counts_s: float) -> bool:
    if math.fsum(samples) < counts_s:
        return True
    mean_s, error_s = mean_of(samples)
    return error_s < PRECISE * mean_s
