"""What the network is given beside the latent: read from a file, or computed by the text encoders.

Prompts go through diffusers' own pipeline: it is called as its user calls it, up to its first call of
the denoiser, whose arguments are the conditioning. So no tokenizing, padding, masking or size embedding
is written again. (``network.random_conditioning`` is for models with random weights.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from paradiff.executor.loading import Pipeline, component_class, load_module, quiet, read_config
from paradiff.executor.network import LATENT_NAMES, Conditioning, Network, random_conditioning

POSITIONS = ("timestep", "img_ids", "txt_ids", "image_rotary_emb", "return_dict")
"""Arguments that the executor makes itself, for the rows at hand."""
NOT_USED = ("safety_checker", "requires_safety_checker")


APART = ("WanTransformer3DModel",)
"""Networks that their pipeline calls once for each guidance branch, first with the prompt."""


class _Reached(Exception):
    """No error: the pipeline has called its network for the first step."""


def encode_prompt(
    pipeline: Pipeline,
    shape: Mapping[str, int],
    size: tuple[int, int, int],
    prompt: Any,
    *,
    negative_prompt: str = "",
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Conditioning:
    """The conditioning of ``prompt`` (a PIL image where the model takes one), for both branches.

    ``shape`` is that of one whole network call without guidance (``Profile.latent_shape``), ``size`` is
    height, width and frames in pixels. Encoders live while this runs. Raises ValueError where the
    pipeline has none, and what the pipeline itself raises.
    """
    folder = pipeline.folder
    if folder is None:
        raise ValueError(
            "a prompt needs text encoders, allowed: the directory of a whole pipeline, embeddings"
            " from a file, or random ones"
        )
    with quiet():
        pipe = pipeline.diffusers_class(**_components(pipeline, folder))
        pipe.set_progress_bar_config(disable=True)
    network = pipeline.network
    call = inspect.signature(pipe.__call__).parameters
    height, width, frames = size
    batch = shape["b"]
    takes = "image" if "image" in call and "prompt" not in call else "prompt"
    if (takes == "image") is not isinstance(prompt, Image.Image):
        raise ValueError(f"{network.profile.name} takes a{'n' * (takes == 'image')} {takes}")
    wanted = {
        takes: prompt,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(seed),
        "use_resolution_binning": False,
        "output_type": "latent",
        **dict.fromkeys((name for name in call if name.endswith("_per_prompt")), batch),
    }
    if network.profile.geometry.guidance == "embedded":
        own = pipeline.guidance_scale
        wanted["guidance_scale"] = own if guidance_scale is None else guidance_scale
    with quiet():
        inputs = {name: wanted[name] for name in wanted if name in call}
        calls = _first_calls(network, lambda: pipe(**inputs))
    given = [_without_latent(network, call) for call in reversed(calls)]
    merged = tree_map(_along_batch, *given) if len(given) > 1 else given[0]
    return checked(network, merged, shape, "the prompt")


def read_conditioning(
    file: Path, network: Network, shape: Mapping[str, int], dtype: torch.dtype
) -> Conditioning:
    """Embeddings from a safetensors file: tensors called as the network's arguments, those of nested
    ones with a dot (``added_cond_kwargs.text_embeds``), both guidance branches along the batch, uncond
    first. Raises ValueError: not safetensors, a name or a shape that the network does not take."""
    device = next(network.model.parameters()).device
    try:
        tensors = load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not readable as safetensors: {error}") from None
    given: dict[str, Any] = {}
    for name, tensor in tensors.items():
        owner, _, inner = name.rpartition(".")
        at = given.setdefault(owner, {}) if owner else given
        at[inner] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return checked(network, given, shape, str(file))


def checked(
    network: Network, given: Conditioning, shape: Mapping[str, int], where: str
) -> Conditioning:
    """``given``, if names and shapes are those that the network takes. Raises ValueError.

    ``shape`` as for ``encode_prompt``. How many text tokens there are is free where they are only keys.
    """
    branches = 2 if network.profile.geometry.guidance == "cfg" else 1
    call = {**shape, "b": branches * shape["b"]}
    wanted = dict(_flat(random_conditioning(network, call, 0, torch.float32)))
    found = dict(_flat(given))
    takes = inspect.signature(type(network.model).forward).parameters
    for name in found:
        if name not in wanted and name.split(".")[0] not in takes:
            raise ValueError(f"{where}: {name!r}, allowed: {', '.join(wanted)}")
    for name, tensor in wanted.items():
        if name not in found:
            raise ValueError(f"{where}: {name!r} is missing, allowed: {', '.join(wanted)}")
        have, want = list(found[name].shape), list(tensor.shape)
        if "encoder_" in name and not network.joint_text:
            have[1:2] = want[1:2]
        if have != want:
            raise ValueError(
                f"{where}: {name} has shape {list(found[name].shape)}, allowed: {want}"
            )
    return given


def _flat(given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its dotted name."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value


# --------------------------------------------------------------------------------- the pipeline


def _components(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    """Arguments of the pipeline's class: what is loaded already, and the rest from ``folder``."""
    model = pipeline.network.model
    parameter = next(model.parameters())
    index = read_config(folder / "model_index.json")
    ready = {
        "transformer": model,
        "unet": model,
        "scheduler": deepcopy(pipeline.scheduler),
        "vae": pipeline.vae,
        "vocoder": pipeline.vocoder,
    }
    found: dict[str, Any] = {}
    for name in inspect.signature(pipeline.diffusers_class.__init__).parameters:
        if name in ready:
            found[name] = ready[name]
        elif name in index and not isinstance(index[name], list):
            found[name] = index[name]
        elif name != "self" and name not in NOT_USED:
            kind = component_class(folder, name, index)
            found[name] = _component(folder / name, kind, parameter.dtype, parameter.device)
    if "safety_checker" in inspect.signature(pipeline.diffusers_class.__init__).parameters:
        found |= {"safety_checker": None, "requires_safety_checker": False}
    return found


def _component(folder: Path, kind: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A module with its weights; a tokenizer or an image processor from its files."""
    if kind is None:
        return None
    if issubclass(kind, nn.Module):
        return load_module(folder, kind, dtype, device)
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{folder}: does not load as {kind.__name__}: {cause}") from None


def _first_calls(network: Network, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Arguments of the network in the first step of ``run``, which goes no further."""
    model, calls = network.model, list[dict[str, Any]]()
    signature = inspect.signature(type(model).forward)
    wanted = 2 if network.class_name in APART else 1

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(signature.bind(model, *args, **kwargs).arguments))
        if len(calls) == wanted:
            raise _Reached
        return (torch.zeros_like(_latent_of(calls[-1])),)

    with (
        suppress(_Reached),
        torch.no_grad(),
        mock.patch.object(model, "forward", forward),
    ):
        run()
    assert len(calls) == wanted, "the pipeline has not called its denoiser"
    return calls


def _latent_of(given: Mapping[str, Any]) -> Tensor:
    latent: Tensor = next(given[name] for name in LATENT_NAMES if name in given)
    return latent


def _along_batch(*parts: Any) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def _without_latent(network: Network, given: dict[str, Any]) -> dict[str, Any]:
    """What is left of a call's arguments without those that the executor makes itself."""
    latent = _latent_of(given)
    left = {
        name: value
        for name, value in given.items()
        if value is not None and value != {} and name not in ("self", *LATENT_NAMES, *POSITIONS)
    }
    channels = network.profile.geometry.channels
    if network.class_name == "UNetSpatioTemporalConditionModel":
        left["image_latents"] = latent[:, :, channels:]
    return left
