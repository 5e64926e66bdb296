"""The laboratory: what it predicts from, when it is satisfied, and that real transfers agree."""

from __future__ import annotations

import gzip
import math
import os
import random
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.comparison import compare
from paradiff.cli import app
from paradiff.cli.common import load_model
from paradiff.cli.validate_lab import _write
from paradiff.config import ConfigError
from paradiff.dependencies import validate
from paradiff.graph import Op
from paradiff.lab import laboratory, namespaces, report
from paradiff.lab.calibration import CALLS, FREE, Calibration, calibrate, chain
from paradiff.lab.cells import DEFAULT, LEFT_OUT, MODEL, NOT_ORDERED, default_cells, order_cells
from paradiff.lab.laboratory import (
    Cell,
    Oracle,
    Result,
    Verdict,
    network_of,
    spread_over,
)
from paradiff.lab.ranks import LaboratoryFailed, Run, ranks, sweep
from paradiff.strategies import AXES, STRATEGIES, parse_spec
from paradiff.trace import TRANSFERS, Trace, read_chrome_trace
from simulator.engine import simulate
from simulator.topology import load_topology

GROUPS = ((2, 2), (2, 4), (4, 4), (2, 8), (4, 8), (8, 8))
CALIBRATION = Calibration(
    {(call, n, world): 1e-3 * n for call in CALLS for n, world in GROUPS}, 5e-5, 1e9
)
BUSY_MS = {
    "p2p": (0.3, 0.38, 0.45),
    "permute": (0.4, 0.46, 0.51, 0.73, 0.78, 0.74),
    "broadcast": (0.5, 0.52, 0.59, 0.9, 0.91, 0.75),
    "all_gather": (0.4, 0.45, 1.12, 0.72, 2.09, 4.14),
    "all_reduce": (0.7, 0.72, 1.58, 1.38, 2.93, 5.59),
    "all_to_all": (0.5, 0.54, 0.82, 0.82, 1.64, 2.83),
}
BUSY = Calibration(
    {
        (call, n, world): 1e-3 * ms
        for call, row in BUSY_MS.items()
        for (n, world), ms in zip(
            [g for g in GROUPS if call != "p2p" or g[0] == 2], row, strict=True
        )
    },
    5e-5,
    1e9,
)
"""As measured on two cores under a load of 19."""
PATCH = Cell("pixart-alpha", "patch=4", 128, 64, 1, "communication")


def op(call: str, n: int, nbytes: int) -> Op:
    kind = call if call in ("p2p", "permute") else "collective"
    return Op("x", kind, call, tuple(range(n)), "s", nbytes=nbytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("n", [2, 4])
def test_chains_are_graphs_whose_rounds_wait_for_what_came(call: str, n: int) -> None:
    """Every kernel but the first of a one-way call's sender reads what the call before wrote to it."""
    if call == "p2p" and n > 2:
        pytest.skip("a message has two ends")
    graph = chain(call, n, 64, n)
    validate(graph)
    rounds = graph.sections[1].ops
    calls = [each for each in rounds if each.kind in TRANSFERS]
    assert [each.ranks[0] for each in calls] == list(range(len(calls)))
    written = {ref.buffer for each in calls for ref in each.writes}
    read = {ref.buffer for each in rounds if each.kind == "compute" for ref in each.reads}
    assert read == written


@pytest.mark.parametrize("call", CALLS)
def test_all_ranks_are_in_calls_at_once(call: str) -> None:
    """Seven ranks: three groups of two, each the chain of two alone on other ranks; one rank is left."""
    graph, alone = chain(call, 2, 64, 7), chain(call, 2, 64, 2)
    validate(graph)
    own = [each for each in alone.sections[1].ops if each.kind in TRANSFERS]
    calls = [each for each in graph.sections[1].ops if each.kind in TRANSFERS]
    assert [each.ranks for each in calls] == [
        tuple(first + rank for rank in each.ranks) for first in (0, 2, 4) for each in own
    ]
    assert {rank for s in graph.sections for each in s.ops for rank in each.ranks} == set(range(6))


def test_fixed_costs() -> None:
    """1 ms a rank was measured for every call: a message of two takes 2 ms; three ranks are between two
    and four. Of a ring's call, whose rounds go on beside bytes, one round of as many ranks shows (the
    shift), or more where bytes are too few to hide the rest. An exchange of four takes three rounds of
    4/3 ms; links make up for 1 ms of the second and of the third. Beside six others that exchange too,
    two ranks take 5 ms; of a world of five, which was not measured, what is known of the next is taken.
    """
    slow = replace(
        CALIBRATION,
        call_s={**CALIBRATION.call_s, ("all_reduce", 4, 4): 30e-3, ("all_to_all", 2, 8): 5e-3},
    )
    assert slow.fixed_s(op("p2p", 2, 1), 4, 9.0, 0.0) == pytest.approx(2e-3)
    assert slow.fixed_s(op("broadcast", 3, 1), 4, 9.0, 0.0) == pytest.approx(3e-3)
    assert slow.fixed_s(op("all_reduce", 4, 1), 4, 1.0, 0.0) == pytest.approx(4e-3)
    assert slow.fixed_s(op("all_reduce", 4, 1), 4, 10e-3, 0.0) == pytest.approx(20e-3)
    assert slow.fixed_s(op("all_to_all", 4, 1), 4, 9.0, 0.0) == pytest.approx(4e-3)
    assert slow.fixed_s(op("all_to_all", 4, 1), 4, 9.0, 1e-3) == pytest.approx(2e-3)
    assert slow.fixed_s(op("all_to_all", 4, 1), 4, 9.0, 2e-3) == pytest.approx(4e-3 / 3)
    assert [slow.fixed_s(op("all_to_all", 2, 1), w, 9.0, 0.0) for w in (2, 4, 5, 8, 9)] == [
        2e-3, 2e-3, 5e-3, 5e-3, 5e-3,
    ]  # fmt: skip
    assert FREE.fixed_s(op("all_to_all", 8, 1), 8, 0.0, 0.0) == 0.0


@pytest.mark.parametrize("n", [3, 4, 8])
def test_a_ring_that_gathers_again_and_again_loses_a_packet(n: int) -> None:
    """gloo's all-gather sends before it says that it can receive (allgather.cc). So, of ranks that come
    at s: a rank whose next has come before it sends at once, and its word to the one before waits behind
    a packet; the link between two ranks starts when one has come and the word of the other has arrived.
    From any jitter, however small, the last rank stays the last, and loses the packet in every call.

    Where half of what a rank sends fits in a packet, nothing waits; where it is half a packet more, the
    word waits for that half.
    """
    bytes_s, kernel_s, packet_s = 60e-3, 5e-3, 1.25e-3
    jitter = random.Random(n)
    come = [jitter.uniform(0, 1e-6) for _ in range(n)]
    lasts = []
    for _ in range(5 * n):
        lasts.append(max(come))
        said = [
            own + packet_s * (come[(rank + 1) % n] < own) for rank, own in enumerate(come)
        ]  # fmt: skip
        come = [max(come[rank - 1], said[rank]) + bytes_s + kernel_s for rank in range(n)]
    period_s = lasts[-1] - lasts[-2]
    known = CALIBRATION.fixed_s(op("all_gather", n, 1), 8, bytes_s, 0.0)
    lost_s = CALIBRATION.fixed_s(op("all_gather", n, 1), 8, bytes_s, packet_s) - known
    assert lost_s == pytest.approx(packet_s)
    assert period_s == pytest.approx(bytes_s + kernel_s + lost_s)

    for packets, waits in ((1.0, 0.0), (1.5, 0.5), (2.0, 1.0)):
        half_s = packets * packet_s
        own = CALIBRATION.fixed_s(op("all_gather", n, 1), 8, 2 * (n - 1) * half_s, packet_s)
        without = CALIBRATION.fixed_s(op("all_gather", n, 1), 8, 2 * (n - 1) * half_s, 0.0)
        assert own - without == pytest.approx(waits * packet_s)
    for call, m in (("all_gather", 2), ("all_reduce", n)):
        own = CALIBRATION.fixed_s(op(call, m, 1), 8, bytes_s, packet_s)
        assert own == CALIBRATION.fixed_s(op(call, m, 1), 8, bytes_s, 0.0), "receives go first"


def test_ranks_spread_over_hosts() -> None:
    box = load_topology("lab-trunk")
    assert spread_over(box, 8) == tuple(range(8))
    devices = spread_over(box, 4)
    switches = [next(k.b for k in box.links if k.a == box.gpus[d]) for d in devices]
    assert switches == ["switch0", "switch0", "switch1", "switch1"]
    with pytest.raises(ConfigError, match="8 hosts, the strategy takes 9 ranks"):
        spread_over(box, 9)


def test_no_link_is_faster_than_a_host() -> None:
    uneven = load_topology("lab-uneven")
    network = network_of(uneven, replace(CALIBRATION, host_bytes_per_s=7e6))
    capacity = {r.name: r.capacity_bytes_per_s for r in network.resources}
    assert capacity["gpu0->switch"] == 7e6  # 60 Mbit/s is 7.5 MB/s
    assert capacity["switch->gpu0"] == 30e6 / 8
    assert network.bucket_bytes == namespaces.PACKET_BYTES


@pytest.mark.parametrize(("regime", "balance"), laboratory.BALANCE.items())
def test_kernels_are_stretched_to_the_balance(regime: laboratory.Regime, balance: float) -> None:
    """patch gathers and computes by turns, so that the whole is what transfers take alone, and the
    kernels of one rank; the final gather and the decoder of other stages cost next to nothing."""
    oracle = Oracle(load_topology("lab-star"), CALIBRATION)
    found = oracle.predict(load_model(PATCH.model), PATCH._replace(regime=regime))
    alone = oracle.predict(load_model(PATCH.model), PATCH, stretch=0.0)
    busy_s = laboratory.busiest_s(found.graph, found.costs, found.placement)
    assert busy_s == pytest.approx(balance * alone.trace.makespan_s, rel=0.02)
    assert found.trace.makespan_s == pytest.approx(busy_s + alone.trace.makespan_s, rel=0.02)


def test_a_prediction_shows_links_that_are_never_more_than_full() -> None:
    """patch=4 gathers: each of four hosts sends to the next in each of its gathers, and the wire is at
    its rate at most, headers and acknowledgements included; at some time a host's link is full."""
    oracle, profile = Oracle(load_topology("lab-star"), CALIBRATION), load_model(PATCH.model)
    found = oracle.predict(profile, PATCH)
    tracks = found.tracks(profile)
    gathers = [i.id for i in found.graph.instances() if i.op.kind in TRANSFERS]
    ring = [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert [(a.op, (a.source, a.destination)) for a in tracks.arrows] == [
        (op, pair) for op in gathers for pair in ring
    ]
    most = {c.name: max(v for _, v in c.points) for c in tracks.counters if c.rank is None}
    hosts = [oracle.box.gpus[device] for device in found.placement]
    assert most.keys() >= {f"{host}->switch" for host in hosts}
    assert max(most.values()) == pytest.approx(100)


def test_a_cell_is_simulated_once_with_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once without, for what transfers take alone; its trace file needs no more."""
    runs: list[str] = []

    def counted(*arguments: object, **options: object) -> Trace:
        runs.append(dict(arguments[0].meta)["spec"])  # type: ignore[attr-defined]
        return simulate(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(laboratory, "simulate", counted)
    oracle, profile = Oracle(load_topology("lab-star"), CALIBRATION), load_model(PATCH.model)
    cells = [PATCH, *(PATCH._replace(spec=s, shared=True) for s in ("patch=2", "ring=2"))]
    for found in oracle.predict_all({PATCH.model: profile}, cells):
        found.tracks(profile)
    assert sorted(runs) == sorted(2 * [cell.spec for cell in cells])


def test_what_a_run_writes(tmp_path: Path) -> None:
    """On two boxes, as if it had gone as predicted: the answer, the table, and two traces a cell, with
    links and who sends to whom."""
    results = []
    for box in map(load_topology, ("lab-star", "lab-trunk")):
        found = Oracle(box, CALIBRATION).predict(load_model(PATCH.model), PATCH)
        as_predicted = compare(found.trace, [found.trace.expanded()] * 2)
        results.append(Result(box.name, found, as_predicted))
    _write(tmp_path / "out", Verdict(tuple(results), 0.10), "{}\n")
    names = [f"00{n}-{which}.trace.json.gz" for n in (1, 2) for which in ("measured", "predicted")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *names, "cells.md", "lab.json",
    ]  # fmt: skip
    for name, result in zip(names[1::2], results, strict=True):
        trace = read_chrome_trace(tmp_path / "out" / name)
        assert trace.makespan_s == pytest.approx(result.prediction.trace.makespan_s)
        written = gzip.decompress((tmp_path / "out" / name).read_bytes()).decode()
        assert "gpu0->switch" in written


def words(spec: str) -> set[str]:
    return {word.partition("=")[0] for word in spec.split(",")}


def test_default_cells_cover_every_strategy_that_moves_something() -> None:
    """4 and 8 ranks each have every axis and strategy but those whose reason is listed. All cells can be
    built on the shipped boxes, and what calls cost is under a tenth of what their transfers take."""
    oracle = Oracle(load_topology("lab-star"), BUSY)
    names: dict[int, set[str]] = {}
    for cell in default_cells(["communication"]):
        found = oracle.predict(load_model(cell.model), cell)
        spec = parse_spec(cell.spec)
        names.setdefault(spec.n_gpus, set()).update(words(cell.spec))
        assert found.trace.makespan_s > 0.1, cell
        assert found.fixed_share < laboratory.MOST_FIXED, cell
    wanted = (STRATEGIES.keys() | set(AXES)) - LEFT_OUT.keys()
    assert wanted <= names[4]
    assert wanted <= names[8]
    for spec in ("serial", "data=4", "batchstep=4,warmup=1,data=2"):
        with pytest.raises(ConfigError, match="moves nothing between ranks"):
            oracle.predict(load_model(PATCH.model), PATCH._replace(spec=spec, steps=8))


@pytest.mark.torch
def test_what_is_left_out_is_not_what_the_executor_refuses() -> None:
    pytest.importorskip("torch")
    from paradiff.executor.interpreter import EXECUTABLE

    assert STRATEGIES.keys() - LEFT_OUT.keys() <= set(EXECUTABLE)


def test_cells_that_are_ordered_do_the_same_work_with_the_same_kernels() -> None:
    """On 4 and on 8 ranks: one size, one number of steps, one stretch for all, the median of their own.
    (One gather of latents, as with ``mode=naive``, says nothing at this size.)"""
    oracle, profiles = Oracle(load_topology("lab-star"), BUSY), {MODEL: load_model(MODEL)}
    found = oracle.predict_all(profiles, order_cells(["communication"]))
    used = set().union(*(words(each.cell.spec) for each in found))
    covered = set().union(*(words(spec) for spec, *_ in DEFAULT))
    assert used >= covered - NOT_ORDERED.keys() - {"mode", "rotate"}
    for n in (4, 8):
        own = [each for each in found if each.graph.world_size == n]
        assert len(own) >= 10
        assert len({(each.cell.work, each.costs.stretch) for each in own}) == 1
        for each in own:
            assert each.fixed_share < laboratory.MOST_FIXED, each.cell
    three = [
        Cell(MODEL, f"{name}=4", 128, 64, 1, "compute", True)
        for name in ("ring", "patch", "tensor")
    ]
    alone = sorted(oracle.predict(profiles[MODEL], cell).costs.stretch for cell in three)
    together = oracle.predict_all(profiles, three)
    assert {each.costs.stretch for each in together} == {alone[1]}
    assert alone[0] < alone[1] < alone[2]


def test_only_results_of_the_same_work_are_ordered() -> None:
    """Three of one work, of which two were predicted the wrong way round; a fourth took another size, a
    fifth another stretch: three pairs."""
    same = verdict(("a", 2.0, 1.0, 0.0), ("b", 1.0, 2.0, 0.0), ("c", 3.0, 3.0, 0.0)).results
    size, stretch = verdict(("d", 0.5, 9.0, 0.0), ("e", 0.5, 9.0, 0.0)).results
    size = replace(size, prediction=replace(size.prediction, cell=PATCH._replace(steps=2)))
    costs = replace(stretch.prediction.costs, stretch=7.0)
    stretch = replace(stretch, prediction=replace(stretch.prediction, costs=costs))
    found = Verdict((*same, size, stretch), 0.10)
    assert [(a.cell.spec, b.cell.spec, right) for a, b, right in found.pairs()] == [
        ("a", "b", False),
        ("a", "c", True),
        ("b", "c", True),
    ]


def test_calls_that_cost_more_than_promised_fail() -> None:
    """ring: 28 layers shift keys and values three times; a call of few bytes takes 4 ms each time, and a
    shift on its own takes these beside its bytes."""
    oracle = Oracle(load_topology("lab-star", ["links.0.bandwidth=400 Mbit/s"]), CALIBRATION)
    cell = PATCH._replace(spec="ring=4")
    found = oracle.predict(load_model(cell.model), cell)
    shift_s = found.costs.calibration.call(op("permute", 4, 1), 4)
    assert shift_s == pytest.approx(4e-3)
    times = Times(Latency(1.0, 1.0), 0.0)
    short = Result("lab-star", found, times)  # type: ignore[arg-type]
    assert found.fixed_share > 0.3
    (failure,) = Verdict((short,), 0.10).failures
    assert failure.startswith("ring=4 on lab-star: calls cost ")
    assert "allowed: 10%" in failure
    assert report.text(Verdict((short,), 0.10)).splitlines()[1].endswith("short")


# -------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Latency:
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True)
class Times:
    latency: Latency
    spread: float


def verdict(*cells: tuple[str, float, float, float]) -> Verdict:
    """Of (spec, predicted, measured, spread) on one box."""
    oracle = Oracle(load_topology("lab-star"), BUSY)
    plain = oracle.predict(load_model(PATCH.model), PATCH)
    results = tuple(
        Result(
            "lab-star",
            replace(plain, cell=PATCH._replace(spec=spec)),
            Times(Latency(predicted, measured), spread),  # type: ignore[arg-type]
        )
        for spec, predicted, measured, spread in cells
    )
    return Verdict(results, 0.10)


def test_what_makes_the_gate_fail() -> None:
    good = [(f"s{i}", 1.0 + i, 1.02 * (1 + i), 0.01) for i in range(10)]
    assert verdict(*good).failures == []
    assert verdict(*good).median_error == pytest.approx(1 - 1 / 1.02)
    assert verdict(*good, ("bad", 50.0, 57.0, 0.0)).failures == [
        "bad on lab-star is -12.3% off, allowed: 10.0%"
    ]
    assert verdict(*good, ("noisy", 50.0, 57.0, 0.04)).failures == []
    assert verdict(*good, ("n", 50.0, 57.0, 0.04), ("m", 50.0, 57.0, 0.04)).failures == [
        "17% of the cells are noisy, allowed: 10%"
    ]
    far = verdict(*((spec, 1.06 * predicted, predicted, 0.0) for spec, predicted, *_ in good))
    assert far.failures == ["median error 6.0%, allowed: 5.0%"]
    turned = verdict(*good, ("a", 20.0, 19.0, 0.0), ("b", 19.5, 21.0, 0.0))
    assert turned.failures == ["a is faster than b on lab-star, predicted the other way"]
    near = verdict(*good, ("a", 20.0, 19.5, 0.0), ("b", 19.5, 21.0, 0.0))
    assert near.failures == [], "times within a tenth may be in any order"


# ------------------------------------------------------------------------------------------ command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--topology", "pcie8"],
            "pcie8: no laboratory can be made of this: gpu0--rc0 has a latency",
        ),
        (["--topology", "nowhere"], "no such file in topologies"),
        (["--model", "sdxl"], "need --strategy beside them"),
        (["--strategy", "ulysses=four"], "--strategy 'ulysses=four'"),
        (["--strategy", "serial"], "--strategy serial: one rank, allowed: two or more"),
        (["--strategy", "patch=4", "--ranks", "8"], "--ranks 8: no strategy takes so many"),
        (["--set", "links.0.bandwidth=fast"], "links.0.bandwidth"),
        (
            ["--strategy", "patch=9", "--height", "144"],
            "lab-star: 8 hosts, the strategy takes 9 ranks",
        ),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["validate", "lab", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1


# -------------------------------------------------------------------------------------- real transfers

REASON = namespaces.why_not()
lab = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def rejudged(oracle: Oracle, results: Sequence[Result]) -> Verdict:
    """The same measured runs against another prediction of the same kernels."""
    again = []
    for r in results:
        p = oracle.predict(load_model(r.cell.model), r.cell, r.prediction.costs.stretch)
        again.append(Result(r.box, p, compare(p.trace, [r.comparison.typical])))
    return Verdict(tuple(again), 0.10)


MEASURED = [
    PATCH,
    PATCH._replace(spec="ring=4"),
    Cell("pixart-alpha", "pipefusion=4,patches=4,warmup=1", 256, 256, 3, "communication"),
]
ROUNDS = 3
"""How often cells are measured on a machine that is not still."""


@lab
@pytest.mark.still
@pytest.mark.torch
def test_predictions_hold_over_real_links_and_faster_ones_show() -> None:
    """Four hosts on a star and on two switches; then the runs on the star against a simulator whose
    links are twice as fast. What is right passes each time, what is wrong does not. A
    machine on which repeats differ is measured again."""
    pytest.importorskip("torch")
    star, trunk = (load_topology(f"lab-{name}") for name in ("star", "trunk"))
    restless: list[str] = []
    with ranks() as running:
        while True:
            calibration = calibrate(running, [4])
            counted: list[Result] = []
            for box in (star, trunk):
                oracle = Oracle(box, calibration)
                predictions = [oracle.predict(load_model(c.model), c) for c in MEASURED]
                counted += laboratory.measure(box, predictions, running, 3)
            quiet = Verdict(tuple(counted), 0.10).quiet
            if len(quiet) >= 4:
                break
            restless.append(", ".join(f"{r.comparison.spread:.0%}" for r in counted))
            if len(restless) == ROUNDS:
                pytest.skip(f"this machine is not still; repeats differ by {'; '.join(restless)}")
    assert abs(worst_of(quiet)) <= 0.10

    on_star = [r for r in counted if r.box == star.name]
    twice = tuple(replace(k, bandwidth_bytes_per_s=2 * k.bandwidth_bytes_per_s) for k in star.links)
    faulty = Oracle(star, calibration, network_of(replace(star, links=twice), calibration))
    assert all(r.error < -0.10 for r in rejudged(faulty, on_star).results)


def test_calls_that_cost_nothing_beside_bytes_show() -> None:
    """A ring whose calls take 4 ms each beside their bytes: runs as they are to a simulator that knows
    it, and to one that has forgotten it. The gate fails for the latter."""
    cell, profile = PATCH._replace(spec="ring=4"), load_model(PATCH.model)
    right = Oracle(load_topology("lab-star"), CALIBRATION)
    found = right.predict(profile, cell)
    free = Oracle(right.box, FREE, right.network).predict(profile, cell, found.costs.stretch)
    for prediction, fails in ((found, False), (free, True)):
        measured = compare(prediction.trace, [found.trace.expanded()])
        seen = Result(right.box.name, prediction, measured)
        assert (seen.error < -0.10) is fails
        off = [text for text in Verdict((seen,), 0.10).failures if "off, allowed: 10.0%" in text]
        assert len(off) == fails


def worst_of(results: Sequence[Result]) -> float:
    return max((r.error for r in results), key=abs)


def test_scratch_of_the_dead_is_swept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [f"paradiff-lab-{pid}-x" for pid in (dead.pid, os.getpid())]
    names += ["paradiff-lab-notes", f"other-{dead.pid}-x", f"paradiff-{dead.pid}-x"]
    for name in names:
        (tmp_path / name).mkdir()
    sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


@lab
@pytest.mark.torch
def test_a_rank_that_fails_is_one_message() -> None:
    """A kernel that sleeps for less than nothing is an error of its rank; the others do not hang."""
    pytest.importorskip("torch")
    graph = chain("p2p", 2, 64, 2)
    with ranks() as running, namespaces.hosts(namespaces.star(2)) as hosts:
        with pytest.raises(LaboratoryFailed, match=r"rank [01]: .*sleep length must be"):
            running.run(hosts, [Run(graph, lambda _: -1.0, 1)])
        ((trace,),) = running.run(hosts, [Run(graph, lambda _: 0.0, 1)])
    assert trace.makespan_s < 10
    assert math.isfinite(trace.makespan_s)
