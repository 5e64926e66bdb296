"""Put the real output of the first command into README.md.

``python tools/readme.py`` rewrites the block that follows ``$ paradiff-plan --topology pcie8.yaml``;
``tests/test_readme.py`` fails while it is not what the command prints.
"""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from paradiff.cli import plan_app

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?<=```\n)\$ paradiff-plan (?P<arguments>[^\n]*)\n(?P<output>.*?)(?=```)", re.S)


def printed(arguments: str) -> str:
    """What the command prints to a pipe."""
    done = CliRunner().invoke(plan_app, arguments.split())
    assert done.exit_code == 0, done.stderr
    return done.stdout


def main() -> None:
    text = README.read_text(encoding="utf-8")
    found = BLOCK.search(text)
    assert found is not None, "README.md has no output block"
    fresh = printed(found["arguments"])
    README.write_text(
        text[: found.start("output")] + fresh + text[found.end("output") :], encoding="utf-8"
    )


if __name__ == "__main__":
    main()
