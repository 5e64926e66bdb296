"""What a schedule adds to the kernels of the network: copies, and GroupNorm taken apart.

Attention wants K and V side by side, a convolution its rows and halo, a gathered list leaves the
communicator's flat buffer (torch's ``ProcessGroupNCCL::allgather`` copies each of its n tensors
out), and a published tensor enters a packed one. A GroupNorm whose moments are exchanged is no
longer one kernel.

Counted line by line in the released code: distrifuser (``DistriSelfAttentionPP``,
``DistriConv2dPP``, ``DistriGroupNorm``, ``PatchParallelismCommManager.enqueue``; attn.py at
96431e3) and xDiT (``CacheManager.update_and_get_kv_cache``, ``xFuserJointAttnProcessor2_0``). PCPP
is distrifuser's code with another attention. Not counted: one ``F.pad`` more before convolutions on
the first and last strip, and two ``cat`` more of all K and V in Flux's stages, which rotate after
they have joined the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from paradiff.graph import Shape
from paradiff.strategies.builder import MOMENT_BYTES, Builder, Copies

GroupNorm = Literal["reduced", "gathered", "corrected"]
"""What becomes of moments: all-reduced; gathered and added up; that, corrected by what is fresh here."""
GN_KERNELS: Mapping[GroupNorm, int] = {"reduced": 13, "gathered": 13, "corrected": 17}
"""Kernels of a GroupNorm in parts but for the one that it replaces: mean, x^2, mean, stack, / n,
square, minus, Bessel, plus eps, root, x - mean, / std, * weight, + bias; corrected: also the own
variance (square, minus) in place of a negative one (compare, choose)."""
CORRECTION = 2
"""Kernels that correct a stale mean: the own moments minus those of the step before, added."""
GN_PASSES = 5
"""What those kernels read and write beyond the norm (each element once in, once out): seven reads and
five writes of the activation, 12 passes against 2."""


def strip_copies(
    build: Builder, shape: Shape, *, fresh: bool, sent: tuple[str, ...], norm: GroupNorm | None
) -> Mapping[int, Copies]:
    """Segment -> what a strip of ``shape`` adds there.

    ``fresh``: exchanges are blocking; what is gathered, a list of ``pp`` parts, is copied out of the
    communicator's buffer. Otherwise the parts lie where the step before left them. ``sent``: kinds of
    points that are queued for the next step. ``norm``: what becomes of moments; None: they stay local.
    """
    n = build.mesh.pp
    found: dict[int, Copies] = {}
    for at, point in build.points.items():
        if n == 1 or (point.kind == "moments" and norm is None):
            continue
        if norm is not None and point.kind == "moments":
            (own, moved), joined = _moments(build, at, shape), 0
            parts, moved = GN_KERNELS[norm], GN_PASSES * moved
            if norm != "reduced":
                parts += n * (1 + fresh) + CORRECTION * (norm == "corrected" and not fresh)
        elif point.kind == "kv":
            own = build.nbytes(point.elements, shape)
            whole = build.nbytes(point.elements, shape._replace(r=shape.k))
            parts, moved, joined = (1 + n, 4 * whole, whole) if fresh else (1, 2 * whole, whole)
        else:
            own, joined = build.nbytes(point.elements, shape), _convolved(build, at, shape)
            parts, moved = 2 + n * fresh, 2 * (joined + own * (1 + n * fresh))
        published = point.kind in sent
        found[at] = Copies(parts + published, moved + 2 * own * published, joined)
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
        more = 2 * max(0, whole - own) if point.joint_text else 0
        found[at] = Copies(2, 4 * own + more, whole if more else 0)
    return found
