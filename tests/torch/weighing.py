"""Runs whose transfers are weighed: what is really sent has the bytes that the op is priced at.

These are the bytes of the packed payloads, which is what ``transports`` sends. Moments and sums of
squares are priced in float32, and have the type of the run where that is wider.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from paradiff.executor import interpreter
from paradiff.executor.packing import packed
from paradiff.executor.payload import Payload
from paradiff.executor.transports import Reads
from paradiff.graph import Instance, Op

FLOAT32_BYTES = 4


@contextmanager
def weighed() -> Iterator[Counter[str]]:
    """Every run in here, all ranks in one process, is weighed; how many transfers of each call were."""
    found = Counter[str]()

    class Weighed(interpreter._Run):
        def _transfer(self, instance: Instance) -> None:
            op, sent = instance.op, defaultdict[int, list[Payload]](list)
            transfer = self.transfer

            def noting(instance: Instance, reads: Reads, targets: Sequence[int]) -> list[Payload]:
                for rank, payload in reads:
                    sent[rank].append(payload)
                return transfer(instance, reads, targets)

            self.transfer = noting
            super()._transfer(instance)
            self.transfer = transfer
            speaks_alone = op.kind == "p2p" or op.call == "broadcast"
            senders = op.ranks[:1] if speaks_alone else op.ranks
            weights = {rank: weight(op, sent[rank]) for rank in senders}
            assert weights == dict.fromkeys(senders, op.nbytes), (op.name, op.nbytes, weights)
            found[op.call or op.kind] += 1

    with mock.patch.object(interpreter, "_Run", Weighed):
        yield found


def weight(op: Op, payloads: list[Payload]) -> int:
    """Bytes of what one rank sends, with what is priced in float32 as if it were."""
    surplus = sum(
        piece.value.nbytes - piece.value.numel() * min(piece.value.itemsize, FLOAT32_BYTES)
        for payload in payloads
        for piece in payload
        if is_moments(piece.point, piece.value) or "/squares" in op.name
    )
    return len(packed(payloads)) - surplus


def is_moments(point: int | None, value: object) -> bool:
    """K and V and the rows of a halo are pairs; moments are one tensor, (2, b, g)."""
    return point is not None and isinstance(value, Tensor)
