"""What cannot be true of measured numbers: rates above a ceiling, one table under two names, no source.

Kernel tables are checked when they are read (:func:`read_table`), everything that ships in the tests
(:func:`shipped_problems`). Public collections need it: of one attention table thousands of rows imply
more than the device's peak, two NCCL profiles of different boxes are byte for byte the same, and
several sites list sparse peaks as dense ones.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from paradiff.config import ConfigError, available, find
from simulator.gpu import BOOST, Gpu, load_gpu
from simulator.topology import load_topology

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k", "dtype", "time_us", "source"),
    "attention": (
        "batch", "seq", "heads", "head_dim", "causal", "kernel", "dtype", "time_us", "source",
    ),
}  # fmt: skip
TEXT = {"dtype", "causal", "kernel", "source"}
LOW_SHARE = 0.55
"""Power-limited cards reach half of their dense peak (A10 0.45, L4 0.58); what reaches less than this
needs a source that says its peak is dense, as a sparse peak is twice the dense one."""
WHEN = re.compile(r"(?<!older than )\b20\d\d\b|\bcommit [0-9a-f]{7}|\bundated\b")
"""What a price's source must say: a year, a day, the commit of the list it was read in, or undated."""
_MODEL = re.compile(r"[A-Z]*\d+[A-Z]*")
_NO_MODEL = re.compile(r"\d{1,3}|\d+GB?|SXM\d|HBM\dE?")
FLOOR_SHARE = 0.25
"""Part of a GPU's shortest kernel that none can take: the profile's is one launch's, seldom measured."""


def read_table(path: Path, table: str, gpu: Gpu) -> list[dict[str, str]]:
    """The rows of a kernel table. Raises ConfigError with the line for the first that cannot be."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [c for c in COLUMNS[table] if c not in (reader.fieldnames or ())]:
            raise ConfigError(f"{path}:1: column missing ({missing[0]})")
        rows = []
        for row in reader:
            if problem := row_problem(row, table, gpu):
                raise ConfigError(f"{path}:{reader.line_num}: {problem}")
            rows.append(row)
    return rows


def row_problem(row: Mapping[str, str], table: str, gpu: Gpu) -> str | None:
    """Why a row of a kernel table cannot be true; None where it can.

    Example: 4096 x 4096 x 4096 in 100 us is 1374 TFLOP/s, which no L40S has.
    """
    if not (row["source"] or "").strip():
        return "source: blank, allowed: where the number comes from"
    try:
        sizes = {c: float(row[c]) for c in COLUMNS[table] if c not in TEXT}
    except (TypeError, ValueError) as error:
        return f"not a number ({error})"
    if bad := [c for c, value in sizes.items() if not 0 < value < math.inf]:
        return f"{bad[0]}: not allowed ({row[bad[0]]}), allowed: a positive number"
    seconds = sizes.pop("time_us") * 1e-6
    return time_problem(*_work(table, sizes, row), seconds, row["dtype"], gpu)


def time_problem(flops: float, nbytes: float, seconds: float, dtype: str, gpu: Gpu) -> str | None:
    """Why a kernel of ``flops`` and ``nbytes`` cannot have taken ``seconds``; None where it can."""
    time = f"time_us: {seconds * 1e6:g}"
    peak = gpu.roof(dtype)
    if flops / seconds > BOOST * peak:
        rate = f"{flops / seconds / 1e12:.0f} TFLOP/s"
        return f"{time} implies {rate}, {gpu.name} has {peak / 1e12:.0f} in {dtype}"
    memory = gpu.memory_bandwidth_peak.value
    if nbytes > gpu.l2.value and nbytes / seconds > BOOST * memory:
        return (
            f"{time} implies {nbytes / seconds / 1e9:.0f} GB/s, {gpu.name} has {memory / 1e9:.0f}"
        )
    if seconds < FLOOR_SHARE * gpu.kernel_floor.value:
        floor = f"{gpu.kernel_floor.value * 1e6:g} us"
        return f"{time} is less than a launch takes: {gpu.name} needs {floor} for its shortest"
    return None


def _work(table: str, sizes: Mapping[str, float], row: Mapping[str, str]) -> tuple[float, float]:
    """FLOPs and the bytes that must cross memory once."""
    itemsize = 4 if row["dtype"] == "fp32" else 2
    if table == "gemm":
        m, n, k = sizes["m"], sizes["n"], sizes["k"]
        return 2 * m * n * k, itemsize * (m * k + k * n + m * n)
    tokens = sizes["batch"] * sizes["heads"] * sizes["seq"] * sizes["head_dim"]
    half = 0.5 if row["causal"] == "yes" else 1.0
    return half * 4 * tokens * sizes["seq"], itemsize * 4 * tokens


def models(name: str) -> set[str]:
    """``NVIDIA A100-SXM4-80GB`` -> {A100}: words with a number that is no size."""
    return {word for word in _MODEL.findall(name.upper()) if not _NO_MODEL.fullmatch(word)}


def is_the_gpu(device: str, gpu: Gpu) -> bool:
    """Whether a device's own name is that of a profile; of a profile that names no model, any is."""
    own = models(gpu.full_name)
    return gpu.is_ideal or not own or not own.isdisjoint(models(device))


def gpu_problems(gpu: Gpu) -> Iterator[str]:
    """What of a GPU profile looks like a sparse peak, or is a price of no date."""
    share = gpu.matmul.half / gpu.peak.half
    kinds = {figure.kind for figure in (gpu.matmul.fp16, gpu.matmul.bf16)}
    if kinds == {"measured"} and share < LOW_SHARE and "dense" not in gpu.peak.fp16.source:
        yield (
            f"{gpu.name}: peak.fp16 is {1 / share:.1f} times the best product measured;"
            " is it the sparse number? Its source should say dense"
        )
    if gpu.price_per_hour is not None and not WHEN.search(gpu.price_per_hour.source):
        yield (
            f"{gpu.name}: price_per_hour.source: {gpu.price_per_hour.source!r} does not say when,"
            " allowed: a text with a day, a year, a commit or the word undated"
        )


def twins(tables: Mapping[str, Sequence[tuple[float, ...]]]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tables hold the same numbers."""
    seen: dict[tuple[tuple[float, ...], ...], str] = {}
    for name, points in tables.items():
        key = tuple(sorted(points))
        if key and key in seen:
            yield seen[key], name
        seen.setdefault(key, name)


def shipped_problems() -> list[str]:
    """Everything that ships: kernel tables, GPU profiles, tables of collectives."""
    found: list[str] = []
    measured: dict[str, list[tuple[float, ...]]] = {}
    folder = find("gpus", "l40").parent.parent / "measured"
    for path in sorted(folder.glob("*/*.csv")):
        if path.stem not in COLUMNS:
            continue
        try:
            rows = read_table(path, path.stem, load_gpu(path.parent.name))
        except ConfigError as error:
            found.append(str(error))
            continue
        numbers = [c for c in COLUMNS[path.stem] if c not in TEXT]
        measured[f"{path.parent.name}/{path.name}"] = [
            tuple(float(row[c]) for c in numbers) for row in rows
        ]
    found += [f"{a} and {b} hold the same numbers" for a, b in twins(measured)]
    for name in available("gpus"):
        found += gpu_problems(load_gpu(name))
    for name in available("topologies"):
        if load_topology(name).price_per_hour is not None:
            found.append(f"{name}: a price_per_hour without source; give it to the GPUs")
    return found + list(_collective_problems())


def _collective_problems() -> Iterator[str]:
    """Tables of collectives that are another box's and do not say so."""
    tables: dict[str, list[tuple[float, ...]]] = {}
    for name in available("topologies"):
        box = load_topology(name)
        for table in box.collectives:
            points: list[tuple[float, ...]] = [*zip(table.sizes, table.seconds, strict=True)]
            if "transferred" not in table.source:
                tables[f"{name} {table.kind} {table.ranks} {table.source}"] = points
    for a, b in twins(tables):
        if a.split(" ", 3)[3] != b.split(" ", 3)[3]:
            yield f"{a} and {b} hold the same numbers"
