"""``paradiff validate fidelity`` as its user calls it: results, files, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from paradiff.cli import app
from paradiff.executor.fidelity import Bench
from paradiff.executor.job import Job

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["validate", "fidelity", *arguments])


FEW = ("--samples", "6", "--steps", "4")


def test_strategies_warm_ups_samplers_and_files(tmp_path: Path) -> None:
    done = run(
        "--model", "small-dit", *FEW, "--batch", "3", "--strategy", "distrifusion=4",
        "--strategy", "cfg=2,ulysses=2", "--warmup", "0", "--warmup", "3", "--scheduler", "own",
        "--scheduler", "ddim", "--format", "json", "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data == json.loads((tmp_path / "out" / "fidelity.json").read_text(encoding="utf-8"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "fidelity.json", "pictures.png", "report.html",
    ]  # fmt: skip
    assert (data["schema"], data["weights"]) == ("paradiff.validate-fidelity/1", "trained")
    found = {(r["spec"], r["scheduler"]): r for r in data["results"]}
    specs = ("distrifusion=4,warmup=0", "distrifusion=4,warmup=3", "cfg=2,ulysses=2")
    assert set(found) == {(spec, name) for spec in specs for name in ("own", "ddim")}
    for (spec, _), result in found.items():
        errors = result["final"]["relative_l2"]["samples"]
        assert len(errors) == 6
        assert (max(errors) < 1e-5) == result["exact"] == ("warmup=0" not in spec)
        assert result["latency_s"] > 0
        assert result["final"]["relative_l2"]["median"] == result["per_step"]["relative_l2"][-1]
    stale = found["distrifusion=4,warmup=0", "own"]
    assert (stale["n_gpus"], stale["synchronous_steps"], stale["max_staleness_steps"]) == (4, 1, 1)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 8


def test_weights_of_scores_are_looked_at_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def too_early(_: Job) -> Bench:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(Bench, "of", too_early)
    for option in ("--lpips", "--clip"):
        done = run("--model", "small-dit", option, str(tmp_path))
        assert done.exit_code == 2, done.output
        assert str(tmp_path) in done.stderr


def test_what_is_stale_is_the_default_and_random_weights_are_said() -> None:
    done = run("--model", "tiny-sd21", "--samples", "1", "--steps", "6")
    assert done.exit_code == 0, done.stderr
    assert "random weights, so the errors say nothing about a trained model" in done.stdout
    rows = [line.split()[0] for line in done.stdout.splitlines() if "=" in line.split(" ")[0]]
    assert any(spec.startswith("distrifusion=4") for spec in rows)
    assert not any(spec.startswith(("cfg", "data", "tensor")) for spec in rows)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "nothing to run, allowed: --model NAME or --weights DIR"),
        (("--model", "small-dit", "--weights", "x"), 2, "give one of them"),
        (("--model", "small-cat"), 2, "small-cat: no such directory, allowed: a local directory"),
        (("--model", "small-dit", "--random-weights"), 2, "small-dit: has weights of its own"),
        (("--model", "small-dit", "--scheduler", "magic"), 2, "--scheduler 'magic', allowed: own, ddim"),
        (("--model", "small-dit", "--scheduler", "flow-match-euler"), 2, "predicts noise (or v)"),
        (("--model", "small-dit", "--batch", "3"), 2, "--samples 20: not divisible by --batch 3"),
        (("--model", "small-dit", "--strategy", "magic=2"), 2, "--strategy 'magic=2'"),
        (("--model", "small-dit", "--prompt", "a cat"), 2, "the model draws digits, allowed: 0 to 9"),
        (("--model", "small-dit", "--topology", "pcie9"), 2, "pcie9"),
        (("--model", "small-dit", "--lpips", "/nowhere"), 2, "/nowhere: no weights"),
        (("--model", "small-unet", "--strategy", "pipefusion=2"), 3, "is a U-Net with skips"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(*FEW[2:], *arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
