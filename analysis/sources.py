"""What the costs of a plan rest on, for whoever has to trust them: figures of GPUs, links, kernel
tables, constants of the simulator, each with its source.

Decides nothing: it reads what the profiles, the box, the cost model and the code say of themselves.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from analysis import intervals
from analysis.attribution import critical_rank
from analysis.close_up import CloseUp
from simulator import costs, kernels, memory, network
from simulator.costs import CostModel
from simulator.gpu import Figure as GpuFigure
from simulator.gpu import load_gpu
from simulator.topology import Topology

CONSTANTS: Sequence[tuple[str, ModuleType]] = (
    ("kernels", kernels),
    ("costs", costs),
    ("links", network),
    ("memory", memory),
    ("intervals", intervals),
)
"""Modules whose constants say in a docstring where they come from."""


def gpu_figures(box: Topology) -> Iterator[tuple[str, str, str, str]]:
    """(GPU and figure, value in base units, kind, source) of every GPU model of the box."""
    for name in dict.fromkeys(box.profiles):
        gpu = load_gpu(name)
        for label, number, kind, source in _figures_of(gpu, ""):
            yield f"{gpu.name}: {label}", number, kind, source
        if gpu.fitted is not None:
            for r in gpu.fitted.residuals:
                missed = f"{r.n}: {r.median:.1%}, at worst {r.worst:.1%}"
                held_out = f"held out {r.held_out_median:.1%}, at worst {r.held_out_worst:.1%}"
                label = f"{gpu.name}: works missed, {r.kind}"
                yield label, f"{missed}; {held_out}", "measured", gpu.fitted.source


def _figures_of(value: Any, label: str) -> Iterator[tuple[str, str, str, str]]:
    if isinstance(value, GpuFigure):
        yield label, f"{value.value:.4g}", value.kind, value.source
    elif isinstance(value, BaseModel):
        for key, inner in value:
            yield from _figures_of(inner, f"{label} {key.replace('_', ' ')}".strip())
    elif isinstance(value, tuple):
        for i, inner in enumerate(value, 1):
            yield from _figures_of(inner, f"{label} {i}")


def links(box: Topology) -> Iterator[tuple[str, str, str, str, str]]:
    """(kind, how many, GB/s, latency, source): the box, host memories, links; alike ones together."""
    yield "box", "", "", "", " ".join(box.source.split())
    memories = Counter(
        (n.host_memory_bytes_per_s / 1e9, " ".join(n.source.split()))
        for n in box.nodes
        if math.isfinite(n.host_memory_bytes_per_s)
    )
    for (rate_gb, source), count in sorted(memories.items()):
        yield "host memory", str(count), f"{rate_gb:.4g}", "", source
    alike = Counter(
        (k.kind, k.bandwidth_bytes_per_s, k.latency_s, " ".join(k.source.split()), k.rate_text)
        for k in box.links
    )
    for (kind, _, latency_s, source, rate), count in sorted(alike.items()):
        yield kind, str(count), rate.replace(" GB/s", ""), f"{latency_s * 1e6:.3g}", source


def kernel_tables(model: CostModel) -> Iterator[tuple[str, str, str, str, str]]:
    """(GPU, kind of kernel, measured on, rows, source) of every table behind a price."""
    for gpu, kind, measured_on, rows, source in model.bases():
        yield gpu, kind, measured_on, str(rows), source


def shares(model: CostModel, seen: CloseUp, placement: Sequence[int]) -> dict[str, float]:
    """Basis -> share of the kernel time of the denoising loop, on the rank that finishes last."""
    rank, seconds = critical_rank(seen.trace), dict[str, float]()
    for section in seen.graph.sections:
        for op in section.ops:
            if op.work is not None and op.ranks == (rank,) and op.step is not None:
                for basis, s in model.seconds_by_basis(op.work, placement[rank]).items():
                    seconds[basis] = seconds.get(basis, 0.0) + section.count * s
    total = sum(seconds.values())
    return {basis: s / total for basis, s in seconds.items() if s}


def constants() -> Iterator[tuple[str, str, str, str]]:
    """(part, name, value, source) of every constant of CONSTANTS that says where it comes from."""
    for part, module in CONSTANTS:
        body = ast.parse(inspect.getsource(module)).body
        for before, after in pairwise(body):
            if isinstance(before, ast.Assign):
                (target,) = before.targets
            elif isinstance(before, ast.AnnAssign):
                target = before.target
            else:
                continue
            if not isinstance(target, ast.Name) or target.id.startswith("_"):
                continue
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            value = _number(getattr(module, target.id))
            if said and value is not None:
                text = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
                yield part, target.id, value, text


def _number(value: object) -> str | None:
    """Text of a number or of a collection of numbers; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        parts = [_number(each) for each in value]
        return None if None in parts or not parts else f"({', '.join(map(str, parts))})"
    if isinstance(value, Mapping):
        named = {key: _number(each) for key, each in value.items()}
        told = ", ".join(f"{key}: {each}" for key, each in named.items())
        return None if None in named.values() else told
    return None
