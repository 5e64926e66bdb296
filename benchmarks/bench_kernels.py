"""Predicted against measured kernels on this machine's CPU, one left out.

``python benchmarks/bench_kernels.py [SECONDS]`` runs ``paradiff profile kernels`` for SECONDS (default
180) with one thread, then predicts each GEMM, convolution and attention from the others, inside their
range. The transform is chosen on one half of the rows and scored on the other, both ways. Fails where a
median is over 10 %.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

from simulator.measured import FILE, TRANSFORMS, TRENDS, KernelTable, read_rows, tables

LIMIT = 0.10
KINDS = ("gemm", "conv", "attention")
LAUNCH = "from paradiff.cli import main as m; import sys; sys.argv[0] = 'paradiff'; m()"


def crossed_errors(table: KernelTable) -> np.ndarray:
    """|predicted / measured - 1| of every row, with the transform that the other half prefers."""
    choices = product(TRANSFORMS, TRENDS)
    errors = np.array([np.abs(np.expm1(table.left_out(*choice))) for choice in choices])
    halves = errors[:, ::2], errors[:, 1::2]
    scored = []
    for chooser, other in (halves, halves[::-1]):
        best = int(np.argmin(np.median(chooser, axis=1)))
        scored.append(other[best])
    return np.concatenate(scored)


def main() -> None:
    seconds = sys.argv[1] if len(sys.argv) > 1 else "180"
    within = True
    with tempfile.TemporaryDirectory() as folder:
        command = ["profile", "kernels", "--budget", seconds, "--output-dir", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", LAUNCH, *command], check=True, env=environment)
        header, rows = read_rows(Path(folder) / FILE)
    print(f"{header['device']}, torch {header['torch']}, {header['date']}")
    for kind, table in tables(rows, "fp32").items():
        errors = crossed_errors(table)
        median, far = np.median(errors), np.quantile(errors, 0.9)
        verdict = ""
        if kind in KINDS:
            within &= bool(median <= LIMIT)
            verdict = f", limit {LIMIT:.0%}"
        print(
            f"{kind}: {len(table.rows)} rows, median {median:.1%}{verdict}, 90 % within {far:.0%}"
        )
    if not within:
        raise SystemExit("over the limit")


if __name__ == "__main__":
    main()
