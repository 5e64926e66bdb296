"""The cells of a laboratory run: every strategy that moves something, at a size for its links.

Sizes are small enough that a cell takes seconds over tens of Mbit/s, and large enough that bytes are
most of what a call takes. One transformer for all, so that strategies can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paradiff.lab.laboratory import BALANCE, Cell, Regime

MODEL = "pixart-alpha"
DEFAULT: Sequence[tuple[str, int, int, int]] = (
    ("ulysses=2", 128, 64, 1),
    ("patch=2", 128, 64, 1),
    ("pipefusion=2,patches=2,warmup=1", 256, 256, 3),
    ("ulysses=4", 256, 128, 1),
    ("ring=4", 128, 64, 1),
    ("ulysses=2,ring=2", 128, 128, 1),
    ("patch=4", 128, 64, 1),
    ("distrifusion=4,warmup=0", 128, 64, 2),
    ("pcpp=4,warmup=0", 128, 64, 2),
    ("pipefusion=4,patches=4,warmup=1", 256, 256, 3),
    ("asyncdiff=3,stride=2,warmup=1", 256, 256, 5),
    ("parastep=4,warmup=1", 1024, 1024, 5),
    ("tensor=4", 64, 64, 1),
    ("cfg=2,ulysses=2", 256, 128, 1),
    ("cfg=2,distrifusion=2,warmup=0", 128, 64, 2),
    ("cfg=2,pipefusion=2,patches=2,warmup=1", 256, 256, 3),
    ("ulysses=8", 256, 256, 1),
    ("ring=8", 128, 64, 1),
    ("patch=8", 128, 64, 1),
    ("distrifusion=8,warmup=0", 128, 64, 2),
    ("pcpp=8,warmup=0", 128, 64, 2),
    ("pipefusion=8,patches=8,warmup=1", 256, 256, 3),
    ("asyncdiff=7,stride=2,warmup=1", 256, 256, 5),
    ("parastep=8,warmup=1", 1024, 1024, 9),
    ("tensor=8", 64, 64, 1),
    ("cfg=2,ulysses=4", 256, 256, 1),
    ("cfg=2,distrifusion=4,warmup=0", 128, 64, 2),
    ("cfg=2,pipefusion=4,patches=4,warmup=1", 256, 256, 3),
)
"""Spec, height, width, steps."""


def default_cells(regimes: Iterable[Regime] = tuple(BALANCE)) -> list[Cell]:
    """Every default, in each of ``regimes``."""
    wanted = tuple(regimes)
    return [Cell(MODEL, *each, regime) for each in DEFAULT for regime in wanted]
