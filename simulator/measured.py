"""Kernels that somebody measured on one device: which to measure, the file, and times between its rows.

A table answers for the shapes that it has, and between them where the shape lies inside its range on
every axis; outside it says nothing, and the kernel model of ``simulator.costs`` does. Between shapes it
interpolates what is left of log(time) after a trend, on the axis transform and with the trend that
leave-one-out error prefers on this very table: LLMServingSim 2.0 found log blending biased by 12-14 %
where linear was 2-4 %, and the reverse elsewhere. How kernels are timed: ``paradiff.executor.measure``.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib import resources
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paradiff.config import ConfigError
from paradiff.graph import ScheduleGraph, Work
from paradiff.profiles import KERNEL_DIMS, Profile, Stage
from simulator.gpu import load_gpu
from simulator.lint import is_the_gpu, time_problem

COLUMNS = ("kind", "dims", "dtype", "time_us", "low_us", "high_us", "runs")
"""``dims``: those of KERNEL_DIMS joined by x. ``time_us``: the median of ``runs`` samples; ``low_us``
and ``high_us``: their quartiles."""
MEASURED, FILE = Path("hardware_profiles/measured"), "kernels.csv"
SHARES = (1, 2, 4, 8)
"""Parts that rows and heads are cut into."""
MAX_HEADS = 24
NEIGHBOURS = 12
"""Rows that one interpolation rests on."""
NUGGET = 1e-3
"""Added to the kernel's diagonal: measured times are not exact."""
LEFT_OUT = 256
"""Rows, evenly spaced, whose left-out error chooses the transform."""
LEAST_ROWS = 8
UNSTEADY = 1.25
"""A row whose quartiles lie farther apart was measured beside something else."""
FARTHEST = 64
"""How many times as far from a row as left-out ones were a shape may lie to be interpolated."""

Array = NDArray[np.float64]


class Key(NamedTuple):
    """One kernel at one shape."""

    kind: str
    dims: tuple[int, ...]

    @property
    def flops(self) -> float:
        """Floating-point operations; elements for kernels that only move them."""
        d = self.dims
        if self.kind == "gemm":
            return 2.0 * d[0] * d[1] * d[2] * d[3]
        if self.kind == "conv":
            return 2.0 * d[0] * d[1] * d[2]
        if self.kind == "attention":
            return 2.0 * d[0] * d[1] * d[2] * d[3] * (d[4] + d[5])
        return float(d[0])

    @property
    def elements(self) -> int:
        """Those that it reads and writes at least."""
        d = self.dims
        if self.kind == "gemm":
            return d[0] * (d[1] * d[3] + d[3] * d[2] + d[1] * d[2])
        if self.kind == "conv":
            return d[3] + d[1] * d[2] + d[0] * d[1]
        if self.kind == "attention":
            return d[0] * d[1] * (d[2] + d[3]) * (d[4] + d[5])
        return d[0]


class Row(NamedTuple):
    """One measurement, seconds."""

    time_s: float
    low_s: float
    high_s: float
    runs: int

    @property
    def is_unsteady(self) -> bool:
        return self.high_s > UNSTEADY * self.low_s


# ----------------------------------------------------------------------------- which to measure


def distinct_kernels(profiles: Iterable[Profile]) -> tuple[Key, ...]:
    """Every kernel that the models take at their default size, on 1, 1/2, 1/4 and 1/8 of the rows with
    the keys of all rows, and with 1 to 24 heads.

    The cheapest model first, in it the cheapest kernel first, kinds in turn: a run that ends early has
    whole neighbourhoods of all kinds.
    """
    done: dict[Key, None] = {}
    lists = [list(_kernels(profile)) for profile in profiles]
    for keys in sorted(lists, key=lambda keys: sum(key.flops for key in keys)):
        new = set(keys) - done.keys()
        queues = [
            sorted((key for key in new if key.kind == kind), key=lambda k: (k.flops, k.dims))
            for kind in KERNEL_DIMS
        ]
        longest = max(map(len, queues))
        done |= dict.fromkeys(q[i] for i in range(longest) for q in queues if i < len(q))
    return tuple(done)


def kernels_of(graph: ScheduleGraph, profile: Profile) -> tuple[Key, ...]:
    """Every kernel of the works of ``graph``, at their shapes."""
    works = dict.fromkeys(op.work for section in graph.sections for op in section.ops)
    found = (launches_of(work, profile) for work in works if work is not None)
    return tuple(dict.fromkeys(key for launches in found for key in launches))


def launches_of(work: Work, profile: Profile) -> Counter[Key]:
    """How often ``work`` launches each of the network's kernels."""
    stage, found = profile.stages[work.stage], Counter[Key]()
    shape = work.shape._asdict()
    bound, repeat = stage.bind(shape), 1 if work.once else stage.repeat(shape)
    for segment in stage.covered(work.ranges, work.values):
        for kernel in segment.kernels:
            key = Key(kernel.kind, tuple(kernel.sizes(bound)))
            if min(key.dims) > 0:
                found[key] += kernel.count * repeat
    return found


def _kernels(profile: Profile) -> Iterator[Key]:
    for stage, shape in _shapes(profile):
        bound = stage.bind(shape)
        lists = {id(s.kernels): s.kernels for s in stage.segments}
        for kernel in (k for kernels in lists.values() for k in kernels):
            for dims in _with_heads(kernel.kind, tuple(kernel.sizes(bound))):
                if min(dims) > 0:
                    yield Key(kernel.kind, dims)


def _shapes(profile: Profile) -> Iterator[tuple[Stage, dict[str, int]]]:
    """Stages that a request spends time in, at whole and at cut rows (the denoiser alone is cut)."""
    size = {key: profile.defaults[key] for key in ("height", "width", "frames")}
    whole = profile.latent_shape(**size, batch=1)
    branches = 2 if profile.geometry.guidance == "cfg" else 1
    for name, stage in profile.stages.items():
        if name != "denoiser":
            yield stage, whole
            continue
        step = profile.geometry.row_multiple
        for share, batch in product(SHARES, {1, branches}):
            rows = max(step, whole["r"] // share // step * step)
            yield stage, {**whole, "r": rows, "b": batch, "h": 0 if share == 1 else 2}


def _with_heads(kind: str, dims: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if kind != "attention":
        yield dims
        return
    for parts in range(1, dims[1] + 1):
        if dims[1] % parts == 0 and dims[1] // parts <= MAX_HEADS:
            yield (dims[0], dims[1] // parts, *dims[2:])


# -------------------------------------------------------------------------------------- the file


def read_rows(path: Path) -> tuple[dict[str, str], dict[tuple[Key, str], Row]]:
    """Header (``# key: value`` lines) and rows by kernel and dtype of a table; the last of a kernel
    measured twice counts. A last line without its end is what an interruption left and is not read.
    Raises ConfigError with file:line."""
    header: dict[str, str] = {}
    rows: dict[tuple[Key, str], Row] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            header[key.strip()] = value.strip()
        elif line and line != ",".join(COLUMNS):
            rows |= [_row(f"{path}:{number}", next(csv.reader([line])))]
    return header, rows


def _row(at: str, cells: Sequence[str]) -> tuple[tuple[Key, str], Row]:
    try:
        kind, dims, dtype, time, low, high, runs = cells
        key = Key(kind, tuple(int(d) for d in dims.split("x")))
        row = Row(float(time) * 1e-6, float(low) * 1e-6, float(high) * 1e-6, int(runs))
    except ValueError:
        what = f"not a measurement ({','.join(cells)[:60]!r})"
        raise ConfigError(f"{at}: {what}, allowed: {','.join(COLUMNS)}") from None
    if len(key.dims) != len(KERNEL_DIMS.get(kind, ())) or min(key.dims) < 1:
        allowed = "; ".join(f"{k}: {' x '.join(d)}" for k, d in KERNEL_DIMS.items())
        raise ConfigError(f"{at}: not a kernel ({kind} {dims}), allowed: {allowed}")
    if not 0 < row.low_s <= row.time_s <= row.high_s < math.inf:
        raise ConfigError(f"{at}: times out of order, allowed: 0 < low_us <= time_us <= high_us")
    return (key, dtype), row


def begin_table(path: Path, header: Mapping[str, str]) -> set[tuple[Key, str]]:
    """Make the file ready to append to: a new one with its header, or one that an earlier run of the
    same device and versions left, without the line that it did not finish. What is done already is
    returned. Raises ConfigError where the file is another machine's."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"# {key}: {' '.join(value.split())}" for key, value in header.items()]
        path.write_text("\n".join([*lines, ",".join(COLUMNS)]) + "\n", encoding="utf-8")
        return set()
    before, rows = read_rows(path)
    for key in ("device", "threads", "torch"):
        if before.get(key) != header[key]:
            what = f"measured with {key} {before.get(key)!r}, this is {header[key]!r}"
            raise ConfigError(f"{path}: {what}, allowed: another --output-dir")
    with path.open("r+b") as stream:
        stream.truncate(stream.read().rfind(b"\n") + 1)
    return set(rows)


def append_row(path: Path, key: Key, dtype: str, row: Row) -> None:
    """Write one measurement to the disk before the next begins."""
    times = (f"{t * 1e6:.6g}" for t in (row.time_s, row.low_s, row.high_s))
    line = ",".join((key.kind, "x".join(map(str, key.dims)), dtype, *times, str(row.runs)))
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


# ---------------------------------------------------------------------------------- interpolation


def _axes(kind: str, dims: tuple[int, ...]) -> tuple[float, ...]:
    """The axes that a kind's time depends on. Batch and heads of attention are one: independent
    tiles. A convolution's input counts by what it adds to m x k / volume, which is little: left out."""
    if kind == "attention":
        return (dims[0] * dims[1], dims[2], dims[3], dims[4])
    return tuple(map(float, dims[:3] if kind == "conv" else dims))


TRANSFORMS: Mapping[str, Callable[[Array], Array]] = {
    "log": np.log,
    "cube root": np.cbrt,
    "square root": np.sqrt,
}
TRENDS = ("work", "power law")
"""What is taken off log(time) first: log(FLOPs), so that rates are interpolated, or the best power law
of the axes."""


REPEATED = (0.95, 1.06)
"""Nominal 90 % interval of a kernel that was measured, as factors: of its median from run to run."""
QUARTILES_TO_90 = 1.645 / 0.674
"""How much farther out 5 and 95 % of a normal scatter lie than its quartiles."""


class Estimate(NamedTuple):
    """Seconds of one kernel, with a nominal 90 % interval. ``exact``: it was measured."""

    time_s: float
    low_s: float
    high_s: float
    exact: bool


class KernelTable:
    """Measured times of one kind and dtype on one device."""

    def __init__(
        self, kind: str, rows: Mapping[tuple[int, ...], Row], source: str = "measured here"
    ) -> None:
        self.kind, self.source = kind, source
        self.rows = dict(sorted(rows.items()))
        self._axes = np.array([_axes(kind, dims) for dims in self.rows], float)
        self._time = np.log(np.array([row.time_s for row in self.rows.values()]))
        self._work = np.log(np.array([Key(kind, dims).flops for dims in self.rows]))
        self._known: dict[tuple[int, ...], Estimate | None] = {}

    def estimate(self, dims: tuple[int, ...]) -> Estimate | None:
        """The measured time, an interpolated one inside the range of every axis, or None: also where no
        row could be left out, or only much nearer ones, and nobody knows what interpolating is worth.

        Its interval is 5 to 95 % of the errors of left-out rows, no narrower than of a measured one, in
        logarithms as the root of the distance where that is more than theirs: what linear radial basis
        functions leave open is a Brownian motion's deviation.
        """
        if dims not in self._known:
            self._known[dims] = self._estimate(dims)
        return self._known[dims]

    def _estimate(self, dims: tuple[int, ...]) -> Estimate | None:
        row = self.rows.get(dims)
        if row is not None:
            low_s, high_s = (row.time_s * (s / row.time_s) ** QUARTILES_TO_90 for s in row[1:3])
            low_s, high_s = (
                min(low_s, REPEATED[0] * row.time_s),
                max(high_s, REPEATED[1] * row.time_s),
            )
            return Estimate(row.time_s, low_s, high_s, exact=True)
        if len(self.rows) < LEAST_ROWS or not self._inside:
            return None
        at = np.array(_axes(self.kind, dims), float)
        if (at < self._axes.min(axis=0)).any() or (at > self._axes.max(axis=0)).any():
            return None
        distance, reach = self._distance(at, None), self._left_out_distance
        if distance > FARTHEST * reach:
            return None
        transform, trend = self.choice
        work = math.log(Key(self.kind, dims).flops)
        seconds = math.exp(self._predict(at, work, transform, trend, None))
        low, high = np.exp(-np.quantile(self.errors, (0.95, 0.05)))
        farther = math.sqrt(max(1.0, distance / reach)) if distance else 1.0
        return Estimate(
            seconds,
            seconds * min(REPEATED[0], float(low)) ** farther,
            seconds * max(REPEATED[1], float(high)) ** farther,
            exact=False,
        )

    @cached_property
    def _left_out_distance(self) -> float:
        """Mean distance from the nearest other row of those whose errors are known."""
        return float(np.mean([self._distance(self._axes[i], i) for i in self._tried]))

    def _distance(self, at: Array, without: int | None) -> float:
        """From the nearest row (but one), on the chosen axes as they are interpolated."""
        points, here = _on_axes(self._axes, at, TRANSFORMS[self.choice[0]])
        apart = np.linalg.norm(points - here, axis=1)
        return float(np.min(apart if without is None else np.delete(apart, without)))

    @cached_property
    def choice(self) -> tuple[str, str]:
        """(transform, trend) with the least median error of left-out rows."""
        return min(
            product(TRANSFORMS, TRENDS),
            key=lambda c: float(np.median(np.abs(self.left_out(c[0], c[1], self._tried)))),
        )

    @cached_property
    def errors(self) -> Array:
        """log(predicted / measured) of left-out rows, with the chosen transform and trend."""
        return self.left_out(*self.choice, self._tried)

    def left_out(self, transform: str, trend: str, chosen: Sequence[int] | None = None) -> Array:
        """log(predicted / measured) of each row (or ``chosen`` ones) from the others.

        Rows that alone reach the edge of the range are not: they would not be interpolated.
        """
        return np.array(
            [
                self._predict(self._axes[i], self._work[i], transform, trend, i) - self._time[i]
                for i in (self._inside if chosen is None else chosen)
            ]
            or [math.inf]
        )

    @cached_property
    def _inside(self) -> Sequence[int]:
        """Rows that lie in the range of the others."""
        low, high = self._axes.min(axis=0), self._axes.max(axis=0)
        return [
            i
            for i in range(len(self.rows))
            if all(
                lo == hi or (np.delete(column, i).min() <= column[i] <= np.delete(column, i).max())
                for column, lo, hi in zip(self._axes.T, low, high, strict=True)
            )
        ]

    @cached_property
    def _tried(self) -> Sequence[int]:
        return self._inside[:: max(1, len(self._inside) // LEFT_OUT)]

    def _predict(
        self, at: Array, work: float, transform: str, trend: str, without: int | None
    ) -> float:
        """log(time) at ``at``: trend plus an interpolation of what is left at the nearest rows, exact
        in a plane (linear radial basis functions with a linear polynomial)."""
        change = TRANSFORMS[transform]
        keep = np.ones(len(self.rows), bool)
        if without is not None:
            keep[without] = False
        axes, time = self._axes[keep], self._time[keep]
        varies = axes.max(axis=0) > axes.min(axis=0)
        points, here = _on_axes(axes, at, change)
        if trend == "work":
            left, add = time - self._work[keep], work
        else:
            design = np.column_stack([np.log(axes[:, varies]), np.ones(len(time))])
            fit = np.linalg.lstsq(design.T @ design, design.T @ time, rcond=None)[0]
            left, add = time - design @ fit, float(np.append(np.log(at[varies]), 1.0) @ fit)
        near = np.argsort(np.linalg.norm(points - here, axis=1), kind="stable")[:NEIGHBOURS]
        return add + _radial(points[near], left[near], here)


def _on_axes(axes: Array, at: Array, change: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Rows and a shape on the axes that vary, transformed, each in units of its spread."""
    varies = axes.max(axis=0) > axes.min(axis=0)
    points, here = change(axes[:, varies]), change(at[varies])
    scale = points.std(axis=0)
    return points / scale, here / scale


def _radial(points: Array, values: Array, here: Array) -> float:
    """Linear radial basis functions through ``values`` at ``points``, with a constant; evaluated."""
    count = len(points)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = -apart + np.eye(count) * NUGGET
    system[:count, count] = system[count, :count] = 1.0
    weights = np.linalg.lstsq(system, np.append(values, 0.0), rcond=None)[0]
    distance = -np.linalg.norm(points - here, axis=1)
    return float(np.append(distance, 1.0) @ weights)


def tables(
    rows: Mapping[tuple[Key, str], Row], dtype: str, source: str = "measured here"
) -> dict[str, KernelTable]:
    """A table for each kind that has rows of ``dtype``."""
    kinds: dict[str, dict[tuple[int, ...], Row]] = {}
    for (key, of), row in rows.items():
        if of == dtype:
            kinds.setdefault(key.kind, {})[key.dims] = row
    return {kind: KernelTable(kind, found, source) for kind, found in kinds.items()}


@cache
def measured_on(gpu: str, dtype: str) -> Mapping[str, KernelTable]:
    """The tables of a GPU profile by kind: ``hardware_profiles/measured/GPU/kernels.csv`` below the
    current directory, else the shipped one, else none. Raises ConfigError."""
    for folder in _folders():
        path = folder / gpu / FILE
        if path.is_file():
            header, rows = read_rows(path)
            _check_rows(path, header, rows, gpu)
            told = [f"{key} {value}" for key, value in header.items()]
            return tables(rows, dtype, ", ".join([f"{path}", *told]))
    return {}


def _check_rows(
    path: Path, header: Mapping[str, str], rows: Mapping[tuple[Key, str], Row], gpu: str
) -> None:
    """Raises ConfigError where the table cannot be of ``gpu``: of another device, or faster than it is.
    Of what has no profile (a CPU) nothing is known."""
    try:
        known = load_gpu(gpu)
    except ConfigError:
        return
    if not is_the_gpu(header.get("device", gpu), known):
        what = f"measured on {header['device']}, which is not a {gpu} ({known.full_name})"
        raise ConfigError(f"{path}: {what}, allowed: the folder of its own name")
    for (key, dtype), row in rows.items():
        moved = key.elements * (4 if dtype == "fp32" else 2)
        flops = key.flops if key.kind in ("gemm", "conv", "attention") else 0.0
        if known.is_ideal or dtype not in ("fp16", "bf16", "fp32"):
            continue
        if problem := time_problem(flops, moved, row.time_s, dtype, known):
            raise ConfigError(
                f"{path}: {key.kind},{'x'.join(map(str, key.dims))},{dtype}: {problem}"
            )


def _folders() -> tuple[Path, Path]:
    return MEASURED, Path(str(resources.files("hardware_profiles"))) / "measured"


def fingerprint() -> str:
    """Of every table that costs may rest on, shipped or below the current directory."""
    digest = hashlib.sha256()
    for folder in _folders():
        for path in sorted(folder.glob("*/*.csv")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
