"""Fitting a GPU profile to traces: only real runs, known factors come back, errors of unseen works."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from shipped import profile
from typer.testing import CliRunner, Result

from analysis.sources import gpu_figures
from paradiff.cli import app
from paradiff.cli.profile import _print_fit
from paradiff.config import ConfigError
from paradiff.graph import Shape, Work
from paradiff.strategies import Workload, build, parse_spec
from paradiff.trace import Trace, read_chrome_trace, write_chrome_trace
from simulator.calibrate import (
    PRIOR,
    SHARED,
    TOLD,
    Factors,
    Fit,
    Seen,
    _fitted,
    _part,
    _Predictor,
    ceilings,
    corrected_yaml,
    fit,
    groups,
    load_traces,
    observations,
    residuals,
    scaled,
)
from simulator.costs import CostModel
from simulator.engine import simulate
from simulator.gpu import Dtype, Gpu, load_gpu
from simulator.measured import Key
from simulator.network import Network
from simulator.topology import load_topology

L40 = load_gpu("l40")
HALF: tuple[Dtype, ...] = ("fp16", "bf16")
TRUE = Factors(0.7, 0.85, 0.6)
RUNS = {"patches": ("sd15", "patch=2", 1024), "heads": ("pixart-alpha", "ulysses=2", 1024)}
"""Attention alone (heads), norms alone, convolutions: each rate has works of its own in both."""
REAL = {"kernels": "real", "device": "NVIDIA L40", "torch": "2.13.0", "date": "2026-11-29"}


def simulated(model: str, spec: str, size: int, gpu: Gpu) -> Trace:
    network = profile(model)
    work = Workload(height=size, width=size, frames=1, steps=3, dtype="bf16")
    graph = build(parse_spec(spec), network, work)
    costs = CostModel(network, [gpu] * 8, "bf16")
    ranks = tuple(range(graph.world_size))
    box = Network(load_topology("pcie8"))
    return simulate(graph, box, costs, placement=ranks).expanded()


def said(trace: Trace, facts: Mapping[str, str | None]) -> Trace:
    """The trace with other facts of its making; None: without that."""
    meta = {**dict(trace.meta), **facts}
    return replace(trace, meta=tuple(sorted((k, v) for k, v in meta.items() if v is not None)))


def measured(name: str, gpu: Gpu) -> Trace:
    """A run on a GPU whose every rate is known: what the engine makes, in the words of the executor."""
    return said(simulated(*RUNS[name], gpu), REAL | {"clock_residual_s": "1e-6"})


def seen_on(factors: Factors, names: Sequence[str] = tuple(RUNS)) -> list[Seen]:
    gpu = scaled(L40, factors, "true", HALF)
    runs = [(Path(name), measured(name, gpu), profile(RUNS[name][0])) for name in names]
    return observations(runs, L40)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of a GPU that is an L40 with other rates."""
    folder, gpu = tmp_path_factory.mktemp("runs"), scaled(L40, TRUE, "true", HALF)
    paths = [folder / f"{name}.json.gz" for name in RUNS]
    for name, path in zip(RUNS, paths, strict=True):
        write_chrome_trace(measured(name, gpu), path)
    return paths


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("name", Factors._fields)
def test_a_known_factor_on_one_rate_comes_back(name: str) -> None:
    """The traces are the model's own, so one set of factors leaves nothing over, for works that were
    held out too; instants are multiples of 2^-40 s, 5e-8 of the shortest work."""
    true = Factors(**{name: 0.7})
    found = fit(seen_on(true), L40, "mine")
    assert found.told == Factors._fields
    assert found.factors == pytest.approx(true, rel=1e-6)
    assert found.held_out == pytest.approx([0.0] * len(found.held_out), abs=1e-6)
    moved = [kind for kind, error in zip(found.kinds, found.before, strict=True) if error < -0.2]
    assert moved
    assert set(moved) <= {name, "launches"}


class Powers(_Predictor):
    """A device on which a work of one kernel, of dimension i, takes the product of the factors to the
    powers -powers[i - 1] of seconds."""

    powers: Sequence[Sequence[float]] = ()

    def __call__(self, seen: Sequence[Seen], factors: Factors) -> NDArray[np.float64]:
        exponents = np.array([self.powers[next(iter(each.launches)).dims[0] - 1] for each in seen])
        return cast("NDArray[np.float64]", np.prod(np.array(factors) ** -exponents, axis=1))


def works(*seconds: float) -> list[Seen]:
    """Works without a kernel in common."""
    shape = Shape(b=1, f=1, r=1, w=1, k=1, t=0, s=0, h=0, u=1, j=0)
    work = Work("denoiser", ((0, 1),), shape)
    return [
        Seen(profile("pixart-alpha"), "bf16", work, {Key("norm", (i,)): 1}, each)
        for i, each in enumerate(seconds, 1)
    ]


def powers(*rows: Sequence[float]) -> Powers:
    predict = Powers(L40, HALF, "eager", "mine")
    predict.powers = rows
    return predict


def test_the_fit_in_closed_form() -> None:
    """Two works at the matmul rate took 2 s where 1 s was predicted, two at the attention rate 1.25 s,
    none is at the memory's: factors 1/2 and 4/5, and the memory's is not told and stays 1. Two works at
    one rate in different measure, 1.21 and 1.44 times as long: the mean of the logarithms."""
    at = powers((1, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 0))
    found = _fitted(works(2.0, 2.0, 1.25, 1.25), at)
    assert found.factors == pytest.approx((1 / 2, 4 / 5, 1), rel=1e-6)
    assert found.factors.memory == 1
    assert found.told == ("matmul", "attention")
    assert found.kinds == ("matmul", "matmul", "attention", "attention")
    apart = _fitted(works(1.21, 1.44), powers((0, 0, 1), (0, 0, 1)))
    assert apart.factors == pytest.approx((1, 1, 1 / (1.1 * 1.2)), rel=1e-6)


@pytest.mark.parametrize(("share", "is_told"), [(0.59, False), (0.61, True)])
def test_what_is_told_in_closed_form(share: float, is_told: bool) -> None:
    """One work of two spends p of its time at the memory rate and nothing else with it: the resolution
    of that rate is p^2 / (p^2 + 0.2^2), above 0.9 where p > 3 x 0.2. Two rates that all works need in
    the same measure have less than 1/2 each, however many works there are: neither is told."""
    assert (PRIOR, TOLD) == (0.2, 0.9)
    found = _fitted(works(2.0, 2.0**share), powers((1, 0, 0), (0, 0, share)))
    assert ("memory" in found.told) is is_told
    assert found.factors == pytest.approx((1 / 2, 1, 1 / 2 if is_told else 1), rel=1e-6)
    alike = _fitted(works(*[2.0] * 9), powers(*[(0.5, 0, 0.5)] * 9))
    assert (alike.told, alike.factors) == ((), (1, 1, 1))


def test_errors_are_of_works_that_were_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Works of one kernel were measured at 0.4 of the rate, those of another at 0.8: each kernel is
    predicted with the other's factor, so the errors are 0.4/0.8 - 1 and 0.8/0.4 - 1 exactly, whatever
    fits both on average, and though works of either kernel come from the same file."""
    seen = works(1 / 0.4, 1 / 0.8) * 2
    monkeypatch.setattr(Powers, "powers", [(1, 0, 0), (1, 0, 0)])
    monkeypatch.setattr("simulator.calibrate._Predictor", Powers)
    assert groups(seen) == [[0, 2], [1, 3]]
    found = fit(seen, L40, "mine")
    assert found.held_out == pytest.approx([-0.5, 1.0] * 2, rel=1e-6)


def test_ceilings(tmp_path: Path) -> None:
    """Times of nearly nothing: every factor stops where the file of the profile still loads, and no rate
    is called measured."""
    impossible = [each._replace(seconds=each.seconds / 50) for each in seen_on(Factors())]
    found = fit(impossible, L40, "mine")
    assert found.factors == pytest.approx(ceilings(L40, HALF), rel=1e-6)
    assert found.gpu.matmul.bf16.value == pytest.approx(1.1 * L40.peak.bf16.value, rel=2e-2)
    assert found.gpu.memory_bandwidth.value == pytest.approx(864e9, rel=2e-4)
    assert found.capped == Factors._fields
    file = tmp_path / "mine.yaml"
    file.write_text(corrected_yaml("l40", found, ["bf16"], "these runs"))
    new = load_gpu(file)
    assert (new.matmul.bf16.kind, new.memory_bandwidth.kind) == ("assumed", "assumed")
    assert (
        new.memory_bandwidth.source
        == "its ceiling, which works reach or exceed, these runs; was 728 GB/s"
    )


def test_times_of_a_much_slower_device_are_refused() -> None:
    slow = [each._replace(seconds=each.seconds * 100) for each in seen_on(Factors(), ["heads"])]
    with pytest.raises(ConfigError, match="more than 20 times what a l40 should"):
        fit(slow, L40, "mine")


# ------------------------------------------------------------------------------------------- works


def test_the_same_work_is_one_observation() -> None:
    """Blocks of a transformer launch the same kernels: of 28, on two ranks, in three steps, there are
    the first, attention, a middle one, the last; and the scheduler. What is measured of each is the
    median over all files: of a run and one that took 1.5 times as long, 1.25 times the first."""
    fast = measured("heads", L40)
    slow = replace(fast, spans=tuple(s._replace(busy_s=1.5 * s.busy_s) for s in fast.spans))
    network = profile("pixart-alpha")
    once, both = (
        observations([(Path(str(i)), trace, network) for i, trace in enumerate(traces)], L40)
        for traces in ([fast], [fast, slow])
    )
    assert len(once) == 5
    assert [each.launches for each in both] == [each.launches for each in once]
    ratios = [b.seconds / a.seconds for a, b in zip(once, both, strict=True)]
    assert ratios == pytest.approx([1.25] * 5)


def test_ops_beside_transfers_are_not_counted() -> None:
    """Two of three steps take twice as long, but all the while a rank sends: one transfer as long as a
    step. What is left of the works is what the third step says."""
    calm = measured("heads", L40)
    whole = {
        (step, rank): (min(s.start_s for s in own), max(s.end_s for s in own))
        for step in (1, 2)
        for rank in (0, 1)
        if (own := [s for s in calm.spans if (s.step, s.rank) == (step, rank)])
    }
    spans = []
    for span in calm.spans:
        if span.step in (1, 2) and span.kind == "compute":
            span = span._replace(busy_s=2 * span.busy_s)
        elif span.step in (1, 2):
            start_s, end_s = whole.pop((span.step, span.rank), (span.start_s, span.end_s))
            span = span._replace(start_s=start_s, end_s=end_s)
        spans.append(span)
    assert not whole
    spans.sort(key=lambda span: span.start_s)
    network = profile("pixart-alpha")
    once, again = (
        observations([(Path("x"), replace(calm, spans=tuple(each)), network)], L40)
        for each in (calm.spans, spans)
    )
    assert [each.seconds for each in again] == pytest.approx([each.seconds for each in once])


def test_works_of_two_folds_share_no_kernel_that_counts() -> None:
    """The first, the middle and the last block of a transformer go together; attention, which only the
    ranks of a sequence launch alone, is apart."""
    seen = seen_on(Factors())
    of = {place: number for number, places in enumerate(groups(seen)) for place in places}
    assert len(of) == len(seen) > 30
    apart = 0
    for i, j in combinations(range(len(seen)), 2):
        common = seen[i].launches.keys() & seen[j].launches.keys()
        if of[i] != of[j] and common:
            apart += 1
            assert min(_part(seen[k].launches, common) for k in (i, j)) <= SHARED
    assert apart
    ranges = {each.work.ranges: of[i] for i, each in enumerate(seen) if each.profile.name != "sd15"}
    first, attention, middle, last = (ranges[(r,)] for r in ((0, 2), (2, 3), (3, 8), (165, 170)))
    assert first == middle == last != attention


def test_too_few_works_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 distinct works longer than 20 us in 2 groups"):
        fit(works(1.0, 1.0), L40, "mine")
    alike = [each._replace(launches={Key("norm", (9,)): 1}) for each in works(*[1.0] * 5)]
    with pytest.raises(ConfigError, match="5 distinct works longer than 20 us in 1 groups"):
        fit(alike, L40, "mine")


def test_precisions_of_different_units_are_not_fitted_together() -> None:
    first, *others = works(*[1.0] * 4)
    with pytest.raises(ConfigError, match="bf16, fp32, which a l40 computes in different units"):
        fit([first._replace(dtype="fp32"), *others], L40, "mine")
    assert list(_Predictor(L40, ["fp32"], "eager", "x").free) == [True, False, True]


# ------------------------------------------------------------------------------- what is a measurement


REFUSED: Mapping[str, tuple[dict[str, str | None], str]] = {
    "simulated": ({"kernels": "simulated"}, "a simulated trace: its times are predictions"),
    "timed": ({"kernels": "timed"}, "timed kernels: they slept for predicted times"),
    "old": ({"kernels": None, "topology": None}, "does not say what took its times, as earlier"),
    "old, simulated": ({"kernels": None}, "a simulated trace"),
    "unknown": ({"kernels": "other"}, "does not say what took its times"),
    "another GPU": ({"device": "NVIDIA H100 80GB HBM3"}, "not a l40 (NVIDIA L40 48 GB PCIe)"),
    "a CPU": ({"device": "AMD EPYC 9B14"}, "measured on AMD EPYC 9B14, which is not a l40"),
    "one of two": ({"device": "NVIDIA L40; NVIDIA L40S"}, "measured on NVIDIA L40S"),
    "no device": ({"device": None, "steps": None}, "a trace without device, steps"),
    "double": ({"dtype": "fp64"}, "a run in fp64, allowed: fp16, bf16, fp32"),
    "twin": (
        {"model": "tiny-sd15"},
        "a run of tiny-sd15, the small twin of sd15: its kernels are too",
    ),
    "one process": ({"clock_residual_s": None}, "its ranks shared one GPU"),
    "no profile": ({"model": "small-dit"}, "a run of small-dit, which has no profile here"),
    "another spec": ({"spec": "serial"}, "is not in the graph of serial"),
    "no number": ({"steps": "three"}, "its graph cannot be built"),
}


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", "fit", *arguments])


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_measurement_is_refused(case: str, runs: list[Path], tmp_path: Path) -> None:
    facts, message = REFUSED[case]
    file, target = tmp_path / "trace.json", tmp_path / "mine.yaml"
    write_chrome_trace(said(read_chrome_trace(runs[1]), facts), file)
    done = command(str(runs[0]), str(file), "--gpu", "l40", "--output", str(target))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"paradiff: {file}: ")
    assert message in done.stderr
    assert "allowed: " in done.stderr
    assert not target.exists()


def test_one_run_twice_is_refused(runs: list[Path], tmp_path: Path) -> None:
    """By what is in it: another name, without compression, other words about its making."""
    copy, link = tmp_path / "other.json", tmp_path / "link.json.gz"
    link.symlink_to(runs[0])
    text = gzip.decompress(runs[0].read_bytes()).decode()
    copy.write_text(text.replace("2026-11-29", "2026-11-30"))
    for again in (copy, link, runs[0]):
        with pytest.raises(ConfigError, match=f"{again}: the same run as {runs[0]}"):
            load_traces([runs[0], runs[1], again], L40)


def test_a_run_that_waits_for_its_launches_is_refused() -> None:
    """sd15 at 256 px on two ranks: by the profile 86 ms of launches, 8 us each, 67 ms of kernels."""
    trace = said(simulated("sd15", "patch=2", 256, L40), REAL)
    with pytest.raises(ConfigError, match="a run that waits for its launches"):
        observations([(Path("small"), trace, profile("sd15"))], L40)
    assert observations([(Path("small"), trace, profile("sd15"))], L40, "cuda-graph")


# ----------------------------------------------------------------------------------- what is written


def test_the_corrected_profile_plans(runs: list[Path], tmp_path: Path) -> None:
    """Its rates are the true ones to five digits, its residuals come back, and a plan says both."""
    target = tmp_path / "mine.yaml"
    done = command(*map(str, runs), "--gpu", "l40", "--output", str(target))
    assert done.exit_code == 0, done.output
    assert "matmul x 0.7, attention x 0.85, memory x 0.6\n" in done.stdout
    assert "predict no better" not in done.stdout
    new = load_gpu(target)
    assert new.name == "mine"
    assert new.matmul.bf16.value == pytest.approx(0.7 * L40.matmul.bf16.value, rel=1e-4)
    assert new.memory_bandwidth.value == pytest.approx(0.6 * 728e9, rel=1e-4)
    told = "sd15 patch=2 1024x1024 bf16, pixart-alpha ulysses=2 1024x1024 bf16; NVIDIA L40, torch 2.13.0"
    assert f"{told}, paradiff 0.1.0, 2026-11-29; was 141.5 TFLOP/s" in new.matmul.bf16.source
    assert new.fitted is not None
    assert [each.kind for each in new.fitted.residuals][-1] == "all"
    of_all = new.fitted.residuals[-1]
    assert of_all.n == sum(each.n for each in new.fitted.residuals[:-1])
    assert max(of_all.worst, of_all.held_out_worst) < 1e-6
    plan = ["plan", "--topology", "pcie8", "--set", f"gpu={target}", "--steps", "4"]
    planned = CliRunner().invoke(app, [*plan, "--strategy", "serial"])
    assert planned.exit_code == 0, planned.output
    note = (
        f"rates of mine are fitted to measured traces: {of_all.n} works are missed by 0.0% in the"
    )
    assert note in " ".join(planned.stdout.split())
    box = load_topology("pcie8", [f"gpu={target}"])
    rows = {label: value for label, value, _, _ in gpu_figures(box)}
    assert rows["mine: works missed, all"].startswith(f"{of_all.n}: 0.0%, at worst 0.0%; held out")


def told_alone(*names: str, factors: Factors = TRUE) -> Fit:
    kept = Factors(**{name: getattr(factors, name) for name in names})
    return Fit(
        gpu=scaled(L40, kept, "mine", HALF),
        factors=kept,
        told=names,
        capped=(),
        kinds=("matmul", "memory", "memory"),
        before=(-0.5, 0.1, 0.3),
        after=(0.1, -0.2, 0.05),
        held_out=(0.3, 0.3, -0.4),
    )


def test_only_what_was_told_is_measured(tmp_path: Path) -> None:
    """Runs in bf16 tell that rate, of attention the figure that all widths are priced from, memory; fp16
    runs on the same units and is transferred. All else is as it was, and with it what it rests on."""
    file = tmp_path / "mine.yaml"
    for names in (("matmul",), ("attention",), ("memory",), Factors._fields):
        file.write_text(corrected_yaml("l40", told_alone(*names), ["bf16"], "these runs"))
        new = load_gpu(file)
        changed = {
            "matmul": {"matmul.fp16": "transferred", "matmul.bf16": "measured"},
            "attention": {"attention.1": "measured"},
            "memory": {"memory_bandwidth": "measured"},
        }
        expected = {key: kind for name in names for key, kind in changed[name].items()}
        assert dict(differing(L40, new)) == expected
    assert new.matmul.fp16.source.startswith(
        "the factor of bf16 on the same units, these runs; was 140.4"
    )


def differing(old: Gpu, new: Gpu) -> Iterator[tuple[str, str]]:
    """(name, kind now) of every figure that is another."""
    for key in Gpu.model_fields.keys() - {"name", "fitted"}:
        before, after = getattr(old, key), getattr(new, key)
        if key in ("peak", "matmul", "launch"):
            for inner in type(before).model_fields:
                if getattr(before, inner) != getattr(after, inner):
                    yield f"{key}.{inner}", getattr(after, inner).kind
        elif key == "attention":
            pairs = enumerate(zip(before, after, strict=True))
            yield from ((f"attention.{i}", b.kind) for i, (a, b) in pairs if a != b)
        elif before != after:
            yield key, after.kind


def test_a_fit_that_does_not_help_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    _print_fit(told_alone("matmul"))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "matmul x 0.7; not told by these works, as it was: attention, memory"
    assert said[-1].endswith("missed as much as before: these rates predict no better.")  # 0.3 both


def test_residuals_by_kind() -> None:
    found = list(residuals(told_alone("matmul")))
    assert [(r.kind, r.n, r.median, r.worst) for r in found] == [
        ("matmul", 1, 0.1, 0.1),
        ("memory", 2, 0.125, 0.2),
        ("all", 3, 0.1, 0.2),
    ]
    assert [(r.held_out_median, r.held_out_worst) for r in found] == [
        (0.3, 0.3),
        (0.35, 0.4),
        (0.3, 0.4),
    ]


def test_wrong_use_is_one_message(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "odd.json").write_text(
        json.dumps(
            {"traceEvents": [{"name": "paradiff", "ph": "M", "args": {"makespan_s": 1, "meta": 5}}]}
        )
    )
    cases = {
        (str(tmp_path / "no.json"), "l40", "x.yaml"): "no paradiff trace",
        (str(tmp_path / "odd.json"), "l40", "x.yaml"): "no paradiff trace",
        (str(tmp_path / "none"), "l40", "x.yaml"): "none",
        (str(tmp_path / "none"), "l40", "nowhere/x.yaml"): "nowhere is not a directory",
        (str(runs[0]), "l44", "x.yaml"): "l44: no such file in gpus",
        (str(runs[0]), "l40", "x.txt"): "ends in .yaml",
    }
    for (trace, gpu, name), message in cases.items():
        done = command(trace, "--gpu", gpu, "--output", str(tmp_path / name))
        assert done.exit_code == 2
        assert message in done.stderr
