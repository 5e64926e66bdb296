"""A VAE's decoder as a network that runs in strips, under the same exchanges as a denoiser.

Most VAEs of videos decode chunk by chunk: which latent frames a chunk takes, and what becomes of them,
is as in diffusers; what is kept of a chunk for the next one stays on its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from paradiff.executor.loading import Pipeline
from paradiff.executor.network import Conditioning, Network
from paradiff.executor.outputs import finished, needs_float32, unscaled
from paradiff.executor.payload import Span
from paradiff.models.interception import DECODERS, cached_convolutions
from paradiff.profiles import Stage


@dataclass(frozen=True)
class Decoder(Network):
    """The decoder of ``model``, a VAE. ``unscaled`` makes of a latent what it takes, ``finished`` of all
    strips together what the user gets.

    ``part`` is the stage of the profile, ``chunk`` counts the calls for one video, and ``kept`` is what
    earlier ones have left on the rank for this one.
    """

    unscaled: Callable[[Tensor], Tensor]
    finished: Callable[[Tensor], Tensor]
    part: str = "vae"
    chunk: int = 0
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        return self.profile.stages[self.part]

    def at(self, part: str, chunk: int, kept: dict[str, Any]) -> Decoder:
        """One call of it."""
        return replace(self, part=part, chunk=chunk, kept=kept)

    def latent_input(
        self,
        x: Tensor,
        given: Conditioning,
        spans: Sequence[Span],
        frames: int | None = None,
    ) -> Tensor:
        """What the first convolution sees, halo rows too: of a video the frames of this chunk, or
        ``frames`` up to its last one."""
        if x.ndim == 5 and self.class_name in _CHUNKS:
            first, last = _CHUNKS[self.class_name](self.chunk)
            last = min(last, x.shape[2])
            x = x[:, :, (first if frames is None else last - frames) : last]
        mix = getattr(self.model, "post_quant_conv", None)
        if self.class_name == "AutoencoderKL" and x.ndim == 5:  # Latte: every frame is an image
            x = x.transpose(1, 2)
            return x if mix is None else mix(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x if mix is None else mix(x)

    def call(
        self,
        x: Tensor,
        given: Conditioning,
        timestep: Tensor,
        spans: Sequence[Span],
        total_rows: int,
    ) -> Tensor:
        """The rows of the picture, or of the frames of this chunk (b, 3, f, rows, columns), that belong
        to ``x``."""
        return _DECODE[self.class_name](self, x)


def _image(decoder: Decoder, x: Tensor) -> Tensor:
    """A picture, or for Latte (b, f, c, rows, columns) pictures."""
    vae: Any = decoder.model
    if x.ndim == 4:
        picture: Tensor = vae.decoder(x)
        return picture
    pictures: Tensor = vae.decoder(x.flatten(0, 1))
    return pictures.unflatten(0, x.shape[:2]).transpose(1, 2)


def _svd(decoder: Decoder, x: Tensor) -> Tensor:
    frames, of_images = x.shape[1], x.new_zeros(x.shape[:2])
    model: Any = decoder.model
    out: Tensor = model(x.flatten(0, 1), num_frames=frames, image_only_indicator=of_images)
    return out.unflatten(0, (-1, frames)).transpose(1, 2)


def _mochi(decoder: Decoder, x: Tensor) -> Tensor:
    vae: Any = decoder.model
    video: Tensor = vae.decode(x, return_dict=False)[0]
    return video


def _wan(decoder: Decoder, x: Tensor) -> Tensor:
    """Every causal convolution has a place in a list for its last frames."""
    vae: Any = decoder.model
    cache = decoder.kept.setdefault("cache", [None] * cached_convolutions(vae))
    out: Tensor = vae.decoder(x, feat_cache=cache, feat_idx=[0], first_chunk=decoder.chunk == 0)
    return out.clamp(-1.0, 1.0)


def _hunyuan_video(decoder: Decoder, x: Tensor) -> Tensor:
    """A tile of frames, whose first ones are blended into the last ones of the tile before."""
    vae: Any = decoder.model
    stride, tile = vae.tile_sample_stride_num_frames, vae.decoder(x)
    before = decoder.kept.get("tile")
    if before is not None:
        tile = vae.blend_t(before, tile[:, :, 1:], vae.tile_sample_min_num_frames - stride)
    decoder.kept["tile"] = tile
    out: Tensor = tile[:, :, : stride + (before is None)]
    return out


_DECODE: Mapping[str, Callable[[Decoder, Tensor], Tensor]] = {
    "AutoencoderKL": _image,
    "TemporalDecoder": _svd,
    "AutoencoderKLMochi": _mochi,
    "AutoencoderKLHunyuanVideo": _hunyuan_video,
    "AutoencoderKLWan": _wan,
}


_CHUNKS: Mapping[str, Callable[[int], Span]] = {
    "AutoencoderKL": lambda chunk: (14 * chunk, 14 * chunk + 14),
    "AutoencoderKLHunyuanVideo": lambda chunk: (3 * chunk, 3 * chunk + 5),
    "AutoencoderKLWan": lambda chunk: (chunk, chunk + 1),
}
"""Class of a VAE -> latent frames of chunk i, if there are as many, as its ``decode`` takes them
(AutoencoderKL: as Latte's pipeline does). Others decode a video at once."""


def strip_decoder(pipeline: Pipeline) -> Decoder | None:
    """The pipeline's VAE, to be run in strips; None where it has none that can be."""
    vae: Any = pipeline.vae
    model = vae.decoder if type(vae).__name__ == "AutoencoderKLTemporalDecoder" else vae
    if type(model).__name__ not in DECODERS:
        return None
    if needs_float32(pipeline):
        model.to(torch.float32)
    return Decoder(
        model,
        pipeline.network.profile,
        lambda x: unscaled(vae, x.to(vae.dtype)),
        lambda x: finished(pipeline, x),
    )
