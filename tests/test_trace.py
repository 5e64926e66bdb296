"""Traces: the file form, the checker's complaints, folding."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from unit_hardware import Graph, exchange, run

from paradiff.graph import ScheduleGraph
from paradiff.trace import (
    Arrow,
    Repeat,
    Span,
    Trace,
    TraceMismatch,
    Tracks,
    check_trace,
    read_chrome_trace,
    write_chrome_trace,
)


@pytest.fixture
def graph() -> ScheduleGraph:
    g = exchange((2, 3), 3)
    g.section("loop", 0, 9)
    return g.build()


def test_the_file_round_trips(graph: ScheduleGraph, tmp_path: Path) -> None:
    trace = run(graph)
    for name in ("trace.json", "trace.json.gz"):
        write_chrome_trace(trace, tmp_path / name)
        assert read_chrome_trace(tmp_path / name) == trace.expanded()
    check_trace(graph, read_chrome_trace(tmp_path / "trace.json.gz"))


def test_equal_traces_give_equal_bytes_and_no_debris(graph: ScheduleGraph, tmp_path: Path) -> None:
    write_chrome_trace(run(graph), tmp_path / "a.json.gz")
    write_chrome_trace(run(graph), tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json.gz", "b.json.gz"]


def test_perfetto_sees_ranks_streams_and_arrows(graph: ScheduleGraph, tmp_path: Path) -> None:
    """Both ranks send in a swap: an arrow each way, from its begin on one to its end on the other. An
    end follows its slice in the file, before a slice that begins then, so that it belongs to it."""
    path = tmp_path / "trace.json.gz"
    swaps = [f"t{step:03d}/swap" for step in range(9)]
    arrows = [Arrow(op, *pair) for op in swaps for pair in ((0, 1), (1, 0))]
    write_chrome_trace(run(graph), path, Tracks(arrows))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]}
    assert names == {"rank 0", "rank 1", "compute", "comm"}
    drawn = [e for e in events if e["ph"] == "X"]
    assert len(drawn) == 2 + 9 * (2 + 2)
    assert {e["cat"] for e in drawn} == {"compute", "permute"}
    begins = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert begins.keys() == ends.keys()
    found = [(begins[i]["pid"], ends[i]["pid"]) for i in sorted(begins)]
    assert found == 9 * [(1, 2), (2, 1)], "rank r is process r + 1"
    for at, event in enumerate(events):
        if event["ph"] in "sf":
            slice_ = next(e for e in reversed(events[:at]) if e["ph"] == "X")
            end = slice_["ts"] + slice_["dur"] * (event["ph"] == "f")
            assert (slice_["name"], slice_["tid"]) == ("swap", event["tid"])
            assert event["ts"] == pytest.approx(end, abs=1e-3)


def test_perfetto_keeps_every_slice(tmp_path: Path) -> None:
    """It keeps whole nanoseconds, and of a thread no slice that begins before the last one has ended:
    thirds of a microsecond, one after the other, for a minute in. Processes and threads begin at one,
    and every event is of a thread that has a name."""
    ends = [60 + third / 3e6 for third in range(300)]
    spans = [
        Span("x", number, 0, stream, "compute", "", begin, begin, end, end - begin, 0)
        for number, (begin, end) in enumerate(itertools.pairwise(ends))
        for stream in ("comm", "compute")
    ]
    path = tmp_path / "trace.json"
    write_chrome_trace(Trace(tuple(spans), ends[-1], (), ()), path)
    events = json.loads(path.read_text())["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events} == named
    assert min(pid for pid, _ in named) == min(tid for _, tid in named) == 1
    for thread in named:
        slices = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == thread]
        kept = [(round(e["ts"] * 1e3), round(e["dur"] * 1e3)) for e in slices]
        assert len(kept) == 299
        assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(kept))
    assert read_chrome_trace(path).spans == tuple(spans)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"traceEvents": []}', b"\x1f\x8bxx"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(TraceMismatch, match="is no paradiff trace"):
        read_chrome_trace(tmp_path / "x")


def changed(trace: Trace, op_id: str, rank: int, **values: object) -> Trace:
    spans = tuple(
        s._replace(**values) if (s.id, s.rank) == (op_id, rank) else s for s in trace.spans
    )
    return replace(trace, spans=spans)


def test_the_checker_names_what_is_wrong(graph: ScheduleGraph) -> None:
    good = run(graph).expanded()
    check_trace(graph, good)
    first = good.spans[0]
    cases = [
        (changed(good, "t003/net@r1", 1, ready_s=0.0, start_s=0.0), "its predecessor .* ended"),
        (changed(good, "t003/net@r1", 1, stream="other"), "belongs to compute"),
        (changed(good, "t003/net@r1", 1, busy_s=99.0), "busy 99"),
        (changed(good, "t008/swap", 1, end_s=good.makespan_s + 1), "times out of order"),
        (replace(good, spans=good.spans[1:]), r"ran on \[\]"),
        (replace(good, spans=(*good.spans, first)), "ran twice"),
        (replace(good, spans=(*good.spans, first._replace(name="more@r0"))), "not an op"),
        (replace(good, makespan_s=good.makespan_s + 1), "makespan"),
    ]
    for bad, message in cases:
        with pytest.raises(TraceMismatch, match=message):
            check_trace(graph, bad)


def test_overlap_on_a_stream_is_seen_across_ranks() -> None:
    # The op before on this stream of rank 1 is a predecessor through rank 1 only.
    g = Graph(2)
    g.op("a", "p2p", "send", (0, 1), "s", nbytes=4)
    g.op("b", "p2p", "send", (1, 0), "s", nbytes=4)
    graph = g.build()
    good = run(graph)
    bad = changed(changed(good, "t000/b", 0, start_s=3.0, ready_s=3.0), "t000/b", 1, start_s=4.0)
    with pytest.raises(TraceMismatch, match="predecessor t000/a"):
        check_trace(graph, bad)


def test_clocks_of_ranks_may_be_apart(graph: ScheduleGraph) -> None:
    # Rank 1's clock is 0.25 s ahead: every comparison within a rank still holds.
    good = run(graph).expanded()
    spans = tuple(
        s._replace(ready_s=s.ready_s + 0.25, start_s=s.start_s + 0.25, end_s=s.end_s + 0.25)
        if s.rank == 1
        else s
        for s in good.spans
    )
    check_trace(graph, replace(good, spans=spans, makespan_s=good.makespan_s + 0.25))


def test_expansion_copies_the_period() -> None:
    # One op of 2 s a step on an otherwise idle rank, period 2, steps 0..4 with 2..3 folded away:
    # steps 0 and 1 are written down, then the last, which the engine has named 4.
    def span(step: int, start: float) -> Span:
        return Span("op", step, 0, "compute", "compute", "f", start, start, start + 2, 2.0, 0)

    folded = Trace((span(0, 0), span(1, 2), span(4, 4)), 10.0, (Repeat(4.0, 2.0, 2, 1),))
    full = folded.expanded()
    assert full.spans == tuple(span(step, 2.0 * step) for step in range(5))
    assert full.expanded() == full
