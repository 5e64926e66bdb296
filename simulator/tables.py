"""Public kernel tables that ship: how far the kernel model is off at measured shapes, and for whom.

A table corrects the model, it never replaces its ceilings: what is looked up is measured over modelled
on the GPU of the table, so that it can be lent to a GPU with the same chip (:func:`lender`) whose
memory, clock or links differ. Kernels timed on a device of one's own: ``simulator.measured``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from simulator.gpu import Gpu, load_gpu
from simulator.kernels import Chip, attention_s, gemm_s
from simulator.lint import read_table

NEIGHBOURS = 5
SAME_CHIP = math.log(1.12)
"""How far the matmul rates of one chip in two products may be apart: an A100 PCIe of 300 W reaches 0.93
of the SXM module's rate, the 40 GB one 0.91."""

Shape3 = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Table:
    """Measured times of one kind of kernel on one GPU: shape -> seconds. A ``gemm`` is (m, n, k); an
    ``attention`` without a mask, of as many queries as keys, (batch x heads, tokens, head dimension).
    ``sources``: who measured them."""

    kind: str
    points: Mapping[Shape3, float]
    sources: tuple[str, ...] = ()

    def has(self, sizes: Sequence[int]) -> bool:
        """Whether this very kernel was measured."""
        return self._shape(sizes) in self.points

    def correction(self, chip: Chip, sizes: Sequence[int], itemsize: int) -> float | None:
        """Measured over modelled on ``chip``, that of the table: at this shape, else at the nearest (log
        distance, weights 1/d), None outside the range of any axis. Utilisation is lent, never time.

        ``sizes`` are those of ``paradiff.profiles.KERNEL_DIMS``.
        """
        shape = self._shape(sizes)
        inside = (
            shape is not None
            and self.points
            and all(
                min(axis) <= size <= max(axis)
                for axis, size in zip(zip(*self.points, strict=True), shape, strict=True)
            )
        )
        if shape is None or not inside:
            return None
        if shape in self.points:
            return self.points[shape] / self._modelled_s(chip, shape, itemsize)
        near = sorted((math.dist(_log(p), _log(shape)), p) for p in self.points)[:NEIGHBOURS]
        errors = [math.log(self.points[p] / self._modelled_s(chip, p, itemsize)) for _, p in near]
        weights = [1 / max(d, 1e-6) for d, _ in near]
        return math.exp(sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights))

    def _shape(self, sizes: Sequence[int]) -> Shape3 | None:
        if self.kind == "gemm":
            batch, m, n, k = sizes
            return (m, n, k) if batch == 1 else None
        batch, heads, q, keys, dim, value_dim = sizes
        return (batch * heads, q, dim) if q == keys and dim == value_dim else None

    def _modelled_s(self, chip: Chip, shape: Shape3, itemsize: int) -> float:
        if self.kind == "gemm":
            return gemm_s(chip, 1, *shape, itemsize)
        tiles, tokens, width = shape
        return attention_s(chip, 1, tiles, tokens, tokens, width, width, itemsize)


def _log(shape: Iterable[int]) -> tuple[float, ...]:
    return tuple(map(math.log, shape))


@cache
def measured_gemms(gpu: str) -> Table:
    """The shipped GEMM table of a GPU; empty where there is none. Raises ConfigError for a row that
    cannot be (``simulator.lint``)."""
    rows = _rows(gpu, "gemm")
    shapes = [(int(r["m"]), int(r["n"]), int(r["k"])) for r in rows]
    return Table("gemm", dict(zip(shapes, map(_seconds, rows), strict=True)), _sources(rows))


@cache
def measured_attention(gpu: str, kernel: str) -> Table:
    """The rows of ``kernel`` without a mask in a GPU's attention table: most have one, which halves the
    work and makes it uneven."""
    rows = [r for r in _rows(gpu, "attention") if r["causal"] == "no" and r["kernel"] == kernel]
    shapes = [(int(r["batch"]) * int(r["heads"]), int(r["seq"]), int(r["head_dim"])) for r in rows]
    return Table("attention", dict(zip(shapes, map(_seconds, rows), strict=True)), _sources(rows))


def _seconds(row: Mapping[str, str]) -> float:
    return float(row["time_us"]) * 1e-6


def _sources(rows: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row["source"] for row in rows))


def _measured() -> Path:
    return Path(str(resources.files("hardware_profiles"))) / "measured"


def _rows(gpu: str, table: str) -> list[dict[str, str]]:
    file = _measured() / gpu / f"{table}.csv"
    return read_table(file, table, load_gpu(gpu)) if file.is_file() else []


def lender(gpu: Gpu, kind: str, kernel: str) -> tuple[Table, Gpu] | None:
    """The table of ``kind`` (``gemm``, or ``attention`` by ``kernel``) for ``gpu``, and whose it is.

    Its own, else that of the nearest by matmul rate and memory bandwidth among the GPUs with the same
    chip (as many SMs, a matmul rate within SAME_CHIP); None where there is none.

    The errors of the model on one chip say little of another's: taken from any other of the four, the
    median error of a GEMM is 6 to 16 %, where the model alone has 4 to 10 %. Between H100 and H200 the
    medians fall from 7.7 and 6.2 to 5.9 %.
    """
    tables = _tables(kind, kernel)
    if gpu.name in tables:
        return tables[gpu.name][0], gpu
    near = [
        (_apart(gpu, there), name)
        for name, (_, there) in tables.items()
        if there.sms.value == gpu.sms.value
        and abs(math.log(there.matmul.half / gpu.matmul.half)) <= SAME_CHIP
    ]
    return tables[min(near)[1]] if near else None


@cache
def _tables(kind: str, kernel: str) -> Mapping[str, tuple[Table, Gpu]]:
    """The GPUs that ship with such a table."""
    found = {}
    for path in sorted(_measured().glob(f"*/{kind}.csv")):
        name = path.parent.name
        table = measured_gemms(name) if kind == "gemm" else measured_attention(name, kernel)
        if table.points:
            found[name] = table, load_gpu(name)
    return found


def _apart(a: Gpu, b: Gpu) -> float:
    return math.hypot(
        math.log(a.matmul.half / b.matmul.half),
        math.log(a.memory_bandwidth.value / b.memory_bandwidth.value),
    )
