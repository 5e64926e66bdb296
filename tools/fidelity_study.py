"""Runs what the claims of ``analysis.fidelity_study`` need, on the small models; writes the page.

    OMP_NUM_THREADS=1 python tools/fidelity_study.py --seconds 170     # again until all is done
    python tools/fidelity_study.py --page

Goes on where it was stopped: each case is kept in ``docs/fidelity/`` as soon as it is measured. The
tables between the marks of ``docs/fidelity.md`` are made from those files alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from analysis.fidelity import compare
from analysis.fidelity_study import BOTH, SAMPLERS, Cell, cases, file_of, markdown, read

if TYPE_CHECKING:
    from paradiff.executor.fidelity import Bench

SAMPLES, SEED = 20, 1000
KEPT, PAGE = ROOT / "docs" / "fidelity", ROOT / "docs" / "fidelity.md"
MARKS = re.compile(r"(?<=<!-- study -->\n).*(?=<!-- end -->)", re.DOTALL)

Kept = dict[str, dict[str, list[float]]]
"""Spec and steps -> metric of the final result -> samples."""


def load(cell: Cell) -> Kept:
    file = file_of(KEPT, cell)
    return json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else {}


def save(cell: Cell, kept: Kept) -> None:
    from paradiff.executor.fidelity import versions

    facts = {"schema": "paradiff.fidelity-study/1", **cell._asdict(), "seed": SEED, **versions()}
    text = json.dumps({**facts, "cases": kept}).replace('}, "', '},\n"')
    file = file_of(KEPT, cell)
    KEPT.mkdir(exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)


def run(models: Sequence[str], samplers: Sequence[str], seconds: float) -> bool:
    """Measure what is missing; False where time ran out before all was done."""
    from paradiff.executor.fidelity import Bench
    from paradiff.executor.job import Job

    warnings.simplefilter("ignore")
    end = time.monotonic() + seconds
    for model in models:
        bench = Bench.of(Job(source=model, spec="serial", batch=SAMPLES, seed=SEED))
        if not all(measured(bench, Cell(model, sampler), end) for sampler in samplers):
            return False
    return True


def measured(bench: Bench, cell: Cell, end: float) -> bool:
    """The missing cases of one cell, each kept as soon as it is made; False where ``end`` came first."""
    from paradiff.executor.fidelity import look

    kept, references = load(cell), {}
    for case in cases(*cell):
        name = f"{case.spec} {case.steps}"
        if name in kept:
            continue
        if time.monotonic() > end:
            return False
        if case.steps not in references:
            references[case.steps] = look(bench.prepared("serial", case.steps, cell.sampler))
        seen = look(bench.prepared(case.spec, case.steps, cell.sampler))
        found = compare(seen, references[case.steps]).final
        kept[name] = {key: [float(f"{x:.5g}") for x in values] for key, values in found.items()}
        save(cell, kept)
        print(*cell, name, f"{np.median(found['relative_l2']):.4f}", flush=True)
    return True


def page() -> str:
    """docs/fidelity.md with the tables of the kept file."""
    return MARKS.sub(lambda _: markdown(read(KEPT)), PAGE.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--model", action="append", choices=BOTH, help="default: both")
    parser.add_argument("--sampler", action="append", choices=SAMPLERS, help="default: both")
    parser.add_argument("--page", action="store_true", help="only write docs/fidelity.md")
    given = parser.parse_args()
    if not given.page:
        is_done = run(given.model or BOTH, given.sampler or SAMPLERS, given.seconds)
        print("all is done" if is_done else "stopped, run it again")
    if PAGE.exists():
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
