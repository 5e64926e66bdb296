"""Engine speed beside that of bare SimPy events, in one run on one core.

    PYTHONPATH=. python benchmarks/bench_engine.py

Graphs are simulated in full (``periodic=False``), so that ops per second mean ops that were run; the
last column folds the steady state, as the planner does. The kernel of SimPy bounds the engine: a
compute op takes one event, a transfer two or more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import simpy

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from unit_hardware import Graph, UnitCosts

from paradiff.graph import ScheduleGraph
from simulator.engine import simulate
from simulator.network import Network
from simulator.topology import Topology


def best_s(action: Callable[[], object], times: int = 3) -> float:
    """The fastest of a few runs, in seconds of wall clock."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bare_events_per_s(count: int = 200_000) -> float:
    """A chain of timeouts with one callback each."""

    def run() -> None:
        env = simpy.Environment()
        left = count

        def again(_: simpy.Event) -> None:
            nonlocal left
            left -= 1
            if left:
                env.timeout(1).callbacks.append(again)

        env.timeout(1).callbacks.append(again)
        env.run()

    return count / best_s(run)


def tensor_parallel(n: int, layers: int, steps: int) -> ScheduleGraph:
    """Lock step: a computation on each rank, an all-reduce, and so on."""
    g = Graph(n)
    for r in range(n):
        g.compute("start", r, 1, writes=["x#-1"])
    g.section("start", 0)
    for layer in range(layers):
        before = f"h{layer - 1}" if layer else "x#-1"
        for r in range(n):
            g.compute(f"layer{layer}", r, 5, reads=[before], writes=[f"p{layer}"], host=1)
        out = "x" if layer == layers - 1 else f"h{layer}"
        g.collective("all_reduce", f"reduce{layer}", range(n), 8, f"p{layer}", out)
    g.section("steps", 0, steps)
    return g.build()


def displaced(n: int, layers: int, steps: int) -> ScheduleGraph:
    """Every layer reads what the others gathered a step before, and slows the layer beside it."""
    g = Graph(n)
    for stale in (False, True):
        for layer in range(layers):
            for r in range(n):
                g.compute(f"layer{layer}", r, 60, writes=[f"own{layer}"], contended=66, host=3,
                          reads=[f"all{layer}#-1"] if stale else [])  # fmt: skip
            g.collective("all_gather", f"gather{layer}", range(n), 5, f"own{layer}", f"all{layer}")
        g.section("stale" if stale else "first", int(stale), steps if stale else 1)
    return g.build()


def pipeline(stages: int, patches: int, steps: int) -> ScheduleGraph:
    """PipeFusion's asynchronous steps: messages of neighbours overlap and meet."""
    g = Graph(stages)
    last = stages - 1
    for begin in (True, False):
        for p in range(patches):
            for d in range(stages):
                source = f"x{p}@r0" if d == 0 else f"z{p}@r{d}"
                out = f"y{p}@r{last}#1" if d == last else f"h{p}@r{d}"
                g.compute(f"p{p}", d, 4, [] if begin and d == 0 else [source], [out], contended=5)
                if d < last:
                    g.send(f"hop{p}.{d}", d, d + 1, 2, f"h{p}", f"z{p}")
        for p in range(patches):
            g.send(f"loop{p}", last, 0, 1, f"y{p}#1", f"x{p}#1")
        g.section("first" if begin else "steady", int(not begin), 1 if begin else steps)
    return g.build()


def main() -> None:
    bare = bare_events_per_s()
    print(f"bare SimPy {bare / 1e3:8.0f} k events/s")
    print(f"{'graph':18}{'ops':>8}{'k ops/s':>10}{'of SimPy':>10}{'folded ms':>11}")
    costs = UnitCosts(unit_s=0.001, fixed_s=0.0001, host_s=0.0001)
    for name, graph in [
        ("tensor 8", tensor_parallel(8, 28, 60)),
        ("displaced 8", displaced(8, 28, 60)),
        ("pipeline 8 x 16", pipeline(8, 16, 60)),
    ]:
        network = Network(Topology.uniform(graph.world_size, bandwidth_bytes_per_s=1000.0))

        def run(periodic: bool, graph: ScheduleGraph = graph, network: Network = network) -> float:
            return best_s(lambda: simulate(graph, network, costs, periodic=periodic))

        rate = graph.op_count() / run(False)
        print(
            f"{name:18}{graph.op_count():8}{rate / 1e3:10.1f}{rate / bare:10.2f}"
            f"{run(True) * 1e3:11.1f}"
        )


if __name__ == "__main__":
    main()
