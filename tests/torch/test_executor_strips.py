"""The executor against plain loops: serial, replicas, guidance branches, strips fresh and displaced."""

from __future__ import annotations

import itertools
from functools import cache

import placed
import plain_loops as plain
import pytest
import torch
from torch import Tensor
from weighing import weighed

from paradiff.executor import interpreter
from paradiff.executor.forward import ScheduleMismatch
from paradiff.executor.interpreter import Request, Result, Unexecutable, run_graph
from paradiff.executor.network import Network
from paradiff.graph import Op, ScheduleGraph, Work, parse_graph
from paradiff.models.catalogue import CATALOGUE
from paradiff.models.tiny import tiny_scheduler
from paradiff.strategies import Infeasible, Workload, build, parse_spec
from paradiff.trace import check_trace

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("device"),
]

STEPS = 5
MODES = ("corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "no_sync")


def graph_of(name: str, spec: str, steps: int = STEPS) -> ScheduleGraph:
    profile, _ = plain.twin(name)
    size = plain.size_of(profile)
    return build(parse_spec(spec), profile, Workload(*size, steps, 1, "fp64"))


def request_of(name: str, replicas: int = 1) -> Request:
    return Request(
        conditioning=[placed.there(plain.given(name, i)) for i in range(replicas)],
        scheduler=tiny_scheduler(name),
        seed=plain.SEED,
        guidance_scale=plain.SCALE,
    )


def execute(name: str, graph: ScheduleGraph, replicas: int = 1) -> Result:
    """Run and judge what holds of every run: a legal trace, transfers of the bytes that they say."""
    profile, _ = plain.twin(name)
    with weighed():
        result = run_graph(graph, Network(placed.model(name), profile), request_of(name, replicas))
    check_trace(graph, result.trace)
    return placed.back(result)


def latent(name: str, spec: str) -> Tensor:
    return execute(name, graph_of(name, spec)).latents[0]


@cache
def reference(name: str) -> Tensor:
    return plain.serial(name, STEPS)


def without_guidance(name: str, spec: str) -> str:
    """``spec`` for a model that evaluates its denoiser once a step."""
    if plain.twin(name)[0].geometry.guidance == "cfg":
        return spec
    return spec.replace("cfg=2,", "").replace("cfg=2", "serial")


@pytest.mark.parametrize("name", CATALOGUE)
def test_serial_is_the_unmodified_loop(name: str) -> None:
    assert plain.relative(latent(name, "serial"), reference(name)) < 1e-10


EXACT = [
    "patch=2",
    "patch=4",
    "cfg=2",
    "cfg=2,patch=2",
    "distrifusion=2,mode=full_sync",
    "distrifusion=4,warmup=4,bucket=3",
    "distrifusion=2,warmup=9,mode=separate_gn",
    "pcpp=4,warmup=4",
]


FEW = [
    "patch=4",
    "cfg=2,patch=2",
    "distrifusion=2,mode=full_sync",
    "distrifusion=2,warmup=4",
    "pcpp=2,warmup=4",
]
ALONE = ["patch=1", "patch=1,mode=naive"]
CASES = [
    *itertools.product(plain.NAMES, EXACT),
    *itertools.product(plain.OTHERS, FEW),
    *itertools.product(["sd21", "wan2.1-1.3b"], ALONE),
    ("sd15", "cfg=2,patch=2"),
    ("wan2.1-14b", "distrifusion=4,warmup=4"),
]


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_exact_strategies_equal_the_unmodified_loop(name: str, spec: str) -> None:
    if "warmup=9" in spec:
        spec = spec.replace("warmup=9", "warmup=5")
    spec = without_guidance(name, spec)
    assert plain.relative(latent(name, spec), reference(name)) < 1e-10


@pytest.mark.parametrize("name", ["sd21", "flux1-dev", "hunyuandit"])
def test_replicas_are_requests_of_their_own(name: str) -> None:
    result = execute(name, graph_of(name, "data=2"), replicas=2)
    for replica in range(2):
        alone = plain.serial(name, STEPS, replica)
        assert plain.relative(result.latents[replica], alone) < 1e-10
    assert plain.relative(result.latents[0], result.latents[1]) > 0.1


def test_a_replica_does_what_it_does_alone() -> None:
    """Bit for bit, whatever the strategy."""
    spec = "pipefusion=2,patches=4"
    together = execute("sd3-medium", graph_of("sd3-medium", f"data=2,{spec}"), replicas=2)
    assert torch.equal(together.latents[0], latent("sd3-medium", spec))


@pytest.mark.parametrize("name", [*plain.NAMES, *plain.OTHERS, "sd15", "cogvideox-5b"])
def test_displaced_strips_equal_the_read_map(name: str) -> None:
    ours = latent(name, "distrifusion=2,warmup=1")
    assert plain.relative(ours, plain.displaced(name, STEPS, 2, 1)) < 1e-10
    assert plain.relative(ours, reference(name)) > 1e-6  # stale data do change the result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sd21", "audioldm2-large"])
def test_every_mode_equals_the_read_map(name: str, mode: str) -> None:
    n = 2 if mode == "sync_gn" else 4  # there the plain loop runs a step once for each GroupNorm
    graph = graph_of(name, f"distrifusion={n},warmup=0,mode={mode},bucket=7", steps=3)
    ours = execute(name, graph).latents[0]
    assert plain.relative(ours, plain.displaced(name, 3, n, 0, mode)) < 1e-10


@pytest.mark.parametrize("name", plain.OTHERS)
def test_modes_differ_only_where_there_is_a_norm_over_rows(name: str) -> None:
    """A transformer has no GroupNorm: whatever is done about its moments, the bits are the same."""
    found = [latent(name, f"distrifusion=2,warmup=1,mode={mode}") for mode in MODES[:-1]]
    assert all(torch.equal(each, found[0]) for each in found[1:])
    never = latent(name, "distrifusion=2,warmup=1,mode=no_sync")
    assert plain.relative(never, plain.displaced(name, STEPS, 2, 1, "no_sync")) < 1e-10


def test_modes_differ() -> None:
    found = [latent("sd21", f"distrifusion=4,warmup=0,mode={mode}") for mode in MODES]
    for i, a in enumerate(found):
        assert all(plain.relative(a, b) > 1e-6 for b in found[i + 1 :])


@pytest.mark.parametrize("name", ["sdxl", "svd", "pixart-alpha", "mochi", "hunyuandit"])
def test_guidance_branches_apart_equal_both_in_one_call(name: str) -> None:
    together = latent(name, "distrifusion=2,warmup=1")
    assert plain.relative(latent(name, "cfg=2,distrifusion=2,warmup=1"), together) < 1e-10


@pytest.mark.parametrize("name", plain.NAMES + plain.OTHERS)
def test_partial_neighbours_equal_the_read_map(name: str) -> None:
    ours = latent(name, "pcpp=4,warmup=1,portion=0.3")
    expected = plain.displaced(name, STEPS, 4, 1, portion=0.3)
    assert plain.relative(ours, expected) < 1e-10


@pytest.mark.parametrize("name", ["sd21", "sd3-medium", "wan2.1-1.3b"])
def test_who_slices_makes_no_difference(name: str) -> None:
    halves = [latent(name, f"pcpp=4,warmup=1,slice={who}") for who in ("sender", "receiver")]
    assert torch.equal(*halves)


@pytest.mark.parametrize("name", ["sdxl", "flux1-dev"])
def test_two_whole_neighbours_are_all_strips(name: str) -> None:
    partial = latent(name, "pcpp=2,warmup=1,portion=1.0")
    assert plain.relative(partial, latent(name, "distrifusion=2,warmup=1")) < 1e-12


@pytest.mark.parametrize("name", ["sd21", "svd", "cogvideox-2b"])
@pytest.mark.parametrize("mode", ["corrected_async_gn", "sync_gn"])
def test_bucket_size_changes_no_bit(name: str, mode: str) -> None:
    found = [
        latent(name, f"distrifusion=2,warmup=1,mode={mode},bucket={size}") for size in (1, 3, 60)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["sd21", "audioldm2-large"])
def test_naive_strips_are_small_images(name: str) -> None:
    assert plain.relative(latent(name, "patch=2,mode=naive"), plain.naive(name, STEPS, 2)) < 1e-10


def test_graph_survives_its_text() -> None:
    """Tags and packed points are part of the text: what was read back runs to the same bits."""
    graph = graph_of("sd21", "distrifusion=2,warmup=1")
    again = parse_graph(graph.text())
    assert again == graph
    assert torch.equal(execute("sd21", again).latents[0], execute("sd21", graph).latents[0])
    unrolled = graph.unroll()
    assert torch.equal(execute("sd21", unrolled).latents[0], execute("sd21", graph).latents[0])


def test_values_are_freed_at_their_last_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[dict[object, object]] = []

    class Watched(interpreter._Run):
        def __post_init__(self) -> None:
            super().__post_init__()
            kept.append(self.values)

    monkeypatch.setattr(interpreter, "_Run", Watched)
    execute("sd21", graph_of("sd21", "cfg=2,distrifusion=2,warmup=1"))
    assert kept == [{}]


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("sd15", "pipefusion=2", "is a U-Net with skips"),
        ("svd-xt", "ring=2", "convolutions need halos"),
        ("hunyuanvideo", "cfg=2", "guidance is embedded"),
        ("flux1-schnell", "cfg=2", "guidance is none"),
        ("mochi", "ulysses=8", "the 4 heads of tiny-mochi do not divide by 8"),
        ("wan2.1-14b", "pipefusion=6", "has 5 blocks"),
        ("latte", "patch=3", "do not divide into 3 strips"),
    ],
)
def test_what_a_class_cannot_run_has_a_reason(name: str, spec: str, reason: str) -> None:
    with pytest.raises(Infeasible, match=reason):
        graph_of(name, spec)


def test_strategy_without_meaning_lists_those_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "EXECUTABLE", ("serial", "patch"))
    with pytest.raises(Unexecutable, match=r"'pcpp=2' cannot be executed yet; .*: serial, patch"):
        execute("sd21", graph_of("sd21", "pcpp=2"))


def test_graph_of_another_model_is_refused() -> None:
    with pytest.raises(Unexecutable, match="graph of tiny-sdxl, network of tiny-sd21"):
        execute("sd21", graph_of("sdxl", "serial"))


def test_missing_conditioning_is_refused() -> None:
    with pytest.raises(Unexecutable, match="2 replicas need as many conditionings, not 1"):
        execute("sd21", graph_of("sd21", "data=2"))


def test_network_that_parts_from_the_graph_is_reported() -> None:
    """An op that ends where the network has no exchange point: the message names both places."""
    graph = graph_of("pixart-alpha", "patch=2", 1)
    points = [i for i, _ in plain.twin("pixart-alpha")[0].denoiser.points()]

    def moved(op: Op) -> Op:
        if op.work is None or op.call != "forward":
            return op
        shifted = tuple(
            (lo - (lo == points[1]), hi - (hi == points[1])) for lo, hi in op.work.ranges
        )
        return Op(**{f: getattr(op, f) for f in op.__slots__} | {
            "work": Work(op.work.stage, shifted, op.work.shape)
        })  # fmt: skip

    sections = tuple(
        type(s)(s.name, s.first, s.count, s.stride, tuple(map(moved, s.ops)))
        for s in graph.sections
    )
    broken = ScheduleGraph(graph.world_size, graph.buffers, sections, graph.meta)
    with pytest.raises(ScheduleMismatch, match=r"should end at .*; reached transformer_blocks\.1"):
        execute("pixart-alpha", broken)
