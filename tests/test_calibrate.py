"""Fitting a GPU profile to traces: known factors come back, and errors are those of ops held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from shipped import profile
from typer.testing import CliRunner, Result

from paradiff.cli import app
from paradiff.config import ConfigError
from paradiff.graph import Shape, Work
from paradiff.strategies import Workload, build, parse_spec
from paradiff.trace import Trace, write_chrome_trace
from simulator.calibrate import (
    Factors,
    Seen,
    _factors,
    _Predictor,
    ceilings,
    fit,
    load_trace,
    observations,
    scaled,
)
from simulator.costs import CostModel
from simulator.engine import simulate
from simulator.gpu import Gpu, load_gpu
from simulator.network import Network
from simulator.topology import load_topology

TRUE = Factors(0.7, 0.85, 0.6)


def traced(model: str, spec: str, size: int, gpu: Gpu, noise: float = 0.0) -> Trace:
    """A run on a GPU: simulated, so that every op's time is known; with noise as clocks have."""
    network = profile(model)
    work = Workload(height=size, width=size, frames=1, steps=3, dtype="bf16")
    graph = build(parse_spec(spec), network, work)
    costs = CostModel(network, [gpu] * 8, "bf16")
    ranks = tuple(range(graph.world_size))
    run = simulate(graph, Network(load_topology("pcie8")), costs, placement=ranks).expanded()
    rng = np.random.default_rng(1)
    spans = tuple(
        s._replace(busy_s=s.busy_s * float(np.exp(noise * rng.standard_normal())))
        for s in run.spans
    )
    return replace(run, spans=spans)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of a GPU that is an L40 with other rates."""
    folder, gpu = tmp_path_factory.mktemp("runs"), scaled(load_gpu("l40"), TRUE, "true")
    paths = [folder / "patches.json.gz", folder / "unet.json.gz"]
    write_chrome_trace(traced("pixart-alpha", "patch=2", 1024, gpu), paths[0])
    write_chrome_trace(traced("sd15", "serial", 512, gpu), paths[1])
    return paths


def seen_in(paths: list[Path]) -> list[Seen]:
    models = {"patches.json.gz": "pixart-alpha", "unet.json.gz": "sd15"}
    return [
        each
        for number, path in enumerate(paths)
        for each in observations(number, path, load_trace(path), profile(models[path.name]))
    ]


def test_known_factors_come_back(runs: list[Path]) -> None:
    """The traces are the model's own, so nothing is left over; ALIKE's pull costs a few per cent."""
    found = fit(seen_in(runs), load_gpu("l40"))
    assert found.factors == pytest.approx(TRUE, rel=0.06)
    assert np.median(np.abs(found.before)) > 0.2  # rates 0.6 to 0.85 of what the profile says
    assert np.median(np.abs(found.held_out)) < 0.06


class Inverse(_Predictor):
    """A device on which each op takes one second at the rate that its trace's number names."""

    def __call__(self, seen: Sequence[Seen], factors: Factors) -> NDArray[np.float64]:
        return np.array([1 / factors[each.trace] for each in seen])


def test_the_fit_term_in_closed_form() -> None:
    """As many ops at the matmul rate (2 times slower than predicted) as at the attention rate (1.25
    times), none at the memory's. With x = log f, t = log 1/2 and log 4/5, m the mean of x, each
    derivative of

        1/2 (x1 - t1)^2 + 1/2 (x2 - t2)^2 + a^2 sum (x - m)^2        (a = 0.02)

    is zero at a^2 (x3 - m) = 0, so the rate that no op tells goes with the two others, x3 = m =
    (t1 + t2)/2, and (xi - ti) + 2 a^2 (xi - m) = 0: each is drawn to m by 1 / (1 + 2 a^2), 0.08 %."""
    work = Work("denoiser", ((0, 1),), Shape(b=1, f=1, r=1, w=1, k=1, t=0, s=0, h=0, u=1, j=0))
    seen = [
        Seen(number, profile("pixart-alpha"), "bf16", work, seconds)
        for number, seconds in ((0, 2.0), (1, 1.25), (0, 2.0), (1, 1.25))
    ]
    gpu = load_gpu("l40")
    found = np.log(_factors(seen, gpu, Inverse(gpu, "eager")))
    told = np.log([1 / 2, 4 / 5])
    expected = told.mean() + (told - told.mean()) / (1 + 2 * 0.02**2)
    assert found == pytest.approx([*expected, told.mean()], abs=1e-6)


def test_errors_are_of_what_was_held_out() -> None:
    """Two traces of GPUs of different speed: each is predicted with the other's factors, so the held-out
    errors are the ratio of the two, 2 and 1/2, whatever fits both on average."""
    l40 = load_gpu("l40")
    slow = seen_in_memory(0, scaled(l40, Factors(0.4, 0.4, 0.4), "slow"))
    fast = seen_in_memory(1, scaled(l40, Factors(0.8, 0.8, 0.8), "fast"))
    found = fit([*slow, *fast], l40)
    errors = np.array(found.held_out)
    assert np.median(errors[: len(slow)]) == pytest.approx(-0.5, abs=0.06)
    assert np.median(errors[len(slow) :]) == pytest.approx(1.0, abs=0.12)


def seen_in_memory(number: int, gpu: Gpu) -> list[Seen]:
    trace = traced("pixart-alpha", "patch=2", 1024, gpu)
    return list(observations(number, Path("memory"), trace, profile("pixart-alpha")))


def test_no_rate_is_lifted_above_its_peak() -> None:
    """Times of nearly nothing: every factor stops at its ceiling."""
    l40 = load_gpu("l40")
    impossible = [each._replace(seconds=each.seconds / 50) for each in seen_in_memory(0, l40)]
    assert fit(impossible, l40).factors == pytest.approx(ceilings(l40), rel=1e-2)


def test_times_of_another_device_are_refused() -> None:
    l40 = load_gpu("l40")
    slow = [each._replace(seconds=each.seconds * 100) for each in seen_in_memory(0, l40)]
    with pytest.raises(ConfigError, match="more than 20 times what a l40 should"):
        fit(slow, l40)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", "fit", *arguments])


def test_the_corrected_profile_plans(runs: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    done = command(*map(str, runs), "--gpu", "l40", "--output", str(target))
    assert done.exit_code == 0, done.output
    new, old = load_gpu(target), load_gpu("l40")
    assert new.name == "mine"
    assert new.matmul.bf16.value == pytest.approx(TRUE.matmul * old.matmul.bf16.value, rel=0.06)
    assert (new.matmul.bf16.kind, new.peak.bf16.kind) == ("measured", "spec")
    assert "fitted with its siblings to the ops of patches.json.gz, unet.json.gz; was " in (
        new.matmul.bf16.source
    )
    assert "with the profile fitted without it" in done.stdout
    plan = ["plan", "--topology", "pcie8", "--set", f"gpu={target}", "--steps", "4"]
    planned = CliRunner().invoke(app, [*plan, "--strategy", "serial"])
    assert planned.exit_code == 0, planned.output


def test_wrong_use_is_one_message(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    cases = {
        (str(tmp_path / "no.json"), "l40", "x.yaml"): "no paradiff trace",
        (str(tmp_path / "none"), "l40", "x.yaml"): "none",
        (str(tmp_path / "none"), "l40", "nowhere/x.yaml"): "nowhere is not a directory",
        (str(runs[0]), "l44", "x.yaml"): "l44: no such file in gpus",
        (str(runs[0]), "l40", "x.txt"): "ends in .yaml",
    }
    for (trace, gpu, name), message in cases.items():
        done = command(trace, "--gpu", gpu, "--output", str(tmp_path / name))
        assert done.exit_code == 2
        assert message in done.stderr
