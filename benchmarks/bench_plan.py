"""Whole-process cost of planning: wall time and peak memory of --help, of the default plan, and of
FLUX on 64 and on 1,024 GPUs.

``python benchmarks/bench_plan.py [RUNS]`` prints the median of RUNS (default 5; of the two large boxes
one run) and fails where it is over its limit, on two cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

LAUNCH = "import sys; sys.argv[0] = 'paradiff-plan'; from paradiff.cli import plan_main as m; m()"
FLUX = ["--model", "flux1-dev", "--topology"]
CASES = (
    ("--help", ["--help"], 0.5, 500.0, None),
    ("default plan", ["--topology", "pcie8.yaml"], 5.0, 500.0, None),
    ("64 GPUs", [*FLUX, "nvlink8x8-h100"], 60.0, 2000.0, 1),
    ("1,024 GPUs", [*FLUX, "nvlink8x128-h100"], 600.0, 2000.0, 1),
)
"""Name, arguments, limits in seconds and megabytes, and how often where that is not asked."""


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
    for name, arguments, seconds, megabytes, only in CASES:
        measured = [measure(arguments) for _ in range(only or runs)]
        wall, memory = (statistics.median(column) for column in zip(*measured, strict=True))
        within &= wall <= seconds and memory <= megabytes
        print(
            f"{name:14} {wall:6.2f} s (limit {seconds} s)  {memory:5.0f} MB (limit {megabytes:.0f})",
            flush=True,
        )
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
