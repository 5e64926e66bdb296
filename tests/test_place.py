"""Which rank a process is: torchrun's names, and those of a Slurm step."""

from __future__ import annotations

import pytest

from paradiff.cli.run import Given, planned_gpus
from paradiff.config import ConfigError
from paradiff.executor.place import SLURM_PORTS, Place, first_host, gpu_of
from paradiff.planfile import PlanFile

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


# --------------------------------------------------------------------------------- a plan's placement


def placed(rank: int, machines: list[int]) -> Place:
    """Rank ``rank`` of ranks started machine by machine, ``machines`` counts them."""
    first = max(sum(machines[:m]) for m in range(len(machines)) if sum(machines[:m]) <= rank)
    return Place(rank, sum(machines), rank - first, "a", 29500, False)


ONE = [("box", 2), ("box", 0), ("box", 3), ("box", 1)]
TWO = [("left", 1), ("left", 0), ("right", 0), ("right", 1)]
ACROSS = [("left", 1), ("right", 0), ("left", 0), ("right", 1)]


@pytest.mark.parametrize(
    ("planned", "machines", "visible", "expected"),
    [
        (ONE, [4], None, [2, 0, 3, 1]),
        (TWO, [2, 2], None, [1, 0, 0, 1]),
        (TWO, [2, 2], "0,1", [1, 0, 0, 1]),
        # of what is visible, in the order in which it is: set by hand, to the placement or otherwise
        (ONE, [4], "2,0,3,1", [0, 1, 2, 3]),
        (ONE, [4], "0,1,2,3,4,5,6,7", [2, 0, 3, 1]),
        (ONE, [4], "7, 3,2,1,0", [2, 4, 1, 3]),
        # others have chosen: four other GPUs, one for each rank, by name
        (ONE, [4], "4,5,6,7", [0, 1, 2, 3]),
        (ONE, [1, 1, 1, 1], "0", [0, 0, 0, 0]),
        (ONE, [4], "GPU-5ebe9f43,GPU-5ebe9f44,GPU-5ebe9f45,GPU-5ebe9f46", [0, 1, 2, 3]),
        (ACROSS, [1, 1, 1, 1], "3", [0, 0, 0, 0]),
    ],
)
def test_a_rank_takes_the_gpu_that_it_is_planned_on(
    planned: list[tuple[str, int]], machines: list[int], visible: str | None, expected: list[int]
) -> None:
    ranks = range(len(planned))
    assert [gpu_of(placed(rank, machines), planned, visible) for rank in ranks] == expected


@pytest.mark.parametrize(
    ("planned", "machines", "message"),
    [
        (
            TWO,
            [4],
            "rank 2 was started on the machine of rank 0, but is planned on right and rank 0",
        ),
        (ACROSS, [2, 2], "rank 1 was started on the machine of rank 0, but is planned on right"),
        (
            ONE,
            [2, 2],
            "rank 2 was not started on the machine of rank 1, but both are planned on box",
        ),
    ],
)
def test_ranks_started_elsewhere_than_planned_are_refused(
    planned: list[tuple[str, int]], machines: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*docs/cluster\.md"):
        [gpu_of(placed(rank, machines), planned, None) for rank in range(len(planned))]


def plan_of(topology: str, *placement: int) -> PlanFile:
    workload = {"height": 8, "width": 8, "frames": 1, "steps": 1, "batch": 1, "dtype": "bf16"}
    return PlanFile(
        schema="paradiff.planfile/1", model="sdxl", topology=topology, workload=workload,
        spec=f"patch={len(placement)}", placement=placement, fingerprint="0", predicted_latency_s=1.0,
    )  # fmt: skip


def test_machines_of_a_plan_are_those_of_its_box() -> None:
    """Device 11 of eight machines of eight is number 3 of the second."""
    planned = planned_gpus(plan_of("nvlink8x8-h100", 11, 0, 63))
    assert [number for _, number in planned] == [3, 0, 7]
    assert len({machine for machine, _ in planned}) == 3


@pytest.mark.parametrize(
    ("plan", "device", "expected"),
    [
        (plan_of("pcie8", 5, 0, 3), "cuda", ["cuda:5", "cuda:0", "cuda:3"]),
        (plan_of("pcie8", 5, 0, 3), "cpu", ["cpu", "cpu", "cpu"]),
        # ranks in the order of the GPUs, on whatever machines they were started, and without a plan
        (plan_of("nowhere", 0, 1, 2), "cuda", ["cuda:0", "cuda:1", "cuda:2"]),
        (None, "cuda", ["cuda:0", "cuda:1", "cuda:2"]),
        (plan_of("pcie8", 5, 0, 8), "cuda", "p.yaml: placement: GPU 8, allowed: the 8 of pcie8"),
        (plan_of("nowhere", 5, 0, 3), "cuda", "p.yaml: nowhere: no such file in topologies"),
        (
            plan_of("nvlink8x8-h100", 5, 0, 8),
            "cuda",
            "p.yaml: rank 2 was started on the machine of",
        ),
    ],
)
def test_devices_of_a_launch(
    plan: PlanFile | None, device: str, expected: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = Given.__new__(Given)
    given.options, given.plan = {"device": device, "plan": "p.yaml"}, plan
    places = [placed(rank, [3]) for rank in range(3)]
    if isinstance(expected, list):
        assert [given.device(place) for place in places] == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            [given.device(place) for place in places]
