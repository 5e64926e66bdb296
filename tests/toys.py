"""Small made-up profiles for closed forms: costs are set by hand, one FLOP at a time."""

from __future__ import annotations

from dataclasses import replace

from paradiff.profiles import (
    Cut,
    Geometry,
    Kernel,
    Point,
    Profile,
    Segment,
    Stage,
    Total,
    parse_expr,
)

E = parse_expr


def work(flops: str) -> tuple[Kernel, ...]:
    """One GEMM of twice ``flops`` / 2 operations: ``2 * 1 * m * 1 * k`` with k = 1 and m = the text."""
    return (Kernel("gemm", 1, (E("1"), E(flops), E("1"), E("1"))),)


def attention(heads: int = 4, head_dim: int = 2, text: str = "") -> tuple[Kernel, ...]:
    tokens = "w*r" + (f" + {text}" if text else "")
    keys = "w*k" + (f" + {text}" if text else "")
    dims = ("b", str(heads), tokens, keys, str(head_dim), str(head_dim))
    return (Kernel("attention", 1, tuple(map(E, dims))),)


def one(name: str, flops: str, repeat: str = "1") -> Stage:
    segment = Segment(name, work(flops), 10, E("b*r*w"))
    return Stage(name, (segment,), 10, E(repeat))


def transformer(
    blocks: int = 4, *, joint: bool = False, per_row: int = 8, text: int = 6, heads: int = 4
) -> Profile:
    """``blocks`` blocks of (qkv, attention, mlp); ``heads`` of hidden 8; row multiple 1."""
    segments, cuts = [Segment("embed", work(f"{per_row}*b*r*w"), 16, E("16*b*r*w"))], []
    for i in range(blocks):
        lo = len(segments)
        attend = attention(heads, 8 // heads, "t" if joint else "")
        point = Point("kv", E("16*b*r*w"), heads, 8 // heads, joint)
        segments += [
            Segment(f"block{i}.qkv", work(f"{per_row}*b*r*w"), 64, E("32*b*r*w")),
            Segment(f"block{i}.attn", attend, 0, E("32*b*r*w"), point),
            Segment(f"block{i}.mlp", work(f"{2 * per_row}*b*r*w"), 128, E("40*b*r*w")),
        ]
        out = "8*b*r*w + 8*b*t" if joint else "8*b*r*w"
        words = "8*b*t" if joint else "0*b"
        cuts.append(Cut(f"block{i}", f"block{i}", lo, len(segments), E(out), E(words)))
    segments.append(Segment("head", work(f"{per_row}*b*r*w"), 16, E("16*b*r*w")))
    weights = sum(s.weights for s in segments)
    return Profile(
        name="toy-dit",
        kind="transformer",
        source={"class": "toy"},
        geometry=Geometry(4, 1, 1, 1, (text,), "cfg"),
        defaults={"height": 16, "width": 4, "frames": 1, "steps": 6},
        stages={
            "text_encoder": one("text_encoder", "5*b"),
            "denoiser": Stage("denoiser", tuple(segments), weights, E("1"), tuple(cuts)),
            "vae": one("vae", "7*b*r*w"),
            "scheduler": one("scheduler", "b*r*w"),
            "guidance": one("guidance", "b*r*w"),
        },
        text_mode="patch0_frozen" if joint else None,
        asyncdiff={},
    )


def unet(attentions: int = 2) -> Profile:
    """conv_in; ``attentions`` blocks of (GroupNorm, conv, attention); conv_out. Three kinds of point."""
    segments = [Segment("conv_in", work("9*b*r*w"), 36, E("8*b*r*w"))]
    cuts = [Cut("conv_in", "conv_in", 0, 1, E("8*b*r*w"), E("0*b"))]
    for i in range(attentions):
        lo = len(segments)
        segments += [
            Segment(f"b{i}.norm", work("2*b*r*w"), 16, E("8*b*r*w"), Point("moments", E("4*b"))),
            Segment(f"b{i}.conv", work("18*b*r*w"), 72, E("8*b*r*w"), Point("halo", E("16*b*w"))),
            Segment(f"b{i}.attn", attention(), 0, E("8*b*r*w"), Point("kv", E("16*b*r*w"), 4, 2)),
            Segment(f"b{i}.out", work("8*b*r*w"), 64, E("8*b*r*w")),
        ]
        cuts.append(Cut(f"down.{i}.0", f"down.{i}", lo, lo + 2, E("8*b*r*w"), E("0*b")))
        cuts.append(Cut(f"down.{i}.1", f"down.{i}", lo + 2, lo + 4, E("8*b*r*w"), E("0*b")))
    end = len(segments)
    segments.append(
        Segment("conv_out", work("9*b*r*w"), 36, E("4*b*r*w"), Point("halo", E("16*b*w")))
    )
    cuts.append(Cut("conv_out", "conv_out", end, end + 1, E("4*b*r*w"), E("0*b")))
    parents = [(f"down.{i}", E("24*b*r*w")) for i in range(attentions)]
    weights = sum(s.weights for s in segments)
    stage = Stage("denoiser", tuple(segments), weights, E("1"), tuple(cuts), tuple(parents))
    return Profile(
        name="toy-unet",
        kind="unet",
        source={"class": "toy"},
        geometry=Geometry(4, 1, 1, 2, (6,), "cfg"),
        defaults={"height": 16, "width": 4, "frames": 1, "steps": 8},
        stages={
            "text_encoder": one("text_encoder", "5*b"),
            "denoiser": stage,
            "vae": one("vae", "7*b*r*w"),
            "scheduler": one("scheduler", "b*r*w"),
            "guidance": one("guidance", "b*r*w"),
        },
        text_mode=None,
        asyncdiff={},
    )


def plain(blocks: int = 4, heads: int = 4) -> Profile:
    """A transformer with work in its blocks alone: no guidance, hidden 8 wide like its 8 channels.

    Embedding, head, text, scheduler and VAE cost nothing, so a run is its blocks and its transfers.
    """
    base = transformer(blocks, heads=heads)
    free = ("embed", "head")
    segments = tuple(
        replace(s, kernels=work("0*b")) if s.name in free else s for s in base.denoiser.segments
    )
    stages = {name: one(name, "0*b") for name in ("text_encoder", "vae", "scheduler")}
    return replace(
        base,
        name="plain-dit",
        geometry=Geometry(8, 1, 1, 1, (0,), "none"),
        stages={
            "text_encoder": stages["text_encoder"],
            "denoiser": replace(base.denoiser, segments=segments),
            "vae": stages["vae"],
            "scheduler": stages["scheduler"],
        },
    )


def divided(profile: Profile) -> Profile:
    """The same transformer with weights that ranks can share, and an output projection after each
    attention: all in a block divides by p, projection and mlp leave partial sums of the stream."""
    segments: list[Segment] = []
    cuts = []
    for segment in profile.denoiser.segments:
        block, _, part = segment.name.partition(".")
        if not part:
            segments.append(segment)
            continue
        total = Total("sum", E("8*b*r*w"))
        if part == "qkv":
            lo = len(segments)
        if part == "mlp":
            out = replace(segment, name=f"{block}.out", kernels=_divided("8*b*r*w"), total=total)
            segments.append(replace(out, shared=out.weights))
        (kernel,) = segment.kernels
        if part == "attn":
            dims = (kernel.dims[0], E(f"{kernel.dims[1]}/p"), *kernel.dims[2:])
            kernels = (replace(kernel, dims=dims),)
        else:
            kernels = _divided(str(kernel.dims[1]))
        point = segment.point and replace(segment.point, elements=E(f"{segment.point.elements}/p"))
        segments.append(
            replace(
                segment,
                kernels=kernels,
                point=point,
                shared=segment.weights,
                total=total if part == "mlp" else None,
            )
        )
        if part == "mlp":
            old = profile.denoiser.cuts[len(cuts)]
            cuts.append(replace(old, lo=lo, hi=len(segments)))
    weights = sum(s.weights for s in segments)
    denoiser = replace(profile.denoiser, segments=tuple(segments), cuts=tuple(cuts), params=weights)
    stages = {**profile.stages, "denoiser": denoiser}
    return replace(profile, name=f"divided-{profile.name}", stages=stages)


def _divided(flops: str) -> tuple[Kernel, ...]:
    """``work`` of 4 times ``flops`` on 4 channels that p ranks share."""
    return (Kernel("gemm", 1, (E("1"), E(flops), E("4/p"), E("1"))),)
