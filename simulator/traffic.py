"""What arrives: classes of requests with their shares, and when.

Decides how a mix and a trace are written (YAML, ``NAME:WEIGHT,KEY=VALUE``, CSV) and how arrival times
are drawn. Knows nothing of service times and queues.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from paradiff.config import ConfigError, Document, Name, Path_, Strict, load_yaml, nearest, problem
from paradiff.units import PositiveSeconds
from simulator.queueing import Floats, Requests

MAX_TRACE_ROWS = 5_000_000
TIME, MODEL = "arrival_s", "model"
"""Columns of a trace."""
Size = Annotated[int, Field(gt=0)]


class RequestClass(Strict):
    """Requests that are alike: one model at one size. ``deadline``: seconds from arrival to result."""

    model: str = Field(min_length=1)
    name: Name = ""
    """What traces and results call it; without it, its model."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the requests, next to the others' weights."""
    height: Size | None = None
    width: Size | None = None
    frames: Size | None = None
    steps: Size | None = None
    batch: Size = 1
    deadline: PositiveSeconds | None = None
    """From arrival to result; without it there is none."""

    @property
    def label(self) -> str:
        """What it is called in traces and results: its name, else its model."""
        return self.name or self.model


class MixFile(Strict):
    """The YAML form of a mix."""

    models: tuple[RequestClass, ...] = Field(min_length=1)
    """The classes."""

    @model_validator(mode="after")
    def _distinct(self) -> MixFile:
        seen: set[str] = set()
        for i, entry in enumerate(self.models):
            if entry.label in seen:
                raise problem(
                    "two classes have one name", entry.label, "a name for each", ("models", i)
                )
            seen.add(entry.label)
        return self


def load_mix(path: str | Path) -> tuple[RequestClass, ...]:
    """The classes of a mix file. Raises ConfigError."""
    return load_yaml(path, MixFile).models


def parse_mix(texts: Sequence[str]) -> tuple[RequestClass, ...]:
    """Classes as on the command line: ``sdxl:0.7,height=512,steps=30,deadline=8s``.

    Raises ConfigError. A name with a colon or a comma in it can be written in a mix file only.
    """
    data: list[dict[str, Any]] = []
    for text in texts:
        first, *others = text.split(",")
        model, _, weight = first.partition(":")
        entry: dict[str, Any] = {"model": model.strip()}
        if weight:
            entry["weight"] = weight.strip()
        for item in others:
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals or key in entry or key == "weight":
                keys = ", ".join(
                    k for k in RequestClass.model_fields if k not in ("model", "weight")
                )
                raise ConfigError(
                    f"--model {text}: {item.strip()!r} is not KEY=VALUE once, allowed keys: {keys}"
                )
            entry[key] = value
        data.append(entry)
    written: dict[Path_, str] = {("models", i): text for i, text in enumerate(texts)}
    document = Document(
        file="--model", data={"models": data}, places={}, keys={}, overrides=written
    )
    try:
        return document.validate(MixFile).models
    except ConfigError as error:
        raise ConfigError(str(error).replace("--set ", "--model ", 1)) from None


class Trace(NamedTuple):
    """Arrivals of a file: seconds from its first request, and the class of each where it says so."""

    arrival_s: Floats
    labels: tuple[str, ...] | None

    @property
    def rate_per_s(self) -> float:
        """Mean arrival rate: gaps per second."""
        return (len(self.arrival_s) - 1) / float(self.arrival_s[-1])


def load_trace(path: str | Path, classes: Sequence[RequestClass]) -> Trace:
    """Read ``arrival_s[,model]`` rows with a header line. Raises ConfigError with file and line.

    Times are seconds from any instant, ascending; ``model`` names a class of the mix. Other columns are
    not read.
    """
    names = [entry.label for entry in classes]
    times: list[float] = []
    labels: list[str] = []
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream)
            header = [cell.strip() for cell in next(rows, [])]
            if TIME not in header:
                raise ConfigError(
                    f"{path}:1: no column {TIME} (found: {', '.join(header) or 'nothing'}), "
                    f"allowed: a header line with {TIME} and, if wanted, {MODEL}"
                )
            at = header.index(TIME)
            of = header.index(MODEL) if MODEL in header else None
            for row in rows:
                if row:
                    where = f"{path}:{rows.line_num}"
                    times.append(_time(row, at, times, where))
                    if of is not None:
                        labels.append(_label(row, of, names, where))
                if len(times) > MAX_TRACE_ROWS:
                    raise ConfigError(f"{path}: too long, allowed: {MAX_TRACE_ROWS} rows at most")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a CSV file ({error}), allowed: UTF-8 text") from None
    if len(times) < 2 or times[-1] == times[0]:
        raise ConfigError(f"{path}: {len(times)} arrivals, allowed: two or more at different times")
    return Trace(np.array(times) - times[0], tuple(labels) if of is not None else None)


def _time(row: Sequence[str], at: int, before: Sequence[float], where: str) -> float:
    text = row[at] if at < len(row) else ""
    try:
        time_s = float(text)
    except ValueError:
        time_s = math.nan
    if not math.isfinite(time_s):
        raise ConfigError(f"{where}: {TIME} is not a number ({text!r}), allowed: seconds")
    if before and time_s < before[-1]:
        raise ConfigError(
            f"{where}: {TIME} goes back ({text} after {before[-1]:g}), allowed: ascending times"
        )
    return time_s


def _label(row: Sequence[str], of: int, names: Sequence[str], where: str) -> str:
    label = row[of].strip() if of < len(row) else ""
    if label not in names:
        shown = ", ".join(nearest(label, names))
        raise ConfigError(f"{where}: {MODEL} is not in the mix ({label!r}), allowed: {shown}")
    return label


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Arrivals to be drawn: ``rate_per_s`` and ``burstiness``, or a trace.

    Gaps are gamma distributed with shape ``burstiness`` and mean 1 / rate, as ``vllm bench serve``
    defines it: 1 is a Poisson process, less is burstier, more is more even. Classes are drawn by
    their shares unless the trace names them.
    """

    shares: tuple[float, ...]
    rate_per_s: float
    burstiness: float = 1.0
    trace: Trace | None = None
    trace_kinds: tuple[int, ...] | None = None

    @property
    def is_random(self) -> bool:
        """Whether two draws differ."""
        return self.trace is None or (self.trace_kinds is None and len(self.shares) > 1)

    def draw(
        self, count: int, seed: tuple[int, ...], load: float = 1.0, ahead: int = 0
    ) -> Requests:
        """``count`` requests (all of the trace, where there is one), arriving ``load`` times as fast,
        after ``ahead`` others (none before a trace).

        The same seed gives the same requests at any load and after any number of others, and fewer
        others are the last of more: what two systems are asked differs in nothing else.
        """
        gaps, kinds, gaps_ahead, kinds_ahead = (
            np.random.default_rng((*seed, stream)) for stream in range(4)
        )
        if self.trace is not None:
            arrival_s, ahead = self.trace.arrival_s / load, 0
        else:
            before, after = self._gaps_s(gaps_ahead, ahead)[::-1], self._gaps_s(gaps, count)
            arrival_s = np.cumsum(np.concatenate((before, after)) / load)
        if self.trace_kinds is not None:
            return Requests.at(arrival_s, np.array(self.trace_kinds))
        drawn = kinds.choice(len(self.shares), size=len(arrival_s) - ahead, p=self.shares)
        others = kinds_ahead.choice(len(self.shares), size=ahead, p=self.shares)[::-1]
        return Requests.at(arrival_s, np.concatenate((others, drawn)))

    def _gaps_s(self, rng: np.random.Generator, count: int) -> Floats:
        return rng.gamma(self.burstiness, 1 / self.burstiness, size=count) / self.rate_per_s


def traffic_of(
    classes: Sequence[RequestClass],
    rate_per_s: float | None = None,
    burstiness: float = 1.0,
    trace: Trace | None = None,
) -> Traffic:
    """The traffic of a mix at a rate, or as in ``trace`` (whose own shares then count)."""
    weights = np.array([entry.weight for entry in classes])
    kinds = None
    if trace is not None:
        rate_per_s = trace.rate_per_s
        if trace.labels is not None:
            numbers = {entry.label: i for i, entry in enumerate(classes)}
            kinds = tuple(numbers[label] for label in trace.labels)
            weights = np.bincount(kinds, minlength=len(classes))
    assert rate_per_s is not None
    return Traffic(
        shares=tuple((weights / weights.sum()).tolist()),
        rate_per_s=rate_per_s,
        burstiness=burstiness,
        trace=trace,
        trace_kinds=kinds,
    )
