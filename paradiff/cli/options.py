"""Options of the commands that run: the same words, limits and help in each (more are in ``common``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from paradiff.cli.common import shipped

Plan = Annotated[
    Path | None, typer.Argument(metavar="[PLAN.yaml]", help="A plan file; else --model.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model of the catalogue, or a twin.", autocompletion=shipped("models", ".json")
    ),
]
Strategy = Annotated[str | None, typer.Option(metavar="SPEC", help="What to run.")]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Local directory of the model, as from_pretrained reads it."),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="The real size with random weights, not the twin.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Default: the plan's or model's.")]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Images or clips per request; default: the plan's, else 1."),
]
Dtype = Annotated[
    Literal["fp16", "bf16", "fp32", "fp64"] | None,
    typer.Option(help="Precision; default: the plan's at real size, else fp32."),
]
InProcess = Annotated[
    bool, typer.Option("--in-process", help="All ranks in this process (the default).")
]
Launch = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Start N processes through torchrun.")
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where ranks run.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Of the noise and of random weights.")
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(min=0.0, max=1000.0, metavar="X", help="Default: the pipeline's."),
]
Embeddings = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Safetensors with the network's arguments by name."),
]
NegativePrompt = Annotated[str, typer.Option(metavar="TEXT", help="For guidance.")]
Scheduler = Annotated[
    Literal["ddim", "euler", "dpmsolver++", "flow-match-euler"] | None,
    typer.Option(help="In place of the model's own."),
]
Timeout = Annotated[
    float, typer.Option(min=1.0, metavar="SECONDS", help="The longest that a transfer may wait.")
]
