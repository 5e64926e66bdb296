"""Whole forward passes on a GPU against the sum of their segments.

``python benchmarks/bench_forward.py GPU [MODEL...]``: each model at its own resolution with random
weights, whole and on strips of a half, a quarter and an eighth of the rows (naive patches: a strip
attends to itself), one rank after another. Predicted: what the cost model asks for the segments of the
pass, from ``hardware_profiles/measured/GPU/kernels.csv`` where ``paradiff profile kernels`` has written
it; the host's time where that is longer. Every pass becomes a row of ``forward.csv`` beside it. Fails
where the median error is over 10 %. ``tools/profile_gpu.sh GPU`` does both.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from paradiff.executor.interpreter import Unexecutable
from paradiff.executor.job import Job, loaded, prepare
from paradiff.executor.measure import machine
from paradiff.strategies import Infeasible
from simulator.costs import CostModel
from simulator.gpu import Gpu, load_gpu
from simulator.measured import MEASURED

MODELS = (
    "sdxl", "pixart-alpha", "sd3-medium", "flux1-dev", "svd", "cogvideox-2b", "audioldm2-large",
)  # fmt: skip
SHARES = (1, 2, 4, 8)
STEPS, RUNS = 2, 3
LIMIT = 0.10
COLUMNS = ("model", "share", "rows", "dtype", "measured_s", "predicted_s", "passes")


def measured(model: str, gpu: Gpu, device: str, dtype: str) -> Iterator[tuple[object, ...]]:
    """A row for every share of the model's rows that a strip can have."""
    job = Job(
        source=model, spec="serial", random_weights=True, steps=STEPS, device=device, dtype=dtype
    )
    pipeline = replace(loaded(job), vae=None)
    costs = CostModel(pipeline.network.profile, [gpu], dtype)
    for share in SHARES:
        spec = "serial" if share == 1 else f"patch={share},mode=naive"
        try:
            prepared = prepare(replace(job, spec=spec), pipeline)
        except (Infeasible, Unexecutable) as reason:
            print(f"{model:16} 1/{share}: {reason}")
            continue
        works = {i.id: i.op.work for i in prepared.graph.instances()}
        ratios, times, wanted, rows = [], [], [], set[int]()
        for run in range(RUNS + 1):
            spans = prepared.in_process(in_turn=True).trace.spans
            for span in spans if run else ():
                work = works[span.id]
                if work is None or work.stage != "denoiser":
                    continue
                cost = costs.compute(work, 0)
                wanted.append(max(cost.device_s, cost.host_s))
                times.append(span.busy_s)
                ratios.append(wanted[-1] / span.busy_s - 1)
                rows.add(work.shape.r)
        took, said = statistics.median(times), statistics.median(wanted)
        yield model, share, max(rows), dtype, f"{took:.6g}", f"{said:.6g}", len(times)
        print(
            f"{model:16} 1/{share}: {took * 1e3:8.2f} ms, {statistics.median(ratios):+.1%}",
            flush=True,
        )


def main(name: str, models: list[str], device: str = "cuda", folder: Path = MEASURED) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_forward: torch sees no CUDA device")
    gpu, dtype = load_gpu(name), "bf16" if device == "cuda" else "fp32"
    about = machine(device) | {
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv),
    }  # fmt: skip
    path = folder / name / "forward.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    errors = []
    with path.open("w", encoding="utf-8", newline="") as out:
        out.writelines(f"# {key}: {value}\n" for key, value in about.items())
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)
        for model in models or MODELS:
            for row in measured(model, gpu, device, dtype):
                table.writerow(row)
                errors.append(abs(float(str(row[5])) / float(str(row[4])) - 1))
    median = statistics.median(errors)
    print(f"{path}: {len(errors)} passes, median error {median:.1%} (limit {LIMIT:.0%})")
    sys.exit(median > LIMIT)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
