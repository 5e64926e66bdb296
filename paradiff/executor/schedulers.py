"""Real diffusers schedulers, stepped by latent rows.

A scheduler that is elementwise in space lets rows be stepped apart from others: these are executed,
others refused. One that adds noise adds its rows of what is drawn for the whole latent. Multistep ones
keep a history, so each part of a rank's latent has a scheduler of its own, stepped once a denoising
step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from paradiff.executor.payload import Span
from paradiff.models.interception import at_step, drawing, precise

GuidanceScale = float | tuple[float, float]
"""One for all, or that of the first and that of the last frame, between which it grows evenly."""
NAMES: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "flow-match-euler": "FlowMatchEulerDiscreteScheduler",
}
"""What ``--scheduler`` takes -> classes of diffusers."""
CLASSES = (
    *NAMES.values(),
    "CogVideoXDDIMScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
    "DDPMScheduler",
)


WITHOUT_MEMORY = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "CogVideoXDDIMScheduler",
)
"""Schedulers whose step needs nothing of the steps before."""


def has_memory(scheduler: Any) -> bool:
    """Whether a step needs predictions of earlier ones, so that one rank must make them all."""
    return type(scheduler).__name__ not in WITHOUT_MEMORY


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
    if name == "PNDMScheduler":
        _set_timesteps(deepcopy(scheduler), steps)


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


class Noise:
    """Noise of a replica's whole latent, one draw after another, of which rows are taken: what a rank
    draws for some rows is what a pipeline with this seed draws there."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self._sizes = tuple(sizes)
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """The next draw, on the CPU: the same whatever the device."""
        return torch.randn(self._sizes, generator=self._generator, dtype=torch.float64)


@dataclass
class _Running:
    """A scheduler that steps some rows, how many steps it has done, and the noise that it may add."""

    scheduler: Any
    noise: Noise
    done: int = 0


class Schedule:
    """Timesteps and initial noise of the replicas' requests, and their schedulers: one for each part of
    each rank's latent.

    ``sigmas`` are the noise levels that the pipeline of the model gives its scheduler, ``sizes`` are
    those of a latent; a replica draws from ``seed`` plus its number.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        *,
        sigmas: Sequence[float] | None,
        tokens: int,
        sizes: Sequence[int],
        seed: int,
        guidance_scale: GuidanceScale,
    ) -> None:
        check_scheduler(scheduler, steps)
        self._template = deepcopy(scheduler)
        if sigmas is not None:
            dynamic = scheduler.config.get("use_dynamic_shifting")
            shift = {"mu": _shift(scheduler.config, tokens)} if dynamic else {}
            self._template.set_timesteps(sigmas=np.array(sigmas), **shift)
        else:
            _set_timesteps(self._template, steps)
        self._scaler = deepcopy(self._template)
        self._running: dict[tuple[int, int | None], _Running] = {}
        self._sizes, self._seed = sizes, seed
        self._guidance_scale = _by_frame(guidance_scale, sizes)

    def initial(self, replica: int) -> Tensor:
        """The latent that a replica begins with, in float64."""
        scale = float(getattr(self._template, "init_noise_sigma", 1.0))
        return Noise(self._sizes, self._seed + replica).draw() * scale

    def timestep(self, step: int) -> Tensor:
        return self._template.timesteps[step]

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """The latent as the network takes it at ``step``."""
        if not hasattr(self._scaler, "scale_model_input"):
            return x
        at_step(self._scaler, step)
        with precise(self._scaler, x.dtype):
            return self._scaler.scale_model_input(x, self.timestep(step))

    def guided(self, branches: list[Tensor]) -> Tensor:
        """Classifier-free guidance of (uncond, cond), or of both along the batch."""
        uncond, cond = branches if len(branches) == 2 else branches[0].chunk(2)
        scale = self._guidance_scale
        if isinstance(scale, Tensor):
            scale = scale.to(uncond)
        return uncond + scale * (cond - uncond)

    def step(
        self,
        rank: int,
        part: int | None,
        step: int,
        prediction: Tensor,
        x: Tensor,
        *,
        replica: int,
        rows: Span,
    ) -> Tensor:
        """The next latent of one part of a rank's rows, which are ``rows`` of the replica's latent."""
        if (rank, part) not in self._running:
            scheduler = deepcopy(self._template)
            scheduler.is_scale_input_called = True
            noise = Noise(self._sizes, self._seed + replica)
            noise.draw()  # the initial latent
            late = 0 if has_memory(scheduler) else step
            for _ in range(late):
                noise.draw()  # what ranks before this one have added
            self._running[rank, part] = _Running(scheduler, noise, late)
        running = self._running[rank, part]
        assert running.done == step, (
            f"rank {rank}, part {part}: scheduler at step {running.done}, graph at {step}"
        )
        running.done += 1
        with precise(running.scheduler, x.dtype), _drawing(running, rows):
            after: Tensor = running.scheduler.step(
                prediction, self.timestep(step), x, return_dict=False
            )[0]
        return after


def _by_frame(scale: GuidanceScale, sizes: Sequence[int]) -> float | Tensor:
    """What to multiply with: of a latent (batch, frames, channels, rows, width), frame by frame."""
    if not isinstance(scale, tuple):
        return scale
    return torch.linspace(*scale, sizes[1]).view(1, -1, 1, 1, 1)


def _set_timesteps(scheduler: Any, steps: int) -> None:
    """``steps`` evaluations of the network. (PNDM makes one more than it is asked for.)"""
    for asked in (steps, steps - 1):
        scheduler.set_timesteps(max(1, asked))
        if len(scheduler.timesteps) == steps:
            return
    raise ValueError(
        f"steps {steps}: {type(scheduler).__name__} has no schedule of as many network calls,"
        " allowed: 1, 3 or more"
    )


def _drawing(running: _Running, rows: Span) -> AbstractContextManager[None]:
    """A stochastic scheduler (DDPM) adds its rows of what is drawn for the whole latent."""

    def draw(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        return running.noise.draw()[..., rows[0] : rows[1], :].to(device, dtype)

    return drawing(running.scheduler, draw)


def _shift(config: Any, tokens: int) -> float:
    """``calculate_shift`` of FluxPipeline."""
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    return float(tokens * slope + config.base_shift - slope * low)
