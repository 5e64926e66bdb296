"""What an hour of a box costs: what its file says, else the sum of its GPUs' prices. Knows no plans."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from simulator.gpu import load_gpu
from simulator.topology import Topology


class Price(NamedTuple):
    """USD per hour of a box and what that rests on; None where nobody says, with what is missing."""

    per_hour: float | None
    source: str


def price_of(box: Topology) -> Price:
    """USD per hour of ``box``.

    Example: pcie8 is eight L40 at 1.14 USD, 9.12 USD an hour.
    """
    if box.price_per_hour is not None:
        return Price(box.price_per_hour, "topology file")
    prices = {name: load_gpu(name).price_per_hour for name in dict.fromkeys(box.profiles)}
    missing = sorted(name for name, price in prices.items() if price is None)
    if missing:
        return Price(None, f"neither {box.name} nor {', '.join(missing)} has a price_per_hour")
    known = {name: price for name, price in prices.items() if price is not None}
    parts = [
        f"{count} {name} at {known[name].value:g} USD: {known[name].source}"
        for name, count in Counter(box.profiles).items()
    ]
    return Price(math.fsum(known[name].value for name in box.profiles), "; ".join(parts))
