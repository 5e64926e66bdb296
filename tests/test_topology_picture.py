"""The picture of a box: where things stand, what is written, and that names cannot become markup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.topology_picture import page, picture, positions
from paradiff.cli import app
from paradiff.config import available
from simulator.topology import load_topology


def test_gpus_in_a_row_switches_above_what_they_join_nvswitch_below() -> None:
    place = positions(load_topology("pcie4-a100"))  # two GPUs on each of two switches
    assert [place[f"gpu{i}"] for i in range(4)] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert place["plx0"] == (0.5, 1)
    assert place["plx1"] == (2.5, 1)
    assert positions(load_topology("nvlink8-h100"))["nvswitch"] == (3.5, -1)


@pytest.mark.parametrize("name", available("topologies"))
def test_every_shipped_box_has_its_links_with_rate_and_source(name: str) -> None:
    box = load_topology(name)
    figure = picture(box)
    hovers = [trace.hovertext for trace in figure.data[: len(box.links)]]
    assert all("GB/s" in hover or name == "unit" for hover in hovers)
    assert len(set(positions(box).values())) == len(box.gpus) + len(box.switches)  # none on another
    labels = len(figure.layout.annotations)
    assert labels == (len(box.links) if len(box.gpus) <= 16 else 0)


def test_text_from_the_file_is_escaped() -> None:
    box = load_topology("pcie2-3090")
    evil = "<script>alert(1)</script>"
    links = tuple(replace(link, kind=evil, source=evil) for link in box.links)
    text = page(replace(box, name=evil, links=links))
    assert evil not in text
    assert "&lt;script&gt;alert(1)" in text


def test_show_writes_the_page_beside_the_tree(tmp_path: Path) -> None:
    target = tmp_path / "box.html"
    done = CliRunner().invoke(app, ["topology", "show", "pcie8", "--html", str(target)])
    assert done.exit_code == 0
    assert done.stdout.startswith("pcie8: 8 GPUs")
    assert "<title>pcie8</title>" in target.read_text()[:1000]
    refused = CliRunner().invoke(app, ["topology", "show", "pcie8", "--html", "/nowhere/x.html"])
    assert refused.exit_code == 2
