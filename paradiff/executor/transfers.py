"""Transfers between ranks of one process: payloads change hands, nothing is copied.

The result must not depend on where the ranks live, so each call means here what it means between
processes: who gives what to whom, in the order of the op's ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from paradiff.executor.payload import Payload, reduced
from paradiff.graph import Instance, Op


def transfer(
    instance: Instance, reads: Sequence[tuple[int, Payload]], targets: Sequence[int]
) -> list[Payload]:
    """What an op writes to each of ``targets`` (ranks, one a write), from (rank, payload) reads."""
    op = instance.op
    sent = {r: tuple(chain.from_iterable(p for at, p in reads if at == r)) for r in op.ranks}
    if op.kind == "p2p":
        return _messages(op, reads, targets)
    if op.kind == "permute":
        before = dict(zip(op.ranks[1:] + op.ranks[:1], op.ranks, strict=True))
        return [sent[before[rank]] for rank in targets]
    if op.call == "all_gather":
        whole = tuple(chain.from_iterable(sent[r] for r in op.ranks))
        return [whole for _ in targets]
    if op.call == "all_reduce":
        total = reduced([sent[r] for r in op.ranks])
        return [total for _ in targets]
    if op.call == "all_to_all":
        return [
            tuple(p for r in op.ranks for p in shares(sent[r], len(op.ranks))[op.ranks.index(rank)])
            for rank in targets
        ]
    if op.call == "broadcast":
        return [sent[op.ranks[0]] for _ in targets]
    raise AssertionError(f"{op.name}: no strategy emits {op.call}")


def shares(own: Payload, n: int) -> list[Payload]:
    """What goes to each of ``n`` ranks in an all-to-all: one piece each, or of several in turn, as the
    phases of a two-phase exchange have them."""
    return [own[i::n] for i in range(n)]


def _messages(
    op: Op, reads: Sequence[tuple[int, Payload]], targets: Sequence[int]
) -> list[Payload]:
    """One message: what was read in parts arrives in the same parts."""
    payloads = [payload for _, payload in reads]
    if len(payloads) == len(targets):
        return payloads
    assert len(payloads) == 1, op.name
    return payloads * len(targets)
