"""Tiny twins of the catalogue: the same classes, geometry and schedulers, few blocks, random weights.

A twin runs in milliseconds on a CPU and has every kind of layer that its model has, so what a strategy
does to results can be checked on it. ``tiny-sdxl`` is the twin of ``sdxl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import nn

from paradiff.models.catalogue import CATALOGUE
from paradiff.models.encoders import SCHEDULERS, TRANSFORMERS, VAES
from paradiff.models.plans import Plan, plan_of
from paradiff.models.stages import build_transformers

ROWS = 16
"""Latent rows and columns of a twin's default size."""
TEXT_TOKENS, SECOND_TOKENS = 6, 8
"""Tokens of the first and of the second text stream."""

_UNET = {
    "sample_size": ROWS,
    "block_out_channels": [32, 64],
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "use_linear_projection": True,
}
_BLOCKS = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 4}
_SVD = {
    "sample_size": ROWS,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
    "layers_per_block": 1,
    "num_attention_heads": [4, 4],
    "cross_attention_dim": 24,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "num_frames": 3,
}
_SD3 = {
    **_BLOCKS,
    "sample_size": ROWS,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 48,
}
_FLUX = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": [2, 2, 4],
}
_COGVIDEOX = {
    **_BLOCKS,
    "attention_head_dim": 12,
    "time_embed_dim": 12,
    "text_embed_dim": 24,
    "sample_width": ROWS,
    "sample_height": ROWS,
    "sample_frames": 9,
    "max_text_seq_length": TEXT_TOKENS,
}
_ROTARY = {"attention_head_dim": 16, "use_rotary_positional_embeddings": True}
_WAN = {**_BLOCKS, "text_dim": 24, "freq_dim": 8, "ffn_dim": 48}

TINY: Mapping[str, Mapping[str, Any]] = {
    "sdxl": {
        **_UNET,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
    "sd21": {**_UNET, "layers_per_block": 2},
    "sd15": {k: v for k, v in _UNET.items() if k != "use_linear_projection"},
    "svd": _SVD,
    "svd-xt": _SVD,
    "audioldm2-large": {
        **{k: v for k, v in _UNET.items() if k != "use_linear_projection"},
        "in_channels": 8,
        "out_channels": 8,
        "cross_attention_dim": [[None, 24, 20, None]] * 2,
    },
    "pixart-alpha": {
        **_BLOCKS,
        "sample_size": ROWS,
        "attention_bias": True,
        "cross_attention_dim": 32,
        "caption_channels": 24,
    },
    "sd3-medium": _SD3,
    "sd3.5-large": {**_SD3, "qk_norm": "rms_norm"},
    "flux1-dev": {**_FLUX, "guidance_embeds": True},
    "flux1-schnell": _FLUX,
    "cogvideox-2b": _COGVIDEOX,
    "cogvideox-5b": {**_COGVIDEOX, **_ROTARY},
    "cogvideox1.5-5b": {**_COGVIDEOX, **_ROTARY, "patch_size_t": 2, "patch_bias": False},
    "wan2.1-1.3b": _WAN,
    "wan2.1-14b": {**_WAN, "num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 5},
    "hunyuanvideo": {
        **_BLOCKS,
        "num_layers": 2,
        "num_single_layers": 2,
        "text_embed_dim": 24,
        "pooled_projection_dim": 12,
        "rope_axes_dim": [2, 2, 4],
    },
    "latte": {
        **CATALOGUE["latte"].config,
        **_BLOCKS,
        "num_layers": 2,
        "sample_size": ROWS,
        "video_length": 3,
        "caption_channels": 24,
        "cross_attention_dim": 32,
    },
    "hunyuandit": {
        **_BLOCKS,
        "num_layers": 6,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": ROWS,
        "hidden_size": 32,
        "cross_attention_dim": 24,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16,
        "text_len": TEXT_TOKENS,
        "text_len_t5": SECOND_TOKENS,
        "use_style_cond_and_image_meta_size": False,
    },
    "mochi": {
        **_BLOCKS,
        "attention_head_dim": 12,
        "pooled_projection_dim": 24,
        "text_embed_dim": 24,
        "time_embed_dim": 8,
        "max_sequence_length": TEXT_TOKENS,
    },
}

_KL = {"block_out_channels": [16] * 4, "norm_num_groups": 4, "layers_per_block": 1}

TINY_VAES: Mapping[str, Mapping[str, Any]] = {
    "kl-4": {**VAES["kl-4"][1], **_KL, "scaling_factor": 0.13025},
    "kl-16": {**VAES["kl-16"][1], **_KL, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "kl-audio": {**VAES["kl-audio"][1], **_KL, "block_out_channels": [16] * 3},
    "svd": {**VAES["svd"][1], "block_out_channels": [32] * 4, "layers_per_block": 2},
    "cogvideox": {**_KL, "scaling_factor": 1.15258426},
    "wan": {"base_dim": 8, "num_res_blocks": 1},
    "hunyuan-video": {**_KL, "scaling_factor": 0.476986},
    "mochi": {
        "encoder_block_out_channels": [32] * 4,
        "decoder_block_out_channels": [32] * 4,
        "layers_per_block": [1] * 5,
    },
}
"""Instead of ``VAES``: as many levels, so that images are as large for their latents."""

TINY_VOCODER = {**TRANSFORMERS["hifigan"][2], "upsample_initial_channel": 32}


def tiny_plan(name: str) -> Plan:
    """The plan of ``tiny-<name>``: its denoiser, scheduler and guidance, tiny VAE and vocoder."""
    base = name.removeprefix("tiny-")
    entry = CATALOGUE[base]
    geometry = entry.geometry
    short = zip(geometry.text_tokens, (TEXT_TOKENS, SECOND_TOKENS), strict=False)
    levels = 2 if "block_out_channels" in TINY[base] else None
    geometry = replace(
        geometry,
        row_multiple=levels or geometry.row_multiple,
        text_tokens=tuple(min(lengths) for lengths in short),
    )
    side, frames = ROWS * geometry.scale, min(entry.size[2], 1 + 2 * geometry.temporal_scale)
    plan = plan_of(
        f"tiny-{base}",
        replace(
            entry,
            config=TINY[base],
            geometry=geometry,
            size=(side, side, frames, 6),
            text=(),
            asyncdiff={},
        ),
        TINY_VAES.get(entry.vae),
    )
    return replace(
        plan,
        stages=tuple(
            replace(spec, build=_meta_vocoder) if spec.name == "vocoder" else spec
            for spec in plan.stages
            if spec.name not in ("text_encoder_3", "image_encoder")
        ),
    )


def _meta_vocoder() -> tuple[Any, ...]:
    return (build_transformers(*TRANSFORMERS["hifigan"][:2], TINY_VOCODER),)


def tiny_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The denoiser of ``tiny-<name>`` with random weights drawn from ``seed``.

    What is born zero is drawn, too: without Mochi's frequencies positions would make no difference.
    """
    base = name.removeprefix("tiny-")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = dict(TINY[base])
        model: nn.Module = getattr(diffusers, CATALOGUE[base].class_name).from_config(config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).eval()


def tiny_scheduler(name: str) -> Any:
    """The scheduler that the model's pipeline uses."""
    class_name, config = SCHEDULERS[CATALOGUE[name.removeprefix("tiny-")].scheduler]
    return getattr(diffusers, class_name)(**config)
