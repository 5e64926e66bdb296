"""Write docs/reference.md: options of every command, keys of every file, fields of every result.

``python tools/reference.py``. Options come from the command line's own definitions, keys of files from
the models that read them, fields of results from small answers that are made here, their meanings from
``tools/glossary.py``.
``tests/test_reference.py`` fails while the page is not what this makes.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import json
import os
import re
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import glossary
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from analysis import validation_report
from analysis.capacity import CSV_COLUMNS
from analysis.comparison import compare
from analysis.published import Rules
from paradiff import units
from paradiff.cli import app
from paradiff.config import available, find
from paradiff.lab import report as lab_report
from paradiff.lab.calibration import CALLS, Calibration
from paradiff.lab.cells import MODEL
from paradiff.lab.laboratory import Cell, Oracle, Result, Verdict
from paradiff.planfile import PlanFile
from paradiff.profiles import KERNEL_DIMS, Profile, load_profile
from paradiff.strategies import (
    AXES,
    STRATEGIES,
    Infeasible,
    SpecError,
    Workload,
    build,
    parse_spec,
)
from simulator import lint, measured, measured_network, quality, sweep, topology, traffic
from simulator.gpu import Gpu
from simulator.measured_machine import CallTime

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
HEADER = """# Reference

Every option of every command, every key of every file, every field of every result. Made by
`python tools/reference.py`; `tests/test_reference.py` fails while it is not current. What the words
mean: [README](../README.md), [hardware_profiles](../hardware_profiles/README.md), [model.md](model.md).

Options may be written with `_` for `-`. Exit codes: 0 done, 1 a run or a check failed, 2 malformed
input, 3 nothing can run, 130 interrupted.
"""
FILES: Sequence[tuple[str, str, type[BaseModel]]] = (
    (
        "Box",
        "`hardware_profiles/topologies/NAME.yaml`, or your own for `--topology`",
        topology.TopologyFile,
    ),
    ("GPU", "`hardware_profiles/gpus/NAME.yaml`, or your own in a box's `gpu`", Gpu),
    ("Sweep", "`paradiff plan --sweep FILE`", sweep.SweepFile),
    ("Mix", "`paradiff capacity --mix FILE`", traffic.MixFile),
    ("Plan file", "`NN-SPEC.plan.yaml` of `--output-dir`, for `paradiff run`", PlanFile),
    ("Rules of published runs", "`hardware_profiles/published/rules.yaml`", Rules),
)
"""Title, where it is, and the model that reads it."""
SPLITS = (*AXES, *(name for name in STRATEGIES if name != "serial"))
DEGREES, STEPS = (2, 4, 8), 4
"""With a warm-up of one step where there is one."""
RUNS = find("published", "runs", ".csv")
PUBLISHED = ("DF-006", "DF-007", "DF-008", "DF-009")
"""Rows that are predicted with and without their own latency on one GPU."""


class Answer(NamedTuple):
    """A document: its title, what the glossary calls it, where it comes from, keys that are names (path
    -> what they name), and fields whose own fields are said in words."""

    title: str
    called: str
    make: Callable[[], Any]
    names: Mapping[str, str] = {}
    words: Mapping[str, str] = {}


def printed(*arguments: str) -> Any:
    """The JSON that a command prints."""
    done = CliRunner().invoke(app, list(arguments))
    if done.exit_code:
        raise RuntimeError(f"{arguments}: exit {done.exit_code}\n{done.output}")
    return json.loads(done.stdout)


@cache
def run_here() -> Mapping[str, Any]:
    """The JSON files of ``paradiff validate run``, all ranks in one process, nothing kept."""
    kept = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            printed(
                "validate", "run", "--model", MODEL, "--strategy", "cfg=2", "--height", "64",
                "--width", "64", "--steps", "1", "--repeats", "1", "--warmup-runs", "0",
                "--max-error", "1000", "--in-process", "--format", "json",
                "--output-dir", f"{folder}/out",
            )  # fmt: skip
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            os.environ.update({} if kept is None else {"XDG_CACHE_HOME": kept})
        return {
            file.name: json.loads(file.read_text()) for file in Path(folder, "out").glob("*.json")
        }


def scored() -> Any:
    """``paradiff validate published`` on a few rows."""
    lines = csv.DictReader(RUNS.read_text(encoding="utf-8").splitlines())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.csv"
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, lines.fieldnames or ())
            writer.writeheader()
            writer.writerows(line for line in lines if line["id"] in PUBLISHED)
        return printed("validate", "published", "--data", str(file), "--format", "json")


def laboratory() -> Any:
    """What ``paradiff validate lab`` would write had links done as predicted: hosts need root."""
    calls = {(call, n, 4): 1e-3 for call in CALLS for n in (2, 4)}
    calibration = Calibration(calls, 5e-5, 1e9)
    box, profile = topology.load_topology("lab-star"), load_profile(find("models", MODEL, ".json"))
    results = []
    for spec in ("patch=4", "ulysses=4"):
        cell = Cell(MODEL, spec, 128, 64, 1, "communication")
        predicted = Oracle(box, calibration).predict(profile, cell)
        repeats = [predicted.trace.expanded()] * 2
        results.append(Result(box.name, predicted, compare(predicted.trace, repeats)))
    return lab_report.to_json(Verdict(tuple(results), 0.1), calibration, 2, {})


def models() -> Any:
    """Every shipped profile."""
    names = available("models", ".json")
    return [json.loads(find("models", n, ".json").read_text(encoding="utf-8")) for n in names]


def record(kind: type[Any]) -> str:
    """The fields of a dataclass, in words."""
    return ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind))


SMALL = ("--topology", "nvlink8-h100", "--model", "sd21", "--format", "json")
MACHINES = "list: of each machine its ranks, and what `paradiff env` says there"
LOST = "number: share of a transfer's time that compute beside it loses; null in one process"
KINDS_OF_KERNEL = "; ".join(
    f"`{kind}`: {', '.join(f'`{dim}`' for dim in dims)}" for kind, dims in KERNEL_DIMS.items()
)
RESULTS: Sequence[Answer] = (
    Answer(
        "`paradiff plan --format json`, `plan.json`",
        "plan",
        partial(printed, "plan", *SMALL, "--strategy", "cfg=2", "--strategy", "patch=2",
                "--strategy", "tensor=2", "--measured-latency", "2"),
    ),
    Answer(
        "`paradiff capacity --format json`, `capacity.json`",
        "capacity",
        partial(printed, "capacity", *SMALL, "--request-rate", "0.5", "--slo", "p95=20s",
                "--num-prompts", "100", "--replications", "2", "--strategy", "serial",
                "--sharing", "static", "--processes", "1"),
    ),
    Answer(
        "`paradiff run --format json`, `summary.json`",
        "run",
        partial(printed, "run", "--model", "sd21", "--strategy", "serial", "--steps", "1",
                "--format", "json"),
        words={"machines": MACHINES},
    ),
    Answer(
        "`paradiff validate run --format json`, its `validation.json`",
        "compared",
        lambda: run_here()["validation.json"],
        {"by_kind": "KIND", "by_call": "CALL", "topology.nodes": "HOST"},
        {
            "machines": MACHINES,
            "measured.compute_lost_beside_a_transfer": LOST,
            "topology.links": f"list: {record(topology.Link)}",
            "topology.collectives": f"list: {record(topology.CollectiveTable)}",
        },
    ),
    Answer(
        "`machine.json` of `paradiff validate run`",
        "machine",
        lambda: run_here()["machine.json"],
        {"works": "WORK"},
        {
            "calls": f"list of [{', '.join(f'`{name}`' for name in CallTime._fields)}]",
            "lost": LOST,
            "kernels": "list of [kind, dimensions, "
            + ", ".join(f"`{name}`" for name in measured.Row._fields) + "]",
        },
    ),
    Answer(
        "`paradiff validate published --format json`, its `validation.json`", "published", scored
    ),
    Answer(
        "`paradiff validate lab --format json`, `lab.json`",
        "lab",
        laboratory,
        {"calibration.call_s": "CALL RANKS of ALL", "cells[].by_call": "CALL"},
        {"machine": "object: what `paradiff env` says"},
    ),
    Answer(
        "`paradiff validate fidelity --format json`, `fidelity.json`",
        "fidelity",
        partial(printed, "validate", "fidelity", "--model", "small-dit", "--steps", "3",
                "--strategy", "parastep=2,warmup=1", "--strategy", "asyncdiff=2,warmup=1",
                "--samples", "6", "--format", "json"),
        {"results[].per_step": "METRIC", "results[].final": "METRIC", "versions": "LIBRARY"},
        {"prompt": "text, or null"},
    ),
)  # fmt: skip
MODEL_FILE = Answer(
    "Model",
    "model",
    models,
    {
        "[].stages": "STAGE", "[].asyncdiff": "RANKS",
        "[].stages.STAGE.shape": "SYMBOL", "[].stages.STAGE.parents": "MODULE",
    },
    {
        "[].kernels": f"list of lists of [kind, count, dimensions...]; {KINDS_OF_KERNEL}",
        "[].stages.STAGE.cuts": "list of [module, its parent, first segment, last segment + 1, elements"
        " of its output, of its text]",
        "[].source": "object: versions it was traced with, classes and how they were configured, and the"
        " sizes that its expressions were fitted to (`probes`)",
        "[].skips": "list of [from, to], numbers of cuts",
    },
)  # fmt: skip
"""Texts in it are expressions of ``paradiff.profiles``."""
TABLES: Sequence[tuple[str, str, Sequence[str]]] = (
    ("arrivals", "`paradiff capacity --trace FILE`", (traffic.TIME, f"[{traffic.MODEL}]")),
    ("`sweep.csv`, `sweep.parquet`", "`paradiff plan --sweep`", sweep.COLUMNS),
    ("`capacity.csv`", "`paradiff capacity --output-dir`", (*CSV_COLUMNS, "latency_QUANTILE_s")),
    ("`kernels.csv`", "`paradiff profile kernels`", measured.COLUMNS),
    ("`network.csv`", "`paradiff profile network`", measured_network.COLUMNS),
    ("`gemm.csv`", "`hardware_profiles/measured/GPU/`", lint.COLUMNS["gemm"]),
    ("`attention.csv`", "`hardware_profiles/measured/GPU/`", lint.COLUMNS["attention"]),
    ("quality", "`paradiff plan --quality FILE`, `hardware_profiles/quality/published.csv`",
     quality.COLUMNS),
    ("`rows.csv`", "`paradiff validate published --output-dir`", validation_report.COLUMNS),
    ("`runs.csv`", "`hardware_profiles/published/`, `validate published --data`",
     RUNS.read_text(encoding="utf-8").split("\n")[0].split(",")),
)  # fmt: skip
"""What it is, where, and its columns."""


# ------------------------------------------------------------------------------------- commands


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below ``command`` with its words, in order of their names."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, below in sorted(command.commands.items()):
        yield from commands(below, (*path, name))


def command_text(path: tuple[str, ...], command: Any) -> str:
    """A section: what it does, its arguments and options, as ``--help`` has them."""
    context = command.context_class(command, info_name=path[-1])
    records = [(p, p.get_help_record(context)) for p in command.params]
    rows = [
        (
            f"`{names}`",
            sentence(text) + " Repeatable." * (p.param_type_name == "option" and p.multiple),
        )
        for p, (names, text) in records
    ]
    head = f"### `{' '.join(path)}`\n\n{sentence(command.help)}\n"
    return head + "\n" + table(("option", "meaning"), rows) if rows else head


# ------------------------------------------------------------------------------------- files


def file_text(title: str, where: str, model: type[BaseModel]) -> str:
    """A section: the keys of a file, and of what is nested in it."""
    text = f"### {title}\n\n{where}. {first_paragraph(model)}\n\n"
    text += keys_table(model)
    for inner in nested(model):
        text += f"\n**{name_of(inner)}**. {first_paragraph(inner)}\n\n" + keys_table(inner)
    return text


def nested(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The models below ``model``, each once, numbers with their source left out."""
    found: dict[type[BaseModel], None] = {}

    def visit(annotation: Any) -> None:
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if is_model and annotation not in found and not is_figure(annotation):
            found[annotation] = None
            visit_fields(annotation)
        for argument in get_args(annotation):
            visit(argument)

    def visit_fields(of: type[BaseModel]) -> None:
        for info in of.model_fields.values():
            visit(info.annotation)

    visit_fields(model)
    return [each for each in found if each is not model]


def is_figure(model: type[BaseModel]) -> bool:
    """A number with kind and source and nothing else."""
    return set(model.model_fields) == {"value", "kind", "source"}


def name_of(model: type[BaseModel]) -> str:
    return re.sub(r"File$", "", model.__name__).partition("[")[0]


def keys_table(model: type[BaseModel]) -> str:
    rows = []
    for name, info in model.model_fields.items():
        default = "required" if info.is_required() else shown_default(info)
        rows.append((f"`{info.alias or name}`", type_text(info), default, meaning(model, name)))
    return table(("key", "value", "default", "meaning"), rows)


def shown_default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True, validated_data={})
    if default is None or default == () or default == "" or default == {}:
        return ""
    return f"`{json.dumps(default, default=list)}`"


def meaning(model: type[BaseModel], name: str) -> str:
    """What a key is: the string that follows it in the source, else that of the option of ``paradiff
    plan`` that has its name, or of which it holds several. Raises LookupError where there is neither."""
    own = (attribute_docs(kind) for kind in model.__mro__ if "[" not in kind.__name__)
    options = (plan_options().get(each, "") for each in singulars(name))
    texts = chain((docs.get(name) for docs in own), options)
    found = next(filter(None, texts), None)
    if found is None:
        raise LookupError(f"{model.__name__}.{name}: no string below it says what it means")
    return sentence(found)


def singulars(name: str) -> Sequence[str]:
    """A key, and what it might be the plural of."""
    return (name, name.removesuffix("s"), name.removesuffix("es"), re.sub("ies$", "y", name))


@cache
def plan_options() -> Mapping[str, str]:
    """Option of ``paradiff plan`` -> its help."""
    command = dict(commands(typer.main.get_command(app), ()))["plan",]
    return {p.name: p.help for p in command.params}


@cache
def attribute_docs(model: type[Any]) -> dict[str, str]:
    """The string that follows each field in the source."""
    if not dataclasses.is_dataclass(model) and not issubclass(model, BaseModel):
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and is_text:
            found[before.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return found


def type_text(info: FieldInfo) -> str:
    """What may be written: a quantity by its example, a choice by its words."""
    return text_of(info.annotation, info.metadata)


WRITTEN: Sequence[tuple[Any, str]] = (
    (units.Bytes, "`48 GiB`"),
    (units.BytesPerSecond, "`26 GB/s`"),
    (units.Seconds, "`2 us`"),
    (units.PositiveSeconds, "`2 us`"),
    (units.FlopPerSecond, "`181 TFLOP/s`"),
    (units.Watts, "`350 W`"),
    (units.Dollars, "`9.1 USD`"),
    (topology.Names, "names (`gpu0..gpu3`)"),
    (topology.GpuEntry, "names, or `{NAMES: GPU}`"),
)
"""How a value that is read from text is written."""


def text_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    for kind, example in WRITTEN:
        if metadata and list(kind.__metadata__) == list(metadata):
            return example
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return text_of(arguments[0], arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(text_of(a) for a in arguments if a is not type(None))
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return "[" + ", ".join(text_of(a) for a in arguments) + "]"
    if origin in (tuple, list):
        return f"list of {text_of(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"{text_of(arguments[0])}: {text_of(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if is_figure(annotation):
            return f"{{value: {type_text(annotation.model_fields['value'])}, kind, source}}"
        return name_of(annotation)
    words = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
    return words.get(annotation, str(annotation))


# ------------------------------------------------------------------------------------- strategies


def strategies_text() -> str:
    """What each strategy is given and goes with, and which model takes it over how many GPUs."""
    composed = [
        (
            f"`{name}{'' if name == 'serial' else '=N'}`",
            ", ".join(f"`{axis}`" for axis in AXES if axis in each.axes) or "none",
            ", ".join(f"`{name}`" for name in each.passes) or "its own",
            ", ".join(f"`{key}`" for key in each.parameters) or "none",
        )
        for name, each in STRATEGIES.items()
    ]
    taken = [
        (
            f"`{name}`",
            *(degrees(load_profile(find("models", name, ".json")), axis) for axis in SPLITS),
        )
        for name in available("models", ".json")
    ]
    head = (
        "A spec is degrees, then parameters: `cfg=2,pipefusion=4,patches=8`. What goes with what; passes"
        ": what a step strategy may run in each step instead of its own."
    )
    sizes = (
        f"Which of {', '.join(map(str, DEGREES))} GPUs each model can be split over, alone, at its own"
        " size (other degrees may divide, too; whether it fits is another matter). Why not: ask for it,"
        " and `paradiff plan` says the reason and the nearest that can run."
    )
    columns = ("strategy", "axes that go with it", "passes", "parameters of its own")
    return "\n\n".join(
        (
            "## Strategies",
            head,
            table(columns, composed),
            sizes,
            table(("model", *(f"`{axis}`" for axis in SPLITS)), taken),
        )
    )


def degrees(profile: Profile, axis: str) -> str:
    """Those of DEGREES over which ``axis`` splits the model at its own size."""
    sizes = (profile.defaults[key] for key in ("height", "width", "frames"))
    workload = Workload(*sizes, steps=STEPS)
    is_warmed = axis in STRATEGIES and "warmup" in STRATEGIES[axis].parameters
    found = []
    for degree in DEGREES:
        try:
            spec = parse_spec(f"{axis}={degree}{',warmup=1' * is_warmed}")
            build(spec, profile, workload)
        except (Infeasible, SpecError):
            continue
        found.append(str(degree))
    return " ".join(found) or "-"


# ------------------------------------------------------------------------------------- results


def result_text(answer: Answer) -> str:
    """A section: the fields of a JSON document, with the kind of each value and what it means."""
    return f"### {answer.title}\n\n" + fields_table(answer)


def fields_table(answer: Answer) -> str:
    rows = [
        (f"`{path}`", kind, glossary.meaning(f"{answer.called}.{path}"))
        for path, kind in fields(answer.make(), answer).items()
    ]
    return table(("field", "value", "meaning"), rows)


def model_text() -> str:
    """A section: the fields of the models' files."""
    head = (
        "### Model\n\n`hardware_profiles/models/NAME.json`, or your own for `--model`; written by"
        " `paradiff profile trace`. Values in text are whole-number expressions of the sizes of a"
        " request (`paradiff/profiles.py`).\n\n"
    )
    return head + fields_table(MODEL_FILE).replace("| `[].", "| `")


def fields(data: Any, answer: Answer, path: str = "") -> dict[str, str]:
    """Path of every value of a document -> its kind. Entries of a list are one, and so are those of an
    object whose keys are names; what is null or empty in one of them has the kind of the others."""
    if path in answer.words:
        return {path: answer.words[path]}
    below: list[tuple[str, Any]] = []
    if isinstance(data, list):
        below = [(f"{path}[]", value) for value in data]
    elif isinstance(data, dict):
        dot = f"{path}." if path else ""
        named = answer.names.get(path)
        below = [(dot + (named or key), value) for key, value in data.items()]
    found: dict[str, str] = {}
    for deeper, value in below:
        for name, kind in fields(value, answer, deeper).items():
            if found.get(name, "null") == "null":
                found[name] = kind
    if not found:
        return {path: f"`{data}`" if path == "schema" else KINDS[type(data)]}
    nulls = [name for name, kind in found.items() if kind in ("null", "object", "list")]
    told = [name for name in nulls if any(x.startswith((f"{name}.", f"{name}[")) for x in found)]
    return {name: kind for name, kind in found.items() if name not in told}


KINDS: Mapping[type, str] = {
    bool: "true, false", int: "number", float: "number", str: "text", type(None): "null", dict: "object",
    list: "list",
}  # fmt: skip


# ------------------------------------------------------------------------------------- the page


def first_paragraph(model: type[BaseModel]) -> str:
    return sentence((model.__doc__ or "").strip().split("\n\n")[0])


def sentence(text: str) -> str:
    """On one line, names as Markdown writes them."""
    return " ".join(text.split()).replace("``", "`")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole reference."""
    root = typer.main.get_command(app)
    parts = [HEADER, "## Commands\n"]
    parts += [command_text(("paradiff", *path), each) for path, each in commands(root, ())]
    parts.append("`paradiff-plan` is `paradiff plan`.\n")
    parts.append("## Files that are read\n")
    parts += [file_text(*each) for each in FILES]
    parts.append(model_text())
    parts.append(strategies_text())
    parts.append("## Tables\n\nCSV with a header line; `#` lines before it say how it was made.\n")
    parts.append(
        table(
            ("file", "where", "columns"),
            [
                (what, where, " ".join(f"`{name}`" for name in names))
                for what, where, names in TABLES
            ],
        )
    )
    about = (
        "`[]` stands for each entry of a list, a word in capitals for a name that is a key, `null` for"
        " what does not apply here."
    )
    parts.append(f"## Results\n\nFields of JSON answers; {about}\n")
    parts += [result_text(each) for each in RESULTS]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
