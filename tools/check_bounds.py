"""The planner's choice against exhaustive search: every model of the catalogue on every eight-GPU box.

``python tools/check_bounds.py [--steps N] [--seconds S] [--again] [MODEL ...]`` plans each pair twice,
once with all candidates simulated and once with bounds, and fails where the first two, the best exact
one, the front or the reasons differ. Default: each model's own steps. Schedules are built once for all
boxes, and what the exhaustive search has simulated is not simulated again. Each pair becomes a row of
``tests/golden/exhaustive.csv`` as it is done; a pair found to be the same is left out but with
``--again``. ``--seconds``: begin no further pair after that long.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paradiff.cli.common import write_file
from paradiff.config import available, find
from paradiff.profiles import load_profile
from paradiff.strategies import Workload
from simulator.planner import Plan, Request, plan
from simulator.runs import Runs
from simulator.symmetry import Quotient
from simulator.topology import Topology, load_topology

RECORD = Path(__file__).parent.parent / "tests" / "golden" / "exhaustive.csv"
COLUMNS = (
    "model", "box", "steps", "same", "first", "second", "best_exact", "simulated", "bounded",
    "rejected", "cpu_s", "date",
)  # fmt: skip


def models() -> list[str]:
    """The catalogue without the tiny twins of the tests."""
    return [name for name in available("models", ".json") if not name.startswith("tiny-")]


def boxes() -> list[Topology]:
    """Every shipped box of eight GPUs; those of the laboratory are processes of one machine."""
    real = [name for name in available("topologies") if not name.startswith("lab-")]
    return [box for box in map(load_topology, real) if len(box.gpus) == 8]


def wanted(result: Plan) -> list[object]:
    """What bounds must not change."""
    exact = next((c for c in result.ranked if c.exact), None)
    front = sorted(c.spec for c in result.ranked if c.pareto)
    return [result.ranked[:2], exact, front, result.decided_by, result.rejected]


def checked(model: str, steps: int | None, known: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """A row for each box that has none."""
    profile = load_profile(find("models", model, ".json"))
    sizes = {key: profile.defaults[key] for key in ("height", "width", "frames")}
    workload = Workload(**sizes, steps=steps or profile.defaults["steps"])
    schedules: dict[str, Quotient] = {}
    for box in boxes():
        if (model, box.name) in known:
            continue
        start = time.process_time()
        runs = Runs(profile, box, workload, "eager", schedules=schedules)
        every, pruned = (
            plan(
                Request(profile=profile, topology=box, workload=workload, gpus=8, top=top),
                runs=runs,
            )
            for top in (None, 2)
        )
        ranked = [c.spec for c in every.ranked[:2]] + ["", ""]
        yield {
            "model": model,
            "box": box.name,
            "steps": workload.steps,
            "same": "yes" if wanted(every) == wanted(pruned) else "NO",
            "first": ranked[0] or "nothing fits",
            "second": ranked[1],
            "best_exact": next((c.spec for c in every.ranked if c.exact), ""),
            "simulated": len(every.ranked),
            "bounded": len(pruned.bounded),
            "rejected": len(every.rejected),
            "cpu_s": f"{time.process_time() - start:.1f}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }


def rows(path: Path = RECORD) -> list[dict[str, str]]:
    """What is recorded."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def record(row: dict[str, Any]) -> None:
    """Put a row into the record, in order, whole or not at all; several processes may."""
    with Path(__file__).open(encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pairs = {(each["model"], each["box"]): each for each in rows()}
        pairs[row["model"], row["box"]] = row
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(pairs[pair] for pair in sorted(pairs))
        write_file(RECORD, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--again", action="store_true", help="also what is recorded as the same")
    parser.add_argument("--steps", type=int, help="default: each model's own")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    wrong = 0
    for model in asked.models or models():
        done = [] if asked.again else [row for row in rows() if row["same"] == "yes"]
        known = {(row["model"], row["box"]) for row in done}
        for row in checked(model, asked.steps, known):
            wrong += row["same"] != "yes"
            record(row)
            print(*row.values(), sep=", ", flush=True)
            if time.monotonic() > end:
                sys.exit(1 if wrong else 0)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
