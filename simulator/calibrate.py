"""A GPU profile corrected by measured traces: its matmul, attention and memory rates, with residuals.

A trace says how long each compute op of its graph kept a device busy. The graph is built again from the
trace's own facts, the cost model prices the same work, and three factors (on the matmul rates, the
attention rates and the memory bandwidth) are fitted to the ratios. Errors are reported on ops that the
factors were not fitted on: a trace left out where there are several, halves of its ops otherwise.
Factors never lift a rate above the device's peak.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from ruamel.yaml import YAML

from paradiff.config import ConfigError, find
from paradiff.graph import Work
from paradiff.profiles import Profile
from paradiff.strategies import Infeasible, SpecError, Workload, build, parse_spec
from paradiff.trace import Trace, TraceMismatch, read_chrome_trace
from simulator.costs import CostModel, Runtime
from simulator.gpu import BOOST, Gpu, load_gpu

SLOWEST = 1 / 20
"""A rate below this share of the profile's is another GPU, not a correction."""
ALIKE = 0.02
"""Weight that draws the three factors together where the ops cannot tell them apart."""
LEAST_OPS = 4
LEAST_S = 20e-6
"""Shorter ops are the clock's."""


class Seen(NamedTuple):
    """One piece of work and the median of its measured times. ``trace`` numbers the file."""

    trace: int
    profile: Profile
    dtype: str
    work: Work
    seconds: float


class Factors(NamedTuple):
    """What the rates of a profile are multiplied by."""

    matmul: float
    attention: float
    memory: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """``before`` and ``held_out``: predicted / measured - 1 of each op with the profile as it was, and
    with factors fitted without it."""

    factors: Factors
    before: tuple[float, ...]
    held_out: tuple[float, ...]


def load_trace(path: Path) -> Trace:
    """A trace with the facts of its making. Raises ConfigError."""
    try:
        trace = read_chrome_trace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except TraceMismatch as error:
        raise ConfigError(f"{path}: {error}") from None
    missing = {"model", "spec", "dtype", "height", "width"} - dict(trace.meta).keys()
    if missing:
        what = f"a trace without {', '.join(sorted(missing))}"
        raise ConfigError(f"{path}: {what}, allowed: one that paradiff run wrote")
    return trace


def observations(number: int, path: Path, trace: Trace, profile: Profile) -> Iterator[Seen]:
    """The distinct work of a trace. Raises ConfigError where its spans are not those of its graph."""
    meta = dict(trace.meta)
    try:
        sizes = {name: int(meta[name]) for name in ("height", "width", "frames", "steps", "batch")}
        graph = build(parse_spec(meta["spec"]), profile, Workload(**sizes, dtype=meta["dtype"]))
    except (KeyError, ValueError, SpecError, Infeasible) as error:
        raise ConfigError(f"{path}: its graph cannot be built ({error})") from None
    works = {i.id: i.op.work for i in graph.instances() if i.op.kind == "compute"}
    times: dict[Work, list[float]] = {}
    for span in trace.expanded().spans:
        if span.kind != "compute":
            continue
        work = works.get(span.id)
        if work is None:
            raise ConfigError(f"{path}: op {span.id} is not in the graph of {meta['spec']}")
        times.setdefault(work, []).append(span.busy_s)
    for work, seconds in times.items():
        middle = statistics.median(seconds)
        if middle > LEAST_S:
            yield Seen(number, profile, meta["dtype"], work, middle)


def scaled(gpu: Gpu, factors: Factors, name: str) -> Gpu:
    """The profile with its rates multiplied."""
    matmul = {
        dtype: figure.model_copy(update={"value": figure.value * factors.matmul})
        for dtype in ("fp16", "bf16", "fp32")
        for figure in [gpu.matmul.of(dtype)]
    }
    attention = tuple(
        f.model_copy(update={"value": f.value * factors.attention}) for f in gpu.attention
    )
    memory = gpu.memory_bandwidth
    memory = memory.model_copy(update={"value": memory.value * factors.memory})
    changed = {
        "name": name,
        "matmul": gpu.matmul.model_copy(update=matmul),
        "attention": attention,
        "memory_bandwidth": memory,
    }
    return gpu.model_copy(update=changed)


def ceilings(gpu: Gpu) -> Factors:
    """The largest factors that keep every rate at its peak (boost included)."""
    return Factors(
        min(
            BOOST * gpu.peak.of(d).value / gpu.matmul.of(d).value for d in ("fp16", "bf16", "fp32")
        ),
        min(BOOST * gpu.peak.half / f.value for f in gpu.attention),
        gpu.memory_bandwidth_peak.value / gpu.memory_bandwidth.value,
    )


class _Predictor:
    """Predicted seconds of observations with a profile's rates multiplied."""

    def __init__(self, gpu: Gpu, runtime: Runtime) -> None:
        self.gpu, self.runtime = gpu, runtime

    def __call__(self, seen: Sequence[Seen], factors: Factors) -> NDArray[np.float64]:
        gpu = scaled(self.gpu, factors, f"{self.gpu.name}-fitted")
        models: dict[tuple[str, str], CostModel] = {}
        found = []
        for each in seen:
            key = (each.profile.name, each.dtype)
            if key not in models:
                models[key] = CostModel(each.profile, [gpu], each.dtype, self.runtime)
            found.append(models[key].compute(each.work, 0).device_s)
        return np.array(found)


def fit(seen: Sequence[Seen], gpu: Gpu, runtime: Runtime = "eager") -> Fit:
    """Factors and errors. Raises ConfigError for too few ops to hold any out."""
    if len(seen) < LEAST_OPS:
        raise ConfigError(
            f"{len(seen)} distinct ops longer than {LEAST_S * 1e6:g} us, allowed: {LEAST_OPS} or more "
            "(more models, sizes or strategies)"
        )
    predict = _Predictor(gpu, runtime)
    as_it_is = predict(seen, Factors(1, 1, 1)) / _seconds(seen) - 1
    held_out = np.concatenate(
        [
            predict(out, _factors(kept, gpu, predict)) / _seconds(out) - 1
            for kept, out in _folds(seen)
        ]
    )
    factors = _factors(seen, gpu, predict)
    if min(factors) < 1.01 * SLOWEST:
        raise ConfigError(
            f"the ops take more than {1 / SLOWEST:.0f} times what a {gpu.name} should, allowed: traces "
            "of the GPU that --gpu names"
        )
    return Fit(
        factors=factors,
        before=tuple(map(float, as_it_is)),
        held_out=tuple(map(float, held_out)),
    )


def _seconds(seen: Iterable[Seen]) -> NDArray[np.float64]:
    return np.array([each.seconds for each in seen])


def _folds(seen: Sequence[Seen]) -> Iterator[tuple[list[Seen], list[Seen]]]:
    """(to fit on, to score on): each trace left out, or each half of one trace's ops by length."""
    numbers = sorted({each.trace for each in seen})
    marks = [each.trace for each in seen]
    if len(numbers) == 1:
        order = sorted(range(len(seen)), key=lambda i: (seen[i].seconds, i))
        marks = [0] * len(seen)
        for place, i in enumerate(order):
            marks[i] = place % 2
    for mark in sorted(set(marks)):
        kept = [each for each, m in zip(seen, marks, strict=True) if m != mark]
        yield kept, [each for each, m in zip(seen, marks, strict=True) if m == mark]


def _factors(seen: Sequence[Seen], gpu: Gpu, predict: _Predictor) -> Factors:
    """Least squares in log(predicted / measured), weighing the ops alike."""
    from scipy.optimize import least_squares

    measured = np.log(_seconds(seen))

    def missed(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        residual = np.log(predict(seen, Factors(*np.exp(logs)))) - measured
        apart = ALIKE * (logs - logs.mean())
        return np.concatenate([residual / np.sqrt(len(seen)), apart])

    top = np.log(ceilings(gpu))
    least = np.full(3, np.log(SLOWEST))
    start = np.clip(np.zeros(3), least + 1e-6, top - 1e-6)
    found = least_squares(
        missed, start, bounds=(least, np.maximum(top, least + 1e-5)), diff_step=1e-3
    )
    return Factors(*map(float, np.exp(found.x)))


def corrected_yaml(gpu_name: str, name: str, found: Fit, source: str) -> str:
    """The profile's file with the corrected rates, comments kept. Raises ConfigError where the result is
    no profile."""
    path = find("gpus", gpu_name)
    new = scaled(load_gpu(path), found.factors, name)
    yaml = YAML(typ="rt")
    yaml.width, yaml.preserve_quotes = 4096, True
    data = yaml.load(path.read_text(encoding="utf-8"))
    data["name"] = name
    for dtype in ("fp16", "bf16", "fp32"):
        _note(data["matmul"][dtype], new.matmul.of(dtype).value, "TFLOP/s", 1e12, source)
    for entry, figure in zip(data["attention"], new.attention, strict=True):
        _note(entry, figure.value, "TFLOP/s", 1e12, source)
    _note(data["memory_bandwidth"], new.memory_bandwidth.value, "GB/s", 1e9, source)
    out = io.StringIO()
    yaml.dump(data, out)
    Gpu.model_validate(YAML(typ="safe", pure=True).load(out.getvalue()))
    return out.getvalue()


def _note(entry: dict[str, object], value: float, unit: str, size: float, source: str) -> None:
    before = entry["value"]
    entry |= {"value": f"{value / size:.5g} {unit}", "kind": "measured"}
    entry["source"] = f"{source}; was {before}"


def summary(found: Fit) -> Iterator[str]:
    """The fit in words."""
    named: Mapping[str, float] = found.factors._asdict()
    yield ", ".join(f"{name} x {value:.3f}" for name, value in named.items())
    for words, errors in (("as it was", found.before), ("fitted without it", found.held_out)):
        sizes = np.abs(errors)
        yield (
            f"an op is missed by {np.median(sizes):.1%} in the median, {np.quantile(sizes, 0.9):.1%} at "
            f"90 %, with the profile {words}"
        )
