"""What each supported class takes and gives, as its pipeline calls it.

Latents here are (B, C, R, W), for videos (B, F, C, R, W) or (B, C, F, R, W) as the class has them; rows
are always the last but one dimension, so a strip of rows is cut the same way for every class. It does
not know ranks, versions or points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from paradiff.executor.payload import Span
from paradiff.models.interception import (
    TEXT_FIRST,
    UNET_CLASSES,
    mochi_sigmas,
    rotary_tables,
    table_rows,
)
from paradiff.models.stages import DENOISERS, latent_sizes
from paradiff.profiles import Profile, Stage

Conditioning = Mapping[str, Any]
"""Keyword arguments of the network other than latent, timestep and positions, for both guidance
branches along the batch (uncond first). ``image_latents`` are SVD's, put beside the latent."""

LATENT_NAMES = ("sample", "hidden_states")
SIGMAS_GIVEN = ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel")
"""Classes whose pipelines give the scheduler evenly spaced noise levels, from 1 to 1 / steps."""
LEARNED_SIGMA = ("PixArtTransformer2DModel", "LatteTransformer3DModel", "HunyuanDiT2DModel")
"""Classes that predict a variance beside the noise, which the scheduler does not take."""
TIMESTEP_CAST = ("HunyuanDiT2DModel", "HunyuanVideoTransformer3DModel", "MochiTransformer3DModel")
"""Classes whose pipelines give the timestep in the latent's dtype."""


@dataclass(frozen=True)
class Network:
    """An unmodified diffusers denoiser and the profile that was traced from its configuration."""

    model: nn.Module
    profile: Profile

    @cached_property
    def class_name(self) -> str:
        return type(self.model).__name__

    @property
    def stage(self) -> Stage:
        """The stage of the profile that this is."""
        return self.profile.denoiser

    @cached_property
    def point_of(self) -> dict[str, int]:
        """Module name -> segment index of its exchange point."""
        segments = self.stage.segments
        return {segments[i].name: i for i, _ in self.stage.points()}

    @cached_property
    def projections(self) -> dict[int, int]:
        """Exchange point of an attention -> the segment in which its V has been projected."""
        return self.stage.projections()

    @cached_property
    def text_first(self) -> bool:
        return TEXT_FIRST.get(self.class_name, False)

    @cached_property
    def joint_text(self) -> bool:
        return any(point.joint_text for _, point in self.profile.denoiser.points("kv"))

    @cached_property
    def learns_sigma(self) -> bool:
        """Does it predict a variance too, which is neither stepped nor sent?"""
        return self.class_name in LEARNED_SIGMA

    @cached_property
    def is_transformer(self) -> bool:
        return self.profile.kind == "transformer"

    @cached_property
    def unit_ranges(self) -> dict[str, tuple[int, int]]:
        """Blocks, parts of U-Net blocks, and these themselves -> segments [lo, hi)."""
        found: dict[str, tuple[int, int]] = {}
        for cut in self.profile.denoiser.cuts:
            for name in (cut.parent, cut.name):
                lo, _ = found.get(name, (cut.lo, cut.hi))
                found[name] = lo, cut.hi
        return found

    def frames_together(self, shape: Mapping[str, int]) -> int:
        """Frames (of tokens) that are part of one attention, one after another."""
        if self.class_name in ("UNetSpatioTemporalConditionModel", "LatteTransformer3DModel"):
            return 1
        return -(-shape["f"] // self.profile.geometry.frame_multiple)

    def by_rows(self, z: Tensor, spans: Sequence[Span], frames: int) -> list[Tensor]:
        """K or V (b, h, n, d) of several spans of rows, one after another in each frame, apart."""
        unit = self.profile.geometry.row_multiple
        rows = [(last - first) // unit for first, last in spans]
        grid = z.unflatten(2, (frames, sum(rows), -1)).split(rows, dim=3)
        return [part.flatten(2, 4) for part in grid]

    def kv(self, shape: Mapping[str, int]) -> dict[str, int]:
        """The attentions that are points -> text tokens among their keys."""
        segments = self.stage.segments
        none = {**shape, "r": 0, "k": 0}
        return {
            segments[i].name: segments[i].kernels[0].dims[3](none)
            for i, _ in self.stage.points("kv")
        }

    def latent_sizes(self, shape: Mapping[str, int]) -> tuple[int, ...]:
        """Sizes of the latent of a request, whose images or videos ``shape["b"]`` counts."""
        g = self.profile.geometry
        return latent_sizes(self.class_name, g.channels, g.frame_multiple, shape)

    def sigmas(self, steps: int) -> list[float] | None:
        """The noise levels that the pipeline of the class gives its scheduler, if it does."""
        if self.class_name in SIGMAS_GIVEN:
            return list(np.linspace(1.0, 1 / steps, steps))
        if self.class_name == "MochiTransformer3DModel":
            return mochi_sigmas(steps)
        return None

    def scheduled_tokens(self, shape: Mapping[str, int]) -> int:
        """Image tokens, on which Flux's schedule depends."""
        return shape["r"] // 2 * (shape["w"] // 2)

    def latent_input(
        self,
        x: Tensor,
        given: Conditioning,
        spans: Sequence[Span],
        frames: int | None = None,
    ) -> Tensor:
        """The latent rows ``spans`` as the network takes them: a copy for each branch, and what is
        put beside it. ``frames``: as many as a convolution has (a decoder's keeps some)."""
        batch = _batch(given)
        x = torch.cat([x] * (batch // x.shape[0])) if batch != x.shape[0] else x
        if "image_latents" in given:
            rows = [given["image_latents"][..., first:last, :] for first, last in spans]
            x = torch.cat((x, torch.cat(rows, dim=-2)), dim=2)
        return x

    def call(
        self,
        x: Tensor,
        given: Conditioning,
        timestep: Tensor,
        spans: Sequence[Span],
        total_rows: int,
    ) -> Tensor:
        """One forward on what ``latent_input`` gave, which are the rows ``spans`` of ``total_rows``; the
        prediction in the latent layout."""
        rest = {name: value for name, value in given.items() if name != "image_latents"}
        if self.class_name in UNET_CLASSES:
            out = self.model(sample=x, timestep=timestep, **rest, return_dict=False)[0]
        elif self.class_name == "FluxTransformer2DModel":
            return self._call_flux(x, rest, timestep, spans)
        else:
            times = timestep.expand(x.shape[0])
            if self.class_name in TIMESTEP_CAST:
                times = times.to(x.dtype)
            rotary = self._rotary(x, total_rows, spans)
            if rotary:
                rest["image_rotary_emb"] = rotary
            out = self.model(hidden_states=x, timestep=times, **rest, return_dict=False)[0]
        result: Tensor = out
        return result[:, : self.profile.geometry.channels] if self.learns_sigma else result

    def _rotary(self, x: Tensor, total_rows: int, spans: Sequence[Span]) -> tuple[Tensor, ...]:
        """Rows ``spans`` of the tables that the class is given, for a latent of ``total_rows``."""
        sizes = (x.shape[1], total_rows, x.shape[-1])
        if (*sizes, x.device) not in self._tables:
            self._tables[*sizes, x.device] = rotary_tables(self.model, *sizes, x.device)
        patch = self.profile.geometry.row_multiple
        grid = total_rows // patch, x.shape[-1] // patch
        whole = self._tables[*sizes, x.device]
        return tuple(table_rows(table, 0, grid, spans, patch) for table in whole)

    @cached_property
    def _tables(self) -> dict[tuple[Any, ...], tuple[Tensor, ...]]:
        """Rotary tables by the sizes and the device of a latent: every forward needs the same."""
        return {}

    def _call_flux(
        self, x: Tensor, rest: dict[str, Any], timestep: Tensor, spans: Sequence[Span]
    ) -> Tensor:
        """Packed tokens and their positions, as FluxPipeline makes them."""
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        at = torch.cat([torch.arange(first // 2, last // 2) for first, last in spans])
        grid = torch.cartesian_prod(at, torch.arange(columns))
        out = self.model(
            hidden_states=pack(x),
            timestep=timestep.to(x.dtype).expand(x.shape[0]) / 1000,
            img_ids=F.pad(grid, (1, 0)).to(x.device, x.dtype),
            txt_ids=x.new_zeros(rest["encoder_hidden_states"].shape[1], 3),
            **rest,
            return_dict=False,
        )[0]
        return unpack(out, rows, columns)


def pack(x_bcrw: Tensor) -> Tensor:
    """2 x 2 latent pixels to a token: (B, R/2 x W/2, 4C)."""
    b, c, r, w = x_bcrw.shape
    x = x_bcrw.reshape(b, c, r // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, r // 2 * (w // 2), 4 * c)


def unpack(x_bne: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``pack`` for ``rows`` x ``columns`` tokens."""
    x = x_bne.unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _batch(given: Conditioning) -> int:
    return int(given["encoder_hidden_states"].shape[0])


def for_branch(given: Conditioning, branch: str) -> Conditioning:
    """The half of ``given`` that belongs to one guidance branch, or all of it."""
    half = _batch(given) // 2
    if branch == "both":
        return given
    chosen = slice(0, half) if branch == "uncond" else slice(half, None)
    return tree_map(lambda t: t[chosen] if isinstance(t, Tensor) else t, dict(given))


def random_conditioning(
    network: Network,
    shape: Mapping[str, int],
    seed: int,
    dtype: torch.dtype,
    guidance_scale: float = 3.5,
) -> Conditioning:
    """Random embeddings of the sizes that the class takes at ``shape``; masks leave out the last tokens,
    of every sample another number.

    ``shape["b"]`` counts both guidance branches. For models with random weights, where no text
    encoder is meant. ``guidance_scale`` is for those that are told it.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)

    given = dict(DENOISERS[network.class_name](network.model, shape))
    latent = next(given.pop(name) for name in LATENT_NAMES if name in given)
    for name in ("timestep", "img_ids", "txt_ids", "image_rotary_emb"):
        given.pop(name, None)
    filled = {name: tree_map(fill, value) for name, value in given.items() if value is not None}
    for name in filled:
        if "mask" in name:
            kind = dtype if given[name].is_floating_point() else given[name].dtype
            filled[name] = _padded(*given[name].shape).to(kind)
        elif name == "guidance":
            filled[name] = torch.full_like(filled[name], guidance_scale)
    if network.class_name == "UNetSpatioTemporalConditionModel":
        b, f, channels, r, w = latent.shape
        extra = channels - network.profile.geometry.channels
        filled["image_latents"] = fill(torch.empty(b, f, extra, r, w))
    return filled


def _padded(samples: int, tokens: int) -> Tensor:
    """Ones where a prompt has a token: prompt i lacks the last 1 + i modulo 3 (but the first one)."""
    lengths = torch.tensor([max(1, tokens - 1 - i % 3) for i in range(samples)])
    return (torch.arange(tokens) < lengths[:, None]).int()
