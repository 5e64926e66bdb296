"""What the executor costs, and what two processes gain: ratios measured in one run.

``python benchmarks/bench_executor.py [PAIRS]``: serial through the executor against the plain diffusers
loop on the same modules, median of PAIRS (default 5) pairs in ABBA order, on twins enlarged until a step
takes 100 ms or more; fails where the executor takes over 5 % more. Then the speed-up of each strategy on
two processes of one thread over serial on one thread, for each request (data=2 serves two at once).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from paradiff.executor.job import Job, Prepared, prepare
from paradiff.strategies import parse_spec

LIMIT = 1.05
MODELS = (("sd21", 512), ("pixart-alpha", 1024), ("sd3-medium", 768))
STEPS = 3
LAUNCHED_STEPS = 6
SPEED_UPS = {
    ("sd21", 448): ("data=2", "cfg=2", "patch=2", "patch=2,mode=naive", "distrifusion=2,warmup=1",
                    "pcpp=2,warmup=1", "asyncdiff=2,warmup=1", "parastep=2,warmup=1",
                    "batchstep=2,warmup=1", "streambatch=2", "tensor=2"),
    ("pixart-alpha", 640): ("data=2", "cfg=2", "patch=2", "patch=2,mode=naive",
                            "distrifusion=2,warmup=1", "pcpp=2,warmup=1",
                            "pipefusion=2,patches=4,warmup=1", "asyncdiff=2,warmup=1",
                            "parastep=2,warmup=1", "batchstep=2,warmup=1",
                            "ulysses=2", "ring=2", "ring=2,rotate=allgather", "tensor=2"),
}  # fmt: skip
"""Every strategy of two ranks that model and scheduler can take, and batchstep, of one. (PixArt's
DPM-Solver++ remembers earlier steps, which streambatch would make on other ranks.)"""


def plain_loop(prepared: Prepared, steps: int) -> Callable[[], None]:
    """The diffusers loop: model, guidance, scheduler."""
    network, request = prepared.pipeline.network, prepared.request
    given = request.conditioning[0]
    meta = dict(prepared.graph.meta)
    shape = network.profile.latent_shape(*(int(meta[n]) for n in ("height", "width", "frames")), 1)
    guided = network.profile.geometry.guidance == "cfg"

    def run() -> None:
        scheduler = type(request.scheduler).from_config(request.scheduler.config)
        scheduler.set_timesteps(steps)
        x = torch.randn(network.latent_sizes(shape)) * getattr(scheduler, "init_noise_sigma", 1)
        name = "sample" if network.profile.kind == "unet" else "hidden_states"
        with torch.no_grad():
            for t in scheduler.timesteps:
                z = (
                    scheduler.scale_model_input(x, t)
                    if hasattr(scheduler, "scale_model_input")
                    else x
                )
                z = torch.cat([z] * 2) if guided else z
                out = network.model(
                    **{name: z}, timestep=t.expand(len(z)), **given, return_dict=False
                )[0]
                if guided:
                    uncond, cond = out.chunk(2)
                    out = uncond + request.guidance_scale * (cond - uncond)
                x = scheduler.step(out[:, : x.shape[1]], t, x, return_dict=False)[0]

    return run


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def overhead(model: str, size: int, pairs: int) -> float:
    """Median of executor over plain; prints it."""
    job = Job(source=f"tiny-{model}", spec="serial", height=size, width=size, steps=STEPS)
    prepared = prepare(job)
    prepared = replace(prepared, request=replace(prepared.request, decode=None))
    runs = {"plain": plain_loop(prepared, STEPS), "executor": prepared.in_process}
    for run in runs.values():
        run()
    ratios, step_s = [], 0.0
    for pair in range(pairs):
        order = list(runs) if pair % 2 else list(runs)[::-1]
        times = {name: seconds(runs[name]) for name in order}
        ratios.append(times["executor"] / times["plain"])
        step_s = times["plain"] / STEPS
    ratio = statistics.median(ratios)
    print(f"{model:14} {size} px  step {step_s * 1e3:6.0f} ms  executor / plain {ratio:.3f}")
    assert step_s > 0.1, "the step is too short to judge by"
    return ratio


def launched(model: str, spec: str, size: int) -> tuple[float, int]:
    """Denoising seconds of one launch for each request that it serves, and its ranks."""
    ranks, requests = parse_spec(spec).n_gpus, parse_spec(spec).degree("data")
    command = [
        sys.executable, "-m", "paradiff", "run", "--model", model, "--strategy", spec,
        "--height", str(size), "--width", str(size), "--steps", str(LAUNCHED_STEPS), "--format", "json",
        "--timeout", "120", "--launch", str(ranks),
    ]  # fmt: skip
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread)
    return float(json.loads(done.stdout)["stages"]["denoise_s"]) / requests, ranks


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    worst = max(overhead(model, size, pairs) for model, size in MODELS)
    for (model, size), specs in SPEED_UPS.items():
        alone_s, _ = launched(model, "serial", size)
        step_ms = alone_s / LAUNCHED_STEPS * 1e3
        print(f"{model:14} {size} px  serial {step_ms:.0f} ms a step on one thread")
        for spec in specs:
            seconds_each, ranks = launched(model, spec, size)
            print(f"{model:14} {spec:32} {alone_s / seconds_each:5.2f}x on {ranks}", flush=True)
    sys.exit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    main()
