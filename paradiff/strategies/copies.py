"""What a schedule adds to the kernels of the network: copies, and GroupNorm taken apart.

Attention wants K and V side by side, a convolution its rows and halo, a gathered list leaves the
communicator's flat buffer, and a published tensor enters a packed one. A GroupNorm whose moments are
exchanged is no longer one kernel. Counted in the released code: distrifuser
(``modules/pp/{attn,conv2d,groupnorm}.py``, ``utils.py`` at 96431e3) and xDiT
(``core/cache_manager/cache_manager.py``, ``layers/attention_processor.py`` at 040bbda).
"""

from __future__ import annotations

from collections.abc import Mapping

from paradiff.graph import Shape
from paradiff.strategies.builder import MOMENT_BYTES, Builder, Copies

CORRECTED_GN, PLAIN_GN = 19, 14
"""Kernels of a GroupNorm in parts, but for the one that it replaces and the sum over n ranks: mean, x^2,
mean, stack, [minus own stale, plus], / n, square, minus, [square, minus, compare, choose], Bessel,
plus eps, root, x - mean, / std, * weight, + bias."""
GN_PASSES = 5
"""What those kernels read and write beyond the norm (each element once in, once out): seven reads and
five writes of the activation, 12 passes against 2."""


def strip_copies(
    build: Builder, shape: Shape, *, fresh: bool, sent: tuple[str, ...], corrected: bool = False
) -> Mapping[int, Copies]:
    """Segment -> what a strip of ``shape`` adds there.

    ``fresh``: the exchange is blocking, its result a list of ``pp`` parts; otherwise the parts lie where
    the step before left them. ``sent``: kinds of points that are published.
    """
    n = build.mesh.pp
    found: dict[int, Copies] = {}
    for at, point in build.points.items():
        if n == 1 or (point.kind == "moments" and "moments" not in sent):
            continue
        if point.kind == "moments":
            parts = (CORRECTED_GN if corrected else PLAIN_GN) + n
            own, moved = _moments(build, at, shape)
            moved *= GN_PASSES
        elif point.kind == "kv":
            own = build.nbytes(point.elements, shape)
            whole = build.nbytes(point.elements, shape._replace(r=shape.k))
            parts, moved = (1 + n, 4 * whole) if fresh else (1, 2 * whole)
        else:
            own = build.nbytes(point.elements, shape)
            parts, moved = 2, 2 * (_convolved(build, at, shape) + own)
        published = point.kind in sent and not fresh
        found[at] = Copies(parts + published, moved + 2 * own * published)
    return found


def _moments(build: Builder, at: int, shape: Shape) -> tuple[int, int]:
    """Bytes of the moments at a GroupNorm, and of what the norm reads and writes."""
    bound = shape._asdict()
    norms = (k for k in build.denoiser.segments[at].kernels if k.kind == "norm")
    moved = sum(k.count * k.sizes(bound)[0] for k in norms) * build.element_bytes
    return build.points[at].elements(bound) * MOMENT_BYTES, moved


def _convolved(build: Builder, at: int, shape: Shape) -> int:
    """Bytes that the convolution at ``at`` reads: its rows and their halo."""
    convs = [k for k in build.denoiser.segments[at].kernels if k.kind == "conv"]
    return convs[0].sizes(shape._asdict())[3] * build.element_bytes if convs else 0


def cache_copies(build: Builder, shape: Shape, heads: int) -> Mapping[int, Copies]:
    """Segment -> what a PipeFusion stage adds for a patch of ``shape``.

    Its K and V are laid side by side and written into the cache; where the text joins the keys, all of
    K and all of V are copied once more (the network's own kernels copy the patch's share of them).
    ``heads`` divides the cached heads.
    """
    found = {}
    for at, point in build.denoiser.points("kv"):
        own = build.nbytes(point.elements, shape)
        whole = build.nbytes(point.elements, shape._replace(r=shape.k)) // heads
        joined = 2 * max(0, whole - own) if point.joint_text else 0
        found[at] = Copies(2, 4 * own + joined)
    return found
