"""The command line as its users meet it: output, files, exit codes, and messages about bad input."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from machine import mounted
from typer.testing import CliRunner, Result

from paradiff.cli import app, plan_app
from paradiff.config import find

PCIE8 = find("topologies", "pcie8").read_text()
QUICK = ["--topology", "pcie8.yaml", "--steps", "6", "--strategy", "serial", "--strategy", "cfg=2"]
CANDIDATE_KEYS = [
    "spec", "feasible", "reason", "latency_s", "latency_low_s", "latency_high_s", "speedup",
    "compute_s", "exposed_comm_s", "bubble_s", "host_s", "stages", "n_gpus", "synchronous_steps",
    "throughput_per_s", "cost", "cost_reason", "quality", "comm_bytes_per_gpu",
    "peak_memory_bytes", "exact", "max_staleness_steps", "placement", "provenance",
]  # fmt: skip
STAGES = {"text_encoder_s", "denoise_s", "vae_s"}


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(plan_app, list(arguments))


def script(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed entry point's code as a process of its own."""
    code = "import sys; sys.argv[0] = 'paradiff-plan'; from paradiff.cli import plan_main as m; m()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        check=False,
    )


# ------------------------------------------------------------------------------------------ output


def test_the_topology_alone_is_enough_from_any_directory(tmp_path: Path) -> None:
    done = script("--topology", "pcie8.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sdxl on pcie8 (8 GPUs): 1024x1024")
    assert re.search(r"^ *# +strategy +GPUs", done.stdout, re.M)
    assert re.search(r"^Run \S+ on \d GPUs?: [\d.]+ s, 90 % between", done.stdout, re.M)
    assert "\x1b" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_has_the_keys_of_the_contract() -> None:
    done = plan(*QUICK, "--format", "json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["schema"] == "paradiff.plan/1"
    assert (data["model"], data["topology"], data["gpus"]) == ("sdxl", "pcie8", 8)
    assert set(data["workload"]) == {"height", "width", "frames", "steps", "batch", "dtype"}
    assert data["currency"] == "USD"
    assert {"latency_s", "peak_memory_bytes", "stages"} <= set(data["baseline"])
    assert set(data["baseline"]["stages"]) == STAGES
    for candidate in data["candidates"]:
        assert [key for key in candidate if key in CANDIDATE_KEYS] == CANDIDATE_KEYS
        assert set(candidate["stages"]) == STAGES
        assert candidate["provenance"] in {"table", "interpolated", "transferred", "analytic"}
    assert data["recommended"] == data["candidates"][0]["spec"]
    assert {data["recommended"], data["runner_up"]} == {"serial", "cfg=2"}
    assert data["decided_by"]


def test_output_dir_holds_the_plan_runnable_files_and_a_trace(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    done = plan(*QUICK, "--output-dir", str(out))
    assert done.exit_code == 0, done.stderr
    names = sorted(p.name for p in out.iterdir())
    best = json.loads((out / "plan.json").read_text())["recommended"]
    other = {"serial": "cfg=2", "cfg=2": "serial"}[best]
    files = ["plan.json", "report.html", "trace.json.gz"]
    assert names == [f"01-{best}.plan.yaml", f"02-{other}.plan.yaml", *files]
    first = (out / names[0]).read_text()
    assert 'schema: "paradiff.planfile/1"' in first
    assert re.search(r'^fingerprint: "[0-9a-f]{64}"$', first, re.M)
    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    assert any(event.get("ph") == "X" for event in trace["traceEvents"])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["out"], "staging is gone"


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    """Separate processes: hash seeds differ, so set order would show."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert script(*QUICK, "--output-dir", "out", cwd=tmp_path / name).returncode == 0
    for path in sorted((tmp_path / "a" / "out").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / "out" / path.name).read_bytes(), path.name


def test_a_second_plan_replaces_the_plan_files_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "07-old=1.plan.yaml").write_text("old")
    assert plan(*QUICK, "--output-dir", str(tmp_path)).exit_code == 0
    names = {p.name for p in tmp_path.iterdir()}
    assert "notes.txt" in names
    assert "07-old=1.plan.yaml" not in names
    assert {"plan.json", "report.html", "trace.json.gz"} <= names


def test_underscores_and_what_if() -> None:
    """Links at a tenth of their bandwidth: a plan that communicates takes longer, and where they are
    those of one socket, it goes to the other."""
    common = ["--topology", "pcie8", "--steps", "6", "--strategy", "patch=2", "--format=json"]
    one = [*common, "--set", "links.0.bandwidth=2.6 GB/s", "--exact_only"]
    done = [plan(*args) for args in (common, one, [*one, "--set", "links.1.bandwidth=2.6 GB/s"])]
    assert [each.exit_code for each in done] == [0, 0, 0], done[1].stderr
    fast, moved, slow = (json.loads(each.stdout)["candidates"][0] for each in done)
    assert slow["latency_s"] > moved["latency_s"] == pytest.approx(fast["latency_s"])
    assert (fast["placement"], moved["placement"], slow["placement"]) == ([0, 1], [4, 5], [0, 1])


def test_version_and_topology_show() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", CliRunner().invoke(app, ["--version"]).stdout)
    shown = CliRunner().invoke(app, ["topology", "show", "pcie8"]).stdout
    assert "gpu7 l40" in shown
    assert "no peer-to-peer" in shown


# --------------------------------------------------------------------------------------- exit code 3


def test_illegal_degree_says_why_and_what_is_near(tmp_path: Path) -> None:
    """CogVideoX-2b has 30 attention heads: 4 does not divide them, 3 and 5 and 2 and 6 do."""
    out = tmp_path / "out"
    done = plan(
        "--topology", "pcie8", "--model", "cogvideox-2b", "--strategy", "ulysses=4",
        "--output-dir", str(out),
    )  # fmt: skip
    assert done.exit_code == 3
    assert "30" in done.stderr
    assert "heads" in done.stderr
    near = re.search(r"nearest: (ulysses=[2356]\b.*)", done.stderr)
    assert near
    assert sorted(path.name for path in out.iterdir()) == ["plan.json", "report.html"]
    text = " ".join(unescape((out / "report.html").read_text()).split())
    assert f"Nothing can run: cogvideox-2b on pcie8. Nearest that can: {near[1]}." in text
    assert "Not possible here" in text
    assert "the 30 heads of cogvideox-2b do not divide by 4" in text


def test_nothing_feasible_still_prints_json() -> None:
    done = plan(
        "--topology", "pcie8", "--strategy", "ulysses=4", "--model", "cogvideox-2b",
        "--format", "json",
    )  # fmt: skip
    assert done.exit_code == 3
    data = json.loads(done.stdout)
    assert data["recommended"] is None
    assert data["candidates"][0]["feasible"] is False
    assert "heads" in data["candidates"][0]["reason"]


def test_more_gpus_than_the_box_has_is_infeasible() -> None:
    done = plan("--topology", "pcie8", "--gpus", "4", "--strategy", "data=8")
    assert done.exit_code == 3
    assert "8" in done.stderr


def test_a_size_the_model_cannot_take() -> None:
    done = plan("--topology", "pcie8", "--height", "1001")
    assert done.exit_code == 3
    assert "1001" in done.stderr
    assert "nearest" in done.stderr


# --------------------------------------------------------------------------------------- exit code 2

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
LINK = re.findall(r"bandwidth: [0-9.]+ GB/s", PCIE8)[0]
BAD_TOPOLOGIES = {
    "unknown-key": (PCIE8 + "\nspeed: 3\n", r":\d+:\d+: .*speed"),
    "no-unit": (PCIE8.replace(LINK, "bandwidth: 26", 1), r":\d+:\d+: .*26"),
    "wrong-unit": (PCIE8.replace(LINK, "bandwidth: 26 GHz", 1), r":\d+:\d+: .*GHz"),
    "unknown-gpu": (re.sub(r"^gpu: \S+", "gpu: l41", PCIE8, flags=re.M), r":\d+:\d+: .*l41"),
    "zero-bandwidth": (PCIE8.replace(LINK, "bandwidth: 0 GB/s", 1), r":\d+:\d+: .*0 GB/s"),
    "negative-bandwidth": (PCIE8.replace(LINK, "bandwidth: -1 GB/s", 1), r":\d+:\d+: .*-1 GB/s"),
    "not-yaml": ("a: [1, 2\n", r":\d+:\d+: "),
    "empty": ("", r":\d+:\d+: "),
    "yaml-bomb": (BOMB, r":\d+:\d+: .*too many"),
    "duplicate-key": (PCIE8 + "\nname: twice\n", r":\d+:\d+: .*name"),
}


def assert_one_message(done: Result, pattern: str) -> None:
    assert done.exit_code == 2, (done.exit_code, done.stdout, done.stderr)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("paradiff: ")
    assert re.search(pattern, done.stderr), done.stderr


@pytest.mark.parametrize("name", BAD_TOPOLOGIES)
def test_malformed_topology(name: str, tmp_path: Path) -> None:
    text, pattern = BAD_TOPOLOGIES[name]
    assert text != PCIE8, "the edit did not apply"
    box = tmp_path / "box.yaml"
    box.write_text(text)
    out = tmp_path / "out"
    assert_one_message(
        plan("--topology", str(box), "--output-dir", str(out)), r"box\.yaml" + pattern
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (bytes(range(256)), r"box\.yaml:\d+:\d+: "),
        (b"x" * (2 << 20), r"box\.yaml.*large"),
        (b"\x80abc: 1", r"box\.yaml:1:1: .*UTF-8"),
    ],
    ids=["binary", "huge", "not-utf-8"],
)
def test_file_that_is_no_text(content: bytes, pattern: str, tmp_path: Path) -> None:
    box = tmp_path / "box.yaml"
    box.write_bytes(content)
    assert_one_message(plan("--topology", str(box)), pattern)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\x01", b"{", b"[1]", b"{}", b'{"schema": "paradiff.profile/1"}', b"[" * 200_000],
    ids=["empty", "binary", "cut", "list", "nothing", "no-stages", "deep"],
)
def test_profile_that_is_none(content: bytes, tmp_path: Path) -> None:
    model = tmp_path / "m.json"
    model.write_bytes(content)
    done = plan("--topology", "pcie8", "--model", str(model))
    assert_one_message(done, r"m\.json:\d+:\d+: ")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--topology", "pcie9"], "pcie9.*pcie8"),
        (["--topology", "."], r"\."),
        (["--topology", "pcie8", "--model", "sdxll"], "sdxll.*sdxl"),
        (["--topology", "pcie8", "--strategy", "ulyses=4"], "ulyses.*ulysses"),
        (["--topology", "pcie8", "--strategy", "ulysses"], "ulysses"),
        (["--topology", "pcie8", "--strategy", "ulysses=0"], "ulysses"),
        (["--topology", "pcie8", "--strategy", "ulysses=two"], "two"),
        (["--topology", "pcie8", "--strategy", ""], "--strategy"),
        (["--topology", "pcie8", "--strategy", "cfg=2,cfg=2"], "cfg"),
        (["--topology", "pcie8", "--gpus", "9"], "9.*8"),
        (["--topology", "pcie8", "--set", "links.0.bandwidht=1 GB/s"], "bandwidht.*bandwidth"),
        (["--topology", "pcie8", "--set", "nonsense"], "PATH=VALUE"),
        (["--topology", "pcie8", "--measured-latency", "-1"], "measured-latency"),
        (["--topology", "pcie8", "--measured-latency", "nan"], "measured-latency"),
        (
            ["--topology", "pcie8", "--measured-latency", "0.001"],
            r"measured-latency.*0\.001 s \(scope pipeline\): one l40 takes at least \d\.\d+ s, for",
        ),
        (["--topology", "pcie8", "--scope", "denoise"], "--scope denoise.*--measured-latency"),
        (["--topology", "pcie8", "--scope", "pipeline"], "--scope pipeline.*--measured-latency"),
    ],
    ids=lambda value: " ".join(value[2:] or value) if isinstance(value, list) else "",
)
def test_bad_argument(arguments: list[str], pattern: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_message(plan(*arguments, "--output-dir", str(out)), pattern)
    assert not out.exists()


@pytest.mark.parametrize("option", ["--bogus", "--runtime=fast", "--height=0", "--height=tall"])
def test_bad_option_is_2_as_well(option: str) -> None:
    done = plan("--topology", "pcie8", option)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert option.split("=")[0] in done.stderr


def test_output_dir_on_another_file_system(tmp_path: Path) -> None:
    """A mount point cannot be renamed onto: results are staged inside it."""
    plain = tmp_path / "plain"
    with mounted(tmp_path / "disk", "16m") as disk:
        assert disk.stat().st_dev != tmp_path.stat().st_dev
        for folder in (plain, disk):
            assert plan(*QUICK, "--output-dir", str(folder)).exit_code == 0
        assert {path.name for path in disk.iterdir()} == {path.name for path in plain.iterdir()}


def test_output_dir_that_cannot_be_made() -> None:
    assert_one_message(
        plan(*QUICK, "--output-dir", "/proc/paradiff"), "--output-dir /proc/paradiff"
    )


def test_a_warm_up_longer_than_the_run_is_synchronous() -> None:
    done = plan("--topology", "pcie8", "--steps", "3", "--strategy", "distrifusion=4")
    assert done.exit_code == 0
    assert "the same picture as one GPU" in done.stdout


def test_what_needs_more_gpus_names_the_nearest() -> None:
    done = plan("--topology", "pcie8", "--model", "pixart-alpha", "--strategy", "ulysses=16")
    assert done.exit_code == 3
    assert "nearest: ulysses=8" in done.output


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("mine")
    assert_one_message(plan(*QUICK, "--output-dir", str(target)), "not a directory")
    assert target.read_text() == "mine"


def test_interrupt_is_130_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("analysis.close_up.close_up", interrupted)
    done = plan(*QUICK, "--output-dir", str(tmp_path / "out"))
    assert done.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_tracing_into_no_folder_fails_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch, which is missing here, is asked for."""
    monkeypatch.setitem(sys.modules, "paradiff.models.trace", None)
    for target, reason in ((tmp_path / "no" / "x.json", "not a directory"), (tmp_path, "a file")):
        done = CliRunner().invoke(app, ["profile", "trace", "sd15", "--output", str(target)])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert f"--output {target}" in done.stderr
        assert reason in done.stderr


def test_tracing_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paradiff.models.trace", None)
    done = CliRunner().invoke(app, ["profile", "trace", "sdxl"])
    assert done.exit_code == 2
    assert "paradiff[run]" in done.stderr
