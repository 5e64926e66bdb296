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

from paradiff.profiles import Profile
from paradiff.strategies import Workload, candidate_specs, parse_spec
from paradiff.strategies import facts as strategy_facts
from simulator.gpu import Gpu, load_gpu
from simulator.importers.assemble import NVLINK_SHARE, PCIE_SHARE
from simulator.importers.machine import Facts, pcie_bytes_per_s
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
_WIRE = re.compile(r"(?:ethernet|eth|roce|ib|infiniband)-?(\d+)(?:g|gbe)?")
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
        *_peer_access(box, facts, list(by_pcie)),
        *_slow_peers(box, facts),
        *_pcie(box, gpus),
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


# --------------------------------------------------------------------------------- peer-to-peer


def _peer_access(box: Topology, facts: Facts | None, pairs: Sequence[Pair]) -> Iterator[Finding]:
    if box.peer_to_peer or not pairs:
        return
    refused = [] if facts is None else [w for able, w in facts.access.values() if not able]
    known = facts is None or bool(facts.access)
    yield Finding(
        code="peer-to-peer",
        severity="wrong" if known else "unknown",
        what="peer-to-peer is off"
        if known
        else "nobody says whether peer-to-peer works; taken as off",
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


def _pcie(box: Topology, gpus: Mapping[str, Gpu]) -> Iterator[Finding]:
    """Links with fewer lanes, an older generation, or less bandwidth than there should be; those with
    the same complaint together."""
    profile = dict(zip(box.gpus, box.profiles, strict=True))
    complaints: dict[tuple[str, str], list[tuple[Link, float]]] = {}
    for link in box.links:
        if not link.kind.startswith("pcie"):
            continue
        ends = [end for end in (link.a, link.b) if end in profile]
        has = gpus[profile[ends[0]]].pcie if ends else None
        found = _complaint(link, has.value if has is not None else None)
        if found is not None:
            complaints.setdefault(found[:2], []).append((link, found[2]))
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


def _complaint(link: Link, generation: int | None) -> tuple[str, str, float] | None:
    """(code, sentence, bandwidth if it were right). ``generation`` is the GPU's, None for links
    between switches, which are compared with their own kind."""
    kind = _PCIE.fullmatch(link.kind)
    is_, lanes = (int(kind[1]), int(kind[2])) if kind else (generation, 16)
    wanted = generation or is_
    if wanted is None or is_ is None:
        return None
    full = pcie_bytes_per_s(wanted, 16) * PCIE_SHARE
    rate = link.bandwidth_bytes_per_s
    if lanes < 16:
        return f"pcie-x{lanes}", f"{lanes} of 16 lanes", full
    if is_ < wanted:
        return f"pcie{is_}", f"PCIe {is_} where the GPU has {wanted}", full
    if rate < SHORT * full:
        lanes = max(1, 2 ** round(math.log2(16 * rate / full)))
        what = f"{rate / GB:.3g} GB/s of {full / GB:.3g}, as if on {lanes} lanes"
        return f"slow-pcie-{lanes}", what, full
    return None


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
    few = [k for k in facts.machine.nvlinks if k.count is not None and k.count < has]
    if few:
        link = min(few, key=lambda k: k.count or 0)
        yield Finding(
            code="nvlinks-down",
            severity="wrong",
            what=f"GPU {link.a} has {link.count} NVLinks up of {has}",
            evidence=link.at,
            remedy="nvidia-smi nvlink -s shows which are down; restart the fabric manager, then the "
            "machine; a virtual machine may get fewer by design",
            repaired=replace(
                box,
                links=tuple(
                    replace(k, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s * has / link.count)
                    if k.is_nvlink and link.count and f"gpu{link.a}" in (k.a, k.b)
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
        if line and link.bandwidth_bytes_per_s < SHORT * int(line[1]) * GB / 8:
            slow.append((link, int(line[1]) * GB / 8))
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
    if used and not box.collectives:
        yield Finding(
            code="unmeasured",
            severity="unknown",
            what=f"{len(used)} of {len(box.links)} links are not measured, and no collective is",
            evidence=used[0].source,
            remedy="nvbandwidth -j for --nvbandwidth; all_to_all and all_gather of nccl-tests at 2, 4 "
            "and 8 GPUs for --nccl-tests; or paradiff profile network",
        )
