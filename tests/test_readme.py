"""The README shows what the product does, not what it once did."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from readme import README, ROWS, commands, printed, shipped


def test_the_output_at_the_top_is_real(tmp_path: Path) -> None:
    shown = next(commands(README.read_text(encoding="utf-8")))
    assert printed(shown.command, str(tmp_path)) == shown.output, "run: python tools/readme.py"


def test_every_shipped_name_is_listed() -> None:
    text = README.read_text(encoding="utf-8")
    for row, kind in ROWS.items():
        assert f"| {row} | {shipped(kind)} |\n" in text, "run: python tools/readme.py"
