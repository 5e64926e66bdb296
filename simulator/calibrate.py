"""A GPU profile corrected by measured traces: its matmul, attention and memory rates, with residuals.

A trace of a real run on the GPU says how long each compute op of its graph kept the device busy. The
graph is built again from the trace's own facts, the cost model prices the same work, and a factor on
each rate that the works tell is fitted to the ratios. A work is what ops launch, whatever op, step, rank
or file they are of: the same kernels are one observation. Errors are reported of works held out with all
that share kernels with them. Rates stay below what a profile may say (``ceilings``).
"""

from __future__ import annotations

import io
import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from paradiff.config import ConfigError, find, printable
from paradiff.graph import Work
from paradiff.profiles import Profile
from paradiff.strategies import Infeasible, SpecError, Workload, build, parse_spec
from paradiff.trace import TRANSFERS, Span, Trace, TraceMismatch, read_chrome_trace
from simulator.costs import CostModel, Runtime, attention_figure
from simulator.gpu import BOOST, Dtype, Figure, Gpu, Residual, load_gpu
from simulator.lint import is_the_gpu
from simulator.measured import Key, launches_of

AnyFigure = TypeVar("AnyFigure", bound=Figure[Any])
SLOWEST = 1 / 20
"""A rate below this share of the profile's is another GPU, not a correction."""
PRIOR = 0.2
"""How many times as far as a work a profile's rate is off, inverted: some 15 % of a work to a factor of
two of a rate; an assumption."""
TOLD = 0.9
"""Works tell a rate if so much of its correction is theirs and not the profile's."""
SHARED = 0.1
"""Works whose common kernels are more than this part of the arithmetic of both are held out together."""
FOLDS = 5
"""Parts of the works, at most, of which each is held out once."""
LEAST_WORKS, LEAST_GROUPS = 4, 2
LEAST_S = 20e-6
"""Shorter ops are the clock's."""
BELOW = 1 - 1e-4
"""How near to its ceiling a rate may come, which is written with five digits."""
LOOP = ("forward", "guidance", "scheduler")
"""Calls whose ops do their own work and no other's, in the precision of the run: a VAE may take another,
and decodes all tiles and chunks in the first of its ops; text encoders run before."""
SIZES = ("height", "width", "frames", "steps", "batch")
UNFIT: Mapping[str | None, str] = {
    "simulated": "a simulated trace: its times are predictions",
    "timed": "a trace of timed kernels: they slept for predicted times",
    None: "a trace that does not say what took its times, as earlier versions wrote it",
}
FIT = (
    "a trace of real kernels on the GPU that --gpu names, as paradiff run --device cuda --random-weights"
    " (or --weights) writes into --output-dir"
)


class Seen(NamedTuple):
    """A work, how often it launches each kernel, and the median of its measured times."""

    profile: Profile
    dtype: Dtype
    work: Work
    launches: Mapping[Key, int]
    seconds: float


class Factors(NamedTuple):
    """What the rates of a profile are multiplied by."""

    matmul: float = 1.0
    attention: float = 1.0
    memory: float = 1.0


KINDS = (*Factors._fields, "launches")
"""What most of a work's time goes to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """``gpu``: the profile with factors on the rates that are ``told``; those of the others are 1. Of
    ``capped`` ones works tell no more than that they reach their ceiling. ``kinds`` of the works, and
    predicted / measured - 1 of each: with the profile as it was, with this one, and with factors fitted
    without the work."""

    gpu: Gpu
    factors: Factors
    told: tuple[str, ...]
    capped: tuple[str, ...]
    kinds: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    held_out: tuple[float, ...]


# -------------------------------------------------------------------------------- what was measured


def load_traces(paths: Iterable[Path], gpu: Gpu) -> list[tuple[Path, Trace]]:
    """Real runs on ``gpu``. Raises ConfigError for a file that is none, and for a run given twice."""
    found: dict[tuple[Span, ...], Path] = {}
    traces = []
    for path in paths:
        trace = load_trace(path, gpu)
        if trace.spans in found:
            same = f"{path}: the same run as {found[trace.spans]}, to the last digit"
            raise ConfigError(f"{same}, allowed: each run once")
        found[trace.spans] = path
        traces.append((path, trace))
    return traces


def load_trace(path: Path, gpu: Gpu) -> Trace:
    """A trace of a real run on ``gpu`` with the facts of its making. Raises ConfigError."""
    try:
        trace = read_chrome_trace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except TraceMismatch as error:
        raise ConfigError(f"{path}: {error}") from None
    meta = {key: printable(value) for key, value in trace.meta}
    kernels = meta.get("kernels", "simulated" if "topology" in meta else None)
    if kernels != "real":
        raise ConfigError(f"{path}: {UNFIT.get(kernels, UNFIT[None])}, allowed: {FIT}")
    missing = {"model", "spec", "dtype", "device", *SIZES} - meta.keys()
    if missing:
        raise ConfigError(f"{path}: a trace without {', '.join(sorted(missing))}, allowed: {FIT}")
    if meta["dtype"] not in get_args(Dtype):
        allowed = ", ".join(get_args(Dtype))
        raise ConfigError(f"{path}: a run in {meta['dtype']}, allowed: {allowed}")
    model = meta["model"]
    if model.startswith("tiny-"):
        raise ConfigError(
            f"{path}: a run of {model}, the small twin of {model.removeprefix('tiny-')}: its kernels are"
            f" too small to tell what a GPU can do, allowed: {FIT}"
        )
    for device in meta["device"].split("; "):
        if not is_the_gpu(device, gpu):
            what = f"measured on {device}, which is not a {gpu.name} ({gpu.full_name})"
            raise ConfigError(f"{path}: {what}, allowed: {FIT}")
    if "clock_residual_s" not in meta and _in_each_others_way(trace):
        raise ConfigError(
            f"{path}: its ranks shared one GPU and were at work at the same time, allowed: the serial"
            " run, or a GPU for each rank (torchrun)"
        )
    return trace


def _in_each_others_way(trace: Trace) -> bool:
    """Whether compute of two ranks overlaps."""
    spans = sorted((s for s in trace.spans if s.kind == "compute"), key=lambda s: s.start_s)
    return any(b.start_s < a.end_s - LEAST_S and b.rank != a.rank for a, b in pairwise(spans))


def observations(
    runs: Iterable[tuple[Path, Trace, Profile]], gpu: Gpu, runtime: Runtime = "eager"
) -> list[Seen]:
    """The distinct works of the denoising loops of all runs. Raises ConfigError where the spans of one
    are not those of its graph, and where its device waits for its host."""
    works: dict[object, tuple[Seen, list[float]]] = {}
    for path, trace, profile in runs:
        dtype: Any = dict(trace.meta)["dtype"]
        times = _times(path, trace, profile)
        _check_outpaced(path, times, CostModel(profile, [gpu], dtype, runtime))
        for work, seconds in times.items():
            launches = launches_of(work, profile)
            same = dtype, frozenset(launches.items()), work.blocks, work.copies, work.copied
            seen = Seen(profile, dtype, work, launches, 0.0)
            works.setdefault(same, (seen, []))[1].extend(seconds)
    middles = [seen._replace(seconds=statistics.median(all_s)) for seen, all_s in works.values()]
    return [seen for seen in middles if LEAST_S < seen.seconds < math.inf]


def _times(path: Path, trace: Trace, profile: Profile) -> Mapping[Work, list[float]]:
    """Seconds of each work of a trace, every time it ran without a transfer beside it."""
    meta = dict(trace.meta)
    try:
        sizes = {name: int(meta[name]) for name in SIZES}
        graph = build(parse_spec(meta["spec"]), profile, Workload(**sizes, dtype=meta["dtype"]))
    except (ValueError, SpecError, Infeasible) as error:
        what = f"its graph cannot be built ({printable(str(error))})"
        raise ConfigError(f"{path}: {what}, allowed: {FIT}") from None
    ops = {instance.id: instance.op for instance in graph.instances()}
    times: dict[Work, list[float]] = {}
    is_disturbed = _disturbed(trace)
    for span in trace.spans:
        op = ops.get(span.id)
        if op is None:
            what = f"op {printable(span.id)} is not in the graph of {printable(meta['spec'])}"
            raise ConfigError(f"{path}: {what}, allowed: {FIT}")
        if op.work is not None and op.call in LOOP and not is_disturbed(span):
            times.setdefault(op.work, []).append(span.busy_s)
    return times


def _disturbed(trace: Trace) -> Callable[[Span], bool]:
    """Whether a span has a transfer of its rank beside it, which takes SMs and bandwidth."""
    begins, ends = dict[int, list[float]](), dict[int, list[float]]()
    for span in trace.spans:
        if span.kind in TRANSFERS:
            begins.setdefault(span.rank, []).append(span.start_s)
            latest = ends.setdefault(span.rank, [])
            latest.append(max([span.end_s, *latest[-1:]]))

    def is_disturbed(span: Span) -> bool:
        begun = bisect_left(begins.get(span.rank, []), span.end_s - LEAST_S)
        return begun > 0 and ends[span.rank][begun - 1] > span.start_s + LEAST_S

    return is_disturbed


def _check_outpaced(path: Path, times: Mapping[Work, Sized], model: CostModel) -> None:
    """Raises ConfigError for a run that takes as long as its launches, whatever its device could do."""
    host_s = device_s = 0.0
    for work, each in times.items():
        cost = model.compute(work, 0)
        host_s += len(each) * cost.host_s
        device_s += len(each) * cost.device_s
    if host_s > device_s:
        raise ConfigError(
            f"{path}: a run that waits for its launches ({host_s:.3g} s by the profile, its kernels"
            f" {device_s:.3g} s): its times are not the device's, allowed: larger sizes or batches"
        )


def groups(seen: Sequence[Seen]) -> list[list[int]]:
    """Places of works that are held out together: along chains of works that share kernels."""
    graph = nx.empty_graph(len(seen))
    for (i, a), (j, b) in combinations(enumerate(seen), 2):
        common = a.launches.keys() & b.launches.keys()
        if common and all(_part(each.launches, common) > SHARED for each in (a, b)):
            graph.add_edge(i, j)
    return [sorted(places) for places in nx.connected_components(graph)]


def _part(launches: Mapping[Key, int], of: Iterable[Key]) -> float:
    """Share of the arithmetic (of what is moved, where there is none) that is in the kernels ``of``."""
    weights = {key: count * key.flops for key, count in launches.items()}
    return sum(weights[key] for key in of) / sum(weights.values())


# ---------------------------------------------------------------------------------- what is fitted


def same_units(gpu: Gpu, dtypes: Iterable[Dtype]) -> list[Dtype]:
    """Precisions that are computed where ``dtypes`` are: those of the same peak."""
    peaks = {gpu.peak.of(dtype).value for dtype in dtypes}
    return [dtype for dtype in get_args(Dtype) if gpu.peak.of(dtype).value in peaks]


def scaled(gpu: Gpu, factors: Factors, name: str, dtypes: Iterable[Dtype]) -> Gpu:
    """The profile with its rates multiplied: matmul in ``dtypes``, memory, and of attention the one that
    all of it is priced from."""
    matmul: dict[str, Any] = {
        dtype: _multiplied(gpu.matmul.of(dtype), factors.matmul) for dtype in dtypes
    }
    priced = attention_figure(gpu)
    changed = {
        "name": name,
        "matmul": gpu.matmul.model_copy(update=matmul),
        "attention": tuple(
            _multiplied(figure, factors.attention) if figure is priced else figure
            for figure in gpu.attention
        ),
        "memory_bandwidth": _multiplied(gpu.memory_bandwidth, factors.memory),
    }
    return gpu.model_copy(update=changed)


def _multiplied(figure: AnyFigure, factor: float) -> AnyFigure:
    return figure.model_copy(update={"value": figure.value * factor})


def ceilings(gpu: Gpu, dtypes: Iterable[Dtype]) -> Factors:
    """The largest factors that a profile may have: matmul and attention up to BOOST times the peak of
    the data sheet, memory up to its peak."""
    matmul = min(gpu.peak.of(dtype).value / gpu.matmul.of(dtype).value for dtype in dtypes)
    attention = gpu.peak.half / attention_figure(gpu).value
    memory = gpu.memory_bandwidth_peak.value / gpu.memory_bandwidth.value
    return Factors(BELOW * BOOST * matmul, BELOW * BOOST * attention, BELOW * memory)


class _Predictor:
    """Predicted seconds of works with the rates of ``gpu`` multiplied, as a profile called ``name``.

    ``traced``: precisions of the works; ``dtypes``: all on their units, whose matmul rates are
    multiplied; ``free``: which rates they could tell. Raises ConfigError where the units differ.
    """

    def __init__(self, gpu: Gpu, traced: Collection[Dtype], runtime: Runtime, name: str) -> None:
        self.gpu, self.runtime, self.name = gpu, runtime, name
        self.dtypes = same_units(gpu, traced)
        peaks = {gpu.peak.of(dtype).value for dtype in self.dtypes}
        if len(peaks) > 1:
            raise ConfigError(
                f"traces in {', '.join(sorted(traced))}, which a {gpu.name} computes in different units,"
                " allowed: one of them at a time (then --gpu FILE with the others)"
            )
        self.free = np.array([True, peaks == {gpu.peak.half}, True])
        self.ceilings = ceilings(gpu, self.dtypes)

    def fitted(self, factors: Factors) -> Gpu:
        """The profile so far."""
        return scaled(self.gpu, factors, self.name, self.dtypes)

    def __call__(self, seen: Sequence[Seen], factors: Factors) -> NDArray[np.float64]:
        gpu = self.fitted(factors)
        models: dict[tuple[str, str], CostModel] = {}
        found = []
        for each in seen:
            key = (each.profile.name, each.dtype)
            if key not in models:
                models[key] = CostModel(each.profile, [gpu], each.dtype, self.runtime)
            found.append(models[key].compute(each.work, 0).device_s)
        return np.array(found)


def fit(seen: Sequence[Seen], gpu: Gpu, name: str, runtime: Runtime = "eager") -> Fit:
    """The profile corrected, called ``name``, and its errors. Raises ConfigError for works that are too
    few to hold any out, or tell nothing of this GPU."""
    apart = groups(seen)
    if len(seen) < LEAST_WORKS or len(apart) < LEAST_GROUPS:
        raise ConfigError(
            f"{len(seen)} distinct works longer than {LEAST_S * 1e6:g} us in {len(apart)} groups without"
            f" kernels in common, allowed: {LEAST_WORKS} works or more in {LEAST_GROUPS} groups or more"
            " (more models, sizes or strategies)"
        )
    traced = {each.dtype for each in seen}
    predict = _Predictor(gpu, traced, runtime, name)
    without = np.zeros(len(seen))
    for number in range(min(FOLDS, len(apart))):
        out = [i for places in apart[number::FOLDS] for i in places]
        kept = [each for i, each in enumerate(seen) if i not in out]
        without[out] = predict([seen[i] for i in out], _fitted(kept, predict).factors)
    found = _fitted(seen, predict)
    if not found.told:
        raise ConfigError(
            "no rate makes enough of the works' time to be told from the others, allowed: more models,"
            " sizes or strategies, and works that outlast their launches"
        )
    if min(found.factors) < 1.01 * SLOWEST:
        raise ConfigError(
            f"the works take more than {1 / SLOWEST:.0f} times what a {gpu.name} should, allowed: traces"
            " of the GPU that --gpu names"
        )
    measured = np.array([each.seconds for each in seen])
    as_it_was = _Predictor(gpu, traced, runtime, gpu.name)(seen, Factors())
    before, after, held_out = (
        tuple(map(float, seconds / measured - 1))
        for seconds in (as_it_was, predict(seen, found.factors), without)
    )
    new = predict.fitted(found.factors)
    return Fit(gpu=new, **found._asdict(), before=before, after=after, held_out=held_out)


class _Fitted(NamedTuple):
    factors: Factors
    told: tuple[str, ...]
    capped: tuple[str, ...]
    kinds: tuple[str, ...]


def _fitted(seen: Sequence[Seen], predict: _Predictor) -> _Fitted:
    """Least squares in log(predicted / measured) over the rates that the works tell, all alike.

    Told is a rate whose diagonal element of the resolution matrix (Backus and Gilbert, Geophys. J. R.
    Astr. Soc. 16, 1968) exceeds TOLD, in the fit of all rates damped by PRIOR towards the profile as it
    is. A work is of the kind that most of its time goes to in that fit.
    """
    free = predict.free
    damped = _solved(seen, predict, free, PRIOR, np.zeros(free.sum()))
    slopes = damped.jac[: len(seen)]
    normal = slopes.T @ slopes
    resolution = np.linalg.solve(normal + PRIOR**2 * np.eye(len(normal)), normal).diagonal()
    told = free.copy()
    told[free] = resolution > TOLD
    logs = np.zeros(len(free))
    if told.any():
        logs[told] = _solved(seen, predict, told, 0.0, damped.x[told[free]]).x
    parts = np.zeros((len(seen), len(KINDS)))
    parts[:, np.flatnonzero(free)] = -slopes
    parts[:, -1] = 1 - parts.sum(axis=1)
    names, factors = np.array(Factors._fields), np.exp(logs)
    capped = told & (factors > BELOW * np.array(predict.ceilings))
    return _Fitted(
        Factors(*map(float, factors)),
        tuple(map(str, names[told])),
        tuple(map(str, names[capped])),
        tuple(KINDS[i] for i in parts.argmax(axis=1)),
    )


def _solved(
    seen: Sequence[Seen],
    predict: _Predictor,
    free: NDArray[np.bool_],
    damping: float,
    start: NDArray[np.float64],
) -> Any:
    """The least squares over the logarithms of the ``free`` factors, 0 for the others, from ``start``;
    its ``jac`` has a row for each work, then one for each factor."""
    from scipy.optimize import least_squares

    measured = np.log([each.seconds for each in seen])

    def missed(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        every = np.zeros(len(free))
        every[free] = logs
        residual = np.log(predict(seen, Factors(*np.exp(every)))) - measured
        return np.concatenate([residual, damping * logs])

    top = np.log(predict.ceilings)[free]
    least = np.full(len(top), np.log(SLOWEST))
    start = np.clip(start, least + 1e-6, top - 1e-6)
    return least_squares(
        missed, start, bounds=(least, np.maximum(top, least + 1e-5)), diff_step=1e-3
    )


# --------------------------------------------------------------------------------- what is written


def residuals(found: Fit) -> Iterator[Residual]:
    """By kind, then of all works."""
    after, held_out = np.abs(found.after), np.abs(found.held_out)
    kinds = np.array(found.kinds)
    for kind in (*KINDS, "all"):
        of_it = kinds == kind if kind != "all" else np.full(len(kinds), fill_value=True)
        if of_it.any():
            sizes = {
                "median": np.median(after[of_it]),
                "worst": after[of_it].max(),
                "held_out_median": np.median(held_out[of_it]),
                "held_out_worst": held_out[of_it].max(),
            }
            shown = {name: float(f"{size:.4g}") for name, size in sizes.items()}
            yield Residual.model_validate({"kind": kind, "n": int(of_it.sum()), **shown})


def source_of(traces: Iterable[Trace]) -> str:
    """Runs, device, versions and days, in words."""
    metas = [{key: printable(value) for key, value in trace.meta} for trace in traces]
    runs = Counter("{model} {spec} {height}x{width} {dtype}".format(**meta) for meta in metas)
    made = dict.fromkeys(
        "{device}, torch {torch}, paradiff {paradiff}, {date}".format_map(
            {"torch": "unknown", "paradiff": "unknown", "date": "undated", **meta}
        )
        for meta in metas
    )
    told = ", ".join(f"{run} ({count} runs)" if count > 1 else run for run, count in runs.items())
    return f"paradiff profile fit: {told}; {'; '.join(made)}"


def corrected_yaml(gpu_name: str, found: Fit, traced: Collection[Dtype], source: str) -> str:
    """The profile's file, comments kept, with the rates that were told put in, and how well they fit.

    Of precisions that run on the units of ``traced``, those of the traces, the rate goes along and is
    transferred; all other numbers and what they rest on are as they were.
    """
    path = find("gpus", gpu_name)
    yaml = YAML(typ="rt")
    yaml.width, yaml.preserve_quotes = 4096, True
    data = yaml.load(path.read_text(encoding="utf-8"))
    old, new = load_gpu(path), found.gpu
    data["name"] = new.name
    for name, entry, value, is_seen in _rates(data, old, new, traced):
        if name in found.capped:
            kind, whose = "assumed", f"its ceiling, which works reach or exceed, {source}"
        elif is_seen:
            kind, whose = "measured", source
        else:
            kind = "transferred"
            whose = f"the factor of {', '.join(sorted(traced))} on the same units, {source}"
        if name in found.told:
            whose = f"{whose}; was {entry['value']}"
            entry |= {"value": value, "kind": kind, "source": whose}
    rows = [CommentedMap(residual.model_dump()) for residual in residuals(found)]
    for row in rows:
        row.fa.set_flow_style()
    data["fitted"] = {"source": source, "residuals": rows}
    out = io.StringIO()
    yaml.dump(data, out)
    Gpu.model_validate(YAML(typ="safe", pure=True).load(out.getvalue()))
    return out.getvalue()


def _rates(
    data: Mapping[str, Any], old: Gpu, new: Gpu, traced: Collection[Dtype]
) -> Iterator[tuple[str, dict[str, Any], str, bool]]:
    """(factor, place in the file, new value, whether works are in its precision) of every rate."""
    for dtype in same_units(old, traced):
        value = f"{new.matmul.of(dtype).value / 1e12:.5g} TFLOP/s"
        yield "matmul", data["matmul"][dtype], value, dtype in traced
    place = old.attention.index(attention_figure(old))
    value = f"{new.attention[place].value / 1e12:.5g} TFLOP/s"
    yield "attention", data["attention"][place], value, True
    value = f"{new.memory_bandwidth.value / 1e9:.5g} GB/s"
    yield "memory", data["memory_bandwidth"], value, True
