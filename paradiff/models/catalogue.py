"""The models that profiles are shipped for: configurations, defaults, geometry, component tables.

Configurations are those of the published checkpoints, arguments that differ from the class's
defaults only. Nothing is fetched: parameter counts, checked in the tests, say that they are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from paradiff.models import stages
from paradiff.models.stages import Shape
from paradiff.profiles import Geometry

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model of the catalogue; ``paradiff.models.plans`` makes stages of it.

    ``text`` lists encoders as (stage name, name in TRANSFORMERS, call, fixed token count or None).
    ``size`` is height, width, frames, steps of the defaults. ``asyncdiff``: degree -> owner of each
    cut, by the longest prefix of its name (AsyncDiff's published tables).
    """

    class_name: str
    config: Config
    geometry: Geometry
    size: tuple[int, int, int, int]
    text: tuple[tuple[str, str, Callable[..., Any], int | None], ...]
    vae: str
    scheduler: str
    text_mode: str | None = None
    asyncdiff: Mapping[int, Mapping[str, int]] = field(default_factory=dict)


def _geometry(
    channels: int,
    row_multiple: int,
    *text_tokens: int,
    scale: int = 8,
    temporal_scale: int = 1,
    guidance: Literal["cfg", "embedded", "none"] = "cfg",
) -> Geometry:
    return Geometry(channels, scale, temporal_scale, row_multiple, text_tokens, guidance)


_FIRST: Mapping[str, Entry] = {
    "sdxl": Entry(
        class_name="UNet2DConditionModel",
        config={
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        geometry=_geometry(4, 4, 77),
        size=(1024, 1024, 1, 50),
        text=(
            ("text_encoder", "clip-l", stages.call_text, None),
            ("text_encoder_2", "openclip-bigg", stages.call_text, None),
        ),
        vae="kl-4",
        scheduler="sdxl",
        asyncdiff={
            2: {
                "": 1,
                "down_blocks.2": 0,
                "mid_block": 0,
                "up_blocks.0.resnets.0": 0,
                "up_blocks.0.attentions.0": 0,
                "up_blocks.0.resnets.1": 0,
                "up_blocks.0.attentions.1": 0,
            },
            3: {
                "": 2,
                "down_blocks.2": 0,
                "mid_block": 0,
                "up_blocks.0": 1,
                "up_blocks.0.resnets.0": 0,
            },
            4: {
                "": 3,
                "down_blocks.1": 0,
                "down_blocks.1.resnets.0": 3,
                "down_blocks.2": 0,
                "mid_block": 1,
                "up_blocks.0": 2,
                "up_blocks.0.resnets.0": 1,
                "up_blocks.0.attentions.0": 1,
            },
        },
    ),
    "sd21": Entry(
        class_name="UNet2DConditionModel",
        config={
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        geometry=_geometry(4, 8, 77),
        size=(768, 768, 1, 50),
        text=(("text_encoder", "openclip-h", stages.call_text, None),),
        vae="kl-4",
        scheduler="sd21",
        asyncdiff={
            2: {
                "": 1,
                "conv_in": 0,
                "down_blocks": 0,
                "mid_block": 0,
                "up_blocks.0": 0,
                "up_blocks.1": 0,
                "up_blocks.1.attentions.2": 1,
                "up_blocks.1.upsamplers": 1,
            },
            3: {
                "": 2,
                "conv_in": 0,
                "down_blocks": 0,
                "mid_block": 1,
                "up_blocks.0": 1,
                "up_blocks.1": 1,
                "up_blocks.2": 1,
            },
            4: {
                "": 3,
                "conv_in": 0,
                "down_blocks.0": 0,
                "down_blocks.1": 0,
                "down_blocks.2": 1,
                "down_blocks.3": 1,
                "mid_block": 1,
                "up_blocks.0": 1,
                "up_blocks.1": 1,
                "up_blocks.2": 2,
                "up_blocks.3.resnets.0": 2,
            },
        },
    ),
    "svd": Entry(
        class_name="UNetSpatioTemporalConditionModel",
        config={"sample_size": 96, "num_frames": 14, "num_attention_heads": [5, 10, 20, 20]},
        geometry=_geometry(4, 8, 1),
        size=(576, 1024, 14, 50),
        text=(),
        vae="svd",
        scheduler="svd",
        asyncdiff={
            2: {"": 0, "up_blocks.2": 1, "up_blocks.3": 1, "conv_norm_out": 1, "conv_out": 1},
            3: {
                "": 0,
                "down_blocks.3": 1,
                "mid_block": 1,
                "up_blocks": 1,
                "up_blocks.3": 2,
                "conv_norm_out": 2,
                "conv_out": 2,
            },
            4: {
                "": 1,
                "conv_in": 0,
                "down_blocks.0": 0,
                "down_blocks.1.resnets.0": 0,
                "down_blocks.1.attentions.0": 0,
                "up_blocks.2": 2,
                "up_blocks.3": 3,
                "up_blocks.3.resnets.0": 2,
                "up_blocks.3.attentions.0": 2,
                "conv_norm_out": 3,
                "conv_out": 3,
            },
        },
    ),
    "audioldm2-large": Entry(
        class_name="AudioLDM2UNet2DConditionModel",
        config={
            "sample_size": 256,
            "in_channels": 8,
            "out_channels": 8,
            "block_out_channels": [128, 256, 384, 640],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
            "attention_head_dim": 8,
            "cross_attention_dim": [[None, 768, 1024, None]] * 4,
            "transformer_layers_per_block": 2,
        },
        # T5 pads to the longest prompt of the batch: 32 stands for a sentence or two. GPT2 makes 8.
        geometry=_geometry(8, 8, 32, 8, scale=4),
        size=(1000, 64, 1, 200),
        text=(
            ("text_encoder", "clap", stages.call_clap, 512),
            ("text_encoder_2", "flan-t5-large", stages.call_masked_text, None),
        ),
        vae="kl-audio",
        scheduler="audioldm2",
    ),
    "pixart-alpha": Entry(
        class_name="PixArtTransformer2DModel",
        config={
            "sample_size": 128,
            "attention_bias": True,
            "caption_channels": 4096,
            "use_additional_conditions": True,
        },
        geometry=_geometry(4, 2, 120),
        size=(1024, 1024, 1, 20),
        text=(("text_encoder", "t5-xxl", stages.call_masked_text, None),),
        vae="kl-4",
        scheduler="pixart",
    ),
    "sd3-medium": Entry(
        class_name="SD3Transformer2DModel",
        config={
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        geometry=_geometry(16, 2, 333),
        size=(1024, 1024, 1, 28),
        text=(
            ("text_encoder", "clip-l-projection", stages.call_text, 77),
            ("text_encoder_2", "openclip-bigg", stages.call_text, 77),
            ("text_encoder_3", "t5-xxl", stages.call_text, 256),
        ),
        vae="kl-16",
        scheduler="sd3",
        text_mode="patch0_frozen",
    ),
    "flux1-dev": Entry(
        class_name="FluxTransformer2DModel",
        config={"guidance_embeds": True},
        geometry=_geometry(16, 2, 512, guidance="embedded"),
        size=(1024, 1024, 1, 28),
        text=(
            ("text_encoder", "clip-l", stages.call_text, 77),
            ("text_encoder_2", "t5-xxl", stages.call_text, None),
        ),
        vae="kl-16",
        scheduler="flux",
        text_mode="per_patch",
    ),
    "cogvideox-2b": Entry(
        class_name="CogVideoXTransformer3DModel",
        config={},
        geometry=_geometry(16, 2, 226, temporal_scale=4),
        size=(480, 720, 49, 50),
        text=(("text_encoder", "t5-xxl", stages.call_text, None),),
        vae="cogvideox",
        scheduler="cogvideox",
        text_mode="patch0_frozen",
    ),
}

_WAN = Entry(
    class_name="WanTransformer3DModel",
    config={"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    geometry=_geometry(16, 2, 512, temporal_scale=4),
    size=(480, 832, 81, 50),
    text=(("text_encoder", "umt5-xxl", stages.call_masked_text, None),),
    vae="wan",
    scheduler="wan",
)

CATALOGUE: Mapping[str, Entry] = {
    **_FIRST,
    "sd15": replace(
        _FIRST["sd21"],
        config={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        size=(512, 512, 1, 50),
        text=(("text_encoder", "clip-l", stages.call_text, None),),
        scheduler="sd15",
        asyncdiff={
            2: {
                "": 1,
                "conv_in": 0,
                "down_blocks": 0,
                "mid_block": 0,
                "up_blocks.0": 0,
                "up_blocks.1.resnets.0": 0,
                "up_blocks.1.attentions.0": 0,
                "up_blocks.1.resnets.1": 0,
            },
            3: {
                "": 2,
                "conv_in": 0,
                "down_blocks": 0,
                "mid_block": 1,
                "up_blocks.0": 1,
                "up_blocks.1": 1,
                "up_blocks.2": 1,
                "up_blocks.2.attentions.2": 2,
                "up_blocks.2.upsamplers": 2,
            },
            4: {
                "": 3,
                "conv_in": 0,
                "down_blocks.0": 0,
                "down_blocks.1": 0,
                "down_blocks.2": 1,
                "down_blocks.3": 1,
                "mid_block": 1,
                "up_blocks.0": 1,
                "up_blocks.1": 2,
                "up_blocks.1.resnets.0": 1,
                "up_blocks.1.attentions.0": 1,
                "up_blocks.1.resnets.1": 1,
                "up_blocks.2": 2,
            },
        },
    ),
    "svd-xt": replace(
        _FIRST["svd"],
        config={**_FIRST["svd"].config, "num_frames": 25},
        size=(576, 1024, 25, 50),
    ),
    "sd3.5-large": replace(
        _FIRST["sd3-medium"],
        config={
            "sample_size": 128,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "flux1-schnell": replace(
        _FIRST["flux1-dev"],
        config={},
        geometry=_geometry(16, 2, 256, guidance="none"),
        size=(1024, 1024, 1, 4),
        scheduler="flux-schnell",
    ),
    "cogvideox-5b": replace(
        _FIRST["cogvideox-2b"],
        config={
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
        scheduler="cogvideox-5b",
    ),
    "cogvideox1.5-5b": replace(
        _FIRST["cogvideox-2b"],
        geometry=replace(_FIRST["cogvideox-2b"].geometry, frame_multiple=2),
        config={
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_height": 96,
            "sample_width": 170,
            "sample_frames": 81,
        },
        size=(768, 1360, 81, 50),
        scheduler="cogvideox-5b",
    ),
    "wan2.1-1.3b": _WAN,
    "wan2.1-14b": replace(_WAN, config={}, size=(720, 1280, 81, 50)),
    "hunyuanvideo": Entry(
        class_name="HunyuanVideoTransformer3DModel",
        config={},
        geometry=_geometry(16, 2, 256, temporal_scale=4, guidance="embedded"),
        size=(720, 1280, 129, 50),
        # 95 tokens of a template go before the prompt's 256; their hidden states are cut off.
        text=(
            ("text_encoder", "llama-3-8b", stages.call_chat_text, 351),
            ("text_encoder_2", "clip-l", stages.call_text, 77),
        ),
        vae="hunyuan-video",
        scheduler="hunyuan-video",
        text_mode="per_patch",
    ),
    "latte": Entry(
        class_name="LatteTransformer3DModel",
        config={
            "sample_size": 64,
            "video_length": 16,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "caption_channels": 4096,
            "cross_attention_dim": 1152,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
        geometry=_geometry(4, 2, 120),
        size=(512, 512, 16, 50),
        text=(("text_encoder", "t5-xxl", stages.call_masked_text, None),),
        vae="kl-4",
        scheduler="latte",
    ),
    "hunyuandit": Entry(
        class_name="HunyuanDiT2DModel",
        config={
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
            "hidden_size": 1408,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "use_style_cond_and_image_meta_size": False,
        },
        geometry=_geometry(4, 2, 77, 256),
        size=(1024, 1024, 1, 50),
        text=(
            ("text_encoder", "bert-large-zh", stages.call_masked_text, 77),
            ("text_encoder_2", "mt5-xl", stages.call_masked_text, 256),
        ),
        vae="kl-4",
        scheduler="hunyuandit",
    ),
    "mochi": Entry(
        class_name="MochiTransformer3DModel",
        config={},
        geometry=_geometry(12, 2, 256, temporal_scale=6),
        size=(480, 848, 163, 64),
        text=(("text_encoder", "t5-xxl", stages.call_masked_text, None),),
        vae="mochi",
        scheduler="mochi",
        text_mode="patch0_frozen",
    ),
}
"""The first models, then those that differ from one of them in few values, then the others."""


# ------------------------------------------------------------------------------------------ probes


def shape(
    b: int, f: int, r: int, w: int, t: int = 0, s: int = 0, *, k: int | None = None, h: int = 0
) -> Shape:
    """All symbols; ``k`` is ``r`` unless the probe is a strip."""
    return {"b": b, "f": f, "r": r, "w": w, "k": r if k is None else k, "t": t, "s": s, "h": h}


def unet_probes(base: Shape, video: bool, second_text: bool) -> tuple[Shape, ...]:
    """Whole latents with every remainder modulo 8, then strips: border, middle, uneven last."""
    rows = [
        (2, 37, 27, 37, 5, 0),
        (3, 22, 45, 22, 9, 0),
        (2, 51, 19, 51, 11, 0),
        (1, 61, 30, 61, 7, 0),
        (4, 20, 36, 20, 13, 0),
        (2, 16, 21, 43, 6, 1),
        (1, 24, 28, 77, 10, 2),
        (3, 13, 35, 29, 4, 1),
    ]
    return (base, *_varied(rows, video, second_text))


def transformer_probes(base: Shape, video: bool, patch: int = 2) -> tuple[Shape, ...]:
    """Rows and columns that patches divide; strips see more rows than they own."""
    rows = [
        (2, 22, 14, 22, 5, 0),
        (3, 10, 34, 10, 9, 0),
        (1, 46, 26, 46, 13, 0),
        (4, 38, 58, 38, 3, 0),
        (2, 6, 22, 34, 7, 1),
        (1, 8, 10, 62, 11, 2),
        (3, 14, 46, 26, 4, 1),
    ]
    sized = [(b, *(side // 2 * patch for side in (r, w, k)), t, h) for b, r, w, k, t, h in rows]
    return (base, *_varied(sized, video, second_text=False))


def _varied(rows: list[tuple[int, ...]], video: bool, second_text: bool) -> list[Shape]:
    frames, second = (3, 5, 2, 4, 6, 3, 7, 2), (8, 3, 6, 2, 12, 7, 5, 9)
    return [
        shape(b, frames[i] if video else 1, r, w, t, second[i] if second_text else 0, k=k, h=h)
        for i, (b, r, w, k, t, h) in enumerate(rows)
    ]


def latent_probes(base: Shape, video: bool, unit: int, frames: int = 1) -> tuple[Shape, ...]:
    """For stages on images: no text, no strips; sizes are multiples of ``unit``."""
    rows = [(2, 5, 7), (3, 9, 4), (1, 6, 11), (4, 3, 5)]
    varied = (3, 5, 2, 4) if video else (frames,) * 4
    return (
        {**base, "t": 0, "s": 0},
        *(shape(b, varied[i], unit * r, unit * w) for i, (b, r, w) in enumerate(rows)),
    )


def decoder_strips(video: bool, frames: int = 1) -> tuple[Shape, ...]:
    """Strips of a decoder: border, middle, border; if not ``video``, all of as many frames."""
    rows = [(2, 6, 8, 7, 19, 1), (1, 3, 6, 13, 24, 2), (3, 7, 5, 8, 11, 1)]
    return tuple(shape(b, f if video else frames, r, w, k=k, h=h) for b, f, r, w, k, h in rows)


def text_probes(tokens: int) -> tuple[Shape, ...]:
    """For text encoders: batch and tokens."""
    sizes = ((1, tokens), (2, 5), (3, 9), (1, 13), (4, 7))
    return tuple(shape(b, 1, 1, 1, t) for b, t in sizes)
