"""Prompts and embeddings: a run equals the whole diffusers pipeline; wrong files are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import plain_loops as plain
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import tiny_pipeline
from torch import Tensor

from paradiff.executor import loading
from paradiff.executor.conditioning import _flat, encode_prompt, read_conditioning
from paradiff.executor.interpreter import Request, run_graph
from paradiff.executor.loading import Pipeline, load
from paradiff.executor.schedulers import GuidanceScale
from paradiff.strategies import Workload, build, parse_spec

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

STEPS, SIZE = 3, 128
PROMPT, NEGATIVE = "a cat on a mat", "blurred"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> the twin's pipeline, saved."""

    @cache
    def saved(name: str) -> Path:
        where = tmp_path_factory.mktemp("pipelines") / name
        tiny_pipeline(name).save_pretrained(where)
        return Path(where)

    return saved


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, folder: Any) -> Any:
    """Name -> the saved pipeline, loaded; the profile is the twin's, for texts of the real length."""

    def one(name: str) -> Pipeline:
        def profile(plan: Any) -> Any:
            return replace(plain.twin(name)[0], name=plan.name, geometry=plan.geometry)

        monkeypatch.setattr(loading, "cached_profile", profile)
        return load(
            str(folder(name)), random_weights=False, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip

    return one


def diffusers_latents(pipe: Any, start: Tensor, **inputs: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    if "PixArt" in type(pipe).__name__:
        inputs["use_resolution_binning"] = False
    if "Flux" in type(pipe).__name__:
        b, c, r, w = start.shape
        start = pipe._pack_latents(start, b, c, r, w)
    out = pipe(
        height=SIZE, width=SIZE, num_inference_steps=STEPS, output_type="latent", latents=start,
        **inputs,
    )  # fmt: skip
    latents = out.frames if hasattr(out, "frames") else out.images
    if "Flux" in type(pipe).__name__:
        latents = pipe._unpack_latents(latents, SIZE, SIZE, 8)
    return latents


@pytest.mark.parametrize(
    "name", ["sdxl", "sd3-medium", "flux1-dev", "pixart-alpha", "svd", "wan2.1-1.3b"]
)
def test_a_run_equals_the_pipeline(loaded: Any, name: str) -> None:
    """From the prompt (SVD: an image) to the latents, with the same noise, in float32."""
    ours = loaded(name)
    profile = ours.network.profile
    frames = {"svd": 3, "wan2.1-1.3b": 9}.get(name, 1)
    workload = Workload(SIZE, SIZE, frames, STEPS, 1, "fp32")
    shape = profile.latent_shape(SIZE, SIZE, frames, 1)
    prompt: Any = PROMPT
    inputs: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 4.0}
    if name == "flux1-dev":
        del inputs["negative_prompt"]
    scale: GuidanceScale = 4.0
    if name == "svd":  # guidance grows over the frames
        prompt = Image.radial_gradient("L").resize((SIZE, SIZE)).convert("RGB")
        scale = 1.5, 4.0
        scales = {"min_guidance_scale": 1.5, "max_guidance_scale": 4.0}
        generator = torch.Generator().manual_seed(7)
        inputs = {"image": prompt, "num_frames": 3, "generator": generator, **scales}
    if name == "wan2.1-1.3b":
        inputs["num_frames"] = frames
    given = encode_prompt(
        ours, shape, (SIZE, SIZE, frames), prompt, negative_prompt=NEGATIVE, guidance_scale=4.0,
        seed=7,
    )  # fmt: skip
    request = Request(
        conditioning=[given], scheduler=ours.scheduler, seed=3, guidance_scale=scale,
        dtype=torch.float32,
    )  # fmt: skip
    graph = build(parse_spec("serial"), profile, workload)
    result = run_graph(graph, ours.network, request).latents[0]
    start = torch.randn(
        ours.network.latent_sizes(shape), generator=torch.Generator().manual_seed(3),
        dtype=torch.float64,
    ).float()  # fmt: skip
    expected = diffusers_latents(tiny_pipeline(name), start, **inputs)
    assert plain.relative(result, expected) < 1e-5


def test_batches_and_files(loaded: Any, tmp_path: Path) -> None:
    """Two images of one prompt; written to a file by the names of the arguments, it reads back."""
    ours = loaded("sdxl")
    shape = ours.network.profile.latent_shape(SIZE, SIZE, 1, 2)
    given = encode_prompt(ours, shape, (SIZE, SIZE, 1), PROMPT, negative_prompt=NEGATIVE)
    embeddings = given["encoder_hidden_states"]
    assert embeddings.shape == (4, 77, 24)  # uncond, uncond, cond, cond
    assert torch.equal(embeddings[2], embeddings[3])
    assert not torch.equal(embeddings[1], embeddings[2])
    expected = [SIZE, SIZE, 0, 0, SIZE, SIZE]  # original size, crop, target size
    assert given["added_cond_kwargs"]["time_ids"].tolist() == [expected] * 4
    file = tmp_path / "given.safetensors"
    flat = dict(_flat(given))
    save_file({k: v.contiguous() for k, v in flat.items()}, file)
    again = read_conditioning(file, ours.network, shape, torch.float32)
    assert all(torch.equal(tensor, flat.pop(name)) for name, tensor in _flat(again))
    assert not flat
    flat = dict(_flat(given))

    def says(tensors: dict[str, Tensor], *words: str) -> None:
        save_file({k: v.clone() for k, v in tensors.items()}, file)
        with pytest.raises(ValueError, match="allowed") as caught:
            read_conditioning(file, ours.network, shape, torch.float32)
        assert all(word in str(caught.value) for word in (file.name, *words)), caught.value

    name = "added_cond_kwargs.time_ids"
    says({k: v for k, v in flat.items() if k != name}, name, "missing")
    says({**flat, name: flat[name][:1]}, name, "[1, 6]", "[4, 6]")
    says({**flat, "prompt_embeds": flat[name]}, "'prompt_embeds'", "encoder_hidden_states")
    file.write_text("no tensors")
    with pytest.raises(ValueError, match="not readable as safetensors"):
        read_conditioning(file, ours.network, shape, torch.float32)


def test_prompts_need_encoders() -> None:
    profile, model = plain.twin("flux1-dev")
    network = loading.Network(model, profile)
    bare = Pipeline(network=network, scheduler=None, guidance_scale=1.0)
    with pytest.raises(ValueError, match="text encoders"):
        encode_prompt(bare, profile.latent_shape(128, 128, 1, 1), (128, 128, 1), PROMPT)


def test_an_encoder_without_weights_is_one_message(folder: Any, loaded: Any) -> None:
    ours = loaded("pixart-alpha")
    weights = folder("pixart-alpha") / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_suffix(".kept"))
    shape = ours.network.profile.latent_shape(SIZE, SIZE, 1, 1)
    try:
        with pytest.raises(ValueError, match=r"text_encoder: no weights"):
            encode_prompt(ours, shape, (SIZE, SIZE, 1), PROMPT)
    finally:
        weights.with_suffix(".kept").rename(weights)
