"""Serial runs equal the whole call of the diffusers pipeline of each class, given the same embeddings.

This is what says that the plain loops call model, scheduler and guidance as the pipeline does. Latents
are float64 in both: where diffusers says float32, which for them is a loss, float64 is put.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import plain_loops as plain
import pytest
import torch
from test_executor_strips import latent
from torch import Tensor

from paradiff.executor.loading import pipeline_class
from paradiff.models.tiny import tiny_scheduler

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("device"),
]

STEPS = 5
SIZE = 128


def branches(name: str, *of: str) -> list[Tensor]:
    """Each of the embeddings ``of``: of the prompt, then of the negative one."""
    return [half for key in of for half in plain.given(name)[key].chunk(2)[::-1]]


def guided(name: str) -> dict[str, Any]:
    cond, uncond = branches(name, "encoder_hidden_states")
    return {"prompt_embeds": cond, "negative_prompt_embeds": uncond, "guidance_scale": plain.SCALE}


def masked(name: str) -> dict[str, Any]:
    cond, uncond = branches(name, "encoder_attention_mask")
    return {**guided(name), "prompt_attention_mask": cond, "negative_prompt_attention_mask": uncond}


def pooled(name: str) -> dict[str, Any]:
    cond, uncond = branches(name, "pooled_projections")
    return {**guided(name), "pooled_prompt_embeds": cond, "negative_pooled_prompt_embeds": uncond}


def sdxl(name: str) -> dict[str, Any]:
    """Time ids are the original size, corner and wanted size that the pipeline is told."""
    given = plain.given(name)["added_cond_kwargs"]
    uncond, cond = given["text_embeds"].chunk(2)
    result = {"pooled_prompt_embeds": cond, "negative_pooled_prompt_embeds": uncond}
    for negative, ids in zip(("negative_", ""), given["time_ids"].tolist(), strict=True):
        result |= {
            f"{negative}original_size": tuple(ids[:2]),
            f"{negative}crops_coords_top_left": tuple(ids[2:4]),
            f"{negative}target_size": tuple(ids[4:]),
        }
    return guided(name) | result


def svd(_: str) -> dict[str, Any]:
    """Its picture is looked at by encoders (see ``without_encoders``) alone."""
    picture = torch.zeros(1, 3, SIZE, SIZE)
    return {
        "image": picture,
        "min_guidance_scale": plain.SCALE,
        "max_guidance_scale": plain.SCALE,
    }


def audioldm2(name: str) -> dict[str, Any]:
    cond, uncond = branches(name, "encoder_hidden_states_1")
    language, other = branches(name, "encoder_hidden_states")
    mask, other_mask = branches(name, "encoder_attention_mask_1")
    return {
        "prompt_embeds": cond, "negative_prompt_embeds": uncond, "attention_mask": mask,
        "generated_prompt_embeds": language, "negative_generated_prompt_embeds": other,
        "negative_attention_mask": other_mask, "guidance_scale": plain.SCALE,
    }  # fmt: skip


def pixart(name: str) -> dict[str, Any]:
    return {**masked(name), "negative_prompt": None, "use_resolution_binning": False}


def hunyuandit(name: str) -> dict[str, Any]:
    names = [
        f"{negative}{kind}{second}"
        for second in ("", "_2")
        for kind in ("prompt_embeds", "prompt_attention_mask")
        for negative in ("", "negative_")
    ]
    values = branches(
        name, "encoder_hidden_states", "text_embedding_mask", "encoder_hidden_states_t5",
        "text_embedding_mask_t5",
    )  # fmt: skip
    given = dict(zip(names, values, strict=True))
    return {**given, "guidance_scale": plain.SCALE, "use_resolution_binning": False}


def embedded(name: str) -> dict[str, Any]:
    """Guidance and pooled embeddings are the network's own inputs."""
    given = plain.given(name)
    inputs = {
        "prompt_embeds": given["encoder_hidden_states"],
        "pooled_prompt_embeds": given["pooled_projections"],
    }
    if "encoder_attention_mask" in given:
        inputs["prompt_attention_mask"] = given["encoder_attention_mask"]
    if "guidance" in given:
        thousand = 1000 if name == "hunyuanvideo" else 1  # by which its pipeline multiplies
        inputs["guidance_scale"] = float(given["guidance"]) / thousand
    return inputs


CALLS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "sd15": guided,
    "sd21": guided,
    "sdxl": sdxl,
    "svd": svd,
    "audioldm2-large": audioldm2,
    "pixart-alpha": pixart,
    "sd3-medium": pooled,
    "sd3.5-large": pooled,
    "flux1-dev": embedded,
    "flux1-schnell": embedded,
    "cogvideox-2b": guided,
    "cogvideox-5b": guided,
    "cogvideox1.5-5b": guided,
    "wan2.1-1.3b": guided,
    "latte": lambda name: {**guided(name), "negative_prompt": None},
    "hunyuandit": hunyuandit,
    "hunyuanvideo": embedded,
    "mochi": masked,
}


def without_encoders(pipe: Any, name: str) -> None:
    """Put what is given in place of encoders that a pipeline calls whatever it is given. SVD's picture
    is the same beside every frame."""
    given = plain.given(name, 0)
    if name == "svd":
        given["image_latents"] = given["image_latents"][:, :1].expand_as(given["image_latents"])
        pipe.vae = SimpleNamespace(dtype=torch.float64)
        pipe._encode_image = lambda *_: given["encoder_hidden_states"]
        pipe._encode_vae_image = lambda *_, **__: given["image_latents"][:, 0]
        pipe._get_add_time_ids = lambda *_: given["added_time_ids"]
    elif name == "audioldm2-large":  # it asks an encoder for its kind to check what it is given
        names = "encoder_hidden_states_1", "encoder_attention_mask_1", "encoder_hidden_states"
        pipe.check_inputs = lambda *_: None
        pipe.encode_prompt = lambda *_, **__: tuple(given[key] for key in names)
        sizes = {"upsample_rates": [1], "sampling_rate": 1, "model_in_dim": SIZE}
        pipe.vocoder = SimpleNamespace(config=SimpleNamespace(**sizes))


def called(name: str) -> Tensor:
    """Latents of the pipeline, whose encoders and VAE are not there."""
    profile, model = plain.twin(name)
    kind = pipeline_class(model)
    parts = signature(kind).parameters
    absent = dict.fromkeys(k for k, v in parts.items() if v.default is v.empty)
    denoiser = "unet" if "unet" in parts else "transformer"
    pipe = kind(**{**absent, denoiser: model, "scheduler": tiny_scheduler(name)})
    pipe.set_progress_bar_config(disable=True)
    without_encoders(pipe, name)
    run = plain.Plain(name, STEPS)
    start = run.x / getattr(run.scheduler, "init_noise_sigma", 1.0)
    if name.startswith("flux"):
        start = diffusers.FluxPipeline._pack_latents(start, *start.shape)
    takes = signature(kind.__call__).parameters
    size = {
        "height": SIZE, "width": SIZE, "num_frames": profile.defaults["frames"],
        "video_length": profile.defaults["frames"],
    }  # fmt: skip
    result = pipe(
        **{k: v for k, v in size.items() if k in takes},
        num_inference_steps=STEPS - (name == "sd15"),
        latents=start,
        generator=run.generator,
        output_type="latent",
        return_dict=False,
        **CALLS[name](name),
    )[0]
    if name.startswith("flux"):
        return diffusers.FluxPipeline._unpack_latents(result, SIZE, SIZE, 8)
    out: Tensor = result
    return out


@pytest.mark.parametrize("name", CALLS)
def test_serial_is_the_pipeline(name: str) -> None:
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.dict(plain.given(name, 0)),
    ):
        expected, ours = called(name), latent(name, "serial")
    assert plain.relative(ours, expected) < 1e-10
