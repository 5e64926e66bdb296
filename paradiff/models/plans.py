"""From a catalogue entry, or a user's own configuration file, to the stages that are traced."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from paradiff.models import stages
from paradiff.models.catalogue import (
    CATALOGUE,
    Entry,
    decoder_strips,
    latent_probes,
    text_probes,
    transformer_probes,
    unet_probes,
)
from paradiff.models.encoders import SCHEDULERS, TRANSFORMERS, VAES
from paradiff.models.fitting import expr
from paradiff.models.interception import UNET_CLASSES
from paradiff.models.stages import DENOISERS, Shape, StageSpec, build_diffusers, build_transformers
from paradiff.profiles import Geometry, InvalidProfile, Profile, parse_expr

BATCHED = (
    "FluxTransformer2DModel",
    "UNetSpatioTemporalConditionModel",
    "LatteTransformer3DModel",
    "MochiTransformer3DModel",
)
"""Denoisers that save copies for a batch of one: see ``_batched``."""

LISTS = {"block_out_channels", "patch_size", "sample_size"}
SIZES = {"in_channels", "out_channels", "patch_size_t", "text_len", "text_len_t5", *LISTS}
UNSET = {"out_channels", "patch_size_t", "sample_size"}
"""Of a user's configuration: what is a size, which of these may be lists, and which may be null."""

Config = Mapping[str, Any]
Symbols = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A model to trace. ``asyncdiff``: degree -> owner of a cut, by the longest prefix of its
    name (AsyncDiff's published tables). ``skips`` as in the profile."""

    name: str
    kind: Literal["unet", "transformer"]
    geometry: Geometry
    defaults: Mapping[str, int]
    stages: tuple[StageSpec, ...]
    configurations: Mapping[str, Any]
    text_mode: str | None = None
    asyncdiff: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    skips: tuple[tuple[int, int], ...] = ()


def plan_for(name_or_config_path: str) -> Plan:
    """The plan of a catalogue model, of a diffusers config.json, or of a folder with one.

    A folder may be a whole pipeline: its ``unet`` or ``transformer`` is traced, with ``vae`` if it
    is an AutoencoderKL. Text encoders are those of the catalogue model of the same class.
    Raises InvalidProfile.
    """
    if name_or_config_path in CATALOGUE:
        return plan_of(name_or_config_path, CATALOGUE[name_or_config_path])
    path = Path(name_or_config_path)
    if not path.exists():
        known = ", ".join(CATALOGUE)
        raise InvalidProfile(f"{path}: no such file, and no model of that name; models: {known}")
    return _user_plan(path)


def plan_of(name: str, entry: Entry, vae_config: Config | None = None) -> Plan:
    """All stages of ``entry``, the VAE with ``vae_config`` instead of the catalogue's if given."""
    height, width, frames, steps = entry.size
    base = _base_shape(entry)
    build = partial(_one, build_diffusers, entry.class_name, entry.config)
    is_unet = entry.class_name in UNET_CLASSES
    video = frames > 1
    if is_unet:
        levels = tuple(2**i for i in range(entry.geometry.row_multiple.bit_length()))
        probes = unet_probes(base, video, second_text=len(entry.geometry.text_tokens) > 1)
    else:
        levels = (entry.geometry.row_multiple,)
        probes = transformer_probes(base, video, entry.geometry.row_multiple)
    if entry.class_name in BATCHED:
        probes = _batched(probes)
    if entry.class_name == "HunyuanDiT2DModel":
        probes = tuple({**probe, "t": base["t"], "s": base["s"]} for probe in probes)
    frame_levels = tuple(sorted({1, entry.geometry.frame_multiple}))
    denoiser = StageSpec(
        "denoiser",
        build,
        stages.call_denoiser,
        probes,
        levels,
        is_denoiser=True,
        in_strips=True,
        frame_levels=frame_levels,
    )
    vae = VAES[entry.vae] if vae_config is None else (VAES[entry.vae][0], vae_config)
    configurations: dict[str, Any] = {
        "denoiser": {"class": entry.class_name, **entry.config},
        "vae": {"class": vae[0], **vae[1]},
        "scheduler": {"class": SCHEDULERS[entry.scheduler][0], **SCHEDULERS[entry.scheduler][1]},
    }
    for stage, encoder, _, _ in entry.text:
        configurations[stage] = {"class": TRANSFORMERS[encoder][0], **TRANSFORMERS[encoder][2]}
    return Plan(
        name=name,
        kind="unet" if is_unet else "transformer",
        geometry=entry.geometry,
        defaults={"height": height, "width": width, "frames": frames, "steps": steps},
        stages=(
            *_text_stages(entry, base),
            denoiser,
            *_decoder_stages(entry, base, vae),
            *_step_stages(entry, base),
        ),
        configurations=configurations,
        text_mode=entry.text_mode,
        asyncdiff=entry.asyncdiff,
        skips=_skips(entry),
    )


def _skips(entry: Entry) -> tuple[tuple[int, int], ...]:
    """HunyuanDiT: block l feeds block L - 1 - l, but for the two in the middle."""
    if entry.class_name != "HunyuanDiT2DModel":
        return ()
    layers = entry.config.get("num_layers", 28)
    return tuple((block, layers - 1 - block) for block in range(layers // 2 - 1))


def _base_shape(entry: Entry) -> dict[str, int]:
    """The latent that the model's defaults mean, one branch of one request."""
    height, width, frames, _ = entry.size
    profile = Profile("", "unet", {}, entry.geometry, {}, {}, None, {})
    return profile.latent_shape(height, width, frames, 1)


def _batched(probes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Probes of at least two requests. Where a batch of one saves copies (a slice of it is
    contiguous), launches differ with the batch, and the profile is that of larger ones: exact in
    FLOPs, and for one request too high by those copies."""
    return tuple({**probe, "b": probe["b"] + 1} for probe in probes)


def _one(build: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    return (build(*args),)


def _transformer(name: str) -> Any:
    return build_transformers(*TRANSFORMERS[name])


def _text_stages(entry: Entry, base: Shape) -> list[StageSpec]:
    specs = []
    for stage, encoder, call, fixed in entry.text:
        tokens = base["t"] if fixed is None else fixed
        shape = () if fixed is None else (("t", str(fixed)),)
        build = partial(_one, _transformer, encoder)
        probes = text_probes(tokens)
        if encoder == "clap":
            probes = _batched(probes)
        specs.append(StageSpec(stage, build, call, probes, shape=shape))
    if entry.class_name == "AudioLDM2UNet2DConditionModel":
        call = stages.call_language_model
        specs.append(StageSpec("text_encoder_3", _language_model, call, text_probes(base["t"])))
    if entry.class_name == "UNetSpatioTemporalConditionModel":
        probes = latent_probes({**base, "f": 1}, video=False, unit=1)
        call = stages.call_image_encoder
        specs.append(StageSpec("image_encoder", _image_encoder, call, probes))
    return specs


def _language_model() -> tuple[Any, ...]:
    config = {"text_encoder_dim": 512, "text_encoder_1_dim": 1024, "langauge_model_dim": 768}
    return build_diffusers("AudioLDM2ProjectionModel", config), _transformer("gpt2")


def _image_encoder() -> tuple[Any, ...]:
    vae: Any = build_diffusers(*VAES["svd"])
    return _transformer("clip-vision-h"), vae.encoder, vae.quant_conv


def _svd_decoder(*vae: Any) -> tuple[Any, ...]:
    module: Any = build_diffusers(*vae)
    return (module.decoder,)


def _decoder_stages(entry: Entry, base: Shape, vae: tuple[str, Config]) -> list[StageSpec]:
    """The VAE's decoder, and what comes after it."""
    build = partial(_one, build_diffusers, *vae)
    image = latent_probes(base, video=False, unit=1)
    if vae[0] == "AutoencoderKLCogVideoX":
        return _cogvideox_chunks(base, build)
    if vae[0] == "AutoencoderKLWan":
        return _wan_chunks(base, build)
    if vae[0] == "AutoencoderKLHunyuanVideo":
        return _hunyuan_video_tiles(base, build)
    if vae[0] == "AutoencoderKLMochi":
        probes = _batched(_video_strips({**_small(base), "f": 7}))
        return [StageSpec("vae", build, stages.call_decode_video, probes, in_strips=True)]
    if entry.class_name == "LatteTransformer3DModel":
        return _image_chunks(base, build)
    if vae[0] == "AutoencoderKLTemporalDecoder":
        build, probes = partial(_svd_decoder, *vae), _batched(_video_strips(base))
        return [StageSpec("vae", build, stages.call_svd_decode, probes, in_strips=True)]
    probes = (*image, *decoder_strips(video=False))
    specs = [StageSpec("vae", build, stages.call_decode, probes, in_strips=True)]
    if entry.class_name == "AudioLDM2UNet2DConditionModel":
        vocoder = partial(_one, _transformer, "hifigan")
        specs.append(StageSpec("vocoder", vocoder, stages.call_vocoder, image))
    return specs


def _video_strips(base: Shape) -> tuple[Shape, ...]:
    """Whole videos and strips of some."""
    return (*latent_probes(base, video=True, unit=1), *decoder_strips(video=True))


def _small(base: Shape) -> Shape:
    """Half the size or less: above 2 GiB the causal VAEs of CogVideoX and Mochi split a convolution,
    which costs copies but no FLOPs."""
    divisor = 2 if base["r"] * base["w"] <= 6000 else 4
    return {**base, **{symbol: base[symbol] // divisor for symbol in "rwk"}}


def _cogvideox_chunks(base: Shape, build: Callable[[], tuple[Any, ...]]) -> list[StageSpec]:
    """The causal VAE decodes two latent frames at a time; an odd number starts with three.

    Of the two first chunks the one of the wrong parity has repeat 0; at least two frames."""
    base = _small(base)

    def first(name: str, frames: int, repeat: str) -> StageSpec:
        probes = latent_probes({**base, "f": frames}, video=False, unit=1, frames=frames)
        probes = _batched(probes)
        return StageSpec(
            name,
            build,
            stages.call_first_chunk,
            probes,
            repeat=repeat,
            shape=(("f", str(frames)),),
            owns_parameters=False,
        )

    probes = _batched(latent_probes({**base, "f": 2}, video=False, unit=1, frames=2))
    return [
        first("vae_first_odd", 3, "2*f2 - f"),
        first("vae_first_even", 2, "f + 1 - 2*f2"),
        StageSpec(
            "vae", build, stages.call_next_chunk, probes, repeat="f - f2 - 1", shape=(("f", "2"),)
        ),
    ]


def _wan_chunks(base: Shape, build: Callable[[], tuple[Any, ...]]) -> list[StageSpec]:
    """The causal VAE decodes one latent frame at a time; of at least two frames."""

    def chunk(name: str, index: int, repeat: str) -> StageSpec:
        return StageSpec(
            name,
            build,
            stages.call_wan_chunk(index),
            _batched(_video_strips(base)),
            repeat=repeat,
            owns_parameters=name == "vae",
            in_strips=True,
        )

    return [chunk("vae_first", 0, "1"), chunk("vae_second", 1, "1"), chunk("vae", 2, "f - 2")]


_ONE_LEFT = "2*f3 - f2 - f6 + 4*f2*f6 - 2*f*f6 - 2*f2*f3 + f*f3"
"""1 iff f = 1 modulo 3, else 0: as sums of products of ceilings can say it."""
_NONE_LEFT = f"1 - 3*f3 + f + {_ONE_LEFT}"
"""1 iff f = 0 modulo 3, else 0: since 3 f3 - f is 0, 2, 1 for f = 0, 1, 2 modulo 3."""


def _hunyuan_video_tiles(base: Shape, build: Callable[[], tuple[Any, ...]]) -> list[StageSpec]:
    """The VAE decodes five latent frames from every third: the last two tiles may have less.

    Exact from five latent frames on, and for two and three. Not tiled in space, which is off by
    default."""

    def whole(frames: int) -> tuple[Shape, ...]:
        return latent_probes({**base, "f": frames}, video=False, unit=1, frames=frames)

    def tile(frames: int, repeat: str) -> StageSpec:
        return StageSpec(
            "vae" if frames == 5 else f"vae_tile_{frames}",
            build,
            stages.call_hunyuan_video_tile(blended=frames == 5),
            _batched((*whole(frames), *decoder_strips(video=False, frames=frames))),
            repeat=str(expr(parse_expr(repeat).terms)),
            shape=(("f", str(frames)),),
            owns_parameters=frames == 5,
            in_strips=True,
        )

    one, none = _ONE_LEFT, _NONE_LEFT
    minus_one = _negative(one)
    return [
        tile(5, f"f3 - 1 {minus_one}"),
        tile(4, one),
        tile(3, none),
        tile(2, f"3*f3 - f {minus_one} {minus_one}"),
        tile(1, one),
        StageSpec(
            "vae_join",
            tuple,
            stages.call_hunyuan_video_join,
            latent_probes(base, video=True, unit=1),
        ),
    ]


def _negative(sum_of_products: str) -> str:
    """The terms of ``- (sum_of_products)``."""
    flipped = {"+": "-", "-": "+"}
    return "- " + "".join(flipped.get(character, character) for character in sum_of_products)


def _image_chunks(base: Shape, build: Callable[[], tuple[Any, ...]]) -> list[StageSpec]:
    """Latte decodes with an image VAE, 14 frames at a time, the rest last."""
    probes, call = _video_strips(base), stages.call_decode_frames
    return [
        StageSpec(
            "vae_chunks",
            build,
            call,
            probes,
            repeat="f14 - 1",
            shape=(("f", "14"),),
            owns_parameters=False,
            in_strips=True,
        ),
        StageSpec("vae", build, call, probes, shape=(("f", "f - 14*f14 + 14"),), in_strips=True),
    ]


def _step_stages(entry: Entry, base: Shape) -> list[StageSpec]:
    """Scheduler and guidance, on latents laid out as the pipeline of the class has them."""
    g = entry.geometry
    video = base["f"] > 1
    unit = 2 if entry.class_name == "FluxTransformer2DModel" else 1
    probes = latent_probes(base, video, unit)
    depth = g.frame_multiple
    frame_levels = tuple(sorted({1, depth}))
    latent = partial(_latent_sizes, entry.class_name, g.channels, depth)
    class_name, config = SCHEDULERS[entry.scheduler]
    step = stages.call_scheduler(class_name, config, latent)
    specs = [StageSpec("scheduler", tuple, step, probes, levels=(unit,), frame_levels=frame_levels)]
    if g.guidance == "cfg":
        channels = entry.config.get("out_channels", 8) if _learns_sigma(entry) else g.channels
        predicted = partial(_latent_sizes, entry.class_name, channels, depth)
        call = stages.call_guidance(predicted)
        specs.append(
            StageSpec("guidance", tuple, call, probes, levels=(unit,), frame_levels=frame_levels)
        )
    return specs


def _learns_sigma(entry: Entry) -> bool:
    """PixArt and Latte predict the variance beside the noise; guidance mixes both, the scheduler
    one. (HunyuanDiT's pipeline drops the variance first.)"""
    return entry.class_name in ("PixArtTransformer2DModel", "LatteTransformer3DModel")


def _latent_sizes(class_name: str, channels: int, depth: int, s: Shape) -> tuple[int, ...]:
    """Flux's pipeline keeps its latents packed."""
    if class_name == "FluxTransformer2DModel":
        return s["b"], s["r"] // 2 * (s["w"] // 2), 4 * channels
    return stages.latent_sizes(class_name, channels, depth, s)


# ------------------------------------------------------------------------------ a user's own model


def _user_plan(path: Path) -> Plan:
    file = _find_config(path)
    config = _read_config(file)
    class_name = config.get("_class_name")
    if class_name not in DENOISERS:
        known = ", ".join(DENOISERS)
        raise InvalidProfile(f"{file}: _class_name {class_name!r} is not supported; known: {known}")
    _check_sizes(file, config, UNSET)
    template = CATALOGUE[_template(class_name, config)]
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    vae_file = file.parent.parent / "vae" / "config.json"
    vae = _read_config(vae_file) if path.is_dir() and vae_file.exists() else {}
    _check_sizes(vae_file, vae, UNSET | {"patch_size"})  # Wan's VAE cuts no patches
    same_vae = vae.get("_class_name") == VAES[template.vae][0]
    vae_config = {k: v for k, v in vae.items() if not k.startswith("_")} if same_vae else None
    entry = replace(
        template,
        config=plain,
        geometry=_user_geometry(class_name, template, plain, vae_config),
        asyncdiff={},
    )
    side = plain.get("sample_size")
    if isinstance(side, int) and class_name in (
        "UNet2DConditionModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel",
    ):
        pixels = side * entry.geometry.scale
        entry = replace(entry, size=(pixels, pixels, *entry.size[2:]))
    name = path.resolve().name if path.is_dir() else file.stem
    return plan_of(name, entry, vae_config)


def _find_config(path: Path) -> Path:
    if path.is_file():
        return path
    for inside in ("config.json", "unet/config.json", "transformer/config.json"):
        if (path / inside).is_file():
            return path / inside
    raise InvalidProfile(f"{path}: no config.json, unet/config.json or transformer/config.json")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidProfile(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidProfile(f"{file}: a configuration is a JSON object")
    return config


def _check_sizes(file: Path, config: Mapping[str, Any], unset: Set[str]) -> None:
    """Raises InvalidProfile for the first of SIZES that is no positive whole number or list of such,
    nor null where ``unset`` allows that."""
    for key in sorted(SIZES & config.keys()):
        given = config[key]
        if given is None and key in unset:
            continue
        values = given if isinstance(given, list) and key in LISTS else [given]
        if not values or any(type(value) is not int or value < 1 for value in values):
            allowed = "positive whole numbers" if key in LISTS else "a positive whole number"
            raise InvalidProfile(f"{file}: {key}: not allowed ({given!r}), allowed: {allowed}")


def _template(class_name: str, config: Config) -> str:
    """The catalogue model whose encoders, VAE and scheduler stand in."""
    if class_name == "UNet2DConditionModel":
        if config.get("addition_embed_type") == "text_time":
            return "sdxl"
        return "sd15" if config.get("cross_attention_dim") == 768 else "sd21"
    return next(name for name, entry in CATALOGUE.items() if entry.class_name == class_name)


def _user_geometry(
    class_name: str, template: Entry, config: Config, vae: Config | None
) -> Geometry:
    geometry = replace(template.geometry, frame_multiple=config.get("patch_size_t") or 1)
    if class_name in UNET_CLASSES and "block_out_channels" in config:
        geometry = replace(geometry, row_multiple=2 ** (len(config["block_out_channels"]) - 1))
    elif class_name != "FluxTransformer2DModel" and "patch_size" in config:
        patch = config["patch_size"]
        rows = patch[1] if isinstance(patch, list) else patch  # Wan: frames, rows, columns
        geometry = replace(geometry, row_multiple=rows)
    if class_name == "HunyuanDiT2DModel":
        text = (config.get("text_len", 77), config.get("text_len_t5", 256))
        geometry = replace(geometry, text_tokens=text)
    if class_name == "FluxTransformer2DModel":
        geometry = replace(geometry, channels=config.get("in_channels", 64) // 4)
        guidance = "embedded" if config.get("guidance_embeds") else "none"
        geometry = replace(geometry, guidance=guidance)
    elif class_name == "UNetSpatioTemporalConditionModel":
        geometry = replace(geometry, channels=config.get("out_channels", 4))
    elif "in_channels" in config:
        geometry = replace(geometry, channels=config["in_channels"])
    if vae and "block_out_channels" in vae:
        geometry = replace(geometry, scale=2 ** (len(vae["block_out_channels"]) - 1))
    return geometry
