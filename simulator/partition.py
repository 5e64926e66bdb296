"""Consecutive blocks on stages, so that the pipeline's period is as short as can be.

PipeEdge's dynamic programme (arXiv 2110.14895) over kinds of GPUs, with the number of
stages fixed, and with PipeFusion's way around: a patch of the next step waits until it has been through
all stages and back at the first. Pure arithmetic: it does not know models, specs or boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Partition:
    """Stage d holds ``counts[d]`` consecutive blocks and runs on a GPU of kind ``kinds[d]``.

    ``slowest_s``: seconds of the slowest stage or message. ``around_s``: of all stages and messages one
    after another, back to the first.
    """

    slowest_s: float
    around_s: float
    counts: tuple[int, ...]
    kinds: tuple[str, ...]

    def period_s(self, patches: int) -> float:
        """Seconds from one step to the next with ``patches`` under way (strategies.md 12.3, uneven):

            max(M slowest, around)

        Of the cycles of the event graph those that stay on one stage or link take M times its seconds a
        step, the one that a patch goes takes ``around``, and any mixture of them lies between.
        """
        return max(patches * self.slowest_s, self.around_s)


def partition(
    block_s: Mapping[str, Sequence[float]],
    have: Mapping[str, int],
    stages: int,
    send_s: Callable[[int, str, str], float] = lambda blocks, here, there: 0.0,
    fits: Callable[[int, int, str], bool] = lambda first, last, kind: True,
    after_s: Mapping[str, float] | None = None,
    *,
    patches: int | None = None,
    loop_s: Callable[[str, str], float] = lambda last, first: 0.0,
) -> Partition | None:
    """The best cut into ``stages`` stages; None where no cut fits.

    ``block_s[kind][i]``: seconds of block i on a GPU of that kind, of which there are ``have[kind]``.
    ``send_s(j, a, b)``: seconds of the message after j blocks, from kind a to kind b. ``fits(i, j, a)``:
    blocks [i, j) can live on one GPU of kind a. Best is the least ``period_s(patches)``, with the
    message ``loop_s(a, b)`` from the last stage to the first; without ``patches`` the least
    ``slowest_s``, and nothing goes back. Of equally good ones, that whose last stage is quickest at what
    comes after (``after_s`` by kind).

    With H(j, S, u) the best value for the first j blocks on GPUs S of which the last is of kind u:

        H(j, S + u, u) = min over i < j, v of max(H(i, S, v), send(i, v, u), sum of block_s[u] in [i, j))

    With ``patches``, H is the Pareto front of (that, the sum of all these), for each kind of first GPU.
    """
    kinds = list(have)
    blocks = len(next(iter(block_s.values())))
    until = {kind: list(accumulate(block_s[kind], initial=0.0)) for kind in kinds}
    best: dict[tuple[int, tuple[int, ...], int, int], list[Partition]] = {
        (0, (0,) * len(kinds), -1, -1): [Partition(0.0, 0.0, (), ())]
    }
    for stage in range(stages):
        reached: dict[tuple[int, tuple[int, ...], int, int], list[Partition]] = {}
        for (i, used, first, before), heads in best.items():
            for k, kind in enumerate(kinds):
                if used[k] == have[kind]:
                    continue
                more = (*used[:k], used[k] + 1, *used[k + 1 :])
                arrives_s = send_s(i, kinds[before], kind) if stage else 0.0
                begins = k if stage == 0 and patches is not None else first
                last = blocks if stage == stages - 1 else blocks - (stages - 1 - stage)
                for j in range(blocks if stage == stages - 1 else i + 1, last + 1):
                    if not fits(i, j, kind):
                        continue
                    mine_s = until[kind][j] - until[kind][i]
                    front = reached.setdefault((j, more, begins, k), [])
                    for head in heads:
                        around_s = 0.0 if patches is None else head.around_s + arrives_s + mine_s
                        slowest_s = max(head.slowest_s, arrives_s, mine_s)
                        if not any(
                            p.slowest_s <= slowest_s and p.around_s <= around_s for p in front
                        ):
                            found = (*head.counts, j - i), (*head.kinds, kind)
                            _keep(front, Partition(slowest_s, around_s, *found))
        best = reached
    later = after_s or dict.fromkeys(kinds, 0.0)
    whole = _closed((p for front in best.values() for p in front), patches, loop_s)
    return min(whole, key=lambda p: (p.period_s(patches or 1), later[p.kinds[-1]]), default=None)


def _keep(front: list[Partition], new: Partition) -> None:
    """Put ``new`` into a Pareto front, for those that it dominates."""
    front[:] = [p for p in front if p.slowest_s < new.slowest_s or p.around_s < new.around_s]
    front.append(new)


def _closed(
    found: Iterable[Partition], patches: int | None, loop_s: Callable[[str, str], float]
) -> Iterable[Partition]:
    """Each with the message from its last stage to its first."""
    if patches is None:
        return found
    back = ((p, loop_s(p.kinds[-1], p.kinds[0])) for p in found)
    return (replace(p, slowest_s=max(p.slowest_s, s), around_s=p.around_s + s) for p, s in back)
