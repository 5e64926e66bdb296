"""Which rank this process is, as the launcher that started it says. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}
SLURM_PORTS = range(15_000, 30_000)
"""Below the ports that Linux gives to outgoing connections."""


@dataclass(frozen=True, slots=True)
class Place:
    """Rank, and where rank 0 is met. ``is_store_hosted``: torchrun already keeps the store there."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    is_store_hosted: bool

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Place | None:
        """From the names that torchrun sets (as may any launcher), else from those of a Slurm step.

        None where there are neither. A batch script is no step, nor is a step of one task: in both
        ``paradiff run`` is a process of its own, although ``SLURM_PROCID`` is set. Raises ValueError for
        half of the names, and for ranks that are none.
        """
        if "RANK" not in environment:
            if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
                return None
            environment = {**_of_slurm(environment), **environment}
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        if missing:
            raise ValueError(
                f"one of several ranks, but without {', '.join(missing)}: start it with torchrun"
            )
        try:
            rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local, port = int(environment.get("LOCAL_RANK", rank)), int(environment["MASTER_PORT"])
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT: {error}") from None
        if not 0 <= rank < world or not 0 <= local < world:
            raise ValueError(
                f"RANK {rank}, LOCAL_RANK {local} of WORLD_SIZE {world}: allowed are 0 to {world - 1}"
            )
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, world, local, environment["MASTER_ADDR"], port, hosted)


def gpu_of(place: Place, planned: Sequence[tuple[str, int]], visible: str | None) -> int:
    """Number that the GPU on which this rank is ``planned`` has among those that this process sees.

    ``planned``: for each rank its machine, and its GPU's number there. ``visible``: what
    CUDA_VISIBLE_DEVICES says. Where that leaves out a GPU that the plan has on this machine, others have
    chosen for the rank (a scheduler, Ray, a user): it takes the GPU of its number on its machine. Raises
    ValueError where the ranks that were started on one machine are not those that are planned on one.
    """
    machine, gpu = planned[place.rank]
    wanted = {number for where, number in planned if where == machine}
    shown = None if visible is None else _numbers(visible)
    if shown is not None and not wanted <= set(shown):
        return place.local_rank
    first = place.rank - place.local_rank
    strangers = [r for r in range(first, place.rank) if planned[r][0] != machine]
    if strangers:
        other, where = strangers[0], planned[strangers[0]][0]
        raise ValueError(
            f"rank {place.rank} was started on the machine of rank {other}, but is planned on"
            f" {machine} and rank {other} on {where}: {BY_MACHINE}"
        )
    if first and planned[first - 1][0] == machine:
        raise ValueError(
            f"rank {place.rank} was not started on the machine of rank {first - 1}, but both are planned"
            f" on {machine}: {BY_MACHINE}"
        )
    return gpu if shown is None else shown.index(gpu)


BY_MACHINE = (
    "start on each machine the ranks that the plan's placement has there (docs/cluster.md), or run the"
    " strategy without the plan"
)


def _numbers(visible: str) -> list[int]:
    return [int(text) for text in visible.split(",") if text.strip().isdecimal()]


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's names for a task of an srun step (srun(1), Output Environment Variables).

    Rank 0 is the first task of the first node. All tasks of a step agree on a port, and the next step of
    the job takes another.
    """
    job, step = (int(environment.get(f"SLURM_{n}_ID", "0")) for n in ("JOB", "STEP"))
    own = {ours: environment[slurms] for ours, slurms in SLURM.items() if slurms in environment}
    own["MASTER_PORT"] = str(SLURM_PORTS[(job + step) % len(SLURM_PORTS)])
    if "SLURM_STEP_NODELIST" in environment:
        own["MASTER_ADDR"] = first_host(environment["SLURM_STEP_NODELIST"])
    return own


def first_host(nodes: str) -> str:
    """``gpu[07-09,12]-ib,login1`` -> ``gpu07-ib``: the first of a Slurm node list."""
    found = re.match(r"(?P<before>[^\[,]*)(?:\[(?P<number>\d+)[^\]]*\](?P<after>[^,]*))?", nodes)
    assert found is not None, "every part is optional"
    return "".join(part or "" for part in found.groups())
