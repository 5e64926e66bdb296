"""``paradiff capacity``: how many nodes, how cut, at what cost."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from paradiff.cli.common import (
    INFEASIBLE,
    Dtype,
    ExactOnly,
    Launches,
    MaxStaleness,
    Specs,
    check_output_dir,
    json_text,
    load_model,
    one_message,
    parsed_specs,
    progress,
    shipped,
    staged,
    workload_of,
)

if TYPE_CHECKING:
    from simulator.capacity import Answer, Box
    from simulator.outcome import Slo
    from simulator.queueing import Failures
    from simulator.topology import Topology
    from simulator.traffic import RequestClass

MOST = 1e6
"""Requests a second, and burstiness; the least is one over it."""


def capacity(
    topology: Annotated[
        list[str],
        typer.Option(
            help="Box: a shipped name or a YAML file; several are compared.",
            autocompletion=shipped("topologies"),
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:WEIGHT][,KEY=VALUE...]",
            help="A class of requests: sdxl:0.7,height=512,steps=30,deadline=8s. Default: sdxl.",
            autocompletion=shipped("models", ".json"),
        ),
    ] = None,
    mix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The classes as a YAML file.")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(metavar="R", help="Requests per second, of all classes.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gamma gaps; 1: Poisson, less: burstier.")
    ] = 1.0,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Arrivals: CSV with arrival_s[,model].")
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="pQ=TIME", help="Latency that Q percent stay below: p99=10s."),
    ] = None,
    attainment: Annotated[
        float, typer.Option(help="Share of a class that must meet its deadline.")
    ] = 0.99,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="GPUs of a node to use; default: all.")
    ] = None,
    max_width: Annotated[int, typer.Option(min=1, help="Most GPUs for one request.")] = 8,
    sharing: Annotated[
        Literal["any", "static", "dynamic"],
        typer.Option(help="Replicas of fixed width, or GPUs dealt out request by request."),
    ] = "any",
    routing: Annotated[
        Literal["shared", "shortest-queue", "round-robin", "random"],
        typer.Option(help="One queue for all replicas, or how to choose a replica's."),
    ] = "shared",
    max_batch: Annotated[int, typer.Option(min=1, help="Requests served together.")] = 1,
    batch_window: Annotated[
        str, typer.Option(metavar="TIME", help="How long a request waits for its batch: 200ms.")
    ] = "0s",
    mtbf: Annotated[
        str | None, typer.Option(metavar="TIME", help="Mean time between failures of a node: 500h.")
    ] = None,
    repair_time: Annotated[
        str, typer.Option(metavar="TIME", help="Mean time until a failed node is back.")
    ] = "4h",
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="BOX=PRICE", help="Of a node per hour: 'pcie8=9.12 USD'."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Look at N nodes; no search.")
    ] = None,
    max_nodes: Annotated[int, typer.Option(min=1, help="Most nodes to try.")] = 1000,
    num_prompts: Annotated[
        int, typer.Option(min=100, help="Requests simulated for each number that is confirmed.")
    ] = 50_000,
    replications: Annotated[
        int, typer.Option(min=2, max=100, help="Independent runs that they are split into.")
    ] = 10,
    confidence: Annotated[float, typer.Option(help="With which the level is kept.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to report.")] = "50,95,99",
    dtype: Dtype = "bf16",
    runtime: Launches = "eager",
    strategy: Specs = None,
    exact_only: ExactOnly = False,
    max_staleness: MaxStaleness = None,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Default: one a core.")
    ] = None,
    format_: Annotated[
        Literal["table", "json", "csv"], typer.Option("--format", help="Output on stdout.")
    ] = "table",
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write capacity.json, capacity.csv, capacity.html."),
    ] = None,
) -> None:
    """Find the cheapest number of nodes that keeps a service level, and how to cut them."""
    with one_message():
        from paradiff.config import ConfigError
        from simulator.capacity import Question, answer
        from simulator.outcome import Budget
        from simulator.parallel import WorkersDied
        from simulator.planner import Goal
        from simulator.search import Demand
        from simulator.topology import load_topology
        from simulator.traffic import load_trace, traffic_of

        check_output_dir(output_dir)
        classes = _classes(model or [], mix)
        boxes = _boxes([load_topology(name) for name in topology], gpus, price or [])
        profiles = tuple(load_model(entry.model) for entry in classes)
        sizes = ("height", "width", "frames", "steps")
        workloads = tuple(
            workload_of(p, {key: getattr(entry, key) for key in sizes}, entry.batch, dtype)
            for p, entry in zip(profiles, classes, strict=True)
        )
        promised = _slo(slo or [], classes, attainment)
        if promised.is_empty and nodes is None:
            raise ConfigError(
                "nothing is asked of the service, allowed: --slo p99=10s, a deadline of a class, "
                "or --nodes N to look at a number"
            )
        _between("--confidence", confidence, 0.5, 1)
        if (request_rate is None) == (trace is None):
            raise ConfigError("give one of --request-rate R and --trace FILE")
        for name, value in (("--request-rate", request_rate), ("--burstiness", burstiness)):
            if value is not None and not 1 / MOST <= value <= MOST:
                raise ConfigError(f"{name} {value:g}: allowed: {1 / MOST:g} to {MOST:g}")
        arrivals = None if trace is None else load_trace(trace, classes)
        demand = Demand(
            traffic=traffic_of(classes, request_rate, burstiness, arrivals),
            slo=promised,
            budget=Budget(
                requests=num_prompts, replications=replications, seed=seed, confidence=confidence
            ),
            sharing=sharing,
            routing=routing,
            max_batch=max_batch,
            window_s=_time("--batch-window", batch_window, positive=False),
            failures=_failures(mtbf, repair_time),
            quantiles=_percentiles(metric_percentiles),
            max_nodes=max_nodes,
        )
        question = Question(
            boxes=boxes, classes=classes, profiles=profiles, workloads=workloads, demand=demand,
            nodes=nodes, max_width=max_width, runtime=runtime, specs=parsed_specs(strategy or []),
            goal=Goal(exact_only=exact_only, max_staleness=max_staleness),
        )  # fmt: skip
        with progress(enabled=format_ == "table") as advance:
            try:
                found = answer(question, processes or os.cpu_count() or 1, advance)
            except WorkersDied as error:
                raise ConfigError(f"--processes {processes}: {error}") from None
        if output_dir is not None:
            with staged(output_dir) as folder:
                _stage(folder, found)
    _print(found, format_)
    if not found.options[0].met:
        _explain(found)
        raise typer.Exit(INFEASIBLE)


# --------------------------------------------------------------------------------------- arguments


def _classes(texts: Sequence[str], mix: Path | None) -> tuple[RequestClass, ...]:
    from paradiff.config import ConfigError
    from simulator.traffic import load_mix, parse_mix

    if mix is not None and texts:
        raise ConfigError("give the classes with --mix or with --model, not with both")
    return load_mix(mix) if mix is not None else parse_mix(texts or ["sdxl"])


def _boxes(
    topologies: Sequence[Topology], gpus: int | None, prices: Sequence[str]
) -> tuple[Box, ...]:
    from paradiff.config import ConfigError, nearest
    from paradiff.units import parse_quantity
    from simulator.capacity import Box
    from simulator.price import Price, price_of

    names = [box.name for box in topologies]
    given: dict[str, float] = {}
    for item in prices:
        name, _, text = (part.strip() for part in item.partition("="))
        if name not in names:
            shown = ", ".join(nearest(name, names))
            raise ConfigError(f"--price {item}: no such box ({name!r}), allowed: {shown}")
        try:
            given[name] = parse_quantity(text, "money", minimum=math.ulp(0.0))
        except ValueError as error:
            raise ConfigError(f"--price {item}: {error}") from None
    boxes = []
    for box in topologies:
        if names.count(box.name) > 1:
            raise ConfigError(f"--topology: two boxes are called {box.name!r}")
        if gpus is not None and gpus > len(box.gpus):
            raise ConfigError(f"--gpus {gpus}: {box.name} has {len(box.gpus)}")
        price = Price(given[box.name], "--price") if box.name in given else price_of(box)
        hint = "; give --price" if price.per_hour is None else ""
        boxes.append(
            Box(
                topology=box,
                gpus=gpus or len(box.gpus),
                price_per_hour=price.per_hour,
                price_source=price.source + hint,
            )
        )
    return tuple(boxes)


def _slo(texts: Sequence[str], classes: Sequence[RequestClass], attainment: float) -> Slo:
    from paradiff.config import ConfigError
    from simulator.outcome import Slo

    quantiles: dict[float, float] = {}
    for text in texts:
        name, _, limit = (part.strip() for part in text.partition("="))
        try:
            percent = float(name.removeprefix("p")) if name.startswith("p") else math.nan
        except ValueError:
            percent = math.nan
        if not 0 < percent < 100:
            raise ConfigError(
                f"--slo {text}: not a percentile ({name!r}), allowed: p50=2s, p99=10s"
            )
        if percent / 100 in quantiles:
            raise ConfigError(f"--slo {text}: {name} is given twice")
        quantiles[percent / 100] = _time(f"--slo {text}", limit)
    _between("--attainment", attainment, 0, 1)
    return Slo(
        quantiles=tuple(sorted(quantiles.items())),
        deadlines=tuple(entry.deadline for entry in classes),
        attainment=attainment,
    )


def _failures(mtbf: str | None, repair_time: str) -> Failures | None:
    from simulator.queueing import Failures

    repair_s = _time("--repair-time", repair_time)
    return None if mtbf is None else Failures(mtbf_s=_time("--mtbf", mtbf), repair_s=repair_s)


def _percentiles(text: str) -> tuple[float, ...]:
    from paradiff.config import ConfigError

    try:
        shares = sorted({float(part) / 100 for part in text.split(",")})
    except ValueError:
        shares = [math.nan]
    if not all(0 < share < 1 for share in shares):
        raise ConfigError(f"--metric-percentiles {text}: allowed: numbers between 0 and 100, 50,99")
    return tuple(shares)


def _time(option: str, text: str, *, positive: bool = True) -> float:
    from paradiff.config import ConfigError
    from paradiff.units import parse_quantity

    try:
        return parse_quantity(text, "time", minimum=math.ulp(0.0) if positive else 0.0)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _between(option: str, value: float, low: float, high: float) -> None:
    from paradiff.config import ConfigError

    if not low < value < high:
        raise ConfigError(f"{option} {value:g}: allowed: between {low:g} and {high:g}")


# --------------------------------------------------------------------------------------- output


def _print(found: Answer, form: str) -> None:
    from analysis import capacity as words
    from analysis.text import plain

    if form == "json":
        typer.echo(json_text(words.to_json(found)), nl=False)
        return
    if form == "csv":
        typer.echo(words.to_csv(found), nl=False)
        return
    typer.echo(words.title(found) + "\n")
    rows = words.rows(found)
    if not rows:
        return
    typer.echo("\n".join(plain(words.HEADER, rows, words.LEFT)) + "\n")
    typer.echo("\n".join([*words.recommendation(found), "", *words.block(found, found.options[0])]))
    others = list(words.unable(found)) if found.best is not None else []
    if others:
        typer.echo("\nNot possible:\n" + "\n".join(f"  {line}" for line in others))


def _explain(found: Answer) -> None:
    """On stderr: why no box keeps the level, and what would be near."""
    from analysis import capacity as words

    asked = found.question.nodes
    many = "no number of nodes keeps" if asked is None else f"--nodes {asked} does not keep"
    hint = "" if asked is None else "; without --nodes the number that does is looked for"
    typer.echo(f"paradiff: {many} the service level{hint}", err=True)
    for line in words.unable(found):
        typer.echo(f"  {line}", err=True)


def _stage(folder: Path, found: Answer) -> None:
    from analysis import capacity as words
    from analysis.capacity_html import page

    (folder / "capacity.json").write_text(json_text(words.to_json(found)), encoding="utf-8")
    (folder / "capacity.csv").write_text(words.to_csv(found), encoding="utf-8")
    (folder / "capacity.html").write_text(page(found, sys.argv[1:]), encoding="utf-8")
