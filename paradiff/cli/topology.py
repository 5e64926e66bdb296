"""``paradiff topology``: boxes."""

from __future__ import annotations

from typing import Annotated

import typer

from paradiff.cli.common import group, one_message

app = group("Boxes.")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Shipped name, or a YAML file.")],
) -> None:
    """Print a box as a tree: nodes, switches, links, GPUs."""
    with one_message():
        from simulator.topology import load_topology

        box = load_topology(name)
    from analysis import text

    typer.echo("\n".join(text.topology_tree(box)))
