"""What a strategy costs the result, as somebody has measured it: published rows, or the user's own run.

A measurement holds for the model, size and number of steps that it was made with, and for strategies
that read the same values. Axes that keep the result (cfg, data, tensor, ulysses, ring) and parameters
that only move messages do not matter. What has more synchronous steps than a measured run is said to
lose at most as much. Nothing is carried over to another model, size or number of steps.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paradiff.config import ConfigError, find, read_text
from paradiff.profiles import Profile
from paradiff.strategies import AXES, AXIS_PARAMETERS, Spec, SpecError, Workload, facts, parse_spec

METRICS: Mapping[str, str] = {
    "lpips": "LPIPS to one GPU's picture of the same seed",
    "fid": "rise of the FID over one GPU's",
    "clip": "points of the CLIP score lost to one GPU's",
    "ssim": "1 - SSIM to one GPU's picture of the same seed",
    "l2": "relative L2 of the final latent to one GPU's",
}
"""What a loss may be measured as: 0 is nothing lost, more is worse."""
COLUMNS = (
    "id", "model", "height", "width", "steps", "spec", "metric", "value", "baseline", "sampler",
    "source", "where", "notes",
)  # fmt: skip
OF_ONE_GPU = ("fid", "clip")
"""Metrics of the pictures alone: the loss is against ``baseline``, that of one GPU."""
SCHEMA = "paradiff.validate-fidelity/1"
FROM_FIDELITY: Mapping[str, str] = {
    "lpips": "lpips",
    "ssim": "ssim",
    "relative_l2": "l2",
    "clip_text_loss": "clip",
}
"""Metrics of ``paradiff validate fidelity`` -> ours."""
MESSAGES_ONLY = ("bucket", "slice", "prepost", "offload")
"""Parameters that change when something is sent or where it is kept, not what is read."""
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measurement. ``loss`` in the metric's unit; ``params`` of the denoiser, where it is said."""

    model: str
    height: int
    width: int
    frames: int
    steps: int
    spec: str
    metric: str
    loss: float
    source: str
    params: int | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a spec: the loss, or where ``at_most`` that it is no larger, and who says so."""

    loss: float
    at_most: bool
    source: str

    @property
    def said(self) -> str:
        """The source in words, after the loss."""
        return f"at most: {self.source}" if self.at_most else self.source


@dataclass(frozen=True, slots=True)
class Quality:
    """All measurements at hand, the user's own before published ones."""

    rows: tuple[Measured, ...] = ()

    def of(self, spec: Spec, profile: Profile, workload: Workload, metric: str) -> Known | None:
        """What ``metric`` has been measured to be; None where nobody has."""
        wanted = _read_map(spec)
        here = facts(spec, workload).synchronous_steps
        bound = None
        for row in self._for(profile, workload, metric):
            measured = parse_spec(row.spec)
            if _read_map(measured) != wanted:
                continue
            fresh = facts(measured, workload).synchronous_steps
            if fresh == here:
                return Known(row.loss, False, row.source)
            if fresh < here and (bound is None or fresh > bound[0]):
                bound = fresh, Known(row.loss, True, f"{row.source}, of {row.spec}")
        return None if bound is None else bound[1]

    def _for(self, profile: Profile, workload: Workload, metric: str) -> Iterator[Measured]:
        for row in self.rows:
            size = row.height, row.width, row.frames, row.steps
            same = size == (workload.height, workload.width, workload.frames, workload.steps)
            known = row.params in (None, profile.denoiser.params)
            if row.metric == metric and row.model == profile.name and same and known:
                yield row


NOTHING_KNOWN = Quality()


def _read_map(spec: Spec) -> tuple[str, frozenset[tuple[str, str]]]:
    """What decides which values a run reads, but for the warm-up."""
    name, kept = spec.name, dict(spec.options)
    dropped = {*AXES, *(key for of in AXIS_PARAMETERS.values() for key in of), "warmup"}
    dropped |= {*MESSAGES_ONLY, *([] if "fp8" in spec.places("weights") else ["weights"])}
    dropped |= {"vae"} if kept.get("vae") == "split" else set()
    defaults = {
        "distrifusion": {"mode": "corrected_async_gn"},
        "pcpp": {"mode": "corrected_async_gn", "portion": "0.3"},
        "asyncdiff": {"stride": "1"},
        "patch": {"mode": "sync"},
        "pipefusion": {"patches": kept.get("pipefusion", "")},
    }.get(name, {})
    if name == "pipefusion" and kept.get("text") != "per_patch":
        dropped |= {"pipefusion", "stages"}  # where the cuts are decides nothing, patches do
    kept = defaults | {key: value for key, value in kept.items() if key not in dropped}
    return name, frozenset(kept.items())


# ---------------------------------------------------------------------------------------------- files


def load_quality(own: Sequence[Path] = ()) -> Quality:
    """The shipped measurements after those of ``own`` files: the JSON of ``paradiff validate fidelity``,
    or a CSV in the columns of the shipped one. Raises ConfigError."""
    rows = [row for file in own for row in _load(file)]
    return Quality((*rows, *_load_csv(find("quality", "published", ".csv"))))


def _load(file: Path) -> list[Measured]:
    return _load_csv(file) if file.suffix == ".csv" else _load_json(file)


def _load_csv(file: Path) -> list[Measured]:
    reader = csv.DictReader(io.StringIO(read_text(file, MAX_BYTES)))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        found = ", ".join(reader.fieldnames or ()) or "nothing"
        raise ConfigError(f"{file}:1: columns {found}, allowed: {', '.join(COLUMNS)}")
    return [_csv_row(row, f"{file}:{reader.line_num}") for row in reader]


def _csv_row(row: Mapping[str, str], at: str) -> Measured:
    metric = row["metric"]
    if metric not in METRICS:
        raise ConfigError(f"{at}: metric {metric!r}, allowed: {', '.join(METRICS)}")
    loss = _number(row["value"], at, "value")
    if metric in OF_ONE_GPU:
        loss = (loss - _number(row["baseline"], at, "baseline")) * (1 if metric == "fid" else -1)
    sizes = {name: int(_number(row[name], at, name)) for name in ("height", "width", "steps")}
    source = ", ".join(filter(None, (row["source"], row["where"], row["sampler"], row["notes"])))
    return Measured(
        model=row["model"],
        frames=1,
        **sizes,
        spec=_spec(row["spec"], at),
        metric=metric,
        loss=round(loss, 6),
        source=source,
    )


def _number(text: str, at: str, column: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{at}: {column} {text!r}, allowed: a number, 0 or more")
    return value


def _spec(text: Any, at: str) -> str:
    try:
        return parse_spec(str(text)).text
    except SpecError as error:
        raise ConfigError(f"{at}: spec {text!r}: {error}") from None


def _load_json(file: Path) -> list[Measured]:
    text = read_text(file, MAX_BYTES)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ConfigError(f"{file}: not what `paradiff validate fidelity` writes ({SCHEMA})")
    if data.get("weights") != "trained":
        raise ConfigError(
            f"{file}: measured on random weights, which say nothing of a model, allowed: trained ones"
        )
    try:
        return list(_json_rows(data, str(file)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: not a whole {SCHEMA}: {type(error).__name__} {error}") from None


def _json_rows(data: Mapping[str, Any], file: str) -> Iterator[Measured]:
    own = Measured(
        model=str(data["model"]),
        height=int(data["height"]),
        width=int(data["width"]),
        frames=int(data["frames"]),
        steps=0,
        spec="serial",
        metric="",
        loss=0.0,
        source="",
        params=int(data["params"]),
    )
    for result in data["results"]:
        said = f"{file}: mean of {int(data['samples'])} samples, sampler {result['scheduler']}"
        for name in FROM_FIDELITY.keys() & result["final"].keys():
            mean = float(result["final"][name]["mean"])
            if not math.isfinite(mean):
                raise ConfigError(
                    f"{file}: {result['spec']}: {name} {mean}, allowed: a finite number"
                )
            yield replace(
                own,
                spec=_spec(result["spec"], file),
                steps=int(result["steps"]),
                metric=FROM_FIDELITY[name],
                loss=1 - mean if name == "ssim" else mean,
                source=said,
            )
