"""Weights divided among ranks: tensor parallelism is exact, alone and with the axes it goes with."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import placed
import plain_loops as plain
import pytest
import torch.nn.functional as F
from test_executor_strips import execute, graph_of, latent, reference
from torch import Tensor

from paradiff.executor.forward import ScheduleMismatch

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("device"),
]

DITS = ("pixart-alpha", "sd3-medium", "flux1-dev", "cogvideox-2b")


@pytest.mark.parametrize("name", [*plain.NAMES, *plain.OTHERS])
@pytest.mark.parametrize("spec", ["tensor=4", "cfg=2,tensor=2"])
def test_shares_of_the_weights_add_up_to_the_model(name: str, spec: str) -> None:
    if plain.twin(name)[0].geometry.guidance != "cfg":
        spec = spec.removeprefix("cfg=2,")
    assert plain.relative(latent(name, spec), reference(name)) < 1e-10


@pytest.mark.parametrize("name", DITS)
@pytest.mark.parametrize(
    "spec",
    [
        "tensor=2,ulysses=2",
        "tensor=2,ring=2",
        "tensor=2,ring=2,rotate=allgather",
        "tensor=2,ulysses=2,ring=2",
    ],
)
def test_weights_and_tokens_divided_at_once(name: str, spec: str) -> None:
    assert plain.relative(latent(name, spec), reference(name)) < 1e-10


@pytest.mark.parametrize("name", DITS)
@pytest.mark.parametrize(
    ("shared", "alone"),
    [
        ("tensor=2,pipefusion=2,patches=1", "serial"),
        ("tensor=2,pipefusion=2,patches=4", "pipefusion=2,patches=4"),
        ("tensor=2,ulysses=2,pipefusion=2,patches=2", "pipefusion=2,patches=2"),
    ],
)
def test_shares_inside_a_pipeline_change_nothing(name: str, shared: str, alone: str) -> None:
    assert plain.relative(latent(name, shared), latent(name, alone)) < 1e-10


def test_shares_inside_parastep_change_nothing() -> None:
    alone = latent("pixart-alpha", "parastep=2,warmup=1")
    shared = latent("pixart-alpha", "parastep=2,tensor=2,warmup=1")
    assert plain.relative(shared, alone) < 1e-10


def test_a_share_is_a_view_of_the_models_own_weights() -> None:
    """What a rank computes with lies in the storage of the parameter, packed halves too."""
    parameters = placed.model("flux1-dev").parameters()
    own = {p.untyped_storage().data_ptr() for p in parameters}
    used = set()
    plain_linear = F.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        used.add(weight.untyped_storage().data_ptr())
        return plain_linear(x, weight, bias)

    with mock.patch.object(F, "linear", spy):
        latent("flux1-dev", "tensor=2")
    assert used <= own


def test_the_graph_must_add_up_where_the_network_does() -> None:
    """An op that goes on beyond a sum."""
    graph = graph_of("pixart-alpha", "tensor=2")
    (steps,) = (s for s in graph.sections if s.name == "steps")
    later = [o for o in steps.ops if o.call == "forward" and 0 in o.ranks][1]
    assert later.work is not None
    lo, hi = later.work.ranges[0]
    moved = later.work._replace(ranges=((lo, hi + 1),))
    ops = tuple(replace(o, work=moved) if o is later else o for o in steps.ops)
    sections = tuple(replace(s, ops=ops) if s is steps else s for s in graph.sections)
    with pytest.raises(ScheduleMismatch, match="ends at"):
        execute("pixart-alpha", replace(graph, sections=sections))
