"""Peak memory per rank: parts in closed form, phases, stale buffers, sentences."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from shipped import profile as shipped
from toys import transformer

from paradiff.graph import ScheduleGraph
from paradiff.profiles import Profile, load_profile
from paradiff.strategies import Workload, build, parse_spec
from simulator.gpu import load_gpu
from simulator.memory import (
    PHASES,
    Phase,
    RankMemory,
    at_peak,
    live_bytes,
    misfit,
    phase_memory,
)

MODELS = Path(__file__).parents[1] / "hardware_profiles" / "models"
TOY = Workload(height=16, width=4, frames=1, steps=6, dtype="fp16")


def plan(profile: Profile, spec: str, workload: Workload) -> ScheduleGraph:
    return build(parse_spec(spec), profile, workload)


def square(pixels: int, steps: int = 8, batch: int = 1) -> Workload:
    return Workload(pixels, pixels, 1, steps, batch, "fp16")


def worst(memory: Iterable[Iterable[RankMemory]]) -> RankMemory:
    return max(at_peak(memory), key=lambda m: m.total)


# -------------------------------------------------------------------------------------- closed forms


def test_serial_parts_in_closed_form() -> None:
    """Two bytes a parameter; the widest segment (mlp, 40*b*r*w elements, b = 2 with guidance)."""
    profile = transformer(3)
    (memory,) = at_peak(phase_memory(plan(profile, "serial", TOY), profile, "fp16", ideal=True))
    per_step = ("denoiser", "scheduler", "guidance")
    assert memory.weights == 2 * sum(profile.stages[s].params for s in per_step)
    assert memory.text_encoders == 2 * profile.stages["text_encoder"].params
    assert memory.vae == 2 * profile.stages["vae"].params
    assert memory.activations == 2 * 40 * 2 * 16 * 4
    assert (memory.phase, memory.communicator, memory.context) == ("denoise", 0, 0)
    assert memory.total == sum(memory.parts().values()) == memory.low == memory.high


def test_context_slack_and_their_interval_in_closed_form() -> None:
    """The toy's 2 B x 40 x b r w activations (b = 2) are 10240 B: a tenth more and 0.6 GB in the middle,
    nothing more and 0.3 GB at the low end, a quarter more and 1.7 GB at the high one."""
    profile = transformer(3)
    graph = plan(profile, "serial", TOY)
    (memory,) = at_peak(phase_memory(graph, profile, "fp16"))
    (known,) = at_peak(phase_memory(graph, profile, "fp16", ideal=True))
    assert known.activations == memory.activations == 10240
    assert memory.context == pytest.approx(600e6 + 1024, rel=1e-12)
    assert memory.total == pytest.approx(known.total + 600e6 + 1024, rel=1e-12)
    assert memory.low == pytest.approx(known.total + 300e6, rel=1e-12)
    assert memory.high == pytest.approx(known.total + 1700e6 + 2560, rel=1e-12)


def test_the_peak_is_a_maximum_over_phases_not_a_sum() -> None:
    """PixArt at 4096 px: decoding peaks; without it denoising does, with fewer activations."""
    profile = load_profile(MODELS / "pixart-alpha.json")
    graph = plan(profile, "serial", square(4096))
    (full,) = at_peak(phase_memory(graph, profile, "fp16"))
    (latent,) = at_peak(phase_memory(graph, profile, "fp16", phases=("encode", "denoise")))
    assert (full.phase, latent.phase) == ("decode", "denoise")
    assert full.activations > 5 * latent.activations
    assert full.vae == latent.vae == 2 * profile.stages["vae"].params
    assert full.total < latent.total + full.activations + 0.1 * full.activations


def test_offloaded_text_encoders_are_there_only_while_they_run() -> None:
    profile = load_profile(MODELS / "pixart-alpha.json")
    graph = plan(profile, "serial", square(1024))
    (memory,) = at_peak(phase_memory(graph, profile, "fp16", offload_text_encoders=True))
    (resident,) = at_peak(phase_memory(graph, profile, "fp16"))
    encoder = profile.stages["text_encoder"]
    text = 2 * (encoder.params + encoder.fp32)
    assert resident.text_encoders == text
    assert memory.phase == "encode"  # 11.5 GB of T5 alone are more than PixArt and its activations
    assert (memory.text_encoders, memory.weights, memory.vae) == (text, 0, 0)


@pytest.mark.parametrize("stages", [2, 4])
def test_pipefusion_ranks_hold_their_stage(stages: int) -> None:
    """Weights over the ranks add up to the module once: P/N on average."""
    profile = load_profile(MODELS / "pixart-alpha.json")
    graph = plan(profile, f"pipefusion={stages},patches={stages}", square(1024))
    memory = at_peak(phase_memory(graph, profile, "fp16"))
    held = [m.weights for m in memory]
    assert max(held) < 1.3 * 2 * profile.denoiser.params / stages
    assert 2 * profile.denoiser.params <= sum(held) < 1.1 * 2 * profile.denoiser.params


PIXART = 28 * (2 * (4 * 1152**2 + 3 * 1152) + 2 * 1152 * 4608 + 4608)
FLUX = 19 * 2 * (4 * 3072**2 + 3 * 3072 + 8 * 3072**2 + 4 * 3072) + 38 * (12 * 3072**2 + 7 * 3072)


@pytest.mark.parametrize(("name", "divided"), [("pixart-alpha", PIXART), ("flux1-dev", FLUX)])
def test_tensor_ranks_hold_their_share_of_the_weights(name: str, divided: int) -> None:
    """P - D + D/n, with D of a block: q, k, v (with bias) and out h x h of both attentions, up (with
    bias) and down h x 4h; of Flux those of both streams, and in single blocks q, k, v, up, and out of
    5h x h. What is whole there is the modulation, a quarter of all (section 4.4)."""
    profile = load_profile(MODELS / f"{name}.json")
    totals = []
    for n in (1, 2, 4, 8):
        memory = at_peak(phase_memory(plan(profile, f"tensor={n}", square(1024)), profile, "fp16"))
        held = profile.denoiser.params - divided + divided // n
        assert {m.weights for m in memory} == {2 * held}
        totals.append(max(m.total for m in memory))
    assert totals == sorted(totals, reverse=True)


def test_communicators_are_counted_once_for_each_group() -> None:
    """Ulysses over 4: one group however often it is used; 4 channels, two connections each."""
    profile = transformer(3)
    memory = at_peak(phase_memory(plan(profile, "ulysses=4", TOY), profile, "fp16", channels=4))
    buffers = 524288 + 4915200 + 4194304  # LL, LL128 and Simple of one connection: 9.2 MiB
    assert {m.communicator for m in memory} == {4 * 2 * buffers}


def test_ranks_that_only_send_open_two_channels() -> None:
    """PipeFusion of two stages: the first sends patches to the second, which sends its output back, over
    two channels of each direction's pair, whatever a collective has."""
    profile = transformer(4)
    graph = plan(profile, "pipefusion=2,patches=2,warmup=1", TOY)
    pairs = {op.ranks for s in graph.sections for op in s.ops if op.kind == "p2p"}
    groups = {op.ranks for s in graph.sections for op in s.ops if op.kind == "collective"}
    for channels in (4, 8):
        memory = at_peak(phase_memory(graph, profile, "fp16", channels=channels))
        connections = 2 * len(pairs) + 2 * channels * len(groups)
        assert {m.communicator for m in memory} == {connections * 9633792}
    assert pairs == {(0, 1), (1, 0)}


# -------------------------------------------------------------------------------------- stale buffers


@pytest.mark.parametrize(
    ("ranks", "pixels", "batch", "gigabytes"),
    [(8, 1024, 1, 0.485), (4, 1024, 1, 0.452), (2, 1024, 1, 0.436), (8, 2048, 1, 1.809)],
)
def test_distrifusion_gathered_buffers_of_sdxl(
    ranks: int, pixels: int, batch: int, gigabytes: float
) -> None:
    """strategies.md 10.3, last column: n*e*sum of published elements, without guidance in the batch
    (``cfg=2``: b = 1 on each rank). Each bucket is gathered through a flat tensor of all its parts that
    is there until its first layer waits for it. The last bucket, a partial one, leaves at the start of
    the next step, before the first is waited for: then all are under way, n*e*sum once more."""
    profile = load_profile(MODELS / "sdxl.json")
    graph = plan(profile, f"cfg=2,distrifusion={ranks}", square(pixels, batch=batch))
    stale = graph.peak_bytes(("kv", "halo", "moments", "slots"))
    assert max(stale.values()) / 1e9 == pytest.approx(gigabytes, rel=0.02)
    memory = phase_memory(graph, profile, "fp16")
    assert worst(memory).buffers / 1e9 == pytest.approx(2 * gigabytes, rel=0.02)


def test_a_flat_gather_is_there_until_it_is_waited_for() -> None:
    """``patch=3`` reads what it gathers at once, so only one gather is under way at a time: the largest,
    three parts. DistriFusion's K and V wait for the next step, so the noise is gathered beside them."""
    profile = transformer(3)
    graph = plan(profile, "patch=3", Workload(24, 4, 1, 2, 1, "fp16"))
    gathers = [op for s in graph.sections for op in s.ops if op.call == "all_gather"]
    staged = [[10**6 * (op.call == "all_gather") for op in s.ops] for s in graph.sections]
    plain, held = graph.peak_bytes(), graph.peak_bytes(staged=staged)
    assert {held[r] - plain[r] for r in plain} == {10**6}
    flat = max(3 * op.nbytes for op in gathers)
    memory = at_peak(phase_memory(graph, profile, "fp16", ideal=True))
    assert {m.buffers for m in memory} == {max(graph.peak_bytes().values()) + flat}
    waiting = plan(profile, "distrifusion=3,warmup=0", Workload(24, 4, 1, 6, 1, "fp16"))
    (_, _, _, steady, _) = waiting.sections
    gathers = (op for op in steady.ops if op.call == "all_gather")
    both = [op.nbytes for op in gathers]  # K and V of all layers, the noise
    assert {m.buffers for m in at_peak(phase_memory(waiting, profile, "fp16", ideal=True))} == {
        max(waiting.peak_bytes().values()) + 3 * sum(both)
    }


@pytest.mark.parametrize("spec", ["distrifusion=3", "pipefusion=3", "ring=2", "cfg=2,ulysses=2"])
def test_the_peak_is_that_of_all_buffers_looked_at_op_by_op(spec: str) -> None:
    """By definition: at op i of the whole run a rank holds each of its buffers that has a version
    written at i or before and last read at i or after, and of each op begun what nobody has read of it
    yet (for the length of an op, where nobody will)."""
    graph = plan(transformer(3), spec, Workload(24, 4, 1, 8, 1, "fp16"))
    staged = [[1000 * len(op.ranks) * len(op.writes) for op in s.ops] for s in graph.sections]
    sizes = [n for s, of in zip(graph.sections, staged, strict=True) for n in of * s.count]
    owner, used = {b.id: b for b in graph.buffers}, {}
    for i, (op, base) in enumerate(graph.instances()):
        for ref in op.writes:
            used[ref._replace(step=ref.at(base), fixed=True)] = [i]
        for ref in op.reads:
            used[ref._replace(step=ref.at(base), fixed=True)].append(i)
    peaks = dict.fromkeys(range(graph.world_size), 0)
    for i in range(graph.op_count()):
        alive = {ref.buffer for ref, at in used.items() if at[0] <= i <= at[-1]}
        held = dict.fromkeys(peaks, 0)
        for name in alive:
            held[owner[name].rank] += owner[name].nbytes
        for ref, (start, *readers) in used.items():
            if start <= i < (readers[0] if readers else start + 1):
                held[owner[ref.buffer].rank] += sizes[start]
        peaks = {rank: max(peaks[rank], held[rank]) for rank in peaks}
    assert graph.peak_bytes(staged=staged) == peaks
    assert graph.peak_bytes() != peaks


def test_keys_and_values_lie_side_by_side_while_a_strip_attends() -> None:
    """PixArt on strips of 1/8: all K and V of a layer (2 x 1152 a token, two branches) beside its own
    strip's. At 4096 px that is more than the feed-forward, which has the largest set of a whole image:
    4608 + 3472 elements a token of its own (K, V, Q, out, residuals), 2304 of all."""
    profile = shipped("pixart-alpha")
    whole, strips = (
        worst(phase_memory(plan(profile, spec, square(4096)), profile, "fp16", phases=("denoise",)))
        for spec in ("serial", "distrifusion=8")
    )
    tokens, text = 256 * 256, 5250 * 120 + 14980
    assert whole.activations == 2 * 2 * ((9216 + 4624) * tokens + text)
    assert strips.activations == 2 * 2 * ((4608 + 2320) * tokens // 8 + text + 2304 * tokens)


def test_cuda_graphs_keep_apart_what_an_eager_run_has_once() -> None:
    """Of each section of the loop one is captured (DistriFusion: synchronous, first stale, steady). Each
    keeps its activations and all its flat gathers, three parts; the buffers between steps are shared.
    Eager, a step's activations are there in its phase only."""
    profile, workload = transformer(3), Workload(24, 4, 1, 6, 1, "fp16")
    graph = plan(profile, "distrifusion=3,warmup=0", workload)
    _, *loop, _ = graph.sections
    assert [s.name for s in loop] == ["sync", "first", "steady"]
    pools = sum(
        3 * sum(op.nbytes for op in s.ops if op.call == "all_gather")
        + max(live_bytes(profile, op.work, 2) for op in s.ops if op.call == "forward")
        for s in loop
    )
    captured, eager = (
        at_peak(phase_memory(graph, profile, "fp16", ideal=True, phases=("denoise",), captured=c))
        for c in (True, False)
    )
    assert {m.buffers for m in captured} == {max(graph.peak_bytes().values()) + pools}
    assert max(m.activations for m in captured) < min(m.activations for m in eager)


def test_a_convolution_keeps_both_layouts_of_its_input_and_output() -> None:
    """The decoder's widest convolution has 256 channels in and out at the picture's resolution, 64
    pixels for each latent one; 45064 elements are alive there. fp32 is not laid out anew: 49160."""
    profile = shipped("sd21")
    half, single = (
        worst(phase_memory(plan(profile, "serial", Workload(768, 768, 1, 2, 1, d)), profile, d))
        for d in ("fp16", "fp32")
    )
    assert half.activations == 2 * 96 * 96 * (45064 + 64 * (256 + 256))
    assert single.activations == 4 * 96 * 96 * 49160


@pytest.mark.parametrize(("stages", "pixels"), [(2, 1024), (4, 1024), (4, 2048)])
def test_pipefusion_cache_in_closed_form(stages: int, pixels: int) -> None:
    """strategies.md 12.4: 2*(L/N)*gB*s*h*e of a PixArt stage, L = 28, h = 1152, s = (pixels/16)^2."""
    profile = load_profile(MODELS / "pixart-alpha.json")
    graph = plan(profile, f"pipefusion={stages},patches={stages}", square(pixels))
    cache = 2 * (28 // stages) * 2 * (pixels // 16) ** 2 * 1152 * 2
    assert set(graph.peak_bytes(("kv", "slots")).values()) == {cache}


# ----------------------------------------------------------------------------------------- sentences


def test_what_does_not_fit_says_why() -> None:
    """PixArt 4096 px under DistriFusion: 16.9 GB of stale K/V (strategies.md 10.4), as much once more
    while they are gathered, then the VAE."""
    profile = load_profile(MODELS / "pixart-alpha.json")
    memory = at_peak(phase_memory(plan(profile, "distrifusion=8", square(4096)), profile, "fp16"))
    assert max(m.buffers for m in memory) == pytest.approx(2 * 16.9e9, rel=0.01)
    reason = misfit(memory, [load_gpu("l40")] * 8)
    assert reason is not None
    assert reason.startswith("needs ")
    assert (
        "GiB of 44.7 GiB on rank 0 (l40) while decoding: activations 38.0, buffers 31.5" in reason
    )
    assert misfit(memory, [load_gpu("h200")] * 8) is None
    smaller = misfit(memory, [*[load_gpu("h200")] * 7, load_gpu("a5000")])
    assert smaller is not None
    assert "on rank 7 (a5000) while" in smaller


def test_unknown_dtype() -> None:
    profile = transformer(1)
    with pytest.raises(ValueError, match="dtype 'q4': one of"):
        phase_memory(plan(profile, "serial", TOY), profile, "q4")


# --------------------------------------------------------------------------- against published peaks

XDIT_PEAKS_GB = {  # xDiT docs, L40, latent output, XD-001..020 (tensor=8 below)
    ("pixart-alpha", 1024): (13.1, 12.99, 13.0, 12.32, 15.28),
    ("pixart-alpha", 4096): (16.6, 13.78, 13.98, 16.14, 51.02),
    ("sd3-medium", 1024): (17.93, 17.67, 14.49, 14.85),
    ("sd3-medium", 2048): (18.92, 17.87, 16.0, 15.88),
}
XDIT_TENSOR_GB = {1024: 12.3, 4096: 14.02}  # pixart-alpha, XD-005 and XD-011
XDIT_SPECS = (
    "serial",
    "ulysses=8",
    "pipefusion=8,patches=8",
    "cfg=2,pipefusion=4,patches=4",
    "distrifusion=8",
)


def test_fp16_keeps_part_of_a_t5_in_fp32() -> None:
    """24 layers whose ``wo`` has 10240 x 4096 parameters stay in fp32 where fp16 is asked for, as
    transformers loads them: 2 B more for each of 1.007 G parameters. Not in bf16."""
    graph = plan(shipped("pixart-alpha"), "serial", square(1024))
    held = {d: worst(phase_memory(graph, shipped("pixart-alpha"), d)) for d in ("fp16", "bf16")}
    assert held["fp16"].text_encoders - held["bf16"].text_encoders == 2 * 24 * 10240 * 4096
    turns = {
        d: next(
            op.nbytes
            for op, _ in plan(
                shipped("pixart-alpha"), "offload=text", Workload(1024, 1024, 1, 20, 1, d)
            ).instances()
            if op.name.startswith("load.text")
        )
        for d in ("fp16", "bf16")
    }
    assert turns["fp16"] - turns["bf16"] == 2 * 24 * 10240 * 4096


OTHER_PEAKS_GB = {  # the whole pipeline, decoding included
    ("flux1-dev", 1024, "bf16"): {  # diffusers docs, L20, DI-004..006
        "ulysses=4": 37.11,
        "ring=4": 37.01,
        "ulysses=2,ring=2": 37.16,
    },
    (
        "sd21",
        768,
        "fp16",
    ): {  # AsyncDiff, table 3, A5000, AD-034..041 (96 rows of 8 make no 8 strips)
        "serial": 5.24,
        "distrifusion=2": 6.538,
        "distrifusion=4": 7.086,
        "asyncdiff=2,warmup=9": 5.45,
        "asyncdiff=2,stride=2,warmup=9": 5.516,
        "asyncdiff=3,stride=2,warmup=9": 5.58,
    },
}
VIDEO_PEAKS_GIB = {  # diffusers docs, api/pipelines/cogvideox.md (2b) and mochi.md, saving memory
    ("cogvideox-2b", Workload(480, 720, 49, 50, 1, "fp16")): {
        "serial": 33,
        "offload=text+vae": 19,
        "vae=tiled,offload=text+vae": 11,
    },
    ("mochi", Workload(480, 848, 85, 64, 1, "bf16")): {"vae=tiled,offload=text+vae": 22},
}
PIPE_4096 = (
    "31 % high: during the warm-up the whole image passes a stage, 3.6 GB of activations that this row"
    " does not show; the hybrid row of the same figure does (1.8 GB, half the batch). With those of a"
    " patch it would be 9 % high: the reference ran it by patches or without a warm-up, refused here"
)
BEYOND_15_PERCENT = {("pixart-alpha", 4096, "pipefusion=8,patches=8"): PIPE_4096}
"""Published peaks that are missed by more, and why."""


def test_published_peaks_within_15_percent_but_for_the_listed() -> None:
    """33 rows: 32 within 15 % by their central value, one listed with the cause.

    xDiT's scripts load in fp16 and print ``torch.cuda.max_memory_allocated`` (xdit-project/xDiT@06dfcd8
    examples/pixartalpha_example.py), which sees neither the context nor the buffers of NCCL; of its 20
    rows 15 are within 2 %. CogVideoX's script prints the same in GiB (diffusers pull 9150). The
    others do not say how they counted: the whole. DistriFusion's code, which AsyncDiff compares with,
    replays CUDA graphs by default (mit-han-lab/distrifuser, ``DistriConfig``); xDiT's script does not.
    """
    errors: dict[tuple[str, int, str], float] = {}
    for (name, pixels), measured in XDIT_PEAKS_GB.items():
        rows_of = dict(zip(XDIT_SPECS, measured, strict=False))
        if name == "pixart-alpha":
            rows_of["tensor=8"] = XDIT_TENSOR_GB[pixels]
        for spec, gigabytes in rows_of.items():
            graph = plan(shipped(name), spec, square(pixels, 20))
            phases: tuple[Phase, ...] = ("encode", "denoise")
            ranks = at_peak(phase_memory(graph, shipped(name), "fp16", phases=phases))
            errors[name, pixels, spec] = max(m.allocated for m in ranks) / (gigabytes * 1e9) - 1
    assert len(errors) == 20
    assert sum(abs(error) < 0.02 for error in errors.values()) == 15
    for (name, pixels, dtype), rows in OTHER_PEAKS_GB.items():
        for spec, gigabytes in rows.items():
            graph = plan(shipped(name), spec, Workload(pixels, pixels, 1, 20, 1, dtype))
            captured = spec.startswith("distrifusion")
            total = worst(phase_memory(graph, shipped(name), dtype, captured=captured)).total
            errors[name, pixels, spec] = total / (gigabytes * 1e9) - 1
    for (name, workload), peaks in VIDEO_PEAKS_GIB.items():
        for spec, gib in peaks.items():
            graph = plan(shipped(name), spec, workload)
            (memory,) = at_peak(phase_memory(graph, shipped(name), workload.dtype))
            errors[name, workload.height, spec] = memory.allocated / (gib * 2**30) - 1
    assert len(errors) == 33
    beyond = {row for row, error in errors.items() if abs(error) > 0.15}
    assert beyond == set(BEYOND_15_PERCENT)
    assert all(BEYOND_15_PERCENT.values())


def test_published_out_of_memory_is_predicted() -> None:
    """PF-007: DistriFusion runs out of memory at 4096 px on eight L40, PipeFusion and one GPU do not.
    The clock of that row covers the denoiser only, so the decoder is left out; XD-012 is the same run on
    a card that holds its 51 GB."""
    for spec, fits in (
        ("distrifusion=8", False),
        ("pipefusion=8,patches=8", True),
        ("serial", True),
    ):
        assert fits_l40(spec, 4096, ("encode", "denoise")) == fits


def test_a_whole_decoder_stops_at_2048_pixels_on_an_l40() -> None:
    """With it decoded in strips by eight L40 an image can be 7168 px wide, 12.25 times the pixels that
    one whole decoder manages (arXiv 2411.01738, section on the parallel VAE): 7168 / sqrt(12.25)."""
    assert fits_l40("serial", 2048, PHASES)
    assert not fits_l40("serial", 4096, PHASES)
    assert fits_l40("ulysses=8,vae=split", 7168, PHASES)


def fits_l40(spec: str, pixels: int, phases: tuple[Phase, ...]) -> bool:
    graph = plan(shipped("pixart-alpha"), spec, square(pixels, 20))
    memory = at_peak(phase_memory(graph, shipped("pixart-alpha"), "fp16", phases=phases))
    return misfit(memory, [load_gpu("l40")] * graph.world_size) is None
