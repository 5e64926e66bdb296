"""Attention whose tokens and heads are spread over a group of ranks (Ulysses, ring, both).

Pure functions on what a rank has: heads apart for an all-to-all, tokens together again, attention over
one block of keys after another with its log-sum-exp. Image and text tokens are kept apart, since the
text may be on every rank. Suffixes: b batch, h heads, n tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paradiff.executor.payload import Payload, Piece, Span


class Tokens(NamedTuple):
    """Image and text tokens of one of Q, K, V, O: (b, h, n, d); no text where it is no part."""

    image: Tensor
    text: Tensor | None

    def joined(self) -> Tensor:
        """Image, then text."""
        return self.image if self.text is None else torch.cat((self.image, self.text), dim=2)


@dataclass(frozen=True, slots=True)
class Layout:
    """A rank's place: ``index`` of ``ulysses`` in the all-to-all, ``blocks`` that a ring brings by, and
    whether the text tokens are spread like the image's."""

    index: int
    ulysses: int
    blocks: int
    split_text: bool


def layout_of(tags: Mapping[str, str]) -> Layout | None:
    """The layout that an op's tags name; None where no attention is spread."""
    if "ulysses" not in tags:
        return None
    index, degree = map(int, tags["ulysses"].split("/"))
    return Layout(index, degree, int(tags.get("ring", "1")), "words" in tags)


def heads_apart(tokens: Tokens, role: str, span: Span, layout: Layout) -> Payload:
    """One piece for each rank of the all-to-all: its heads of this rank's tokens."""
    image = tokens.image.chunk(layout.ulysses, dim=1)
    text = [None] * layout.ulysses
    if tokens.text is not None and layout.split_text:
        text = list(tokens.text.chunk(layout.ulysses, dim=1))
    return tuple(Piece(span, Tokens(i, t), role=role) for i, t in zip(image, text, strict=True))


def own_heads(tokens: Tokens, layout: Layout) -> Tensor | None:
    """This rank's heads of text that every rank has whole."""
    if tokens.text is None or layout.split_text:
        return None
    return tokens.text.chunk(layout.ulysses, dim=1)[layout.index]


def together(payloads: Iterable[Payload], role: str, text: Tensor | None) -> Tokens:
    """All tokens of ``role`` among ``payloads``, in the order of their rows, each once.

    ``text`` is what every rank has of it; otherwise the pieces' own.
    """
    found = {p.span: p.value for payload in payloads for p in payload if p.role == role}
    parts = [found[span] for span in sorted(found)]
    spread = [part.text for part in parts if part.text is not None]
    whole = torch.cat(spread, dim=2) if spread else text
    return Tokens(torch.cat([part.image for part in parts], dim=2), whole)


def block_tokens(block: Payload, at: int) -> tuple[Tokens, Tokens]:
    """K and V that came from other ranks: fresh rows, and those cached for point ``at``."""
    key, value = (together([block], role, None) for role in "kv")
    cached = [piece.value for piece in block if piece.point == at]
    if not cached:
        return key, value
    keys, values = zip(*cached, strict=True)
    return (
        Tokens(torch.cat((key.image, *keys), dim=2), key.text),
        Tokens(torch.cat((value.image, *values), dim=2), value.text),
    )


def tokens_apart(out: Tokens, queries: Payload) -> Payload:
    """One piece for each rank of the all-to-all: this rank's heads of the tokens it sent."""
    order = sorted(queries, key=lambda piece: piece.span)
    images = dict(
        zip(
            (p.span for p in order),
            out.image.split([p.value.image.shape[2] for p in order], dim=2),
            strict=True,
        )
    )
    texts: dict[Span, Tensor] = {}
    if out.text is not None and all(p.value.text is not None for p in order):
        sizes = [p.value.text.shape[2] for p in order]
        texts = dict(zip(images, out.text.split(sizes, dim=2), strict=True))
    return tuple(
        Piece(p.span, Tokens(images[p.span], texts.get(p.span)), role="o") for p in queries
    )


def heads_together(pieces: Sequence[Piece]) -> Tokens:
    """All heads of this rank's tokens, from the ranks in order."""
    image = torch.cat([p.value.image for p in pieces], dim=1)
    texts = [p.value.text for p in pieces if p.value.text is not None]
    return Tokens(image, torch.cat(texts, dim=1) if texts else None)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys, and the log-sum-exp of its scores (b, h, n, 1; float32
    where half precision is fused).

    By torch's fused kernels, which never hold the scores; on a GPU they take no float64, and no mask
    that is broadcast, where the scores are written out.
    """
    fused = torch.ops.aten
    if query.device.type == "cpu":
        bias = None if mask is None else torch.zeros(mask.shape, dtype=query.dtype)
        if bias is not None:
            bias = bias.masked_fill(~mask, -torch.inf).expand(-1, -1, query.shape[2], -1)
        out, total = fused._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias
        )
        return out, total.unsqueeze(-1)
    if mask is None and query.dtype != torch.float64:
        out, total, *_ = fused._scaled_dot_product_efficient_attention(
            query, key, value, None, compute_log_sumexp=True
        )
        return out, total[:, :, : query.shape[2], None]
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    return torch.exp(scores - total) @ value, total


def mask_of(keys: Tokens, words: Tensor | None) -> Tensor | None:
    """The mask of ``keys``, (b, 1, 1, n), for a mask of the text, which is whole where it is there."""
    if words is None or keys.text is None:
        return None
    return torch.cat((words.new_ones(*words.shape[:-1], keys.image.shape[2]), words), dim=-1)


def merged(
    one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention over two blocks of keys from that over each (Dao et al., log-sum-exp merge)."""
    if one is None:
        return other
    total = torch.logaddexp(one[1], other[1])
    return torch.exp(one[1] - total) * one[0] + torch.exp(other[1] - total) * other[0], total
