"""The box doctor: each fault is found on a box that has it, and not on one that has not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from shipped import profile
from typer.testing import CliRunner, Result

from analysis.doctor import costs, diagnose
from paradiff.cli import app
from paradiff.config import available
from paradiff.strategies import Workload
from simulator.importers.assemble import read_facts, topology_data
from simulator.importers.cluster import cluster
from simulator.importers.machine import Facts
from simulator.planner import Request, plan
from simulator.topology import (
    CollectiveTable,
    Link,
    Node,
    Topology,
    TopologyFile,
    load_topology,
)

BOXES = Path(__file__).parent / "boxes"


def box_of(gpu: str, **files: str) -> tuple[Topology, Facts]:
    facts = read_facts({kind: str(BOXES / file) for kind, file in files.items()})
    return TopologyFile.model_validate(topology_data(facts, "box", gpu)).topology(), facts


def from_text(tmp_path: Path, gpu: str, **texts: str) -> tuple[Topology, Facts]:
    """As ``box_of``, of files with these texts."""
    for kind, text in texts.items():
        (tmp_path / kind).write_text(text)
    return box_of(gpu, **{kind: str(tmp_path / kind) for kind in texts})


def codes(box: Topology, facts: Facts | None = None) -> dict[str, str]:
    return {finding.code: finding.severity for finding in diagnose(box, facts)}


def healthy() -> Topology:
    """Two L40 below one switch with peer access and links as they should be: nothing to find."""
    links = tuple(
        Link(
            a=g,
            b="plx0",
            bandwidth_bytes_per_s=26e9,
            latency_s=1e-6,
            kind="pcie4-x16",
            source="measured",
        )
        for g in ("gpu0", "gpu1")
    )
    return Topology(
        name="good", gpus=("gpu0", "gpu1"), profiles=("l40", "l40"), switches=("plx0",), links=links,
        nodes=(Node(name="host0", gpus=("gpu0", "gpu1"), host_memory_bytes_per_s=80e9),),
    )  # fmt: skip


def with_link(box: Topology, **changes: object) -> Topology:
    return replace(box, links=(replace(box.links[0], **changes), *box.links[1:]))  # type: ignore[arg-type]


def test_a_healthy_box_has_no_findings() -> None:
    assert codes(healthy()) == {}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"kind": "pcie4-x8", "bandwidth_bytes_per_s": 13e9}, "pcie-x8", "8 of 16 lanes"),
        (
            {"kind": "pcie3-x16", "bandwidth_bytes_per_s": 13e9},
            "pcie3",
            "PCIe 3 where the GPU has 4",
        ),
        # 6.6 of 26 GB/s is a quarter of sixteen lanes
        ({"bandwidth_bytes_per_s": 6.6e9}, "slow-pcie-4", "6.6 GB/s of 26, as if on 4 lanes"),
        ({"kind": "pcie", "bandwidth_bytes_per_s": 13e9}, "slow-pcie-8", "as if on 8 lanes"),
    ],
)
def test_links_below_what_the_gpu_has(changes: dict[str, object], code: str, words: str) -> None:
    (finding,) = diagnose(with_link(healthy(), **changes))
    assert (finding.code, finding.severity) == (code, "wrong")
    assert words in finding.what
    assert finding.repaired is not None
    assert diagnose(finding.repaired) == () or changes.get(
        "kind"
    )  # the repaired link is at full rate
    assert finding.repaired.links[0].bandwidth_bytes_per_s == pytest.approx(26.0e9, rel=1e-3)


def test_peer_access_refused_says_who_says_so() -> None:
    box, facts = box_of("l40s", nvidia_smi="two-sockets.topo.txt", p2p="refused.p2p.txt")
    found = {finding.code: finding for finding in diagnose(box, facts)}
    assert "refused.p2p.txt:2: CNS, chipset not supported" in found["peer-to-peer"].evidence
    assert found["peer-to-peer"].severity == "wrong"
    # sixteen pairs of eight GPUs, four a socket
    assert found["sockets"].what.startswith("16 GPU pairs")
    # 8 links of 26.01 GB/s, a store and a load for each byte
    assert "ask for 416" in found["host-memory-host0"].what
    assert found["unmeasured"].severity == "unknown"


def test_nobody_says_whether_there_is_peer_access() -> None:
    box, facts = box_of("a5000", nvidia_smi="bridges.topo.txt")
    assert codes(box, facts)["peer-to-peer"] == "unknown"
    assert codes(box, facts)["nvlink-pairs"] == "limit"


def test_peers_slower_than_the_host() -> None:
    """9.9 against 22 GB/s: the way through the host doubles the rate of a pair."""
    box, facts = box_of(
        "rtx4090", nvidia_smi="slow-peers.topo.txt", p2p_test="slow-peers.p2ptest.txt"
    )
    found = {finding.code: finding for finding in diagnose(box, facts)}
    slow = found["slow-peers"]
    assert "12 of 12 directed pairs" in slow.what
    assert "p2ptest.txt:" in slow.evidence
    assert slow.repaired is not None
    assert not slow.repaired.peer_to_peer
    best = [round(k.bandwidth_bytes_per_s / 1e8) for k in slow.repaired.links if "gpu" in k.a]
    assert best == [221, 223, 223, 221]  # each GPU's best copy through the host


def test_what_a_repair_gains_is_the_planners_own_answer() -> None:
    """A link of four lanes between two GPUs: repaired it plans as the healthy box does, faster."""
    model, work = profile("pixart-alpha"), Workload(height=1024, width=1024, frames=1, steps=4)
    slow = with_link(healthy(), bandwidth_bytes_per_s=6.5e9)
    (finding,) = diagnose(slow)
    gain = costs(model, work, slow, [finding])[finding.code]
    assert gain.exact_s is not None
    assert gain.exact_repaired_s is not None
    assert gain.exact_repaired_s < gain.exact_s
    request = Request(profile=model, topology=healthy(), workload=work, gpus=2)
    best = min(c.latency_s or 0 for c in plan(request).ranked if c.exact and c.n_gpus == 2)
    assert gain.exact_repaired_s == pytest.approx(best, rel=1e-3)  # 26.007 against 26 GB/s
    assert costs(model, work, healthy(), ()) == {}


def test_lanes_measured_by_a_copy_and_lanes_told_by_nccl() -> None:
    box, facts = box_of(
        "l40s",
        nvidia_smi="two-sockets.topo.txt",
        p2p="granted.p2p.txt",
        nvbandwidth="two-sockets.nvbandwidth.json",
    )
    found = {finding.code: finding for finding in diagnose(box, facts)}
    assert found["slow-pcie-4"].what.startswith("gpu5 to plx2")
    assert "peer-to-peer" not in found
    box, facts = box_of(
        "l40s",
        nvidia_smi="two-sockets.topo.txt",
        p2p="refused.p2p.txt",
        nvbandwidth="refused.nvbandwidth.json",
    )
    assert {c for c, how in codes(box, facts).items() if how == "wrong"} == {
        "slow-pcie-4",
        "peer-to-peer",
    }
    box, facts = box_of("h100-pcie", nccl_xml="switches.nccl.xml")
    assert codes(box, facts)["pcie-x8"] == "wrong"
    assert codes(box, facts)["nvlink-missing"] == "wrong"


def test_links_that_are_down_and_partitions() -> None:
    """An H100 has 18 NVLinks; an image of an A100 box with NV12 has 6 down."""
    box, facts = box_of("a100-80g-sxm", nvidia_smi="nvswitch.topo.txt")
    assert codes(box, facts) == {"mig": "wrong", "unmeasured": "unknown"}
    h100 = replace(box, profiles=("h100-sxm",) * 8)
    down = next(f for f in diagnose(h100, facts) if f.code == "nvlinks-down")
    assert down.what == "GPU 0 has 12 NVLinks up of 18, and 7 more GPUs have too few"


@pytest.mark.parametrize("lame", [0, 3])
def test_one_gpu_with_links_down_is_named(tmp_path: Path, lame: int) -> None:
    """nvidia-smi prints for a pair the links of the GPU with fewer: NV10 in one GPU's row and column.
    The others have twelve, 12 x 25 x 0.8 = 240 GB/s; that one 200, and 240 if repaired."""
    lines = (BOXES / "nvswitch.topo.txt").read_text().split("\n")
    for n, line in enumerate(lines):
        cells = line.split("\t")
        if cells[0] == f"GPU{lame}":
            lines[n] = line.replace("NV12", "NV10")
        elif cells[0].startswith("GPU") and "NV12" in cells:
            lines[n] = "\t".join("NV10" if i == 1 + lame else c for i, c in enumerate(cells))
    box, facts = from_text(tmp_path, "a100-80g-sxm", nvidia_smi="\n".join(lines))

    def ports(box: Topology) -> dict[str, int]:
        return {k.a: round(k.bandwidth_bytes_per_s / 1e9) for k in box.links if k.is_nvlink}

    assert ports(box) == {f"gpu{i}": 200 if i == lame else 240 for i in range(8)}
    (down,) = (f for f in diagnose(box, facts) if f.code == "nvlinks-down")
    assert down.what == f"GPU {lame} has 10 NVLinks up of 12"
    assert down.repaired is not None
    assert set(ports(down.repaired).values()) == {240}


def test_sxm_without_any_nvlink_is_broken_unless_no_file_could_say(tmp_path: Path) -> None:
    matrix = (BOXES / "two-sockets.topo.txt").read_text()
    box, facts = from_text(tmp_path, "a100-80g-sxm", nvidia_smi=matrix)
    finding = next(f for f in diagnose(box, facts) if f.code == "no-nvlink")
    assert (finding.severity, finding.what) == (
        "wrong",
        "no NVLink is up, and each NVIDIA A100 80 GB SXM4 has 12",
    )
    assert "fabricmanager" in finding.remedy
    assert finding.repaired is not None
    assert sum(k.is_nvlink for k in finding.repaired.links) == 8
    assert codes(*from_text(tmp_path, "a5000", nvidia_smi=matrix))["no-nvlink"] == "limit"
    assert codes(*box_of("h100-sxm", lstopo="three.lstopo.xml"))["no-nvlink"] == "unknown"


def test_a_gpu_without_nvlink_leaves_peer_access_open(tmp_path: Path) -> None:
    """NVLink joins seven of eight GPUs, and no file says how the eighth is reached."""
    lines = (BOXES / "nvswitch.topo.txt").read_text().split("\n")
    for n, line in enumerate(lines):
        cells = line.split("\t")
        if cells[0] == "GPU7":
            lines[n] = line.replace("NV12", "SYS")
        elif cells[0].startswith("GPU") and "NV12" in cells:
            lines[n] = "\t".join("SYS" if i == 8 else c for i, c in enumerate(cells))
    box, facts = from_text(tmp_path, "a100-80g-sxm", nvidia_smi="\n".join(lines))
    assert not box.peer_to_peer
    found = codes(box, facts)
    assert (found["peer-to-peer"], found["nvlink-missing"]) == ("unknown", "wrong")


def test_the_file_alone_gives_the_same_verdict_on_peer_access(tmp_path: Path) -> None:
    box, facts = box_of("a5000", nvidia_smi="bridges.topo.txt")
    assert codes(box)["peer-to-peer"] == codes(box, facts)["peer-to-peer"] == "unknown"
    # what a driver refuses on some pairs is refused on all: a topology has one answer
    some = (BOXES / "refused.p2p.txt").read_text().replace("CNS", "OK", 3)
    matrix = (BOXES / "two-sockets.topo.txt").read_text()
    box, facts = from_text(tmp_path, "l40s", nvidia_smi=matrix, p2p=some)
    found = next(f for f in diagnose(box, facts) if f.code == "peer-to-peer")
    assert found.what == "peer-to-peer is off on 53 of 56 directed pairs; taken as off for all"
    assert codes(box)["peer-to-peer"] == found.severity == "wrong"
    assert "(3 of 56 pairs have it)" in box.source


def test_copies_between_gpus_say_nothing_of_lanes(tmp_path: Path) -> None:
    """Copies staged in host memory reach 11.4 GB/s on whole links: their way is what limits. A GPU whose
    copies alone are slow is another matter, and one that the host reaches no faster, too."""
    matrix = (BOXES / "slow-peers.topo.txt").read_text()
    test = (BOXES / "slow-peers.p2ptest.txt").read_text()
    staged = test.replace("CAN Access", "CANNOT Access")
    for fast in ("22.10", "22.30"):
        staged = staged.replace(fast, "11.40")
    box, facts = from_text(tmp_path, "rtx4090", nvidia_smi=matrix, p2p_test=staged)
    found = {f.code: f for f in diagnose(box, facts)}
    assert not any(code.startswith("slow-pcie") for code in found)
    assert found["slow-copies"].severity == "unknown"
    assert "11.4 GB/s of the 26" in found["slow-copies"].what
    box, facts = from_text(tmp_path, "rtx4090", nvidia_smi=matrix, p2p_test=test)
    assert {code for code, how in codes(box, facts).items() if how == "wrong"} == {"slow-peers"}
    source = "measured: t:1, GPU 0 to 1"
    slow = with_link(healthy(), bandwidth_bytes_per_s=6.6e9, source=source)
    assert codes(slow) == {"slow-pcie-4": "wrong"}  # the other GPU's link is fast
    links = tuple(replace(k, bandwidth_bytes_per_s=6.6e9, source=source) for k in slow.links)
    assert codes(replace(slow, links=links)) == {"slow-copies": "unknown"}
    links = tuple(replace(k, source=f"{source}, as with the host") for k in links)
    assert codes(replace(slow, links=links)) == {"slow-pcie-4": "wrong"}


def test_a_switch_above_is_held_to_the_generation_of_its_gpus(tmp_path: Path) -> None:
    text = (BOXES / "switches.nccl.xml").read_text()
    bridge = 'device="0xc030" link_speed="32.0 GT/s PCIe"'
    text = text.replace(bridge, bridge.replace("32.0", "16.0"))
    text = text.replace('32.0 GT/s PCIe" link_width="8"', '16.0 GT/s PCIe" link_width="8"')
    box, facts = from_text(tmp_path, "h100-pcie", nccl_xml=text)
    found = {f.code: f.what for f in diagnose(box, facts)}
    assert found["pcie4"] == "plx0 to socket0, plx1 to socket1: PCIe 4 where the GPU has 5"
    assert found["pcie4-x8"] == "gpu3 to plx1: 8 of 16 lanes, and PCIe 4 where the GPU has 5"


def test_links_of_idle_gpus_are_not_taken_for_slow_ones(tmp_path: Path) -> None:
    """All at 2.5 GT/s: power saving. The rate is that of the GPU's generation, 5 with sixteen lanes or
    eight; one slow link among fast ones is what it says."""
    text = (BOXES / "switches.nccl.xml").read_text()
    box, facts = from_text(tmp_path, "h100-pcie", nccl_xml=text.replace("32.0 GT/s", "2.5 GT/s"))
    kinds = {k.kind for k in box.links if "gpu" in k.a and not k.is_nvlink}
    assert kinds == {"pcie5-x16", "pcie5-x8"}
    found = codes(box, facts)
    assert found["idle-links"] == "unknown"
    assert {code for code in found if "pcie" in code} == {"pcie-x8"}  # lanes do not save power
    one = text.replace('32.0 GT/s PCIe" link_width="8"', '2.5 GT/s PCIe" link_width="8"')
    found = codes(*from_text(tmp_path, "h100-pcie", nccl_xml=one))
    assert found["pcie1-x8"] == "wrong"
    assert "idle-links" not in found


def test_another_gpu_than_the_files_name(tmp_path: Path) -> None:
    files = {"nvidia_smi": "two-sockets.topo.txt", "nvbandwidth": "two-sockets.nvbandwidth.json"}
    assert "other-gpu" not in codes(*box_of("l40s", **files))
    other = next(f for f in diagnose(*box_of("l40", **files)) if f.code == "other-gpu")
    assert other.what == "the box has NVIDIA L40S, and is taken for NVIDIA L40 48 GB PCIe"
    assert "nvbandwidth.json:9" in other.evidence


def test_collectives_leave_links_unmeasured() -> None:
    table = CollectiveTable(kind="all_reduce", ranks=2, sizes=(1.0,), seconds=(1e-5,))
    links = tuple(replace(k, source="nominal: 31.5 GB/s") for k in healthy().links)
    (finding,) = diagnose(replace(healthy(), links=links, collectives=(table,)))
    assert finding.what == "2 of 2 links are not measured"


def test_collectives_over_hosts_below_the_adapters(tmp_path: Path) -> None:
    """9.01 GB/s on the bus of two hosts whose adapter carries 100 Gbit/s is fine (0.72 of 12.5), 1.5 is
    not; and a link that --nodes wrote is held to the rate in its kind."""
    text = (BOXES / "eight.ncclt.txt").read_text()
    for i in range(8):
        text = text.replace(f"worker-0 device  {i}", f"worker-{i // 4} device  {i % 4}")
    (tmp_path / "run.txt").write_text(text)
    facts = read_facts({"nccl_xml": str(BOXES / "switches.nccl.xml")}, [str(tmp_path / "run.txt")])
    one = topology_data(facts, "box", "h100-pcie")
    found = {f.code: f for f in diagnose(TopologyFile.model_validate(one).topology(), facts)}
    assert "network-all_reduce" not in found
    slow = found["network-all_to_all"]
    assert (
        slow.what == "all_to_all over 2 hosts: 1.5 GB/s on the bus of 12.5 that the adapters have"
    )
    assert "run.txt:" in slow.evidence
    assert "switches.nccl.xml:15" in slow.evidence
    two = TopologyFile.model_validate(cluster(one, facts.machine, 2)).topology()
    assert "network" not in codes(two)
    links = tuple(
        replace(k, bandwidth_bytes_per_s=6e9) if k.kind.startswith("network") else k
        for k in two.links
    )
    assert codes(replace(two, links=links))["network"] == "wrong"


def test_network_at_half_rate() -> None:
    wire = Link(
        a="nic0", b="net", bandwidth_bytes_per_s=5.9e9, kind="ethernet-100g", source="iperf"
    )
    box = healthy()
    box = replace(box, switches=("plx0", "nic0", "net"), links=(*box.links, wire))
    (finding,) = diagnose(box)
    assert (finding.code, finding.what) == ("network", "nic0 to net: 5.9 of 12.5 GB/s")


@pytest.mark.parametrize("name", available("topologies"))
def test_every_shipped_box_can_be_examined(name: str) -> None:
    """And none is called broken but for what its file says itself: peer-to-peer off."""
    wrong = {
        finding.code for finding in diagnose(load_topology(name)) if finding.severity == "wrong"
    }
    assert wrong <= {"peer-to-peer"}


# ------------------------------------------------------------------------------------ command line


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["topology", *arguments])


TWO_SOCKETS = [
    "--nvidia-smi",
    str(BOXES / "two-sockets.topo.txt"),
    "--p2p",
    str(BOXES / "refused.p2p.txt"),
]


def test_import_says_which_sizes_were_measured(tmp_path: Path) -> None:
    """A run of nccl-tests with one size: the first of a report's jobs, cut to its row of 1 MiB."""
    lines = (BOXES / "eight.ncclt.txt").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["1024"])
    row = next(line for line in lines[first:] if line.split()[:1] == ["1048576"])
    one = tmp_path / "one.txt"
    one.write_text("\n".join([*lines[:first], row, ""]))
    target = str(tmp_path / "mine.yaml")
    done = run(
        "import", "--gpu", "l40s", *TWO_SOCKETS, "--nccl-tests", str(one), "--output", target
    )
    assert done.exit_code == 0, done.output
    assert "over 8 GPUs: measured at 1 MiB only\nOther sizes take the links' time" in done.stdout


def test_import_writes_a_file_that_plans_and_prints_what_is_wrong(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    done = run("import", "--gpu", "l40s", *TWO_SOCKETS, "--output", str(target))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{target}: 8 GPUs, 13 links\n")
    assert "WRONG: peer-to-peer is off." in done.stdout
    assert load_topology(target).name == "mine"
    assert list(tmp_path.iterdir()) == [target]
    planned = CliRunner().invoke(
        app, ["plan", "--topology", str(target), "--strategy", "cfg=2", "--steps", "4"]
    )
    assert planned.exit_code == 0, planned.output


def test_import_to_stdout_keeps_findings_apart(tmp_path: Path) -> None:
    done = run("import", "--gpu", "l40s", *TWO_SOCKETS)
    (tmp_path / "box.yaml").write_text(done.stdout)
    assert len(load_topology(tmp_path / "box.yaml").gpus) == 8
    assert "peer-to-peer is off" in done.stderr


def test_doctor_check_fails_only_where_something_is_wrong() -> None:
    assert run("doctor", "pcie8", "--no-what-if", "--check").exit_code == 1
    assert run("doctor", "pcie8", "--no-what-if").exit_code == 0
    assert run("doctor", "nvlink8-h100", "--no-what-if", "--check").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor"], "no box, allowed: a name, a file, or the files of an import"),
        (["doctor", *TWO_SOCKETS], "--gpu is missing"),
        (["import", "--gpu", "l40x", *TWO_SOCKETS], "l40x: no such file in gpus"),
        (["import", "--gpu", "l40s", "--p2p", str(BOXES / "refused.p2p.txt")], "the structure"),
        (["import", "--gpu", "l40s", "--nvidia-smi", "nowhere"], "nowhere: cannot be read"),
        (["import", "--gpu", "l40s", "--output", "/nowhere/x.yaml"], "/nowhere is not a directory"),
        (["import", "--gpu", "a10", "--nvidia-smi", str(BOXES / "bridges.topo.txt")], "nvlink"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_message(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
