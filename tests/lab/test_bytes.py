"""What goes over each link is what the graph says: interface counters of hosts in namespaces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from counting_rank import graph_of

from paradiff.lab import namespaces
from simulator.tcp import ACK_SHARE

REASON = namespaces.why_not()
pytestmark = [pytest.mark.torch, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

CASES = [
    ("sd21", "distrifusion=4,warmup=0"),
    ("sd21", "patch=4,vae=split"),
    ("sd21", "patch=4,mode=naive"),
    ("sd21", "pcpp=4,warmup=0"),
    ("sd21", "asyncdiff=4,warmup=1"),
    ("sd21", "asyncdiff=3,warmup=1,stride=2"),
    ("sd3-medium", "cfg=2,parastep=2,warmup=1"),
    ("sd3-medium", "cfg=2,streambatch=2"),
    ("sd3-medium", "pipefusion=4,patches=4"),
    ("sd3-medium", "cfg=2,pipefusion=2,patches=4"),
    ("sd3-medium", "ulysses=4"),
    ("sd3-medium", "cfg=2,ring=2"),
    ("sd3-medium", "ulysses=2,ring=2,rotate=allgather"),
    # the twin's own tensors, computed and packed by the executor
    ("tiny-sd21", "distrifusion=4,warmup=0"),
    ("tiny-sd21", "pcpp=4,warmup=0,slice=sender"),
    ("tiny-sd21", "asyncdiff=4,warmup=1"),
    ("tiny-sd3-medium", "cfg=2,parastep=2,warmup=1"),
    ("tiny-sd3-medium", "cfg=2,streambatch=2"),
    ("tiny-sd3-medium", "pipefusion=4,patches=4"),
    ("tiny-sd3-medium", "ulysses=4,exchange=2x2"),
    ("tiny-sd3-medium", "ulysses=2,ring=2"),
    ("tiny-sd3-medium", "tensor=4"),
]


def test_links_carry_what_the_graph_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 %: TCP and gloo add headers, each buffer is sent once. Where little goes out against much
    that comes in (the loop of a pipeline), its acknowledgements are seen too: up to 66 bytes for every
    two packets of 1448."""
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps(CASES))
    root = Path(__file__).parents[2]
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / ".pytest_cache" / "twins"))
    graphs = [graph_of(model, spec) for model, spec in CASES]
    with namespaces.hosts(namespaces.star(4)) as hosts:
        ranks = [
            namespaces.start(
                host,
                [sys.executable, str(Path(__file__).with_name("counting_rank.py")), str(cases)],
                {
                    "RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": namespaces.address(0),
                    "MASTER_PORT": "29577", "GLOO_SOCKET_IFNAME": namespaces.INTERFACE,
                    "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
                },
            )
            for rank, host in enumerate(hosts)
        ]  # fmt: skip
        outputs = [rank.communicate(timeout=1500) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, outputs[0][1][-2000:]
    counts = [[json.loads(line) for line in out.splitlines()] for out, _ in outputs]
    for number, ((_, spec), graph) in enumerate(zip(CASES, graphs, strict=True)):
        calls = graph.bytes_by_call()
        said = [[sum(way) for way in zip(*calls[r].values(), strict=True)] for r in range(4)]
        seen = [counts[rank][number][2:] for rank in range(4)]
        for rank, (ours, theirs) in enumerate(zip(said, seen, strict=True)):
            for way, expected, found in zip(("out", "in"), ours, theirs, strict=True):
                other = ours[1 if way == "out" else 0]
                acknowledged = ACK_SHARE * other if other > 4 * expected else 0.0
                most = 1.05 * expected + acknowledged
                assert 0.95 * expected <= found <= most, (spec, rank, way)
