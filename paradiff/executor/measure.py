"""How long single kernels take on a device of this machine.

Decides what stands for a kernel of a profile (a linear layer, a convolution, an attention, a norm, an
elementwise map) and how it is timed: warmed up, each sample long enough for the clock, inputs from a
ring of copies larger than the last cache, random numbers (zeros cost less power and less time). Which
kernels, and where the times go, is the caller's business.

``kind`` and ``dims`` are those of ``paradiff.profiles.KERNEL_DIMS``.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UPS = 2
SAMPLE_S = 200e-6
"""A sample repeats the kernel until it lasts this long."""
LEAST_SAMPLES, MOST_SAMPLES = 5, 100
PRECISE = 0.02
"""Samples are taken until their median is known to this share (one standard error)."""
PATIENCE_S = 1.0
"""Once a kernel took this long in all, LEAST_SAMPLES are enough."""
MOST_BYTES = 4 * 2**30
"""Inputs of a kernel that is tried."""
MOST_COPIES = 4096
ALIGN = 64
"""Elements that inputs begin at a multiple of."""
NORM_WIDTH = 1024
VOLUMES: Mapping[int, tuple[int, ...]] = {
    1: (1, 1), 9: (3, 3), 3: (3, 1, 1), 27: (3, 3, 3), 25: (5, 5), 49: (7, 7),
}  # fmt: skip
"""Kernel shapes of stride 1 by volume."""


class Timing(NamedTuple):
    """Seconds: the median of ``runs`` samples and their quartiles."""

    time_s: float
    low_s: float
    high_s: float
    runs: int


class NotMeasurable(ValueError):
    """A kernel that cannot be set up here; the message says why."""


def is_here(kind: str) -> bool:
    """Whether this machine has a device of that kind (cpu, cuda)."""
    return kind == "cpu" or torch.cuda.is_available()


def device_of(kind: str, index: int) -> torch.device:
    """The device of one of several processes on a machine."""
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)


def pin_to_cores(local_rank: int) -> None:
    """Keep this process on as many cores as torch has threads, processes of one machine on different
    ones; before it makes any threads. Raises ValueError where that is not possible."""
    threads = torch.get_num_threads()
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("--pin: this system does not let a process choose its cores")
    cores = sorted(os.sched_getaffinity(0))
    own = cores[local_rank * threads : (local_rank + 1) * threads]
    if len(own) < threads:
        raise ValueError(
            f"--pin: process {local_rank} of {threads} threads, {len(cores)} cores here, allowed: fewer"
            " processes, or fewer threads (OMP_NUM_THREADS)"
        )
    os.sched_setaffinity(0, own)


def machine(kind: str) -> dict[str, str]:
    """What a table must say of where it was measured."""
    device = torch.device(kind)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    found = {
        "device": name,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "0",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        found["cuda"] = f"{torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"
    return found


def made_on(device: torch.device) -> dict[str, str]:
    """What a trace must say of where and when it was measured."""
    today = time.strftime("%Y-%m-%d")
    return {**machine(str(device)), "diffusers": version("diffusers"), "date": today}


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def measure(kind: str, dims: Sequence[int], dtype: str, on: str) -> Timing:
    """Time one kernel on a device (cpu, cuda). Raises NotMeasurable where it does not fit in memory, or
    where no layer has these dimensions."""
    make = {"gemm": _gemm, "conv": _conv, "attention": _attention, "norm": _norm}.get(kind, _map)
    device = torch.device(on)
    try:
        with torch.inference_mode():
            shapes, call = make(tuple(dims))
            ring = _ring(shapes, DTYPES[dtype], device)
            clock = _cuda_clock if device.type == "cuda" else _host_clock
            return _timed(lambda i: call(*ring[i % len(ring)]), clock)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NotMeasurable(f"{kind} {dims}: does not fit in memory ({error})") from None
    except RuntimeError as error:
        raise NotMeasurable(f"{kind} {dims}: {error}") from None


Shapes = tuple[tuple[int, ...], ...]
Call = Callable[..., torch.Tensor]


def _gemm(dims: tuple[int, ...]) -> tuple[Shapes, Call]:
    batch, m, n, k = dims
    if batch == 1:
        return ((m, k), (n, k)), F.linear
    return ((batch, m, k), (batch, k, n)), torch.bmm


def _attention(dims: tuple[int, ...]) -> tuple[Shapes, Call]:
    batch, heads, q, keys, dim, value_dim = dims
    shapes = ((batch, heads, q, dim), (batch, heads, keys, dim), (batch, heads, keys, value_dim))
    return shapes, F.scaled_dot_product_attention


def _conv(dims: tuple[int, ...]) -> tuple[Shapes, Call]:
    """A convolution of stride 1 whose implicit GEMM and input are these; else one of stride 2.

    With kernel volume v the input has ``input_elements * v / k`` positions.
    """
    m, n, k, elements = dims
    for volume, kernel in VOLUMES.items():
        positions, rest = divmod(elements * volume, k)
        if k % volume or rest or positions < m:
            continue
        found = _whole(m, positions, kernel) or _strip(m, positions, kernel)
        found = found or _causal(m, positions, kernel)
        if found is not None:
            size, padding = found
            call = F.conv2d if len(kernel) == 2 else F.conv3d
            shapes = ((1, k // volume, *size), (n, k // volume, *kernel))
            return shapes, partial(call, padding=padding)
    quarter, rest = divmod(elements * 9 // k, 4)
    columns = quarter - m  # a strip of 2 rows for each row of the output and two halo rows
    if k % 9 == 0 and not rest and columns >= 0 and (columns == 0 or m % columns == 0):
        rows, columns = (m // columns + 1, columns) if columns else _factors(m, 2)
        shapes = ((1, k // 9, 2 * rows, 2 * columns), (n, k // 9, 3, 3))
        padding = (0, 1) if quarter > m else (1, 1)
        return shapes, partial(F.conv2d, stride=2, padding=padding)
    raise NotMeasurable(f"conv {dims}: no kernel of stride 1 or 2 has these dimensions")


Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Sides of a convolution's input, and its padding."""


def _whole(m: int, positions: int, kernel: tuple[int, ...]) -> Layout | None:
    """As many input positions as output positions: every side is padded."""
    if positions != m:
        return None
    return _factors(m, len(kernel)), tuple(side // 2 for side in kernel)


def _strip(m: int, positions: int, kernel: tuple[int, ...]) -> Layout | None:
    """Rows with halo rows above and below in the input; the columns are padded. A batch counts as
    columns."""
    if len(kernel) != 2 or kernel[0] == 1 or positions <= m:
        return None
    columns, odd = divmod(positions - m, kernel[0] - 1)
    if odd or not columns or m % columns:
        return None
    return (m // columns + kernel[0] - 1, columns), (0, kernel[1] // 2)


def _causal(m: int, positions: int, kernel: tuple[int, ...]) -> Layout | None:
    """Frames with two earlier ones in the input, as causal video autoencoders cut them; rows and
    columns padded by the convolution, or in the input: (frames + 2) (rows + 2) (columns + 2) positions.
    """
    if kernel != (3, 3, 3):
        return None
    area, odd = divmod(positions - m, 2)
    if area and not odd and m % area == 0:
        return (m // area + 2, *_factors(area, 2)), (0, 1, 1)
    for frames in range(1, 65):
        area, rest = divmod(m, frames)
        padded, odd = divmod(positions, frames + 2)
        half = (padded - area - 4) // 2  # rows + columns
        root = math.isqrt(max(half * half - 4 * area, 0))
        rows, columns = (half - root) // 2, (half + root) // 2
        fits = rows * columns == area and (rows + 2) * (columns + 2) == padded
        if not rest and not odd and rows > 0 and fits:
            return (frames + 2, rows + 2, columns + 2), (0, 0, 0)
    return None


def _factors(positions: int, axes: int) -> tuple[int, ...]:
    """``positions`` as nearly equal sides; a third side, frames, is at most 8."""
    frames = max(f for f in range(1, 9) if positions % f == 0) if axes == 3 else 1
    area = positions // frames
    rows = max(side for side in range(1, math.isqrt(area) + 1) if area % side == 0)
    return (frames, rows, area // rows)[3 - axes :]


def _norm(dims: tuple[int, ...]) -> tuple[Shapes, Call]:
    width = min(NORM_WIDTH, max(1, dims[0] // 2))
    shapes = ((max(1, dims[0] // 2 // width), width),)
    return shapes, lambda x: F.layer_norm(x, (width,))


def _map(dims: tuple[int, ...]) -> tuple[Shapes, Call]:
    return ((max(1, dims[0] // 2),),), F.silu


def _ring(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[list[torch.Tensor]]:
    """Sets of random inputs, together twice the last cache, so that none is warm when its turn comes:
    cut out of one pool of random numbers, or their own where they are larger than it."""
    pool = _pool(dtype, device)
    sizes = [-(-math.prod(shape) // ALIGN) * ALIGN for shape in shapes]
    if sum(sizes) > pool.numel():
        if sum(sizes) * dtype.itemsize > MOST_BYTES:
            need = sum(sizes) * dtype.itemsize / 2**30
            raise NotMeasurable(f"{need:.1f} GiB of inputs, allowed: {MOST_BYTES / 2**30:g}")
        return [[torch.randn(shape, device=device, dtype=dtype) for shape in shapes]]
    ring = []
    for first in range(0, pool.numel() - sum(sizes) + 1, sum(sizes)):
        starts = accumulate(sizes, initial=first)
        ring.append(
            [
                pool[start : start + math.prod(shape)].view(shape)
                for start, shape in zip(starts, shapes, strict=False)
            ]
        )
        if len(ring) == MOST_COPIES:
            break
    return ring


@cache
def _pool(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers, twice the last cache of them."""
    return torch.randn(2 * _cache_bytes(device) // dtype.itemsize, device=device, dtype=dtype)


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in found]
    return max([*sizes, 2**25])


def _host_clock(run: Callable[[], None]) -> float:
    """Wall time; with one thread that thread's own time, which what else runs here does not lengthen."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def _cuda_clock(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _timed(call: Callable[[int], object], clock: Callable[[Callable[[], None]], float]) -> Timing:
    step = 0

    def run(times: int) -> Callable[[], None]:
        def launch() -> None:
            nonlocal step
            for _ in range(times):
                call(step)
                step += 1

        return launch

    first = [clock(run(1)) for _ in range(WARM_UPS + 1)][-1]
    times = max(1, math.ceil(SAMPLE_S / max(first, 1e-7)))
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < MOST_SAMPLES:
        samples.append(clock(run(times)) / times)
        if len(samples) < LEAST_SAMPLES:
            continue
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        error = median_error(low, high, len(samples))
        if error < PRECISE * middle or time.perf_counter() - began > PATIENCE_S:
            break
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, len(samples))


def mean_of(samples: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: inf for one sample."""
    error = statistics.stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else math.inf
    return statistics.fmean(samples), error


def median_error(low: float, high: float, count: int) -> float:
    """Standard error of a median from its quartiles, for normal noise: 1.253 sigma / sqrt(count), sigma
    = (high - low) / 1.349."""
    return 1.253 / 1.349 * (high - low) / math.sqrt(count)
