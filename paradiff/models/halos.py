"""Convolutions on a strip of rows, with those that its neighbours lend: two ways to pad a border.

A convolution of torch fills it with zeros. Causal ones (Mochi, HunyuanVideo) are given an input that
their module has padded, with the rows at the border again. Neither knows which strips there are.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from paradiff.models.divided import apply

Lend = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
"""Rows above and below an input (..., rows, columns); None at the border of the image."""


def halo_rows(module: Any) -> int:
    """Rows that ``module`` wants of each neighbour: a convolution's vertical padding, of others 0."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return int(module.padding[-2]) if module.kernel_size[-2] > 1 else 0
    return int(module.time_causal_padding[2]) if _repeats_borders(module) else 0


def _repeats_borders(module: Any) -> bool:
    return getattr(module, "pad_mode", "") == "replicate" and hasattr(module, "time_causal_padding")


def _without_rows(conv: Any) -> Any:
    """The same causal convolution, which pads columns and frames alone."""
    bare, padding = copy(conv), conv.time_causal_padding
    bare.time_causal_padding = (*padding[:2], 0, 0, *padding[4:])
    return bare


def with_halo(
    lend: Lend, rows: int, conv: Any, divided: bool, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """``forward`` of ``conv`` on the rows that ``lend`` has; ``divided``: it takes a padding."""
    bare = _without_rows(conv) if _repeats_borders(conv) else None

    @wraps(forward)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        above, below = lend(x)
        if above is None and below is None:
            return forward(x, *args, **kwargs)
        edges = [x.new_zeros(())] * 2 if bare is None else [x[..., :1, :], x[..., -1:, :]]
        sizes = (*x.shape[:-2], rows, x.shape[-1])
        above, below = (
            edge.expand(sizes) if lent is None else lent
            for edge, lent in zip(edges, (above, below), strict=True)
        )
        x = torch.cat([above, x, below], dim=-2)
        if bare is not None:
            return type(conv).forward(bare, x, *args, **kwargs)
        unpadded = (*conv.padding[:-2], 0, conv.padding[-1])
        if divided:
            return forward(x, unpadded)
        return apply(conv, x, conv.weight, conv.bias, unpadded)

    return run
