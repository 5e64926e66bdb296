"""Cost of the HTML report at its largest: 200 candidates, the timelines of eight ranks in a pipeline.

``python benchmarks/bench_report.py [RUNS]`` prints the median of RUNS (default 5) of close-up and page,
and fails where it is over 10 s or the page over 8 MB.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

from analysis.close_up import close_up
from analysis.plan_html import page
from paradiff.config import find
from paradiff.profiles import load_profile
from paradiff.strategies import Workload
from simulator import planner
from simulator.topology import load_topology

CANDIDATES, LIMIT_S, LIMIT_BYTES = 200, 10.0, 8e6


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    request = planner.Request(
        profile=load_profile(find("models", "pixart-alpha", ".json")),
        topology=load_topology("pcie8", []),
        workload=Workload(1024, 1024, 1, 20),
        gpus=8,
        specs=("pipefusion=8,patches=8,warmup=1",),
    )
    plan = planner.plan(request)
    first = plan.ranked[0]
    many = tuple(replace(first, spec=f"{first.spec},n={i}") for i in range(CANDIDATES))
    seconds, size = [], 0
    for _ in range(runs):
        start = time.perf_counter()
        best = close_up(request, first.spec, first.placement or ())
        size = len(page(request, replace(plan, ranked=many), [best, best], []).encode())
        seconds.append(time.perf_counter() - start)
    wall = statistics.median(seconds)
    print(
        f"{CANDIDATES} candidates: {wall:.2f} s (limit {LIMIT_S} s), {size / 1e6:.1f} MB (limit 8)"
    )
    sys.exit(0 if wall <= LIMIT_S and size <= LIMIT_BYTES else 1)


if __name__ == "__main__":
    main()
