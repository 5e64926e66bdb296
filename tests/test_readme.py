"""The README shows what the product does, not what it once did."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from readme import BLOCK, README, ROWS, printed, shipped


def test_the_output_at_the_top_is_real() -> None:
    found = BLOCK.search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert printed(found["arguments"]) == found["output"], "run: python tools/readme.py"


def test_every_shipped_name_is_listed() -> None:
    text = README.read_text(encoding="utf-8")
    for row, kind in ROWS.items():
        assert f"| {row} | {shipped(kind)} |\n" in text, "run: python tools/readme.py"
