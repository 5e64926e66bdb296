"""A run on a Ray cluster: one actor a rank, packed on as few machines as hold them.

``python tools/cluster/ray_ranks.py --ranks 8 --gpus-per-rank 1 run PLAN.yaml --device cuda`` starts
``paradiff run PLAN.yaml --device cuda`` as eight ranks (``acceptance`` and its options in place of ``run
...``: tools/acceptance.py). Needs ``pip install 'paradiff[run,ray]'`` on every machine, and this
directory at the same path there. Ranks are numbered machine by machine. Rank 0's output is printed. The
exit code is that of the first rank that fails; the others are then ended.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from paradiff.executor.launch import die_with_parent

ACCEPTANCE = Path(__file__).resolve().parent.parent / "acceptance.py"


class Rank:
    """One rank's process on the machine that Ray has chosen, with the GPUs that Ray has given it."""

    def where(self) -> tuple[str, int]:
        """Address of this machine, and a port that is free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(
        self, command: list[str], directory: str, facts: dict[str, str]
    ) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of the command."""
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", **facts},
            capture_output=True,
            text=True,
            preexec_fn=die_with_parent,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


def run(command: list[str], ranks: int, cpus: float, gpus: float, timeout_s: float) -> int:
    """Start the ranks, wait for all, print what rank 0 says. The exit code."""
    bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    group = placement_group([bundle] * ranks, strategy="PACK")
    if not group.wait(timeout_s):
        print(f"ray_ranks: no room for {ranks} x {bundle} within {timeout_s:g} s", file=sys.stderr)
        return 1
    kind = ray.remote(num_cpus=cpus, num_gpus=gpus)(Rank)
    actors = [
        kind.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, i)).remote()
        for i in range(ranks)
    ]
    places = ray.get([actor.where.remote() for actor in actors])
    machines = [machine for machine, _ in places]
    order = sorted(range(ranks), key=lambda i: machines.index(machines[i]))
    address, port = places[order[0]]
    running: dict[Any, int] = {}
    for rank, i in enumerate(order):
        # Where Ray shows a rank its own GPU alone, that GPU is number 0.
        local = 0 if gpus else sum(machines[j] == machines[i] for j in order[:rank])
        facts = {
            "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local, "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }  # fmt: skip
        texts = {name: str(value) for name, value in facts.items()}
        running[actors[i].run.remote(command, os.getcwd(), texts)] = rank
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        rank = running.pop(done)
        code, out, errors = ray.get(done)
        if rank == 0 or code:
            sys.stdout.write(out)
            sys.stderr.write(errors)
        if code:
            for actor in actors:
                ray.kill(actor)
            return int(code)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--address", default="auto", help="of the cluster; local: start one here")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--cpus-per-rank", type=float, default=1.0)
    parser.add_argument("--gpus-per-rank", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for room")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what paradiff is given")
    options = parser.parse_args()
    if not options.command:
        parser.error("what should run? run PLAN.yaml ..., or acceptance ...")
    first, *others = options.command
    what = [str(ACCEPTANCE)] if first == "acceptance" else ["-m", "paradiff", first]
    is_local = options.address == "local"
    try:
        ray.init(
            address=options.address,
            num_cpus=int(options.ranks * options.cpus_per_rank) if is_local else None,
            log_to_driver=False,
            include_dashboard=False if is_local else None,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        parser.error(f"--address {options.address}: no Ray cluster answers ({error})")
    try:
        code = run(
            [sys.executable, *what, *others],
            options.ranks,
            options.cpus_per_rank,
            options.gpus_per_rank,
            options.timeout,
        )
    finally:
        ray.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    main()
