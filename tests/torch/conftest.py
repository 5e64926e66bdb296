"""These tests import torch and diffusers: none is collected where they are missing or unwanted.

A test that uses ``device`` runs on the CPU and, marked ``gpu``, on a GPU.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Tiny models on tiny tensors: threads of two test processes would only wait for each other."""
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""The same bits every time, whatever the stream."""
for library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    unwanted = "not torch" in config.getoption("markexpr")
    missing = find_spec("torch") is None or find_spec("diffusers") is None
    return True if unwanted or missing else None


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames and has_gpu():
        both = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("device", both, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU: of each module that would run there one test, which is skipped."""
    users = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    if not users or has_gpu():
        return
    for module in dict.fromkeys(item.getparent(pytest.Module) for item in users):
        absent = pytest.Function.from_parent(module, name="on_a_gpu", callobj=_skip)
        absent.add_marker("gpu")
        items.append(absent)


def _skip() -> None:
    pytest.skip("torch sees no CUDA device")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the runs of a test compute (``placed.device``), there with the same bits every time."""
    name: str = getattr(request, "param", "cpu")
    if name != "cpu":
        import placed
        import torch

        monkeypatch.setattr(placed, "device", name)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return name
