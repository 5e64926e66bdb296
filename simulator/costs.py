"""Work to seconds: what a compute op costs on one device, with provenance and a 90 % interval.

Each kernel is priced from a measured table where its exact shape was measured, else by the kernel
model corrected with the errors it makes at the nearest measured shapes (*interpolated*; *transferred*
where they were measured on another GPU with the same chip), else by the kernel model alone (*analytic*).
Host time, runtimes (eager, compiled, CUDA graphs), interference by collectives and one-number
calibration are decided here; kernels in ``simulator.kernels``; which kernels run in
``paradiff.profiles``; queues and links in ``simulator.engine``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal, NamedTuple

from paradiff.graph import Op, Shape, Work
from paradiff.profiles import Kernel, Profile, Segment, Stage
from simulator.gpu import AttentionFigure, Gpu
from simulator.kernels import Chip, attention_s, conv_s, gemm_s, placed_s, stream_s
from simulator.measured import REPEATED, Estimate, KernelTable, measured_on
from simulator.tables import Table, lender

Runtime = Literal["eager", "compiled", "cuda-graph"]
Provenance = Literal["table", "interpolated", "transferred", "analytic", "calibrated"]
Scope = Literal["denoise", "latent", "pipeline"]

ITEMSIZE: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}

SPREAD: Mapping[str, tuple[float, float]] = {
    "gemm-table": REPEATED,
    "gemm-interpolated": (0.86, 1.16),
    "gemm-transferred": (0.84, 1.18),
    "gemm": (0.83, 1.27),
    "attention": (0.80, 1.32),
    "attention-table": REPEATED,
    "attention-interpolated": (0.90, 1.12),
    "attention-transferred": (0.86, 1.18),
    "conv": (0.70, 1.45),
    "stream": (0.65, 1.50),
    "calibrated": (0.88, 1.14),
}
"""Nominal 90 % interval of a kernel's time, as factors. ``gemm`` and ``attention``: 5 and 95 % residuals
of the kernel model on GPUs left out of its fit (0.85-1.26 and 0.83-1.30, ``tools/fit_kernel_model.py``),
a little wider. ``gemm-interpolated``: leave-one-out residuals of the tables; ``gemm-transferred``: of
H100 from H200 and the reverse (0.87-1.15). ``attention-interpolated``: each of 18 rows from the others,
within 10 %; transferred: wider as for GEMM. ``conv`` and ``stream`` have no table: assumed.
``calibrated``: what is left after one measured shape, at strips of 1/2 to 1/16
of it: 0.87-1.04 in the GEMM tables (averaged over sites; small kernels boost), 0.73-1.25 for a single
attention with fewer heads, 5-15 % between repeat runs of different sources, and what cutting a network
adds and no kernel shows (collectives slow the compute beside them by 19 % on average, arXiv 2507.03114).
Errors of one kind are common to all kernels of a GPU, so they add linearly."""
CEILING_SPREAD = (0.85, 1.18)
"""Further factors where a GPU's ceiling was not measured on it: measured matmul over data-sheet peak is
0.74 (L40S), 0.80 (H100, H200, A6000), 0.87 (A100), 0.96 (L20), 1.03 (RTX 4090); attention over matmul
is 0.72 (A100), 0.76 (L40S), 0.93 (A5000), 1.00 (RTX 4090)."""

GAP = 2.0
"""Device time between one launch and the next, as a multiple of the shortest kernel: the chip drains,
the next kernel starts, and small second passes run (statistics, k-splits, layouts) that profiles do not
list. Fitted to one-GPU runs: SDXL on one A100 under CUDA graphs takes 100.4 ms a step at 1024 and 474 ms
at 2048 px (DistriFusion, table 1 and figure 10), the kernels alone 86 and 438 ms; a constant next to a
factor gives 8.9 ms for 1843 launches, 4.8 us each, where the shortest kernel takes 2.5 us."""
CAST_BYTES = 6
MERGE_BYTES = (CAST_BYTES, 12, 8, 12)
"""Bytes that each element of an attention's result moves when the results of two blocks of keys are
merged, kernel by kernel: block to fp32 (read 2, write 4), out - block (8 and 4), times sigmoid (4 and
4), out minus that (8 and 4): _update_out_and_lse of zhuzilin/ring-flash-attention, which xDiT uses and
diffusers repeats. The first block is cast to fp32, the last result back."""
COLLECTIVE_HOST_S = {"eager": 40e-6, "compiled": 40e-6, "cuda-graph": 2e-6}
"""Host time to issue a collective or a batch of P2Ps through torch.distributed: an assumption (20 to
80 us are seen from Python to the enqueued kernel); recorded in a graph, a node."""
GRAPH_LAUNCH_NODES = 10
"""Launching a whole CUDA graph costs the host about as much as ten of its nodes (1 us each) cost the
device; an assumption. The nodes' own cost is in the kernel floor, which was measured inside graphs."""
COLLECTIVE_FIXED_S = {"eager": 40e-6, "compiled": 40e-6, "cuda-graph": 5e-6}
"""Device-side fixed cost of a torch-level transfer beyond the raw NCCL time: stream events on both
sides, which the communicator's stream and the compute stream wait for. In a graph these are edges: an
assumption, the cost of a few nodes."""
SLOWDOWN = 1.19
"""Compute beside a collective takes at least so much longer: 18.9 % on average over GPUs and networks,
40 % at most (arXiv 2507.03114). Lost SMs and bandwidth give that for large kernels only; those that do
not fill the chip suffer too."""
COLLECTIVE_BANDWIDTH_SHARE = 0.10
"""Memory bandwidth that an overlapped collective takes: an NVLink ring at 200 GB/s reads and writes
about 2 x 200 GB/s of 2-3.4 TB/s. PCIe rings take less."""


class ComputeCost(NamedTuple):
    """Price of a compute op. ``contended_s``: the same while a collective that uses SMs runs beside
    it. ``low_s``, ``high_s``: nominal 90 % interval of ``device_s``. ``host_s``: to issue it.
    ``placed_s``: until its blocks leave an SM to a collective that is launched with it."""

    device_s: float
    contended_s: float
    launches: int
    host_s: float
    low_s: float
    high_s: float
    provenance: Provenance
    placed_s: float = 0.0


class _Sum(NamedTuple):
    """Additive parts of the price of a list of kernels."""

    device_s: float = 0.0
    contended_s: float = 0.0
    launches: int = 0
    low_s: float = 0.0
    high_s: float = 0.0
    table_s: float = 0.0
    interpolated_s: float = 0.0
    transferred_s: float = 0.0


def _add(a: _Sum, b: _Sum) -> _Sum:
    return _Sum(*map(sum, zip(a, b, strict=True)))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """The serial run on one GPU as predicted: what a measured latency is compared with.

    ``host_s`` is the part of ``denoise_s`` during which the device waited for its host.
    """

    text_encoder_s: float
    denoise_s: float
    vae_s: float
    host_s: float = 0.0

    def beside(self, scope: Scope) -> float:
        """What a clock of ``scope`` covers beside the loop (denoise): text encoders (latent), also the
        VAE (pipeline)."""
        return {"denoise": 0.0, "latent": self.text_encoder_s}.get(
            scope, self.text_encoder_s + self.vae_s
        )

    def under(self, scope: Scope) -> float:
        """What a clock of ``scope`` shows."""
        return self.denoise_s + self.beside(scope)


def chip_of(gpu: Gpu, dtype: str, attention_kernel: str = "auto") -> Chip:
    """The kernel model's view of a GPU. ``auto`` is what SDPA of torch >= 2.10 prefers: cuDNN on Hopper
    (sdp_utils.cpp, check_prefer_cudnn_attention), FlashAttention-2 elsewhere."""
    matmul = gpu.matmul.of(dtype).value
    seen = attention_figure(gpu, attention_kernel)
    return Chip(
        sm_flops=matmul / gpu.sms.value,
        sms=gpu.sms.value,
        memory_bytes_per_s=gpu.memory_bandwidth.value,
        l2_bytes=gpu.l2.value,
        floor_s=gpu.kernel_floor.value,
        attention=seen.value / gpu.matmul.half,
        attention_dim=seen.head_dim,
        ideal=gpu.is_ideal,
    )


def spread_of(gpu: Gpu, dtype: str, attention_kernel: str) -> Mapping[str, tuple[float, float]]:
    """SPREAD on one GPU: wider where a ceiling was transferred or assumed, and where ``auto`` does not
    say which of several attention kernels runs (FA2 is 1.6 times slower than cuDNN on H100)."""
    if gpu.is_ideal:
        return dict.fromkeys(SPREAD, (1.0, 1.0))
    spread = dict(SPREAD)
    seen = attention_figure(gpu, attention_kernel)
    widen = {
        "gemm": gpu.matmul.of(dtype).kind,
        "conv": gpu.matmul.of(dtype).kind,
        "attention": seen.kind,
    }
    for kind, known in widen.items():
        if known != "measured":
            spread[kind] = _product(spread[kind], CEILING_SPREAD)
    if attention_kernel == "auto":
        rates = [f.value for f in gpu.attention if f.head_dim == seen.head_dim]
        kernels = (seen.value / max(rates), seen.value / min(rates))
        for kind in (
            "attention",
            "attention-table",
            "attention-interpolated",
            "attention-transferred",
        ):
            spread[kind] = _product(spread[kind], kernels)
    return spread


def attention_figure(gpu: Gpu, attention_kernel: str = "auto") -> AttentionFigure:
    """The one that attention of every width is priced from."""
    return gpu.attention_figure(128, "cudnn" if attention_kernel == "auto" else attention_kernel)


class Basis(NamedTuple):
    """A table that kernels of ``kind`` on ``gpu`` are priced with: on which GPU its ``rows`` were
    measured, and by whom."""

    gpu: str
    kind: str
    measured_on: str
    rows: int
    source: str


class _Lent(NamedTuple):
    """A shipped table, the chip that it was measured on, whose that is, and whether that is the GPU
    priced."""

    table: Table
    chip: Chip
    lender: str
    own: bool

    def source(self, sizes: Sequence[int]) -> Literal["table", "interpolated", "transferred"]:
        """What a correction at this shape rests on."""
        if not self.own:
            return "transferred"
        return "table" if self.table.has(sizes) else "interpolated"


def _lent(gpu: Gpu, kind: str, dtype: str, attention_kernel: str) -> _Lent | None:
    """The shipped table that holds for ``gpu``. They are of two bytes an element."""
    kernel = attention_figure(gpu, attention_kernel).kernel
    found = lender(gpu, kind, kernel) if ITEMSIZE[dtype] == 2 else None
    if found is None or gpu.is_ideal:
        return None
    table, there = found
    chip = chip_of(there, dtype, kernel)
    return _Lent(table, chip, there.name, there.name == gpu.name)


def _product(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] * b[0], a[1] * b[1]


@dataclass(frozen=True)
class CostModel:
    """Prices of one model's work on the devices of a box. Immutable; prices are cached.

    ``gpus[d]`` is the GPU of device d. ``device_scale`` and ``host_scale`` multiply the denoising
    loop's device and host time; ``calibrated`` sets them. ``speed``: what if every kernel took so many
    times less; what launches cost the host stays. ``kernels``: tables by kind, measured on these very
    devices; None: those of the GPUs' profiles.
    """

    profile: Profile
    gpus: Sequence[Gpu]
    dtype: str = "bf16"
    runtime: Runtime = "eager"
    attention_kernel: str = "auto"
    device_scale: float = 1.0
    host_scale: float = 1.0
    is_calibrated: bool = False
    speed: float = 1.0
    kernels: Mapping[str, KernelTable] | None = None
    _pricers: dict[str, _Pricer] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype {self.dtype!r}: one of {', '.join(ITEMSIZE)}")
        for gpu in self.gpus:
            if gpu.name not in self._pricers:
                pricer = _Pricer(self.profile, gpu, self.dtype, self.runtime, self.attention_kernel)
                if self.kernels is not None:
                    pricer.kernels = self.kernels
                self._pricers[gpu.name] = pricer

    @property
    def _ideal(self) -> bool:
        return all(pricer.chip.ideal for pricer in self._pricers.values())

    def compute(self, work: Work, device: int) -> ComputeCost:
        """Price of ``work`` on ``device``. Raises KeyError for a stage the profile lacks."""
        gpu = self.gpus[device]
        total = self._pricers[gpu.name].price(work)
        in_loop = work.stage in ("denoiser", "scheduler", "guidance")
        scale = (self.device_scale if in_loop else 1.0) / self.speed
        per_launch = gpu.launch.of(self.runtime).value * (self.host_scale if in_loop else 1.0)
        low, high = total.low_s * scale, total.high_s * scale
        if self.is_calibrated and in_loop:
            low, high = (total.device_s * scale * factor for factor in SPREAD["calibrated"])
        return ComputeCost(
            device_s=total.device_s * scale,
            contended_s=total.contended_s * scale,
            launches=total.launches,
            host_s=total.launches * per_launch,
            low_s=low,
            high_s=high,
            provenance="calibrated" if self.is_calibrated and in_loop else _provenance(total),
            placed_s=self._pricers[gpu.name].placed_s(work) * scale,
        )

    def bases(self) -> Iterator[Basis]:
        """The tables behind prices that are not ``analytic``; the first that knows a kernel decides."""
        for gpu, pricer in self._pricers.items():
            for kind, table in pricer.kernels.items():
                yield Basis(gpu, kind, gpu, len(table.rows), table.source)
            for kind, lent in pricer.lent.items():
                if lent is not None:
                    source = "; ".join(lent.table.sources)
                    yield Basis(gpu, kind, lent.lender, len(lent.table.points), source)

    def seconds_by_basis(self, work: Work, device: int) -> dict[Provenance, float]:
        """The device time of ``work`` by what it rests on; before any calibration."""
        total = self._pricers[self.gpus[device].name].price(work)
        known: dict[Provenance, float] = {
            "table": total.table_s,
            "interpolated": total.interpolated_s,
            "transferred": total.transferred_s,
        }
        return {**known, "analytic": max(0.0, total.device_s - sum(known.values()))}

    def transfer_fixed_s(self, op: Op) -> float:
        """What a transfer costs beyond the wire; 0 between ideal devices.

        An all-to-all also permutes heads and tokens of its payload before and after, two kernels that
        read and write it. With COLLECTIVE_FIXED_S and some 20 us of the raw call this makes the 80-90 us
        that each Ulysses all-to-all of Flux costs on H100 (14 MB a rank; derived from cache-dit and xDiT
        rows), and grows with the payload where that fixed number would not.
        """
        if self._ideal:
            return 0.0
        if op.call != "all_to_all":
            return COLLECTIVE_FIXED_S[self.runtime]
        permute_s = max(pricer.permute_s(op.nbytes) for pricer in self._pricers.values())
        return COLLECTIVE_FIXED_S[self.runtime] + 2 * permute_s

    def transfer_host_s(self, op: Op) -> float:
        """Host time of each participant to issue a transfer; 0 between ideal devices."""
        if self._ideal:
            return 0.0
        return COLLECTIVE_HOST_S[self.runtime] * self.host_scale

    def calibrated(
        self, measured_latency_s: float, scope: Scope, serial: StageSeconds
    ) -> CostModel:
        """The model scaled so that the serial one-GPU run takes ``measured_latency_s``.

        ``scope`` says what the clock covered (``StageSeconds.beside``). The serial stages keep their own
        prediction and are subtracted first. What remains scales the device; where the host was the
        floor (more than half of the loop) it scales both, because then the measurement says nothing
        about the device. Raises ValueError where nothing remains for the loop.
        """
        outside = serial.beside(scope)
        loop_s, device_s = measured_latency_s - outside, serial.denoise_s - serial.host_s
        host_bound = serial.host_s > device_s
        base_s = serial.denoise_s if host_bound else device_s
        ratio = (loop_s if host_bound else loop_s - serial.host_s) / base_s
        if ratio <= 0:
            raise ValueError(
                f"measured latency {measured_latency_s:g} s (scope {scope}): "
                f"text encoders, VAE and launches alone are predicted to take "
                f"{outside + (0 if host_bound else serial.host_s):.3g} s"
            )
        return replace(
            self,
            device_scale=self.device_scale * ratio,
            host_scale=self.host_scale * (ratio if host_bound else 1.0),
            is_calibrated=True,
        )


def _provenance(total: _Sum) -> Provenance:
    """The weakest source behind at least a tenth of the time."""
    lent_s, between_s = total.transferred_s, total.interpolated_s
    analytic_s = total.device_s - total.table_s - between_s - lent_s
    if analytic_s > 0.1 * total.device_s or not total.device_s:
        return "analytic"
    if lent_s > 0.1 * total.device_s:
        return "transferred"
    return "interpolated" if between_s > 0.1 * total.device_s else "table"


class _Pricer:
    """Prices on one GPU model, cached by shape (prefix sums) and by kernel list."""

    def __init__(
        self, profile: Profile, gpu: Gpu, dtype: str, runtime: Runtime, attention_kernel: str
    ) -> None:
        self.profile, self.runtime = profile, runtime
        self.chip = chip_of(gpu, dtype, attention_kernel)
        self.busy = self.chip.beside_collective(
            gpu.collective_sms.value, COLLECTIVE_BANDWIDTH_SHARE
        )
        self.itemsize = ITEMSIZE[dtype]
        self.lent = {k: _lent(gpu, k, dtype, attention_kernel) for k in ("gemm", "attention")}
        self.kernels = measured_on(gpu.name, dtype)
        self.spread = spread_of(gpu, dtype, attention_kernel)
        self._works: dict[Work, _Sum] = {}
        self._prefix: dict[tuple[str, Shape], list[_Sum]] = {}
        self._parts: dict[tuple[str, Shape, int, tuple[int, ...], bool], _Sum] = {}
        self._corrections: dict[tuple[str, tuple[int, ...]], float | None] = {}

    def price(self, work: Work) -> _Sum:
        """Sum over the work's segments, times how often the stage repeats for one request, or once."""
        known = self._works.get(work)
        if known is None:
            known = self._works[work] = self._price(work)
        return known

    def _price(self, work: Work) -> _Sum:
        stage = self.profile.stages[work.stage]
        key = (work.stage, work.shape)
        if key not in self._prefix:
            bound = stage.bind(work.shape._asdict())
            lists = [(id(s.kernels), _ends_in_matmul(s)) for s in stage.segments]
            distinct = dict(zip(lists, stage.segments, strict=True))
            prices = {i: self._list(s.kernels, bound, i[1]) for i, s in distinct.items()}
            self._prefix[key] = list(accumulate((prices[i] for i in lists), _add, initial=_Sum()))
        repeat = 1 if work.once else stage.repeat(work.shape._asdict())
        prefix = self._prefix[key]
        total = _Sum()
        for lo, hi in work.ranges:
            first = lo + (work.values == "from")
            part = (b - a for a, b in zip(prefix[first], prefix[hi], strict=True))
            total = _add(total, _Sum(*part))  # type: ignore[arg-type]
        if work.values:
            total = _add(total, self._in_part(stage, work))
        if work.stored == "fp8":
            total = _add(total, self._cast(stage, work))
        if work.blocks > 1:
            total = _add(total, self._merge(stage, work))
        launches = total.launches
        gap_s = GAP * self.chip.floor_s * launches
        total = _add(total, _Sum(gap_s, gap_s, 0, gap_s, gap_s))
        if work.copies:
            total = _add(total, self._copies(work))
            launches = total.launches
        if not self.chip.ideal:
            beside_s = max(total.contended_s, SLOWDOWN * total.device_s)
            total = total._replace(contended_s=beside_s)
        if self.runtime == "cuda-graph":
            launches = GRAPH_LAUNCH_NODES * len(work.ranges)
        return _Sum(*(value * repeat for value in total))._replace(launches=launches * repeat)  # type: ignore[arg-type]

    def _in_part(self, stage: Stage, work: Work) -> _Sum:
        """The segment in which ``work`` ends or begins, where V has been projected."""
        until = work.values == "until"
        whole = stage.segments[work.ranges[-1][1] if until else work.ranges[0][0]]
        key = (work.stage, work.shape, id(whole.kernels), whole.projected, until)
        if key not in self._parts:
            segment = whole.until_values() if until else whole.from_values()
            bound = stage.bind(work.shape._asdict())
            self._parts[key] = self._list(segment.kernels, bound, _ends_in_matmul(segment))
        return self._parts[key]

    def placed_s(self, work: Work) -> float:
        """Seconds until the grid of a ring's block has been placed; 0 for work of many kernels, between
        any two of which a collective finds its SMs."""
        if work.blocks == 1 or self.chip.ideal:
            return 0.0
        stage = self.profile.stages[work.stage]
        bound, total_s = stage.bind(work.shape._asdict()), 0.0
        for segment in stage.covered(work.ranges, work.values):
            for kernel in segment.kernels:
                if kernel.kind == "attention":
                    sizes = kernel.sizes(bound)
                    share = placed_s(self.chip, *sizes) / self._model("attention", self.chip, sizes)
                    total_s += share * self._heavy(kernel, sizes).device_s
        return total_s

    def permute_s(self, nbytes: float) -> float:
        """Seconds of a kernel that reads and writes ``nbytes`` in another order."""
        return stream_s(self.chip, math.ceil(2 * nbytes / self.itemsize), self.itemsize)

    def _copies(self, work: Work) -> _Sum:
        """Kernels that the schedule adds: the shortest kernel each, and their bytes. No GAP: most are
        too small to fill a chip that the next one would wait for."""
        moved_s = work.copied / self.chip.memory_bytes_per_s if not self.chip.ideal else 0.0
        seconds = moved_s + work.copies * self.chip.floor_s
        low, high = self.spread["stream"]
        beside_s = seconds + moved_s * COLLECTIVE_BANDWIDTH_SHARE / (1 - COLLECTIVE_BANDWIDTH_SHARE)
        return _Sum(seconds, beside_s, work.copies, low * seconds, high * seconds)

    def _merge(self, stage: Stage, work: Work) -> _Sum:
        """Share of one block in merging the results of ``work.blocks`` blocks of keys (MERGE_BYTES)."""
        bound, n = stage.bind(work.shape._asdict()), work.blocks
        outputs = 0
        for segment in stage.covered(work.ranges, work.values):
            for kernel in segment.kernels:
                if kernel.kind == "attention":
                    batch, heads, q, _, _, width = kernel.sizes(bound)
                    outputs += kernel.count * batch * heads * q * width
        total = _Sum()
        for nbytes in MERGE_BYTES:
            moved = math.ceil(outputs * nbytes * (n - 1) / n / self.itemsize)
            total = _add(total, self._stream(moved))
        return _add(total, self._stream(math.ceil(outputs * 2 * CAST_BYTES / n / self.itemsize)))

    def _stream(self, elements: int) -> _Sum:
        low, high = self.spread["stream"]
        seconds = stream_s(self.chip, elements, self.itemsize)
        return _times(1, seconds, stream_s(self.busy, elements, self.itemsize), low, high)

    def _cast(self, stage: Stage, work: Work) -> _Sum:
        """Weights from one byte to the network's dtype before each layer that has any: one kernel a
        segment, which reads one byte and writes ``itemsize`` for every parameter."""
        total = _Sum()
        for segment in (s for s in stage.covered(work.ranges, work.values) if s.weights):
            weights = segment.held(work.shape.p)
            elements = weights * (1 + self.itemsize) // self.itemsize
            total = _add(total, self._stream(elements))
        return total

    def _list(
        self, kernels: tuple[Kernel, ...], bound: Mapping[str, int], ends_in_matmul: bool
    ) -> _Sum:
        """The price of one segment's kernels at a shape.

        Compiled: the memory-bound launches between two matmuls, convolutions or attentions collapse
        into one kernel, and a chain's intermediates are neither written nor read again, which leaves
        its largest member's bytes. Profiles do not keep the order of launches, so equal heavy launches
        are taken as parallel projections (q, k, v) with nothing between: a segment with H distinct
        ones keeps its H + 1 largest memory-bound launches (H where a matmul ends it). An assumption,
        and the weaker bound (H counting every launch) gave 1 % where xDiT measured 9 %.
        """
        total, streams, heavy = _Sum(), [], 0
        for kernel in kernels:
            sizes = kernel.sizes(bound)
            if kernel.kind in ("norm", "elementwise"):
                streams += [sizes[0]] * kernel.count
                continue
            heavy += 1
            total = _add(total, self._heavy(kernel, sizes))
        if self.runtime == "compiled":
            streams = sorted(streams, reverse=True)[: heavy + (not ends_in_matmul)]
        for elements in streams:
            total = _add(total, self._stream(elements))
        return total

    def _heavy(self, kernel: Kernel, sizes: list[int]) -> _Sum:
        """The price of ``count`` launches of a matmul, a convolution or an attention."""
        known = self._measured(kernel.kind, sizes)
        if known is not None:
            return self._from_table(kernel, sizes, known)
        seconds, contended_s = (
            self._model(kernel.kind, chip, sizes) for chip in (self.chip, self.busy)
        )
        lent = self.lent.get(kernel.kind)
        factor = None if lent is None else self._correction(lent, kernel.kind, sizes)
        if lent is None or factor is None:
            return _times(kernel.count, seconds, contended_s, *self.spread[kernel.kind])
        source = lent.source(sizes)
        low, high = self.spread[f"{kernel.kind}-{source}"]
        whole = _times(kernel.count, seconds * factor, contended_s * factor, low, high)
        if source == "table":
            return whole._replace(table_s=whole.device_s)
        if source == "interpolated":
            return whole._replace(interpolated_s=whole.device_s)
        return whole._replace(transferred_s=whole.device_s)

    def _correction(self, lent: _Lent, kind: str, sizes: list[int]) -> float | None:
        """Measured over modelled in a shipped table, or None where it does not say."""
        key = kind, tuple(sizes)
        if key not in self._corrections:
            self._corrections[key] = lent.table.correction(lent.chip, sizes, self.itemsize)
        return self._corrections[key]

    def _measured(self, kind: str, sizes: list[int]) -> Estimate | None:
        """From this GPU's own kernel table. It was measured eager: not for compiled convolutions, whose
        layout differs."""
        table = self.kernels.get(kind)
        if table is None or min(sizes) <= 0 or (kind == "conv" and self.runtime == "compiled"):
            return None
        return table.estimate(tuple(sizes))

    def _from_table(self, kernel: Kernel, sizes: list[int], known: Estimate) -> _Sum:
        """A measured or interpolated time; what a collective beside it costs is the model's ratio."""
        alone_s, contended_s = (self._model(kernel.kind, c, sizes) for c in (self.chip, self.busy))
        low, high = known.low_s / known.time_s, known.high_s / known.time_s
        beside_s = known.time_s * contended_s / alone_s
        whole = _times(kernel.count, known.time_s, beside_s, low, high)
        if known.exact:
            return whole._replace(table_s=whole.device_s)
        return whole._replace(interpolated_s=whole.device_s)

    def _model(self, kind: str, chip: Chip, sizes: list[int]) -> float:
        if kind == "gemm":
            batch, m, n, k = sizes
            return gemm_s(chip, batch, m, n, k, self.itemsize)
        if kind == "conv":
            m, n, k, elements = sizes
            relayout = self.runtime != "compiled"
            return conv_s(chip, m, n, k, elements, self.itemsize, relayout)
        batch, heads, q, keys, dim, value_dim = sizes
        return attention_s(chip, batch, heads, q, keys, dim, value_dim, self.itemsize)


def _ends_in_matmul(segment: Segment) -> bool:
    """Does nothing follow its last matmul? Its outputs are then partial sums."""
    return segment.total is not None and segment.total.kind == "sum"


def _times(count: int, seconds: float, contended_s: float, low: float, high: float) -> _Sum:
    """``count`` launches. Fewer SMs never help, even where the model would then split k less."""
    device_s = count * seconds
    return _Sum(
        device_s, max(device_s, count * contended_s), count, low * device_s, high * device_s
    )
