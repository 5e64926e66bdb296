"""Convolutions on a strip of rows, with those that its neighbours lend: who pads a border, and how.

A convolution of torch fills it with zeros. Causal ones are given an input that their module has padded:
with the rows at the border again (Mochi, HunyuanVideo), or with zeros (Wan). Frames that a module puts
before its input, which it has kept of the chunk before, are lent like the others. None of this knows
which strips there are.
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
TOP, BEFORE = 2, 4
"""In a padding as ``F.pad`` takes it: rows above (then those below), frames before."""


def halo_rows(module: Any) -> int:
    """Rows that ``module`` wants of each neighbour: a convolution's vertical padding, of others 0."""
    if attribute := _own_padding(module):
        return int(getattr(module, attribute)[TOP])
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return int(module.padding[-2]) if module.kernel_size[-2] > 1 else 0
    return 0


def _own_padding(module: Any) -> str:
    """Where a module that pads its input itself has by how much, as ``F.pad`` takes it, or ""."""
    if getattr(module, "pad_mode", "") == "replicate" and hasattr(module, "time_causal_padding"):
        return "time_causal_padding"
    return "_padding" if isinstance(module, nn.Conv3d) and hasattr(module, "_padding") else ""


def with_halo(
    lend: Lend, rows: int, conv: Any, divided: bool, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """``forward`` of ``conv`` on the rows that ``lend`` has; ``divided``: it takes a padding."""
    attribute = _own_padding(conv)

    @wraps(forward)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if attribute:
            return _padding_itself(lend, rows, conv, attribute, x, *args)
        lent = lend(x)
        if all(given is None for given in lent):
            return forward(x, *args, **kwargs)
        x = _between(lent, x, rows, repeats=False)
        unpadded = (*conv.padding[:-2], 0, conv.padding[-1])
        if divided:
            return forward(x, unpadded)
        return apply(conv, x, conv.weight, conv.bias, unpadded)

    return run


def _padding_itself(
    lend: Lend,
    rows: int,
    conv: Any,
    attribute: str,
    x: Tensor,
    kept: Tensor | None = None,
) -> Any:
    """A module that pads ``x``, after the frames that are ``kept`` of the chunk before (Wan's)."""
    padding = [*getattr(conv, attribute)]
    if kept is not None:
        x = torch.cat([kept, x], dim=2)
        padding[BEFORE] -= kept.shape[2]
    lent = lend(x)
    if any(given is not None for given in lent):
        x = _between(lent, x, rows, repeats=attribute == "time_causal_padding")
        padding[TOP] = padding[TOP + 1] = 0
    other = copy(conv)
    setattr(other, attribute, tuple(padding))
    last = [x]
    del x  # the module's own forward lets go of what it has padded
    return type(conv).forward(other, last.pop())


def _between(
    lent: tuple[Tensor | None, Tensor | None], x: Tensor, rows: int, repeats: bool
) -> Tensor:
    """``x`` with ``rows`` above and below: those lent, at a border the outermost again or zeros."""
    edges = [x[..., :1, :], x[..., -1:, :]] if repeats else [x.new_zeros(())] * 2
    sizes = (*x.shape[:-2], rows, x.shape[-1])
    above, below = (
        edge.expand(sizes) if given is None else given
        for edge, given in zip(edges, lent, strict=True)
    )
    return torch.cat([above, x, below], dim=-2)
