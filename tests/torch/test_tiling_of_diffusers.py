"""``vae=tiled`` against diffusers: the calls that its own tiled decoding makes, class by class."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from shipped import profile as shipped
from torch import Tensor, nn

from paradiff.executor.outputs import enable_tiling
from paradiff.models.stages import build_diffusers
from paradiff.strategies import Workload, build, parse_spec
from paradiff.strategies.tiling import tiling

pytestmark = pytest.mark.torch

ROWS, COLUMNS, FRAMES = 40, 50, 7
"""Of the latent: more than any tile in both directions, and an odd number of frames."""


class Recorder(nn.Module):
    """In place of a decoder: what it is called with, and as many pixels as it would make."""

    def __init__(self, per_frame: int, with_cache: bool) -> None:
        super().__init__()
        self.per_frame, self.with_cache = per_frame, with_cache
        self.calls: Counter[tuple[int, int]] = Counter()

    def forward(self, z: Tensor, *_: Any, **__: Any) -> Any:
        b, _channels, f, r, w = z.shape
        self.calls[r, w] += 1
        pixels = z.new_empty(b, 3, self.per_frame * (f - 1) + 1, 8 * r, 8 * w)
        return (pixels, None) if self.with_cache else pixels


@pytest.mark.parametrize("tile", [None, 12])
@pytest.mark.parametrize("name", ["cogvideox-2b", "hunyuanvideo", "mochi", "wan2.1-1.3b"])
def test_as_many_calls_of_the_decoder_at_the_same_sizes(name: str, tile: int | None) -> None:
    """Without ``tile`` the class's plain ``enable_tiling()``, with it as the executor sets it: each tile
    is decoded as often as the stages of the graph say, in batches of frames."""
    profile = shipped(name)
    kind = profile.source["models"]["vae"]["class"]
    vae: Any = build_diffusers(kind, {})
    with_cache = kind in ("AutoencoderKLCogVideoX", "AutoencoderKLMochi")
    vae.decoder = recorder = Recorder(profile.geometry.temporal_scale, with_cache)
    if tile is None:
        vae.enable_tiling()
    else:
        enable_tiling(vae, tiling(profile, tile), profile.geometry.scale)
    with torch.no_grad():
        latent = torch.empty(1, profile.geometry.channels, FRAMES, ROWS, COLUMNS, device="meta")
        vae.decode(latent.to(vae.dtype))
    spec = "vae=tiled" if tile is None else f"vae=tiled,tile={tile}"
    frames = (FRAMES - 1) * profile.geometry.temporal_scale + 1
    graph = build(parse_spec(spec), profile, Workload(8 * ROWS, 8 * COLUMNS, frames, 1))
    expected: Counter[tuple[int, int]] = Counter()
    for op in graph.sections[-1].ops:
        if op.work is not None and op.work.stage != "vae_join":
            shape = op.work.shape
            expected[shape.r, shape.w] += profile.stages[op.work.stage].repeat(shape._asdict())
    assert recorder.calls == +expected
