"""The planner's choice against exhaustive search: every model of the catalogue on every eight-GPU box.

``python tools/check_bounds.py [--steps N] [MODEL ...]`` plans each pair twice, once with every candidate
simulated and once with bounds, and fails where the first two, the best exact one or the front differ.
Default: each model's own steps. A line a pair, as it is done; an hour or so for all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.resources import files

from paradiff.config import find
from paradiff.profiles import Profile, load_profile
from paradiff.strategies import Workload
from simulator.planner import Plan, Request, plan
from simulator.topology import Topology, load_topology


def shipped(kind: str, suffix: str) -> list[str]:
    folder = files("hardware_profiles") / kind
    return sorted(p.name.removesuffix(suffix) for p in folder.iterdir() if p.name.endswith(suffix))


def planned(profile: Profile, box: Topology, steps: int, top: int | None) -> tuple[Plan, float]:
    sizes = {key: profile.defaults[key] for key in ("height", "width", "frames")}
    workload = Workload(**sizes, steps=steps)
    start = time.process_time()
    result = plan(Request(profile=profile, topology=box, workload=workload, gpus=8, top=top))
    return result, time.process_time() - start


def wanted(result: Plan) -> list[object]:
    """What bounds must not change."""
    exact = next((c for c in result.ranked if c.exact), None)
    front = sorted(c.spec for c in result.ranked if c.pareto)
    return [result.ranked[:2], exact, front, result.decided_by, result.rejected]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="default: all that are shipped")
    parser.add_argument("--steps", type=int, help="default: each model's own")
    asked = parser.parse_args()
    boxes = [
        box for box in map(load_topology, shipped("topologies", ".yaml")) if len(box.gpus) == 8
    ]
    wrong = 0
    models = asked.models or [m for m in shipped("models", ".json") if not m.startswith("tiny-")]
    for model in models:
        profile = load_profile(find("models", model, ".json"))
        for box in boxes:
            steps = asked.steps or profile.defaults["steps"]
            (every, slow_s), (pruned, fast_s) = (
                planned(profile, box, steps, top) for top in (None, 2)
            )
            same = wanted(every) == wanted(pruned)
            wrong += not same
            choice = pruned.ranked[0].spec if pruned.ranked else "nothing fits"
            print(
                f"{'same' if same else 'DIFFERENT'}  {model} on {box.name}: {choice}; "
                f"{len(every.ranked)} candidates, {len(pruned.bounded)} bounded away, "
                f"{slow_s:.1f} s and {fast_s:.1f} s of CPU",
                flush=True,
            )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
