"""One running forward of a network: a coroutine that pauses where the op in hand ends.

The forward is diffusers' own. At every exchange point it asks here, and gets what the reads of the ops
have bound to that point; without any, the layer works on its own rows. Points must be reached in the
order of the profile's segments, and every op must end where the graph says that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from torch.utils._pytree import tree_map

from paradiff.executor.faults import ScheduleMismatch
from paradiff.executor.network import Conditioning, Network, for_branch
from paradiff.executor.payload import (
    Payload,
    Piece,
    all_keys,
    edges,
    mix_moments,
    moments,
    near_keys,
    neighbours,
    parse_spans,
    take_rows,
)
from paradiff.executor.sequence import (
    Tokens,
    attend,
    block_tokens,
    heads_apart,
    heads_together,
    layout_of,
    mask_of,
    merged,
    own_heads,
    together,
    tokens_apart,
)
from paradiff.graph import Buffer, Op
from paradiff.models.interception import (
    Handler,
    Site,
    block_inputs,
    block_output,
    block_streams,
    with_block_inputs,
)


@dataclass
class Task:
    """What the op in hand asks of the forward: where it begins and stops."""

    id: str
    lo: int
    hi: int
    tags: Mapping[str, str]
    values: str = ""


@dataclass(eq=False)
class Forward(Handler):
    """A forward of ``network`` on the rows that the first op's tags name, or a part of one.

    ``ranges`` are the segments that it computes; transformer blocks outside are passed by, modules
    outside that an op has read the output of give that. ``publishes`` are the points whose own data
    some op of this forward writes: computed nowhere else. ``kept`` is the text that entered each block
    with patch 0, for the rank's later forwards; ``blank`` stands for the latent where a stage has none.
    """

    network: Network
    total_rows: int
    halo_rows: bool
    scale: Callable[[Tensor], Tensor]
    timestep: Tensor
    task: Task
    publishes: Collection[int]
    ranges: Sequence[tuple[int, int]]
    kept: dict[str, Tensor]
    blank: Tensor
    frames: int
    captures: AbstractSet[str] = frozenset()
    published: dict[int, Payload] = field(default_factory=dict)
    captured: dict[str, Payload] = field(default_factory=dict)
    streams: list[Payload] = field(default_factory=list)
    output: Payload = ()
    _received: list[Payload] = field(default_factory=list)
    _modules: dict[str, Any] = field(default_factory=dict)
    _bound: dict[int, list[Piece]] = field(default_factory=dict)
    _latent: list[Piece] = field(default_factory=list)
    _given: Conditioning = field(default_factory=dict)
    _at: int = 0
    _again: int = -1
    _values: list[Tensor] = field(default_factory=list)
    _stopped: bool = False

    def __post_init__(self) -> None:
        self.rows = parse_spans(self.task.tags["rows"])
        self.branch = self.task.tags.get("branch", "both")
        self._at = self.task.lo
        self.layout = layout_of(self.task.tags)
        self._share = int(self.task.tags.get("tensor", "0/1").split("/")[0])
        self._greenlet = greenlet(self._run)
        self._segments = self.network.stage.segments
        end, ends = self.ranges[-1][1], [hi for _, hi in self.network.unit_ranges.values()]
        self._last = (
            max((hi for hi in ends if hi <= end), default=None)
            if end < len(self._segments)
            else None
        )

    # ---------------------------------------------------------------------------- for the interpreter

    def bind(self, buffer: Buffer, payload: Payload) -> None:
        """Take what an op reads: the latent, the conditioning, the streams of the stage before, a
        module's output, or others' data at points."""
        kind = buffer.kind
        if kind == "latent":
            self._latent.extend(payload)
        elif kind == "text":
            self._given = for_branch(payload[0].value, self.branch)
            if "words" in self.task.tags:
                ((first, last),) = parse_spans(self.task.tags["words"])
                words = self._given["encoder_hidden_states"][:, first:last]
                self._given = {**self._given, "encoder_hidden_states": words}
        elif buffer.module:
            self._modules[buffer.module] = payload[0].value
        elif kind == "hidden":
            self._received.append(payload)
        else:
            for piece in payload:
                assert piece.point is not None, kind
                self._bound.setdefault(piece.point, []).append(piece)

    def resume(self, task: Task) -> None:
        """Run to the end of ``task``. Raises ScheduleMismatch if the forward ends elsewhere."""
        if task.lo not in (self._at, self._again):
            raise ScheduleMismatch(f"{task.id} begins at {self._name(task.lo)}, not {self.here}")
        self.task, self._again, self.streams = task, -1, []
        self._greenlet.switch()
        if self._at != task.hi:
            raise ScheduleMismatch(f"{task.id} ends at {self._name(task.hi)}, not {self.here}")

    @property
    def finished(self) -> bool:
        return bool(self._greenlet.dead) or self._stopped

    def close(self) -> None:
        """Unwind what a stage has left of the forward."""
        self._greenlet.throw()

    @property
    def here(self) -> str:
        return self._name(self._at)

    def _name(self, at: int) -> str:
        return self._segments[at].name if at < len(self._segments) else "the end"

    # ---------------------------------------------------------------------------- the coroutine

    def _run(self) -> None:
        x = self._input(self.rows)
        out = self.network.call(x, self._given, self.timestep, self.rows, self.total_rows)
        self._at = len(self._segments)
        sizes = [last - first for first, last in self.rows]
        scale = out.shape[-2] // sum(sizes)  # a decoder makes several rows of one
        strips = out.split([scale * size for size in sizes], dim=-2)
        pairs = zip(self.rows, strips, strict=True)
        self.output = tuple(Piece(span, rows, branch=self.branch) for span, rows in pairs)

    def _input(self, spans: Iterable[tuple[int, int]], frames: int | None = None) -> Tensor:
        spans = list(spans)
        have = self._latent or [Piece((0, self.total_rows), self.blank)]
        rows = self.scale(take_rows(have, spans))
        return self.network.latent_input(rows, self._given, spans, frames)

    def _reach(self, at: int, own: Callable[[], Any]) -> tuple[Piece | None, list[Piece]]:
        """At a point: publish, pause if the op ends here. Returns own and others' data to be used."""
        if at > self.task.hi:
            raise ScheduleMismatch(
                f"{self.task.id} should end at {self._name(self.task.hi)}; reached {self._name(at)}"
            )
        piece = None
        if at in self.publishes:
            self.published[at] = self._pieces(at, own())
            piece = self.published[at][0]
        if at == self.task.hi:
            self._pause(at)
        others = self._bound.pop(at, [])
        if others and piece is None:
            piece = Piece(self.rows[0], own(), at)
        return piece, others

    def _pieces(self, at: int, value: Any) -> Payload:
        """Own data at a point; K and V of several patches apart."""
        if len(self.rows) == 1:
            return (Piece(self.rows[0], value, at),)
        key, value = (self.network.by_rows(t, self.rows, self.frames) for t in value)
        return tuple(Piece(s, pair, at) for s, *pair in zip(self.rows, key, value, strict=True))

    def _pause(self, at: int) -> None:
        if at <= self._at:
            raise ScheduleMismatch(f"{self._name(at)} comes again after {self.here}")
        self._at = at
        getcurrent().parent.switch()

    def _take(self) -> list[Payload]:
        """What the op in hand has read of other ranks' streams."""
        taken, self._received = self._received, []
        return taken

    # ---------------------------------------------------------------------------- units

    def unit(
        self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Own units run; another gives what an op has read of its output, or passes its input on. The
        block just before the own ones gives what the stage before has sent."""
        lo, hi = self.network.unit_ranges[name]
        if any(a <= lo and hi <= b for a, b in self.ranges):
            return self._own(name, forward, args, kwargs)
        if name in self._modules:
            return self._modules[name]
        if not self.network.is_transformer:
            return forward(*args, **kwargs)
        image, text = block_inputs(self.network.model, args, kwargs)
        if hi == self.ranges[0][0] and self._received:
            image, *rest = (payload[0].value for payload in self._take())
            text = rest[0] if rest else text
        return block_output(self.network.model, image, text)

    def _own(
        self, name: str, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """A unit of this rank, whose text may be that of patch 0."""
        role, model = self.task.tags.get("text"), self.network.model
        if role is not None:
            image, text = block_inputs(model, args, kwargs)
            if role == "keep":
                self.kept[name] = text.clone()
            args, kwargs = with_block_inputs(model, args, kwargs, image, self.kept[name])
        return forward(*args, **kwargs)

    def leave(self, name: str, output: Any) -> Any:
        """Keep the output of a module that others will use. After the last own unit we stop."""
        if name in self.captures:
            copy = tree_map(lambda z: z.clone() if isinstance(z, Tensor) else z, output)
            self.captured[name] = (Piece(self.rows[0], copy),)
        if (
            self.network.unit_ranges[name][1] == self._last
            and self.captured.keys() >= self.captures
        ):
            if self.network.is_transformer:
                streams = [z for z in block_streams(self.network.model, output) if z is not None]
                self.streams = [(Piece(self.rows[0], z.clone()),) for z in streams]
            self._stopped = True
            self._pause(self.ranges[-1][1])
        return output

    # ---------------------------------------------------------------------------- shared weights

    def share(self) -> int:
        return self._share

    def total(self, name: str, partial: Tensor) -> Tensor:
        """Pause for the all-reduce; every sum is the next one that the profile lists."""
        sums = (i for i, _ in self.network.profile.denoiser.totals() if i >= self._at)
        self.streams = [(Piece(self.rows[0], partial),)]
        self._pause(next(sums) + 1)
        ((piece,),) = self._take()
        result: Tensor = piece.value
        return result

    def squares(self, name: str, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.total(name, wide.square().sum(-1, keepdim=True))

    # ---------------------------------------------------------------------------- points

    def span(self) -> tuple[int, int] | None:
        return self.rows[0][0], self.total_rows

    def spans(self) -> tuple[tuple[int, int], ...] | None:
        return self.rows

    def projected(self, name: str, value: Tensor, is_last: bool) -> None:
        """V goes out when the op in hand ends here, image and text apart as at the attention."""
        if self.task.values != "until":
            return
        at = self.network.point_of.get(name)
        if at is None or self.layout is None:
            return
        self._values.append(value)
        if is_last:
            point = self._segments[at].point
            assert point is not None
            local = [z.unflatten(-1, (-1, point.head_dim)).transpose(1, 2) for z in self._values]
            tokens = self._apart(local[0]) if len(local) == 1 else Tokens(*local)
            self.streams = [heads_apart(tokens, "v", self.rows[0], self.layout)]
            self._at = self.network.projections[at]
            getcurrent().parent.switch()

    def attention(
        self, name: str, call: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        at = self.network.point_of.get(name)
        if at is not None and self.layout is not None:
            return self._spread(at, call, query, key, value)
        result = call()
        if at is not None and self.task.hi == at + 1:
            self._pause(at + 1)
        return result

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout is not None:
            return key, value
        at = self.network.point_of[site.name]
        own, others = self._reach(at, lambda: (key, value))
        if own is None or not others:
            return key, value
        if "portion" in self.task.tags:
            return near_keys(own, others, float(self.task.tags["portion"]), self.frames)
        return all_keys(own, others)

    def _spread(
        self, at: int, call: partial[Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """An attention over the tokens of the whole group: exchange, attend, exchange back."""
        layout, span = self.layout, self.rows[0]
        assert layout is not None
        local = {r: self._apart(z) for r, z in zip("qkv", (query, key, value), strict=True)}
        text = {r: own_heads(z, layout) for r, z in local.items()}
        sent = {r: heads_apart(z, r, span, layout) for r, z in local.items()}
        if layout.ulysses > 1:
            self.streams = [sent[role] for role in ("qk" if self._values else "qkv")]
            self._values = []
        else:
            self.streams = [sent["k"] + sent["v"]]
        self._pause(at)
        read = self._take()
        queries = sent["q"] if layout.ulysses == 1 else read[0]
        q = together([queries], "q", text["q"])
        own = read[: 3 if layout.ulysses > 1 else 1]
        k, v = (together(own, role, text[role]) for role in "kv")
        mine = {piece.span for each in (*own, self._bound.get(at, ())) for piece in each}
        k, v = self._with_cache(at, own, k, v)
        if len(read) > len(own):
            more = tuple(p for p in read[-1] if p.span not in mine)
            k, v = (_longer(z, w) for z, w in zip((k, v), block_tokens(more, at), strict=True))
        mask = self._words_mask(call.keywords.get("attn_mask"), local["k"])
        if layout.blocks == 1:
            options = {**call.keywords, "attn_mask": mask_of(k, mask)}
            out = call.func(q.joined(), k.joined(), v.joined(), **options)
        else:
            out = self._ring(at, q, k, v, mask)
        words = 0 if q.text is None else q.text.shape[2]
        image, of_text = out.split([out.shape[2] - words, words], dim=2)
        result = Tokens(image, of_text if words else None)
        if layout.ulysses > 1:
            self.streams = [tokens_apart(result, queries)]
            if text["q"] is not None:
                self.streams.append((Piece(span, Tokens(of_text, None), role="text"),))
        self._pause(at + 1)
        if layout.ulysses > 1:
            result = self._heads_back()
        return self._joined(result)

    def _words_mask(self, mask: Tensor | None, local: Tokens) -> Tensor | None:
        """The part of the mask of ``local`` keys that is the text's: the image's is all ones."""
        if mask is None:
            return None
        assert local.text is not None
        image, words = local.image.shape[2], local.text.shape[2]
        sizes = [words, image] if self.network.text_first else [image, words]
        return mask.split(sizes, dim=-1)[0 if self.network.text_first else 1]

    def _ring(self, at: int, q: Tokens, k: Tokens, v: Tokens, mask: Tensor | None) -> Tensor:
        """One block of keys after another; each further one is an op of its own."""
        assert self.layout is not None
        found = attend(q.joined(), k.joined(), v.joined(), mask_of(k, mask))
        for _ in range(1, self.layout.blocks):
            self._at, self._again = at + 1, at
            getcurrent().parent.switch()
            (block,) = self._take()
            key, value = block_tokens(block, at)
            more = attend(q.joined(), key.joined(), value.joined(), mask_of(key, mask))
            found = merged(found, more)
        self._at = at
        return found[0].to(q.image.dtype)

    def _heads_back(self) -> Tokens:
        """All heads of the own tokens, and of text that every rank has."""
        back, *gathered = self._take()
        result = heads_together(back)
        if gathered:
            result = Tokens(result.image, heads_together(gathered[0]).image)
        return result

    def _with_cache(
        self, at: int, read: list[Payload], k: Tokens, v: Tokens
    ) -> tuple[Tokens, Tokens]:
        """Publish the exchanged rows of this patch (of each, in the warm-up); see the cached others."""
        if at not in self.publishes:
            return k, v
        sources = sorted((p for payload in read for p in payload if p.role in "kv"), key=_span_of)
        by_role = [
            [
                self.network.by_rows(p.value.image, self.rows, self.frames)
                for p in sources
                if p.role == r
            ]
            for r in "kv"
        ]
        fresh = [[torch.cat(part, dim=2) for part in zip(*each, strict=True)] for each in by_role]
        self.published[at] = tuple(
            Piece(s, pair, at) for s, *pair in zip(self.rows, *fresh, strict=True)
        )
        mine = {piece.span: piece for piece in self._bound.pop(at, [])}
        mine |= {piece.span: piece for piece in self.published[at]}
        keys, values = zip(*(mine[s].value for s in sorted(mine)), strict=True)
        return Tokens(torch.cat(keys, dim=2), k.text), Tokens(torch.cat(values, dim=2), v.text)

    def _apart(self, z: Tensor) -> Tokens:
        """Image and text tokens of one of Q, K, V."""
        if not self.network.joint_text:
            return Tokens(z, None)
        words = self._given["encoder_hidden_states"].shape[1]
        sizes = [words, z.shape[2] - words]
        if self.network.text_first:
            text, image = z.split(sizes, dim=2)
        else:
            image, text = z.split(sizes[::-1], dim=2)
        return Tokens(image, text)

    def _joined(self, z: Tokens) -> Tensor:
        """In the order that the model has them."""
        if z.text is not None and self.network.text_first:
            return torch.cat((z.text, z.image), dim=2)
        return z.joined()

    def halo(self, site: Site, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if site.is_input:
            return self._input_halo(site.rows, x)
        at = self.network.point_of[site.name]
        _, others = self._reach(at, lambda: edges(x, site.rows))
        return neighbours(self.rows[0], others)

    def _input_halo(self, rows: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The latent is whole on every rank, so the first convolution needs no exchange."""
        first, last = self.rows[0]
        if not self.halo_rows:
            return None, None
        lent = [(first - rows, first), (last, last + rows)]
        frames = x.shape[2] if x.ndim == 5 else None
        above, below = (
            self._input([s], frames) if s[0] >= 0 and s[1] <= self.total_rows else None
            for s in lent
        )
        return _frames_as_in(x, above), _frames_as_in(x, below)

    def moments(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor] | None:
        at = self.network.point_of[site.name]
        own, others = self._reach(at, lambda: moments(x, site.groups))
        if own is None or not others:
            return None
        return mix_moments(own, others, self.task.tags.get("moments") == "corrected")


def _frames_as_in(x: Tensor, rows: Tensor | None) -> Tensor | None:
    """The first convolutions of SVD and of an image's decoder take frames along the batch."""
    return rows.flatten(0, 1) if rows is not None and rows.ndim > x.ndim else rows


def task_of(op: Op, op_id: str) -> Task:
    """The task of a compute op of the denoiser."""
    assert op.work is not None
    lo, hi = op.work.ranges[0][0], op.work.ranges[-1][1]
    return Task(op_id, lo, hi, dict(op.tags), op.work.values)


def _longer(z: Tokens, w: Tokens) -> Tokens:
    """Tokens of both."""
    texts = [t for t in (z.text, w.text) if t is not None]
    image = torch.cat((z.image, w.image), dim=2)
    return Tokens(image, torch.cat(texts, dim=2) if texts else None)


def _span_of(piece: Piece) -> tuple[int, int]:
    return piece.span


class Router(Handler):
    """Hands every call to the forward that is running: all ranks share one module."""

    def __init__(self) -> None:
        self.active: Handler = Handler()

    def attention(self, *args: Any) -> Tensor:
        return self.active.attention(*args)

    def kv(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self.active.kv(*args)

    def projected(self, *args: Any) -> None:
        self.active.projected(*args)

    def halo(self, *args: Any) -> tuple[Tensor | None, Tensor | None]:
        return self.active.halo(*args)

    def moments(self, *args: Any) -> tuple[Tensor, Tensor] | None:
        return self.active.moments(*args)

    def share(self) -> int:
        return self.active.share()

    def total(self, *args: Any) -> Tensor:
        return self.active.total(*args)

    def squares(self, *args: Any) -> Tensor | None:
        return self.active.squares(*args)

    def unit(self, *args: Any) -> Any:
        return self.active.unit(*args)

    def leave(self, name: str, output: Any) -> Any:
        return self.active.leave(name, output)

    def span(self) -> tuple[int, int] | None:
        return self.active.span()

    def spans(self) -> tuple[tuple[int, int], ...] | None:
        return self.active.spans()
