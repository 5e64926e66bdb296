"""Runs of which every latent is kept: what ``paradiff validate fidelity`` compares.

One model, many runs, all ranks in this process. It does not know metrics or what a difference means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paradiff.executor.interpreter import run_graph
from paradiff.executor.job import Job, Prepared, loaded, prepare, workload_of
from paradiff.executor.loading import Pipeline
from paradiff.executor.network import Conditioning
from paradiff.executor.payload import Piece, Span, take_rows
from paradiff.profiles import Profile
from paradiff.strategies import Workload, parse_spec


@dataclass
class _Album:
    """The latents on the way to the result: of every row those of the lowest rank that stepped it, which
    is the authority where ranks differ (ParaStep's first rank). Of the first replica."""

    kept: dict[tuple[int, Span], tuple[int, Piece]] = field(default_factory=dict)

    def watch(self, replica: int, step: int, rank: int, piece: Piece) -> None:
        before = self.kept.get((step, piece.span))
        if replica == 0 and (before is None or rank < before[0]):
            own = Piece(piece.span, piece.value.detach().to("cpu", copy=True))
            self.kept[step, piece.span] = rank, own

    def whole(self, rows: int) -> Tensor:
        """(steps, samples, ..., rows, columns)."""
        steps: dict[int, list[tuple[int, Piece]]] = {}
        for (step, _), found in self.kept.items():
            steps.setdefault(step, []).append(found)
        return torch.stack(
            [
                take_rows([piece for _, piece in sorted(found, key=lambda f: f[0])], [(0, rows)])
                for _, found in sorted(steps.items())
            ]
        )


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


Seen = tuple[NDArray[Any], NDArray[Any] | None]
"""Latents after each step (steps, samples, ...) in float32 or float64; pictures (samples, frames, rows,
columns, 3) in 0 to 1, None for sound and for models without a VAE."""


@dataclass(frozen=True)
class Bench:
    """A model that has been loaded, and what all of its runs have in common. Prompts are encoded once
    for each batch (and number of replicas)."""

    job: Job
    pipeline: Pipeline
    given: dict[tuple[int, int], Sequence[Conditioning]] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> Bench:
        """Load the model. Raises ValueError."""
        return cls(job, loaded(job))

    @property
    def profile(self) -> Profile:
        return self.pipeline.network.profile

    def workload(self, steps: int | None) -> Workload:
        """What a run computes; None: the model's own number of steps."""
        return workload_of(replace(self.job, steps=steps), self.profile)

    def prepared(self, spec: str, steps: int, scheduler: str | None, number: int = 0) -> Prepared:
        """Batch ``number`` of samples, whose noise is drawn from the job's seed plus that number.

        Raises ValueError (Infeasible where the model cannot run ``spec``)."""
        job = replace(
            self.job, spec=spec, steps=steps, scheduler=scheduler, seed=self.job.seed + number
        )
        key = number, parse_spec(spec).degree("data")
        prepared = prepare(job, self.pipeline, self.given.get(key))
        self.given[key] = prepared.request.conditioning
        return prepared


def look(prepared: Prepared) -> Seen:
    """Run, and keep what is to be compared. Raises what ``run_graph`` raises."""
    album = _Album()
    request = replace(prepared.request, watch=album.watch)
    result = run_graph(prepared.graph, prepared.pipeline.network, request)
    latents = album.whole(result.latents[0].shape[-2])
    assert torch.equal(latents[-1], result.latents[0].cpu()), "the last latent seen is the result"
    kind = torch.float64 if latents.dtype == torch.float64 else torch.float32
    return latents.to(kind).numpy(), _pictures(result.decoded.get(0))


def _pictures(decoded: Tensor | None) -> NDArray[Any] | None:
    """Images (b, 3, h, w) and videos (b, 3, f, h, w), -1 to 1."""
    if decoded is None or decoded.ndim < 4:
        return None
    frames = decoded[:, :, None] if decoded.ndim == 4 else decoded
    shown = (frames.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    return np.ascontiguousarray(shown.cpu().numpy())
