"""The machine that a process runs on, in words: what a reader must know of it to trust a result.

Versions are read from the metadata of installed packages: nothing heavy is imported.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import paradiff

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "greenlet",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "numpy", "scipy", "networkx", "simpy", "pydantic",
    "ruamel.yaml", "plotly", "jinja2", "typer", "rich", "pyarrow", "ray",
)  # fmt: skip
PREFIXES = ("NCCL_", "CUDA_VISIBLE_DEVICES", "GLOO_", "OMP_NUM_THREADS", "TORCH_NCCL_")
"""Environment variables that change how ranks run."""
QUERY = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
TOPOLOGY = ("topo", "-m")
TIMEOUT_S = 20


def rows() -> Iterator[tuple[str, str]]:
    """Name and value of each fact, GPUs one by one; for people to read."""
    yield "paradiff", paradiff.__version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    yield "cpu", f"{_cpu()}, {os.cpu_count()} logical cores"
    yield "memory", _memory()
    for number, gpu in enumerate(_gpus()):
        yield ("gpus" if number == 0 else ""), gpu
    for name in LIBRARIES:
        found = _version(name)
        if found is not None or not name.startswith("nvidia-"):
            yield name, found or "not installed"
    for name in sorted(os.environ):
        if name.startswith(PREFIXES):
            yield name, os.environ[name]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """Model name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "not known"
    return f"{total / 1e9:.1f} GB"


def _gpus() -> list[str]:
    """A line a GPU: number, name, driver, memory, as ``nvidia-smi`` says; or why there is none."""
    try:
        lines = _nvidia_smi(QUERY)
    except FileNotFoundError:
        return ["none seen (no nvidia-smi)"]
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not answer ({type(error).__name__})"]
    return [f"{number}: {line.strip()}" for number, line in enumerate(lines)] or ["none"]


def _nvidia_smi(arguments: Sequence[str]) -> list[str]:
    """The lines that it prints. Raises OSError where there is none, SubprocessError where it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise FileNotFoundError("nvidia-smi")
    done = subprocess.run(
        [tool, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    return [line for line in done.stdout.splitlines() if line.strip()]


def facts() -> dict[str, object]:
    """The same for programs, with the host's name and, where there are GPUs, ``nvidia-smi topo -m``."""
    said: dict[str, list[str]] = {}
    last = ""
    for name, value in rows():
        last = name or last
        said.setdefault(last, []).append(value)
    try:
        topology = _nvidia_smi(TOPOLOGY)
    except (OSError, subprocess.SubprocessError):
        topology = []
    one_or_all = {name: values if name == "gpus" else values[0] for name, values in said.items()}
    return {"host": socket.gethostname(), **one_or_all, "topology": topology}
