"""Quantities with units, as written in files and on the command line, turned into base units.

Base units: bytes, seconds, bytes/s, FLOP/s, W, USD. Conversion happens once, where a file is read;
inside the program every number carries its unit in its name (``latency_s``, ``nbytes``). A number
without a unit is an error, because nobody can tell 25 GB/s from 25 Gbit/s afterwards.
``parse_quantity("26 GB/s", "bandwidth") == 26e9``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

_SIZES = {"B": 1.0} | {
    prefix + "B": factor
    for prefix, factor in {
        "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
        "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
    }.items()
}  # fmt: skip
_BITS = {"kbit/s": 1e3 / 8, "Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8, "Tbit/s": 1e12 / 8}
_FLOPS = {"FLOP/s": 1.0, "MFLOP/s": 1e6, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15}

UNITS: Mapping[str, Mapping[str, float]] = {
    "size": _SIZES,
    "bandwidth": {unit + "/s": factor for unit, factor in _SIZES.items()} | _BITS,
    "time": {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0},
    "compute": _FLOPS,
    "power": {"W": 1.0, "kW": 1e3},
    "money": {"USD": 1.0},
}
"""Allowed units of each dimension and their size in base units."""

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)\s*", re.ASCII)


def parse_quantity(text: object, dimension: str, *, minimum: float | None = None) -> float:
    """Return ``text`` in base units of ``dimension`` (a key of :data:`UNITS`).

    Raises ValueError, naming the allowed units, for anything that is not ``<number> <unit>``, and
    for a value that is not finite. With ``minimum`` the value must be at least that; a minimum of
    ``math.ulp(0.0)`` means "positive".
    """
    allowed = ", ".join(UNITS[dimension])
    found = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if found is None or not found[2]:
        missing = found is not None or isinstance(text, int | float)
        problem = f"{dimension} has no unit" if missing else f"not a {dimension} (number and unit)"
        raise ValueError(f"{problem} ({text!r}), allowed: {allowed}")
    factor = UNITS[dimension].get(found[2])
    if factor is None:
        raise ValueError(f"unknown {dimension} unit {found[2]!r} ({text!r}), allowed: {allowed}")
    value = float(found[1]) * factor
    if not math.isfinite(value):
        raise ValueError(f"{dimension} is not finite ({text!r}), allowed: a finite number")
    if minimum is not None and value < minimum:
        bound = "zero or more" if minimum == 0 else "more than zero"
        raise ValueError(f"{dimension} out of range ({text!r}), allowed: {bound}")
    return value


def size_text(nbytes: int) -> str:
    """A size as files write it, exact: ``size_text(65536) == "64 KiB"``."""
    unit = next(u for u in ("GiB", "MiB", "KiB", "B") if nbytes % int(_SIZES[u]) == 0)
    return f"{nbytes // int(_SIZES[unit])} {unit}"


def _field(dimension: str, minimum: float) -> Callable[[Any], float]:
    return lambda value: parse_quantity(value, dimension, minimum=minimum)


_POSITIVE = math.ulp(0.0)
Bytes = Annotated[float, BeforeValidator(_field("size", _POSITIVE))]
BytesPerSecond = Annotated[float, BeforeValidator(_field("bandwidth", _POSITIVE))]
FlopPerSecond = Annotated[float, BeforeValidator(_field("compute", _POSITIVE))]
Seconds = Annotated[float, BeforeValidator(_field("time", 0.0))]
PositiveSeconds = Annotated[float, BeforeValidator(_field("time", _POSITIVE))]
Watts = Annotated[float, BeforeValidator(_field("power", _POSITIVE))]
Dollars = Annotated[float, BeforeValidator(_field("money", _POSITIVE))]
