"""tools/cluster: ranks that torchrun starts on two nodes, that Slurm starts, that Ray starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import free_port
from nodes import nodes, ray, slurm, why_no_slurm
from safetensors.torch import load_file
from typer.testing import CliRunner

from paradiff.cli import app
from paradiff.executor.place import SLURM_PORTS, Place
from paradiff.lab import namespaces
from paradiff.trace import read_chrome_trace

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tools" / "cluster"
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # else 15: beside other tests its ranks would not get on
}  # fmt: skip
NO_ROOT = namespaces.why_not()


def asked(spec: str, output: Path) -> list[str]:
    return [
        "run", "--model", "sd21", "--strategy", spec, "--steps", "2", "--dtype", "fp64",
        "--timeout", "600", "--output-dir", str(output),
    ]  # fmt: skip


def check(spec: str, output: Path, tmp_path: Path) -> None:
    """What the ranks made is what one process makes; machines and a trace of all ranks are written."""
    done = CliRunner().invoke(app, asked(spec, tmp_path / "here"))
    assert done.exit_code == 0, done.output
    ours, here = (
        load_file(p / "latents.safetensors")["latents.0"] for p in (output, tmp_path / "here")
    )
    assert torch.allclose(ours, here, rtol=1e-12, atol=1e-12)
    summary = json.loads((output / "summary.json").read_text())
    ranks = list(range(len(summary["ranks"])))
    assert sorted(r for machine in summary["machines"] for r in machine["ranks"]) == ranks
    assert {machine["torch"] for machine in summary["machines"]} == {torch.__version__}
    trace = read_chrome_trace(output / "trace.json.gz")
    assert sorted({span.rank for span in trace.spans}) == ranks


def by_torchrun(
    ranks: int, command: list[str], tmp_path: Path, **more: str
) -> tuple[list[int], str]:
    """Exit codes of ``command`` on two nodes of ``ranks`` each, and what the first says on stderr."""
    environment = {
        **ENVIRONMENT, "GLOO_SOCKET_IFNAME": namespaces.INTERFACE, "NCCL_DEBUG": "INFO", **more,
    }  # fmt: skip
    with nodes(2, tmp_path) as members:
        started = [
            node.start(
                ["bash", str(CLUSTER / "torchrun.sh"), str(number), "2", str(ranks), "node0:29571",
                 *command],
                environment,
            )
            for number, node in enumerate(members)
        ]  # fmt: skip
        outputs = [one.communicate() for one in started]
    return [one.returncode for one in started], outputs[0][1]


@pytest.mark.skipif(NO_ROOT is not None, reason=str(NO_ROOT))
def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """Two nodes of two ranks, that meet at the first one's name: cfg between them, patches inside."""
    output = tmp_path / "out"
    codes, said = by_torchrun(2, asked("cfg=2,patch=2", output), tmp_path)
    assert codes == [0, 0], said[-2000:]
    check("cfg=2,patch=2", output, tmp_path)
    machines = machines_of(output / "summary.json")
    assert [(m["host"], m["ranks"]) for m in machines] == [("node0", [0, 1]), ("node1", [2, 3])]
    assert {m["NCCL_DEBUG"] for m in machines} == {"INFO"}


@pytest.mark.skipif(NO_ROOT is not None, reason=str(NO_ROOT))
def test_a_plan_is_validated_on_two_nodes(tmp_path: Path) -> None:
    """Measured, predicted, run and compared by the ranks of both. A gate that nothing passes: the node
    of rank 0 ends with its exit code, and all is written."""
    planned = CliRunner().invoke(app, [
        "plan", "--topology", "pcie8", "--model", "sd21", "--strategy", "cfg=2", "--steps", "2",
        "--output-dir", str(tmp_path / "plan"),
    ])  # fmt: skip
    assert planned.exit_code == 0, planned.output
    (plan,) = (tmp_path / "plan").glob("*.plan.yaml")
    output = tmp_path / "out"
    command = ["validate", "run", str(plan), "--repeats", "2", "--max-error", "0", "--timeout", "600",
               "--measure-again", "--output-dir", str(output)]  # fmt: skip
    twins = ROOT / ".pytest_cache" / "twins"
    codes, said = by_torchrun(1, command, tmp_path, XDG_CACHE_HOME=str(twins))
    assert codes[0] == 1, said[-2000:]
    assert "allowed: 0.0% (--max-error)" in said
    answer = json.loads((output / "validation.json").read_text())
    assert (answer["passed"], answer["how"]) == (False, "2 processes over gloo")
    assert answer["topology"]["nodes"] == {"node0": ["rank0"], "node1": ["rank1"]}
    machines = machines_of(output / "validation.json")
    assert [(m["host"], m["ranks"]) for m in machines] == [("node0", [0]), ("node1", [1])]
    assert {m["NCCL_DEBUG"] for m in machines} == {"INFO"}
    assert answer["files"] == sorted(path.name for path in output.iterdir())
    traces = [read_chrome_trace(file) for file in sorted(output.glob("*.json.gz"))]
    assert [t.makespan_s for t in traces] == [*answer["repeats_s"], answer["predicted_s"]]
    assert [{s.rank for s in t.spans} for t in traces] == [{0, 1}] * 3


def machines_of(report: Path) -> list[dict[str, Any]]:
    """The machines of a run, in the order of their names."""
    found = json.loads(report.read_text())["machines"]
    return sorted(found, key=lambda machine: machine["host"])


SRUN = f"""#!{sys.executable}
import os, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=1", sys.argv
tasks = int(os.environ["SLURM_NTASKS"])
step = {{"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_ID": "0"}}
ranks = [
    subprocess.Popen(
        sys.argv[2:], env={{**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}
    )
    for i in range(tasks)
]
sys.exit(max(rank.wait() for rank in ranks))
"""
"""Starts the tasks of a step as srun does, on this machine."""


def test_slurm(tmp_path: Path) -> None:
    """The batch script under an srun that starts its tasks here; the job's number, and so the port where
    they meet, is free."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = SLURM_PORTS.index(free_port())
    batch = {
        "SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "127.0.0.1",
    }  # fmt: skip
    assert Place.of_environment(batch) is None
    done = subprocess.run(
        ["bash", str(CLUSTER / "paradiff.sbatch"), *asked("patch=2", tmp_path / "out")],
        env={**ENVIRONMENT, **batch, "PATH": f"{srun.parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    check("patch=2", tmp_path / "out", tmp_path)


@pytest.mark.skipif(NO_ROOT is not None, reason=str(NO_ROOT))
@pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm()))
def test_slurm_of_two_nodes(tmp_path: Path) -> None:
    """A real Slurm: two nodes of two tasks, that meet at the first node's name."""
    output = tmp_path / "out"
    with nodes(2, tmp_path) as members, slurm(members, 2, tmp_path) as slurm_environment:
        environment = {**ENVIRONMENT, **slurm_environment, "PARADIFF": str(ROOT)}
        environment["GLOO_SOCKET_IFNAME"] = namespaces.INTERFACE
        members[0].run(
            ["sbatch", "--wait", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0",
             "--cpus-per-task=1", f"--output={tmp_path / 'log'}", str(CLUSTER / "paradiff.sbatch"),
             *asked("cfg=2,patch=2", output)],
            environment, 1200,
        )  # fmt: skip
    check("cfg=2,patch=2", output, tmp_path)
    machines = machines_of(output / "summary.json")
    assert [(m["host"], m["ranks"]) for m in machines] == [("node0", [0, 1]), ("node1", [2, 3])]


@pytest.mark.skipif(NO_ROOT is not None, reason=str(NO_ROOT))
def test_ray_of_two_nodes(tmp_path: Path) -> None:
    """Four actors on two nodes that have room for two each: ranks are numbered node by node."""
    pytest.importorskip("ray", reason="Ray is not installed (the [ray] extra)")
    output = tmp_path / "out"
    short = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket's path has 107 bytes at most
    with nodes(2, tmp_path) as members, ray(members, 2, ENVIRONMENT, short) as users:
        members[0].run(
            [sys.executable, str(CLUSTER / "ray_ranks.py"), "--ranks", "4",
             *asked("cfg=2,patch=2", output)],
            {**users, "GLOO_SOCKET_IFNAME": namespaces.INTERFACE}, 1200,
        )  # fmt: skip
    shutil.rmtree(short)
    check("cfg=2,patch=2", output, tmp_path)
    machines = machines_of(output / "summary.json")
    assert [m["host"] for m in machines] == ["node0", "node1"]
    assert sorted(m["ranks"] for m in machines) == [[0, 1], [2, 3]]


def test_ray(tmp_path: Path) -> None:
    """Acceptance on a Ray of one node: it compares with one process and writes what to send back."""
    pytest.importorskip("ray", reason="Ray is not installed (the [ray] extra)")
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([["sd21", "patch=2"]]))
    done = subprocess.run(
        [sys.executable, str(CLUSTER / "ray_ranks.py"), "--address", "local", "--ranks", "2",
         "acceptance", "--device", "cpu", "--cases", str(cases), "--output-dir", str(tmp_path / "out")],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 of 1 passed" in done.stdout
    summary = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert [machine["ranks"] for machine in summary["machines"]] == [[0, 1]]
    trace = read_chrome_trace(tmp_path / "out" / "traces" / "00-sd21-patch=2.trace.json.gz")
    assert {span.rank for span in trace.spans} == {0, 1}


@pytest.mark.parametrize("script", ["torchrun.sh", "paradiff.sbatch"])
def test_scripts_parse_and_say_how_they_are_used(script: str) -> None:
    done = subprocess.run(
        ["bash", str(CLUSTER / script)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "usage: " in done.stderr) == (1, True)
