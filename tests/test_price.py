"""What an hour of a box costs."""

from dataclasses import replace

import pytest

from simulator.gpu import load_gpu
from simulator.price import price_of
from simulator.topology import load_topology


def test_a_box_costs_its_gpus_and_says_by_whose_prices() -> None:
    """pcie8 is eight L40: 8 x 1.14 = 9.12 USD. Two models: 2 x 2.25 + 2 x 0.49 = 5.48."""
    price = price_of(load_topology("pcie8"))
    assert price.per_hour == 9.12
    assert price.source == f"8 l40 at 1.14 USD: {load_gpu('l40').price_per_hour.source}"  # type: ignore[union-attr]
    mixed = price_of(load_topology("pcie4-l40s-l4"))
    assert mixed.per_hour == pytest.approx(5.48)
    assert "2 l40s at 2.25 USD" in mixed.source
    assert "2 l4 at 0.49 USD" in mixed.source


def test_the_file_of_a_box_wins() -> None:
    box = replace(load_topology("pcie8-l20"), price_per_hour=8.0)
    assert price_of(box) == (8.0, "topology file")


def test_a_gpu_that_nobody_prices_leaves_the_box_without() -> None:
    price = price_of(load_topology("nvlink8-a800"))
    assert price == (None, "neither nvlink8-a800 nor a800 has a price_per_hour")
