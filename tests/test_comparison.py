"""Predicted against measured: hand-made runs whose every number is known; faults that the gate sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, Scripts, check_hovers, opened
from unit_hardware import UnitCosts, exchange, run

from analysis import comparison_report, timeline
from analysis.comparison import SCHEMA, Comparison, compare, to_json
from analysis.timeline import view
from paradiff.graph import ScheduleGraph
from paradiff.trace import Trace, TraceMismatch
from simulator.topology import Topology

STEPS = 6


@pytest.fixture
def graph() -> ScheduleGraph:
    """A step: 5 s on rank 0, 3 s on rank 1; both swap 4 bytes; meanwhile rank 0 computes 2 s more."""
    g = exchange((5, 3), 4)
    g.compute("beside", 0, 2, reads=["y"])
    g.section("loop", 0, STEPS)
    return g.build()


def slower(trace: Trace, factor: float) -> Trace:
    """The same run on a clock that is ``factor`` as fast: a measurement with a known error."""
    spans = tuple(
        span._replace(
            **{n: getattr(span, n) * factor for n in ("ready_s", "start_s", "end_s", "busy_s")}
        )
        for span in trace.expanded().spans
    )
    return Trace(spans, trace.makespan_s * factor, (), trace.meta)


def test_a_run_equals_itself(graph: ScheduleGraph) -> None:
    predicted = run(graph)
    found = compare(predicted, [predicted.expanded()])
    # 1 s, then six steps of 5 s on rank 0 and 4 s on the wire.
    assert found.latency.predicted_s == found.latency.measured_s == 1 + STEPS * 9
    assert found.latency.error == 0
    assert found.spread == 0
    assert found.median_op_error == 0
    assert [both.predicted_s for both in found.steps] == [9.0] * STEPS
    assert all(op.miss_s == 0 for op in found.ops)
    assert found.within(0.0)


def test_sums_by_kind_and_rank(graph: ScheduleGraph) -> None:
    predicted = run(graph)
    found = compare(predicted, [slower(predicted, 2.0)])
    assert found.latency.error == pytest.approx(1 / 2 - 1)
    # compute: two encoders of 1 s, then 5 + 3 + 2 a step; a swap works 4 s on each of two ranks.
    compute, swap = found.kinds["compute"], found.kinds["permute"]
    assert (compute.ops, compute.times.predicted_s) == (2 + 3 * STEPS, 2 + 10 * STEPS)
    assert (swap.ops, swap.times.predicted_s) == (2 * STEPS, 8 * STEPS)
    assert compute.times.measured_s == 2 * compute.times.predicted_s
    assert compute.median_error == swap.median_error == pytest.approx(0.5)
    (rank0, slow0), (rank1, _) = found.ranks
    # On rank 0 two of the four seconds of a swap lie under compute. Rank 1 hides nothing, and waits 2 s
    # a step before rank 0 comes to the swap.
    assert (rank0.compute_s, rank0.communication_s, rank0.overlapped_s) == (43, 12, 12)
    assert (rank1.compute_s, rank1.communication_s, rank1.overlapped_s) == (19, 24, 0)
    assert (rank0.waiting_s, rank1.waiting_s) == (0, 12)
    assert slow0.communication_s == 2 * rank0.communication_s


def test_repeats_become_medians_and_a_spread(graph: ScheduleGraph) -> None:
    predicted = run(graph)
    found = compare(predicted, [slower(predicted, f) for f in (1.5, 1.0, 1.1, 1.2, 1.05)])
    latency = 1 + STEPS * 9
    assert found.latency.measured_s == pytest.approx(1.1 * latency)
    # Quartiles of 1, 1.05, 1.1, 1.2, 1.5 are the second and the fourth.
    assert found.spread == pytest.approx((1.2 - 1.05) / 1.1)
    assert found.typical.makespan_s == pytest.approx(1.1 * latency)
    assert found.latency.error == pytest.approx(1 / 1.1 - 1)
    assert found.within(0.1)
    assert not found.within(0.09)


def test_the_worst_op_is_the_one_that_was_moved(graph: ScheduleGraph) -> None:
    """The last ``beside`` takes 5 s in place of 2: it ends 1 s after the swap that it began with."""
    predicted, name = run(graph), f"t{STEPS - 1:03d}/beside@r0"
    longer = [
        span._replace(busy_s=span.busy_s + 3, end_s=span.end_s + 3) if span.id == name else span
        for span in predicted.expanded().spans
    ]
    measured = Trace(tuple(longer), predicted.makespan_s + 1)
    data = to_json(compare(predicted, [measured]), 0.1)
    assert data["schema"] == SCHEMA
    assert data["passed"]
    first = data["worst_ops"][0]
    assert (first["id"], first["predicted_s"], first["measured_s"]) == (name, 2.0, 5.0)
    assert data["by_kind"]["permute"]["error"] == 0
    assert data["steps"][-1]["measured_s"] == data["steps"][-1]["predicted_s"] + 1


def test_other_ops_are_not_compared(graph: ScheduleGraph) -> None:
    predicted = run(graph)
    whole = predicted.expanded()
    with pytest.raises(
        TraceMismatch, match=r"repeat 2: .* predicted, but not measured \(1 ops differ"
    ):
        compare(predicted, [whole, replace(whole, spans=whole.spans[:-1])])
    with pytest.raises(ValueError, match="no measured run"):
        compare(predicted, [])


FIXED_S = 2.0
Fault = Callable[[ScheduleGraph], Trace]
FAULTS: dict[str, tuple[float, Fault]] = {
    "a link twice too fast": (
        1 + 6 * (5 + 2 + 2),
        lambda g: run(
            g, Topology.uniform(2, bandwidth_bytes_per_s=2.0), UnitCosts(fixed_s=FIXED_S)
        ),
    ),
    "no fixed cost of a call": (1 + 6 * (5 + 4), lambda g: run(g, costs=UnitCosts(fixed_s=0.0))),
    "compute a third too slow": (
        4 / 3 * (1 + 6 * 5) + 6 * (2 + 4),
        lambda g: run(g, costs=UnitCosts(unit_s=4 / 3, fixed_s=FIXED_S)),
    ),
}
"""What is predicted, in seconds, and how."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_simulator_fails_the_gate(graph: ScheduleGraph, fault: str) -> None:
    """The measured run has links of 1 B/s and calls that cost 2 s more: 1 + 6 x (5 + 2 + 4) = 67 s.
    Links twice as fast give 18 % too little, and so does no fixed cost; slow compute 15 % too much."""
    measured = run(graph, costs=UnitCosts(fixed_s=FIXED_S)).expanded()
    assert measured.makespan_s == 67
    right = compare(run(graph, costs=UnitCosts(fixed_s=FIXED_S)), [measured])
    assert right.within(0.0)
    expected_s, predict = FAULTS[fault]
    wrong = compare(predict(graph), [measured])
    assert wrong.latency.predicted_s == pytest.approx(expected_s)
    assert not wrong.within(0.10)


def facts(found: Comparison) -> dict[str, Any]:
    """A report with hostile names, as ``paradiff validate run`` writes it."""
    return {
        **to_json(found, 0.1),
        "model": HOSTILE,
        "spec": "patch=2",
        "how": "2 processes over gloo",
        "workload": {"height": 64, "width": 64, "steps": STEPS, "batch": 1, "dtype": "fp32"},
        "measured": {"device": HOSTILE},
        "machines": [{"host": HOSTILE, "gpus": ["none"], "ranks": [0, 1]}],
    }


def test_the_text_has_both_times(graph: ScheduleGraph) -> None:
    predicted = run(graph)
    found = compare(predicted, [slower(predicted, 1.25)])
    said = comparison_report.text(found, facts(found))
    assert "Predicted 55.0 s, measured 68.8 s (one run): -20.0%, failed at 10.0%." in said
    assert "One run does not show how far runs lie apart" in said
    found = compare(predicted, [slower(predicted, 1.25)] * 2)
    assert "One run" not in comparison_report.text(found, facts(found))
    permute = next(line for line in said.splitlines() if line.startswith("permute"))
    assert permute.split() == ["permute", "12", "48.0", "s", "60.0", "s", "-20.0%", "20.0%"]


def test_what_is_predicted_to_take_no_time_has_no_error(graph: ScheduleGraph) -> None:
    predicted = run(graph)
    spans = tuple(
        span._replace(kind="host", busy_s=0.0) if span.name.startswith("beside") else span
        for span in predicted.expanded().spans
    )
    longer = tuple(
        span._replace(busy_s=2.0) if span.kind == "host" else span  # as they were
        for span in spans
    )
    made, seen = (Trace(each, predicted.makespan_s) for each in (spans, longer))
    rows = {row[0]: row[1:] for row in comparison_report.kind_table(compare(made, [seen]))[1]}
    assert rows["host"] == ["6", "0 s", "12.0 s", "-", "-"]
    assert rows["permute"][-2:] == ["+0.0%", "0.0%"]


@pytest.mark.parametrize(
    ("room", "ranks", "steps", "note"),
    [
        (24, 4, 2, ""),
        (12, 4, 1, ""),
        (8, 2, 1, " Of 4 ranks the first 2 are drawn."),
        (1, 1, 1, " Of 4 ranks rank 0 is drawn."),
    ],
)
def test_what_is_too_much_for_one_timeline_is_a_whole_step_of_the_first_ranks(
    graph: ScheduleGraph,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    ranks: int,
    steps: int,
    note: str,
) -> None:
    """Four ranks of three spans a step. With room for both steps, for one, for two ranks and a part, for
    less than one rank: what is shown are whole steps of whole ranks, one of each at least."""
    monkeypatch.setattr(timeline, "MAX_SPANS", room)
    like = run(graph).spans[0]
    spans = [
        like._replace(rank=rank, step=step, start_s=3.0 * step + k, end_s=3.0 * step + k + 1)
        for step in range(2)
        for k in range(3)
        for rank in range(4)
    ]
    trace = Trace(tuple(spans), 6.0)
    shown = view([trace, trace], range(2))
    assert (len(shown.ranks), len(shown.steps), shown.note) == (ranks, steps, note)
    assert len(shown.spans(trace)) == 3 * ranks * steps


def test_the_page_shows_both_timelines_on_one_axis(graph: ScheduleGraph, tmp_path: Path) -> None:
    """Rows of the prediction above those of the run, in which step 3 begins at zero in both."""
    predicted = run(graph)
    found = compare(predicted, [slower(predicted, 1.25)])
    path = tmp_path / "report.html"
    path.write_text(comparison_report.page(graph, found, facts(found)), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    elements = Scripts()
    elements.feed(text)
    assert elements.fetched == []
    assert "<script>alert" not in text
    for width, scheme in ((1280, "light"), (390, "dark")):
        with opened(path, width, scheme) as browser:
            for chart in ("ranks", "begin", "steady"):
                browser.wait_for_selector(f"#{chart} .barlayer .point path", state="attached")
            rows = browser.evaluate("figures.steady.layout.yaxis.categoryarray")
            assert [row.split(":")[0] for row in rows] == ["measured"] * 4 + ["predicted"] * 4
            ends = browser.evaluate(
                "figures.steady.data.filter(t => t.name === 'permute')"
                ".flatMap(t => t.y.map((row, i) => [row, t.base[i] + t.x[i]]))"
            )
            # Two steps of 9 s, and of 11.25 s.
            latest = {name: max(at for row, at in ends if row.startswith(name)) for name, _ in ends}
            assert latest["predicted: rank 0 comm"] == pytest.approx(18e3)
            assert latest["measured: rank 0 comm"] == pytest.approx(22.5e3)
            assert check_hovers(browser).keys() == {"ranks", "begin", "steady"}
