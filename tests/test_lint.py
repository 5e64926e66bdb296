"""Data that cannot be true is refused: ceilings, twins, sparse peaks, missing sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paradiff.config import ConfigError
from simulator.gpu import Figure, load_gpu
from simulator.lint import (
    gpu_problems,
    is_the_gpu,
    read_table,
    row_problem,
    shipped_problems,
    twins,
)
from simulator.topology import load_topology

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


@pytest.mark.parametrize(
    ("device", "gpu", "is_it"),
    [
        ("NVIDIA L40S", "l40s", True), ("NVIDIA L40", "l40s", False), ("NVIDIA L40S", "l40", False),
        ("NVIDIA A100-SXM4-80GB", "a100-80g-sxm", True), ("NVIDIA H100 80GB HBM3", "h100-sxm", True),
        ("NVIDIA GeForce RTX 3090", "rtx3090", True), ("NVIDIA RTX A6000", "a6000", True),
        ("Tesla T4", "t4", True), ("AMD EPYC 7763", "t4", False), ("anything", "unit", True),
    ],
)  # fmt: skip
def test_a_device_is_known_by_its_name(device: str, gpu: str, is_it: bool) -> None:
    assert is_the_gpu(device, load_gpu(gpu)) is is_it


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


BOX = """name: mine
gpu: l40s
nodes: [{name: host0, gpus: [gpu0..gpu1]}]
peer_to_peer: true
switches: [rc0]
links:
  - {ends: [gpu0..gpu1, rc0], kind: KIND, bandwidth: RATE, latency: 2 us}
source: "assumed: a test"
"""
TABLE = (
    '  - {kind: KIND, ranks: 2, source: "measured: SOURCE", '
    "table: [[1 MiB, 80 us], [1 GiB, TIME]]}\n"
)


def box(tmp_path: Path, *tables: str, kind: str = "pcie4-x16", rate: str = "26 GB/s") -> Path:
    path = tmp_path / "mine.yaml"
    text = BOX.replace("KIND", kind).replace("RATE", rate)
    path.write_text(text + "".join(["collectives:\n", *tables] if tables else []))
    return path


def table(kind: str = "all_reduce", source: str = "me", time: str = "45 ms") -> str:
    return TABLE.replace("KIND", kind).replace("SOURCE", source).replace("TIME", time)


@pytest.mark.parametrize(
    ("changes", "tables", "message"),
    [
        # 16 lanes of generation 4 carry 31.5 GB/s after coding; ten times, a thousand times
        (
            {"rate": "260 GB/s"},
            [table()],
            r":7:\d+: links.0.bandwidth: 260 GB/s, but pcie4-x16 .*31.51",
        ),
        ({"rate": "26100 GB/s", "kind": "pcie5-x16"}, [table()], "pcie5-x16 carries 63.02"),
        ({"rate": "600 GB/s", "kind": "pcie4-x8"}, [table()], "pcie4-x8 carries 15.75"),
        # half of 1 GiB in 2 us
        ({}, [table(time="2 us")], r":10:\d+: collectives.0.table.1: .* 2.684e\+05 GB/s a GPU"),
        ({}, [table(), table(time="50 ms")], ":11:.* a second table of all_reduce over 2"),
        (
            {},
            [table(), table("all_gather")],
            "all_gather over 2 has the numbers of all_reduce over 2",
        ),
    ],
)
def test_a_box_that_cannot_be_is_refused_with_the_line(
    changes: dict[str, str], tables: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_topology(box(tmp_path, *tables, **changes))


def test_what_may_be_of_a_box_is_taken(tmp_path: Path) -> None:
    """A rate a little above its line, a table that says whose it is, and any what-if on a link."""
    lent = table("all_gather", "me, transferred from the all-reduce")
    assert len(load_topology(box(tmp_path, table(), lent, rate="33 GB/s")).collectives) == 2
    faster = load_topology(box(tmp_path, table()), ["links.0.bandwidth=260 GB/s"])
    assert faster.links[0].bandwidth_bytes_per_s == 260e9


def test_nvlinks_are_those_of_the_gpus_at_their_ends(tmp_path: Path) -> None:
    """An A6000 has four links of 14.0625 GB/s: 56.25 GB/s. Of an L40S nobody says."""
    path = box(tmp_path, kind="nvlink-bridge", rate="63 GB/s")
    assert load_topology(path).gpus
    path.write_text(path.read_text().replace("l40s", "a6000"))
    with pytest.raises(ConfigError, match=r"nvlink-bridge carries 56\.25 at most"):
        load_topology(path)


def test_one_table_under_two_names() -> None:
    assert list(twins({"a": [(1, 2)], "b": [(1, 2)], "c": [(1, 3)], "d": []})) == [("a", "b")]
