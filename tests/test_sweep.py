"""Sweeps: the same bytes on one process, on two, on Ray, after a kill, after a worker's death."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from machine import is_alive
from typer.testing import CliRunner, Result

from paradiff.cli import app
from paradiff.config import find
from paradiff.profiles import load_profile
from paradiff.strategies import Workload, build, parse_spec
from simulator.measured import Row, append_row, begin_table, kernels_of
from simulator.sweep import COLUMNS

Popen = subprocess.Popen[bytes]
SWEEP = """
models: [sdxl, pixart-alpha]
topologies: [pcie2-3090]
resolutions: [512x512, 1024x512]
degrees: [1, 2, 4]
strategies: [serial, cfg=2, ulysses=2]
steps: 4
"""
COMBINATIONS = 2 * 2 * 3


def sweep(folder: Path, *more: str, text: str = SWEEP) -> Result:
    file = folder / "sweep.yaml"
    file.write_text(text)
    arguments = ["plan", "--sweep", str(file), "--output-dir", str(folder / "out"), *more]
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """On one process, undisturbed."""
    folder = tmp_path_factory.mktemp("one")
    done = sweep(folder, "--processes", "1")
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in (folder / "out").iterdir()] == ["sweep.csv"], "no parts are left"
    return (folder / "out" / "sweep.csv").read_bytes()


def test_rows_are_plans_in_the_order_of_the_file(expected: bytes) -> None:
    """12 combinations; at degree 4 the box has too few GPUs and there is one row with the reason."""
    rows = list(csv.DictReader(expected.decode().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    order = list(dict.fromkeys((r["model"], r["width"], r["height"], r["gpus"]) for r in rows))
    assert order == [
        (model, width, "512", gpus)
        for model in ("sdxl", "pixart-alpha")
        for width in ("512", "1024")
        for gpus in ("1", "2", "4")
    ]
    best = [r for r in rows if r["rank"] == "1"]
    assert len(best) == 8
    assert {r["reason"] for r in rows if not r["spec"]} == {"4 GPUs of 2"}
    two = [r for r in rows if (r["model"], r["width"], r["gpus"]) == ("pixart-alpha", "512", "2")]
    times = [float(r["latency_s"]) for r in two if r["rank"]]
    assert times == sorted(times)
    assert len(times) == 3
    unet = [r for r in rows if r["model"] == "sdxl" and r["spec"] == "ulysses=2"]
    assert all(r["feasible"] == "False" and r["reason"] for r in unet)
    stages = ("stages_text_encoder_s", "stages_denoise_s", "stages_vae_s")
    assert sum(float(best[0][s]) for s in stages) == pytest.approx(float(best[0]["latency_s"]))


def test_two_processes_write_the_same_bytes(expected: bytes, tmp_path: Path) -> None:
    assert sweep(tmp_path, "--processes", "2").exit_code == 0
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == expected


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in /proc")
def test_a_local_ray_writes_the_same_bytes_though_a_worker_is_killed(
    expected: bytes, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the [ray] extra)")
    running = start(tmp_path, "--ray", "local")
    kill_a_worker(running, "ray::rows")
    assert running.wait() == 0
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == expected


HELD = """
import sys, time
from pathlib import Path
from paradiff.cli import main
from simulator import sweep
write, left = sweep._write, [int(sys.argv.pop(1))]
def held(file, text):
    write(file, text)
    left[0] -= 1
    if left[0] == 0:
        Path("held").touch()
        while not Path("go").exists():
            time.sleep(0.005)
sweep._write = held
main()
"""
"""The program, which stops after so many parts until it is told to go on."""


def start(
    folder: Path, *more: str, held_after: int = 0, stderr: IO[str] | int = subprocess.DEVNULL
) -> Popen:
    """The sweep as a process of its own; it stops after ``held_after`` parts, if any."""
    (folder / "sweep.yaml").write_text(SWEEP)
    arguments = ["plan", "--sweep", "sweep.yaml", "--output-dir", "out", *more]
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", HELD, str(held_after), *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": root,
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_worker_niceness": "0",  # else 15: beside other tests its workers would not get on
        },
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "out" / "sweep.parts").glob("[!.]*.json"))


def until_held(running: Popen, folder: Path) -> None:
    while not (folder / "held").exists():
        assert running.poll() is None
        time.sleep(0.005)


def kill_after_two(folder: Path) -> None:
    """Start the sweep, and kill it when it has two parts."""
    running = start(folder, "--processes", "1", held_after=2)
    until_held(running, folder)
    running.send_signal(signal.SIGKILL)
    running.wait()
    (folder / "held").unlink()


def test_a_killed_sweep_goes_on_where_it_stopped(expected: bytes, tmp_path: Path) -> None:
    kill_after_two(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
    assert len(kept) == 2
    torn, _ = kept.popitem()
    torn.write_bytes(torn.read_bytes()[:100])  # as when the power is cut: made again
    assert not (tmp_path / "out" / "sweep.csv").exists()
    again = start(tmp_path, "--processes", "1", held_after=COMBINATIONS - 1)
    until_held(again, tmp_path)
    assert len(parts(tmp_path)) == COMBINATIONS
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    (tmp_path / "go").touch()
    assert again.wait() == 0
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.csv"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in /proc")
def test_a_terminated_sweep_takes_its_workers_along(tmp_path: Path) -> None:
    """SIGTERM, as from ``timeout`` or a job's end, does what Ctrl-C does: one line, no worker left."""
    with (tmp_path / "said").open("w+") as said:
        running = start(tmp_path, "--processes", "2", held_after=1, stderr=said)
        until_held(running, tmp_path)
        workers = descendants(running.pid)
        assert len(workers) >= 2
        running.send_signal(signal.SIGTERM)
        assert running.wait() == 128 + signal.SIGTERM
        said.seek(0)
        assert said.read() == "12 combinations; interrupted, the same command goes on.\n"
    while any(map(is_alive, workers)):
        time.sleep(0.05)


def test_what_was_measured_since_is_planned_again(expected: bytes, tmp_path: Path) -> None:
    """Part of a sweep is done; then the box's GPU gets a kernel table, of one product that one GPU runs.
    The end is that of a sweep that had the table all along, and not that of one without."""
    kill_after_two(tmp_path)
    profile = load_profile(find("models", "sdxl", ".json"))
    graph = build(parse_spec("serial"), profile, Workload(512, 512, 1, 4))
    product = next(key for key in kernels_of(graph, profile) if key.kind == "gemm")
    for folder in (tmp_path, tmp_path / "afresh"):
        table = folder / "hardware_profiles" / "measured" / "rtx3090" / "kernels.csv"
        begin_table(table, {"device": "GeForce RTX 3090", "threads": "0", "torch": "none"})
        append_row(table, product, "bf16", Row(5e-3, 4.9e-3, 5.1e-3, 9))
        assert start(folder, "--processes", "2").wait() == 0
    again, afresh = (f / "out" / "sweep.csv" for f in (tmp_path, tmp_path / "afresh"))
    assert again.read_bytes() == afresh.read_bytes() != expected


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in /proc")
def test_killing_a_worker_loses_nothing(expected: bytes, tmp_path: Path) -> None:
    running = start(tmp_path, "--processes", "2", held_after=1)
    until_held(running, tmp_path)
    kill_a_worker(running, "spawn_main")
    (tmp_path / "go").touch()
    assert running.wait() == 0
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == expected


def kill_a_worker(running: Popen, name: str) -> None:
    """Kill one of its descendants whose command has ``name`` in it."""
    while running.poll() is None:
        for pid in descendants(running.pid):
            with contextlib.suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
                    return
    pytest.fail("it ended before a worker was seen")


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def test_parquet_holds_the_same(expected: bytes, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    done = sweep(tmp_path, "--processes", "1", text=SWEEP + "format: parquet\n")
    assert done.exit_code == 0, done.stderr
    found = parquet.read_table(tmp_path / "out" / "sweep.parquet").to_pylist()
    rows = csv.DictReader(expected.decode().splitlines())
    for one, other in zip(found, rows, strict=True):
        assert {k: "" if v is None else str(v) for k, v in one.items()} == other


# ------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (SWEEP + "resolution: 5\n", [], "sweep.yaml:8:1: resolution: unknown key"),
        (SWEEP.replace("512x512", "wide"), [], "not a resolution ('wide')"),
        (SWEEP.replace("serial", "seriel"), [], "sweep.yaml:6:"),
        (SWEEP.replace("[1, 2, 4]", "[0]"), [], "sweep.yaml:5:"),
        (SWEEP.replace("sdxl", "sdxk"), [], "sdxk: no such file in models"),
        (SWEEP.replace("pcie2-3090", "pcie3"), [], "pcie3: no such file in topologies"),
        (SWEEP, ["--topology", "pcie8", "--top", "3"], "--topology, --top: not with --sweep"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, text: str, more: list[str], message: str) -> None:
    done = sweep(tmp_path, *more, text=text)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_ray_cluster_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the [ray] extra)")
    for address in ("nonsense", ""):
        done = sweep(tmp_path, "--ray", address)
        assert done.exit_code == 2
        assert f"--ray {address}: " in done.stderr
    done = sweep(tmp_path, "--ray", "127.0.0.1:1")
    assert done.exit_code == 2
    assert "--ray 127.0.0.1:1: Connection refused" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_belongs_to_a_sweep_needs_one() -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["plan", "--topology", "pcie8", "--ray", "local"])
    assert (done.exit_code, "go with --sweep" in done.stderr) == (2, True)
    done = runner.invoke(app, ["plan"])
    assert (done.exit_code, "--topology is missing" in done.stderr) == (2, True)
