"""Why one plan comes before another: what separates them, and which measurement would turn the order.

Decides the words and the arithmetic of a comparison; ranks nothing. Two plans on one box share their
errors, so an error common to one part of the latency moves both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from analysis.attribution import Breakdown
from analysis.intervals import Factors, Part, parts
from paradiff.graph import Op
from simulator.collectives import table_bytes

FAR = 3.0
"""An error of this many half intervals (in logarithms) is not worth a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One of two plans. ``weight``: what a second of its latency counts in the objective.

    ``largest``: the transfer that moves most bytes in all, times how often, and the GPUs it joins.
    """

    spec: str
    breakdown: Breakdown
    factors: Mapping[Part, Factors]
    weight: float
    low_s: float
    high_s: float
    largest: tuple[int, Op, tuple[int, ...]] | None


def separation(first: Contender, second: Contender, unit: str) -> str:
    """What separates the first from the second, or what measurement would."""
    gaps = _gaps(first, second)
    total = sum(gaps.values())
    sentence = f"{second.spec} takes {total:.3g} {unit} more ({_in_words(gaps)})"
    if first.high_s < second.low_s:
        return f"{sentence}; the intervals do not overlap"
    return f"{sentence}; the intervals overlap: {_deciding(first, second, gaps)}"


def _gaps(first: Contender, second: Contender) -> dict[Part, float]:
    """Part by part, how much more of the objective's time ``second`` takes than ``first``."""
    one, two = parts(first.breakdown), parts(second.breakdown)
    return {part: second.weight * two[part] - first.weight * one[part] for part in one}


def _deciding(first: Contender, second: Contender, gaps: Mapping[Part, float]) -> str:
    """The measurement that would settle an order whose intervals overlap.

    An error common to one part (all compute f times as long) turns the order at f = 1 - total / gap;
    the part whose f lies deepest inside its interval is the one to measure. Where no factor turns it,
    the largest part of the difference is.
    """
    total = sum(gaps.values())
    joint = {**gaps, "compute": gaps["compute"] + gaps["bubble"], "bubble": 0.0}
    turning: list[tuple[float, Part, float]] = []
    for part, gap in joint.items():
        turn = 1 - total / gap if abs(gap) > 1e-12 else 0.0
        reach = math.log(first.factors[part][turn > 1])
        if turn > 0 and reach and (depth := math.log(turn) / reach) < FAR:
            turning.append((depth, part, turn))
    if not turning:
        largest = max(joint, key=lambda part: joint[part])
        measure = _measurement(largest, first, second)
        return f"no error common to both turns the order; to be sure, {measure}"
    depth, part, turn = min(turning)
    measure = _measurement(part, first, second)
    needed = f"{_NAMES[part]} takes {turn:.2f} times what is predicted"
    if depth > 1:
        low, high = first.factors[part]
        needed += f", outside its interval of {low:.2f} to {high:.2f}"
    return f"the order turns if {needed}; to be sure, {measure}"


def _measurement(part: Part, first: Contender, second: Contender) -> str:
    transfers = [each.largest for each in (first, second) if each.largest is not None]
    if part != "comm" or not transfers:
        return "measure one GPU (--measured-latency)"
    _, op, devices = max(transfers, key=lambda each: each[0])
    tool = _NCCL_TESTS.get(op.call, "sendrecv_perf")
    gpus = ",".join(map(str, devices))
    return f"measure nccl-tests {tool} with {table_bytes(op)} bytes on GPUs {gpus}"


_NAMES: Mapping[Part, str] = {
    "compute": "compute",
    "host": "launching from the host",
    "comm": "exposed communication",
    "bubble": "waiting (bubbles)",
    "text_encoder": "the text encoder",
    "vae": "the VAE",
}
_NCCL_TESTS = {
    "all_gather": "all_gather_perf",
    "all_reduce": "all_reduce_perf",
    "reduce_scatter": "reduce_scatter_perf",
    "all_to_all": "alltoall_perf",
    "broadcast": "broadcast_perf",
}


def _in_words(gaps: Mapping[Part, float]) -> str:
    """The parts of a difference, largest first, those below a twentieth of the largest left out."""
    largest = max(abs(gap) for gap in gaps.values())
    named = sorted(gaps.items(), key=lambda item: -abs(item[1]))
    return ", ".join(f"{gap:+.3g} {_NAMES[part]}" for part, gap in named if abs(gap) > largest / 20)
