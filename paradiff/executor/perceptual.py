"""LPIPS and CLIP scores of pictures, with weights that lie on this machine. Nothing is ever fetched.

LPIPS (Zhang et al. 2018, version 0.1): channel-normalised activations of AlexNet after each of its five
rectifiers, squared differences weighted by a learned 1 x 1 layer, mean over places, sum over layers.
Its packages fetch AlexNet's weights when they are made, so the few lines are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from paradiff.executor.loading import load_module, quiet

Array = NDArray[Any]
Score = Callable[[Array, Array], Array]
"""From pictures (n, frames, rows, columns, 3) in 0 to 1, and those of the serial run, to (n,)."""

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS' normalisation of pictures in -1 to 1."""
CHANNELS = (64, 192, 384, 256, 256)
LEAST_PIXELS = 31
"""What is left of a smaller picture after AlexNet's second pooling is nothing."""


class LPIPS:
    """Learned perceptual distance: 0 for equal pictures.

    ``folder`` has torchvision's AlexNet (``features.0.weight`` ...) and LPIPS' own ``alex`` layers
    (``lin0.model.1.weight`` ...), as safetensors, or as .pth, of which only tensors are read. Raises
    ValueError: a file that cannot be read, a tensor that is missing or of another shape.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.device = device
        self.features = _alexnet()
        found = _tensors(folder)
        wanted = {
            f"features.{name}": tensor for name, tensor in self.features.state_dict().items()
        } | {f"lin{i}.model.1.weight": torch.empty(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
        for name, tensor in wanted.items():
            if name not in found:
                raise ValueError(
                    f"{folder}: no tensor {name!r}, allowed: the weights of torchvision's AlexNet and of"
                    " LPIPS 0.1 (alex), as .safetensors or .pth"
                )
            if found[name].shape != tensor.shape:
                raise ValueError(
                    f"{folder}: {name} has shape {tuple(found[name].shape)}, allowed:"
                    f" {tuple(tensor.shape)}"
                )
        self.features.load_state_dict(
            {k: found[f"features.{k}"] for k in self.features.state_dict()}
        )
        self.features.to(device)
        self.weights = [found[f"lin{i}.model.1.weight"].to(device) for i in range(len(CHANNELS))]

    def __call__(self, pictures: Array, reference: Array) -> Array:
        """Mean over the frames of each sample. Raises ValueError for pictures that are too small."""
        if min(pictures.shape[2:4]) < LEAST_PIXELS:
            raise ValueError(
                f"LPIPS: pictures of {pictures.shape[2]} x {pictures.shape[3]} pixels, allowed: at least"
                f" {LEAST_PIXELS}"
            )
        pairs = zip(pictures, reference, strict=True)
        return np.array([float(self._distances(a, b).mean()) for a, b in pairs])

    @torch.no_grad()
    def _distances(self, a: Array, b: Array) -> Tensor:
        """Of frames (f, rows, columns, 3)."""
        layers = zip(self._activations(a), self._activations(b), self.weights, strict=True)
        parts = [F.conv2d((x - y).square(), w).mean((1, 2, 3)) for x, y, w in layers]
        return torch.stack(parts).sum(0)

    def _activations(self, frames: Array) -> list[Tensor]:
        x = torch.from_numpy(frames).to(self.device, torch.float32).permute(0, 3, 1, 2) * 2 - 1
        shift, scale = (x.new_tensor(each).view(1, 3, 1, 1) for each in (SHIFT, SCALE))
        x, found = (x - shift) / scale, []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


def _alexnet() -> nn.Sequential:
    """The convolutions of AlexNet (Krizhevsky 2014), numbered as torchvision does."""
    c1, c2, c3, c4, c5 = CHANNELS
    return nn.Sequential(
        nn.Conv2d(3, c1, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(c1, c2, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU(),
        nn.Conv2d(c3, c4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(c4, c5, 3, padding=1), nn.ReLU(),
    ).eval()  # fmt: skip


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all weight files in ``folder``."""
    found: dict[str, Tensor] = {}
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".pth"))
    for file in files:
        try:
            if file.suffix == ".safetensors":
                found |= load_file(file)
            else:
                found |= torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, TypeError, SafetensorError, UnpicklingError) as error:
            cause = " ".join(str(error).split())[:120]
            raise ValueError(f"{file}: not readable as tensors alone: {cause}") from None
    if not files:
        raise ValueError(f"{folder}: no weights, allowed: .safetensors or .pth files")
    return found


class CLIP:
    """Cosine similarities in CLIP's space (Radford et al. 2021; CLIP score: Hessel et al. 2021).

    ``folder``: a CLIPModel as ``save_pretrained`` writes it, with its image processor, and its tokenizer
    where there is a ``prompt``. Raises ValueError.
    """

    def __init__(self, folder: Path, prompt: str | None = None, device: str = "cpu") -> None:
        self.model: Any = load_module(
            folder, transformers.CLIPModel, torch.float32, torch.device(device)
        )
        with quiet():
            self.processor = _part(transformers.CLIPImageProcessor, folder)
            self.text = None if prompt is None else self._embedded(folder, prompt)

    @torch.no_grad()
    def _embedded(self, folder: Path, prompt: str) -> Tensor:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise ValueError(f"{folder}: no tokenizer, which a prompt needs")
        tokenizer = _part(transformers.CLIPTokenizer, folder)
        tokens = tokenizer([prompt], truncation=True, return_tensors="pt")
        return _unit(self.model.get_text_features(**tokens.to(self.model.device)))

    def scores(self) -> Mapping[str, Score]:
        """``clip_image``: similarity of a picture and the serial run's; ``clip_text_loss``: how much
        less it resembles the prompt, in points of the CLIP score (100 times the cosine)."""
        found: dict[str, Score] = {"clip_image": self._images}
        if self.text is not None:
            found["clip_text_loss"] = self._text
        return found

    def _images(self, pictures: Array, reference: Array) -> Array:
        return self._mean((self._features(pictures) * self._features(reference)).sum(1), pictures)

    def _text(self, pictures: Array, reference: Array) -> Array:
        now, then = (self._features(each) @ self.text.T for each in (pictures, reference))
        return self._mean(100 * (then - now)[:, 0], pictures)

    @torch.no_grad()
    def _features(self, pictures: Array) -> Tensor:
        """Unit vectors of all frames of all samples."""
        frames = list((pictures.reshape(-1, *pictures.shape[2:]) * 255).round().astype(np.uint8))
        pixels = self.processor(images=frames, return_tensors="pt")["pixel_values"]
        return _unit(self.model.get_image_features(pixel_values=pixels.to(self.model.device)))

    def _mean(self, by_frame: Tensor, pictures: Array) -> Array:
        mean: Array = by_frame.view(len(pictures), -1).mean(1).cpu().double().numpy()
        return mean


def _unit(features: Any) -> Tensor:
    """The embeddings, of length 1. (transformers 5 wraps them in an output.)"""
    x = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(x, dim=-1)


def _part(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())[:160]
        raise ValueError(f"{folder}: does not load as {kind.__name__}: {cause}") from None
