"""Schedulers stepped by rows: equal to the whole latent's step, whatever scheduler a model is given."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any
from unittest import mock

import diffusers
import placed
import plain_loops as plain
import plain_steps
import pytest
import test_executor_strips
import torch
from test_executor_steps import owners, rows_of
from test_executor_strips import latent

from paradiff.executor.network import Network
from paradiff.executor.schedulers import NAMES, Schedule, check_scheduler, scheduler_named
from paradiff.models.tiny import tiny_scheduler

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("device"),
]

STEPS = 5
CASES = [
    # a model, what it is given: DDIM and Euler with v, with noise, the multistep solver, and flows
    ("sd21", "ddim"),
    ("sd21", "euler"),
    ("sd21", "dpmsolver++"),
    ("pixart-alpha", "ddim"),
    ("pixart-alpha", "euler"),
    ("pixart-alpha", "dpmsolver++"),
    ("cogvideox-2b", "ddim"),
    ("sd3-medium", "flow-match-euler"),
    ("flux1-dev", "flow-match-euler"),
    # the model's own: one more evaluation than steps, noise added, a solver of flows, noise levels
    ("sd15", None),
    ("hunyuandit", None),
    ("wan2.1-1.3b", None),
    ("mochi", None),
]


@pytest.mark.parametrize(("name", "chosen"), CASES)
def test_rows_stepped_apart_equal_the_whole_latent(name: str, chosen: str | None) -> None:
    """Every scheduler is elementwise: not a bit differs. The whole equals diffusers' own loop."""
    scheduler, own = (
        scheduler_named(chosen, tiny_scheduler(name)) if chosen else tiny_scheduler(name)
        for _ in range(2)
    )
    plain.set_timesteps(own, name, STEPS, 64)
    draw = torch.Generator().manual_seed(1)
    sizes = (1, 4, 8, 6)
    predictions = placed.there(torch.randn(STEPS, *sizes, generator=draw, dtype=torch.float64))
    sigmas = Network(*plain.twin(name)[::-1]).sigmas(STEPS)
    schedule = Schedule(
        scheduler, STEPS, sigmas=sigmas, tokens=64, sizes=sizes, seed=0, guidance_scale=5.0
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(sizes, generator=generator, dtype=torch.float64)
    extra = {"generator": generator} if "generator" in signature(own.step).parameters else {}
    whole = placed.there(schedule.initial(0))
    assert torch.equal(whole.cpu(), start * getattr(own, "init_noise_sigma", 1.0))
    parts = list(whole.split([2, 5, 1], dim=-2))
    loop = whole
    for step, out in enumerate(predictions):
        whole = schedule.step(0, None, step, out, whole, replica=0, rows=(0, 8))
        rows = zip(parts, out.split([2, 5, 1], dim=-2), [(0, 2), (2, 7), (7, 8)], strict=True)
        parts = [
            schedule.step(1, i, step, o, x, replica=0, rows=at) for i, (x, o, at) in enumerate(rows)
        ]
        with mock.patch.object(torch, "float32", torch.float64):
            t = own.timesteps[step]
            if hasattr(own, "scale_model_input"):
                own.scale_model_input(loop, t)
            loop = own.step(out, t, loop, **extra, return_dict=False)[0]
    assert torch.equal(torch.cat(parts, dim=-2), whole)
    assert plain.relative(whole, loop) < 1e-10


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives every model of a test the named scheduler, in the executor and in the plain loops."""

    def give(chosen: str) -> None:
        def scheduler(name: str) -> Any:
            return scheduler_named(chosen, tiny_scheduler(name))

        for module in (plain, test_executor_strips):
            monkeypatch.setattr(module, "tiny_scheduler", scheduler)

    return give


@pytest.mark.parametrize("chosen", ["ddim", "euler"])
def test_a_pipeline_steps_patch_by_patch(given: Callable[[str], None], chosen: str) -> None:
    given(chosen)
    expected = plain_steps.pipefusion("pixart-alpha", STEPS, rows_of("pixart-alpha", 4), 1, [])
    ours = latent("pixart-alpha", "pipefusion=2,patches=4,warmup=1")
    assert plain.relative(ours, expected) < 1e-10


@pytest.mark.parametrize("chosen", ["euler", "dpmsolver++"])
def test_ranks_that_step_apart(given: Callable[[str], None], chosen: str) -> None:
    """ParaStep's ranks step latents of their own; AsyncDiff steps twice with one prediction."""
    given(chosen)
    steps = plain_steps.parastep("sd21", STEPS, 2, 1)
    assert plain.relative(latent("sd21", "parastep=2,warmup=1"), steps) < 1e-10
    pairs = plain_steps.asyncdiff("sd21", STEPS, owners("sd21", 2), 2, 1, 2)
    ours = latent("sd21", "asyncdiff=2,warmup=1,stride=2,cuts=balanced")
    assert plain.relative(ours, pairs) < 1e-10


@pytest.mark.parametrize(
    ("name", "chosen", "words"),
    [
        ("sdxl", "flow-match-euler", ("noise", "ddim, euler, dpmsolver++")),
        ("sd3-medium", "dpmsolver++", ("velocities", "allowed: flow-match-euler")),
        ("flux1-dev", "ddim", ("velocities", "allowed: flow-match-euler")),
        ("svd", "ddim", ("logarithms", "allowed: euler")),
        ("cogvideox-2b", "euler", ("signal-to-noise", "allowed: ddim")),
        ("sdxl", "lcm", ("'lcm'", "flow-match-euler")),
    ],
)
def test_a_scheduler_of_another_equation_is_refused(
    name: str, chosen: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        scheduler_named(chosen, tiny_scheduler(name))
    assert all(word in str(caught.value) for word in words), caught.value


def test_wan_keeps_its_shift_in_other_solvers_of_flows() -> None:
    own = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    euler, solver = (scheduler_named(name, own) for name in ("flow-match-euler", "dpmsolver++"))
    for scheduler in (own, euler, solver):
        scheduler.set_timesteps(10)
    assert euler.config.shift == solver.config.flow_shift == 3.0
    # of 1000; they differ in where the last step begins
    torch.testing.assert_close(solver.timesteps, own.timesteps, rtol=0, atol=3)
    # s u / (1 + (s - 1) u) at u = 1 - 5/9 (1 - 0.003), s = 3; without the shift it would be 446
    assert euler.timesteps[5] == pytest.approx(707, abs=1)


@pytest.mark.parametrize(
    ("kind", "config", "word"),
    [
        ("HeunDiscreteScheduler", {}, "number of times"),
        ("EulerAncestralDiscreteScheduler", {}, "draws noise"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "draws noise"),
        ("DDIMScheduler", {"thresholding": True}, "quantile"),
    ],
)
def test_what_cannot_be_stepped_by_rows_is_refused(
    kind: str, config: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        check_scheduler(getattr(diffusers, kind)(**config), 5)
    assert all(name in str(caught.value) for name in NAMES)


def test_steps_that_no_schedule_has_are_refused() -> None:
    """PNDM evaluates once for one step, and three times for two."""
    for steps in (1, 3, 50):
        check_scheduler(tiny_scheduler("sd15"), steps)
    with pytest.raises(ValueError, match=r"steps 2: PNDMScheduler .* allowed: 1, 3 or more"):
        check_scheduler(tiny_scheduler("sd15"), 2)


def test_more_steps_than_were_trained_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 1000"):
        check_scheduler(diffusers.DDIMScheduler(), 1001)
