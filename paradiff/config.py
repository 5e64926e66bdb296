"""YAML files into validated pydantic models, with one kind of error that says where.

Decides how a file is read (safely), how a problem is reported (``file:line:column``) and how a name
such as ``pcie8`` becomes a file. Knows nothing of what the files mean: the models say that.

Reading goes through the YAML *node graph*, never through YAML's object construction: only
mappings, sequences and plain scalars exist, tags and duplicate keys are refused, aliases are
expanded under a budget. Every value keeps the position it was written at.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_FILE_BYTES = 2**20
MAX_NODES = 50_000
MAX_DEPTH = 32
_UNKNOWN_KEY = "unknown key"
_ALLOWED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "text (in quotes where it looks like a number)",
    "model_type": "a mapping (key: value)",
    "tuple_type": "a list",
    "too_short": "a longer list",
    "too_long": "a shorter list",
}
"""What to write instead, for pydantic's complaints that do not say."""

Path_ = tuple[str | int, ...]
"""Where a value sits in a document: keys and list indices from the root."""


class ConfigError(ValueError):
    """A file, an override or a name that the user has to correct; the message says how."""


def printable(name: str) -> str:
    """``name`` with control characters and line breaks as escapes: a terminal would obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


Name = Annotated[str, AfterValidator(printable)]
"""A name from a file."""


class Strict(BaseModel):
    """Base of everything read from a file: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def problem(
    what: str, value: object = None, allowed: object = None, at: Path_ = ()
) -> PydanticCustomError:
    """An error for pydantic validators to raise; ``at`` is the place below the validated model.

    ``allowed`` is a sentence, or the names to choose from (the nearest to ``value`` come first).
    """
    text = what if value is None else f"{what} ({_show(value)})"
    if allowed is not None:
        names = allowed if isinstance(allowed, str) else ", ".join(nearest(str(value), allowed))  # type: ignore[arg-type]
        text += f", allowed: {names or 'nothing'}"
    return PydanticCustomError("config", "{text}", {"text": text, "at": at})


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """All of ``names``, those that look most like ``name`` first."""
    pool = sorted(set(names))
    close = difflib.get_close_matches(name, pool, n=3, cutoff=0.6)
    return close + [other for other in pool if other not in close]


Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data of one YAML file, and where each value of it was written."""

    file: str
    data: Any
    places: Mapping[Path_, tuple[int, int]]
    keys: Mapping[Path_, tuple[int, int]]
    overrides: Mapping[Path_, str]

    def locate(self, path: Path_, *, key: bool = False) -> str:
        """``file:line:column`` of the value (or of the key) at ``path``, or of its nearest parent.

        For a value that came from an override, ``--set PATH=VALUE``.
        """
        if key and path in self.keys and path not in self.overrides:
            line, column = self.keys[path]
            return f"{self.file}:{line}:{column}"
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return f"--set {self.overrides[path[:length]]}"
            if path[:length] in self.places:
                line, column = self.places[path[:length]]
                return f"{self.file}:{line}:{column}"
        return f"{self.file}:1:1"

    def error(self, path: Path_, what: str, *, key: bool = False) -> ConfigError:
        """The error to raise about the value (or the key) at ``path``."""
        name = ".".join(map(str, path))
        return ConfigError(f"{self.locate(path, key=key)}: {name + ': ' if name else ''}{what}")

    def validate(self, model: type[Model]) -> Model:
        """The data as ``model``; ConfigError about the first problem of the file otherwise."""
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            details = _worth_telling(error.errors(include_url=False))
            found = [self._explain(model, detail) for detail in details]
            order = [(d["type"] == "missing", self.places.get(d["loc"], (0, 0))) for d in details]
            path, text = found[order.index(min(order))]
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise self.error(path, text + more, key=text.startswith(_UNKNOWN_KEY)) from None

    def _explain(self, model: type[BaseModel], detail: ErrorDetails) -> tuple[Path_, str]:
        """Path in the file and a sentence for one of pydantic's complaints."""
        path, context = detail["loc"], detail.get("ctx", {})
        kind, value = detail["type"], detail["input"]
        if kind == "config":
            return self._known(path + tuple(context["at"])), context["text"]
        if kind == "extra_forbidden":
            names = nearest(str(path[-1]), fields_at(model, path[:-1]))
            return path, f"{_UNKNOWN_KEY} ({path[-1]}), allowed: {', '.join(names)}"
        if kind == "missing":
            return path[:-1], f"key missing ({path[-1]})"
        if kind == "value_error":
            return self._known(path), str(context["error"])
        allowed = context.get("expected", _ALLOWED.get(kind))
        if allowed is not None:
            return self._known(path), f"not allowed ({_show(value)}), allowed: {allowed}"
        return self._known(path), f"{detail['msg'].lower()} ({_show(value)})"

    def _known(self, path: Path_) -> Path_:
        """The longest part of ``path`` that the file has (pydantic appends names of union arms)."""
        while path and path not in self.places and path not in self.overrides:
            path = path[:-1]
        return path


def _worth_telling(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without the "too short" that pydantic adds to a list whose items are wrong."""
    paths = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any(p != detail["loc"] and p[: len(detail["loc"])] == detail["loc"] for p in paths)
    ]


def load_yaml(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Read, override and validate one file. Raises ConfigError and nothing else."""
    return read_document(path, overrides, model).validate(model)


def read_document(
    path: str | Path, overrides: Sequence[str] = (), model: type[BaseModel] | None = None
) -> Document:
    """Read one YAML 1.2 file as plain data with positions, ``overrides`` applied.

    Raises ConfigError for a file that cannot be read, is over :data:`MAX_FILE_BYTES`, is not UTF-8
    text, is not one YAML document, has a tag, a duplicate key, or more than :data:`MAX_NODES` nodes
    once its aliases are expanded.
    """
    file = str(path)
    root = _compose(read_text(path, MAX_FILE_BYTES), file)
    reader = _Reader(file)
    data = reader.plain(root, (), 0) if root is not None else None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}:1:1: not a mapping ({_show(data)}), allowed: key: value lines")
    data = apply_overrides(data, overrides, model)
    written = {_split(item)[0]: item for item in overrides}
    return Document(file=file, data=data, places=reader.places, keys=reader.keys, overrides=written)


def read_text(path: str | Path, most_bytes: int) -> str:
    """A UTF-8 file of at most ``most_bytes``. Raises ConfigError."""
    file = str(path)
    try:
        if Path(path).is_dir():
            raise ConfigError(f"{file}: is a directory, allowed: a file")
        with Path(path).open("rb") as stream:
            raw = stream.read(most_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    if len(raw) > most_bytes:
        raise ConfigError(f"{file}: too large, allowed: {most_bytes} bytes at most")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        byte = f"byte 0x{raw[error.start]:02x}"
        raise ConfigError(f"{file}:{line}:{column}: not text ({byte}), allowed: UTF-8") from None
    return text


def _compose(text: str, file: str) -> Node | None:
    """The YAML node graph of ``text``; nothing is constructed."""
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
        return node
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else f"{file}:1:1"
        raise ConfigError(f"{place}: not valid YAML ({error.problem or error.context})") from None
    except YAMLError as error:
        raise _unreadable(text, file, error) from None
    except RecursionError:
        raise ConfigError(f"{file}:1:1: nested too deep, allowed: {MAX_DEPTH} levels") from None
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"{file}:1:1: not valid YAML ({error})") from None


def _unreadable(text: str, file: str, error: YAMLError) -> ConfigError:
    """Control characters: the only YAML error without a mark."""
    bad = re.search("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
    if bad is None:
        return ConfigError(f"{file}:1:1: not valid YAML ({error})")
    line = text.count("\n", 0, bad.start()) + 1
    column = bad.start() - text.rfind("\n", 0, bad.start())
    return ConfigError(f"{file}:{line}:{column}: binary file ({bad[0]!r}), allowed: UTF-8 text")


class _Reader:
    """Turns YAML nodes into plain data and notes where each value stands."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[Path_, tuple[int, int]] = {}
        self.keys: dict[Path_, tuple[int, int]] = {}
        self._nodes = 0

    def plain(self, node: Node, path: Path_, depth: int) -> Any:
        self._nodes += 1
        self.places[path] = _position(node)
        if self._nodes > MAX_NODES:
            raise self._error(node, f"too many values, allowed: {MAX_NODES} with aliases expanded")
        if depth > MAX_DEPTH:
            raise self._error(node, f"nested too deep, allowed: {MAX_DEPTH} levels")
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            self._check_tag(node, "seq")
            return [self.plain(n, (*path, i), depth + 1) for i, n in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: MappingNode, path: Path_, depth: int) -> dict[str, Any]:
        self._check_tag(node, "map")
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                raise self._error(key_node, "key is not a word", "text keys")
            if key in data:
                raise self._error(key_node, f"duplicate key ({key})", "each key once")
            self.keys[(*path, key)] = _position(key_node)
            data[key] = self.plain(value_node, (*path, key), depth + 1)
        return data

    def _scalar(self, node: Node) -> str | int | float | bool | None:
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        text: str = node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind in ("int", "float"):
            return _number(text)
        if kind not in ("str", "timestamp", "value"):
            raise self._error(node, f"tag or merge key ({node.tag})", "plain YAML values")
        return text

    def _check_tag(self, node: Node, expected: str) -> None:
        if str(node.tag) != f"tag:yaml.org,2002:{expected}":
            raise self._error(node, f"tag ({node.tag})", "plain YAML values")

    def _error(self, node: Node, what: str, allowed: str = "") -> ConfigError:
        line, column = _position(node)
        tail = f", allowed: {allowed}" if allowed else ""
        return ConfigError(f"{self.file}:{line}:{column}: {what}{tail}")


def _number(text: str) -> int | float | str:
    """A number that YAML's resolver recognised; text where Python does not read it as one."""
    for convert in (int, float, lambda t: int(t, 0)):
        try:
            return convert(text.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            continue
    return text


def _position(node: Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def apply_overrides(
    data: Mapping[str, Any], overrides: Sequence[str], model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """``data`` with ``PATH=VALUE`` changes: ``links.0.bandwidth=52 GB/s``, ``peer_to_peer=true``.

    VALUE is YAML. The last part of PATH must exist, or be a key that ``model`` knows at that place.
    Returns a changed copy. Raises ConfigError naming the valid keys.
    """
    result: dict[str, Any] = _copy(data)
    for item in overrides:
        path, text = _split(item)
        place = f"--set {item}"
        try:
            root = _compose(text, "value")
            value = _Reader("value").plain(root, (), 0) if root is not None else None
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        _assign(result, path, value, place, model)
    return result


def _split(item: str) -> tuple[Path_, str]:
    path, separator, text = item.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set {item}: not an override, allowed: PATH=VALUE")
    if not text.strip():
        raise ConfigError(f"--set {item}: no value, allowed: PATH=VALUE")
    parts = path.strip().split(".")
    return tuple(int(p) if p.isascii() and p.isdigit() else p for p in parts), text.strip()


def _assign(root: Any, path: Path_, value: Any, place: str, model: type[BaseModel] | None) -> None:
    here = root
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here, list):
            valid = [str(i) for i in range(len(here))]
        elif isinstance(here, dict):
            key = str(key)
            known = fields_at(model, path[:depth]) if model is not None and last else ()
            valid = sorted({*here, *known})
        else:
            valid = []
        if str(key) not in valid:
            names = ", ".join(nearest(str(key), valid) if isinstance(here, dict) else valid)
            where = ".".join(map(str, path[: depth + 1]))
            raise ConfigError(f"{place}: unknown path ({where}), allowed: {names or 'nothing'}")
        if last:
            here[key] = value
        else:
            here = here[key]


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def fields_at(model: type[BaseModel], path: Path_) -> tuple[str, ...]:
    """Names that ``model`` allows at ``path``; empty where the model takes no keys."""
    kinds: tuple[Any, ...] = (model,)
    for key in path:
        kinds = tuple(inner for kind in kinds for inner in _step(kind, key))
    names = [name for kind in kinds if _is_model(kind) for name in kind.model_fields]
    return tuple(dict.fromkeys(names))


def _step(kind: Any, key: str | int) -> tuple[Any, ...]:
    """Types found below ``kind`` at ``key``, unions and annotations flattened."""
    if _is_model(kind):
        field = kind.model_fields.get(str(key))
        return _flatten(field.annotation) if field is not None else ()
    arguments = [a for a in get_args(kind) if a is not Ellipsis]
    return _flatten(arguments[-1]) if arguments else ()


def _flatten(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        return _flatten(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(inner for arm in get_args(kind) for inner in _flatten(arm))
    return (kind,)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@lru_cache(maxsize=1)
def _shipped() -> Path:
    return Path(str(resources.files("hardware_profiles")))


def available(kind: str, suffix: str = ".yaml") -> tuple[str, ...]:
    """Names of the shipped files of one kind (``gpus``, ``topologies``), sorted."""
    files = (_shipped() / kind).glob("*" + suffix)
    return tuple(sorted(path.name.removesuffix(suffix) for path in files))


def find(kind: str, name: str, suffix: str = ".yaml") -> Path:
    """The file meant by ``name``: a path, a file of the current directory, else a shipped one.

    ``pcie8`` and ``pcie8.yaml`` mean the same. Raises ConfigError listing the shipped names, the
    nearest first.
    """
    file_name = name if name.endswith(suffix) else name + suffix
    for candidate in (Path(name), Path(file_name)):
        if name and candidate.is_file():
            return candidate
    shipped = _shipped() / kind / file_name
    if Path(file_name).name == file_name and shipped.is_file():
        return shipped
    names = ", ".join(nearest(Path(name).name.removesuffix(suffix), available(kind, suffix)))
    raise ConfigError(f"{name}: no such file in {kind}, allowed: a path, or one of {names}")
