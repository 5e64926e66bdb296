"""What is wrong with a box: links below what they should be, peer access refused, slow ways taken.

Decides what counts as wrong, with the evidence, the remedy, and the box as it would be if repaired;
``costs`` asks the planner what the repair would gain. Works on a topology alone; what the files of an
import say besides makes it see more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, pairwise
from typing import Literal

import networkx as nx

from paradiff.profiles import Profile
from paradiff.strategies import Workload, candidate_specs, parse_spec
from paradiff.strategies import facts as strategy_facts
from simulator.gpu import Gpu, load_gpu
from simulator.importers.assemble import (
    AS_HOST,
    ASSUMED_NVLINKS,
    ASSUMED_PEERS,
    IDLE,
    NVLINK_SHARE,
    PCIE_SHARE,
    as_switch,
    pcie_access,
)
from simulator.importers.machine import Facts, pcie_bytes_per_s
from simulator.lint import is_the_gpu, models
from simulator.network import Network
from simulator.planner import Candidate, Request, plan
from simulator.topology import Link, Topology

Severity = Literal["wrong", "limit", "unknown"]
"""``wrong``: somebody can repair it. ``limit``: the box is made so. ``unknown``: nobody measured."""
SHORT = 0.6
"""A link below this share of what it should reach is not noise: half the lanes or a generation less
makes 0.5."""
SLOWER = 0.9
"""Peer access slower than this share of the way through the host is worth turning off."""
WIRE_SHARE = 0.94
"""What RDMA reaches of an Ethernet or InfiniBand line: 47 of 50 GB/s (as in nvlink8x8-h100)."""
SOCKET_KINDS = ("upi", "qpi", "xgmi")
_PCIE = re.compile(r"pcie(\d)-x(\d+)")
_WIRE = re.compile(r"(?:network|ethernet|eth|roce|ib|infiniband)-?(\d+(?:\.\d+)?)(?:g|gbe)?")
_BETWEEN = re.compile(rf", GPU \d+ to \d+(?!\d|{AS_HOST})")
"""In the source of a link whose rate is that of a copy between GPUs alone."""
GB = 1e9
Pair = tuple[int, int]
"""Two device numbers, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing. ``repaired`` is the box without it, None where nothing can be simulated."""

    code: str
    severity: Severity
    what: str
    evidence: str
    remedy: str
    repaired: Topology | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Best latencies on the box as it is and as repaired, with any strategy and with the exact ones;
    None where none is feasible."""

    latency_s: float | None
    repaired_s: float | None
    exact_s: float | None
    exact_repaired_s: float | None


def diagnose(box: Topology, facts: Facts | None = None) -> tuple[Finding, ...]:
    """All findings, the worst kind first. Raises ConfigError for an unknown GPU profile."""
    gpus = {name: load_gpu(name) for name in dict.fromkeys(box.profiles)}
    by_pcie = _by_pcie(box)
    found = [
        *_other_gpu(gpus[box.profiles[0]], facts),
        *_peer_access(box, facts, list(by_pcie)),
        *_slow_peers(box, facts),
        *_pcie(box, gpus, facts),
        *_idle(box),
        *_nvlinks(box, gpus, facts),
        *_sockets(box, by_pcie),
        *_host_memory(box, list(by_pcie)),
        *_wires(box, facts),
        *_mig(facts),
        *_unmeasured(box),
    ]
    order = ("wrong", "limit", "unknown")
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def costs(
    profile: Profile,
    workload: Workload,
    box: Topology,
    findings: Sequence[Finding],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Cost]:
    """What each repair that can be simulated would gain, by code: the strategies that use every GPU of
    the first node, planned on the box as it is and on each repaired one."""
    repairs = [finding for finding in findings if finding.repaired is not None]
    gpus = len(box.nodes[0].gpus)
    specs = tuple(
        spec
        for spec in candidate_specs(profile, workload, gpus)
        if strategy_facts(parse_spec(spec), workload).n_gpus == gpus
    )
    boxes = [box, *(f.repaired for f in repairs if f.repaired is not None)] if repairs else []
    best = []
    for done, each in enumerate(boxes):
        request = Request(profile=profile, topology=each, workload=workload, gpus=gpus, specs=specs)
        ranked = plan(request).ranked
        best.append((_first(ranked), _first([c for c in ranked if c.exact])))
        if progress is not None:
            progress(done + 1, len(boxes))
    return {
        finding.code: Cost(best[0][0], then[0], best[0][1], then[1])
        for finding, then in zip(repairs, best[1:], strict=True)
    }


def _first(ranked: Sequence[Candidate]) -> float | None:
    return ranked[0].latency_s if ranked else None


def _by_pcie(box: Topology) -> dict[Pair, tuple[str, ...]]:
    """Pairs of GPUs in one node whose way is not NVLink all along, in order, and that way."""
    network, links = Network(box), {frozenset((k.a, k.b)): k for k in box.links}
    device = {gpu: i for i, gpu in enumerate(box.gpus)}
    neighbours = (combinations(sorted(device[gpu] for gpu in node.gpus), 2) for node in box.nodes)
    ways = {(i, j): network.route(i, j).path for i, j in sorted(chain.from_iterable(neighbours))}
    return {
        pair: path
        for pair, path in ways.items()
        if not all(links[frozenset(ends)].is_nvlink for ends in pairwise(path))
    }


def _named(pairs: Sequence[Pair]) -> str:
    shown = ", ".join(f"{i}-{j}" for i, j in pairs[:3])
    return shown + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")


def _other_gpu(gpu: Gpu, facts: Facts | None) -> Iterator[Finding]:
    """A file that names another model than the profile is of."""
    if facts is None:
        return
    tables = [facts.machine.cards, *(b.cards for b in facts.bandwidths)]
    cards = [
        *chain.from_iterable(t.values() for t in tables),
        *chain(*(r.cards for r in facts.runs)),
    ]
    other = [c for c in cards if models(c.model) and not is_the_gpu(c.model, gpu)]
    if other:
        yield Finding(
            code="other-gpu",
            severity="wrong",
            what=f"the box has {other[0].model}, and is taken for {gpu.full_name}",
            evidence=other[0].at,
            remedy="--gpu with the profile of the GPU that is there",
        )


# --------------------------------------------------------------------------------- peer-to-peer


def _peer_access(box: Topology, facts: Facts | None, pairs: Sequence[Pair]) -> Iterator[Finding]:
    if box.peer_to_peer or not pairs:
        return
    told = {} if facts is None else pcie_access(facts)
    refused = [said for able, said in told.values() if not able]
    known = bool(told) or ASSUMED_PEERS not in box.source
    what = (
        "peer-to-peer is off" if known else "nobody says whether peer-to-peer works; taken as off"
    )
    if 0 < len(refused) < len(told):
        what = f"{what} on {len(refused)} of {len(told)} directed pairs; taken as off for all"
    yield Finding(
        code="peer-to-peer",
        severity="wrong" if known else "unknown",
        what=what,
        evidence=refused[0]
        if refused
        else f"peer_to_peer: false; GPU pairs {_named(pairs)} use PCIe",
        remedy="nvidia-smi topo -p2p rw shows why: turn ACS off in the BIOS, iommu=pt on the kernel "
        "line, unset NCCL_P2P_DISABLE; drivers of GeForce cards refuse it",
        repaired=replace(box, peer_to_peer=True),
    )


def _slow_peers(box: Topology, facts: Facts | None) -> Iterator[Finding]:
    """Peer access that is slower than the way through the host, as measured."""
    if facts is None or not box.peer_to_peer:
        return
    peer = {p: r for b in facts.bandwidths for p, r in b.peer.items()}
    staged = {p: r for b in facts.bandwidths for p, r in b.staged.items()}
    slow = [p for p in sorted(peer) if p in staged and peer[p].value < SLOWER * staged[p].value]
    if not slow:
        return
    worst = min(slow, key=lambda p: peer[p].value / staged[p].value)
    here, there = peer[worst], staged[worst]
    own = {
        name: max((r.value for p, r in staged.items() if i in p), default=0.0)
        for i, name in enumerate(box.gpus)
    }  # what each GPU's link carries when peer access does not slow it
    links = tuple(
        replace(link, bandwidth_bytes_per_s=max(link.bandwidth_bytes_per_s, own[end]))
        if (end := link.a if link.a in own else link.b) in own and not link.is_nvlink
        else link
        for link in box.links
    )
    yield Finding(
        code="slow-peers",
        severity="wrong",
        what=f"peer-to-peer is slower than the way through the host on {len(slow)} of {len(peer)} "
        f"directed pairs: {here.value / GB:.3g} against {there.value / GB:.3g} GB/s on "
        f"GPU {worst[0]} to {worst[1]}",
        evidence=f"{here.at} and {there.at}",
        remedy="NCCL_P2P_DISABLE=1 takes the way through the host; look for ACS, which sends peer "
        "traffic up to the root complex",
        repaired=replace(box, peer_to_peer=False, links=links),
    )


# ------------------------------------------------------------------------------------------ PCIe


_Case = tuple[Link, float]
"""A link and the bandwidth that it should have."""


def _complaints(
    box: Topology, gpus: Mapping[str, Gpu]
) -> tuple[dict[tuple[str, str], list[_Case]], list[_Case]]:
    """Links by what is wrong with them (code, sentence), and those that only copies between GPUs say to
    be slow: these tell of a GPU's lanes where copies of other GPUs were fast, else the way between
    them may be slow."""
    profile = dict(zip(box.gpus, box.profiles, strict=True))
    tree = nx.Graph((k.a, k.b) for k in box.links if not k.is_nvlink)
    complaints: dict[tuple[str, str], list[_Case]] = {}
    unsure: list[_Case] = []
    fine = False
    for link in box.links:
        if not link.kind.startswith("pcie"):
            continue
        below = [gpus[profile[gpu]].pcie for gpu in _below(box, tree, link)]
        found = _complaint(link, max((has.value for has in below if has is not None), default=None))
        own = link.a in profile or link.b in profile
        fine |= own and found is None and link.source.startswith("measured")
        if found is not None and found[0].startswith("slow") and _BETWEEN.search(link.source):
            unsure.append((link, found[2]))
        elif found is not None:
            complaints.setdefault(found[:2], []).append((link, found[2]))
    if fine:
        own_links = [case for case in unsure if {case[0].a, case[0].b} & profile.keys()]
        for link, rate in own_links:
            complaints.setdefault(_too_slow(link, rate), []).append((link, rate))
        unsure = [case for case in unsure if case not in own_links]
    return complaints, unsure


def _pcie(box: Topology, gpus: Mapping[str, Gpu], facts: Facts | None) -> Iterator[Finding]:
    """Links with fewer lanes, an older generation, or less bandwidth than there should be; those with
    the same complaint together."""
    complaints, unsure = _complaints(box, gpus)
    if unsure and next(_slow_peers(box, facts), None) is None:
        link, rate = min(unsure, key=lambda case: case[0].bandwidth_bytes_per_s / case[1])
        yield Finding(
            code="slow-copies",
            severity="unknown",
            what=f"copies between GPUs reach {link.bandwidth_bytes_per_s / GB:.3g} GB/s of the "
            f"{rate / GB:.3g} of {link.a} to {link.b}: its lanes, or the way through the host",
            evidence=link.source,
            remedy="nvbandwidth -j for --nvbandwidth: copies from the host cross the GPU's link alone",
        )
    for (code, what), cases in complaints.items():
        full = {id(link): rate for link, rate in cases}
        links = tuple(
            replace(link, bandwidth_bytes_per_s=full[id(link)]) if id(link) in full else link
            for link in box.links
        )
        names = ", ".join(f"{link.a} to {link.b}" for link, _ in cases[:3])
        more = f" and {len(cases) - 3} more" if len(cases) > 3 else ""
        yield Finding(
            code=code,
            severity="wrong",
            what=f"{names}{more}: {what}",
            evidence=cases[0][0].source or f"links of {box.name}",
            remedy="reseat the card or its riser; look at the slot's lanes and bifurcation in the BIOS; "
            "nvidia-smi -q -d PCIE under load (an idle GPU trains its link down)",
            repaired=replace(box, links=links),
        )


def _below(box: Topology, tree: nx.Graph, link: Link) -> list[str]:
    """The GPUs that a link leads to: the one at its end, else those on the side without host memory."""
    own = [end for end in (link.a, link.b) if end in box.gpus]
    memory = {at for node in box.nodes for at in node.memory_at}
    if own or not memory:
        return own
    tree.remove_edge(link.a, link.b)
    sides = [nx.node_connected_component(tree, end) for end in (link.a, link.b)]
    tree.add_edge(link.a, link.b)
    lower = set().union(*(side for side in sides if not side & memory))
    return [gpu for gpu in box.gpus if gpu in lower]


def _complaint(link: Link, generation: int | None) -> tuple[str, str, float] | None:
    """(code, sentence, bandwidth if it were right). ``generation`` is that of the GPUs below, None
    where there are none: compared with its own kind, then."""
    kind = _PCIE.fullmatch(link.kind)
    is_, lanes = (int(kind[1]), int(kind[2])) if kind else (generation, 16)
    wanted = generation or is_
    if wanted is None or is_ is None:
        return None
    full = pcie_bytes_per_s(wanted, 16) * PCIE_SHARE
    rate = link.bandwidth_bytes_per_s
    older = f"PCIe {is_} where the GPU has {wanted}"
    if lanes < 16:
        what = f"{lanes} of 16 lanes" + (f", and {older}" if is_ < wanted else "")
        return f"pcie{is_ if is_ < wanted else ''}-x{lanes}", what, full
    if is_ < wanted:
        return f"pcie{is_}", older, full
    return (*_too_slow(link, full), full) if rate < SHORT * full else None


def _too_slow(link: Link, full: float) -> tuple[str, str]:
    """Code and sentence for a rate far below the full one."""
    rate = link.bandwidth_bytes_per_s
    lanes = max(1, 2 ** round(math.log2(16 * rate / full)))
    what = f"{rate / GB:.3g} GB/s of {full / GB:.3g}, as if on {lanes} lanes"
    return f"slow-pcie-{lanes}", what


def _idle(box: Topology) -> Iterator[Finding]:
    """Links that a file has at 2.5 GT/s, all of them."""
    idle = [k for k in box.links if IDLE in k.source]
    if idle:
        yield Finding(
            code="idle-links",
            severity="unknown",
            what=f"{len(idle)} PCIe links were at 2.5 GT/s, which idle GPUs train down to; taken at the "
            "generation of the GPU",
            evidence=idle[0].source,
            remedy="make the file while the GPUs work, or nvbandwidth -j for --nvbandwidth",
        )


# ---------------------------------------------------------------------------------------- NVLink


def _nvlinks(box: Topology, gpus: Mapping[str, Gpu], facts: Facts | None) -> Iterator[Finding]:
    """Links that are down, pairs without a bridge, and GPUs that could have one."""
    first = gpus[box.profiles[0]]
    if first.nvlinks is None or first.nvlink_bandwidth is None or len(box.gpus) < 2:
        return
    joined = {frozenset((k.a, k.b)) for k in box.links if k.is_nvlink}
    switched = {end for pair in joined for end in pair if not pair <= set(box.gpus)} & set(box.gpus)
    yield from _down(box, first, facts, bool(switched))
    lone = [gpu for gpu in box.gpus if not any(gpu in pair for pair in joined)]
    if joined and lone:
        yield Finding(
            code="nvlink-missing",
            severity="wrong",
            what=f"{', '.join(lone)} has no NVLink, the other GPUs have",
            evidence=next(k.source for k in box.links if k.is_nvlink) or f"links of {box.name}",
            remedy="nvidia-smi nvlink -s; reseat the bridge or restart the fabric manager",
        )
    elif joined and not switched:
        pairs = [
            (i, j)
            for i, j in combinations(range(len(box.gpus)), 2)
            if frozenset((box.gpus[i], box.gpus[j])) not in joined
        ]
        if pairs:
            yield Finding(
                code="nvlink-pairs",
                severity="limit",
                what=f"NVLink joins some pairs; {_named(pairs)} go over PCIe",
                evidence=next(k.source for k in box.links if k.is_nvlink) or f"links of {box.name}",
                remedy="keep groups that exchange most on bridged pairs (the plan's placement does)",
            )
    elif not joined and ASSUMED_NVLINKS in box.source:
        yield Finding(
            code="no-nvlink",
            severity="unknown",
            what=f"nobody says whether the NVLinks of the {first.full_name} are up; taken as none",
            evidence=box.source,
            remedy="nvidia-smi topo -m for --nvidia-smi",
        )
    elif not joined and "SXM" in first.full_name:
        rate = first.nvlinks.value * first.nvlink_bandwidth.value * NVLINK_SHARE
        ports = tuple(
            Link(
                a=gpu, b="nvswitch", bandwidth_bytes_per_s=rate, latency_s=1e-6, kind="nvlink",
                source="what if",
            )
            for gpu in box.gpus
        )  # fmt: skip
        whole = replace(box, switches=(*box.switches, "nvswitch"), links=(*box.links, *ports))
        yield Finding(
            code="no-nvlink",
            severity="wrong",
            what=f"no NVLink is up, and each {first.full_name} has {first.nvlinks.value}",
            evidence=box.source if facts is None else facts.machine.at,
            remedy="nvidia-smi nvlink -s; the fabric manager must run (systemctl status "
            "nvidia-fabricmanager), in the driver's version; a virtual machine may have none by design",
            repaired=whole if len(box.nodes) == 1 else None,
        )
    elif not joined:
        rate = first.nvlinks.value * first.nvlink_bandwidth.value * NVLINK_SHARE
        bridges = tuple(
            Link(
                a=a, b=b, bandwidth_bytes_per_s=rate, latency_s=1e-6, kind="nvlink-bridge",
                source="what if",
            )
            for a, b in zip(box.gpus[::2], box.gpus[1::2], strict=False)
        )  # fmt: skip
        yield Finding(
            code="no-nvlink",
            severity="limit",
            what=f"the {first.full_name} can have NVLink, no pair here has",
            evidence=first.nvlinks.source,
            remedy="bridges on neighbours (the gain below is with one on each pair 0-1, 2-3, ...)",
            repaired=replace(box, links=(*box.links, *bridges)),
        )


def _down(box: Topology, gpu: Gpu, facts: Facts | None, switched: bool) -> Iterator[Finding]:
    """Fewer NVLinks to the NVSwitches than the GPU has, or than its neighbours have."""
    assert gpu.nvlinks is not None
    if facts is None or not switched:
        return
    has = gpu.nvlinks.value
    ports = [k for k in as_switch(facts.machine, gpu) if k.b is None]
    few = [k for k in ports if k.count is not None and k.count < has]
    if few:
        link = min(few, key=lambda k: k.count or 0)
        lacking = {box.gpus[k.a]: has / k.count for k in few if k.count}
        more = f", and {len(few) - 1} more GPUs have too few" if len(few) > 1 else ""
        yield Finding(
            code="nvlinks-down",
            severity="wrong",
            what=f"GPU {link.a} has {link.count} NVLinks up of {has}{more}",
            evidence=link.at,
            remedy="nvidia-smi nvlink -s shows which are down; restart the fabric manager, then the "
            "machine; a virtual machine may get fewer by design",
            repaired=replace(
                box,
                links=tuple(
                    replace(k, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s * lacking[end])
                    if k.is_nvlink and (end := k.a if k.a in lacking else k.b) in lacking
                    else k
                    for k in box.links
                ),
            ),
        )


# ------------------------------------------------------------------ sockets, host memory, network


def _sockets(box: Topology, by_pcie: Mapping[Pair, tuple[str, ...]]) -> Iterator[Finding]:
    """Pairs that cross from socket to socket on a link slower than their own."""
    cross = {frozenset((k.a, k.b)): k for k in box.links if k.kind in SOCKET_KINDS}
    pairs, used = [], set()
    for pair, path in by_pcie.items():
        over = [s for p in pairwise(path) if (s := frozenset(p)) in cross]
        if over:
            pairs.append(pair)
            used |= set(over)
    if not pairs:
        return
    slowest = min((cross[pair] for pair in used), key=lambda k: k.bandwidth_bytes_per_s)
    wide = sum(k.bandwidth_bytes_per_s for k in box.links if {k.a, k.b} & set(box.gpus)) / 2
    links = tuple(
        replace(k, bandwidth_bytes_per_s=max(k.bandwidth_bytes_per_s, wide))
        if k.kind in SOCKET_KINDS
        else k
        for k in box.links
    )
    yield Finding(
        code="sockets",
        severity="limit",
        what=f"{len(pairs)} GPU pairs ({_named(pairs)}) go from socket to socket, all over "
        f"{slowest.bandwidth_bytes_per_s / GB:.3g} GB/s",
        evidence=slowest.source or f"links of {box.name}",
        remedy="keep a group that exchanges much on one socket (the plan's placement does), or move "
        "the cards",
        repaired=replace(box, links=links),
    )


def _host_memory(box: Topology, by_pcie: Sequence[Pair]) -> Iterator[Finding]:
    """Host memory below what the GPUs on it ask for when all exchange at once."""
    if box.peer_to_peer or not by_pcie:
        return
    for node in box.nodes:
        links = [k for k in box.links if not k.is_nvlink and {k.a, k.b} & set(node.gpus)]
        asked = 2 * sum(k.bandwidth_bytes_per_s for k in links)
        if node.host_memory_bytes_per_s >= asked:
            continue
        nodes = tuple(
            replace(n, host_memory_bytes_per_s=asked) if n is node else n for n in box.nodes
        )
        yield Finding(
            code=f"host-memory-{node.name}",
            severity="limit",
            what=f"host memory of {node.name} carries {node.host_memory_bytes_per_s / GB:.3g} GB/s; its "
            f"{len(node.gpus)} GPUs, exchanging through it at the rate of their links, ask for "
            f"{asked / GB:.3g} (a store and a load for each byte)",
            evidence=f"host_memory of {node.name} and the links of its GPUs",
            remedy="a module in every memory channel; buffers on the GPU's own socket (numactl); or "
            "peer-to-peer",
            repaired=replace(box, nodes=nodes),
        )


def _wires(box: Topology, facts: Facts | None) -> Iterator[Finding]:
    """Networks at half rate or less: links of a known line rate, and runs over several hosts."""
    slow = []
    for link in box.links:
        line = _WIRE.fullmatch(link.kind)
        if line and link.bandwidth_bytes_per_s < SHORT * float(line[1]) * GB / 8:
            slow.append((link, float(line[1]) * GB / 8))
    remedy = (
        "TCP over one socket reaches half of a fast line: RDMA (RoCE, InfiniBand) where there is, else "
        "NCCL_SOCKET_NTHREADS and NCCL_NSOCKS_PERTHREAD, jumbo frames"
    )
    if slow:
        full = {id(link): rate * WIRE_SHARE for link, rate in slow}
        links = tuple(
            replace(k, bandwidth_bytes_per_s=full[id(k)]) if id(k) in full else k for k in box.links
        )
        link, rate = slow[0]
        yield Finding(
            code="network",
            severity="wrong",
            what=f"{link.a} to {link.b}: {link.bandwidth_bytes_per_s / GB:.3g} of {rate / GB:.3g} GB/s",
            evidence=link.source or f"links of {box.name}",
            remedy=remedy,
            repaired=replace(box, links=links),
        )
    rates = [] if facts is None else [r for _, r in facts.machine.nics if r is not None]
    for run in () if facts is None else facts.runs:
        line_rate = sum(r.value for r in rates)
        if len(run.hosts) > 1 and rates and run.busbw.value < SHORT * line_rate:
            yield Finding(
                code=f"network-{run.kind}",
                severity="wrong",
                what=f"{run.kind} over {len(run.hosts)} hosts: {run.busbw.value / GB:.3g} GB/s on the "
                f"bus of {line_rate / GB:.3g} that the adapters have",
                evidence=f"{run.busbw.at} and {rates[0].at}",
                remedy=remedy,
            )


def _mig(facts: Facts | None) -> Iterator[Finding]:
    if facts is not None and facts.mig_at is not None:
        yield Finding(
            code="mig",
            severity="wrong",
            what="a GPU is partitioned (MIG): its instances have no peer access and no NVLink",
            evidence=facts.mig_at,
            remedy="nvidia-smi -mig 0 on the GPUs of a parallel run",
        )


def _unmeasured(box: Topology) -> Iterator[Finding]:
    """Links that rest on nothing but their line rate."""
    used = [k for k in box.links if k.source.startswith(("nominal", "assumed"))]
    if used:
        none = "" if box.collectives else ", and no collective is"
        yield Finding(
            code="unmeasured",
            severity="unknown",
            what=f"{len(used)} of {len(box.links)} links are not measured{none}",
            evidence=used[0].source,
            remedy="nvbandwidth -j for --nvbandwidth; all_to_all and all_gather of nccl-tests at 2, 4 "
            "and 8 GPUs for --nccl-tests; or paradiff profile network",
        )
