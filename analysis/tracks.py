"""What a run did to links and memory over time, and who sent to whom, for a trace file.

Decides what is counted and drawn. Of a simulated run, links as the engine shared them out; of a measured
one, whose links nobody watched, what every rank sent and received while its transfers ran; of one whose
ranks share a process, no links, as payloads change hands there. Memory is the model's
(``simulator.memory``), at the times of the run: what is resident in a phase, and the activations of the
computation that runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

from paradiff.graph import ScheduleGraph, sends, traffic
from paradiff.profiles import Profile
from paradiff.strategies.builder import DTYPE_BYTES
from paradiff.trace import TRANSFERS, Arrow, Counter, LinkUse, Span, Trace, Tracks
from simulator.engine import Flows
from simulator.memory import PHASES, RankMemory, live_bytes, phase_memory, phase_of, shared
from simulator.network import Network
from simulator.symmetry import Quotient, whole

UNWATCHED = "links were not watched: what each rank sends and receives, evenly over its transfers"
NO_LINKS = "no links: all ranks in one process, payloads change hands"
_ENDS = re.compile(r"->|--|\.host$")
"""Between the names of a resource of the network."""
Piece = tuple[float, float, float]
"""A part of a number over time: from, until, how much."""


def simulated(
    flows: Iterable[Flows],
    network: Network,
    schedule: Quotient,
    memory: Iterable[Counter],
    devices: Collection[int] | None = None,
) -> Tracks:
    """The ``flows`` that the engine logged of ``schedule``, link by link; utilisation in percent of the
    capacity.

    ``devices``: links to GPUs other than these are left out.
    """
    box = network.topology
    others = {gpu for i, gpu in enumerate(box.gpus) if devices is not None and i not in devices}
    kept = [others.isdisjoint(_ENDS.split(r.name)) for r in network.resources]
    uses, pieces = list[LinkUse](), dict[int, list[Piece]]()
    for op, begin_s, end_s, routes, rates in flows:
        taken: dict[int, float] = {}
        for route, rate in zip(routes, rates, strict=True):
            for resource, weight in network.usage(route):
                if kept[resource]:
                    taken[resource] = taken.get(resource, 0.0) + weight * rate
        for resource, rate in taken.items():
            uses.append(LinkUse(network.resources[resource].name, op, begin_s, end_s, rate))
            share = 100 * rate / network.capacities[resource]
            pieces.setdefault(resource, []).append((begin_s, end_s, share))
    links = [Counter(network.resources[r].name, None, "%", levels(pieces[r])) for r in pieces]
    return Tracks(arrows(schedule), joined(uses), (*sorted(links), *memory))


def measured(graph: ScheduleGraph, trace: Trace, profile: Profile) -> Tracks:
    """What each rank sent and received, evenly while its transfers ran, in GB/s."""
    sent = _sent(graph, trace)
    pieces: dict[str, list[Piece]] = {}
    for use in sent:
        pieces.setdefault(use.link, []).append((use.begin_s, use.end_s, use.bytes_per_s / 1e9))
    links = [Counter(link, None, "GB/s", levels(pieces[link])) for link in sorted(pieces)]
    memory = modelled_memory(graph, trace, profile)
    return Tracks(arrows(whole(graph)), sent, (*links, *memory), UNWATCHED)


def in_one_process(graph: ScheduleGraph, trace: Trace, profile: Profile) -> Tracks:
    """Of a run, simulated or measured, whose ranks share a process."""
    memory = tuple(modelled_memory(graph, trace, profile))
    return Tracks(arrows(whole(graph)), (), memory, NO_LINKS)


def modelled_memory(graph: ScheduleGraph, trace: Trace, profile: Profile) -> Iterator[Counter]:
    """``memory_over_time`` of a graph that is run as it is, in the precision it was made for."""
    dtype = dict(graph.meta)["dtype"]
    return memory_over_time(graph, trace, profile, dtype, phase_memory(graph, profile, dtype))


def arrows(schedule: Quotient) -> tuple[Arrow, ...]:
    """Who sends to whom in every transfer (``paradiff.graph.sends``), between ranks that are drawn: of
    alike ones the representative sends to the representative of whom it sends to."""
    alike, found = schedule.representative, list[Arrow]()
    for section, members in zip(schedule.graph.sections, schedule.members, strict=True):
        pairs = [
            dict.fromkeys(
                (alike[a], alike[b]) for ranks in each for a, b in sends(op.kind, op.call, ranks)
            )
            for op, each in zip(section.ops, members, strict=True)
        ]
        for i in range(section.count):
            base = section.first + i * section.stride
            found += [
                Arrow(op.id_at(base), a, b)
                for op, each in zip(section.ops, pairs, strict=True)
                for a, b in each
                if a != b and a in op.ranks and b in op.ranks
            ]
    return tuple(found)


def _sent(graph: ScheduleGraph, trace: Trace) -> list[LinkUse]:
    moves = {each.id: traffic(each.op) for each in graph.instances() if each.op.kind in TRANSFERS}
    return [
        LinkUse(f"rank {span.rank} {way}", span.id, span.start_s, span.end_s, nbytes / seconds)
        for span in trace.spans
        if span.id in moves and (seconds := span.end_s - span.start_s) > 0
        for way, nbytes in zip(("sends", "receives"), moves[span.id][span.rank], strict=True)
        if nbytes
    ]


def joined(uses: Iterable[LinkUse]) -> tuple[LinkUse, ...]:
    """One use for each op and link, from its first byte to its last, at its mean rate."""
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    for use in uses:
        begin, end, nbytes = found.get((use.link, use.op), (use.begin_s, use.end_s, 0.0))
        nbytes += (use.end_s - use.begin_s) * use.bytes_per_s
        found[use.link, use.op] = min(begin, use.begin_s), max(end, use.end_s), nbytes
    return tuple(
        LinkUse(link, op, begin, end, nbytes / (end - begin))
        for (link, op), (begin, end, nbytes) in found.items()
    )


def levels(pieces: Iterable[Piece]) -> tuple[tuple[float, float], ...]:
    """(seconds, sum of the pieces from then on) where that changes, from 0 s on."""
    changes: dict[float, list[tuple[int, float]]] = {0.0: []}
    for begin, end, value in pieces:
        changes.setdefault(begin, []).append((1, value))
        changes.setdefault(end, []).append((-1, value))
    points: list[tuple[float, float]] = []
    active, total = 0, 0.0
    for at in sorted(changes):
        for sign, value in changes[at]:
            active, total = active + sign, total + sign * value
        total = total if active else 0.0
        if not points or points[-1][1] != total:
            points.append((at, total))
    return tuple(points)


def memory_over_time(
    graph: ScheduleGraph,
    trace: Trace,
    profile: Profile,
    dtype: str,
    memory: Sequence[Sequence[RankMemory]],
    *,
    captured: bool = False,
) -> Iterator[Counter]:
    """A counter for each rank of ``trace``, in GB; its maximum is the rank's peak.

    ``memory``: of every rank in each of PHASES (``simulator.memory.phase_memory``); ``captured`` as it
    was told: what CUDA graphs of the denoiser work on is among what is resident.
    """
    profile, itemsize = shared(profile, graph), DTYPE_BYTES[dtype]
    phases = {name: PHASES.index(phase_of(name, profile)) for name in profile.stages}
    works = {op.work for section in graph.sections for op in section.ops if op.work is not None}
    live = {
        work: 0.0 if captured and work.stage == "denoiser" else live_bytes(profile, work, itemsize)
        for work in works
    }
    ops = {each.id: each.op for each in graph.instances() if each.op.work is not None}
    own: dict[int, list[Span]] = {rank: [] for rank in trace.ranks()}
    for span in trace.spans:
        if span.id in ops:
            own[span.rank].append(span)
    for rank, spans in own.items():
        begins: dict[int, float] = {}
        pieces: list[Piece] = []
        for span in spans:
            work = ops[span.id].work
            assert work is not None
            begins.setdefault(phases[work.stage], span.start_s)
            pieces.append((span.start_s, span.end_s, live[work] / 1e9))
        ordered = sorted(begins)
        starts = [0.0, *(begins[phase] for phase in ordered[1:]), trace.makespan_s]
        for phase, (begin, end) in zip(ordered, pairwise(starts), strict=True):
            at_most = memory[rank][phase]
            pieces.append((begin, end, (at_most.total - at_most.activations) / 1e9))
        yield Counter("modelled memory", rank, "GB", levels(pieces))
