"""These tests import torch and diffusers: none is collected where they are missing or unwanted."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Tiny models on tiny tensors: threads of two test processes would only wait for each other."""
for library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    unwanted = "not torch" in config.getoption("markexpr")
    missing = find_spec("torch") is None or find_spec("diffusers") is None
    return True if unwanted or missing else None
