"""Which version of which tensor each stale strategy reads: plain loops over a toy transformer, float64.

Every function states the rule of one method as its released code has it: DistriFusion (arXiv 2402.19481,
mit-han-lab/distrifuser), PCPP (arXiv 2412.02962), PipeFusion (arXiv 2405.14430, xdit-project/xDiT),
AsyncDiff (arXiv 2406.06911, czg1225/AsyncDiff), ParaStep (arXiv 2505.14741). Nothing is about time, and
nothing comes from this project. Weights and noise are those of seed 0, drawn in the order below;
``KNOWN`` is what the rules were first worked out to with them (docs/strategies.md, section 21). Steps
are large on purpose, so that no wrong version goes unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPE = torch.float64
LAYERS, HIDDEN, HEADS, TOKENS, CHANNELS, STEPS = 4, 32, 4, 32, 4, 12
Pair = tuple[Tensor, Tensor]
_generator = torch.Generator().manual_seed(0)


def _drawn(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=DTYPE, generator=_generator)


def _weights(*sizes: int) -> Tensor:
    return _drawn(*sizes) / math.sqrt(sizes[0])


WEIGHTS = [
    {
        "q": _weights(HIDDEN, HIDDEN),
        "k": _weights(HIDDEN, HIDDEN),
        "v": _weights(HIDDEN, HIDDEN),
        "o": _weights(HIDDEN, HIDDEN),
        "up": _weights(HIDDEN, 4 * HIDDEN),
        "down": _weights(4 * HIDDEN, HIDDEN),
        "scale": _weights(1, HIDDEN),
    }
    for _ in range(LAYERS)
]
W_IN = _drawn(CHANNELS, HIDDEN) / 2
W_OUT = _weights(HIDDEN, CHANNELS)
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=DTYPE)
START = _drawn(TOKENS, CHANNELS)

KNOWN = {
    "displaced 4, 1": 0.1924,
    "pipefusion 4, 1": 0.2576,
    "asyncdiff 2, 1, 1": 0.3275,
    "asyncdiff 2, 1, 2": 0.6100,
    "parastep 2, 2": 0.0527,
    "parastep 4, 2": 0.1857,
}
"""Relative error against ``serial``, to four digits."""


def modulated(layer: int, x: Tensor, t: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,)) * (1 + WEIGHTS[layer]["scale"] * t)


def keys_values(layer: int, x: Tensor, t: Tensor) -> Pair:
    y = modulated(layer, x, t)
    return y @ WEIGHTS[layer]["k"], y @ WEIGHTS[layer]["v"]


def by_head(z: Tensor) -> Tensor:
    return z.view(-1, HEADS, HIDDEN // HEADS).transpose(0, 1)


def block(layer: int, x: Tensor, t: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One block on tokens ``x``, which attend to whatever keys and values the caller has."""
    w = WEIGHTS[layer]
    query = by_head(modulated(layer, x, t) @ w["q"])
    scores = query @ by_head(key).transpose(1, 2) / math.sqrt(HIDDEN // HEADS)
    attended = torch.softmax(scores, -1) @ by_head(value)
    x = x + attended.transpose(0, 1).reshape(-1, HIDDEN) @ w["o"]
    return x + torch.tanh(modulated(layer, x, t) @ w["up"]) @ w["down"]


def predicted(x: Tensor, t: Tensor, on_kv: Callable[[int, Pair], None] | None = None) -> Tensor:
    z = x @ W_IN
    for layer in range(LAYERS):
        pair = keys_values(layer, z, t)
        if on_kv is not None:
            on_kv(layer, pair)
        z = block(layer, z, t, *pair)
    return z @ W_OUT


def stepped(x: Tensor, prediction: Tensor, step: int) -> Tensor:
    """Euler, token by token."""
    return x + (TIMES[step + 1] - TIMES[step]) * prediction


def serial() -> Tensor:
    x = START
    for step in range(STEPS):
        x = stepped(x, predicted(x, TIMES[step]), step)
    return x


def displaced(
    n: int, warmup: int, see: Callable[[int, int, Pair], Pair | None] | None = None
) -> Tensor:
    """DistriFusion: steps 0 to ``warmup`` see all strips fresh, later ones others' of the step before.

    ``see(i, j, pair)``: what strip i sees of strip j in a stale step."""
    size, x, published = TOKENS // n, START, list[list[Pair]]()
    for step in range(STEPS):
        t, now = TIMES[step], []
        z = [part @ W_IN for part in x.split(size)]
        for layer in range(LAYERS):
            pairs = [keys_values(layer, part, t) for part in z]
            for i in range(n):
                if step <= warmup:
                    seen = list(pairs)
                else:
                    old = published[layer]
                    which = [pairs[j] if j == i else old[j] for j in range(n)]
                    visible = [see(i, j, p) if see else p for j, p in enumerate(which)]
                    seen = [pair for pair in visible if pair is not None]
                z[i] = block(layer, z[i], t, *(torch.cat(each) for each in zip(*seen, strict=True)))
            now.append(pairs)
        published, x = now, stepped(x, torch.cat([part @ W_OUT for part in z]), step)
    return x


def pcpp(n: int, warmup: int, portion: float) -> Tensor:
    """Of the strips beside its own, the nearest ``portion``; of others nothing."""
    size = TOKENS // n
    near = round(size * portion)

    def see(i: int, j: int, pair: Pair) -> Pair | None:
        if j == i:
            return pair
        if j == i - 1:
            return pair[0][size - near :], pair[1][size - near :]
        return (pair[0][:near], pair[1][:near]) if j == i + 1 else None

    return displaced(n, warmup, see)


def pipefusion(patches: int, warmup: int) -> Tensor:
    """Patch p sees patches up to its own of this step and those after it of the step before."""
    size, x = TOKENS // patches, START
    cache = [torch.zeros(2, TOKENS, HIDDEN, dtype=DTYPE) for _ in range(LAYERS)]
    for step in range(STEPS):
        t = TIMES[step]
        if step < warmup:

            def keep(layer: int, pair: Pair) -> None:
                cache[layer] = torch.stack(pair)

            x = stepped(x, predicted(x, t, keep), step)
            continue
        after = x.clone()
        for p in range(patches):
            own = slice(p * size, (p + 1) * size)
            z = x[own] @ W_IN
            for layer in range(LAYERS):
                cache[layer][:, own] = torch.stack(keys_values(layer, z, t))
                z = block(layer, z, t, *cache[layer])
            after[own] = stepped(x[own], z @ W_OUT, step)
        x = after
    return x


def asyncdiff(components: int, warmup: int, stride: int) -> Tensor:
    """Component c reads what component c - 1 gave a round before. With stride 2 a round at an odd step
    serves it and the next, at whose time the components compute; one more device evaluates the last
    component at its own time."""
    cuts = [round(j * LAYERS / components) for j in range(components + 1)]

    def part(c: int, z: Tensor, t: Tensor) -> Tensor:
        for layer in range(cuts[c], cuts[c + 1]):
            z = block(layer, z, t, *keys_values(layer, z, t))
        return z

    x, given = START, list[Tensor]()
    for step in range(STEPS):
        t, read = TIMES[step], [x @ W_IN, *given[:-1]]
        if step < warmup:
            given = []
            for c in range(components):
                given.append(part(c, given[-1] if given else x @ W_IN, t))
            out = given[-1]
        elif stride == 1:
            given = [part(c, read[c], t) for c in range(components)]
            out = given[-1]
        elif step % 2:
            out = part(components - 1, read[-1], t)
            ahead = TIMES[min(step + 1, STEPS - 1)]
            given = [part(c, read[c], ahead) for c in range(components)]
        else:
            out = given[-1]
        x = stepped(x, out @ W_OUT, step)
    return x


def parastep(degree: int, warmup: int) -> Tensor:
    """Rank r evaluates step r of a cycle, at its own latent; the first holds the one that counts."""
    latents, own = [START] * degree, [torch.empty(0)] * degree
    for step in range(STEPS):
        if step < warmup:
            own = [predicted(latents[0], TIMES[step])] * degree
            latents = [stepped(x, e, step) for x, e in zip(latents, own, strict=True)]
            continue
        r = (step - warmup) % degree
        own[r] = predicted(latents[r], TIMES[step])
        use = [own[r] if k in (0, r) else own[k] for k in range(degree)]
        latents = [stepped(x, e, step) for x, e in zip(latents, use, strict=True)]
        if r == degree - 1:
            latents = [latents[0]] * degree
    return latents[0]


def mixed_moments(
    mode: str, i: int, fresh: Sequence[Pair], stale: Sequence[Pair]
) -> tuple[Tensor, Tensor]:
    """Mean and mean of squares for strip i from those of all strips, as DistriFusion's modes have it."""

    def mean(moments: Sequence[Pair]) -> Pair:
        first, second = (sum(each) / len(moments) for each in zip(*moments, strict=True))
        return first, second

    if mode == "sync_gn":
        return mean(fresh)
    if mode == "stale_gn":
        return mean([fresh[j] if j == i else stale[j] for j in range(len(fresh))])
    assert mode == "corrected_async_gn"
    m, q = (mean(stale)[k] + fresh[i][k] - stale[i][k] for k in range(2))
    own = fresh[i][1] - fresh[i][0] ** 2
    variance = torch.where(q - m * m < 0, own, q - m * m)
    return m, variance + m * m
