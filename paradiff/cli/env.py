"""``paradiff env``: what a report of a problem should say about the machine, as a block to paste."""

from __future__ import annotations

import typer


def env() -> None:
    """Print versions, machine and GPUs as a block to paste into an issue."""
    from paradiff.executor.machine import rows

    known = list(rows())
    typer.echo("```text")
    width = max(len(name) for name, _ in known)
    for name, value in known:
        typer.echo(f"{name:<{width}}  {value}")
    typer.echo("```")
