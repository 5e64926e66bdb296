"""Cost of the HTML report at its largest, 200 candidates, and of a trace file of more than 25,000 ops.

``python benchmarks/bench_report.py [RUNS]`` prints the median of RUNS (default 5) of all that follows a
plan (close-ups, what would change it, the page), for two models: one with the timelines of eight ranks
in a pipeline, and one whose graphs are large; then of writing the trace. It fails where a report is over
10 s or 8 MB.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from analysis.close_up import close_up
from analysis.plan_html import page
from analysis.what_if import outlook
from paradiff.config import find
from paradiff.profiles import load_profile
from paradiff.strategies import Workload
from paradiff.trace import write_chrome_trace
from simulator import planner
from simulator.topology import load_topology

PIPELINE = "pipefusion=8,patches=8,warmup=1"
REPORTS = (("pixart-alpha", "pcie8", [PIPELINE, PIPELINE]), ("flux1-dev", "nvlink8-h100", []))
CANDIDATES, LIMIT_S, LIMIT_BYTES = 200, 10.0, 8e6


def request(model: str, box: str) -> planner.Request:
    profile = load_profile(find("models", model, ".json"))
    sizes = {key: profile.defaults[key] for key in ("height", "width", "frames", "steps")}
    return planner.Request(
        profile=profile,
        topology=load_topology(box, []),
        workload=Workload(**sizes),
        gpus=8,
    )


def median_s(work: Callable[[], int], runs: int) -> tuple[float, int]:
    """Seconds, and what it returned last: bytes."""
    seconds, size = [], 0
    for _ in range(runs):
        start = time.perf_counter()
        size = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), size


def report(asked: planner.Request, drawn: Sequence[str]) -> Callable[[], int]:
    """The candidates of eight GPUs, repeated until there are enough; timelines of ``drawn``, else of the
    first two."""
    plan = planner.plan(asked)
    many = tuple(
        replace(c, spec=c.spec if i < len(plan.ranked) else f"{c.spec},n={i}")
        for i in range(CANDIDATES)
        for c in (plan.ranked[i % len(plan.ranked)],)
    )
    pairs = [(spec, tuple(range(8))) for spec in drawn]
    pairs = pairs or [(c.spec, c.placement or ()) for c in plan.ranked[:2]]

    def work() -> int:
        seen = [close_up(asked, *pair, watched=pair is pairs[0]) for pair in pairs]
        text = page(asked, replace(plan, ranked=many), seen, outlook(asked, plan), [])
        return len(text.encode())

    return work


def trace(folder: Path) -> Callable[[], int]:
    seen = close_up(request("pixart-alpha", "pcie8"), "ulysses=8", tuple(range(8)), watched=True)
    print(f"trace of {len(seen.trace.spans)} spans, {len(seen.tracks.links)} on links")
    path = folder / "trace.json.gz"

    def work() -> int:
        write_chrome_trace(seen.trace, path, seen.tracks)
        return path.stat().st_size

    return work


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    good = True
    for model, box, drawn in REPORTS:
        wall, size = median_s(report(request(model, box), drawn), runs)
        good &= wall <= LIMIT_S and size <= LIMIT_BYTES
        print(
            f"{model} on {box}, {CANDIDATES} candidates: {wall:.2f} s (limit {LIMIT_S} s),"
            f" {size / 1e6:.1f} MB (limit 8)"
        )
    with tempfile.TemporaryDirectory() as folder:
        trace_s, trace_bytes = median_s(trace(Path(folder)), runs)
    print(f"written in {trace_s:.2f} s, {trace_bytes / 1e6:.1f} MB")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
