"""How far a strategy moves the result: errors against the serial run of the same request, in pairs.

A sample of a strategy is compared with the sample of the serial run that has the same noise, text, steps
and sampler; what is left is the strategy's doing (and rounding). Errors of two strategies are compared
sample by sample for the same reason. Runs come from outside, as arrays; how they are made, and on what,
is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.text import plain, seconds

SCHEMA = "paradiff.validate-fidelity/1"
Array = NDArray[Any]
Seen = tuple[Array, Array | None]
"""Latents after each step (steps, samples, ...), and the pictures (samples, frames, rows, columns, 3) in
0 to 1, None where nothing is decoded to pictures."""
Score = Callable[[Array, Array], Array]
"""From pictures and those of the serial run to a number for each sample."""

BEST_DB = 160.0
"""PSNR of equal pictures: a mean squared error of 1e-16 is below what float32 can tell."""
SPREAD = (0.1, 0.9)
"""Quantiles over the samples between which an error is shown."""
CONFIDENCE = 0.95
LEAST_PAIRS = 6
"""Of five pairs that all agree a signed-rank test still says p = 0.06."""
PICTURES = 6
"""Samples that are shown."""


class Case(NamedTuple):
    """What is run. ``scheduler``: a name of ``paradiff run``, or "own", the model's."""

    spec: str
    steps: int
    scheduler: str

    @property
    def serial(self) -> Case:
        return self._replace(spec="serial")


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of one case, sample by sample. ``steps``: metric -> (samples, steps); ``final``: metric ->
    (samples,). ``pictures``: the first of them, and ``serial``'s."""

    steps: Mapping[str, Array]
    final: Mapping[str, Array]
    pictures: Array | None = None
    serial: Array | None = None


@dataclass(frozen=True, slots=True)
class Paired:
    """Two cases compared on the same samples.

    ``ratio`` is the geometric mean of ``first``'s error over ``second``'s, ``low`` and ``high`` its 95 %
    interval (Student's t on the logarithms); ``p`` of Wilcoxon's signed-rank test, two-sided, on the
    same; ``effect`` the matched-pairs rank-biserial correlation: 1 where ``first`` is worse on every
    sample, -1 where it is better.
    """

    first: str
    second: str
    samples: int
    ratio: float
    low: float
    high: float
    p: float
    effect: float


# ------------------------------------------------------------------------------------------ metrics


def relative_l2(x: Array, reference: Array) -> Array:
    """|x - reference| / |reference| of each sample: (n, ...) to (n,)."""
    a, b = _flat(x), _flat(reference)
    ratio: Array = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return ratio


def cosine(x: Array, reference: Array) -> Array:
    """Cosine similarity of each sample: (n, ...) to (n,)."""
    a, b = _flat(x), _flat(reference)
    of: Array = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return of


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1).astype(np.float64)


def psnr_db(pictures: Array, reference: Array) -> Array:
    """Peak signal-to-noise ratio of each sample (all its frames), in dB; BEST_DB at most."""
    from skimage import metrics

    floor = 10 ** (-BEST_DB / 10)

    def of(a: Array, b: Array) -> float:
        if metrics.mean_squared_error(b, a) <= floor:
            return BEST_DB
        return float(metrics.peak_signal_noise_ratio(b, a, data_range=1.0))

    return np.array([of(a, b) for a, b in zip(pictures, reference, strict=True)])


def ssim(pictures: Array, reference: Array) -> Array:
    """Structural similarity (Wang et al. 2004, their Gaussian window) of each sample, mean over its
    frames. Raises ValueError for pictures that are smaller than the window, 11 x 11."""
    from skimage import metrics

    rows, columns = pictures.shape[2:4]
    if min(rows, columns) < 11:
        raise ValueError(f"pictures of {rows} x {columns} pixels: SSIM needs 11")
    settings: dict[str, Any] = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }

    def of(a: Array, b: Array) -> float:
        return float(
            metrics.structural_similarity(a, b, channel_axis=-1, data_range=1.0, **settings)
        )

    return np.array(
        [
            np.mean([of(f, g) for f, g in zip(a, b, strict=True)])
            for a, b in zip(pictures, reference, strict=True)
        ]
    )


def compare(seen: Seen, reference: Seen, scores: Mapping[str, Score] | None = None) -> Errors:
    """All metrics of one run against the serial one."""
    latents, pictures = seen
    of_latents: dict[str, Score] = {"relative_l2": relative_l2, "cosine": cosine}
    steps = {
        name: np.stack([metric(a, b) for a, b in zip(latents, reference[0], strict=True)], axis=1)
        for name, metric in of_latents.items()
    }
    final = {name: values[:, -1] for name, values in steps.items()}
    serial = reference[1]
    if pictures is None or serial is None:
        return Errors(steps, final)
    of_pictures: dict[str, Score] = {"psnr_db": psnr_db, "ssim": ssim, **(scores or {})}
    final |= {name: metric(pictures, serial) for name, metric in of_pictures.items()}
    return Errors(steps, final, pictures[:PICTURES], serial[:PICTURES])


def measure(
    cases: Sequence[Case],
    batches: int,
    run: Callable[[Case, int], Seen],
    scores: Mapping[str, Score] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Case, Errors]:
    """Errors of every case over ``batches`` batches of samples.

    ``run`` gets a case and the number of the batch; the serial run of each sampler and number of steps
    is made once a batch.
    """
    found: dict[Case, list[Errors]] = {case: [] for case in cases}
    done, total = 0, batches * (len(cases) + len({case.serial for case in cases}))
    for batch in range(batches):
        for serial in dict.fromkeys(case.serial for case in cases):
            reference = run(serial, batch)
            done += 1
            for case in (each for each in found if each.serial == serial):
                found[case].append(compare(run(case, batch), reference, scores))
                done += 1
                if progress is not None:
                    progress(done, total)
    return {case: _joined(parts) for case, parts in found.items()}


def _joined(parts: Sequence[Errors]) -> Errors:
    """Samples of several batches one after another; the pictures are those of the first."""
    first = parts[0]
    steps = {name: np.concatenate([part.steps[name] for part in parts]) for name in first.steps}
    final = {name: np.concatenate([part.final[name] for part in parts]) for name in first.final}
    return Errors(steps, final, first.pictures, first.serial)


# --------------------------------------------------------------------------------------- statistics


def paired(first: str, a: Array, second: str, b: Array) -> Paired:
    """Errors ``a`` of ``first`` against ``b`` of ``second``, all positive. Raises ValueError for fewer
    than LEAST_PAIRS samples."""
    from scipy.stats import rankdata, t, wilcoxon

    n = len(a)
    if n < LEAST_PAIRS:
        raise ValueError(f"{n} samples: a paired test needs {LEAST_PAIRS}")
    d = np.log(a) - np.log(b)
    if np.allclose(d, 0.0, atol=1e-12):
        return Paired(first, second, n, 1.0, 1.0, 1.0, 1.0, 0.0)
    mean = float(np.mean(d))
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(d, ddof=1) / math.sqrt(n))
    ranks = rankdata(np.abs(d))
    return Paired(
        first,
        second,
        n,
        ratio=math.exp(mean),
        low=math.exp(mean - half),
        high=math.exp(mean + half),
        p=float(wilcoxon(d).pvalue),
        effect=float(np.sum(np.sign(d) * ranks) / np.sum(ranks)),
    )


def quantiles(values: Array) -> tuple[float, float, float]:
    """Median, and the ends of SPREAD."""
    low, middle, high = np.quantile(values, (SPREAD[0], 0.5, SPREAD[1]))
    return float(middle), float(low), float(high)


# ------------------------------------------------------------------------------------------- report


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case: what it means, what it costs, what it does to the result. ``latency_s`` is simulated;
    None where the box cannot run it."""

    case: Case
    n_gpus: int
    synchronous_steps: int
    exact: bool
    max_staleness_steps: int
    latency_s: float | None
    errors: Errors

    def to_json(self) -> dict[str, Any]:
        return {
            **self.case._asdict(),
            "n_gpus": self.n_gpus,
            "synchronous_steps": self.synchronous_steps,
            "exact": self.exact,
            "max_staleness_steps": self.max_staleness_steps,
            "latency_s": self.latency_s,
            "per_step": {
                name: np.median(values, axis=0).tolist()
                for name, values in self.errors.steps.items()
            },
            "final": {
                name: {
                    "mean": float(np.mean(values)),
                    **dict(zip(("median", "low", "high"), quantiles(values), strict=True)),
                    "samples": values.tolist(),
                }
                for name, values in self.errors.final.items()
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured, and on what, which is ``what`` in words. ``facts`` go into the JSON as they
    stand; latencies are simulated on ``topology``."""

    model: str
    what: str
    topology: str
    facts: Mapping[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            **self.facts,
            "topology": self.topology,
            "results": [row.to_json() for row in self.rows],
            "comparisons": [
                {"steps": steps, "scheduler": scheduler, **asdict(each)}
                for steps, scheduler, each in neighbours(self.rows)
            ],
        }


def neighbours(rows: Iterable[Row]) -> Iterator[tuple[int, str, Paired]]:
    """Of the strategies that change the result, each against the next better one, where steps and
    sampler are the same, samples are enough and none is equal to the serial one."""
    for (steps, scheduler), group in _by_run(rows):
        stale = [
            r for r in group if not r.exact and len(_error(r)) >= LEAST_PAIRS and _error(r).all()
        ]
        stale.sort(key=lambda row: float(np.median(_error(row))), reverse=True)
        for worse, better in pairwise(stale):
            yield (
                steps,
                scheduler,
                paired(worse.case.spec, _error(worse), better.case.spec, _error(better)),
            )


def _by_run(rows: Iterable[Row]) -> Iterator[tuple[tuple[int, str], list[Row]]]:
    def key(row: Row) -> tuple[int, str]:
        return row.case.steps, row.case.scheduler

    for each, group in groupby(sorted(rows, key=key), key):
        yield each, list(group)


def _error(row: Row) -> Array:
    return row.errors.final["relative_l2"]


HEADER = ("strategy", "steps", "sampler", "GPUs", "synchronous", "stale", "latency")
LABELS: Mapping[str, str] = {
    "relative_l2": "relative L2",
    "cosine": "cosine",
    "psnr_db": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "clip_image": "CLIP, pictures",
    "clip_text_loss": "CLIP, text, loss",
}
LEFT = ("strategy", "sampler")


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the median of each metric, of the relative error also the spread."""
    names = [name for name in LABELS if any(name in row.errors.final for row in report.rows)]
    rows = []
    for row in report.rows:
        cells = [
            row.case.spec,
            str(row.case.steps),
            row.case.scheduler,
            str(row.n_gpus),
            str(row.synchronous_steps),
            "exact" if row.exact else str(row.max_staleness_steps),
            seconds(row.latency_s),
        ]
        cells += [_cell(name, row.errors.final.get(name)) for name in names]
        rows.append(cells)
    return [*HEADER, *(LABELS[name] for name in names)], rows


def _cell(name: str, values: Array | None) -> str:
    if values is None:
        return "-"
    middle, low, high = quantiles(values)
    if name == "relative_l2":
        return f"{middle:.3g} ({low:.2g} - {high:.2g})"
    return f"{middle:.1f} dB" if name == "psnr_db" else f"{middle:.4f}"


def sentences(report: Report) -> list[str]:
    """What the table means, and which neighbours in it the samples tell apart."""
    lines = [
        "Errors are against the serial run of the same noise, text, steps and sampler: median over the"
        " samples (10 % to 90 % of them)."
    ]
    for steps, scheduler, each in neighbours(report.rows):
        lines.append(f"{steps} steps, {scheduler}: {compared(each)}.")
    return lines


def compared(each: Paired) -> str:
    """A paired comparison in words."""
    told = each.p < 1 - CONFIDENCE
    return (
        f"{each.first} {'is off' if told else 'may be off'} {each.ratio:.2f} times as far as"
        f" {each.second} ({each.low:.2f} to {each.high:.2f}, p {p_value(each.p)}, {each.samples} pairs)"
        + ("" if told else ", which these samples do not tell apart")
    )


def p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def text(report: Report) -> str:
    """The whole report for a terminal."""
    header, rows = table(report)
    lines = [report.what, "", *plain(header, rows, LEFT), "", *sentences(report)]
    return "\n".join(lines)
