"""CUDA's order of issue, with a stand-in for the device: it does what it is given when it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paradiff.executor import streams
from paradiff.executor.faults import OpFailed
from paradiff.executor.streams import Step, Threads, on_cuda
from paradiff.graph import Instance, Op

pytestmark = [pytest.mark.torch]


class Device:
    """Numbers events as they are recorded; the first ``done`` of them have come."""

    def __init__(self, done: float) -> None:
        self.done, self.recorded = done, 0

    def event(self, **_: Any) -> Any:
        event = SimpleNamespace(number=0, synchronize=lambda: None)

        def record(_: Any = None) -> None:
            self.recorded += 1
            event.number = self.recorded

        event.record, event.query = record, lambda: event.number <= self.done
        event.elapsed_time = lambda later: 1e3 * (later.number - event.number)
        return event

    def synchronize(self, _: torch.device) -> None:
        until(lambda: self.done >= self.recorded)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_rank_says_which_op_its_device_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four have been issued. Event 1 is the origin, then each op has one before and one after it."""
    device = Device(done=5)
    monkeypatch.setattr(streams, "LOOK_S", 0.005)
    for name, stand_in in (
        ("Event", device.event), ("synchronize", device.synchronize),
        ("Stream", lambda _: SimpleNamespace(wait_event=lambda _: None)),
        ("stream", lambda _: nullcontext()), ("current_stream", lambda _: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    names = [("first", "compute"), ("copy", "copies"), ("second", "compute"), ("third", "compute")]
    ops = [Op(name, "compute", "guidance", (0,), stream) for name, stream in names]
    before = [(), (0,), (0,), (2,)]
    steps = [Step(n, Instance(op, 0), before[n]) for n, op in enumerate(ops)]
    doing: dict[str, str] = {}
    spans: list[Any] = []

    def issue() -> None:
        where = torch.device("cuda")
        spans.extend(on_cuda(steps, lambda *_: None, where, 0, lambda _: iter(()), doing=doing))

    issuer = Thread(target=issue, daemon=True)
    issuer.start()
    until(lambda: device.recorded == 9 and doing == {"compute": "second", "copies": "copy"})
    time.sleep(0.05)
    assert doing["compute"] == "second"
    device.done = 7
    until(lambda: doing["compute"] == "third")
    device.done = 9
    issuer.join(300)
    assert [span.name for span in spans] == [name for name, _ in names]
    assert [round(span.end_s - span.start_s) for span in spans] == [1] * 4


def test_memory_that_ends_where_an_op_is_noted_is_told_with_the_op(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any request for memory may be the one too many."""

    def none_left(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(streams, "spans_of", none_left)
    step = Step(0, Instance(Op("only", "compute", "guidance", (0,), "compute"), 0), ())
    with pytest.raises(OpFailed, match=r"op \S*only\S*, rank 0: out of memory"):
        Threads(0, [step], lambda *_: None).run()
