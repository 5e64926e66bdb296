"""From a name or a local directory to modules that can run: what ``paradiff run`` loads.

Weights come from safetensors files, through diffusers' and transformers' own ``from_pretrained``, from
this machine alone, or they are random; a pickle is never read. Whatever does not fit is a ValueError
that names the file and what is allowed. It does not know graphs or ranks.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError
from torch import nn

from paradiff.config import find
from paradiff.executor.network import Conditioning, Network
from paradiff.executor.schedulers import GuidanceScale
from paradiff.models.catalogue import CATALOGUE
from paradiff.models.encoders import SCHEDULERS, TRANSFORMERS, VAES
from paradiff.models.plans import Plan, plan_for
from paradiff.models.small import (
    BASES,
    GUIDANCE_SCALE,
    Pixels,
    encode_digits,
    small_model,
    small_plan,
    small_scheduler,
)
from paradiff.models.tiny import (
    TINY,
    TINY_VAES,
    TINY_VOCODER,
    tiny_model,
    tiny_plan,
    tiny_scheduler,
)
from paradiff.models.trace import cached_profile
from paradiff.profiles import Profile, load_profile

DENOISER_FOLDERS = ("transformer", "unet")
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
"""Where the components of a pipeline may come from; model_index.json could name any module."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PIPELINES: Mapping[str, str] = {
    "UNetSpatioTemporalConditionModel": "StableVideoDiffusionPipeline",
    "AudioLDM2UNet2DConditionModel": "AudioLDM2Pipeline",
    "PixArtTransformer2DModel": "PixArtAlphaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "CogVideoXTransformer3DModel": "CogVideoXPipeline",
    "WanTransformer3DModel": "WanPipeline",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoPipeline",
    "LatteTransformer3DModel": "LattePipeline",
    "HunyuanDiT2DModel": "HunyuanDiTPipeline",
    "MochiTransformer3DModel": "MochiPipeline",
}
"""Denoiser class -> the diffusers pipeline that it belongs to (U-Nets of images: see below)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What a run needs. ``vae`` and ``vocoder`` decode; ``folder`` is a whole pipeline's directory,
    which has the text encoders, else None. ``guidance_scale`` is the pipeline's default. ``encode``, of
    a small model, makes its conditioning of a prompt (or none), samples, seed and dtype."""

    network: Network
    scheduler: Any
    guidance_scale: GuidanceScale
    vae: nn.Module | None = None
    vocoder: nn.Module | None = None
    folder: Path | None = None
    encode: Callable[[str | None, int, int, torch.dtype], Conditioning] | None = None

    @property
    def diffusers_class(self) -> Any:
        """The class of diffusers pipelines that runs this network."""
        return pipeline_class(self.network.model)


def load(
    source: str,
    *,
    random_weights: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Pipeline:
    """The pipeline that ``source`` names, in ``dtype`` on ``device``.

    ``tiny-sdxl`` is a twin, whose weights are always random; ``small-dit`` is small and trained;
    ``sdxl``, real size, has none of its own
    and asks for ``random_weights``; else a local directory: a whole pipeline, its denoiser alone, or
    with ``random_weights`` a configuration. Raises ValueError: a name that is not known, a file that is
    missing, is a pickle or does not fit its configuration, a class that cannot be executed.
    """
    with quiet():
        return _load(source, _Place(dtype, device, seed), random_weights=random_weights)


def _load(source: str, place: _Place, *, random_weights: bool) -> Pipeline:
    base = source.removeprefix("tiny-")
    if source != base and base in TINY:
        return _twin(base, place)
    if source in BASES:
        if random_weights:
            raise ValueError(f"{source}: has weights of its own, allowed: without random weights")
        return _small(source, place)
    if source in CATALOGUE:
        if not random_weights:
            raise ValueError(
                f"{source}: the name of a configuration, which has no weights, allowed: a local"
                f" directory, random weights, or the twin tiny-{source}"
            )
        return _catalogue(source, place)
    if not Path(source).exists():
        twins = ", ".join([*BASES, *(f"tiny-{name}" for name in TINY)])
        raise ValueError(
            f"{source}: no such directory, allowed: a local directory, {twins}, or with random"
            f" weights {', '.join(CATALOGUE)}"
        )
    return _local(Path(source), place, random_weights=random_weights)


@dataclass(frozen=True, slots=True)
class _Place:
    dtype: torch.dtype
    device: torch.device
    seed: int

    def put(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype).eval()

    def random(self, kind: Any, config: Any) -> nn.Module:
        """A module with random weights, born where it is to be: a large one exists once only."""
        before = torch.get_default_dtype()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.device(self.device):
            torch.manual_seed(self.seed)
            torch.set_default_dtype(self.dtype)
            try:
                model = kind.from_config(config) if isinstance(config, dict) else kind(config)
            finally:
                torch.set_default_dtype(before)
        return self.put(model)


def pipeline_class(model: nn.Module) -> Any:
    """The diffusers pipeline of a denoiser's class."""
    name = PIPELINES.get(type(model).__name__)
    if name is None:
        is_xl = model.config.addition_embed_type == "text_time"
        name = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    return getattr(diffusers, name)


def _guidance_scale(model: nn.Module) -> GuidanceScale:
    """The default of the pipeline's call (SVD's grows over the frames)."""
    parameters = inspect.signature(pipeline_class(model).__call__).parameters
    if "guidance_scale" in parameters:
        return float(parameters["guidance_scale"].default)
    first, last = (float(parameters[f"{m}_guidance_scale"].default) for m in ("min", "max"))
    return first, last


# ------------------------------------------------------------------------------------------ names


def _twin(base: str, place: _Place) -> Pipeline:
    """Weights are drawn on the CPU in float32, so they are the same on every device, in any dtype."""
    entry = CATALOGUE[base]
    drawn = _Place(torch.float32, torch.device("cpu"), place.seed)
    model = tiny_model(base, place.dtype, place.seed).to(place.device)
    vae = vocoder = None
    if entry.vae in TINY_VAES:
        vae = place.put(drawn.random(getattr(diffusers, VAES[entry.vae][0]), TINY_VAES[entry.vae]))
    if entry.vae == "kl-audio":
        config = transformers.SpeechT5HifiGanConfig(**TINY_VOCODER)
        vocoder = place.put(drawn.random(transformers.SpeechT5HifiGan, config))
    return Pipeline(
        network=Network(model, cached_profile(tiny_plan(base))),
        scheduler=tiny_scheduler(base),
        guidance_scale=_guidance_scale(model),
        vae=vae,
        vocoder=vocoder,
    )


def _small(name: str, place: _Place) -> Pipeline:
    return Pipeline(
        network=Network(place.put(small_model(name)), cached_profile(small_plan(name))),
        scheduler=small_scheduler(name),
        guidance_scale=GUIDANCE_SCALE,
        vae=Pixels(),
        encode=encode_digits,
    )


def _catalogue(name: str, place: _Place) -> Pipeline:
    entry = CATALOGUE[name]
    model = place.random(getattr(diffusers, entry.class_name), dict(entry.config))
    vae_class, vae_config = VAES[entry.vae]
    vocoder = None
    if entry.vae == "kl-audio":
        config = transformers.SpeechT5HifiGanConfig(**TRANSFORMERS["hifigan"][2])
        vocoder = place.random(transformers.SpeechT5HifiGan, config)
    class_name, settings = SCHEDULERS[entry.scheduler]
    return Pipeline(
        network=Network(model, _shipped(name)),
        scheduler=getattr(diffusers, class_name)(**settings),
        guidance_scale=_guidance_scale(model),
        vae=place.random(getattr(diffusers, vae_class), dict(vae_config)),
        vocoder=vocoder,
    )


def _shipped(name: str) -> Profile:
    return load_profile(find("models", name, ".json"))


# ------------------------------------------------------------------------------ a local directory


def _local(path: Path, place: _Place, *, random_weights: bool) -> Pipeline:
    plan = plan_for(str(path))
    config = dict(plan.configurations["denoiser"])
    class_name = config.pop("class")
    index = _index(path)
    folder = _denoiser_folder(path, index)
    kind = getattr(diffusers, class_name)
    if random_weights:
        model = _built(place, kind, config, folder / "config.json")
    else:
        model = load_module(folder, kind, place.dtype, place.device)
    if index is None:
        settings = dict(plan.configurations["scheduler"])
        scheduler = getattr(diffusers, settings.pop("class"))(**settings)
    else:
        scheduler = _scheduler(path / "scheduler")
    parts = {
        name: _component(path, name, index, place, random_weights=random_weights)
        for name in ("vae", "vocoder")
    }
    same = _same_as_shipped(plan)
    profile = cached_profile(plan) if same is None else _shipped(same)
    return Pipeline(
        network=Network(model, profile),
        scheduler=scheduler,
        guidance_scale=_guidance_scale(model),
        folder=path if index is not None and not random_weights else None,
        **parts,
    )


Index = Mapping[str, Any]


def _index(path: Path) -> Index | None:
    """model_index.json: component -> (library, class); None where there is none."""
    file = path / "model_index.json"
    return read_config(file) if file.is_file() else None


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: a configuration is a JSON object")
    return config


def _denoiser_folder(path: Path, index: Index | None) -> Path:
    """Where the denoiser's weights lie; its configuration has been read from there."""
    if path.is_file():
        return path.parent
    if (path / "config.json").is_file():
        return path
    folder = next(
        path / name for name in DENOISER_FOLDERS if (path / name / "config.json").is_file()
    )
    if index is not None:
        component_class(path, folder.name, index)
    return folder


def component_class(path: Path, name: str, index: Index) -> Any:
    """The class that model_index.json gives for a component, None where it has none.

    Raises ValueError for a library or class that is not known, or where the component's own
    configuration says another class.
    """
    entry = index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
        return None
    library, class_name = entry
    kind = getattr(LIBRARIES.get(library), str(class_name), None)
    if kind is None:
        raise ValueError(
            f"{path / 'model_index.json'}: {name} is {class_name!r} of {library!r}, allowed: a class"
            f" of {' or '.join(LIBRARIES)}"
        )
    file = path / name / "config.json"
    own = read_config(file) if file.is_file() else {}
    said = own.get("_class_name", class_name)
    if said != class_name:
        raise ValueError(
            f"{file}: the configuration of a {said}, allowed: {class_name}, as model_index.json says"
        )
    return kind


def _component(
    path: Path, name: str, index: Index | None, place: _Place, *, random_weights: bool
) -> nn.Module | None:
    """A component that decodes, None where the directory has none."""
    kind = None if index is None else component_class(path, name, index)
    if kind is None:
        return None
    if random_weights:
        file = path / name / "config.json"
        config: Any = read_config(file)
        if hasattr(kind, "config_class"):
            config = kind.config_class.from_dict(config)
        return _built(place, kind, config, file)
    return load_module(path / name, kind, place.dtype, place.device)


def _built(place: _Place, kind: Any, config: Any, file: Path) -> nn.Module:
    """A module with random weights from the configuration in ``file``."""
    try:
        return place.random(kind, config)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: does not build as {kind.__name__}: {_cause(error)}") from None


def _scheduler(folder: Path) -> Any:
    file = folder / "scheduler_config.json"
    name = str(read_config(file).get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{file}: _class_name {name!r}, allowed: a scheduler of diffusers")
    return kind.from_pretrained(str(folder), local_files_only=True)


def _same_as_shipped(plan: Plan) -> str | None:
    """The catalogue model of the same denoiser and VAE: its shipped profile is this one's, too."""
    for name, entry in CATALOGUE.items():
        theirs = {
            "denoiser": {"class": entry.class_name, **entry.config},
            "vae": {"class": VAES[entry.vae][0], **VAES[entry.vae][1]},
        }
        if all(_complete(theirs[k]) == _complete(plan.configurations[k]) for k in theirs):
            return name
    return None


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every default put in, without what changes no kernel."""
    kind = getattr(diffusers, config["class"])
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in ("self", *IRRELEVANT)
    }
    known = {key: value for key, value in config.items() if key in defaults}
    return json.loads(
        json.dumps({k: v or None for k, v in (defaults | known).items()}, default=str)
    )


IRRELEVANT = ("kwargs", "scaling_factor", "shift_factor", "force_upcast", "sample_size")
"""Parameters that do not change what is launched; sizes come with the request."""


# ----------------------------------------------------------------------------------------- weights


def load_module(folder: Path, kind: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A module of class ``kind`` of diffusers or transformers with the safetensors of ``folder``.

    Raises ValueError unless every parameter is there in its shape.
    """
    ours = issubclass(kind, diffusers.ModelMixin)
    stem = "diffusion_pytorch_model" if ours else "model"
    variant, file = _weights(folder, stem)
    settings = {"torch_dtype": dtype} if ours else {"dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, info = kind.from_pretrained(
                str(folder),
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **settings,
            )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{file}: does not load as {kind.__name__}: {_cause(error)}") from None
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{file}: {name} has shape {tuple(found)}, allowed: {tuple(wanted)}")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{file}: {len(missing)} tensors of a {kind.__name__} are missing, the first is {missing[0]}"
        )
    result: nn.Module = model.to(device).eval()
    return result


def _cause(error: Exception) -> str:
    """The first sentence: what follows is advice to load it all the same."""
    return " ".join(str(error).split(". If you want")[0].split())


def _weights(folder: Path, stem: str) -> tuple[str | None, Path]:
    """Variant and file of the weights in ``folder``. Raises ValueError: none, or a pickle."""
    for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
        if (folder / name).is_file():
            return None, folder / name
    for file in sorted(folder.glob(f"{stem}.*.safetensors")):
        variant = file.name.removeprefix(f"{stem}.").removesuffix(".safetensors")
        if "." not in variant:
            return variant, file
    for file in sorted(folder.glob("*")):
        if file.suffix in PICKLES:
            raise ValueError(
                f"{file}: a pickle, which can run code and is not read, allowed: {stem}.safetensors"
                " (what save_pretrained writes)"
            )
    raise ValueError(f"{folder}: no weights, allowed: {stem}.safetensors, or random weights")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and reports of both libraries: what is wrong is said in one message."""
    logs = [diffusers.utils.logging, transformers.utils.logging]
    before = [log.get_verbosity() for log in logs]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for log in logs:
        log.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
