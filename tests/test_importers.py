"""Importers against files that look like the tools' own (``boxes/``), whole, odd and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paradiff.config import ConfigError
from simulator.importers.assemble import read_facts, to_yaml, topology_data, validated
from simulator.importers.bandwidth import read_nvbandwidth, read_p2p_test
from simulator.importers.cluster import cluster
from simulator.importers.lstopo import read_lstopo
from simulator.importers.machine import Facts, Machine, pcie_bytes_per_s
from simulator.importers.nccl import read_log, read_xml
from simulator.importers.nccl_tests import read_nccl_tests
from simulator.importers.reading import Report, read_report
from simulator.importers.smi import read_p2p, read_topo
from simulator.network import Network
from simulator.topology import Topology, load_topology

BOXES = Path(__file__).parent / "boxes"


def imported(tmp_path: Path, gpu: str, runs: tuple[str, ...] = (), **files: str) -> Topology:
    """The topology of some fixtures, through the YAML that a user gets."""
    facts = read_facts(
        {kind: str(BOXES / file) for kind, file in files.items()}, [str(BOXES / r) for r in runs]
    )
    target = tmp_path / "box.yaml"
    target.write_text(to_yaml(topology_data(facts, "box", gpu), ["a comment"]))
    return load_topology(target)


def rates(box: Topology) -> dict[str, float]:
    """GB/s of each link by its ends."""
    return {f"{k.a} {k.b}": round(k.bandwidth_bytes_per_s / 1e9, 2) for k in box.links}


def report(text: str) -> Report:
    return Report("file", tuple(text.split("\n")))


# ------------------------------------------------------------------------------------- whole boxes


def test_two_sockets_from_the_matrix_alone(tmp_path: Path) -> None:
    """PIX pairs share a switch, NODE pairs a socket, SYS pairs neither. Nominal: PCIe 4 x16 carries
    16 GT/s x 16 lanes x 128/130 / 8 = 31.508 GB/s, copies reach 26/31.5 of it: 26.01."""
    box = imported(tmp_path, "l40s", nvidia_smi="two-sockets.topo.txt", p2p="refused.p2p.txt")
    assert len(box.gpus) == 8
    assert not box.peer_to_peer
    assert box.nodes[0].memory_at == ("socket0", "socket1")
    ways = {(i, j): Network(box)._path(f"gpu{i}", f"gpu{j}")[2] for i in (0,) for j in (1, 2, 4)}
    assert ways[0, 1] == ("gpu0", "plx0", "gpu1")
    assert ways[0, 2] == ("gpu0", "plx0", "socket0", "plx1", "gpu2")
    assert ways[0, 4] == ("gpu0", "plx0", "socket0", "socket1", "plx2", "gpu4")
    assert rates(box)["gpu0 plx0"] == round(31.508 * 26 / 31.5, 2)
    assert all(link.source.startswith(("nominal", "assumed")) for link in box.links)
    assert "CNS, chipset not supported" in box.source


@pytest.mark.parametrize(
    ("gpu", "matrix", "sockets"),
    [("l40s", "two-sockets.topo.txt", 2), ("a5000", "bridges.topo.txt", 1)],
)
def test_unmeasured_host_memory_is_that_of_the_shipped_box(
    tmp_path: Path, gpu: str, matrix: str, sockets: int
) -> None:
    """pcie8 has two sockets: half of its host memory for each socket of the box."""
    like = load_topology("pcie8").nodes[0]
    box = imported(tmp_path, gpu, nvidia_smi=matrix)
    assert len(box.nodes[0].memory_at) == sockets
    assert box.nodes[0].host_memory_bytes_per_s == like.host_memory_bytes_per_s * sockets / 2


def test_measured_copies_find_the_link_that_limited_them(tmp_path: Path) -> None:
    """In nvbandwidth's matrix pairs below one switch reach 26.3 GB/s, pairs of one socket 21.9, pairs
    across sockets 13.1, and GPU 5 never more than 6.6: its own link. The switches' uplinks limited
    the second, the link between the sockets the third. Host memory: eight copies at once, 13.4 to 14.1
    GB/s, 110.0 together."""
    box = imported(
        tmp_path,
        "l40s",
        ("eight.ncclt.txt",),
        nvidia_smi="two-sockets.topo.txt",
        p2p="granted.p2p.txt",
        nvbandwidth="two-sockets.nvbandwidth.json",
    )
    found = rates(box)
    assert box.peer_to_peer
    assert found["gpu5 plx2"] == 6.6
    assert {found[f"gpu{i} plx{i // 2}"] for i in range(8) if i != 5} == {26.35}
    assert {found[f"plx{i} socket{i // 2}"] for i in range(4)} == {21.88}
    assert found["socket0 socket1"] == 13.14
    assert box.nodes[0].host_memory_bytes_per_s == pytest.approx(110e9)
    assert all("two-sockets.nvbandwidth.json:" in link.source for link in box.links)
    kinds = [(table.kind, table.ranks, table.scope) for table in box.collectives]
    assert kinds == [("all_reduce", 8, "node"), ("all_to_all", 8, "node")]
    assert box.collectives[1].time_s(2**20) == pytest.approx(611.9e-6)  # the row of 1048576 bytes


def test_the_imported_box_can_be_planned_with_its_symmetry_seen(tmp_path: Path) -> None:
    """Noise between equal links must not make every GPU its own class: 2 of 8 GPUs are in one of
    few classes (same switch, same socket, other socket, with GPU 5 or without)."""
    from simulator.placement import classes

    box = imported(
        tmp_path,
        "l40s",
        nvidia_smi="two-sockets.topo.txt",
        p2p="granted.p2p.txt",
        nvbandwidth="two-sockets.nvbandwidth.json",
    )
    assert len(classes(box, 2)) <= 2 * 8


def test_old_driver_without_legend_or_numa_column(tmp_path: Path) -> None:
    """SOC is what SYS was called; an adapter column (mlx5_0) is no GPU."""
    box = imported(tmp_path, "v100", nvidia_smi="old-driver.topo.txt")
    assert set(rates(box)) == {
        "gpu0 socket0", "gpu1 socket0", "gpu2 socket1", "gpu3 socket1", "socket0 socket1",
    }  # fmt: skip
    assert rates(box)["gpu0 socket0"] == round(pcie_bytes_per_s(3, 16) / 1e9 * 26 / 31.5, 2)


def test_bridged_pairs_keep_their_pcie(tmp_path: Path) -> None:
    """NV4 on an A5000: 4 x 14.0625 GB/s x 0.8 = 45 GB/s, the number of the shipped pcie4-a5000."""
    box = imported(tmp_path, "a5000", nvidia_smi="bridges.topo.txt")
    found = rates(box)
    assert found["gpu0 gpu1"] == found["gpu2 gpu3"] == 45
    assert len(found) == 2 + 4
    assert sum(link.is_nvlink for link in box.links) == 2


def test_nv12_on_all_pairs_of_eight_is_a_switch(tmp_path: Path) -> None:
    """Seven peers at 12 links each are more than the 12 that an A100 has. GPUs in the order of NUMA
    nodes 3 3 1 1 7 7 5 5, two on each PCIe switch (both PXB to one adapter)."""
    box = imported(tmp_path, "a100-80g-sxm", nvidia_smi="nvswitch.topo.txt")
    found = rates(box)
    assert {found[f"gpu{i} nvswitch"] for i in range(8)} == {240}  # 12 x 25 x 0.8
    assert {f"gpu{i} plx{i // 2}" for i in range(8)} < set(found)
    assert {f"socket{i} fabric" for i in range(4)} < set(found)
    assert box.peer_to_peer
    assert not any(
        link.kind == "nvlink" for link in box.links if "nvswitch" not in (link.a, link.b)
    )


def test_four_gpus_with_direct_nvlinks_are_no_switch(tmp_path: Path) -> None:
    """Four A100 of an HGX board: NV4 to each of three peers are its 12 links."""
    rows = "\n".join(
        f"GPU{i}\t" + "\t".join(" X " if i == j else "NV4" for j in range(4)) + "\t0-31\t0"
        for i in range(4)
    )
    (tmp_path / "topo").write_text("\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\n" + rows)
    facts = read_facts({"nvidia_smi": str(tmp_path / "topo")})
    data = topology_data(facts, "box", "a100-80g-sxm")
    assert "nvswitch" not in data["switches"]
    assert sum(link["kind"] == "nvlink-4" for link in data["links"]) == 6


def test_nccl_xml_gives_lanes_bridges_and_the_cpu(tmp_path: Path) -> None:
    """GPU 3 trained at x8: half of 63.0 GB/s, the bridge above it has one purpose and two GPUs.
    Intel model 143 (Sapphire Rapids): NCCL counts 22 GB/s. NVLink targets differ in case."""
    box = imported(tmp_path, "h100-pcie", nccl_xml="switches.nccl.xml")
    found, kinds = rates(box), {f"{k.a} {k.b}": k.kind for k in box.links}
    assert kinds["gpu2 plx1"] == "pcie5-x16"
    assert kinds["gpu3 plx1"] == "pcie5-x8"
    assert found["gpu3 plx1"] == pytest.approx(found["gpu2 plx1"] / 2, rel=1e-3)
    assert found["gpu0 gpu1"] == 240  # 12 x 25 x 0.8
    assert found["socket0 socket1"] == 22
    assert len(found) == 8
    machine = read_xml(read_report(BOXES / "switches.nccl.xml"))
    assert [(name, r.value) for name, r in machine.nics if r is not None] == [("mlx5_0", 12.5e9)]


def test_nccl_log_is_read_for_one_rank_and_tells_who_goes_through_the_host(tmp_path: Path) -> None:
    """NCCL's 24 GB/s is PCIe 4 x16 (12 for 3 x16): 31.5 GB/s; its 6.0 a quarter of that."""
    box = imported(tmp_path, "l40", nccl_log="four.nccl.log")
    found = rates(box)
    assert found["gpu0 plx0"] == found["plx0 socket0"] == 26.01
    assert found["gpu3 socket1"] == pytest.approx(26.01 / 4, rel=1e-3)
    machine, access = read_log(read_report(BOXES / "four.nccl.log"))
    assert machine is not None
    assert machine.cpu == ("AuthenticAMD", -1)
    assert {pair: able for pair, (able, _) in access.items()} == {
        (0, 1): True, (1, 2): False, (3, 0): False,
    }  # fmt: skip
    assert found["socket0 socket1"] == 16
    assert not box.peer_to_peer


def test_the_log_of_an_intel_box_says_what_joins_its_sockets() -> None:
    """The SYS link as NCCL prints it. Without a figure (5000 stands for none) the model counts: NCCL's
    own number, 3 for Sapphire Rapids, whose SRP_QPI_BW is 22."""
    text = (BOXES / "four.nccl.log").read_text().replace("(1/2/-1)", "(1/1/3)")
    for printed, rate, source in (
        ("9.0", 9, "file:12"),
        ("22.0", 22, "file:12"),
        ("5000.0", 22, "GenuineIntel model 143"),
    ):
        machine, _ = read_log(report(text.replace("SYS[16.0]", f"SYS[{printed}]")))
        assert machine is not None
        facts = Facts(machine=machine, access={}, bandwidths=(), runs=())
        (link,) = (k for k in topology_data(facts, "box", "l40")["links"] if k["kind"] == "upi")
        assert link["bandwidth"] == f"{rate} GB/s"
        assert source in link["source"]


def test_lstopo_orders_gpus_by_nvml_and_ignores_other_displays(tmp_path: Path) -> None:
    box = imported(tmp_path, "l40", lstopo="three.lstopo.xml")
    found = rates(box)
    assert len(box.gpus) == 3
    assert found["gpu0 plx0"] == round(15.753846 * 26 / 31.5, 2)  # nvml0 is the second in the file
    assert found["gpu1 plx0"] == 26.01
    assert "gpu2 socket1" in found


def test_lstopo_knows_the_cpu() -> None:
    """hwloc writes CPUVendor and CPUModelNumber as CPUID has them."""
    text = (BOXES / "three.lstopo.xml").read_text()
    name = '<info name="CPUModel" value="AMD EPYC 7543"/>'
    told = '<info name="CPUVendor" value="GenuineIntel"/><info name="CPUModelNumber" value="143"/>'
    assert read_lstopo(report(text)).cpu is None
    assert read_lstopo(report(text.replace(name, told))).cpu == ("GenuineIntel", 143)


def test_machines_on_a_network(tmp_path: Path) -> None:
    """Three of the box with one adapter of 100 Gbit/s: 12 GPUs in three nodes, numbered on; between two
    nodes 0.94 x 12.5 GB/s for all of a node together, inside as in the box alone."""
    facts = read_facts({"nccl_xml": str(BOXES / "switches.nccl.xml")})
    one = topology_data(facts, "box", "h100-pcie")
    target = tmp_path / "three.yaml"
    target.write_text(to_yaml(cluster(one, facts.machine, 3), ["three"]))
    alone = imported(tmp_path, "h100-pcie", nccl_xml="switches.nccl.xml")
    box = load_topology(target)
    count = len(alone.gpus)
    assert box.gpus == tuple(f"gpu{i}" for i in range(3 * count))
    assert [node.gpus for node in box.nodes] == [box.gpus[i * count :][:count] for i in range(3)]
    inside, network = Network(alone), Network(box)
    for i in range(1, count):
        assert network.message_s(0, i) == inside.message_s(0, i)
        assert network.message_s(count, count + i) == inside.message_s(0, i)
    across = tuple(network.route(i, count + i).id for i in range(count))
    wire = 0.94 * 12.5e9
    assert {"nic0", "fabric", "nic1"} <= set(network.route(0, count).path)
    assert sum(network.rates(across)) == pytest.approx(wire, rel=1e-3)
    assert "switches.nccl.xml:15" in next(k.source for k in box.links if k.kind == "network-100g")


def test_a_network_needs_a_rate(tmp_path: Path) -> None:
    facts = read_facts({"nvidia_smi": str(BOXES / "two-sockets.topo.txt")})
    one = topology_data(facts, "box", "l40s")
    with pytest.raises(ConfigError, match="no rate of the network adapters, allowed: --nic-rate"):
        cluster(one, facts.machine, 2)
    with pytest.raises(ConfigError, match="--nodes: 1 nodes, allowed: 2 or more"):
        cluster(one, facts.machine, 1, 100)
    off = tmp_path / "off.xml"
    off.write_text((BOXES / "switches.nccl.xml").read_text().replace('speed="100000"', 'speed="0"'))
    down = read_facts({"nccl_xml": str(off)})
    with pytest.raises(ConfigError, match=r"off\.xml:15: adapter mlx5_0 has rate 0"):
        cluster(topology_data(down, "box", "h100-pcie"), down.machine, 2)
    given = [
        link
        for link in cluster(one, facts.machine, 2, 400)["links"]
        if link["kind"] == "network-400g"
    ]
    assert {link["bandwidth"] for link in given} == {"47 GB/s"}
    assert len(given) == 2 * max(1, len(facts.machine.nics))


def test_p2p_test_gives_both_ways_and_host_memory(tmp_path: Path) -> None:
    """Four RTX 4090: 9.9 GB/s with peer access, 22 without. Both directions without: at most 30.3
    together, each byte stored and loaded, so host memory carries 60.6 at least."""
    read = read_p2p_test(read_report(BOXES / "slow-peers.p2ptest.txt"))
    assert read.peer[0, 1].value == pytest.approx(9.92e9)
    assert read.staged[1, 2].value == pytest.approx(22.3e9)
    assert read.host_memory is not None
    assert read.host_memory.value == pytest.approx(60.6e9)
    assert all(able for able, _ in read.access.values())
    box = imported(
        tmp_path, "rtx4090", nvidia_smi="slow-peers.topo.txt", p2p_test="slow-peers.p2ptest.txt"
    )
    assert box.peer_to_peer
    assert {r for ends, r in rates(box).items() if ends.startswith("gpu")} == {9.94}


def test_nccl_tests_keeps_size_as_printed_and_drops_empty_rows() -> None:
    runs, notes = read_nccl_tests(read_report(BOXES / "eight.ncclt.txt"))
    assert notes == ()
    assert [(run.kind, run.ranks) for run in runs] == [("all_reduce", 8), ("all_to_all", 8)]
    assert runs[0].table == ((1024, 31.2e-6), (1048576, 318.4e-6), (268435456, 52110e-6))
    assert runs[1].table[0][0] == 1024  # the row of size 0 is gone
    # busbw of all_reduce: 268435456 B / 52.11 ms x 2 x 7/8
    assert runs[0].busbw.value == pytest.approx(268435456 / 52.11e-3 * 1.75, rel=2e-3)


def test_a_table_of_some_gpus_holds_for_those_where_gpus_differ(tmp_path: Path) -> None:
    text = (BOXES / "eight.ncclt.txt").read_text()
    kept = [k for k in text.split("\n") if not any(f"Rank  {i} " in k for i in range(4, 8))]
    (tmp_path / "four.txt").write_text("\n".join(kept))
    box = imported(
        tmp_path, "l40s", (str(tmp_path / "four.txt"),), nvidia_smi="two-sockets.topo.txt"
    )
    assert {table.scope for table in box.collectives} == {("gpu0", "gpu1", "gpu2", "gpu3")}


def test_processes_that_see_one_gpu_are_told_by_pci_address(tmp_path: Path) -> None:
    """Slurm's --gpus-per-task=1: every rank prints device 0. nvbandwidth lists 12:00 and 13:00 as
    devices 2 and 3; without such a file nobody can tell which two ran, unless all did."""
    text = (BOXES / "eight.ncclt.txt").read_text()
    for i in range(8):
        text = text.replace(f"device  {i} [{0x1B + i:#x}]", f"device  0 [0000:{0x10 + i:x}:00]")
    half = [k for k in text.split("\n") if not any(f"Rank  {i} " in k for i in (0, 1, 4, 5, 6, 7))]
    (tmp_path / "all.txt").write_text(text)
    (tmp_path / "two.txt").write_text("\n".join(half))
    matrix = {"nvidia_smi": "two-sockets.topo.txt"}
    named = matrix | {"nvbandwidth": "two-sockets.nvbandwidth.json"}
    box = imported(tmp_path, "l40s", (str(tmp_path / "two.txt"),), **named)
    assert {table.scope for table in box.collectives} == {("gpu2", "gpu3")}
    box = imported(tmp_path, "l40s", (str(tmp_path / "all.txt"),), **matrix)
    assert {table.scope for table in box.collectives} == {"node"}
    with pytest.raises(ConfigError, match=r"two\.txt:11: which 2 of 8 GPUs ran\?"):
        imported(tmp_path, "l40s", (str(tmp_path / "two.txt"),), **matrix)


def test_what_is_not_used_of_a_file_is_said(tmp_path: Path) -> None:
    text = (BOXES / "eight.ncclt.txt").read_text()
    text = text.replace("alltoall_perf", "sendrecv_perf").replace(
        "worker-0 device  7", "b device  0"
    )
    (tmp_path / "run.txt").write_text(text)
    facts = read_facts(
        {"nvidia_smi": str(BOXES / "two-sockets.topo.txt")}, [str(tmp_path / "run.txt")]
    )
    assert [note.rpartition("run.txt:")[2] for note in facts.notes] == [
        "24: sendrecv_perf is not used",
        "17: all_reduce over 2 hosts is not written into the topology",
    ]
    assert topology_data(facts, "box", "l40s")["collectives"] == []


def test_nvbandwidth_writes_from_the_row_and_reads_into_it() -> None:
    """testcases_ce.cpp: DeviceToDeviceWriteCE copies srcBuffer (row) to peerBuffer (column),
    DeviceToDeviceReadCE peerBuffer to srcBuffer."""
    data = json.loads((BOXES / "two-sockets.nvbandwidth.json").read_text())
    cases = {case["name"]: case for case in data["nvbandwidth"]["testcases"]}
    for kind, pair in (("write", (0, 1)), ("read", (1, 0))):
        case = cases[f"device_to_device_memcpy_{kind}_ce"]
        case["bandwidth_matrix"][0][1] = "12.34"
        data["nvbandwidth"]["testcases"] = [case]
        peer = read_nvbandwidth(report(json.dumps(data))).peer
        assert {p for p, r in peer.items() if r.value == pytest.approx(12.34e9)} == {pair}


def test_what_no_topology_can_be_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"^topo\.txt:3:1: nodes\.0\.gpus: .*longer list"):
        validated({"name": "x", "gpu": "l40s", "nodes": [{"name": "a", "gpus": []}]}, "topo.txt:3")


def test_lines_with_time_stamps_and_new_names_of_a_log() -> None:
    """A time stamp before each line, ``system-bus`` names, a tag of mpirun: the same machine."""
    text = (BOXES / "four.nccl.log").read_text()
    plain, _ = read_log(report(text))
    newer = text.replace("GPU/", "GPU/0-").replace("CPU/", "CPU/0-").replace("PCI/", "PCI/0-")
    stamped = "\n".join(
        f"[2025-01-01 10:00:{i:02d}] [1,0]<stdout>:{k}" for i, k in enumerate(newer.split("\n"))
    )
    found, access = read_log(report(stamped))
    assert plain is not None
    assert found is not None
    shape = [(v.name, v.kind, v.parent, v.pcie and v.pcie.bytes_per_s) for v in plain.vertices]
    assert [
        (v.name, v.kind, v.parent, v.pcie and v.pcie.bytes_per_s) for v in found.vertices
    ] == shape
    assert len(access) == 3


@pytest.mark.parametrize(
    ("columns", "ratio", "kind"),
    [
        ("float sum -1", 2 * 7 / 8, "all_reduce"),
        ("float sum -1", 7 / 8, "reduce_scatter"),
        ("float none 0", 1.0, "broadcast"),
        ("float none -1", 7 / 8, None),  # all_gather or alltoall
    ],
)
def test_a_table_without_a_name_is_told_by_its_columns(
    columns: str, ratio: float, kind: str | None
) -> None:
    """busbw / algbw is 2 (n-1)/n for all_reduce, (n-1)/n for reduce_scatter, 1 for broadcast."""
    ranks = [f"#  Rank {i:2d} Pid 1 on host device {i:2d} [0x1b] NVIDIA L40S" for i in range(8)]
    numbers = f"100.0 40.00 {40 * ratio:.2f} 0"
    row = f" 4194304 1048576 {columns} {numbers} {numbers}"
    text = report("\n".join([*ranks, row]))
    if kind is None:
        with pytest.raises(ConfigError, match="which collective is this"):
            read_nccl_tests(text)
    else:
        assert read_nccl_tests(text)[0][0].kind == kind


# ------------------------------------------------------------------------------------- broken files


TOPO = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tPHB\t0-7\t0\nGPU1\tPHB\t X \t0-7\t0\n"


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (read_topo, "hello", "file:1: no header line"),
        (read_topo, TOPO.replace("PHB", "FOO", 1), "file:2: GPU0 to GPU1: unknown code ('FOO')"),
        (read_topo, TOPO.replace("PHB", "SYS", 1), "file:3: GPU0 to GPU1 is SYS, but GPU1"),
        (read_topo, TOPO.replace(" X ", "PIX", 1), "file:2: GPU0 to GPU0: 'PIX', allowed: X"),
        (read_topo, TOPO.rsplit("\nGPU1", 1)[0], "file:1: no row for GPU1"),
        (read_topo, TOPO.replace("\tPHB\t X \t0-7\t0", "\tPHB"), "file:3: row GPU1 has 1 cells"),
        (read_topo, TOPO + TOPO.split("\n")[1], "file:4: second row for GPU0"),
        (read_p2p, "\tGPU0\tGPU1\n GPU0\tX\tYES\n GPU1\tOK\tX", "file:2: GPU0 to GPU1: unknown status"),
        (read_xml, "<system><cpu>", "file:1: not valid XML (no element found)"),
        (read_xml, "<topology/>", "file:1: root element <topology>"),
        (read_xml, "<system>\n<cpu/></system>", "file:1: no <gpu> in it"),
        (read_xml, '<system>\n<pci><gpu dev="x"/></pci></system>', "file:2: <gpu dev>: not a number"),
        (
            read_xml,
            '<system><cpu>\n<pci link_speed="9 GT/s" link_width="16"><gpu dev="0"/></pci></cpu>'
            "</system>",
            "file:2: link_speed '9 GT/s', allowed: 2.5, 5, 8, 16, 32, 64 GT/s",
        ),
        (
            read_xml,
            '<!DOCTYPE s [\n<!ENTITY a "aaaa">]><system>&a;</system>',
            "file:2: XML entity (a), allowed: none",
        ),
        (
            read_xml,
            '<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]><system>&a;</system>',
            "file:1: XML entity (a)",
        ),
        (read_log, "nothing", "file:1: neither a line '=== System'"),
        (read_nvbandwidth, "no json", "file:1: not JSON"),
        (read_nvbandwidth, '{\n"a": }', "file:2: not valid JSON"),
        (read_nvbandwidth, '{"nvbandwidth": {}}', "file:1: no nvbandwidth.testcases"),
        (
            read_nvbandwidth,
            '{"nvbandwidth": {"testcases": [\n{"name": "host_to_device_memcpy_ce", '
            '"bandwidth_matrix": [["fast"]]}]}}',
            "file:2: host_to_device_memcpy_ce [0][0]: not a number ('fast')",
        ),
        (
            read_nvbandwidth,
            '{"nvbandwidth": {"testcases": [\n{"name": "host_to_device_memcpy_ce", '
            '"bandwidth_matrix": [["0.00"]]}]}}',
            "file:2: host_to_device_memcpy_ce [0][0]: 0.00, allowed: more than 0",
        ),
        (read_p2p_test, "x", "file:1: no bandwidth matrix"),
        (
            read_p2p_test,
            "Unidirectional P2P=Enabled Bandwidth Matrix (GB/s)\n D\\D 0 1\n 0 900.0 0.00\n",
            "file:3: GPU 0 to 1 in GB/s: 0.00, allowed: more than 0",
        ),
        (
            read_p2p_test,
            "Unidirectional P2P=Enabled Bandwidth Matrix (GB/s)\n D\\D 0 1\n 0 900.0\n",
            "file:3: row 0 has 1 numbers, allowed: 2",
        ),
        (read_nccl_tests, "x", "file:1: no row with a time"),
        (read_nccl_tests, "# sendrecv_perf", "file:1: sendrecv_perf is not used, allowed: all_gather"),
        (
            read_nccl_tests,
            " 1024 256 float none -1 9.1 0.1 0.1 0 9.1 0.1 0.1 0",
            "file:1: which collective is this?",
        ),
        (
            read_nccl_tests,
            "# all_reduce_perf\n#  Rank  0 Pid 1 on a device  0 [0x00] V\n  1024   256   float  ",
            "file:3: row is cut (1024   256   float), allowed: whole rows",
        ),
        (
            read_nccl_tests,
            " 1024 256 float none -1 0.00 0.1 0.1 0 9.1 0.1 0.1 0",
            "file:1: time in us: 0.00, allowed: more than 0",
        ),
        (
            read_nccl_tests,
            "# all_reduce_perf\n#  Rank  0 Pid 1 on a device  0 [0x00] V"
            "\n#  Rank  0 Pid 2 on b device  0 [0x00] V",
            "file:3: second rank 0",
        ),
    ],
)  # fmt: skip
def test_broken_files_say_the_line(reader: object, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reader(report(text))  # type: ignore[operator]
    assert message in str(caught.value)


def test_files_of_two_boxes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"slow-peers\.p2ptest\.txt:1: 4 GPUs, but .*two-sockets.* has 8"
    ):
        imported(
            tmp_path, "l40s", nvidia_smi="two-sockets.topo.txt", p2p_test="slow-peers.p2ptest.txt"
        )
    with pytest.raises(ConfigError, match=r"8 GPUs, but .* has 4"):
        imported(tmp_path, "l40s", nccl_xml="switches.nccl.xml", nvidia_smi="two-sockets.topo.txt")
    with pytest.raises(
        ConfigError, match=r"refused\.p2p\.txt:2: CNS, .* for GPU 0 to 1, but .*: copied, allowed"
    ):
        imported(
            tmp_path,
            "l40s",
            nvidia_smi="two-sockets.topo.txt",
            p2p="refused.p2p.txt",
            nvbandwidth="two-sockets.nvbandwidth.json",
        )
    with pytest.raises(ConfigError, match="no file has the structure"):
        imported(tmp_path, "l40s", p2p="granted.p2p.txt")
    with pytest.raises(ConfigError, match=r"GPU 4, but .* has 4 GPUs"):
        imported(tmp_path, "l40s", nccl_xml="switches.nccl.xml", p2p="granted.p2p.txt")


def test_binary_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "bin").write_bytes(b"ok\n\xff\xfe")
    (tmp_path / "empty").write_text("\n")
    for name, message in (
        ("bin", ":2:1: not text"),
        ("empty", ":1: empty"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_report(tmp_path / name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fixture=st.sampled_from(sorted(path.name for path in BOXES.iterdir())),
    cut=st.integers(0, 4000),
    length=st.integers(1, 60),
    junk=st.text("0123456789GPUXSY<>{}[]\"'&;- \t\nNV/", max_size=12),
)
def test_damaged_files_are_read_or_refused(fixture: str, cut: int, length: int, junk: str) -> None:
    """Whatever is cut out of or put into a fixture: a result, or one ConfigError; never a traceback."""
    text = (BOXES / fixture).read_text()
    damaged = report(text[:cut] + junk + text[cut + length :])
    readers = {
        ".topo.txt": read_topo, ".p2p.txt": read_p2p, ".nccl.xml": read_xml, ".nccl.log": read_log,
        "lstopo.xml": read_lstopo, ".json": read_nvbandwidth, ".p2ptest.txt": read_p2p_test,
        ".ncclt.txt": read_nccl_tests,
    }  # fmt: skip
    reader = next(r for suffix, r in readers.items() if fixture.endswith(suffix))
    complaint = ""
    try:
        found = reader(damaged)
        machine = found[0] if isinstance(found, tuple) else found
        if isinstance(machine, Machine):
            facts = Facts(machine=machine, access={}, bandwidths=(), runs=())
            topology_data(facts, "box", "h100-sxm")
    except ConfigError as error:
        complaint = str(error)
    assert not complaint or complaint.startswith("file:")


def test_numbers_are_strings_in_nvbandwidth() -> None:
    data = json.loads((BOXES / "two-sockets.nvbandwidth.json").read_text())
    cell = data["nvbandwidth"]["testcases"][0]["bandwidth_matrix"][0][0]
    assert isinstance(cell, str)
