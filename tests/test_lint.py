"""Data that cannot be true is refused: ceilings, twins, sparse peaks, missing sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paradiff.config import ConfigError
from simulator.gpu import Figure, load_gpu
from simulator.lint import gpu_problems, read_table, row_problem, shipped_problems, twins

L40S = load_gpu("l40s")
GEMM = {"m": "4096", "n": "4096", "k": "4096", "dtype": "bf16", "time_us": "600", "source": "me"}
ATTENTION = {
    "batch": "1", "seq": "8192", "heads": "16", "head_dim": "128", "causal": "no",
    "kernel": "flash2", "dtype": "bf16", "time_us": "3000", "source": "me",
}  # fmt: skip


def test_what_ships_is_clean() -> None:
    assert shipped_problems() == []


@pytest.mark.parametrize(
    ("table", "change", "problem"),
    [
        # 2 * 4096^3 FLOPs in 100 us
        ("gemm", {"time_us": "100"}, "time_us: 100 implies 1374 TFLOP/s, l40s has 362 in bf16"),
        # 65536 x 16 by 16 x 65536: 8.6 GB written, in 3 ms 2866 GB/s
        (
            "gemm",
            {"m": "65536", "n": "65536", "k": "16", "time_us": "3000"},
            "time_us: 3000 implies 2865 GB/s, l40s has 864",
        ),
        ("gemm", {"source": " "}, "source: blank"),
        ("gemm", {"time_us": "0"}, r"time_us: not allowed \(0\)"),
        ("gemm", {"m": "many"}, "not a number"),
        # 4 * 16 * 8192^2 * 128 FLOPs in 1 ms; half of it where causal
        ("attention", {"time_us": "1000"}, "implies 550 TFLOP/s"),
        ("attention", {"time_us": "500", "causal": "yes"}, "implies 550 TFLOP/s"),
    ],
)
def test_a_row_that_cannot_be(table: str, change: dict[str, str], problem: str) -> None:
    row = GEMM if table == "gemm" else ATTENTION
    assert row_problem(row, table, L40S) is None
    found = row_problem(row | change, table, L40S)
    assert found is not None
    assert re.search(problem, found), found


def test_a_table_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "gemm.csv"
    path.write_text("m,n,k,dtype,time_us,source\n64,64,64,bf16,5,me\n4096,4096,4096,bf16,9,me\n")
    with pytest.raises(ConfigError, match=r"gemm.csv:3: time_us: 9 implies"):
        read_table(path, "gemm", L40S)
    path.write_text("m,n,k,dtype,time_us\n")
    with pytest.raises(ConfigError, match=r"gemm.csv:1: column missing \(source\)"):
        read_table(path, "gemm", L40S)


def test_a_sparse_peak_is_suspected() -> None:
    """An L40S with the 733 TFLOP/s of its sparse column reaches 0.37 of it."""
    sparse = Figure[float](value=733e12, kind="spec", source="some site")
    peak = L40S.peak.model_copy(update={"fp16": sparse, "bf16": sparse})
    found = list(gpu_problems(L40S.model_copy(update={"peak": peak})))
    assert len(found) == 1
    assert "l40s: peak.fp16 is 2.7 times the best product measured" in found[0]


def test_a_price_of_no_date_is_said() -> None:
    """``dear`` prints a price, and not when it did; that it is older than a year is no date."""
    for source in ("dear", "dear, older than 2026"):
        price = Figure[float](value=1.0, kind="measured", source=source)
        found = list(gpu_problems(L40S.model_copy(update={"price_per_hour": price})))
        assert found == [
            f"l40s: price_per_hour.source: {source!r} does not say when, allowed: a text with a day,"
            " a year, a commit or the word undated"
        ]


def test_one_table_under_two_names() -> None:
    assert list(twins({"a": [(1, 2)], "b": [(1, 2)], "c": [(1, 3)], "d": []})) == [("a", "b")]
