"""What to try where a schedule does not fit: weights elsewhere, in fewer bits, in turns.

Decides the order only: what keeps the picture first, and the gentlest of each. Whether it then fits is
for the caller to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from paradiff.strategies import parse_spec
from paradiff.strategies.places import PLACES

REMEDIES = (
    ("vae=split", "offload=text", "offload=text+vae", "vae=split,offload=text+vae", "weights=hsdp",
     "offload=text+vae,weights=hsdp", "vae=split,offload=text+vae,weights=hsdp"),
    ("vae=tiled", "vae=tiled,offload=text", "vae=tiled,offload=text+vae", "weights=fp8",
     "offload=text,weights=fp8", "offload=text+vae,weights=fp8",
     "vae=tiled,offload=text+vae,weights=fp8", "vae=tiled,offload=text+vae,weights=fp8+hsdp"),
)  # fmt: skip
"""What makes a schedule fit, gentlest first: that which keeps the picture, that which may change it."""


def remedied(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Specs like ``text`` that fit: the gentlest that keeps the picture, then one that may change it,
    unless that does more of the same."""
    if PLACES.keys() & parse_spec(text).options.keys():
        return
    found: set[str] = set()
    for remedies in REMEDIES:
        for remedy in remedies:
            places = {
                f"{key}={part}"
                for key, _, value in (each.partition("=") for each in remedy.split(","))
                for part in value.split("+")
            }
            if found and places > found:
                continue  # what keeps the picture does already with less
            if fits(f"{text},{remedy}"):
                found = places
                yield f"{text},{remedy}"
                break
