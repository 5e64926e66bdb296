"""Tables of docs/laboratory.md are those of the runs that are kept."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import laboratory_page
from laboratory_page import KEPT, PAGE, keep, markdown, read

from paradiff.cli.common import load_model
from paradiff.lab.calibration import Calibration
from paradiff.lab.laboratory import Cell, Oracle
from simulator.topology import load_topology


def cell(spec: str, error: float, **more: Any) -> dict[str, Any]:
    return {
        "topology": "lab-star", "regime": "compute", "ranks": 4, "spec": spec, "height": 128,
        "width": 64,
        "steps": 2, "shared": True, "predicted_s": 1 + error, "measured_s": 1.0, "error": error,
        "spread": 0.01, "noisy": False, "fixed_share": 0.05, "repeats_s": [1.0] * 5,
    } | more  # fmt: skip


def run(
    *cells: dict[str, Any], ordered: tuple[int, int] = (3, 3), p2p_s: float = 2.5e-4
) -> dict[str, Any]:
    return {
        "schema": "paradiff.validate-lab/1", "ordered_pairs": list(ordered), "cells": list(cells),
        "allowed": {"fixed_share": 0.1}, "calibration": {"call_s": {"p2p 2 of 4": p2p_s}},
        "machine": {"host": "here", "cpu": "a cpu, 2 logical cores", "torch": "2.13"},
    }  # fmt: skip


def test_the_page_is_made_of_what_is_kept() -> None:
    tables = markdown(read(KEPT))
    assert f"<!-- lab -->\n{tables}<!-- end -->" in PAGE.read_text(encoding="utf-8")
    for name, kept in read(KEPT).items():
        assert kept["repeats"] >= 5, name
        assert all({"fixed_share", "repeats_s", "stretch"} <= each.keys() for each in kept["cells"])


def test_what_is_kept_holds() -> None:
    """Over the cells of all runs: the gate of docs/laboratory.md."""
    runs = list(read(KEPT).values())
    cells = [each for kept in runs for each in kept["cells"]]
    quiet = [abs(each["error"]) for each in cells if not each["noisy"]]
    assert len(quiet) >= 0.9 * len(cells)
    assert statistics.median(quiet) <= 0.05
    assert max(quiet) <= 0.10
    assert max(each["fixed_share"] for each in cells) <= 0.10
    assert all(kept["ordered_pairs"][0] == kept["ordered_pairs"][1] for kept in runs)


def test_what_is_kept_is_what_the_simulator_says_now() -> None:
    """What was measured over real links, predicted again from the links and the kept calibration: a
    change of the simulator or of a strategy that those links refute is seen without links. (Of cells
    bound by compute the kernels, whose times are given, are most.)"""
    errors: list[float] = []
    for name, kept in read(KEPT).items():
        if not (name.startswith("each") and name.endswith("communication")):
            continue
        calibration = calibration_of(kept["calibration"])
        for each in kept["cells"]:
            cell = Cell(*(each[name] for name in Cell._fields))
            oracle = Oracle(load_topology(each["topology"]), calibration)
            found = oracle.predict(load_model(cell.model), cell, each["stretch"])
            assert found.graph.fingerprint() == each["fingerprint"], cell
            if not each["noisy"]:
                errors.append(abs(found.trace.makespan_s / each["measured_s"] - 1))
    assert len(errors) > 70
    assert statistics.median(errors) <= 0.05
    assert max(errors) <= 0.10


def calibration_of(kept: dict[str, Any]) -> Calibration:
    """``Calibration.to_json`` read back: a key is "all_gather 2 of 4"."""
    keys = {key: key.split() for key in kept["call_s"]}
    call_s = {(c, int(n), int(w)): kept["call_s"][key] for key, (c, n, _, w) in keys.items()}
    return Calibration(call_s, kept["kernel_s"], kept["host_bytes_per_s"])


def test_runs_are_laid_together() -> None:
    """Two pieces of one part: errors over both, a row for a strategy, pairs added; noisy cells and those
    of the other part do not count."""
    one = run(cell("ring=4", 0.02), cell("patch=4", -0.04), ordered=(3, 4))
    two = run(
        cell("ring=4", 0.06, regime="communication", fixed_share=0.2),
        cell("patch=4", 0.5, regime="communication", noisy=True, spread=0.07),
        cell("tensor=4", 0.3, shared=False),
        p2p_s=3.5e-4,
    )
    text = markdown({"one": one, "two": two})
    own, together = text.split("### All strategies on the same work")
    assert "`tensor=4`" in own
    assert "`tensor=4`" not in together
    assert "4 cells, 5 repeats or more, 3 quiet (widest spread 7.0%)" in together
    assert "error 4.0% median, 6.0% worst (`ring=4`, lab-star)" in together
    assert "more than a tenth of the transfers in 1." in together
    assert "Median and worst error by box: lab-star 4.0%, 6.0%.\n" in together
    assert "6 of 7 pairs" in together.replace("In the predicted order: ", "")
    row = "| 4 | `ring=4` | 128 x 64, 2 | 1.02 / 1 s, +2.0% | 1.06 / 1 s, +6.0% | 20.0% |"
    assert row in together
    assert "1.5 / 1 s, +50.0%, noisy" in together
    assert "of all runs. a cpu, 2 logical cores, torch 2.13.\n" in together
    assert "| call | 2 of 4 |\n|---|---|\n| p2p | 0.3 (0.25 to 0.35) |" in together


def test_a_run_is_kept_whole_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laboratory_page, "KEPT", tmp_path / "kept")
    given = tmp_path / "lab.json"
    given.write_text(json.dumps(run(cell("ring=4", 0.02))))
    keep("order", given)
    (kept,) = read(tmp_path / "kept").values()
    assert kept == run(cell("ring=4", 0.02)) | {"machine": kept["machine"]}
    assert "host" not in kept["machine"]
    given.write_text(json.dumps({"schema": "other"}))
    with pytest.raises(ValueError, match="schema 'other', allowed: paradiff"):
        keep("order", given)
