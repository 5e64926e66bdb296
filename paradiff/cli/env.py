"""``paradiff env``: what a report of a problem should say about the machine, as a block to paste.

Versions are read from the metadata of installed packages: nothing heavy is imported.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

import paradiff

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "greenlet",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "numpy", "scipy", "networkx", "simpy", "pydantic",
    "ruamel.yaml", "plotly", "jinja2", "typer", "rich", "pyarrow", "ray",
)  # fmt: skip
PREFIXES = ("NCCL_", "CUDA_VISIBLE_DEVICES", "GLOO_", "OMP_NUM_THREADS", "TORCH_NCCL_")
"""Environment variables that change how ranks run."""
QUERY = "name,driver_version,memory.total"
TIMEOUT_S = 20


def env() -> None:
    """Print versions, machine and GPUs as a block to paste into an issue."""
    typer.echo("```text")
    rows = list(_rows())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
    typer.echo("```")


def _rows() -> Iterator[tuple[str, str]]:
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
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["none seen (no nvidia-smi)"]
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not answer ({type(error).__name__})"]
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return [f"{number}: {line}" for number, line in enumerate(lines)] or ["none"]
