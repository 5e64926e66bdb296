"""How each supported class is built on the meta device and called, as its pipeline calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from torch import Tensor, nn

from paradiff.models.interception import cached_convolutions

DTYPE = torch.bfloat16
"""Models are built in it, since it is what they are run in: casts launch kernels, too."""

Shape = Mapping[str, int]
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage to trace. ``build`` makes its modules; ``call`` says what runs at a shape.

    ``levels`` are the divisions of rows and columns, ``frame_levels`` of frames; ``repeat`` and
    ``shape`` go into the profile as they stand. ``owns_parameters`` is False for a stage whose
    modules another stage counts. ``in_strips``: rows may be spread over ranks, so its exchange points
    are traced too, those of the denoiser always.
    """

    name: str
    build: Callable[[], tuple[Any, ...]]
    call: Callable[[tuple[Any, ...], Shape], Call]
    probes: tuple[Shape, ...]
    levels: tuple[int, ...] = (1,)
    is_denoiser: bool = False
    repeat: str = "1"
    shape: tuple[tuple[str, str], ...] = ()
    owns_parameters: bool = True
    frame_levels: tuple[int, ...] = (1,)
    in_strips: bool = False


def versions() -> dict[str, str]:
    """What a profile depends on besides the configuration."""
    return {
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
    }


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without memory, in DTYPE."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def build_diffusers(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers module from its configuration. SVD's mix factors are born on the CPU: moved."""
    with on_meta():
        model: nn.Module = getattr(diffusers, class_name).from_config(dict(config))
    return model.eval().to("meta")


def build_transformers(class_name: str, config_class: str, config: Mapping[str, Any]) -> nn.Module:
    """A transformers module from its configuration."""
    with on_meta():
        settings = getattr(transformers, config_class)(**config)
        model: nn.Module = getattr(transformers, class_name)(settings)
    return model.eval().to("meta")


def empty(*sizes: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """An input tensor."""
    return torch.empty(*sizes, dtype=dtype, device="meta")


# -------------------------------------------------------------------------------------- denoisers

FRAMES_FIRST = ("UNetSpatioTemporalConditionModel", "CogVideoXTransformer3DModel")
"""Video models whose latents are (batch, frames, channels, rows, columns) ..."""
CHANNELS_FIRST = (
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LatteTransformer3DModel",
    "MochiTransformer3DModel",
)
"""... and those that have channels before frames. Images have no frames."""


def latent_sizes(class_name: str, channels: int, depth: int, s: Shape) -> tuple[int, ...]:
    """Sizes of the latent; where patches extend over ``depth`` frames, the pipeline adds frames until
    they divide."""
    frames = depth * -(-s["f"] // depth)
    if class_name in FRAMES_FIRST:
        return s["b"], frames, channels, s["r"], s["w"]
    if class_name in CHANNELS_FIRST:
        return s["b"], channels, frames, s["r"], s["w"]
    return s["b"], channels, s["r"], s["w"]


def _timestep(b: int) -> Tensor:
    return empty(b, dtype=torch.float32)


def inputs_unet(model: Any, s: Shape) -> dict[str, Any]:
    b, c = s["b"], model.config
    extra = {}
    if c.addition_embed_type == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        extra = {"text_embeds": empty(b, pooled), "time_ids": empty(b, 6)}
    return {
        "sample": empty(b, c.in_channels, s["r"], s["w"]),
        "timestep": _timestep(b)[0],
        "encoder_hidden_states": empty(b, s["t"], c.cross_attention_dim),
        "added_cond_kwargs": extra or None,
    }


def inputs_svd(model: Any, s: Shape) -> dict[str, Any]:
    b, c = s["b"], model.config
    ids = c.projection_class_embeddings_input_dim // c.addition_time_embed_dim
    return {
        "sample": empty(b, s["f"], c.in_channels, s["r"], s["w"]),
        "timestep": _timestep(b)[0],
        "encoder_hidden_states": empty(b, s["t"], c.cross_attention_dim),
        "added_time_ids": empty(b, ids),
    }


def inputs_audioldm2(model: Any, s: Shape) -> dict[str, Any]:
    """Cross dimensions of a block are (None, GPT2, T5, ...): the first stream is GPT2's 8 tokens."""
    b, c = s["b"], model.config
    widths = [width for width in c.cross_attention_dim[0] if width is not None]
    return {
        "sample": empty(b, c.in_channels, s["r"], s["w"]),
        "timestep": _timestep(b)[0],
        "encoder_hidden_states": empty(b, s["s"], widths[0]),
        "encoder_hidden_states_1": empty(b, s["t"], widths[1]),
        "encoder_attention_mask_1": empty(b, s["t"]),
    }


def inputs_pixart(model: Any, s: Shape) -> dict[str, Any]:
    b, c = s["b"], model.config
    extra = {}
    if model.use_additional_conditions:
        extra = {"resolution": empty(b, 2), "aspect_ratio": empty(b, 1)}
    return {
        "hidden_states": empty(b, c.in_channels, s["r"], s["w"]),
        "encoder_hidden_states": empty(b, s["t"], c.caption_channels),
        "encoder_attention_mask": empty(b, s["t"]),
        "timestep": _timestep(b),
        "added_cond_kwargs": extra,
    }


def inputs_sd3(model: Any, s: Shape) -> dict[str, Any]:
    b, c = s["b"], model.config
    return {
        "hidden_states": empty(b, c.in_channels, s["r"], s["w"]),
        "encoder_hidden_states": empty(b, s["t"], c.joint_attention_dim),
        "pooled_projections": empty(b, c.pooled_projection_dim),
        "timestep": _timestep(b),
    }


def inputs_flux(model: Any, s: Shape) -> dict[str, Any]:
    """The pipeline packs 2 x 2 latent pixels into one token."""
    b, c = s["b"], model.config
    tokens = s["r"] // 2 * (s["w"] // 2)
    return {
        "hidden_states": empty(b, tokens, c.in_channels),
        "encoder_hidden_states": empty(b, s["t"], c.joint_attention_dim),
        "pooled_projections": empty(b, c.pooled_projection_dim),
        "timestep": _timestep(b),
        "guidance": empty(b, dtype=torch.float32) if c.guidance_embeds else None,
        "img_ids": empty(tokens, 3),
        "txt_ids": empty(s["t"], 3),
    }


def inputs_cogvideox(model: Any, s: Shape) -> dict[str, Any]:
    """Models with rotary embeddings are given theirs."""
    b, c, rotary = s["b"], model.config, None
    depth = c.patch_size_t or 1
    patches = -(-s["f"] // depth)
    if c.use_rotary_positional_embeddings:
        tokens = patches * (s["r"] // c.patch_size) * (s["w"] // c.patch_size)
        table = empty(tokens, c.attention_head_dim, dtype=torch.float32)
        rotary = (table, torch.empty_like(table))
    return {
        "hidden_states": empty(
            *latent_sizes("CogVideoXTransformer3DModel", c.in_channels, depth, s)
        ),
        "encoder_hidden_states": empty(b, s["t"], c.text_embed_dim),
        "timestep": _timestep(b),
        "image_rotary_emb": rotary,
    }


def _video(model: Any, s: Shape) -> Tensor:
    return empty(*latent_sizes(type(model).__name__, model.config.in_channels, 1, s))


def inputs_wan(model: Any, s: Shape) -> dict[str, Any]:
    """Text to video."""
    return {
        "hidden_states": _video(model, s),
        "encoder_hidden_states": empty(s["b"], s["t"], model.config.text_dim),
        "timestep": _timestep(s["b"]),
    }


def inputs_hunyuan_video(model: Any, s: Shape) -> dict[str, Any]:
    b, c = s["b"], model.config
    return {
        "hidden_states": _video(model, s),
        "encoder_hidden_states": empty(b, s["t"], c.text_embed_dim),
        "encoder_attention_mask": empty(b, s["t"]),
        "pooled_projections": empty(b, c.pooled_projection_dim),
        "timestep": _timestep(b),
        "guidance": empty(b, dtype=torch.float32) if c.guidance_embeds else None,
    }


def inputs_latte(model: Any, s: Shape) -> dict[str, Any]:
    return {
        "hidden_states": _video(model, s),
        "encoder_hidden_states": empty(s["b"], s["t"], model.config.caption_channels),
        "timestep": _timestep(s["b"]),
    }


def inputs_hunyuandit(model: Any, s: Shape) -> dict[str, Any]:
    """Text lengths are those of the configuration: a parameter pads them."""
    b, c = s["b"], model.config
    tokens = (s["r"] // c.patch_size) * (s["w"] // c.patch_size)
    table = empty(tokens, c.attention_head_dim, dtype=torch.float32)
    extra = {}
    if c.use_style_cond_and_image_meta_size:
        extra = {"image_meta_size": empty(b, 6), "style": empty(b, dtype=torch.int64)}
    return {
        "hidden_states": empty(b, c.in_channels, s["r"], s["w"]),
        "timestep": empty(b),
        "encoder_hidden_states": empty(b, c.text_len, c.cross_attention_dim),
        "text_embedding_mask": empty(b, c.text_len, dtype=torch.int64),
        "encoder_hidden_states_t5": empty(b, c.text_len_t5, c.cross_attention_dim_t5),
        "text_embedding_mask_t5": empty(b, c.text_len_t5, dtype=torch.int64),
        "image_rotary_emb": (table, torch.empty_like(table)),
        **extra,
    }


def inputs_mochi(model: Any, s: Shape) -> dict[str, Any]:
    return {
        "hidden_states": _video(model, s),
        "encoder_hidden_states": empty(s["b"], s["t"], model.config.text_embed_dim),
        "timestep": _timestep(s["b"]),
        "encoder_attention_mask": empty(s["b"], s["t"], dtype=torch.bool),
    }


DENOISERS: Mapping[str, Callable[[Any, Shape], dict[str, Any]]] = {
    "UNet2DConditionModel": inputs_unet,
    "UNetSpatioTemporalConditionModel": inputs_svd,
    "AudioLDM2UNet2DConditionModel": inputs_audioldm2,
    "PixArtTransformer2DModel": inputs_pixart,
    "SD3Transformer2DModel": inputs_sd3,
    "FluxTransformer2DModel": inputs_flux,
    "CogVideoXTransformer3DModel": inputs_cogvideox,
    "WanTransformer3DModel": inputs_wan,
    "HunyuanVideoTransformer3DModel": inputs_hunyuan_video,
    "LatteTransformer3DModel": inputs_latte,
    "HunyuanDiT2DModel": inputs_hunyuandit,
    "MochiTransformer3DModel": inputs_mochi,
}


def call_denoiser(modules: tuple[Any, ...], s: Shape) -> Call:
    """One network call with the inputs that its class takes.

    CogVideoX has a positional table with room for exactly one text length, Latte one with room for
    exactly one number of frames: a probe has to set them."""
    model = modules[0]
    if type(model).__name__ == "CogVideoXTransformer3DModel":
        model.patch_embed.max_text_seq_length = s["t"]
    elif type(model).__name__ == "LatteTransformer3DModel":
        model.temp_pos_embed = empty(1, s["f"], model.temp_pos_embed.shape[-1], dtype=torch.float32)
    inputs = {**DENOISERS[type(model).__name__](model, s), "return_dict": False}
    if type(model).__name__ == "MochiTransformer3DModel":
        return partial(_run_mochi, model), (), inputs
    return model, (), inputs


def _run_mochi(model: Any, **inputs: Any) -> Any:
    """There is no autocast on meta. FLOPs are those of prompts as long as they can be."""
    with mock.patch.object(torch, "autocast", return_value=nullcontext()):
        return model(**inputs)


# ----------------------------------------------------------------- text and image encoders, decoders


def call_text(modules: tuple[Any, ...], s: Shape) -> Call:
    """A text encoder on padded prompts, hidden states of every layer kept as the pipelines do."""
    ids = empty(s["b"], s["t"], dtype=torch.int64)
    return modules[0], (), {"input_ids": ids, "output_hidden_states": True}


def call_masked_text(modules: tuple[Any, ...], s: Shape) -> Call:
    """T5 with an attention mask."""
    ids = empty(s["b"], s["t"], dtype=torch.int64)
    mask = empty(s["b"], s["t"], dtype=torch.int64)
    return modules[0], (), {"input_ids": ids, "attention_mask": mask}


def call_chat_text(modules: tuple[Any, ...], s: Shape) -> Call:
    """A language model on a padded prompt, hidden states of every layer kept."""
    ids = empty(s["b"], s["t"], dtype=torch.int64)
    mask = empty(s["b"], s["t"], dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return modules[0], (), {**inputs, "output_hidden_states": True, "use_cache": False}


def call_clap(modules: tuple[Any, ...], s: Shape) -> Call:
    """The text branch of CLAP and its projection."""
    ids = empty(s["b"], s["t"], dtype=torch.int64)
    mask = empty(s["b"], s["t"], dtype=torch.int64)
    return modules[0].get_text_features, (ids,), {"attention_mask": mask}


def call_language_model(modules: tuple[Any, ...], s: Shape) -> Call:
    """AudioLDM2: projection of CLAP's one and T5's t embeddings, then 8 tokens by GPT2 with cache."""
    projection, language_model = modules

    def generate(clap: Tensor, t5: Tensor) -> Tensor:
        states = projection(hidden_states=clap, hidden_states_1=t5).hidden_states
        generated, cache, step = [], None, states
        for _ in range(8):
            output = language_model(inputs_embeds=step, past_key_values=cache, use_cache=True)
            cache, step = output.past_key_values, output.last_hidden_state[:, -1:]
            generated.append(step)
        return torch.cat(generated, dim=1)

    c = projection.config
    return (
        generate,
        (
            empty(s["b"], 1, c.text_encoder_dim),
            empty(s["b"], s["t"], c.text_encoder_1_dim),
        ),
        {},
    )


def call_image_encoder(modules: tuple[Any, ...], s: Shape) -> Call:
    """SVD's condition: CLIP on the image at its own size, the VAE's encoder at the video's."""
    vision, encoder, quant = modules

    def encode(small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        return vision(pixel_values=small).image_embeds, quant(encoder(large))

    side = vision.config.image_size
    return encode, (empty(s["b"], 3, side, side), empty(s["b"], 3, 8 * s["r"], 8 * s["w"])), {}


def call_decode(modules: tuple[Any, ...], s: Shape) -> Call:
    vae = modules[0]
    channels = vae.config.latent_channels
    return vae.decode, (empty(s["b"], channels, s["r"], s["w"]),), {"return_dict": False}


def call_decode_video(modules: tuple[Any, ...], s: Shape) -> Call:
    """A video decoder on all frames at once. Mochi's normalises eight frames at a time; intercepted all,
    which moves as many elements in fewer launches."""
    vae = modules[0]
    latent = empty(s["b"], vae.config.latent_channels, s["f"], s["r"], s["w"])
    return vae.decode, (latent,), {"return_dict": False}


def call_decode_frames(modules: tuple[Any, ...], s: Shape) -> Call:
    """An image decoder on the frames of a video."""
    latent = empty(s["b"] * s["f"], modules[0].config.latent_channels, s["r"], s["w"])
    return modules[0].decode, (latent,), {"return_dict": False}


def call_svd_decode(modules: tuple[Any, ...], s: Shape) -> Call:
    """All frames in one chunk, the pipeline's default."""
    decoder, frames = modules[0], s["f"]
    latent = empty(s["b"] * frames, 4, s["r"], s["w"])
    indicator = empty(s["b"], frames)
    return decoder, (latent,), {"num_frames": frames, "image_only_indicator": indicator}


def call_vocoder(modules: tuple[Any, ...], s: Shape) -> Call:
    """AudioLDM2: four mel frames to a latent row, as many mel bins as the vocoder takes."""
    model = modules[0]
    return model, (empty(s["b"], 4 * s["r"], model.config.model_in_dim),), {}


def call_first_chunk(modules: tuple[Any, ...], s: Shape) -> Call:
    """CogVideoX: the first latent frames of a video (3 of an odd number, else 2)."""
    vae = modules[0]
    latent = empty(s["b"], vae.config.latent_channels, s["f"], s["r"], s["w"])
    return lambda z: vae.decoder(z, conv_cache=None), (latent,), {}


def call_next_chunk(modules: tuple[Any, ...], s: Shape) -> Call:
    """CogVideoX: two latent frames after others, whose last ones the causal convolutions keep."""
    vae = modules[0]
    latent = empty(s["b"], vae.config.latent_channels, 2, s["r"], s["w"])
    with torch.no_grad():
        _, cache = vae.decoder(latent, conv_cache=None)
    return lambda z, conv_cache: vae.decoder(z, conv_cache=conv_cache), (latent, cache), {}


def call_wan_chunk(index: int) -> Callable[[tuple[Any, ...], Shape], Call]:
    """Wan decodes frame by frame; chunks 0, 1 and all later ones differ in what they find cached.

    With the first goes what happens once to all frames. Each later chunk is joined to the video so
    far, 4 i + 1 frames after chunk i, which is 2 f + 1 on average: that is what is recorded."""

    def call(modules: tuple[Any, ...], s: Shape) -> Call:
        vae = modules[0]
        b, f, r, w = s["b"], s["f"], s["r"], s["w"]
        cache = [None] * cached_convolutions(vae)
        frame = empty(b, vae.config.z_dim, 1, r, w)

        def decode(x: Tensor, first: bool) -> Tensor:
            result: Tensor = vae.decoder(x, feat_cache=cache, feat_idx=[0], first_chunk=first)
            return result

        def once(latent: Tensor, video: Tensor) -> Tensor:
            decode(vae.post_quant_conv(latent)[:, :, :1], True)
            return torch.clamp(video, min=-1.0, max=1.0)

        def later(x: Tensor, one: Tensor, other: Tensor, _: Any) -> Tensor:
            decode(x, False)
            return torch.cat([one, other], 2)

        def video(frames: int) -> Tensor:
            return empty(b, vae.config.out_channels, frames, 8 * r, 8 * w)

        if index == 0:
            return once, (empty(b, vae.config.z_dim, f, r, w), video(4 * f - 3)), {}
        with torch.no_grad():
            for chunk in range(index):
                decode(frame, chunk == 0)
        return later, (frame, video(f), video(f + 1), cache), {}

    return call


def call_hunyuan_video_tile(blended: bool) -> Callable[[tuple[Any, ...], Shape], Call]:
    """HunyuanVideo decodes tiles of up to five latent frames; one that is not the first is blended
    into the one before it."""

    def call(modules: tuple[Any, ...], s: Shape) -> Call:
        vae = modules[0]

        def decode(latent: Tensor, before: Tensor) -> Tensor:
            tile: Tensor = vae.decoder(vae.post_quant_conv(latent))
            extent = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
            return vae.blend_t(before, tile[:, :, 1:], extent) if blended else tile

        latent = empty(s["b"], vae.config.latent_channels, s["f"], s["r"], s["w"])
        return decode, (latent, empty(s["b"], 3, 4, 8 * s["r"], 8 * s["w"])), {}

    return call


def call_hunyuan_video_join(_: tuple[Any, ...], s: Shape) -> Call:
    """HunyuanVideo's tiles become one video."""
    b, f, r, w = s["b"], s["f"], 8 * s["r"], 8 * s["w"]
    return torch.cat, ([empty(b, 3, 4 * f - 4, r, w), empty(b, 3, 1, r, w)],), {"dim": 2}


# -------------------------------------------------------------------------- scheduler and guidance


def call_scheduler(
    class_name: str, config: Mapping[str, Any], latent: Callable[[Shape], tuple[int, ...]]
) -> Callable[[tuple[Any, ...], Shape], Call]:
    """A step in the middle of a run: multistep methods have their history by then.

    The schedule's tables stay on the CPU, as scalars do; only work on latents is recorded."""

    def call(_: tuple[Any, ...], s: Shape) -> Call:
        scheduler = getattr(diffusers, class_name)(**config)
        if config.get("use_dynamic_shifting"):
            scheduler.set_timesteps(8, mu=1.0)
        else:
            scheduler.set_timesteps(8)
        size = latent(s)

        def step(index: int, noise: Tensor, sample: Tensor) -> Tensor:
            t = scheduler.timesteps[index]
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, t)
            result: Tensor = scheduler.step(noise, t, sample, return_dict=False)[0]
            return result

        with torch.no_grad():
            for index in range(5):
                step(index, empty(*size), empty(*size))
        return lambda noise, sample: step(5, noise, sample), (empty(*size), empty(*size)), {}

    return call


def call_guidance(
    latent: Callable[[Shape], tuple[int, ...]],
) -> Callable[[tuple[Any, ...], Shape], Call]:
    """Classifier-free guidance of both branches' predictions, as every pipeline writes it."""

    def call(_: tuple[Any, ...], s: Shape) -> Call:
        size = latent(s)

        def guide(prediction: Tensor) -> Tensor:
            uncond, cond = prediction.chunk(2)
            return uncond + 7.5 * (cond - uncond)

        return guide, (empty(2 * size[0], *size[1:]),), {}

    return call
