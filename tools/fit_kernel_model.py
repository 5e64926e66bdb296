"""Fit and score the kernel model on the shipped microbenchmarks: ``python tools/fit_kernel_model.py``.

Prints the fitted constants of ``simulator.kernels`` and, per GPU, the errors with all GPUs in the fit
and with that GPU left out. Only GEMM and attention tables enter; no end-to-end run does. The residuals
of the left-out GPUs are what ``simulator.costs.SPREAD`` is derived from. Takes about a minute.
"""

from __future__ import annotations

import csv
import heapq
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from simulator import kernels
from simulator.costs import chip_of
from simulator.gpu import load_gpu
from simulator.kernels import Chip

MEASURED = Path(kernels.__file__).parents[1] / "hardware_profiles" / "measured"
GPUS = tuple(sorted(p.name for p in MEASURED.iterdir() if (p / "gemm.csv").is_file()))
TABLE_KERNELS = {"flash_attention": "flash3", "vllm_flash_attn_fa3": "flash3"}
"""Which figure of a GPU's profile a table's kernel belongs to; flash2 where not listed."""

GEMM_START = {
    "large": 0.99, "medium": 0.92, "small": 0.83, "tiny": 0.53,
    "PROLOGUE_K": 90.0, "GEMM_BANDWIDTH": 0.83, "SPLIT_S": 1e-6, "GEMM_FIXED_S": 2.3e-6,
}  # fmt: skip
TILES = {"large": 256 * 128, "medium": 128 * 128, "small": 128 * 64, "tiny": 64 * 64}
CTA_START = {"ATTENTION_CTA_S": 2e-6}
CAUSAL_START = {"DIAGONAL_S": 8e-6, "ATTENTION_FIXED_S": 5e-6, "ALONE": 1.8}
DIAGONAL_S = 8.8e-6
"""What the masked diagonal costs a causal CTA beyond a block of keys (fitted; models do not need it)."""


class Row(NamedTuple):
    """A measured kernel: its sizes and seconds; ``kernel`` names the attention figure to use."""

    sizes: tuple[int, ...]
    seconds: float
    kernel: str = ""


def gemm_rows(gpu: str) -> list[Row]:
    """The GEMM table of a GPU: sizes (m, n, k)."""
    return [
        Row((int(r["m"]), int(r["n"]), int(r["k"])), float(r["time_us"]) * 1e-6)
        for r in _read(gpu, "gemm")
    ]


def attention_rows(gpu: str, *, causal: bool) -> list[Row]:
    """The attention table: sizes (batch, seq, heads, head_dim); of causal ones at least 4 heads.

    Diffusion models run grids of hundreds of CTAs; below 4 heads and 2048 tokens the serving kernels
    of these tables split differently from SDPA's.
    """
    columns = ("batch", "seq", "heads", "head_dim")
    rows = []
    for r in _read(gpu, "attention"):
        sizes = tuple(int(r[c]) for c in columns)
        if causal != (r["causal"] == "yes"):
            continue
        if not causal:
            rows.append(Row(sizes, float(r["time_us"]) * 1e-6, r["kernel"]))
        elif sizes[1] >= 2048 and sizes[2] >= 4:
            hopper = gpu.startswith("h")
            kernel = TABLE_KERNELS.get(r["kernel"], "flash2") if hopper else "flash2"
            rows.append(Row(sizes, float(r["time_us"]) * 1e-6, kernel))
    return rows


def _read(gpu: str, table: str) -> Iterator[dict[str, str]]:
    with (MEASURED / gpu / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def chip(gpu: str, kernel: str = "auto") -> Chip:
    return chip_of(load_gpu(gpu), "bf16", kernel)


def gemm_residuals(gpu: str) -> list[float]:
    """log(model / measured) of every GEMM."""
    c = chip(gpu)
    return [math.log(kernels.gemm_s(c, 1, *r.sizes, 2) / r.seconds) for r in gemm_rows(gpu)]


def attention_residuals(gpu: str) -> list[float]:
    """log(model / measured) of every attention without a mask (H100: three kernels, six lengths)."""
    errors = []
    for row in attention_rows(gpu, causal=False):
        batch, seq, heads, dim = row.sizes
        c = chip(gpu, row.kernel)
        seconds = kernels.attention_s(c, batch, heads, seq, seq, dim, dim, 2)
        errors.append(math.log(seconds / row.seconds))
    return errors


def causal_residuals(gpu: str) -> list[float]:
    """log(model / measured) of every causal attention."""
    chips = {kernel: chip(gpu, kernel) for kernel in ("flash2", "flash3")}
    return [
        math.log(causal_attention_s(chips[r.kernel], *r.sizes) / r.seconds)
        for r in attention_rows(gpu, causal=True)
    ]


def causal_attention_s(c: Chip, batch: int, seq: int, heads: int, dim: int) -> float:
    """The kernel model for a causal mask: CTAs of unequal length, the longest first.

    Block i of 64 rows sees 64*(i+1) keys, and its diagonal costs a further block of 128.
    """
    blocks, sequences, slots = -(-seq // kernels.ROWS), batch * heads, 2 * c.sms
    rate = c.sm_flops * c.attention * kernels.softmax_share(c, dim) / 2
    split = max(1, min(slots // (blocks * sequences), seq // kernels.SPLIT_BLOCK))
    flops = 4 * kernels.ROWS * kernels.padded(dim)
    overhead_s = kernels.ATTENTION_CTA_S + DIAGONAL_S
    keys = [min(seq, kernels.ROWS * (i + 1)) + kernels.SPLIT_BLOCK for i in range(blocks)]
    lengths = [flops * k / split / rate + overhead_s for k in reversed(keys)]
    copies = sequences * split
    if blocks * copies <= c.sms:
        busy_s = lengths[0] * kernels.ALONE / 2
    elif blocks * copies > 12000:
        busy_s = sum(lengths) * copies / slots
    else:
        busy_s = _list_schedule(lengths, copies, slots)
    return busy_s + kernels.ATTENTION_FIXED_S


def _list_schedule(lengths: Sequence[float], copies: int, slots: int) -> float:
    """When the last of ``copies`` of every length ends, each taking the slot that is free first."""
    free = [0.0] * slots
    for length in lengths:
        for _ in range(copies):
            heapq.heapreplace(free, free[0] + length)
    return max(free)


def _set(names: Sequence[str], values: Sequence[float]) -> None:
    for name, value in zip(names, values, strict=True):
        if name == "DIAGONAL_S":
            globals()[name] = float(value)
        elif name in TILES:
            kernels.TILE_EFFICIENCY[TILES[name]] = float(value)
        else:
            setattr(kernels, name, float(value))
    kernels.gemm_s.cache_clear()
    kernels.attention_s.cache_clear()


def fit(start: dict[str, float], residuals: object, gpus: Sequence[str]) -> list[float]:
    """Constants that minimise the soft-l1 log error over ``gpus``; leaves them set."""
    names, scale = list(start), np.array(list(start.values()))

    def errors(x: np.ndarray) -> list[float]:
        _set(names, x * scale)
        return [e for gpu in gpus for e in residuals(gpu)]  # type: ignore[operator]

    found = least_squares(
        errors, np.ones(len(names)), bounds=(0.05, 2.5), loss="soft_l1", f_scale=0.1, diff_step=3e-3
    )
    _set(names, found.x * scale)
    return list(found.x * scale)


def quantiles(errors: Sequence[float]) -> str:
    a = np.abs(errors)
    low, high = np.exp(-np.quantile(errors, [0.95, 0.05]))
    return (
        f"median {np.expm1(np.median(a)):.1%} p90 {np.expm1(np.quantile(a, 0.9)):.1%} "
        f"bias {np.expm1(np.median(errors)):+.1%} measured/model 5-95 % {low:.2f} {high:.2f}"
    )


def main() -> None:
    for title, start, residuals in (
        ("GEMM", GEMM_START, gemm_residuals),
        ("attention", CTA_START, attention_residuals),
        ("attention, causal", CAUSAL_START, causal_residuals),
    ):
        left_out: list[float] = []
        shown: dict[str, list[float]] = {}
        having = [gpu for gpu in GPUS if residuals(gpu)]
        for gpu in having if len(having) > 1 else ():
            fit(start, residuals, [g for g in having if g != gpu])
            shown[gpu] = residuals(gpu)
            left_out += shown[gpu]
        values = fit(start, residuals, having)
        print(title, dict(zip(start, (float(f"{v:.3g}") for v in values), strict=True)))
        for gpu in having:
            print(f"  {gpu:14} all in: {quantiles(residuals(gpu))}")
            if gpu in shown:
                print(f"  {gpu:14} left out: {quantiles(shown[gpu])}")
        if left_out:
            print(f"  pooled, left out: {quantiles(left_out)}")


if __name__ == "__main__":
    main()
