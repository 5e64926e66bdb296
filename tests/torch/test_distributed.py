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

from paradiff.trace import Span, Trace, read_chrome_trace

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
    early = list((output / "traces").glob("*order=v-first*"))
    assert len(early) == (world == 2)
    for path in early:
        for v, qk in exchanges_of_v(read_chrome_trace(path)):
            assert v.ready_s <= qk.start_s + 1e-9, "V may go when what is done to Q and K begins"


@pytest.mark.still
def test_v_goes_beside_what_follows_it(tmp_path: Path) -> None:
    """Somewhere before that ends, which other work of the machine may delay, and which no order but this
    allows once."""
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([["flux1-dev", "ulysses=2,order=v-first"]]))
    launched(
        2, ROOT / "tools" / "acceptance.py", "--device", "cpu", "--cases", str(cases),
        "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    (path,) = (tmp_path / "out" / "traces").iterdir()
    assert any(v.start_s < qk.end_s for v, qk in exchanges_of_v(read_chrome_trace(path)))


def exchanges_of_v(trace: Trace) -> list[tuple[Span, Span]]:
    """Each exchange of V, and what is done to Q and K meanwhile."""

    def spans(rank: int, step: int, end: str) -> list[Span]:
        own = (s for s in trace.spans if (s.rank, s.step) == (rank, step))
        found = (s for s in own if s.name.partition("@")[0].endswith(end))
        return sorted(found, key=lambda s: s.ready_s)

    ranks, steps = (0, 1), sorted({s.step for s in trace.spans if s.name.endswith("/qk@r0")})
    pairs = [
        pair
        for rank in ranks
        for step in steps
        for pair in zip(spans(rank, step, ".attn/v"), spans(rank, step, "/qk"), strict=True)
    ]
    assert len(pairs) >= len(ranks) * len(steps) > 0
    return pairs


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
