"""Runs of graphs with timed kernels on hosts of this machine, started once for many."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from paradiff.executor.launch import die_with_parent
from paradiff.graph import Op, ScheduleGraph
from paradiff.lab.namespaces import INTERFACE, Host
from paradiff.trace import Trace, read_chrome_trace

SCRATCH = "paradiff-lab-"
POLL_S = 0.1
TIMEOUT_S = 60.0
"""How long a transfer may wait."""
Progress = Callable[[int, int], None]


class LaboratoryFailed(RuntimeError):
    """Ranks that did not run to their end; the message is the last word of the first that failed."""


@dataclass(frozen=True)
class Run:
    """A graph, what each of its compute ops takes, and how often it runs."""

    graph: ScheduleGraph
    seconds: Callable[[Op], float]
    repeats: int


class Ranks:
    """A process that has imported what ranks need, and forks them (``paradiff.executor.hosts``)."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder
        self._numbers = count()

    def run(
        self, hosts: Sequence[Host], runs: Sequence[Run], progress: Progress | None = None
    ) -> list[list[Trace]]:
        """The traces of every repeat of every run, rank r on ``hosts[r]``. Raises LaboratoryFailed.

        ``progress`` gets (repeats done, all repeats).
        """
        number = next(self._numbers)
        where = self._folder / str(number)
        where.mkdir()
        names = [
            [where / f"{i}-{repeat}.json" for repeat in range(run.repeats)]
            for i, run in enumerate(runs)
        ]
        job = where / "job.json"
        job.write_text(json.dumps(self._job(hosts, runs, where, 29500 + number)))
        self._say(str(job))
        wanted = [name for row in names for name in row]
        while not self._answered():
            if progress is not None:
                progress(sum(name.exists() for name in wanted), len(wanted))
            time.sleep(POLL_S)
        failed = json.loads(self._hear())["failed"]
        if failed is not None:
            raise LaboratoryFailed(failed)
        return [[read_chrome_trace(name) for name in row] for row in names]

    def _job(
        self, hosts: Sequence[Host], runs: Sequence[Run], where: Path, port: int
    ) -> dict[str, object]:
        files = []
        for i, run in enumerate(runs):
            file = where / f"{i}.graph"
            file.write_text(run.graph.text())
            files.append(file)
        return {
            "hosts": [{"pid": host.pid, "address": host.address} for host in hosts],
            "interface": INTERFACE,
            "port": port,
            "timeout_s": TIMEOUT_S,
            "runs": [
                {
                    "graph": str(file),
                    "seconds": [[run.seconds(op) for op in s.ops] for s in run.graph.sections],
                    "repeats": run.repeats,
                    "trace": f"{where}/{i}-%d.json",
                }
                for i, (run, file) in enumerate(zip(runs, files, strict=True))
            ],
        }

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answered(self) -> bool:
        return bool(select.select([self._out], [], [], 0)[0])

    def _hear(self) -> str:
        line = self._out.readline()
        if not line:
            raise LaboratoryFailed(f"the ranks' process ended with {self._process.wait()}")
        return line

    @property
    def _out(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout


def sweep() -> None:
    """Remove the scratch folders of laboratories whose processes are gone: those that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}[0-9]*-*"):
        pid = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The process, until the context ends. Raises LaboratoryFailed where it does not start."""
    sweep()
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as scratch:
        environment = {
            name: value for name, value in os.environ.items() if name != "LOCAL_WORLD_SIZE"
        }
        # gloo's all-reduce would go through shared memory where all ranks are said to be on one machine
        with (Path(scratch) / "stderr").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "paradiff.executor.hosts"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**environment, "OMP_NUM_THREADS": "1"},
                preexec_fn=die_with_parent,
            )
            try:
                found = Ranks(process, Path(scratch))
                found._hear()
                yield found
            finally:
                process.kill()
                process.communicate()
