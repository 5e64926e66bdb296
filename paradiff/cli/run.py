"""``paradiff run``: in this process, as one rank of several, or by launching them."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from paradiff.cli import options as opt
from paradiff.cli.common import (
    INFEASIBLE,
    INTERRUPTED,
    MALFORMED,
    Frames,
    Pixels,
    TableOrJson,
    check_one_of,
    check_output_dir,
    json_text,
    leave_with,
    load_model,
    one_message,
    parsed_specs,
    progress,
    shipped,
    staged,
    workload_of,
)

if TYPE_CHECKING:
    from paradiff.executor.interpreter import Result
    from paradiff.executor.job import Job, Prepared
    from paradiff.executor.place import Place
    from paradiff.executor.session import Session
    from paradiff.graph import Instance, ScheduleGraph
    from paradiff.planfile import PlanFile
    from paradiff.trace import Trace

FAILED = 1
WORKLOAD = ("height", "width", "frames", "steps", "batch", "dtype")
TIMEOUT_S = 20.0


def run(
    plan: opt.Plan = None,
    model: opt.Model = None,
    strategy: opt.Strategy = None,
    weights: opt.Weights = None,
    random_weights: opt.RandomWeights = False,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    steps: opt.Steps = None,
    batch: opt.Batch = None,
    dtype: opt.Dtype = None,
    in_process: opt.InProcess = False,
    launch: opt.Launch = None,
    device: opt.Device = "cpu",
    compile_: Annotated[
        bool, typer.Option("--compile", help="torch.compile what lies between exchange points.")
    ] = False,
    kernels: Annotated[
        Literal["real", "timed"],
        typer.Option(help="timed: compute sleeps for its modelled time, transfers are real."),
    ] = "real",
    topology: Annotated[
        str | None,
        typer.Option(
            help="Box whose kernel times timed kernels take; default: the plan's.",
            autocompletion=shipped("topologies"),
        ),
    ] = None,
    seed: opt.Seed = 0,
    guidance_scale: opt.GuidanceScale = None,
    scheduler: opt.Scheduler = None,
    embeddings: opt.Embeddings = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Encoded by the text encoders of --weights.")
    ] = None,
    negative_prompt: opt.NegativePrompt = "",
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="In place of a prompt, for models that animate an image."
        ),
    ] = None,
    timeout: opt.Timeout = TIMEOUT_S,
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write trace.json.gz, summary.json and the outputs."),
    ] = None,
    format_: TableOrJson = "table",
) -> None:
    """Run one strategy on real processes and show where each rank's time went (needs [run])."""
    arguments = dict(locals())
    with one_message():
        given = Given(arguments)
        carry_out(given, ["run"], _run_rank, _in_process)


def carry_out(
    given: Given,
    command: Sequence[str],
    rank: Callable[[Given, Place, dict[str, str]], None],
    alone: Callable[[Given], None],
) -> None:
    """Start the ranks of ``paradiff COMMAND``, be one of them, or do it ``alone``, as asked and started.

    Raises ConfigError where the number of ranks is not the strategy's.
    """
    in_process, launch = given.options["in_process"], given.options["launch"]
    check_one_of(given.options, "in_process", "launch")
    if launch is not None:
        given.check_world(launch, "--launch")
        check_output_dir(given.options["output_dir"])
        launch_ranks(given, command, launch)
        return
    place = None if in_process else place_here()
    if place is not None:
        given.check_world(place.world_size, "WORLD_SIZE")
        as_rank(place, partial(rank, given, place))
    else:
        alone(given)


RESIDENT = "offload: weights stay on the device here, so loading them takes no time"


SYMPTOM_S = 1.0
"""How long a rank that suffers from another's end stays, so that torchrun sees that end first."""


class Ended(Exception):
    """How a command ends early: its exit code and its one message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Given:
    """The options, completed by the plan file."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        from paradiff.config import ConfigError
        from paradiff.planfile import load_plan

        self.options = options
        self.plan: PlanFile | None = None
        self.params = 0
        if options["plan"] is not None:
            self.plan = load_plan(options["plan"])
            for name in ("model", "strategy"):
                if options[name] is not None:
                    raise ConfigError(f"--{name}: the plan {options['plan']} has its own")
            self.params = _check_plan(self.plan, options["plan"])
        elif options["model"] is None and options["weights"] is None:
            raise ConfigError("nothing to run, allowed: a plan file, --model NAME or --weights DIR")
        check_one_of(options, "embeddings", "prompt", "image")
        check_one_of(options, "random_weights", "weights")
        check_one_of(options, "model", "weights")
        if options["kernels"] == "timed" and options["device"] == "cuda":
            raise ConfigError("--kernels timed: no GPU computes anything, allowed: --device cpu")
        (self.spec,) = parsed_specs(
            [self.plan.spec if self.plan else options["strategy"] or "serial"]
        )

    @property
    def model(self) -> str | None:
        return self.plan.model if self.plan else self.options["model"]

    @property
    def is_real_size(self) -> bool:
        """The model that the plan speaks of, not its twin."""
        return self.options["random_weights"] or self.options["weights"] is not None

    @property
    def source(self) -> str:
        if self.options["weights"] is not None:
            return str(self.options["weights"])
        name = str(self.model)
        is_itself = self.is_real_size or name.startswith(("tiny-", "small-"))
        return name if is_itself else f"tiny-{name}"

    def check_world(self, ranks: int, where: str) -> None:
        """Raises ConfigError unless ``ranks`` is what the strategy takes."""
        from paradiff.config import ConfigError
        from paradiff.strategies import parse_spec

        needed = parse_spec(self.spec).n_gpus
        if ranks != needed:
            raise ConfigError(f"{where} {ranks}: {self.spec} takes {needed} ranks")

    def sizes(self, *, planned: bool) -> dict[str, int | None]:
        """Height, width, frames and steps: as asked, else the plan's where they hold here."""
        asked = {name: self.options[name] for name in ("height", "width", "frames", "steps")}
        if self.plan is None:
            return asked
        of_plan = self.plan.workload.model_dump()
        kept = asked if planned else ("steps",)
        return {n: of_plan[n] if v is None and n in kept else v for n, v in asked.items()}

    @property
    def batch(self) -> int:
        own = self.options["batch"]
        return int(own or (self.plan.workload.batch if self.plan else 1))

    def dtype(self, *, planned: bool) -> str:
        own = "bf16" if self.options["kernels"] == "timed" else "fp32"
        return self.options["dtype"] or (self.plan.workload.dtype if self.plan and planned else own)

    def device(self, place: Place | None) -> str:
        """Where a rank computes: the GPU that the plan places it on. Raises ConfigError."""
        from paradiff.config import ConfigError
        from paradiff.executor.place import gpu_of

        if self.options["device"] != "cuda" or place is None:
            return str(self.options["device"])
        placement = () if self.plan is None else self.plan.placement
        if self.plan is None or placement == tuple(range(len(placement))):
            return f"cuda:{place.local_rank}"
        try:
            planned = planned_gpus(self.plan)
            return f"cuda:{gpu_of(place, planned, os.environ.get('CUDA_VISIBLE_DEVICES'))}"
        except ValueError as error:
            raise ConfigError(f"{self.options['plan']}: {error}") from None

    def job(self, place: Place | None) -> Job:
        from paradiff.executor.job import Job

        real, options = self.is_real_size, self.options
        names = ("height", "width", "frames", "steps", "dtype")
        is_same = all(options[name] is None for name in names)
        planned = None
        if real and self.plan is not None:
            planned = self.plan.fingerprint if is_same else None, self.params
        return Job(
            source=self.source,
            spec=self.spec,
            random_weights=options["random_weights"],
            **self.sizes(planned=real),
            batch=self.batch,
            dtype=self.dtype(planned=real),
            device=self.device(place),
            is_compiled=options["compile_"],
            seed=options["seed"],
            guidance_scale=options["guidance_scale"],
            scheduler=options["scheduler"],
            embeddings=options["embeddings"],
            prompt=options["prompt"],
            negative_prompt=options["negative_prompt"],
            image=options["image"],
            planned=planned,
        )


def _check_plan(plan: PlanFile, file: Path) -> int:
    """Parameters of the plan's denoiser. Raises ConfigError unless this version makes the same schedule
    of what the plan says."""
    from paradiff.config import ConfigError
    from paradiff.strategies import Infeasible, Workload, build, parse_spec

    (spec,) = parsed_specs([plan.spec])
    try:
        workload = Workload(**plan.workload.model_dump())
        profile = load_model(plan.model)
        found = build(parse_spec(spec), profile, workload).fingerprint()
    except (Infeasible, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None
    if found != plan.fingerprint:
        raise ConfigError(
            f"{file}: the schedule of {spec} on {plan.model} has fingerprint {found[:12]}, the plan"
            f" {plan.fingerprint[:12]}: it was made for another model, size or version"
        )
    ranks, placement = parse_spec(spec).n_gpus, plan.placement
    if placement and (len(placement) != ranks or len({*placement}) != ranks or min(placement) < 0):
        raise ConfigError(
            f"{file}: placement {list(placement)}: {spec} takes {ranks} GPUs, each another, from 0 on"
        )
    return profile.denoiser.params


def planned_gpus(plan: PlanFile) -> list[tuple[str, int]]:
    """Machine of each rank, and its GPU's number there. Raises ConfigError where the box is unknown."""
    from paradiff.config import ConfigError
    from simulator.topology import load_topology

    box = load_topology(plan.topology, plan.set)
    absent = [device for device in plan.placement if not 0 <= device < len(box.gpus)]
    if absent:
        raise ConfigError(
            f"placement: GPU {absent[0]}, allowed: the {len(box.gpus)} of {box.name}, from 0 on"
        )
    nodes = [(box.node_of(device), box.gpus[device]) for device in plan.placement]
    return [(node.name, node.gpus.index(gpu)) for node, gpu in nodes]


def place_here() -> Place | None:
    from paradiff.config import ConfigError
    from paradiff.executor.place import Place

    try:
        place = Place.of_environment()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if place is not None:
        needs_torch()
    return place


def needs_torch() -> None:
    """Raises ConfigError where it is not installed; keeps the advice of the libraries to themselves."""
    import warnings
    from importlib.util import find_spec

    from paradiff.config import ConfigError

    warnings.simplefilter("ignore")
    for name in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{name}_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a stack trace for a port that is closed

    for name in ("torch", "diffusers", "greenlet"):
        if find_spec(name) is None:
            raise ConfigError(
                f"running needs {name}: pip install 'paradiff[run]' (planning does not)"
            )


# ------------------------------------------------------------------------------------- in process


def _in_process(given: Given) -> None:
    """All ranks here."""
    from paradiff.config import ConfigError

    if given.options["kernels"] == "timed":
        raise ConfigError("--kernels timed: needs transfers between processes, add --launch N")
    needs_torch()
    check_output_dir(given.options["output_dir"])
    from paradiff.executor.faults import RunFailed

    try:
        prepared = prepared_of(given, None)
        with progress("running", enabled=given.options["format_"] == "table") as advance:
            result = prepared.in_process(advance)
    except Ended as error:
        leave_with(error.code, str(error))
    except RunFailed as error:
        leave_with(FAILED, str(error))
    from paradiff.executor.machine import facts

    graph = prepared.graph
    machines = [facts() | {"ranks": [*range(graph.world_size)]}]
    _report(given, graph, result.trace, None, machines, prepared, result)


def prepared_of(given: Given, place: Place | None) -> Prepared:
    """Raises ConfigError for whatever is wrong with the input, Ended where the model cannot."""
    from paradiff.config import ConfigError
    from paradiff.executor.job import prepare
    from paradiff.strategies import Infeasible

    try:
        return prepare(given.job(place))
    except Infeasible as error:
        raise Ended(INFEASIBLE, f"{given.spec}: {error}") from None
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


# --------------------------------------------------------------------------------- one rank of many


def as_rank(place: Place, work: Callable[[dict[str, str]], None]) -> None:
    """This process is one rank and does ``work``, which keeps a dict at the op that each stream has in
    hand. Report to the launcher if there is one, and leave at once on failure, since a thread may still
    wait in a transfer that nobody will answer."""
    from paradiff.executor.heartbeat import Heartbeat
    from paradiff.executor.launch import STATUS, die_with_parent, status_path

    doing: dict[str, str] = {}
    beat = None
    if STATUS in os.environ:
        die_with_parent()
        path = status_path(os.environ[STATUS], place.rank)
        beat = Heartbeat(path, place.rank, lambda: dict(doing))
        beat.start()

    def leave(code: int, state: str, message: str, *, symptom: bool = False) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the last word is being said
        if beat is not None:
            beat.finish(state, message, code=code, symptom=symptom)
            time.sleep(SYMPTOM_S if symptom else 0.0)
        elif message:
            typer.echo(f"paradiff: {message}", err=True)
        sys.stdout.flush()
        os._exit(code)

    def terminated(*_: object) -> None:
        leave(143, "terminated", "")

    signal.signal(signal.SIGTERM, terminated)
    with _leaving(leave, place.rank):
        work(doing)
    if beat is not None:
        beat.finish("done")


@contextmanager
def _leaving(leave: Callable[..., NoReturn], rank: int) -> Iterator[None]:
    """Turn whatever ends a rank early into its last word and exit code."""
    from paradiff.config import ConfigError
    from paradiff.executor.faults import RunFailed, is_out_of_memory

    try:
        yield
    except ConfigError as error:
        leave(MALFORMED, "refused", " ".join(str(error).split()))
    except Ended as error:
        leave(error.code, "refused", str(error))
    except RunFailed as error:
        leave(FAILED, "failed", str(error), symptom=error.symptom)
    except KeyboardInterrupt:
        leave(INTERRUPTED, "interrupted", "")
    except Exception as error:
        if not is_out_of_memory(error):
            traceback.print_exc()
        what = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        leave(FAILED, "failed", f"rank {rank}: {what}")


def _run_rank(given: Given, place: Place, doing: dict[str, str]) -> None:
    from paradiff.executor import distributed
    from paradiff.executor.session import Session, meet

    options = given.options
    check_output_dir(options["output_dir"] if place.rank == 0 else None)
    if options["kernels"] == "timed":
        graph, seconds = _timed(given)
        session = Session.join(place, options["timeout"], "cpu", graph.fingerprint())
        trace = distributed.run_timed(graph, seconds, session, doing)
        _finish_rank(given, session, graph, trace)
        return
    timeout_s = options["timeout"]
    hub = meet(place, timeout_s)
    prepared = prepared_of(given, place)
    fingerprint = prepared.graph.fingerprint()
    session = Session.join(place, timeout_s, prepared.device, fingerprint, hub)
    result = distributed.run_rank(
        prepared.graph, prepared.pipeline.network, prepared.request, session, doing
    )
    _finish_rank(given, session, prepared.graph, result.trace, prepared, result)


def _finish_rank(
    given: Given, session: Session, graph: ScheduleGraph, trace: Trace, *more: Any
) -> None:
    machines = [] if given.options["output_dir"] is None else session.machines()
    if session.rank == 0:
        _report(given, graph, trace, session.backend, machines, *more)
    session.leave()


def _timed(given: Given) -> tuple[ScheduleGraph, Callable[[Instance], float]]:
    """The real model's schedule, and what its compute ops take on the box.

    Raises ConfigError and Ended.
    """
    from paradiff.config import ConfigError
    from paradiff.strategies import Infeasible, build, parse_spec
    from simulator.costs import CostModel
    from simulator.gpu import load_gpu
    from simulator.topology import load_topology

    options, plan = given.options, given.plan
    name = options["topology"] or (plan.topology if plan else None)
    if name is None:
        raise ConfigError("--kernels timed: which box? give --topology")
    if options["weights"] is not None:
        raise ConfigError("--kernels timed: nothing is computed, give --model instead of --weights")
    box = load_topology(name, plan.set if plan and options["topology"] is None else ())
    profile = load_model(str(given.model))
    workload = workload_of(
        profile, given.sizes(planned=True), given.batch, given.dtype(planned=True)
    )
    try:
        graph = build(parse_spec(given.spec), profile, workload)
    except Infeasible as error:
        raise Ended(INFEASIBLE, f"{given.spec}: {error}") from None
    placement = plan.placement if plan and plan.placement else tuple(range(graph.world_size))
    if len(box.gpus) < graph.world_size:
        raise ConfigError(f"--topology {box.name}: {len(box.gpus)} GPUs, {given.spec} takes more")
    runtime = plan.runtime if plan else "eager"
    costs = CostModel(profile, [load_gpu(name) for name in box.profiles], workload.dtype, runtime)

    def seconds(instance: Instance) -> float:
        op = instance.op
        if op.work is None:
            return 0.0
        cost = costs.compute(op.work, placement[op.ranks[0]])
        return max(cost.device_s, cost.host_s)

    return graph, seconds


# ------------------------------------------------------------------------------------- launching


def launch_ranks(given: Given, command: Sequence[str], ranks: int) -> None:
    """Start ``ranks`` processes of ``command`` with the same options; the exit code is theirs."""
    needs_torch()
    from paradiff.executor.launch import launch

    with progress("starting", enabled=given.options["format_"] == "table") as advance:
        shown = None if advance is None else partial(_show_steps, given, advance)
        try:
            outcome = launch(
                _arguments(command, given.options), ranks, given.options["timeout"], shown
            )
        except KeyboardInterrupt:
            leave_with(INTERRUPTED, "interrupted")
    if outcome.code:
        leave_with(outcome.code, outcome.message)


def _arguments(command: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The command and its options again, for the ranks."""
    arguments = [*command] if options["plan"] is None else [*command, str(options["plan"])]
    for name, value in options.items():
        is_default = value is None or value is False or (name == "negative_prompt" and not value)
        if is_default or name in ("plan", "launch", "in_process"):
            continue
        flag = f"--{name.strip('_').replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)]
    return arguments


def _show_steps(
    given: Given, advance: Callable[[int, int], None], found: Mapping[int, Mapping[str, Any]]
) -> None:
    """Progress of a launch: the step that the slowest rank is in."""
    total = given.sizes(planned=True)["steps"]
    at = [op[1:].partition("/")[0] for s in found.values() for op in s["doing"].values()]
    steps = [int(step) for step in at if step.isdecimal()]
    if steps and total:
        advance(min(steps), total)


# -------------------------------------------------------------------------------------- the report


def _report(
    given: Given,
    graph: ScheduleGraph,
    trace: Trace,
    backend: str | None,
    machines: list[dict[str, Any]],
    prepared: Prepared | None = None,
    result: Result | None = None,
) -> None:
    """What is printed and written of a run that has ended well. ``backend``: None in one process."""
    from analysis.attribution import attribute, by_rank
    from analysis.tracks import in_one_process, measured
    from paradiff.trace import write_chrome_trace

    broken = attribute(trace)
    meta = dict(trace.meta)
    summary = {
        "schema": "paradiff.run/1",
        "model": meta["model"],
        "spec": given.spec,
        "how": "all ranks in one process"
        if backend is None
        else f"{graph.world_size} processes over {backend}",
        "kernels": given.options["kernels"],
        "device": given.options["device"],
        "workload": {key: _number(meta[key]) for key in WORKLOAD},
        "fingerprint": graph.fingerprint(),
        "latency_s": trace.makespan_s,
        "stages": asdict(broken.stages),
        "predicted_latency_s": given.plan.predicted_latency_s if given.plan else None,
        "clock_residual_s": float(meta.get("clock_residual_s", 0.0)),
        "ranks": [asdict(each) for each in by_rank(trace)],
        "machines": machines,
        "notes": [] if "offload=" not in given.spec else [RESIDENT],
        "files": [],
    }
    target = given.options["output_dir"]
    if target is not None:
        with staged(target) as folder:
            network = None if prepared is None else prepared.pipeline.network
            profile = network.profile if network else load_model(str(given.model))
            seen = in_one_process if backend is None else measured
            tracks = seen(graph, trace, profile)
            write_chrome_trace(trace, folder / "trace.json.gz", tracks)
            if prepared is not None and result is not None:
                prepared.save(result, folder)
            names = sorted({*(path.name for path in folder.iterdir()), "summary.json"})
            summary["files"] = names
            (folder / "summary.json").write_text(json_text(summary), encoding="utf-8")
    if given.options["format_"] == "json":
        typer.echo(json_text(summary), nl=False)
    else:
        _print_summary(given, summary)


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _print_summary(given: Given, summary: Mapping[str, Any]) -> None:
    from analysis.text import plain, seconds

    typer.echo(f"{_what(given, summary)}: {summary['spec']}, {summary['how']}\n")
    header = ["rank", "compute", "communication", "waiting"]
    rows = [
        [str(r["rank"]), *(seconds(r[f"{name}_s"]) for name in header[1:])]
        for r in summary["ranks"]
    ]
    typer.echo("\n".join(plain(header, rows)) + "\n")
    loop = seconds(summary["stages"]["denoise_s"])
    typer.echo(f"Took {seconds(summary['latency_s'])}, of that the denoising loop {loop}.")
    for note in summary["notes"]:
        typer.echo(f"Note: {note}.")
    if summary["files"]:
        typer.echo(f"Written to {given.options['output_dir']}: {', '.join(summary['files'])}.")


def _what(given: Given, summary: Mapping[str, Any]) -> str:
    size = "{height}x{width}, {steps} steps, batch {batch}, {dtype}".format(**summary["workload"])
    name = f"{summary['model']} ({size})"
    if given.source.startswith("small-"):
        return f"{name}, small and trained"
    if given.options["kernels"] == "timed":
        return f"{name}, timed kernels"
    if not given.is_real_size:
        return f"{name}, a twin: the classes of the model, few blocks, random weights"
    return f"{name}, random weights" if given.options["random_weights"] else name
