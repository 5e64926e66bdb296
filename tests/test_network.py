"""Routes, rates and finish times: closed forms first, then two independent solvers."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from simulator.network import Flow, Network, max_min_rates, simulate_flows
from simulator.topology import Link, Node, Topology

SYSTEM_PYTHON = "/usr/bin/python3"


def box(
    links: Sequence[Link],
    *,
    gpus: int = 4,
    switches: Sequence[str] = ("rc0", "rc1"),
    peer_to_peer: bool = True,
    host_memory: float = math.inf,
) -> Topology:
    names = tuple(f"gpu{i}" for i in range(gpus))
    return Topology(
        name="box",
        gpus=names,
        profiles=("unit",) * gpus,
        nodes=(Node(name="host", gpus=names, host_memory_bytes_per_s=host_memory),),
        switches=tuple(switches),
        links=tuple(links),
        peer_to_peer=peer_to_peer,
    )


def link(a: str, b: str, bandwidth: float = 1.0, **more: Any) -> Link:
    return Link(a=a, b=b, bandwidth_bytes_per_s=bandwidth, **more)


def two_sockets(**more: Any) -> Topology:
    """gpu0, gpu1 - rc0 - rc1 - gpu2, gpu3, every link 1 B/s."""
    ends = [("gpu0", "rc0"), ("gpu1", "rc0"), ("gpu2", "rc1"), ("gpu3", "rc1"), ("rc0", "rc1")]
    return box([link(a, b, latency_s=0.25, kind="pcie") for a, b in ends], **more)


class TestFinishTimes:
    def test_one_flow(self) -> None:
        # 3 bytes at 1 B/s over gpu0-rc0-gpu1, started at 2, plus two hops of 0.25: 2 + 3 + 0.5.
        assert simulate_flows(two_sockets(), [Flow(0, 1, 3, 2)]) == (5.5,)

    def test_no_bytes_take_the_latency_only(self) -> None:
        assert simulate_flows(two_sockets(), [Flow(0, 2, 0, 1)]) == (1.75,)

    def test_a_device_to_itself_takes_nothing(self) -> None:
        assert simulate_flows(two_sockets(), [Flow(1, 1, 1e9, 4)]) == (4.0,)

    def test_sharing_and_release(self) -> None:
        # Both leave gpu0 at half rate. The small one is done at 2 (1 byte at 1/2); by then the
        # large one has 2 of its 3 bytes left and takes them at full rate: 2 + 2. Latency 0.5 each.
        assert simulate_flows(two_sockets(), [Flow(0, 1, 1), Flow(0, 1, 3)]) == (2.5, 4.5)

    def test_a_flow_that_joins_later(self) -> None:
        # Alone until 1 (1 of 2 bytes), then half rate until 3 when it ends. The other moved 1 of 2
        # bytes by then and ends at 4.
        assert simulate_flows(two_sockets(), [Flow(0, 1, 2), Flow(0, 1, 2, 1)]) == (3.5, 4.5)

    def test_full_duplex_does_not_share(self) -> None:
        assert simulate_flows(two_sockets(), [Flow(0, 1, 1), Flow(1, 0, 1)]) == (1.5, 1.5)

    def test_half_duplex_shares(self) -> None:
        one = box([link("gpu0", "gpu1", duplex="half")], gpus=2, switches=())
        assert simulate_flows(one, [Flow(0, 1, 1), Flow(1, 0, 1)]) == (2.0, 2.0)

    def test_the_socket_link_is_shared(self) -> None:
        # gpu0->gpu2 and gpu1->gpu3 meet on rc0->rc1 only: half rate, three hops of latency.
        assert simulate_flows(two_sockets(), [Flow(0, 2, 1), Flow(1, 3, 1)]) == (2.75, 2.75)

    def test_infinite_bandwidth_ends_at_once(self) -> None:
        ideal = Topology.uniform(3, bandwidth_bytes_per_s=math.inf, latency_s=0.5)
        assert simulate_flows(ideal, [Flow(0, 1, 1e12), Flow(0, 2, 5, 1)]) == (0.5, 1.5)

    def test_all_to_all_on_one_switch(self) -> None:
        # n (n-1) flows of 1 byte; every port carries n-1 of them each way: n-1 seconds.
        flows = [Flow(i, j, 1) for i in range(5) for j in range(5) if i != j]
        assert simulate_flows(Topology.uniform(5), flows) == pytest.approx([4.0] * 20, rel=1e-12)

    def test_the_order_of_flows_does_not_matter(self) -> None:
        flows = [Flow(0, 2, 5), Flow(1, 3, 3, 1), Flow(1, 2, 2, 0.5), Flow(3, 0, 4)]
        forward = simulate_flows(two_sockets(), flows)
        backward = simulate_flows(two_sockets(), flows[::-1])
        assert forward == backward[::-1]


class TestHostMemory:
    @pytest.mark.parametrize(
        ("staged", "duplex", "flows", "seconds"),
        [
            (False, "full", [Flow(0, 1, 3)], 1.5),  # the switch turns it around at 2 B/s
            (True, "full", [Flow(0, 1, 3)], 3.0),  # up and down its uplink of 1 B/s each way
            (True, "full", [Flow(0, 1, 3), Flow(1, 0, 3)], 6.0),  # two share each way
            (True, "half", [Flow(0, 1, 3)], 6.0),  # up and down take from the same 1 B/s
            (True, "full", [Flow(0, 2, 3)], 3.0),  # to the other switch: up one, down the other
        ],
    )
    def test_a_switch_below_the_root_complex_cannot_turn_a_staged_transfer_around(
        self, staged: bool, duplex: Any, flows: list[Flow], seconds: float
    ) -> None:
        """gpu0, gpu1 at 2 B/s on plx0, gpu2 on plx1; both switches at 1 B/s on the root complex."""
        ends = [("gpu0", "plx0"), ("gpu1", "plx0"), ("gpu2", "plx1")]
        links = [link(a, b, 2.0, kind="pcie") for a, b in ends]
        links += [link(f"plx{i}", "rc0", kind="pcie", duplex=duplex) for i in (0, 1)]
        plain = box(links, gpus=3, switches=("plx0", "plx1", "rc0"), peer_to_peer=not staged)
        node = Node(name="host", gpus=plain.gpus, memory_at=("rc0",))
        assert simulate_flows(replace(plain, nodes=(node,)), flows) == (seconds,) * len(flows)

    def test_the_nearer_root_complex_is_taken(self) -> None:
        two = two_sockets(peer_to_peer=False)
        node = replace(two.nodes[0], memory_at=("rc0", "rc1"))
        network = Network(replace(two, nodes=(node,)))
        assert network.route(0, 1).path == ("gpu0", "rc0", "gpu1")
        assert network.route(3, 2).path == ("gpu3", "rc1", "gpu2")
        assert network.route(0, 3).path == ("gpu0", "rc0", "rc1", "gpu3")

    def test_staged_transfer(self) -> None:
        # Host memory of 1 B/s is written and read: 1/2 B/s. Two copies pay the 0.5 s each.
        staged = two_sockets(peer_to_peer=False, host_memory=1.0)
        assert simulate_flows(staged, [Flow(0, 1, 1)]) == (3.0,)

    def test_it_is_shared_by_flows_that_share_no_link(self) -> None:
        # Memory of 2 B/s, two flows of weight 2: 2x + 2x = 2, half a byte per second each.
        staged = two_sockets(peer_to_peer=False, host_memory=2.0)
        assert simulate_flows(staged, [Flow(0, 1, 1), Flow(2, 3, 1)]) == (3.0, 3.0)

    def test_nvlink_never_crosses_it(self) -> None:
        links = [*two_sockets().links, link("gpu0", "gpu1", kind="nvlink")]
        staged = box(links, peer_to_peer=False, host_memory=1.0)
        assert simulate_flows(staged, [Flow(0, 1, 1)]) == (1.0,)

    def test_a_transfer_between_nodes_crosses_both(self) -> None:
        ends = [("gpu0", "nic"), ("gpu1", "nic")]
        cluster = Topology(
            name="cluster",
            gpus=("gpu0", "gpu1"),
            profiles=("unit", "unit"),
            nodes=(
                Node(name="a", gpus=("gpu0",), host_memory_bytes_per_s=1.0),
                Node(name="b", gpus=("gpu1",), host_memory_bytes_per_s=0.5),
            ),
            switches=("nic",),
            links=tuple(link(a, b, kind="pcie") for a, b in ends),
            peer_to_peer=False,
        )
        network = Network(cluster)
        names = [network.resources[r].name for r, _ in network.route(0, 1).resources]
        assert names == ["gpu0->nic", "nic->gpu1", "a.memory", "b.memory"]
        assert simulate_flows(cluster, [Flow(0, 1, 1)]) == (4.0,)  # 0.5 B/s written and read


class TestRoutes:
    def test_wide_links_beat_near_ones(self) -> None:
        # A 1 MiB message: 1.05 ms over the direct 1 GB/s link, 0.11 ms over two links of 20 GB/s.
        links = [link("gpu0", "gpu1", 1e9), link("gpu0", "rc0", 20e9), link("gpu1", "rc0", 20e9)]
        assert Network(box(links, gpus=2, switches=["rc0"])).route(0, 1).path == (
            "gpu0", "rc0", "gpu1",
        )  # fmt: skip

    def test_the_routing_message_has_one_mebibyte(self) -> None:
        """At 1 and 2 GB/s it takes 1048.576 and 524.288 us, so the wide way wins with up to 524.288 us
        more of latency."""
        for more_s, switch in ((524.2e-6, True), (524.4e-6, False)):
            network = Network(
                box(
                    [
                        link("gpu0", "gpu1", 1e9),
                        link("gpu0", "rc0", 2e9, latency_s=more_s),
                        link("rc0", "gpu1", 2e9 * 1e6),
                    ],
                    gpus=2,
                )
            )
            assert ("rc0" in network.route(0, 1).path) == switch

    def test_nvlink_pair_beats_pcie(self) -> None:
        links = [*two_sockets().links, link("gpu0", "gpu1", 40.0, kind="nvlink")]
        assert Network(box(links)).route(0, 1).path == ("gpu0", "gpu1")

    def test_a_gpu_is_not_passed_through_while_there_is_another_way(self) -> None:
        # gpu0=gpu1=gpu2 by NVLink is wider, but gpu1 forwards nothing for others.
        fast = [link("gpu0", "gpu1", 1e9, kind="nvlink"), link("gpu1", "gpu2", 1e9, kind="nvlink")]
        network = Network(box([*two_sockets().links, *fast]))
        assert network.route(0, 2).path == ("gpu0", "rc0", "rc1", "gpu2")

    def test_a_gpu_is_passed_through_where_there_is_no_other_way(self) -> None:
        chain = [link("gpu0", "gpu1"), link("gpu1", "gpu2")]
        assert Network(box(chain, gpus=3, switches=())).route(0, 2).path == ("gpu0", "gpu1", "gpu2")

    def test_ties_go_by_name(self) -> None:
        for order in (("rc0", "rc1"), ("rc1", "rc0")):
            links = [link(gpu, switch) for switch in order for gpu in ("gpu1", "gpu0")]
            path = Network(box(links, gpus=2, switches=order)).route(0, 1).path
            assert path == ("gpu0", "rc0", "gpu1")

    def test_ids_count_up_and_answers_are_kept(self) -> None:
        network = Network(two_sockets())
        assert network.route(0, 1).id == 0
        assert network.route(1, 0).id == 1
        assert network.route(0, 1) is network.route(0, 1)
        assert network.route(2, 2).resources == ()
        assert network.rates((network.route(2, 2).id,)) == (math.inf,)

    def test_no_route(self) -> None:
        with pytest.raises(ValueError, match="no route from gpu0 to gpu1"):
            Network(box([], gpus=2)).route(0, 1)


class TestMaxMin:
    def test_the_textbook_case(self) -> None:
        # Resource 0 (1 B/s) holds flows A, B; resource 1 (2 B/s) holds B, C. A = B = 1/2, C = 3/2.
        flows = [((0, 1.0),), ((0, 1.0), (1, 1.0)), ((1, 1.0),)]
        assert max_min_rates(flows, [1.0, 2.0]) == (0.5, 0.5, 1.5)

    def test_weights_are_consumption_not_priority(self) -> None:
        # x + 2x = 1: both get 1/3.
        assert max_min_rates([((0, 1.0),), ((0, 2.0),)], {0: 1.0}) == pytest.approx((1 / 3, 1 / 3))

    def test_rounding_does_not_part_equal_rates(self) -> None:
        # Resource 0 loses 3 x 0.1 to one flow of weight 3, resource 1 loses 0.1 three times; what
        # is left differs in the last bit (0.7 and 0.7000000000000001). Both fill in one round.
        slow = [
            ((0, 3.0), (2, 1.0)),
            ((1, 1.0), (3, 1.0)),
            ((1, 1.0), (4, 1.0)),
            ((1, 1.0), (5, 1.0)),
        ]
        rates = max_min_rates([*slow, ((0, 1.0),), ((1, 1.0),)], [1.0, 1.0, 0.1, 0.1, 0.1, 0.1])
        assert rates[:4] == (0.1, 0.1, 0.1, 0.1)
        assert rates[4] == rates[5] == pytest.approx(0.7)

    def test_no_flows_and_no_resources(self) -> None:
        assert max_min_rates([], []) == ()
        assert max_min_rates([()], []) == (math.inf,)


Case = tuple[list[tuple[tuple[int, float], ...]], list[float]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 6 flows with weights 1 and 2 over up to 5 resources with small capacities."""
    count = draw(st.integers(1, 5))
    capacities = [float(draw(st.integers(1, 12))) for _ in range(count)]
    usage = st.dictionaries(st.integers(0, count - 1), st.sampled_from([1.0, 2.0]), min_size=1)
    flows = draw(st.lists(usage.map(lambda u: tuple(sorted(u.items()))), min_size=1, max_size=6))
    return flows, capacities


def lexicographic_max_min(
    flows: list[tuple[tuple[int, float], ...]], capacities: list[float]
) -> list[float]:
    """The definition, by linear programs: raise the smallest rate, then the next smallest, ...

    In each round the common floor t of the flows still open is maximised; an open flow that cannot
    exceed t in any solution with that floor is settled at t.
    """
    n = len(flows)
    use = np.zeros((len(capacities), n))
    for i, usage in enumerate(flows):
        for resource, weight in usage:
            use[resource, i] = weight
    settled: dict[int, float] = {}

    def solve(goal: np.ndarray, floor: float | None) -> Any:
        """Maximise goal over (rates, t); open flows >= t, or >= floor where it is given."""
        a, b = [np.append(row, 0.0) for row in use], list(capacities)
        for i in range(n):
            row = np.zeros(n + 1)
            row[i] = -1.0
            if i not in settled and floor is None:
                row[n] = 1.0
            a.append(row)
            b.append(-settled.get(i, floor or 0.0) * (1 - 1e-9))
        result = linprog(-goal, A_ub=np.array(a), b_ub=b, bounds=[(0, None)] * (n + 1))
        assert result.status == 0
        return result

    while len(settled) < n:
        objective = np.zeros(n + 1)
        objective[n] = 1.0
        floor = float(solve(objective, None).x[n])
        for i in [i for i in range(n) if i not in settled]:
            objective = np.zeros(n + 1)
            objective[i] = 1.0
            if solve(objective, floor).x[i] <= floor * (1 + 1e-6):
                settled[i] = floor
    return [settled[i] for i in range(n)]


@settings(max_examples=60)
@given(cases())
def test_against_the_definition_by_linear_programs(case: Case) -> None:
    assert max_min_rates(*case) == pytest.approx(lexicographic_max_min(*case), rel=1e-5)


@settings(max_examples=300)
@given(cases())
def test_every_flow_has_a_bottleneck(case: Case) -> None:
    """Rates are max-min fair iff they fit and each flow crosses a full resource on which no other
    flow is faster (Bertsekas and Gallager, Data Networks, 6.5.2)."""
    flows, capacities = case
    rates = max_min_rates(flows, capacities)
    load = [
        math.fsum(w * x for u, x in zip(flows, rates, strict=True) for r, w in u if r == resource)
        for resource in range(len(capacities))
    ]
    assert all(x <= c * (1 + 1e-9) for x, c in zip(load, capacities, strict=True))
    for usage, rate in zip(flows, rates, strict=True):
        full = [r for r, _ in usage if load[r] >= capacities[r] * (1 - 1e-9)]
        fastest = [max(x for u, x in zip(flows, rates, strict=True) if r in dict(u)) for r in full]
        assert any(rate >= top * (1 - 1e-9) for top in fastest)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Two or three switches in a row, two to six GPUs hung on them, some pairs bridged."""
    switches = [f"sw{i}" for i in range(draw(st.integers(1, 3)))]
    count = draw(st.integers(2, 6))
    speed = st.sampled_from([1e6, 2e6, 3e6, 5e6, 7e6])
    duplex = st.sampled_from(["full", "half"])
    ends = list(pairwise(switches))
    ends += [(f"gpu{i}", draw(st.sampled_from(switches))) for i in range(count)]
    links = [link(a, b, draw(speed), kind="pcie", duplex=draw(duplex)) for a, b in ends]
    if draw(st.booleans()):
        links.append(link("gpu0", "gpu1", draw(speed), kind="nvlink"))
    return box(
        links,
        gpus=count,
        switches=switches,
        peer_to_peer=draw(st.booleans()),
        host_memory=draw(st.sampled_from([3e6, 8e6, 1e9])),
    )


@st.composite
def traffic(draw: st.DrawFn) -> tuple[Topology, list[Flow]]:
    topology = draw(topologies())
    device = st.integers(0, len(topology.gpus) - 1)
    pairs = st.tuples(device, device).filter(lambda p: p[0] != p[1])
    flow = st.builds(
        lambda pair, size, start: Flow(*pair, size * 1000.0, start / 8),
        pairs, st.integers(1, 5000), st.integers(0, 16),
    )  # fmt: skip
    return topology, draw(st.lists(flow, min_size=1, max_size=8))


@settings(max_examples=60)
@given(topologies(), st.randoms(use_true_random=False))
def test_routes_do_not_depend_on_what_was_asked_before(topology: Topology, pick) -> None:  # type: ignore[no-untyped-def]
    """A search goes on where the last one from the same GPU stopped: as good as one of its own."""
    shared = Network(topology)
    pairs = [(a, b) for a in range(len(topology.gpus)) for b in range(len(topology.gpus))]
    for pair in pick.sample(pairs, len(pairs)):
        found, alone = shared.route(*pair), Network(topology).route(*pair)
        assert replace(found, id=0) == replace(alone, id=0)


@settings(max_examples=150)
@given(traffic())
def test_rates_of_the_network_equal_one_plain_solve(case: tuple[Topology, list[Flow]]) -> None:
    """Splitting into groups, merging equal routes and remembering change nothing."""
    topology, flows = case
    network = Network(topology)
    routes = [network.route(flow.source, flow.destination) for flow in flows]
    plain = max_min_rates([route.resources for route in routes], network.capacities)
    for length in range(1, len(routes) + 1):  # fill the caches with prefixes first
        rates = network.rates(tuple(route.id for route in routes[:length]))
    assert rates == pytest.approx(plain, rel=1e-12)


def exact_finish(topology: Topology, flows: list[Flow]) -> list[float]:
    """Finish times in exact arithmetic: rational water-filling, one resource after the other."""
    network = Network(topology)
    routes = [network.route(flow.source, flow.destination) for flow in flows]
    left = {i: Fraction(flow.nbytes) for i, flow in enumerate(flows)}
    end: dict[int, Fraction] = {}
    now = Fraction(0)
    while left:
        active = [i for i in left if flows[i].start_s <= now]
        rate: dict[int, Fraction] = {}
        while len(rate) < len(active):
            levels = []
            for r, capacity in enumerate(network.capacities):
                weight = {i: Fraction(dict(routes[i].resources).get(r, 0)) for i in active}
                open_weight = sum(w for i, w in weight.items() if i not in rate)
                if open_weight and capacity < math.inf:
                    taken = sum(weight[i] * x for i, x in rate.items())
                    levels.append((Fraction(capacity) - taken) / open_weight)
            level = min(levels)
            for r, capacity in enumerate(network.capacities):
                weight = {i: Fraction(dict(routes[i].resources).get(r, 0)) for i in active}
                if capacity < math.inf:
                    used = sum(weight[i] * rate.get(i, level) for i in active)
                    if used >= Fraction(capacity):
                        rate |= {i: level for i in active if weight[i] and i not in rate}
        steps = [left[i] / rate[i] for i in active]
        steps += [Fraction(f.start_s) - now for f in flows if f.start_s > now]
        step = min(steps)
        now += step
        for i in active:
            left[i] -= rate[i] * step
            if left[i] == 0:
                end[i] = now
                del left[i]
    return [float(end[i]) for i in range(len(flows))]


@settings(max_examples=150)
@given(traffic())
def test_finish_times_against_exact_arithmetic(case: tuple[Topology, list[Flow]]) -> None:
    topology, flows = case
    assert simulate_flows(topology, flows) == pytest.approx(exact_finish(topology, flows), rel=1e-9)


def simgrid_missing() -> str | None:
    """Why SimGrid cannot be used, or None."""
    if not Path(SYSTEM_PYTHON).exists():
        return f"no {SYSTEM_PYTHON}"
    probe = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import simgrid"], capture_output=True, check=False
    )
    return None if probe.returncode == 0 else "Debian's python3-simgrid is not installed"


@pytest.mark.simgrid
def test_finish_times_against_simgrid() -> None:
    """Forty boxes with up to eight flows each, by the C++ simulator's own solver and event loop.

    Routes (weights as links that occur twice) are ours; sharing and time are SimGrid's.
    """
    if reason := simgrid_missing():
        pytest.skip(reason)
    rng = np.random.default_rng(7)
    script = Path(__file__).with_name("simgrid_flows.py")
    for _ in range(40):
        topology, flows = random_traffic(rng)
        network = Network(topology)
        entries = [
            {
                "usage": network.route(flow.source, flow.destination).resources,
                "nbytes": flow.nbytes,
                "start_s": flow.start_s,
            }
            for flow in flows
        ]
        question = json.dumps({"capacities": network.capacities, "flows": entries})
        answer = subprocess.run(
            [SYSTEM_PYTHON, str(script)], input=question, capture_output=True, text=True, check=True
        )
        line = next(line for line in answer.stdout.splitlines() if line.startswith("RESULT"))
        expected = json.loads(line.removeprefix("RESULT"))
        assert simulate_flows(topology, flows) == pytest.approx(expected, rel=1e-6)


def random_traffic(rng: np.random.Generator) -> tuple[Topology, list[Flow]]:
    """A two-socket box with random speeds, staged or not, and four to eight flows."""
    gpus = int(rng.integers(3, 7))
    ends = [(f"gpu{i}", f"rc{i % 2}") for i in range(gpus)] + [("rc0", "rc1")]
    links = [
        link(
            a, b, float(rng.integers(1, 30)) * 1e9, kind="pcie", duplex=rng.choice(["full", "half"])
        )
        for a, b in ends
    ]
    memory = float(rng.integers(10, 90)) * 1e9
    topology = box(links, gpus=gpus, peer_to_peer=bool(rng.integers(2)), host_memory=memory)
    flows = []
    for _ in range(int(rng.integers(4, 9))):
        source, destination = (int(d) for d in rng.choice(gpus, 2, replace=False))
        nbytes, start = float(rng.integers(1, 10**9)), float(rng.integers(0, 100)) / 1e3
        flows.append(Flow(source, destination, nbytes, start))
    return topology, flows


def test_equal_questions_get_byte_identical_answers_in_another_process() -> None:
    code = (
        "from simulator.network import *; from simulator.topology import Topology\n"
        "flows = [Flow(i, j, 1e6 * (i + 1) / (j + 3), i / 7) for i in range(8) for j in range(8)]\n"
        "print(simulate_flows(Topology.uniform(8, bandwidth_bytes_per_s=3e9, latency_s=1e-6), flows))"
    )
    root = str(Path(__file__).parents[1])
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": root, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(answers) == 1
