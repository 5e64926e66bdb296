"""Payloads as bytes: what a receiver must know of one (its header), and all its tensors in one buffer.

A header is JSON, and so is everything that processes tell each other here: nothing is unpickled. Each
tensor begins at a multiple of its element size, so a payload of one type has no gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from paradiff.executor.payload import Payload, Piece
from paradiff.executor.sequence import Tokens

Node = Any
"""JSON form of a value: ``{"size": [...], "dtype": "float64"}`` where a tensor stands."""


def header_of(payloads: Sequence[Payload]) -> str:
    """Coordinates of every piece of ``payloads``, and what its tensors look like."""
    return json.dumps([[_piece_node(piece) for piece in payload] for payload in payloads])


def packed(payloads: Sequence[Payload]) -> Tensor:
    """Every tensor of ``payloads``, one after another: (bytes,) uint8, on the device of the first."""
    parts: list[Tensor] = []
    at = 0
    for leaf in _leaves([[piece.value for piece in payload] for payload in payloads]):
        gap = -at % leaf.element_size()
        if gap:
            parts.append(torch.zeros(gap, dtype=torch.uint8, device=leaf.device))
        flat = leaf.contiguous().view(-1)
        parts.append(
            flat.view(torch.uint8) if flat.numel() else flat.new_zeros(0).view(torch.uint8)
        )
        at += gap + leaf.numel() * leaf.element_size()
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)


def size_of(header: str) -> int:
    """Bytes that ``packed`` gives for the payloads of ``header``."""
    end = 0
    for node in _tensor_nodes(_parsed(header)):
        itemsize = _dtype(node).itemsize
        end += -end % itemsize + prod(node["size"]) * itemsize
    return end


def unpacked(header: str, buffer: Tensor) -> list[Payload]:
    """The payloads whose header and bytes came from elsewhere; their tensors are views of ``buffer``."""
    reader = _Reader(buffer)
    return [tuple(_piece(node, reader) for node in nodes) for nodes in _parsed(header)]


@lru_cache(4096)
def _parsed(header: str) -> Node:
    """Read once for all occurrences of an op."""
    return json.loads(header)


class _Reader:
    """Tensors of a buffer, in order."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._at = 0

    def next(self, node: Node) -> Tensor:
        dtype, size = _dtype(node), node["size"]
        start = self._at + -self._at % dtype.itemsize
        self._at = start + prod(size) * dtype.itemsize
        return self._buffer[start : self._at].view(dtype).view(size)


def _dtype(node: Node) -> torch.dtype:
    dtype = getattr(torch, node["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _piece_node(piece: Piece) -> Node:
    return {
        "span": piece.span,
        "point": piece.point,
        "branch": piece.branch,
        "weight": piece.weight,
        "role": piece.role,
        "value": _node(piece.value),
    }


def _piece(node: Node, reader: _Reader) -> Piece:
    return Piece(
        span=(node["span"][0], node["span"][1]),
        value=_value(node["value"], reader),
        point=node["point"],
        branch=node["branch"],
        weight=node["weight"],
        role=node["role"],
    )


def _node(value: Any) -> Node:
    if isinstance(value, Tensor):
        return {"size": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Tokens):
        return {"tokens": [_node(each) for each in value]}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_node(each) for each in value]}
    if value is None:
        return None
    raise TypeError(f"a payload holds a {type(value).__name__}, which cannot be sent")


def _value(node: Node, reader: _Reader) -> Any:
    if node is None:
        return None
    if "size" in node:
        return reader.next(node)
    ((kind, nodes),) = node.items()
    values = [_value(each, reader) for each in nodes]
    return {
        "tokens": lambda: Tokens(*values),
        "tuple": lambda: tuple(values),
        "list": lambda: values,
    }[kind]()


def _leaves(value: Any) -> Iterator[Tensor]:
    """Tensors of nested tuples and lists, in the order of ``_node``."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for each in value:
            yield from _leaves(each)


def _tensor_nodes(node: Node) -> Iterator[Node]:
    if isinstance(node, dict) and "size" in node:
        yield node
    elif isinstance(node, dict):
        if "value" in node:
            yield from _tensor_nodes(node["value"])
        else:
            for each in node.values():
                yield from _tensor_nodes(each)
    elif isinstance(node, list):
        for each in node:
            yield from _tensor_nodes(each)
