"""Starts a run's ranks through torchrun, watches them, and says in one message how they failed.

Each rank keeps a status file (``heartbeat.Heartbeat``). This process reads them, and nothing here needs
torch. Whatever happens, no rank outlives the launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS = "PARADIFF_STATUS"
"""Environment variable: the folder that ranks keep their status files in."""
POLL_S = 0.1
GRACE_S = 2.0
NOTICE_S = 6.0
"""How long torchrun may take to notice, and say, how a rank ended."""
SILENCE_S = 3.0
"""How long others may take to say that they wait for a rank that says nothing."""
START_S = 24.0
"""How long torchrun and the ranks may take to start, until a rank says its first word."""

Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a launch ended: exit code and, unless that is 0, the one message."""

    code: int
    message: str = ""


def launch(
    arguments: Sequence[str],
    ranks: int,
    timeout_s: float,
    progress: Callable[[Mapping[int, Status]], None] | None = None,
) -> Outcome:
    """Run ``python -m paradiff ARGUMENTS`` as ``ranks`` processes of this machine.

    What rank 0 prints goes to this process's stdout. Ctrl-C ends all ranks and is raised again; SIGTERM
    does as much and is a SystemExit.
    """
    with _exit_at_sigterm(), tempfile.TemporaryDirectory(prefix="paradiff-") as scratch:
        folder = Path(os.environ.get(STATUS) or scratch)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0",
            "--nproc-per-node", str(ranks), "--no-python", sys.executable, "-m", "paradiff", *arguments,
        ]  # fmt: skip
        log = Path(scratch) / "stderr"
        environment = {"OMP_NUM_THREADS": "1", **os.environ, STATUS: str(folder)}
        with log.open("wb") as errors:
            runner = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            try:
                _watch(runner, folder, ranks, timeout_s, progress)
                said = log.read_text(errors="replace")
            finally:
                _end(runner, statuses(folder))
        return Outcome(0) if runner.returncode == 0 else judged(statuses(folder), ranks, said)


@contextlib.contextmanager
def _exit_at_sigterm() -> Iterator[None]:
    """So that what was made here is unmade, as after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent does; elsewhere do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def statuses(folder: Path) -> dict[int, Status]:
    """The last word of every rank that has said one."""
    found = {}
    for path in folder.glob("rank-*.json"):
        status = json.loads(path.read_text())
        found[status["rank"]] = status
    return found


def status_path(folder: str, rank: int) -> str:
    return f"{folder}/rank-{rank}.json"


def _watch(
    runner: subprocess.Popen[bytes],
    folder: Path,
    ranks: int,
    timeout_s: float,
    progress: Callable[[Mapping[int, Status]], None] | None,
) -> None:
    """Return when the ranks have ended, when one has failed (after a moment for the others to say
    what they see), or when one no longer says anything."""
    begin, until = time.monotonic(), None
    while runner.poll() is None:
        found = statuses(folder)
        if progress is not None:
            progress(found)
        over = [s for s in found.values() if s["state"] not in ("running", "done")]
        now, clock = time.monotonic(), time.time()
        silent = any(
            s["state"] == "running" and clock - s["time_s"] > timeout_s for s in found.values()
        )
        absent = len(found) < ranks and now - begin > max(START_S, timeout_s)
        if not (over or silent or absent):
            until = None
        elif until is None:
            until = now + (NOTICE_S if over else SILENCE_S)
        if until is not None and now > until:
            return
        time.sleep(POLL_S)


def _end(runner: subprocess.Popen[bytes], found: Mapping[int, Status]) -> None:
    """Nothing that was started outlives this."""
    if runner.poll() is None:
        for status in found.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(status["pid"], signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(runner.pid, signal.SIGTERM)
        try:
            runner.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(runner.pid, signal.SIGKILL)
            runner.wait()


def judged(found: Mapping[int, Status], ranks: int, log: str) -> Outcome:
    """The one message: the rank at fault before those that only wait for it."""
    by_time = sorted(found.values(), key=lambda s: (s["time_s"], s["rank"]))
    for status in by_time:
        if status["state"] == "refused":
            return Outcome(status["code"], status["message"])
    for status in by_time:
        if status["state"] == "failed" and not status["symptom"]:
            return Outcome(1, status["message"])
    symptoms = [s["message"] for s in by_time if s["state"] == "failed"]
    waits = f"; {symptoms[0]}" if symptoms else ""
    if absent := sorted(set(range(ranks)) - set(found)):
        many = "s" * (len(absent) > 1)
        names = ", ".join(map(str, absent))
        return Outcome(1, f"rank{many} {names} never started{waits or _last_line(log)}")
    for status in by_time:
        if status["state"] == "running":
            return Outcome(
                1, f"rank {status['rank']} {_end_of(status, log)}, {doing(status)}{waits}"
            )
    if symptoms:
        at = [f"rank {s['rank']} is {doing(s)}" for s in by_time if s["state"] != "failed"]
        return Outcome(1, "; ".join([symptoms[0], *at]))
    return Outcome(1, f"the ranks ended without a word{_last_line(log)}")


def _end_of(status: Status, log: str) -> str:
    """How a rank ended that has said nothing of it: torchrun knows the exit code, if it ended at all."""
    found = re.search(rf"exitcode: (-?\d+)\) local_rank: {status['rank']} ", log)
    if found is None:
        return f"has stalled: its last word was {time.time() - status['time_s']:.0f} s ago"
    code = int(found[1])
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def doing(status: Status) -> str:
    """Where a rank was, in words: its compute, if it was computing, or the earliest op in hand."""
    ops = status["doing"]
    if not ops:
        return "outside of any op"
    op = ops.get("compute", min(ops.values()))
    step = op.partition("/")[0]
    where = f"step {int(step[1:])}, " if step[1:].isdecimal() and step[0] == "t" else ""
    return f"in {where}op {op}"


def _last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip(" =-")]
    return f": {lines[-1].strip()}" if lines else ""
