"""Model profiles: what one forward of a real diffusers model costs, as functions of its shape.

A profile is traced once from the unmodified diffusers class (``paradiff.models``) and shipped as
JSON. It lists **segments**, the stretches of the forward between **exchange points** (places where a
strategy may need another rank's data), and in each segment its **kernels** with dimensions that are
exact functions of the shape. This file knows no torch, no time and no hardware.

Symbols of every expression (all non-negative integers):

========= =============================================================================
``b``     batch of one network call: requests x guidance branches
``f``     latent frames (1 for images)
``r``     latent rows that this rank computes (its strip)
``w``     latent columns
``k``     latent rows whose keys are visible (``k == r`` when the latent is whole)
``t s``   tokens of the first and of the second text stream
``h``     how many neighbours lend halo rows: 0, 1 or 2
``p``     ranks that share heads and channels (tensor parallelism); a shape may leave it out: 1
========= =============================================================================

An atom is a symbol with an optional level: ``r4`` is ``ceil(r / 4)``. An expression is a sum or
difference of products, for example ``320*b*r2*w2 + 64*b*t`` or ``2*f2 - f`` (1 iff f is odd).
``p`` alone divides: ``1280*b*t/p`` (exactly, at every degree that ``paradiff.strategies`` admits).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from operator import gt
from pathlib import Path
from typing import Any, Literal, get_args

from paradiff.config import printable

SYMBOLS = "bfrwktsh"
KERNEL_DIMS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("batch", "m", "n", "k"),
    "conv": ("m", "n", "k", "input_elements"),
    "attention": ("batch", "heads", "q", "keys", "head_dim", "value_dim"),
    "norm": ("elements",),
    "elementwise": ("elements",),
}
"""Dimensions of each kernel kind. ``elements`` counts those read plus those written. A convolution
is its implicit GEMM: m output positions (batch included), n output channels, k = input channels per
group x kernel volume."""

PointKind = Literal["kv", "halo", "moments"]
TotalKind = Literal["sum", "squares"]


class InvalidProfile(ValueError):
    """A profile file that does not say what a profile must say."""


@dataclass(frozen=True, slots=True)
class Expr:
    """A sum of products over levelled symbols: ``((coefficient, ((symbol, level), ...)), ...)``."""

    terms: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]

    def __call__(self, shape: Mapping[str, int]) -> int:
        """Value at ``shape`` (symbol -> integer). Raises KeyError for a symbol it lacks."""
        total = 0
        for coefficient, atoms in self.terms:
            product = coefficient
            for symbol, level in atoms:
                if symbol == "p":  # comes last
                    product //= shape.get("p", 1)
                else:
                    product *= -(-shape[symbol] // level)
            total += product
        return total

    def __str__(self) -> str:
        def term(coefficient: int, atoms: tuple[tuple[str, int], ...]) -> str:
            names = [f"{s}{level if level > 1 else ''}" for s, level in atoms if s != "p"]
            product = "*".join([str(coefficient)] * (coefficient != 1 or not names) + names)
            return product + "/p" * (len(atoms) - len(names))

        return " + ".join(term(*each) for each in self.terms).replace("+ -", "- ") or "0"

    @property
    def shared(self) -> tuple[int, ...]:
        """Coefficients of the terms that ``p`` divides."""
        return tuple(c for c, atoms in self.terms if ("p", 1) in atoms)


@cache
def parse_expr(text: str) -> Expr:
    """Read an expression such as ``2*b*r2*w2 + 77*b``. Raises InvalidProfile."""
    terms = []
    for part in text.replace(" ", "").replace("-", "+-").removeprefix("+").split("+"):
        coefficient, atoms = -1 if part.startswith("-") else 1, []
        for factor in part.removeprefix("-").removesuffix("/p").split("*"):
            level = factor[1:] or "1"
            if factor.isdecimal():
                coefficient *= int(factor)
            elif factor and factor[0] in SYMBOLS and level.isdecimal() and int(level):
                atoms.append((factor[0], int(level)))
            else:
                raise InvalidProfile(f"expression {text!r}: cannot read {factor!r}")
        atoms += [("p", 1)] * part.endswith("/p")
        if coefficient:
            terms.append((coefficient, tuple(atoms)))
    return Expr(tuple(terms))


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kind of kernel launch, ``count`` times, with dimensions as KERNEL_DIMS names them."""

    kind: str
    count: int
    dims: tuple[Expr, ...]

    def sizes(self, shape: Mapping[str, int]) -> list[int]:
        """The dimensions at ``shape``.

        Two optional symbols concern attention alone: ``u`` divides the heads (Ulysses), and ``j`` is
        how many text tokens are among the keys (default ``t``; a ring sees them in one iteration).
        """
        d = [dim(shape) for dim in self.dims]
        if self.kind == "attention":
            d[1] //= shape.get("u", 1)
            if shape.get("j", shape["t"]) != shape["t"]:
                d[3] = self.dims[3]({**shape, "t": shape["j"]})
        return d

    def flops(self, shape: Mapping[str, int]) -> int:
        """Floating-point operations (2 per multiply-add) of all ``count`` launches."""
        d = self.sizes(shape)
        if self.kind == "gemm":
            return 2 * self.count * d[0] * d[1] * d[2] * d[3]
        if self.kind == "conv":
            return 2 * self.count * d[0] * d[1] * d[2]
        if self.kind == "attention":
            return 2 * self.count * d[0] * d[1] * d[2] * d[3] * (d[4] + d[5])
        return 0


@dataclass(frozen=True, slots=True)
class Point:
    """An exchange point: what lies just before the segment that carries it.

    ``elements`` is what this rank publishes there: K and V of its image rows (``kv``), its first and
    last ``pad`` input rows (``halo``, both sides together), its mean and mean of squares (``moments``,
    always 4 bytes each). ``heads`` and ``head_dim`` are those of a ``kv`` point; ``joint_text`` says
    that text tokens are part of the same attention.
    """

    kind: PointKind
    elements: Expr
    heads: int = 0
    head_dim: int = 0
    joint_text: bool = False


@dataclass(frozen=True, slots=True)
class Total:
    """What ranks that share a layer's weights add up, just after the segment that carries it.

    Each has ``elements`` of partial sums of an output (``sum``), or of sums of squares over its heads
    for a norm over all of them (``squares``, always 4 bytes each).
    """

    kind: TotalKind
    elements: Expr


@dataclass(frozen=True, slots=True)
class Segment:
    """Kernels between two exchange points.

    A segment whose point is ``kv`` holds the attention kernel alone, so that sequence parallelism can
    exchange before and after it. ``weights`` counts parameters first used here, ``shared`` those of
    them that ranks divide under tensor parallelism; ``live`` the elements alive at the segment's peak,
    its inputs included. ``projected``: launches of each of ``kernels`` until V of the next ``kv`` point
    has been projected, where that is in this segment and launches follow it before the point.
    """

    name: str
    kernels: tuple[Kernel, ...]
    weights: int
    live: Expr
    point: Point | None = None
    total: Total | None = None
    shared: int = 0
    projected: tuple[int, ...] = ()

    def until_values(self) -> Segment:
        """What lies before V has been projected; all parameters count here."""
        return replace(self, kernels=self._launched(self.projected), total=None, projected=())

    def from_values(self) -> Segment:
        """What follows V's projection."""
        left = (k.count - n for k, n in zip(self.kernels, self.projected, strict=True))
        return replace(
            self, kernels=self._launched(left), weights=0, shared=0, point=None, projected=()
        )

    def _launched(self, counts: Iterable[int]) -> tuple[Kernel, ...]:
        pairs = zip(self.kernels, counts, strict=True)
        return tuple(replace(kernel, count=count) for kernel, count in pairs if count)

    def held(self, ranks: int) -> int:
        """Parameters on the first of ``ranks`` ranks that share its weights."""
        return self.weights - self.shared + self.shared // ranks


@dataclass(frozen=True, slots=True)
class Cut:
    """A module whose output may cross ranks (a transformer block, a U-Net sub-block).

    It covers segments ``lo`` to ``hi`` (exclusive). ``out`` counts the elements of its whole output
    tuple, ``text_out`` the part of them that is the text stream. ``parent`` names the enclosing
    U-Net block (itself where there is none).
    """

    name: str
    parent: str
    lo: int
    hi: int
    out: Expr
    text_out: Expr


@dataclass(frozen=True, slots=True)
class Stage:
    """One module of the pipeline: ``denoiser``, ``text_encoder``, ``vae``, ``scheduler``, ...

    ``repeat`` is how often the segments run for one request (VAE chunks, say). ``params`` counts all
    parameters of the module, used or not. ``shape`` overrides symbols (a chunk's frame count).
    ``fp32``: of its parameters those that stay in fp32 where fp16 is asked for (transformers'
    ``_keep_in_fp32_modules``: the second matrix of each feed-forward of a T5).
    """

    name: str
    segments: tuple[Segment, ...]
    params: int
    repeat: Expr
    cuts: tuple[Cut, ...] = ()
    parents: tuple[tuple[str, Expr], ...] = ()
    shape: tuple[tuple[str, Expr], ...] = ()
    fp32: int = 0

    def bind(self, shape: Mapping[str, int]) -> dict[str, int]:
        """``shape`` with this stage's own symbols put in."""
        return {**shape, **{symbol: expr(shape) for symbol, expr in self.shape}}

    def flops(self, shape: Mapping[str, int]) -> int:
        """Floating-point operations of one request's worth of this stage."""
        bound = self.bind(shape)
        once = sum(k.flops(bound) for segment in self.segments for k in segment.kernels)
        return once * self.repeat(shape)

    def covered(self, ranges: Iterable[tuple[int, int]], values: str = "") -> Iterator[Segment]:
        """Segments of ``ranges``, the last or first of them in part as ``Work.values`` says."""
        for lo, hi in ranges:
            own = self.segments[lo:hi]
            if values == "until":
                own = (*own, self.segments[hi].until_values())
            elif values == "from":
                own = (own[0].from_values(), *own[1:])
            yield from own

    def projections(self) -> dict[int, int]:
        """``kv`` point -> the segment before it in which its V has been projected, where that is known
        and launches follow it."""
        found, seen = {}, None
        for index, segment in enumerate(self.segments):
            if segment.point is not None and segment.point.kind == "kv" and seen is not None:
                found[index], seen = seen, None
            if segment.projected:
                seen = index
        return found

    def points(self, *kinds: str) -> Iterator[tuple[int, Point]]:
        """(segment index, point) of every exchange point, of the given kinds if any are given."""
        for index, segment in enumerate(self.segments):
            if segment.point is not None and (not kinds or segment.point.kind in kinds):
                yield index, segment.point

    def totals(self) -> Iterator[tuple[int, Total]]:
        """(index of the segment before it, what) of every sum that tensor parallelism needs."""
        for index, segment in enumerate(self.segments):
            if segment.total is not None:
                yield index, segment.total


@dataclass(frozen=True, slots=True)
class Geometry:
    """From pixels (or mel bins, or frames) to the latent, and what a network call takes."""

    channels: int
    scale: int
    temporal_scale: int
    row_multiple: int
    """A strip's rows must be a multiple of this: the patch size, or 2^(levels-1) of a U-Net."""
    text_tokens: tuple[int, ...]
    guidance: Literal["cfg", "embedded", "none"]
    """``cfg``: two evaluations a step; ``embedded``: distilled, one evaluation."""
    frame_multiple: int = 1
    """Latent frames of a patch. The loop adds frames until they divide; the VAE decodes without them."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything the planner knows of a model. ``kind`` is ``unet`` or ``transformer``.

    ``stages`` run in this order: text encoders, denoiser (once a step), VAE and after; ``scheduler``
    and ``guidance`` are the elementwise work of a step. ``text_mode`` of a joint-text transformer
    says how PipeFusion treats its text (``patch0_frozen`` or ``per_patch``), else None.
    ``asyncdiff`` holds published component tables: degree -> the owner of each cut, in order.
    ``skips`` are the long skip connections of a transformer: pairs of cuts (indices), where the first
    one's output is an input of the second, too.
    """

    name: str
    kind: Literal["unet", "transformer"]
    source: Mapping[str, Any]
    geometry: Geometry
    defaults: Mapping[str, int]
    stages: Mapping[str, Stage]
    text_mode: str | None
    asyncdiff: Mapping[int, tuple[int, ...]]
    skips: tuple[tuple[int, int], ...] = ()

    @property
    def denoiser(self) -> Stage:
        return self.stages["denoiser"]

    def share(self, ranks: int) -> Profile:
        """The same work with the weights that the first of ``ranks`` ranks holds that share them."""
        whole = self.denoiser
        own = tuple(replace(s, weights=s.held(ranks), shared=0) for s in whole.segments)
        others = sum(s.weights for s in whole.segments) - sum(s.weights for s in own)
        denoiser = replace(whole, segments=own, params=whole.params - others)
        return self if ranks == 1 else replace(self, stages={**self.stages, "denoiser": denoiser})

    def latent_shape(self, height: int, width: int, frames: int, batch: int) -> dict[str, int]:
        """Symbols of one whole network call without guidance: the latent of ``batch`` requests.

        Raises ValueError where the size does not divide into latent rows and columns.
        """
        g = self.geometry
        for axis, size in (("height", height), ("width", width)):
            step = g.scale * (g.row_multiple if self.kind == "transformer" else 1)
            if size <= 0 or size % step:
                lower = max(step, size // step * step)
                raise ValueError(
                    f"{axis} {size}: {self.name} takes multiples of {step}; "
                    f"nearest {lower} or {lower + step}"
                )
        if g.temporal_scale > 1 and (frames - 1) % g.temporal_scale:
            raise ValueError(
                f"frames {frames}: {self.name} takes {g.temporal_scale} n + 1; "
                f"nearest {(frames - 1) // g.temporal_scale * g.temporal_scale + 1}"
            )
        if self.defaults.get("frames") == 1 and frames != 1:
            raise ValueError(f"frames {frames}: {self.name} makes single images; nearest 1")
        rows = height // g.scale
        text = (*g.text_tokens, 0, 0)
        shape = {
            "b": batch,
            "f": (frames - 1) // g.temporal_scale + 1,
            "r": rows,
            "w": width // g.scale,
            "k": rows,
            "t": text[0],
            "s": text[1],
            "h": 0,
        }
        for stage in self.stages.values():
            if stage.repeat(shape) < 0:
                raise ValueError(
                    f"frames {frames}: too few for the {stage.name} of {self.name}; "
                    f"nearest {frames + g.temporal_scale}"
                )
        return shape


# ------------------------------------------------------------------------------------------ JSON

SCHEMA = "paradiff.profile/1"


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """The JSON form. Kernel lists that recur (identical blocks) are stored once."""
    table: dict[tuple[Kernel, ...], int] = {}

    def segment(each: Segment) -> dict[str, Any]:
        index = table.setdefault(each.kernels, len(table))
        out: dict[str, Any] = {"name": each.name, "kernels": index, "weights": each.weights}
        out["live"] = str(each.live)
        if each.point is not None:
            p = each.point
            out["point"] = {"kind": p.kind, "elements": str(p.elements)}
            if p.kind == "kv":
                out["point"] |= {"heads": p.heads, "head_dim": p.head_dim}
                out["point"]["joint_text"] = p.joint_text
        if each.total is not None:
            out["total"] = {"kind": each.total.kind, "elements": str(each.total.elements)}
        if each.shared:
            out["shared"] = each.shared
        if each.projected:
            out["projected"] = list(each.projected)
        return out

    def stage(each: Stage) -> dict[str, Any]:
        return {
            "params": each.params,
            **({"fp32": each.fp32} if each.fp32 else {}),
            "repeat": str(each.repeat),
            "shape": {symbol: str(expr) for symbol, expr in each.shape},
            "segments": [segment(s) for s in each.segments],
            "cuts": [
                [c.name, c.parent, c.lo, c.hi, str(c.out), str(c.text_out)] for c in each.cuts
            ],
            "parents": {name: str(expr) for name, expr in each.parents},
        }

    g = profile.geometry
    stages = {name: stage(each) for name, each in profile.stages.items()}
    return {
        "schema": SCHEMA,
        "name": profile.name,
        "kind": profile.kind,
        "source": dict(profile.source),
        "geometry": {
            "channels": g.channels,
            "scale": g.scale,
            "temporal_scale": g.temporal_scale,
            "row_multiple": g.row_multiple,
            "text_tokens": list(g.text_tokens),
            "guidance": g.guidance,
            **({"frame_multiple": g.frame_multiple} if g.frame_multiple > 1 else {}),
        },
        "defaults": dict(profile.defaults),
        "text_mode": profile.text_mode,
        "asyncdiff": {str(n): list(owners) for n, owners in profile.asyncdiff.items()},
        "kernels": [[[k.kind, k.count, *map(str, k.dims)] for k in kernels] for kernels in table],
        "stages": stages,
        **({"skips": [list(pair) for pair in profile.skips]} if profile.skips else {}),
    }


def profile_from_json(data: Mapping[str, Any]) -> Profile:
    """Read the JSON form. Raises InvalidProfile with what is missing or wrong."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise InvalidProfile(f"schema {schema!r}: this version reads {SCHEMA!r}")
    try:
        profile = _read_profile(data)
    except InvalidProfile:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise InvalidProfile(f"missing or malformed entry: {error!r}") from error
    _check(profile)
    return profile


def _check(profile: Profile) -> None:
    """What types cannot say: a denoiser is there, cuts cover its segments in order, and so on."""
    if profile.kind not in ("unet", "transformer"):
        raise InvalidProfile(f"kind {profile.kind!r}: one of unet, transformer")
    if profile.geometry.guidance not in ("cfg", "embedded", "none"):
        raise InvalidProfile(f"guidance {profile.geometry.guidance!r}: cfg, embedded or none")
    if profile.geometry.frame_multiple < 1:
        raise InvalidProfile(f"frame_multiple {profile.geometry.frame_multiple}: at least 1")
    if "denoiser" not in profile.stages:
        raise InvalidProfile(f"stages {list(profile.stages)}: no denoiser")
    missing = {"height", "width", "frames", "steps"} - profile.defaults.keys()
    if missing:
        raise InvalidProfile(f"defaults: no {', '.join(sorted(missing))}")
    for stage in profile.stages.values():
        for each in (s for s in stage.segments if s.projected):
            counts = [k.count for k in each.kernels]
            if len(counts) != len(each.projected) or any(map(gt, each.projected, counts)):
                raise InvalidProfile(f"segment {each.name}: projected {each.projected} of {counts}")
        end = 0
        for cut in stage.cuts:
            if not end <= cut.lo < cut.hi <= len(stage.segments):
                raise InvalidProfile(f"stage {stage.name}, cut {cut.name}: {cut.lo} to {cut.hi}")
            end = cut.hi
    for degree, owners in profile.asyncdiff.items():
        if len(owners) != len(profile.denoiser.cuts):
            raise InvalidProfile(f"asyncdiff {degree}: {len(owners)} owners for its cuts")
    for source, target in profile.skips:
        if not source < target < len(profile.denoiser.cuts):
            raise InvalidProfile(f"skips: {source} to {target}")


def _read_profile(data: Mapping[str, Any]) -> Profile:
    kernels = dict(enumerate(tuple(map(_read_kernel, rows)) for rows in data["kernels"]))

    def point(row: Mapping[str, Any] | None) -> Point | None:
        if row is None:
            return None
        if row["kind"] not in get_args(PointKind):
            kinds = ", ".join(get_args(PointKind))
            raise InvalidProfile(f"point kind {row['kind']!r}: one of {kinds}")
        rest = {key: row[key] for key in ("heads", "head_dim", "joint_text") if key in row}
        return Point(kind=row["kind"], elements=parse_expr(row["elements"]), **rest)

    def total(row: Mapping[str, Any] | None) -> Total | None:
        if row is None:
            return None
        if row["kind"] not in get_args(TotalKind):
            raise InvalidProfile(f"total {row['kind']!r}: one of {', '.join(get_args(TotalKind))}")
        return Total(row["kind"], parse_expr(row["elements"]))

    def stage(name: str, row: Mapping[str, Any]) -> Stage:
        return Stage(
            name=name,
            params=_natural(row["params"]),
            fp32=_natural(row.get("fp32", 0)),
            repeat=parse_expr(row["repeat"]),
            shape=tuple((symbol, parse_expr(e)) for symbol, e in row["shape"].items()),
            segments=tuple(
                Segment(
                    name=s["name"],
                    kernels=kernels[s["kernels"]],
                    weights=_natural(s["weights"]),
                    live=parse_expr(s["live"]),
                    point=point(s.get("point")),
                    total=total(s.get("total")),
                    shared=_natural(s.get("shared", 0)),
                    projected=tuple(map(_natural, s.get("projected", ()))),
                )
                for s in row["segments"]
            ),
            cuts=tuple(
                Cut(n, parent, _natural(lo), _natural(hi), parse_expr(out), parse_expr(text))
                for n, parent, lo, hi, out, text in row["cuts"]
            ),
            parents=tuple((n, parse_expr(e)) for n, e in row["parents"].items()),
        )

    g = data["geometry"]
    return Profile(
        name=printable(data["name"]),
        kind=data["kind"],
        source=data["source"],
        geometry=Geometry(
            channels=_natural(g["channels"]),
            scale=_natural(g["scale"]),
            temporal_scale=_natural(g["temporal_scale"]),
            row_multiple=_natural(g["row_multiple"]),
            text_tokens=tuple(map(_natural, g["text_tokens"])),
            guidance=g["guidance"],
            frame_multiple=_natural(g.get("frame_multiple", 1)),
        ),
        defaults={key: _natural(value) for key, value in data["defaults"].items()},
        stages={name: stage(name, row) for name, row in data["stages"].items()},
        text_mode=data["text_mode"],
        asyncdiff={int(n): tuple(map(_natural, o)) for n, o in data["asyncdiff"].items()},
        skips=tuple((_natural(a), _natural(b)) for a, b in data.get("skips", ())),
    )


def _read_kernel(row: list[Any]) -> Kernel:
    kind, count, *dims = row
    if kind not in KERNEL_DIMS or len(dims) != len(KERNEL_DIMS[kind]):
        raise InvalidProfile(f"kernel {row!r}: kinds and dimensions are {dict(KERNEL_DIMS)}")
    return Kernel(kind, _natural(count), tuple(parse_expr(d) for d in dims))


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidProfile(f"{value!r}: a non-negative integer is meant")
    return value


def load_profile(path: Path) -> Profile:
    """Read a profile file. Raises InvalidProfile (with the path) or OSError."""
    try:
        return profile_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidProfile(f"{path}: not JSON: {error}") from error
    except InvalidProfile as error:
        raise InvalidProfile(f"{path}: {error}") from error
