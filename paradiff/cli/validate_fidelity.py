"""``paradiff validate fidelity``: what stale strategies do to the result, sample by sample."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paradiff.cli import options as opt
from paradiff.cli.common import (
    INFEASIBLE,
    Frames,
    Pixels,
    TableOrJson,
    check_one_of,
    check_output_dir,
    json_text,
    leave_with,
    one_message,
    parsed_specs,
    progress,
    shipped,
    staged,
)

if TYPE_CHECKING:
    from analysis.fidelity import Case, Errors, Report, Row, Score, Seen
    from paradiff.executor.job import Prepared

FAILED = 1
OWN = "own"
SCHEDULERS = (OWN, "ddim", "euler", "dpmsolver++", "flow-match-euler")
GPUS = 4
"""Ranks at most where no strategy is asked for."""
WARMUP = re.compile(r"(?<=warmup=)\d+")


def fidelity(
    model: Annotated[
        str | None,
        typer.Option(
            help="small-dit or small-unet (trained), a twin, or with --random-weights any."
        ),
    ] = None,
    weights: opt.Weights = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The real size with random weights.")
    ] = False,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC", help="May be given several times; default: the stale ones on 4 GPUs."
        ),
    ] = None,
    warmup: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="W", help="In place of each strategy's; several: each."),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Several: each; default: the model's.")
    ] = None,
    scheduler: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(SCHEDULERS)}; several: each; default: the model's own.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Draws of noise to compare on.")
    ] = 20,
    batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Samples at a time, of one seed; default: all."),
    ] = None,
    seed: opt.Seed = 0,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    dtype: Annotated[Literal["fp16", "bf16", "fp32", "fp64"], typer.Option(help="Precision.")] = (
        "fp32"
    ),
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where all ranks run.")] = "cpu",
    guidance_scale: opt.GuidanceScale = None,
    embeddings: opt.Embeddings = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="For the text encoders of --weights; a digit for small-*."
        ),
    ] = None,
    negative_prompt: opt.NegativePrompt = "",
    lpips: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="AlexNet's and LPIPS' weights: adds LPIPS."),
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A CLIP model: adds its similarities.")
    ] = None,
    topology: Annotated[
        str,
        typer.Option(
            help="Box that latencies are simulated on.", autocompletion=shipped("topologies")
        ),
    ] = "pcie8",
    format_: TableOrJson = "table",
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write fidelity.json, report.html and pictures.png."),
    ] = None,
) -> None:
    """How far stale strategies move the result: latents of every step and pictures against serial."""
    given = dict(locals())
    with one_message():
        from paradiff.cli.run import needs_torch
        from paradiff.config import ConfigError

        check_output_dir(output_dir)
        if model is None and weights is None:
            raise ConfigError("nothing to run, allowed: --model NAME or --weights DIR")
        check_one_of(given, "model", "weights")
        if samples % (batch or samples):
            raise ConfigError(f"--samples {samples}: not divisible by --batch {batch}")
        for name in scheduler or []:
            if name not in SCHEDULERS:
                raise ConfigError(f"--scheduler {name!r}, allowed: {', '.join(SCHEDULERS)}")
        parsed_specs(strategy or [])
        needs_torch()
        report = _measured(given)
        from analysis import fidelity as words

        data = report.to_json()
        if output_dir is not None:
            from analysis import fidelity_html

            with staged(output_dir) as folder:
                (folder / "fidelity.json").write_text(json_text(data), encoding="utf-8")
                page = fidelity_html.page(report, sys.argv[1:])
                (folder / "report.html").write_text(page, encoding="utf-8")
                sheet = fidelity_html.sheet_png(report)
                if sheet is not None:
                    (folder / "pictures.png").write_bytes(sheet)
    if format_ == "json":
        typer.echo(json_text(data), nl=False)
    else:
        typer.echo(words.text(report))


def _scores(given: Mapping[str, Any]) -> Mapping[str, Score]:
    """LPIPS and CLIP, where their weights were given. Raises ValueError."""
    if given["lpips"] is None and given["clip"] is None:
        return {}
    from paradiff.executor.perceptual import CLIP, LPIPS

    found: dict[str, Score] = {}
    if given["lpips"] is not None:
        found["lpips"] = LPIPS(given["lpips"], given["device"])
    if given["clip"] is not None:
        found |= CLIP(given["clip"], given["prompt"], given["device"]).scores()
    return found


def _measured(given: Mapping[str, Any]) -> Report:
    """Everything that was asked for, run and compared.

    Raises ConfigError; exits with 3 for a strategy that cannot run, with 1 where a run fails."""
    from analysis import fidelity as words
    from paradiff.config import ConfigError
    from paradiff.executor.faults import RunFailed
    from paradiff.strategies import Infeasible

    try:
        scores = _scores(given)
        measuring = _Measuring(given)
        cases = measuring.cases()
        batches = given["samples"] // measuring.bench.job.batch
        with progress("running", enabled=given["format_"] == "table") as advance:
            found = words.measure(cases, batches, measuring.run, scores, advance)
        return measuring.report(found)
    except Infeasible as error:
        leave_with(INFEASIBLE, str(error))
    except RunFailed as error:
        leave_with(FAILED, str(error))
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


class _Measuring:
    """One question in work: the model is loaded once, every case is run on it."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        from paradiff.executor.fidelity import Bench
        from paradiff.executor.job import Job
        from simulator.topology import load_topology

        self.given = given
        self.box = load_topology(given["topology"])
        taken = ("random_weights", "height", "width", "frames", "dtype", "device", "seed")
        inputs = ("guidance_scale", "embeddings", "prompt", "negative_prompt")
        self.bench = Bench.of(
            Job(
                source=str(given["weights"] or given["model"]),
                spec="serial",
                batch=given["batch"] or given["samples"],
                **{name: given[name] for name in (*taken, *inputs)},
            )
        )

    @property
    def is_random(self) -> bool:
        name = str(self.given["model"])
        return self.given["random_weights"] or name.startswith("tiny-")

    def cases(self) -> list[Case]:
        """Every asked strategy with every warm-up, number of steps and sampler; each can run.

        Raises Infeasible for one that was asked for and cannot."""
        from analysis.fidelity import Case

        found = []
        for steps in self.given["steps"] or [self.bench.workload(None).steps]:
            specs = list(self.given["strategy"] or self._stale(steps))
            found += [
                Case(each, steps, scheduler)
                for scheduler in dict.fromkeys(self.given["scheduler"] or [OWN])
                for spec in specs
                for each in self._warmed(spec)
            ]
        for case in found:
            self._prepared(case, 0)
        return list(dict.fromkeys(found))

    def _stale(self, steps: int) -> Iterator[str]:
        """What the planner would propose on few GPUs that changes the result, without exact axes."""
        from paradiff.strategies import AXES, Infeasible, build, candidate_specs, facts, parse_spec

        workload = self.bench.workload(steps)
        for text in candidate_specs(self.bench.profile, workload, GPUS):
            spec = parse_spec(text)
            if facts(spec, workload).exact or any(spec.degree(axis) > 1 for axis in AXES):
                continue
            with suppress(Infeasible):
                build(spec, self.bench.profile, workload)
                yield text

    def _warmed(self, spec: str) -> Iterator[str]:
        """``spec`` with each of the asked warm-ups, where it has one."""
        from paradiff.strategies import parse_spec

        asked = self.given["warmup"]
        if not asked or "warmup" not in parse_spec(spec).strategy.parameters:
            yield spec
            return
        for steps in asked:
            replaced, count = WARMUP.subn(str(steps), spec)
            yield replaced if count else f"{spec},warmup={steps}"

    def _prepared(self, case: Case, number: int) -> Prepared:
        scheduler = None if case.scheduler == OWN else case.scheduler
        return self.bench.prepared(case.spec, case.steps, scheduler, number)

    def run(self, case: Case, number: int) -> Seen:
        from paradiff.executor.fidelity import look

        seen: Seen = look(self._prepared(case, number))
        return seen

    # ---------------------------------------------------------------------------- the report

    def report(self, found: Mapping[Case, Errors]) -> Report:
        from analysis.fidelity import Report

        latencies = self._latencies(found)
        return Report(
            model=self.bench.profile.name,
            what=self._what(),
            topology=self.box.name,
            facts=self._facts(),
            rows=tuple(self._row(case, errors, latencies) for case, errors in found.items()),
        )

    def _row(self, case: Case, errors: Errors, latencies: Mapping[Case, float | None]) -> Row:
        from analysis.fidelity import Row
        from paradiff.strategies import build, facts, parse_spec

        spec, workload = parse_spec(case.spec), self.bench.workload(case.steps)
        known = facts(spec, workload)
        return Row(
            case=case,
            n_gpus=known.n_gpus,
            synchronous_steps=known.synchronous_steps,
            exact=known.exact,
            max_staleness_steps=build(spec, self.bench.profile, workload).staleness(),
            latency_s=latencies[case],
            errors=errors,
        )

    def _latencies(self, cases: Iterable[Case]) -> dict[Case, float | None]:
        """One request of one sample on the box, in the run's precision (float64: float32)."""
        from simulator import planner

        found: dict[Case, float | None] = {}
        for steps, group in groupby(sorted(cases, key=_steps_of), _steps_of):
            here = list(group)
            dtype = "fp32" if self.given["dtype"] == "fp64" else self.given["dtype"]
            workload = replace(self.bench.workload(steps), batch=1, dtype=dtype)
            request = planner.Request(
                profile=self.bench.profile,
                topology=self.box,
                workload=workload,
                gpus=len(self.box.gpus),
                specs=tuple(dict.fromkeys(case.spec for case in here)),
            )
            known = {c.spec: c.latency_s for c in planner.plan(request).ranked}
            found |= {case: known.get(case.spec) for case in here}
        return found

    def _what(self) -> str:
        w, given = self.bench.workload(None), self.given
        frames = f", {w.frames} frames" if w.frames > 1 else ""
        kind = ": random weights, so the errors say nothing about a trained model" * self.is_random
        return (
            f"{self.bench.profile.name}{kind}; {w.height}x{w.width}{frames}, {given['dtype']},"
            f" {given['samples']} samples; latencies are simulated, on {self.box.name}"
        )

    def _facts(self) -> dict[str, Any]:
        """What a reader needs to know the model and the request by, and to run it again."""
        import paradiff
        from paradiff.executor.fidelity import versions

        workload, job = self.bench.workload(None), self.bench.job
        return {
            "weights": "random" if self.is_random else "trained",
            "params": self.bench.profile.denoiser.params,
            "height": workload.height,
            "width": workload.width,
            "frames": workload.frames,
            "dtype": job.dtype,
            "samples": self.given["samples"],
            "batch": job.batch,
            "seed": job.seed,
            "guidance_scale": (
                self.bench.pipeline.guidance_scale
                if job.guidance_scale is None
                else job.guidance_scale
            ),
            "prompt": job.prompt,
            "versions": {"paradiff": paradiff.__version__, **versions()},
        }


def _steps_of(case: Case) -> int:
    return case.steps
