"""Plan files: one recommendation of ``paradiff plan``, as ``paradiff run`` takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from paradiff.config import Strict, load_yaml


class PlannedWorkload(Strict):
    """The fields of ``strategies.Workload``."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    frames: int
    """Of a clip; 1: an image."""
    steps: int
    """Of the denoising loop."""
    batch: int
    """Images or clips per request."""
    dtype: str
    """Precision."""


class PlanFile(Strict):
    """``NN-SPEC.plan.yaml``. ``fingerprint`` is that of the schedule that was simulated; ``set`` are the
    overrides of the topology."""

    schema_: Literal["paradiff.planfile/1"] = Field(alias="schema")
    """Version of this form."""
    model: str
    topology: str
    set: tuple[str, ...] = ()
    """What is changed in the box, as by ``--set``."""
    workload: PlannedWorkload
    """What a request asks for."""
    runtime: Literal["eager", "compiled", "cuda-graph"] = "eager"
    spec: str
    """The strategy."""
    placement: tuple[int, ...] = ()
    """GPU of each rank, by its index in the box."""
    fingerprint: str
    """Of the schedule that was simulated: a run checks that it carries out the same."""
    predicted_latency_s: float
    """Of one request."""


def load_plan(path: Path) -> PlanFile:
    """Read a plan file. Raises ConfigError with file, line and column."""
    return load_yaml(path, PlanFile)
