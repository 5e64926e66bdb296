"""The cells of a laboratory run: every strategy that moves something, at a size for its links; and many
strategies on the same work, whose order can be compared.

Sizes are small enough that a cell takes seconds over tens of Mbit/s, and large enough that bytes are
most of what a call takes (``laboratory.MOST_FIXED``). One transformer for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from paradiff.lab.laboratory import BALANCE, Cell, Regime

MODEL = "pixart-alpha"
DEFAULT: Sequence[tuple[str, int, int, int]] = (
    ("ulysses=2", 128, 64, 1),
    ("patch=2", 128, 64, 1),
    ("pipefusion=2,patches=2,warmup=1", 256, 256, 3),
    ("ulysses=4", 256, 128, 1),
    ("ulysses=4,exchange=2x2", 128, 128, 1),
    ("ring=4", 128, 64, 1),
    ("ring=4,rotate=allgather", 128, 64, 1),
    ("ulysses=2,ring=2", 128, 128, 1),
    ("patch=4", 128, 64, 1),
    ("patch=4,mode=naive", 2048, 2048, 1),
    ("distrifusion=4,warmup=0", 128, 64, 2),
    ("pcpp=4,warmup=0", 128, 64, 2),
    ("pipefusion=4,patches=4,warmup=1", 256, 256, 3),
    ("asyncdiff=3,stride=2,warmup=1", 256, 256, 5),
    ("parastep=4,warmup=1", 1024, 1024, 5),
    ("streambatch=4", 2048, 2048, 8),
    ("tensor=4", 128, 64, 1),
    ("cfg=2,ulysses=2", 256, 128, 1),
    ("cfg=2,distrifusion=2,warmup=0", 128, 64, 2),
    ("cfg=2,pipefusion=2,patches=2,warmup=1", 256, 256, 3),
    ("ulysses=8", 512, 256, 1),
    ("ring=8", 128, 128, 1),
    ("ulysses=2,ring=4", 256, 128, 1),
    ("ring=8,rotate=allgather", 128, 128, 1),
    ("patch=8", 128, 128, 1),
    ("patch=8,mode=naive", 2048, 2048, 1),
    ("distrifusion=8,warmup=0", 128, 64, 2),
    ("pcpp=8,warmup=0", 128, 128, 2),
    ("pipefusion=8,patches=8,warmup=1", 256, 256, 3),
    ("asyncdiff=7,stride=2,warmup=1", 256, 256, 5),
    ("parastep=8,warmup=1", 1024, 1024, 9),
    ("streambatch=8", 2048, 2048, 8),
    ("tensor=8", 128, 128, 1),
    ("cfg=2,ulysses=4", 512, 256, 1),
    ("cfg=2,ulysses=2,ring=2", 256, 256, 1),
    ("cfg=2,distrifusion=4,warmup=0", 128, 64, 2),
    ("cfg=2,pipefusion=4,patches=4,warmup=1", 256, 256, 3),
)
"""Spec, height, width, steps."""
LEFT_OUT: Mapping[str, str] = {
    "serial": "one rank",
    "data": "replicas send each other nothing",
    "batchstep": "all on one rank",
}
"""Strategies and axes without a cell, and why."""

ORDER_SIZE = (128, 128, 2)
"""Height, width, steps of the work that strategies are ordered on."""
ORDER: Sequence[str] = (
    "ulysses=4,exchange=2x2",
    "ring=4",
    "ulysses=2,ring=2",
    "patch=4",
    "distrifusion=4,warmup=0",
    "pcpp=4,warmup=0",
    "pipefusion=4,patches=4,warmup=1",
    "asyncdiff=4,stride=1,warmup=1",
    "cfg=2,ulysses=2",
    "cfg=2,patch=2",
    "cfg=2,distrifusion=2,warmup=0",
    "cfg=2,pipefusion=2,patches=2,warmup=1",
    "ring=8",
    "patch=8",
    "distrifusion=8,warmup=0",
    "pcpp=8,warmup=0",
    "pipefusion=8,patches=8,warmup=1",
    "asyncdiff=8,stride=1,warmup=1",
    "cfg=2,ring=4",
    "cfg=2,patch=4",
    "cfg=2,distrifusion=4,warmup=0",
    "cfg=2,pcpp=4,warmup=0",
    "cfg=2,pipefusion=4,patches=4,warmup=1",
)
NOT_ORDERED: Mapping[str, str] = {
    "parastep": "only latents move, a few KB at this size: calls cost as much as bytes",
    "streambatch": "the same, and it takes more steps than this",
    "tensor": "three times as long as the next of four ranks; of eight, its calls are short",
}
"""What has a cell in ``DEFAULT``, but does not fit ``ORDER_SIZE``, and why. Exchanges among eight ranks,
of two at a time or of all, do not either: their calls are short here."""


def default_cells(regimes: Iterable[Regime] = tuple(BALANCE)) -> list[Cell]:
    """Every strategy at a size of its own, in each of ``regimes``."""
    wanted = tuple(regimes)
    return [Cell(MODEL, *each, regime) for each in DEFAULT for regime in wanted]


def order_cells(regimes: Iterable[Regime] = tuple(BALANCE)) -> list[Cell]:
    """Strategies on the same work, in each of ``regimes``."""
    wanted = tuple(regimes)
    return [Cell(MODEL, spec, *ORDER_SIZE, regime, True) for spec in ORDER for regime in wanted]
