"""These tests import torch and diffusers: none is collected where they are missing or unwanted."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    unwanted = "not torch" in config.getoption("markexpr")
    missing = find_spec("torch") is None or find_spec("diffusers") is None
    return True if unwanted or missing else None
