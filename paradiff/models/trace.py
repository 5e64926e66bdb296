"""From a model's configuration to its profile: probe, align, fit, cut into segments.

Every stage is run on the meta device at several shapes (probes), the denoiser also on strips: with
the rows of one patch, K and V widened to the visible rows, and halo rows lent by the neighbours; and
as the first of p ranks that share its weights, at the smallest p that divides them. The
launches of all probes must align one to one; each dimension is then fitted exactly
(``paradiff.models.fitting``). The result depends on the configuration and on the versions of
diffusers and transformers, on nothing else: two traces are byte-identical.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor
from torch.utils._pytree import tree_leaves

from paradiff.models.fitting import Fitter, Quantity, Shape, expr, value
from paradiff.models.interception import exchange_sites, intercept, unit_parents
from paradiff.models.plans import Plan, plan_for
from paradiff.models.recording import Launch, Mark, Recorder, Recording, RecordingHandler
from paradiff.models.sharding import largest_degree, shards_of
from paradiff.models.stages import StageSpec, versions
from paradiff.profiles import (
    SCHEMA,
    Cut,
    Expr,
    InvalidProfile,
    Kernel,
    Point,
    Profile,
    Segment,
    Stage,
    Total,
    load_profile,
    parse_expr,
    profile_to_json,
)

ShapeSymbols = Mapping[str, int]


def trace_profile(name_or_config_path: str) -> Profile:
    """Trace a shipped model by name, or a diffusers ``config.json`` (or the folder it lies in).

    Raises InvalidProfile for a name that is not known, a class that is not supported, and a
    configuration that cannot be built or run the way the pipeline of its class does.
    """
    try:
        return trace_plan(plan_for(name_or_config_path))
    except InvalidProfile:
        raise
    except (
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise InvalidProfile(f"{name_or_config_path}: does not build or run: {error}") from error


def trace_plan(plan: Plan) -> Profile:
    """Trace every stage of ``plan``. Raises InvalidProfile where its denoiser has no block."""
    traced = {spec.name: trace_stage(spec) for spec in plan.stages}
    if not traced["denoiser"].cuts:
        raise InvalidProfile(f"{plan.name}: the denoiser has no blocks, allowed: one or more")
    return Profile(
        name=plan.name,
        kind=plan.kind,
        source={
            **versions(),
            "probes": {spec.name: list(map(dict, spec.probes)) for spec in plan.stages},
            "models": plan.configurations,
        },
        geometry=plan.geometry,
        defaults=plan.defaults,
        stages=traced,
        text_mode=plan.text_mode,
        asyncdiff={
            n: tuple(_owner(cut.name, table) for cut in traced["denoiser"].cuts)
            for n, table in plan.asyncdiff.items()
        },
        skips=plan.skips,
    )


def cached_profile(plan: Plan) -> Profile:
    """``trace_plan(plan)``, kept in the user's cache directory: a trace takes seconds, up to a minute.

    A kept profile is used again only under the same configurations, versions and tracing code.
    """
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    facts = [plan.name, plan.configurations, plan.geometry, plan.defaults, versions(), SCHEMA]
    key = hashlib.sha256(repr(facts).encode() + code).hexdigest()[:16]
    path = user_cache_path("paradiff") / "profiles" / f"{plan.name}-{key}.json"
    with suppress(OSError, InvalidProfile):
        return load_profile(path)
    profile = trace_plan(plan)
    with suppress(OSError):  # a cache that cannot be written costs time, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(profile, path)
    return profile


def _owner(cut: str, table: Mapping[str, int]) -> int:
    """The owner by the longest prefix, of whole path components, that is in ``table``."""
    return table[max((p for p in table if f"{cut}.".startswith(f"{p}." if p else "")), key=len)]


def trace_stage(spec: StageSpec) -> Stage:
    """Record one stage at all its probes and fit it. Raises FitError where that is impossible."""
    modules = spec.build()
    whole = [p for p in spec.probes if p["k"] == p["r"]]
    strips = [p for p in spec.probes if p["k"] != p["r"]]
    recordings = [record(spec, modules, p) for p in whole]
    attentions: dict[str, Expr] = {}
    shared: list[ShapeSymbols] = []
    if spec.in_strips:
        attentions = find_kv(Fitter(whole, spec.levels, spec.frame_levels), recordings)
        most = largest_degree(shards_of(modules[0])) if spec.is_denoiser else 1
        divisors = (p for p in range(2, most + 1) if most % p == 0)
        shared = [{**whole[0], "p": p} for p in islice(divisors, 1)]
        recordings += [record(spec, modules, p, attentions) for p in (*strips, *shared)]
        _check_points_run(modules[0], recordings[0])
    try:
        aligned = _aligned(recordings, shared[0]["p"] if shared else 1)
    except InvalidProfile:
        if not shared:
            raise
        # With one head left a rank launches less (repeating a mask is a view then): such a small model
        # does not say how it is divided.
        shared = []
        aligned = _aligned(recordings[:-1])
    fitter = Fitter([*whole, *strips, *shared], spec.levels, spec.frame_levels)
    assembly = _Assembly(fitter, aligned, attentions)
    assembly.build(spec.name, parents=unit_parents(modules[0]) if spec.in_strips else {})
    return Stage(
        name=spec.name,
        segments=tuple(assembly.segments),
        params=sum(p.numel() for m in modules for p in m.parameters()) * spec.owns_parameters,
        repeat=parse_expr(spec.repeat),
        cuts=tuple(assembly.cuts),
        parents=tuple(assembly.parents.items()),
        shape=tuple((symbol, parse_expr(text)) for symbol, text in spec.shape),
        fp32=sum(map(_kept_in_fp32, modules)) * spec.owns_parameters,
    )


def _kept_in_fp32(module: Any) -> int:
    """Parameters of a module of transformers that ``from_pretrained(torch_dtype=float16)`` leaves in
    fp32: those below a module that ``_keep_in_fp32_modules`` names."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if not hasattr(module, "_keep_in_fp32_modules_strict"):
        return 0
    return sum(p.numel() for name, p in module.named_parameters() if kept & set(name.split(".")))


def record(
    spec: StageSpec,
    modules: tuple[Any, ...],
    shape: ShapeSymbols,
    attentions: Mapping[str, Expr] | None = None,
) -> Recording:
    """One forward of a stage at ``shape``; ``attentions`` are its kv points and their key counts.

    Here values do not matter: a rank's share of packed weights is one matmul, as where it is stored so.
    """
    call, args, kwargs = spec.call(modules, shape)
    recorder = Recorder(modules if spec.owns_parameters else ())
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            recorder.hold(tensor)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder.replaced_functions())
        if spec.in_strips:
            model = modules[0]
            points = attentions or {}
            text = {name: _text(e)(shape) for name, e in points.items()}
            seen = {name: _image(e)({**shape, "r": shape["k"]}) for name, e in points.items()}
            handler = RecordingHandler(recorder, seen.get, shape["h"])
            parents = unit_parents(model)
            units = sorted({*parents, *parents.values()})
            shards, degree = shards_of(model) if spec.is_denoiser else {}, shape.get("p", 1)
            for name, shard in shards.items():
                recorder.divide(shard.parameters(model.get_submodule(name)), degree)
            one_piece = {n: replace(s, pieces=(sum(s.pieces),)) for n, s in shards.items()}
            stack.enter_context(
                intercept(
                    model,
                    handler,
                    kv=text,
                    units=units,
                    shards=one_piece,
                    degree=degree,
                    projections=spec.is_denoiser,
                )
            )
        stack.enter_context(recorder)
        call(*args, **kwargs)
    return recorder.recording


def find_kv(fitter: Fitter, recordings: Sequence[Recording]) -> dict[str, Expr]:
    """Attentions whose key count grows with the rows, as an expression of the model's own rows.

    Cross attention (keys are text) and temporal attention (keys are frames) do not qualify.
    """
    found = {}
    for events in _aligned(recordings):
        first = events[0]
        if isinstance(first, Launch) and first.kind == "attention" and first.attention:
            keys = fitter.quantity([e.dims[3] for e in events])
            if any(symbol == "r" for _, atoms in keys.terms for symbol, _ in atoms):
                found[first.attention] = keys
    return found


def _image(keys: Expr) -> Expr:
    """The terms of a key count that are image tokens."""
    return Expr(tuple(t for t in keys.terms if any(symbol in "rk" for symbol, _ in t[1])))


def _text(keys: Expr) -> Expr:
    return Expr(tuple(t for t in keys.terms if not any(symbol in "rk" for symbol, _ in t[1])))


def _times(*factors: Expr) -> Expr:
    terms = [(1, ())]
    for factor in factors:
        terms = [(a * c, (*m, *n)) for a, m in terms for c, n in factor.terms]
    return expr(terms)


def _aligned(recordings: Sequence[Recording], degree: int = 1) -> Aligned:
    """Recordings side by side. Raises InvalidProfile at the first launch where they part."""
    first = recordings[0]
    for other in recordings[1:]:
        for index, (a, b) in enumerate(zip(first.events, other.events, strict=False)):
            if _signature(a) != _signature(b):
                around = [_signature(e) for e in first.events[max(0, index - 3) : index]]
                raise InvalidProfile(f"probes part at launch {index}: {a} and {b}, after {around}")
        if len(first.events) != len(other.events) or len(first.tensors) != len(other.tensors):
            raise InvalidProfile("probes differ in how many launches or tensors they have")
    return Aligned(recordings, degree)


def _signature(event: Launch | Mark) -> tuple[Any, ...]:
    if isinstance(event, Mark):
        return event.what, event.name
    return event.kind, event.attention, tuple(len(q) for q in event.dims)


class Aligned:
    """Recordings whose events correspond; iterates over events, one tuple of all probes each. The last
    one is of the first of ``degree`` ranks that share the weights."""

    def __init__(self, recordings: Sequence[Recording], degree: int = 1) -> None:
        self.recordings = recordings
        self.base = recordings[0]
        self.degree = degree

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*(r.events for r in self.recordings), strict=True)

    def weights(self, index: int) -> tuple[int, int]:
        """Parameters that event ``index`` is the first to use, and those of them that ranks divide:
        what a share of 1/p lacks is 1 - 1/p of these."""
        whole, share = self.base.weights[index], self.recordings[-1].weights[index]
        return whole, (whole - share) * self.degree // max(self.degree - 1, 1)

    def tensor(self, index: int) -> list[Shape]:
        return [r.tensors[index] for r in self.recordings]


@dataclass(slots=True)
class _Open:
    """A segment being filled."""

    name: str
    point: Point | None = None
    total: Total | None = None
    kernels: Counter[tuple[str, tuple[Expr, ...]]] = field(default_factory=Counter)
    weights: int = 0
    shared: int = 0
    peak: tuple[int, tuple[int, ...]] = (-1, ())


class _Assembly:
    """Cuts aligned events into segments. One pass, in order of execution."""

    def __init__(self, fitter: Fitter, aligned: Aligned, attentions: Mapping[str, Expr]) -> None:
        self.segments: list[Segment] = []
        self.cuts: list[Cut] = []
        self.parents: dict[str, Expr] = {}
        self._fitter = fitter
        self._aligned = aligned
        self._attentions = attentions
        self._fitted: dict[tuple[Quantity, ...], Expr] = {}
        self._sizes = [value((shape,)) for shape in aligned.base.tensors]
        self._open = _Open("")
        self._waiting = [0, 0]
        self._values = "", 0, self._open.kernels

    def build(self, stage: str, parents: Mapping[str, str]) -> None:
        self._open = _Open("head" if parents else stage)
        lo = 0
        for index, events in enumerate(self._aligned):
            for i, count in enumerate(self._aligned.weights(index)):
                self._waiting[i] += count
            first = events[0]
            if isinstance(first, Launch):
                self._launch(index, events)
            elif first.what == "enter" and first.name in parents:
                self._split(first.name)
                lo = len(self.segments)
            elif first.what == "leave" and first.name in parents:
                self._split(f"after {first.name}")
                self._leave(first.name, parents[first.name], lo, events)
            elif first.what == "leave":
                self.parents[first.name] = self._quantity([e.sizes for e in events])
            elif first.what in ("sum", "squares"):
                self._open.total = Total(first.what, self._quantity([e.sizes for e in events]))
                self._split(f"{first.name}.after")
            elif first.what == "projected":
                self._values = first.name, len(self.segments), self._open.kernels.copy()
            elif first.what != "enter":
                point = Point(first.what, self._quantity([e.sizes for e in events]))
                self._split(first.name, point)
        self._split("")
        if self.cuts and self.cuts[-1].hi < len(self.segments):
            self.segments[-1] = replace(self.segments[-1], name="tail")
        order = list(dict.fromkeys(parents[c.name] for c in self.cuts))
        self.parents = {name: self.parents[name] for name in order if parents}
        if self._waiting[0] and self.segments:
            last = self.segments[-1]
            self.segments[-1] = replace(last, weights=last.weights + self._waiting[0])

    def _leave(self, name: str, parent: str, lo: int, events: Sequence[Mark]) -> None:
        out = self._quantity([e.sizes for e in events])
        parts = [
            self._quantity([(e.sizes[i],) for e in events]) for i in range(len(events[0].sizes))
        ]
        text = [t for part in parts for t in part.terms if not _image(part).terms]
        self.cuts.append(Cut(name, parent, lo, len(self.segments), out, expr(text)))
        if parent == name:
            self.parents[name] = out

    def _launch(self, index: int, events: Sequence[Launch]) -> None:
        first = events[0]
        is_point = first.attention in self._attentions
        dims = tuple(self._quantity([e.dims[i] for e in events]) for i in range(len(first.dims)))
        if is_point:
            self._split(first.attention, self._kv_point(dims))
            self._mark_values(first.attention)
        current = self._open
        current.kernels[first.kind, dims] += 1
        current.weights += self._waiting[0]
        current.shared += self._waiting[1]
        self._waiting = [0, 0]
        alive = self._aligned.base.alive[index]
        current.peak = max(current.peak, (sum(self._sizes[i] for i in alive), alive))
        if is_point:
            self._split(f"{first.attention}.after")

    def _mark_values(self, attention: str) -> None:
        """Say in which segment the last projection of V of ``attention`` was, if launches follow it."""
        name, at, counts = self._values
        if name != attention:
            return
        done = self.segments[at]
        before = tuple(counts[k.kind, k.dims] for k in done.kernels)
        if at < len(self.segments) - 1 or before != tuple(k.count for k in done.kernels):
            self.segments[at] = replace(done, projected=before)

    def _kv_point(self, dims: tuple[Expr, ...]) -> Point:
        batch, heads, _, keys, head_dim, value_dim = dims
        own = Expr(
            tuple(
                (c, tuple(("r" if s == "k" else s, level) for s, level in atoms))
                for c, atoms in _image(keys).terms
            )
        )
        both = expr([*head_dim.terms, *value_dim.terms])
        return Point(
            "kv",
            _times(batch, heads, own, both),
            heads=heads({}),
            head_dim=head_dim({}),
            joint_text=bool(_text(keys).terms),
        )

    def _split(self, name: str, point: Point | None = None) -> None:
        """Close the open segment, if there is anything in it, and open ``name``."""
        if self._open.kernels:
            self.segments.append(self._close(self._open))
        elif self._open.point is not None:
            raise AssertionError(f"no kernel between point {self._open.name} and {name}")
        self._open = _Open(name, point)

    def _close(self, done: _Open) -> Segment:
        alive = [self._shape(i) for i in done.peak[1]]
        return Segment(
            name=done.name,
            kernels=tuple(Kernel(k, n, dims) for (k, dims), n in done.kernels.items()),
            weights=done.weights,
            live=expr(term for each in alive for term in each.terms),
            point=done.point,
            total=done.total,
            shared=done.shared,
        )

    def _shape(self, tensor: int) -> Expr:
        return self._quantity([(shape,) for shape in self._aligned.tensor(tensor)])

    def _quantity(self, seen: Sequence[Quantity]) -> Expr:
        key = tuple(seen)
        if key not in self._fitted:
            self._fitted[key] = self._fitter.quantity(key)
        return self._fitted[key]


def _check_points_run(model: Any, recording: Recording) -> None:
    """Every exchange point of the module tree must have been met exactly once."""
    met = Counter(
        e.name for e in recording.events if isinstance(e, Mark) and e.what in ("halo", "moments")
    )
    expected = Counter(site.name for site in exchange_sites(model) if not site.is_input)
    if met != expected:
        raise InvalidProfile(f"points met and expected differ: {met - expected}, {expected - met}")


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, one segment or kernel list to a line, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(dump_profile(profile), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def dump_profile(profile: Profile) -> str:
    """The JSON text: broken over lines down to one segment, kernel list or configuration each."""
    return _json_text(profile_to_json(profile), "profile", "") + "\n"


_BROKEN = {"profile": 1, "source": 1, "models": 1, "probes": 1, "stages": 3, "kernels": 1}
"""Keys whose values are broken over lines, and how many levels deep."""


def _json_text(data: Any, key: str, indent: str, depth: int = 0) -> str:
    depth = max(depth, _BROKEN.get(key, 0))
    if not depth or not isinstance(data, dict | list) or not data:
        return json.dumps(data, ensure_ascii=False)
    inner = indent + " "
    if isinstance(data, dict):
        rows = [
            f"{inner}{json.dumps(name)}: {_json_text(item, name, inner, depth - 1)}"
            for name, item in data.items()
        ]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    rows = [inner + _json_text(item, "", inner, depth - 1) for item in data]
    return "[\n" + ",\n".join(rows) + f"\n{indent}]"
