"""The options are a contract: this list changes only together with CHANGELOG.md."""

from __future__ import annotations

import re

import typer
from typer.testing import CliRunner

from paradiff.cli import app, plan_app

PLAN = {
    "--topology", "--model", "--height", "--width", "--frames", "--steps", "--batch", "--dtype",
    "--gpus", "--strategy", "--runtime", "--measured-latency", "--scope", "--objective",
    "--exact-only", "--max-staleness", "--max-quality-loss", "--quality-metric",
    "--quality", "--set", "--top", "--exhaustive", "--format", "--emit", "--output-dir", "--sweep",
    "--processes", "--ray",
}  # fmt: skip
IMPORT = {
    "--gpu", "--nvidia-smi", "--p2p", "--nccl-xml", "--nccl-log", "--nvbandwidth", "--p2p-test",
    "--nccl-tests", "--lstopo",
}  # fmt: skip
CAPACITY = {
    "--topology", "--model", "--mix", "--request-rate", "--burstiness", "--trace", "--slo",
    "--attainment", "--gpus", "--max-width", "--sharing", "--routing", "--max-batch",
    "--batch-window", "--mtbf", "--repair-time", "--price", "--nodes", "--max-nodes",
    "--num-prompts", "--replications", "--confidence", "--seed", "--metric-percentiles", "--dtype",
    "--runtime", "--strategy", "--exact-only", "--max-staleness", "--processes", "--format",
    "--output-dir",
}  # fmt: skip
RUN = {
    "--model", "--strategy", "--weights", "--random-weights", "--height", "--width", "--frames",
    "--steps", "--batch", "--dtype", "--in-process", "--launch", "--device", "--compile", "--kernels",
    "--topology", "--seed", "--guidance-scale", "--scheduler", "--embeddings", "--prompt", "--image",
    "--negative-prompt", "--timeout", "--output-dir", "--format",
}  # fmt: skip
FIDELITY = {
    "--model", "--weights", "--random-weights", "--strategy", "--warmup", "--steps", "--scheduler",
    "--samples", "--batch", "--seed", "--height", "--width", "--frames", "--dtype", "--device",
    "--guidance-scale", "--embeddings", "--prompt", "--negative-prompt", "--lpips", "--clip",
    "--topology", "--format", "--output-dir",
}  # fmt: skip
VALIDATE_RUN = {
    "--model", "--strategy", "--weights", "--random-weights", "--height", "--width", "--frames",
    "--steps", "--batch", "--dtype", "--in-process", "--launch", "--device", "--gpu", "--pin", "--seed",
    "--scheduler", "--repeats", "--warmup-runs", "--max-error", "--measure-again", "--timeout",
    "--output-dir", "--format",
}  # fmt: skip
CHOICES = {
    "--dtype": ["fp16", "bf16", "fp32"],
    "--runtime": ["eager", "compiled", "cuda-graph"],
    "--scope": ["denoise", "latent", "pipeline"],
    "--objective": ["latency", "throughput", "cost"],
    "--quality-metric": ["lpips", "fid", "clip", "ssim", "l2"],
    "--format": ["table", "json"],
    "--emit": ["xdit", "diffusers", "sglang", "vllm-omni", "cache-dit"],
}


def options(command: object) -> set[str]:
    return {name for p in command.params for name in p.opts if name.startswith("--")}  # type: ignore[attr-defined]


def test_commands() -> None:
    group = typer.main.get_command(app)
    assert sorted(group.commands) == [
        "capacity",
        "env",
        "plan",
        "profile",
        "run",
        "topology",
        "validate",
    ]  # type: ignore[attr-defined]
    assert sorted(group.commands["profile"].commands) == ["fit", "kernels", "network", "trace"]  # type: ignore[attr-defined]
    assert sorted(group.commands["topology"].commands) == ["doctor", "import", "show"]  # type: ignore[attr-defined]
    assert sorted(group.commands["validate"].commands) == ["fidelity", "lab", "published", "run"]  # type: ignore[attr-defined]


def test_validate_options() -> None:
    group = typer.main.get_command(app)
    commands = group.commands["validate"].commands  # type: ignore[attr-defined]
    assert options(commands["published"]) == {"--data", "--format", "--output-dir"}
    assert options(commands["fidelity"]) == FIDELITY
    assert options(commands["run"]) == VALIDATE_RUN
    of_run = [p.name for p in commands["run"].params if p.param_type_name == "argument"]
    assert of_run == ["plan"]


def test_validate_lab_options() -> None:
    command = typer.main.get_command(app).commands["validate"].commands["lab"]  # type: ignore[attr-defined]
    assert options(command) == {
        "--topology", "--set", "--model", "--strategy", "--height", "--width", "--steps", "--ranks",
        "--cells", "--regime", "--repeats", "--max-error", "--format", "--output-dir",
    }  # fmt: skip


def test_plan_options_are_the_same_under_both_names() -> None:
    group = typer.main.get_command(app)
    assert options(group.commands["plan"]) == PLAN  # type: ignore[attr-defined]
    completion = {"--install-completion", "--show-completion"}
    assert options(typer.main.get_command(plan_app)) == PLAN | completion


def test_run_options() -> None:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    assert options(command) == RUN
    assert [p.name for p in command.params if p.param_type_name == "argument"] == ["plan"]


def test_topology_options() -> None:
    commands = typer.main.get_command(app).commands["topology"].commands  # type: ignore[attr-defined]
    assert options(commands["import"]) == IMPORT | {"--name", "--nic-rate", "--nodes", "--output"}
    assert options(commands["show"]) == {"--html"}
    assert options(commands["doctor"]) == IMPORT | {"--model", "--what-if", "--check"}


def test_root_options() -> None:
    root = typer.main.get_command(app)
    assert options(root) == {"--version", "--install-completion", "--show-completion"}
    assert options(root.commands["env"]) == set()  # type: ignore[attr-defined]


def test_capacity_options() -> None:
    group = typer.main.get_command(app)
    command = group.commands["capacity"]  # type: ignore[attr-defined]
    assert options(command) == CAPACITY
    assert [p.opts[0] for p in command.params if p.required] == ["--topology"]


def test_profile_options() -> None:
    commands = typer.main.get_command(app).commands["profile"].commands  # type: ignore[attr-defined]
    assert options(commands["kernels"]) == {
        "--model", "--device", "--dtype", "--budget", "--gpu", "--again", "--output-dir",
    }  # fmt: skip
    assert options(commands["fit"]) == {"--gpu", "--output", "--runtime"}
    assert options(commands["network"]) == {
        "--topology", "--output", "--device", "--min-bytes", "--max-bytes", "--timeout",
        "--output-dir",
    }  # fmt: skip


def test_choices() -> None:
    shown = CliRunner().invoke(plan_app, ["--help"], env={"COLUMNS": "200"}).stdout
    found = dict(re.findall(r"(--[a-z-]+) <([a-z0-9-]+(?:\|[a-z0-9-]+)+)>", shown))
    assert {name: choices.split("|") for name, choices in found.items()} == CHOICES


def test_a_topology_or_a_sweep_is_required() -> None:
    command = typer.main.get_command(plan_app)
    assert [p.opts[0] for p in command.params if p.required] == []
    done = CliRunner().invoke(plan_app, ["--model", "sdxl"])
    assert (done.exit_code, "--topology is missing" in done.stderr) == (2, True)
