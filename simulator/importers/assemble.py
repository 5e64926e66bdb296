"""From what the files say to one topology, each link with its source.

Decides which file wins where several speak, what a measured copy says of the links it crossed, and what
is assumed where nobody measured. The structure comes from the file that knows most: NCCL's XML, then
lstopo, NCCL's log, nvidia-smi. NVLinks come from NCCL, else nvidia-smi. A bandwidth is measured where a
copy crossed the link and was limited by it; otherwise nominal: the line rate times what copies reach.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from paradiff.config import ConfigError, Document, Path_
from paradiff.units import size_text
from simulator.gpu import Gpu, load_gpu
from simulator.importers.bandwidth import read_nvbandwidth, read_p2p_test
from simulator.importers.lstopo import read_lstopo
from simulator.importers.machine import (
    Bandwidths,
    CollectiveRun,
    Facts,
    Machine,
    Nvlinks,
    Pair,
    Pcie,
    Reading,
    Vertex,
    pcie_bytes_per_s,
)
from simulator.importers.nccl import read_log, read_xml
from simulator.importers.nccl_tests import read_nccl_tests
from simulator.importers.reading import read_report
from simulator.importers.smi import mig_line, read_p2p, read_topo
from simulator.topology import TopologyFile, load_topology

PCIE_SHARE = 26 / 31.5
"""What a large copy reaches of a PCIe link's rate: 26 GB/s of PCIe 4 x16 (NVIDIA/nvbandwidth README)."""
NVLINK_SHARE = 0.8
"""What kernels reach of an NVLink: 20 of 25 GB/s (SM80_NVLINK_BW, NVIDIA/nccl src/graph/topo.h)."""
SOCKET_GB_PER_S = {
    "AuthenticAMD": ((-1, 16.0),),
    "GenuineIntel": ((0, 6.0), (85, 10.0), (143, 22.0), (173, 40.0)),
}
"""Between sockets, GB/s, by CPU vendor and from a model on (AMD_BW, BDW/SKL/SRP/ERP_QPI_BW, topo.h;
models 173 to 175, Granite Rapids, count as ERP since NCCL 2.31)."""
UNKNOWN_SOCKET = (20.0, "assumed: as pcie8; the CPU is not in the files")
DIE = (200.0, "assumed: root complexes of one socket share its mesh, wider than their links")
LIKE_BOX = "pcie8"
"""The shipped box whose host memory, socket by socket, an unmeasured one is taken to have."""
LATENCY = {"pcie": "2 us", "upi": "1 us", "nvlink": "1 us", "die": "0 us"}
"""Assumed, as in the shipped boxes: the tools time the issue of a copy, not the wire."""
LIMITED = 0.95
"""A copy slower than this share of the GPUs' own links was limited by what they share."""
ALIKE = 1.03
"""Measured links of one kind within this factor are one link with noise: each gets their median, so that
the planner sees the symmetry of the box."""
BETWEEN, AS_HOST = ", GPU {} to {}", ", as with the host"
"""What the source of a link says whose rate is that of a copy between GPUs, and where one from the host
was no faster: the link itself, then, is what limits."""
IDLE_BYTES_PER_S = pcie_bytes_per_s(1, 16)
"""PCIe links that are no faster than 2.5 GT/s gives sixteen lanes: what an idle GPU trains down to."""
ASSUMED_PEERS = "peer-to-peer assumed"
ASSUMED_NVLINKS = "no NVLink assumed"
"""What a topology's source says where no file tells."""
IDLE = "idle?"
"""What the source of a link says whose file has it at 2.5 GT/s, as those of all GPUs."""
MOST_NVLINKS = 18
"""NVLinks of a GPU whose profile does not say."""
GB = 1e9

Files = Mapping[str, str]
"""Kind of file -> path. Kinds: nvidia_smi, p2p, nccl_xml, nccl_log, nvbandwidth, p2p_test, nccl_tests,
lstopo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cable:
    """A link under construction."""

    a: str
    b: str
    kind: str
    bytes_per_s: float
    source: str


def read_facts(files: Files, nccl_tests: Sequence[str] = ()) -> Facts:
    """All that the files say. Raises ConfigError where one is malformed, two contradict, or none has
    the structure of the box."""
    reports = {kind: read_report(path) for kind, path in files.items()}
    machines: dict[str, Machine] = {}
    access: dict[Pair, tuple[bool, str]] = {}
    measured: list[Bandwidths] = []
    if "nccl_xml" in reports:
        machines["nccl_xml"] = read_xml(reports["nccl_xml"])
    if "lstopo" in reports:
        machines["lstopo"] = read_lstopo(reports["lstopo"])
    if "nccl_log" in reports:
        machine, access = read_log(reports["nccl_log"])
        machines |= {} if machine is None else {"nccl_log": machine}
    if "nvidia_smi" in reports:
        machines["nvidia_smi"] = read_topo(reports["nvidia_smi"])
    if "nvbandwidth" in reports:
        measured.append(read_nvbandwidth(reports["nvbandwidth"]))
    if "p2p_test" in reports:
        measured.append(read_p2p_test(reports["p2p_test"]))
    if not machines:
        allowed = "--nccl-xml, --nvidia-smi, --lstopo or --nccl-log"
        raise ConfigError(f"no file has the structure of the box, allowed: one of {allowed}")
    machine = _merged(list(machines.values()))
    told = [each.access for each in measured]
    told += [read_p2p(reports["p2p"])] if "p2p" in reports else []
    access = {**access, **_agreed(told)}
    tables = [read_nccl_tests(read_report(path)) for path in nccl_tests]
    runs = [run for found, _ in tables for run in found]
    notes = [note for _, said in tables for note in said]
    notes += [
        f"{run.at}: {run.kind} over {len(run.hosts)} hosts is not written into the topology"
        for run in runs
        if len(run.hosts) > 1
    ]
    _check_counts(machine, measured, access, runs)
    facts = Facts(
        machine=machine,
        access=access,
        bandwidths=tuple(measured),
        runs=(),
        mig_at=mig_line(reports["nvidia_smi"]) if "nvidia_smi" in reports else None,
        notes=tuple(notes),
    )
    return replace(facts, runs=tuple(_placed(run, facts) for run in runs))


def _agreed(
    told: Sequence[Mapping[Pair, tuple[bool, str]]],
) -> dict[Pair, tuple[bool, str]]:
    """Whether pairs have peer access, by the last file that says. Raises ConfigError where two
    differ."""
    access: dict[Pair, tuple[bool, str]] = {}
    for each in told:
        for pair, (able, said) in each.items():
            before, other = access.get(pair, (able, said))
            if before != able:
                what = f"{said} for GPU {pair[0]} to {pair[1]}, but {other}"
                raise ConfigError(f"{what}, allowed: files that agree (leave out the wrong one)")
        access |= each
    return access


def _placed(run: CollectiveRun, facts: Facts) -> CollectiveRun:
    """The run with the box's numbers of its GPUs: by PCI address where the files have those, else as it
    numbers them itself, which tells nothing where each process saw one GPU (device 0) alone."""
    index = {card.address: i for i, card in facts.cards.items() if card.address is not None}
    found = [index[card.address] for card in run.cards if card.address in index]
    if len(set(found)) == len(run.cards):
        return replace(run, devices=tuple(found))
    if len(set(run.devices)) == len(run.devices):
        return run
    count = len(facts.machine.gpus)
    return replace(run, devices=tuple(range(count)) if len(run.cards) == count else ())


def _merged(machines: Sequence[Machine]) -> Machine:
    """The first machine, with NVLinks, CPU and adapters of the first that has them. Raises ConfigError
    where two see a different number of GPUs."""
    first = machines[0]
    for other in machines[1:]:
        if len(other.gpus) != len(first.gpus):
            what = f"{len(other.gpus)} GPUs, but {first.at} has {len(first.gpus)}"
            raise ConfigError(f"{other.at}: {what}, allowed: files of one box")
    return replace(
        first,
        nvlinks=next((m.nvlinks for m in machines if m.nvlinks), ()),
        cpu=next((m.cpu for m in machines if m.cpu), None),
        between_sockets=next((m.between_sockets for m in machines if m.between_sockets), None),
        cards=next((m.cards for m in machines if m.cards), {}),
        tells_nvlinks=any(m.tells_nvlinks for m in machines),
        nics=max((m.nics for m in machines), key=lambda nics: (any(r for _, r in nics), len(nics))),
    )


def _check_counts(
    machine: Machine,
    measured: Sequence[Bandwidths],
    access: Mapping[Pair, tuple[bool, str]],
    runs: Sequence[CollectiveRun],
) -> None:
    count = len(machine.gpus)
    for each in measured:
        if each.gpus != count:
            raise ConfigError(f"{each.at}: {each.gpus} GPUs, but {machine.at} has {count}")
    for pair, (_, said) in access.items():
        if max(pair) >= count:
            raise ConfigError(f"{said}: GPU {max(pair)}, but {machine.at} has {count} GPUs")
    for run in runs:
        if max(run.devices) >= count or len(run.devices) > count:
            raise ConfigError(f"{run.at}: {run.ranks} ranks, but {machine.at} has {count} GPUs")


def pcie_access(facts: Facts) -> dict[Pair, tuple[bool, str]]:
    """What the files say of peer access between GPUs that NVLink does not join."""
    return {
        pair: said for pair, said in facts.access.items() if not _by_nvlink(facts.machine, pair)
    }


def _by_nvlink(machine: Machine, pair: Pair) -> bool:
    switched = {link.a for link in machine.nvlinks if link.b is None}
    return switched.issuperset(pair) or any({k.a, k.b} == set(pair) for k in machine.nvlinks)


def peer_access(facts: Facts) -> tuple[bool, str]:
    """Whether GPUs that NVLink does not join reach each other's memory, and who says so. False where
    one such pair does not, and where nobody says."""
    told, machine = pcie_access(facts), facts.machine
    if told:
        refused = [said for able, said in told.values() if not able]
        if not refused:
            return True, next(iter(told.values()))[1]
        some = f" ({len(told) - len(refused)} of {len(told)} pairs have it)"
        return False, refused[0] + (some if len(refused) < len(told) else "")
    if all(_by_nvlink(machine, pair) for pair in combinations(range(len(machine.gpus)), 2)):
        one = "one GPU" if len(machine.gpus) == 1 else "NVLink joins every pair"
        return True, f"{one} ({machine.at})"
    return False, "assumed: no file says whether GPUs reach each other (nvidia-smi topo -p2p rw)"


def _assumed_memory(sockets: int) -> tuple[float, str]:
    """Host memory of a box with so many sockets, bytes per second, and its source."""
    like = load_topology(LIKE_BOX).nodes[0]
    each = like.host_memory_bytes_per_s / len(like.memory_at)
    return each * max(sockets, 1), f"assumed: {each / GB:g} GB/s a socket, as {LIKE_BOX}"


def topology_data(facts: Facts, name: str, gpu_name: str) -> dict[str, Any]:
    """The topology as plain data, in the order of its keys; ``TopologyFile`` has been asked whether it
    is one. Raises ConfigError."""
    gpu = load_gpu(gpu_name)
    machine = _awake(facts.machine, gpu)
    facts = replace(facts, machine=replace(machine, nvlinks=as_switch(machine, gpu)))
    able, who = peer_access(facts)
    cables = _levelled([*_pcie_cables(facts, gpu, able), *_nvlink_cables(facts, gpu)])
    sockets = [v.name for v in facts.machine.vertices if v.kind == "socket"]
    memory, memory_source = _assumed_memory(len(sockets))
    readings = [b.host_memory for b in facts.bandwidths if b.host_memory is not None]
    if readings:
        best = max(readings, key=lambda reading: reading.value)
        memory, memory_source = best.value, f"measured: {best.at}, at least"
    ends = dict.fromkeys(end for cable in cables for end in (cable.a, cable.b))
    nvlinks = "" if machine.tells_nvlinks else f"; {ASSUMED_NVLINKS}"
    data = {
        "name": name,
        "gpu": gpu_name,
        "nodes": [
            {
                "name": "host0",
                "gpus": list(facts.machine.gpus),
                "host_memory": _rate(memory),
                "memory_at": sockets,
                "source": memory_source,
            }
        ],
        "peer_to_peer": able,
        "switches": [end for end in ends if end not in facts.machine.gpus],
        "links": [
            {
                "ends": [cable.a, cable.b],
                "kind": cable.kind,
                "bandwidth": _rate(cable.bytes_per_s),
                "latency": LATENCY[_family(cable.kind)],
                "duplex": "full",
                "source": cable.source,
            }
            for cable in cables
        ],
        "collectives": [_collective(facts, run) for run in facts.runs if len(run.hosts) == 1],
        "source": f"imported: structure {machine.at}; peer-to-peer {who}{nvlinks}; latencies assumed",
    }
    validated(data, facts.machine.at)
    return data


def validated(data: Mapping[str, Any], at: str) -> TopologyFile:
    """``data`` as what a topology file says. Raises ConfigError about ``at`` (``file:line``), with the
    key."""
    file, _, line = at.rpartition(":")
    places = {path: (int(line), 1) for path in _paths(data, ())}
    return Document(file, data, places, {}, {}).validate(TopologyFile)


def _paths(value: Any, path: Path_) -> Iterator[Path_]:
    """Where every part of plain data sits."""
    yield path
    inner = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    for key, each in inner:
        yield from _paths(each, (*path, key))


def _levelled(cables: Sequence[_Cable]) -> list[_Cable]:
    """The cables, measured ones of one kind that differ by noise alone made equal."""
    level: dict[int, float] = {}
    count: dict[int, int] = {}
    for kind in {cable.kind for cable in cables}:
        same = [i for i, c in enumerate(cables) if c.kind == kind and c.source[:8] == "measured"]
        left = sorted(same, key=lambda i: cables[i].bytes_per_s)
        while left:
            top = cables[left[0]].bytes_per_s * ALIKE
            run = [i for i in left if cables[i].bytes_per_s <= top]
            middle = median(cables[i].bytes_per_s for i in run)
            level |= dict.fromkeys(run, middle)
            count |= dict.fromkeys(run, len(run))
            left = left[len(run) :]
    return [
        cable
        if count.get(i, 1) == 1
        else replace(
            cable,
            bytes_per_s=level[i],
            source=f"{cable.source} ({_rate(cable.bytes_per_s)}; median of {count[i]} alike)",
        )
        for i, cable in enumerate(cables)
    ]


def _family(kind: str) -> str:
    return "nvlink" if kind.startswith("nv") else kind.partition("-")[0].rstrip("0123456789")


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / GB:.4g} GB/s"


# ------------------------------------------------------------------------------------------- PCIe


def _pcie_cables(facts: Facts, gpu: Gpu, able: bool) -> list[_Cable]:
    """Every link of the tree, then what joins the sockets."""
    machine = facts.machine
    cables = {v.name: _nominal(v, gpu) for v in machine.vertices if v.parent is not None}
    for i, name in enumerate(machine.gpus):
        found = _own_rate(facts, i, able)
        if found is not None:
            cables[name] = replace(cables[name], bytes_per_s=found[0], source=found[1])
    sockets = [v.name for v in machine.vertices if v.kind == "socket"]
    nominal, why = _socket_rate(machine)
    joints = {
        s: _Cable(a=s, b="fabric", kind="upi", bytes_per_s=nominal, source=why) for s in sockets
    }
    if len(sockets) == 2:
        joints = {sockets[0]: replace(joints[sockets[0]], b=sockets[1])}
    if len(sockets) == 1:
        joints = {}
    shared = {n: c for n, c in cables.items() if n not in machine.gpus} | joints
    own = {name: cables[name].bytes_per_s for name in machine.gpus}
    measured = _crossings(facts, able)
    for name, cable in shared.items():
        shared[name] = _limited(machine, name, cable, own, measured)
    return [*(shared.get(n, c) for n, c in cables.items()), *(shared[n] for n in joints)]


def _awake(machine: Machine, gpu: Gpu) -> Machine:
    """The machine with links of the GPU's generation in place of 2.5 GT/s, where all GPUs have that:
    they train them down to save power, which is more likely than a box that is so slow throughout."""
    slow = {
        v.name
        for v in machine.vertices
        if v.pcie is not None
        and (
            v.pcie.generation == 1
            or (v.pcie.generation is None and v.pcie.bytes_per_s <= IDLE_BYTES_PER_S)
        )
    }
    if not slow.issuperset(machine.gpus):
        return machine
    generation = gpu.pcie.value if gpu.pcie is not None else 4
    vertices = []
    for vertex in machine.vertices:
        if vertex.name in slow and vertex.pcie is not None:
            width = vertex.pcie.width or 16
            link = Pcie(
                bytes_per_s=pcie_bytes_per_s(generation, width),
                at=f"{vertex.pcie.at} has 2.5 GT/s: {IDLE}",
                generation=generation,
                width=width,
            )
            vertex = replace(vertex, pcie=link)
        vertices.append(vertex)
    return replace(machine, vertices=tuple(vertices))


def _nominal(vertex: Vertex, gpu: Gpu) -> _Cable:
    """The link above a vertex, at what copies reach of its line rate."""
    assert vertex.parent is not None
    if vertex.kind == "root":
        return _Cable(
            a=vertex.name, b=vertex.parent, kind="die", bytes_per_s=DIE[0] * GB, source=DIE[1]
        )
    link = vertex.pcie
    if link is not None:
        rate, kind = link.bytes_per_s, link.kind
        source = f"nominal: {rate / GB:.3g} GB/s ({link.at}) x {PCIE_SHARE:.3f}"
    else:
        generation = gpu.pcie.value if gpu.pcie is not None else 4
        rate, kind = pcie_bytes_per_s(generation, 16), f"pcie{generation}-x16"
        source = (
            f"nominal: {rate / GB:.3g} GB/s (what {gpu.name} has; no file says) x {PCIE_SHARE:.3f}"
        )
    return _Cable(
        a=vertex.name, b=vertex.parent, kind=kind, bytes_per_s=rate * PCIE_SHARE, source=source
    )


def _own_rate(facts: Facts, index: int, able: bool) -> tuple[float, str] | None:
    """The best copy that crossed a GPU's PCIe link, to or from the host or another GPU, and its source.
    Where peers below one switch are slower than each is from the host, peer access itself is slow: the
    best copy between GPUs, then."""
    host = {i: b.host[i] for b in facts.bandwidths for i in b.host}
    between = {pair: r for pair, r in _crossings(facts, able).items() if index in pair}
    near = [p for p in between if _path(facts.machine, *p) == {f"gpu{i}" for i in p}]
    slow = [
        p
        for p in near
        if host.keys() >= set(p) and between[p].value < LIMITED * min(host[i].value for i in p)
    ]
    mine = host.get(index)
    own = [] if mine is None else [(mine.value, f"measured: {mine.at}")]
    copies = [
        (
            r.value,
            f"measured: {r.at}{BETWEEN.format(*pair)}"
            + (AS_HOST if mine is not None and LIMITED * mine.value < r.value else ""),
        )
        for pair, r in between.items()
    ]
    if able and copies and (slow or not own):
        own = copies
    elif able or not own:
        own += copies
    return max(own, key=lambda each: each[0], default=None)


def _crossings(facts: Facts, able: bool) -> dict[Pair, Reading]:
    """Measured copies between GPUs over PCIe, in the way that they exchange: with peer access, or
    through host memory."""
    found: dict[Pair, Reading] = {}
    for each in facts.bandwidths:
        for pair, reading in (each.peer if able else each.staged).items():
            if not _by_nvlink(facts.machine, pair):
                found.setdefault(pair, reading)
    return found


def _limited(
    machine: Machine,
    name: str,
    cable: _Cable,
    own: Mapping[str, float],
    measured: Mapping[Pair, Reading],
) -> _Cable:
    """A shared link in the light of the copies that crossed it. Slower than the GPUs' own links: this
    is what limited them. As fast: it carries at least that."""
    crossing = {
        pair: reading for pair, reading in measured.items() if name in _path(machine, *pair)
    }
    if not crossing:
        return cable
    pair, best = max(crossing.items(), key=lambda item: item[1].value)
    source = f"measured: {best.at}{BETWEEN.format(*pair)}"
    ends = min(own[f"gpu{i}"] for i in pair)
    if best.value < LIMITED * ends:
        return replace(cable, bytes_per_s=best.value, source=source)
    if best.value > cable.bytes_per_s:
        return replace(cable, bytes_per_s=best.value, source=source + ", at least")
    return cable


def _path(machine: Machine, i: int, j: int) -> set[str]:
    """Names of the links between two GPUs: a link is called by its lower end; that between two sockets
    by the first of them."""
    here = [v.name for v in machine.above(f"gpu{i}")]
    there = [v.name for v in machine.above(f"gpu{j}")]
    common = set(here) & set(there)
    return (set(here) | set(there)) - common


def _socket_rate(machine: Machine) -> tuple[float, str]:
    stated = machine.between_sockets
    if stated is not None:
        return stated.value, f"nominal: {stated.value / GB:g} GB/s by NCCL ({stated.at})"
    vendor, model = machine.cpu or ("", -1)
    rates = [rate for least, rate in SOCKET_GB_PER_S.get(vendor, ()) if model >= least]
    if not rates:
        return UNKNOWN_SOCKET[0] * GB, UNKNOWN_SOCKET[1]
    source = f"nominal: what NCCL takes for {vendor} model {model} (src/graph/topo.h)"
    return rates[-1] * GB, source


# ------------------------------------------------------------------------------------------ NVLink


def _nvlink_cables(facts: Facts, gpu: Gpu) -> Iterator[_Cable]:
    """Bridges between pairs, or a link from each GPU to the NVSwitches."""
    peer = {pair: r for b in facts.bandwidths for pair, r in b.peer.items()}
    for link in facts.machine.nvlinks:
        if link.b is None:
            rates = [r for pair, r in peer.items() if link.a in pair]
            reading = max(rates, key=lambda r: r.value, default=None)
            end, kind = "nvswitch", "nvlink"
        else:
            rates = [peer[p] for p in ((link.a, link.b), (link.b, link.a)) if p in peer]
            reading = min(rates, key=lambda r: r.value, default=None)
            end = f"gpu{link.b}"
            kind = "nvlink" if link.count is None else f"nvlink-{link.count}"
        nominal, source = _nvlink_rate(link, gpu)
        if reading is not None:
            nominal, source = reading.value, f"measured: {reading.at}"
        yield _Cable(a=f"gpu{link.a}", b=end, kind=kind, bytes_per_s=nominal, source=source)


def as_switch(machine: Machine, gpu: Gpu) -> tuple[Nvlinks, ...]:
    """The NVLinks; all pairs with more links than a GPU has together means NVSwitches: nvidia-smi
    prints NV12 for each of eight A100, which have twelve links each. A pair has those of the GPU with
    fewer up, so a GPU has the most of its pairs."""
    links = machine.nvlinks
    per_gpu = gpu.nvlinks.value if gpu.nvlinks is not None else MOST_NVLINKS
    of: dict[int, list[Nvlinks]] = {}
    for link in links:
        for i in (link.a, link.b):
            if i is not None:
                of.setdefault(i, []).append(link)
    total = max((sum(k.count or 0 for k in pairs) for pairs in of.values()), default=0)
    if any(link.b is None for link in links) or total <= per_gpu:
        return links
    most = {i: max(of[i], key=lambda link: link.count or 0) for i in sorted(of)}
    return tuple(Nvlinks(a=i, b=None, count=k.count, at=k.at) for i, k in most.items())


def _nvlink_rate(link: Nvlinks, gpu: Gpu) -> tuple[float, str]:
    if link.bytes_per_s is not None:
        return link.bytes_per_s, f"nominal: {link.bytes_per_s / GB:.4g} GB/s by NCCL ({link.at})"
    if gpu.nvlink_bandwidth is None or link.count is None:
        what = f"NVLinks, but the profile {gpu.name} has no nvlink_bandwidth"
        raise ConfigError(f"{link.at}: {what}, allowed: the GPU that is in this box (--gpu)")
    each = gpu.nvlink_bandwidth.value
    source = f"nominal: {link.count} x {each / GB:g} GB/s ({link.at}) x {NVLINK_SHARE}"
    return link.count * each * NVLINK_SHARE, source


# ------------------------------------------------------------------------------------- collectives


def _collective(facts: Facts, run: CollectiveRun) -> dict[str, Any]:
    """A measured table. It holds for any group of its size where all GPUs are alike on NVSwitches, or
    take part; else for the GPUs that ran."""
    count = len(facts.machine.gpus)
    alike = len({link.a for link in facts.machine.nvlinks if link.b is None}) == count
    if not alike and not run.devices:
        what = f"which {run.ranks} of {count} GPUs ran? Each process saw one alone (device 0)"
        allowed = "a file with their PCI addresses (--nccl-xml, --lstopo, --nvbandwidth)"
        raise ConfigError(f"{run.at}: {what}, allowed: {allowed}, or a run that sees all GPUs")
    scope: str | list[str] = (
        "node" if alike or run.ranks == count else sorted(f"gpu{i}" for i in run.devices)
    )
    return {
        "kind": run.kind,
        "ranks": run.ranks,
        "scope": scope,
        "source": f"measured: nccl-tests, out of place, {run.at}",
        "table": [[size_text(size), f"{seconds * 1e6:.6g} us"] for size, seconds in run.table],
    }


# --------------------------------------------------------------------------------------------- YAML


def to_yaml(data: Mapping[str, Any], header: Sequence[str] = ()) -> str:
    """The file, in the manner of the shipped ones: one line a link."""
    lines = [f"# {line}" for line in header]
    for key, value in data.items():
        if key == "nodes":
            lines.append("nodes:")
            for node in value:
                items = [f"{k}: {_flow(v, bare=k != 'source')}" for k, v in node.items()]
                lines += [("  - " if i == 0 else "    ") + item for i, item in enumerate(items)]
        elif key == "links":
            lines.append("links:" if value else "links: []")
            for link in value:
                items = [f"{k}: {_flow(v, bare=k != 'source')}" for k, v in link.items()]
                lines.append("  - {" + ", ".join(items) + "}")
        elif key == "collectives":
            lines.append("collectives:" if value else "collectives: []")
            for table in value:
                items = [
                    f"{k}: {_flow(table[k], bare=k != 'source')}" for k in table if k != "table"
                ]
                lines += [("  - " if i == 0 else "    ") + item for i, item in enumerate(items)]
                lines.append("    table:")
                lines += [f"      - {_flow(row, bare=True)}" for row in table["table"]]
        else:
            lines.append(f"{key}: {_flow(value, bare=key in ('gpu', 'switches'))}")
    return "\n".join(lines) + "\n"


_PLAIN = re.compile(r"[A-Za-z_][\w-]*|\d[\d.e+-]* [A-Za-z/]+", re.ASCII)
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def _flow(value: Any, *, bare: bool) -> str:
    """``value`` as YAML in one line; text is quoted unless it is plainly a name or a quantity."""
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item, bare=bare) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        plain = bare and _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        return value if plain else json.dumps(value, ensure_ascii=False)
    return str(value)


def default_name(files: Files) -> str:
    """A topology's name from the first file's."""
    stem = Path(next(iter(files.values()), "box")).stem
    return re.sub(r"[^\w.-]", "-", stem) or "box"
