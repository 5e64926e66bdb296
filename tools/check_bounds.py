"""The planner's choice against exhaustive search: every model of the catalogue on every eight-GPU box.

``python tools/check_bounds.py [--seconds S] [MODEL ...]`` plans each pair twice, once with all
candidates simulated and once with bounds, and fails where the first two, the best exact one, the front
or the reasons differ. Each model's own steps. Schedules are built once for all boxes, and what the
exhaustive search has simulated is not simulated again. Each pair becomes a row of
``tests/golden/exhaustive.csv`` as it is done. A row names what it was found with: ``inputs``, the
numbers of model, box, GPUs and kernel tables, and ``code``, the text of all that plans. A pair found to
be the same with today's inputs and code is left out. ``--seconds``: begin no further pair after that.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from paradiff.cli.common import write_file
from paradiff.config import available, find
from paradiff.profiles import load_profile
from paradiff.strategies import Workload
from simulator.gpu import load_gpu
from simulator.planner import Plan, Request, plan
from simulator.runs import Runs
from simulator.symmetry import Quotient
from simulator.topology import Topology, load_topology

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "golden" / "exhaustive.csv"
COLUMNS = (
    "model", "box", "steps", "same", "first", "second", "best_exact", "simulated", "bounded",
    "rejected", "cpu_s", "date", "inputs", "code",
)  # fmt: skip


def models() -> list[str]:
    """The catalogue without the tiny twins of the tests."""
    return [name for name in available("models", ".json") if not name.startswith("tiny-")]


def boxes() -> list[Topology]:
    """Every shipped box of eight GPUs; those of the laboratory are processes of one machine."""
    real = [name for name in available("topologies") if not name.startswith("lab-")]
    return [box for box in map(load_topology, real) if len(box.gpus) == 8]


def _digest(*texts: bytes) -> str:
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


@cache
def code() -> str:
    """What decides a plan: the text of all that ``simulator.planner`` imports, as twelve digits."""
    parts = ("paradiff", "simulator", "analysis")
    files = {
        Path(module.__file__)
        for name, module in sys.modules.items()
        if name.split(".")[0] in parts and not name.startswith("paradiff.cli") and module.__file__
    }
    return _digest(*(file.read_bytes() for file in sorted(files)))


def _numbers(value: Any) -> Any:
    """``value`` without what no plan depends on: where numbers are from, how well they fit, prices."""
    if isinstance(value, dict):
        left_out = ("source", "fitted", "price_per_hour")
        return {k: _numbers(v) for k, v in value.items() if k not in left_out}
    return [_numbers(v) for v in value] if isinstance(value, (list, tuple)) else value


@cache
def _tables() -> tuple[bytes, ...]:
    folder = find("gpus", "l40").parent.parent / "measured"
    return tuple(file.read_bytes() for file in sorted(folder.glob("*/*.csv")))


@cache
def _hardware(box: Topology) -> bytes:
    gpus = {name: load_gpu(name).model_dump() for name in dict.fromkeys(box.profiles)}
    return json.dumps(_numbers([gpus, asdict(box)]), sort_keys=True, default=str).encode()


def _model(name: str, box: Topology) -> bytes:
    """The profile's text; without where V is projected on a box of one machine, for which no candidate
    asks (``simulator.tailored``)."""
    text = find("models", name, ".json").read_bytes()
    return text if len(box.nodes) > 1 else re.sub(rb', "projected": \[[\d, ]*\]', b"", text)


def inputs(model: str, box: Topology) -> str:
    """What a plan of ``model`` on ``box`` is made from, as twelve digits."""
    return _digest(_model(model, box), _hardware(box), *_tables())


def wanted(result: Plan) -> list[object]:
    """What bounds must not change."""
    exact = next((c for c in result.ranked if c.exact), None)
    front = sorted(c.spec for c in result.ranked if c.pareto)
    return [result.ranked[:2], exact, front, result.decided_by, result.rejected]


def checked(model: str, known: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """A row for each box that has none of today's inputs and code."""
    profile = load_profile(find("models", model, ".json"))
    sizes = {key: profile.defaults[key] for key in ("height", "width", "frames")}
    workload = Workload(**sizes, steps=profile.defaults["steps"])
    schedules: dict[str, Quotient] = {}
    for box in boxes():
        made_of = inputs(model, box)
        if (model, box.name, made_of, code()) in known:
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
            "inputs": made_of,
            "code": code(),
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
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    wrong = 0
    for model in asked.models or models():
        same = [row for row in rows() if row["same"] == "yes"]
        known = {(row["model"], row["box"], row["inputs"], row["code"]) for row in same}
        for row in checked(model, known):
            wrong += row["same"] != "yes"
            record(row)
            print(*row.values(), sep=", ", flush=True)
            if time.monotonic() > end:
                sys.exit(1 if wrong else 0)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
