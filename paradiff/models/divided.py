"""Modules that run on one rank's share of their weights, for tensor parallelism.

Each wrapper makes a forward that computes with views of the module's own parameters: no copies, and no
other model. Which module is divided how is ``paradiff.models.sharding``'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ShardKind = Literal["heads", "column", "row", "groups", "squares", "table"]


@dataclass(frozen=True, slots=True)
class Shard:
    """How one module is divided among ranks that share the weights.

    ``heads``: an attention, by its heads. ``column``, ``row``: a linear layer or a convolution, by its
    outputs or inputs. ``groups``: a GroupNorm. ``squares``: a norm over all heads, which needs the sum
    of squares of the others. ``table``: a rotary table that has a row for each head.

    ``pieces`` are the sizes of what is divided, each on its own where several are packed in one axis
    (the halves of a GEGLU, attention and MLP of Flux's single blocks). ``takes_share``: a row whose
    input every rank has whole.
    """

    kind: ShardKind
    pieces: tuple[int, ...]
    takes_share: bool = False

    def part(self, size: int, index: int, degree: int) -> list[slice]:
        """What rank ``index`` of ``degree`` has of an axis of ``size``: a slice of each piece."""
        unit, at, slices = size // sum(self.pieces), 0, []
        for piece in self.pieces:
            share = piece * unit // degree
            slices.append(slice(at + index * share, at + (index + 1) * share))
            at += piece * unit
        return slices

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """The parameters that are divided: all but a row's bias, which the first rank adds."""
        if self.kind in ("heads", "table"):
            return []
        names = ("weight",) if self.kind == "row" else ("weight", "bias")
        found = (getattr(module, name, None) for name in names)
        return [parameter for parameter in found if parameter is not None]


class Sharing:
    """What a divided module asks of whoever runs it; this base is one rank that has all."""

    def share(self) -> int:
        """Which of the ranks that share the weights is running."""
        return 0

    def total(self, name: str, partial: Tensor) -> Tensor:
        """The sum over these ranks of what ``name`` made of its share of the weights."""
        return partial

    def squares(self, name: str, x: Tensor) -> Tensor | None:
        """The sum of squares over all heads, (..., 1), of which ``x`` has some; None: it has all."""
        return None


def apply(
    module: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int] | None,
) -> Tensor:
    """The linear layer or convolution with a part of its weights; ``padding`` None: its own."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    convolve = F.conv3d if weight.ndim == 5 else F.conv2d
    own = module.padding if padding is None else padding
    return convolve(x, weight, bias, module.stride, own, module.dilation, module.groups)


def _channel_axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _column(handler: Sharing, name: str, shard: Shard, degree: int, module: Any, _: Any) -> Any:
    """A rank's outputs, in the order of the pieces that are packed in them. Weights are views."""

    def run(x: Tensor, padding: Sequence[int] | None = None) -> Tensor:
        outs = [
            apply(module, x, module.weight[p], _of(module.bias, p), padding)
            for p in shard.part(module.weight.shape[0], handler.share(), degree)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=_channel_axis(module))

    return run


def _row(handler: Sharing, name: str, shard: Shard, degree: int, module: Any, _: Any) -> Any:
    """All outputs of a rank's inputs, summed over the ranks, of which the first adds the bias."""

    def run(x: Tensor, padding: Sequence[int] | None = None) -> Tensor:
        parts = shard.part(module.weight.shape[1], handler.share(), degree)
        shares = x.split([p.stop - p.start for p in parts], dim=_channel_axis(module))
        biases = [module.bias if handler.share() == 0 else None, *[None] * (len(parts) - 1)]
        outs = [
            apply(module, share, module.weight[:, p], bias, padding)
            for share, p, bias in zip(shares, parts, biases, strict=True)
        ]
        return handler.total(name, outs[0] if len(outs) == 1 else torch.stack(outs).sum(0))

    return run


def taking_its_share(handler: Sharing, shard: Shard, degree: int, forward: Any) -> Any:
    """A row whose input every rank has whole."""

    @wraps(forward)
    def run(x: Tensor) -> Tensor:
        (part,) = shard.part(x.shape[1], handler.share(), degree)
        result: Tensor = forward(x[:, part])
        return result

    return run


def _group_norm(handler: Sharing, name: str, shard: Shard, degree: int, norm: Any, _: Any) -> Any:
    """The groups of a rank; ``num_groups`` counts them."""

    def run(x: Tensor) -> Tensor:
        (part,) = shard.part(norm.num_channels, handler.share(), degree)
        return F.group_norm(
            x, norm.num_groups, _of(norm.weight, part), _of(norm.bias, part), norm.eps
        )

    return run


def _norm_over_heads(
    handler: Sharing, name: str, shard: Shard, degree: int, norm: Any, _: Any
) -> Any:
    """Root mean square over the heads of all ranks."""

    def run(x: Tensor) -> Tensor:
        (part,) = shard.part(norm.weight.numel(), handler.share(), degree)
        weight = norm.weight[part]
        squares = handler.squares(name, x)
        if squares is None:
            return F.rms_norm(x, weight.shape, weight, norm.eps)
        scale = (squares / norm.weight.numel() + norm.eps).rsqrt()
        return (x.to(scale.dtype) * scale).to(x.dtype) * weight

    return run


def _table_of_heads(
    handler: Sharing, name: str, shard: Shard, degree: int, module: Any, forward: Any
) -> Any:
    """Tables (tokens, heads, width): a rank's heads."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        (part,) = shard.part(sum(shard.pieces), handler.share(), degree)
        return tuple(table[..., part, :] for table in forward(*args, **kwargs))

    return run


def _of(parameter: Tensor | None, part: slice) -> Tensor | None:
    return None if parameter is None else parameter[part]


DIVIDED = {
    "column": _column,
    "row": _row,
    "groups": _group_norm,
    "squares": _norm_over_heads,
    "table": _table_of_heads,
}
"""Kind of shard -> what makes the forward of such a module."""
