"""One rank in its own namespace: runs schedules, counts its link's bytes.

``python counting_rank.py CASES.json`` prints a line of JSON for each case: bytes out and in. A model is
run with kernels that take no time and buffers that the graph sizes; its twin with all that it computes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from paradiff.config import find
from paradiff.executor import distributed
from paradiff.executor.job import Job, Prepared, prepare
from paradiff.executor.session import Place, Session
from paradiff.graph import ScheduleGraph
from paradiff.lab.namespaces import INTERFACE
from paradiff.profiles import load_profile
from paradiff.strategies import Workload, build, parse_spec
from paradiff.trace import check_trace

STEPS, TWIN_STEPS = 3, 9
PIXELS = 640


def twin_of(model: str, spec: str) -> Prepared:
    """So large, for so many steps, that what ranks say about payloads once is little beside them."""
    return prepare(Job(source=model, spec=spec, height=PIXELS, width=PIXELS, steps=TWIN_STEPS))


def graph_of(model: str, spec: str) -> ScheduleGraph:
    if model.startswith("tiny-"):
        return twin_of(model, spec).graph
    profile = load_profile(find("models", model, ".json"))
    d = profile.defaults
    return build(parse_spec(spec), profile, Workload(d["height"], d["width"], d["frames"], STEPS))


def counted() -> tuple[int, int]:
    """Bytes out and in, Ethernet included: columns 9 and 1 of the host's own table."""
    (line,) = (x for x in Path("/proc/net/dev").read_text().splitlines() if f"{INTERFACE}:" in x)
    numbers = line.partition(":")[2].split()
    return int(numbers[8]), int(numbers[0])


class Counting(distributed.Threads):
    """Reads the counters right around the run of the ops."""

    last: tuple[int, int] = (0, 0)

    def run(self) -> list[distributed.Span]:
        before = counted()
        spans = super().run()
        dist.barrier()
        after = counted()
        Counting.last = after[0] - before[0], after[1] - before[1]
        return spans


def main(cases: list[tuple[str, str]]) -> None:
    distributed.Threads = Counting  # type: ignore[misc]
    place = Place.of_environment()
    assert place is not None
    session = Session.join(place, 120.0, "cpu", "counting")
    for model, spec in cases:
        if model.startswith("tiny-"):
            twin = twin_of(model, spec)
            graph, network = twin.graph, twin.pipeline.network
            trace = distributed.run_rank(graph, network, twin.request, session).trace
        else:
            graph = graph_of(model, spec)
            trace = distributed.run_timed(graph, lambda _: 0.0, session)
        check_trace(graph, trace)
        sys.stdout.write(json.dumps([model, spec, *Counting.last]) + "\n")
        sys.stdout.flush()
    session.leave()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
