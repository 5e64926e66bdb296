"""Small trained models, the latents that are kept of runs, orderings that hold clearly, scores."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.fidelity import paired, relative_l2
from analysis.fidelity_study import CLAIMS, SAMPLERS, links, read
from paradiff.executor.fidelity import Bench, Seen, look
from paradiff.executor.job import Job
from paradiff.executor.perceptual import CHANNELS, CLIP, LPIPS, _alexnet
from paradiff.models.small import (
    BASES,
    DIGITS,
    GUIDANCE_SCALE,
    WEIGHTS,
    digits_of,
    small_model,
    small_scheduler,
    words,
)

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
torch.set_num_threads(1)

STEPS = 6
KEPT = Path(__file__).parents[2] / "docs" / "fidelity"


@cache
def bench(model: str, batch: int, dtype: str = "fp64") -> Bench:
    return Bench.of(Job(source=model, spec="serial", batch=batch, dtype=dtype))


@cache
def seen(model: str, spec: str, batch: int = 2) -> Seen:
    return look(bench(model, batch).prepared(spec, STEPS, None))


def plain(model: str, samples: int) -> list[Tensor]:
    """The unmodified model and its scheduler, and the latent after every step."""
    network, scheduler = small_model(model, torch.float64), small_scheduler(model)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(
        samples, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    text = words([None] * samples + [i % DIGITS for i in range(samples)], torch.float64)
    found = []
    for t in scheduler.timesteps:
        x2, given = torch.cat([x, x]), {"encoder_hidden_states": text, "return_dict": False}
        if BASES[model] == "pixart-alpha":
            given["timestep"] = t.expand(len(x2))
            out = network(hidden_states=x2, **given)[0]
        else:
            out = network(x2, t, **given)[0]
        uncond, cond = out.chunk(2)
        v = uncond + GUIDANCE_SCALE * (cond - uncond)
        x = scheduler.step(v, t, x, return_dict=False)[0]
        found.append(x)
    return found


@pytest.mark.parametrize("model", BASES)
def test_every_latent_is_that_of_the_unmodified_loop(model: str) -> None:
    with torch.no_grad():
        expected = torch.stack(plain(model, 2)).numpy()
    latents, pictures = seen(model, "serial")
    np.testing.assert_allclose(latents, expected, rtol=1e-6, atol=1e-6)  # schedulers use float32
    assert pictures is not None
    grey = np.clip(expected[-1] / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(pictures[:, 0, :, :, 0], grey[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        ("small-dit", "cfg=2,ulysses=2"),
        ("small-dit", "pipefusion=4,patches=1,warmup=1"),
        ("small-dit", "parastep=2,warmup=5"),
        ("small-unet", "patch=4"),
        ("small-unet", "distrifusion=2,mode=full_sync"),
        ("small-unet", "asyncdiff=2,stride=1,warmup=6"),
    ],
)
def test_exact_strategies_have_no_error_in_any_step(model: str, spec: str) -> None:
    for ours, serial in zip(seen(model, spec)[0], seen(model, "serial")[0], strict=True):
        assert relative_l2(ours, serial).max() < 1e-10


@pytest.mark.parametrize(
    ("model", "spec", "synchronous"),
    [
        ("small-unet", "distrifusion=4,warmup=1", 2),
        ("small-unet", "pcpp=4,warmup=1", 2),
        ("small-unet", "asyncdiff=2,stride=1,warmup=2", 2),
        ("small-dit", "pipefusion=2,patches=4,warmup=2", 2),
        ("small-dit", "parastep=2,warmup=2", 2),
    ],
)
def test_errors_begin_after_the_synchronous_steps(model: str, spec: str, synchronous: int) -> None:
    """Synchronous steps are exact, and the first step that reads old values is not. (AsyncDiff's first
    parallel round reads what the last whole pass has made, one step old; ParaStep's first cycle begins
    with a true latent on rank 0, so it is off one step later.)"""
    pairs = zip(seen(model, spec)[0], seen(model, "serial")[0], strict=True)
    errors = [relative_l2(ours, serial).max() for ours, serial in pairs]
    late = 1 if "parastep" in spec else 0
    assert max(errors[: synchronous + late]) < 1e-10
    assert min(errors[synchronous + late :]) > 1e-6


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """The first sample of a batch has the noise and the digit of a batch of one."""
    for model, spec in (
        ("small-unet", "distrifusion=4,warmup=1"),
        ("small-dit", "parastep=2,warmup=2"),
    ):
        alone, together = (seen(model, spec, batch=n)[0] for n in (1, 2))
        np.testing.assert_allclose(together[:, :1], alone, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("model", BASES)
def test_weights_are_small_and_their_log_is_kept(model: str) -> None:
    assert (WEIGHTS / f"{model}.safetensors").stat().st_size < 5e6
    facts, *lines, _ = (WEIGHTS / f"{model}.log").read_text(encoding="utf-8").splitlines()
    known = json.loads(facts)
    assert (known["model"], known["seed"]) == (model, 0)
    assert lines[-1].startswith(f"step {known['steps']} ")
    tensors = load_file(WEIGHTS / f"{model}.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_training_goes_on_where_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two steps, at once or one after the other, leave the same weights, named as those that are kept,
    and a log of both."""
    pytest.importorskip("sklearn", reason="scikit-learn is part of [dev]")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import train_small

    monkeypatch.setitem(train_small.STEPS, "small-dit", 2)
    for name, pieces in (("whole", [[]]), ("cut", 2 * [["--seconds", "0"]])):
        for piece in pieces:
            folders = ["--work", str(tmp_path / f"{name}-work"), "--output", str(tmp_path / name)]
            monkeypatch.setattr("sys.argv", ["train_small", "small-dit", *folders, *piece])
            train_small.main()
    whole, cut = (load_file(tmp_path / n / "small-dit.safetensors") for n in ("whole", "cut"))
    kept = load_file(WEIGHTS / "small-dit.safetensors")
    assert whole.keys() == cut.keys() == kept.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not all(torch.equal(whole[name], kept[name]) for name in whole)
    facts, line, _ = (tmp_path / "cut" / "small-dit.log").read_text(encoding="utf-8").splitlines()
    assert (json.loads(facts)["steps"], line[:12]) == (2, "step 2 loss ")


@cache
def samples(model: str, spec: str, steps: int, number: int) -> Seen:
    """With DDIM, of seed 0. (The study draws others: seed 1000.)"""
    return look(bench(model, number, "fp32").prepared(spec, steps, "ddim"))


@pytest.mark.parametrize("model", BASES)
def test_samples_are_the_digits_that_were_asked_for(model: str) -> None:
    """The nearest of scikit-learn's 1797 pictures is of the asked class for at least 80 % of 20 samples;
    guessing would be right for 10 %."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is part of [dev]")
    data = datasets.load_digits()
    pictures = samples(model, "serial", 10, 20)[1]
    assert pictures is not None
    small = pictures[:, 0, :, :, 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64) * 16
    nearest = np.square(small[:, None] - data.data[None]).sum(2).argmin(1)
    asked = np.array(digits_of(None, 20, 0))
    assert (data.target[nearest] == asked).mean() >= 0.8


def test_a_prompt_is_a_digit() -> None:
    assert digits_of("7", 2, 0) == [7, 7]
    assert digits_of(None, 3, 9) == [9, 0, 1]
    with pytest.raises(ValueError, match="prompt 'a cat': the model draws digits, allowed: 0 to 9"):
        digits_of("a cat", 1, 0)


# ------------------------------------------------------------------- orderings that hold clearly

GATED = {
    ("devices", "small-dit"): [f"distrifusion={n},warmup=2" for n in (8, 4, 2)],
    ("devices", "small-unet"): [f"distrifusion={n},warmup=2" for n in (4, 2)],
    ("warm-up", "small-dit"): [f"distrifusion=4,warmup={w}" for w in (0, 1, 3, 6)],
    ("warm-up", "small-unet"): [f"distrifusion=4,warmup={w}" for w in (1, 3, 6)],
    ("few steps", "small-dit"): ["distrifusion=4,warmup=0 in 5 steps", "distrifusion=4,warmup=1"],
    ("few steps", "small-unet"): ["distrifusion=4,warmup=1", "distrifusion=4,warmup=3 in 20 steps"],
    ("synchronous GroupNorm", "small-unet"): [
        "distrifusion=4,warmup=2",
        "distrifusion=4,mode=sync_gn,warmup=2",
    ],
    ("PipeFusion", "small-dit"): ["distrifusion=4,warmup=2", "pipefusion=4,patches=4,warmup=3"],
    ("PCPP against DistriFusion", "small-dit"): [
        "pcpp=4,portion=0.3,warmup=0",
        "distrifusion=4,warmup=0",
    ],
    **{
        (claim, model): chain
        for model in BASES
        for claim, chain in {
            "AsyncDiff components": [f"asyncdiff={n},stride=1,warmup=3" for n in (3, 2)],
            "AsyncDiff stride": [f"asyncdiff=2,stride={s},warmup=3" for s in (2, 1)],
            "ParaStep": [f"parastep={p},warmup=3" for p in (4, 2)],
            "PCPP against naive strips": ["patch=4,mode=naive", "pcpp=4,portion=0.3,warmup=0"],
        }.items()
    },
}
"""Of every claim, on every model where some link of it holds with both samplers: a chain of such links,
from what is further off to what is nearer."""


def clear() -> dict[tuple[str, str], set[tuple[str, str]]]:
    """Claim and model -> links that hold with either sampler in the runs that are kept."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for claim in CLAIMS:
        held = Counter(
            (link.cell.model, link.paired.first, link.paired.second)
            for link in links(claim, read(KEPT))
            if link.verdict == "holds"
        )
        for (model, *pair), times in held.items():
            if times == len(SAMPLERS):
                found.setdefault((claim.name, model), set()).add((pair[0], pair[1]))
    return found


def test_every_claim_that_holds_clearly_is_gated() -> None:
    found = clear()
    assert found.keys() == GATED.keys()
    for key, chain in GATED.items():
        assert set(pairwise(chain)) <= found[key], key


@pytest.mark.parametrize(("claim", "model"), GATED)
def test_orderings_of_the_literature(claim: str, model: str) -> None:
    """On other samples than those of the study, fewer of them."""
    points = {p.label: p for each in CLAIMS for chain in each.chains for p in chain}

    def errors(label: str) -> NDArray[np.float64]:
        spec, steps = points[label]
        own, serial = (samples(model, each, steps, 10)[0][-1] for each in (spec, "serial"))
        return relative_l2(own, serial)

    for worse, better in pairwise(GATED[claim, model]):
        found = paired(worse, errors(worse), better, errors(better))
        assert found.p < 0.01, found
        assert found.low > 1, found


# ---------------------------------------------------------------------------------- LPIPS and CLIP


def pictures(seed: int, frames: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((2, frames, 40, 48, 3), dtype=np.float32)


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in two files, as people have them: AlexNet's, and those of LPIPS."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    state = {f"features.{name}": tensor for name, tensor in _alexnet().state_dict().items()}
    save_file(state | {"classifier.1.weight": torch.zeros(2)}, folder / "alexnet.safetensors")
    own = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    torch.save(own, folder / "alex.pth")
    return folder


def test_lpips_is_the_weighted_distance_of_unit_activations(lpips_folder: Path) -> None:
    """Written out again, place by place, from the paper's equation 1."""
    a, b = pictures(0), pictures(1)
    found = LPIPS(lpips_folder)(a, b)
    state = load_file(lpips_folder / "alexnet.safetensors")
    own = torch.load(lpips_folder / "alex.pth", weights_only=True)
    layers = [
        (0, 4, 2, False),
        (3, 1, 2, True),
        (6, 1, 1, True),
        (8, 1, 1, False),
        (10, 1, 1, False),
    ]

    def activations(x: Tensor) -> list[Tensor]:
        out = []
        for at, stride, padding, pooled in layers:
            if pooled and at < 8:
                x = torch.max_pool2d(x, 3, 2)
            weight, bias = state[f"features.{at}.weight"], state[f"features.{at}.bias"]
            x = torch.relu(torch.conv2d(x, weight, bias, stride, padding))
            out.append(x)
        return out

    expected = []
    for p, q in zip(a[:, 0], b[:, 0], strict=True):
        both = torch.tensor(np.stack([p, q])).permute(0, 3, 1, 2) * 2 - 1
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        total = 0.0
        for i, x in enumerate(activations((both - shift) / scale)):
            y = x / x.norm(dim=1, keepdim=True)
            total += float(((y[0] - y[1]) ** 2 * own[f"lin{i}.model.1.weight"][0]).sum(0).mean())
        expected.append(total)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert LPIPS(lpips_folder)(a, a).max() == 0.0


def test_lpips_says_what_is_missing(lpips_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights, allowed: \.safetensors or \.pth"):
        LPIPS(tmp_path)
    save_file(load_file(lpips_folder / "alexnet.safetensors"), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'lin0\.model\.1\.weight'"):
        LPIPS(tmp_path)
    (tmp_path / "b.pth").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"b\.pth: not readable as tensors alone"):
        LPIPS(tmp_path)


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Path("/")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="not readable as tensors alone"):
        LPIPS(tmp_path)


def test_clip_similarity_of_pictures(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config=small,
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(
        tmp_path
    )
    score = CLIP(tmp_path).scores()["clip_image"]
    a, b = pictures(0, frames=2), pictures(1, frames=2)
    np.testing.assert_allclose(score(a, a), [1.0, 1.0], rtol=1e-5)
    assert (score(a, b) < 1 - 1e-6).all()
    with pytest.raises(ValueError, match="no tokenizer, which a prompt needs"):
        CLIP(tmp_path, prompt="a cat")
