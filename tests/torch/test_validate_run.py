"""``paradiff validate run`` on tiny twins: real processes and numbers, files, cache, gate, messages."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from analysis.tracks import UNWATCHED
from paradiff.cli import app
from paradiff.cli.measure_here import _timed, are_alike, measure_here
from paradiff.config import ConfigError, available
from paradiff.dependencies import validate
from paradiff.executor.job import Job, Prepared, prepare
from paradiff.executor.measure import mean_of
from paradiff.executor.measure_calls import (
    MOST_BETWEEN_S,
    PACES,
    STRIDE,
    Call,
    Load,
    calls_for,
    chain,
    grid,
    paces,
)
from paradiff.executor.measure_works import (
    Samples,
    _pass,
    measure_works,
    shortest,
    works_of,
)
from paradiff.graph import work_text
from paradiff.trace import TRANSFERS, check_trace, read_chrome_trace
from simulator.measured_machine import CallTime, MeasuredMachine

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
SMALL = ("--model", "pixart-alpha", "--height", "128", "--width", "128", "--steps", "3")
ANY = ("--max-error", "1000")
"""Other processes of a test machine may take any time: only files and sums are judged."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def launched(cache: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "paradiff", "validate", "run", *SMALL, *arguments],
        capture_output=True, text=True, cwd=folder, check=False, env=environment,
    )  # fmt: skip


def here(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["validate", "run", *arguments])


def test_two_processes_are_measured_predicted_run_and_compared(cache: Path, tmp_path: Path) -> None:
    """Then again without measuring, under a gate that nothing passes."""
    command = ("--strategy", "ulysses=2", "--launch", "2", "--repeats", "2", "--warmup-runs", "1")
    done = launched(cache, tmp_path, *command, *ANY, "--output-dir", "out", "--format", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == json.loads((tmp_path / "out" / "validation.json").read_text())
    assert answer["schema"] == "paradiff.validate-run/1"
    assert answer["passed"] is True
    assert answer["error"] == pytest.approx(answer["predicted_s"] / answer["measured_s"] - 1)
    assert len(answer["repeats_s"]) == 2
    assert sum(s["predicted_s"] for s in answer["steps"]) <= answer["predicted_s"]
    assert answer["by_kind"]["collective"]["predicted_s"] > 0
    assert answer["measured"]["new"] == answer["measured"]["works"] + answer["measured"]["calls"]
    assert answer["machines"][0]["ranks"] == [0, 1]
    _check_traces(tmp_path / "out", answer)

    again = launched(
        cache,
        tmp_path,
        *command[:-2],
        "--warmup-runs",
        "0",
        "--max-error",
        "0",
        "--output-dir",
        "again",
    )
    assert again.returncode == 1
    assert "allowed: 0.0% (--max-error)" in again.stderr.splitlines()[-1]
    report = json.loads((tmp_path / "again" / "validation.json").read_text())
    assert report["measured"]["new"] == 0
    # The same measurements predict the same run, whatever this time was measured.
    assert report["predicted_s"] == answer["predicted_s"]


def _check_traces(folder: Path, answer: dict[str, Any]) -> None:
    """Every trace is a run of the graph, and they are those of the numbers."""
    prepared = prepare(
        Job(source="tiny-pixart-alpha", spec="ulysses=2", height=128, width=128, steps=3)
    )
    names = ["predicted.json.gz", "measured-1.json.gz", "measured-2.json.gz"]
    traces = [read_chrome_trace(folder / name) for name in names]
    for trace in traces:
        check_trace(prepared.graph, trace)
    assert [dict(t.meta)["kernels"] for t in traces] == ["simulated", "real", "real"]
    assert [t.makespan_s for t in traces] == [answer["predicted_s"], *answer["repeats_s"]]
    for name, note in zip(names, (None, UNWATCHED, UNWATCHED), strict=True):
        events = json.loads(gzip.decompress((folder / name).read_bytes()))["traceEvents"]
        assert {e["name"] for e in events if e["ph"] == "i"} == ({note} if note else set())
        counted = {e["name"] for e in events if e["ph"] == "C"}
        assert "modelled memory" in counted
        links = {frozenset(re.split("->|--", each)) for each in counted}
        own = ("rank 0 sends", "rank 1 receives") if note else ("rank0 switch0", "rank1 switch0")
        assert {frozenset([each] if note else each.split()) for each in own} <= links, name
        both = [{e["pid"] for e in events if e["ph"] == end} for end in "sf"]
        assert both == [{1, 2}, {1, 2}], "each rank sends its heads to the other"
    assert answer["files"] == sorted(path.name for path in folder.iterdir())


def test_one_process_takes_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """All ranks in one process: nothing overlaps, so the prediction is the sum of the works."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (tmp_path / "out").mkdir()
    for name in ("measured-1.json.gz", "measured-5.json.gz", "mine.txt"):
        (tmp_path / "out" / name).touch()
    command = (
        *SMALL,
        "--strategy",
        "cfg=2",
        "--repeats",
        "1",
        "--output-dir",
        str(tmp_path / "out"),
    )
    done = here(*command, *ANY, "--format", "json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*answer["files"], "mine.txt"}, "runs of an earlier command are gone"
    assert "measured-5.json.gz" not in answer["files"]
    assert answer["how"] == "all ranks in one process, in turn"
    assert answer["predicted_s"] == pytest.approx(answer["by_kind"]["compute"]["predicted_s"])


def test_the_gate_fails_for_a_machine_that_is_kept_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Thirty times as long as measured passes here, whatever else the machine does; works that are kept
    as a thousand times as long as they are do not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = (*SMALL, "--strategy", "cfg=2", "--repeats", "1", "--max-error", "30")
    right = here(*command)
    assert right.exit_code == 0, right.output
    assert "One run does not show" in right.stdout
    (file,) = tmp_path.glob("paradiff/measured/*.json")
    kept = json.loads(file.read_text())
    kept["works"] = {key: [1000 * s for s in each] for key, each in kept["works"].items()}
    file.write_text(json.dumps(kept))
    wrong = here(*command)
    assert wrong.exit_code == 1, wrong.output
    assert "allowed: 3000.0% (--max-error)" in wrong.stderr


def test_works_are_timed_once_for_all_that_have_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A longer run has no work that a shorter one lacks; a broken file is said, not used, and measured
    over where that is asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    job = Job(source="tiny-pixart-alpha", spec="serial", height=128, width=128, steps=2)
    prepared = prepare(job)
    first = measure_here(job, prepared)
    assert first.new == len(first.machine.works) == len(works_of(prepared.graph))
    longer = prepare(Job(**{**_fields(job), "steps": 4}), prepared.pipeline)
    assert measure_here(job, longer, again=False).new == 0
    (file,) = tmp_path.glob("paradiff/measured/*.json")
    assert json.loads(file.read_text())["about"]["torch"] == torch.__version__
    whole = file.read_text()
    for broken in (whole[:-9], whole.replace("paradiff.", "other.", 1), "[]"):
        file.write_text(broken)
        with pytest.raises(ConfigError, match=rf"{file.name}: no measurements of a machine"):
            measure_here(job, prepared)
    assert measure_here(job, prepared, again=True).new == first.new
    assert json.loads(file.read_text())["works"].keys() == json.loads(whole)["works"].keys()


def _fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__slots__}


def test_the_shortest_schedule_has_every_work() -> None:
    """Two warm-up steps and one after them are the fewest that show a stale strategy."""
    job = Job(source="tiny-pixart-alpha", spec="pipefusion=2,patches=2,warmup=2", height=128, width=128,
              steps=12)  # fmt: skip
    prepared = prepare(job)
    wanted = works_of(prepared.graph)
    fewer = shortest(job, prepared.pipeline, wanted)
    assert works_of(fewer.graph) == wanted
    assert int(dict(fewer.graph.meta)["steps"]) < 5


@pytest.mark.parametrize("spec", ["serial", "ulysses=2"])
def test_what_finds_its_weights_in_the_caches_is_told_apart(spec: str) -> None:
    """In one process rank 1 does every piece of work right after rank 0 has done the same."""
    prepared = prepare(Job(source="tiny-pixart-alpha", spec=spec, height=128, width=128, steps=2))
    cold, warm = Samples(list), Samples(list)
    _pass(prepared, cold, warm)
    ops = Counter(i.op.ranks[0] for i in prepared.graph.instances() if i.op.call == "forward")
    texts = {work_text(i.op.work) for i in prepared.graph.instances()
             if i.op.call == "forward" and i.op.work is not None}  # fmt: skip
    assert [sum(len(each[text]) for text in texts) for each in (cold, warm)] == [ops[0], ops[1]]


def test_calls_are_timed_after_computations_as_long_as_those_of_the_schedule() -> None:
    """With a microsecond for each work, the quantiles are numbers of works between two of a rank's
    transfers: their mean is near that of all (works over transfers, for each rank)."""
    job = Job(source="tiny-pixart-alpha", spec="ulysses=2", height=128, width=128, steps=2)
    graph = prepare(job).graph
    ops = [instance.op for instance in graph.instances()]
    works = sum(op.work is not None for op in ops)
    transfers = sum(len(op.ranks) for op in ops if op.kind in TRANSFERS)
    for call in calls_for(graph, "aa", lambda *_: 1e-6):
        assert len(call.between_s) == PACES
        assert [*call.between_s] == sorted(call.between_s)
        assert all(s * 1e6 == pytest.approx(round(s * 1e6)) for s in call.between_s)
    every = [
        s for c in calls_for(graph, "aa", lambda *_: 1e-6) if c.kind == "p2p" for s in c.between_s
    ]
    assert statistics.fmean(every) == pytest.approx(1e-6 * works / transfers, rel=0.25)
    for call in calls_for(graph, "aa", lambda *_: 1.0):
        assert max(call.between_s) == MOST_BETWEEN_S


def test_computations_before_calls_of_one_size_are_told_from_those_of_another() -> None:
    """Sizes within a factor of four of the one that is timed count, all where there are none."""
    seen = [(64, 1e-3)] * 6 + [(100, 2e-3)] * 2 + [(10**6, 5e-3), (10**6, 1.0)]
    assert paces(seen, 64) == (1e-3,) * 6 + (2e-3,) * 2
    assert paces(seen, 4**10) == (5e-3,) * 4 + (MOST_BETWEEN_S,) * 4
    assert paces(seen, 4**7) == (1e-3,) * 5 + (2e-3,) * 1 + (5e-3,) + (MOST_BETWEEN_S,)


class Slow(Load):
    """Kernels of 50 us each, that are counted and not made."""

    def __init__(self) -> None:
        self.made: list[int] = []
        super().__init__()

    def _seconds(self, times: int) -> float:
        return times * 50e-6

    def _multiply(self, times: int) -> None:
        self.made.append(times)


def test_made_up_computations_are_as_many_kernels_as_fill_the_time() -> None:
    load = Slow()
    for seconds in (0.0, 1e-2, 2e-2):
        load(seconds)
    assert load.made == [0, 200, 400]


def test_a_chain_has_each_computation_as_often_as_any_other() -> None:
    assert sorted(STRIDE * i % PACES for i in range(PACES)) == list(range(PACES))


def test_means_predict_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine passes one takes twelve times as long: a mean of 20 / 9 of the others', a median of 1."""
    took = iter([0.0, 1.0, 12.0, *[1.0] * 7])

    def take(prepared: Prepared, cold: Samples, warm: Samples) -> float:
        cold["work"].append(next(took))
        return 1.0

    monkeypatch.setattr("paradiff.executor.measure_works._pass", take)
    job = Job(source="tiny-pixart-alpha", spec="serial", height=128, width=128, steps=1)
    timed = measure_works(job, prepare(job).pipeline, ())
    assert timed == {"work": pytest.approx(20 / 9)}
    assert mean_of([1.0, 1.0, 1.0, 5.0]) == pytest.approx((2.0, 1.0))
    assert mean_of([3.0]) == (3.0, math.inf)


@pytest.mark.parametrize(
    ("some_s", "others_s", "alike"),
    [
        ((1e-3, 2e-3), (1.24e-3, 2.4e-3), True),
        ((1e-3, 2e-3), (1e-3, 2.6e-3), False),
        ((0.0, 2e-3), (99e-6, 2e-3), True),
        ((0.0, 2e-3), (101e-6, 2e-3), False),
        ((1e-3,), (1e-3, 1e-3), False),
    ],
)
def test_calls_after_computations_alike_are_not_timed_again(
    some_s: tuple[float, ...], others_s: tuple[float, ...], alike: bool
) -> None:
    """A quarter apart, or of 0.1 ms at the most."""
    assert are_alike(some_s, others_s) is are_alike(others_s, some_s) is alike


def test_one_schedule_s_calls_are_not_another_s() -> None:
    """Of the same sizes after other computations: both are kept, and each is found by its own."""
    short, long = ((s,) * PACES for s in (1e-3, 5e-3))
    calls = tuple(
        CallTime("collective", "all_reduce", (0, 1), 64, b, b[0] / 2) for b in (short, long)
    )
    machine = MeasuredMachine(about={}, hosts=("a", "a"), calls=calls)
    for each in calls:
        assert _timed(Call("collective", "all_reduce", (0, 1), 64, each.between_s), machine) is each
        assert (
            _timed(Call("collective", "all_reduce", (0, 1), 256, each.between_s), machine) is None
        )
    assert _timed(Call("collective", "all_reduce", (0, 1), 64, (2e-3,) * PACES), machine) is None


@pytest.mark.parametrize(
    ("hosts", "pairs"), [("aabb", {(0, 1), (0, 2)}), ("abbb", {(0, 1), (1, 2)}), ("abcd", {(0, 1)})]
)
@pytest.mark.parametrize("spec", ["ulysses=4", "ring=4", "pipefusion=4,patches=4,warmup=1"])
def test_what_is_timed_encloses_every_transfer_of_the_schedule(
    spec: str, hosts: str, pairs: set[tuple[int, int]]
) -> None:
    """Of each collective its sizes; of messages two sizes or more, between the first two ranks of one
    host and the first two of two."""
    graph = prepare(
        Job(source="tiny-pixart-alpha", spec=spec, height=128, width=128, steps=2)
    ).graph
    calls = calls_for(graph, hosts, lambda *_: 1e-3)
    assert len({call[:4] for call in calls}) == len(calls)
    for kind in ("p2p", "permute"):
        for pair in pairs:
            assert len([call for call in calls if (call.kind, call.ranks) == (kind, pair)]) >= 2
    for op in (op for section in graph.sections for op in section.ops if op.kind in TRANSFERS):
        at = {op.ranks} if op.kind == "collective" else pairs
        for ranks in at:
            sizes = [c.nbytes for c in calls if (c.kind, c.ranks) == (op.kind, ranks)]
            assert min(sizes) <= op.nbytes <= max(sizes)


@pytest.mark.parametrize(
    "call",
    [
        Call("collective", "all_gather", (0, 1, 2), 64, (0.0,) * PACES),
        Call("permute", "ring", (0, 2), 64, (0.0,) * PACES),
        Call("p2p", "send", (2, 0), 64, (0.0,) * PACES),
    ],
)
def test_chains_are_legal_schedules(call: Call) -> None:
    """Each call waits for the one before: with a second for a call, n of them take n seconds."""
    graph = chain(call, 3, 5)
    validate(graph)
    transfers = [i for i in graph.instances() if i.op.kind == call.kind]
    assert len(transfers) == (10 if call.kind == "p2p" else 5)
    assert {i.op.nbytes for i in transfers} == {64}


def test_grids_enclose_what_is_asked() -> None:
    assert grid(1, 1) == [1]
    assert grid(5, 64) == [4, 16, 64]
    assert grid(1024, 1025) == [1024, 4096]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "nothing to run"),
        ((*SMALL, "--strategy", "cfg=2", "--launch", "3"), 2, "--launch 3: cfg=2 takes 2 ranks"),
        ((*SMALL, "--launch", "1", "--in-process"), 2, "give one of them"),
        ((*SMALL, "--device", "cuda"), 2, "which GPU is it"),
        ((*SMALL, "--gpu", "nonsense"), 2, "nonsense"),
        (("--model", "sd21", "--strategy", "ulysses=2"), 3, "ulysses"),
        ((*SMALL, "--repeats", "0"), 2, "--repeats"),
        (("absent.plan.yaml",), 2, "absent.plan.yaml"),
    ],
)
def test_bad_input_is_one_message(arguments: tuple[str, ...], code: int, said: str) -> None:
    done = here(*arguments)
    assert done.exit_code == code, done.output
    assert said in done.output


CARDS = {
    "NVIDIA A10": "a10", "NVIDIA A100-SXM4-40GB": "a100-40g", "NVIDIA A100-SXM4-80GB": "a100-80g-sxm",
    "NVIDIA A100 80GB PCIe": "a100-80g-pcie", "NVIDIA B200": "b200", "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H20": "h20", "NVIDIA H200": "h200", "NVIDIA L4": "l4",
    "NVIDIA L20": "l20", "NVIDIA L40": "l40", "NVIDIA L40S": "l40s", "NVIDIA RTX A5000": "a5000",
    "NVIDIA RTX A6000": "a6000", "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090", "Tesla T4": "t4", "Tesla V100-SXM2-32GB": "v100",
}  # fmt: skip
"""What the driver calls a GPU -> its profile."""


def test_every_card_has_a_profile() -> None:
    assert set(CARDS.values()) <= set(available("gpus", ".yaml"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("spec", ["serial", "ulysses=4"])
def test_kernel_tables_predict_a_real_model_on_a_gpu(tmp_path: Path, spec: str) -> None:
    """PixArt at full size, one process, ranks one after another: an op within 10 % in the median, a step
    within 7 %."""
    name = CARDS.get(torch.cuda.get_device_name())
    assert name is not None, f"{torch.cuda.get_device_name()}: add its profile to CARDS"
    done = here("--model", "pixart-alpha", "--random-weights", "--strategy", spec, "--steps", "4",
                "--dtype", "fp16", "--device", "cuda", "--gpu", name, *ANY, "--output-dir",
                str(tmp_path / "out"))  # fmt: skip
    assert done.exit_code == 0, done.output
    answer = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert answer["by_call"]["forward"]["median_error"] <= 0.10
    for step in answer["steps"][1:]:
        assert abs(step["error"]) <= 0.07
