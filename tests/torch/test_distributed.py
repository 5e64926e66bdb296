"""Real processes over gloo compute what all ranks in one process compute, for every strategy.

One launch for each number of processes runs all its cases: a launch costs seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.torch]

CASES: dict[int, list[tuple[str, str]]] = {
    2: [
        ("sd21", "cfg=2"),
        ("sd21", "data=2"),
        ("sd21", "patch=2"),
        ("sd21", "patch=2,mode=naive"),
        ("sd21", "distrifusion=2,warmup=1"),
        ("sd21", "distrifusion=2,warmup=0,mode=stale_gn,bucket=7"),
        ("sd21", "distrifusion=2,warmup=0,mode=sync_gn"),
        ("sd21", "distrifusion=2,warmup=0,mode=separate_gn"),
        ("sd21", "distrifusion=2,warmup=0,mode=no_sync"),
        ("sd21", "pcpp=2,warmup=1"),
        ("sd21", "asyncdiff=2,warmup=1"),
        ("sd21", "parastep=2,warmup=1"),
        ("sdxl", "cfg=2,vae=split"),
        ("svd", "distrifusion=2,warmup=1"),
        ("pixart-alpha", "distrifusion=2,warmup=1"),
        ("pixart-alpha", "pipefusion=2,patches=4"),
        ("pixart-alpha", "ulysses=2"),
        ("sd3-medium", "ring=2"),
        ("sd3-medium", "ring=2,rotate=allgather"),
        ("sd3-medium", "pipefusion=2,patches=4,prepost=false"),
        ("flux1-dev", "pipefusion=2,patches=4,text=per_patch"),
        ("flux1-dev", "parastep=2,warmup=1"),
        ("cogvideox-2b", "ulysses=2"),
        ("cogvideox-2b", "asyncdiff=2,warmup=1"),
        ("sd15", "patch=2"),
        ("wan2.1-1.3b", "ring=2"),
        ("hunyuanvideo", "ulysses=2"),
        ("hunyuandit", "pipefusion=2,patches=4"),
        ("mochi", "pipefusion=2,patches=2"),
    ],
    4: [
        ("sd21", "cfg=2,distrifusion=2,warmup=1"),
        ("sd21", "patch=4"),
        ("sd21", "patch=4,vae=split"),
        ("sd21", "pcpp=4,warmup=1"),
        ("sd21", "pcpp=4,warmup=1,slice=receiver"),
        ("sd21", "asyncdiff=3,warmup=1,stride=2"),
        ("sd21", "parastep=4,warmup=1"),
        ("svd", "asyncdiff=3,warmup=1,stride=2"),
        ("pixart-alpha", "pipefusion=4,patches=4"),
        ("pixart-alpha", "cfg=2,pipefusion=2,patches=4"),
        ("sd3-medium", "pipefusion=2,patches=4,ulysses=2"),
        ("sd3-medium", "ulysses=2,ring=2"),
        ("flux1-dev", "pipefusion=2,patches=2,ring=2"),
        ("cogvideox-2b", "cfg=2,ulysses=2"),
        ("cogvideox-2b", "pipefusion=4,patches=4"),
        ("cogvideox-2b", "ring=4"),
        ("hunyuandit", "pipefusion=4,patches=2,stages=1:1:2:2"),
        ("latte", "pipefusion=2,patches=4,ulysses=2"),
    ],
    8: [
        ("sd21", "cfg=2,distrifusion=4,warmup=1"),
        ("pixart-alpha", "cfg=2,pipefusion=2,patches=4,ulysses=2"),
        ("sd3-medium", "cfg=2,pipefusion=4,patches=4"),
        ("flux1-dev", "pipefusion=2,patches=2,ring=2,ulysses=2"),
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_processes_equal_one_process(world: int, tmp_path: Path) -> None:
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps(CASES[world]))
    script = Path(__file__).parent / "ranks.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", str(world), str(script), str(cases)],
        capture_output=True, text=True, timeout=590, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [tuple(each["case"]) for each in found] == CASES[world]
    for each in found:
        assert each["error"] < 1e-12, each
        assert each["replicas"] == ([0, 1] if "data" in each["case"][1] else [0])
