"""Quantities: base units, and every way to write one wrong."""

import math

import pytest

from paradiff.units import UNITS, parse_quantity


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("26 GB/s", "bandwidth", 26e9),
        ("26GB/s", "bandwidth", 26e9),
        ("  2 GiB/s ", "bandwidth", 2 * 2**30),
        ("100 Gbit/s", "bandwidth", 12.5e9),  # 100e9 bit / 8
        ("2 us", "time", 2e-6),
        ("2 µs", "time", 2e-6),
        ("1.5e-3 s", "time", 1.5e-3),
        (".5 ms", "time", 0.5e-3),
        ("48 GiB", "size", 48 * 2**30),
        ("64 kB", "size", 64e3),
        ("64 KiB", "size", 65536),
        ("181 TFLOP/s", "compute", 181e12),
        ("9.1 USD", "money", 9.1),
        ("300 W", "power", 300),
    ],
)
def test_base_units(text: str, dimension: str, value: float) -> None:
    assert parse_quantity(text, dimension) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("26", "bandwidth has no unit ('26')"),
        (26, "bandwidth has no unit (26)"),
        (26.5, "bandwidth has no unit (26.5)"),
        ("26 GB", "unknown bandwidth unit 'GB'"),
        ("26 gb/s", "unknown bandwidth unit 'gb/s'"),
        ("26 Gb/s", "unknown bandwidth unit 'Gb/s'"),  # bits or bytes? never guessed
        ("26 us", "unknown bandwidth unit 'us'"),
        ("fast", "not a bandwidth"),
        ("GB/s", "not a bandwidth"),
        ("26 GB / s", "not a bandwidth"),
        ("1,5 GB/s", "not a bandwidth"),
        ("inf GB/s", "not a bandwidth"),
        ("nan GB/s", "not a bandwidth"),
        ("", "not a bandwidth"),
        (None, "not a bandwidth"),
        ([], "not a bandwidth"),
        ("1e999 GB/s", "bandwidth is not finite"),
    ],
)
def test_refused_with_the_units_allowed(text: object, says: str) -> None:
    with pytest.raises(ValueError, match="allowed: ") as refusal:
        parse_quantity(text, "bandwidth")
    assert str(refusal.value).startswith(says)
    if "finite" not in says:
        assert str(refusal.value).endswith(", ".join(UNITS["bandwidth"]))


def test_minimum() -> None:
    assert parse_quantity("0 s", "time", minimum=0.0) == 0.0
    with pytest.raises(ValueError, match=r"time out of range \('-1 s'\), allowed: zero or more"):
        parse_quantity("-1 s", "time", minimum=0.0)
    with pytest.raises(ValueError, match=r"bandwidth out of range .*, allowed: more than zero"):
        parse_quantity("0 GB/s", "bandwidth", minimum=math.ulp(0.0))
