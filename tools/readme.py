"""Put the real output of the first command, and the shipped names, into README.md.

``python tools/readme.py`` rewrites the block that follows ``$ paradiff-plan --topology pcie8.yaml`` and
three rows of the table of what is supported; ``tests/test_readme.py`` fails while they are not current.
"""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from paradiff.cli import plan_app

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(
    r"(?<=```\n)\$ paradiff-plan (?P<arguments>[^\n]*)\n(?P<output>.*?)(?=```)", re.S
)


def printed(arguments: str) -> str:
    """What the command prints to a pipe."""
    done = CliRunner().invoke(plan_app, arguments.split())
    assert done.exit_code == 0, done.stderr
    return done.stdout


ROWS = {"models": "models", "boxes": "topologies", "GPUs": "gpus"}
"""Row of the table of what is supported -> folder of hardware_profiles."""


def shipped(kind: str) -> str:
    """The row's text: every name of one kind."""
    folder = README.parent / "hardware_profiles" / kind
    return ", ".join(f"`{path.stem}`" for path in sorted(folder.iterdir()))


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for row, kind in ROWS.items():
        text = re.sub(rf"(?m)^\| {row} \|.*$", f"| {row} | {shipped(kind)} |", text)
    found = BLOCK.search(text)
    assert found is not None, "README.md has no output block"
    fresh = printed(found["arguments"])
    README.write_text(
        text[: found.start("output")] + fresh + text[found.end("output") :], encoding="utf-8"
    )


if __name__ == "__main__":
    main()
