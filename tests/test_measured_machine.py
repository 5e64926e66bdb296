"""A measured machine: what the simulator is told equals what was measured, in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from unit_hardware import Graph, exchange

from analysis.comparison import compare
from paradiff.config import ConfigError
from paradiff.graph import ScheduleGraph, work_text
from paradiff.trace import Trace, check_trace
from simulator.engine import simulate
from simulator.measured import Key, Row
from simulator.measured_machine import SCHEMA, CallTime, MeasuredMachine, in_turn

LATENCY_S, RATE = 2e-3, 1e6
PAIR = (0, 1)


def message_s(nbytes: int) -> float:
    return LATENCY_S + nbytes / RATE


def calls(ring: float = 1.0) -> tuple[CallTime, ...]:
    """Messages of 2 ms and 1 MB/s, rings ``ring`` times as long, gathers of 5 ms and 2 us/B."""
    sizes = (1024, 4096, 65536, 1048576)
    return (
        *(CallTime("p2p", "send", PAIR, n, (0.0,), message_s(n)) for n in sizes),
        *(CallTime("permute", "ring", PAIR, n, (0.0,), ring * message_s(n)) for n in sizes),
        *(CallTime("collective", "all_gather", PAIR, n, (0.0,), 5e-3 + 2e-6 * n) for n in sizes),
    )


@pytest.fixture
def graph() -> ScheduleGraph:
    """A step: 3 on rank 0, 5 on rank 1; a gather; rank 1 computes 4 beside it; then a message."""
    g = exchange((3, 5), 4096, call="all_gather")
    g.compute("beside", 1, 4, reads=["y"], writes=["z"])
    g.send("back", 1, 0, 4096, "x", "w")
    g.section("loop", 0, 3)
    return g.build()


def machine_of(
    graph: ScheduleGraph, lost: float | None = 0.0, ring: float = 1.0
) -> MeasuredMachine:
    """Work of r takes r ms on rank 0 and twice that on rank 1."""
    ops = [op for section in graph.sections for op in section.ops if op.work is not None]
    times = {
        work_text(op.work): (1e-3 * op.work.shape.r, 2e-3 * op.work.shape.r)
        for op in ops
        if op.work is not None
    }
    return MeasuredMachine(
        about={"device": "by hand"}, hosts=("here", "here"), works=times, calls=calls(ring),
        lost=lost,
    )  # fmt: skip


def run(graph: ScheduleGraph, machine: MeasuredMachine) -> Trace:
    trace = simulate(graph, machine.topology(), machine.costs(), backend=machine.backend("gloo"))
    check_trace(graph, trace)
    return trace.expanded()


def busy(trace: Trace, name: str, rank: int) -> float:
    return next(s.busy_s for s in trace.spans if s.name == name and s.rank == rank)


def test_ops_take_what_was_measured(graph: ScheduleGraph) -> None:
    trace = run(graph, machine_of(graph))
    assert busy(trace, "net@r0", 0) == pytest.approx(3e-3)
    assert busy(trace, "net@r1", 1) == pytest.approx(10e-3)  # 5 of work, rank 1 is half as fast
    assert busy(trace, "swap", 0) == pytest.approx(5e-3 + 2e-6 * 4096)  # tables: gathered bytes
    assert busy(trace, "back", 1) == pytest.approx(message_s(4096), rel=1e-6)


def test_compute_beside_a_transfer_loses_what_it_was_seen_to_lose(graph: ScheduleGraph) -> None:
    """``beside`` has 8 ms to do alone. Losing 3/4 it does a quarter of the gather's and of the message's
    13.3 and 6.2 ms meanwhile, and the rest after them."""
    free, slow = run(graph, machine_of(graph)), run(graph, machine_of(graph, lost=0.75))
    moving_s = busy(free, "swap", 1) + busy(free, "back", 1)
    assert busy(slow, "swap", 1) + busy(slow, "back", 1) == pytest.approx(moving_s)
    assert busy(free, "beside@r1", 1) == pytest.approx(8e-3)
    assert busy(slow, "beside@r1", 1) == pytest.approx(moving_s + 8e-3 - moving_s / 4)


def test_compute_beside_a_transfer_keeps_a_fiftieth_of_its_speed(graph: ScheduleGraph) -> None:
    """Losing all of it in short samples is not what a long run shows: 50 times as long at most."""
    works = [op.work for s in graph.sections for op in s.ops if op.work is not None]
    for lost, times in ((0.75, 4.0), (0.97, 1 / 0.03), (0.999, 50.0), (1.0, 50.0)):
        cost = machine_of(graph, lost=lost).costs().compute(works[0], 0)
        assert cost.contended_s == pytest.approx(times * cost.device_s)


@pytest.mark.parametrize(("ring", "duplex"), [(1.0, "full"), (1.49, "full"), (1.51, "half")])
def test_links_are_read_from_messages(graph: ScheduleGraph, ring: float, duplex: str) -> None:
    box = machine_of(graph, ring=ring).topology()
    assert len(box.links) == 2
    for link in box.links:
        assert link.bandwidth_bytes_per_s == pytest.approx(RATE)
        assert 2 * link.latency_s == pytest.approx(LATENCY_S)
        assert link.duplex == duplex


def test_ranks_on_two_hosts_have_a_trunk_between_them(graph: ScheduleGraph) -> None:
    """Within a host as above, between hosts 10 ms and half the rate, from ranks 0 and 2."""
    far = tuple(
        CallTime("p2p", "send", (0, 2), n, (0.0,), 10e-3 + 2 * n / RATE)
        for n in (1024, 65536, 1048576)
    )
    near = machine_of(graph)
    box = replace(near, hosts=("a", "a", "b", "b"), calls=(*near.calls, *far)).topology()
    assert [node.gpus for node in box.nodes] == [("rank0", "rank1"), ("rank2", "rank3")]
    trunks = [link for link in box.links if link.b == "trunk"]
    assert len(trunks) == 2
    assert trunks[0].bandwidth_bytes_per_s == pytest.approx(RATE / 2)
    # Rank 0, its switch, the trunk, the other switch, rank 2.
    assert sum(link.latency_s for link in (box.links[0], *trunks, box.links[2])) == pytest.approx(
        10e-3
    )


def test_ranks_alone_on_their_hosts_are_as_far_apart_as_hosts_are(graph: ScheduleGraph) -> None:
    """A rank a host: no message within one was timed, and messages and gathers take what they took."""
    near = machine_of(graph)
    box = replace(near, hosts=("a", "b")).topology()
    assert {node.name: node.gpus for node in box.nodes} == {"a": ("rank0",), "b": ("rank1",)}
    assert sum(link.latency_s for link in box.links) == pytest.approx(LATENCY_S)
    apart, together = run(graph, replace(near, hosts=("a", "b"))), run(graph, near)
    assert [s.end_s for s in apart.spans] == pytest.approx([s.end_s for s in together.spans])


def test_one_process_takes_turns(graph: ScheduleGraph) -> None:
    """3 steps of 3 + 5 + 4, two begins of 1, at the speed of the first rank; hand-overs are free."""
    trace = in_turn(graph, machine_of(graph).costs())
    check_trace(graph, trace)
    assert trace.makespan_s == pytest.approx(1e-3 * (2 + 3 * 12))


def test_the_file_round_trips(graph: ScheduleGraph) -> None:
    machine = machine_of(graph, lost=None)
    machine = replace(machine, kernels={Key("gemm", (1, 2, 3, 4)): Row(1.0, 0.5, 1.5, 7)})
    text = json.dumps(machine.to_json())
    assert MeasuredMachine.from_json(text, "file") == machine
    for broken in ("", "{}", "[]", text.replace(SCHEMA, f"{SCHEMA}0"), text[:-9]):
        with pytest.raises(ConfigError, match="file: no measurements"):
            MeasuredMachine.from_json(broken, "file")


def test_a_fault_of_the_simulator_fails_the_gate() -> None:
    """A step: 10 ms, then 8192 bytes to the other rank and back: of 30.4 ms 16.4 are the rate's and 4
    the calls'. Links twice too fast give 22.2 ms, calls without their cost 26.4."""
    g = Graph(2)
    g.compute("begin", 0, 1, writes=["x#-1"], step=None)
    g.section("begin", 0)
    g.compute("net", 0, 10, reads=["x#-1"], writes=["y"])
    g.send("there", 0, 1, 8192, "y", "z")
    g.send("back", 1, 0, 8192, "z", "x")
    g.section("loop", 0, 9)
    graph = g.build()
    machine = machine_of(graph)
    real = run(graph, machine)
    assert compare(run(graph, machine), [real]).within(0.0)
    box = machine.topology()
    twice = tuple(replace(k, bandwidth_bytes_per_s=2 * k.bandwidth_bytes_per_s) for k in box.links)
    free = tuple(replace(link, latency_s=0.0) for link in box.links)
    for links in (twice, free):
        wrong = simulate(
            graph, replace(box, links=links), machine.costs(), backend=machine.backend("gloo")
        )
        assert not compare(wrong, [real]).within(0.10)


Kept = dict[str, Any]
FAULTS: dict[str, Callable[[Kept], Kept]] = {
    "links twice too fast": lambda kept: {
        "calls": [[*call, s - 0.5 * moved_s(call[1], call[3])] for *call, s in kept["calls"]]
    },
    "no fixed cost of a call": lambda kept: {
        "calls": [[*call, moved_s(call[1], call[3])] for *call, _ in kept["calls"]]
    },
    "compute twice too fast": lambda kept: {
        "works": {key: [s / 2 for s in each] for key, each in kept["works"].items()}
    },
}


def moved_s(call: str, nbytes: int) -> float:
    """What the bytes of a call take, without its fixed cost (``calls``)."""
    return 2e-6 * nbytes if call == "all_gather" else nbytes / RATE


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_is_kept_fails_the_gate(graph: ScheduleGraph, fault: str) -> None:
    """A step is 10 ms of rank 1, 13.3 of the gather and 6.2 of the message. Links twice too fast leave
    out 4.1 and 2 of these, no fixed cost 5 and 2, compute 5: each more than a tenth of the whole."""
    kept = json.dumps(machine_of(graph).to_json())
    measured = run(graph, machine_of(graph))
    right = MeasuredMachine.from_json(kept, "kept")
    assert compare(run(graph, right), [measured]).within(1e-9)
    data = json.loads(kept)
    wrong = MeasuredMachine.from_json(json.dumps(data | FAULTS[fault](data)), "kept")
    assert not compare(run(graph, wrong), [measured]).within(0.10)
