"""Strategies: pure functions from (model profile, workload, spec) to a schedule graph.

A spec is a comma-separated list, for example ``cfg=2,pipefusion=4,patches=8``: degrees of axes first,
then parameters. ``STRATEGIES`` says which parameters each knows. A strategy is one function
``(Builder, options) -> None`` and one line here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from paradiff.graph import ScheduleGraph
from paradiff.profiles import Profile
from paradiff.strategies.asyncdiff import asyncdiff
from paradiff.strategies.builder import Builder, Infeasible, Mesh, Options, Workload, widest_strips
from paradiff.strategies.decoding import DECODE, split_decode
from paradiff.strategies.displaced import MODES, distrifusion, pcpp, synchronous_steps
from paradiff.strategies.parastep import batchstep, parastep
from paradiff.strategies.passes import patch
from paradiff.strategies.pipefusion import pipefusion
from paradiff.strategies.places import PLACES, in_turns, sharded, stored_in_fp8
from paradiff.strategies.reuse import whole
from paradiff.strategies.stream import streambatch
from paradiff.strategies.tensor import check_tensor, widest_tensor
from paradiff.strategies.tiling import tiled_decode

__all__ = [
    "AXES",
    "STRATEGIES",
    "Alike",
    "Facts",
    "Infeasible",
    "Spec",
    "SpecError",
    "Workload",
    "build",
    "build_alike",
    "candidate_specs",
    "facts",
    "not_compared",
    "parse_spec",
]

INTEGER, COUNTS = r"[0-9]{1,6}", r"[0-9]{1,4}(:[0-9]{1,4})*"
PRODUCT = r"[0-9]{1,4}x[0-9]{1,4}"
FRACTION = r"0?\.[0-9]{0,5}[1-9][0-9]{0,5}|1(\.0*)?"


def _all(_: Options, steps: int) -> int:
    return steps


def _nothing_left_out(options: Options, _: int) -> bool:
    return options.get("mode") != "naive"


@dataclass(frozen=True, slots=True)
class Strategy:
    """One pass or step strategy: its emitter, its parameters (name -> pattern), what it promises.

    ``exact(options, steps)`` and ``synchronous(options, steps)``: whether the result is that of one GPU,
    and, where it is not, how many steps come before the first that reads something old. ``along``: the
    mesh axis that its degree is of; ``ranks`` that this axis has for a degree; ``staged``: they hold
    different layers; ``axes`` that go with it, and why no others (``alone``); ``alike``: ranks that
    share tokens or weights, and those of both branches, do the same; ``passes`` that a step strategy
    may run each step on; ``streams``: a rank may begin the next request before this one ends.
    """

    emit: Callable[[Builder, Options], None]
    parameters: Mapping[str, str] = field(default_factory=dict)
    exact: Callable[[Options, int], bool] = _nothing_left_out
    synchronous: Callable[[Options, int], int] = _all
    along: Literal["pp", "step"] | None = None
    ranks: Callable[[Options, int], int] = lambda _, degree: degree
    staged: bool = False
    alike: bool = False
    axes: frozenset[str] = frozenset({"cfg", "data"})
    alone: str = "a strip is one rank's, with all weights and heads"
    passes: frozenset[str] = frozenset()
    streams: bool = False


def _warmup(default: int) -> Callable[[Options, int], int]:
    return lambda options, steps: min(steps, int(options.get("warmup", default)))


def _before_reuse(options: Options, steps: int) -> int:
    """Steps before the first that reuses features of an earlier one."""
    skipped = [int(step) for step in options["skip"].split(":")] if "skip" in options else []
    return min([steps, *skipped, *[1] * (int(options.get("cache", "1")) > 1)])


def _one_left(options: Options, steps: int) -> bool:
    """The warm-up leaves one step at most, which is predicted at the true latent."""
    return int(options.get("warmup", "5")) >= steps - 1


SEQUENCE = frozenset({"cfg", "data", "ulysses", "ring", "tensor"})
STRATEGIES: Mapping[str, Strategy] = {
    "serial": Strategy(
        whole,
        {"cache": INTEGER, "skip": COUNTS},
        lambda o, t: _before_reuse(o, t) == t,
        _before_reuse,
        alike=True,
        axes=SEQUENCE,
    ),
    "patch": Strategy(patch, {"mode": "sync|naive"}, along="pp"),
    "distrifusion": Strategy(
        distrifusion,
        {"warmup": INTEGER, "mode": "|".join(MODES), "bucket": INTEGER},
        lambda o, t: synchronous_steps(o, t) == t,
        synchronous_steps,
        along="pp",
    ),
    "pcpp": Strategy(
        pcpp,
        {
            "warmup": INTEGER,
            "mode": "|".join(mode for mode in MODES if mode != "no_sync"),
            "bucket": INTEGER,
            "portion": FRACTION,
            "slice": "sender|receiver",
        },
        lambda o, t: synchronous_steps(o, t) == t,
        synchronous_steps,
        along="pp",
    ),
    "pipefusion": Strategy(
        pipefusion,
        {
            "warmup": INTEGER,
            "patches": INTEGER,
            "stages": f"balanced|{COUNTS}",
            "text": "patch0_frozen|per_patch",
            "prepost": "true|false",
        },
        lambda o, t: int(o.get("patches", o["pipefusion"])) == 1 or _warmup(1)(o, t) == t,
        _warmup(1),
        along="pp",
        staged=True,
        alike=True,
        axes=SEQUENCE,
    ),
    "asyncdiff": Strategy(
        asyncdiff,
        {"warmup": INTEGER, "stride": "1|2", "cuts": f"published|balanced|{COUNTS}"},
        lambda o, t: _warmup(9)(o, t) == t,
        _warmup(9),
        along="pp",
        ranks=lambda o, degree: degree + int(o.get("stride", "1")) - 1,
        staged=True,
        alike=True,
        alone="a component is one rank's, and what it hands on is whole",
    ),
    "parastep": Strategy(
        parastep,
        {"warmup": INTEGER},
        lambda o, t: _one_left(o, t) and _nothing_left_out(o, t),
        _warmup(5),
        along="step",
        alike=True,
        axes=SEQUENCE,
        passes=frozenset({"patch"}),
    ),
    "streambatch": Strategy(
        streambatch,
        along="step",
        alike=True,
        axes=SEQUENCE,
        passes=frozenset({"patch"}),
        streams=True,
    ),
    "batchstep": Strategy(
        batchstep,
        {"warmup": INTEGER},
        _one_left,
        _warmup(5),
        axes=frozenset({"data"}),
        alone="one rank predicts its steps as one batch, both branches in it",
    ),
}
AXES = ("cfg", "data", "ulysses", "ring", "tensor")
AXIS_PARAMETERS = {
    "ring": {"rotate": "p2p|allgather"},
    "ulysses": {"exchange": PRODUCT, "order": "qkv|v-first"},
}


class SpecError(ValueError):
    """A spec that cannot be read; the message names the part and what is allowed."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed spec: the text as given, the strategy's name, and every key with its value."""

    text: str
    name: str
    options: Mapping[str, str]

    def degree(self, axis: str) -> int:
        return int(self.options.get(axis, "1"))

    def places(self, key: str) -> list[str]:
        """The parts of ``offload`` or ``weights``."""
        return [part for part in self.options.get(key, "").split("+") if part]

    @property
    def tile(self) -> int | None:
        """Latent rows and columns of a tile of ``vae=tiled``; None: what the class of the VAE takes."""
        return int(self.options["tile"]) if "tile" in self.options else None

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.name]

    @property
    def mesh(self) -> Mesh:
        """Degrees in xDiT's order."""
        along = {
            STRATEGIES[name].along: STRATEGIES[name].ranks(self.options, self.degree(name))
            for name in self.options.keys() & STRATEGIES
        }
        return Mesh(
            tp=self.degree("tensor"),
            ulysses=self.degree("ulysses"),
            ring=self.degree("ring"),
            pp=along.get("pp", 1),
            cfg=self.degree("cfg"),
            step=along.get("step", 1),
            dp=self.degree("data"),
        )

    @property
    def n_gpus(self) -> int:
        """Ranks that the spec takes."""
        return self.mesh.size

    def narrower(self, gpus: int) -> str | None:
        """The widest axis made as wide as ``gpus`` allow, as ``name=degree``; None where none can be."""
        axis = max((*AXES, *(n for n in STRATEGIES if n in self.options)), key=self.degree)
        for degree in range(self.degree(axis) - 1, 0, -1):
            options = {**self.options, axis: str(degree)}
            if Spec(self.text, self.name, options).n_gpus <= gpus:
                return f"{axis}={degree}"
        return None


def parse_spec(text: str) -> Spec:
    """Read a spec such as ``cfg=2,distrifusion=4,warmup=4``. Raises SpecError."""
    options: dict[str, str] = {}
    named: list[str] = []
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key == "serial" and not equals:
            value = "1"
        if key in options:
            raise SpecError(f"spec {text!r}: {key} occurs twice")
        if key in STRATEGIES:
            named.append(key)
        if not value:
            raise SpecError(f"spec {text!r}: {item.strip()!r} is not name=value")
        options[key] = value
    named.sort(key=lambda name: not STRATEGIES[name].passes)
    if len(named) > 2 or (named and not set(named[1:]) <= STRATEGIES[named[0]].passes):
        both = " and ".join(name for name in options if name in named)
        raise SpecError(f"spec {text!r}: {both} both decide the pass; give one")
    spec = Spec(text.strip(), named[0] if named else "serial", options)
    _check_options(spec)
    return spec


def _check_options(spec: Spec) -> None:
    allowed = dict.fromkeys((*AXES, spec.name), INTEGER) | dict(spec.strategy.parameters)
    allowed |= PLACES
    allowed |= DECODE
    if spec.options.get("vae") == "tiled":
        allowed["tile"] = INTEGER
    for name in spec.strategy.passes & spec.options.keys():
        allowed |= {name: INTEGER} | dict(STRATEGIES[name].parameters)
    if spec.name == "serial":
        allowed["serial"] = "1"
    for axis, parameters in AXIS_PARAMETERS.items():
        if axis in spec.options:
            allowed |= parameters
    for key, value in spec.options.items():
        if key not in allowed:
            raise SpecError(
                f"spec {spec.text!r}: unknown {key!r}; a strategy is one of"
                f" {', '.join(STRATEGIES)}, and with {spec.name} go {', '.join(sorted(allowed))}"
            )
        if not re.fullmatch(allowed[key], value):
            wanted = {INTEGER: "a whole number", FRACTION: "a number in (0, 1]"}
            wanted |= {COUNTS: "counts such as 7:7:7:7", PRODUCT: "ranks x machines such as 8x2"}
            expected = wanted.get(
                allowed[key], allowed[key].replace(COUNTS, "i:j").replace("\\", "")
            )
            raise SpecError(f"spec {spec.text!r}: {key}={value}; expected {expected}")
        if key in (*AXES, *STRATEGIES, "bucket", "cache") and int(value) < 1:
            raise SpecError(f"spec {spec.text!r}: {key}={value}; expected at least 1")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a spec means, whatever the conventions of its parameters. ``synchronous_steps`` are those
    before the first that reads old values: all where none does."""

    n_gpus: int
    synchronous_steps: int
    exact: bool


def facts(spec: Spec, workload: Workload) -> Facts:
    """GPUs taken, synchronous steps really run, and whether the result equals the serial one.

    Exact up to floating-point association (strategies.md 21).
    """
    s, o = spec.strategy, spec.options
    kept = "fp8" not in spec.places("weights") and o.get("vae") != "tiled"
    fresh = s.exact(o, workload.steps)
    synchronous = workload.steps if fresh else s.synchronous(o, workload.steps)
    return Facts(spec.n_gpus, synchronous, fresh and kept)


def build(spec: Spec, profile: Profile, workload: Workload) -> ScheduleGraph:
    """The schedule of ``spec``. Raises Infeasible with the reason and the nearest legal choice."""
    builder, graph = _emitted(spec, profile, workload, alike=False)
    return _placed(graph, spec, profile.share(spec.mesh.tp), builder.element_bytes)


class Alike(NamedTuple):
    """A schedule of one rank of each kind: the fields of ``simulator.symmetry.Quotient``."""

    graph: ScheduleGraph
    members: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    representative: tuple[int, ...]


def build_alike(spec: Spec, profile: Profile, workload: Workload) -> Alike | None:
    """``build`` without the ops of ranks that do the same as another; None where the mesh does not say
    which these are. Raises Infeasible."""
    rearranged = {*PLACES, *DECODE, *spec.strategy.passes} & spec.options.keys()
    if rearranged or not spec.strategy.alike or len(set(spec.mesh.kinds())) == spec.mesh.size:
        return None
    builder, graph = _emitted(spec, profile, workload, alike=True)
    return Alike(graph, tuple(builder.members), builder.kinds)


def _emitted(
    spec: Spec, profile: Profile, workload: Workload, *, alike: bool
) -> tuple[Builder, ScheduleGraph]:
    _check_axes(spec, profile)
    try:
        builder = Builder(profile, workload, spec.mesh, alike)
    except ValueError as error:
        raise Infeasible(str(error)) from error
    check_tensor(builder)
    spec.strategy.emit(builder, spec.options)
    meta = {"model": profile.name, "spec": spec.text}
    meta |= {k: str(getattr(workload, k)) for k in workload.__dataclass_fields__}
    return builder, builder.graph(meta)


def _placed(
    graph: ScheduleGraph, spec: Spec, profile: Profile, element_bytes: int
) -> ScheduleGraph:
    """``graph`` decoded by as many, and with its weights stored, spread and loaded, as the spec asks."""
    dtype = dict(graph.meta)["dtype"]
    if spec.options.get("vae") == "split":
        graph = split_decode(graph, profile, spec.mesh.dp, dtype)
    elif "vae" in spec.options:
        graph = tiled_decode(graph, profile, spec.tile, dtype)
    weights, offload = spec.places("weights"), spec.places("offload")
    param_bytes = 1 if "fp8" in weights else element_bytes
    if "fp8" in weights:
        graph = stored_in_fp8(graph)
    if "hsdp" in weights:
        lanes = [lane for groups in spec.mesh.step_groups() for group in groups for lane in group]
        staged = spec.strategy.staged
        groups = [ranks for lane in lanes for ranks in (lane.groups if staged else [lane.ranks])]
        tp = spec.mesh.tp
        together = [ranks[share::tp] for ranks in groups for share in range(tp)]
        if max(map(len, together)) == 1:
            raise Infeasible(
                "weights=hsdp: no two ranks run the same layers at the same time; it needs a sequence"
                " or patch axis",
                "weights=fp8",
            )
        graph = sharded(graph, profile, together, param_bytes)
    if offload:
        graph = in_turns(graph, profile, offload, (param_bytes, element_bytes), dtype)
    return graph


def _legal_parts(spec: Spec) -> list[str]:
    """The parts of ``spec`` but for axes that its strategy has not, and their parameters."""
    axes = set(AXES) - spec.strategy.axes
    gone = axes.union(*(AXIS_PARAMETERS.get(axis, ()) for axis in axes))
    return [f"{key}={value}" for key, value in spec.options.items() if key not in gone]


def _check_axes(spec: Spec, profile: Profile) -> None:
    for axis in AXES:
        if spec.degree(axis) > 1 and axis not in spec.strategy.axes:
            raise Infeasible(
                f"{axis} inside {spec.name}: {spec.strategy.alone}",
                ",".join(_legal_parts(spec)),
            )
    if spec.degree("cfg") > 1:
        if profile.geometry.guidance != "cfg":
            raise Infeasible(
                f"cfg={spec.degree('cfg')}: {profile.name} evaluates the denoiser once a step"
                f" (guidance is {profile.geometry.guidance})",
                "cfg=1",
            )
        if spec.degree("cfg") != 2:
            raise Infeasible(f"cfg={spec.degree('cfg')}: guidance has two branches", "cfg=2")


def candidate_specs(profile: Profile, workload: Workload, max_gpus: int) -> Iterator[str]:
    """Specs worth comparing on up to ``max_gpus``: powers of two, every product of them on the mesh of
    up to PRODUCTS GPUs, of more those with Ulysses; and the widest legal degree of each axis.

    Illegal powers of two are yielded too: that they are illegal, and why, is part of the answer.
    """
    yield "serial"
    powers = [n for n in POWERS if n <= max_gpus]
    for cfg in _branches(profile, max_gpus):
        prefix = "cfg=2," if cfg == 2 else ""
        if cfg == 2:
            yield "cfg=2"
        room = max_gpus // cfg
        for n in [p for p in powers if p <= room]:
            yield from (prefix + each for each in _pass_specs(profile, workload, n))
        yield from (prefix + each for each in _widest(profile, workload, room, powers))
    yield from _step_specs(profile, workload, max_gpus, powers)
    if max_gpus > 1:
        yield f"data={max_gpus}"
        if workload.steps >= max_gpus:
            yield f"streambatch={max_gpus}"
    yield from _replicated(profile, workload, max_gpus)


POWERS = (2, 4, 8, 16, 32, 64)
PRODUCTS = 16


def not_compared(profile: Profile, max_gpus: int) -> Iterator[str]:
    """What ``candidate_specs`` leaves out on a large box, as a sentence; nothing where nothing is."""
    if profile.kind == "transformer" and max_gpus > PRODUCTS:
        yield (
            f"of products on more than {PRODUCTS} GPUs only some are compared: pipelines and parastep"
            " with Ulysses inside, Ulysses with ring, tensor up to 4 with Ulysses; ask for others with"
            " --strategy"
        )


def _branches(profile: Profile, max_gpus: int) -> tuple[int, ...]:
    """Degrees of cfg: branches that ranks can take apart."""
    return (1, 2) if profile.geometry.guidance == "cfg" and max_gpus > 1 else (1,)


def _replicated(profile: Profile, workload: Workload, max_gpus: int) -> Iterator[str]:
    """Replicas of what fits where one GPU does not hold the model, or of what wastes least."""
    for n in [n for n in (2, 4) if 2 * n <= max_gpus]:
        data = f"data={max_gpus // n}"
        if n == 2 and profile.geometry.guidance == "cfg":
            yield f"cfg=2,{data}"
        yield f"tensor={n},{data}"
        yield f"asyncdiff={n},stride=1,warmup={_asyncdiff_warmup(workload, 1)},{data}"
        if profile.kind == "transformer":
            yield f"pipefusion={n},patches={2 * n},warmup=1,{data}"


def _strip_specs(profile: Profile, workload: Workload, n: int) -> Iterator[str]:
    warmup = min(4, workload.steps - 1)
    if profile.kind == "unet":
        yield f"patch={n}"
        yield f"pcpp={n},portion=0.3,slice=sender,warmup={warmup}"
    yield f"distrifusion={n},warmup={warmup}"


def _groups(n: int) -> Iterator[str]:
    """How ``n`` ranks, a power of two, may share weights, heads and keys: parts of a spec."""
    degrees = [1, *(p for p in POWERS if p <= n)]
    for tensor, ulysses in itertools.product(degrees, degrees):
        if tensor * ulysses > n:
            continue
        ring = n // tensor // ulysses
        if n <= PRODUCTS or tensor == 1 or tensor == n or (ring == 1 and tensor <= 4):
            axes = {"tensor": tensor, "ulysses": ulysses, "ring": ring}
            yield ",".join(f"{axis}={degree}" for axis, degree in axes.items() if degree > 1)


def _pass_specs(profile: Profile, workload: Workload, n: int) -> Iterator[str]:
    """All passes on exactly ``n`` GPUs, a power of two."""
    yield from _strip_specs(profile, workload, n)
    if profile.kind == "unet":
        yield f"tensor={n}"
        return
    yield from _groups(n)
    blocks = len(profile.denoiser.cuts)
    for stages in [s for s in (2, 4, 8, 16) if s <= min(n, blocks)]:
        uneven = blocks % stages or len({c.hi - c.lo for c in profile.denoiser.cuts}) > 1
        balance = ",stages=balanced" if uneven else ""
        many = [f"ulysses={n // stages}"] if stages < n else [""]
        groups = _groups(n // stages) if n <= PRODUCTS else many
        for group, patches in itertools.product(groups, (stages, 2 * stages)):
            inside = f",{group}" if group else ""
            yield f"pipefusion={stages}{inside},patches={patches}{balance},warmup=1"


def _widest(profile: Profile, workload: Workload, room: int, powers: list[int]) -> Iterator[str]:
    """The largest degree up to ``room`` that rows (and heads) allow, where it is no power of two."""
    geometry = profile.geometry
    tensor = widest_tensor(profile, room)
    if tensor > 1 and tensor not in powers:
        yield f"tensor={tensor}"
    strips = widest_strips(workload.height // geometry.scale, geometry.row_multiple, room)
    if strips > 1 and strips not in powers:
        yield from _strip_specs(profile, workload, strips)
    if profile.kind == "transformer":
        heads = next((p.heads for _, p in profile.denoiser.points("kv")), 1)
        rows = workload.height // geometry.scale
        both = [
            n for n in range(2, room + 1) if heads % n + rows % (n * geometry.row_multiple) == 0
        ]
        if both and both[-1] not in powers:
            yield f"ulysses={both[-1]}"
        if strips > 1 and strips not in powers:
            yield f"ring={strips}"


def _asyncdiff_warmup(workload: Workload, stride: int) -> int:
    """9 as published, at most a fifth of the steps; odd where rounds are of two steps."""
    room = max(1, workload.steps // 5)
    return max(1, min(9, room if stride == 1 else room - (room + 1) % 2))


def _step_specs(
    profile: Profile, workload: Workload, max_gpus: int, widths: list[int]
) -> Iterator[str]:
    """AsyncDiff with the published component counts, ParaStep on groups of one to four, its steps as a
    batch; warm-up at most a fifth of the steps."""
    branches = _branches(profile, max_gpus)
    for cfg, stride, components in itertools.product(branches, (1, 2), (2, 3, 4)):
        if cfg * (components + stride - 1) <= max_gpus:
            warmup = _asyncdiff_warmup(workload, stride)
            prefix = "cfg=2," if cfg == 2 else ""
            yield f"{prefix}asyncdiff={components},stride={stride},warmup={warmup}"
    warmup = min(5, max(1, workload.steps // 5))
    for n in [n for n in widths if workload.steps - warmup >= n]:
        for cfg, inside in itertools.product(branches, (1, 2, 4)):
            gpus = cfg * inside * n
            if gpus > max_gpus or (gpus > PRODUCTS and cfg * inside > 4):
                continue
            axes = ["tensor", "ulysses", "ring"] if gpus <= PRODUCTS else ["ulysses"]
            if profile.kind == "unet":
                axes = ["tensor"]
            for group in [f"{axis}={inside}" for axis in axes] if inside > 1 else [""]:
                parts = ["cfg=2"] * (cfg == 2) + [group] * (group != "")
                yield ",".join([*parts, f"parastep={n},warmup={warmup}"])
    if workload.steps - warmup >= 2:
        yield f"batchstep=2,warmup={warmup}"
