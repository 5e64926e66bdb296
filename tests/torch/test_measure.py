"""Timing of kernels: what stands for each, how samples are taken, and the command that resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

from paradiff.cli import app, profile
from paradiff.config import available, find
from paradiff.executor import measure
from paradiff.profiles import load_profile
from simulator.measured import Key, distinct_kernels, read_rows

KEYS = distinct_kernels(
    load_profile(find("models", name, ".json")) for name in ("sdxl", "pixart-alpha", "cogvideox-2b")
)


def test_what_runs_has_the_dimensions_that_were_asked_for() -> None:
    """On the meta device: a convolution's output has m x n elements, its weights n x k, its input the
    input's; a product's m x n; an attention's as many rows as queries."""
    refused = 0
    for key in KEYS:
        d = key.dims
        make = {"gemm": measure._gemm, "conv": measure._conv, "attention": measure._attention}
        if key.kind not in make:
            continue
        try:
            shapes, call = make[key.kind](d)
        except measure.NotMeasurable:
            refused += 1
            continue
        inputs = [torch.empty(shape, device="meta") for shape in shapes]
        out = call(*inputs)
        sizes = [tensor.numel() for tensor in inputs]
        if key.kind == "conv":
            m, n, k, elements = d
            assert (out.numel(), sizes[1], sizes[0]) == (m * n, n * k, elements), key
        elif key.kind == "gemm":
            batch, m, n, k = d
            assert (out.numel(), sizes) == (batch * m * n, [batch * m * k, batch * k * n])
        else:
            batch, heads, q, keys, dim, value_dim = d
            assert out.shape == (batch, heads, q, value_dim)
            assert sizes[1] == batch * heads * keys * dim
    assert refused < 0.05 * sum(key.kind == "conv" for key in KEYS)


def test_samples_are_long_enough_and_their_median_is_known_well_enough() -> None:
    """A clock that says 1 us a call, one in ten 5 us: a sample repeats the call 200 times, and equal
    samples need no more than the least number of them."""
    calls = []

    def clock(run: Callable[[], None]) -> float:
        before = len(calls)
        run()
        return (len(calls) - before) * 1e-6

    timing = measure._timed(calls.append, clock)
    assert timing.time_s == pytest.approx(1e-6)
    assert timing.runs == measure.LEAST_SAMPLES
    per_sample = math.ceil(measure.SAMPLE_S / 1e-6)
    assert len(calls) == measure.WARM_UPS + 1 + measure.LEAST_SAMPLES * per_sample
    assert calls == list(range(len(calls)))  # each call its own number: the ring turns


def test_noise_takes_more_samples() -> None:
    noisy = iter([1e-3 * (1 + 0.5 * (i % 3)) for i in range(1000)])
    timing = measure._timed(lambda i: None, lambda run: (run(), next(noisy))[1])
    assert timing.runs > 5 * measure.LEAST_SAMPLES
    assert timing.low_s < timing.time_s < timing.high_s


def test_inputs_rotate_through_more_than_the_cache_and_are_not_zero() -> None:
    ring = measure._ring(((64, 64), (32, 64)), torch.float32, torch.device("cpu"))
    assert len(ring) > 100
    starts = {pair[0].data_ptr() for pair in ring} | {pair[1].data_ptr() for pair in ring}
    assert len(starts) == 2 * len(ring)
    nbytes = sum(tensor.numel() * 4 for pair in ring for tensor in pair)
    assert nbytes > measure._cache_bytes(torch.device("cpu"))
    assert all(0.5 < float(tensor.std()) < 1.5 for tensor in ring[7])


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(measure.NotMeasurable, match="no kernel of stride 1 or 2"):
        measure.measure("conv", (7, 5, 11, 13), "fp32", "cpu")
    with pytest.raises(measure.NotMeasurable, match="GiB of inputs"):
        measure.measure("gemm", (1, 10**6, 10, 10**6), "fp32", "cpu")


@pytest.mark.parametrize("kind", ["gemm", "conv", "attention", "norm", "elementwise"])
def test_one_kernel_of_each_kind_is_timed(kind: str) -> None:
    key = next(key for key in KEYS if key.kind == kind and key.flops > 1e5)
    timing = measure.measure(key.kind, key.dims, "fp32", "cpu")
    assert 0 < timing.low_s <= timing.time_s <= timing.high_s < 1


# ------------------------------------------------------------------------------------- the command


def kernels(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", "kernels", *arguments])


def test_the_command_measures_within_its_budget_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is a quarter of a second later: a second is not over before the fourth."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: 0.25 * next(ticks), strftime=time.strftime)
    monkeypatch.setattr(profile, "time", clock)
    arguments = ("--model", "pixart-alpha", "--budget", "1", "--output-dir", str(tmp_path))
    done = kernels(*arguments)
    assert done.exit_code == 0, done.output
    header, first = read_rows(tmp_path / "kernels.csv")
    assert header["device"]
    assert header["command"].startswith("paradiff profile kernels")
    assert len(first) == 4
    again = kernels(*arguments)
    assert f"{len(first)} were there" in again.stdout
    rows = read_rows(tmp_path / "kernels.csv")[1]
    assert list(rows)[: len(first)] == list(first)
    assert len(rows) == 2 * len(first)
    assert all(isinstance(key, Key) and dtype == "fp32" for key, dtype in rows)


def test_what_scatters_is_said_and_measured_again(tmp_path: Path) -> None:
    """Two rows of a table are unsteady, one of them no kernel of the model: the other is measured."""
    arguments = ("--model", "pixart-alpha", "--output-dir", str(tmp_path))
    kernels(*arguments, "--budget", "1")
    path = tmp_path / "kernels.csv"
    steady = [line for line in path.read_text().splitlines() if line.startswith("#")]
    models = [load_profile(find("models", "pixart-alpha", ".json"))]
    norm = next(key for key in distinct_kernels(models) if key.kind == "norm")
    rows = [f"norm,{norm.dims[0]},fp32,54000,29000,181000,5", "norm,7,fp32,54000,29000,181000,5"]
    path.write_text("\n".join([*steady, *rows, ""]))
    done = kernels(*arguments, "--again")
    assert done.exit_code == 0, done.output
    assert "1 kernels measured, 0 were there" in done.stdout
    assert " of them scatter: quartiles more than 25 % apart" in done.stdout
    assert read_rows(path)[1][norm, "fp32"].time_s < 0.054


def test_an_interruption_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = measure.measure, []

    def stopped(*arguments: object) -> measure.Timing:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "measure", stopped)
    done = kernels("--model", "pixart-alpha", "--output-dir", str(tmp_path))
    assert done.exit_code != 0
    assert "2 kernels measured" in done.stdout
    assert len(read_rows(tmp_path / "kernels.csv")[1]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "nothing: no such file in models"),
        (["--model", "sdxl", "--output-dir", "/proc/x"], "--output-dir /proc/x"),
        (["--gpu", "nosuchgpu"], "nosuchgpu: no such file in gpus, allowed: a path, or one of"),
        (["--gpu", "../../evil"], "../../evil: no such file in gpus"),
        (
            ["--gpu", "l40s", "--dtype", "bf16"],
            "--gpu l40s: plans for NVIDIA L40S 48 GB PCIe would",
        ),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch sees no GPU")]),
    ],
)
def test_wrong_use_is_one_message(arguments: list[str], message: str) -> None:
    done = kernels(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_all_models_have_kernels_to_measure() -> None:
    profiles = [load_profile(find("models", n, ".json")) for n in available("models", ".json")]
    assert len(distinct_kernels(profiles)) > 5000
