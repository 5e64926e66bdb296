"""One GPU model as numbers with their sources: what it could do, what it was seen to do.

:class:`Gpu` is the schema of ``hardware_profiles/gpus/*.yaml``. Every number is a :class:`Figure`, so
that a prediction can say what it rests on: ``measured`` on this GPU, ``spec`` from a data sheet,
``transferred`` from a sibling by a ratio that the source states, or ``assumed``. How long a kernel
takes is decided in ``simulator.costs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from paradiff.config import Name, Strict, find, load_yaml, problem
from paradiff.units import Bytes, BytesPerSecond, Dollars, FlopPerSecond, Seconds, Watts

Value = TypeVar("Value")
FigureKind = Literal["measured", "spec", "transferred", "assumed"]
Runtime = Literal["eager", "compiled", "cuda-graph"]
Dtype = Literal["fp16", "bf16", "fp32"]
AttentionKernel = Literal["flash2", "flash3", "cudnn", "efficient"]
"""``efficient`` is SDPA's memory-efficient kernel, which GPUs before Ampere fall back to."""
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BOOST = 1.1
"""How far a rate may exceed the peak: cards boost above the clock of their data sheet (an RTX 3090 by
7.5 %)."""


class Figure(Strict, Generic[Value]):
    """A number in base units, what kind of knowledge it is, and where it comes from."""

    value: Value
    """The number."""
    kind: FigureKind
    """What kind of knowledge it is."""
    source: str = Field(min_length=1)
    """Where it comes from."""


class AttentionFigure(Figure[FlopPerSecond]):
    """Best forward attention at one head width, FLOP/s of 4*q*k*d per head (half of it if causal)."""

    head_dim: Count
    """Width of a head."""
    kernel: AttentionKernel
    """The kernel that was timed."""


class Rates(Strict):
    """FLOP/s per data type. fp32 means CUDA cores, not TF32."""

    fp16: Figure[FlopPerSecond]
    """Inputs in fp16."""
    bf16: Figure[FlopPerSecond]
    """Inputs in bf16."""
    fp32: Figure[FlopPerSecond]
    """Inputs in fp32."""

    @property
    def half(self) -> float:
        """FLOP/s in the better of fp16 and bf16: before Ampere, tensor cores know fp16 only."""
        return max(self.fp16.value, self.bf16.value)

    def of(self, dtype: str) -> Figure[FlopPerSecond]:
        """The figure for ``dtype``; ValueError naming the allowed ones."""
        known = {"fp16": self.fp16, "bf16": self.bf16, "fp32": self.fp32}
        if dtype not in known:
            raise ValueError(f"no rate for dtype {dtype!r}, allowed: {', '.join(known)}")
        return known[dtype]


class Launch(Strict):
    """Host seconds per kernel launch: the floor below which a rank cannot issue work."""

    eager: Figure[Seconds]
    """One by one from Python."""
    compiled: Figure[Seconds]
    """From code that torch.compile has made."""
    cuda_graph: Figure[Seconds] = Field(alias="cuda-graph")
    """Replayed as a graph."""

    def of(self, runtime: str) -> Figure[Seconds]:
        """The figure for ``runtime``; ValueError naming the allowed ones."""
        known = {"eager": self.eager, "compiled": self.compiled, "cuda-graph": self.cuda_graph}
        if runtime not in known:
            raise ValueError(f"no launch cost for {runtime!r}, allowed: {', '.join(known)}")
        return known[runtime]


class Residual(Strict):
    """Sizes of predicted / measured - 1 of works of one kind, with the fitted rates."""

    kind: Literal["matmul", "attention", "memory", "launches", "all"]
    """What most of their time goes to, as the profile has it."""
    n: Count
    """Distinct works."""
    median: Share
    """With rates that were fitted to all works."""
    worst: Share
    """The same, the largest."""
    held_out_median: Share
    """With rates that were fitted without the work and without all that share its kernels."""
    held_out_worst: Share
    """The same, the largest."""


class Fitted(Strict):
    """What rates were fitted to, and how well."""

    source: str = Field(min_length=1)
    """Which runs, where and when."""
    residuals: tuple[Residual, ...] = Field(min_length=1)
    """By kind, then of all."""

    @model_validator(mode="after")
    def _all_last(self) -> Fitted:
        last = self.residuals[-1].kind
        if last != "all":
            raise problem("the last residual", last, "all", ("residuals", len(self.residuals) - 1))
        return self


class Gpu(Strict):
    """A GPU profile."""

    name: Name
    """What topologies call it."""
    full_name: Name
    """What its maker calls it."""
    peak: Rates
    """Dense tensor-core peak without sparsity; the roof of every other rate."""
    matmul: Rates
    """Best matrix product seen, FLOP/s: the roof that a cost model should use."""
    attention: tuple[AttentionFigure, ...] = Field(min_length=1)
    """Best attention seen, by head width and kernel."""
    memory_bandwidth_peak: Figure[BytesPerSecond]
    """Of the data sheet."""
    memory_bandwidth: Figure[BytesPerSecond]
    """Achievable, bytes read plus bytes written."""
    memory: Figure[Bytes]
    """Of the device."""
    l2: Figure[Bytes]
    """Size of the L2 cache."""
    sms: Figure[Count]
    """Streaming multiprocessors."""
    kernel_floor: Figure[Seconds]
    """Shortest time of any kernel on the device."""
    launch: Launch
    """Host time per kernel launch."""
    collective_sms: Figure[Count]
    """SMs that a collective's kernels take from overlapped compute."""
    pcie: Figure[Count] | None = None
    """PCIe generation of its sixteen lanes; None where it has none."""
    nvlinks: Figure[Count] | None = None
    """How many it has; None where it has none."""
    nvlink_bandwidth: Figure[BytesPerSecond] | None = None
    """Of one NVLink, each direction, before what protocol takes."""
    tdp: Figure[Watts]
    """Thermal design power."""
    price_per_hour: Figure[Dollars] | None = None
    """Of one GPU; None where nobody prints one."""
    fitted: Fitted | None = None
    """Of rates that `paradiff profile fit` has corrected; None where it has not."""

    @model_validator(mode="after")
    def _below_peak(self) -> Gpu:
        for dtype in ("fp16", "bf16", "fp32"):
            roof, seen = self.peak.of(dtype), self.matmul.of(dtype)
            if seen.value > BOOST * roof.value:
                raise problem(
                    "more FLOP/s than the peak", seen.value, f"{roof.value:g} at most",
                    ("matmul", dtype, "value"),
                )  # fmt: skip
        half = self.peak.half
        for i, figure in enumerate(self.attention):
            if figure.value > BOOST * half:
                raise problem(
                    "more FLOP/s than the peak", figure.value, f"{half:g} at most",
                    ("attention", i, "value"),
                )  # fmt: skip
        if self.memory_bandwidth.value > self.memory_bandwidth_peak.value:
            raise problem(
                "more than the peak", self.memory_bandwidth.value,
                f"{self.memory_bandwidth_peak.value:g} at most", ("memory_bandwidth", "value"),
            )  # fmt: skip
        return self

    def roof(self, dtype: str) -> float:
        """FLOP/s that no kernel exceeds, but for BOOST. fp32 may be TF32, of half the rate of fp16."""
        peak = self.peak.of(dtype).value
        return max(peak, self.peak.half / 2) if dtype == "fp32" else peak

    @property
    def is_ideal(self) -> bool:
        """Whether it is made for closed forms: no time to start a kernel, tensors alone in memory."""
        return self.kernel_floor.value == 0

    def attention_figure(self, head_dim: int, kernel: str = "flash2") -> AttentionFigure:
        """The figure nearest to ``head_dim``, of ``kernel`` where this GPU has one.

        Equally near: the narrower head (the slower one).
        """
        return min(
            self.attention,
            key=lambda f: (f.kernel != kernel, abs(f.head_dim - head_dim), f.head_dim),
        )


def load_gpu(name: str | Path, overrides: Sequence[str] = ()) -> Gpu:
    """The GPU profile called ``name`` (a path, or a shipped name such as ``l40``).

    Raises ConfigError.
    """
    return load_yaml(find("gpus", str(name)), Gpu, overrides)
