"""Transfers timed between real processes, and their way into a topology's tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paradiff.cli import app
from paradiff.config import ConfigError, find
from paradiff.executor.measure_network import COLLECTIVES, cases
from simulator.measured_network import COLUMNS, Measured, check_library, to_csv, with_tables
from simulator.topology import load_topology

ROOT = Path(__file__).parent.parent.parent


def measured(kind: str, ranks: tuple[int, ...], nbytes: int, us: float) -> Measured:
    return Measured(kind, ranks, "all", nbytes, us * 1e-6, us * 9e-7, us * 1.1e-6, 9, 1e-4, 2e-4)


def test_cases_of_four_ranks() -> None:
    """Messages from rank 0 to three others, one way and both; every collective of two ranks and of
    four. A gathered buffer divides by ranks and element size: 1000 B becomes 1008 for four ranks."""
    found = cases(4, [1000, 4096])
    assert len(found) == 3 * 2 * 2 + 2 * len(COLLECTIVES) * 2
    assert {case.ranks for case in found} == {(0, 1), (0, 2), (0, 3), (0, 1, 2, 3)}
    assert {c.nbytes for c in found if len(c.ranks) == 4} == {1008, 4096}
    assert {len(c.ranks) for c in cases(6, [64]) if c.kind != "p2p"} == {2, 4, 6}


def test_tables_replace_older_ones_of_the_same_calls_and_comments_stay(tmp_path: Path) -> None:
    """pcie8-l40s-alltoall has all_to_all tables of 2, 4 and 8 GPUs that hold for the node. New: one of
    all eight replaces that of eight; one of two GPUs holds for those two and stands beside the old."""
    rows = [
        measured("all_to_all", tuple(range(8)), 2**20, 500.0),
        measured("all_to_all", tuple(range(8)), 2**10, 50.0),
        measured("all_gather", (0, 1), 3000, 70.0),
        measured("p2p", (0, 1), 2**20, 40.0),
    ]
    text = with_tables("pcie8-l40s-alltoall", rows, range(8), "measured: here")
    target = tmp_path / "box.yaml"
    target.write_text(text)
    old, new = load_topology("pcie8-l40s-alltoall"), load_topology(target)
    assert new.links == old.links
    comment = find("topologies", "pcie8-l40s-alltoall").read_text().split("\n")[0]
    assert text.startswith(comment)
    kept = [t for t in old.collectives if (t.kind, t.ranks) != ("all_to_all", 8)]
    assert list(new.collectives[: len(kept)]) == kept
    whole, two = new.collectives[len(kept) :]
    assert (whole.scope, whole.sizes) == ("node", (1024, 2**20))
    assert whole.seconds == pytest.approx((50e-6, 500e-6))
    assert (two.kind, two.scope) == ("all_gather", ("gpu0", "gpu1"))
    assert "[1 MiB, 500 us]" in text
    again = with_tables(str(target), rows, range(8), "measured: here")
    assert again == text


def test_a_box_that_the_ranks_do_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 ranks, but pcie2-3090 has 2 GPUs"):
        with_tables("pcie2-3090", [], range(4), "x")
    with pytest.raises(ConfigError, match="ranks on several nodes of pcie8x2"):
        with_tables("pcie8x2", [], range(16), "x")


def test_times_between_cpus_are_not_those_of_gpus() -> None:
    with pytest.raises(
        ConfigError, match="gloo's times between CPUs are not those of GPUs on pcie"
    ):
        check_library(load_topology("pcie8"), "cpu")
    check_library(load_topology("pcie8"), "cuda")
    check_library(load_topology("lab-star"), "cpu")


def test_the_file_has_every_number() -> None:
    text = to_csv({"device": "a\nb"}, [measured("p2p", (0, 3), 4096, 12.5)])
    assert text.split("\n") == [
        "# device: a b", ",".join(COLUMNS), "p2p,0-3,all,4096,12.5,11.25,13.75,9,100,200", "",
    ]  # fmt: skip


def test_two_processes_measure_each_other(tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'paradiff'; from paradiff.cli import main as m; m()"
    script = tmp_path / "launch.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(script), "profile", "network"]
    command += ["--min-bytes", "4 KiB", "--max-bytes", "16 KiB", "--output-dir", str(tmp_path)]
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text(
        "{name: hosts, gpu: l40, peer_to_peer: true, source: 'assumed: a test', "
        "nodes: [{name: host0, gpus: [gpu0..gpu1]}], links: [{ends: [gpu0, gpu1], kind: ethernet, "
        "bandwidth: 1 GB/s, latency: 1 us}]}"
    )
    command += ["--topology", str(hosts), "--output", str(tmp_path / "box.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2  # rank 0 alone speaks
    lines = (tmp_path / "network.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines if not line.startswith("#")][1:]
    assert len(rows) == 2 * 2 + 5 * 2
    assert all(float(cell) > 0 for row in rows for cell in row[4:])
    box = load_topology(tmp_path / "box.yaml")
    assert {(t.kind, t.scope) for t in box.collectives} == {(kind, "node") for kind in COLLECTIVES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "not one of several ranks, allowed: torchrun"),
        (["--topology", "pcie8"], "--topology and --output: give both"),
        (["--topology", "pcie8", "--output", "/nowhere/x.yaml"], "/nowhere is not a directory"),
        (["--output-dir", "/dev/null/x"], "/dev/null is not a directory"),
        (["--min-bytes", "1"], "size has no unit"),
        (["--min-bytes", "1 MiB", "--max-bytes", "1 KiB"], "larger than --max-bytes"),
    ],
)
def test_wrong_use_is_one_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    done = CliRunner().invoke(app, ["profile", "network", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
