"""Latents decoded and written: as each pipeline decodes them, all files or none."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import plain_loops as plain
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from scipy.io import wavfile
from tiny_pipelines import t5, t5_tokenizer, tiny_pipeline
from torch import Tensor

from paradiff.executor.loading import Pipeline
from paradiff.executor.network import Network
from paradiff.executor.outputs import decoder, write_outputs
from paradiff.models.catalogue import CATALOGUE
from paradiff.models.encoders import VAES
from paradiff.models.tiny import TINY_VAES, TINY_VOCODER, tiny_model, tiny_scheduler

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def ours_of(pipe: Any, name: str) -> Pipeline:
    """What loading would have made of a diffusers pipeline; profiles do not matter here."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    return Pipeline(
        network=Network(network, plain.twin("flux1-dev")[0]), scheduler=pipe.scheduler,
        guidance_scale=1.0, vae=pipe.vae, vocoder=getattr(pipe, "vocoder", None),
    )  # fmt: skip


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


@pytest.mark.parametrize("name", ["sdxl", "sd3-medium", "flux1-dev", "pixart-alpha", "svd"])
def test_decoding_equals_the_pipeline(name: str) -> None:
    """One step, to the latent and to the picture: ours of the one is the other."""
    pipe = tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    inputs: dict[str, Any] = {"prompt": "a cat", "height": 64, "width": 64}
    if name == "pixart-alpha":
        inputs["use_resolution_binning"] = False
    if name == "svd":
        inputs = {"image": Image.new("RGB", (64, 64)), "num_frames": 3, "height": 64, "width": 64}

    def run(output: str) -> Any:
        generator = torch.Generator().manual_seed(1)
        out = pipe(num_inference_steps=2, output_type=output, generator=generator, **inputs)
        return out.frames if hasattr(out, "frames") else out.images

    latent, expected = run("latent"), run("np")
    if name == "flux1-dev":
        latent = pipe._unpack_latents(latent, 64, 64, 8)
    found = decoder(ours_of(pipe, name))(latent)
    pictures = (found / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy()
    # SVD's pipeline multiplies by 1 / scale: a rounding of float32 more, that its layers carry on.
    atol = 4e-6 if name == "svd" else 1e-6
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=atol)


def test_decoding_equals_cogvideox_and_audioldm2() -> None:
    cog = seeded(
        lambda: diffusers.CogVideoXPipeline(
            t5_tokenizer(), t5(),
            diffusers.AutoencoderKLCogVideoX.from_config(TINY_VAES["cogvideox"]),
            tiny_model("cogvideox-2b", torch.float32), tiny_scheduler("cogvideox-2b"),
        )
    )  # fmt: skip
    latent = torch.randn(1, 3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = cog.decode_latents(latent)
    assert plain.relative(decoder(ours_of(cog, "cogvideox-2b"))(latent), expected) < 1e-6

    vocoder = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**TINY_VOCODER))
    audio = seeded(
        lambda: diffusers.AudioLDM2Pipeline(
            vae=diffusers.AutoencoderKL.from_config(TINY_VAES["kl-audio"]), text_encoder=None,
            text_encoder_2=None, projection_model=None, language_model=None, tokenizer=None,
            tokenizer_2=None, feature_extractor=None,
            unet=tiny_model("audioldm2-large", torch.float32),
            scheduler=tiny_scheduler("audioldm2-large"), vocoder=vocoder.eval().double(),
        )
    )  # fmt: skip
    audio.vae.double()
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 8, 4, 16, generator=draw, dtype=torch.float64)
    with torch.no_grad():  # the lines of its call, and its own method
        mel = audio.vae.decode(1 / audio.vae.config.scaling_factor * latent).sample
        wave = audio.mel_spectrogram_to_waveform(mel)[:, : int(0.16 * 16000)]
    found = decoder(ours_of(audio, "audioldm2-large"))(latent)
    assert found.shape == (2, 4 * 4 * 160)  # four mel frames a latent row, 160 samples each
    assert plain.relative(found, wave) < 1e-6


def words(tokens: int, width: int, pooled: int = 0) -> tuple[Tensor, ...]:
    """Embeddings of a prompt, a mask of them, and a pooled embedding."""
    draw = torch.Generator().manual_seed(2)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    return (
        torch.randn(1, tokens, width, generator=draw),
        mask,
        torch.randn(1, pooled, generator=draw),
    )


def video_pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a twin without text encoders, and the embeddings to call it with."""
    entry = CATALOGUE[name]
    vae = seeded(lambda: getattr(diffusers, VAES[entry.vae][0]).from_config(TINY_VAES[entry.vae]))
    parts = {"vae": vae, "scheduler": tiny_scheduler(name), "text_encoder": None, "tokenizer": None}
    parts["transformer"] = tiny_model(name, torch.float32)
    embeddings, mask, pooled = words(6, 24, 12)
    given: dict[str, Any] = {"prompt_embeds": embeddings}
    if name == "hunyuanvideo":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        given |= {"pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
        return diffusers.HunyuanVideoPipeline(**parts), given
    given["negative_prompt_embeds"] = embeddings
    if name == "mochi":
        given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        return diffusers.MochiPipeline(**parts), given
    vae.double()  # its pipeline divides by 1 / std: in float32 that shows in the seventh digit
    return diffusers.WanPipeline(**parts), given


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "hunyuanvideo", "mochi"])
def test_decoding_equals_the_pipeline_of_videos(name: str) -> None:
    pipe, given = video_pipeline(name)
    pipe.set_progress_bar_config(disable=True)

    def run(output: str) -> Any:
        generator = torch.Generator().manual_seed(1)
        frames = 7 if name == "mochi" else 9
        return pipe(
            **given, height=64, width=64, num_frames=frames, num_inference_steps=2,
            output_type=output, generator=generator,
        ).frames  # fmt: skip

    latent, expected = run("latent"), run("np")
    found = decoder(ours_of(pipe, name))(latent)
    pictures = (found / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy()
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-6)


def test_statistics_of_the_latent_are_put_back() -> None:
    """SDXL's pipeline, with latents_mean and latents_std: z = x std / scale + mean."""
    pipe = tiny_pipeline("sdxl")
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5] * 4)
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    with torch.no_grad():
        expected = pipe.vae.decode(latent * 0.5 / pipe.vae.config.scaling_factor + mean).sample
    assert torch.equal(decoder(ours_of(pipe, "sdxl"))(latent), expected)


def test_xl_decodes_in_float32_under_float16() -> None:
    pipe = tiny_pipeline("sdxl").to(torch.float16)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    found = decoder(ours_of(pipe, "sdxl"))(latent)
    assert pipe.vae.dtype == torch.float16
    with torch.no_grad():
        vae = pipe.vae.float()
        expected = vae.decode(latent.float() / vae.config.scaling_factor).sample
    assert torch.equal(found, expected)


# --------------------------------------------------------------------------------------------- files


def bare(name: str) -> Pipeline:
    profile, model = plain.twin(name)
    vocoder = None
    if name == "audioldm2-large":
        vocoder = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**TINY_VOCODER))
    return Pipeline(
        network=Network(model, profile), scheduler=None, guidance_scale=1.0, vocoder=vocoder
    )


def test_images_are_written_for_every_sample_of_every_replica(tmp_path: Path) -> None:
    latents = {r: torch.full((2, 4, 2, 2), float(r), dtype=torch.float64) for r in (1, 0)}
    values = torch.linspace(-1.5, 1.5, 2 * 3 * 16 * 8).view(2, 3, 16, 8)
    paths = write_outputs(tmp_path, bare("flux1-dev"), latents, {0: values, 1: values.flip(0)})
    names = ["latents.safetensors", *(f"image-{i}.png" for i in range(4))]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    again = load_file(tmp_path / "latents.safetensors")
    assert torch.equal(again["latents.1"], latents[1])
    pixels = np.asarray(Image.open(tmp_path / "image-2.png"))
    wanted = (values[1] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    np.testing.assert_allclose(pixels, wanted, atol=0.5)


def test_video_plays_as_many_frames_as_there_are(tmp_path: Path) -> None:
    """Grey levels survive 4:2:0 and quantisation to a few of 255."""
    levels = torch.linspace(-0.9, 0.9, 5)
    video = levels.view(1, 1, 5, 1, 1).expand(1, 3, 5, 32, 48)
    latents = {0: torch.zeros(1, 2, 16, 4, 6)}
    write_outputs(tmp_path, bare("cogvideox-2b"), latents, {0: video})
    with av.open(str(tmp_path / "video-0.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert [f.shape for f in frames] == [(32, 48, 3)] * 5
    np.testing.assert_allclose([f.mean() for f in frames], (levels / 2 + 0.5) * 255, atol=4)


def test_sound_is_pcm_at_the_rate_of_the_vocoder(tmp_path: Path) -> None:
    wave = torch.tensor([[0.0, 0.5, -0.5, 1.5]])
    write_outputs(tmp_path, bare("audioldm2-large"), {0: torch.zeros(1)}, {0: wave})
    rate, samples = wavfile.read(tmp_path / "audio-0.wav")
    assert rate == 16000
    assert samples.tolist() == [0, 16384, -16384, 32767]


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_full_disk_leaves_nothing_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    original, calls = Path.write_bytes, io.StringIO()

    def write(self: Path, data: bytes) -> int:
        if calls.tell() == fails_at:
            original(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        calls.write(".")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    image: Tensor = torch.zeros(2, 3, 8, 8)
    name = ["latents.safetensors", "image-0.png", "image-1.png"][fails_at]
    with pytest.raises(OSError, match="No space left") as caught:
        write_outputs(tmp_path, bare("flux1-dev"), {0: image}, {0: image})
    assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_no_vae_no_picture() -> None:
    assert decoder(bare("flux1-dev")) is None
