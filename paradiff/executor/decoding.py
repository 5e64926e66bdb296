"""A VAE's decoder as a network that runs in strips, under the same exchanges as a denoiser.

Where a pipeline decodes a video chunk by chunk, so does each strip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paradiff.executor.loading import Pipeline
from paradiff.executor.network import Conditioning, Network
from paradiff.executor.outputs import finished, needs_float32, unscaled
from paradiff.executor.payload import Span
from paradiff.models.interception import DECODERS
from paradiff.profiles import Stage

CHUNK_FRAMES = 14
"""Latte's pipeline decodes so many frames at a time (``decode_latents``)."""


@dataclass(frozen=True)
class Decoder(Network):
    """The decoder of ``model``, a VAE. ``unscaled`` makes of a latent what it takes, ``finished`` of all
    strips together what the user gets. ``part`` is the stage of the profile, ``chunk`` counts the calls
    for one video."""

    unscaled: Callable[[Tensor], Tensor]
    finished: Callable[[Tensor], Tensor]
    part: str = "vae"
    chunk: int = 0

    @property
    def stage(self) -> Stage:
        return self.profile.stages[self.part]

    def at(self, part: str, chunk: int) -> Decoder:
        """One call of it."""
        return replace(self, part=part, chunk=chunk)

    def latent_input(self, x: Tensor, given: Conditioning, spans: Sequence[Span]) -> Tensor:
        """What the first convolution sees, halo rows too: of Latte's videos the frames of this chunk,
        (b, f, c, rows, columns)."""
        mix = getattr(self.model, "post_quant_conv", None)
        if self.class_name == "AutoencoderKL" and x.ndim == 5:
            first = CHUNK_FRAMES * self.chunk
            x = x[:, :, first : first + CHUNK_FRAMES].transpose(1, 2)
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
        vae: Any = self.model
        if self.class_name == "TemporalDecoder":
            frames, of_images = x.shape[1], x.new_zeros(x.shape[:2])
            out: Tensor = vae(x.flatten(0, 1), num_frames=frames, image_only_indicator=of_images)
            return out.unflatten(0, (-1, frames)).transpose(1, 2)
        if self.class_name == "AutoencoderKLMochi":
            out = vae.decode(x, return_dict=False)[0]
        elif x.ndim == 5:  # Latte: every frame is an image
            out = vae.decoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(1, 2)
        else:
            out = vae.decoder(x)
        return out


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
