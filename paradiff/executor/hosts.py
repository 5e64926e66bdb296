"""Ranks on hosts of this machine: one process imports everything once and forks a process for each rank,
which enters the network namespace of its host.

``python -m paradiff.executor.hosts`` reads the name of a job's file a line and answers each with a line
of JSON, ``{"failed": null}`` or why. A job is JSON: the ``hosts`` of its ranks (``pid`` of a process in
the namespace, ``address``), their ``interface``, a ``port``, ``timeout_s``, and ``runs``: the file of a
graph's text, the ``seconds`` of every op by section and place, how many ``repeats``, and the name of a
file for the trace of each (``%d`` is the repeat).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paradiff.executor import distributed
from paradiff.executor.launch import die_with_parent
from paradiff.executor.session import Place, Session
from paradiff.graph import ScheduleGraph, parse_graph
from paradiff.trace import write_chrome_trace

REAL_TIME = 10
"""Priority of ranks: they mostly sleep, and whatever else the machine runs must not decide when they
wake (under a load of five, calls of few bytes took three to six times as long without)."""


def main() -> None:
    """Serve jobs until stdin ends."""
    torch.set_num_threads(1)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        failed = _job(json.loads(Path(line.strip()).read_text()))
        sys.stdout.write(json.dumps({"failed": failed}) + "\n")
        sys.stdout.flush()


def _job(job: Mapping[str, Any]) -> str | None:
    """Run all ranks; the first that fails ends the others. Its last words, None where none failed."""
    texts = sorted({run["graph"] for run in job["runs"]})
    graphs = {name: parse_graph(Path(name).read_text()) for name in texts}
    said = {rank: os.memfd_create(f"rank{rank}") for rank in range(len(job["hosts"]))}
    ranks = {_fork(job, rank, graphs, said[rank]): rank for rank in said}
    failed = None
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status and failed is None:
            failed = f"rank {rank}: {_last_words(said[rank])}"
            for other in ranks:
                os.kill(other, 9)
    for file in said.values():
        os.close(file)
    return failed


def _last_words(file: int) -> str:
    lines = os.pread(file, 1 << 20, 0).decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "ended without a word"


def _fork(
    job: Mapping[str, Any], rank: int, graphs: Mapping[str, ScheduleGraph], errors: int
) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with_parent()
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REAL_TIME))
        os.dup2(errors, 2)
        _enter(job["hosts"][rank]["pid"])
        _rank(job, rank, graphs)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _enter(pid: int) -> None:
    """Take this process into the network namespace of another."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        if libc.setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns to the namespace of process {pid}")


def _rank(job: Mapping[str, Any], rank: int, graphs: Mapping[str, ScheduleGraph]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = job["interface"]
    hosts = job["hosts"]
    place = Place(rank, len(hosts), rank, hosts[0]["address"], job["port"], False)
    session = Session.join(place, job["timeout_s"], "cpu", "laboratory")
    for run in job["runs"]:
        graph = graphs[run["graph"]]
        known = _seconds(graph, run["seconds"])
        for repeat in range(run["repeats"]):
            trace = distributed.run_timed(graph, lambda i, known=known: known[id(i.op)], session)
            if rank == 0:
                write_chrome_trace(trace, Path(run["trace"] % repeat))
    session.leave()


def _seconds(graph: ScheduleGraph, given: Sequence[Sequence[float]]) -> dict[int, float]:
    """Seconds by the identity of an op: a name may mean other work in another section."""
    return {
        id(op): seconds
        for section, row in zip(graph.sections, given, strict=True)
        for op, seconds in zip(section.ops, row, strict=True)
    }


if __name__ == "__main__":
    main()
