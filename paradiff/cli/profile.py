"""``paradiff profile``: model profiles, and measurements of kernels and transfers on this machine."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from paradiff.cli.common import (
    check_output_dir,
    check_output_file,
    group,
    load_model,
    one_message,
    progress,
    shipped,
    write_file,
)

if TYPE_CHECKING:
    from paradiff.profiles import Profile
    from paradiff.trace import Trace
    from simulator.calibrate import Fit

app = group("Model profiles, and measurements on this machine.")


@contextmanager
def _needs_torch(what: str) -> Iterator[None]:
    """A missing module of the [run] extra as one sentence."""
    from paradiff.config import ConfigError

    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} needs {error.name}: pip install 'paradiff[run]' (planning does not)"
        ) from None


@app.command()
def trace(
    source: Annotated[
        str, typer.Argument(metavar="NAME|CONFIG", help="Known model, or a diffusers config.json.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: NAME.json in this directory.")
    ] = None,
) -> None:
    """Trace a diffusers model on the meta device and write its profile (needs the [run] extra)."""
    with one_message():
        from paradiff.config import ConfigError

        if output is not None:
            check_output_file(output)
        with _needs_torch("tracing"):
            from paradiff.models.trace import dump_profile, trace_profile
        try:
            profile = trace_profile(source)
        except (ValueError, OSError) as error:
            where = "" if str(error).startswith(source) else f"{source}: "
            raise ConfigError(f"{where}{error}") from None
        target = output or Path(f"{profile.name}.json")
        write_file(target, dump_profile(profile))
    typer.echo(f"{target}: {profile.name}, {profile.denoiser.params / 1e6:.1f} M parameters")


@app.command()
def kernels(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Take the kernels of this model; repeatable; default: all."
        ),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where they run.")] = "cpu",
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(help="Default: fp32 on a CPU, bf16 on a GPU."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=1.0, metavar="SECONDS", help="Stop after this; run again to go on."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The GPU profile that this device is, to plan with.",
            autocompletion=shipped("gpus"),
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Only what is there with quartiles more than 25 % apart, once more."
        ),
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="kernels.csv goes there; default: hardware_profiles/measured/ and the profile's name, "
            "or the device's.",
        ),
    ] = None,
) -> None:
    """Time the kernels that models take, whole and in parts, on this machine (needs the [run] extra).

    Rows are written one by one: an interrupted run goes on where it stopped.
    """
    with one_message():
        from paradiff.config import ConfigError, available
        from simulator.measured import (
            FILE,
            MEASURED,
            Row,
            append_row,
            begin_table,
            distinct_kernels,
            read_rows,
        )  # fmt: skip

        with _needs_torch("measuring"):
            from paradiff.executor import measure
        if not measure.is_here(device):
            raise ConfigError("--device cuda: torch sees no GPU here, allowed: cpu")
        names = model or [*available("models", ".json")]
        wanted = distinct_kernels([load_model(name) for name in names])
        chosen = dtype or ("fp32" if device == "cpu" else "bf16")
        about = measure.machine(device)
        if gpu is not None:
            _check_gpu(gpu, device, about["device"])
        name = gpu or re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        folder = output_dir or MEASURED / name
        path = folder / FILE
        command = shlex.join(["paradiff", "profile", "kernels", *sys.argv[3:]])
        about |= {"date": time.strftime("%Y-%m-%d"), "command": command}
        try:
            done = begin_table(path, about)
            known = read_rows(path)[1] if again else {}
        except OSError as error:
            raise ConfigError(f"--output-dir {folder}: {error.strerror or error}") from None
    if again:
        unsteady = {kernel for kernel, row in known.items() if row.is_unsteady}
        wanted = tuple(key for key in wanted if (key, chosen) in unsteady)
        done = set()
    left = [key for key in wanted if (key, chosen) not in done]
    began, taken, skipped = time.monotonic(), 0, 0
    try:
        with progress("measuring", enabled=True) as advance:
            for number, key in enumerate(left):
                if budget is not None and time.monotonic() - began > budget:
                    break
                try:
                    timing = measure.measure(key.kind, key.dims, chosen, device)
                    append_row(path, key, chosen, Row(*timing))
                    taken += 1
                except measure.NotMeasurable:
                    skipped += 1
                if advance is not None:
                    advance(number + 1, len(left))
    finally:
        typer.echo(
            f"{path}: {taken} kernels measured, {len(wanted) - len(left)} were there, {skipped} cannot "
            f"run here, {len(left) - taken - skipped} are left"
        )
    _print_errors(path, chosen)


def _check_gpu(name: str, device: str, seen: str) -> None:
    """Raises ConfigError where measurements of this device are not those of the GPU profile ``name``."""
    from paradiff.config import ConfigError
    from simulator.gpu import load_gpu
    from simulator.lint import is_the_gpu

    profile = load_gpu(name)
    if profile.name != name:
        raise ConfigError(f"--gpu {name}: not a name, allowed: {profile.name}")
    if device != "cuda":
        what = f"plans for {profile.full_name} would take what --device {device} measures"
        raise ConfigError(f"--gpu {name}: {what}, allowed: --device cuda, or no --gpu")
    if not is_the_gpu(seen, profile):
        raise ConfigError(f"--gpu {name}: this is a {seen}, not a {profile.full_name}")


def _print_errors(path: Path, dtype: str) -> None:
    """How well each kind of the table predicts a row from the others, and how many rows scatter."""
    import numpy as np

    from simulator.measured import LEAST_ROWS, read_rows, tables

    rows = read_rows(path)[1]
    unsteady = sum(row.is_unsteady for (_, of), row in rows.items() if of == dtype)
    if unsteady:
        typer.echo(
            f"{unsteady} of them scatter: quartiles more than 25 % apart. On a still machine, measure "
            "them again: --again"
        )
    for kind, table in sorted(tables(rows, dtype).items()):
        if len(table.rows) < LEAST_ROWS or not np.isfinite(table.errors).all():
            continue
        missed = np.abs(np.exp(table.errors) - 1)
        transform, trend = table.choice
        typer.echo(
            f"{kind}: {len(table.rows)} rows; one left out is missed by {np.median(missed):.1%} in the "
            f"median, {np.quantile(missed, 0.9):.0%} at 90 % ({transform} axes, {trend})"
        )


@app.command()
def network(
    topology: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="The box that this is; its tables are for --output.",
            autocompletion=shipped("topologies"),
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The topology with the measured tables in it."),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="cpu: over gloo; cuda: over NCCL.")
    ] = "cpu",
    min_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Smallest size.")] = "1 KiB",
    max_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Largest size.")] = "64 MiB",
    timeout: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="The longest wait for another rank.")
    ] = 120.0,
    output_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="network.csv goes there.")
    ] = Path(),
) -> None:
    """Time messages and collectives between ranks, alone and beside compute (needs [run]).

    Start it on the box that is meant: torchrun --nproc-per-node N --no-python paradiff profile network
    """
    with one_message():
        from paradiff.config import ConfigError
        from paradiff.units import parse_quantity
        from simulator.measured_network import (
            Measured,
            check_box,
            check_library,
            to_csv,
            with_tables,
        )
        from simulator.topology import load_topology

        with _needs_torch("measuring"):
            from paradiff.executor import measure, measure_network
            from paradiff.executor.faults import RunFailed
            from paradiff.executor.place import Place
            from paradiff.executor.session import Session
        if (topology is None) != (output is None):
            raise ConfigError("--topology and --output: give both, or none")
        check_output_dir(output_dir)
        if output is not None:
            check_output_file(output)
        try:
            least, most = (
                int(parse_quantity(s, "size", minimum=4)) for s in (min_bytes, max_bytes)
            )
            place = Place.of_environment()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if least > most:
            raise ConfigError(f"--min-bytes {min_bytes}: larger than --max-bytes {max_bytes}")
        if place is None or place.world_size < 2:
            raise ConfigError(
                "not one of several ranks, allowed: torchrun --nproc-per-node N --no-python paradiff "
                "profile network, N of 2 or more"
            )
        if not measure.is_here(device):
            raise ConfigError(f"--device {device}: torch sees no GPU here, allowed: cpu")
        sizes = [least * 4**i for i in range(40) if least * 4**i <= most]
        wanted = measure_network.cases(place.world_size, sizes)
        if topology is not None:
            box = load_topology(topology)
            check_box(box, range(place.world_size))
            check_library(box, device)
        first = place.rank == 0
        rows: list[Measured] = []
        try:
            session = Session.join(
                place, timeout, measure.device_of(device, place.local_rank), "network"
            )
            with progress("measuring", enabled=first) as advance:
                for timed in measure_network.measure(session, wanted):
                    rows.append(Measured(*timed.case, *timed[1:]))
                    if advance is not None:
                        advance(len(rows), len(wanted))
            devices = [int(text) for text in session.gather_text(str(place.local_rank))]
            session.leave()
        except RunFailed as error:
            typer.echo(f"paradiff: rank {place.rank}: {error}", err=True)
            raise typer.Exit(1) from None
        if not first:
            return
        about = measure.machine(device) | {
            "ranks": str(place.world_size),
            "date": time.strftime("%Y-%m-%d"),
        }
        about["command"] = shlex.join(["paradiff", "profile", "network", *sys.argv[3:]])
        output_dir.mkdir(parents=True, exist_ok=True)
        write_file(output_dir / "network.csv", to_csv(about, rows))
        if topology is not None and output is not None:
            source = (
                f"measured: paradiff profile network, {about['device']}, "
                f"{'NCCL' if device == 'cuda' else 'gloo'}, torch {about['torch']}, {about['date']}"
            )
            write_file(output, with_tables(topology, rows, devices, source))
    typer.echo(
        f"{output_dir / 'network.csv'}: {len(rows)} transfers between {place.world_size} ranks"
    )
    if output is not None:
        typer.echo(
            f"{output}: {topology} with "
            f"{len({row[:2] for row in rows if row.way == 'all'})} measured tables"
        )


@app.command()
def fit(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="trace.json.gz of paradiff run.")
    ],
    gpu: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="GPU profile to correct.", autocompletion=shipped("gpus")
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="The corrected profile; its name is the file's.")
    ],
    runtime: Annotated[
        Literal["eager", "compiled", "cuda-graph"], typer.Option(help="How the runs were executed.")
    ] = "eager",
) -> None:
    """Correct a GPU profile's rates by measured traces, and say how far it is then off elsewhere.

    Plan with it: paradiff-plan --topology BOX --set gpu=FILE.
    """
    with one_message():
        from paradiff.config import ConfigError
        from simulator import calibrate
        from simulator.gpu import load_gpu

        if output.suffix != ".yaml":
            raise ConfigError(f"--output {output}: allowed: a name that ends in .yaml")
        check_output_file(output)
        base = load_gpu(gpu)
        runs = [
            (path, trace, _model_of(path, trace))
            for path, trace in calibrate.load_traces(traces, base)
        ]
        seen = calibrate.observations(runs, base, runtime)
        found = calibrate.fit(seen, base, output.stem, runtime)
        traced = {each.dtype for each in seen}
        source = calibrate.source_of(trace for _, trace, _ in runs)
        write_file(output, calibrate.corrected_yaml(gpu, found, traced, source))
    from analysis.text import count_of

    counts = f"{count_of(len(seen), 'work')} of {count_of(len(runs), 'run')}"
    typer.echo(f"{output}: {gpu} corrected by {counts}")
    _print_fit(found)


def _model_of(path: Path, trace: Trace) -> Profile:
    """The profile that a trace was made with. Raises ConfigError."""
    from paradiff.config import ConfigError, available, find, printable

    name = printable(dict(trace.meta)["model"])
    try:
        find("models", name, ".json")
    except ConfigError:
        models = ", ".join(available("models", ".json"))
        raise ConfigError(
            f"{path}: a run of {name}, which has no profile here, allowed: {name}.json in this directory"
            f" (paradiff profile trace makes it), or a run of {models}"
        ) from None
    return load_model(name)


def _print_fit(found: Fit) -> None:
    """Factors, and how far works are missed."""
    import numpy as np

    from analysis.text import plain
    from simulator.calibrate import residuals

    told = [
        f"{name} x {getattr(found.factors, name):.4g}{' (its ceiling)' * (name in found.capped)}"
        for name in found.told
    ]
    left = [name for name in found.factors._fields if name not in found.told]
    stays = f"; not told by these works, as it was: {', '.join(left)}" if left else ""
    typer.echo(f"{', '.join(told)}{stays}\n")
    rows = []
    for each in residuals(found):
        of_it = [each.kind in ("all", kind) for kind in found.kinds]
        before = np.abs(found.before)[of_it]
        pairs = (
            (np.median(before), before.max()),
            (each.median, each.worst),
            (each.held_out_median, each.held_out_worst),
        )
        missed = [f"{median:.1%} (worst {worst:.1%})" for median, worst in pairs]
        rows.append([each.kind, str(each.n), *missed])
    header = ["mostly", "works", "missed as it was", "fitted", "held out"]
    typer.echo("\n".join(plain(header, rows, left=("mostly",))))
    if np.median(np.abs(found.held_out)) >= np.median(np.abs(found.before)):
        typer.echo("\nHeld out, works are missed as much as before: these rates predict no better.")
