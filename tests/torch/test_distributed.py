"""Real processes over gloo compute what all ranks in one process compute, for every strategy.

One launch for each number of processes runs all its cases: a launch costs seconds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.torch]

ROOT = Path(__file__).parents[2]


def launched(world: int, script: Path, *arguments: str) -> list[dict[str, Any]]:
    """The lines of JSON that rank 0 of ``world`` processes prints."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", str(world), str(script), *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_equal_one_process(world: int, tmp_path: Path) -> None:
    """The acceptance run that users have for their clusters, on this machine's gloo."""
    output = tmp_path / "out"
    launched(
        world, ROOT / "tools" / "acceptance.py", "--device", "cpu", "--output-dir", str(output)
    )
    summary = json.loads((output / "acceptance.json").read_text())
    assert summary["ranks"] == world
    for each in summary["cases"]:
        assert each["error"] < 1e-12, each
        assert each["trace"] == "legal", each
        replicas = re.search(r"data=(\d+)", each["case"][1])
        assert each["replicas"] == list(range(int(replicas[1]) if replicas else 1))
        assert [rank["rank"] for rank in each["ranks"]] == list(range(world))


def test_spread_attention_agrees_with_diffusers() -> None:
    """Ulysses and the all-gather ring of Flux and Wan against diffusers' own, on the same weights."""
    found = launched(2, Path(__file__).parent / "ranks_diffusers.py")
    names = {(name, spec.partition("=")[0]) for name, spec in (each["case"] for each in found)}
    assert names == {(m, s) for m in ("flux1-dev", "wan2.1-1.3b") for s in ("ulysses", "ring")}
    assert all(each["error"] < 1e-5 for each in found), found


def test_calls_made_of_messages_bring_every_byte_to_its_place() -> None:
    """Exchanges in rounds, broadcasts in pieces, two ranks that gather: uneven, empty and long buffers,
    ranks in another order than their numbers, every root. Clocks that drift are followed."""
    (said,) = launched(4, Path(__file__).parent / "ranks_messages.py")
    assert [len(each) for each in said["found"]] == [14, 15, 14, 15]
    assert all(all(each.values()) for each in said["found"]), said
