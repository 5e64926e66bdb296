"""The whole scoreboard against its gates: ``python benchmarks/bench_published.py``.

Predicts every published run that ships, prints the summary and the time it took, and fails (exit 1)
where a score is worse than what was reached. ``tests/test_scoreboard.py`` does the same for a sample.
"""

from __future__ import annotations

import gc
import sys
import time

from analysis.published import load_rules, read_rows
from analysis.scoreboard import Predictor, by_source, one_gpu, score, scores
from analysis.validation_report import summary
from paradiff.config import find

WORST = {
    "median_ape_calibrated": 0.07, "mape_calibrated": 0.105, "median_ape_zero_shot": 0.12,
    "mean_regret": 0.02,
}  # fmt: skip
LEAST_TAU, LEAST_COVERED, COVERAGE = 0.84, 0.90, (0.80, 0.97)
ONE_GPU_MEDIAN, ONE_GPU_NEAR = 0.10, 0.90


def main() -> None:
    gc.set_threshold(1_000_000)
    begin = time.perf_counter()
    scored = score(read_rows(find("published", "runs", ".csv")), load_rules(), Predictor())
    print(*summary(scored), f"{time.perf_counter() - begin:.0f} s", sep="\n")
    total = scores(scored)
    core = [e for e in scored if e.row.is_core and not (e.covered and not e.counts)]
    errors = sorted(abs(error) for own in one_gpu(scored).values() for error in own)
    near = sum(error <= 0.25 for error in errors) / len(errors)
    failed = [f"{name} {getattr(total, name):.3f} > {w}" for name, w in WORST.items()
              if getattr(total, name) > w]  # fmt: skip
    gates = {
        f"Kendall tau {total.kendall_tau:.3f} < {LEAST_TAU}": total.kendall_tau >= LEAST_TAU,
        f"{total.count} of {len(core)} covered": total.count >= LEAST_COVERED * len(core),
        f"interval coverage {total.interval_coverage:.2f} outside {COVERAGE}": (
            COVERAGE[0] <= total.interval_coverage <= COVERAGE[1]
        ),
        f"one GPU: median error {errors[len(errors) // 2]:.3f}": (
            errors[len(errors) // 2] <= ONE_GPU_MEDIAN
        ),
        f"one GPU: {near:.2f} within 25 %": near >= ONE_GPU_NEAR,
    }
    failed += [text for text, holds in gates.items() if not holds]
    for name, (_, others) in by_source(scored).items():
        if others.median_ape_calibrated > 0.085:
            failed.append(f"without {name}: median {others.median_ape_calibrated:.3f}")
    print(*(f"GATE FAILED: {text}" for text in failed), sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
