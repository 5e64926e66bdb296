"""``paradiff env`` and shell completion."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import paradiff
from paradiff.cli import app

ROOT = str(Path(__file__).parent.parent)
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'diffusers', 'numpy', 'networkx', 'ray'}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
sys.argv = ['paradiff', 'env']
from paradiff.cli import main
main()
"""


def completed(words: str) -> list[str]:
    """What bash would offer after ``words``."""
    command = words.split()[0]
    entry = {"paradiff": "main", "paradiff-plan": "plan_main"}[command]
    done = subprocess.run(
        [sys.executable, "-c", f"from paradiff.cli import {entry}; {entry}()"],
        env={
            **os.environ,
            "PYTHONPATH": ROOT,
            f"_{command.upper().replace('-', '_')}_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split()


def test_the_block_names_versions_without_importing_anything_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        env={**os.environ, "PYTHONPATH": ROOT, "NCCL_P2P_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    said = dict(line.split(maxsplit=1) for line in lines[1:-1] if not line.startswith(" "))
    assert said["paradiff"] == paradiff.__version__
    assert said["numpy"] == version("numpy")
    assert said["python"].startswith(sys.version.split()[0])
    assert said["NCCL_P2P_DISABLE"] == "1"
    assert {"platform", "cpu", "memory", "gpus", "torch"} <= set(said)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo 'NVIDIA L40, 550.54, 46068 MiB'; echo 'NVIDIA L40, 550.54, 46068 MiB'",
            "1: NVIDIA L40",
        ),
        ("exit 9", "nvidia-smi does not answer (CalledProcessError)"),
        ("true", "none"),
    ],
)
def test_gpus_are_what_nvidia_smi_says(
    script: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert expected in CliRunner().invoke(app, ["env"]).stdout
    monkeypatch.setenv("PATH", "")
    assert "none seen (no nvidia-smi)" in CliRunner().invoke(app, ["env"]).stdout


def test_completion_offers_commands_options_and_shipped_names() -> None:
    assert completed("paradiff ca") == ["capacity"]
    assert "--request-rate" in completed("paradiff capacity --req")
    assert completed("paradiff plan --topology nvlink8-h2") == ["nvlink8-h20", "nvlink8-h200"]
    assert completed("paradiff plan --model flux1-s") == ["flux1-schnell"]
    assert completed("paradiff run --model flux1-s") == ["flux1-schnell"]
    assert completed("paradiff-plan --model flux1-s") == ["flux1-schnell"]
    assert completed("paradiff topology import --gpu l40") == ["l40", "l40s"]
    assert completed("paradiff topology doctor nvlink8-h2") == ["nvlink8-h20", "nvlink8-h200"]
    assert completed("paradiff validate lab --topology lab-t") == ["lab-trunk"]
