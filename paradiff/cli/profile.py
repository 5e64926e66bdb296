"""``paradiff profile``: model profiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from paradiff.cli.common import group, one_message

app = group("Model profiles.")


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
