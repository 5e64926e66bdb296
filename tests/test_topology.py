# ruff: noqa: E501 - one case per line reads as a table
"""Topology files: the shipped ones, every way to write one wrong, and the measured tables."""

import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from paradiff.config import ConfigError, available
from simulator.gpu import Gpu, load_gpu
from simulator.network import Flow, Network, simulate_flows
from simulator.topology import CollectiveTable, Node, Topology, TopologyFile, expand, load_topology

GOOD = """\
name: test
gpu: l40
nodes:
  - {name: host0, gpus: [gpu0..gpu3], host_memory: 80 GB/s}
peer_to_peer: false
switches: [rc0, rc1]
links:
  - {ends: [gpu0..gpu1, rc0], kind: pcie4-x16, bandwidth: 26 GB/s, latency: 2 us}
  - {ends: [gpu2..gpu3, rc1], kind: pcie4-x16, bandwidth: 26 GB/s, latency: 2 us}
  - {ends: [rc0, rc1], kind: upi, bandwidth: 20 GB/s, latency: 1 us, duplex: half}
source: a test
"""
TABLE = "collectives:\n  - {kind: all_to_all, ranks: 2, source: x, table: [[1 KiB, 1 us]]}\n"


def complaint(tmp_path: Path, text: str) -> str:
    file = tmp_path / "box.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_topology(file)
    return str(error.value).replace(f"{tmp_path}/", "")


def test_a_file_becomes_hardware(tmp_path: Path) -> None:
    file = tmp_path / "box.yaml"
    file.write_text(GOOD.replace("[gpu0..gpu3]", "[gpu0..gpu2, {gpu3: l40s}]"))
    topology = load_topology(file)
    assert topology.gpus == ("gpu0", "gpu1", "gpu2", "gpu3")
    assert topology.profiles == ("l40", "l40", "l40", "l40s")
    assert topology.nodes[0].host_memory_bytes_per_s == 80e9
    assert [(x.a, x.b, x.bandwidth_bytes_per_s, x.duplex) for x in topology.links] == [
        ("gpu0", "rc0", 26e9, "full"),
        ("gpu1", "rc0", 26e9, "full"),
        ("gpu2", "rc1", 26e9, "full"),
        ("gpu3", "rc1", 26e9, "full"),
        ("rc0", "rc1", 20e9, "half"),
    ]
    assert sorted(topology.graph().neighbors("rc0")) == ["gpu0", "gpu1", "rc1"]


def test_a_link_may_have_another_rate_back(tmp_path: Path) -> None:
    """gpu0 sends 26 GB into rc0 in a second and takes 13 in two: its own link lets 6.5 GB/s down."""
    file = tmp_path / "box.yaml"
    cable = (
        "{ends: [gpu0, rc0], kind: x, bandwidth: 26 GB/s, bandwidth_back: 6.5 GB/s, latency: 0 s}"
    )
    other = "{ends: [gpu1, rc0], kind: x, bandwidth: 26 GB/s, latency: 0 s}"
    head, _, tail = GOOD.replace("false", "true").partition("  - {ends: [gpu0..gpu1")
    file.write_text(f"{head}  - {cable}\n  - {other}\n{tail.partition(chr(10))[2]}")
    box = load_topology(file)
    assert box.links[0].rate_text == "26 GB/s (back 6.5)"
    assert [box.links[0].rate_from(end) for end in ("gpu0", "rc0")] == [26e9, 6.5e9]
    assert simulate_flows(box, [Flow(0, 1, 26e9), Flow(1, 0, 13e9)]) == pytest.approx((1.0, 2.0))
    wrong = file.read_text().replace(
        "bandwidth_back: 6.5 GB/s", "bandwidth_back: 1 GB/s, duplex: half"
    )
    assert "two rates ('half duplex'), allowed: duplex: full" in complaint(tmp_path, wrong)


COMPACT = """\
name: rails
gpu: unit
nodes:
  - {name: host0..host1, gpus: [gpu0..gpu3], memory_at: [rc0..rc1]}
peer_to_peer: true
switches: [nvswitch0..nvswitch1, nic0..nic3, rail0..rail1, rc0..rc1]
links:
  - {ends: [gpu0..gpu3, nvswitch0..nvswitch1], kind: nvlink, bandwidth: 4 B/s, latency: 0 s}
  - {ends: [gpu0..gpu3, nic0..nic3], kind: pcie5-x16, bandwidth: 2 B/s, latency: 0 s}
  - {ends: [nic0..nic2/2, rail0], kind: ib, bandwidth: 1 B/s, latency: 0 s}
  - {ends: [nic1..nic3/2, rail1], kind: ib, bandwidth: 1 B/s, latency: 0 s}
  - {ends: [rc0..rc1, nic0..nic3], kind: pcie5-x16, bandwidth: 2 B/s, latency: 0 s}
source: a test
"""


def test_many_machines_in_few_lines(tmp_path: Path) -> None:
    """Two hosts of two GPUs: runs of two to a switch and a root complex, every second NIC a rail."""
    file = tmp_path / "rails.yaml"
    file.write_text(COMPACT)
    box = load_topology(file)
    assert [(n.name, n.gpus, n.memory_at) for n in box.nodes] == [
        ("host0", ("gpu0", "gpu1"), ("rc0",)),
        ("host1", ("gpu2", "gpu3"), ("rc1",)),
    ]
    cables = [(link.a, link.b) for link in box.links]
    assert cables[:4] == [
        ("gpu0", "nvswitch0"),
        ("gpu1", "nvswitch0"),
        ("gpu2", "nvswitch1"),
        ("gpu3", "nvswitch1"),
    ]
    assert cables[4:8] == [(f"gpu{i}", f"nic{i}") for i in range(4)]
    assert cables[8:12] == [(f"nic{i}", f"rail{i % 2}") for i in (0, 2, 1, 3)]
    assert cables[12:] == [("rc0", "nic0"), ("rc0", "nic1"), ("rc1", "nic2"), ("rc1", "nic3")]
    assert Network(box).route(0, 2).path == ("gpu0", "nic0", "rail0", "nic2", "gpu2")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("peer_to_peer", "@peer_to_pear", "peer_to_pear: unknown key (peer_to_pear), allowed: peer_to_peer"),
        ("bandwidth: 20", "@bandwith: 20", "links.2.bandwith: unknown key (bandwith), allowed: bandwidth"),
        ("20 GB/s", "@20", "links.2.bandwidth: bandwidth has no unit (20), allowed: B/s, kB/s"),
        ("20 GB/s", "@20 GHz", "links.2.bandwidth: unknown bandwidth unit 'GHz' ('20 GHz'), allowed: B/s"),
        ("20 GB/s", "@0 GB/s", "links.2.bandwidth: bandwidth out of range ('0 GB/s'), allowed: more than zero"),
        ("20 GB/s", "@-2 GB/s", "links.2.bandwidth: bandwidth out of range ('-2 GB/s'), allowed: more than zero"),
        ("1 us", "@-1 us", "links.2.latency: time out of range ('-1 us'), allowed: zero or more"),
        ("80 GB/s", "@80 GB", "nodes.0.host_memory: unknown bandwidth unit 'GB' ('80 GB'), allowed: B/s"),
        ("half", "@both", "links.2.duplex: not allowed ('both'), allowed: 'full' or 'half'"),
        ("gpu: l40", "gpu: @l41", "gpu: unknown GPU ('l41'), allowed: l4, l40, "),
        ("[gpu0..gpu3]", "[gpu0..gpu2, @{gpu3: l4O}]", "nodes.0.gpus.1: unknown GPU ('l4O'), allowed: l4, l40, "),
        ("[gpu0..gpu3]", "[gpu0..gpu2, @{gpu3: 5}]", "nodes.0.gpus.1: not a GPU profile name"),
        ("[gpu0..gpu3]", "[@gpu3..gpu0]", "nodes.0.gpus.0: not a range ('gpu3..gpu0'), allowed: ascending"),
        ("[gpu0..gpu3]", "[@gpu0..gpu99999999]", "nodes.0.gpus.0: not a range"),
        ("[gpu0..gpu3]", "[@gpu0..x3]", "nodes.0.gpus.0: not a name ('gpu0..x3')"),
        ("[gpu0..gpu3]", "@[]", "nodes.0.gpus: not allowed ([]), allowed: a longer list"),
        ("[gpu0..gpu3]", "[gpu0..gpu3, @gpu1]", "nodes.0.gpus.1: duplicate name ('gpu1'), allowed: each name once"),
        ("[rc0, rc1]\n", "[rc0, rc1, @rc0]\n", "switches.2: duplicate name ('rc0')"),
        ("[rc0, rc1]\n", "[rc0, rc1, @host0]\n", "switches.2: duplicate name ('host0')"),
        ("gpu2..gpu3, rc1", "@gpu2..gpu4, rc1", "links.1.ends.0: link to nowhere ('gpu4'), allowed: gpu3, "),
        ("gpu2..gpu3, rc1", "gpu2..gpu3, @rc2", "links.1.ends.1: link to nowhere ('rc2'), allowed: rc1, "),
        ("[gpu2..gpu3, rc1", "@[gpu0..gpu2, rc0..rc1", "links.1.ends: uneven ranges ('3 and 2 names'), allowed: the longer a multiple of the shorter"),
        ("name: host0, gpus: [", "name: host0..host2, gpus: @[", "nodes.0.gpus: uneven ranges ('4 and 3 names'), allowed: the longer a multiple of the shorter"),
        ("host_memory", "memory_at: [@rc2], host_memory", "nodes.0.memory_at.0: unknown switch ('rc2'), allowed: rc1, rc0"),
        ("[gpu0..gpu3]", "[@gpu0..gpu3/0]", "nodes.0.gpus.0: not a name ('gpu0..gpu3/0')"),
        ("[gpu2..gpu3, rc1", "@[gpu2..gpu3, gpu2", "links.1.ends: link from a vertex to itself ('gpu2, gpu2')"),
        ("source", "  - {ends: @[rc1, rc0], kind: x, bandwidth: 1 B/s, latency: 0 s}\nsource", "links.3.ends: duplicate link ('rc1, rc0')"),
        ("[rc0, rc1], kind", "@[rc0, gpu0], kind", "links.2.ends: duplicate link ('rc0, gpu0')"),
        ("[rc0, rc1], kind", "[gpu0, gpu1], kind", "box.yaml:8:3: links: not connected, separate parts: gpu0, gpu1, rc0; gpu2, gpu3, rc1, allowed: links that join them"),
        ("source: a test\n", "", "box.yaml:1:1: key missing (source)"),
        ("source: a test\n", "source: a test\n@gpu: l40\n", "duplicate key (gpu), allowed: each key once"),
        ("source", TABLE.replace("1 KiB", "@1024") + "source", "collectives.0.table.0.0: size has no unit (1024), allowed: B, "),
        ("source", TABLE.replace("]]", "], [@1 KiB, 2 us]]") + "source", "collectives.0.table.1.0: sizes out of order (1024.0), allowed: ascending sizes"),
        ("source", TABLE.replace("1 us", "@0 us") + "source", "collectives.0.table.0.1: time out of range ('0 us'), allowed: more than zero"),
        ("source", TABLE.replace("all_to_all", "@alltoall") + "source", "collectives.0.kind: not allowed ('alltoall'), allowed: 'all_gather'"),
        ("source", TABLE.replace("ranks: 2", "ranks: 2, scope: @[gpu0, gpu7]") + "source", "collectives.0.scope: unknown GPU ('gpu7'), allowed: gpu3"),
        ("source", TABLE.replace("ranks: 2", "ranks: 2, scope: @[gpu0]") + "source", "collectives.0.scope: wrong number of GPUs (1), allowed: 2 names"),
    ],
)  # fmt: skip
def test_bad_files_name_place_value_and_choice(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    """``@`` marks the place that the message must name; without it ``says`` has the place."""
    position = GOOD.rindex(old) if old == "source" else GOOD.index(old)
    text = GOOD[:position] + new + GOOD[position + len(old) :]
    if "@" in text:
        before = text[: text.index("@")]
        column = len(before) - before.rfind("\n")
        says = f"box.yaml:{before.count(chr(10)) + 1}:{column}: {says}"
    assert complaint(tmp_path, text.replace("@", "")).startswith(says)


def test_what_if_overrides(tmp_path: Path) -> None:
    fast = load_topology("pcie8", ["links.2.bandwidth=40 GB/s", "peer_to_peer=true"])
    assert [k.bandwidth_bytes_per_s for k in fast.links if k.kind == "upi"] == [40e9]
    assert fast.peer_to_peer
    with pytest.raises(
        ConfigError, match=r"--set links.2.bandwith=1 GB/s: unknown path .* bandwidth"
    ):
        load_topology("pcie8", ["links.2.bandwith=1 GB/s"])
    with pytest.raises(
        ConfigError, match=r"--set gpu=l41: gpu: unknown GPU \('l41'\), allowed: l4, l40"
    ):
        load_topology("pcie8", ["gpu=l41"])


def test_names_and_ranges() -> None:
    assert expand("gpu8..gpu11") == ("gpu8", "gpu9", "gpu10", "gpu11")
    assert expand("rc0") == ("rc0",)
    for bad in ("gpu0..gpu", "gpu0...gpu3", "", "a b", "gpu0..cpu3", "-x"):
        with pytest.raises(ValueError, match="allowed: gpu0, or a range"):
            expand(bad)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"profiles": ("unit",)}, "2 GPUs but 1 profiles"),
        ({"nodes": (Node(name="host0", gpus=("gpu0",)),)}, "each GPU belongs to one node"),
        ({"switches": ()}, "link to 'switch'"),
        (
            {"nodes": (Node(name="host0", gpus=("gpu0", "gpu1"), memory_at=("rc",)),)},
            "memory at 'rc'",
        ),
    ],
)
def test_topologies_built_in_code_are_checked(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(Topology.uniform(2), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan])
def test_links_need_bandwidth(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="bandwidth > 0"):
        Topology.uniform(2, bandwidth_bytes_per_s=bandwidth)


class TestCollectiveTables:
    table = CollectiveTable(
        kind="all_gather", ranks=2, sizes=(1e3, 1e5, 1e6), seconds=(1e-6, 4e-6, 2e-6)
    )

    def test_points_are_kept_and_kinks_with_them(self) -> None:
        assert [self.table.time_s(s) for s in (1e3, 1e5, 1e6)] == pytest.approx([1e-6, 4e-6, 2e-6])

    def test_between_points_a_latency_plus_bytes_over_a_bandwidth(self) -> None:
        # 9900 of the 99000 bytes from 10^3 to 10^5 are a tenth; from 1 to 4 us it is 1.3 us.
        assert self.table.time_s(10_900) == pytest.approx(1.3e-6, rel=1e-12)

    @pytest.mark.parametrize("nbytes", [0, 1, 999])
    def test_below_a_smallest_size_of_few_bytes_there_is_its_latency(self, nbytes: float) -> None:
        assert self.table.covers(nbytes)
        assert self.table.time_s(nbytes) == 1e-6

    @pytest.mark.parametrize("nbytes", [0, 65_536, 99_999, 1_000_001, 3e6])
    def test_outside_its_sizes_it_says_nothing(self, nbytes: float) -> None:
        large = replace(self.table, sizes=(1e5, 1e6), seconds=(4e-6, 2e-6))
        assert not large.covers(nbytes)
        with pytest.raises(ValueError, match="all_gather was measured from 100000 B to 1000000 B"):
            large.time_s(nbytes)
        assert large.covers(1e5)
        assert large.covers(1e6)

    def test_the_most_particular_table_wins(self) -> None:
        gpus = ("gpu0", "gpu1", "gpu2", "gpu3")
        values: list[tuple[object, float]] = [("any", 3.0), ("node", 2.0), (("gpu0", "gpu1"), 1.0)]
        tables = tuple(
            CollectiveTable(
                kind="all_gather", ranks=2, sizes=(1.0,), seconds=(t,), scope=scope, source=str(t)  # type: ignore[arg-type]
            )
            for scope, t in values
        )  # fmt: skip
        topology = Topology(
            name="t",
            gpus=gpus,
            profiles=("unit",) * 4,
            nodes=(Node(name="a", gpus=gpus[:3]), Node(name="b", gpus=gpus[3:])),
            links=(),
            collectives=tables,
        )
        assert topology.measured_collective("all_gather", (1, 0), 1) == (1.0, "1.0")
        assert topology.measured_collective("all_gather", (1, 2), 1) == (2.0, "2.0")
        assert topology.measured_collective("all_gather", (0, 3), 1) == (3.0, "3.0")
        assert topology.measured_collective("all_gather", (0, 1), 2) is None  # its one size is 1
        assert topology.measured_collective("all_gather", (0, 1, 2), 1) is None
        assert topology.measured_collective("all_reduce", (0, 1), 1) is None


PROVENANCE = re.compile(r"(measured|spec|transferred|assumed): \S")


class TestShipped:
    @pytest.mark.parametrize("name", available("topologies"))
    def test_topologies(self, name: str) -> None:
        topology = load_topology(name)
        assert topology.name == name
        network = Network(topology)
        count = len(topology.gpus)
        some = range(count) if count <= 72 else (0, 1, 9, count - 1)
        for i in some:
            for j in some:
                route = network.route(i, j)
                assert (route.path[0], route.path[-1]) == (topology.gpus[i], topology.gpus[j])
                assert not set(route.path[1:-1]) & set(topology.gpus)

    @pytest.mark.parametrize("name", available("topologies"))
    def test_every_link_and_table_says_what_it_rests_on(self, name: str) -> None:
        from paradiff.config import find, load_yaml

        file = load_yaml(find("topologies", name), TopologyFile)
        for entry in (*file.links, *file.collectives):
            assert PROVENANCE.match(entry.source), entry
        for node in file.nodes:
            assert node.host_memory is None or PROVENANCE.match(node.source), node

    @pytest.mark.parametrize("name", available("topologies"))
    def test_no_table_beats_its_links(self, name: str) -> None:
        """A measured collective cannot move more per second than all ports together (10 % slack:
        the links are measurements too). In-switch reduction halves what an all-reduce sends."""
        topology = load_topology(name)
        port = max(link.bandwidth_bytes_per_s for link in topology.links)
        for table in topology.collectives:
            sent = (table.ranks - 1) / table.ranks
            for size, seconds in zip(table.sizes, table.seconds, strict=True):
                assert size * sent / seconds < 1.1 * port, (table.kind, table.ranks, size)

    def test_the_box_of_the_paper(self) -> None:
        network = Network(load_topology("pcie8"))
        far, near = network.route(0, 7), network.route(0, 3)
        assert far.path == ("gpu0", "rc0", "socket0", "socket1", "rc1", "gpu7")
        assert near.path == ("gpu0", "rc0", "socket0", "rc0", "gpu3")
        assert far.staged
        assert near.staged
        assert far.latency_s == pytest.approx(10e-6)  # (2 + 1 + 2) us for each of two copies
        assert near.latency_s == pytest.approx(8e-6)
        # One flow alone: PCIe 22 GB/s near; UPI 20 GB/s far; host memory 300 / 2 limits neither.
        assert network.rates((near.id,)) == (22e9,)
        assert network.rates((far.id,)) == (20e9,)
        # Eight GPUs in a ring: 8 flows of weight 2 on 300 GB/s. The two that cross the sockets get the
        # 20 GB/s of the UPI; the other six could have (300 - 2 x 40) / 12 = 18.3 GB/s, which is less, so
        # all eight share host memory: 300 / 16 = 18.75 GB/s each.
        ring = tuple(network.route(i, (i + 1) % 8).id for i in range(8))
        assert network.rates(ring) == pytest.approx([18.75e9] * 8)

    def test_two_boxes(self) -> None:
        network = Network(load_topology("pcie8x2"))
        route = network.route(4, 15)
        assert route.path == (
            "gpu4", "rc1", "socket1", "socket0", "rc0", "nic0", "ethernet",
            "nic1", "rc2", "socket2", "socket3", "rc3", "gpu15",
        )  # fmt: skip
        # To the other box: 2 (GPU) + 1 (UPI) + 2 (adapter) + 2 (network), and back in: 14 us, twice.
        assert route.latency_s == pytest.approx(28e-6)
        assert network.rates((route.id,)) == (12e9,)
        used = [network.resources[r].name for r, weight in route.resources if weight == 2]
        assert used == ["host0.memory", "host1.memory"]

    def test_the_catalogue(self) -> None:
        """The boxes of the catalogue; two boxes of eight L40 on 100 Gbit/s are pcie8x2. Each knows
        where its host memory hangs, so that loads of weights share what they cross: on a processor.
        Those of one PCIe tree have root complexes, those of NVLink a plane, those of several machines
        an adapter for each way out."""
        pcie = (
            "pcie8 pcie8-l40s-alltoall pcie8-l20 pcie4-l20 pcie4-t4 pcie2-3090 pcie4-a100 pcie8x2"
            " pcie4-a5000 pcie4-l40s-l4 pcie8-a6000"
        )
        nvlink = "nvlink8-a800 nvlink8-h20 nvlink8-h200 nvlink8x8-h100 nvl72"
        for box in map(load_topology, (*pcie.split(), *nvlink.split())):
            assert all(node.memory_at for node in box.nodes), box.name
            kinds = {re.sub(r"\d+$", "", name) for name in box.switches}
            processors = {re.sub(r"\d+$", "", n) for node in box.nodes for n in node.memory_at}
            assert processors in ({"socket"}, {"grace"}), box.name
            expected = {"nvswitch"} if box.name.startswith("nv") else {"rc"}
            expected |= {"nic"} if box.name in ("pcie8x2", "nvlink8x8-h100", "nvl72") else set()
            assert kinds >= processors | expected, box.name

    @pytest.mark.parametrize("name", ["nvlink8x8-h100", "nvl72"])
    def test_big_files_load_at_once(self, name: str) -> None:
        seconds = []
        for _ in range(3):
            start = time.process_time()
            load_topology(name)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.5

    def test_eight_boxes_on_rails(self) -> None:
        """Same position: over the rail of that position, two adapters and one switch. Another
        position: up to the spine. 47 GB/s either way, and 64 pairs on 64 adapters do not disturb
        one another."""
        network = Network(load_topology("nvlink8x8-h100"))
        assert network.route(3, 11).path == (
            "gpu3", "plx3", "nic3", "rail3", "nic11", "plx11", "gpu11",
        )  # fmt: skip
        assert network.route(3, 12).path[3:6] == ("rail3", "spine", "rail4")
        assert network.route(0, 7).path == ("gpu0", "nvswitch0", "gpu7")
        shifted = tuple(network.route(i, (i + 8) % 64).id for i in range(64))
        assert network.rates(shifted) == (47e9,) * 64

    def test_without_peers_two_a100_share_the_uplink_of_their_switch(self) -> None:
        """0->1->0 without peer-to-peer: two flows up and two down 25 GB/s, 12.5 each."""
        network = Network(load_topology("pcie4-a100", ["peer_to_peer=false"]))
        up = ("gpu0", "plx0", "rc0", "socket0", "rc0", "plx0", "gpu1")
        assert network.route(0, 1).path == up
        both = (network.route(0, 1).id, network.route(1, 0).id)
        assert network.rates(both) == pytest.approx([12.5e9] * 2)

    def test_rings_over_two_sockets_of_eight_l20(self) -> None:
        """0->1->...->7->0 goes at the rate of a GPU's port, 23.7 GB/s; of 0->2->4->6->0 and 1->3->5->7->1
        two flows each way share 33.6 GB/s between the sockets, those inside a socket do not."""
        network = Network(load_topology("pcie8-l20"))
        one = tuple(network.route(i, (i + 1) % 8).id for i in range(8))
        assert network.rates(one) == pytest.approx([23.7e9] * 8)
        two = tuple(network.route(i, (i + 2) % 8).id for i in range(8))
        across = [16.8e9 if i in (2, 3, 6, 7) else 23.7e9 for i in range(8)]
        assert network.rates(two) == pytest.approx(across)

    def test_peers_turn_around_below_the_root_complex(self) -> None:
        network = Network(load_topology("pcie4-a100"))
        assert network.route(0, 1).path == ("gpu0", "plx0", "gpu1")
        assert not network.route(0, 3).staged

    def test_bridged_pairs(self) -> None:
        network = Network(load_topology("pcie4-a5000"))
        assert network.route(2, 3).path == ("gpu2", "gpu3")
        assert network.route(1, 2).path == ("gpu1", "rc0", "gpu2")
        eight = Network(load_topology("pcie8-a6000"))
        assert eight.route(6, 7).path == ("gpu6", "gpu7")
        assert eight.route(1, 4).path == ("gpu1", "rc0", "socket0", "socket1", "rc1", "gpu4")

    def test_the_table_of_the_l40s_node_is_attached(self) -> None:
        with_table, without = load_topology("pcie8-l40s-alltoall"), load_topology("pcie8")
        assert (with_table.links, with_table.nodes) == (without.links, without.nodes)
        found = with_table.measured_collective("all_to_all", tuple(range(8)), 2**24)
        assert found is not None
        assert found[0] == pytest.approx(11886e-6)  # nccl-tests, 16 MiB over 8 GPUs
        assert without.measured_collective("all_to_all", tuple(range(8)), 2**24) is None

    @pytest.mark.parametrize("name", available("gpus"))
    def test_gpus(self, name: str) -> None:
        gpu = load_gpu(name)
        assert gpu.name == name
        for dtype in ("fp16", "bf16", "fp32"):
            assert gpu.peak.of(dtype).kind == "spec"
            assert gpu.matmul.of(dtype).value <= 1.1 * gpu.peak.of(dtype).value

    def test_the_gpus_of_the_catalogue(self) -> None:
        """The GPUs that issue 4 names, besides those of the first plan."""
        older = "t4 v100 rtx2080ti rtx3090 rtx4090 a10 a6000 l4 l20 l40s"
        newer = "a100-40g a100-80g-pcie a800 h20 h100-pcie h800 b200 gb200"
        assert {*older.split(), *newer.split()} <= set(available("gpus"))

    def test_a_gpu_without_bf16_keeps_its_fp16_attention(self) -> None:
        """T4: bf16 is emulated at 2.46 TFLOP/s; attention is half of the fp16 products' rate."""
        from simulator.costs import chip_of

        t4 = load_gpu("t4")
        fp16, bf16 = chip_of(t4, "fp16"), chip_of(t4, "bf16")
        assert fp16.attention == bf16.attention == pytest.approx(20.9 / 41.91)
        assert bf16.sm_flops / fp16.sm_flops == pytest.approx(2.46 / 41.91)

    def test_unit_hardware(self) -> None:
        gpu = load_gpu("unit")
        assert gpu.matmul.bf16.value == gpu.memory_bandwidth.value == 1.0
        assert gpu.launch.of("eager").value == gpu.kernel_floor.value == 0.0


class TestGpuFiles:
    def text(self) -> str:
        from paradiff.config import find

        return find("gpus", "l40").read_text()

    def refusal(self, tmp_path: Path, old: str, new: str) -> str:
        assert old in self.text()
        file = tmp_path / "card.yaml"
        file.write_text(self.text().replace(old, new, 1))
        with pytest.raises(ConfigError) as error:
            load_gpu(file)
        return str(error.value).replace(f"{tmp_path}/", "")

    def test_more_than_the_peak(self, tmp_path: Path) -> None:
        refusal = self.refusal(tmp_path, "141.5 TFLOP/s", "200 TFLOP/s")
        assert "matmul.bf16.value: more FLOP/s than the peak (200000000000000.0)" in refusal
        assert "attention.0.value: more FLOP/s" in self.refusal(tmp_path, "140.5 TF", "362 TF")
        assert "memory_bandwidth.value: more than the peak" in self.refusal(tmp_path, "728", "900")

    def test_a_number_without_source_or_kind(self, tmp_path: Path) -> None:
        refusal = self.refusal(tmp_path, 'source: "NVIDIA L40 data sheet"', 'source: ""')
        assert "memory_bandwidth_peak.source" in refusal
        assert "key missing (kind)" in self.refusal(tmp_path, "kind: spec, ", "")
        refusal = self.refusal(tmp_path, "kind: spec", "kind: guessed")
        assert "allowed: 'measured', 'spec', 'transferred' or 'assumed'" in refusal

    def test_the_attention_figure_nearest_in_width(self) -> None:
        h100 = load_gpu("h100-sxm")
        assert h100.attention_figure(64).kernel == "flash2"
        assert h100.attention_figure(128, "flash3").value == 646e12
        l40: Gpu = load_gpu("l40")
        assert [l40.attention_figure(d).head_dim for d in (40, 72, 96, 160)] == [64, 64, 64, 128]
        assert l40.attention_figure(64, "flash3").kernel == "flash2"  # it has no other

    def test_unknown_dtype_and_runtime(self) -> None:
        with pytest.raises(ValueError, match="'fp8', allowed: fp16, bf16, fp32"):
            load_gpu("l40").peak.of("fp8")
        with pytest.raises(ValueError, match="'jit', allowed: eager, compiled, cuda-graph"):
            load_gpu("l40").launch.of("jit")
