"""``paradiff plan --sweep``: a file of combinations to one table of results."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import typer

from paradiff.cli.common import (
    check_output_dir,
    load_model,
    one_message,
    progress,
    staged,
    was_given,
)

PARTS = "sweep.parts"
"""Folder of finished combinations inside the output folder, while a sweep is on its way."""
EXTRAS = {"pyarrow": "parquet", "ray": "ray"}
"""Library -> extra of this package that brings it."""


def run_sweep(
    file: Path, output_dir: Path | None, processes: int | None, ray_address: str | None
) -> None:
    """Plan every combination of ``file`` and write ``sweep.csv`` or ``sweep.parquet``."""
    with one_message():
        from paradiff.config import ConfigError, load_yaml
        from simulator import sweep
        from simulator.parallel import WorkersDied
        from simulator.topology import load_topology

        if output_dir is None:
            raise ConfigError(f"--sweep {file}: needs --output-dir DIR for its results")
        check_output_dir(output_dir)
        asked = load_yaml(file, sweep.SweepFile)
        models = {name: load_model(name) for name in asked.models}
        boxes = {name: load_topology(name) for name in asked.topologies}
        if asked.format == "parquet":
            _need("pyarrow", f"{file}: format parquet")
        if ray_address is not None:
            _need("ray", f"--ray {ray_address}")
        work = list(sweep.combinations(asked, list(models.values()), list(boxes.values())))
        parts = output_dir / PARTS
        typer.echo(f"{len(work)} combinations; interrupted, the same command goes on.", err=True)
        with progress(enabled=True) as advance:
            try:
                found = sweep.run(
                    work, parts, processes or os.cpu_count() or 1, ray_address, advance
                )
            except WorkersDied as error:
                raise ConfigError(f"--processes {processes}: {error}") from None
            except OSError as error:
                lost = ray_address is not None and isinstance(error, ConnectionError | TimeoutError)
                where = f"--ray {ray_address}" if lost else f"--output-dir {output_dir}"
                raise ConfigError(f"{where}: {error.strerror or error}") from None
        name = f"sweep.{asked.format}"
        with staged(output_dir) as folder:
            make = sweep.to_parquet if asked.format == "parquet" else sweep.to_csv
            (folder / name).write_bytes(make(found))
        shutil.rmtree(parts, ignore_errors=True)
    typer.echo(f"{output_dir / name}: {len(found)} rows")


def _need(library: str, what: str) -> None:
    from paradiff.config import ConfigError

    if find_spec(library) is None:
        raise ConfigError(f"{what} needs {library}: pip install 'paradiff[{EXTRAS[library]}]'")


def refuse_others(context: typer.Context, allowed: Sequence[str]) -> None:
    """Options of a single plan given beside ``--sweep`` would do nothing: say so."""
    from paradiff.config import ConfigError

    others = [name for name in context.params if name not in allowed and was_given(context, name)]
    if others:
        options = ", ".join("--" + name.strip("_").replace("_", "-") for name in others)
        raise ConfigError(f"{options}: not with --sweep, whose file says what to plan")
