"""What this machine is measured to do for one schedule, kept for the next time, and the prediction.

Decides what is missing, who measures it and where it is kept: a file for each machine, versions,
model, precision and group of ranks, in the user's cache directory, replaced whole. On a CPU works are
timed (``paradiff.executor.measure_works``) and calls through the executor (``measure_calls``), on a GPU
kernels (``measure``) and calls of the library alone (``measure_network``).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path

import paradiff
from analysis.tracks import in_one_process, modelled_memory, simulated
from paradiff.cli.common import json_text, write_file
from paradiff.config import ConfigError
from simulator.costs import ITEMSIZE, CostModel
from simulator.engine import Costs, Flows, simulate
from simulator.gpu import load_gpu
from simulator.measured import Key, Row, kernels_of, tables
from simulator.measured_machine import SCHEMA, CallTime, MeasuredMachine, in_turn
from simulator.network import Network
from simulator.symmetry import whole

if TYPE_CHECKING:
    from paradiff.executor.job import Job, Prepared
    from paradiff.executor.measure_calls import Call
    from paradiff.executor.session import Session
    from paradiff.graph import Work
    from paradiff.trace import Trace, Tracks

ALIKE = 1.25
"""Calls among computations of so many times the length, or one in so many, need not be timed again."""
NO_MATTER_S = 100e-6
"""Computations as short as this are alike."""
BESIDE_BYTES = 2**22
"""Of the gather that compute runs beside."""


@dataclass(frozen=True)
class Measured:
    """A machine, and how much of it was measured just now (the rest was known)."""

    machine: MeasuredMachine
    new: int


def measure_here(
    job: Job, prepared: Prepared, session: Session | None = None, *, again: bool = False
) -> Measured:
    """All that predicting ``prepared`` needs; all ranks of ``session`` take part and get the same.

    ``again``: do not use what is kept. Raises RunFailed; ConfigError for a kept file that is broken.
    """
    about = _about(job, prepared, session)
    hosts = tuple(_told(session, socket.gethostname()))
    path = _path(about, hosts)
    kept = "" if again else _read(path)
    kept = _told(session, kept)[0]
    known = (
        MeasuredMachine.from_json(kept, str(path))
        if kept
        else MeasuredMachine(about=about, hosts=hosts)
    )
    if prepared.device.startswith("cuda"):
        if job.dtype not in ITEMSIZE:
            raise ConfigError(f"--dtype {job.dtype} on a GPU, allowed: {', '.join(ITEMSIZE)}")
        found = _with_kernels(known, prepared, session)
    else:
        found = _with_works(known, job, prepared, session)
    own = found
    if session is not None and session.world_size > 1:
        found, own = _with_calls(found, prepared, session)
    names = ("works", "kernels", "calls")
    new = sum(len(set(getattr(found, name)) - set(getattr(known, name))) for name in names)
    if new and (session is None or session.rank == 0):
        # what cannot be kept costs time the next time, not this run
        with suppress(OSError, ConfigError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json_text(found.to_json()))
    return Measured(own, new)


def predict(
    prepared: Prepared, machine: MeasuredMachine, backend: str | None, gpu: str | None = None
) -> tuple[Trace, Tracks]:
    """The simulated run: processes over ``backend``, or (None) all ranks in one process, in turn.
    ``gpu``: the profile of the device where that is a GPU."""
    graph, profile = prepared.graph, prepared.pipeline.network.profile
    costs: Costs = machine.costs()
    if prepared.device.startswith("cuda"):
        costs = _kernel_costs(prepared, machine, gpu)
    if backend is None:
        trace = in_turn(graph, costs)
        return trace, in_one_process(graph, trace, profile)
    library, network, flows = machine.backend(backend), Network(machine.topology()), list[Flows]()
    trace = simulate(graph, network, costs, backend=library, periodic=False, flows=flows)
    memory = modelled_memory(graph, trace, profile)
    return trace, simulated(flows, network, whole(graph), memory)


def _kernel_costs(prepared: Prepared, machine: MeasuredMachine, gpu: str | None) -> CostModel:
    assert gpu is not None
    meta = dict(prepared.graph.meta)
    rows = {(Key(kind, dims), meta["dtype"]): row for (kind, dims), row in machine.kernels.items()}
    return CostModel(
        prepared.pipeline.network.profile,
        [load_gpu(gpu)] * len(machine.hosts),
        meta["dtype"],
        kernels=tables(rows, meta["dtype"]),
    )


# ------------------------------------------------------------------------------------------ the cache


def _about(job: Job, prepared: Prepared, session: Session | None) -> dict[str, str]:
    """All that another time may differ in."""
    from paradiff.executor.measure import machine

    affinity = getattr(os, "sched_getaffinity", None)
    return {
        **machine(job.device.partition(":")[0]),
        "paradiff": paradiff.__version__,
        "diffusers": version("diffusers"),
        "model": job.source,
        "parameters": str(prepared.pipeline.network.profile.denoiser.params),
        "dtype": job.dtype,
        "cores": str(len(affinity(0)) if affinity else os.cpu_count()),
        "processes": str(1 if session is None else session.world_size),
    }


def _path(about: Mapping[str, str], hosts: Sequence[str]) -> Path:
    key = hashlib.sha256(repr((SCHEMA, sorted(about.items()), hosts)).encode()).hexdigest()[:16]
    name = about["model"].rstrip("/").rpartition("/")[2]
    return user_cache_path("paradiff") / "measured" / f"{name}-{key}.json"


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""


def _told(session: Session | None, own: str) -> list[str]:
    """What every rank says."""
    return [own] if session is None else session.gather_text(own)


# ------------------------------------------------------------------------------------------ measuring


def _with_works(
    known: MeasuredMachine, job: Job, prepared: Prepared, session: Session | None
) -> MeasuredMachine:
    """All ranks measure at the same time: what they share is shared in the run too."""
    from paradiff.executor.measure_works import measure_works, works_of

    missing = works_of(prepared.graph) - known.works.keys()
    if not missing:
        return known

    def agree(done: bool) -> bool:
        return all(_told(session, "done" * done))

    timed = measure_works(job, prepared.pipeline, missing, agree)
    every = [json.loads(text) for text in _told(session, json.dumps(timed))]
    new = {key: tuple(float(each[key]) for each in every) for key in sorted(every[0])}
    return replace(known, works={**new, **known.works})


def _with_kernels(
    known: MeasuredMachine, prepared: Prepared, session: Session | None
) -> MeasuredMachine:
    """The first rank measures: its device stands for all."""
    from paradiff.executor import measure

    graph, profile = prepared.graph, prepared.pipeline.network.profile
    rows: list[tuple[Key, Row]] = []
    if session is None or session.rank == 0:
        for key in kernels_of(graph, profile):
            if key not in known.kernels:
                with suppress(measure.NotMeasurable):
                    timing = measure.measure(key.kind, key.dims, dict(graph.meta)["dtype"], "cuda")
                    rows.append((key, Row(*timing)))
    told = json.loads(_told(session, json.dumps(rows))[0])
    new = {Key(kind, tuple(dims)): Row(*row) for (kind, dims), row in told}
    return replace(known, kernels={**known.kernels, **new})


def _with_calls(
    known: MeasuredMachine, prepared: Prepared, session: Session
) -> tuple[MeasuredMachine, MeasuredMachine]:
    """All that is known now, and what this schedule's prediction rests on: without the calls that others
    make after other computations."""
    from paradiff.executor.measure_calls import calls_for, measure_calls

    is_gpu, costs = session.device.type == "cuda", known.costs()

    def work_s(work: Work, rank: int) -> float:
        return 0.0 if is_gpu else costs.compute(work, rank).device_s

    calls = calls_for(prepared.graph, known.hosts, work_s)
    wanted = [call for call in calls if _timed(call, known) is None]
    seconds = _library_s(session, wanted) if is_gpu else measure_calls(session, wanted)
    new = [CallTime(**c._asdict(), time_s=s) for c, s in zip(wanted, seconds, strict=True)]
    found = replace(known, calls=(*known.calls, *new))
    if not is_gpu and found.lost is None:
        found = replace(found, lost=_lost(session))
    timed = (_timed(call, found) for call in calls)
    return found, replace(found, calls=tuple(each for each in timed if each is not None))


def _timed(call: Call, machine: MeasuredMachine) -> CallTime | None:
    """That call after computations alike, if it has been timed."""
    found = (each for each in machine.calls if each[:4] == call[:4])
    return next((each for each in found if are_alike(each.between_s, call.between_s)), None)


def are_alike(some_s: Sequence[float], others_s: Sequence[float]) -> bool:
    """Whether computations, the shortest to the longest, need not be told apart."""
    return len(some_s) == len(others_s) and all(
        max(a_s, b_s) <= max(ALIKE * min(a_s, b_s), NO_MATTER_S)
        for a_s, b_s in zip(some_s, others_s, strict=True)
    )


def _library_s(session: Session, calls: Sequence[Call]) -> Iterator[float]:
    """Seconds of the library alone: what the framework adds on a GPU is in the cost model."""
    from paradiff.executor.measure_network import ITEM, Case, measure

    cases = []
    for call in calls:
        count = len(call.ranks)
        size = call.nbytes * (count if call.call == "all_gather" else 1)
        whole = -(-size // (count * ITEM)) * count * ITEM
        if call.kind == "collective":
            cases.append(Case(call.call, call.ranks, "all", whole))
        else:
            cases.append(Case("p2p", call.ranks, "one" if call.kind == "p2p" else "both", whole))
    return (timed.time_s for timed in measure(session, cases))


def _lost(session: Session) -> float:
    """Share of a gather's time by which it lengthens compute beside it."""
    from paradiff.executor.measure_network import Case, measure

    ranks = tuple(range(session.world_size))
    (timed,) = measure(session, [Case("all_gather", ranks, "all", BESIDE_BYTES)])
    lost = (timed.together_s - timed.compute_s) / timed.time_s
    return float(min(max(lost, 0.0), 1.0))
