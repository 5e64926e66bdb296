"""Real diffusers schedulers, stepped by latent rows.

A scheduler that is elementwise in space and draws no noise lets rows be stepped apart from others: these
are executed, others refused. Multistep ones keep a history, so each part of a rank's latent has a
scheduler of its own, stepped once a denoising step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from torch import Tensor

NAMES: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "flow-match-euler": "FlowMatchEulerDiscreteScheduler",
}
"""What ``--scheduler`` takes -> classes of diffusers."""
CLASSES = (*NAMES.values(), "CogVideoXDDIMScheduler", "UniPCMultistepScheduler")


def check_scheduler(scheduler: Any, steps: int) -> None:
    """Raise ValueError unless ``scheduler`` can be stepped row by row, once a denoising step."""
    name, config = type(scheduler).__name__, scheduler.config
    reason = None
    if name not in CLASSES:
        reason = (
            "draws noise, or evaluates the denoiser another number of times than there are steps"
        )
    elif config.get("thresholding"):
        reason = (
            "thresholding takes a quantile of the whole latent, so rows cannot be stepped apart"
        )
    elif config.get("stochastic_sampling") or "sde" in config.get("algorithm_type", ""):
        reason = "draws noise in every step, which no two ranks draw alike"
    if reason:
        raise ValueError(
            f"{name}: {reason}, allowed: {', '.join(NAMES)}, where the model's kind fits"
        )
    trained = int(config.get("num_train_timesteps", steps))
    if steps > trained:
        raise ValueError(f"steps {steps}: {name} was trained on {trained}, allowed: 1 to {trained}")


def scheduler_named(name: str, own: Any) -> Any:
    """The scheduler ``name`` for a model whose own is ``own``, with that one's configuration.

    Raises ValueError for a name that is not known and for a scheduler that would step another
    equation than the model was trained for: flow matching predicts velocities on straight paths,
    the others noise (or v) on the path of their betas.
    """
    if name not in NAMES:
        raise ValueError(f"scheduler {name!r}, allowed: {', '.join(NAMES)}")
    reason = _misfit(name, own)
    if reason:
        fitting = [each for each in NAMES if not _misfit(each, own)]
        allowed = ", ".join(fitting) or f"its own {type(own).__name__}"
        raise ValueError(
            f"scheduler {name}: the model of {type(own).__name__} {reason}, allowed: {allowed}"
        )
    if _same_method(name, own):
        return own
    config, kind = dict(own.config), getattr(diffusers, NAMES[name])
    if "flow_shift" in config:
        config["shift"] = config["flow_shift"]
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config({k: v for k, v in config.items() if k in known or k.startswith("_")})


def _same_method(name: str, own: Any) -> bool:
    """CogVideoX has a DDIM of its own."""
    return type(own).__name__ in (NAMES[name], f"CogVideoX{NAMES[name]}")


def _misfit(name: str, own: Any) -> str | None:
    """What the model of scheduler ``own`` does that scheduler ``name`` does not know."""
    if _same_method(name, own):
        return None
    flow_sigmas = own.config.get("use_flow_sigmas", False)
    is_flow = flow_sigmas or type(own).__name__ == NAMES["flow-match-euler"]
    if is_flow and name != "flow-match-euler" and not (flow_sigmas and name == "dpmsolver++"):
        return "predicts velocities of flow matching, not noise"
    if name == "flow-match-euler" and not is_flow:
        return "predicts noise (or v), not velocities of flow matching"
    if own.config.get("timestep_type") == "continuous":
        return "takes logarithms of noise levels for timesteps"
    if "snr_shift_scale" in own.config:
        return "was trained with a shifted signal-to-noise ratio"
    return None


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
        check_scheduler(scheduler, steps)
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
