"""Where to cut a stack of blocks over GPUs that differ, so that the slowest stage is as fast as can be.

PipeEdge's dynamic programme (arXiv 2110.14895; STRATEGIES 18.7) over kinds of GPUs, with the number of
stages fixed. Pure arithmetic: it does not know models, specs or boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Partition:
    """Stage d holds ``counts[d]`` consecutive blocks and runs on a GPU of kind ``kinds[d]``.

    ``slowest_s``: seconds of the slowest stage or of the slowest message between two of them.
    """

    slowest_s: float
    counts: tuple[int, ...]
    kinds: tuple[str, ...]


def partition(
    block_s: Mapping[str, Sequence[float]],
    have: Mapping[str, int],
    stages: int,
    send_s: Callable[[int, str, str], float] = lambda blocks, here, there: 0.0,
    fits: Callable[[int, int, str], bool] = lambda first, last, kind: True,
    after_s: Mapping[str, float] | None = None,
) -> Partition | None:
    """The best cut into ``stages`` stages; None where no cut fits.

    ``block_s[kind][i]``: seconds of block i on a GPU of that kind, of which there are ``have[kind]``.
    ``send_s(j, a, b)``: seconds of the message after j blocks, from kind a to kind b. ``fits(i, j, a)``:
    blocks [i, j) can live on one GPU of kind a. Of equally good ones, that whose last stage is quickest
    at what comes after (``after_s`` by kind).

    With H(j, S, u) the best value for the first j blocks on GPUs S of which the last is of kind u:

        H(j, S + u, u) = min over i < j, v of max(H(i, S, v), send(i, v, u), sum of block_s[u] in [i, j))
    """
    kinds = list(have)
    blocks = len(next(iter(block_s.values())))
    until = {kind: list(accumulate(block_s[kind], initial=0.0)) for kind in kinds}
    best: dict[tuple[int, tuple[int, ...], int], Partition] = {
        (0, (0,) * len(kinds), -1): Partition(0.0, (), ())
    }
    for stage in range(stages):
        reached: dict[tuple[int, tuple[int, ...], int], Partition] = {}
        for (i, used, before), head in best.items():
            for k, kind in enumerate(kinds):
                if used[k] == have[kind]:
                    continue
                more = (*used[:k], used[k] + 1, *used[k + 1 :])
                arrives_s = send_s(i, kinds[before], kind) if stage else 0.0
                least = max(head.slowest_s, arrives_s)
                last = blocks if stage == stages - 1 else blocks - (stages - 1 - stage)
                for j in range(blocks if stage == stages - 1 else i + 1, last + 1):
                    slowest_s = max(least, until[kind][j] - until[kind][i])
                    known = reached.get((j, more, k))
                    if known is not None and known.slowest_s <= slowest_s:
                        continue
                    if fits(i, j, kind):
                        reached[j, more, k] = Partition(
                            slowest_s, (*head.counts, j - i), (*head.kinds, kind)
                        )
        best = reached
    later = after_s or dict.fromkeys(kinds, 0.0)
    return min(best.values(), key=lambda p: (p.slowest_s, later[p.kinds[-1]]), default=None)
