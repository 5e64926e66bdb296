"""Predicted against measured speed-ups of every strategy on two processes, real kernels.

``python benchmarks/bench_validate.py [MODEL...]``: for a U-Net, a DiT with cross-attention and one with
joint attention (twins, enlarged until a step takes 100 ms and more), two processes of one thread, each
pinned to a core. Serial on one of them against each strategy on both, in ABBA order. Fails where the
speed-up is missed by more than 10 % in the median or 20 % at worst. Nothing is fitted on strategies:
works are timed one at a time, calls among made-up computations (docs/validation.md).

A virtual machine's cores are now of one core of the host, now of two, and slow each other or not, for
seconds at a time and for minutes. So works and calls are measured anew in the middle of each round of
runs, and the rounds of a strategy lie apart: all strategies have their first, then all their second.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from analysis.attribution import attribute
from paradiff.cli.measure_here import measure_here, predict
from paradiff.cli.validate_run import runs_of
from paradiff.executor.interpreter import Unexecutable
from paradiff.executor.job import Job, Prepared, prepare
from paradiff.executor.measure import pin_to_cores
from paradiff.executor.place import Place
from paradiff.executor.session import Session
from paradiff.executor.transports import Distributed
from paradiff.strategies import Infeasible
from paradiff.trace import Trace

MODELS = {"sd21": 448, "pixart-alpha": 640, "sd3-medium": 640}
STEPS = 4
ROUNDS = 5
"""Each serial, strategy, serial, strategy, measurement, and the same backwards."""
SPECS = (
    "cfg=2", "data=2", "patch=2", "patch=2,mode=naive", "distrifusion=2,warmup=1", "pcpp=2,warmup=1",
    "ulysses=2", "ring=2", "ring=2,rotate=allgather", "pipefusion=2,patches=4,warmup=1",
    "asyncdiff=2,warmup=1", "parastep=2,warmup=1", "streambatch=2", "tensor=2",
)  # fmt: skip
"""Every family of two processes; a model takes those that it can."""
LEAST_STEP_S = 0.1
MEDIAN, WORST = 0.10, 0.20
TIMEOUT_S = 300.0


def loop_s(trace: Trace) -> float:
    return attribute(trace).stages.denoise_s


def compared(model: str, session: Session) -> list[float | None]:
    """Relative errors of the speed-ups of ``model``; rank 0 prints them."""
    size = MODELS[model]
    job = Job(source=f"tiny-{model}", spec="serial", height=size, width=size, steps=STEPS)
    pipeline = replace(prepare(job).pipeline, vae=None)  # the loop alone is judged
    serial = prepare(job, pipeline)
    _alone(serial, session)
    alone_s = _alone(serial, session)
    if session.rank == 0:
        print(f"{model} {size} px: a step alone {alone_s / STEPS * 1e3:.0f} ms", flush=True)
    contenders = list(_contenders(job, serial, session))
    rounds: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for number in range(ROUNDS):
        for contender, seen in zip(contenders, rounds, strict=True):
            seen.append(_round(contender, serial, session))
        if session.rank == 0:
            print(f"  round {number + 1} of {ROUNDS} done", file=sys.stderr, flush=True)
    assert session.rank or alone_s > LEAST_STEP_S * STEPS, "the step is too short to judge by"
    return [
        _error(each.job.spec, seen, session) for each, seen in zip(contenders, rounds, strict=True)
    ]


class Contender(NamedTuple):
    """A strategy, ready to run."""

    job: Job
    prepared: Prepared
    transport: Distributed


def _contenders(job: Job, serial: Prepared, session: Session) -> Iterator[Contender]:
    """The strategies that the model can take, each of which has run once."""
    for spec in SPECS:
        try:
            prepared = prepare(replace(job, spec=spec), serial.pipeline)
            transport = Distributed(session, prepared.graph)
            runs_of(prepared, session, 1, 0, transport=transport)
        except (Infeasible, Unexecutable):
            continue
        yield Contender(replace(job, spec=spec), prepared, transport)


def _round(contender: Contender, serial: Prepared, session: Session) -> tuple[float, float]:
    """Predicted and measured speed-up."""
    job, prepared, transport = contender

    def together_s() -> float:
        (trace,) = runs_of(prepared, session, 0, 1, transport=transport)
        return loop_s(trace)

    runs = [partial(_alone, serial, session), together_s] * 2
    seconds = [run() for run in runs]
    predicted = _predicted(job, prepared, serial, session)
    seconds += reversed([run() for run in reversed(runs)])
    return predicted, statistics.median(seconds[::2]) / statistics.median(seconds[1::2])


def _error(spec: str, rounds: Sequence[tuple[float, float]], session: Session) -> float | None:
    """Relative error of the predicted speed-up, both the medians of all rounds, which rank 0 prints with
    the least and the largest error of a round; None on other ranks."""
    if session.rank:
        return None
    predicted, measured = (statistics.median(each) for each in zip(*rounds, strict=True))
    error = predicted / measured - 1
    errors = [expected / seen - 1 for expected, seen in rounds]
    spread = " ... ".join(f"{e:+.0%}" for e in (min(errors), max(errors)))
    print(
        f"  {spec:32} {predicted:5.2f}x, measured {measured:5.2f}x {error:+7.1%} ({spread})",
        flush=True,
    )
    return error


def _predicted(job: Job, prepared: Prepared, serial: Prepared, session: Session) -> float:
    """Speed-up as this machine is now."""
    serial_s = _predicted_alone(replace(job, spec="serial"), serial, session)
    found = measure_here(job, prepared, session, again=True)
    return serial_s / loop_s(predict(prepared, found.machine, session.backend)[0])


def _predicted_alone(job: Job, serial: Prepared, session: Session) -> float:
    """Predicted seconds of the loop on rank 0, measured now, the others waiting."""
    dist.barrier()
    seconds = 0.0
    if session.rank == 0:
        seconds = loop_s(predict(serial, measure_here(job, serial, again=True).machine, None)[0])
    dist.barrier()
    return seconds


def _alone(serial: Prepared, session: Session) -> float:
    """Seconds of the loop on rank 0, the others waiting."""
    dist.barrier()
    seconds = loop_s(serial.in_process().trace) if session.rank == 0 else 0.0
    dist.barrier()
    return seconds


def as_rank(place: Place, models: list[str]) -> None:
    torch.set_num_threads(1)
    pin_to_cores(place.local_rank)
    session = Session.join(place, TIMEOUT_S, "cpu", "bench_validate")
    errors = [error for model in models for error in compared(model, session)]
    session.leave()
    if place.rank:
        return
    sizes = [abs(error) for error in errors if error is not None]
    print(
        f"{len(sizes)} speed-ups: missed by {statistics.median(sizes):.1%} in the"
        f" median (wanted {MEDIAN:.0%}), {max(sizes):.1%} at worst (wanted {WORST:.0%})"
    )
    sys.exit(statistics.median(sizes) > MEDIAN or max(sizes) > WORST)


def main() -> None:
    models = sys.argv[1:] or list(MODELS)
    place = Place.of_environment()
    if place is not None:
        as_rank(place, models)
        return
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        __file__, *models,
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
