"""Every strategy on the ranks that run this, against one process: what a new cluster must pass.

Under torchrun, Slurm or Ray with 2, 4 or 8 ranks: tiny twins in float64, so that the result must agree
to 1e-12 on gloo (1e-10 on a GPU) and the trace be a legal run of the graph. Rank 0 prints a line for
each case and writes ``acceptance.json`` (versions, machines, times, errors: what to send back). The exit
code is 1 if a case failed. The trace of each case lies beside it in ``traces``. ``--cases FILE`` takes a
JSON list of [model, spec] instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

for library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

import diffusers
import torch

import paradiff
from analysis.attribution import by_rank
from analysis.tracks import measured
from paradiff.executor.distributed import run_rank
from paradiff.executor.interpreter import Result
from paradiff.executor.job import Job, Prepared, prepare
from paradiff.executor.place import Place
from paradiff.executor.session import Session
from paradiff.trace import TraceMismatch, check_trace, write_chrome_trace

STEPS = 4
CASES: dict[int, list[tuple[str, str]]] = {
    2: [
        ("sd21", "cfg=2"),
        ("sd21", "data=2"),
        ("sd21", "patch=2"),
        ("sd21", "patch=2,vae=split"),
        ("sd21", "patch=2,mode=naive"),
        ("sd21", "distrifusion=2,warmup=1"),
        ("sd21", "distrifusion=2,warmup=0,mode=stale_gn,bucket=7"),
        ("sd21", "distrifusion=2,warmup=0,mode=sync_gn"),
        ("sd21", "distrifusion=2,warmup=0,mode=separate_gn"),
        ("sd21", "distrifusion=2,warmup=0,mode=no_sync"),
        ("sd21", "pcpp=2,warmup=1"),
        ("sd21", "asyncdiff=2,warmup=1"),
        ("sd21", "parastep=2,warmup=1"),
        ("sd21", "tensor=2"),
        ("wan2.1-1.3b", "tensor=2"),
        ("svd", "distrifusion=2,warmup=1"),
        ("pixart-alpha", "distrifusion=2,warmup=1"),
        ("pixart-alpha", "pipefusion=2,patches=4"),
        ("pixart-alpha", "ulysses=2"),
        ("hunyuandit", "pipefusion=2,patches=2"),
        ("sd3-medium", "ring=2"),
        ("sd3-medium", "ring=2,rotate=allgather"),
        ("sd3-medium", "pipefusion=2,patches=4,prepost=false"),
        ("flux1-dev", "pipefusion=2,patches=4,text=per_patch"),
        ("flux1-dev", "parastep=2,warmup=1"),
        ("flux1-dev", "streambatch=2"),
        ("sd3-medium", "tensor=2"),
        ("flux1-dev", "tensor=2"),
        ("cogvideox-2b", "ulysses=2"),
        ("cogvideox-2b", "asyncdiff=2,warmup=1"),
        ("sd15", "patch=2"),
        ("sd21", "streambatch=2"),
        ("pixart-alpha", "cfg=2"),
        ("pixart-alpha", "data=2"),
        ("pixart-alpha", "patch=2"),
        ("pixart-alpha", "pcpp=2,warmup=1"),
        ("pixart-alpha", "asyncdiff=2,warmup=1"),
        ("pixart-alpha", "parastep=2,warmup=1"),
        ("pixart-alpha", "tensor=2"),
        ("pixart-alpha", "ring=2"),
        ("sd3-medium", "cfg=2"),
        ("sd3-medium", "data=2"),
        ("sd3-medium", "patch=2"),
        ("sd3-medium", "distrifusion=2,warmup=1"),
        ("sd3-medium", "pcpp=2,warmup=1"),
        ("sd3-medium", "asyncdiff=2,warmup=1"),
        ("sd3-medium", "ulysses=2"),
        ("cogvideox-2b", "cfg=2"),
        ("cogvideox-2b", "data=2"),
        ("cogvideox-2b", "patch=2"),
        ("cogvideox-2b", "distrifusion=2,warmup=1"),
        ("cogvideox-2b", "pcpp=2,warmup=1"),
        ("cogvideox-2b", "parastep=2,warmup=1"),
        ("cogvideox-2b", "streambatch=2"),
        ("sd3-medium", "ulysses=2,cache=2"),
        ("sd21", "cfg=2,skip=2:3"),
        ("wan2.1-1.3b", "ring=2"),
        ("hunyuanvideo", "ulysses=2"),
        ("flux1-dev", "ulysses=2,order=v-first"),
        ("mochi", "pipefusion=2,patches=2"),
        ("sd21", "pcpp=2,warmup=1,slice=sender"),
        ("sd21", "data=2,batchstep=2,warmup=1"),
        ("hunyuandit", "streambatch=2"),
    ],
    4: [
        ("sd21", "cfg=2,distrifusion=2,warmup=1"),
        ("sd21", "patch=4,vae=split"),
        ("sd21", "pcpp=4,warmup=1"),
        ("sd21", "pcpp=4,warmup=1,slice=sender"),
        ("sd21", "asyncdiff=3,warmup=1,stride=2"),
        ("sd21", "parastep=4,warmup=1"),
        ("sd21", "cfg=2,parastep=2,warmup=1"),
        ("svd", "asyncdiff=3,warmup=1,stride=2"),
        ("sd3-medium", "asyncdiff=3,warmup=1,stride=2"),
        ("sd21", "patch=4"),
        ("sd21", "data=2,cfg=2"),
        ("sd21", "streambatch=4"),
        ("flux1-dev", "tensor=4"),
        ("pixart-alpha", "pipefusion=4,patches=4"),
        ("pixart-alpha", "cfg=2,pipefusion=2,patches=4"),
        ("sd3-medium", "pipefusion=2,patches=4,ulysses=2"),
        ("sd3-medium", "ulysses=2,ring=2"),
        ("sd3-medium", "tensor=2,ulysses=2"),
        ("pixart-alpha", "cfg=2,tensor=2"),
        ("flux1-dev", "pipefusion=2,patches=2,ring=2"),
        ("flux1-dev", "tensor=2,ulysses=2"),
        ("sd3-medium", "tensor=2,pipefusion=2,patches=4"),
        ("cogvideox-2b", "cfg=2,ulysses=2"),
        ("cogvideox-2b", "pipefusion=4,patches=4"),
        ("cogvideox-2b", "ring=4"),
        ("hunyuandit", "pipefusion=4,patches=2,stages=1:1:2:2"),
        ("latte", "pipefusion=2,patches=4,ulysses=2"),
        ("hunyuandit", "streambatch=4"),
        ("pixart-alpha", "data=4,batchstep=2,warmup=1"),
        ("pixart-alpha", "distrifusion=4,warmup=1"),
        ("pixart-alpha", "parastep=4,warmup=1"),
        ("pixart-alpha", "tensor=4"),
        ("sd3-medium", "ulysses=4"),
        ("sd3-medium", "ulysses=4,exchange=2x2"),
        ("sd3-medium", "ring=4"),
    ],
    8: [
        ("sd21", "cfg=2,distrifusion=4,warmup=1"),
        ("pixart-alpha", "cfg=2,pipefusion=2,patches=4,ulysses=2"),
        ("sd3-medium", "cfg=2,pipefusion=4,patches=4"),
        ("sd3-medium", "cfg=2,tensor=2,ulysses=2"),
        ("flux1-dev", "pipefusion=2,patches=2,ring=2,ulysses=2"),
        ("pixart-alpha", "cfg=2,tensor=2,ulysses=2"),
    ],
}


@cache
def loaded(name: str, device: str) -> Prepared:
    """The twin, loaded once."""
    return prepare(Job(source=f"tiny-{name}", spec="serial", dtype="fp64", device=device))


def case(name: str, spec: str, device: str) -> Prepared:
    job = Job(source=f"tiny-{name}", spec=spec, steps=STEPS, dtype="fp64", device=device)
    return prepare(job, loaded(name, device).pipeline)


def difference(ours: Result, theirs: Result) -> float:
    """The largest relative difference (L2) of latents and of what they decode to."""
    pairs = [(ours.latents[k], x) for k, x in theirs.latents.items()]
    pairs += [(ours.decoded[k], x) for k, x in theirs.decoded.items()]
    norms = [(torch.linalg.norm((a.cpu() - b.cpu()).double()), b.cpu().double()) for a, b in pairs]
    return max(float(d / torch.linalg.norm(b)) for d, b in norms)


def one(name: str, spec: str, device: str, session: Session, trace: Path) -> dict[str, Any]:
    """Run a case on all ranks; on rank 0, judge it and write its trace."""
    prepared = case(name, spec, device)
    result = run_rank(prepared.graph, prepared.pipeline.network, prepared.request, session)
    line: dict[str, Any] = {"case": [name, spec], "latency_s": result.trace.makespan_s}
    try:
        check_trace(prepared.graph, result.trace)
        line["trace"] = "legal"
    except TraceMismatch as error:
        line["trace"] = str(error)
    line["ranks"] = [asdict(each) for each in by_rank(result.trace)]
    if session.rank == 0:
        profile = prepared.pipeline.network.profile
        tracks = measured(prepared.graph, result.trace, profile)
        write_chrome_trace(result.trace, trace, tracks)
        line["replicas"] = sorted(result.latents)
        line["error"] = difference(result, prepared.in_process())
    return line


def facts(session: Session) -> dict[str, Any]:
    """What a reader of the summary must know of where it was made."""
    gpu = torch.cuda.get_device_name() if session.device.type == "cuda" else None
    return {
        "schema": "paradiff.acceptance/1",
        "ranks": session.world_size,
        "backend": session.backend,
        "hosts": sorted(set(session.gather_text(socket.gethostname()))),
        "gpu": gpu,
        "paradiff": paradiff.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "nccl": {k: v for k, v in sorted(os.environ.items()) if k.startswith("NCCL_")},
        "clock_residual_s": session.residual_s,
        "machines": session.machines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("acceptance"))
    parser.add_argument("--timeout", type=float, default=300.0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    place = Place.of_environment()
    if place is None or (options.cases is None and place.world_size not in CASES):
        sys.exit("start it with torchrun on 2, 4 or 8 ranks (tools/acceptance.sh does)")
    device = f"cuda:{place.local_rank}" if options.device == "cuda" else "cpu"
    cases = json.loads(options.cases.read_text()) if options.cases else CASES[place.world_size]
    session = Session.join(place, options.timeout, device, json.dumps(cases))
    limit = 1e-12 if options.device == "cpu" else 1e-10
    lines = []
    traces = options.output_dir / "traces"
    if place.rank == 0:
        traces.mkdir(parents=True, exist_ok=True)
    for number, (name, spec) in enumerate(cases):
        trace = traces / f"{number:02d}-{name}-{spec}.trace.json.gz"
        line = one(name, spec, device, session, trace)
        if session.rank == 0:
            line["passed"] = line["error"] < limit and line["trace"] == "legal"
            word = "ok  " if line["passed"] else "FAIL"
            print(
                f"{word} {name:16} {spec:48} error {line['error']:.1e}  {line['latency_s']:.3f} s"
            )
            lines.append(line)
    summary = facts(session) | {"cases": lines}
    session.leave()
    if place.rank == 0:
        staged = options.output_dir / f".acceptance.json.{os.getpid()}"
        staged.write_text(json.dumps(summary, indent=1) + "\n")
        staged.replace(options.output_dir / "acceptance.json")
        passed = sum(line["passed"] for line in lines)
        print(f"{passed} of {len(lines)} passed; {options.output_dir / 'acceptance.json'}")
        sys.exit(passed < len(lines))


if __name__ == "__main__":
    main()
