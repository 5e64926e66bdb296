"""``paradiff plan``, also ``paradiff-plan``: arguments to a request, a plan to a table and files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paradiff.cli.common import (
    INFEASIBLE,
    Batch,
    Dtype,
    ExactOnly,
    Frames,
    Launches,
    MaxStaleness,
    Pixels,
    Specs,
    TableOrJson,
    check_output_dir,
    json_text,
    load_model,
    one_message,
    parsed_specs,
    portable,
    progress,
    shipped,
    staged,
    was_given,
    workload_of,
)
from paradiff.cli.sweep import refuse_others, run_sweep

if TYPE_CHECKING:
    from analysis.emit import EngineName
    from simulator.planner import Plan, Request

SWEEP_OPTIONS = ("sweep", "output_dir", "processes", "ray")
SHOWN = 10
"""Candidates that matter where ``--top`` says nothing."""
STALE_OUTPUT = re.compile(r"\d\d-.*\.plan\.yaml|trace\.json\.gz")


def plan(
    context: typer.Context,
    topology: Annotated[
        str | None,
        typer.Option(
            help="Box: a shipped name (pcie8) or a YAML file.",
            show_default=False,
            autocompletion=shipped("topologies"),
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Shipped model, or a profile file.", autocompletion=shipped("models", ".json")
        ),
    ] = "sdxl",
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    steps: Frames = None,
    batch: Batch = 1,
    dtype: Dtype = "bf16",
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use N GPUs; default: all of the box.")
    ] = None,
    strategy: Specs = None,
    runtime: Launches = "eager",
    measured_latency: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Your own one-GPU time, to calibrate with."),
    ] = None,
    scope: Annotated[
        Literal["denoise", "latent", "pipeline"],
        typer.Option(help="What that clock covered: the loop, up to the latent, or everything."),
    ] = "pipeline",
    objective: Annotated[
        Literal["latency", "throughput", "cost"], typer.Option(help="What to rank by.")
    ] = "latency",
    exact_only: ExactOnly = False,
    max_staleness: MaxStaleness = None,
    max_quality_loss: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="X", help="Measured loss of at most X, in --quality-metric."),
    ] = None,
    quality_metric: Annotated[
        Literal["lpips", "fid", "clip", "ssim", "l2"],
        typer.Option(
            help="LPIPS, 1 - SSIM or relative L2 to one GPU's result; rise of FID, loss of CLIP score."
        ),
    ] = "lpips",
    quality: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Your own measurements: fidelity.json, or CSV; before published ones.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="What if, on the box: peer_to_peer=true."),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="N", help="Keep the N best.")] = None,
    exhaustive: Annotated[
        bool,
        typer.Option("--exhaustive", help="Simulate also what cannot be among those shown."),
    ] = False,
    format_: TableOrJson = "table",
    emit: Annotated[
        Literal["xdit", "diffusers", "sglang", "vllm-omni", "cache-dit"] | None,
        typer.Option(help="Also the best plan as this engine's launch line or snippet."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write report.html, plan.json, NN-SPEC.plan.yaml, trace.json.gz."
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan every combination of a YAML file instead."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of a sweep; default: one a core.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Sweep on a Ray cluster; local: start one here."),
    ] = None,
) -> None:
    """Rank the parallel strategies for one model on one box."""
    if sweep is not None:
        with one_message():
            refuse_others(context, SWEEP_OPTIONS)
        run_sweep(sweep, output_dir, processes, ray)
        return
    with one_message():
        from paradiff.config import ConfigError
        from simulator import planner
        from simulator.quality import load_quality
        from simulator.runs import Contradiction
        from simulator.topology import load_topology

        if topology is None:
            raise ConfigError("--topology is missing, allowed: a shipped name, a YAML file")
        if processes is not None or ray is not None:
            raise ConfigError("--processes and --ray go with --sweep FILE")
        check_output_dir(output_dir)
        box = load_topology(topology, set_ or [])
        profile = load_model(model)
        if gpus is not None and gpus > len(box.gpus):
            raise ConfigError(f"--gpus {gpus}: {box.name} has {len(box.gpus)}")
        if measured_latency is not None and not 0 < measured_latency < float("inf"):
            raise ConfigError(f"--measured-latency {measured_latency}: must be positive")
        if measured_latency is None and was_given(context, "scope"):
            raise ConfigError(
                f"--scope {scope}: says what the clock of --measured-latency covered, which is missing"
            )
        sizes = {"height": height, "width": width, "frames": frames, "steps": steps}
        request = planner.Request(
            profile=profile,
            topology=box,
            workload=workload_of(profile, sizes, batch, dtype),
            gpus=gpus or len(box.gpus),
            runtime=runtime,
            specs=parsed_specs(strategy or []),
            goal=planner.Goal(
                objective=objective,
                exact_only=exact_only,
                max_staleness=max_staleness,
                max_quality_loss=max_quality_loss,
                quality_metric=quality_metric,
            ),
            quality=load_quality(quality or ()),
            measured=None if measured_latency is None else (measured_latency, scope),
            top=None if exhaustive or strategy else top or SHOWN,
        )
        try:
            with progress(enabled=format_ == "table") as advance:
                result = planner.plan(request, advance)
        except Contradiction as error:
            raise ConfigError(f"--measured-latency: {error}") from None
        if output_dir is not None:
            inputs = {"model": portable(model), "topology": portable(topology), "set": set_ or []}
            shown = progress("simulating what the report shows", enabled=format_ == "table")
            with shown, staged(output_dir, STALE_OUTPUT) as folder:
                _stage_results(folder, request, result, inputs, top)
    line, inexpressible = _emitted(emit, request, result) if emit else (None, None)
    if format_ == "json":
        emitted = {"emit": line} if emit else {}
        typer.echo(json_text(result.to_json(top) | emitted), nl=False)
    else:
        _print_plan(result, top or SHOWN, asked=bool(strategy))
        if max_quality_loss is not None:
            _print_losses(result, top or SHOWN)
        if line is not None:
            typer.echo(f"\nFor {emit}:\n\n{line}")
    if not result.ranked:
        _explain_nothing(result)
        raise typer.Exit(INFEASIBLE)
    if inexpressible is not None:
        typer.echo(f"paradiff: --emit {emit}: {inexpressible}", err=True)
        raise typer.Exit(INFEASIBLE)


def _emitted(engine: EngineName, request: Request, plan: Plan) -> tuple[str | None, str | None]:
    """The recommended plan in the words of ``engine``, or why it has none."""
    from analysis.emit import Inexpressible, recommended

    if not plan.ranked:
        return None, None
    try:
        return recommended(engine, request, plan), None
    except Inexpressible as error:
        return None, str(error)


def _print_plan(plan: Plan, top: int, *, asked: bool) -> None:
    """The table and the recommendation; for a terminal with lines, otherwise plain."""
    from analysis import text

    typer.echo(text.title(plan))
    typer.echo(text.baseline_line(plan) + "\n")
    if not plan.ranked:
        return
    header, rows = text.table(plan, top)
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = Console()
        names, cells = text.fitted(header, rows, console.width)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in names:
            left = name in text.LEFT
            table.add_column(name, justify="left" if left else "right", overflow="fold")
        for row in cells:
            table.add_row(*row)
        console.print(table)
    else:
        typer.echo("\n".join(text.plain(header, rows)) + "\n")
    typer.echo(text.recommendation(plan))
    hidden = len(plan.ranked) - len(rows)
    if hidden > 0:
        typer.echo(f"\n{hidden} more are not shown (--top N, --format json).")
    if plan.bounded:
        typer.echo(("" if hidden > 0 else "\n") + text.bounded_line(plan, top))
    if plan.rejected:
        typer.echo(
            "\nNot possible here:" if asked else f"\nNot possible here: {len(plan.rejected)}"
        )
        for line in text.rejected(plan.rejected):
            typer.echo(f"  {line}")


def _print_losses(plan: Plan, top: int) -> None:
    """What the candidates shown lose, each with who has measured it."""
    from analysis import text

    lines = list(text.losses(plan, top))
    if lines:
        typer.echo("\nMeasured losses:")
    for line in lines:
        typer.echo(f"  {line}")


def _explain_nothing(plan: Plan) -> None:
    """On stderr: why each asked strategy is out, and what would be near."""
    from analysis import text

    typer.echo(f"paradiff: nothing can run: {plan.model} on {plan.topology}", err=True)
    for line in text.rejected(plan.rejected, limit=20):
        typer.echo(f"  {line}", err=True)


def _stage_results(
    staging: Path, request: Request, plan: Plan, inputs: Mapping[str, Any], top: int | None
) -> None:
    from analysis.close_up import close_up, fingerprint
    from analysis.plan_html import page
    from analysis.what_if import outlook
    from paradiff.trace import write_chrome_trace

    data = plan.to_json(top)
    (staging / "plan.json").write_text(json_text(data), encoding="utf-8")
    for number, candidate in enumerate(plan.ranked[: top or SHOWN], 1):
        content = {
            "schema": "paradiff.planfile/1",
            **inputs,
            "workload": data["workload"],
            "runtime": plan.runtime,
            "spec": candidate.spec,
            "placement": list(candidate.placement or ()),
            "fingerprint": fingerprint(request, candidate.spec),
            "predicted_latency_s": candidate.latency_s,
        }
        lines = [
            f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()
        ]
        name = re.sub(r"[^\w=,.+-]", "_", candidate.spec)
        target = staging / f"{number:02d}-{name}.plan.yaml"
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    seen = [
        close_up(request, c.spec, c.placement or (), watched=c is plan.ranked[0])
        for c in plan.ranked[:2]
    ]
    if seen:
        write_chrome_trace(seen[0].trace, staging / "trace.json.gz", seen[0].tracks)
    expected = outlook(request, plan) if seen else None
    report = page(request, plan, seen, expected, sys.argv[1:])
    (staging / "report.html").write_text(report, encoding="utf-8")
