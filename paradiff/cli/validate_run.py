"""``paradiff validate run``: measure what a run is made of, predict it, run it, compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paradiff.cli import options as opt
from paradiff.cli.common import (
    GATE_FAILED,
    Frames,
    Pixels,
    TableOrJson,
    check_output_dir,
    json_text,
    leave_with,
    one_message,
    progress,
    shipped,
    staged,
)
from paradiff.cli.run import (
    Ended,
    Given,
    carry_out,
    needs_torch,
    prepared_of,
)

if TYPE_CHECKING:
    from paradiff.cli.measure_here import Measured
    from paradiff.executor.job import Prepared
    from paradiff.executor.place import Place
    from paradiff.executor.session import Session
    from paradiff.executor.transports import Distributed
    from paradiff.trace import Trace

TIMEOUT_S = 120.0
WORKLOAD = ("height", "width", "frames", "steps", "batch")
OLD_RUNS = re.compile(r"measured-\d+\.json\.gz")
"""Of an earlier command, which may have had more repeats."""
ELSEWHERE = {
    "compile_": False, "kernels": None, "guidance_scale": None, "embeddings": None, "prompt": None,
    "image": None, "negative_prompt": "",
}  # fmt: skip
"""Options of ``paradiff run`` that this command does not have."""


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
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="GPU profile of the device, for what has no kernel table.",
            autocompletion=shipped("gpus"),
        ),
    ] = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="Each process on as many cores as it has threads.")
    ] = False,
    seed: opt.Seed = 0,
    scheduler: opt.Scheduler = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 5,
    warmup_runs: Annotated[int, typer.Option(min=0, help="Runs before them that do not.")] = 1,
    max_error: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="X", help="Exit 1 if the latency is missed by more than this."
        ),
    ] = 0.10,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Do not use what was measured here before.")
    ] = False,
    timeout: opt.Timeout = TIMEOUT_S,
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write validation.json, report.html and all traces."),
    ] = None,
    format_: TableOrJson = "table",
) -> None:
    """Predict a run from what this machine is measured to do, run it, compare op by op (needs [run])."""
    arguments = ELSEWHERE | locals()
    with one_message():
        given = Given(arguments)
        check_output_dir(output_dir)
        _check_device(device, gpu)
        carry_out(given, ["validate", "run"], _rank, _in_process)


def _check_device(device: str, gpu: str | None) -> None:
    """Raises ConfigError unless kernels without a table have rates to be priced with."""
    from paradiff.config import ConfigError, available
    from simulator.gpu import load_gpu

    if gpu is not None:
        load_gpu(gpu)
    elif device == "cuda":
        names = ", ".join(available("gpus", ".yaml"))
        raise ConfigError(f"--device cuda: which GPU is it? give --gpu NAME, one of {names}")


def _rank(given: Given, place: Place, doing: dict[str, str]) -> None:
    """One of several processes: all measure and run, the first compares."""
    from paradiff.cli.measure_here import measure_here
    from paradiff.executor.session import Session, meet

    options, timeout_s = given.options, given.options["timeout"]
    _pin(given, place.local_rank)
    hub = meet(place, timeout_s)
    prepared = prepared_of(given, place)
    fingerprint = prepared.graph.fingerprint()
    session = Session.join(place, timeout_s, prepared.device, fingerprint, hub)
    again = options["measure_again"]
    measured = measure_here(given.job(place), prepared, session, again=again)
    runs = runs_of(prepared, session, options["warmup_runs"], options["repeats"], doing)
    machines = session.machines()
    session.leave()
    if session.rank == 0:
        _conclude(given, prepared, measured, runs, machines, session.backend)


def _pin(given: Given, local_rank: int) -> None:
    """Keep this process on its cores, if asked to. Raises ConfigError."""
    from paradiff.config import ConfigError
    from paradiff.executor.measure import pin_to_cores

    try:
        if given.options["pin"]:
            pin_to_cores(local_rank)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def runs_of(
    prepared: Prepared,
    session: Session,
    warmup_runs: int,
    repeats: int,
    doing: dict[str, str] | None = None,
    transport: Distributed | None = None,
) -> list[Trace]:
    """Traces of the runs that count. ``transport``: of earlier runs, if there were any. Raises
    RunFailed."""
    from paradiff.executor.distributed import run_rank
    from paradiff.executor.transports import Distributed

    transport = transport or Distributed(session, prepared.graph)
    network, request = prepared.pipeline.network, prepared.request
    return [
        run_rank(prepared.graph, network, request, session, doing, transport).trace
        for _ in range(warmup_runs + repeats)
    ][warmup_runs:]


def _in_process(given: Given) -> None:
    """All ranks here, one op after another."""
    needs_torch()
    from paradiff.cli.measure_here import measure_here
    from paradiff.executor.faults import RunFailed
    from paradiff.executor.machine import facts

    options = given.options
    _pin(given, 0)
    try:
        prepared = prepared_of(given, None)
        measured = measure_here(given.job(None), prepared, again=options["measure_again"])
        total = options["warmup_runs"] + options["repeats"]
        runs: list[Trace] = []
        with progress("running", enabled=options["format_"] == "table") as advance:
            for number in range(total):
                runs.append(prepared.in_process(in_turn=True).trace)
                if advance is not None:
                    advance(number + 1, total)
        here = facts() | {"ranks": [*range(prepared.graph.world_size)]}
        _conclude(given, prepared, measured, runs[options["warmup_runs"] :], [here], None)
    except RunFailed as error:
        leave_with(GATE_FAILED, str(error))
    except Ended as error:
        leave_with(error.code, str(error))


def _conclude(
    given: Given,
    prepared: Prepared,
    measured: Measured,
    runs: Sequence[Trace],
    machines: list[dict[str, Any]],
    backend: str | None,
) -> None:
    """Predict, compare, print, write. Raises Ended where the gate fails."""
    from analysis import comparison_report as words
    from analysis import tracks
    from analysis.comparison import compare, to_json
    from paradiff.cli.measure_here import predict
    from paradiff.trace import check_trace, write_chrome_trace

    options = given.options
    predicted, watched = predict(prepared, measured.machine, backend, options["gpu"])
    for trace in (predicted, *runs):
        check_trace(prepared.graph, trace)
    found = compare(predicted, runs)
    report = {
        **to_json(found, options["max_error"]),
        **_facts(given, prepared, measured, backend),
        "machines": machines,
        "files": [],
    }
    target = options["output_dir"]
    if target is not None:
        graph, profile = prepared.graph, prepared.pipeline.network.profile
        seen = tracks.in_one_process if backend is None else tracks.measured
        with staged(target, OLD_RUNS) as folder:
            write_chrome_trace(found.predicted, folder / "predicted.json.gz", watched)
            for number, trace in enumerate(runs, 1):
                file = folder / f"measured-{number}.json.gz"
                write_chrome_trace(trace, file, seen(graph, trace, profile))
            machine = json_text(measured.machine.to_json())
            (folder / "machine.json").write_text(machine, encoding="utf-8")
            (folder / "report.html").write_text(
                words.page(prepared.graph, found, report), encoding="utf-8"
            )
            report["files"] = sorted({*(p.name for p in folder.iterdir()), "validation.json"})
            (folder / "validation.json").write_text(json_text(report), encoding="utf-8")
    if options["format_"] == "json":
        typer.echo(json_text(report), nl=False)
    else:
        typer.echo(words.text(found, report))
    if not report["passed"]:
        raise Ended(GATE_FAILED, words.failure(found, options["max_error"]))


def _facts(
    given: Given, prepared: Prepared, measured: Measured, backend: str | None
) -> dict[str, Any]:
    """What somebody else needs to trust the numbers."""
    machine, options = measured.machine, given.options
    box, meta = machine.topology(), dict(prepared.graph.meta)
    ranks = len(machine.hosts)
    here = "all ranks in one process, in turn"
    return {
        "model": meta["model"],
        "spec": given.spec,
        "how": here if backend is None else f"{ranks} process{'es' * (ranks > 1)} over {backend}",
        "workload": {key: int(meta[key]) for key in WORKLOAD} | {"dtype": meta["dtype"]},
        "fingerprint": prepared.graph.fingerprint(),
        "warmup_runs": options["warmup_runs"],
        "is_pinned": options["pin"],
        "measured": {
            **machine.about,
            "new": measured.new,
            "works": len(machine.works),
            "kernels": len(machine.kernels),
            "calls": len(machine.calls),
            "compute_lost_beside_a_transfer": machine.lost,
        },
        "topology": {
            "nodes": {node.name: list(node.gpus) for node in box.nodes},
            "links": [asdict(link) for link in box.links],
            "collectives": [asdict(table) for table in box.collectives],
        },
    }
