"""A capacity answer as text, JSON and CSV.

Decides wording, keys and columns; every number comes from the answer. The block of 50 columns is that of
``vllm bench serve`` with queue wait, service and end-to-end latency in the place of tokens.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from analysis.text import count_of, seconds
from simulator.capacity import HOURS_PER_MONTH, Answer, Option
from simulator.estimates import Estimate
from simulator.outcome import MAX_LOAD, Outcome
from simulator.service import Service

SCHEMA = "paradiff.capacity/1"
WIDTH = 50
HEADER = (
    "#", "box", "cut of a node", "nodes", "GPUs", "90 %", "USD/month", "USD/1000 images", "p50", "p95",
    "p99", "busy",
)  # fmt: skip
LEFT = {"box", "cut of a node"}
"""Columns that read better flush left."""
IDLE_POWER = "power of idle GPUs and of hosts is not in the profiles"


# --------------------------------------------------------------------------------------- text


def title(answer: Answer) -> str:
    """What arrives and what is promised."""
    q = answer.question
    traffic, slo = q.demand.traffic, q.demand.slo
    mix = ", ".join(
        f"{label} {100 * share:.3g} %"
        for label, share in zip(q.labels, traffic.shares, strict=True)
    )
    shape = "Poisson" if traffic.burstiness == 1 else f"burstiness {traffic.burstiness:g}"
    if traffic.trace is not None:
        shape = f"a trace of {len(traffic.trace.arrival_s)} arrivals"
    promises = [f"p{100 * share:g} under {limit:g} s" for share, limit in slo.quantiles]
    promises += [
        f"{100 * slo.attainment:g} % of {label} within {deadline:g} s"
        for label, deadline in zip(q.labels, slo.deadlines, strict=True)
        if deadline is not None
    ]
    confidence = f", {100 * q.demand.budget.confidence:g} % confidence" if promises else ""
    return (
        f"{traffic.rate_per_s:.4g} requests/s ({shape}): {mix}; "
        f"{', '.join(promises) or 'no service level'}{confidence}"
    )


def rows(answer: Answer) -> list[list[str]]:
    """The options that have numbers, in their order."""
    out = []
    for number, option in enumerate(answer.options, 1):
        if option.cut is None or option.outcome is None:
            continue
        by_name = dict(option.outcome.quantiles_s)
        cost, per_1000 = option.cost_per_month, _per_1000(answer, option)
        busy = option.outcome.utilisation
        out.append(
            [
                str(number),
                option.box.topology.name,
                option.cut.text(answer.question.labels),
                str(option.nodes),
                str((option.nodes or 0) * option.box.gpus),
                _range(option) if answer.question.nodes is None else "-",
                "-" if cost is None else f"{cost:,.0f}",
                "-" if per_1000 is None else f"{per_1000:.2f}",
                *(
                    "saturated" if option.outcome.saturated
                    else seconds(by_name[q].value) if q in by_name else "-"
                    for q in (0.5, 0.95, 0.99)
                ),
                "-" if busy is None else f"{100 * busy:.0f} %",
            ]
        )  # fmt: skip
    return out


def _range(option: Option) -> str:
    low, high = option.nodes_low, option.nodes_high
    return f"{'?' if low is None else low} - {'none' if high is None else high}"


def _per_1000(answer: Answer, option: Option) -> float | None:
    return option.cost_per_1000_images(answer.question.images_per_request)


def recommendation(answer: Answer) -> Iterator[str]:
    """The first option in a few sentences."""
    best, q = answer.options[0], answer.question
    if best.outcome is None or best.cut is None:
        return
    o = best.outcome
    nodes = f"{count_of(best.nodes or 0, 'node')} of {best.box.topology.name}"
    verb = "Buy" if q.nodes is None else "With"
    yield f"{verb} {nodes} ({best.box.gpus} GPUs each), each cut {best.cut.text(q.labels)}."
    if o.saturated:
        yield (
            f"Saturated: {o.rate_per_s:.4g} requests/s arrive, {o.saturation_per_s:.4g} can be served; "
            "the queue grows without end and no latency can be named."
        )
    elif not o.settled:
        yield f"{_too_near(o)}."
    for check in o.checks:
        yield f"{check.text(q.labels)}."
    for kind, label in enumerate(q.labels):
        yield f"  {label}: " + "; ".join(_way(s) for s in _ways(best, kind))
    if q.nodes is None:
        yield (
            f"Service times carry the planner's 90 % interval: with all of them at its low end "
            f"{_nodes_or(best.nodes_low)}, at its high end {_nodes_or(best.nodes_high)}."
        )
    if best.cost_per_month is not None:
        yield (
            f"Price: {best.box.price_per_hour:g} USD an hour and node ({best.box.price_source}), "
            f"all {HOURS_PER_MONTH:g} hours of a month."
        )
    else:
        yield f"Price: not known ({best.box.price_source}); ranked by GPUs."
    if q.demand.failures is not None:
        f = q.demand.failures
        seen = o.failures
        few = "; too few to trust a tail, raise --num-prompts" if seen < 20 else ""
        yield (
            f"Failures: nodes are up {100 * f.availability:.4g} % of the time; {seen} were seen in "
            f"{o.duration_s / 3600:.3g} simulated hours{few}."
        )


def _too_near(o: Outcome) -> str:
    return (
        f"{100 * o.rate_per_s / o.saturation_per_s:.1f} % of the saturation rate, above "
        f"{100 * MAX_LOAD:g} %: too near for any promise"
    )


def _nodes_or(nodes: int | None) -> str:
    return "out of the reach of this cut" if nodes is None else count_of(nodes, "node")


def _ways(option: Option, kind: int) -> list[Service]:
    """Services of a class that the option's cut uses."""
    assert option.cut is not None
    widths = next(ws for pool in option.cut.pools for k, ws in pool.widths if k == kind)
    return [option.table[kind][w] for w in widths]


def _way(service: Service) -> str:
    gpus = f"{service.width} GPU{'s' * (service.width != 1)}"
    picture = "" if service.exact else ", not the same picture"
    return f"{service.spec} on {gpus} {seconds(service.batch_s[0])}{picture}"


def block(answer: Answer, option: Option) -> Iterator[str]:
    """The block that users of ``vllm bench serve`` know; nothing where the option has no numbers."""
    o = option.outcome
    if o is None:
        return

    def line(label: str, value: float | str | None) -> str:
        text = "-" if value is None else value if isinstance(value, str) else f"{value:.2f}"
        return f"{label:<40} {text:<10}".rstrip()

    yield f"{' Capacity Result ':=^{WIDTH}}"
    yield line("Nodes:", str(option.nodes))
    yield line("Request rate (req/s):", o.rate_per_s)
    yield line("Saturation rate (req/s):", o.saturation_per_s)
    if o.saturated:
        yield line("Latency:", "saturated")
        yield "=" * WIDTH
        return
    yield line("Requests simulated:", str(o.requests))
    yield line("Simulated duration (s):", o.duration_s)
    goodput = None if o.goodput_share is None else o.goodput_share * o.rate_per_s
    yield line("Request goodput (req/s):", goodput)
    yield line("Utilisation (%):", 100 * (o.utilisation or 0.0))
    sections: list[tuple[str, str, Estimate | None]] = [
        ("Queue Wait", "wait", o.wait),
        ("Service", "service", o.service),
        ("End-to-end Latency", "E2EL", o.latency),
    ]
    for name, short, estimate in sections:
        yield f"{name:-^{WIDTH}}"
        yield line(f"Mean {short} (ms):", None if estimate is None else 1000 * estimate.value)
        if short == "E2EL":
            for share, value in o.quantiles_s:
                word = "Median" if share == 0.5 else f"P{100 * share:g}"
                yield line(f"{word} {short} (ms):", 1000 * value.value)
    yield f"{'Cost and Energy':-^{WIDTH}}"
    yield line("Cost per month (USD):", option.cost_per_month)
    yield line("Cost per 1000 images (USD):", _per_1000(answer, option))
    energy = option.energy_wh_per_image(answer.question.images_per_request)
    yield line("Busy GPU energy per image (Wh):", energy)
    yield "=" * WIDTH


def unable(answer: Answer) -> Iterator[str]:
    """Each box that cannot, why, and what could."""
    for option in answer.options:
        if option.reason is not None:
            yield f"{option.box.topology.name}: {option.reason}"
            if option.nearest is not None:
                yield f"  {option.nearest}"
        elif not option.met:
            missed = [c for c in option.outcome.checks if not c.met] if option.outcome else []
            for check in missed:
                yield f"{option.box.topology.name}: {check.text(answer.question.labels)}."
            if (
                option.outcome is not None
                and not option.outcome.settled
                and not option.outcome.saturated
            ):
                yield f"{option.box.topology.name}: {_too_near(option.outcome)}"
            if option.outcome is not None and option.outcome.saturated:
                yield (
                    f"{option.box.topology.name}: saturated, {option.outcome.saturation_per_s:.4g} of "
                    f"{option.outcome.rate_per_s:.4g} requests/s can be served"
                )


# --------------------------------------------------------------------------------------- JSON, CSV


def to_json(answer: Answer) -> dict[str, Any]:
    """The keys are a contract. Times in seconds, money in USD; None is "not known"."""
    q = answer.question
    demand = q.demand
    best = answer.best
    return {
        "schema": SCHEMA,
        "request_rate_per_s": demand.traffic.rate_per_s,
        "burstiness": None if demand.traffic.trace is not None else demand.traffic.burstiness,
        "mix": [
            {"name": label, "model": entry.model, "share": share, "deadline_s": entry.deadline}
            | {k: getattr(w, k) for k in ("height", "width", "frames", "steps", "batch", "dtype")}
            for label, entry, share, w in zip(
                q.labels, q.classes, demand.traffic.shares, q.workloads, strict=True
            )
        ],
        "slo": {
            "quantiles": {f"p{100 * s:g}": limit for s, limit in demand.slo.quantiles},
            "attainment": demand.slo.attainment,
            "confidence": demand.budget.confidence,
        },
        "routing": demand.routing,
        "max_batch": demand.max_batch,
        "batch_window_s": demand.window_s,
        "failures": None if demand.failures is None else {
            "mtbf_s": demand.failures.mtbf_s, "repair_s": demand.failures.repair_s
        },
        "num_prompts": demand.budget.requests,
        "replications": demand.budget.replications,
        "seed": demand.budget.seed,
        "recommended": None if best is None else best.box.topology.name,
        "options": [_option_json(answer, option) for option in answer.options],
    }  # fmt: skip


def _option_json(answer: Answer, option: Option) -> dict[str, Any]:
    q, o = answer.question, option.outcome
    images = q.images_per_request
    return {
        "topology": option.box.topology.name,
        "gpus_per_node": option.box.gpus,
        "met": option.met,
        "reason": option.reason,
        "nearest": option.nearest,
        "cut": None if option.cut is None else option.cut.text(q.labels),
        "nodes": option.nodes,
        "nodes_low": option.nodes_low,
        "nodes_high": option.nodes_high,
        "services": {} if option.cut is None else {
            label: [_service_json(s) for s in _ways(option, kind)] for kind, label in enumerate(q.labels)
        },
        "price_per_hour": option.box.price_per_hour,
        "price_source": option.box.price_source,
        "cost_per_month": option.cost_per_month,
        "cost_per_1000_images": _per_1000(answer, option),
        "energy": {
            "busy_gpu_wh_per_image": option.energy_wh_per_image(images),
            "tdp_source": option.tdp_source,
            "idle_wh_per_image": None,
            "reason": IDLE_POWER,
        },
        "outcome": None if o is None else _outcome_json(o),
        "load_latency": [] if option.curves is None else [
            {"load": share} | _point_json(point) for share, point in option.curves.load
        ],
        "nodes_latency": [] if option.curves is None else [
            {"nodes": nodes} | _point_json(point) for nodes, point in option.curves.ladder
        ],
    }  # fmt: skip


def _service_json(s: Service) -> dict[str, Any]:
    return {
        "spec": s.spec,
        "gpus": s.width,
        "service_s": list(s.batch_s),
        "low": s.low,
        "high": s.high,
        "exact": s.exact,
        "provenance": s.provenance,
    }


def _estimate_json(e: Estimate | None) -> dict[str, float | None] | None:
    return None if e is None else {"value": e.value, "low": e.low, "high": e.high}


def _outcome_json(o: Outcome) -> dict[str, Any]:
    return {
        "saturated": o.saturated,
        "saturation_per_s": o.saturation_per_s,
        "utilisation": o.utilisation,
        "goodput_per_s": None if o.goodput_share is None else o.goodput_share * o.rate_per_s,
        "latency_mean_s": _estimate_json(o.latency),
        "wait_mean_s": _estimate_json(o.wait),
        "service_mean_s": _estimate_json(o.service),
        "latency_s": {f"p{100 * share:g}": _estimate_json(value) for share, value in o.quantiles_s},
        "checks": [check._asdict() for check in o.checks],
        "requests": o.requests,
        "simulated_s": o.duration_s,
        "failures": o.failures,
    }


def _point_json(o: Outcome) -> dict[str, Any]:
    quantiles = {f"p{100 * share:g}": value.value for share, value in o.quantiles_s}
    return {"rate_per_s": o.rate_per_s, "saturated": o.saturated, "latency_s": quantiles or None}


CSV_COLUMNS = (
    "topology", "met", "nodes", "nodes_low", "nodes_high", "gpus_per_node", "cut", "cost_per_month",
    "cost_per_1000_images", "busy_gpu_wh_per_image", "utilisation", "goodput_per_s", "saturated",
    "saturation_per_s", "wait_mean_s", "latency_mean_s", "reason",
)  # fmt: skip


def to_csv(answer: Answer) -> str:
    """One row a box, in order; quantiles in the columns after CSV_COLUMNS."""
    quantiles = [f"p{100 * q:g}" for q in answer.question.demand.quantiles]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *(f"latency_{q}_s" for q in quantiles)])
    for option in answer.options:
        data = _option_json(answer, option)
        outcome: dict[str, Any] = data["outcome"] or {}
        flat = data | outcome | data["energy"] | {"reason": data["reason"]}
        flat |= {
            key: (outcome.get(key) or {}).get("value") for key in ("wait_mean_s", "latency_mean_s")
        }
        latency = outcome.get("latency_s", {})
        writer.writerow(
            [
                *(flat.get(column) for column in CSV_COLUMNS),
                *((latency.get(q) or {}).get("value") for q in quantiles),
            ]
        )
    return stream.getvalue()
