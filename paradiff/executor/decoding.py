"""A VAE's decoder as a network that runs in strips, under the same exchanges as a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.executor.loading import Pipeline
from paradiff.executor.network import Conditioning, Network
from paradiff.executor.outputs import finished, needs_float32, unscaled
from paradiff.executor.payload import Span
from paradiff.models.interception import DECODER_CLASSES
from paradiff.profiles import Stage


@dataclass(frozen=True)
class Decoder(Network):
    """The decoder of ``model``, a VAE. ``unscaled`` makes of a latent what it takes, ``finished`` of all
    strips together what the user gets."""

    unscaled: Callable[[Tensor], Tensor]
    finished: Callable[[Tensor], Tensor]

    @property
    def stage(self) -> Stage:
        return self.profile.stages["vae"]

    def latent_input(self, x: Tensor, given: Conditioning, spans: Sequence[Span]) -> Tensor:
        """What the first convolution sees, halo rows too."""
        mix = self.model.post_quant_conv
        return x if mix is None else mix(x)

    def call(
        self,
        x: Tensor,
        given: Conditioning,
        timestep: Tensor,
        spans: Sequence[Span],
        total_rows: int,
    ) -> Tensor:
        """The rows of the picture that belong to ``x``."""
        image: Tensor = self.model.decoder(x)
        return image


def strip_decoder(pipeline: Pipeline) -> Decoder | None:
    """The pipeline's VAE, to be run in strips; None where it has none that can be."""
    vae = pipeline.vae
    if vae is None or type(vae).__name__ not in DECODER_CLASSES:
        return None
    if needs_float32(pipeline):
        vae.to(torch.float32)
    return Decoder(
        vae,
        pipeline.network.profile,
        lambda x: unscaled(vae, x.to(vae.dtype)),
        lambda x: finished(pipeline, x),
    )
