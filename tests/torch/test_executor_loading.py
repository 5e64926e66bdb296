"""Loading: twins, real sizes, local directories; and everything in them that may be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import diffusers
import plain_loops as plain
import pytest
import torch
from safetensors.torch import load_file, save_file

from paradiff.config import find
from paradiff.executor import job, loading
from paradiff.executor.loading import Pipeline, load
from paradiff.models import trace
from paradiff.models.plans import plan_for
from paradiff.models.tiny import TINY_VAES, tiny_model, tiny_plan, tiny_scheduler
from paradiff.models.trace import cached_profile
from paradiff.profiles import load_profile

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

WEIGHTS = "diffusion_pytorch_model.safetensors"


def loaded(
    source: str | Path, *, random: bool = False, dtype: torch.dtype = torch.float64
) -> Pipeline:
    return load(str(source), random_weights=random, dtype=dtype, device=torch.device("cpu"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins as the other tests have traced them."""

    def profile(plan: Any) -> Any:
        base = plan.name.removeprefix("tiny-")
        return plain.twin(base)[0] if base != plan.name else cached_profile(plan)

    monkeypatch.setattr(loading, "cached_profile", profile)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole PixArt pipeline without text encoders, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("pixart")
    vae = diffusers.AutoencoderKL.from_config(TINY_VAES["kl-4"])
    diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=vae,
        transformer=tiny_model("pixart-alpha", torch.float32),
        scheduler=tiny_scheduler("pixart-alpha"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "pixart"))


# ------------------------------------------------------------------------------------ what loads


@pytest.mark.parametrize("name", ["svd", "audioldm2-large", "flux1-dev", "cogvideox-2b"])
def test_a_twin_is_the_model_the_scheduler_and_a_vae_of_the_class(name: str) -> None:
    ours = loaded(f"tiny-{name}")
    again, other = tiny_model(name).state_dict(), plan_for(name).configurations["vae"]["class"]
    assert all(torch.equal(again[k], v) for k, v in ours.network.model.state_dict().items())
    assert ours.network.profile.name == f"tiny-{name}"
    assert ours.scheduler.config == tiny_scheduler(name).config
    assert type(ours.vae).__name__ == other
    assert (ours.vocoder is not None) == (name == "audioldm2-large")


def test_weights_of_a_twin_do_not_depend_on_the_dtype() -> None:
    wide, narrow = loaded("tiny-flux1-dev"), loaded("tiny-flux1-dev", dtype=torch.bfloat16)
    pairs = zip(wide.vae.parameters(), narrow.vae.parameters(), strict=True)
    assert all(torch.equal(a.bfloat16(), b) for a, b in pairs)


def test_a_directory_gives_the_weights_that_were_saved(saved: Path) -> None:
    ours, model = loaded(saved, dtype=torch.float32), tiny_model("pixart-alpha", torch.float32)
    state = ours.network.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert ours.vae is not None
    assert ours.guidance_scale == 4.5
    assert ours.folder == saved
    assert ours.network.profile.name == saved.name
    pairs = (p.denoiser.segments for p in (ours.network.profile, plain.twin("pixart-alpha")[0]))
    assert all(a.kernels == b.kernels for a, b in zip(*pairs, strict=True))


def test_the_denoiser_alone_takes_the_catalogues_scheduler(saved: Path) -> None:
    ours = loaded(saved / "transformer")
    assert ours.vae is None
    assert ours.folder is None
    assert ours.scheduler.config == tiny_scheduler("pixart-alpha").config


def test_a_configuration_is_enough_for_random_weights(broken: Path) -> None:
    for file in broken.rglob("*.safetensors"):
        file.unlink()
    ours = loaded(broken, random=True, dtype=torch.float32)
    sizes = {k: v.shape for k, v in ours.network.model.state_dict().items()}
    assert sizes == {k: v.shape for k, v in tiny_model("pixart-alpha").state_dict().items()}
    assert torch.isfinite(next(ours.vae.parameters())).all()


def test_variants_and_shards_are_found(broken: Path) -> None:
    weights = broken / "vae" / WEIGHTS
    weights.rename(broken / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    model = tiny_model("pixart-alpha", torch.float32)
    (broken / "transformer" / WEIGHTS).unlink()
    model.save_pretrained(broken / "transformer", max_shard_size="50KB")
    assert len(list((broken / "transformer").glob("*-of-*.safetensors"))) > 1
    state = loaded(broken, dtype=torch.float32).network.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_published_configuration_takes_the_shipped_profile(tmp_path: Path) -> None:
    """Published files spell out many defaults, some of them as null."""
    kind = diffusers.UNet2DConditionModel
    with torch.device("meta"):
        config = dict(kind.from_config(dict(plan_for("sdxl").configurations["denoiser"])).config)
    config |= {"_class_name": kind.__name__, "upcast_attention": None, "sample_size": 96}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    assert loading._same_as_shipped(plan_for(str(tmp_path))) == "sdxl"
    config["layers_per_block"] = 1
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    assert loading._same_as_shipped(plan_for(str(tmp_path))) is None


def test_real_size_with_random_weights() -> None:
    """On the meta device: as many parameters as the shipped profile says, and that profile."""
    meta = torch.device("meta")
    ours = load("pixart-alpha", random_weights=True, dtype=torch.bfloat16, device=meta)
    profile = load_profile(find("models", "pixart-alpha", ".json"))
    assert ours.network.profile == profile
    parameters = list(ours.network.model.parameters())
    assert sum(p.numel() for p in parameters) == profile.denoiser.params
    assert {p.dtype for p in parameters} == {torch.bfloat16}


def test_profiles_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan("flux1-dev")
    first = cached_profile(plan)
    monkeypatch.setattr(trace, "trace_plan", None)
    assert cached_profile(plan) == first


# ------------------------------------------------------------------------------------ what is wrong


def says(source: Path | str, *words: str, random: bool = False) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        loaded(source, random=random)
    assert all(word in str(caught.value) for word in words), caught.value


def test_names_that_are_none() -> None:
    says("tiny-nothing", "no such directory", "tiny-sdxl")
    says("sdxl", "no weights", "tiny-sdxl")


def test_a_pickle_is_not_read(broken: Path) -> None:
    (broken / "transformer" / WEIGHTS).unlink()
    says(broken, "no weights", WEIGHTS)

    class Armed:
        def __reduce__(self) -> Any:
            return Path.touch, (broken / "run",)

    for name in ("diffusion_pytorch_model.bin", "other.pt"):
        (broken / "transformer" / name).write_bytes(pickle.dumps(Armed()))
        says(broken, name, "pickle", WEIGHTS)
        (broken / "transformer" / name).unlink()
    assert not (broken / "run").exists()


def test_weights_of_another_shape_or_with_a_hole(broken: Path) -> None:
    file = broken / "transformer" / WEIGHTS
    state = load_file(file)
    name = "proj_out.weight"
    save_file({**state, name: torch.zeros(3, 5)}, file)
    says(broken, str(file), name, "3, 5")
    save_file({k: v for k, v in state.items() if k != name}, file)
    says(broken, str(file), name, "missing")
    file.write_bytes(file.read_bytes()[:100])
    says(broken, str(file), "does not load")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer": ["os", "system"]}, ("model_index.json", "diffusers or transformers")),
        ({"vae": ["diffusers", "NoSuchClass"]}, ("model_index.json", "NoSuchClass")),
        ({"vae": ["diffusers", "AutoencoderKLWan"]}, ("vae/config.json", "AutoencoderKLWan")),
        ({"transformer": ["diffusers", "SD3Transformer2DModel"]}, ("transformer/config.json",)),
    ],
)
def test_an_index_that_names_something_else(broken: Path, change: Any, words: Any) -> None:
    file = broken / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    says(broken, *words)


def test_configurations_that_name_something_else(broken: Path) -> None:
    file = broken / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    says(broken, str(file), "scheduler of diffusers")
    file.write_text("{")
    says(broken, str(file), "not JSON")
    config = broken / "transformer" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"norm_type": "none of these"}))
    says(broken, str(config), "does not build", random=True)
    config.write_text(json.dumps({"_class_name": "PriorTransformer"}))
    says(broken, str(config), "PriorTransformer", "PixArtTransformer2DModel")
    says(broken / "vae", "AutoencoderKL")
    says(broken / "scheduler", "no config.json")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of another machine, or more ranks than GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match="cuda:5: torch sees 2 GPUs here, allowed: cuda:0 to cuda:1"
    ):
        job.loaded(job.Job(source="tiny-sd21", spec="serial", device="cuda:5"))
