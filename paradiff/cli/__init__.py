"""The command line: one file a command, ``common`` for what they share.

It decides how arguments become values, what is printed and written, and the exit code. Everything heavy
is imported inside the command that needs it, so ``--help`` costs little more than typer.
"""

from __future__ import annotations

import gc
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

import paradiff
from paradiff.cli import profile, topology, validate
from paradiff.cli.capacity import capacity
from paradiff.cli.common import INTERRUPTED, group
from paradiff.cli.env import env
from paradiff.cli.plan import plan
from paradiff.cli.run import run

app = group(
    "Which parallel strategy should run this diffusion model on this box, and how fast?",
    completion=True,
)
plan_app = group("Rank the parallel strategies for one model on one box.", completion=True)
app.command()(plan)
app.command()(run)
plan_app.command()(plan)
app.command()(capacity)
app.command()(env)
app.add_typer(profile.app, name="profile")
app.add_typer(topology.app, name="topology")
app.add_typer(validate.app, name="validate")


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
    signal.signal(signal.SIGTERM, _terminated)
    try:
        command(prog_name=name)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _terminated(number: int, frame: FrameType | None) -> None:
    """What is open is closed on the way out, worker processes included."""
    sys.exit(128 + number)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(paradiff.__version__)
        raise typer.Exit
