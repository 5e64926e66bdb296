"""A large capacity question as a whole process: three models, four boxes, wall time and memory.

``python benchmarks/bench_capacity.py [REQUESTS]``; goals: under 60 s on two idle cores, under 1 GB in
the largest process. REQUESTS is --num-prompts, 20,000 by default: with all the numbers of nodes and cuts
that are looked at, that is 4.2 million requests in all.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

BOXES = ("pcie8", "nvlink8-h100", "nvlink8-a100", "pcie4-a100")
MODELS = ("sdxl:0.6", "pixart-alpha:0.3", "sd3-medium:0.1")
PER_CONFIRMATION = 20_000
LIMIT_S = 60.0


def main() -> None:
    requests = sys.argv[1] if len(sys.argv) > 1 else str(PER_CONFIRMATION)
    command = [sys.executable, "-c", "from paradiff.cli import main; main()", "capacity"]
    command += [word for box in BOXES for word in ("--topology", box)]
    command += [word for model in MODELS for word in ("--model", model)]
    command += ["--request-rate", "20", "--slo", "p99=15s", "--processes", "2"]
    command += ["--num-prompts", requests, "--format", "csv"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout or done.stderr)
    print(
        f"wall {wall_s:.1f} s, CPU {used.ru_utime + used.ru_stime:.1f} s on {os.cpu_count()} cores"
    )
    print(f"largest process {used.ru_maxrss / 1024:.0f} MiB")
    sys.exit(0 if done.returncode == 0 and wall_s <= LIMIT_S and used.ru_maxrss < 2**20 else 1)


if __name__ == "__main__":
    main()
