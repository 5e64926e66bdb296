"""Profiles as files: they load, round-trip, say what is wrong; and what the shipped ones add up to."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiff.profiles import (
    SYMBOLS,
    Expr,
    InvalidProfile,
    Profile,
    load_profile,
    parse_expr,
    profile_from_json,
    profile_to_json,
)

FOLDER = Path(__file__).parents[1] / "hardware_profiles" / "models"
FILES = sorted(FOLDER.glob("*.json"))


def shipped(name: str) -> Profile:
    return load_profile(FOLDER / f"{name}.json")


def at(profile: Profile, batch: int = 1, **size: int) -> dict[str, int]:
    """Symbols of a whole network call, at the defaults but for ``size``."""
    keys = ("height", "width", "frames")
    return profile.latent_shape(**{k: size.get(k, profile.defaults[k]) for k in keys}, batch=batch)


# ----------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_profile_loads_and_round_trips(path: Path) -> None:
    data = json.loads(path.read_text("utf-8"))
    profile = load_profile(path)
    assert profile_to_json(profile) == data
    assert profile_from_json(data) == profile
    assert profile.name == path.stem
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_profile_is_whole(path: Path) -> None:
    """Weights used do not exceed parameters; a kv segment is the attention alone; every default
    shape gives positive sizes; segment names are unique."""
    profile = load_profile(path)
    shape = at(profile)
    for stage in profile.stages.values():
        assert sum(segment.weights for segment in stage.segments) <= stage.params
        bound = stage.bind(shape)
        for segment in stage.segments:
            assert segment.live(bound) > 0
            assert all(kernel.count > 0 for kernel in segment.kernels)
            assert all(dim(bound) > 0 for kernel in segment.kernels for dim in kernel.dims)
    denoiser = profile.denoiser
    assert sum(segment.weights for segment in denoiser.segments) == denoiser.params
    assert all(0 <= segment.shared <= segment.weights for segment in denoiser.segments)
    assert len({segment.name for segment in denoiser.segments}) == len(denoiser.segments)
    for index, _ in denoiser.points("kv"):
        kernels = denoiser.segments[index].kernels
        assert [(kernel.kind, kernel.count) for kernel in kernels] == [("attention", 1)]
    assert {"denoiser", "vae", "scheduler"} <= profile.stages.keys()
    assert ("guidance" in profile.stages) == (profile.geometry.guidance == "cfg")


MALFORMED = {
    "not JSON": "{",
    "schema None": "[]",
    "schema 'other'": '{"schema": "other"}',
    "missing or malformed entry: KeyError": '{"schema": "paradiff.profile/1"}',
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_file_is_reported_with_its_path(tmp_path: Path, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(MALFORMED[message])
    with pytest.raises(InvalidProfile, match=message) as error:
        load_profile(path)
    assert str(error.value).startswith(str(path))


def damaged(keys: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = json.loads((FOLDER / "pixart-alpha.json").read_text("utf-8"))
    place = data
    for key in keys[:-1]:
        place = place[key]
    if value is KeyError:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return data


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("kind",), "gan", "kind 'gan'"),
        (("stages", "denoiser"), KeyError, "no denoiser"),
        (("stages", "denoiser", "params"), "many", "'many'"),
        (("stages", "denoiser", "repeat"), "2*q", "cannot read 'q'"),
        (("stages", "denoiser", "cuts", 0, 3), 999, "transformer_blocks.0: 1 to 999"),
        (("stages", "denoiser", "segments", 0, "kernels"), -1, "KeyError"),
        (("stages", "denoiser", "segments", 2, "point", "kind"), "qk", "kv, halo, moments"),
        (("stages", "denoiser", "segments", 3, "total", "kind"), "max", "one of sum, squares"),
        (("kernels", 0, 0, 0), "fft", "kernel .'fft'"),
        (("kernels", 0, 0, 1), 1.5, "1.5: a non-negative integer"),
        (("geometry", "scale"), KeyError, "KeyError.'scale'"),
        (("geometry", "guidance"), "negative", "guidance 'negative'"),
        (("geometry", "frame_multiple"), 0, "frame_multiple 0: at least 1"),
        (("defaults", "steps"), KeyError, "no steps"),
        (("asyncdiff", "2"), [0], "asyncdiff 2: 1 owners"),
        (("asyncdiff", "two"), [0], "malformed"),
        (("skips",), [[3, 1]], "skips: 3 to 1"),
        (("skips",), [[0, 28]], "skips: 0 to 28"),
    ],
)
def test_damage_is_named(keys: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(InvalidProfile, match=message):
        profile_from_json(damaged(keys, value))


def _places(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(data, dict):
        inner = list(data.items())
    elif isinstance(data, list):
        inner = list(enumerate(data))[:3]
    else:
        return [prefix]
    below = [place for key, value in inner for place in _places(value, (*prefix, key))]
    return [*([prefix] if prefix else []), *below]


PIXART = json.loads((FOLDER / "pixart-alpha.json").read_text("utf-8"))


@settings(max_examples=200)
@given(st.sampled_from(_places(PIXART)), st.sampled_from([KeyError, None, 7, "x", [], {}]))
def test_any_damage_is_invalid_or_harmless(keys: tuple[Any, ...], value: Any) -> None:
    """Never an exception of another kind."""
    data = copy.deepcopy(PIXART)
    place = data
    for key in keys[:-1]:
        place = place[key]
    if value is KeyError:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    with contextlib.suppress(InvalidProfile):
        profile_from_json(data)


# ----------------------------------------------------------------------------------- expressions

atoms = st.tuples(st.sampled_from(SYMBOLS), st.integers(1, 16))
terms = st.tuples(
    st.integers(-(10**12), 10**12).filter(bool),
    st.tuples(st.lists(atoms, max_size=4), st.sampled_from([[], [("p", 1)]])).map(
        lambda each: (*each[0], *each[1])
    ),
)
expressions = st.lists(terms, max_size=4).map(lambda each: Expr(tuple(each)))
shapes = st.fixed_dictionaries(
    {symbol: st.integers(0, 5000) for symbol in SYMBOLS}, optional={"p": st.integers(1, 8)}
)


@given(expressions, shapes)
def test_expression_round_trips_and_keeps_its_value(
    expression: Expr, shape: dict[str, int]
) -> None:
    again = parse_expr(str(expression))
    assert again == expression
    assert again(shape) == expression(shape)


@given(shapes)
def test_expression_agrees_with_python(shape: dict[str, int]) -> None:
    b, r, w, t = (shape[symbol] for symbol in "brwt")
    assert parse_expr("3*b*r4*w4 + 77*b*t - t + 840*t/p")(shape) == (
        3 * b * -(-r // 4) * -(-w // 4) + 77 * b * t - t + 840 * t // shape.get("p", 1)
    )


@given(st.text(alphabet="bfrwktshp0123456789*/+- ²x.", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidProfile):
        assert isinstance(parse_expr(text)(dict.fromkeys(SYMBOLS, 3)), int)


# ------------------------------------------------------------------- what shipped profiles add up to


@pytest.mark.parametrize(
    ("name", "kv", "moments", "halo"),
    [
        # DistriFusion registers these and leaves conv_in out. SDXL: 10 self attentions at 640 and
        # 60 at 1280 channels; 17 resnets x 2 + 11 transformers + 1 = 46 GroupNorms; 17 x 2
        # convolutions + 2 down + 2 up + conv_out = 39. SD2.1 likewise: 22 resnets, 16
        # transformers: 44 + 16 + 1 = 61 and 44 + 3 + 3 + 1 = 51.
        ("sdxl", 70, 46, 39),
        ("sd21", 16, 61, 51),
        ("sd15", 16, 61, 51),
        # One attention per block; no convolution and no GroupNorm.
        ("pixart-alpha", 28, 0, 0),
        ("sd3-medium", 24, 0, 0),
        ("sd3.5-large", 38, 0, 0),
        ("flux1-dev", 19 + 38, 0, 0),
        ("flux1-schnell", 19 + 38, 0, 0),
        ("cogvideox-2b", 30, 0, 0),
        ("cogvideox-5b", 42, 0, 0),
        ("cogvideox1.5-5b", 42, 0, 0),
        ("wan2.1-1.3b", 30, 0, 0),
        ("wan2.1-14b", 40, 0, 0),
        ("hunyuandit", 40, 0, 0),
        ("mochi", 48, 0, 0),
        ("hunyuanvideo", 20 + 40, 0, 0),  # not the two of its token refiner
        ("latte", 28, 0, 0),  # not the 28 temporal ones
    ],
)
def test_exchange_points(name: str, kv: int, moments: int, halo: int) -> None:
    denoiser = shipped(name).denoiser
    counts = {kind: len(list(denoiser.points(kind))) for kind in ("kv", "moments", "halo")}
    assert counts == {"kv": kv, "moments": moments, "halo": halo}


@pytest.mark.parametrize(
    ("size", "n", "attention", "convolution"),
    [
        # Millions of elements that one of n devices publishes in a step of SDXL, batch 1:
        # attention sum 2 (s_l / n) C_l, e.g. n = 8: 2 (10 x 4096 x 640 + 60 x 1024 x 1280) / 8;
        # convolutions sum 2 C_l W_l, whatever n.
        (1024, 8, "26.214", "4.096"),
        (1024, 4, "52.429", "4.096"),
        (1024, 2, "104.858", "4.096"),
        (2048, 8, "104.858", "8.192"),
        (3840, 8, "368.640", "15.360"),
    ],
)
def test_what_distrifusion_publishes(size: int, n: int, attention: str, convolution: str) -> None:
    sdxl = shipped("sdxl")
    whole = at(sdxl, height=size, width=size)
    strip = {**whole, "r": whole["r"] // n, "h": 2}

    def published(kind: str) -> int:
        return sum(point.elements(strip) for _, point in sdxl.denoiser.points(kind))

    assert f"{published('kv') / 1e6:.3f}" == attention
    assert f"{published('halo') / 1e6:.3f}" == convolution
    assert published("moments") == 46 * 2 * 32  # mean and mean of squares of 32 groups
    gigabytes = (n - 1) * 2 * sum(map(published, ("kv", "halo", "moments"))) / 1e9
    paper = {(1024, 8): 0.42, (3840, 8): 5.38}
    assert gigabytes == pytest.approx(paper.get((size, n), gigabytes), abs=0.01)


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        # AsyncDiff's broadcasts of a round, fp16, two branches: blocks of one owner go as their
        # whole output tuple (a down block's hidden state twice), cut blocks in pieces.
        ("sdxl", {2: 257, 3: 257, 4: 276}),
        ("sd21", {2: 146, 3: 128, 4: 187}),
        ("sd15", {2: 65, 3: 73, 4: 65}),
    ],
)
def test_what_asyncdiff_broadcasts(name: str, megabytes: dict[int, int]) -> None:
    profile = shipped(name)
    shape = at(profile, batch=2)
    parents = dict(profile.denoiser.parents)
    for n, expected in megabytes.items():
        owners: dict[str, set[int]] = {}
        for cut, owner in zip(profile.denoiser.cuts, profile.asyncdiff[n], strict=True):
            owners.setdefault(cut.parent, set()).add(owner)
        whole = sum(parents[p](shape) for p, who in owners.items() if len(who) == 1)
        pieces = sum(cut.out(shape) for cut in profile.denoiser.cuts if len(owners[cut.parent]) > 1)
        assert round((whole + pieces) * 2 / 1e6) == expected
        assert set(profile.asyncdiff[n]) == set(range(n))


def test_what_sd3_carries_between_blocks() -> None:
    """(4096 image + 333 text) x 1536 x 2 bytes x 2 branches = 27.2 MB; the last block has no text."""
    sd3 = shipped("sd3-medium")
    shape = at(sd3, batch=2)
    first, *_, last = sd3.denoiser.cuts
    assert first.out(shape) * 2 == 2 * (4096 + 333) * 1536 * 2
    assert first.text_out(shape) == 2 * 333 * 1536
    assert (last.out(shape), last.text_out(shape)) == (2 * 4096 * 1536, 0)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("sdxl", (32, 32, 32, 32)),
        ("sd21", (32, 32, 32)),
        ("pixart-alpha", (44, 44, 40)),
        ("flux1-dev", (34, 34, 34, 26)),
        ("latte", (22, 22, 20)),
        ("hunyuanvideo", (30, 30, 30)),
        ("wan2.1-1.3b", (16, 16, 28)),
        ("audioldm2-large", (88, 88, 74)),  # 250 rows are not a multiple of 8: uneven and ragged
    ],
)
def test_strips_share_the_work(name: str, rows: tuple[int, ...]) -> None:
    """Strips that see all keys do the whole's attention and convolutions between them, exactly;
    GEMMs on text and time are repeated by each."""
    profile = shipped(name)
    whole = at(profile)
    assert sum(rows) == whole["r"]

    def flops(shape: dict[str, int], *, kinds: tuple[str, ...]) -> int:
        segments = profile.denoiser.segments
        return sum(k.flops(shape) for s in segments for k in s.kernels if k.kind in kinds)

    last = len(rows) - 1
    strips = [{**whole, "r": r, "h": 1 if i in (0, last) else 2} for i, r in enumerate(rows)]
    joint = any(point.joint_text for _, point in profile.denoiser.points("kv"))
    exact = ("conv",) if joint else ("conv", "attention")
    assert sum(flops(s, kinds=exact) for s in strips) == flops(whole, kinds=exact)
    gemms = sum(flops(s, kinds=("gemm",)) for s in strips) - flops(whole, kinds=("gemm",))
    nothing = {**whole, "r": 0, "k": 0}
    assert gemms == (len(rows) - 1) * flops(nothing, kinds=("gemm",))


def test_skip_connections_of_hunyuandit() -> None:
    """40 blocks: 0 feeds 39, ..., 18 feeds 21; 19 and 20 are in the middle. No other model has any."""
    assert shipped("hunyuandit").skips == tuple((block, 39 - block) for block in range(19))
    assert [path.stem for path in FILES if load_profile(path).skips] == ["hunyuandit"]


def test_latent_shape_names_the_nearest_size() -> None:
    with pytest.raises(ValueError, match="height 1001: flux1-dev takes multiples of 16; nearest"):
        shipped("flux1-dev").latent_shape(1001, 1024, 1, 1)
    with pytest.raises(ValueError, match="frames 3: flux1-dev makes single images; nearest 1"):
        shipped("flux1-dev").latent_shape(1024, 1024, 3, 1)
    with pytest.raises(ValueError, match=r"frames 50: cogvideox-2b takes 4 n \+ 1"):
        shipped("cogvideox-2b").latent_shape(480, 720, 50, 1)
    for name in ("cogvideox-2b", "wan2.1-1.3b", "hunyuanvideo"):
        with pytest.raises(ValueError, match=r"frames 1: too few for the vae of .*; nearest 5"):
            shipped(name).latent_shape(480, 720 - 720 % 16, 1, 1)
