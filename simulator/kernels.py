"""Kernels to seconds: tiles, waves and rooflines. Pure functions of a chip and of dimensions.

What this file decides: how long one kernel runs alone on a GPU whose achievable matmul rate and
memory bandwidth are known. What it does not: which kernels run (profiles), launch and host time,
measured tables, intervals (``simulator.costs``).

Every constant is physics, taken from a kernel's source, or fitted by ``tools/fit_kernel_model.py`` to
the GEMM and attention microbenchmarks of ``hardware_profiles/measured``; none to an end-to-end run.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
TILE_EFFICIENCY = {256 * 128: 0.97, 128 * 128: 0.90, 128 * 64: 0.84, 64 * 64: 0.82}
"""Share of an SM's achievable matmul rate by output tile (fitted; smaller tiles reload operands more
often: m*n/(m+n) multiply-adds per element loaded)."""
PROLOGUE_K = 148
"""Filling and draining the k-loop's pipeline costs as much as this many extra k (fitted)."""
GEMM_BANDWIDTH = 0.86
"""Share of the achievable copy bandwidth that a GEMM's operand loads reach (fitted)."""
SPLIT_S = 1.6e-6
"""A split-k GEMM's second pass, before its bytes (fitted)."""
GEMM_FIXED_S = 1.0e-6
"""Begin and end of a GEMM launch beyond its k-loop (fitted)."""

ROWS = 64
"""FlashAttention-2 counts its grid in blocks of 64 query rows, two of which share an SM
(``num_splits_heuristic(batch * heads * ceil(q / 64), 2 * num_sm, ...)``, flash_api.cpp)."""
SPLIT_BLOCK = 128
"""Keys are split over CTAs in blocks of this many (flash_api.cpp, head dim up to 128)."""
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Head dimensions that flash kernels are compiled for; others are padded up to the next."""
ATTENTION_CTA_S = 1.0e-6
"""Prologue and epilogue of one CTA (fitted to attention without a mask, 512 to 16384 tokens, H100)."""
ATTENTION_FIXED_S = 5.8e-6
"""Begin and end of an attention launch (fitted)."""
ALONE = 1.8
"""A CTA alone on its SM takes this much of the time of half a shared SM, over two (fitted)."""
WIDE_ATTENTION = 0.47
"""Share of the matmul rate where no flash kernel exists (head dim above 256): memory-efficient SDPA
reaches 56 of 114 TFLOP/s on L20 and 82 of 168 on RTX 4090 (xlite-dev/ffpa-attn README, D=320)."""
EXP_PER_CLOCK = 16
"""Exponentials an SM evaluates per clock (CUDA programming guide, throughput table, sm80 to sm90)."""
EXP_EXPOSED = 0.5
"""Share of the softmax's exponentials not hidden behind matmuls (an assumption between 0, as RTX
4090 at head dims 64 and 128 shows, and 1)."""
CLOCK_HZ = 1.7e9
"""Clock under load, for exponentials only."""

CONV_EFFICIENCY = 0.80
"""Implicit GEMM against GEMM at equal tiles. An assumption, not fitted: no public table gives
convolutions by shape; index arithmetic and halo loads cost 10-30 % in cuDNN."""


class Chip(NamedTuple):
    """A GPU as a kernel sees it. ``ideal`` chips have no tiles, no floors: cost is FLOPs over rate."""

    sm_flops: float
    """Matmul FLOP/s that one SM achieves, not the data sheet's."""
    sms: int
    memory_bytes_per_s: float
    """Copy bandwidth that is achieved, not the data sheet's."""
    l2_bytes: float
    floor_s: float
    """The shortest kernel."""
    attention: float
    """Share of the matmul rate that long flash attention reaches at ``attention_dim``."""
    attention_dim: int = 128
    ideal: bool = False

    @property
    def matmul_flops(self) -> float:
        return self.sm_flops * self.sms

    def beside_collective(self, sms: int, bandwidth_share: float) -> Chip:
        """What is left while a collective holds ``sms`` SMs and a share of memory bandwidth."""
        return self._replace(
            sms=max(1, self.sms - sms),
            memory_bytes_per_s=self.memory_bytes_per_s * (1 - bandwidth_share),
        )


def waves(ctas: float, slots: int) -> int:
    """How many rounds ``ctas`` equal blocks take on ``slots``: 133 blocks on 132 SMs take 2."""
    return math.ceil(ctas / slots)


@lru_cache(maxsize=1 << 17)
def gemm_s(chip: Chip, batch: int, m: int, n: int, k: int, itemsize: int) -> float:
    """Seconds of ``batch`` products (m, k) x (k, n): the best of a few tilings and k-splits.

    A tiling takes waves(ctas) x 2*tm*tn*(k/split + PROLOGUE_K) / SM rate, never less than its bytes
    take. Leaving each of four measured GPUs out of
    the fit: median error 8 %, worst GPU 16 % (``tools/fit_kernel_model.py``).
    """
    if min(batch, m, n, k) <= 0:
        return 0.0
    if chip.ideal:
        return 2.0 * batch * m * n * k / chip.matmul_flops
    operands = batch * itemsize * (m * k + k * n + m * n)
    loads_s = operands / (chip.memory_bytes_per_s * GEMM_BANDWIDTH)
    best = math.inf
    for tm, tn in TILES:
        ctas = batch * -(-m // tm) * -(-n // tn)
        rate = chip.sm_flops * TILE_EFFICIENCY[tm * tn]
        most = max(1, k // 256) if ctas < chip.sms else 1
        for split in {
            1,
            min(most, max(1, chip.sms // ctas)),
            min(most, max(1, 2 * chip.sms // ctas)),
        }:
            loop_s = 2 * tm * tn * (k / split + PROLOGUE_K) / rate
            reduce_s = 0.0
            if split > 1:  # partial sums in fp32, written and read once
                reduce_s = SPLIT_S + 8 * split * batch * m * n / (3 * chip.memory_bytes_per_s)
            best = min(best, max(waves(ctas * split, chip.sms) * loop_s, loads_s) + reduce_s)
    return max(chip.floor_s, GEMM_FIXED_S + best)


@lru_cache(maxsize=1 << 16)
def conv_s(
    chip: Chip, m: int, n: int, k: int, input_elements: int, itemsize: int, relayout: bool
) -> float:
    """Seconds of a convolution as an implicit GEMM; its input is read once, not k times.

    ``relayout``: eager diffusers keeps NCHW tensors, tensor cores want NHWC, so cuDNN adds a pass
    over the input and one over the output. Inductor plans NHWC once and has none.
    """
    if min(m, n, k) <= 0:
        return 0.0
    if chip.ideal:
        return 2.0 * m * n * k / chip.matmul_flops
    matmul = chip._replace(sm_flops=chip.sm_flops * CONV_EFFICIENCY, memory_bytes_per_s=math.inf)
    tensors = itemsize * (input_elements + m * n)
    loads_s = (tensors + itemsize * n * k) / (chip.memory_bytes_per_s * GEMM_BANDWIDTH)
    seconds = max(gemm_s(matmul, 1, m, n, k, itemsize), GEMM_FIXED_S + loads_s)
    if relayout:
        seconds += stream_s(chip, 2 * input_elements, itemsize)
        seconds += stream_s(chip, 2 * m * n, itemsize)
    return seconds


@lru_cache(maxsize=1 << 16)
def attention_s(
    chip: Chip, batch: int, heads: int, q: int, keys: int, dim: int, value_dim: int, itemsize: int
) -> float:
    """Seconds of flash attention: CTAs of 64 query rows of one head, two to an SM.

    A grid of at most half the chip splits the keys (flash-decoding); fewer heads per GPU, as Ulysses
    leaves, lose whole waves.
    """
    if min(batch, heads, q, keys) <= 0:
        return 0.0
    if chip.ideal:
        return 2.0 * batch * heads * q * keys * (dim + value_dim) / chip.matmul_flops
    grid = _grid(chip, batch, heads, q, keys, dim, value_dim)
    full, rest = divmod(grid.ctas, grid.slots)
    last = ALONE / 2 if rest <= chip.sms else 1.0
    busy_s = grid.shared_s * (full + (last if rest else 0.0))
    moved = batch * heads * itemsize * (q * (dim + value_dim) + keys * (dim + value_dim))
    return ATTENTION_FIXED_S + max(busy_s, moved / chip.memory_bytes_per_s)


def placed_s(
    chip: Chip, batch: int, heads: int, q: int, keys: int, dim: int, value_dim: int
) -> float:
    """Seconds from the start of :func:`attention_s` until its last CTA has got its place on an SM.

    Until then no CTA of a later launch gets one: blocks are placed in the order of launches (Amert et
    al., GPU Scheduling on the NVIDIA TX2: Hidden Details Revealed, RTSS 2017).
    """
    if chip.ideal or min(batch, heads, q, keys) <= 0:
        return 0.0
    grid = _grid(chip, batch, heads, q, keys, dim, value_dim)
    return (waves(grid.ctas, grid.slots) - 1) * grid.shared_s


class _Grid(NamedTuple):
    """CTAs of an attention, how many run at once, and seconds of one that shares its SM."""

    ctas: int
    slots: int
    shared_s: float


def _grid(chip: Chip, batch: int, heads: int, q: int, keys: int, dim: int, value_dim: int) -> _Grid:
    wide = max(dim, value_dim) > HEAD_DIMS[-1]
    flops_per_score = 2 * (padded(dim) + padded(value_dim))
    rate = chip.sm_flops * (WIDE_ATTENTION if wide else chip.attention * softmax_share(chip, dim))
    slots = 2 * chip.sms
    ctas = batch * heads * -(-q // ROWS)
    split = max(1, min(slots // ctas, keys // SPLIT_BLOCK))
    shared_s = ROWS * -(-keys // split) * flops_per_score / (rate / 2) + ATTENTION_CTA_S
    return _Grid(ctas * split, slots, shared_s)


def padded(head_dim: int) -> int:
    """The head dimension a flash kernel computes with: PixArt's 72 costs 96."""
    for size in HEAD_DIMS:
        if head_dim <= size:
            return size
    return head_dim


def softmax_share(chip: Chip, head_dim: int) -> float:
    """Matmul efficiency at ``head_dim`` relative to ``chip.attention_dim``.

    A score costs 4*d/F clocks of matmul (F: FLOPs per clock of an SM) and EXP_EXPOSED / 16 of
    exponentials that stay visible: efficiency goes as d / (d + d0), d0 = EXP_EXPOSED * F / 64.
    """
    d, known = padded(head_dim), chip.attention_dim
    d0 = EXP_EXPOSED * chip.sm_flops / CLOCK_HZ / (4 * EXP_PER_CLOCK)
    return (d / (d + d0)) / (known / (known + d0))


def stream_s(chip: Chip, elements: int, itemsize: int) -> float:
    """Seconds of a kernel that only moves ``elements`` (read plus written) through memory.

    What fits in half the L2 was left there by the kernel before and moves three times faster: an
    assumption below the A100 white paper's ratio (5120 B per clock of L2, 4.6 times its HBM).
    """
    if elements <= 0 or chip.ideal:
        return 0.0
    moved = elements * itemsize
    bandwidth = chip.memory_bytes_per_s * (3 if moved <= chip.l2_bytes / 2 else 1)
    return max(chip.floor_s, moved / bandwidth + chip.floor_s / 2)
