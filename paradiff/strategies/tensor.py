"""Layer level: ranks that share the weights of every layer (tensor parallelism, strategies.md 4).

Each has some heads of every attention, some inner channels of every feed-forward and resnet, and the
whole stream between them, which is why every layer ends in an all-reduce. Which sums these are, the
profile says (``Stage.totals``); ``Forward.run`` emits them on every forward of a mesh whose ``tp`` is
above 1, whatever the strategy. Here is what may be divided by how much.
"""

from __future__ import annotations

from collections.abc import Iterator

from paradiff.profiles import KERNEL_DIMS, Profile
from paradiff.strategies.builder import Builder, Infeasible

DIVIDED_DIMS = {"gemm": ("n", "k"), "conv": ("n", "k")}


def divided_sizes(profile: Profile) -> Iterator[tuple[str, int]]:
    """(what it is, its size) of everything that tensor parallelism divides."""
    for _, point in profile.denoiser.points("kv"):
        yield "attention heads", point.heads
    for _, point in profile.denoiser.points("moments"):
        yield "groups of a GroupNorm", point.elements.terms[0][0] // 2
    for segment in profile.denoiser.segments:
        for kernel in segment.kernels:
            for name in DIVIDED_DIMS.get(kernel.kind, ()):
                for size in kernel.dims[KERNEL_DIMS[kernel.kind].index(name)].shared:
                    yield "channels", size


def check_tensor(build: Builder) -> None:
    """Raise Infeasible, with the nearest legal degree, unless the mesh's divides all that it must.

    Heads are never split and every rank gets as many: diffusers' rule (section 4.5).
    """
    n, name = build.mesh.tp, build.profile.name
    if n == 1:
        return
    sizes = dict.fromkeys(divided_sizes(build.profile))
    for what, size in sizes:
        if size % n:
            legal = [d for d in range(1, size + 1) if all(s % d == 0 for _, s in sizes)]
            near = [f"tensor={max(d for d in legal if d < n)}"]
            near += [f"tensor={d}" for d in legal if d > n][:1]
            raise Infeasible(
                f"tensor={n}: the {size} {what} of {name} do not divide by {n}", " or ".join(near)
            )
    if not any(True for _ in build.denoiser.totals()):
        raise Infeasible(
            f"tensor={n}: the profile of {name} does not say how its weights are divided (an"
            " old trace, or a model of two heads)",
            "tensor=1",
        )


def widest_tensor(profile: Profile, most: int) -> int:
    """The largest legal degree up to ``most``."""
    sizes = {size for _, size in divided_sizes(profile)}
    return max(d for d in range(1, most + 1) if all(size % d == 0 for size in sizes))
