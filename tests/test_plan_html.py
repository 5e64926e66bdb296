"""``report.html``: what it says against plan.json, in a browser, with hostile names, at its largest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from pages import (
    check_hovers,
    check_is_one_harmless_file,
    check_numbers,
    check_zooms,
    hostile,
    opened,
)
from typer.testing import CliRunner

from analysis.close_up import close_up
from analysis.plan_html import page
from analysis.sources import constants, kernel_tables, shares
from analysis.what_if import Effect, Outlook, outlook
from paradiff.cli import plan_app
from paradiff.config import find
from paradiff.profiles import load_profile
from paradiff.strategies import Workload
from simulator import planner
from simulator.tables import measured_gemms
from simulator.topology import load_topology

SPECS = ["serial", "cfg=2", "patch=4", "cfg=2,distrifusion=4,warmup=2", "tensor=4"]
BARS = ("time", "memory", "what_if", "begin", "steady", "second_begin", "second_steady")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a box and a model with hostile names."""
    folder = tmp_path_factory.mktemp("plan")
    box, model = hostile("topologies", "pcie8", folder), hostile("models", "sdxl", folder)
    done = CliRunner().invoke(
        plan_app,
        [
            "--topology", box, "--model", model, "--steps", "8",
            *(a for spec in SPECS for a in ("--strategy", spec)),
            "--output-dir", str(folder / "out"),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "\x1b" not in done.output
    assert "\\n\\x1b[2J" in done.output, "on one line, and the terminal is not cleared"
    assert sorted(p.name for p in folder.iterdir()) == ["hostile.json", "hostile.yaml", "out"]
    return folder / "out" / "report.html"


def test_the_page_is_one_file_and_names_are_only_text(report: Path) -> None:
    """Plotly, the charts, the table."""
    check_is_one_harmless_file(report, scripts=3)


def test_the_page_in_a_browser(report: Path) -> None:
    """Marks in every chart; what the bars add up to is the plan's; sorting, filter and zoom by keyboard,
    hover in every chart; narrow, wide and dark."""
    data = json.loads((report.parent / "plan.json").read_text())
    ranked = [c for c in data["candidates"] if c["feasible"]]
    for width, scheme in ((1280, "light"), (390, "dark")):
        with opened(report, width, scheme) as browser:
            browser.wait_for_selector("#topology .scatterlayer path.js-line", state="attached")
            for chart in BARS:
                assert browser.locator(f"#{chart} .barlayer .point path").count() >= 4, chart
            for chart in ("pareto", "staleness"):
                points = browser.locator(f"#{chart} .scatterlayer .point").count()
                assert points == len(ranked), chart
            for chart in ("gpus", "sizes"):
                assert browser.locator(f"#{chart} .scatterlayer path.js-line").count() >= 2, chart
            bars = browser.evaluate(
                "figures.time.data.filter(t => t.type === 'bar').map(t => t.x)"
                ".reduce((sum, x) => sum.map((s, i) => s + x[i]))"
            )
            assert bars == pytest.approx([c["latency_s"] for c in ranked])
            peak = browser.evaluate(
                "Math.max(...figures.memory.data.map(t => t.x)"
                ".reduce((sum, x) => sum.map((s, i) => s + x[i])))"
            )
            assert 1e9 * peak == pytest.approx(ranked[0]["peak_memory_bytes"], abs=1)
            _sorts_and_filters(browser, ranked)
            ink, paper = browser.evaluate(
                "['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k])"
            )
            assert (_lightness(ink) > _lightness(paper)) == (scheme == "dark")
            check_numbers(browser, "staleness", [c["latency_s"] for c in ranked])
            said = check_hovers(browser)
            assert "reads" in said["begin"]
            assert said.keys() >= {*BARS, "pareto", "staleness", "gpus", "sizes", "topology"}
            check_zooms(browser, "begin")


def _lightness(colour: str) -> int:
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def _sorts_and_filters(browser: Any, ranked: Sequence[Mapping[str, Any]]) -> None:
    def column(k: int) -> Any:
        return browser.locator(f"#ranked tbody tr:visible td:nth-child({k})").all_inner_texts()

    assert column(2) == [c["spec"] for c in ranked]
    memory = browser.locator("#ranked th button", has_text="memory")
    memory.focus()
    for reverse, said in ((False, "ascending"), (True, "descending")):
        browser.keyboard.press("Enter")
        assert browser.locator("#ranked th[aria-sort]").get_attribute("aria-sort") == said
        by_memory = sorted(
            ranked, key=lambda c: round(c["peak_memory_bytes"] / 1e9, 1), reverse=reverse
        )
        assert column(2)[0] == by_memory[0]["spec"]
    browser.locator("#filter").fill("CFG=2")
    assert sorted(column(2)) == sorted(c["spec"] for c in ranked if "cfg=2" in c["spec"])
    browser.locator("#filter").fill("")
    assert len(column(2)) == len(ranked)


LINES = """() => Math.max(...[...document.querySelectorAll('#ranked td:not(.left)')].map(cell => {
  const text = document.createRange();
  text.selectNodeContents(cell);
  return text.getClientRects().length;
}))"""
"""Over how many lines a number of the table is, at most."""


def test_on_paper_no_table_is_cut_off_and_sources_are_open(report: Path) -> None:
    """718 pixels: A4 less its margins. Paper is white, whatever the screen is."""
    with opened(report, 718, "dark") as browser:
        browser.emulate_media(media="print", color_scheme="dark")
        browser.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        ink = "getComputedStyle(document.querySelector('{}')).{}"
        assert browser.evaluate(ink.format("body", "color")) == "rgb(26, 26, 26)"
        assert browser.evaluate(ink.format("#time .xtick text", "fill")) == "rgb(26, 26, 26)"
        ends = "[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)"
        rights = browser.evaluate(ends)
        assert len(rights) >= 4
        assert max(rights) <= 718
        assert browser.evaluate(LINES) == 1, "no number is broken"
        assert browser.locator("details:not(.data):not([open])").count() == 0


def test_sources_of_the_box_are_said(report: Path) -> None:
    """Host memory decides on PCIe; its bandwidth is an assumption, and that is on the page."""
    text, box = " ".join(unescape(report.read_text()).split()), load_topology("pcie8")
    for source in (box.source, box.nodes[0].source):
        assert source
        assert " ".join(source.split()) in text


def test_a_plan_without_a_candidate_is_a_page_of_reasons(tmp_path: Path) -> None:
    """Why each cannot run, and the box's sources; no chart, and nothing that fails for lack of one."""
    done = CliRunner().invoke(
        plan_app,
        ["--topology", "pcie4-t4", "--model", hostile("models", "flux1-dev", tmp_path),
         "--strategy", "serial", "--strategy", "ring=4", "--output-dir", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 3
    report = tmp_path / "out" / "report.html"
    check_is_one_harmless_file(report, scripts=0)
    for width, scheme in ((1280, "light"), (390, "dark")):
        with opened(report, width, scheme) as browser:
            reasons = browser.locator("h2:has-text('Not possible here') + .scroll tbody tr")
            assert sorted(reasons.locator("td:first-child").all_inner_texts()) == [
                "ring=4",
                "serial",
            ]
            why = reasons.locator("td:nth-child(2)").all_inner_texts()
            assert all("GiB" in text and "nearest" not in text for text in why)
            near = reasons.locator("td:nth-child(3)").all_inner_texts()
            assert any(spec.startswith("ring=4,") for spec in near)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"plan.json", "report.html"}


def test_kernel_tables_and_constants_have_their_sources(report: Path) -> None:
    """The box has L40s, which have no table: prices are analytic, or lent by a GPU with the same chip.
    On L40S, each table is there with its rows, and the shares of what it prices add up."""
    text = " ".join(unescape(report.read_text()).split())
    named = [(name, why) for _, name, _, why in constants()]
    assert {"GAP", "SPREAD", "TILE_EFFICIENCY", "COMM_SPREAD"} <= {name for name, _ in named}
    assert all(why in text for _, why in named)
    request = planner.Request(
        profile=load_profile(find("models", "flux1-dev", ".json")),
        topology=load_topology("pcie8", ["gpu=l40s"]),
        workload=Workload(1024, 1024, 1, 2),
        gpus=8,
        specs=("ulysses=8",),
    )
    runs = request.runs()
    rows = {(gpu, kind): int(n) for gpu, kind, _, n, _ in kernel_tables(runs.costs)}
    assert rows["l40s", "gemm"] == len(measured_gemms("l40s").points)
    assert all("aiconfigurator" in source for *_, source in kernel_tables(runs.costs))
    found = shares(runs.costs, close_up(request, "ulysses=8", tuple(range(8))), tuple(range(8)))
    assert sum(found.values()) == pytest.approx(1)
    assert found.keys() & {"table", "interpolated"}


def test_links_are_used_as_long_as_their_bytes_take() -> None:
    """cfg=2 on one socket, without peer-to-peer: each GPU sends its half of the guidance to the other.
    Bytes of one direction over bandwidth and latency is the share that is drawn."""
    profile = load_profile(find("models", "sdxl", ".json"))
    box = load_topology("pcie8", [])
    request = planner.Request(
        profile=profile, topology=box, workload=Workload(512, 512, 1, 4), gpus=2, specs=("cfg=2",)
    )
    plan = planner.plan(request)
    best = close_up(request, "cfg=2", (0, 1))
    text = page(request, plan, [best], outlook(request, plan), [])
    (link,) = [k for k in box.links if k.a == "gpu0" or k.b == "gpu0"]
    sent = plan.ranked[0].comm_bytes_per_gpu
    assert sent is not None
    share = sent / link.bandwidth_bytes_per_s / best.trace.makespan_s
    assert f"busy {share:.1%} (" in text


def test_alike_ranks_of_a_wide_box_are_drawn_once() -> None:
    """24 ranks, alike but for the one that decodes when the others are done."""
    request = planner.Request(
        profile=load_profile(find("models", "flux1-dev", ".json")),
        topology=load_topology("nvl72", []),
        workload=Workload(768, 768, 1, 2),
        gpus=24,
        specs=("ulysses=24",),
    )
    seen = close_up(request, "ulysses=24", tuple(range(24)), watched=True)
    assert seen.trace.ranks() == (0,)
    assert seen.representative == (0,) * 24
    plan = planner.plan(request)
    assert seen.trace.makespan_s == plan.ranked[0].latency_s
    links = {use.link for use in seen.tracks.links}
    assert links == {"gpu0->nvswitch", "nvswitch->gpu0"}
    nothing = Outlook(1, (Effect("as it is", 1.0, 1.0, "ulysses=24"),), (), ())
    text = page(request, plan, [seen], nothing, [])
    assert "are drawn once: each stands for 24 of 24." in text


def test_two_hundred_candidates_stay_below_the_limit() -> None:
    """The largest report: 200 candidates, and the timeline of eight ranks in a pipeline."""
    profile = load_profile(find("models", "pixart-alpha", ".json"))
    request = planner.Request(
        profile=profile,
        topology=load_topology("pcie8", []),
        workload=Workload(1024, 1024, 1, 8),
        gpus=8,
        specs=("pipefusion=8,patches=8,warmup=1",),
    )
    plan = planner.plan(request)
    best = close_up(request, plan.ranked[0].spec, plan.ranked[0].placement or ())
    many = tuple(replace(plan.ranked[0], spec=f"{plan.ranked[0].spec},n={i}") for i in range(200))
    text = page(request, replace(plan, ranked=many), [best, best], outlook(request, plan), [])
    assert len(text.encode()) < 8e6
    assert text.count("<tr") >= 200
