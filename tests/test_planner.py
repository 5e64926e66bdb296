"""What the planner adds to building and simulating: ranking, filters, intervals, reasons."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
from shipped import profile

from analysis import text
from analysis.intervals import comm_basis
from paradiff.strategies import Workload, build, candidate_specs, not_compared, parse_spec
from simulator import symmetry
from simulator.gpu import load_gpu
from simulator.network import Network
from simulator.planner import Candidate, Goal, Plan, Request, plan
from simulator.runs import Contradiction
from simulator.topology import load_topology

STEPS = 8
"""Enough for warm-up, steady state and tail; quick."""


def request(model: str = "sdxl", topology: str = "pcie8", **changes: object) -> Request:
    p = profile(model)
    sizes = {key: p.defaults[key] for key in ("height", "width", "frames")}
    base = Request(
        profile=p,
        topology=load_topology(topology),
        workload=Workload(**sizes, steps=STEPS),
        gpus=8,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@cache
def whole(model: str) -> Plan:
    """Every enumerated spec on pcie8."""
    return plan(request(model))


def by_spec(result: Plan) -> dict[str, Candidate]:
    return {c.spec: c for c in (*result.ranked, *result.rejected)}


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("model", ["sdxl", "pixart-alpha"])
def test_times_add_up(model: str) -> None:
    """Four classes make the loop, three stages the request; the latency lies in its interval."""
    assert len(whole(model).ranked) > 15
    for c in whole(model).ranked:
        assert c.stages is not None
        classes = (c.compute_s, c.exposed_comm_s, c.bubble_s, c.host_s)
        assert all(part is not None and part >= 0 for part in classes), c
        assert sum(filter(None, classes)) == pytest.approx(c.stages.denoise_s, rel=1e-9)
        stages = (c.stages.text_encoder_s, c.stages.denoise_s, c.stages.vae_s)
        assert c.latency_s == pytest.approx(sum(stages), rel=1e-12)
        assert c.latency_low_s < c.latency_s < c.latency_high_s  # type: ignore[operator]


def test_serial_is_the_baseline() -> None:
    result = whole("sdxl")
    serial = by_spec(result)["serial"]
    assert serial.speedup == 1.0
    assert serial.latency_s == result.baseline.latency_s
    assert serial.peak_memory_bytes == result.baseline.peak_memory_bytes
    assert (serial.exposed_comm_s, serial.comm_bytes_per_gpu) == (0.0, 0)


def test_cfg_halves_what_travels_and_what_is_computed() -> None:
    """SDXL 1024: eps of one branch is 4 x 128 x 128 x 2 B = 131072 B, once a step."""
    cfg = by_spec(whole("sdxl"))["cfg=2"]
    assert cfg.comm_bytes_per_gpu == STEPS * 131072
    serial = by_spec(whole("sdxl"))["serial"]
    assert 0.5 * serial.compute_s <= cfg.compute_s < 0.7 * serial.compute_s  # type: ignore[operator]
    assert (cfg.n_gpus, cfg.exact, cfg.max_staleness_steps) == (2, True, 0)


def test_every_enumerated_spec_is_answered_once() -> None:
    r = request("pixart-alpha")
    specs = list(candidate_specs(r.profile, r.workload, 8))
    assert sorted(by_spec(whole("pixart-alpha"))) == sorted(specs)
    assert all(c.reason for c in whole("pixart-alpha").rejected)


def test_throughput_counts_replicas() -> None:
    """data=8 serves eight requests in the time of one."""
    many = by_spec(whole("sdxl"))["data=8"]
    one = by_spec(whole("sdxl"))["serial"]
    assert many.throughput_per_s == pytest.approx(8 / many.latency_s)  # type: ignore[operator]
    assert one.throughput_per_s == pytest.approx(1 / one.latency_s)  # type: ignore[operator]


def test_a_step_pipeline_is_rated_by_its_busiest_rank() -> None:
    """Eight steps on eight GPUs: each request takes as long as alone, and one comes out a step, plus
    what every rank encodes or the last one decodes."""
    stream, one = (by_spec(whole("sdxl"))[spec] for spec in ("streambatch=8", "serial"))
    assert stream.exact
    assert stream.latency_s == pytest.approx(one.latency_s, rel=0.01)
    assert one.stages is not None
    share = one.stages.denoise_s / STEPS + one.stages.text_encoder_s + one.stages.vae_s
    assert 1 / stream.throughput_per_s == pytest.approx(share, rel=0.02)  # type: ignore[operator]


def test_what_is_not_compared_on_a_large_box_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the products on more than 16 GPUs those that the sentence names are there, and no others."""
    flux = request("flux1-dev")
    flux = replace(flux, workload=replace(flux.workload, steps=28))

    def found(gpus: int) -> set[frozenset[str]]:
        parsed = map(parse_spec, candidate_specs(flux.profile, flux.workload, gpus))
        axes = ("tensor", "ulysses", "ring", "pipefusion", "parastep")
        kinds = (
            frozenset(a for a in axes if s.degree(a) > 1) | {s.name} & {"parastep"}
            for s in parsed
            if s.n_gpus == gpus
        )
        return {kind for kind in kinds if len(kind) > 1}

    assert not list(not_compared(flux.profile, 16))
    assert {"pipefusion", "ring"} in found(16)
    assert {"pipefusion", "tensor"} in found(16)
    (said,) = not_compared(flux.profile, 64)
    assert "pipelines and parastep with Ulysses inside, Ulysses with ring, tensor" in said
    assert found(64) == {
        frozenset({"pipefusion", "ulysses"}),
        frozenset({"parastep", "ulysses"}),
        frozenset({"ulysses", "ring"}),
        frozenset({"tensor", "ulysses"}),
    }
    assert not list(not_compared(request("sdxl").profile, 64))
    monkeypatch.setattr("simulator.planner.candidate_specs", lambda *_: iter(["serial"]))
    monkeypatch.setattr("simulator.planner.tailored_specs", lambda *_: ())
    large = request("flux1-dev", "nvlink8x8-h100", gpus=64)
    assert said in plan(large).notes
    assert said not in plan(replace(large, specs=("serial",))).notes


def test_cost_is_the_share_of_the_box() -> None:
    """9.12 USD an hour for 8 GPUs; cfg=2 takes 2 of them."""
    cfg = by_spec(whole("sdxl"))["cfg=2"]
    assert cfg.cost == pytest.approx(9.12 * 2 / 8 / 3600 * cfg.latency_s)  # type: ignore[operator]
    assert cfg.cost_reason is None


def test_without_a_price_the_cost_is_unknown_and_says_why() -> None:
    """Nobody's price of an L20 is at hand; the order is that of GPU seconds per request."""
    specs = ("serial", "cfg=2", "data=8")
    goal = Goal(objective="cost")
    result = plan(replace(request(topology="pcie8-l20", specs=specs), goal=goal))
    for c in result.ranked:
        assert c.cost is None
        assert c.cost_reason == (
            "neither pcie8-l20 nor l20 has a price_per_hour; --set 'price_per_hour=20 USD' gives it one"
        )
    assert result.notes[0] == f"ranked by GPU seconds per request: {c.cost_reason}"
    header, rows = text.table(result, 3)
    assert {row[header.index("USD per request")] for row in rows} == {"no price"}
    priced = replace(load_topology("pcie8-l20"), price_per_hour=8.0)
    cheapest = plan(replace(request(specs=specs), topology=priced, goal=goal))
    assert [c.spec for c in cheapest.ranked] == [c.spec for c in result.ranked]
    header, rows = text.table(cheapest, 1)
    assert float(rows[0][header.index("USD per request")]) == pytest.approx(
        cheapest.ranked[0].cost, rel=5e-3
    )


def test_what_does_not_fit_is_made_to_fit() -> None:
    """flux1-dev has 23.8 GB of weights and 9.8 GB of text encoders; two RTX 3090 have 24 GB each.

    All that is enumerated is refused; what is offered moves weights, keeps the picture or says that it
    does not, and costs what the same run without costs less.
    """
    asked = replace(request("flux1-dev", "pcie2-3090"), gpus=2)
    result = plan(asked)
    best = result.ranked[0]
    assert {c.spec for c in result.rejected} >= set(
        candidate_specs(asked.profile, asked.workload, 2)
    )
    assert all("offload=" in c.spec or "weights=" in c.spec for c in result.ranked)
    assert any(c.exact for c in result.ranked)
    assert all(c.exact is False for c in result.ranked if "fp8" in c.spec)
    assert all(c.peak_memory_bytes < 24e9 for c in result.ranked)  # type: ignore[operator]
    (note,) = (n for n in result.notes if "costs" in n)
    places, cost, without = re.fullmatch(
        r"(\S+) costs (\S+) s of each request: \S+ would take (\S+) s if it fitted", note
    ).groups()  # type: ignore[union-attr]
    assert best.spec.endswith(places)
    assert float(cost) > 0.1
    assert float(cost) + float(without) == pytest.approx(best.latency_s, rel=0.01)

    refused = plan(replace(asked, specs=("serial", "ulysses=2")))
    offered = tuple(c.nearest for c in refused.rejected)
    assert all(offered)
    assert all(f"nearest: {c.nearest}" in str(c.reason) for c in refused.rejected)
    assert len(plan(replace(asked, specs=offered)).ranked) == 2  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ ranking


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ("latency", lambda c: c.latency_s),
        ("throughput", lambda c: -c.throughput_per_s),
        ("cost", lambda c: c.cost),
    ],
)
def test_ranked_by_the_objective(objective: str, value: object) -> None:
    specs = ("serial", "cfg=2", "data=8", "distrifusion=4,warmup=2", "parastep=2,warmup=2")
    result = plan(request(specs=specs, goal=Goal(objective=objective)))  # type: ignore[arg-type]
    values = [value(c) for c in result.ranked]  # type: ignore[operator]
    assert values == sorted(values)
    if objective == "throughput":
        assert result.ranked[0].spec == "data=8"


def test_decided_by_names_the_runner_up_and_a_reason() -> None:
    result = whole("sdxl")
    assert result.ranked[1].spec in result.decided_by
    overlap = result.ranked[0].latency_high_s >= result.ranked[1].latency_low_s  # type: ignore[operator]
    assert ("intervals overlap" in result.decided_by) == overlap


def test_overlapping_intervals_name_a_measurement() -> None:
    """Between two that exchange much and little, the wire decides: the call to measure is named."""
    specs = ("distrifusion=2,warmup=4", "cfg=2")
    wire = plan(request(specs=specs)).decided_by
    assert "nccl-tests all_gather_perf with" in wire
    assert "on GPUs 0,1" in wire
    # The same exchange, more or less split compute: one GPU's speed decides.
    compute = plan(request(specs=("parastep=2,warmup=2", "parastep=4,warmup=2"))).decided_by
    assert "--measured-latency" in compute


# ------------------------------------------------------------------------------------------ filters


def test_exact_only() -> None:
    result = plan(request(goal=Goal(exact_only=True)))
    assert result.ranked
    assert all(c.exact for c in result.ranked)
    reasons = {c.reason for c in result.rejected if c.exact is False}
    assert reasons == {"changes the picture, and --exact-only was asked"}


def test_max_staleness() -> None:
    result = plan(request(goal=Goal(max_staleness=1)))
    assert max(c.max_staleness_steps or 0 for c in result.ranked) == 1
    stale = [c for c in result.rejected if "--max-staleness" in (c.reason or "")]
    assert all((c.max_staleness_steps or 0) > 1 for c in stale)
    assert stale


def test_quality_is_not_invented() -> None:
    result = plan(request(goal=Goal(max_quality_loss=0.1)))
    assert all(c.exact for c in result.ranked)
    assert any("what nobody has measured was left out" in note for note in result.notes)
    assert all(c.quality is None for c in (*result.ranked, *result.rejected))


def test_gpus_bounds_what_is_tried() -> None:
    result = plan(request(gpus=2))
    assert max(c.n_gpus or 0 for c in result.ranked) == 2
    late = plan(request(gpus=2, specs=("data=8",)))
    assert late.rejected[0].reason == "needs 8 GPUs, there are 2; nearest: data=2"


# ----------------------------------------------------------------------------------- memory, tables


def test_speedup_is_null_where_one_gpu_cannot_hold_the_model() -> None:
    """FLUX.1-dev with T5 takes 34 GB of weights in bf16: not on an A5000 of 24 GB."""
    result = plan(request("flux1-dev", "pcie4-a5000", gpus=4, specs=("serial", "pipefusion=4")))
    assert result.baseline.latency_s is None
    assert result.baseline.reason is not None
    assert all(c.speedup is None for c in (*result.ranked, *result.rejected))
    serial = by_spec(result)["serial"]
    assert not serial.feasible
    assert "GiB" in (serial.reason or "")
    assert serial.peak_memory_bytes is not None
    assert serial.peak_memory_bytes > 24e9


def test_measured_all_to_all_turns_ulysses_into_a_loss() -> None:
    """Published, PixArt-alpha 1024 on eight L40: ulysses=8 takes 5.62 s, one GPU 2.80 s."""
    specs = ("serial", "ulysses=8", "cfg=2,pipefusion=4,patches=8")
    r = request("pixart-alpha", "pcie8-l40s-alltoall", specs=specs)
    result = plan(replace(r, workload=replace(r.workload, steps=20)))
    found = by_spec(result)
    serial_s = found["serial"].latency_s
    assert found["ulysses=8"].latency_s > serial_s  # type: ignore[operator]
    assert found["cfg=2,pipefusion=4,patches=8"].latency_s < serial_s  # type: ignore[operator]
    assert found["ulysses=8"].topology_only_latency_s < found["ulysses=8"].latency_s  # type: ignore[operator]
    assert found["serial"].topology_only_latency_s is None
    assert "topology_only_latency_s" in found["ulysses=8"].to_json()
    assert "topology_only_latency_s" not in found["serial"].to_json()


def test_one_measured_number_calibrates() -> None:
    result = plan(request(specs=("serial", "cfg=2"), measured=(3.0, "pipeline")))
    assert result.baseline.latency_s == pytest.approx(3.0, rel=0.02)
    plain = plan(request(specs=("serial", "cfg=2")))
    ratio = {c.spec: c.latency_high_s / c.latency_low_s for c in result.ranked}  # type: ignore[operator]
    assert all(ratio[c.spec] < c.latency_high_s / c.latency_low_s for c in plain.ranked)  # type: ignore[operator]
    assert {c.provenance for c in result.ranked} == {"calibrated"}


def test_a_latency_beyond_the_peak_is_refused() -> None:
    """SDXL in bf16 on an L40: every multiplication of the loop at the tensor cores' peak and a tenth,
    both branches in one batch; for ``pipeline`` those of encoders and VAE too."""
    p, gpu = profile("sdxl"), load_gpu("l40")
    shape = build(parse_spec("serial"), p, request().workload)
    works = {op.work.stage: op.work for s in shape.sections for op in s.ops if op.work}
    each = {name: p.stages[name].flops(work.shape._asdict()) for name, work in works.items()}
    loop = STEPS * each["denoiser"]
    others = sum(flops for name, flops in each.items() if name != "denoiser")
    for scope, flops in (("denoise", loop), ("pipeline", loop + others)):
        least_s = flops / (1.1 * gpu.peak.bf16.value)
        said = rf"\(scope {scope}\): one l40 takes at least {least_s:.3g} s, for .* peak .* in bf16"
        with pytest.raises(Contradiction, match=said):
            request(measured=(0.999 * least_s, scope)).runs()
    assert request(measured=(1.001 * least_s, "pipeline")).runs().calibration is not None


def test_what_a_plan_rests_on_is_in_its_words_and_its_json() -> None:
    """A second as long as 4 times the prediction is worth a note, 3.9 times is not."""
    plain = plan(request(specs=("cfg=2",)))
    predicted_s = plain.baseline.latency_s
    assert plain.calibration is plain.to_json()["calibration"] is None
    for factor, notes in ((3.9, 0), (4.1, 1)):
        result = plan(request(specs=("cfg=2",), measured=(factor * predicted_s, "pipeline")))  # type: ignore[operator]
        assert sum("check that model, size" in note for note in result.notes) == notes
        known = result.to_json()["calibration"]
        assert known["predicted_s"] == pytest.approx(predicted_s)
        assert (known["scope"], known["gpu"]) == ("pipeline", "l40")
        assert known["device_scale"] > factor
        said = text.recommendation(result)
        assert re.search(r"Calibration: one l40 took [\d.]+ s \(scope pipeline: text enc", said)
    assert "Box: no peer-to-peer (transfers cross host memory); no measured collectives" in said
    tables = load_topology("pcie8-l40s-alltoall")
    assert text.box_of(tables) == (
        "no peer-to-peer (transfers cross host memory); measured collectives: all_to_all, all_reduce and"
        " all_gather over 2, 4 and 8 GPUs; all others are priced from the links"
    )


def test_warm_up_has_a_column_where_something_is_stale() -> None:
    specs = ("cfg=2", "distrifusion=4,warmup=2", "pipefusion=4,patches=4", "patch=4")
    header, rows = text.table(plan(request("pixart-alpha", specs=specs)), 4)
    shown = {row[1]: row[header.index("warm-up")] for row in rows}
    assert shown == dict(zip(specs, ("-", "3", "1", "-"), strict=True))
    exact = text.table(plan(request("pixart-alpha", specs=("cfg=2",))), 4)[0]
    assert "warm-up" not in exact


# --------------------------------------------------------------------------------------------- text


def test_a_narrow_terminal_loses_columns_not_letters() -> None:
    header, rows = text.table(whole("sdxl"), 10)
    assert text.fitted(header, rows, 500) == (header, rows)
    names, cells = text.fitted(header, rows, 110)
    assert {"strategy", "latency", "speed-up", "output"} <= set(names) < set(header)
    assert max(len("   ".join(row)) for row in cells) <= 110
    for name, row in zip(names, zip(*cells, strict=True), strict=True):
        assert list(row) == [full[header.index(name)] for full in rows]


def test_plain_columns_line_up() -> None:
    """Numbers end where their heading ends, names begin where theirs begins."""
    header, rows = text.table(whole("sdxl"), 5)
    lines = list(text.plain(header, rows))
    assert len(lines) == 6
    assert {line.index(row[1]) for line, row in zip(lines[1:], rows, strict=True)} == {
        lines[0].index("strategy")
    }
    end = lines[0].index("latency") + len("latency")
    assert all(line[:end].endswith(row[3]) for line, row in zip(lines[1:], rows, strict=True))


@pytest.mark.parametrize(
    ("topology", "spec", "basis"),
    [
        # all-gathers have tables on the A100 box, a pipeline's sends have none anywhere
        ("nvlink8-a100", "patch=2", "table"),
        ("nvlink8-a100", "parastep=2", "links"),
        ("pcie8", "patch=2", "staged links"),
        # its all-gathers are another box's; a pipeline's sends have no table
        ("pcie8-l40s-alltoall", "patch=2", "transferred table"),
        ("pcie8-l40s-alltoall", "parastep=2", "staged links"),
    ],
)
def test_exposed_communication_rests_on_the_weakest_transfer(
    topology: str, spec: str, basis: str
) -> None:
    asked = request(topology=topology)
    graph = build(parse_spec(spec), asked.profile, asked.workload)
    assert comm_basis(Network(asked.topology), symmetry.whole(graph), (0, 1)) == basis


def test_sizes_that_a_table_lacks_are_priced_by_links_and_noted() -> None:
    """Eight H100 with tables of one size each: 1 GiB, or 1 KiB, and none. The all-to-alls of PixArt are
    far from both; what the plan says of them lies within the interval of links of what it says without a
    table (one bandwidth from 1 KiB would make hours of it), with that interval and a note."""
    asked = request("pixart-alpha", "nvlink8-h100", specs=("ulysses=8",))
    box, ranks = asked.topology, tuple(range(8))
    tables = [t for t in box.collectives if t.ranks == 8]
    graph = symmetry.whole(build(parse_spec("ulysses=8"), asked.profile, asked.workload))
    alone = plan(replace(asked, topology=replace(box, collectives=()))).ranked[0]
    for size in (2.0**30, 2.0**10):
        bandwidth, latency_s = 400e9, 12e-6
        seconds = latency_s + size / bandwidth
        one = tuple(replace(t, sizes=(size,), seconds=(seconds,)) for t in tables)
        network = Network(replace(box, collectives=one))
        assert comm_basis(network, graph, ranks) == "links"
        found = plan(replace(asked, topology=network.topology))
        best = found.ranked[0]
        assert best.exposed_comm_s == pytest.approx(alone.exposed_comm_s, rel=0.7)
        assert best.topology_only_latency_s == pytest.approx(alone.latency_s)
        said = "1 GiB" if size > 2**20 else "1 KiB"
        assert any(
            f"outside its measured table (at {said} only)" in note and "all_to_all" in note
            for note in found.notes
        )
    assert not any("outside" in note for note in plan(asked).notes)


def test_throughput_counts_requests_not_images() -> None:
    one = plan(request(specs=("serial",))).ranked[0]
    batch = plan(request(specs=("serial",), workload=replace(request().workload, batch=4))).ranked[
        0
    ]
    for candidate in (one, batch):
        assert candidate.throughput_per_s == pytest.approx(1 / candidate.latency_s)  # type: ignore[operator]


@pytest.mark.parametrize("gpus", [1, 2])
def test_fewer_gpus_than_the_box_has_are_planned(gpus: int) -> None:
    """With bounds, which price every op on a GPU of each model among those that are used."""
    asked = request(gpus=gpus, top=2)
    found = plan(asked)
    assert {c.n_gpus for c in found.ranked} == set(range(1, gpus + 1))
    assert found.ranked[0].spec == plan(replace(asked, top=None)).ranked[0].spec
