"""Published runs: rows of a CSV file, and what each means as a model, a box, a workload and a spec.

A row is read once (:func:`read_rows`) and understood by rules (:class:`Rules`, one YAML file): patterns
over its words, never over its id or its source. :func:`understand` gives a :class:`Case`, or raises
:class:`NotCovered` with the reason. How long a case takes is predicted in ``analysis.scoreboard``.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, model_validator

from paradiff.config import ConfigError, Strict, available, find, load_yaml, problem
from paradiff.profiles import Profile
from paradiff.strategies import SpecError, Workload, parse_spec
from simulator.costs import ITEMSIZE, Runtime, Scope
from simulator.gpu import AttentionKernel

NEEDED = (
    "id", "source", "model", "height", "width", "frames", "steps", "warmup_steps", "batch", "precision",
    "cfg", "gpu", "n_gpus", "interconnect", "strategy", "params", "latency_s", "baseline_latency_s",
    "notes",
)  # fmt: skip
"""Columns that are read; a file may have more."""
MAX_FILE_BYTES = 16 * 2**20
SINGLE = re.compile(r"\bsingle\b|\bserial\b")
ORDER = (
    "cfg", "distrifusion", "pcpp", "pipefusion", "patch", "asyncdiff", "parastep", "batchstep",
    "tensor", "ulysses", "ring", "data",
)  # fmt: skip
"""Axes of a spec in the order they are written."""


class NotCovered(ValueError):
    """A row that paradiff has no prediction for; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published run. Seconds are of the whole run; None where the source prints none."""

    line: int
    cells: Mapping[str, str]
    n_gpus: int
    latency_s: float | None
    baseline_s: float | None

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    @property
    def machine(self) -> tuple[str, ...]:
        """The words that say which machine it was; behind a semicolon they say how it was used."""
        return self.source, words(self["gpu"]), words(self["interconnect"].partition(";")[0])

    @property
    def source(self) -> str:
        """Who published it: what errors are clustered by."""
        return self["source"]

    def tag(self, name: str) -> str:
        """The value of ``name=value`` among the tags of the notes; empty where there is none."""
        found = re.search(rf"(?:^|;)\s*{name}=([^;]*)", self["notes"])
        return found[1].strip() if found else ""

    @property
    def is_core(self) -> bool:
        """Whether the row can judge a predictor: several GPUs, a whole run, its own one-GPU run."""
        timed = self.latency_s is not None and self.baseline_s is not None
        return timed and self.n_gpus > 1 and self.tag("unit") == "run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a row means. ``specs``: one, or those of which the source reports the best.

    ``runtime`` is the row's, ``baseline_runtime`` that of the one-GPU run it is compared with. ``note``
    says what of the row was not taken at its word.
    """

    model: str
    topology: str
    overrides: tuple[str, ...]
    gpu: str
    workload: Workload
    specs: tuple[str, ...]
    n_gpus: int
    scope: Scope
    runtime: Runtime
    baseline_runtime: Runtime
    attention: str = "auto"
    note: str | None = None


# ------------------------------------------------------------------------------------------- rules


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({text!r}): {error}") from None
    return text


Match = Annotated[str, AfterValidator(_pattern)]
LinkKind = Literal["bridge", "nvlink", "pcie"]


class Rule(Strict):
    """What a text means in which ``match`` is found; or, ``reason``, why a row with it is left out."""

    match: Match
    """A regular expression; the words are lower case, other characters spaces."""
    means: str = ""
    """What such rows mean."""
    reason: str | None = None
    """Why such rows are left out."""


class BoxRule(Strict):
    """The box of rows with this link, a GPU that ``gpu`` matches, and at most ``gpus`` of them."""

    link: LinkKind
    """What joins the GPUs."""
    gpu: Match = ""
    """A regular expression; left out, any GPU."""
    gpus: int
    """The largest run that it holds for."""
    topology: str
    """The box."""
    set: tuple[str, ...] = ()
    """What is changed in it, as by ``--set``."""


class OptionRule(Strict):
    """Parameters of a spec that has ``axis`` where ``match`` is found."""

    match: Match
    """A regular expression, in strategy and parameters."""
    axis: str
    """The part of a spec that it is for."""
    add: str
    """What the spec gets."""


class WarmupRule(Strict):
    """Warm-up steps of ``axis`` for models that match, where a row does not say."""

    axis: str
    """The part of a spec that it is for."""
    model: Match = ""
    """A regular expression; left out, any model."""
    steps: int
    """Synchronous steps before the stale ones."""


class Rules(Strict):
    """The schema of ``hardware_profiles/published/rules.yaml``. In each list the first match decides."""

    gpus: tuple[Rule, ...]
    """Column ``gpu`` to a GPU profile."""
    models: tuple[Rule, ...]
    """Column ``model`` to a model."""
    dtypes: tuple[Rule, ...]
    """Column ``precision`` to a precision."""
    runtimes: tuple[Rule, ...]
    """Notes, strategy and parameters to how kernels are launched."""
    scopes: tuple[Rule, ...]
    """Tag ``scope=`` of the notes to what the clock covered."""
    attention: tuple[Rule, ...]
    """Notes to the kernel behind attention."""
    links: tuple[Rule, ...]
    """Column ``interconnect`` to what joins the GPUs."""
    sxm: tuple[str, ...]
    """GPUs that NVLink joins where a row does not say."""
    boxes: tuple[BoxRule, ...]
    """Link, GPU and size to a box."""
    refused: tuple[Rule, ...]
    """Strategies and parameters that nothing here stands for."""
    axes: tuple[Rule, ...]
    """Column ``strategy`` to parts of a spec."""
    degrees: dict[str, str]
    """Names of degrees in parameters to parts of a spec."""
    options: tuple[OptionRule, ...]
    """Words of strategy or parameters to parameters of a spec."""
    warmup: tuple[WarmupRule, ...]
    """Synchronous steps where a row does not say."""
    patches: tuple[int, ...]
    """Tried where a row does not say how many: the best counts."""

    @model_validator(mode="after")
    def _known(self) -> Rules:
        """Every meaning is one that exists."""
        allowed: Mapping[str, Sequence[str]] = {
            "gpus": available("gpus"),
            "models": available("models", ".json"),
            "dtypes": tuple(ITEMSIZE),
            "runtimes": get_args(Runtime),
            "scopes": get_args(Scope),
            "attention": ("auto", *get_args(AttentionKernel)),
            "links": get_args(LinkKind),
        }
        for name, names in allowed.items():
            for i, rule in enumerate(getattr(self, name)):
                if rule.reason is None and rule.means not in names:
                    raise problem("unknown meaning", rule.means, names, (name, i, "means"))
        for i, box in enumerate(self.boxes):
            if box.topology not in available("topologies"):
                at = ("boxes", i, "topology")
                raise problem("unknown topology", box.topology, available("topologies"), at)
        return self


def load_rules() -> Rules:
    """The shipped rules. Raises ConfigError."""
    return load_yaml(find("published", "rules"), Rules)


# -------------------------------------------------------------------------------------------- rows


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV file in the columns of ``hardware_profiles/published/runs.csv``.

    Raises ConfigError with the line for a file that cannot be read, misses a column, has a row of
    another length, an id twice, or a number that is none.
    """
    file = str(path)
    reader = csv.reader(io.StringIO(_text(Path(path), file), newline=""), strict=True)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in NEEDED if name not in header]:
            raise ConfigError(
                f"{file}:1: column missing ({missing[0]}), allowed: {','.join(NEEDED)}"
            )
        end = reader.line_num
        for cells in reader:
            line, end = end + 1, reader.line_num
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise ConfigError(
                    f"{file}:{line}: {len(cells)} cells, allowed: {len(header)} as in the header"
                )
            row = _row(dict(zip(header, cells, strict=True)), f"{file}:{line}", line)
            if row["id"] in seen:
                raise ConfigError(
                    f"{file}:{line}: id twice ({row['id']}), first in line {seen[row['id']]}"
                )
            seen[row["id"]] = line
            rows.append(row)
    except csv.Error as error:
        raise ConfigError(f"{file}:{reader.line_num}: not CSV ({error})") from None
    if not rows:
        raise ConfigError(f"{file}:1: no rows")
    return rows


def _text(path: Path, file: str) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file}: too large, allowed: {MAX_FILE_BYTES} bytes at most")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not text (byte {error.start}), allowed: UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None


def _row(cells: Mapping[str, str], place: str, line: int) -> Row:
    if not cells["id"].strip():
        raise ConfigError(f"{place}: id: blank, allowed: a name of its own for each row")
    return Row(
        line,
        cells,
        n_gpus=int(_number(cells, "n_gpus", place) or 1),
        latency_s=_number(cells, "latency_s", place),
        baseline_s=_number(cells, "baseline_latency_s", place),
    )


def _number(cells: Mapping[str, str], column: str, place: str) -> float | None:
    text = cells[column].strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (column == "n_gpus" and value != int(value)):
        raise ConfigError(f"{place}: {column}: not allowed ({text}), allowed: a positive number")
    return value


# --------------------------------------------------------------------------------------- understand


def words(text: str) -> str:
    """Lower case, Greek letters by name, every run of other characters than letters, digits, dots and +
    as one space."""
    named = text.lower().replace("\u03b1", " alpha").replace("\u03c3", " sigma")
    return re.sub(r"[^a-z0-9.+]+", " ", named).strip()


def _meaning(rules: Sequence[Rule], text: str, what: str) -> str:
    """What ``text`` means. Raises NotCovered with the reason of its rule, or where none fits."""
    found = next((rule for rule in rules if re.search(rule.match, text)), None)
    if found is None:
        known = ", ".join(dict.fromkeys(rule.means for rule in rules if rule.means))
        raise NotCovered(f"no rule knows this {what}: {text or 'blank'}; known: {known}")
    if found.reason is not None:
        raise NotCovered(found.reason)
    return found.means


def box_sizes(rows: Sequence[Row]) -> dict[tuple[str, ...], int]:
    """Words that describe a machine -> the most GPUs that a row with them takes."""
    sizes: dict[tuple[str, ...], int] = {}
    for row in rows:
        sizes[row.machine] = max(sizes.get(row.machine, 1), row.n_gpus)
    return sizes


def understand(
    row: Row, rules: Rules, profiles: Mapping[str, Profile], box_gpus: int | None = None
) -> Case:
    """The case that ``row`` describes. ``profiles`` are looked up by the names that rules give;
    ``box_gpus`` is how many GPUs the machine has at least (default: what the row takes).

    Raises NotCovered with the reason where there is none.
    """
    for rule in rules.refused:
        if re.search(rule.match, words(f"{row['strategy']} {row['params']}")):
            raise NotCovered(rule.reason or rule.match)
    profile = profiles[_meaning(rules.models, words(row["model"]), "model")]
    _check_guidance(row, profile)
    workload = _workload(row, rules, profile)
    clock = words(row.tag("scope")) + (" video" if workload.frames > 1 else "")
    gpu = _meaning(rules.gpus, words(row["gpu"]), "GPU")
    topology, overrides = _box(row, rules, gpu, box_gpus or row.n_gpus)
    notes, own = words(row["notes"]), words(f"{row['strategy']} {row['params']}")
    baseline_runtime = _meaning(rules.runtimes, notes, "runtime")
    runtime = _meaning(rules.runtimes, own, "runtime")
    return Case(
        model=profile.name,
        topology=topology,
        overrides=overrides,
        gpu=gpu,
        workload=workload,
        specs=_specs(row, rules, profile.name),
        n_gpus=row.n_gpus,
        scope=cast(Scope, _meaning(rules.scopes, clock, "scope")),
        runtime=cast(Runtime, runtime if runtime != "eager" else baseline_runtime),
        baseline_runtime=cast(Runtime, baseline_runtime),
        attention=_meaning(rules.attention, notes, "attention"),
    )


def with_possible_warmup(case: Case, row: Row) -> Case:
    """``case`` with fewer warm-up steps in its pipeline where the row's own speed-up refutes them.

    A warm-up step takes a whole picture through the stages one after another, so with w of T steps,
    guidance over c and n GPUs in all no run is faster than T / (w / c + (T - w) / n) times one GPU.
    PipeFusion's 7.91 times for PixArt at 2048 px with w = 1, T = 20, c = 2, n = 8 cannot be: 6.96 at
    most.
    """
    stated = re.search(r"pipefusion=\d+.*warmup=(\d+)", case.specs[0])
    if stated is None or row.latency_s is None or row.baseline_s is None:
        return case
    steps, guided = case.workload.steps, 2 if "cfg=2" in case.specs[0] else 1
    speedup, label = row.baseline_s / row.latency_s, int(stated[1])
    possible = next(
        (
            w for w in range(label, 0, -1)
            if speedup <= steps / (w / guided + (steps - w) / case.n_gpus)
        ),
        0,
    )  # fmt: skip
    if possible == label:
        return case
    specs = tuple(re.sub(r"warmup=\d+", f"warmup={possible}", spec) for spec in case.specs)
    told = "stated" if row["warmup_steps"].strip() else "assumed"
    note = f"{label} warm-up steps are {told}; a speed-up of {speedup:.2f} allows {possible}"
    return replace(case, specs=specs, note=note)


def _check_guidance(row: Row, profile: Profile) -> None:
    text, guided = words(row["cfg"]), profile.geometry.guidance == "cfg"
    if (text.startswith("on") and not guided) or (text.startswith("off") and guided):
        known = "with" if guided else "without"
        raise NotCovered(f"guidance is {row['cfg']}; {profile.name} is known {known} two branches")


def _workload(row: Row, rules: Rules, profile: Profile) -> Workload:
    """Sizes as the row has them, else the model's own."""
    sizes: dict[str, Any] = {}
    for column in ("height", "width", "frames", "steps", "batch"):
        text = row[column].strip()
        found = re.match(r"\d+(?![\d.]*p)", text)
        if text and (found is None or not int(found[0])):
            raise NotCovered(f"{column} is {text!r}, not a number")
        default = profile.defaults.get(column, 1)
        sizes[column] = int(found[0]) if found else default
    dtype = _meaning(rules.dtypes, words(row["precision"]), "precision")
    return Workload(**sizes, dtype=dtype)


def _box(row: Row, rules: Rules, gpu: str, gpus: int) -> tuple[str, tuple[str, ...]]:
    """Topology and overrides. A tag ``box=NAME`` in the notes names a shipped topology itself."""
    if named := row.tag("box"):
        if named not in available("topologies"):
            raise NotCovered(f"box={named} is no shipped topology")
        return named, ()
    said = (words(row[column]) for column in ("interconnect", "gpu"))
    linked = (rule.means for text in said for rule in rules.links if re.search(rule.match, text))
    link = next(linked, "nvlink" if gpu in rules.sxm else "pcie")
    fitting = [box for box in rules.boxes if box.link == link and re.search(box.gpu, gpu)]
    for size in (gpus, row.n_gpus):
        for box in fitting:
            if size <= box.gpus:
                return box.topology, (*box.set, f"gpu={gpu}")
    most = max((box.gpus for box in fitting), default=0)
    raise NotCovered(
        f"no box of {row.n_gpus} {gpu} with {link}: {most} at most; a tag box=NAME in notes names one"
    )


# ------------------------------------------------------------------------------------------- specs


def _specs(row: Row, rules: Rules, model: str) -> tuple[str, ...]:
    """The spec in our words; several where the source reports the best of them."""
    if row.n_gpus == 1 and SINGLE.search(words(row["strategy"])):
        return ("serial",)
    text = words(row["strategy"])
    named = list(dict.fromkeys(r.means for r in rules.axes if re.search(r.match, text)))
    degrees = _degrees(row, rules)
    if not named and not set(ORDER) & set(_adjacent(row["strategy"], rules)):
        raise NotCovered(f"no rule knows this strategy: {row['strategy']} {row['params']}".strip())
    axes = [axis for axis in named if axis != "usp"]
    axes += [axis for axis in degrees if axis in ORDER and axis not in axes]
    known = {axis: degrees[axis] for axis in axes if axis in degrees}
    if "degree" in degrees and len(axes) == 1:
        known.setdefault(axes[0], degrees["degree"])
    open_axes = [axis for axis in axes if axis not in known]
    if "usp" in named and not axes:
        open_axes = ["ulysses", "ring"]
    left = row.n_gpus // math.prod(known.values())
    shares: list[tuple[int, ...]] = [(left,)] if open_axes else [()]
    if len(open_axes) > 1:
        if set(open_axes) != {"ulysses", "ring"}:
            raise NotCovered(f"degrees are not stated: {row['strategy']} {row['params']}".strip())
        shares = [(u, left // u) for u in range(2, left) if left % u == 0] or [(left, 1)]
    found = (
        _written(row, rules, model, known | dict(zip(open_axes, share, strict=True)), degrees)
        for share in shares
    )
    return tuple(spec for specs in found for spec in specs)


def _degrees(row: Row, rules: Rules) -> dict[str, int]:
    """Axis or parameter -> number, of what ``params`` says as key=number, or params or strategy as
    a known key with its number behind (``u2r4``, ``Ulysses-4``)."""
    found = re.findall(r"([a-z_]+)\s*[=:]\s*(\d+)", row["params"].lower())
    said = {rules.degrees.get(key, key): int(number) for key, number in found}
    return _adjacent(row["strategy"], rules) | _adjacent(row["params"], rules) | said


def _adjacent(text: str, rules: Rules) -> dict[str, int]:
    """Axis or parameter -> the number right behind its key."""
    found = re.findall(r"(?<![a-z])([a-z]+)[ _=:-]?(\d+)(?![\d.])", text.lower())
    return {rules.degrees[key]: int(number) for key, number in found if key in rules.degrees}


def _written(
    row: Row, rules: Rules, model: str, axes: Mapping[str, int], degrees: Mapping[str, int]
) -> tuple[str, ...]:
    """Axes and parameters as specs, one for each number of patches that is open."""
    wide = {axis: axes[axis] for axis in ORDER if axes.get(axis, 1) > 1}
    options = [f"{axis}={degree}" for axis, degree in wide.items()] or ["serial"]
    text = words(f"{row['strategy']} {row['params']}")
    if "stride" in degrees and "asyncdiff" in wide:
        options.append(f"stride={degrees['stride']}")
    options += [
        rule.add for rule in rules.options if rule.axis in wide and re.search(rule.match, text)
    ]
    stated = re.match(r"\D*(\d+)", row["warmup_steps"])
    usual = [
        rule.steps for rule in rules.warmup if rule.axis in wide and re.search(rule.model, model)
    ]
    if usual:
        options.append(f"warmup={stated[1] if stated else usual[0]}")
    if "pipefusion" not in wide:
        return (_checked(row, ",".join(options)),)
    options.append("stages=balanced")
    patches = [degrees["patches"]] if "patches" in degrees else rules.patches
    return tuple(_checked(row, ",".join((*options, f"patches={m}"))) for m in patches)


def _checked(row: Row, text: str) -> str:
    """``text`` if it is a spec and takes the row's GPUs."""
    unknown = [axis for axis in re.findall(r"(\w+)=", text) if axis in ORDER]
    try:
        spec = parse_spec(text)
    except SpecError as error:
        raise NotCovered(f"not a strategy of paradiff: {error}") from None
    if spec.n_gpus != row.n_gpus and unknown:
        raise NotCovered(f"{text} takes {spec.n_gpus} GPUs, the row says {row.n_gpus}")
    return text
