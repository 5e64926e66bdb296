"""Runs that go wrong, on real processes: they end soon, say what and where, and leave nothing.

A rank that is killed, stalls, never starts, has another graph, runs out of memory or meets NaN; a full
disk; Ctrl-C. Each launch is one of the product's own, watched through its status files. What needs no
second rank is tried on a GPU too.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from machine import free_port, is_alive, mounted
from safetensors.torch import save_file

from paradiff.cli.run import TIMEOUT_S
from paradiff.executor.launch import STATUS, Status, statuses

pytestmark = [pytest.mark.torch]

ROOT = Path(__file__).parents[2]
LONG = ["--model", "sd21", "--strategy", "distrifusion=2,warmup=1", "--steps", "900"]
HALVES = {
    "cpu": ["--model", "sd21", "--strategy", "cfg=2"],
    "cuda": ["--model", "sd21", "--device", "cuda", "--launch", "1"],
}
"""A rank for each guidance branch; NCCL has one rank on a GPU, which has both."""
ENDS_WITHIN_S = 30.0


def environment(status: Path, **more: str) -> dict[str, str]:
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), STATUS: str(status)}
    return own | more


@contextmanager
def launched(folder: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    """``paradiff run ... --launch 2``, ended whatever the test does. Nothing that ends for another
    reason than its timeout waits for that."""
    (folder / "status").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "paradiff", "run", "--launch", "2", "--timeout", "300", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=environment(folder / "status", **more),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & ignores it
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def in_the_loop(folder: Path, ranks: int = 2) -> dict[int, Status]:
    """The status of all ranks once they denoise."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        found = statuses(folder / "status")
        inside = [
            any(re.match(r"t\d\d[1-9]/", op) for op in s["doing"].values()) for s in found.values()
        ]
        if len(found) == ranks and all(inside):
            return found
        time.sleep(0.1)
    raise AssertionError(f"the ranks never denoised: {statuses(folder / 'status')}")


def ended(process: subprocess.Popen[str], found: dict[int, Status]) -> str:
    """The one message of a launch that fails within the time that is promised; no rank is left."""
    begin = time.monotonic()
    message = failed(process)
    assert time.monotonic() - begin < ENDS_WITHIN_S
    assert are_gone(found)
    return message


def are_gone(found: Mapping[int, Status]) -> bool:
    """A process that was killed still has to end itself, for which a busy machine takes its time."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    while left := any(is_alive(status["pid"]) for status in found.values()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return not left


def failed(process: subprocess.Popen[str], code: int = 1) -> str:
    """The one message of a launch that fails, whenever."""
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert len(errors.splitlines()) == 1, errors
    return errors


def test_killed_rank_is_named(tmp_path: Path) -> None:
    with launched(tmp_path, *LONG, "--output-dir", "out") as process:
        found = in_the_loop(tmp_path)
        os.kill(found[1]["pid"], signal.SIGKILL)
        message = ended(process, found)
    assert re.search(r"rank 1 was ended by SIGKILL, in step \d+, op t\d+/\S+", message), message
    assert [p.name for p in tmp_path.iterdir()] == ["status"]


@pytest.mark.still
def test_stalled_rank_is_named(tmp_path: Path) -> None:
    """Within what is promised of the timeout that nobody has set. It leaves ranks 24 s to start in and
    the launcher 5 s of its own: a promise of a machine that does nothing else."""
    with launched(tmp_path, *LONG, "--timeout", str(TIMEOUT_S)) as process:
        found = in_the_loop(tmp_path)
        os.kill(found[0]["pid"], signal.SIGSTOP)
        message = ended(process, found)
    assert re.search(r"rank 0 has stalled: .* in step \d+, op t\d+/\S+", message), message
    assert re.search(r"op t\d+/\S+, rank 1: waits for rank 0 in vain", message), message


def test_memory_that_ends_is_named(tmp_path: Path) -> None:
    with launched(tmp_path, *LONG) as process:
        found = in_the_loop(tmp_path)
        pid = found[1]["pid"]
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (used // 2, used // 2))
        message = ended(process, found)
    assert re.search(r"step \d+, op t\d+/\S+, rank 1: out of memory", message), message


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "paradiff: interrupted\n"), (signal.SIGTERM, 143, "")],
)
def test_ctrl_c_ends_all(number: int, code: int, words: str, tmp_path: Path) -> None:
    """So does what a scheduler sends."""
    (tmp_path / "scratch").mkdir()
    scratch = str(tmp_path / "scratch")
    with launched(tmp_path, *LONG, "--output-dir", "out", TMPDIR=scratch) as process:
        found = in_the_loop(tmp_path)
        process.send_signal(number)
        _, errors = process.communicate(timeout=ENDS_WITHIN_S)
    assert process.returncode == code
    assert errors == words
    assert are_gone(found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scratch", "status"]
    assert not [p for p in (tmp_path / "scratch").iterdir() if p.name.startswith("paradiff")]


def test_killed_launcher_leaves_no_rank(tmp_path: Path) -> None:
    with launched(tmp_path, *LONG) as process:
        found = in_the_loop(tmp_path)
        process.kill()
        assert are_gone(found)


def test_nan_is_found_where_it_is_made(device: str, tmp_path: Path) -> None:
    """Embeddings with one NaN, which is the first branch's: rank 0 has that, and the first step."""
    tensors = {"encoder_hidden_states": torch.zeros(2, 6, 24)}
    tensors["encoder_hidden_states"][0, 0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    arguments = [*HALVES[device], "--steps", "3", "--embeddings", "nan.safetensors"]
    with launched(tmp_path, *arguments) as process:
        message = failed(process)
    assert re.fullmatch(
        r"paradiff: step 0, op t000/\S+@r0, rank 0: the prediction is not finite: \d+ NaN .*\n",
        message,
    ), message


SPOILING = """
import os
if os.environ.get("RANK") == "{rank}":
    from torch.nn import SiLU
    plain = SiLU.forward
    SiLU.forward = lambda own, x: ({activation} if os.path.exists("spoil") else plain(own, x))
"""
"""Python imports it at its start: from the time when the file exists, activations are something else."""


@contextmanager
def spoilt_rank(
    folder: Path, device: str, activation: str, *arguments: str
) -> Iterator[tuple[int, Callable[[], str]]]:
    """A launch whose last rank has ``activation`` in place of its own from some step on. Yields that
    rank, and what ends the launch and has its message."""
    site = folder / "site"
    site.mkdir()
    rank = 1 if device == "cpu" else 0
    (site / "sitecustomize.py").write_text(SPOILING.format(rank=rank, activation=activation))
    ours = [*HALVES[device], "--steps", "900", *arguments]
    with launched(folder, *ours, PYTHONPATH=f"{site}:{ROOT}") as process:
        found = in_the_loop(folder, rank + 1)
        (folder / "spoil").touch()
        yield rank, lambda: ended(process, found)


def test_nan_of_a_later_step_is_found_where_it_is_made(device: str, tmp_path: Path) -> None:
    nan = "plain(own, x) * float('nan')"
    with spoilt_rank(tmp_path, device, nan, "--output-dir", "out") as (rank, end):
        message = end()
    assert re.fullmatch(
        rf"paradiff: step [1-9]\d*, op t\d+/\S+@r{rank}, rank {rank}: the prediction is not finite:"
        r" \d+ NaN .*\n",
        message,
    ), message
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_half_file(device: str, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "16k") as disk:
        arguments = [*HALVES[device], "--steps", "60", "--output-dir", "disk/out"]
        with launched(tmp_path, *arguments) as process:
            message = failed(process, code=2)
        assert are_gone(statuses(tmp_path / "status"))
        assert re.search(r"--output-dir .*disk/out: No space left on device\n$", message), message
        assert list(disk.iterdir()) == []


# ------------------------------------------------------------------- ranks that somebody else starts


def rank_alone(
    folder: Path, port: int, rank: int, strategy: str, *more: str, timeout_s: float = 300
) -> subprocess.Popen[str]:
    """One rank of two, as a plain script with the environment that any launcher sets."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    own = environment(folder, **place, MASTER_PORT=str(port))
    del own[STATUS]
    return subprocess.Popen(
        [sys.executable, "-m", "paradiff", "run", "--model", "sd21", "--strategy", strategy,
         "--steps", "2", "--timeout", str(timeout_s), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=own,
    )  # fmt: skip


def test_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    rank = rank_alone(tmp_path, free_port(), 0, "cfg=2", timeout_s=5)
    assert failed(rank) == "paradiff: rank 1 did not come within 5 s\n"


def test_bad_input_is_refused_before_the_ranks_form_a_group(tmp_path: Path) -> None:
    """Though there is nobody to form one with."""
    (tmp_path / "pickle").write_bytes(b"\x80\x04.")
    rank = rank_alone(tmp_path, free_port(), 0, "cfg=2", "--embeddings", "pickle")
    errors = failed(rank, code=2)
    assert re.fullmatch(r"paradiff: pickle: not readable as safetensors.*\n", errors), errors


def test_launched_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    """Python itself hangs before the rank's first word. What is promised counts from that of the other:
    how long Python takes to start is the machine's."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '1':\n    time.sleep(600)\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    arguments = ["--model", "sd21", "--strategy", "cfg=2", "--timeout", "15"]
    with launched(tmp_path, *arguments, PYTHONPATH=path) as process:
        while not (found := statuses(tmp_path / "status")):
            assert process.poll() is None
            time.sleep(0.05)
        message = ended(process, found)
    assert re.match(r"paradiff: rank 1 never started", message), message


def test_ranks_with_different_graphs_say_so(tmp_path: Path) -> None:
    port = free_port()
    ranks = [rank_alone(tmp_path, port, r, s) for r, s in enumerate(["cfg=2", "patch=2"])]
    for rank in ranks:
        errors = failed(rank)
        assert re.search(r"paradiff: rank 1 would run another graph than rank 0", errors), errors


def test_status_files_are_whole(tmp_path: Path) -> None:
    """A reader in a loop never sees half a file."""
    with launched(tmp_path, "--model", "sd21", "--strategy", "cfg=2", "--steps", "2") as process:
        while process.poll() is None:
            for path in (tmp_path / "status").glob("rank-*.json"):
                json.loads(path.read_text())
        assert process.returncode == 0


MEETS_S = 6.0
"""A timeout that is waited for: longer than a process of a busy machine waits for its turn."""
MEETING = f"""
import sys, time
from pathlib import Path
from paradiff.executor.faults import RanksMissing
from paradiff.executor.place import Place
from paradiff.executor.session import Session, meet
place, late_s, goer, folder = Place.of_environment(), float(sys.argv[1]), *sys.argv[2:]
Path(folder, "imported-" + str(place.rank)).touch()
while len([*Path(folder).glob("imported-*")]) < 2:
    time.sleep(0.01)
hub = meet(place, {MEETS_S})
time.sleep(late_s * place.rank)
session = Session.join(place, {MEETS_S}, "cpu", "hello", hub)
if goer == str(place.rank):
    import os
    os._exit(0)
begin = time.monotonic()
time.sleep(late_s * (1 - place.rank))
try:
    session.leave()
except RanksMissing as error:
    print(error, time.monotonic() - begin < {MEETS_S} + 13)
"""


@pytest.mark.parametrize(
    ("late_s", "goer", "words"),
    [
        (MEETS_S + 2, None, ""),
        (0, 1, f"rank 1 did not come within {MEETS_S:g} s"),
        (0, 0, r"where the ranks meet .* nobody answers any more \(.*\)"),
    ],
)
def test_who_lives_is_waited_for(
    late_s: float, goer: int | None, words: str, tmp_path: Path
) -> None:
    """Loading, or decoding, longer than the timeout is no fault; to have gone is. They begin together:
    how long each takes to import torch is the machine's."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = [sys.executable, "-c", MEETING, str(late_s), str(goer), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(tmp_path, RANK=str(rank), **place),
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    stayed = said[0 if goer != 0 else 1][0]
    assert re.fullmatch(f"{words} True\n" if words else "", stayed), said
