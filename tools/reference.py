"""Write docs/reference.md: options of every command, keys of every file, fields of every result.

``python tools/reference.py``. Options come from the command line's own definitions, keys of files from
the models that read them, fields of results from small answers that are made here.
``tests/test_reference.py`` fails while the page is not what this makes.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from analysis.capacity import CSV_COLUMNS
from analysis.published import Rules
from paradiff import units
from paradiff.cli import app
from paradiff.config import find
from paradiff.planfile import PlanFile
from simulator import lint, measured, measured_network, sweep, topology, traffic
from simulator.gpu import Gpu

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
RUNS = find("published", "runs", ".csv")
SMALL = ("--topology", "nvlink8-h100", "--model", "sd21", "--format", "json")
RESULTS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("`paradiff plan --format json`, `plan.json`",
     ("plan", *SMALL, "--strategy", "cfg=2", "--strategy", "patch=2", "--strategy", "tensor=2")),
    ("`paradiff capacity --format json`, `capacity.json`",
     ("capacity", *SMALL, "--request-rate", "0.5", "--slo", "p95=20s", "--num-prompts", "100",
      "--replications", "2", "--strategy", "serial", "--sharing", "static", "--processes", "1")),
    ("`paradiff run --format json`, `summary.json`",
     ("run", "--model", "sd21", "--strategy", "serial", "--steps", "1", "--format", "json")),
)  # fmt: skip
"""Title, and a command whose JSON has every field."""
OPAQUE = {"machines": "list: of each machine its ranks, and what `paradiff env` says there"}
"""Fields whose own fields are those of the machine."""
TABLES: Sequence[tuple[str, str, Sequence[str]]] = (
    ("arrivals", "`paradiff capacity --trace FILE`", (traffic.TIME, f"[{traffic.MODEL}]")),
    ("`sweep.csv`, `sweep.parquet`", "`paradiff plan --sweep`", sweep.COLUMNS),
    ("`capacity.csv`", "`paradiff capacity --output-dir`", (*CSV_COLUMNS, "latency_QUANTILE_s")),
    ("`kernels.csv`", "`paradiff profile kernels`", measured.COLUMNS),
    ("`network.csv`", "`paradiff profile network`", measured_network.COLUMNS),
    ("`gemm.csv`", "`hardware_profiles/measured/GPU/`", lint.COLUMNS["gemm"]),
    ("`attention.csv`", "`hardware_profiles/measured/GPU/`", lint.COLUMNS["attention"]),
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
    notes = attribute_docs(model)
    rows = []
    for name, info in model.model_fields.items():
        default = "required" if info.is_required() else shown_default(info)
        rows.append(
            (f"`{info.alias or name}`", type_text(info), default, sentence(notes.get(name, "")))
        )
    return table(("key", "value", "default", "meaning"), rows)


def shown_default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True, validated_data={})
    if default is None or default == () or default == "" or default == {}:
        return ""
    return f"`{json.dumps(default, default=list)}`"


def attribute_docs(model: type[BaseModel]) -> dict[str, str]:
    """The string that follows each field in the source."""
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


# ------------------------------------------------------------------------------------- results


def result_text(title: str, arguments: tuple[str, ...]) -> str:
    """A section: the fields of a JSON answer, with the kind of each value."""
    done = CliRunner().invoke(app, list(arguments))
    if done.exit_code:
        raise RuntimeError(f"{arguments}: exit {done.exit_code}\n{done.output}")
    rows = [(f"`{path}`", kind) for path, kind in fields(json.loads(done.stdout)).items()]
    return f"### {title}\n\n" + table(("field", "value"), rows)


def fields(data: Any, path: str = "") -> dict[str, str]:
    """Path of every value of a document -> its kind. Entries of a list are one; what is null in one of
    them has the kind of the others."""
    if path in OPAQUE:
        return {path: OPAQUE[path]}
    below = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    found: dict[str, str] = {}
    for key, value in below:
        deeper = f"{path}[]" if isinstance(data, list) else f"{path}.{key}" if path else key
        for name, kind in fields(value, deeper).items():
            if found.get(name, "null") == "null":
                found[name] = kind
    if not found:
        return {path: f"`{data}`" if path == "schema" else KINDS[type(data)]}
    nulls = [name for name, kind in found.items() if kind == "null"]
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
    about = "`[]` stands for each entry of a list, `null` for what does not apply here."
    parts.append(f"## Results\n\nFields of JSON answers; {about}\n")
    parts += [result_text(*each) for each in RESULTS]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
