"""Plans and boxes in words: the ranked table, the recommendation, why the rest cannot run.

Decides wording and column order only; every number comes from the plan. ``table`` gives rows of text
so that the terminal table and the plain one cannot differ.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from simulator.costs import Scope
from simulator.one_number import Calibration
from simulator.planner import CURRENCY, Candidate, Plan
from simulator.price import price_of
from simulator.topology import Link, Topology

if TYPE_CHECKING:
    from analysis.doctor import Cost, Finding

HEADER = (
    "#", "strategy", "GPUs", "latency", "90 % interval", "speed-up",
    "compute", "comm", "bubble", "host", "memory", "output", "basis",
)  # fmt: skip
TOPOLOGY_ONLY = "links only"
WARM_UP = "warm-up"
CLOCKS: Mapping[Scope, str] = {
    "denoise": "the denoising loop",
    "latent": "text encoders and denoising loop",
    "pipeline": "text encoders, denoising loop and VAE",
}
"""What a clock covers."""
COST = f"{CURRENCY} per request"
FRONT = "*"
"""Mark of what is on the front of latency, memory and staleness."""
LEFT = {"strategy", "output", "basis"}
"""Columns that read better flush left."""
USUAL_BYTES = (2**16, 2**27)
"""Collectives of diffusion models are hardly smaller or larger."""
EXPENDABLE = ("basis", "host", "bubble", WARM_UP, "compute", "comm", "90 % interval", "memory")
"""Columns that a narrow terminal goes without, the first of them first."""


def seconds(value: float | None) -> str:
    """About three digits, never scientific: ``3.14 s``, ``0.0123 s``, ``812 s``, ``0 s``."""
    if value is None:
        return "-"
    if value < 5e-5:
        return "0 s"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{digits}f} s"


def gigabytes(value: int | None) -> str:
    """Decimal gigabytes, as GPU makers count them."""
    return "-" if value is None else f"{value / 1e9:.1f} GB"


def output_of(candidate: Candidate) -> str:
    """What the picture is compared with one GPU's: ``exact``, or how stale."""
    if candidate.exact:
        return "exact"
    steps = candidate.max_staleness_steps
    if not steps:
        return "approximate"
    return f"stale {count_of(steps, 'step')}"


def table(plan: Plan, top: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the ``top`` feasible candidates, best first."""
    shown = plan.ranked[:top]
    with_links = any(c.topology_only_latency_s is not None for c in shown)
    header = list(HEADER)
    if with_links:
        header.insert(header.index("speed-up"), TOPOLOGY_ONLY)
    with_cost = plan.objective == "cost"
    if with_cost:
        header.insert(header.index("latency"), COST)
    with_warm_up = any(c.max_staleness_steps for c in shown)
    if with_warm_up:
        header.insert(header.index("basis"), WARM_UP)
    rows = []
    for number, c in enumerate(shown, 1):
        row = [
            f"{FRONT if c.pareto else ''}{number}",
            c.spec,
            str(c.n_gpus),
            seconds(c.latency_s),
            f"{seconds(c.latency_low_s)[:-2]} - {seconds(c.latency_high_s)}",
            "-" if c.speedup is None else f"{c.speedup:.2f}x",
            seconds(c.compute_s),
            seconds(c.exposed_comm_s),
            seconds(c.bubble_s),
            seconds(c.host_s),
            gigabytes(c.peak_memory_bytes),
            output_of(c),
            c.provenance or "-",
        ]
        if with_cost:
            row.insert(header.index(COST), "no price" if c.cost is None else f"{c.cost:.3g}")
        if with_links:
            row.insert(header.index(TOPOLOGY_ONLY), _links_only(c))
        if with_warm_up:
            row.insert(header.index(WARM_UP), _warm_up(c))
        rows.append(row)
    return header, rows


def _warm_up(candidate: Candidate) -> str:
    """The steps before the first that reads old values, where there is one."""
    return str(candidate.synchronous_steps) if candidate.max_staleness_steps else "-"


def _links_only(candidate: Candidate) -> str:
    """The prediction without the measured tables, and how far it is from the one with them."""
    links, measured = candidate.topology_only_latency_s, candidate.latency_s
    if links is None or not measured:
        return "-"
    return f"{seconds(links)} ({links / measured - 1:+.0%})"


def plain(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Container[str] = LEFT
) -> Iterator[str]:
    """Aligned columns without lines or colours, for pipes and files; ``left`` names the flush left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def fitted(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[str], list[list[str]]]:
    """The table without as many of the EXPENDABLE columns as it takes to fit into ``width``."""
    kept = list(header)
    for name in EXPENDABLE:
        wide = (max(len(row[header.index(n)]) for row in (header, *rows)) + 3 for n in kept)
        if sum(wide) <= width:
            break
        kept.remove(name)
    at = [header.index(name) for name in kept]
    return kept, [[row[i] for i in at] for row in rows]


def title(plan: Plan) -> str:
    """Model, box and workload in one line."""
    w = plan.workload
    frames = f", {w.frames} frames" if w.frames > 1 else ""
    return (
        f"{plan.model} on {plan.topology} ({plan.gpus} GPUs): {w.width}x{w.height}{frames}, "
        f"{w.steps} steps, batch {w.batch}, {w.dtype}, {plan.runtime}; best {plan.objective} first"
    )


def baseline_line(plan: Plan) -> str:
    """What one GPU does."""
    base = plan.baseline
    if base.latency_s is None or base.stages is None:
        return f"one GPU cannot run it: {base.reason}"
    s = base.stages
    return (
        f"one GPU: {seconds(base.latency_s)} (text encoders {seconds(s.text_encoder_s)}, denoising "
        f"{seconds(s.denoise_s)}, VAE {seconds(s.vae_s)}), peak {gigabytes(base.peak_memory_bytes)}"
    )


def recommendation(plan: Plan) -> str:
    """The first choice in a few sentences: how fast, why, what is exact, memory, basis."""
    best = plan.ranked[0]
    faster = f", {best.speedup:.2f} times one GPU" if best.speedup else ""
    split = ""
    if best.stages is not None:
        s = best.stages
        serial = s.text_encoder_s + s.vae_s
        split = f" ({seconds(s.denoise_s)} denoising, {seconds(serial)} text encoders and VAE)"
    return "\n".join(
        [
            f"Run {best.spec} on {count_of(best.n_gpus or 0, 'GPU')}: "
            f"{seconds(best.latency_s)}, 90 % between {seconds(best.latency_low_s)} and "
            f"{seconds(best.latency_high_s)}{faster}{split}.",
            f"Placement: {placement_of(best)}.",
            f"Why: {plan.decided_by}.",
            f"Output: {_output_sentence(plan)}",
            f"Memory: {gigabytes(best.peak_memory_bytes)} of {gigabytes(plan.gpu_memory_bytes)} a GPU "
            f"at its peak. Basis of the times: {best.provenance}.",
            *(f"Calibration: {calibration_of(c)}." for c in [plan.calibration] if c is not None),
            f"Box: {box_of(plan.box)}.",
            *(f"Note: {note}." for note in plan.notes),
        ]
    )


def calibration_of(known: Calibration) -> str:
    """Which measurement the times rest on, and what it made of the loop's."""
    scaled = f"device time of the loop x {known.device_scale:.4g}"
    if known.host_scale != 1:
        scaled += f", launches x {known.host_scale:.4g}"
    return (
        f"one {known.gpu} took {seconds(known.measured_s)} (scope {known.scope}: {CLOCKS[known.scope]}),"
        f" {seconds(known.predicted_s)} without it; {scaled}"
    )


def box_of(box: Topology) -> str:
    """Whether its GPUs reach each other, and what of its collectives was measured."""
    peers = "peer-to-peer" if box.peer_to_peer else "no peer-to-peer (transfers cross host memory)"
    if not box.collectives:
        return f"{peers}; no measured collectives, all are priced from the links"
    ranks: dict[str, list[int]] = {}
    for each in sorted(box.collectives, key=lambda table: table.ranks):
        ranks.setdefault(each.kind, []).append(each.ranks)
    kinds: dict[str, list[str]] = {}
    for kind, sizes in ranks.items():
        kinds.setdefault(listed([str(n) for n in dict.fromkeys(sizes)]), []).append(kind)
    measured = "; ".join(f"{listed(names)} over {n} GPUs" for n, names in kinds.items())
    return f"{peers}; measured collectives: {measured}; all others are priced from the links"


def bounded_line(plan: Plan, top: int) -> str:
    """How many were left out because of their bounds, and how near the nearest could come."""
    nearest = min(plan.bounded, key=lambda c: c.bound_s or 0.0)
    return (
        f"{count_of(len(plan.bounded), 'candidate')} not simulated: behind the {top} best whatever the "
        f"links do ({nearest.spec} takes at least {seconds(nearest.bound_s)}; --exhaustive)."
    )


def placement_of(candidate: Candidate) -> str:
    """Which rank runs on which GPU of the box."""
    gpus = candidate.placement or ()
    if len(gpus) == 1:
        return f"rank 0 on GPU {gpus[0]}"
    return f"ranks 0 to {len(gpus) - 1} on GPUs {', '.join(map(str, gpus))}"


def _output_sentence(plan: Plan) -> str:
    best = plan.ranked[0]
    if best.exact:
        return "the same picture as one GPU, up to rounding."
    steps = best.max_staleness_steps or 0
    fresh = count_of(best.synchronous_steps or 0, "synchronous step")
    changes = [f"values up to {count_of(steps, 'step')} old are read after {fresh}"] * (steps > 0)
    changes += ["weights are stored in 8 bits"] * ("fp8" in best.spec)
    changes += ["the picture is decoded in tiles"] * ("vae=tiled" in best.spec)
    what = " and ".join(changes) or "nothing is exchanged"
    exact = next((c for c in plan.ranked if c.exact), None)
    instead = (
        "" if exact is None else f" Best that keeps it: {exact.spec}, {seconds(exact.latency_s)}."
    )
    known = (
        f"how much that changes it is not known for {plan.model}"
        if best.quality is None
        else f"{plan.quality_metric} {best.quality:.3g} ({best.quality_source})"
    )
    return f"not the same picture as one GPU: {what}; {known}.{instead}"


def losses(plan: Plan, top: int) -> Iterator[str]:
    """The measured losses of the ``top`` candidates, each with its source."""
    for c in plan.ranked[:top]:
        if c.quality is not None:
            yield f"{c.spec}: {plan.quality_metric} {c.quality:.3g}, {c.quality_source}"


def count_of(number: int, noun: str) -> str:
    """``1 GPU``, ``2 GPUs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(texts: Sequence[str]) -> str:
    """``a, b and c``."""
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last


def rejected(candidates: Sequence[Candidate], limit: int = 6) -> Iterator[str]:
    """Why the infeasible ones cannot run, those with one reason together."""
    out = [c for c in candidates if not c.feasible]
    ordered = sorted(out, key=lambda c: (c.reason or "", c.spec))
    groups = [(r, [c.spec for c in g]) for r, g in groupby(ordered, key=lambda c: c.reason)]
    for reason, specs in groups[:limit]:
        more = f" and {len(specs) - 2} more" if len(specs) > 3 else ""
        named = ", ".join(specs if not more else specs[:2])
        alone = len(specs) == 1 and (reason or "").startswith(f"{specs[0]}:")
        yield reason or named if alone else f"{named}{more}: {reason}"
    if len(groups) > limit:
        yield f"and {len(groups) - limit} more reasons; --format json lists all"


KIND = {"wrong": "WRONG", "limit": "LIMIT", "unknown": "NOT KNOWN"}


def findings(found: Sequence[Finding], worth: Mapping[str, Cost], model: str) -> Iterator[str]:
    """What the box doctor found, a paragraph each."""
    if not found:
        yield "Nothing wrong was found."
    for finding in found:
        yield f"{KIND[finding.severity]}: {finding.what}."
        yield f"  evidence: {finding.evidence}"
        cost = worth.get(finding.code)
        if cost is not None:
            yield f"  costs: {_gain(cost, model)}"
        yield f"  do: {finding.remedy}"


def _gain(cost: Cost, model: str) -> str:
    """What a repair would change for the best plan, and for the best that keeps the picture."""

    def change(now: float | None, then: float | None) -> str:
        if now is None or then is None:
            return f"{seconds(now)} now, {seconds(then)} if repaired"
        if now < then * 1.001:
            return (
                f"nothing ({seconds(now)})"
                if then < now * 1.001
                else f"repair is slower: {seconds(then)}"
            )
        return f"{now / then:.2f} times ({seconds(now)}, {seconds(then)} if repaired)"

    best, exact = (
        change(cost.latency_s, cost.repaired_s),
        change(cost.exact_s, cost.exact_repaired_s),
    )
    return f"{model}, best plan {best}; best that keeps the picture {exact}"


def topology_tree(box: Topology) -> Iterator[str]:
    """The box as a tree: each switch with its GPUs, then what joins the switches."""
    per_hour = price_of(box).per_hour
    price = "" if per_hour is None else f", {per_hour:g} USD per hour"
    peers = "" if box.peer_to_peer else ", no peer-to-peer (transfers cross host memory)"
    yield f"{box.name}: {len(box.gpus)} GPUs{peers}{price}"
    profile = dict(zip(box.gpus, box.profiles, strict=True))
    for node in box.nodes:
        memory = node.host_memory_bytes_per_s
        host = f", host memory {memory / 1e9:g} GB/s" if memory < float("inf") else ""
        yield f"+- {node.name}{host}"
        for gpu in node.gpus:
            ends = [
                f"{link.b if link.a == gpu else link.a} ({_cable(link)})"
                for link in box.links
                if gpu in (link.a, link.b)
            ]
            yield f"|  +- {gpu} {profile[gpu]} -- {', '.join(ends)}"
    for link in box.links:
        if link.a in box.switches and link.b in box.switches:
            yield f"+- {link.a} -- {link.b} ({_cable(link)})"
    for each in box.collectives:
        yield f"+- measured {each.kind} over {each.ranks}: {each.sizes_text}; {each.source}"
    yield f"source: {' '.join(box.source.split())}"


def measured_sizes(box: Topology) -> Iterator[str]:
    """The sizes of each measured table, and what to measure where models have others."""
    for each in box.collectives:
        yield f"{each.kind} over {count_of(each.ranks, 'GPU')}: measured {each.sizes_text}"
    if any(not each.covers(size) for each in box.collectives for size in USUAL_BYTES):
        ask = "measure nccl-tests -b 1K -e 512M -f 2"
        yield f"Other sizes take the links' time, scaled to meet these; {ask}."


def _cable(link: Link) -> str:
    half = ", half duplex" if link.duplex == "half" else ""
    return f"{link.kind}, {link.rate_text}, {link.latency_s * 1e6:g} us{half}"
