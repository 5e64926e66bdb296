"""Two small trained models: a transformer and a U-Net that draw handwritten digits, class by class.

Random weights say nothing about what staleness does to a picture; these do, on a CPU in seconds. Classes
and geometry are those of a catalogue model's, so every strategy for that class runs on them; the latent
is the grey picture itself, 32 x 32 pixels, without a VAE. ``tools/train_small.py`` has made the weights,
from scikit-learn's digits; its log lies beside them. What is seen on them is not carried over to another
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paradiff.models.catalogue import CATALOGUE, latent_probes, shape
from paradiff.models.plans import Plan, plan_of
from paradiff.models.stages import Call, Shape, StageSpec, empty

SIDE = 32
"""Rows and columns of a picture, and of the latent."""
DIGITS = 10
TOKENS, WIDTH = 2, 16
"""Text tokens of a call, and channels of each."""
NO_DIGIT, END = DIGITS, DIGITS + 1
"""Channels that stand for "any digit", which guidance is away from, and for the end of the text."""
GUIDANCE_SCALE = 2.0
STEPS = 20
WEIGHTS = Path(__file__).parent / "trained"

BASES: Mapping[str, str] = {"small-dit": "pixart-alpha", "small-unet": "sd21"}
"""Small model -> the catalogue model whose class, guidance and text stream it has."""

SMALL: Mapping[str, Mapping[str, Any]] = {
    "small-dit": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 8,
        "patch_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "sample_size": SIDE,
        "attention_bias": True,
        "cross_attention_dim": 64,
        "caption_channels": WIDTH,
    },
    "small-unet": {
        "sample_size": SIDE,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [16, 32, 64],
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "use_linear_projection": True,
    },
}

_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "small-dit": ("DPMSolverMultistepScheduler", {**_NOISE, "timestep_spacing": "trailing"}),
    "small-unet": (
        "DDIMScheduler",
        {
            **_NOISE,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "timestep_spacing": "trailing",
        },
    ),
}


class Pixels(nn.Module):
    """In place of a VAE: the latent is the picture. Grey (b, 1, h, w) to RGB (b, 3, h, w), -1 to 1."""

    def forward(self, latent: Tensor) -> Tensor:
        return latent.clamp(-1, 1).expand(-1, 3, -1, -1)


def small_plan(name: str) -> Plan:
    """The plan of a small model: its denoiser, scheduler and guidance, and pixels for a VAE."""
    entry, config = CATALOGUE[BASES[name]], SMALL[name]
    levels = config.get("block_out_channels")
    unit = config["patch_size"] if levels is None else 2 ** (len(levels) - 1)
    geometry = replace(
        entry.geometry, channels=1, scale=1, row_multiple=unit, text_tokens=(TOKENS,)
    )
    size = (SIDE, SIDE, 1, STEPS)
    plan = plan_of(
        name,
        replace(entry, config=config, geometry=geometry, size=size, text=(), asyncdiff={}),
    )
    class_name, scheduler = SCHEDULERS[name]
    whole = shape(1, 1, SIDE, SIDE)
    pixels = StageSpec(
        "vae", _build_pixels, _call_pixels, latent_probes(whole, video=False, unit=1)
    )
    return replace(
        plan,
        stages=tuple(pixels if spec.name == "vae" else spec for spec in plan.stages),
        configurations={
            **plan.configurations,
            "vae": {"class": "Pixels"},
            "scheduler": {"class": class_name, **scheduler},
        },
    )


def _build_pixels() -> tuple[Any, ...]:
    return (Pixels(),)


def _call_pixels(modules: tuple[Any, ...], s: Shape) -> Call:
    return modules[0], (empty(s["b"], 1, s["r"], s["w"]),), {}


def small_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The trained denoiser."""
    model: nn.Module = new_model(name)
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.to(dtype).eval()


def new_model(name: str) -> nn.Module:
    """The denoiser as its class initialises it."""
    model: nn.Module = getattr(diffusers, CATALOGUE[BASES[name]].class_name).from_config(
        dict(SMALL[name])
    )
    return model


def small_scheduler(name: str) -> Any:
    """The sampler that the model runs with by default."""
    class_name, config = SCHEDULERS[name]
    return getattr(diffusers, class_name)(**config)


def words(digits: Sequence[int | None], dtype: torch.dtype = torch.float32) -> Tensor:
    """The text of each picture, (n, TOKENS, WIDTH): which digit (None: any), and the end."""
    text = torch.zeros(len(digits), TOKENS, WIDTH, dtype=dtype)
    for i, digit in enumerate(digits):
        text[i, 0, NO_DIGIT if digit is None else digit] = WIDTH**0.5
    text[:, 1, END] = WIDTH**0.5
    return text


def digits_of(prompt: str | None, samples: int, seed: int) -> list[int]:
    """The digit of each picture: that of the prompt, else one after another, from ``seed`` on.

    Raises ValueError for a prompt that is no digit.
    """
    if prompt is None:
        return [(seed + i) % DIGITS for i in range(samples)]
    if prompt not in map(str, range(DIGITS)):
        raise ValueError(f"prompt {prompt!r}: the model draws digits, allowed: 0 to {DIGITS - 1}")
    return [int(prompt)] * samples


def encode_digits(
    prompt: str | None, samples: int, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What the network is given beside the latent, both guidance branches along the batch, uncond
    first."""
    asked = digits_of(prompt, samples, seed)
    return {"encoder_hidden_states": words([*[None] * samples, *asked], dtype)}
