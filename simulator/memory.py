"""Peak memory of every rank of a schedule, in parts, and whether it fits.

The peak is the maximum over three phases (text encoding, denoising, decoding) of what is resident plus
that phase's activations; activations of different phases are never added. Buffers, communicators and
the CUDA context stay for the whole request. Everything but context, communicators and slack follows
from the graph and the profile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from paradiff.graph import BufferKind, Op, ScheduleGraph, Work
from paradiff.profiles import Profile, Segment
from paradiff.strategies.builder import DTYPE_BYTES
from paradiff.strategies.places import PER_STEP, blocks_of, held_bytes
from simulator.gpu import Gpu
from simulator.symmetry import Quotient, whole

Phase = Literal["encode", "denoise", "decode"]
PHASES: tuple[Phase, ...] = ("encode", "denoise", "decode")

CONTEXT_BYTES = 600e6
"""CUDA context with loaded modules, cuBLAS and cuDNN handles and workspaces. An assumption: it varies
with GPU and library versions and torch's own counters do not see it."""
CONTEXT_SPREAD_BYTES = (300e6, 1700e6)
"""Published peaks of SD2.1 (AsyncDiff, A5000) lie 0.3 to 1.0 GB above the central value: fragmentation,
other workspaces or another way to count. The interval spans it, the central value does not follow it."""
ALLOCATOR_SLACK = 0.10
"""Reserved but unused by torch's caching allocator, as a share of activations (blocks are rounded up and
split); an assumption, between 0 and 0.25."""
ALLOCATOR_SLACK_SPREAD = (0.0, 0.25)
NCCL_CONNECTION_BYTES = 512 * 8 * 8 * 16 + 120 * 640 * 8 * 8 + (1 << 22)
"""Buffers of one NCCL connection of one channel: LL 0.5 MiB, LL128 4.7 MiB, Simple 4 MiB
(DEFAULT_LL_BUFFSIZE, DEFAULT_LL128_BUFFSIZE, DEFAULT_BUFFSIZE in nccl/src/init.cc)."""
NCCL_CONNECTIONS = 2
"""A ring's receiving and sending side; trees connect lazily and only for large all-reduces."""
HALF_BYTES = 2
"""Elements of fp16 and bf16; convolutions in fp32 are not laid out anew."""
P2P_CHANNELS = 2
"""Channels of a group of two ranks that only sends and receives: two for each peer, more over several
NVLinks (nccl/src/graph/paths.cc, ncclTopoGetNchannels)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank in one phase, at their most."""

    phase: Phase
    weights: float
    """Denoiser parameters that the rank's ops touch; sharded, its share and the gathered blocks."""
    text_encoders: float
    """Weights of every module before the denoiser (image encoders too)."""
    vae: float
    """Weights of every module after it (vocoders too)."""
    buffers: float
    """What ops leave for others, flat gathers under way, and what CUDA graphs work on."""
    activations: float
    """Of an op, with what is laid side by side for it and both layouts of a convolution."""
    communicator: float
    context: float
    """CUDA context and allocator slack."""
    low: float
    high: float
    """Nominal 90 % interval of the total: context and slack are the unknowns."""

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.parts().values())

    @property
    def allocated(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` counts of it: neither the context, nor what the
        allocator keeps free, nor the buffers of NCCL."""
        return self.total - self.context - self.communicator

    def parts(self) -> dict[str, float]:
        """Part -> bytes; they add up to ``total``."""
        names = [f.name for f in fields(self) if f.name not in ("phase", "low", "high")]
        return {name: float(getattr(self, name)) for name in names}


def phase_memory(
    schedule: ScheduleGraph | Quotient,
    profile: Profile,
    dtype: str,
    *,
    offload_text_encoders: bool = False,
    phases: Sequence[Phase] = PHASES,
    channels: int = 4,
    ideal: bool = False,
    captured: bool = False,
) -> tuple[tuple[RankMemory, ...], ...]:
    """Memory of every rank of ``schedule`` at its most in each of ``phases``.

    Without offload every module a rank runs stays resident throughout, as in diffusers' plain
    pipelines. What takes turns is known from the graph's loads; ``offload_text_encoders`` says of any
    graph that prompts are encoded before the other modules are loaded.
    ``phases`` leaves decoding out for a run that ends with the latent; its weights stay. ``channels``:
    of a collective (one SM each, ``Gpu.collective_sms``). ``ideal`` leaves out context,
    slack and communicators. ``captured``: the denoiser is replayed from CUDA graphs.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r}: one of {', '.join(DTYPE_BYTES)}")
    if isinstance(schedule, ScheduleGraph):
        schedule = whole(schedule)
    graph = schedule.graph
    profile = shared(profile, graph)
    itemsize = DTYPE_BYTES[dtype]
    used = _usage(graph, profile, itemsize)
    communicators = _communicators(schedule, channels)
    kept = [kind for kind in get_args(BufferKind) if kind != "weights"]
    flat = _gathered_flat(schedule)
    buffers = graph.peak_bytes(kept, () if captured else flat)
    if captured:
        for rank, pool in _pools(graph, profile, itemsize, flat).items():
            buffers[rank] += pool
            used[rank]["denoiser"].live = 0.0
    gathered = graph.peak_bytes(["weights"])
    ops = [op for section in graph.sections for op in section.ops]
    turns = {dict(op.tags)["turn"] for op in ops if op.call == "load"}
    turns |= {"text"} if offload_text_encoders else set()
    stored = 1 if any(op.work is not None and op.work.stored for op in ops) else itemsize
    of_rank = {
        rank: _rank_memory(
            profile,
            used[rank],
            {"denoiser": stored},
            dtype,
            gathered[rank],
            buffers[rank],
            0.0 if ideal else communicators[rank],
            phases,
            turns,
            ideal,
        )
        for rank in schedule.ranks
    }
    return tuple(of_rank[rank] for rank in schedule.representative)


def memory_on(
    gpu: Gpu, schedule: ScheduleGraph | Quotient, profile: Profile, dtype: str, *, captured: bool
) -> tuple[tuple[RankMemory, ...], ...]:
    """``phase_memory`` of ranks that run on GPUs of this model."""
    return phase_memory(
        schedule,
        profile,
        dtype,
        channels=gpu.collective_sms.value,
        ideal=gpu.is_ideal,
        captured=captured,
    )


def at_peak(memory: Iterable[Iterable[RankMemory]]) -> tuple[RankMemory, ...]:
    """Of every rank's phases the one with the largest total."""
    return tuple(max(phases, key=lambda m: m.total) for phases in memory)


def misfit(memory: Sequence[RankMemory], gpus: Sequence[Gpu]) -> str | None:
    """Why the schedule does not fit (rank r on ``gpus[r]``), or None: the rank with the largest deficit.

    ``needs 52.1 GiB of 44.7 GiB on rank 0 (l40) while denoising: buffers 36.0, text_encoders 9.5 GiB``
    """
    over = [
        (m.total - gpu.memory.value, -r)
        for r, (m, gpu) in enumerate(zip(memory, gpus, strict=True))
    ]
    deficit, minus_rank = max(over)
    if deficit <= 0:
        return None
    rank = -minus_rank
    m, gpu = memory[rank], gpus[rank]
    largest = sorted(m.parts().items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest if size)
    doing = {"encode": "encoding text", "denoise": "denoising", "decode": "decoding"}[m.phase]
    return (
        f"needs {m.total / 2**30:.1f} GiB of {gpu.memory.value / 2**30:.1f} GiB on rank {rank} "
        f"({gpu.name}) while {doing}: {parts} GiB"
    )


@dataclass(slots=True)
class _Use:
    """What one rank does with one stage: the segments it runs and its largest live set (bytes)."""

    segments: set[int]
    live: float


def shared(profile: Profile, graph: ScheduleGraph) -> Profile:
    """``profile`` as one of the ranks that divide its layers in ``graph`` sees it."""
    return profile.share(max((op.work.shape.p for op in _compute_ops(graph)), default=1))  # type: ignore[union-attr]


def live_bytes(profile: Profile, work: Work, itemsize: int) -> float:
    """Largest live set while ``work`` runs on elements of ``itemsize`` bytes: activations, what the
    schedule has laid side by side, and the layouts of convolutions."""
    stage = profile.stages[work.stage]
    bound = stage.bind(work.shape._asdict())
    return max(
        (
            itemsize * (s.live(bound) + _relaid(s, bound, itemsize))
            + (work.joined if s.point is not None and s.point.kind != "moments" else 0)
            for s in stage.covered(work.ranges, work.values)
        ),
        default=0,
    )


def _relaid(segment: Segment, bound: Mapping[str, int], itemsize: int) -> int:
    """Elements of a convolution's input and output with channels last, as cuDNN's kernels for tensor
    cores want them: it keeps both in its workspace (the passes that this takes are among the costs)."""
    if itemsize > HALF_BYTES:
        return 0
    sizes = (k.sizes(bound) for k in segment.kernels if k.kind == "conv")
    return max((m * n + inputs for m, n, _, inputs in sizes), default=0)


def _usage(graph: ScheduleGraph, profile: Profile, itemsize: int) -> list[dict[str, _Use]]:
    """Per rank: stage -> use. Every iteration of a section runs the same work."""
    used: list[dict[str, _Use]] = [{} for _ in range(graph.world_size)]
    peaks: dict[Work, float] = {}
    for op in _compute_ops(graph):
        assert op.work is not None
        use = used[op.ranks[0]].setdefault(op.work.stage, _Use(set(), 0))
        if op.work not in peaks:
            peaks[op.work] = live_bytes(profile, op.work, itemsize)
        use.segments.update(*(range(lo, hi) for lo, hi in op.work.ranges))
        use.live = max(use.live, peaks[op.work])
    return used


def _compute_ops(graph: ScheduleGraph) -> Iterator[Op]:
    for section in graph.sections:
        if section.count:
            yield from (op for op in section.ops if op.work is not None)


def _gathered_flat(schedule: Quotient) -> list[list[int]]:
    """Per section and op: bytes of the one flat tensor through which an all-gather goes, all parts of
    all ranks, that each of its ranks holds beside the parts until it has waited for them.

    torch's all-gather of a list allocates it and copies every part out of it
    (``ProcessGroupNCCL::allgather``, ``newLikeFlat``); so do distrifuser, PCPP, xDiT's DistriFusion and
    the executor here. Shards of weights are gathered straight into where they stay.
    """
    weights = {b.id for b in schedule.graph.buffers if b.kind == "weights"}
    return [
        [
            len(ranks[0]) * op.nbytes
            if op.call == "all_gather" and not any(ref.buffer in weights for ref in op.writes)
            else 0
            for op, ranks in zip(section.ops, members, strict=True)
        ]
        for section, members in zip(schedule.graph.sections, schedule.members, strict=True)
    ]


def _pools(
    graph: ScheduleGraph, profile: Profile, itemsize: int, flat: Sequence[Sequence[int]]
) -> dict[int, int]:
    """Per rank: what CUDA graphs of the denoiser keep, one for each section of the loop, for as long as
    they can be replayed: the activations of each, and every gather's flat tensor, which a capture never
    uses again (``CUDACachingAllocator`` waits for the events of a freed block's streams until it ends).
    """
    pools: dict[int, float] = {}
    for section, sizes in zip(graph.sections, flat, strict=True):
        live: dict[int, float] = {}
        gathered: dict[int, int] = {}
        for op, size in zip(section.ops, sizes, strict=True):
            for rank in op.ranks:
                gathered[rank] = gathered.get(rank, 0) + size
                if op.work is not None and op.work.stage == "denoiser":
                    live[rank] = max(live.get(rank, 0.0), live_bytes(profile, op.work, itemsize))
        for rank, most in live.items():
            pools[rank] = pools.get(rank, 0.0) + most + gathered[rank]
    return {rank: int(pool) for rank, pool in pools.items()}


def _communicators(schedule: Quotient, channels: int) -> list[float]:
    """Per rank: NCCL buffers, one communicator for each distinct group (created once, kept)."""
    groups = dict.fromkeys(
        (op.kind == "p2p", op.ranks) for op, _ in schedule.transfers if len(op.ranks) > 1
    )
    held = [0.0] * schedule.world_size
    for p2p, ranks in groups:
        size = NCCL_CONNECTION_BYTES * (P2P_CHANNELS if p2p else NCCL_CONNECTIONS * channels)
        for rank in ranks:
            held[rank] += size
    return held


def _rank_memory(
    profile: Profile,
    used: dict[str, _Use],
    param_bytes: Mapping[str, int],
    dtype: str,
    gathered: float,
    buffers: float,
    communicator: float,
    phases: Sequence[Phase],
    turns: Collection[str],
    ideal: bool,
) -> tuple[RankMemory, ...]:
    """One for each phase."""
    stages, itemsize = list(profile.stages), DTYPE_BYTES[dtype]
    before = stages[: stages.index("denoiser")]
    weights, live = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    for name, use in used.items():
        phase, segments = _phase(name, before), use.segments
        if name == "denoiser" and gathered:
            weights[phase] += gathered
            segments = segments - blocks_of(profile)
        size = param_bytes.get(name, itemsize)
        weights[phase] += held_bytes(profile.stages[name], segments, size, dtype)
        live[phase] = max(live[phase], use.live)
    candidates = []
    for phase in phases:
        alone = phase == "encode" and "text" in turns
        decoding = phase == "decode" and "vae" in turns
        slack, fixed = (0.0, 0.0) if ideal else (ALLOCATOR_SLACK, CONTEXT_BYTES)
        resident = {
            "weights": 0.0 if alone or decoding else weights["denoise"],
            "text_encoders": 0.0 if "text" in turns and not alone else weights["encode"],
            "vae": 0.0 if alone or ("vae" in turns and not decoding) else weights["decode"],
            "buffers": 0.0 if alone else buffers,
            "activations": live[phase],
            "communicator": communicator,
        }
        known = sum(resident.values())
        low, high = (
            known + (0 if ideal else context + share * live[phase])
            for context, share in zip(CONTEXT_SPREAD_BYTES, ALLOCATOR_SLACK_SPREAD, strict=True)
        )
        candidates.append(
            RankMemory(
                phase=phase, context=fixed + slack * live[phase], low=low, high=high, **resident
            )
        )
    return tuple(candidates)


def phase_of(stage: str, profile: Profile) -> Phase:
    """When a stage runs: before the denoiser, in the loop, after it."""
    stages = list(profile.stages)
    return _phase(stage, stages[: stages.index("denoiser")])


def _phase(stage: str, before: Sequence[str]) -> Phase:
    return "encode" if stage in before else "denoise" if stage in PER_STEP else "decode"
