"""Plan files: one recommendation of ``paradiff plan``, as ``paradiff run`` takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from paradiff.config import Strict, load_yaml


class PlannedWorkload(Strict):
    """The fields of ``strategies.Workload``."""

    height: int
    width: int
    frames: int
    steps: int
    batch: int
    dtype: str


class PlanFile(Strict):
    """``NN-SPEC.plan.yaml``. ``fingerprint`` is that of the schedule that was simulated; ``set`` are the
    overrides of the topology."""

    schema_: Literal["paradiff.planfile/1"] = Field(alias="schema")
    model: str
    topology: str
    set: tuple[str, ...] = ()
    workload: PlannedWorkload
    runtime: Literal["eager", "compiled", "cuda-graph"] = "eager"
    spec: str
    placement: tuple[int, ...] = ()
    fingerprint: str
    predicted_latency_s: float


def load_plan(path: Path) -> PlanFile:
    """Read a plan file. Raises ConfigError with file, line and column."""
    return load_yaml(path, PlanFile)
