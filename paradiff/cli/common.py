"""What every command shares: one message for bad input, progress, models by name, files all or none.

Exit codes: 0 done; 1 a gate failed; 2 malformed input (one message on stderr, nothing written); 3 well
formed, but nothing can run (the reason for each, and the nearest that can); 130 interrupted.
"""

from __future__ import annotations

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

if TYPE_CHECKING:
    from paradiff.profiles import Profile
    from paradiff.strategies import Workload

GATE_FAILED, MALFORMED, INFEASIBLE, INTERRUPTED = 1, 2, 3, 130
MAX_PROFILE_BYTES = 64 * 2**20

# Options that several commands have.
Pixels = Annotated[int | None, typer.Option(min=1, help="Pixels; default: the model's.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Default: the model's.")]
Batch = Annotated[int, typer.Option(min=1, help="Images or clips per request.")]
Dtype = Annotated[Literal["fp16", "bf16", "fp32"], typer.Option(help="Precision.")]
Launches = Annotated[
    Literal["eager", "compiled", "cuda-graph"], typer.Option(help="How kernels are launched.")
]
Specs = Annotated[
    list[str] | None,
    typer.Option(metavar="SPEC", help="Only this strategy; may be given several times."),
]
ExactOnly = Annotated[
    bool, typer.Option("--exact-only", help="Only strategies that keep the picture.")
]
MaxStaleness = Annotated[
    int | None, typer.Option(min=0, metavar="K", help="Nothing older than K steps is read.")
]
TableOrJson = Annotated[
    Literal["table", "json"], typer.Option("--format", help="Output on stdout.")
]

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    # xDiT's users write --output_dir, everybody else --output-dir: both are read.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


def group(text: str, *, completion: bool = False) -> typer.Typer:
    """A typer application in the manner of all of ours. ``completion``: with --install-completion
    and --show-completion."""
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=CONTEXT,
    )


def shipped(kind: str, suffix: str = ".yaml") -> Callable[[str], list[str]]:
    """What a shell offers for an option that takes a shipped name."""

    def names(incomplete: str) -> list[str]:
        from paradiff.config import available

        return [name for name in available(kind, suffix) if name.startswith(incomplete)]

    return names


@contextmanager
def one_message() -> Iterator[None]:
    """Turn malformed input into one line on stderr and exit code 2."""
    from paradiff.config import ConfigError

    try:
        yield
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    leave_with(MALFORMED, " ".join(message.split()))


def leave_with(code: int, message: str) -> NoReturn:
    """End the command with its one message, if it has one."""
    if message:
        typer.echo(f"paradiff: {message}", err=True)
    raise typer.Exit(code)


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the option was written on the command line, whatever its default."""
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def check_one_of(options: Mapping[str, Any], *names: str) -> None:
    """Raises ConfigError where several of these options were given."""
    from paradiff.config import ConfigError

    given = [f"--{n.replace('_', '-')}" for n in names if options[n] not in (None, False)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")


def load_model(name: str) -> Profile:
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


def workload_of(
    profile: Profile, sizes: Mapping[str, int | None], batch: int, dtype: str
) -> Workload:
    """What was asked for, the rest as the model has it by default."""
    from paradiff.strategies import Workload

    chosen = {
        key: profile.defaults[key] if given is None else given for key, given in sizes.items()
    }
    return Workload(**chosen, batch=batch, dtype=dtype)


def parsed_specs(texts: Iterable[str]) -> tuple[str, ...]:
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
def progress(
    what: str = "simulating", *, enabled: bool
) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr where that is a terminal; None otherwise."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def json_text(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def portable(name: str) -> str:
    """A shipped name as it is, a path made absolute, so that a plan file works from anywhere."""
    path = Path(name)
    return str(path.resolve()) if path.is_file() else name


def check_output_dir(path: Path | None) -> None:
    """Fail before the work, not after it, where results could not be written."""
    from paradiff.config import ConfigError

    if path is None:
        return
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output-dir {path}: {existing} is not a directory")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"--output-dir {path}: {existing} cannot be written to")


def check_output_file(path: Path) -> None:
    """Fail before the work where the folder of ``--output`` is not there, or the path is a folder."""
    from paradiff.config import ConfigError

    if path.is_dir():
        raise ConfigError(f"--output {path}: a directory, allowed: a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: {path.parent} is not a directory")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--output {path}: {path.parent} cannot be written to")


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises ConfigError where the file system refuses."""
    from paradiff.config import ConfigError

    partial = path.with_name(f".{path.name}.paradiff-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staged(directory: Path, stale: re.Pattern[str] | None = None) -> Iterator[Path]:
    """A folder to write results into; they appear in ``directory`` all together, or not at all.

    It lies on the same file system (inside ``directory`` where that exists: it may be a mount point);
    what lies in ``directory`` and matches ``stale``, but was not written again, is removed. Raises
    ConfigError where the file system refuses.
    """
    from paradiff.config import ConfigError

    directory = directory.absolute()
    home = directory if directory.exists() else directory.parent
    staging = home / f".{directory.name}.paradiff-{os.getpid()}"
    try:
        staging.mkdir(parents=True)
        yield staging
        if not directory.exists():
            staging.rename(directory)
            return
        written = sorted(path.name for path in staging.iterdir())
        for old in directory.iterdir():
            if stale is not None and stale.fullmatch(old.name) and old.name not in written:
                old.unlink()
        for name in written:
            (staging / name).replace(directory / name)
    except OSError as error:
        raise ConfigError(f"--output-dir {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
