"""Layer level: what sequence parallelism does inside one attention (Ulysses, Ring, USP).

Exact: every version read is of the step at hand. strategies.md 5 to 7 and 15.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from paradiff.graph import Ref, Shape
from paradiff.profiles import Point
from paradiff.strategies.builder import (
    Builder,
    Forward,
    Infeasible,
    Options,
    Tags,
    nearest_strips,
    strip,
)

Cache = Mapping[int, Sequence[Ref]]
"""rank -> K/V of other patches that it holds."""


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """Degrees and layout of the sequence axis.

    ``split_text``: the text tokens of a joint attention are sharded like image tokens; otherwise they
    are replicated, enter a ring in one iteration only, and their heads are gathered after Ulysses.
    ``phases``: (ranks inside a machine, machines) of an all-to-all in two phases; None: all at once.
    ``v_first``: V is exchanged while Q and K are still normed and rotated.
    """

    ulysses: int
    ring: int
    rotate: str
    split_text: bool
    phases: tuple[int, int] | None = None
    v_first: bool = False

    @property
    def degree(self) -> int:
        return self.ulysses * self.ring

    def tags(self, j: int, text: int) -> Tags:
        """Tags of a forward on rank j of the group: its place in the all-to-all, the blocks that a ring
        brings by, and which of ``text`` tokens it has, where they are spread."""
        if self.degree == 1:
            return ()
        tags = [("ulysses", f"{j % self.ulysses}/{self.ulysses}")]
        if self.ring > 1 and self.rotate == "p2p":
            tags.append(("ring", str(self.ring)))
        if self.split_text:
            first, last = strip(text, self.degree, j)
            tags.append(("words", f"{first}-{last}"))
        return tuple(tags)


def plan_sequence(build: Builder, options: Options, patches: int) -> SequenceParallel:
    """The sequence layout of this mesh. Raises Infeasible with the nearest legal degree."""
    mesh, profile = build.mesh, build.profile
    if mesh.sp > 1:
        if profile.kind != "transformer":
            raise Infeasible(
                f"{profile.name} is a U-Net: its convolutions need halos, which sequence parallelism"
                " does not exchange",
                nearest_strips(build, "patch", mesh.sp),
            )
        heads = build.attention[0].heads // mesh.tp
        blocks = build.rows // profile.geometry.row_multiple
        if heads % mesh.ulysses:
            whose = f" on each of {mesh.tp} tensor ranks" if mesh.tp > 1 else ""
            raise Infeasible(
                f"ulysses={mesh.ulysses}: the {heads} heads of {profile.name}{whose} do not divide by"
                f" {mesh.ulysses}",
                nearest_sequence(build),
            )
        if blocks % mesh.sp:
            raise Infeasible(
                f"sequence degree {mesh.sp}: the {blocks} token rows of {profile.name} at this size do"
                f" not divide by {mesh.sp}",
                nearest_sequence(build),
            )
    text = build.latent["t"]
    divides = build.joint_text and mesh.sp > 1 and patches == 1 and mesh.pp == 1
    split = divides and text % mesh.sp == 0 and not mixes_text(build)
    rotate, phases = options.get("rotate", "p2p"), two_phases(mesh.ulysses, options)
    v_first = is_v_first(build, options)
    return SequenceParallel(mesh.ulysses, mesh.ring, rotate, split, phases, v_first)


def two_phases(ulysses: int, options: Options) -> tuple[int, int] | None:
    """(ranks inside, machines) of ``exchange=8x2``. Raises Infeasible unless they make the degree."""
    if "exchange" not in options:
        return None
    inside, across = (int(n) for n in options["exchange"].split("x"))
    if min(inside, across) < 2 or inside * across != ulysses:
        widest = max((d for d in range(2, ulysses) if ulysses % d == 0), default=0)
        raise Infeasible(
            f"exchange={inside}x{across}: two numbers above 1 that make the {ulysses} ranks of ulysses",
            f"exchange={widest}x{ulysses // widest}" if widest else "ulysses=4,exchange=2x2",
        )
    return inside, across


def is_v_first(build: Builder, options: Options) -> bool:
    """Whether V goes first (``order=v-first``). Raises Infeasible where that is no other order."""
    if options.get("order", "qkv") == "qkv" or build.mesh.ulysses == 1:
        return False
    segments = build.denoiser.segments
    missing = [segments[at].name for at in build.points if at not in build.projections]
    if missing:
        raise Infeasible(
            f"order=v-first: in {missing[0]} of {build.profile.name} nothing is done to Q and K between"
            " V's projection, where that is a module of its own, and the attention",
            "order=qkv",
        )
    if "hsdp" in options.get("weights", ""):
        raise Infeasible(
            "order=v-first with weights=hsdp: weights are gathered where segments begin, not where V"
            " has been projected",
            "order=qkv",
        )
    return True


def mixes_text(build: Builder) -> bool:
    """Do text tokens meet before they join the image's? HunyuanVideo refines its text, Mochi pools it:
    there a rank needs all of it."""
    return any(
        kernel.kind == "attention" and any(s == "t" for _, m in kernel.dims[3].terms for s, _ in m)
        for segment in build.denoiser.segments
        if segment.point is None
        for kernel in segment.kernels
    )


def nearest_sequence(build: Builder) -> str:
    """The legal degrees nearest below those asked, and for Ulysses alone also the next one above."""
    mesh, heads = build.mesh, build.attention[0].heads // build.mesh.tp
    blocks = build.rows // build.profile.geometry.row_multiple

    def legal(u: int, r: int) -> bool:
        return heads % u == 0 and blocks % (u * r) == 0

    sizes = itertools.product(range(1, mesh.ulysses + 1), range(1, mesh.ring + 1))
    u, r = max(
        (each for each in sizes if legal(*each)), key=lambda each: (each[0] * each[1], each[0])
    )
    below = [f"ulysses={u}"] * (u > 1) + [f"ring={r}"] * (r > 1)
    above = [n for n in range(mesh.ulysses + 1, heads + 1) if mesh.ring == 1 and legal(n, 1)][:1]
    return " or ".join([",".join(below) or "ulysses=1", *(f"ulysses={n}" for n in above)])


def local_shape(build: Builder, sp: SequenceParallel, rows: int) -> Shape:
    """Shape of one rank's share of ``rows`` rows."""
    text = build.latent["t"] // (sp.degree if sp.split_text else 1)
    return build.shape(rows // sp.degree, text=text)


def attend(
    forward: Forward,
    at: int,
    sp: SequenceParallel,
    rows: int,
    keys: int,
    cache: Cache | None = None,
) -> None:
    """Run ``forward`` through the attention at segment ``at`` under sequence parallelism.

    ``rows`` are the query rows of the whole group, ``keys`` the visible key rows; ``cache`` holds, per
    rank, the older K/V that attention reads besides its own (PipeFusion).
    """
    build = forward.build
    qkv = _Exchange(build, forward, at, build.points[at], sp, forward.shapes[0])
    if sp.ulysses > 1:
        qkv.to_heads()
    else:
        forward.run(at, {r: qkv.own(r) for r in forward.kept})
        for rank in forward.kept:
            forward.need(rank, *qkv.own(rank))
    for rank in forward.kept:
        forward.need(rank, *(cache or {}).get(rank, ()))
    if sp.ring > 1 and sp.rotate == "p2p":
        qkv.rotate(rows, keys, cache)
    else:
        if sp.ring > 1:
            qkv.gather_ring(keys, cache)
        share = build.shape(
            rows // sp.ring,
            keys=keys,
            text=qkv.local.t * (sp.ulysses if sp.split_text else 1),
            key_text=build.latent["t"],
            heads=sp.ulysses,
        )
        qkv.compute([share] * len(forward.ranks))
    if sp.ulysses > 1:
        qkv.to_tokens()


@dataclass
class _Exchange:
    """The transfers around one attention; versions of a work buffer are numbered by segment."""

    build: Builder
    forward: Forward
    at: int
    point: Point
    sp: SequenceParallel
    local: Shape

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one of Q, K, V, O on this rank: b (s/n + text/n) h e (strategies.md 5.3)."""
        image = self.build.nbytes(self.point.elements, self.local) // 2
        return image + (self.text_bytes if self.sp.split_text else 0)

    @cached_property
    def text_bytes(self) -> int:
        """Bytes of this rank's text tokens in one of Q, K, V, O."""
        if not self.point.joint_text:
            return 0
        width = self.point.heads * self.point.head_dim // self.local.p
        return self.local.b * self.local.t * width * self.build.element_bytes

    @property
    def text_heads_bytes(self) -> int:
        """Bytes of replicated text's output in this rank's heads; 0 where text is split or apart."""
        return 0 if self.sp.split_text else self.text_bytes // self.sp.ulysses

    def ref(self, name: str, rank: int, sub: int = 0, size: int | None = None) -> Ref:
        """Version of work buffer ``name`` that this attention writes (``sub``: ring iteration)."""
        size = 2 * self.token_bytes if size is None else size
        buffer = self.build.buffer(name, rank, size, "hidden")
        return Ref(buffer, self.forward.step, None, False, self.first + sub)

    @cached_property
    def first(self) -> int:
        """Sub-version of the first ring iteration."""
        layer = self.forward.index * len(self.build.denoiser.segments) + self.at
        return layer * self.sp.ring

    def own(self, rank: int) -> list[Ref]:
        """K and V that this rank starts with: after the all-to-all where there is one."""
        if self.sp.ulysses > 1:
            return [self.ref(n, rank, size=self.token_bytes) for n in ("kh", "vh")]
        return [self.ref("kv0", rank)]

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Among ranks with the same share of the weights, Ulysses groups are contiguous; ring groups
        take every ulysses-th rank."""
        tp, u = self.build.mesh.tp, self.sp.ulysses
        found = []
        for ranks in (tuple(self.forward.ranks[i::tp]) for i in range(tp)):
            if axis == "ulysses":
                found += [ranks[i : i + u] for i in range(0, len(ranks), u)]
            else:
                found += [ranks[i::u] for i in range(u)]
        return found

    def exchange(
        self,
        call: str,
        label: str,
        nbytes: int,
        source: str,
        target: str,
        groups: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        name = f"{self.build.denoiser.segments[self.at].name}/{label}{self.forward.tag}"
        for group in groups or self.groups("ulysses"):
            self.build.collective(
                call,
                name,
                group,
                nbytes,
                [self.ref(source, r, size=nbytes) for r in self.build.kept(group)],
                [self.ref(target, r, size=nbytes) for r in self.build.kept(group)],
                step=self.forward.step,
                channel="ulysses",
            )

    def all_to_all(self, label: str, nbytes: int, source: str, target: str) -> None:
        """Each rank's share to each other: at once, or in two phases (CoCoDiff, strategies.md 18.6 a).

        First inside each machine, to the rank at the receiver's place, then across, between ranks at
        the same place: (m-1)/m and (k-1)/k of the bytes out of each of m ranks on k machines, in m - 1
        and k - 1 messages instead of m k - 1.
        """
        if self.sp.phases is None:
            self.exchange("all_to_all", label, nbytes, source, target)
            return
        m, k = self.sp.phases
        whole, between = self.groups("ulysses"), f"{source}in"
        inside = [group[o * m : (o + 1) * m] for group in whole for o in range(k)]
        across = [group[i::m] for group in whole for i in range(m)]
        self.exchange("all_to_all", f"{label}/inside", nbytes, source, between, inside)
        self.exchange("all_to_all", f"{label}/across", nbytes, between, target, across)

    def to_heads(self) -> None:
        """Tokens to heads: one all-to-all each for Q, K and V, or of V before Q and K are ready."""
        size = self.token_bytes
        ranks = self.forward.kept
        then = "qkv"
        if self.sp.v_first:
            at, then = self.build.projections[self.at], "qk"
            self.forward.run_until_values(at, {r: [self.ref("v", r, size=size)] for r in ranks})
            self.all_to_all("v", size, "v", "vh")
        self.forward.run(self.at, {r: [self.ref(n, r, size=size) for n in then] for r in ranks})
        for n in then:
            self.all_to_all(n, size, n, f"{n}h")
        for rank in ranks:
            self.forward.need(rank, *(self.ref(f"{n}h", rank, size=size) for n in "qkv"))

    def to_tokens(self) -> None:
        """Heads back to tokens; replicated text heads are gathered."""
        size, ranks = self.token_bytes, self.forward.kept
        self.all_to_all("o", size, "o", "ot")
        text = self.text_heads_bytes
        if text:
            self.exchange("all_gather", "text", text, "otext", "texth")
        for rank in ranks:
            self.forward.need(rank, self.ref("ot", rank, size=size))
            if text:
                self.forward.need(rank, self.ref("texth", rank, size=text))

    def outputs(self, rank: int) -> list[Ref]:
        """What the attention op writes for ``to_tokens``."""
        if self.sp.ulysses == 1:
            return []
        refs = [self.ref("o", rank, size=self.token_bytes)]
        text = self.text_heads_bytes
        return refs + ([self.ref("otext", rank, size=text)] if text else [])

    def compute(self, shapes: Sequence[Shape]) -> None:
        """The attention segment itself, in one op a rank."""
        dense = self.forward.shapes
        self.forward.shapes = shapes
        self.forward.run(self.at + 1, {r: self.outputs(r) for r in self.forward.kept})
        self.forward.shapes = dense

    def block_bytes(self, keys: int) -> int:
        """K and V of one ring block: ``keys`` rows over the ring, heads over Ulysses."""
        share = self.build.shape(keys // self.sp.ring, text=self.local.t)
        image = self.build.nbytes(self.point.elements, share) // self.sp.ulysses
        return image + (2 * self.text_bytes if self.sp.split_text else 0)

    def block(self, rank: int, cache: Cache | None) -> list[Ref]:
        """What a rank gives to the ring: its fresh K and V and, in a pipeline, what it has cached."""
        return [*self.own(rank), *(cache or {}).get(rank, ())]

    def cached(self, cache: Cache | None) -> Tags:
        """Of a cache that holds all layers of a stage, the ring takes what belongs to this one."""
        return () if cache is None else (("cached", str(self.at)),)

    def gather_ring(self, keys: int, cache: Cache | None) -> None:
        """diffusers' ring: one all-gather of K and V, then a local loop over the blocks."""
        size = self.block_bytes(keys)
        name = f"{self.build.denoiser.segments[self.at].name}/kv{self.forward.tag}"
        for group in self.groups("ring"):
            self.build.collective(
                "all_gather",
                name,
                group,
                size,
                [ref for r in self.build.kept(group) for ref in self.block(r, cache)],
                [
                    self.ref("kvall", r, size=(self.sp.ring - 1) * size)
                    for r in self.build.kept(group)
                ],
                step=self.forward.step,
                channel="ring",
                tags=self.cached(cache),
            )
        for rank in self.forward.kept:
            self.forward.need(rank, self.ref("kvall", rank, size=(self.sp.ring - 1) * size))

    def rotate(self, rows: int, keys: int, cache: Cache | None) -> None:
        """A true ring: while block j is attended to, it travels on to the next rank.

        Two buffers alternate, so block j + 2 waits until block j has been read. A PipeFusion cache
        must survive, so there both rotating buffers are extra.
        """
        sp, size = self.sp, self.block_bytes(keys)
        names = ("kva", "kvb") if cache is not None or sp.ulysses > 1 else ("kv0", "kv1")
        name = self.build.denoiser.segments[self.at].name
        text = self.local.t * (sp.ulysses if sp.split_text else 1)

        def block(j: int, rank: int) -> list[Ref]:
            if j == 0:
                return self.block(rank, cache)
            return [self.ref(names[j % 2], rank, sub=j, size=size)]

        for j in range(sp.ring):
            for group in self.groups("ring") if j < sp.ring - 1 else ():
                self.build.emit(
                    f"{name}/ring{j}{self.forward.tag}@g{'-'.join(map(str, group))}",
                    "permute",
                    "ring",
                    group,
                    f"ring.{'-'.join(map(str, group))}",
                    reads=[ref for r in self.build.kept(group) for ref in block(j, r)],
                    writes=[ref for r in self.build.kept(group) for ref in block(j + 1, r)],
                    step=self.forward.step,
                    nbytes=size,
                    tags=self.cached(cache),
                )
            share = self.build.shape(
                rows // sp.ring,
                keys=keys // sp.ring,
                text=text,
                key_text=text if sp.split_text or j == 0 else 0,
                heads=sp.ulysses,
            )
            for rank, tags in zip(self.forward.ranks, self.forward.tags, strict=True):
                if self.build.keeps(rank):
                    self._block(name, j, rank, share, block(j, rank) if j else [], tags)
        self.forward.skip(self.at + 1)

    def _block(
        self, name: str, j: int, rank: int, share: Shape, block: list[Ref], tags: Tags
    ) -> None:
        """Attention of one rank's queries over block ``j``."""
        last = j == self.sp.ring - 1
        self.build.compute(
            f"{name}/block{j}{self.forward.tag}",
            rank,
            "denoiser",
            share,
            ranges=((self.at, self.at + 1),),
            reads=[*self.forward.take(rank), *block],
            writes=self.outputs(rank) if last else (),
            step=self.forward.step,
            call="forward",
            tags=tags,
            blocks=self.sp.ring,
        )
