"""A file that another tool wrote, as lines, XML or JSON; every complaint says the file and the line.

Decides how such files are read safely: bounded size, terminal codes stripped, XML without entities.
Knows nothing of what they mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from paradiff.config import ConfigError, read_text

MAX_BYTES = 64 * 2**20
MAX_XML_DEPTH = 200
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")


@dataclass(frozen=True, slots=True)
class Report:
    """A text file: its name and its lines, without terminal codes."""

    file: str
    lines: tuple[str, ...]

    def at(self, number: int) -> str:
        """``file:line`` of line ``number``, counted from 1."""
        return f"{self.file}:{number}"

    def error(self, number: int, what: str) -> ConfigError:
        """The error to raise about line ``number``."""
        return ConfigError(f"{self.at(number)}: {what}")

    def numbered(self) -> Iterator[tuple[int, str]]:
        """(number from 1, line) of every line."""
        return enumerate(self.lines, 1)


@dataclass(slots=True)
class Element:
    """An XML element and the line it begins on."""

    tag: str
    attributes: Mapping[str, str]
    line: int
    children: list[Element] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        """This element and all below, in document order."""
        yield self
        for child in self.children:
            yield from child.walk()


def read_report(path: str | Path) -> Report:
    """The file at ``path``. Raises ConfigError where it cannot be read or is not UTF-8 text."""
    file, text = str(path), read_text(path, MAX_BYTES)
    if not text.strip():
        raise ConfigError(f"{file}:1: empty file, allowed: the output of the tool")
    lines = _TERMINAL_CODES.sub("", text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return Report(file, tuple(lines))


def parse_xml(report: Report) -> Element:
    """The root element. Raises ConfigError for malformed XML, and for any entity declared in it."""
    parser = expat.ParserCreate()
    parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
    root: list[Element] = []
    above: list[Element] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, attributes, parser.CurrentLineNumber)
        if len(above) >= MAX_XML_DEPTH:
            raise report.error(element.line, f"nested too deep, allowed: {MAX_XML_DEPTH} levels")
        (above[-1].children if above else root).append(element)
        above.append(element)

    def refuse(name: str, *_: object) -> None:
        raise report.error(parser.CurrentLineNumber, f"XML entity ({name}), allowed: none")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: above.pop()
    parser.EntityDeclHandler = refuse
    parser.SkippedEntityHandler = refuse
    try:
        parser.Parse("\n".join(report.lines), True)
    except expat.ExpatError as error:
        what = expat.ErrorString(error.code)
        raise report.error(error.lineno, f"not valid XML ({what})") from None
    return root[0]


def parse_json(report: Report) -> Any:
    """The JSON value. Text before the first brace is skipped: tools print banners. Raises
    ConfigError."""
    text = "\n".join(report.lines)
    begin = text.find("{")
    if begin < 0:
        raise report.error(1, "not JSON (no opening brace)")
    try:
        return json.loads(text[begin:])
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, begin) + error.lineno
        raise report.error(line, f"not valid JSON ({error.msg})") from None
    except RecursionError:
        raise report.error(1, "not valid JSON (nested too deep)") from None


def number(report: Report, line: int, text: object, what: str) -> float:
    """``text`` as a finite number that is not negative; tools write numbers as strings."""
    try:
        value = float(str(text))
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise report.error(line, f"{what}: not a number ({str(text)[:40]!r})")
    return value


def positive(report: Report, line: int, text: object, what: str) -> float:
    """``text`` as a finite number above zero: a rate or a time that was measured."""
    value = number(report, line, text, what)
    if not value:
        raise report.error(line, f"{what}: {str(text)[:40]}, allowed: more than 0")
    return value
