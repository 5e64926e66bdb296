"""``paradiff run`` as its users meet it: plan files, outputs, launches, and messages about bad input."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from analysis.close_up import fingerprint
from paradiff.cli import app
from paradiff.cli.run import Given, _arguments
from paradiff.cli.run import run as run_command
from paradiff.config import find
from paradiff.models.tiny import tiny_model, tiny_plan
from paradiff.models.trace import cached_profile
from paradiff.profiles import load_profile
from paradiff.strategies import Workload, build, parse_spec
from paradiff.trace import check_trace, read_chrome_trace
from simulator import planner
from simulator.topology import load_topology

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
PATIENT = ("--timeout", "200")
"""Of launches that are to work however slowly Python starts here."""
PLANNED = ("--topology", "pcie8", "--model", "sd21", "--strategy", "cfg=2", "--steps", "3")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["run", *arguments])


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recommendation that ``paradiff plan`` wrote."""
    folder = tmp_path_factory.mktemp("plan") / "out"
    done = CliRunner().invoke(app, ["plan", *PLANNED, "--output-dir", str(folder)])
    assert done.exit_code == 0, done.output
    (file,) = folder.glob("*.plan.yaml")
    return file


def test_a_plan_runs_on_its_twin_in_one_process_and_launched(
    plan_file: Path, tmp_path: Path
) -> None:
    """The same latents either way, a trace that is a run of the graph, and every promised file."""
    here = run(
        str(plan_file), "--in-process", "--dtype", "fp64", "--output-dir", str(tmp_path / "a")
    )
    assert here.exit_code == 0, here.output
    there = subprocess.run(
        [sys.executable, "-m", "paradiff", "run", str(plan_file), "--launch", "2", *PATIENT, "--dtype",
         "fp64", "--output-dir", "b", "--format", "json"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert there.returncode == 0, there.stderr
    assert there.stderr == ""
    latents = [load_file(tmp_path / n / "latents.safetensors")["latents.0"] for n in "ab"]
    assert torch.allclose(*latents, rtol=1e-12, atol=1e-12)
    names = ["image-0.png", "latents.safetensors", "summary.json", "trace.json.gz"]
    summary = json.loads(there.stdout)
    assert summary == json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["schema"] == "paradiff.run/1"
    assert summary["files"] == sorted(p.name for p in (tmp_path / "b").iterdir()) == names
    profile = cached_profile(tiny_plan("sd21"))
    graph = build(parse_spec("cfg=2"), profile, Workload(128, 128, 1, 3, 1, "fp64"))
    assert summary["fingerprint"] == graph.fingerprint()
    (machine,) = summary["machines"]
    assert (machine["ranks"], machine["torch"]) == ([0, 1], torch.__version__)
    for name in "ab":
        trace = read_chrome_trace(tmp_path / name / "trace.json.gz")
        check_trace(graph, trace)
        made = dict(trace.meta)
        assert (made["kernels"], made["torch"]) == ("real", torch.__version__)
        assert made["device"] in machine["cpu"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", made["date"])
        assert made.keys() >= {"paradiff", "diffusers", "python", "system"}
        assert ("clock_residual_s" in made) is (name == "b")
    for rank in summary["ranks"]:
        whole = rank["compute_s"] + rank["communication_s"] + rank["waiting_s"]
        assert whole == pytest.approx(summary["latency_s"], rel=1e-9)


@pytest.mark.still
def test_timed_kernels_take_their_modelled_time(tmp_path: Path) -> None:
    """Two steps of SDXL in two branches on two L40s: each kernel takes what the simulator says, never
    less (a sleep is not shorter than asked), and the time to wake up, which is short at least once. Nor
    does all of it take twice as long, as kernels slept twice or branches in turn would; so does the
    loop, in which the predictions are exchanged as bytes."""
    arguments = ["--model", "sdxl", "--strategy", "cfg=2", "--steps", "2", "--topology", "pcie8"]
    done = subprocess.run(
        [sys.executable, "-m", "paradiff", "run", *arguments, "--kernels", "timed", "--launch", "2",
         *PATIENT, "--output-dir", "out", "--format", "json"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    profile, box = load_profile(find("models", "sdxl", ".json")), load_topology("pcie8")
    request = planner.Request(
        profile=profile, topology=box, workload=Workload(1024, 1024, 1, 2, 1, "bf16"), gpus=2,
        specs=("cfg=2",),
    )  # fmt: skip
    (candidate,) = planner.plan(request).ranked
    assert candidate.stages is not None
    predicted_s = candidate.stages.denoise_s
    assert predicted_s < summary["stages"]["denoise_s"] < 2 * predicted_s
    assert summary["fingerprint"] == fingerprint(request, "cfg=2")
    graph, costs = build(parse_spec("cfg=2"), profile, request.workload), request.runs().costs
    trace = read_chrome_trace(tmp_path / "out" / "trace.json.gz")
    check_trace(graph, trace)
    assert dict(trace.meta)["kernels"] == "timed"
    priced = {i.id: costs.compute(i.op.work, i.op.ranks[0]) for i in graph.instances() if i.op.work}
    modelled_s = {name: max(cost.device_s, cost.host_s) for name, cost in priced.items()}
    over_s = [s.end_s - s.start_s - modelled_s[s.id] for s in trace.spans if s.id in modelled_s]
    assert len(over_s) == len(modelled_s) >= 10
    assert min(over_s) > -1e-9  # differences of doubles
    assert min(over_s) < 1e-3
    assert sum(over_s) < sum(modelled_s.values())


def test_compiled_regions_compute_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Feed-forwards and embeddings are compiled (here without code generation), pauses stay eager."""
    from paradiff.executor import job
    from paradiff.models.interception import compile_between_points

    counts: list[int] = []

    def without_inductor(model: torch.nn.Module, points: dict[str, int]) -> None:
        counts.append(compile_between_points(model, points, backend="eager"))

    monkeypatch.setattr(job, "compile_between_points", without_inductor)
    arguments = ["--model", "pixart-alpha", "--strategy", "pipefusion=2,patches=4", "--steps", "3",
                 "--dtype", "fp64"]  # fmt: skip
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        done = run(*arguments, *more, "--output-dir", str(tmp_path / name))
        assert done.exit_code == 0, done.output
    one, other = (
        load_file(tmp_path / n / "latents.safetensors")["latents.0"] for n in ("eager", "compiled")
    )
    assert counts
    assert counts[0] >= 4
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "nothing to run, allowed: a plan file, --model NAME or --weights DIR"),
        (["--model", "nope"], 2, "tiny-nope: no such directory"),
        (["nofile.yaml"], 2, "nofile.yaml: cannot be read"),
        (["--model", "sd21", "--strategy", "cfg"], 2, "'cfg' is not name=value"),
        (["--model", "sd21", "--strategy", "cfg=2", "--launch", "3"], 2, "cfg=2 takes 2 ranks"),
        (["--model", "sd21", "--in-process", "--launch", "1"], 2, "give one of them"),
        (["--model", "sd21", "--kernels", "timed"], 2, "add --launch N"),
        (["--model", "sd21", "--device", "cuda"], 2, "torch sees no GPU"),
        (["--model", "sd21", "--weights", "x"], 2, "--model and --weights: give one of them"),
        (
            ["--model", "sd21", "--kernels", "timed", "--device", "cuda", "--launch", "1"],
            2,
            "allowed: --device cpu",
        ),
        (["--model", "sd21", "--embeddings", "x", "--prompt", "y"], 2, "give one of them"),
        (["--model", "sd21", "--prompt", "y"], 2, "needs text encoders"),
        (["--model", "svd", "--image", "no.png"], 2, "no.png: not readable as an image"),
        (["--model", "svd", "--image", "x", "--prompt", "y"], 2, "--prompt and --image: give one"),
        (["--model", "sd21", "--scheduler", "flow-match-euler"], 2, "flow-match"),
        (["--model", "sd21", "--steps", "2000"], 2, "allowed: 1 to 1000"),
        (["--model", "sd21", "--strategy", "ulysses=2"], 3, "nearest: patch=2"),
        (["--model", "sd21", "--height", "100"], 3, "nearest 96 or 104"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], code: int, message: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_plan_of_another_model_is_refused(plan_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.plan.yaml"
    other.write_text(plan_file.read_text().replace('model: "sd21"', 'model: "sdxl"'))
    done = run(str(other))
    assert done.exit_code == 2
    assert "it was made for another model, size or version" in done.stderr
    weights = tmp_path / "weights"
    tiny_model("sd21", torch.float32).save_pretrained(weights)
    for more in ([], ["--steps", "2", "--height", "64", "--width", "64"]):
        done = run(str(plan_file), "--weights", str(weights), *more)
        assert done.exit_code == 2
        assert "it was made for another model or size" in done.stderr
    broken = tmp_path / "broken.plan.yaml"
    broken.write_text(plan_file.read_text().replace("spec:", "specs:"))
    done = run(str(broken))
    assert done.exit_code == 2
    assert "broken.plan.yaml:" in done.stderr


@pytest.mark.parametrize("placement", ["[1]", "[1, 1]", "[-1, 0]"])
def test_a_placement_that_is_none_is_refused(
    placement: str, plan_file: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.plan.yaml"
    wrong.write_text(re.sub(r"placement: .*", f"placement: {placement}", plan_file.read_text()))
    done = run(str(wrong))
    assert done.exit_code == 2
    assert f"wrong.plan.yaml: placement {placement}: cfg=2 takes 2 GPUs" in done.stderr


def test_ranks_are_told_what_was_asked() -> None:
    """Nothing that was given is dropped: an empty prompt is one."""
    given = {"plan": None, "launch": 2, "model": "sd21", "prompt": "", "batch": None, "pin": True}
    assert _arguments(["run"], given) == ["run", "--model", "sd21", "--prompt", "", "--pin"]


def test_a_batch_of_one_is_asked_for(plan_file: Path) -> None:
    options = dict.fromkeys(inspect.signature(run_command).parameters)
    options["plan"] = plan_file
    given = Given(options)
    given.plan = given.plan.model_copy(
        update={"workload": given.plan.workload.model_copy(update={"batch": 4})}
    )
    assert given.batch == 4
    given.options["batch"] = 1
    assert given.batch == 1


def test_a_pickle_and_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "weights.pt")
    done = run("--model", "sd21", "--embeddings", str(tmp_path / "weights.pt"))
    assert done.exit_code == 2
    assert "not readable as safetensors" in done.stderr
    save_file({"encoder_hidden_states": torch.zeros(2, 6, 5)}, tmp_path / "e.safetensors")
    done = run("--model", "sd21", "--embeddings", str(tmp_path / "e.safetensors"))
    assert done.exit_code == 2
    assert "encoder_hidden_states has shape [2, 6, 5], allowed: [2, 6, 24]" in done.stderr


def test_a_world_that_is_not_the_strategys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    done = run("--model", "sd21", "--strategy", "cfg=2")
    assert done.exit_code == 2
    assert "WORLD_SIZE 4: cfg=2 takes 2 ranks" in done.stderr


def test_a_launch_of_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    done = run("--model", "sd21")
    assert done.exit_code == 2
    assert "one of several ranks, but without WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in done.stderr
