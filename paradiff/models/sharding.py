"""How the weights of each supported class are divided among tensor-parallel ranks.

Megatron's rule (Shoeybi et al., arXiv 1909.08053, section 3; strategies.md 4): of two layers in a
row the first is divided by its outputs (``column``), the second by its inputs (``row``), so that what
lies between needs no exchange, and the second's outputs are partial sums. Attention is divided by heads,
a resnet's second GroupNorm by groups. What is not listed here every rank has whole: norms, modulation,
embeddings, shortcuts, the projections around a U-Net's transformers.

Everything follows from the module tree; this file runs nothing and does not know ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any

from torch import nn

from paradiff.models.divided import Shard
from paradiff.models.interception import UNET_CLASSES, self_attention_names, unit_parents


def shards_of(model: nn.Module) -> dict[str, Shard]:
    """Module name -> how it is divided. Only blocks (units) are; a text refiner before them is not."""
    units = tuple(f"{name}." for name in unit_parents(model))
    found: dict[str, Shard] = {}
    for name in self_attention_names(model):
        if name.startswith(units):
            found.update(_attention(name, model.get_submodule(name)))
    for name, module in model.named_modules():
        if not f"{name}.".startswith(units):
            continue
        if type(module).__name__ == "FeedForward":
            found.update(_feed_forward(name, module))
        elif hasattr(module, "proj_mlp"):
            found.update(_single_block(name, module))
        elif hasattr(module, "conv1") and hasattr(module, "time_emb_proj"):
            found.update(_resnet(name, module))
        elif name.endswith("samplers.0.conv"):
            found[name] = _row(module, takes_share=True)
    if type(model).__name__ == "MochiTransformer3DModel":
        found["rope"] = Shard("table", (model.pos_frequencies.shape[1],))
    if type(model).__name__ in UNET_CLASSES:
        found["conv_out"] = _row(model.conv_out, takes_share=True)
    return found


def largest_degree(shards: Mapping[str, Shard]) -> int:
    """The greatest degree that divides everything; all legal ones divide it."""
    return gcd(*(size for shard in shards.values() for size in shard.pieces))


def _column(module: Any, parts: int = 1) -> Shard:
    return Shard("column", (module.weight.shape[0] // parts,) * parts)


def _row(module: Any, takes_share: bool = False) -> Shard:
    return Shard("row", (module.weight.shape[1],), takes_share)


def _attention(name: str, attention: Any) -> Iterator[tuple[str, Shard]]:
    yield name, Shard("heads", (attention.heads,))
    for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        if getattr(attention, part, None) is not None:
            yield f"{name}.{part}", _column(getattr(attention, part))
    if getattr(attention, "to_out", None) is not None:
        yield f"{name}.to_out.0", _row(attention.to_out[0])
    if getattr(attention, "to_add_out", None) is not None:
        yield f"{name}.to_add_out", _row(attention.to_add_out)
    inner = attention.to_q.weight.shape[0]
    for part in ("norm_q", "norm_k"):
        norm = getattr(attention, part, None)
        if isinstance(norm, nn.RMSNorm) and norm.weight.numel() == inner > inner // attention.heads:
            yield f"{name}.{part}", Shard("squares", (inner,))


def _feed_forward(name: str, module: Any) -> Iterator[tuple[str, Shard]]:
    first, last = module.net[0].proj, module.net[2]
    yield f"{name}.net.0.proj", _column(first, first.weight.shape[0] // last.weight.shape[1])
    yield f"{name}.net.2", _row(last)


def _single_block(name: str, block: Any) -> Iterator[tuple[str, Shard]]:
    inner, mlp = block.attn.to_q.weight.shape[0], block.proj_mlp.weight.shape[0]
    yield f"{name}.proj_mlp", _column(block.proj_mlp)
    yield f"{name}.proj_out", Shard("row", (inner, mlp))


def _resnet(name: str, resnet: Any) -> Iterator[tuple[str, Shard]]:
    yield f"{name}.conv1", _column(resnet.conv1)
    if resnet.time_emb_proj is not None:
        parts = resnet.time_emb_proj.weight.shape[0] // resnet.conv1.weight.shape[0]
        yield f"{name}.time_emb_proj", _column(resnet.time_emb_proj, parts)
    yield f"{name}.norm2", Shard("groups", (resnet.norm2.num_groups,))
    yield f"{name}.conv2", _row(resnet.conv2)
