"""What gloo puts on the wire for a collective: its algorithms, as flows of which some wait for others.

Read in its source (github.com/pytorch/gloo, ``gloo/*.cc``) and seen in counters and times of hosts in
namespaces (docs/laboratory.md). In the order of the group's ranks, whatever the machine looks like:

=========== =====================================================================================
all_gather  ring to the next rank, in halves, two under way (allgather.cc); two ranks exchange
all_reduce  ring to the rank before: reduce-scatter, all-gather, two segments under way (allreduce.cc)
broadcast   chain from the root in pieces: a rank passes on a piece when it has come
all_to_all  pairwise exchange: in round i to rank + i, from rank - i; the next when both have gone
=========== =====================================================================================

Of the last two, and of an all-gather of two, the executor makes messages with receives posted first
(``paradiff.executor.transports``), and that is what is modelled: gloo holds a message back until its
receive is posted, so a round begins when both its ends are through with the one before. gloo's own
all-to-all posts sends before receives, and both directions of a pair of ranks share one connection in
order, so a rank that comes a little later is heard only when all it sends has gone: it runs at between
half and full duplex, as it happens. Its own broadcast is a binomial tree whose ranks send all to all
their children at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from paradiff.graph import BROADCAST_PIECE
from simulator.network import Flow


def flows(call: str, devices: Sequence[int], size: float) -> tuple[int, tuple[Flow, ...]]:
    """Latency steps and flows of one call; ``devices`` by rank, of a broadcast as its op names them.

    Three devices, a broadcast of two pieces: the first from the root to the second, then at the same
    time the other piece to the second and the first to the third. Payloads are in the conventions of
    ``paradiff.graph.traffic``.
    """
    n = len(devices)
    if n < 2 or size <= 0:
        return 0, ()
    if call == "broadcast":
        return n - 1, _chain(devices, size)
    if call == "all_to_all":
        return n - 1, _rounds(devices, size / n)
    if call == "all_gather":
        return n - 1, _ring(devices, (n - 1) * size)
    if call == "all_reduce":
        return 2 * (n - 1), _ring(devices[::-1], 2 * (n - 1) / n * size)
    return n - 1, _ring(devices, (n - 1) / n * size)


def _ring(devices: Sequence[int], nbytes: float) -> tuple[Flow, ...]:
    return tuple(
        Flow(a, b, nbytes) for a, b in zip(devices, [*devices[1:], devices[0]], strict=True)
    )


def _chain(devices: Sequence[int], size: float) -> tuple[Flow, ...]:
    """Of every link the first piece, which waits for that of the link before, then the rest."""
    links = list(pairwise(devices))
    first = min(size, BROADCAST_PIECE)
    found = [Flow(a, b, first, after=(k - 1,) * (k > 0)) for k, (a, b) in enumerate(links)]
    if size > first:
        found += [Flow(a, b, size - first, after=(k,)) for k, (a, b) in enumerate(links)]
    return tuple(found)


def _rounds(devices: Sequence[int], share: float) -> tuple[Flow, ...]:
    n = len(devices)

    def before(step: int, i: int) -> tuple[int, ...]:
        """What both ends of the message of i sent and took in the round before."""
        if step == 1:
            return ()
        j = i + step
        senders = {rank % n for end in (i, j) for rank in (end, end - (step - 1))}
        return tuple((step - 2) * n + sender for sender in sorted(senders))

    return tuple(
        Flow(devices[i], devices[(i + step) % n], share, after=before(step, i))
        for step in range(1, n)
        for i in range(n)
    )
