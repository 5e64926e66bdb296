"""From final latents to files: what the VAE and the vocoder make of them, as PNG, MP4 or WAV.

Scaling and shifts are those that each diffusers pipeline applies before its VAE. The raw latents are
written always. It does not know graphs or ranks.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from safetensors.torch import save
from scipy.io import wavfile
from torch import Tensor, nn

from paradiff.executor.loading import Pipeline
from paradiff.strategies.tiling import Tiling

FRAMES_PER_S: Mapping[str, int] = {
    "UNetSpatioTemporalConditionModel": 7,
    "CogVideoXTransformer3DModel": 8,
    "LatteTransformer3DModel": 8,
    "WanTransformer3DModel": 16,
    "HunyuanVideoTransformer3DModel": 24,
    "MochiTransformer3DModel": 30,
}
"""What each video model was trained on, as its model card says."""
CHANNELS_FIRST = ("AutoencoderKLWan", "AutoencoderKLHunyuanVideo", "AutoencoderKLMochi")
"""VAEs of latents that have channels before frames."""
VIDEO_QUALITY = {"crf": "18", "preset": "medium"}
"""Constant rate factor of x264: 18 is near what the eye tells apart."""


# ------------------------------------------------------------------------------------------- decode


def decoder(pipeline: Pipeline, tiles: Tiling | None = None) -> Callable[[Tensor], Tensor] | None:
    """What makes of final latents what the user gets; None where there is no VAE for that.

    ``tiles``: the VAE decodes overlapping tiles of that size, with diffusers' own ``enable_tiling``.
    Images (b, 3, h, w) and videos (b, 3, f, h, w) about -1 to 1, sound (b, samples); float32 or wider.
    """
    vae = pipeline.vae
    if vae is None or type(vae).__name__ not in _DECODE:
        return None
    decode = _DECODE[type(vae).__name__]
    if tiles is not None:
        enable_tiling(vae, tiles, pipeline.network.profile.geometry.scale)

    @torch.no_grad()
    def run(latent: Tensor) -> Tensor:
        return finished(pipeline, decode(pipeline, vae, latent))

    return run


def enable_tiling(vae: Any, tiles: Tiling, scale: int) -> None:
    """``tiles`` as ``vae`` takes them: of latents, or in pixels with a share or a step."""
    height, width = tiles.rows * scale, tiles.columns * scale
    down, right = (scale * step for step in tiles.steps)
    kind = type(vae).__name__
    if kind == "AutoencoderKL":
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = tiles.rows, height
    elif kind == "AutoencoderKLCogVideoX":
        vae.enable_tiling(height, width, *tiles.overlap)
    else:
        vae.enable_tiling(
            tile_sample_min_height=height,
            tile_sample_min_width=width,
            tile_sample_stride_height=down,
            tile_sample_stride_width=right,
        )


def finished(pipeline: Pipeline, out: Tensor) -> Tensor:
    """What the user gets of what the VAE has made: spectrograms become sound."""
    if pipeline.vocoder is not None:
        out = _sound(pipeline.vocoder, out.squeeze(1))
    return out if out.dtype == torch.float64 else out.float()


def _image(pipeline: Pipeline, vae: Any, latent: Tensor) -> Tensor:
    if latent.ndim == 5:  # Latte: every frame is an image
        images = _image(pipeline, vae, latent.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (latent.shape[0], -1)).transpose(1, 2)
    wide = needs_float32(pipeline)
    if wide:
        vae.to(torch.float32)
    image: Tensor = vae.decode(unscaled(vae, latent.to(vae.dtype)), return_dict=False)[0]
    if wide:
        vae.to(torch.float16)
    return image


def needs_float32(pipeline: Pipeline) -> bool:
    """SDXL's VAE overflows in float16, so its pipeline runs it in float32."""
    vae: Any = pipeline.vae
    is_xl = pipeline.diffusers_class.__name__ == "StableDiffusionXLPipeline"
    return bool(is_xl and vae.dtype == torch.float16 and vae.config.force_upcast)


def unscaled(vae: Any, latent: Tensor) -> Tensor:
    """The latent as the VAE takes it: (b, c, f, r, w) for some, else channels are the third dimension
    from the end."""
    c, after = vae.config, (1, 1, 1) if type(vae).__name__ in CHANNELS_FIRST else (1, 1)
    scale = getattr(c, "scaling_factor", None) or 1.0
    mean, std = (getattr(c, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is not None and std is not None:
        mean, std = (latent.new_tensor(each).view(-1, *after) for each in (mean, std))
        return latent * std / scale + mean
    z = latent / scale
    shift = getattr(c, "shift_factor", None)
    return z if shift is None else z + shift


def _pixels(_: Pipeline, vae: Any, latent: Tensor) -> Tensor:
    picture: Tensor = vae(latent)
    return picture


def _svd(_: Pipeline, vae: Any, latent: Tensor) -> Tensor:
    """All frames of one video at once, the pipeline's default."""
    frames = latent.shape[1]
    videos = [vae.decode(z, num_frames=frames).sample for z in unscaled(vae, latent)]
    return torch.stack(videos).transpose(1, 2)


def _cogvideox(_: Pipeline, vae: Any, latent: Tensor) -> Tensor:
    video: Tensor = vae.decode(unscaled(vae, latent).transpose(1, 2)).sample
    return video


def _video(_: Pipeline, vae: Any, latent: Tensor) -> Tensor:
    """Latents (b, c, f, r, w), as the pipelines of these models have them."""
    video: Tensor = vae.decode(unscaled(vae, latent.to(vae.dtype)), return_dict=False)[0]
    return video


def _sound(vocoder: Any, mel: Tensor) -> Tensor:
    """As long as asked for: the vocoder's last convolutions add a little."""
    samples = mel.shape[1] * prod(vocoder.config.upsample_rates)
    wave: Tensor = vocoder(mel)[:, :samples]
    return wave


_DECODE: Mapping[str, Callable[[Pipeline, nn.Module, Tensor], Tensor]] = {
    "AutoencoderKL": _image,
    "Pixels": _pixels,
    "AutoencoderKLTemporalDecoder": _svd,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLWan": _video,
    "AutoencoderKLHunyuanVideo": _video,
    "AutoencoderKLMochi": _video,
}


# -------------------------------------------------------------------------------------------- files


def write_outputs(
    folder: Path,
    pipeline: Pipeline,
    latents: Mapping[int, Tensor],
    decoded: Mapping[int, Tensor],
) -> list[Path]:
    """Write everything into ``folder``, or nothing; returns the paths.

    ``latents.safetensors`` (tensor ``latents.0`` is that of replica 0), and for each sample
    ``image-0.png``, ``video-0.mp4`` or ``audio-0.wav``, counted through all replicas. Raises OSError
    with the path of the file that could not be written; none is left then, whole or half.
    """
    tensors = {f"latents.{replica}": x.contiguous() for replica, x in sorted(latents.items())}
    files = {"latents.safetensors": save(tensors)}
    samples = [sample for _, batch in sorted(decoded.items()) for sample in batch.cpu()]
    for number, sample in enumerate(samples):
        kind, suffix, encode = _FORMATS[sample.ndim]
        files[f"{kind}-{number}.{suffix}"] = encode(sample, pipeline)
    staged: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            staged[temporary] = folder / name
            temporary.write_bytes(data)
        for temporary, final in staged.items():
            temporary.replace(final)
    except OSError as error:
        at = error.filename or str(temporary)
        final_name = next((str(f) for t, f in staged.items() if str(t) == str(at)), str(at))
        raise OSError(error.errno, error.strerror, final_name) from None
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)
    return list(staged.values())


def _png(image: Tensor, _: Pipeline) -> bytes:
    (picture,) = VaeImageProcessor().postprocess(image[None], output_type="pil")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _mp4(video: Tensor, pipeline: Pipeline) -> bytes:
    (frames,) = VideoProcessor().postprocess_video(video[None], output_type="np")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = FRAMES_PER_S.get(pipeline.network.class_name, 8)
        stream = container.add_stream("libx264", rate=rate, options=VIDEO_QUALITY)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in (frames * 255).round().astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _wav(wave: Tensor, pipeline: Pipeline) -> bytes:
    """16-bit PCM at the vocoder's rate."""
    vocoder: Any = pipeline.vocoder
    buffer = io.BytesIO()
    samples = (wave.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    wavfile.write(buffer, int(vocoder.config.sampling_rate), samples)
    return buffer.getvalue()


_FORMATS: Mapping[int, tuple[str, str, Callable[[Tensor, Pipeline], bytes]]] = {
    1: ("audio", "wav", _wav),
    3: ("image", "png", _png),
    4: ("video", "mp4", _mp4),
}
"""Dimensions of one decoded sample -> what it is, the suffix, and how it is encoded."""
