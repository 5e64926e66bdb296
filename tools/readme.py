"""Run the commands of README.md and of the pages in docs/, and put what they really print under them.

``python tools/readme.py [PAGE...]`` rewrites these pages in place, and three rows of the README's table
of what is supported; ``tests/test_readme.py`` and ``tests/test_docs.py`` fail while they are not
current.

Every page is run from an empty directory, block after block, as a reader would. What a fenced block is
called says what is done with it:

=====================  =======================================================================
```console             each ``$ command`` is run, what follows it is what it prints
```console measured    the same, but numbers are of one machine: only the words must agree
```sh                  each line is run and must succeed; what it prints is not shown
```                    for reading: it needs weights, a GPU, a cluster, or somebody's files
=====================  =======================================================================
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "docs" / "tutorial.md", ROOT / "docs" / "howto.md"]
"""Pages whose commands are run."""
BLOCK = re.compile(r"^```(?P<kind>console(?: measured)?|sh)\n(?P<body>.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^\$ (?P<command>(?:.*\\\n)*.*)\n(?P<output>(?:(?!\$ ).*\n)*)", re.M)
LINE = re.compile(r"^(?P<command>(?:.*\\\n)*.+)\n", re.M)
NUMBER = re.compile(r"[\d.]+(?:e[+-]?\d+)?\s?(?:ms|us|s|%)?(?![\w-])")
ROWS = {"models": "models", "boxes": "topologies", "GPUs": "gpus"}
"""Row of the table of what is supported -> folder of hardware_profiles."""


@dataclass(frozen=True)
class Shown:
    """One command of a page: where its output stands in the text, and what is there now."""

    command: str
    output: str | None
    """None where the page does not show it."""
    span: tuple[int, int]
    is_measured: bool

    def agrees(self, fresh: str) -> bool:
        """Whether the page shows what was printed now."""
        if self.output is None:
            return True
        return words(self.output) == words(fresh) if self.is_measured else self.output == fresh


def words(text: str) -> list[str]:
    """What is left of measured output without its numbers."""
    return NUMBER.sub("#", text).split()


def commands(text: str) -> Iterator[Shown]:
    """The commands of a page in order."""
    for block in BLOCK.finditer(text):
        if block["kind"] == "sh":
            for line in LINE.finditer(block["body"]):
                yield Shown(line["command"], None, (0, 0), False)
            continue
        base = block.start("body")
        for found in COMMAND.finditer(block["body"]):
            first, last = found.span("output")
            is_measured = block["kind"].endswith("measured")
            span = (base + first, base + last)
            yield Shown(found["command"], found["output"], span, is_measured)


def printed(command: str, home: str) -> str:
    """What the command prints to a pipe, errors with it, run in ``home``.

    ``$PARADIFF`` is this checkout; ``home`` is the user's, who may say there what shells complete. The
    shell stays beside the command, which may ask what shell it is in
    (``--install-completion``). Raises RuntimeError where the command fails.
    """
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    facts = {"PATH": programs, "PARADIFF": str(ROOT)}
    facts |= {"HOME": home, "XDG_CACHE_HOME": f"{home}/.cache"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command}\nexit $?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=home,
        env=os.environ | facts | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {command}\n{done.stdout}")
    return done.stdout


def run_page(page: Path) -> Iterator[tuple[Shown, str]]:
    """Every command of the page and what it prints now."""
    with tempfile.TemporaryDirectory(prefix="paradiff-page-") as home:
        for shown in commands(page.read_text(encoding="utf-8")):
            yield shown, printed(shown.command, home)


def refreshed(page: Path) -> str:
    """The page with what its commands print now."""
    text = page.read_text(encoding="utf-8")
    for shown, fresh in reversed(list(run_page(page))):
        if shown.output is not None and not shown.agrees(fresh):
            first, last = shown.span
            text = text[:first] + fresh + text[last:]
    return text


def shipped(kind: str) -> str:
    """A row of the table of what is supported: every name of one kind."""
    folder = ROOT / "hardware_profiles" / kind
    return ", ".join(f"`{path.stem}`" for path in sorted(folder.iterdir()))


def main(pages: list[Path]) -> None:
    for page in pages:
        text = refreshed(page)
        if page == README:
            for row, kind in ROWS.items():
                text = re.sub(rf"(?m)^\| {row} \|.*$", f"| {row} | {shipped(kind)} |", text)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]] or PAGES)
