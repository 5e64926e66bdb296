"""Two ranks that compare our spread attention with diffusers' own context parallelism, as a script.

On a CPU diffusers needs two things that it finds on a GPU: a number of accelerators, and an attention
that gives its log-sum-exp. Both are put in place here; its hooks, splits and exchanges are its own. That
it does spread is seen at the attention: half of the heads (Ulysses), or half of the queries with one
half of the keys after the other (ring). Rank 0 prints a line of JSON for each case: the relative
difference of the latents.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any
from unittest import mock

import plain_loops as plain
import torch
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from test_executor_strips import graph_of, request_of
from torch import Tensor

from paradiff.executor.distributed import run_rank
from paradiff.executor.network import Network
from paradiff.executor.place import Place
from paradiff.executor.session import Session
from paradiff.models.tiny import tiny_model
from paradiff.profiles import Profile

CASES = [
    ("flux1-dev", "ulysses=2", {"ulysses_degree": 2}),
    ("flux1-dev", "ring=2,rotate=allgather", {"ring_degree": 2, "convert_to_fp32": False}),
    ("wan2.1-1.3b", "ulysses=2", {"ulysses_degree": 2}),
    ("wan2.1-1.3b", "ring=2,rotate=allgather", {"ring_degree": 2, "convert_to_fp32": False}),
]
STEPS = 3
Shape = tuple[int, int, int]
"""Queries, keys and heads of one attention."""


def attention_with_sums(_: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention (b, n, h, d) and, where wanted, its log-sum-exp (b, n, h)."""
    q, k, v = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    result = out.permute(0, 2, 1, 3)
    wants_sums = kwargs.get("return_lse", args[5] if len(args) > 5 else False)
    return (result, sums.permute(0, 2, 1)) if wants_sums else result


def parallel(name: str, profile: Profile, settings: dict[str, Any]) -> tuple[Tensor, list[Shape]]:
    """The plain loop over a model that diffusers has spread, and what it attended to at once."""
    model = tiny_model(name)
    seen: list[Shape] = []

    def spy(context: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[1], key.shape[1], query.shape[2]))
        return attention_with_sums(context, query, key, *args, **kwargs)

    with (
        mock.patch.object(attention_dispatch, "_native_attention_forward_op", spy),
        mock.patch.object(plain, "twin", return_value=(profile, model)),
    ):
        model.enable_parallelism(config=ContextParallelConfig(**settings))
        return plain.serial(name, STEPS), seen


def self_attentions(name: str) -> list[Shape]:
    """Those of the same loop on one rank: as many queries as keys."""
    seen: list[Shape] = []
    attend = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query.shape[2], key.shape[2], query.shape[1]))
        return attend(query, key, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        plain.serial(name, STEPS)
    return [shape for shape in seen if shape[0] == shape[1]]


def halved(whole: list[Shape], way: str) -> list[Shape]:
    """What one of two ranks attends to: by heads, or by queries and then block by block of keys."""
    if way == "ulysses":
        return [(queries, keys, heads // 2) for queries, keys, heads in whole]
    return [(queries // 2, keys // 2, heads) for queries, keys, heads in whole for _ in range(2)]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.accelerator.device_count = lambda: 1
    place = Place.of_environment()
    assert place is not None
    session = Session.join(place, 120.0, "cpu", "diffusers")
    for name, spec, settings in CASES:
        graph = graph_of(name, spec, steps=STEPS)
        profile, model = plain.twin(name)
        ours = run_rank(graph, Network(model, profile), request_of(name), session).latents[0]
        theirs, seen = parallel(name, profile, settings)
        expected = halved(self_attentions(name), spec.partition("=")[0])
        assert seen == expected != [], (name, spec, seen[:4], expected[:4])
        if session.rank == 0:
            line = json.dumps({"case": [name, spec], "error": plain.relative(ours, theirs)})
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    session.leave()


if __name__ == "__main__":
    main()
