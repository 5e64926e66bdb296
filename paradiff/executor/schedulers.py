"""Real diffusers schedulers, stepped by latent rows.

Every scheduler of the catalogue is elementwise in space, so rows may be stepped apart from others;
multistep ones keep a history, so each part of a rank's latent has a scheduler of its own, stepped once
a denoising step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor


class _Wide(ModuleType):
    """``torch`` in whose eyes float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _precise(scheduler: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a float64 latent keep its precision: several schedulers "upcast" what they get to float32."""
    module = sys.modules[type(scheduler).__module__]
    if dtype != torch.float64:
        yield
        return
    with mock.patch.object(module, "torch", _Wide("torch")):
        yield


class Schedule:
    """One request's timesteps, and its schedulers: one for each part of each rank's latent."""

    def __init__(self, scheduler: Any, steps: int, tokens: int, guidance_scale: float) -> None:
        self._template = deepcopy(scheduler)
        if scheduler.config.get("use_dynamic_shifting"):
            sigmas = np.linspace(1.0, 1 / steps, steps)
            self._template.set_timesteps(sigmas=sigmas, mu=_shift(self._template.config, tokens))
        else:
            self._template.set_timesteps(steps)
        self._scaler = deepcopy(self._template)
        self._running: dict[tuple[int, int | None], tuple[Any, int]] = {}
        self._guidance_scale = guidance_scale

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the initial latent."""
        return float(getattr(self._template, "init_noise_sigma", 1.0))

    def timestep(self, step: int) -> Tensor:
        return self._template.timesteps[step]

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """The latent as the network takes it at ``step``."""
        if not hasattr(self._scaler, "scale_model_input"):
            return x
        self._scaler._step_index = step
        with _precise(self._scaler, x.dtype):
            return self._scaler.scale_model_input(x, self.timestep(step))

    def guided(self, branches: list[Tensor]) -> Tensor:
        """Classifier-free guidance of (uncond, cond), or of both along the batch."""
        uncond, cond = branches if len(branches) == 2 else branches[0].chunk(2)
        return uncond + self._guidance_scale * (cond - uncond)

    def step(self, rank: int, part: int | None, step: int, prediction: Tensor, x: Tensor) -> Tensor:
        """The next latent of one part of a rank's rows."""
        scheduler, done = self._running.get((rank, part), (None, 0))
        if scheduler is None:
            scheduler = deepcopy(self._template)
            scheduler.is_scale_input_called = True
        assert done == step, f"rank {rank}, part {part}: scheduler at step {done}, graph at {step}"
        with _precise(scheduler, x.dtype):
            after = scheduler.step(prediction, self.timestep(step), x, return_dict=False)[0]
        self._running[rank, part] = scheduler, step + 1
        return after


def _shift(config: Any, tokens: int) -> float:
    """``calculate_shift`` of FluxPipeline."""
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    return float(tokens * slope + config.base_shift - slope * low)
