"""Where the runs of a test compute: on the CPU, and under ``-m gpu`` on a GPU too (fixture ``device``).

What they are compared with stays on the CPU: plain loops over the models of ``plain_loops.twin``.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import plain_loops as plain
import torch
from torch.utils._pytree import tree_map

from paradiff.executor.interpreter import Result

device = "cpu"
"""Set by the fixture, for one test."""


def there(value: Any) -> Any:
    """Every tensor of ``value`` where the runs compute."""
    return tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, value)


def model(name: str) -> Any:
    """The model of ``tiny-<name>`` there."""
    return plain.twin(name)[1] if device == "cpu" else _copied(name, device)


@cache
def _copied(name: str, where: str) -> Any:
    return deepcopy(plain.twin(name)[1]).to(where)


def back(result: Result) -> Result:
    """The result on the CPU."""
    latents, decoded = (
        {k: t.cpu() for k, t in x.items()} for x in (result.latents, result.decoded)
    )
    return replace(result, latents=latents, decoded=decoded)
