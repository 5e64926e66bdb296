"""``paradiff capacity`` as its users meet it: block, JSON, CSV, HTML, exit codes, messages."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from pages import HOSTILE, check_hovers, check_is_one_harmless_file, check_zooms, hostile, opened
from typer.testing import CliRunner, Result

from paradiff.cli import app

QUICK = [
    "--topology", "pcie8", "--gpus", "2", "--strategy", "serial", "--strategy", "cfg=2",
    "--model", "sdxl,steps=4,height=512,width=512", "--num-prompts", "1000", "--replications", "4",
    "--processes", "1",
]  # fmt: skip
ASKED = [*QUICK, "--request-rate", "8", "--slo", "p99=4s"]


def capacity(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["capacity", *arguments])


# ------------------------------------------------------------------------------------------ output


def test_the_block_is_that_of_vllm_bench_serve() -> None:
    """50 columns: heads centred in = and -, labels to the left of 40, values after them."""
    done = capacity(*ASKED)
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    start = lines.index("================ Capacity Result =================")
    block = lines[start:]
    assert block[-1] == "=" * 50
    heads = [line for line in block if line.startswith("-")]
    assert [head.strip("-") for head in heads] == [
        "Queue Wait", "Service", "End-to-end Latency", "Cost and Energy",
    ]  # fmt: skip
    assert all(len(line) <= 50 for line in block)
    for line in block[1:-1]:
        assert line in heads or re.fullmatch(r"[^:]+:\s+[\d.]+", line), line
        assert line in heads or len(line[:40].rstrip()) < 40 < len(line)
    assert re.search(r"^Buy \d nodes? of pcie8 \(2 GPUs each\), each cut ", done.stdout, re.M)


def test_json_adds_up_and_says_the_same_on_two_processes() -> None:
    """Two boxes, so that two processes have something to share."""
    two = [*ASKED, "--topology", "pcie2-3090", "--format", "json"]
    done = capacity(*two)
    assert done.exit_code == 0, done.stderr
    assert capacity(*[*two, "--processes", "2"]).stdout == done.stdout
    data = json.loads(done.stdout)
    assert data["schema"] == "paradiff.capacity/1"
    assert data["recommended"] == data["options"][0]["topology"]
    costs = [option["cost_per_month"] for option in data["options"]]
    assert costs == sorted(costs)
    for option in data["options"]:
        o = option["outcome"]
        assert option["met"]
        assert o["latency_mean_s"]["value"] == pytest.approx(
            o["wait_mean_s"]["value"] + o["service_mean_s"]["value"]
        )
        assert o["latency_s"]["p50"]["value"] <= o["latency_s"]["p99"]["value"]
        assert o["checks"][0]["bound"] <= 4
        assert 0 < o["utilisation"] < 1
        assert o["saturation_per_s"] > 8
        hours = 730 * option["nodes"] * option["price_per_hour"]
        assert option["cost_per_month"] == pytest.approx(hours)
        assert option["cost_per_1000_images"] == pytest.approx(1000 * hours / (730 * 3600 * 8))
        assert option["nodes_low"] <= option["nodes"] <= option["nodes_high"]
        assert option["energy"]["idle_wh_per_image"] is None
        assert "not in the profiles" in option["energy"]["reason"]
        assert all(p["saturated"] == (p["latency_s"] is None) for p in option["load_latency"])


def test_csv_has_a_row_a_box() -> None:
    done = capacity(*ASKED, "--format", "csv", "--metric-percentiles", "50,90")
    (row,) = csv.DictReader(done.stdout.splitlines())
    assert (row["topology"], row["met"], row["gpus_per_node"]) == ("pcie8", "True", "2")
    assert float(row["latency_p50_s"]) < float(row["latency_p90_s"])
    assert row["reason"] == ""


def test_a_number_of_nodes_can_be_looked_at_and_saturation_is_no_number() -> None:
    done = capacity(*QUICK, "--request-rate", "500", "--nodes", "1")
    assert done.exit_code == 3
    assert "--nodes 1 does not keep the service level; without --nodes" in done.stderr
    assert "saturated" in done.stderr
    assert re.search(r"^Latency: +saturated$", done.stdout, re.M)
    assert "p99" not in done.stdout.split("Capacity Result")[1]
    done = capacity(*QUICK, "--request-rate", "500", "--nodes", "1", "--format", "json")
    (option,) = json.loads(done.stdout)["options"]
    assert option["outcome"]["saturated"]
    assert option["outcome"]["latency_s"] == {}
    assert option["cost_per_1000_images"] is None
    fine = capacity(*QUICK, "--request-rate", "1", "--nodes", "2")
    assert fine.exit_code == 0, fine.stderr
    assert "With 2 nodes" in fine.stdout


def test_out_of_reach_says_by_how_much_and_what_would_reach_it() -> None:
    done = capacity(*QUICK, "--request-rate", "8", "--slo", "p50=10ms")
    assert done.exit_code == 3
    assert re.search(r"p50 is [\d.]+ s with no queue at all, [\d.]+ s above 0.01 s", done.stderr)
    found = re.search(r"p50=([\d.]+)s would be kept by (\d+) node", done.stderr)
    assert found is not None
    again = capacity(*QUICK, "--request-rate", "8", "--slo", f"p50={found[1]}s")
    assert again.exit_code == 0, again.stderr
    few = capacity(*QUICK, "--request-rate", "90", "--slo", "p99=4s", "--max-nodes", "2")
    assert few.exit_code == 3
    assert re.search(r"keeps \d+ nodes busy, --max-nodes 2\n +--max-nodes \d+$", few.stderr, re.M)


def test_every_way_to_queue_gives_an_answer() -> None:
    for more in (
        ["--routing", "shortest-queue", "--sharing", "static"],
        ["--max-batch", "2", "--batch-window", "50ms"],
        ["--mtbf", "100h", "--repair-time", "1h", "--sharing", "static"],
        ["--burstiness", "0.3"],
    ):
        done = capacity(*ASKED, *more)
        assert done.exit_code == 0, (more, done.stderr)
    assert "Failures: nodes are up" in capacity(*ASKED, "--mtbf", "100h").stdout


# ------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--request-rate", "0"], "--request-rate 0: allowed: 1e-06 to 1e+06"),
        (["--request-rate", "-3"], "--request-rate -3: allowed"),
        (["--request-rate", "nan"], "--request-rate nan: allowed"),
        (["--request-rate", "1e300"], "--request-rate 1e+300: allowed"),
        ([], "one of --request-rate R and --trace FILE"),
        (["--request-rate", "1", "--burstiness", "0"], "--burstiness 0: allowed: 1e-06"),
        (["--request-rate", "1", "--slo", "p98=10"], "time has no unit"),
        (["--request-rate", "1", "--slo", "p0=10s"], "not a percentile"),
        (["--request-rate", "1", "--slo", "fast"], "not a percentile"),
        (["--request-rate", "1", "--slo", "p99=3s"], "given twice"),
        (["--request-rate", "1", "--price", "pcie8=-9 USD"], "money out of range ('-9 USD')"),
        (["--request-rate", "1", "--price", "pcie8=0 USD"], "money out of range ('0 USD')"),
        (["--request-rate", "1", "--price", "pcie8=9 EUR"], "unknown money unit 'EUR'"),
        (["--request-rate", "1", "--price", "pcie9=9 USD"], "no such box"),
        (["--request-rate", "1", "--topology", "pcie8"], "two boxes are called 'pcie8'"),
        (["--request-rate", "1", "--model", "sdxl"], "two classes have one name"),
        (["--request-rate", "1", "--model", "sdxk:0.3"], "sdxk"),
        (["--request-rate", "1", "--mix", "none.yaml"], "not with both"),
        (["--request-rate", "1", "--confidence", "95"], "--confidence 95"),
        (["--request-rate", "1", "--attainment", "1"], "--attainment 1"),
        (["--request-rate", "1", "--metric-percentiles", "50;99"], "--metric-percentiles"),
        (["--request-rate", "1", "--mtbf", "0h"], "--mtbf: time out of range"),
        (["--trace", "none.csv"], "none.csv: cannot be read"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = capacity(*QUICK, "--slo", "p99=4s", *arguments, "--output-dir", str(out))
    assert done.exit_code == 2, done.stdout
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not out.exists()


def test_without_a_level_there_is_nothing_to_search() -> None:
    done = capacity(*QUICK, "--request-rate", "1")
    assert done.exit_code == 2
    assert "--slo p99=10s" in done.stderr


def test_an_empty_and_an_unordered_trace(tmp_path: Path) -> None:
    for text, message in (("", "no column arrival_s"), ("arrival_s\n2\n1\n", "trace.csv:3:")):
        (tmp_path / "trace.csv").write_text(text)
        done = capacity(*QUICK, "--slo", "p99=4s", "--trace", str(tmp_path / "trace.csv"))
        assert done.exit_code == 2
        assert message in done.stderr
    (tmp_path / "trace.csv").write_text("arrival_s\n" + "".join(f"{i / 4}\n" for i in range(40)))
    done = capacity(*QUICK, "--slo", "p99=4s", "--trace", str(tmp_path / "trace.csv"))
    assert done.exit_code == 0, done.stderr
    assert "a trace of 40 arrivals" in done.stdout


# ------------------------------------------------------------------------------------------ HTML


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with two boxes, one of them with a hostile name, and a class with another."""
    folder = tmp_path_factory.mktemp("report")
    box = hostile("topologies", "pcie2-3090", folder)
    mix = folder / "mix.yaml"
    mix.write_text(
        "models:\n  - {model: sdxl, steps: 4, height: 512, width: 512, deadline: 6 s}\n"
        f"  - {{model: sdxl, steps: 8, height: 512, width: 512, name: {json.dumps(HOSTILE)}}}\n"
    )
    at = QUICK.index("--model")
    done = capacity(
        *QUICK[:at], *QUICK[at + 2 :], "--mix", str(mix), "--topology", box,
        "--request-rate", "8", "--slo", "p99=6s", "--output-dir", str(folder / "out"),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "\x1b" not in done.output
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "capacity.csv", "capacity.html", "capacity.json",
    ]  # fmt: skip
    return folder / "out" / "capacity.html"


def test_the_page_is_one_file_and_names_are_only_text(report: Path) -> None:
    """Plotly and the charts."""
    check_is_one_harmless_file(report, scripts=2)
    text = report.read_text(encoding="utf-8")
    for name in ("distribution", "load", "cost", "utilisation"):
        assert f'id="{name}"' in text


def test_the_page_in_a_browser(report: Path) -> None:
    """Marks in every chart, what lies under a mouse by its number, zoom; narrow, wide and dark."""
    for width, scheme in ((1280, "light"), (390, "dark")):
        with opened(report, width, scheme) as page:
            page.wait_for_selector("#utilisation .scatterlayer path.js-line")
            for chart in ("distribution", "load", "cost", "utilisation"):
                assert page.locator(f"#{chart} .scatterlayer path.js-line").count() >= 1, chart
            said = check_hovers(page)["utilisation"]
            found = re.search(r"([\d.]+) s: (\d+) %", said)
            assert found is not None, said
            drawn = page.evaluate(
                "figures.utilisation.data.map(t => t.x.map((x, i) => [x, t.y[i]]))"
            )
            x, y = pytest.approx(float(found[1]), rel=5e-3), pytest.approx(int(found[2]), abs=0.51)
            assert any((x, y) == tuple(point) for points in drawn for point in points)
            check_zooms(page, "utilisation")
