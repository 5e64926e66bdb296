"""The README shows what the product does, not what it once did."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from readme import README, ROWS, commands, printed, shipped


def test_the_output_at_the_top_is_real(tmp_path: Path) -> None:
    shown = next(commands(README.read_text(encoding="utf-8")))
    assert printed(shown.command, str(tmp_path)) == shown.output, "run: python tools/readme.py"


def test_every_shipped_name_is_listed() -> None:
    text = README.read_text(encoding="utf-8")
    for row, kind in ROWS.items():
        assert f"| {row} | {shipped(kind)} |\n" in text, "run: python tools/readme.py"


def test_the_scores_are_those_of_the_validation_page() -> None:
    """docs/validation.md has a gate of its own (``benchmarks/bench_published.py``)."""
    page = (README.parent / "docs" / "validation.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| [^|]*\| ([^|]+) \|", page, re.M))
    row = lambda name: re.findall(r"[\d.]+", rows[name])  # noqa: E731
    text = README.read_text(encoding="utf-8")
    own, zero, order, intervals = re.findall(
        r"^\| (?:with the run's own|without it|order of|90 % intervals)[^|]*\|([^|]+)\|", text, re.M
    )
    numbers = re.compile(r"[\d.]+(?= %)")
    assert numbers.findall(own) == row("calibrated median error") + row("calibrated mean error")
    one_gpu = row("one GPU, zero-shot: median, within 25 %")
    assert numbers.findall(zero) == [*row("zero-shot median error"), *one_gpu, "25"]
    assert re.findall(r"[\d.]+\d", order) == row("Kendall tau") + row("mean regret")
    assert numbers.findall(intervals) == row("interval coverage (width)")


def test_every_picture_is_made_by_the_tool_and_the_timeline_is_of_the_strategy_that_is_named() -> (
    None
):
    pytest.importorskip("playwright", reason="playwright is not installed")
    pytest.importorskip("PIL", reason="Pillow is not installed")
    from pictures import PICTURES, SHOTS, SHOWN

    pages = [README, *(README.parent / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = {
        name: said for said, name in re.findall(r"!\[([^]]+)\]\(\S*pictures/(\w+)\.png\)", text)
    }
    assert shown.keys() == SHOTS.keys() == {file.stem for file in PICTURES.iterdir()}
    assert f" {SHOWN}:" in shown["timeline"]
