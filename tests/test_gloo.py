"""gloo's algorithms and TCP's costs as closed forms on unit hardware: n ranks on switches, 1 B/s."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit_hardware import Graph, UnitCosts, run

from paradiff.graph import BROADCAST_PIECE, ScheduleGraph, traffic
from simulator.engine import simulate
from simulator.gloo import flows
from simulator.tcp import ACK_SHARE, WIRE_SHARE, TcpNetwork
from simulator.topology import Link, Topology


def one_call(call: str, n: int, nbytes: int) -> ScheduleGraph:
    g = Graph(n)
    g.collective(call, "call", range(n), nbytes, "", "out")
    return g.build()


def two_switches(n: int, trunk: float) -> Topology:
    """The first half of ``n`` GPUs on one switch, the others on another, 1 B/s each."""
    plain = Topology.uniform(n)
    links = [
        Link(a=gpu, b="left" if i < n // 2 else "right", bandwidth_bytes_per_s=1.0)
        for i, gpu in enumerate(plain.gpus)
    ]
    links.append(Link(a="left", b="right", bandwidth_bytes_per_s=trunk))
    return replace(plain, switches=("left", "right"), links=tuple(links))


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_calls_alone_on_a_star(n: int) -> None:
    """Rings and pairwise exchange keep each link busy with what leaves a rank. A broadcast of one piece
    goes from rank to rank, n - 1 times."""
    size = 24 * n
    for call, seconds in [
        ("all_gather", (n - 1) * size),
        ("all_reduce", 2 * (n - 1) * size / n),
        ("all_to_all", (n - 1) * size / n),
        ("broadcast", (n - 1) * size),
        ("permute", size),
    ]:
        assert run(one_call(call, n, size), backend="gloo").makespan_s == pytest.approx(seconds), (
            call
        )


@pytest.mark.parametrize("call", ["all_gather", "all_reduce", "all_to_all"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_flows_carry_what_the_graph_says(call: str, n: int) -> None:
    """Bytes out of and into every rank, against ``traffic``, which knows no algorithm."""
    op = one_call(call, n, 40 * n).sections[0].ops[0]
    _, found = flows(call, range(n), op.nbytes)
    for rank, (out, into) in traffic(op).items():
        assert sum(f.nbytes for f in found if f.source == rank) == pytest.approx(out)
        assert sum(f.nbytes for f in found if f.destination == rank) == pytest.approx(into)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("pieces", [1, 2.5, 36])
def test_a_broadcast_goes_along_the_chain_in_pieces(n: int, pieces: float) -> None:
    """The last rank has the first piece after n - 1 of its times; the others follow at full rate:
    (n - 2) pieces more than the buffer. Every link carries the buffer once, as ``traffic`` says."""
    size = round(pieces * BROADCAST_PIECE)
    trace = run(one_call("broadcast", n, size), backend="gloo")
    assert trace.makespan_s == pytest.approx(size + (n - 2) * BROADCAST_PIECE)
    _, found = flows("broadcast", range(n), size)
    for rank in range(n - 1):
        assert sum(f.nbytes for f in found if (f.source, f.destination) == (rank, rank + 1)) == size


@pytest.mark.parametrize("n", [3, 4, 7, 8])
def test_a_round_of_an_exchange_begins_when_both_ends_are_through_with_theirs(n: int) -> None:
    """Sender and receiver each wait for what they sent and what came to them in the round before."""
    _, found = flows("all_to_all", range(n), 8.0 * n)
    for number, flow in enumerate(found):
        step, i = number // n + 1, number % n
        assert (flow.source, flow.destination) == (i, (i + step) % n)
        if step > 1:
            ends = {flow.source, flow.destination}
            round_before = range((step - 2) * n, (step - 1) * n)
            assert set(flow.after) == {
                k for k in round_before if ends & {found[k].source, found[k].destination}
            }


def test_an_exchange_over_a_thin_trunk() -> None:
    """Four ranks, two a switch, shares of 6 bytes, a trunk of 1/2 B/s each way. Of the three rounds the
    first has one message each way on the trunk (12 s), the second two (24 s), the third one (12 s).
    The messages of rounds one and three that stay at home take 6 s, but what comes to their sender
    next has crossed, so nobody gets ahead: 48 s. A broadcast of 6, one piece: 6 s, 12 s over the trunk,
    6 s."""
    box = two_switches(4, trunk=0.5)
    for call, size, seconds in [("all_to_all", 24, 48.0), ("broadcast", 6, 24.0)]:
        trace = run(one_call(call, 4, size), box, backend="gloo")
        assert trace.makespan_s == pytest.approx(seconds), call


def test_an_exchange_with_hosts_that_take_in_half_of_what_they_send() -> None:
    """Eight ranks on one switch, the first four take in 30 B/s and send 60, the others 40 and 80. What
    comes to a slow rank comes one message after another, 4 s for a share of 120 bytes: 7 rounds of 4 s.
    (If a message waited for its sender alone, those of two rounds would share a slow rank's link.)"""
    plain = Topology.uniform(8)
    links = [
        Link(a=gpu, b="switch", bandwidth_bytes_per_s=2.0 * r, back_bytes_per_s=r)
        for gpu, r in zip(plain.gpus, [30.0] * 4 + [40.0] * 4, strict=True)
    ]
    box = replace(plain, switches=("switch",), links=tuple(links))
    trace = run(one_call("all_to_all", 8, 8 * 120), box, backend="gloo")
    assert trace.makespan_s == pytest.approx(7 * 4.0)


def test_waiting_flows_share_links_with_others() -> None:
    """A broadcast of 4 bytes from 0 over 1 to 2, beside a message of 6 bytes from 1 to 2. Until 4 s they
    are on other links, and 4 bytes of the message are through; then both want 1 to 2, half each: the
    other 2 until 8 s, and of the broadcast's 4 the last 2 until 10 s."""
    g = Graph(3)
    g.op("bcast", "collective", "broadcast", (0, 1, 2), "a", nbytes=4)
    g.op("send", "p2p", "send", (1, 2), "b", nbytes=6)
    ends = {s.name: s.end_s for s in run(g.build(), backend="gloo").spans}
    assert ends == pytest.approx({"bcast": 10.0, "send": 8.0})


def test_the_order_of_a_group_is_that_of_its_ranks() -> None:
    """Ranks 0 and 2 on one switch, 1 and 3 on the other: a ring in rank order crosses the trunk with
    every step, two each way; NCCL's goes along the machine, one each way."""
    g = Graph(4)
    g.collective("all_gather", "call", (2, 0, 3, 1), 5, "", "out")
    box = two_switches(4, trunk=1.0)
    placement = (0, 2, 1, 3)
    gloo, nccl = (
        simulate(g.build(), box, UnitCosts(), placement=placement, backend=name).makespan_s
        for name in ("gloo", "nccl")
    )
    assert (gloo, nccl) == (pytest.approx(2 * 15), pytest.approx(15))


def test_steady_states_with_calls_of_several_rounds() -> None:
    """Skipping whole periods changes nothing; a message beside the rounds shares links."""
    g = Graph(4)
    for r in range(4):
        g.compute("start", r, 1, writes=["x"])
    g.section("start", 0)
    for r in range(4):
        g.compute("step", r, 3, reads=["x#-1"], writes=["y"])
    g.collective("all_to_all", "swap", range(4), 12, "y", "x")
    g.send("aside", 1, 3, 7, "y", "w")
    g.section("loop", 1, 60)
    assert run(g.build(), backend="gloo").repeats  # compared with the whole there


# ------------------------------------------------------------------------------------------------ TCP


def test_headers_and_acknowledgements() -> None:
    """1448 of 1514 bytes are payload. One way: S x 1514/1448. Both ways: the link also carries 66 bytes
    back for every two packets that come: S x (1514/1448 + 66/2896)."""
    assert pytest.approx(1514 / 1448) == WIRE_SHARE
    assert pytest.approx(66 / 2896) == ACK_SHARE
    network = TcpNetwork(Topology.uniform(3))
    g = Graph(3)
    g.op("one", "p2p", "send", (0, 1), "a", nbytes=1000)
    assert run(g.build(), network, backend="gloo").makespan_s == pytest.approx(1000 * WIRE_SHARE)
    trace = run(one_call("permute", 3, 1000), network, backend="gloo")
    assert trace.makespan_s == pytest.approx(1000 * (WIRE_SHARE + ACK_SHARE))


def test_an_idle_link_sends_its_bucket_at_once() -> None:
    """Links of 1 GB/s with a bucket of 5 GB, messages of 20 GB on the wire from 0 to 1, each behind 3 s
    of fixed cost. The first finds full buckets: 3 + 15 s. The second finds what came in during its own
    3 s: 3 + 17 s. The third is sent after 60 s of computing, when they are full again: 3 + 15 s."""
    g = Graph(2)
    g.compute("start", 0, 1, writes=["x"])
    size = round(20e9 / WIRE_SHARE)
    for name in ("first", "second"):
        g.send(name, 0, 1, size, "x", name)
    g.compute("pause", 0, 60, reads=["x"], writes=["late"])
    g.send("third", 0, 1, size, "late", "third")
    network = TcpNetwork(Topology.uniform(2, bandwidth_bytes_per_s=1e9), bucket_bytes=5e9)
    trace = run(g.build(), network, UnitCosts(fixed_s=3.0), backend="gloo")
    spans = {s.name: s.end_s - s.start_s for s in trace.spans if s.kind == "p2p"}
    assert spans == pytest.approx({"first": 18.0, "second": 20.0, "third": 18.0}, rel=1e-6)
