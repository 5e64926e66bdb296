"""Whole-process cost of planning: wall time and peak memory of the default plan, and of --help.

``python benchmarks/bench_plan.py [RUNS]`` prints the median of RUNS (default 5) and fails where a
median is over its limit: 5 s and 500 MB for the plan, 0.5 s for --help, on two cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

LAUNCH = "import sys; sys.argv[0] = 'paradiff-plan'; from paradiff.cli import plan_main as m; m()"
CASES = (
    ("default plan", ["--topology", "pcie8.yaml"], 5.0, 500.0),
    ("--help", ["--help"], 0.5, 500.0),
)


def measure(arguments: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of one process."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", LAUNCH, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    elapsed = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"paradiff-plan {' '.join(arguments)}: exit {child.returncode}")
    return elapsed, usage.ru_maxrss / 1024


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    within = True
    for name, arguments, seconds, megabytes in CASES:
        measured = [measure(arguments) for _ in range(runs)]
        wall, memory = (statistics.median(column) for column in zip(*measured, strict=True))
        within &= wall <= seconds and memory <= megabytes
        print(
            f"{name:14} {wall:6.2f} s (limit {seconds} s)  {memory:5.0f} MB (limit {megabytes:.0f})"
        )
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
