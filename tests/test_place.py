"""Which rank a process is: torchrun's names, and those of a Slurm step."""

from __future__ import annotations

import pytest

from paradiff.executor.place import SLURM_PORTS, Place, first_host

TASK = {
    "SLURM_JOB_ID": "200505", "SLURM_STEP_ID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gnode[10,20,25,37]",
}  # fmt: skip
"""What srun sets for the second task of the third node."""
RANK = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_a_task_of_a_slurm_step_is_a_rank() -> None:
    """Port: 15000 + (200505 + 1) % 15000."""
    assert Place.of_environment(TASK) == Place(5, 8, 1, "gnode10", 20_506, False)
    assert 20_506 in SLURM_PORTS


def test_a_batch_script_and_a_step_of_one_task_are_not() -> None:
    """The batch script has SLURM_PROCID and SLURM_NTASKS of the job, but is no step."""
    batch = {k: v for k, v in TASK.items() if "STEP" not in k} | {"SLURM_NTASKS": "8"}
    assert Place.of_environment(batch) is None
    assert Place.of_environment(TASK | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert Place.of_environment({}) is None


def test_torchrun_below_srun_wins_and_an_address_may_be_given() -> None:
    assert Place.of_environment(TASK | RANK) == Place(3, 4, 3, "a", 29500, False)
    given = Place.of_environment(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert given == Place(5, 8, 1, "10.0.0.1", 7, False)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gnode10", "gnode10"),
        ("a1,a2", "a1"),
        ("tux[1-3,5],other7", "tux1"),
        ("gpu[07-09]-ib", "gpu07-ib"),
        ("r[2]n4,r3n1", "r2n4"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_half_of_the_names_is_refused() -> None:
    with pytest.raises(
        ValueError, match="without MASTER_ADDR, MASTER_PORT: start it with torchrun"
    ):
        Place.of_environment({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="without RANK, MASTER_ADDR"):
        Place.of_environment({"SLURM_STEP_NUM_TASKS": "2"})
    with pytest.raises(ValueError, match="WORLD_SIZE, LOCAL_RANK, MASTER_PORT: invalid literal"):
        Place.of_environment(TASK | {"SLURM_STEP_NUM_TASKS": "two"})
    with pytest.raises(ValueError, match="MASTER_PORT: invalid literal"):
        Place.of_environment(RANK | {"MASTER_PORT": "http"})
    with pytest.raises(
        ValueError, match="RANK 4, LOCAL_RANK 4 of WORLD_SIZE 4: allowed are 0 to 3"
    ):
        Place.of_environment(RANK | {"RANK": "4"})
