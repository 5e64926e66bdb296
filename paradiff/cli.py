"""The command line: ``paradiff plan | profile | topology``, and ``paradiff-plan`` for the first.

Decides how arguments become values, what is printed and written, and the exit code. Everything heavy
is imported inside the command that needs it, so ``--help`` costs little more than typer.

Exit codes: 0 done; 2 malformed input (one message on stderr, nothing written); 3 well formed, but
nothing can run (the reason for each, and the nearest that can); 130 interrupted.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

import paradiff

if TYPE_CHECKING:
    from paradiff.profiles import Profile
    from paradiff.strategies import Workload
    from simulator.planner import Plan, Request

MALFORMED, INFEASIBLE, INTERRUPTED = 2, 3, 130
MAX_PROFILE_BYTES = 64 * 2**20
STALE_OUTPUT = re.compile(r"\d\d-.*\.plan\.yaml")

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    # xDiT's users write --output_dir, everybody else --output-dir: both are read.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


def _typer(text: str) -> typer.Typer:
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=CONTEXT,
    )


app = _typer("Which parallel strategy should run this diffusion model on this box, and how fast?")
plan_app = _typer("Rank the parallel strategies for one model on one box.")
profile_app = _typer("Model profiles.")
topology_app = _typer("Boxes.")
app.add_typer(profile_app, name="profile")
app.add_typer(topology_app, name="topology")


def main() -> None:
    """Entry point of ``paradiff``."""
    _run(app, "paradiff")


def plan_main() -> None:
    """Entry point of ``paradiff-plan``: the same as ``paradiff plan``."""
    _run(plan_app, "paradiff-plan")


def _run(command: typer.Typer, name: str) -> None:
    # Graphs and simulations are a million small objects, nearly none in cycles: collecting them as
    # often as Python does by default is a third of a plan's time.
    gc.set_threshold(1_000_000)
    try:
        command(prog_name=name)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(paradiff.__version__)
        raise typer.Exit


# ---------------------------------------------------------------------------------------------- plan


@plan_app.command()
@app.command()
def plan(
    topology: Annotated[
        str, typer.Option(help="Box: a shipped name (pcie8) or a YAML file.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Shipped model, or a profile file.")] = "sdxl",
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images or clips per request.")] = 1,
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], typer.Option(help="Precision.")] = "bf16",
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use N GPUs; default: all of the box.")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Only this strategy; may be given several times."),
    ] = None,
    runtime: Annotated[
        Literal["eager", "compiled", "cuda-graph"], typer.Option(help="How kernels are launched.")
    ] = "eager",
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
    exact_only: Annotated[
        bool, typer.Option("--exact-only", help="Only strategies that keep the picture.")
    ] = False,
    max_staleness: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="Nothing older than K steps is read.")
    ] = None,
    max_quality_loss: Annotated[
        float | None, typer.Option(min=0.0, metavar="X", help="Measured loss of at most X.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="What if, on the box: peer_to_peer=true."
        ),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="N", help="Keep the N best.")] = None,
    format_: Annotated[
        Literal["table", "json"], typer.Option("--format", help="Output on stdout.")
    ] = "table",
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write plan.json, NN-SPEC.plan.yaml, trace.json.gz."),
    ] = None,
) -> None:
    """Rank the parallel strategies for one model on one box."""
    with _one_message():
        from paradiff.config import ConfigError
        from simulator import planner
        from simulator.topology import load_topology

        _check_output_dir(output_dir)
        box = load_topology(topology, set_ or [])
        profile = _load_model(model)
        if gpus is not None and gpus > len(box.gpus):
            raise ConfigError(f"--gpus {gpus}: {box.name} has {len(box.gpus)}")
        if measured_latency is not None and not 0 < measured_latency < float("inf"):
            raise ConfigError(f"--measured-latency {measured_latency}: must be positive")
        sizes = {"height": height, "width": width, "frames": frames, "steps": steps}
        request = planner.Request(
            profile=profile,
            topology=box,
            workload=_workload(profile, sizes, batch, dtype),
            gpus=gpus or len(box.gpus),
            runtime=runtime,
            specs=_specs(strategy or []),
            goal=planner.Goal(
                objective=objective,
                exact_only=exact_only,
                max_staleness=max_staleness,
                max_quality_loss=max_quality_loss,
            ),
            measured=None if measured_latency is None else (measured_latency, scope),
        )
        try:
            with _progress(enabled=format_ == "table") as advance:
                result = planner.plan(request, advance)
        except planner.Contradiction as error:
            raise ConfigError(f"--measured-latency: {error}") from None
        if output_dir is not None and result.ranked:
            inputs = {"model": _portable(model), "topology": _portable(topology), "set": set_ or []}
            _write_results(output_dir, request, result, inputs, top)
    if format_ == "json":
        typer.echo(_json(result.to_json(top)), nl=False)
    else:
        _print_plan(result, top or 10, asked=bool(strategy))
    if not result.ranked:
        _explain_nothing(result)
        raise typer.Exit(INFEASIBLE)


@contextmanager
def _one_message() -> Iterator[None]:
    """Turn malformed input into one line on stderr and exit code 2."""
    from paradiff.config import ConfigError

    try:
        yield
    except ConfigError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo("paradiff: " + " ".join(message.split()), err=True)
    raise typer.Exit(MALFORMED)


def _load_model(name: str) -> Profile:
    """The profile called ``name``: shipped, or a JSON file. Raises ConfigError."""
    from paradiff.config import ConfigError, find
    from paradiff.profiles import InvalidProfile, load_profile

    path = find("models", name, ".json")
    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise ConfigError(f"{path}:1:1: too large, allowed: {MAX_PROFILE_BYTES} bytes at most")
        return load_profile(path)
    except InvalidProfile as error:
        cause = error.__cause__
        line, column = getattr(cause, "lineno", 1), getattr(cause, "colno", 1)
        text = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{path}:{line}:{column}: {text}") from None
    except RecursionError:
        raise ConfigError(f"{path}:1:1: not a profile: nested too deep") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _workload(
    profile: Profile, sizes: Mapping[str, int | None], batch: int, dtype: str
) -> Workload:
    """What was asked for, the rest as the model has it by default."""
    from paradiff.strategies import Workload

    chosen = {
        key: profile.defaults[key] if given is None else given for key, given in sizes.items()
    }
    return Workload(**chosen, batch=batch, dtype=dtype)


def _specs(texts: Iterable[str]) -> tuple[str, ...]:
    """The asked specs, each well formed. Raises ConfigError."""
    from paradiff.config import ConfigError
    from paradiff.strategies import SpecError, parse_spec

    unique = tuple(dict.fromkeys(texts))
    for text in unique:
        try:
            parse_spec(text)
        except SpecError as error:
            raise ConfigError(f"--strategy {text!r}: {error}") from None
    return unique


@contextmanager
def _progress(*, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr where that is a terminal; None otherwise."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
    if plan.rejected:
        typer.echo(
            "\nNot possible here:" if asked else f"\nNot possible here: {len(plan.rejected)}"
        )
        for line in text.rejected(plan.rejected):
            typer.echo(f"  {line}")


def _explain_nothing(plan: Plan) -> None:
    """On stderr: why each asked strategy is out, and what would be near."""
    from analysis import text

    typer.echo(f"paradiff: nothing can run: {plan.model} on {plan.topology}", err=True)
    for line in text.rejected(plan.rejected, limit=20):
        typer.echo(f"  {line}", err=True)


# ---------------------------------------------------------------------------------------- files out


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _portable(name: str) -> str:
    """A shipped name as it is, a path made absolute, so that a plan file works from anywhere."""
    path = Path(name)
    return str(path.resolve()) if path.is_file() else name


def _check_output_dir(path: Path | None) -> None:
    """Fail before the work, not after it, where results could not be written."""
    from paradiff.config import ConfigError

    if path is None:
        return
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output-dir {path}: {existing} is not a directory")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"--output-dir {path}: {existing} cannot be written to")


def _write_results(
    directory: Path, request: Request, plan: Plan, inputs: Mapping[str, Any], top: int | None
) -> None:
    """The plan, one runnable file per recommendation, the winner's trace: all of them or none.

    They are staged on the same file system (inside ``directory`` where it exists: it may be a mount
    point) and then renamed. Raises ConfigError where the file system refuses.
    """
    from paradiff.config import ConfigError

    directory = directory.absolute()
    home = directory if directory.exists() else directory.parent
    staging = home / f".{directory.name}.paradiff-{os.getpid()}"
    try:
        staging.mkdir(parents=True)
        _stage_results(staging, request, plan, inputs, top)
        if not directory.exists():
            staging.rename(directory)
            return
        staged = sorted(path.name for path in staging.iterdir())
        for old in directory.iterdir():
            if STALE_OUTPUT.fullmatch(old.name) and old.name not in staged:
                old.unlink()
        for name in staged:
            (staging / name).replace(directory / name)
    except OSError as error:
        raise ConfigError(f"--output-dir {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stage_results(
    staging: Path, request: Request, plan: Plan, inputs: Mapping[str, Any], top: int | None
) -> None:
    from simulator import planner

    data = plan.to_json(top)
    (staging / "plan.json").write_text(_json(data), encoding="utf-8")
    for number, candidate in enumerate(plan.ranked[: top or 10], 1):
        content = {
            "schema": "paradiff.planfile/1",
            **inputs,
            "workload": data["workload"],
            "runtime": plan.runtime,
            "spec": candidate.spec,
            "placement": list(candidate.placement or ()),
            "fingerprint": planner.fingerprint(request, candidate.spec),
            "predicted_latency_s": candidate.latency_s,
        }
        lines = [
            f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()
        ]
        name = re.sub(r"[^\w=,.+-]", "_", candidate.spec)
        target = staging / f"{number:02d}-{name}.plan.yaml"
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    best = plan.ranked[0]
    planner.write_trace(request, best.spec, staging / "trace.json.gz", best.placement)


# ------------------------------------------------------------------------------- profile, topology


@profile_app.command()
def trace(
    source: Annotated[
        str, typer.Argument(metavar="NAME|CONFIG", help="Known model, or a diffusers config.json.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: NAME.json in this directory.")
    ] = None,
) -> None:
    """Trace a diffusers model on the meta device and write its profile (needs the [run] extra)."""
    with _one_message():
        from paradiff.config import ConfigError

        try:
            from paradiff.models.trace import trace_profile, write_profile
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracing needs {error.name}: pip install 'paradiff[run]' (planning does not)"
            ) from None
        try:
            profile = trace_profile(source)
        except (ValueError, OSError) as error:
            where = "" if str(error).startswith(source) else f"{source}: "
            raise ConfigError(f"{where}{error}") from None
        target = output or Path(f"{profile.name}.json")
        staged = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            write_profile(profile, staged)
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)
    typer.echo(f"{target}: {profile.name}, {profile.denoiser.params / 1e6:.1f} M parameters")


@topology_app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Shipped name, or a YAML file.")],
) -> None:
    """Print a box as a tree: nodes, switches, links, GPUs."""
    with _one_message():
        from simulator.topology import load_topology

        box = load_topology(name)
    from analysis import text

    typer.echo("\n".join(text.topology_tree(box)))
