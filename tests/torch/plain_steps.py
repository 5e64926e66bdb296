"""Plain loops for what PipeFusion, AsyncDiff and ParaStep read; nothing here comes from the executor.

Each runs the unmodified model as often as it takes and replaces what a part of it may not see new: K and
V of patches (PipeFusion), the text that enters a block, or the outputs of modules (AsyncDiff).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import plain_loops as plain
import torch
from torch import Tensor, nn

from paradiff.models.interception import Handler, Site, intercept


class Caching(Handler):
    """Patch p of ``spans``: its K and V enter the cache, then all of the cache is seen."""

    def __init__(self, cache: dict[str, list[Any]], p: int, run: plain.Plain, first: int) -> None:
        self.cache, self.p, self.run, self.first = cache, p, run, first

    def span(self) -> tuple[int, int]:
        return self.first, self.run.rows

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.cache[site.name][self.p] = key, value
        return tuple(torch.cat(z, dim=2) for z in zip(*self.cache[site.name], strict=True))


class Filling(Handler):
    """The whole latent: fills the cache, cut into patches of ``rows`` of ``total`` rows."""

    def __init__(self, rows: list[int], frames: int) -> None:
        self.rows, self.frames, self.cache = rows, frames, {}

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        def patches(z: Tensor) -> list[Tensor]:
            grid = z.unflatten(2, (self.frames, sum(self.rows) // 2, -1))
            return [g.flatten(2, 4) for g in grid.split([r // 2 for r in self.rows], dim=3)]

        self.cache[site.name] = list(zip(patches(key), patches(value), strict=True))
        return key, value


def pipefusion(
    name: str, steps: int, rows: list[int], warmup: int, fixed_text: Iterable[str]
) -> Tensor:
    """Patch p sees patches before it of this step, those after it of the step before.

    ``fixed_text``: blocks that later patches enter with the text that entered them with patch 0.
    """
    run = plain.Plain(name, steps)
    frames = plain.token_frames(run)
    points = plain._points(name)
    firsts = [sum(rows[:p]) for p in range(len(rows))]
    x, cache, text = run.x, {}, {}
    with torch.no_grad(), ExitStack() as hooks:
        keep_text(run.model, fixed_text, text, hooks)
        for step, t in enumerate(run.scheduler.timesteps):
            if step < warmup:
                filling = Filling(rows, frames)
                with intercept(run.model, filling, kv=points):
                    out = run.network(run.scaled(x, t), t)
                text.clear()
                cache = filling.cache
            else:
                parts, z = [], run.scaled(x, t)
                for p, first in enumerate(firsts):
                    with intercept(run.model, Caching(cache, p, run, first), kv=points):
                        parts.append(run.network(z, t, first, first + rows[p]))
                out = torch.cat(parts, dim=-2)
                text.clear()
            x = run.advance(out, t, x)
    return x


def keep_text(model: Any, blocks: Iterable[str], text: dict[str, Tensor], hooks: ExitStack) -> None:
    """Before each of ``blocks``: keep the text that enters it first, put it in place of later ones."""

    def hook(name: str) -> Callable[..., Any]:
        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            now = args[1] if args else kwargs["encoder_hidden_states"]
            kept = text.setdefault(name, now.clone())
            if args:
                return (args[0], kept, *args[2:]), kwargs
            return args, {**kwargs, "encoder_hidden_states": kept}

        return before

    for name in blocks:
        handle = model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        hooks.callback(handle.remove)


def asyncdiff(
    name: str, steps: int, owners: Mapping[str, int], components: int, warmup: int, stride: int
) -> Tensor:
    """Component c computes with the outputs that modules of other components had a round before."""
    run = plain.Plain(name, steps)
    x, old = run.x, {}

    def network(own: int | None, x: Tensor, t: Tensor, at: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """All modules of ``own`` (None: of all) new, at timestep ``at``; their outputs beside eps."""
        seen: dict[str, Any] = {}

        def hook(module: str) -> Callable[..., Any]:
            def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
                if own is not None and owners[module] != own:
                    return old[module]
                seen[module] = out
                return out

            return after

        with ExitStack() as hooks:
            for module in owners:
                handle = run.model.get_submodule(module).register_forward_hook(
                    hook(module), with_kwargs=True
                )
                hooks.callback(handle.remove)
            return run.network(run.scaled(x, t), at), seen

    with torch.no_grad():
        times, step = run.scheduler.timesteps, 0
        while step < steps:
            t = times[step]
            if step < warmup:
                out, old = network(None, x, t, t)
                x, step = run.advance(out, t, x), step + 1
                continue
            if (
                stride == 2 and step % 2 == 0
            ):  # only after an even warm-up: its last prediction again
                x, step = run.advance(out, t, x), step + 1
                continue
            ahead = times[min(step + 1, steps - 1)] if stride == 2 else t
            rounds = [network(c, x, t, ahead) for c in range(components)]
            out = network(components - 1, x, t, t)[0] if stride == 2 else rounds[-1][0]
            old = {module: rounds[owner][1][module] for module, owner in owners.items()}
            x, step = run.advance(out, t, x), step + 1
            if stride == 2 and step < steps:  # an even step replays
                x, step = run.advance(rounds[-1][0], times[step], x), step + 1
    return x


def parastep(name: str, steps: int, degree: int, warmup: int) -> Tensor:
    """Rank r evaluates step r of a cycle; until then it steps with what it predicted last time."""
    runs = [plain.Plain(name, steps) for _ in range(degree)]
    x, own = [run.x for run in runs], [torch.empty(0)] * degree
    with torch.no_grad():
        for step, t in enumerate(runs[0].scheduler.timesteps):
            if step < warmup:
                out = runs[0].network(runs[0].scaled(x[0], t), t)
                own = [out] * degree
                x = [run.advance(out, t, z) for run, z in zip(runs, x, strict=True)]
                continue
            r = (step - warmup) % degree
            runs_r = runs[r]
            own[r] = runs_r.network(runs_r.scaled(x[r], t), t)
            use = [own[r] if k in (0, r) else own[k] for k in range(degree)]
            x = [run.advance(e, t, z) for run, e, z in zip(runs, use, x, strict=True)]
            if r == degree - 1:
                x = [x[0]] * degree
    return x[0]


def reusing(name: str, steps: int, fresh: Iterable[str], reused: Iterable[int]) -> Tensor:
    """In steps ``reused``, all units but ``fresh`` give what they gave in the last whole step."""
    run, kept, again = plain.Plain(name, steps), set(fresh), set(reused)
    units = [cut.parent for cut in plain.twin(name)[0].denoiser.cuts]
    x, old = run.x, dict[str, Any]()

    def hook(module: str, step: int) -> Callable[..., Any]:
        def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            if step in again and module not in kept:
                return old[module]
            old[module] = out
            return out

        return after

    with torch.no_grad():
        for step, t in enumerate(run.scheduler.timesteps):
            with ExitStack() as hooks:
                for module in dict.fromkeys(units):
                    after = hook(module, step)
                    handle = run.model.get_submodule(module).register_forward_hook(
                        after, with_kwargs=True
                    )
                    hooks.callback(handle.remove)
                out = run.network(run.scaled(x, t), t)
            x = run.advance(out, t, x)
    return x
