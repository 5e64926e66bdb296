"""Many plans at once: every combination of models, boxes, resolutions, batches and numbers of GPUs.

Decides what a sweep file says, the order of the combinations, what a row holds, and how finished work is
kept. A combination is one plan; what it found is written to a part of its own as soon as it is there,
under a name made of everything it depends on. A sweep that was killed finds its parts again and ends
with the same bytes. Where combinations run is decided in ``simulator.parallel``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

import paradiff
from analysis.attribution import Stages
from paradiff.config import Strict
from paradiff.profiles import Profile
from paradiff.strategies import Workload, parse_spec
from simulator import measured, planner
from simulator.gpu import Dtype, Runtime, load_gpu
from simulator.parallel import ray_results, results
from simulator.topology import Topology

Count = Annotated[int, Field(gt=0)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]
RESOLUTION = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", re.ASCII)
DEFAULT = "default"


class SweepFile(Strict):
    """The YAML form. Left out: the model's own resolution and steps, batch 1, all GPUs of the box."""

    models: Names
    topologies: Names
    resolutions: Names = (DEFAULT,)
    """``WIDTHxHEIGHT``, ``WIDTHxHEIGHTxFRAMES``, or ``default``."""
    batches: tuple[Count, ...] = Field(default=(1,), min_length=1)
    degrees: tuple[Count, ...] | None = Field(default=None, min_length=1)
    """Numbers of GPUs to use."""
    steps: Count | None = None
    dtype: Dtype = "bf16"
    runtime: Runtime = "eager"
    strategies: tuple[str, ...] = ()
    objective: planner.Objective = "latency"
    exact_only: bool = False
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    format: Literal["csv", "parquet"] = "csv"
    """Of the table that is written."""

    @field_validator("resolutions")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if text != DEFAULT and not RESOLUTION.fullmatch(text):
                raise ValueError(
                    f"not a resolution ({text!r}), allowed: 1024x576, 1024x576x25, {DEFAULT}"
                )
        return value

    @field_validator("strategies")
    @classmethod
    def _parsed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_spec(text)
        return value


class Combination(NamedTuple):
    """One plan to make. ``reason``: why there is none to make."""

    request: planner.Request
    reason: str | None


def combinations(
    file: SweepFile, models: Sequence[Profile], boxes: Sequence[Topology]
) -> Iterator[Combination]:
    """In the order of the file, the last key fastest; ``models`` and ``boxes`` are those it names."""
    goal = planner.Goal(
        objective=file.objective, exact_only=file.exact_only, max_staleness=file.max_staleness
    )
    sizes = (file.resolutions, file.batches, file.degrees or (None,))
    for profile, box, resolution, batch, degree in product(models, boxes, *sizes):
        gpus = degree or len(box.gpus)
        request = planner.Request(
            profile=profile,
            topology=box,
            workload=_workload(profile, resolution, batch, file),
            gpus=gpus,
            runtime=file.runtime,
            specs=file.strategies,
            goal=goal,
        )
        missing = f"{gpus} GPUs of {len(box.gpus)}" if gpus > len(box.gpus) else None
        yield Combination(request, missing)


def _workload(profile: Profile, resolution: str, batch: int, file: SweepFile) -> Workload:
    sizes = {key: profile.defaults[key] for key in ("height", "width", "frames", "steps")}
    found = RESOLUTION.fullmatch(resolution)
    if found is not None:
        sizes |= {"width": int(found[1]), "height": int(found[2])}
        sizes |= {"frames": int(found[3])} if found[3] else {}
    if file.steps is not None:
        sizes["steps"] = file.steps
    return Workload(**sizes, batch=batch, dtype=file.dtype)


# --------------------------------------------------------------------------------------- rows

Row = dict[str, Any]
KEYS = ("model", "topology", "gpus", "runtime", "objective", "rank")
STAGES = tuple(f"stages_{f.name}" for f in fields(Stages))
COLUMNS = (
    *KEYS[:2],
    *(f.name for f in fields(Workload)),
    *KEYS[2:],
    *(
        name
        for f in fields(planner.Candidate)
        for name in (STAGES if f.name == "stages" else (f.name,))
    ),
)
"""Of a result: what was asked, then the fields of a candidate."""


def rows(combination: Combination) -> list[Row]:
    """What became of every strategy, best first (``rank`` 1, 2, ...), those that cannot run last
    (no rank). One row without a strategy where there was no plan to make."""
    request, reason = combination
    asked = {
        "model": request.profile.name,
        "topology": request.topology.name,
        **asdict(request.workload),
        "gpus": request.gpus,
        "runtime": request.runtime,
        "objective": request.goal.objective,
    }
    empty: Row = dict.fromkeys(COLUMNS)
    if reason is not None:
        return [empty | asked | {"feasible": False, "reason": reason}]
    plan = planner.plan(request)
    ranked = [(rank, c) for rank, c in enumerate(plan.ranked, 1)]
    return [
        empty | asked | {"rank": rank} | _flat(candidate)
        for rank, candidate in (*ranked, *((None, c) for c in plan.rejected))
    ]


def _flat(candidate: planner.Candidate) -> Row:
    row = asdict(candidate)
    stages = row.pop("stages") or {}
    row |= {f"stages_{key}": value for key, value in stages.items()}
    seconds = [key for key in row if key.endswith("_s") and row[key] is not None]
    row |= {key: float(row[key]) for key in seconds}
    places = row["placement"]
    row["placement"] = None if places is None else " ".join(map(str, places))
    return row


def to_csv(found: Sequence[Row]) -> bytes:
    """All rows under a header; numbers in full, nothing for what is not known."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return stream.getvalue().encode()


def to_parquet(found: Sequence[Row]) -> bytes:
    """All rows as a parquet file. Raises ModuleNotFoundError without pyarrow."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: [row[name] for row in found] for name in COLUMNS}
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


# --------------------------------------------------------------------------------------- work


def run(
    work: Sequence[Combination],
    parts: Path,
    processes: int = 1,
    ray_address: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """All rows in the order of ``work``, the same wherever and in however many attempts they are made.

    ``parts``: folder of what is finished, left for the caller to remove. Raises OSError where it cannot
    be written or no Ray cluster answers.
    """
    tables = measured.fingerprint()
    files = [parts / f"{_key(each, tables)}.json" for each in work]
    left = [i for i, file in enumerate(files) if _read(file) is None]
    done = len(work) - len(left)
    inputs = [work[i] for i in left]
    made = (
        results(rows, inputs, processes)
        if ray_address is None
        else ray_results(rows, inputs, ray_address)
    )
    for index, output in made:
        _write(files[left[index]], json.dumps(output, allow_nan=False))
        done += 1
        if progress is not None:
            progress(done, len(work))
    return [row for file in files for row in _read(file) or ()]


def _read(file: Path) -> list[Row] | None:
    """The rows of a finished part; None where it is not there, or not whole."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if found and isinstance(found, list) else None


def _write(file: Path, text: str) -> None:
    """Whole or not at all, though the power is cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    with staged.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    staged.replace(file)


def _key(combination: Combination, tables: str) -> str:
    """Hash of everything a part depends on: the request with all it holds, its GPUs, the fingerprint of
    measured ``tables``, the program's version."""
    gpus = [load_gpu(name) for name in dict.fromkeys(combination.request.topology.profiles)]
    text = f"{paradiff.__version__}\n{tables}\n{combination!r}\n{gpus!r}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
