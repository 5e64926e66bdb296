"""What one forward launches: kernels with their dimensions, marks between them, live tensors.

``Recorder`` is a TorchDispatchMode, so it sees what every line of diffusers or transformers code
lowers to, on the meta device. Two functions are replaced while it records: linear layers and
attention, whose lowering depends on strides and backend but whose work does not. What is recorded
are dimensions as numbers; ``paradiff.models.fitting`` turns several recordings into expressions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paradiff.models.fitting import Quantity, Shape
from paradiff.models.interception import Handler, Site

NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "_softmax"}
GEMMS = {"mm", "addmm", "bmm", "baddbmm"}
WRITE_ONLY = {"copy_", "fill_", "zero_"}
"""In-place operators that do not read what they write."""
GATHERS = {"embedding", "index", "index_select", "gather"}
"""Operators that read of their first operand what they write, not all of it."""
PADS = {"replication_pad3d", "constant_pad_nd"}
TAKES_HALO = {"convolution", *PADS}
"""Operators that read a strip and its neighbours' rows; what puts these together is not the layer's."""
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: kind and dimensions in the order of ``KERNEL_DIMS``."""

    kind: str
    dims: tuple[Quantity, ...]
    attention: str = ""
    """Name of the module that attends, for attention launches."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something between two launches: ``enter`` or ``leave`` of a unit, V of an attention ``projected``,
    or the kind of a point.

    ``sizes`` are the tensors of a unit's output tuple, or those published at a point."""

    what: str
    name: str
    sizes: Quantity = ()


@dataclass(slots=True)
class Recording:
    """One forward at one shape. ``events[i]`` left the tensors ``alive[i]`` (indices of
    ``tensors``, in order of creation), and was the first to use ``weights[i]`` parameters."""

    events: list[Launch | Mark] = field(default_factory=list)
    tensors: list[Shape] = field(default_factory=list)
    alive: list[tuple[int, ...]] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Records until it is left. ``modules`` hold the parameters to be attributed."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.recording = Recording()
        self.quiet = 0
        self.pending_halo: tuple[Shape, Shape] | None = None
        parameters = [p for m in modules for p in (*m.parameters(), *m.buffers())]
        self._resident = {_storage_key(p) for p in parameters}
        self._unclaimed = {_storage_key(p): p.numel() for m in modules for p in m.parameters()}
        self._live: dict[int, int] = {}
        self._references: list[Any] = []

    def divide(self, parameters: Iterable[Tensor], ranks: int) -> None:
        """Count the first of ``ranks`` equal parts of these parameters only."""
        for parameter in parameters:
            self._unclaimed[_storage_key(parameter)] //= ranks

    # ---------------------------------------------------------------------------- for handlers

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Run something that is not to be accounted for."""
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    def mark(self, mark: Mark) -> None:
        """Put a mark before the next launch."""
        self._add(mark)

    def hold(self, tensor: Tensor, shape: Shape | None = None) -> None:
        """Account ``tensor`` as alive from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._resident or tensor.device.type != "meta":
            return
        self._live[key] = len(self.recording.tensors)
        self.recording.tensors.append(tuple(tensor.shape) if shape is None else shape)
        self._references.append(weakref.ref(storage, partial(self._release, key)))

    def _release(self, key: int, _: Any) -> None:
        self._live.pop(key, None)

    # ------------------------------------------------------------------------ what is recorded

    @contextmanager
    def replaced_functions(self) -> Iterator[None]:
        """Linear layers and attention that allocate their output and are recorded whole."""
        with (
            mock.patch.object(F, "linear", self._linear),
            mock.patch.object(F, "scaled_dot_product_attention", self.attend),
        ):
            yield

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with self.silence():
            out = x.new_empty(*x.shape[:-1], weight.shape[0])
        if self.quiet:
            return out
        self._claim([weight] if bias is None else [weight, bias])
        self.hold(out)
        dims = ((1,),), (tuple(x.shape[:-1]),), ((weight.shape[0],),), ((weight.shape[1],),)
        self._add(Launch("gemm", dims))
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, name: str = "", **__: Any
    ) -> Tensor:
        """Stand-in for a fused attention: output laid out as the fused kernels lay it out."""
        heads, q, width = query.shape[-3], query.shape[-2], value.shape[-1]
        batch = tuple(query.shape[:-3])
        with self.silence():
            out = query.new_empty(*batch, q, heads, width).transpose(-3, -2)
        if self.quiet:
            return out
        self.hold(out)
        numbers = heads, q, key.shape[-2], query.shape[-1], width
        self._add(Launch("attention", ((batch,), *(((n,),) for n in numbers)), attention=name))
        return out

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and _on_meta(args[0]):
            return False  # "is the mask all ones?": prompts are padded
        out = func(*args, **(kwargs or {}))
        if self.quiet:
            return out
        if self.pending_halo is not None and name not in TAKES_HALO:
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if _on_meta(t)]
        outputs = [t for t in tree_leaves(out) if _on_meta(t)]
        self._claim(inputs)
        if not outputs or (not func._schema.is_mutable and _only_views(inputs, outputs)):
            return out
        for tensor in outputs:
            self.hold(tensor)
        if name not in ALLOCATIONS:
            self._add(self._launch(name, func, args, inputs, outputs))
        return out

    def _launch(
        self, name: str, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> Launch:
        if name in GEMMS:
            return _gemm(name, args)
        if name == "convolution":
            launch = _convolution(args, outputs[0], self.pending_halo)
            self.pending_halo = None
            return launch
        if name in PADS and self.pending_halo is not None:
            rows, self.pending_halo = self.pending_halo, None
            return Launch("elementwise", ((*rows, tuple(outputs[0].shape)),))
        if name in NORMS:
            return Launch("norm", ((tuple(args[0].shape), tuple(outputs[0].shape)),))
        reads = inputs[1:] if name in WRITE_ONLY | GATHERS else inputs
        reads = reads + outputs if name in GATHERS else reads
        return Launch("elementwise", (tuple(map(_distinct, (*reads, *outputs))),))

    def _add(self, event: Launch | Mark) -> None:
        recording = self.recording
        if len(recording.weights) == len(recording.events):
            recording.weights.append(0)
        recording.events.append(event)
        recording.alive.append(tuple(self._live.values()))

    def _claim(self, tensors: list[Tensor]) -> None:
        """Attribute parameters to the next launch, once each."""
        numel = sum(self._unclaimed.pop(_storage_key(t), 0) for t in tensors)
        recording = self.recording
        if len(recording.weights) == len(recording.events):
            recording.weights.append(0)
        recording.weights[-1] += numel


class RecordingHandler(Handler):
    """Puts marks at exchange points and lends a strip what its neighbours would send.

    ``visible`` gives the image tokens whose keys an attention sees; ``neighbours`` is the symbol h.
    """

    def __init__(
        self, recorder: Recorder, visible: Callable[[str], int | None], neighbours: int
    ) -> None:
        self._recorder = recorder
        self._visible = visible
        self._neighbours = neighbours

    def attention(
        self, name: str, call: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        self._recorder.quiet = 0
        return self._recorder.attend(query, key, value, name=name)

    def kv(self, site: Site, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._recorder.quiet = 1  # until ``attention``: putting K and V together is not the layer's
        tokens = self._visible(site.name)
        shape = (*key.shape[:2], tokens if tokens is not None else key.shape[2])
        return key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3])

    def projected(self, name: str, value: Tensor, is_last: bool) -> None:
        self._recorder.mark(Mark("projected", name))

    def halo(self, site: Site, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        edge = (*x.shape[:-2], site.rows, x.shape[-1])
        if not site.is_input:
            self._recorder.mark(Mark("halo", site.name, ((2, *edge),)))
        lent = (*x.shape[:-2], self._neighbours * site.rows, x.shape[-1])
        self._recorder.pending_halo = (tuple(x.shape), lent)
        if not self._neighbours:
            return None, None
        with self._recorder.silence():
            row = x.new_empty(*edge)
        return row, row if self._neighbours == 2 else None

    def moments(self, site: Site, x: Tensor) -> None:
        self._recorder.mark(Mark("moments", site.name, ((2, x.shape[0], site.groups),)))

    def total(self, name: str, partial: Tensor) -> Tensor:
        self._recorder.mark(Mark("sum", name, (tuple(partial.shape),)))
        return partial

    def squares(self, name: str, x: Tensor) -> None:
        self._recorder.mark(Mark("squares", name, ((*x.shape[:-1], 1),)))

    def enter(self, name: str) -> None:
        self._recorder.mark(Mark("enter", name))

    def leave(self, name: str, output: Any) -> Any:
        sizes = tuple(tuple(t.shape) for t in tree_leaves(output) if isinstance(t, Tensor))
        self._recorder.mark(Mark("leave", name, sizes))
        return output

    def table(self, compute: Callable[[], Any]) -> Any:
        with self._recorder.silence():
            return compute()


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _only_views(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    known = {_storage_key(t) for t in inputs}
    return all(_storage_key(t) in known for t in outputs)


def _distinct(tensor: Tensor) -> Shape:
    """Sizes of a tensor without the dimensions along which it repeats itself (stride 0)."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(1 if stride == 0 else size for size, stride in pairs)


def _gemm(name: str, args: Any) -> Launch:
    left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    batch, m = ((left.shape[0],), (left.shape[1],)) if left.ndim == 3 else ((1,), (left.shape[0],))
    if left.ndim == 3 and right.stride(0) == 0:
        batch, m = (1,), (left.shape[0], left.shape[1])
    return Launch("gemm", ((batch,), (m,), ((right.shape[-1],),), ((right.shape[-2],),)))


def _convolution(args: Any, out: Tensor, halo: tuple[Shape, Shape] | None) -> Launch:
    """The implicit GEMM of a convolution, transposed ones too (there m counts input positions)."""
    x, weight, transposed = args[0], args[1], args[6]
    positions = x if transposed else out
    m = (positions.shape[0], *positions.shape[2:])
    n, k = weight.shape[0], prod(weight.shape[1:])
    if transposed:
        n, k = prod(weight.shape[1:]), weight.shape[0]
    elements = (tuple(x.shape),) if halo is None else halo
    return Launch("conv", ((m,), ((n,),), ((k,),), elements))
