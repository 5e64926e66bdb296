"""The decoder on strips of several ranks: exact, whoever has the latent and however many decode."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import placed
import plain_loops as plain
import pytest
import torch
from torch import Tensor
from weighing import weighed

from paradiff.executor import loading
from paradiff.executor.decoding import strip_decoder
from paradiff.executor.interpreter import Request, Result, Unexecutable, run_graph
from paradiff.executor.job import Job, prepare
from paradiff.executor.loading import Pipeline, load
from paradiff.executor.outputs import decoder
from paradiff.graph import ScheduleGraph
from paradiff.models.tiny import TINY
from paradiff.strategies import Workload, build, parse_spec
from paradiff.strategies.tiling import tiling
from paradiff.trace import check_trace

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("device"),
]

STEPS = 2
FRAMES = {"latte": 16, "hunyuanvideo": 25}
"""Of a video in more than one chunk: latent frames 14 + 2, tiles of 5, 4 and 1."""


def pipeline(name: str) -> Pipeline:
    return _loaded(name, placed.device)


@cache
def _loaded(name: str, device: str) -> Pipeline:
    profile, _ = plain.twin(name)  # of all tests: not of as many frames as below
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "cached_profile", lambda plan: profile)
        patch.setitem(TINY["latte"], "video_length", FRAMES["latte"])
        where = torch.device(device)
        return load(f"tiny-{name}", random_weights=True, dtype=torch.float64, device=where)


def graph_of(name: str, spec: str) -> ScheduleGraph:
    profile = pipeline(name).network.profile
    height, width, frames = plain.size_of(profile)
    workload = Workload(height, width, FRAMES.get(name, frames), STEPS, 1, "fp64")
    return build(parse_spec(spec), profile, workload)


def execute(name: str, spec: str, ours: Pipeline | None = None) -> Result:
    ours, graph = ours or pipeline(name), graph_of(name, spec)
    replicas = range(parse_spec(spec).degree("data"))
    request = Request(
        conditioning=[placed.there(plain.given(name, r)) for r in replicas],
        scheduler=ours.scheduler,
        decode=decoder(ours),
        strips=strip_decoder(ours),
    )
    is_priced = ours is pipeline(name)  # a narrower decoder is not what the graph is of
    with weighed() if is_priced else nullcontext():
        result = run_graph(graph, ours.network, request)
    check_trace(graph, result.trace)
    return result


@pytest.mark.parametrize(
    ("name", "spec", "decoding"),
    [
        ("sdxl", "cfg=2", {0, 1}),
        ("sdxl", "patch=4", {0, 1, 2, 3}),  # an end, two middles, an end
        ("sd3-medium", "ulysses=2", {0, 1}),  # no convolution before the first
        (
            "pixart-alpha",
            "pipefusion=2,patches=4",
            {0, 1},
        ),  # the last stage has the latent, in parts
        ("sd21", "asyncdiff=3,warmup=1,cuts=balanced", {0, 1}),  # 16 rows: not over three
        ("flux1-dev", "parastep=4,warmup=1", {0, 1, 2, 3}),  # the first rank's latent is the one
        ("audioldm2-large", "cfg=2", {0, 1}),  # a spectrogram: rows are moments of time
        ("svd", "patch=4", {0, 1, 2, 3}),  # norms of a frame and of the video
        ("mochi", "cfg=2,ulysses=2", {0, 1, 2, 3}),  # borders are repeated, frames dropped
        ("latte", "cfg=2,ulysses=2", {0, 1, 2, 3}),  # chunks that know nothing of each other
        ("hunyuanvideo", "ulysses=2", {0, 1}),  # tiles of frames that blend, masked attention
        ("hunyuanvideo", "ulysses=4", {0, 1, 2, 3}),
        ("wan2.1-1.3b", "ulysses=2", {0, 1}),  # zeros at borders, frames kept for the next chunk
        ("wan2.1-1.3b", "ulysses=4", {0, 1, 2, 3}),
    ],
)
def test_strips_equal_the_unmodified_decoder(name: str, spec: str, decoding: set[int]) -> None:
    alone, split = execute(name, spec), execute(name, f"{spec},vae=split")
    assert torch.equal(split.latents[0], alone.latents[0])
    expected = decoder(pipeline(name))(alone.latents[0])
    assert torch.equal(alone.decoded[0], expected)
    assert split.decoded[0].shape == expected.shape
    assert plain.relative(split.decoded[0], expected) < 1e-10
    assert {span.rank for span in split.trace.spans if span.call == "decode"} == decoding


def test_frames_that_fill_up_a_patch_are_not_decoded() -> None:
    """Three latent frames, patches of two: CogVideoX 1.5's pipeline adds one at the begin and drops it
    before it decodes."""
    found = execute("cogvideox1.5-5b", "cfg=2")
    assert found.latents[0].shape[1] == 4
    expected = decoder(pipeline("cogvideox1.5-5b"))(found.latents[0][:, 1:])
    assert torch.equal(found.decoded[0], expected)
    assert expected.shape[2] == 9


def test_every_replica_decodes_its_own() -> None:
    split = execute("sdxl", "data=2,cfg=2,vae=split")
    for replica in range(2):
        expected = decoder(pipeline("sdxl"))(split.latents[replica])
        assert plain.relative(split.decoded[replica], expected) < 1e-10
    assert plain.relative(split.decoded[0], split.decoded[1]) > 0.01


def test_half_precision_keeps_its_moments_in_float32() -> None:
    """In bfloat16, as far from float64 as the unmodified decoder."""
    latent = execute("sdxl", "cfg=2").latents[0]
    exact = decoder(pipeline("sdxl"))(latent)
    vae = deepcopy(pipeline("sdxl").vae)
    narrow = replace(pipeline("sdxl"), vae=vae.to(torch.bfloat16))
    split = execute("sdxl", "cfg=2,vae=split", narrow).decoded[0]
    whole = decoder(narrow)(latent)
    errors = [plain.relative(found.double(), exact) for found in (split, whole)]
    assert 1e-4 < errors[0] < 2 * errors[1]


def test_a_pipeline_without_such_a_vae_is_refused() -> None:
    ours = replace(pipeline("sdxl"), vae=None)
    request = Request(conditioning=[plain.given("sdxl")], scheduler=ours.scheduler)
    assert strip_decoder(ours) is None
    with pytest.raises(Unexecutable, match="AutoencoderKL"):
        run_graph(graph_of("sdxl", "cfg=2,vae=split"), ours.network, request)


def test_a_job_decodes_as_its_spec_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "cached_profile", lambda plan: plain.twin("sdxl")[0])
    pictures = []
    for spec in ("cfg=2", "cfg=2,vae=split"):
        job = Job(source="tiny-sdxl", spec=spec, steps=STEPS, dtype="fp64", device=placed.device)
        prepared = prepare(job)
        result = prepared.in_process()
        prepared.save(result, tmp_path)
        pictures.append(result.decoded[0])
        assert (tmp_path / "image-0.png").exists()
    assert plain.relative(*pictures) < 1e-10


def test_tiles_are_those_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 latent rows in squares of 8, a quarter of which overlaps: as its own method decodes them."""
    ours = replace(pipeline("sdxl"), vae=deepcopy(pipeline("sdxl").vae))
    latent = execute("sdxl", "cfg=2").latents[0]
    whole = decoder(ours)(latent)
    found = decoder(ours, tiling(ours.network.profile, 8))(latent)
    other = deepcopy(pipeline("sdxl").vae)
    other.tile_latent_min_size, other.tile_sample_min_size = 8, 64

    @torch.no_grad()
    def expected(x: Tensor) -> Tensor:
        tiles: Tensor = other.tiled_decode(x / other.config.scaling_factor).sample
        return tiles

    assert torch.equal(found, expected(latent))
    assert plain.relative(found, whole) > 1e-3
    monkeypatch.setattr(loading, "cached_profile", lambda plan: plain.twin("sdxl")[0])
    job = Job(
        source="tiny-sdxl", spec="cfg=2,vae=tiled,tile=8", steps=STEPS, dtype="fp64",
        device=placed.device,
    )  # fmt: skip
    result = prepare(job).in_process()
    assert torch.equal(result.decoded[0], expected(result.latents[0]))
