"""Running diffusers' own forward under a handler: the one file that leans on its private structure (at
the end, that of schedulers and decoders).

``intercept`` wraps ``module.forward`` per instance and patches one function,
``F.scaled_dot_product_attention``. The forward stays diffusers'; at every **exchange point** the
handler is asked, and may replace what the layer would have used:

- ``kv``: keys and values of *image self attention*, after norm and rotary embedding, image rows
  only; text tokens of a joint attention are put back beside whatever the handler returns;
- ``projected``: V of such an attention, as soon as it has been projected (only told);
- ``halo``: the neighbours' rows of a convolution with vertical kernel and padding;
- ``moments``: mean and mean of squares of a GroupNorm;
- ``total`` and ``squares``: what ranks add up that share a layer's weights;
- ``enter`` and ``leave``: a unit (a transformer block, a U-Net sub-block) begins or ends.

Positions follow from the rows: a handler that runs a strip says which rows it has (``span``), and
patch embeddings and rotary tables then run at full height and are sliced. (Flux takes its positions as
an argument, HunyuanDiT and CogVideoX with rotary embeddings their tables: ``rotary_tables``.)
Positional tables that a model computes when its shape is not the configured one go through
``table``, so that a handler can leave them out of its account.

It does not know devices, ranks or costs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, update_wrapper, wraps
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import diffusers.models.attention_processor
import diffusers.models.embeddings
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paradiff.models.divided import DIVIDED, Shard, Sharing, taking_its_share
from paradiff.models.halos import halo_rows, with_halo

TEXT_FIRST = {
    "FluxTransformer2DModel": True,
    "CogVideoXTransformer3DModel": True,
    "SD3Transformer2DModel": False,
    "HunyuanVideoTransformer3DModel": False,
    "MochiTransformer3DModel": False,
}
"""Joint attention: does the text come before the image tokens? Read from the class's processor."""

TEXT_OUT_FIRST = {
    "FluxTransformer2DModel": True,
    "SD3Transformer2DModel": True,
    "CogVideoXTransformer3DModel": False,
    "HunyuanVideoTransformer3DModel": False,
    "MochiTransformer3DModel": False,
}
"""Blocks that return a pair of streams: is its first one the text?"""

UNET_CLASSES = (
    "UNet2DConditionModel",
    "UNetSpatioTemporalConditionModel",
    "AudioLDM2UNet2DConditionModel",
)
DECODERS = {
    "AutoencoderKL": "decoder.",
    "TemporalDecoder": "",
    "AutoencoderKLMochi": "decoder.",
    "AutoencoderKLHunyuanVideo": "decoder.",
    "AutoencoderKLWan": "decoder.",
}
"""Modules with a decoder that takes strips: where in them it is. ``TemporalDecoder`` is that of SVD's
AutoencoderKLTemporalDecoder."""
ALL_FRAMES = 1 << 30
"""More frames than a video has: what is done chunk by chunk for memory's sake meets a point once."""
TRANSFORMER_CLASSES = (
    "PixArtTransformer2DModel",
    "WanTransformer3DModel",
    "LatteTransformer3DModel",
    "HunyuanDiT2DModel",
    *TEXT_FIRST,
)
BLOCK_LISTS = (
    "transformer_blocks",
    "single_transformer_blocks",
    "temporal_transformer_blocks",
    "blocks",
)
"""Names under which transformers keep their blocks."""
VALUES = ("to_v", "add_v_proj")
"""Projections of V and of the text's in a joint attention; then V is only laid out, text by image."""
EMBEDDINGS = ("PatchEmbed", "CogVideoXPatchEmbed")
"""Modules that add positions of their own to patches."""
TOKEN_AXIS = {"WanRotaryPosEmbed": 1, "HunyuanVideoRotaryPosEmbed": 0, "MochiRoPE": 0}
"""Modules that compute rotary tables: the axis of the tables that counts tokens."""


@dataclass(frozen=True, slots=True)
class Site:
    """An exchange point in the module tree. ``rows`` is the vertical padding of a ``halo``;
    ``is_input`` marks the convolution that reads the latent itself, which is no exchange."""

    name: str
    kind: str
    rows: int = 0
    groups: int = 0
    is_input: bool = False


class Handler(Sharing):
    """What to do at each point; this base leaves the forward as it is."""

    def attention(
        self, name: str, call: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Every attention, exchange or not; ``key`` and ``value`` are what ``kv`` made of them."""
        return call()

    def projected(self, name: str, value: Tensor, is_last: bool) -> None:
        """V of attention ``name``, (batch, tokens, heads x head_dim): image's, then text's, or both."""

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Image rows of K and V, (batch, heads, tokens, head_dim): returns the visible ones."""
        return key, value

    def halo(self, site: Site, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Rows above and below ``x`` (..., rows, columns); None at the border of the image."""
        return None, None

    def moments(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and mean of squares, (batch, groups), to normalise with; None: the layer's own."""
        return None

    def enter(self, name: str) -> None:
        """A unit is about to run."""

    def unit(
        self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a unit; its inputs or its output may be others."""
        return forward(*args, **kwargs)

    def leave(self, name: str, output: Any) -> Any:
        """A unit has run; returns its output or another in its place."""
        return output

    def span(self) -> tuple[int, int] | None:
        """First latent row of the strip and rows of the whole latent; None: it is whole."""
        return None

    def spans(self) -> tuple[tuple[int, int], ...] | None:
        """Latent rows [first, last) of each piece, where ``span`` begins several."""
        return None

    def table(self, compute: Callable[[], Any]) -> Any:
        """A positional table for the shape at hand."""
        return compute()


# -------------------------------------------------------------------------------- blocks' streams


def block_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Image and text stream that enter a transformer block (None where text is no stream)."""
    if type(model).__name__ not in TEXT_OUT_FIRST:
        return args[0], None
    if args:
        return args[0], args[1]
    return kwargs["hidden_states"], kwargs["encoder_hidden_states"]


def with_block_inputs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    image: Tensor,
    text: Tensor | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other streams."""
    if type(model).__name__ not in TEXT_OUT_FIRST:
        return (image, *args[1:]), kwargs
    if args:
        return (image, text, *args[2:]), kwargs
    return args, {**kwargs, "hidden_states": image, "encoder_hidden_states": text}


def block_streams(model: nn.Module, output: Any) -> tuple[Tensor, Tensor | None]:
    """Image and text stream in a block's output."""
    text_first = TEXT_OUT_FIRST.get(type(model).__name__)
    if text_first is None:
        return output, None
    return (output[1], output[0]) if text_first else (output[0], output[1])


def block_output(model: nn.Module, image: Tensor, text: Tensor | None) -> Any:
    """What a block returns for these streams."""
    text_first = TEXT_OUT_FIRST.get(type(model).__name__)
    if text_first is None:
        return image
    return (text, image) if text_first else (image, text)


# ------------------------------------------------------------------------------------ what to find


def self_attention_names(model: nn.Module) -> list[str]:
    """Modules that attend (``processor`` and ``to_q``, or Wan's decoder's own), whatever class they are
    of."""
    return [
        name
        for name, m in model.named_modules()
        if (hasattr(m, "processor") and hasattr(m, "to_q"))
        or type(m).__name__ == "WanAttentionBlock"
    ]


def unit_parents(model: nn.Module) -> dict[str, str]:
    """Unit -> enclosing U-Net block (itself where there is none), in no particular order.

    Transformers: every block of every top-level list of blocks. U-Nets: ``conv_in``, the resnets,
    attentions and samplers of each block, ``mid_block`` whole, ``conv_norm_out``, ``conv_out``.
    """
    if type(model).__name__ in UNET_CLASSES:
        units = {name: name for name in ("conv_in", "mid_block", "conv_norm_out", "conv_out")}
        for side in ("down_blocks", "up_blocks"):
            for i, block in enumerate(getattr(model, side)):
                for part in ("resnets", "attentions", "downsamplers", "upsamplers"):
                    for j in range(len(getattr(block, part, None) or ())):
                        units[f"{side}.{i}.{part}.{j}"] = f"{side}.{i}"
        return units
    return {
        name: name
        for name, _ in model.named_modules()
        if name.count(".") == 1 and name.split(".")[0] in BLOCK_LISTS
    }


def exchange_sites(model: nn.Module) -> list[Site]:
    """``halo`` and ``moments`` points of a U-Net or a VAE's decoder (a transformer has none), by module.

    A convolution needs a halo iff it is padded vertically (temporal Conv3d is not), by itself or by the
    module around it. Attention is found by running, since only the key length tells (see
    ``paradiff.models.trace``).
    """
    if type(model).__name__ not in (*UNET_CLASSES, *DECODERS):
        return []
    inside = DECODERS.get(type(model).__name__, "")
    sites = []
    for name, module in model.named_modules():
        if not name.startswith(inside):
            continue
        if rows := halo_rows(module):
            sites.append(Site(name, "halo", rows=rows, is_input=name == f"{inside}conv_in"))
        elif isinstance(module, nn.GroupNorm):
            sites.append(Site(name, "moments", groups=module.num_groups))
    return sites


def compile_between_points(
    model: nn.Module, points: Collection[str], backend: str = "inductor"
) -> int:
    """Let torch compile, each on its own, the largest modules that no exchange point lies in.

    ``points`` are those of the profile. What is wrapped or paused in stays eager: a compiled region
    cannot be left half-way. Returns how many modules there were.
    """
    fixed = {*points, *self_attention_names(model), *(s.name for s in exchange_sites(model))}
    fixed |= {n for n, m in model.named_modules() if type(m).__name__ in (*EMBEDDINGS, *TOKEN_AXIS)}
    fixed |= set(unit_parents(model))
    compiled = 0

    def visit(name: str, module: nn.Module) -> None:
        nonlocal compiled
        if name in fixed or any(other.startswith(f"{name}." if name else "") for other in fixed):
            for child, inner in module.named_children():
                visit(f"{name}.{child}" if name else child, inner)
        elif len(list(module.modules())) > 1 and any(True for _ in module.parameters()):
            module.compile(backend=backend)
            compiled += 1

    visit("", model)
    return compiled


class _KeyCounts(Handler):
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def attention(
        self, name: str, call: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        self.counts[name] = key.shape[-2]
        return call()


def image_attentions(model: nn.Module, run: Callable[[int], object]) -> dict[str, int]:
    """The ``kv`` points: attention -> text tokens among its keys, found by running twice.

    ``run(scale)`` runs a forward whose latent has ``scale`` times as many rows. Keys that are text
    (cross attention) or frames (temporal attention) do not grow; of joint ones, with T text and I
    image tokens, k1 = T + I and k2 = T + 2 I, so T = 2 k1 - k2.
    """
    counts = []
    for scale in (1, 2):
        handler = _KeyCounts()
        with torch.no_grad(), intercept(model, handler):
            run(scale)
        counts.append(handler.counts)
    once, twice = counts
    return {name: 2 * k - twice[name] for name, k in once.items() if name and twice[name] != k}


# --------------------------------------------------------------------------------------- intercept


@contextmanager
def intercept(
    model: nn.Module,
    handler: Handler,
    *,
    kv: Mapping[str, int] | None = None,
    units: Sequence[str] = (),
    shards: Mapping[str, Shard] | None = None,
    degree: int = 1,
    projections: bool = False,
) -> Iterator[None]:
    """Run forwards of ``model`` under ``handler``.

    ``kv`` maps the attentions that are exchange points to how many text tokens are part of them
    (0 for pure self attention). ``units`` are the modules to report to ``enter`` and ``leave``.
    ``shards`` are divided among ``degree`` ranks, which must divide each of their pieces;
    ``projections``: those of V are reported.
    """
    text_first = TEXT_FIRST.get(type(model).__name__, False)
    together = type(model).__name__ == "MochiTransformer3DModel"
    inside = ContextVar[tuple[str, Tensor | None]]("inside", default=("", None))
    modules = dict(model.named_modules())
    with ExitStack() as stack:

        def wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
            module = modules[name]
            stack.enter_context(mock.patch.object(module, "forward", make(module.forward)))

        for name, shard in (shards or {}).items():
            module = modules[name]
            for attribute in ("heads", "num_groups") if degree > 1 else ():
                if hasattr(module, attribute):
                    whole = getattr(module, attribute)
                    stack.enter_context(mock.patch.object(module, attribute, whole // degree))
            if shard.kind != "heads":
                wrap(name, partial(DIVIDED[shard.kind], handler, name, shard, degree, module))
        for module in modules.values():
            if type(module).__name__ == "MochiChunkedGroupNorm3D":  # eight frames at a time
                stack.enter_context(mock.patch.object(module, "chunk_size", ALL_FRAMES))
        for name in self_attention_names(model):
            wrap(name, partial(_attention_scope, inside, name, together))
            parts = [part for part in VALUES if projections and f"{name}.{part}" in modules]
            for part in parts:
                told = partial(_tell_values, handler, name, part == parts[-1])
                stack.enter_context(modules[f"{name}.{part}"].register_forward_hook(told))
        if together:
            stack.enter_context(_samples_together())
        for site in exchange_sites(model):
            module = modules[site.name]
            if site.kind == "halo":
                lend, divided = partial(handler.halo, site), site.name in (shards or {})
                wrap(site.name, partial(with_halo, lend, site.rows, module, divided))
            else:
                wrap(site.name, partial(_with_moments, handler, site, module))
        for name, shard in (shards or {}).items():
            if shard.takes_share:
                wrap(name, partial(taking_its_share, handler, shard, degree))
        for name, module in modules.items():
            if type(module).__name__ in EMBEDDINGS:
                wrap(name, partial(_with_positions, handler, module))
            elif type(module).__name__ in TOKEN_AXIS:
                axis = TOKEN_AXIS[type(module).__name__]
                wrap(name, partial(_with_rotation, handler, model.config.patch_size, axis))
        for name in units:
            wrap(name, partial(_unit_scope, handler, name))
        original = F.scaled_dot_product_attention
        sdpa = partial(_attend, handler, inside, kv or {}, text_first, original)
        update_wrapper(sdpa, original)  # torch.compile asks every function of torch for its name
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", sdpa))
        stack.enter_context(_tables(handler))
        yield


def _attention_scope(
    inside: ContextVar[tuple[str, Tensor | None]],
    name: str,
    together: bool,
    forward: Callable[..., Any],
) -> Any:
    """Says which module attends, for each coroutine apart. ``together``: and keeps the mask of the text,
    which Mochi's processor would act upon itself."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = inside.set((name, kwargs["attention_mask"] if together else None))
        try:
            return forward(*args, **kwargs)
        finally:
            inside.reset(before)

    return run


class TorchWith(ModuleType):
    """``torch`` in whose place a module of diffusers finds some names replaced."""

    def __init__(self, **replaced: Any) -> None:
        super().__init__("torch")
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _EverySample(int):
    """An index into a batch that is all of it: ``x[i : i + 1]`` is ``x``."""

    batch: int

    def __add__(self, _: object) -> int:
        return self.batch


@contextmanager
def _samples_together() -> Iterator[None]:
    """Mochi attends sample by sample over the text tokens that its mask leaves. Here a batch attends
    at once, over all tokens under a mask: an exchange point is met once a forward."""

    def samples(batch: int) -> list[_EverySample]:
        every = _EverySample(0)
        every.batch = batch
        return [every]

    def nonzero(mask: Tensor, *, as_tuple: bool) -> Tensor:
        return torch.arange(mask.numel(), device=mask.device)[:, None]

    processors: Any = diffusers.models.attention_processor
    with (
        mock.patch.object(processors, "range", samples, create=True),
        mock.patch.object(processors, "torch", TorchWith(nonzero=nonzero)),
    ):
        yield


def _words_mask(words: Tensor, keys: int) -> Tensor | None:
    """The mask of joint keys (batch, 1, 1, keys), image first, for a mask of the text; None where no
    token is masked, and on meta, where prompts are as long as they can be."""
    if words.device.type == "meta" or bool(words.all()):
        return None
    image = words.new_ones(words.shape[0], keys - words.shape[1])
    return torch.cat((image, words), dim=1)[:, None, None].bool()


def _unit_scope(handler: Handler, name: str, forward: Callable[..., Any]) -> Any:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        handler.enter(name)
        return handler.leave(name, handler.unit(name, forward, args, kwargs))

    return run


def _tell_values(handler: Handler, name: str, is_last: bool, *called: Any) -> None:
    handler.projected(name, called[-1], is_last)


def _attend(
    handler: Handler,
    inside: ContextVar[tuple[str, Tensor | None]],
    kv: Mapping[str, int],
    text_first: bool,
    original: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The patched attention; its parameters are called positionally and by keyword."""
    name, words = inside.get()
    if words is not None:
        kwargs["attn_mask"] = _words_mask(words, key.shape[2])
    if name in kv:
        text = kv[name]
        site = Site(name, "kv")
        own = key.shape[2]
        key, value = _widen(handler, site, key, value, text, text_first)
        if kwargs.get("attn_mask") is not None and key.shape[2] != own:
            kwargs["attn_mask"] = _widen_mask(kwargs["attn_mask"], key.shape[2], text, text_first)
    call = partial(original, query, key, value, *args, **kwargs)
    return handler.attention(name, call, query, key, value)


def _widen(
    handler: Handler, site: Site, key: Tensor, value: Tensor, text: int, text_first: bool
) -> tuple[Tensor, Tensor]:
    if not text:
        return handler.kv(site, key, value)
    image = slice(text, None) if text_first else slice(None, -text)
    beside = slice(None, text) if text_first else slice(-text, None)
    wide = handler.kv(site, key[:, :, image], value[:, :, image])
    joined = []
    for whole, part in zip((key, value), wide, strict=True):
        pair = (whole[:, :, beside], part) if text_first else (part, whole[:, :, beside])
        joined.append(torch.cat(pair, dim=2))
    return joined[0], joined[1]


def _widen_mask(mask: Tensor, keys: int, text: int, text_first: bool) -> Tensor:
    """A boolean mask of joint keys, which masks text alone, for more image tokens. Without text it masks
    frames (HunyuanVideo's decoder), and each strip of rows has its tokens frame by frame."""
    if not text:
        strips = -(-keys // mask.shape[-1])
        return mask.repeat(*[1] * (mask.ndim - 1), strips)[..., :keys]
    image = mask.new_ones(*mask.shape[:-1], keys - text)
    if text_first:
        return torch.cat((mask[..., :text], image), dim=-1)
    return torch.cat((image, mask[..., mask.shape[-1] - text :]), dim=-1)


def _with_moments(handler: Handler, site: Site, norm: Any, forward: Callable[..., Any]) -> Any:
    @wraps(forward)
    def run(x: Tensor) -> Tensor:
        replaced = handler.moments(site, x)
        if replaced is None:
            return forward(x)
        mean, mean_of_squares = replaced
        deviation = (mean_of_squares - mean * mean + norm.eps).rsqrt()
        grouped = x.reshape(x.shape[0], norm.num_groups, -1).to(mean.dtype)
        normal = ((grouped - mean[..., None]) * deviation[..., None]).to(x.dtype).reshape(x.shape)
        if norm.weight is None:
            return normal
        per_channel = (1, -1, *[1] * (x.ndim - 2))
        return normal * norm.weight.view(per_channel) + norm.bias.view(per_channel)

    return run


def _with_positions(handler: Handler, embed: Any, forward: Callable[..., Any]) -> Any:
    """Embed the strip inside a latent of full height, whose other rows are zero, and slice.

    CogVideoX's table has room for one text length, so a part of the text is filled up to it."""
    patch = embed.patch_size

    @wraps(forward)
    def run(*args: Tensor) -> Tensor:
        span = handler.span()
        if span is None:
            return forward(*args)
        *text, image = args
        first, total = span
        rows, columns = image.shape[-2:]
        spans = handler.spans() or ((first, first + rows),)
        whole = image.new_zeros(*image.shape[:-2], total, columns)
        for (a, b), part in zip(spans, image.split([b - a for a, b in spans], dim=-2), strict=True):
            whole[..., a:b, :] = part
        words = sum(each.shape[1] for each in text)
        room = [getattr(embed, "max_text_seq_length", words)] * bool(text)
        tokens = forward(*(F.pad(t, (0, 0, 0, room[0] - words)) for t in text), whole)
        grid = tokens[:, sum(room) :].unflatten(1, (-1, total // patch, columns // patch))
        strips = [grid[:, :, a // patch : b // patch] for a, b in spans]
        return torch.cat((tokens[:, :words], torch.cat(strips, dim=2).flatten(1, 3)), dim=1)

    return run


def _with_rotation(
    handler: Handler, patch: int | Sequence[int], axis: int, forward: Callable[..., Any]
) -> Any:
    """Rotary tables of a latent of full height, of which the strip's rows are kept.

    Called with the latent, or (Mochi) with frequencies, frames, rows and columns in patches."""
    size = patch if isinstance(patch, int) else patch[1]

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        span = handler.span()
        if span is None:
            return forward(*args, **kwargs)
        first, total = span
        if len(args) == 1:
            own, columns = (n // size for n in args[0].shape[-2:])
            whole = (args[0].new_empty(*args[0].shape[:-2], total, args[0].shape[-1]),)
        else:
            own, columns = args[2:4]
            whole = (*args[:2], total // size, *args[3:])
        spans = handler.spans() or ((first, first + own * size),)

        grid = (total // size, columns)
        return tuple(table_rows(t, axis, grid, spans, size) for t in forward(*whole, **kwargs))

    return run


def table_rows(
    table: Tensor, axis: int, grid: tuple[int, int], spans: Sequence[tuple[int, int]], size: int
) -> Tensor:
    """Entries of the latent rows ``spans`` in a table that counts frames, rows, columns in patches."""
    whole = table.unflatten(axis, (-1, *grid))
    pieces = [whole.narrow(axis + 1, a // size, (b - a) // size) for a, b in spans]
    return torch.cat(pieces, dim=axis + 1).flatten(axis, axis + 2)


def rotary_tables(
    model: nn.Module, frames: int, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Cosines and sines that the caller gives, (tokens, width) each, as the pipeline of the class makes
    them for a latent of these sizes; none where the model has its own."""
    c: Any = model.config
    if type(model).__name__ == "HunyuanDiT2DModel":
        module: Any = import_module("diffusers.pipelines.hunyuandit.pipeline_hunyuandit")
        grid = rows // c.patch_size, columns // c.patch_size
        crop = module.get_resize_crop_region_for_grid(grid, 512 // 8 // c.patch_size)
        return tuple(
            module.get_2d_rotary_pos_embed(
                c.attention_head_dim, crop, grid, device=device, output_type="pt"
            )
        )
    if getattr(c, "use_rotary_positional_embeddings", False):
        pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
        make = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
        return tuple(make(pipeline, rows, columns, frames, device))
    return ()


@contextmanager
def _tables(handler: Handler) -> Iterator[None]:
    """Route the sine-cosine tables of PatchEmbed and CogVideoXPatchEmbed through the handler.

    PatchEmbed casts its table to float32 at once; here the cast is part of the computation."""
    embeddings = diffusers.models.embeddings

    def routed(owner: Any, attribute: str, finish: Callable[[Tensor], Tensor]) -> Any:
        original = getattr(owner, attribute)

        @wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            return handler.table(lambda: finish(original(*args, **kwargs)))

        return mock.patch.object(owner, attribute, run)

    with (
        routed(embeddings, "get_2d_sincos_pos_embed", Tensor.float),
        routed(embeddings.CogVideoXPatchEmbed, "_get_positional_embeddings", Tensor.detach),
    ):
        yield


# ------------------------------------------------------------------------- schedulers and decoders


@contextmanager
def precise(scheduler: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a float64 latent keep its precision: several schedulers "upcast" what they get to float32."""
    if dtype != torch.float64:
        yield
        return
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "torch", TorchWith(float32=torch.float64)):
        yield


@contextmanager
def drawing(scheduler: Any, draw: Callable[..., Tensor]) -> Iterator[None]:
    """A scheduler that draws noise gets it from ``draw``, called as diffusers' ``randn_tensor``."""
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, "randn_tensor"):
        yield
        return
    with mock.patch.object(module, "randn_tensor", draw):
        yield


def mochi_sigmas(steps: int) -> list[float]:
    """The noise levels that Mochi's pipeline gives its scheduler."""
    module: Any = import_module("diffusers.pipelines.mochi.pipeline_mochi")
    return list(module.linear_quadratic_schedule(steps, threshold_noise=0.025))


def at_step(scheduler: Any, step: int) -> None:
    """Tell a scheduler which step it is asked about."""
    scheduler._step_index = step


def cached_convolutions(vae: Any) -> int:
    """Convolutions of Wan's decoder that keep frames for the next chunk."""
    return int(vae._cached_conv_counts["decoder"])
