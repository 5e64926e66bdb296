"""What the refs of a graph hold at run time, and how a layer's own data and others' are put together.

A payload is a tuple of pieces, each with its coordinates (latent rows, guidance branch, exchange
point), so a transfer only hands pieces on and a reader finds the one it needs. It does not know when
anything runs.

Shape suffixes: b batch, h heads, n tokens, d head width, g groups, r latent rows; ``...`` before r
are batch, frames and channels, after it come columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int]
"""Latent rows [first, last)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Data of the latent rows ``span``.

    ``value`` is a tensor, a pair of them (K and V; a strip's first and last rows), or the conditioning
    of a request. ``point`` is the exchange point that it belongs to, if any; ``weight`` counts the
    strips summed in it, ``role`` is q, k, v or o where an attention's tokens are spread.
    """

    span: Span
    value: Any
    point: int | None = None
    branch: str = "both"
    weight: int = 1
    role: str = ""


Payload = tuple[Piece, ...]


def parse_spans(text: str) -> tuple[Span, ...]:
    """Read a ``rows`` tag: ``0-8`` or ``0-4+8-12``."""
    spans = [part.split("-") for part in text.split("+")]
    return tuple((int(first), int(last)) for first, last in spans)


def take_rows(pieces: Iterable[Piece], spans: Sequence[Span]) -> Tensor:
    """Rows of ``spans``, in this order, from pieces that have them: (..., rows, columns)."""
    have, parts = list(pieces), []
    for first, last in spans:
        at = first
        while at < last:
            piece = next(p for p in have if p.span[0] <= at < p.span[1])
            stop = min(last, piece.span[1])
            parts.append(piece.value[..., at - piece.span[0] : stop - piece.span[0], :])
            at = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def edges(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """First and last ``rows`` rows; copies, since views would keep the whole activation alive."""
    return x[..., :rows, :].clone(), x[..., -rows:, :].clone()


def moments(x: Tensor, groups: int) -> Tensor:
    """Mean and mean of squares, (2, b, g), in float32 at least."""
    x_bge = x.reshape(x.shape[0], groups, -1)
    if x_bge.dtype in (torch.float16, torch.bfloat16):
        x_bge = x_bge.float()
    return torch.stack((x_bge.mean(-1), (x_bge * x_bge).mean(-1)))


def all_keys(own: Piece, others: Iterable[Piece]) -> tuple[Tensor, Tensor]:
    """K and V of all strips in the order of their rows, ``own`` fresh: (b, h, n, d)."""
    strips = {piece.span: piece for piece in others} | {own.span: own}
    pairs = [strips[span].value for span in sorted(strips)]
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def near_keys(
    own: Piece, others: Iterable[Piece], portion: float, frames: int
) -> tuple[Tensor, Tensor]:
    """K and V of the own strip and of the nearest ``portion`` of each adjacent one (PCPP, section 11).

    ``others`` are whole, or what ``near_edge`` has left of them.
    """
    share = _share(own, portion, frames)
    pairs = {own.span: own.value}
    for piece in others:
        if piece.span[1] == own.span[0]:
            pairs[piece.span] = _edge_tokens(piece.value, 1, share, frames)
        elif piece.span[0] == own.span[1]:
            pairs[piece.span] = _edge_tokens(piece.value, 0, share, frames)
    keys, values = zip(*(pairs[span] for span in sorted(pairs)), strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def near_edge(piece: Piece, side: int, portion: float, frames: int) -> Piece:
    """What a neighbour sees of a strip's K and V: of each frame the first (0) or the last (1) tokens."""
    share = _share(piece, portion, frames)
    return replace(piece, value=_edge_tokens(piece.value, side, share, frames))


def _share(piece: Piece, portion: float, frames: int) -> int:
    """Counted in tokens of the layer at hand, frame by frame: round(portion x tokens of a strip)."""
    return round(portion * (piece.value[0].shape[2] // frames))


def _edge_tokens(
    pair: tuple[Tensor, Tensor], side: int, share: int, frames: int
) -> tuple[Tensor, ...]:
    """The first or the last ``share`` tokens of each of ``frames``, one after another in n."""
    by_frame = [z.unflatten(2, (frames, -1)) for z in pair]
    first = side * (by_frame[0].shape[3] - share)
    return tuple(z.narrow(3, first, share).flatten(2, 3) for z in by_frame)


def one_side(piece: Piece, side: int) -> Piece:
    """The first (0) or the last (1) rows of a strip's edges alone."""
    edge = tuple(rows if i == side else None for i, rows in enumerate(piece.value))
    return replace(piece, value=edge)


def neighbours(own: Span, others: Iterable[Piece]) -> tuple[Tensor | None, Tensor | None]:
    """Rows above and below ``own``: the neighbours' last and first ones; None at the border."""
    above = below = None
    for piece in others:
        if piece.span[1] == own[0]:
            above = piece.value[1]
        elif piece.span[0] == own[1]:
            below = piece.value[0]
    return above, below


def mix_moments(own: Piece, others: Sequence[Piece], corrected: bool) -> tuple[Tensor, Tensor]:
    """Mean and mean of squares to normalise with, (b, g) each (strategies.md 10.2).

    Summed over all strips already, or the average with the own strip fresh; ``corrected`` moves the
    average of the older moments by what changed in the own strip, and takes the own variance where
    that makes it negative.
    """
    summed = [piece for piece in others if piece.weight > 1]
    if summed:
        mean, square = summed[0].value / summed[0].weight
        return mean, square
    older = {piece.span: piece.value for piece in others}
    if not corrected:
        strips = older | {own.span: own.value}
        mean, square = sum(strips[span] for span in sorted(strips)) / len(strips)
        return mean, square
    average = sum(older[span] for span in sorted(older)) / len(older)
    mean, square = average + own.value - older[own.span]
    own_variance = own.value[1] - own.value[0] ** 2
    variance = square - mean * mean
    variance = torch.where(variance < 0, own_variance, variance)
    return mean, variance + mean * mean


def reduced(payloads: Sequence[Payload]) -> Payload:
    """Sum of equal payloads of all ranks, in rank order."""
    return tuple(
        replace(
            column[0],
            value=sum(piece.value for piece in column),
            span=(column[0].span[0], column[-1].span[1]),
            weight=len(column),
        )
        for column in zip(*payloads, strict=True)
    )


def branches_of(pieces: Sequence[Piece]) -> list[Tensor]:
    """Network output by branch (uncond, cond, or the only one), rows put together in order."""
    spans = sorted({piece.span for piece in pieces})
    found = {(piece.branch, piece.span): piece for piece in pieces}
    names = [name for name in ("uncond", "cond", "both") if (name, spans[0]) in found]
    return [take_rows([found[name, span] for span in spans], spans) for name in names]
