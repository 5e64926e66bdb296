"""A strip of rows, given what its neighbours would send, computes its rows of the whole output.

This is the contract of every exchange point at once: the whole latent is run first and what passes
each point is kept; then one strip alone is run and asks for it. In float64 the two agree to rounding
for every supported class, so the points found are enough, and each is in the right place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paradiff.models.interception import (
    Handler,
    Site,
    exchange_sites,
    image_attentions,
    intercept,
    unit_parents,
)

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

TINY_UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 24,
}
ROWS, COLUMNS, TEXT, BATCH = 16, 8, 5, 2

Inputs = Callable[[int, int], dict[str, Any]]
"""Inputs of a forward for latent rows [first, last): random, the same numbers for every strip."""


def noise(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(channels: int, *frames: int, total: int = ROWS) -> Tensor:
    return noise(BATCH, *frames, channels, total, COLUMNS, seed=1)


def text(width: int, tokens: int = TEXT) -> Tensor:
    return noise(BATCH, tokens, width, seed=2)


def unet() -> tuple[Any, Inputs]:
    model = diffusers.UNet2DConditionModel(**TINY_UNET, in_channels=4, out_channels=4)
    return model, lambda a, b: {
        "sample": image(4, total=max(b, ROWS))[..., a:b, :],
        "timestep": torch.tensor(7),
        "encoder_hidden_states": text(24),
    }


def svd() -> tuple[Any, Inputs]:
    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=(2, 4),
        cross_attention_dim=24,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    return model, lambda a, b: {
        "sample": image(8, 3, total=max(b, ROWS))[..., a:b, :],
        "timestep": torch.tensor(7.0),
        "encoder_hidden_states": text(24, 1),
        "added_time_ids": noise(BATCH, 3, seed=3),
    }


def audioldm2() -> tuple[Any, Inputs]:
    config = {**TINY_UNET, "cross_attention_dim": [[None, 24, 20, None]] * 2}
    model = diffusers.AudioLDM2UNet2DConditionModel(**config, in_channels=4, out_channels=4)
    return model, lambda a, b: {
        "sample": image(4, total=max(b, ROWS))[..., a:b, :],
        "timestep": torch.tensor(7),
        "encoder_hidden_states": text(24, 8),
        "encoder_hidden_states_1": text(20),
    }


def pixart() -> tuple[Any, Inputs]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=ROWS,
        use_additional_conditions=False,
    )
    return model, lambda a, b: {
        "hidden_states": image(4, total=max(b, ROWS))[..., a:b, :],
        "timestep": torch.tensor([7.0, 7.0]),
        "encoder_hidden_states": text(24),
        "added_cond_kwargs": {},
    }


def sd3() -> tuple[Any, Inputs]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=ROWS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
    )
    return model, lambda a, b: {
        "hidden_states": image(4, total=max(b, ROWS))[..., a:b, :],
        "timestep": torch.tensor([7.0, 7.0]),
        "encoder_hidden_states": text(24),
        "pooled_projections": noise(BATCH, 12, seed=3),
    }


def flux() -> tuple[Any, Inputs]:
    """Tokens are given packed, with their positions: both are sliced by the caller."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )

    def inputs(a: int, b: int) -> dict[str, Any]:
        tokens = noise(BATCH, max(b, ROWS) // 2, COLUMNS // 2, 16, seed=1)[:, a // 2 : b // 2]
        grid = torch.cartesian_prod(torch.arange(a // 2, b // 2), torch.arange(COLUMNS // 2))
        return {
            "hidden_states": tokens.flatten(1, 2),
            "encoder_hidden_states": text(24),
            "pooled_projections": noise(BATCH, 12, seed=3),
            "timestep": torch.tensor([0.7, 0.7], dtype=torch.float64),
            "img_ids": F.pad(grid, (1, 0)).double(),
            "txt_ids": torch.zeros(TEXT, 3, dtype=torch.float64),
        }

    return model, inputs


def cogvideox() -> tuple[Any, Inputs]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        time_embed_dim=12,
        text_embed_dim=24,
        num_layers=2,
        sample_width=COLUMNS,
        sample_height=ROWS,
        sample_frames=9,
        max_text_seq_length=TEXT,
    )
    return model, lambda a, b: {
        "hidden_states": image(4, 3, total=max(b, ROWS))[..., a:b, :],
        "timestep": torch.tensor([7.0, 7.0]),
        "encoder_hidden_states": text(24),
    }


def cogvideox15() -> tuple[Any, Inputs]:
    """Patches of two frames; the caller slices the rotary table."""
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        time_embed_dim=12,
        text_embed_dim=24,
        num_layers=2,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )
    return model, lambda a, b: {
        "hidden_states": image(4, 4, total=max(b, ROWS))[..., a:b, :],
        "timestep": torch.tensor([7.0, 7.0]),
        "encoder_hidden_states": text(24),
        "image_rotary_emb": rotary(a, b, 24, frames=2),
    }


def rotary(a: int, b: int, width: int, frames: int = 1) -> tuple[Tensor, Tensor]:
    """Rows [a, b) of two tables, one line a token."""
    whole = noise(2, frames, max(b, ROWS) // 2, COLUMNS // 2, width, seed=4)
    cosine, sine = whole[:, :, a // 2 : b // 2].flatten(1, 3)
    return cosine, sine


def video(a: int, b: int, batch: int = BATCH) -> Tensor:
    """Four channels, three frames."""
    return image(4, 3, total=max(b, ROWS))[:batch, ..., a:b, :].transpose(1, 2)


def wan() -> tuple[Any, Inputs]:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
    )
    return model, lambda a, b: {
        "hidden_states": video(a, b),
        "timestep": torch.tensor([7.0, 7.0]),
        "encoder_hidden_states": text(24),
    }


def hunyuan_video() -> tuple[Any, Inputs]:
    """Prompts of different lengths: the mask is for text alone, whatever the rows."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    )
    return model, lambda a, b: {
        "hidden_states": video(a, b),
        "timestep": torch.tensor([7.0, 7.0], dtype=torch.float64),
        "encoder_hidden_states": text(24),
        "encoder_attention_mask": torch.tensor([[1] * TEXT, [1] * 3 + [0] * (TEXT - 3)]),
        "pooled_projections": noise(BATCH, 12, seed=3),
        "guidance": torch.tensor([3.0, 3.0], dtype=torch.float64),
    }


def latte() -> tuple[Any, Inputs]:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=ROWS,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=24,
        video_length=3,
    )
    return model, lambda a, b: {
        "hidden_states": video(a, b),
        "timestep": torch.tensor([7.0, 7.0]),
        "encoder_hidden_states": text(24),
    }


def hunyuandit() -> tuple[Any, Inputs]:
    """The last of four blocks has a skip connection from the first."""
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=ROWS,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=TEXT,
        text_len_t5=TEXT,
        use_style_cond_and_image_meta_size=False,
    )
    return model, lambda a, b: {
        "hidden_states": image(4, total=max(b, ROWS))[..., a:b, :],
        "timestep": torch.tensor([7.0, 7.0], dtype=torch.float64),
        "encoder_hidden_states": text(24),
        "text_embedding_mask": torch.ones(BATCH, TEXT),
        "encoder_hidden_states_t5": text(16),
        "text_embedding_mask_t5": torch.ones(BATCH, TEXT),
        "image_rotary_emb": rotary(a, b, 8),
    }


def mochi() -> tuple[Any, Inputs]:
    """One sample: it attends sample by sample."""
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    return model, lambda a, b: {
        "hidden_states": video(a, b, batch=1),
        "timestep": torch.tensor([7.0]),
        "encoder_hidden_states": text(24)[:1],
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
    }


MODELS = (
    unet,
    svd,
    audioldm2,
    pixart,
    sd3,
    flux,
    cogvideox,
    cogvideox15,
    wan,
    hunyuan_video,
    latte,
    hunyuandit,
    mochi,
)


class Keep(Handler):
    """Keeps what passes every point of a whole forward."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.kept[site.name] = key, value
        return key, value

    def halo(self, site: Site, x: Tensor) -> tuple[None, None]:
        self.kept[site.name] = x
        return None, None

    def moments(self, site: Site, x: Tensor) -> None:
        grouped = x.reshape(x.shape[0], site.groups, -1)
        self.kept[site.name] = grouped.mean(-1), (grouped**2).mean(-1)


class Strip(Handler):
    """One strip, lent by ``kept`` what it does not have."""

    def __init__(self, kept: Mapping[str, Any], first: int, last: int) -> None:
        self.kept, self.first, self.last = kept, first, last
        self.asked: list[str] = []

    def span(self) -> tuple[int, int]:
        return self.first, ROWS

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(site.name)
        wide_key, wide_value = self.kept[site.name]
        assert key.shape[2] * ROWS == wide_key.shape[2] * (self.last - self.first)
        return wide_key, wide_value

    def halo(self, site: Site, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        self.asked.append(site.name)
        whole = self.kept[site.name]
        first = self.first * whole.shape[-2] // ROWS
        last = first + x.shape[-2]
        above = None if first == 0 else whole[..., first - site.rows : first, :]
        below = None if last == whole.shape[-2] else whole[..., last : last + site.rows, :]
        return above, below

    def moments(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(site.name)
        return self.kept[site.name]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Inputs]:
    torch.manual_seed(0)
    model, inputs = request.param()
    return model.double().eval(), inputs


def forward(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs, return_dict=False)[0]
    return out


def rows_of(out: Tensor, first: int, last: int) -> Tensor:
    """Output rows; Flux's output is tokens, row by row."""
    if out.ndim == 3:
        return out[:, first // 2 * COLUMNS // 2 : last // 2 * COLUMNS // 2]
    return out[..., first:last, :]


@pytest.mark.parametrize(("first", "last"), [(0, 4), (4, 12), (12, 16)])
def test_strip_with_its_neighbours_data_equals_rows_of_whole(
    tiny: tuple[Any, Inputs], first: int, last: int
) -> None:
    model, inputs = tiny
    points = image_attentions(model, lambda scale: model(**inputs(0, scale * ROWS)))
    keep = Keep()
    with intercept(model, keep, kv=points):
        whole = forward(model, inputs(0, ROWS))
    strip = Strip(keep.kept, first, last)
    with intercept(model, strip, kv=points):
        part = forward(model, inputs(first, last))
    torch.testing.assert_close(part, rows_of(whole, first, last), rtol=1e-10, atol=1e-10)
    expected = {*points, *(site.name for site in exchange_sites(model))}
    assert sorted(strip.asked) == sorted(expected)  # every point met, once


def test_strip_without_its_neighbours_data_differs(tiny: tuple[Any, Inputs]) -> None:
    """The equality above is not vacuous: a naive patch is off by much more than rounding."""
    model, inputs = tiny
    whole = rows_of(forward(model, inputs(0, ROWS)), 4, 12)
    assert (forward(model, inputs(4, 12)) - whole).abs().max() > 1e-4


def test_idle_interception_changes_nothing(tiny: tuple[Any, Inputs]) -> None:
    model, inputs = tiny
    plain = forward(model, inputs(0, ROWS))
    forwards = [module.forward for module in model.modules()]
    with intercept(model, Handler(), units=list(unit_parents(model))):
        assert torch.equal(forward(model, inputs(0, ROWS)), plain)
    assert [module.forward for module in model.modules()] == forwards


def test_neither_text_nor_frames_are_exchanged(tiny: tuple[Any, Inputs]) -> None:
    """Cross attention of U-Nets and PixArt, temporal attention of SVD stay local; AudioLDM2's
    attn2 is self attention where its cross dimension is None."""
    model, inputs = tiny
    points = image_attentions(model, lambda scale: model(**inputs(0, scale * ROWS)))
    assert points
    assert not any("temporal" in name for name in points)
    joint = type(model).__name__ in (
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "MochiTransformer3DModel",
    )
    assert set(points.values()) == {TEXT if joint else 0}
    second = [name for name in points if name.endswith("attn2")]
    assert bool(second) == (type(model).__name__ == "AudioLDM2UNet2DConditionModel")


def test_units_report_their_outputs_and_may_replace_them(tiny: tuple[Any, Inputs]) -> None:
    model, inputs = tiny
    seen: list[str] = []

    class Zero(Handler):
        def leave(self, name: str, output: Any) -> Any:
            seen.append(name)
            return torch.zeros_like(output) if isinstance(output, Tensor) else output

    units = list(unit_parents(model))
    with intercept(model, Zero(), units=units):
        forward(model, inputs(0, ROWS))
    assert sorted(seen) == sorted(units)
