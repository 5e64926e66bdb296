"""The tiny twins run by plain loops: the unmodified model and its scheduler, as its pipeline has them.

Nothing here comes from the executor but the random embeddings; the interception of the model
(``paradiff.models.interception``) is shared with it. ``displaced`` states which data a strip sees in
DistriFusion and PCPP: it runs strip after strip, which the rule allows, since within a stale step no
strip reads another's new data (``sync_gn`` apart, which is run again until it has them all).
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import CogVideoXPipeline, FluxPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from torch import Tensor

from paradiff.executor.network import Network, random_conditioning
from paradiff.models.interception import Handler, Site, image_attentions, intercept
from paradiff.models.tiny import tiny_model, tiny_plan, tiny_scheduler
from paradiff.models.trace import cached_profile
from paradiff.profiles import Profile

NAMES = (
    "sdxl", "sd21", "svd", "audioldm2-large", "pixart-alpha", "sd3-medium", "flux1-dev",
    "cogvideox-2b",
)  # fmt: skip
"""Twins on which every strategy is tried in all its ways."""
UNETS = ("sdxl", "sd21", "sd15", "svd", "svd-xt", "audioldm2-large")
OTHERS = (
    "cogvideox1.5-5b", "wan2.1-1.3b", "hunyuanvideo", "latte", "hunyuandit", "mochi",
)  # fmt: skip
"""Twins of the other classes, and of CogVideoX with rotary tables and patches of two frames."""
NEAR = ("sd15", "svd-xt", "sd3.5-large", "flux1-schnell", "cogvideox-5b", "wan2.1-14b")
"""Twins that differ from one above in few values."""
FRAMES_FIRST = ("svd", "svd-xt", "cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b")
CHANNELS_FIRST = ("wan2.1-1.3b", "wan2.1-14b", "hunyuanvideo", "latte", "mochi")
JOINT = (
    "sd3-medium", "sd3.5-large", "flux1-dev", "flux1-schnell", "cogvideox-2b", "cogvideox-5b",
    "cogvideox1.5-5b", "hunyuanvideo", "mochi",
)  # fmt: skip
"""Image and text tokens attend together."""
SCALE = 5.0
SEED = 0
torch.set_num_threads(1)  # tensors are so small that threads only wait for each other


@cache
def twin(name: str) -> tuple[Profile, Any]:
    """Profile and model of ``tiny-<name>``. A trace is kept for other processes and later runs: it is
    another one's under other tracing code, configurations or versions."""
    kept = str(Path(__file__).parents[2] / ".pytest_cache" / "twins")
    with warnings.catch_warnings(), mock.patch.dict(os.environ, XDG_CACHE_HOME=kept):
        warnings.simplefilter("ignore")
        return cached_profile(tiny_plan(name)), tiny_model(name)


def size_of(profile: Profile) -> tuple[int, int, int]:
    d = profile.defaults
    return d["height"], d["width"], d["frames"]


@cache
def given(name: str, replica: int = 0) -> dict[str, Any]:
    """Random embeddings of both branches (uncond first)."""
    profile, model = twin(name)
    shape = profile.latent_shape(*size_of(profile), 1)
    shape["b"] = 2 if profile.geometry.guidance == "cfg" else 1
    return dict(random_conditioning(Network(model, profile), shape, 5 + replica, torch.float64))


class Plain:
    """One request: initial latent, scheduler, one network call of all branches, guidance."""

    def __init__(self, name: str, steps: int, seed: int = SEED, replica: int = 0) -> None:
        self.name, self.steps = name, steps
        profile, self.model = twin(name)
        self.guided = profile.geometry.guidance == "cfg"
        self.given = given(name, replica)
        s = profile.latent_shape(*size_of(profile), 1)
        channels, pixels = profile.geometry.channels, (s["r"], s["w"])
        frames = s["f"] + s["f"] % 2 if name == "cogvideox1.5-5b" else s["f"]
        if name in FRAMES_FIRST:
            sizes = (1, frames, channels, *pixels)
        elif name in CHANNELS_FIRST:
            sizes = (1, channels, frames, *pixels)
        else:
            sizes = (1, channels, *pixels)
        self.rows = s["r"]
        self.scheduler = tiny_scheduler(name)
        set_timesteps(self.scheduler, name, steps, s["r"] // 2 * (s["w"] // 2))
        self.generator = torch.Generator().manual_seed(seed + replica)
        noise = torch.randn(sizes, generator=self.generator, dtype=torch.float64)
        self.x = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def network(self, x: Tensor, t: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of the latent through the network; every class's own calling convention."""
        last = self.rows if last is None else last
        x = torch.cat([x] * 2) if self.guided else x
        rest = dict(self.given)
        if "image_latents" in rest:
            x = torch.cat((x, rest.pop("image_latents")), dim=2)
        strip = x[..., first:last, :]
        if self.name in UNETS:
            out = self.model(sample=strip, timestep=t, **rest, return_dict=False)[0]
        elif self.name.startswith("flux"):
            b, c, r, w = strip.shape
            out = self.model(
                hidden_states=FluxPipeline._pack_latents(strip, b, c, r, w),
                timestep=t.double().expand(b) / 1000,
                img_ids=FluxPipeline._prepare_latent_image_ids(
                    b, self.rows // 2, w // 2, "cpu", torch.float64
                )[first // 2 * (w // 2) : last // 2 * (w // 2)],
                txt_ids=torch.zeros(rest["encoder_hidden_states"].shape[1], 3).double(),
                **rest,
                return_dict=False,
            )[0]
            out = FluxPipeline._unpack_latents(out, r * 8, w * 8, 8)
        else:
            times = t.expand(len(strip))
            if self.name in ("hunyuandit", "hunyuanvideo", "mochi"):
                times = times.double()
            if self.name in ("hunyuandit", "cogvideox-5b", "cogvideox1.5-5b"):
                rest["image_rotary_emb"] = self.rotary(first, last)
            out = self.model(hidden_states=strip, timestep=times, **rest, return_dict=False)[0]
        result: Tensor = out
        return result

    def rotary(self, first: int, last: int) -> list[Tensor]:
        """Rows [first, last) of the tables that the pipeline makes for the whole latent."""
        c, columns = self.model.config, self.x.shape[-1]
        grid = self.rows // c.patch_size, columns // c.patch_size
        if self.name == "hunyuandit":
            crop = get_resize_crop_region_for_grid(grid, 512 // 8 // c.patch_size)
            tables = get_2d_rotary_pos_embed(
                c.attention_head_dim, crop, grid, device="cpu", output_type="pt"
            )
        else:
            pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
            pipeline.transformer, pipeline.vae_scale_factor_spatial = self.model, 8
            tables = pipeline._prepare_rotary_positional_embeddings(
                8 * self.rows, 8 * columns, self.x.shape[1], "cpu"
            )
        rows = slice(first // c.patch_size, last // c.patch_size)
        return [t.unflatten(0, (-1, *grid))[:, rows].flatten(0, 2) for t in tables]

    def guide(self, out: Tensor) -> Tensor:
        if self.name in ("pixart-alpha", "latte", "hunyuandit"):
            out = out[:, :4]  # what follows is the variance
        if self.guided:
            uncond, cond = out.chunk(2)
            out = uncond + SCALE * (cond - uncond)
        return out

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        with mock.patch.object(torch, "float32", torch.float64):
            return self.scheduler.scale_model_input(x, t)

    def advance(self, out: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The scheduler's step. It casts a latent to float32, which is no step up for float64."""
        draws = "generator" in signature(self.scheduler.step).parameters
        extra = {"generator": self.generator} if draws else {}
        with mock.patch.object(torch, "float32", torch.float64):
            return self.scheduler.step(self.guide(out), t, x, **extra, return_dict=False)[0]


def set_timesteps(scheduler: Any, name: str, steps: int, tokens: int) -> None:
    """As the pipeline does it; PNDM evaluates the network once more than it is asked to."""
    if name == "flux1-dev":
        c = scheduler.config
        mu = calculate_shift(
            tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    elif name in ("flux1-schnell", "hunyuanvideo"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    elif name == "mochi":
        scheduler.set_timesteps(sigmas=np.array(linear_quadratic_schedule(steps, 0.025)))
    else:
        scheduler.set_timesteps(steps - (name == "sd15"))
    assert len(scheduler.timesteps) == steps


def token_frames(run: Plain) -> int:
    """Frames of tokens in one attention."""
    if run.name in ("wan2.1-1.3b", "wan2.1-14b", "hunyuanvideo", "mochi"):
        return run.x.shape[2]
    if run.name.startswith("cogvideox"):
        return run.x.shape[1] // (2 if run.name == "cogvideox1.5-5b" else 1)
    return 1


def serial(name: str, steps: int, replica: int = 0) -> Tensor:
    """The unmodified model, step by step."""
    run = Plain(name, steps, replica=replica)
    x = run.x
    with torch.no_grad():
        for t in run.scheduler.timesteps:
            x = run.advance(run.network(run.scaled(x, t), t), t, x)
    return x


def naive(name: str, steps: int, n: int) -> Tensor:
    """Every strip alone, as a small image of its own (U-Nets)."""
    run = Plain(name, steps)
    x, height = run.x, run.rows // n
    with torch.no_grad():
        for t in run.scheduler.timesteps:
            z = run.scaled(x, t)
            parts = [run.network(z, t, i * height, (i + 1) * height) for i in range(n)]
            x = run.advance(torch.cat(parts, dim=-2), t, x)
    return x


# ------------------------------------------------------------------------------- displaced strips

Published = dict[str, list[Any]]
"""Point -> what each strip published there: (K, V), (first rows, last rows), or (mean, square)."""


def moments_of(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    grouped = x.reshape(x.shape[0], groups, -1)
    return grouped.mean(-1), (grouped**2).mean(-1)


class Whole(Handler):
    """A whole forward; keeps what each of n strips would have published."""

    def __init__(self, n: int, frames: int) -> None:
        self.n, self.frames, self.seen = n, frames, Published()

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        def strips(z: Tensor) -> list[Tensor]:
            rows = z.unflatten(2, (self.frames, -1)).chunk(self.n, dim=3)
            return [part.flatten(2, 3) for part in rows]

        self.seen[site.name] = list(zip(strips(key), strips(value), strict=True))
        return key, value

    def halo(self, site: Site, x: Tensor) -> tuple[None, None]:
        pads = [(s[..., : site.rows, :], s[..., -site.rows :, :]) for s in x.chunk(self.n, dim=-2)]
        self.seen[site.name] = pads
        return None, None

    def moments(self, site: Site, x: Tensor) -> None:
        self.seen[site.name] = [moments_of(s, site.groups) for s in x.chunk(self.n, dim=-2)]


class Displaced(Handler):
    """Strip i: its own data new, the others' as ``before`` has them."""

    def __init__(
        self, i: int, n: int, before: Published, new: Published, mode: str, portion: float | None,
        fresh: Published, latent: Tensor, rows: int, frames: int,
    ) -> None:  # fmt: skip
        self.i, self.n, self.before, self.new, self.mode = i, n, before, new, mode
        self.portion, self.fresh, self.latent, self.rows = portion, fresh, latent, rows
        self.frames = frames

    def span(self) -> tuple[int, int]:
        return self.i * self.rows // self.n, self.rows

    def put(self, site: Site, value: Any) -> list[Any]:
        self.new.setdefault(site.name, [None] * self.n)[self.i] = value
        strips = list(self.before[site.name])
        strips[self.i] = value
        return strips

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        strips = self.put(site, (key, value))
        if self.portion is not None:
            near = [strips[self.i]]
            if self.i > 0:
                near.insert(0, [self.edge(z, last=True) for z in strips[self.i - 1]])
            if self.i < self.n - 1:
                near.append([self.edge(z, last=False) for z in strips[self.i + 1]])
            strips = near
        return tuple(torch.cat(z, dim=2) for z in zip(*strips, strict=True))

    def edge(self, z: Tensor, last: bool) -> Tensor:
        """The portion of a strip's tokens next to the own strip, of each frame."""
        tokens = z.shape[2] // self.frames
        share = round(tokens * self.portion)
        seen = range(tokens - share, tokens) if last else range(share)
        return z[:, :, [f * tokens + token for f in range(self.frames) for token in seen]]

    def halo(self, site: Site, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if site.is_input:
            first, last = self.i * self.rows // self.n, (self.i + 1) * self.rows // self.n
            above = self.latent[..., first - 1 : first, :] if self.i else None
            below = self.latent[..., last : last + 1, :] if self.i < self.n - 1 else None
            return above, below
        strips = self.put(site, (x[..., : site.rows, :], x[..., -site.rows :, :]))
        above = strips[self.i - 1][1] if self.i else None
        return above, strips[self.i + 1][0] if self.i < self.n - 1 else None

    def moments(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor] | None:
        own = moments_of(x, site.groups)
        old, strips = self.before[site.name], self.put(site, own)

        def mean(which: list[Any]) -> list[Tensor]:
            return [sum(z) / self.n for z in zip(*which, strict=True)]

        if self.mode == "sync_gn":
            fresh = self.fresh.get(site.name, [own] * self.n)
            m, q = mean([own if j == self.i else fresh[j] for j in range(self.n)])
        elif self.mode == "stale_gn":
            m, q = mean(strips)
        elif self.mode == "corrected_async_gn":
            base = mean(old)
            m, q = (base[k] + own[k] - old[self.i][k] for k in range(2))
            variance = q - m * m
            q = torch.where(variance < 0, own[1] - own[0] ** 2, variance) + m * m
        else:
            return None
        return m, q


def displaced(
    name: str, steps: int, n: int, warmup: int, mode: str = "corrected_async_gn",
    portion: float | None = None,
) -> Tensor:  # fmt: skip
    """Steps 0 to ``warmup`` on the whole latent, then strips that see the step before."""
    run = Plain(name, steps)
    frames = token_frames(run)
    points = _points(name)
    x, before = run.x, Published()
    with torch.no_grad():
        for step, t in enumerate(run.scheduler.timesteps):
            z = run.scaled(x, t)
            if step <= warmup:
                whole = Whole(n, frames)
                with intercept(run.model, whole, kv=points):
                    out = run.network(z, t)
                before = whole.seen
            else:
                out, new = _stale_step(run, points, z, t, n, before, mode, portion)
                before = before if mode == "no_sync" else new
            x = run.advance(out, t, x)
    return x


def _stale_step(
    run: Plain, points: dict[str, int], z: Tensor, t: Tensor, n: int, before: Published, mode: str,
    portion: float | None,
) -> tuple[Tensor, Published]:  # fmt: skip
    latent = torch.cat([z] * 2) if run.guided else z
    if "image_latents" in run.given:
        latent = torch.cat((latent, run.given["image_latents"]), dim=2).flatten(0, 1)
    fresh = Published()
    while True:
        new, parts = Published(), []
        for i in range(n):
            strip = Displaced(
                i, n, before, new, mode, portion, fresh, latent, run.rows, token_frames(run)
            )
            with intercept(run.model, strip, kv=points):
                parts.append(run.network(z, t, i * run.rows // n, (i + 1) * run.rows // n))
        if mode != "sync_gn" or _same(new, fresh):
            return torch.cat(parts, dim=-2), new
        fresh = new


def _same(new: Published, fresh: Published) -> bool:
    return bool(fresh) and all(
        torch.equal(a, b)
        for name in new
        for s, u in zip(new[name], fresh[name], strict=True)
        for a, b in zip(s, u, strict=True)
    )


@cache
def _points(name: str) -> dict[str, int]:
    """Attentions that see the image -> text tokens among their keys, found by running twice."""
    run = Plain(name, 3)
    model = run.model
    if name.startswith("cogvideox"):  # its latent is fixed in size; every attention is joint
        tokens = run.given["encoder_hidden_states"].shape[1]
        return {f"transformer_blocks.{i}.attn1": tokens for i in range(4)}

    def forward(scale: int) -> None:
        run.rows *= scale
        rows = {k: v for k, v in run.given.items() if k == "image_latents"}
        run.given = run.given | {k: torch.cat([v] * scale, dim=-2) for k, v in rows.items()}
        run.network(torch.cat([run.x] * scale, dim=-2), torch.tensor(7.0))
        run.rows //= scale
        run.given = run.given | rows

    return image_attentions(model, forward)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
