"""Published runs: rows of a CSV file, and what each means as a model, a box, a workload and a spec.

A row is read once (:func:`read_rows`) and understood by rules (:class:`Rules`, one YAML file): patterns
over its words, never over its id or its source. :func:`understand` gives a :class:`Case`, or raises
:class:`NotCovered` with the reason. How long a case takes is predicted in ``analysis.scoreboard``.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args

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
ORDER = (
    "cfg", "distrifusion", "pcpp", "pipefusion", "patch", "asyncdiff", "parastep", "batchstep",
    "streambatch", "tensor", "ulysses", "ring", "data",
)  # fmt: skip
"""Axes of a spec in the order they are written."""
HYBRID = ("cfg", "ulysses", "ring", "pipefusion")
"""Axes that engines combine where a source only says that it took the best hybrid."""
WHOLE = "sequence"
"""Of degrees: ulysses times ring."""
TOKEN = re.compile(
    r"(\d+)(?:[ -]?way|x(?= [a-z])|(?= patches))|([a-z_]+)|(\d+(?:\.\d+)?)|([^\s\w])"
)
"""A number of what follows (``4-way``, ``2x``), a word, another number, a mark."""
JOINING = "=:-\u2013(\u00d7*"
"""Marks that may stand between the name of an axis and its degree."""
LATER = ("stride", "warmup", "stages", "patches", "serial")
"""Parameters of a spec that have a place of their own in it."""
MAX_HYBRID = 16
COUNTED = re.compile(r"^(?:\d{1,3}(?!\d) ?x? ?)+(?=[a-z])| ?x ?\d{1,3}$")
"""How many machines and GPUs, before the name of one or behind: ``8x``, ``2x8x``, ``x8``."""


class NotCovered(ValueError):
    """A row that paradiff has no prediction for; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published run. Seconds are of the whole run; None where the source prints none."""

    place: str
    """File and line."""
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

    ``runtime`` is the row's, ``baseline_runtime`` that of the one-GPU run it is compared with. ``notes``
    say what of the row was not taken at its word.
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
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------- rules


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({text!r}): {error}") from None
    return text


Match = Annotated[str, AfterValidator(_pattern)]
LinkKind = Literal["bridge", "nvlink", "pcie"]
USUAL = "usual"
"""Of a link: what GPUs of this model have."""


class Rule(Strict):
    """What a text means in which ``match`` is found; or, ``reason``, why a row with it is left out."""

    match: Match
    """A regular expression; the words are lower case, other characters spaces."""
    unless: Match | None = None
    """A regular expression: where this is found too, the rule does not hold."""
    means: str = ""
    """What such rows mean."""
    note: str | None = None
    """What of such rows is then not taken at its word."""
    reason: str | None = None
    """Why such rows are left out."""

    def holds(self, text: str) -> bool:
        """Whether it is about ``text``."""
        left_out = self.unless is not None and re.search(self.unless, text) is not None
        return not left_out and re.search(self.match, text) is not None


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
    note: str | None = None
    """How it differs from what rows mean."""


class OptionRule(Strict):
    """Parameters of a spec that has ``axis`` where ``match`` is found."""

    match: Match
    """A regular expression, in strategy and parameters."""
    axis: str = ""
    """The part of a spec that it is for; left out, any."""
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
    """Column ``interconnect`` to what joins the GPUs of one machine."""
    sxm: tuple[str, ...]
    """GPUs that NVLink joins where a row does not say."""
    boxes: tuple[BoxRule, ...]
    """Link, GPU and size to a box."""
    guidance: tuple[Rule, ...]
    """Column ``cfg`` to how many branches an evaluation has, ``one`` or ``two``."""
    refused: tuple[Rule, ...]
    """Strategies and parameters that nothing here stands for."""
    single: Match
    """Strategies of rows on one GPU that divide nothing."""
    best: Match
    """Strategies of which the source only says that it took the best hybrid."""
    axes: tuple[Rule, ...]
    """Column ``strategy`` to parts of a spec."""
    between: frozenset[str]
    """Words that may stand between the name of an axis and its degree."""
    idle: frozenset[str]
    """Words of strategies and parameters that add nothing; others are noted."""
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
            "links": (*get_args(LinkKind), USUAL),
            "guidance": ("one", "two"),
            "axes": (*ORDER, "usp"),
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
            row = _row(dict(zip(header, cells, strict=True)), f"{file}:{line}")
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


def _row(cells: Mapping[str, str], place: str) -> Row:
    if not cells["id"].strip():
        raise ConfigError(f"{place}: id: blank, allowed: a name of its own for each row")
    return Row(
        place,
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


def _rule(rules: Sequence[Rule], text: str, what: str, beside: str = "") -> Rule:
    """The first that is about ``text``, with what is known ``beside`` it behind. Raises NotCovered with
    its reason, or where there is none."""
    found = next((rule for rule in rules if rule.holds(f"{text} {beside}".strip())), None)
    if found is None:
        known = ", ".join(dict.fromkeys(rule.means for rule in rules if rule.means))
        raise NotCovered(f"no rule knows this {what}: {text or 'blank'}; known: {known}")
    if found.reason is not None:
        raise NotCovered(found.reason)
    return found


def box_sizes(rows: Sequence[Row]) -> dict[tuple[str, ...], int]:
    """Words that describe a machine -> the most GPUs that a row with them takes."""
    sizes: dict[tuple[str, ...], int] = {}
    for row in rows:
        sizes[row.machine] = max(sizes.get(row.machine, 1), row.n_gpus)
    return sizes


class _Hardware(NamedTuple):
    gpu: str
    topology: str
    overrides: tuple[str, ...]
    notes: tuple[str | None, ...] = ()


def understand(
    row: Row, rules: Rules, profiles: Mapping[str, Profile], box_gpus: int | None = None
) -> Case:
    """The case that ``row`` describes. ``profiles`` are looked up by the names that rules give;
    ``box_gpus`` is how many GPUs the machine has at least (default: what the row takes).

    Raises NotCovered with the reason where there is none.
    """
    own = words(f"{row['strategy']} {row['params']}")
    for rule in rules.refused:
        if rule.holds(own):
            raise NotCovered(rule.reason or rule.match)
    model = _rule(rules.models, words(row["model"]), "model")
    profile = profiles[model.means]
    _check_guidance(row, rules, profile)
    workload = _workload(row, rules, profile)
    clock = words(row.tag("scope")) + (" video" if workload.frames > 1 else "")
    box = _hardware(row, rules, box_gpus or row.n_gpus)
    notes = words(row["notes"])
    baseline_runtime = _rule(rules.runtimes, notes, "runtime").means
    runtime = _rule(rules.runtimes, own, "runtime").means
    specs = _specs(row, rules, profile)
    kinds = {re.sub(r",patches=\d+", "", spec) for spec in specs}
    best = f"the best of {len(kinds)} ways to divide it" if len(kinds) > 1 else None
    told = (model.note, *box.notes, best, _passed_over(row, rules))
    return Case(
        model=profile.name,
        topology=box.topology,
        overrides=box.overrides,
        gpu=box.gpu,
        workload=workload,
        specs=specs,
        n_gpus=row.n_gpus,
        scope=cast(Scope, _rule(rules.scopes, clock, "scope").means),
        runtime=cast(Runtime, runtime if runtime != "eager" else baseline_runtime),
        baseline_runtime=cast(Runtime, baseline_runtime),
        attention=_rule(rules.attention, notes, "attention").means,
        notes=tuple(filter(None, told)),
    )


def with_possible_warmup(case: Case, row: Row) -> Case:
    """``case`` with fewer warm-up steps in its pipeline where the row's own speed-up refutes them.

    A warm-up step takes a whole picture through the stages one after another, so with w of T steps,
    guidance over c and n GPUs in all no run is faster than T / (w / c + (T - w) / n) times one GPU.
    PipeFusion's 7.91 times for PixArt at 2048 px with w = 1, T = 20, c = 2, n = 8 cannot be: 6.96 at
    most.
    """
    found = [re.search(r"pipefusion=\d+.*warmup=(\d+)", spec) for spec in case.specs]
    stated = found[0] if all(found) else None
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
    return replace(case, specs=specs, notes=(*case.notes, note))


def _check_guidance(row: Row, rules: Rules, profile: Profile) -> None:
    guided = "two" if profile.geometry.guidance == "cfg" else "one"
    text = words(row["cfg"])
    told = next((rule.means for rule in rules.guidance if rule.holds(text)), guided)
    if told != guided:
        known = "with" if guided == "two" else "without"
        raise NotCovered(f"guidance is {row['cfg']}; {profile.name} is known {known} two branches")


def _workload(row: Row, rules: Rules, profile: Profile) -> Workload:
    """Sizes as the row has them, else the model's own."""
    sizes: dict[str, Any] = {}
    for column in ("height", "width", "frames", "steps", "batch"):
        text = row[column].strip()
        found = re.match(r"(\d+) ?(k|px|f)?(?![\w.])(?! ?(s|sec|seconds|p)\b)", text.lower())
        if text and (found is None or not int(found[1])):
            raise NotCovered(f"{column} is {text!r}, not a number")
        default = profile.defaults.get(column, 1)
        sizes[column] = int(found[1]) * (1024 if found[2] == "k" else 1) if found else default
    dtype = _rule(rules.dtypes, words(row["precision"]), "precision").means
    return Workload(**sizes, dtype=dtype)


def _hardware(row: Row, rules: Rules, gpus: int) -> _Hardware:
    """GPU, topology and overrides. A tag ``box=NAME`` in the notes names a shipped topology itself."""
    name, joined = words(row["gpu"]), words(row["interconnect"])
    count = COUNTED.search(name)
    if count is not None:
        gpus = max(gpus, math.prod(map(int, re.findall(r"\d+", count[0]))))
        name = COUNTED.sub("", name)
    told = [r.means for text in (joined, name) for r in rules.links if text and r.holds(text)]
    said = next((link for link in told if link != USUAL), "")
    rule = _rule(rules.gpus, name, "GPU", said)
    gpu = rule.means
    if named := row.tag("box"):
        if named not in available("topologies"):
            raise NotCovered(f"box={named} is no shipped topology")
        return _Hardware(gpu, named, (), (rule.note,))
    link = said or ("nvlink" if gpu in rules.sxm else "pcie")
    known = not joined or any(each.holds(joined) for each in rules.links)
    note = None if known else f"interconnect {row['interconnect']!r} is not known: taken as {link}"
    fitting = [box for box in rules.boxes if box.link == link and re.search(box.gpu, gpu)]
    for size in (gpus, row.n_gpus):
        for box in fitting:
            if size <= box.gpus:
                set_, notes = (*box.set, f"gpu={gpu}"), (rule.note, note, box.note)
                return _Hardware(gpu, box.topology, set_, notes)
    most = max((box.gpus for box in fitting), default=0)
    raise NotCovered(
        f"no box of {row.n_gpus} {gpu} with {link}: {most} at most; a tag box=NAME in notes names one"
    )


# ------------------------------------------------------------------------------------------- specs


def _specs(row: Row, rules: Rules, profile: Profile) -> tuple[str, ...]:
    """The spec in our words; several where the source reports the best of them."""
    text, said = words(row["strategy"]), f"{row['strategy']} {row['params']}".strip()
    if _is_single(row, rules):
        return ("serial",)
    if (own := _as_a_spec(row)) is not None:
        divided = {axis: int(own.pop(axis)) for axis in ORDER if axis in own}
        return _written(row, rules, profile.name, divided, own)
    named = _named(text, rules)
    degrees = _degrees(row, rules)
    stated = {*ORDER, WHOLE} & degrees.keys()
    if not named and not stated and re.search(rules.best, text):
        return tuple(_hybrids(row, rules, profile))
    if not named and (_left_over(text, rules) or not stated):
        raise NotCovered(f"no rule knows this strategy: {said}")
    named = named or _named(words(row["params"]), rules)
    if "pipefusion" in named and "patch" in degrees:
        degrees["patches"] = degrees.pop("patch")
    axes = [axis for axis in named if axis != "usp"]
    axes += [axis for axis in degrees if axis in ORDER and axis not in axes]
    if "usp" in named:
        axes += [axis for axis in ("ulysses", "ring") if axis not in axes]
    elif WHOLE in degrees and not {"ulysses", "ring"} & set(axes):
        axes.append("ulysses")
    taken = {axis: max(1, degrees[axis]) for axis in axes if axis in degrees}
    if "degree" in degrees and len(axes) == 1:
        taken.setdefault(axes[0], degrees["degree"])
    options = {key: str(n) for key, n in degrees.items() if key in ("stride", "patches", "warmup")}
    found = (
        _written(row, rules, profile.name, taken | shares, options)
        for shares in _shares(row, [axis for axis in axes if axis not in taken], taken, degrees)
    )
    return tuple(spec for specs in found for spec in specs)


def _named(text: str, rules: Rules) -> list[str]:
    """The axes whose words are in ``text``."""
    return list(dict.fromkeys(rule.means for rule in rules.axes if rule.holds(text)))


def _is_single(row: Row, rules: Rules) -> bool:
    """Whether it divides nothing."""
    return row.n_gpus == 1 and re.search(rules.single, words(row["strategy"])) is not None


def _as_a_spec(row: Row) -> dict[str, str] | None:
    """The keys and values of a row whose words are a spec of ours; None where they are not."""
    text = ",".join(filter(None, (row["strategy"].strip(), row["params"].strip())))
    try:
        return dict(parse_spec(text).options) if "=" in text else None
    except SpecError:
        return None


def _shares(
    row: Row, axes: Sequence[str], known: Mapping[str, int], degrees: Mapping[str, int]
) -> list[dict[str, int]]:
    """What ``axes`` without a degree may take of the GPUs that ``known`` ones leave: ulysses and ring
    every split of the sequence's share, another axis the rest."""
    sequence = [axis for axis in axes if axis in ("ulysses", "ring")]
    others = [axis for axis in axes if axis not in sequence]
    left = row.n_gpus // math.prod(known.values())
    whole = degrees.get(WHOLE, 0 if sequence and others else left)
    if len(others) > 1 or (others and sequence and not whole):
        said = f"{row['strategy']} {row['params']}".strip()
        raise NotCovered(f"degrees are not stated: {said}")
    rest = dict.fromkeys(others, left // max(whole, 1) if sequence else left)
    if len(sequence) < 2:
        return [rest | dict.fromkeys(sequence, whole)]
    splits = [(u, whole // u) for u in range(2, whole) if whole % u == 0] or [(whole, 1)]
    return [rest | {"ulysses": u, "ring": r} for u, r in splits]


def _hybrids(row: Row, rules: Rules, profile: Profile) -> Iterator[str]:
    """Every product of the HYBRID axes on the row's GPUs. Raises NotCovered where these are too many."""
    if row.n_gpus > MAX_HYBRID:
        raise NotCovered(
            f"which hybrid of {row.n_gpus} GPUs is not said; of {MAX_HYBRID} all are tried"
        )
    branches = 2 if profile.geometry.guidance == "cfg" else 1
    sizes = [n for n in range(1, row.n_gpus + 1) if row.n_gpus % n == 0]
    for degrees in itertools.product(sizes, repeat=len(HYBRID)):
        axes = dict(zip(HYBRID, degrees, strict=True))
        if math.prod(degrees) == row.n_gpus and axes["cfg"] <= branches:
            yield from _written(row, rules, profile.name, axes, {})


def _degrees(row: Row, rules: Rules) -> dict[str, int]:
    """Axis or parameter -> number, of a name before its number (``u2r4``, ``Ulysses-4``, ``tensor
    parallel size = 2``) or behind it (``4-way Ulysses``)."""
    keys, between = {axis: axis for axis in ORDER} | rules.degrees, {"", *rules.between}
    found: dict[str, int] = {}
    for text in (row["strategy"], row["params"]):
        key, ways = "", ""
        for before, word, number, mark in TOKEN.findall(text.lower()):
            name = keys.get(word.strip("_"), "")
            if name and ways:
                found[name], key, ways = int(ways), "", ""
            elif name or (before and not key):
                key, ways = name, before
            elif key and (before or number).isdecimal():
                found[key], key = int(before or number), ""
            elif number or word not in between or mark not in JOINING:
                key, ways = "", ""
    return found


def _left_over(text: str, rules: Rules) -> list[str]:
    """Words of ``text`` that no rule for strategies reads."""
    for match in (*(rule.match for rule in rules.axes), *(rule.match for rule in rules.options)):
        text = re.sub(match, " ", text)
    read = {*ORDER, *rules.degrees, *rules.between, *rules.idle}
    return [word for word in re.findall(r"[a-z]{2,}", text) if word not in read]


def _passed_over(row: Row, rules: Rules) -> str | None:
    """What to note of a strategy with words that were not read."""
    if _is_single(row, rules) or _as_a_spec(row) is not None:
        return None
    left = dict.fromkeys(_left_over(words(f"{row['strategy']} {row['params']}"), rules))
    return f"strategy: not read: {', '.join(left)}" if left else None


def _written(
    row: Row, rules: Rules, model: str, axes: Mapping[str, int], options: Mapping[str, str]
) -> tuple[str, ...]:
    """Axes and options as specs, one for each number of patches that is open."""
    wide = {axis: axes[axis] for axis in ORDER if axes.get(axis, 1) > 1}
    spec = {axis: str(degree) for axis, degree in wide.items()}
    text = words(f"{row['strategy']} {row['params']}")
    if "stride" in options and "asyncdiff" in wide:
        spec["stride"] = options["stride"]
    for rule in rules.options:
        if (rule.axis in wide or not rule.axis) and re.search(rule.match, text):
            key, _, value = rule.add.partition("=")
            spec[key] = value
    spec |= {key: value for key, value in options.items() if key not in LATER}
    stated = re.match(r"\D*(\d+)", row["warmup_steps"])
    told = stated[1] if stated else options.get("warmup")
    usual = [r.steps for r in rules.warmup if r.axis in wide and re.search(r.model, model)]
    if usual:
        spec["warmup"] = told or str(usual[0])
    if "pipefusion" not in wide:
        return (_checked(row, spec),)
    spec["stages"] = options.get("stages", "balanced")
    patches = [options["patches"]] if "patches" in options else rules.patches
    return tuple(_checked(row, {**spec, "patches": str(m)}) for m in patches)


def _checked(row: Row, options: Mapping[str, str]) -> str:
    """The spec of these options, if it is one and takes the row's GPUs."""
    text = ",".join(f"{key}={value}" for key, value in options.items()) or "serial"
    try:
        spec = parse_spec(text)
    except SpecError as error:
        raise NotCovered(f"not a strategy of paradiff: {error}") from None
    if spec.n_gpus != row.n_gpus:
        takes = "takes 1 GPU" if spec.n_gpus == 1 else f"takes {spec.n_gpus} GPUs"
        raise NotCovered(f"{text} {takes}, the row says {row.n_gpus}")
    return text
