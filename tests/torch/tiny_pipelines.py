"""Whole diffusers pipelines around the twins: tiny text encoders and tokenizers, random weights."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers

from paradiff.models.tiny import TINY_VAES, tiny_model, tiny_scheduler


def clip_tokenizer() -> Any:
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(c, -3.0) for c in string.ascii_lowercase]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def clip(hidden: int, projection: int | None = None) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=hidden, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        projection_dim=projection or hidden,
    )  # fmt: skip
    kinds = transformers.CLIPTextModelWithProjection, transformers.CLIPTextModel
    return kinds[projection is None](config).eval()


def t5() -> Any:
    config = transformers.T5Config(
        d_model=24, d_ff=32, d_kv=8, num_heads=2, num_layers=2, vocab_size=30,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


def umt5() -> Any:
    config = transformers.UMT5Config(
        d_model=24, d_ff=32, d_kv=8, num_heads=2, num_layers=2, vocab_size=30,
    )  # fmt: skip
    return transformers.UMT5EncoderModel(config).eval()


def tiny_pipeline(name: str) -> Any:
    """The diffusers pipeline of twin ``name`` in float32, weights drawn from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(name)


def _build(name: str) -> Any:
    model, scheduler = tiny_model(name, torch.float32), tiny_scheduler(name)
    kl = {k: diffusers.AutoencoderKL.from_config(TINY_VAES[k]) for k in ("kl-4", "kl-16")}
    if name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            kl["kl-4"], clip(12), clip(12, 16), clip_tokenizer(), clip_tokenizer(), model, scheduler
        )
    if name == "sd3-medium":
        return diffusers.StableDiffusion3Pipeline(
            model, scheduler, kl["kl-16"], clip(12, 6), clip_tokenizer(), clip(12, 6),
            clip_tokenizer(), t5(), t5_tokenizer(),
        )  # fmt: skip
    if name == "flux1-dev":
        return diffusers.FluxPipeline(
            scheduler, kl["kl-16"], clip(12), clip_tokenizer(), t5(), t5_tokenizer(), model
        )
    if name == "pixart-alpha":
        return diffusers.PixArtAlphaPipeline(t5_tokenizer(), t5(), kl["kl-4"], model, scheduler)
    if name == "wan2.1-1.3b":
        vae = diffusers.AutoencoderKLWan.from_config(TINY_VAES["wan"])
        return diffusers.WanPipeline(t5_tokenizer(), umt5(), vae, scheduler, model)
    assert name == "svd", name
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=224, patch_size=112, projection_dim=24,
    )  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        diffusers.AutoencoderKLTemporalDecoder.from_config(TINY_VAES["svd"]),
        transformers.CLIPVisionModelWithProjection(vision).eval(),
        model,
        scheduler,
        transformers.CLIPImageProcessorPil(crop_size=224, size=224),
    )
