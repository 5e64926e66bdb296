"""Results of a laboratory as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from analysis.text import plain, seconds
from paradiff.lab.calibration import Calibration
from paradiff.lab.laboratory import (
    APART,
    MEDIAN_SHARE,
    MOST_FIXED,
    MOST_NOISY,
    NOISY,
    Result,
    Verdict,
)

SCHEMA = "paradiff.validate-lab/1"
HEADER = (
    "links",
    "ranks",
    "bound by",
    "strategy",
    "predicted",
    "measured",
    "error",
    "spread",
    "fixed",
    "",
)


def to_json(
    verdict: Verdict, calibration: Calibration, repeats: int, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was found; times in seconds. ``machine``: what it says of itself."""
    pairs = list(verdict.pairs())
    return {
        "schema": SCHEMA,
        "passed": not verdict.failures,
        "failures": verdict.failures,
        "repeats": repeats,
        "median_error": verdict.median_error if verdict.quiet else None,
        "worst_error": None if verdict.worst is None else verdict.worst.error,
        "noisy_share": verdict.noisy_share,
        "ordered_pairs": [len(pairs) - len(verdict.misordered), len(pairs)],
        "allowed": {
            "median_error": MEDIAN_SHARE * verdict.max_error,
            "worst_error": verdict.max_error,
            "spread": NOISY,
            "noisy_share": MOST_NOISY,
            "fixed_share": MOST_FIXED,
            "apart": APART,
        },
        "machine": machine,
        "calibration": calibration.to_json(),
        "cells": [_cell(result) for result in verdict.results],
    }


def _cell(result: Result) -> dict[str, Any]:
    found = result.comparison
    return {
        "topology": result.box,
        "ranks": result.ranks,
        **result.cell._asdict(),
        "stretch": result.prediction.costs.stretch,
        "placement": list(result.prediction.placement),
        "fingerprint": result.prediction.graph.fingerprint(),
        "predicted_s": found.latency.predicted_s,
        "measured_s": found.latency.measured_s,
        "error": result.error,
        "spread": found.spread,
        "noisy": result.is_noisy,
        "fixed_share": result.prediction.fixed_share,
        "repeats_s": list(found.repeats_s),
        "clock_residual_s": found.clock_residual_s,
        "by_call": {
            name: {"ops": group.ops, **asdict(group.times), "median_error": group.median_error}
            for name, group in found.calls.items()
        },
    }


def text(verdict: Verdict) -> str:
    """Every cell, then what holds."""
    lines = plain(list(HEADER), [_row(result) for result in verdict.results])
    return "\n".join([*lines, "", *_summary(verdict)])


def _row(result: Result) -> list[str]:
    times = result.comparison.latency
    return [
        result.box,
        str(result.ranks),
        result.cell.regime,
        result.cell.spec,
        seconds(times.predicted_s),
        seconds(times.measured_s),
        f"{result.error:+.1%}",
        f"{result.comparison.spread:.1%}",
        f"{result.prediction.fixed_share:.1%}",
        ", ".join(["noisy"] * result.is_noisy + ["short"] * result.is_short),
    ]


def _summary(verdict: Verdict) -> Iterator[str]:
    quiet, total = len(verdict.quiet), len(verdict.results)
    worst = verdict.worst
    if worst is not None:
        yield (
            f"Error of the prediction: {verdict.median_error:.1%} median, {abs(worst.error):.1%} worst"
            f" ({worst.cell.spec}, {worst.box}), {quiet} of {total} cells quiet."
        )
    pairs = list(verdict.pairs())
    right = len(pairs) - len(verdict.misordered)
    yield (
        f"In the predicted order: {right} of {len(pairs)} pairs of strategies on the same work whose"
        f" times differ by more than {APART:.0%}."
    )
    yield from (f"Fails: {line}." for line in verdict.failures)


def markdown(results: Sequence[Result]) -> str:
    """The rows as a table for docs."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    lines += [f"| {' | '.join(_row(result))} |" for result in results]
    return "\n".join(lines) + "\n"
