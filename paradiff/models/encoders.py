"""Configurations of the modules around the denoisers: text and image encoders, VAEs, schedulers.

Values of the published checkpoints; where only a class's defaults are meant, nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

TRANSFORMERS: Mapping[str, tuple[str, str, Config]] = {
    "clip-l": (
        "CLIPTextModel",
        "CLIPTextConfig",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
        },
    ),
    "clip-l-projection": (
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
        },
    ),
    "openclip-h": (
        "CLIPTextModel",
        "CLIPTextConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
    ),
    "openclip-bigg": (
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
    ),
    "t5-xxl": (
        "T5EncoderModel",
        "T5Config",
        {
            "d_model": 4096,
            "d_ff": 10240,
            "d_kv": 64,
            "num_heads": 64,
            "num_layers": 24,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "mt5-xl": (
        "T5EncoderModel",
        "T5Config",
        {
            "vocab_size": 250112,
            "d_model": 2048,
            "d_ff": 5120,
            "d_kv": 64,
            "num_heads": 32,
            "num_layers": 24,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "umt5-xxl": (
        "UMT5EncoderModel",
        "UMT5Config",
        {
            "vocab_size": 256384,
            "d_model": 4096,
            "d_ff": 10240,
            "d_kv": 64,
            "num_heads": 64,
            "num_layers": 24,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "bert-large-zh": (
        "BertModel",
        "BertConfig",
        {
            "vocab_size": 47020,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "llama-3-8b": (
        "LlamaModel",
        "LlamaConfig",
        {
            "vocab_size": 128320,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "flan-t5-large": (
        "T5EncoderModel",
        "T5Config",
        {
            "d_model": 1024,
            "d_ff": 2816,
            "d_kv": 64,
            "num_heads": 16,
            "num_layers": 24,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "clip-vision-h": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 1024,
            "hidden_act": "gelu",
        },
    ),
    "clap": ("ClapModel", "ClapConfig", {}),
    "gpt2": ("GPT2Model", "GPT2Config", {}),
    "hifigan": (
        "SpeechT5HifiGan",
        "SpeechT5HifiGanConfig",
        {
            "model_in_dim": 64,
            "sampling_rate": 16000,
            "upsample_initial_channel": 1024,
            "upsample_rates": [5, 4, 2, 2, 2],
            "upsample_kernel_sizes": [16, 16, 8, 4, 4],
            "normalize_before": False,
        },
    ),
}
"""Name -> (class, configuration class, arguments), all of transformers."""

VAES: Mapping[str, tuple[str, Config]] = {
    "kl-4": (
        "AutoencoderKL",
        {
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    ),
    "kl-16": (
        "AutoencoderKL",
        {
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "kl-audio": (
        "AutoencoderKL",
        {
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": [128, 256, 512],
            "layers_per_block": 2,
            "latent_channels": 8,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
    ),
    "svd": (
        "AutoencoderKLTemporalDecoder",
        {
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
        },
    ),
    "cogvideox": ("AutoencoderKLCogVideoX", {}),
    "wan": ("AutoencoderKLWan", {}),
    "hunyuan-video": ("AutoencoderKLHunyuanVideo", {}),
    "mochi": ("AutoencoderKLMochi", {}),
}
"""Name -> (class, arguments), all of diffusers."""

_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_COGVIDEOX: Config = {
    **_SD_BETAS,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}

SCHEDULERS: Mapping[str, tuple[str, Config]] = {
    "sdxl": (
        "EulerDiscreteScheduler",
        {**_SD_BETAS, "timestep_spacing": "leading", "steps_offset": 1},
    ),
    "sd21": (
        "DDIMScheduler",
        {
            **_SD_BETAS,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": "v_prediction",
        },
    ),
    "sd15": (
        "PNDMScheduler",
        {**_SD_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "svd": (
        "EulerDiscreteScheduler",
        {
            **_SD_BETAS,
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "timestep_type": "continuous",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
    "audioldm2": (
        "DDIMScheduler",
        {
            "beta_start": 0.0015,
            "beta_end": 0.0195,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    ),
    "pixart": (
        "DPMSolverMultistepScheduler",
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    ),
    "sd3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flux": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    "flux-schnell": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
    "hunyuandit": (
        "DDPMScheduler",
        {
            "beta_start": 0.00085,
            "beta_end": 0.018,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "steps_offset": 1,
        },
    ),
    "latte": (
        "DDIMScheduler",
        {
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "clip_sample": False,
        },
    ),
    "wan": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "hunyuan-video": ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
    "mochi": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    "cogvideox": ("CogVideoXDDIMScheduler", _COGVIDEOX),
    "cogvideox-5b": ("CogVideoXDDIMScheduler", {**_COGVIDEOX, "snr_shift_scale": 1.0}),
}
"""Name -> (class, arguments), all of diffusers."""
