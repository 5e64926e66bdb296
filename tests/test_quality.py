"""What is known of a strategy's loss: whose measurement holds for which spec, and what is not read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from shipped import profile
from typer.testing import CliRunner, Result

from paradiff.cli import plan_app
from paradiff.config import ConfigError
from paradiff.strategies import Workload, facts, parse_spec
from simulator.quality import COLUMNS, Known, Quality, load_quality

SDXL = Workload(1024, 1024, 1, 50, 1, "bf16")
SD21 = Workload(768, 768, 1, 50, 1, "bf16")


def known(
    spec: str, model: str = "sdxl", workload: Workload = SDXL, metric: str = "lpips", *own: Path
) -> Known | None:
    return load_quality(own).of(parse_spec(spec), profile(model), workload, metric)


@pytest.mark.parametrize(
    ("spec", "loss"),
    [
        ("distrifusion=4,warmup=4", 0.183),
        ("cfg=2,distrifusion=4,warmup=4", 0.183),  # cfg keeps the result
        ("distrifusion=4,bucket=7,warmup=4,mode=corrected_async_gn", 0.183),  # a default; a message
        ("distrifusion=4", 0.183),  # the default warm-up
        ("distrifusion=4,warmup=4,offload=text", 0.183),
        ("distrifusion=4,warmup=4,vae=split", 0.183),
        ("distrifusion=8,warmup=4,mode=stale_gn", 0.247),
        ("patch=4,mode=naive", 0.753),
    ],
)
def test_a_row_holds_for_what_reads_the_same(spec: str, loss: float) -> None:
    found = known(spec)
    assert found is not None
    assert (found.loss, found.at_most) == (loss, False)
    assert "DistriFusion arXiv:2402.19481" in found.source


@pytest.mark.parametrize(
    "spec",
    [
        "distrifusion=4,warmup=3",  # fewer synchronous steps than anybody has measured
        "distrifusion=4,warmup=4,weights=fp8",
        "distrifusion=4,warmup=4,vae=tiled",
        "distrifusion=4,warmup=4,mode=no_sync",
        "pcpp=4,warmup=4",
        "parastep=4,warmup=5",
    ],
)
def test_nothing_else_is_known(spec: str) -> None:
    assert known(spec) is None


def test_nothing_is_carried_to_another_model_size_or_number_of_steps() -> None:
    spec = "distrifusion=4,warmup=4"
    for other in (replace(SDXL, steps=49), replace(SDXL, height=2048), replace(SDXL, width=768)):
        assert known(spec, workload=other) is None
    assert known(spec, "sd15") is None
    assert known(spec, "sd21", SD21) is None
    assert known(spec, metric="ssim") is None


def test_more_synchronous_steps_lose_at_most_as_much() -> None:
    """Of the rows with fewer the one with most: 10 after 9, of 1 to 11 measured."""
    found = known("asyncdiff=3,stride=2,warmup=10", "sd21", SD21)
    assert found is not None
    assert (found.loss, found.at_most) == (0.194, True)
    assert found.said.startswith("at most: AsyncDiff arXiv:2406.06911")
    assert found.said.endswith("of asyncdiff=3,stride=2,warmup=9")


def test_losses_of_pictures_alone_are_against_one_gpu() -> None:
    """FID 24.2 against 24.0; CLIP 31.22 against 31.6; a FID may fall: 27.79 against 27.89."""
    for spec, model, workload, metric, loss in (
        ("distrifusion=2,warmup=4", "sdxl", SDXL, "fid", 0.2),
        ("asyncdiff=3,stride=2,warmup=1", "sd21", SD21, "clip", 0.38),
        ("asyncdiff=2,stride=1,warmup=1", "sd21", SD21, "fid", -0.1),
    ):
        found = known(spec, model, workload, metric)
        assert found is not None
        assert found.loss == pytest.approx(loss)


def test_every_shipped_row_is_of_a_model_that_is_shipped_and_changes_the_result() -> None:
    rows = load_quality().rows
    assert len(rows) == 50
    for row in rows:
        spec = parse_spec(row.spec)
        workload = Workload(row.height, row.width, row.frames, row.steps, 1, "fp16")
        assert not facts(spec, workload).exact
        assert Quality((row,)).of(spec, profile(row.model), workload, row.metric) is not None


# --------------------------------------------------------------------------------- the user's own


def own_json(**changes: object) -> str:
    data = {
        "schema": "paradiff.validate-fidelity/1",
        "model": "sdxl",
        "weights": "trained",
        "params": profile("sdxl").denoiser.params,
        "height": 1024,
        "width": 1024,
        "frames": 1,
        "samples": 20,
        "results": [
            {
                "spec": "parastep=4,warmup=5",
                "steps": 50,
                "scheduler": "own",
                "final": {"relative_l2": {"mean": 0.3}, "ssim": {"mean": 0.9}},
            },
            {
                "spec": "distrifusion=4,warmup=4",
                "steps": 50,
                "scheduler": "own",
                "final": {"lpips": {"mean": 0.5}},
            },
        ],
    }
    return json.dumps(data | changes)


def test_own_measurements_come_before_published_ones(tmp_path: Path) -> None:
    file = tmp_path / "fidelity.json"
    file.write_text(own_json())
    step = known("parastep=4,warmup=5", "sdxl", SDXL, "l2", file)
    assert step is not None
    assert (step.loss, step.source) == (0.3, f"{file}: mean of 20 samples, sampler own")
    ssim = known("parastep=4,warmup=5", "sdxl", SDXL, "ssim", file)
    assert ssim is not None
    assert ssim.loss == pytest.approx(0.1)
    strips = known("distrifusion=4,warmup=4", "sdxl", SDXL, "lpips", file)
    assert strips is not None
    assert strips.loss == 0.5
    file.write_text(own_json(params=7))
    again = known("distrifusion=4,warmup=4", "sdxl", SDXL, "lpips", file)
    assert again is not None
    assert again.loss == 0.183


HEADER = ",".join(COLUMNS) + "\n"
ROW = "1,sdxl,1024,1024,50,parastep=4,lpips,0.1,,,me,,\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json:1:2: not JSON"),
        ("a.json", "{}", "not what `paradiff validate fidelity` writes"),
        ("a.json", own_json(weights="random"), "measured on random weights"),
        ("a.json", own_json(results=[{}]), "not a whole paradiff.validate-fidelity/1: KeyError"),
        ("a.csv", "x,y\n", "a.csv:1: columns x, y, allowed: id, model"),
        ("a.csv", HEADER + ROW.replace("lpips", "beauty"), "a.csv:2: metric 'beauty', allowed: lpips"),
        ("a.csv", HEADER + ROW.replace("0.1", "good"), "a.csv:2: value 'good', allowed: a number"),
        ("a.csv", HEADER + ROW.replace("lpips", "fid"), "a.csv:2: baseline '', allowed: a number"),
        ("a.csv", HEADER + ROW.replace("parastep", "magic"), "a.csv:2: spec 'magic=4'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        load_quality([tmp_path / name])
    assert message in str(error.value)


# ------------------------------------------------------------------------------------- in a plan


def plan(*arguments: str) -> Result:
    specs = ("serial", "cfg=2,distrifusion=4,warmup=4", "distrifusion=8,warmup=4", "parastep=4")
    asked = [part for spec in specs for part in ("--strategy", spec)]
    return CliRunner().invoke(plan_app, ["--topology", "pcie8", *asked, *arguments])


def test_a_plan_leaves_out_what_loses_too_much_or_is_not_measured() -> None:
    done = plan("--max-quality-loss", "0.2")
    assert done.exit_code == 0, done.stderr
    assert (
        "  cfg=2,distrifusion=4,warmup=4: lpips 0.183, DistriFusion arXiv:2402.19481" in done.stdout
    )
    assert "distrifusion=8,warmup=4: loses 0.211 in lpips (DistriFusion arXiv" in done.stdout
    assert "parastep=4: no measured lpips for sdxl at this size and number of steps" in done.stdout
    assert "Output: not the same picture as one GPU" in done.stdout
    assert "; lpips 0.183 (DistriFusion" in done.stdout


def test_a_plan_says_what_is_measured_without_being_asked_to_limit_it() -> None:
    data = json.loads(plan("--format", "json").stdout)
    found = {c["spec"]: c for c in data["candidates"]}
    assert found["distrifusion=8,warmup=4"]["quality"] == 0.211
    assert found["distrifusion=8,warmup=4"]["quality_source"].startswith("DistriFusion arXiv")
    assert found["parastep=4"]["quality"] is None
    assert found["serial"]["quality"] is None
    assert data["quality_metric"] == "lpips"


def test_a_plan_takes_own_measurements(tmp_path: Path) -> None:
    file = tmp_path / "fidelity.json"
    file.write_text(own_json())
    options = ("--max-quality-loss", "0.4", "--quality-metric", "l2", "--quality", str(file))
    done = plan(*options)
    assert f"  parastep=4: l2 0.3, {file}: mean of 20 samples, sampler own" in done.stdout
    assert "no measured l2 for sdxl" in done.stdout
    assert plan(*options[:-1], str(tmp_path / "none.json")).exit_code == 2
