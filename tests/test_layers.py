"""The layers of CONTRIBUTING.md: imports go down only, and planning needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("paradiff", "simulator", "analysis", "hardware_profiles")
TORCH_SIDE = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "greenlet"}
L0_LIBRARIES = {"pydantic", "pydantic_core", "ruamel"}
L0 = (
    "paradiff.graph", "paradiff.dependencies", "paradiff.trace", "paradiff.profiles",
    "paradiff.units", "paradiff.config",
)  # fmt: skip
L1 = ("paradiff.strategies", "paradiff.planfile")
MODELS = ("paradiff.models", "paradiff.executor")
L3 = (
    "analysis", "simulator.runs", "simulator.planner", "simulator.service", "simulator.cuts",
    "simulator.search", "simulator.capacity", "simulator.sweep", "paradiff.lab",
)  # fmt: skip
L4 = ("paradiff.cli", "paradiff.__main__")
L2 = ("simulator",)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the product."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def layer(name: str) -> int:
    if name in PACKAGES:
        return 0  # the packages' own __init__ files hold nothing but a docstring
    if under(name, L0):
        return 0
    if under(name, L1):
        return 1
    if under(name, L3):
        return 3
    if under(name, L2) or under(name, MODELS):
        return 2
    assert under(name, ("paradiff.cli", "paradiff.__main__")), (
        f"{name} has no layer: say where it belongs"
    )
    return 4


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, functions and type-checking blocks included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = modules()
            yield from (name if name in known else node.module for name in names)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down_only(name: str) -> None:
    for target in imports(modules()[name]):
        if target.split(".")[0] not in PACKAGES:
            continue
        assert layer(target) <= layer(name), f"{name} imports {target}, which is above it"
        if layer(target) == layer(name) == 2:
            assert under(target, MODELS) == under(name, MODELS), f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_torch_stays_on_its_side(name: str) -> None:
    foreign = {target.split(".")[0] for target in imports(modules()[name])}
    if not under(name, MODELS):
        assert not foreign & TORCH_SIDE
    if layer(name) == 0:
        assert foreign <= L0_LIBRARIES | set(PACKAGES) | set(sys.stdlib_module_names)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
sys.argv = ['paradiff-plan', *{arguments}]
from paradiff.cli import plan_main
plan_main()
"""


def run_blocked(blocked: set[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(blocked=blocked, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_planning_runs_with_torch_blocked() -> None:
    arguments = ["--topology", "pcie8.yaml", "--strategy", "serial", "--strategy", "cfg=2"]
    done = run_blocked(TORCH_SIDE, arguments)
    assert done.returncode == 0, done.stderr
    assert "cfg=2" in done.stdout


def test_help_needs_no_numerics() -> None:
    """Import costs of what --help must not pay for: networkx 0.16 s, numpy 0.13 s, scipy 0.6 s."""
    heavy = TORCH_SIDE | {"numpy", "scipy", "networkx", "simpy", "plotly", "jinja2", "pydantic"}
    done = run_blocked(heavy - {"pydantic"}, ["--help"])
    assert done.returncode == 0, done.stderr
    assert "--topology" in done.stdout
