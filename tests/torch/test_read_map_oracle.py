"""What must hold of every read map, whatever it is: known values on a toy, equality where nothing moves,
and bits that do not depend on who sends what first."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from heapq import heapify, heappop, heappush
from typing import Any
from unittest import mock

import diffusers
import placed
import plain_loops as plain
import pytest
import read_map_oracle as oracle
import test_executor_strips
import torch
import torch.nn.functional as F
import toys
from test_executor_strips import execute, graph_of
from torch import Tensor, nn

from paradiff.dependencies import Dependencies
from paradiff.executor import schedulers
from paradiff.executor.interpreter import Request, run_graph
from paradiff.executor.network import Network
from paradiff.executor.payload import Piece, mix_moments, moments, reduced
from paradiff.graph import Instance, Op, Ref, ScheduleGraph, Section, absolute
from paradiff.profiles import Geometry, Profile
from paradiff.strategies import Workload, build, parse_spec

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("device"),
]

EULER = diffusers.FlowMatchEulerDiscreteScheduler


class FlowMatchEulerDiscreteScheduler(EULER):
    """Noise levels as they are given, in float64: of all others the executor knows the class by name."""

    __module__ = EULER.__module__  # where its float64 is kept

    def set_timesteps(self, *_: Any, **__: Any) -> None:
        self.sigmas, self.timesteps = self.levels, 1000 * self.levels[:-1]
        self._step_index, self._begin_index = None, 0


def at_levels(levels: Tensor) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.levels = levels
    return scheduler


# ---------------------------------------------------------------------------------- known values


class Attention(nn.Module):
    """Found by what diffusers' attentions have: a processor and ``to_q``."""

    processor = to_q = None

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.w = oracle.WEIGHTS[layer]

    def forward(self, y: Tensor) -> Tensor:
        query, key, value = (oracle.by_head(y[0] @ self.w[role])[None] for role in "qkv")
        out = F.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).flatten(2) @ self.w["o"]


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.attn, self.w = layer, Attention(layer), oracle.WEIGHTS[layer]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.attn(oracle.modulated(self.layer, x, t))
        inner = torch.tanh(oracle.modulated(self.layer, x, t) @ self.w["up"])
        return x + inner @ self.w["down"]


class Toy(nn.Module):
    """The oracle's transformer as modules: (1, tokens, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(layer) for layer in range(oracle.LAYERS))
        self.register_parameter("unused", nn.Parameter(torch.zeros(1, dtype=oracle.DTYPE)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        z = x @ oracle.W_IN
        for block in self.transformer_blocks:
            z = block(z, t)
        return z @ oracle.W_OUT


class ToyNetwork(Network):
    """A latent of one column: a row is a token."""

    def call(self, x: Tensor, given: Any, timestep: Tensor, *_: Any) -> Tensor:
        return self.model(x[..., 0].mT, timestep / 1000).mT[..., None]


@cache
def toy_profile() -> Profile:
    """Four blocks with an attention each, named as the modules are."""
    made = toys.transformer(oracle.LAYERS, heads=oracle.HEADS)
    stages = {name: stage for name, stage in made.stages.items() if name != "guidance"}
    whole = made.denoiser

    def renamed(name: str) -> str:
        return name.replace("block", "transformer_blocks.")

    stages["denoiser"] = replace(
        whole,
        segments=tuple(replace(s, name=renamed(s.name)) for s in whole.segments),
        cuts=tuple(replace(c, name=renamed(c.name), parent=renamed(c.name)) for c in whole.cuts),
    )
    geometry = Geometry(oracle.CHANNELS, 1, 1, 1, (6,), "none")
    return replace(made, geometry=geometry, stages=stages)


def toy_graph(spec: str) -> ScheduleGraph:
    size = oracle.TOKENS, 1, 1, oracle.STEPS
    return build(parse_spec(spec), toy_profile(), Workload(*size, 1, "fp64"))


def on_the_toy(graph: ScheduleGraph) -> Tensor:
    """Run by the executor on the oracle's network from its noise: (tokens, channels)."""
    words = {"encoder_hidden_states": torch.zeros(1, 6, 8, dtype=oracle.DTYPE)}
    weights = {n: placed.there(getattr(oracle, n)) for n in ("WEIGHTS", "W_IN", "W_OUT")}
    request = Request(conditioning=[placed.there(words)], scheduler=at_levels(oracle.TIMES))
    start = oracle.START.mT[None, ..., None]
    with (
        mock.patch.multiple(oracle, **weights),
        mock.patch.object(schedulers.Noise, "draw", return_value=start),
    ):
        network = ToyNetwork(Toy().to(placed.device), toy_profile())
        found = placed.back(run_graph(graph, network, request)).latents[0]
    return found[0, ..., 0].mT


def error_of(spec: str) -> float:
    """Against serial."""
    return _error_of(spec, placed.device)


@cache
def _error_of(spec: str, _: str) -> float:
    return plain.relative(on_the_toy(toy_graph(spec)), oracle.serial())


RULES = [
    ("displaced", (2, 1), "distrifusion=2,warmup=1"),
    ("displaced", (4, 1), "distrifusion=4,warmup=1"),
    ("displaced", (4, 4), "distrifusion=4,warmup=4,bucket=1"),
    ("pcpp", (4, 1, 0.3), "pcpp=4,warmup=1,portion=0.3"),
    ("pipefusion", (2, 1), "pipefusion=2,patches=2,warmup=1"),
    ("pipefusion", (4, 1), "pipefusion=4,patches=4,warmup=1"),
    ("asyncdiff", (2, 1, 1), "asyncdiff=2,warmup=1"),
    ("asyncdiff", (4, 1, 1), "asyncdiff=4,warmup=1"),
    ("asyncdiff", (2, 1, 2), "asyncdiff=2,warmup=1,stride=2"),
    ("parastep", (2, 2), "parastep=2,warmup=2"),
    ("parastep", (4, 2), "parastep=4,warmup=2"),
]


@pytest.mark.parametrize(("rule", "arguments", "spec"), RULES, ids=[spec for *_, spec in RULES])
def test_real_graphs_read_what_the_rules_say(
    rule: str, arguments: tuple[float, ...], spec: str
) -> None:
    """One wrong version in a graph is another number: the rules agree to the last digits with the run,
    and to the four known ones with what they were first worked out to."""
    ours = on_the_toy(toy_graph(spec))
    assert plain.relative(ours, getattr(oracle, rule)(*arguments)) < 1e-12
    found = error_of(spec)
    assert found > 1e-3
    known = oracle.KNOWN.get(f"{rule} {', '.join(map(str, arguments))}")
    assert known is None or round(found, 4) == known


def test_all_known_values_are_tried() -> None:
    tried = {f"{rule} {', '.join(map(str, arguments))}" for rule, arguments, _ in RULES}
    assert oracle.KNOWN.keys() <= tried


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("distrifusion=2,warmup=1", "distrifusion=4,warmup=1"),
        ("distrifusion=4,warmup=4", "distrifusion=4,warmup=1"),
        ("asyncdiff=2,warmup=1", "asyncdiff=4,warmup=1"),
        ("asyncdiff=2,warmup=1", "asyncdiff=2,warmup=1,stride=2"),
        ("parastep=2,warmup=2", "parastep=4,warmup=2"),
        ("pcpp=4,warmup=1,portion=1.0", "pcpp=4,warmup=1,portion=0.2"),
    ],
)
def test_more_of_it_loses_more(less: str, more: str) -> None:
    assert error_of(less) < error_of(more)


def test_one_wrong_read_is_another_number() -> None:
    """What the above is worth: rank 0 takes the second step of a cycle with the noise of the first."""

    def wrong(op: Op) -> Op:
        if op.call != "scheduler" or op.ranks != (0,):
            return op
        reads = (
            r._replace(buffer="eps@r0", step=0) if r.buffer == "eps.1@r0" else r for r in op.reads
        )
        return replace(op, reads=tuple(reads))

    graph = toy_graph("parastep=2,warmup=2")
    sections = tuple(replace(s, ops=tuple(map(wrong, s.ops))) for s in graph.sections)
    broken = replace(graph, sections=sections)
    assert broken != graph
    error = plain.relative(on_the_toy(broken), oracle.serial())
    assert abs(error - oracle.KNOWN["parastep 2, 2"]) > 1e-3


# ------------------------------------------------------------------------------- nothing that moves


STILL, STEPS = 0.5, 4
"""The only noise level, until the last step leads from it to nought."""
FROZEN = [
    *(("sd21", f"distrifusion=4,warmup=0,mode={mode},bucket=7")
      for mode in ("corrected_async_gn", "stale_gn", "sync_gn")),
    ("svd", "distrifusion=2,warmup=0"),
    ("sd21", "asyncdiff=3,warmup=1"),
    ("sd21", "asyncdiff=3,warmup=1,stride=2"),
    ("sd21", "parastep=3,warmup=1"),
    ("sd21", "batchstep=3,warmup=1"),
    ("sd21", "cache=2"),
    ("sd3-medium", "cfg=2,distrifusion=2,warmup=0,mode=no_sync"),
    ("sd3-medium", "pcpp=2,warmup=0,portion=1.0"),
    ("sd3-medium", "pipefusion=2,patches=4,text=patch0_frozen"),
    ("flux1-dev", "pipefusion=3,patches=4,text=per_patch"),
    ("sd3-medium", "pipefusion=2,patches=2,ulysses=2"),
    ("hunyuandit", "pipefusion=2,patches=4,stages=1:5"),
    ("sd3-medium", "asyncdiff=4,warmup=1,stride=2"),
    ("sd3-medium", "parastep=2,ulysses=2,warmup=1"),
    ("flux1-dev", "skip=2:3"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spec"), FROZEN)
def test_what_is_old_is_what_is_new_where_nothing_moves(
    name: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of no size at one time: from the second on every activation is what it was, so every stale
    method predicts what the network does, and the last step shows it: x + (0 - 1/2) prediction."""
    for module in (plain, test_executor_strips):
        levels = torch.tensor([STILL] * STEPS + [0.0], dtype=torch.float64)
        monkeypatch.setattr(module, "tiny_scheduler", lambda _, levels=levels: at_levels(levels))
    run = plain.Plain(name, STEPS)
    with torch.no_grad():
        out = run.guide(run.network(run.x, run.scheduler.timesteps[0]))
    ours = execute(name, graph_of(name, spec, STEPS)).latents[0]
    assert plain.relative(ours, run.x - STILL * out) < 1e-10


@pytest.mark.parametrize("mode", ["sync_gn", "stale_gn", "corrected_async_gn"])
def test_moments_are_mixed_as_the_modes_say(mode: str) -> None:
    """Four strips of (2, 8, 16, 6) and four groups. With old data apart from new, the rule of the mode;
    with old data that are the new ones, the moments of the whole."""
    generator = torch.Generator().manual_seed(1)
    now, before = (torch.randn(2, 8, 16, 6, generator=generator).double() for _ in range(2))
    spans = [(4 * i, 4 * i + 4) for i in range(4)]

    def pieces(x: Tensor) -> list[Piece]:
        return [Piece(s, moments(x[:, :, s[0] : s[1]], 4)) for s in spans]

    fresh = pieces(now)
    for stale, tolerance in ((pieces(3 * before), 1e-12), (fresh, 1e-12)):
        pairs = [[tuple(p.value) for p in each] for each in (fresh, stale)]
        for i, own in enumerate(fresh):
            others = reduced([(p,) for p in fresh]) if mode == "sync_gn" else stale
            found = mix_moments(own, others, mode == "corrected_async_gn")
            expected = oracle.mixed_moments(mode, i, *pairs)
            torch.testing.assert_close(tuple(found), expected, rtol=0, atol=tolerance)
            if stale is fresh:
                whole = tuple(moments(now, 4))
                torch.testing.assert_close(tuple(found), whole, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------ who is first, who is who


def reordered(graph: ScheduleGraph, seed: int) -> ScheduleGraph:
    """The same ops in another order that the versions allow: what a rank computes stays in order, what
    is sent and received does not, not even on one channel."""
    ops = [absolute(instance) for instance in graph.instances()]
    dependencies, waiting, after = Dependencies(), [], [list[int]() for _ in ops]
    for number, op in enumerate(ops):
        loose = op.kind not in ("compute", "host")
        known = replace(op, stream=f"{op.stream}.{number}") if loose else op
        before = dependencies.add(Instance(known, 0), number)
        waiting.append(len(before))
        for each in before:
            after[each].append(number)
    draw = random.Random(seed)
    ready = [(draw.random(), n) for n, count in enumerate(waiting) if not count]
    heapify(ready)
    order = []
    while ready:
        _, number = heappop(ready)
        order.append(ops[number])
        for each in after[number]:
            waiting[each] -= 1
            if not waiting[each]:
                heappush(ready, (draw.random(), each))
    assert sorted(op.name for op in order) == sorted(op.name for op in ops)
    return replace(graph, sections=(Section("all", 0, 1, 1, tuple(order)),))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("sd21", "parastep=3,warmup=1"),
        ("sd3-medium", "cfg=2,parastep=2,warmup=2"),
        ("sd21", "asyncdiff=3,warmup=1"),
        ("sd3-medium", "asyncdiff=3,warmup=1,stride=2"),
        ("sd21", "distrifusion=2,warmup=1,bucket=60"),
        ("sd3-medium", "pcpp=4,warmup=1"),
        ("flux1-dev", "pipefusion=2,patches=4"),
        ("hunyuandit", "pipefusion=3,patches=4,stages=balanced"),
    ],
)
def test_order_of_transfers_changes_no_bit(name: str, spec: str) -> None:
    graph = graph_of(name, spec)
    expected = execute(name, graph).latents[0]
    other = reordered(graph, 3)
    assert [op.name for op in other.sections[0].ops] != [i.op.name for i in graph.instances()]
    assert torch.equal(execute(name, other).latents[0], expected)


def on_other_ranks(graph: ScheduleGraph, ranks: Mapping[int, int]) -> ScheduleGraph:
    """The same schedule, each rank's part done by another."""

    def moved(name: str) -> str:
        buffer, rank = name.rsplit("@r", 1)
        return f"{buffer}@r{ranks[int(rank)]}"

    def refs(found: tuple[Ref, ...]) -> tuple[Ref, ...]:
        return tuple(ref._replace(buffer=moved(ref.buffer)) for ref in found)

    def op(each: Op) -> Op:
        there = tuple(ranks[rank] for rank in each.ranks)
        return replace(each, ranks=there, reads=refs(each.reads), writes=refs(each.writes))

    return replace(
        graph,
        buffers=tuple(replace(b, id=moved(b.id), rank=ranks[b.rank]) for b in graph.buffers),
        sections=tuple(replace(s, ops=tuple(map(op, s.ops))) for s in graph.sections),
    )


@pytest.mark.parametrize("name", ["sd21", "sd3-medium"])
@pytest.mark.parametrize("spec", ["asyncdiff=3,warmup=1", "parastep=3,warmup=1"])
def test_which_rank_is_which_component_changes_no_bit(name: str, spec: str) -> None:
    graph = graph_of(name, spec)
    other = on_other_ranks(graph, {0: 2, 1: 0, 2: 1})
    assert other.fingerprint() != graph.fingerprint()
    assert torch.equal(execute(name, other).latents[0], execute(name, graph).latents[0])


def receiver_by_receiver(graph: ScheduleGraph) -> ScheduleGraph:
    """Every broadcast as a message to each receiver, the last one first."""

    def parts(op: Op) -> Iterator[Op]:
        if op.call != "broadcast":
            yield op
            return
        for rank, write in reversed(list(zip(op.ranks[1:], op.writes, strict=True))):
            yield replace(
                op, name=f"{op.name}>{rank}", kind="p2p", call="send", ranks=(op.ranks[0], rank),
                stream=f"p2p.{op.ranks[0]}-{rank}", writes=(write,),
            )  # fmt: skip

    ops = (tuple(each for op in s.ops for each in parts(op)) for s in graph.sections)
    pairs = zip(graph.sections, ops, strict=True)
    return replace(graph, sections=tuple(replace(s, ops=each) for s, each in pairs))


@pytest.mark.parametrize("name", ["sd21", "sd3-medium"])
def test_grouping_of_broadcasts_changes_no_bit(name: str) -> None:
    graph = graph_of(name, "asyncdiff=3,warmup=1")
    apart = receiver_by_receiver(graph)
    calls = [
        {op.call for s in g.sections for op in s.ops if len(op.ranks) > 1} for g in (graph, apart)
    ]
    assert calls == [{"broadcast"}, {"send"}]
    assert torch.equal(execute(name, apart).latents[0], execute(name, graph).latents[0])
