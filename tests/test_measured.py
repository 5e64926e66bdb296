"""Measured kernels: what to measure, the file and its resumption, times between rows, their use."""

from __future__ import annotations

import math
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from shipped import profile

from paradiff.config import ConfigError
from paradiff.graph import Shape, Work
from simulator.costs import CostModel
from simulator.gpu import load_gpu
from simulator.measured import (
    COLUMNS,
    KernelTable,
    Key,
    Row,
    _radial,
    append_row,
    begin_table,
    distinct_kernels,
    measured_on,
    read_rows,
)  # fmt: skip

HEADER = {"device": "a CPU", "threads": "1", "torch": "2.13"}


def row(seconds: float) -> Row:
    return Row(seconds, 0.9 * seconds, 1.2 * seconds, 7)


def gemms(rate: float = 1e11, fixed: float = 2e-6) -> dict[tuple[int, ...], Row]:
    """Times of a machine with a fixed cost and one rate, at powers of two."""
    sizes = [2**i for i in range(6, 11)]
    return {(1, m, n, k): row(fixed + 2 * m * n * k / rate) for m, n, k in product(sizes, repeat=3)}


# ---------------------------------------------------------------------------------- which kernels


def test_kernels_are_those_of_the_model_in_parts() -> None:
    """PixArt at 1024 px: 4096 tokens, width 1152, 16 heads of 72, two branches: a strip of 1/8 has 512
    queries on 4096 keys; Ulysses of 8 leaves two heads."""
    keys = distinct_kernels([profile("pixart-alpha")])
    attention = {key.dims for key in keys if key.kind == "attention"}
    assert {(2, 16, 4096 // s, 4096, 72, 72) for s in (1, 2, 4, 8)} < attention
    assert {(2, 16 // u, 4096, 4096, 72, 72) for u in (1, 2, 4, 8, 16)} < attention
    assert max(dims[1] for dims in attention) <= 24
    assert any(key.dims == (1, 2 * 4096, 1152, 1152) for key in keys if key.kind == "gemm")
    assert len(set(keys)) == len(keys)


def test_cheap_first_and_kinds_in_turn() -> None:
    keys = distinct_kernels([profile("pixart-alpha")])
    assert {key.kind for key in keys[:5]} == {"gemm", "conv", "attention", "norm", "elementwise"}
    for kind in ("gemm", "attention"):
        work = [key.flops for key in keys if key.kind == kind]
        assert work == sorted(work)


# --------------------------------------------------------------------------------------- the file


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "device" / "kernels.csv"
    assert begin_table(path, HEADER) == set()
    first, second = Key("gemm", (1, 64, 64, 64)), Key("norm", (4096,))
    append_row(path, first, "fp32", row(1e-5))
    with path.open("a") as stream:
        stream.write("norm,4096,fp32,1")  # the machine died here
    assert begin_table(path, HEADER) == {(first, "fp32")}
    append_row(path, second, "fp32", row(2e-5))
    header, rows = read_rows(path)
    assert header == HEADER
    assert list(rows) == [(first, "fp32"), (second, "fp32")]
    assert rows[second, "fp32"] == pytest.approx((2e-5, 1.8e-5, 2.4e-5, 7))
    with pytest.raises(ConfigError, match="measured with threads '1', this is '2'"):
        begin_table(path, {**HEADER, "threads": "2"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gemm,1x2x3,fp32,1,1,1,5", ":2: not a kernel"),
        ("matmul,1x2x3x4,fp32,1,1,1,5", ":2: not a kernel"),
        ("gemm,1x2x3x4,fp32,one,1,1,5", ":2: not a measurement"),
        ("gemm,1x2x3x4,fp32,1,1", ":2: not a measurement"),
        ("gemm,1x2x3x4,fp32,1,2,3,5", ":2: times out of order"),
        ("gemm,1x2x3x0,fp32,1,1,1,5", ":2: not a kernel"),
        ("gemm,1x2x3x4,fp32,nan,1,1,5", ":2: times out of order"),
    ],
)
def test_malformed_rows_say_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "kernels.csv"
    path.write_text(",".join(COLUMNS) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_rows(path)


# -------------------------------------------------------------------------------- between the rows


def test_measured_shapes_answer_for_themselves_others_within_the_range_only() -> None:
    table = KernelTable("gemm", gemms())
    exact = table.estimate((1, 128, 256, 512))
    assert exact is not None
    assert exact.exact
    assert exact.time_s == gemms()[1, 128, 256, 512].time_s
    between = table.estimate((1, 180, 180, 180))
    assert between is not None
    assert not between.exact
    assert between.low_s <= between.time_s <= between.high_s
    assert between.time_s == pytest.approx(2e-6 + 2 * 180**3 / 1e11, rel=0.05)
    assert table.estimate((1, 4096, 256, 256)) is None
    assert table.estimate((1, 128, 256, 32)) is None


def test_two_rows_are_interpolated_in_closed_form() -> None:
    """0 at one point and 1 at another, one apart. With the nugget v on the diagonal and w the weights,

        v w1 - w2 + c = 0,  -w1 + v w2 + c = 1,  w1 + w2 = 0:   w1 = -w2 = -1 / (2 (1 + v)),  c = 1/2

    so at the second the curve is 1 - v w2 = 1 - 0.001/2.002, half a thousandth below what was measured,
    and a quarter of the way c + w1 / 2."""
    points, values = np.array([[0.0], [1.0]]), np.array([0.0, 1.0])
    assert _radial(points, values, np.array([1.0])) == pytest.approx(1 - 0.001 / 2.002, abs=1e-12)
    assert _radial(points, values, np.array([0.5])) == pytest.approx(0.5, abs=1e-12)
    assert _radial(points, values, np.array([0.25])) == pytest.approx(0.5 - 0.25 / 1.001, abs=1e-12)


def test_a_power_law_is_reproduced_exactly() -> None:
    """With a power law as trend nothing is left to interpolate: log(time) is linear in log axes."""
    rows = {dims: row(1e-9 * dims[1] ** 0.9 * dims[2] ** 1.1 * dims[3]) for dims in gemms()}
    table = KernelTable("gemm", rows)
    assert np.abs(table.left_out("log", "power law")).max() < 1e-8
    assert table.choice[1] == "power law"


def test_left_out_rows_are_inside_the_range_of_the_others() -> None:
    """Of 5 x 5 x 5 sizes every row shares each coordinate with others: all can be left out. A row that
    alone has the largest m cannot."""
    assert len(KernelTable("gemm", gemms()).left_out("log", "work")) == 125
    alone = gemms() | {(1, 9999, 64, 64): row(1.0)}
    assert len(KernelTable("gemm", alone).left_out("log", "work")) == 125


def test_a_rate_that_depends_on_the_work_prefers_its_own_transform() -> None:
    """The chosen transform is the one with the least left-out error, by brute force."""
    table = KernelTable("gemm", gemms(fixed=3e-4))
    medians = {
        (t, w): float(np.median(np.abs(table.left_out(t, w))))
        for t, w in product(("log", "cube root", "square root"), ("work", "power law"))
    }
    assert medians[table.choice] == min(medians.values())


def test_a_measured_row_is_as_sure_as_a_measured_one_or_as_its_samples() -> None:
    """Quartiles 1 % apart leave 0.95 to 1.06, what medians differ by from run to run. Of a log-normal
    scatter 5 and 95 % lie 1.645 / 0.674 = 2.441 times as far from the median as its quartiles."""
    rows = {(1, 8, 8, 8): Row(1.0, 0.99, 1.01, 7), (1, 8, 8, 16): Row(54.0, 29.0, 181.0, 7)}
    table = KernelTable("gemm", rows)
    steady, unsteady = table.estimate((1, 8, 8, 8)), table.estimate((1, 8, 8, 16))
    assert steady == pytest.approx((1.0, 0.95, 1.06, True))
    scatter = (54 * (29 / 54) ** 2.4407, 54 * (181 / 54) ** 2.4407)
    assert unsteady == pytest.approx((54.0, *scatter, True), rel=1e-3)


def test_where_no_row_can_be_left_out_nothing_is_interpolated() -> None:
    """Eight attentions, each alone at the least or largest heads, queries, keys or width; a ninth amid
    them can be left out."""
    shapes = [
        (1, 1024, 1024, 64), (24, 1024, 1024, 64), (8, 128, 1024, 64), (8, 4096, 1024, 64),
        (8, 1024, 128, 64), (8, 1024, 4096, 64), (8, 1024, 1024, 32), (8, 1024, 1024, 128),
    ]  # fmt: skip
    rows = {(1, h, q, k, d, d): row(1e-12 * h * q * k * d) for h, q, k, d in shapes}
    asked, amid = (1, 6, 512, 512, 64, 64), (1, 4, 1024, 512, 64, 64)
    assert KernelTable("attention", rows).estimate(asked) is None
    assert KernelTable("attention", rows | {amid: row(1e-4)}).estimate(asked) is not None


def test_an_interval_contains_its_estimate_and_widens_as_the_root_of_the_distance() -> None:
    """Times in proportion to m, so no left-out row is missed: 0.95 to 1.06, what a measured one has.
    Rows 16 to 23 lie about log(1 + 1/19) apart, 65536 far away; u from 23 it has sqrt(u / apart)
    times the logarithms of that, as a Brownian motion deviates."""
    sizes = (16, 17, 18, 19, 20, 21, 22, 23, 65536)
    table = KernelTable("gemm", {(1, m, 1024, 1024): row(m * 1e-7) for m in sizes})
    assert table.choice[0] == "log"
    # rows 17 to 23 can be left out; 17 is nearest to 18, ..., 23 to 22
    apart = np.mean([math.log(m / (m - 1)) for m in (18, 19, 20, 21, 22, 23, 23)])
    for m in (24, 40, 200):
        seen = table.estimate((1, m, 1024, 1024))
        assert seen is not None
        farther = math.sqrt(max(1.0, math.log(m / 23) / apart))
        want = (m * 1e-7, m * 1e-7 * 0.95**farther, m * 1e-7 * 1.06**farther)
        assert seen[:3] == pytest.approx(want, rel=1e-6), m
    assert table.estimate((1, 1500, 1024, 1024)) is None  # 4.2 / 0.05: more than 64 times as far


# ----------------------------------------------------------------------------------- in the prices


def test_a_table_of_the_gpu_wins_over_the_model_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every GEMM, convolution and attention of PixArt's denoiser measured at three times what the model
    says: the device time of these triples, and its provenance is the table."""
    model, l4 = profile("pixart-alpha"), load_gpu("l4")
    shape = Shape(b=2, f=1, r=128, w=128, k=128, t=120, s=0, h=0, u=1, j=120)
    work = Work("denoiser", ((0, len(model.denoiser.segments)),), shape)
    measured_on.cache_clear()
    before = CostModel(model, [l4]).compute(work, 0)
    path = tmp_path / "hardware_profiles" / "measured" / "l4" / "kernels.csv"
    begin_table(path, {**HEADER, "device": "NVIDIA L4"})
    pricer = CostModel(model, [l4])._pricers["l4"]
    heavy, seen = 0.0, set()
    for segment in model.denoiser.segments:
        for kernel in segment.kernels:
            if kernel.kind in ("gemm", "conv", "attention"):
                sizes = kernel.sizes(shape._asdict())
                seconds = pricer._heavy(kernel, sizes).device_s / kernel.count
                heavy += kernel.count * seconds
                if (kernel.kind, *sizes) not in seen:
                    seen.add((kernel.kind, *sizes))
                    append_row(path, Key(kernel.kind, tuple(sizes)), "bf16", row(3 * seconds))
    monkeypatch.chdir(tmp_path)
    measured_on.cache_clear()
    after = CostModel(model, [l4]).compute(work, 0)
    measured_on.cache_clear()
    assert before.provenance == "analytic"
    assert after.provenance in (
        "table",
        "analytic",
    )  # norms keep the model: up to a tenth of the time
    assert after.device_s == pytest.approx(before.device_s + 2 * heavy, rel=1e-4)
    assert heavy > 0.5 * before.device_s


def test_no_table_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measured_on.cache_clear()
    assert measured_on("l40", "bf16") == {}
    assert math.isclose(Key("attention", (1, 2, 3, 4, 5, 6)).flops, 2 * 2 * 3 * 4 * 11)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("device", "line", "message"),
    [
        ("AMD EPYC", "", "measured on AMD EPYC, which is not a l40s"),
        ("NVIDIA L40", "", "measured on NVIDIA L40, which is not a l40s"),
        # 2 x 4096^3 in 100 us: 1374 TFLOP/s
        (
            "NVIDIA L40S",
            "gemm,1x4096x4096x4096,bf16,100,99,101,9",
            "implies 1374 TFLOP/s, l40s has 362",
        ),
        # 10^9 elements of two bytes in 1 ms: 2000 GB/s
        ("NVIDIA L40S", "norm,1000000000,bf16,1000,999,1001,9", "implies 2000 GB/s, l40s has 864"),
        ("NVIDIA L40S", "norm,4096,bf16,0.05,0.05,0.05,9", "is less than a launch takes"),
    ],
)
def test_a_table_that_cannot_be_of_its_gpu_is_refused(
    device: str, line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hardware_profiles" / "measured" / "l40s" / "kernels.csv"
    begin_table(path, {**HEADER, "device": device})
    with path.open("a") as stream:
        stream.write(f"{line}\n")
    monkeypatch.chdir(tmp_path)
    measured_on.cache_clear()
    with pytest.raises(ConfigError, match=message):
        measured_on("l40s", "bf16")
    measured_on.cache_clear()
