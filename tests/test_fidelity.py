"""Metrics against closed forms, paired statistics against exact counts, what is kept of runs, claims."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pages import check_hovers, opened

pytest.importorskip("skimage", reason="scikit-image is part of [run]")

from analysis import fidelity_html
from analysis.fidelity import (
    BEST_DB,
    Case,
    Errors,
    Report,
    Row,
    Seen,
    compare,
    cosine,
    measure,
    neighbours,
    paired,
    psnr_db,
    relative_l2,
    ssim,
    text,
)
from analysis.fidelity_study import (
    BOTH,
    CLAIMS,
    FRESH,
    SAMPLERS,
    Cell,
    Point,
    cases,
    links,
    markdown,
    read,
    verdict,
)

RANDOM = np.random.default_rng(0)
LATENTS = RANDOM.standard_normal((3, 4, 8, 8))
"""(samples, ...)."""


def test_relative_error_of_a_scaled_latent() -> None:
    """|k x - x| / |x| = |k - 1|, sample by sample."""
    k = np.array([1.5, 0.75, 1.0])
    found = relative_l2(LATENTS * k[:, None, None, None], LATENTS)
    np.testing.assert_allclose(found, [0.5, 0.25, 0.0], atol=1e-15)


def test_cosine_of_scaled_opposite_and_orthogonal_latents() -> None:
    x = np.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    y = np.array([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0]])
    np.testing.assert_allclose(cosine(x, y), [1.0, -1.0, 0.0], atol=1e-15)


def flat(value: float, samples: int = 2) -> np.ndarray:
    return np.full((samples, 1, 16, 16, 3), value)


def test_psnr_of_a_constant_offset() -> None:
    """MSE = d^2 with peak 1: 10 log10(1 / d^2) = -20 log10 d; equal pictures stop at BEST_DB."""
    np.testing.assert_allclose(psnr_db(flat(0.6), flat(0.5)), [20.0, 20.0], rtol=1e-12)
    assert psnr_db(flat(0.5), flat(0.5)).tolist() == [BEST_DB, BEST_DB]


def test_ssim_of_flat_pictures() -> None:
    """Without variance only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1), c1 = 0.01^2."""
    a, b, c1 = 0.3, 0.7, 1e-4
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    np.testing.assert_allclose(ssim(flat(a), flat(b)), [expected] * 2, rtol=1e-12)
    with pytest.raises(ValueError, match="10 x 16 pixels: SSIM needs 11"):
        ssim(flat(a)[:, :, :10], flat(b)[:, :, :10])


def test_a_constant_ratio_is_found_exactly() -> None:
    """ln(2b / b) = ln 2 for all: ratio 2, no width, effect 1."""
    b = np.array([0.1, 0.2, 0.3, 0.5, 0.8, 1.3])
    found = paired("worse", 2 * b, "better", b)
    assert found.ratio == pytest.approx(2.0, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((2.0, 2.0), rel=1e-9)
    assert found.effect == 1.0


def test_p_counts_signs() -> None:
    """Of the 2^6 signs of six pairs one is as extreme on either side: p = 2 / 64."""
    found = paired("worse", np.exp([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), "better", np.ones(6))
    assert found.p == 2 / 64


def test_the_interval_is_students() -> None:
    """d = ln a - ln b of mean m, deviation s over n: exp(m -+ t s / sqrt n), t of 0.975 and 6 degrees of
    freedom being 2.446912 (any table)."""
    d = np.array([0.1, -0.2, 0.4, 0.3, 0.2, 0.5, -0.1])
    found = paired("a", np.exp(d), "b", np.ones(7))
    half = 2.446912 * d.std(ddof=1) / math.sqrt(7)
    assert found.ratio == pytest.approx(math.exp(d.mean()))
    assert found.low == pytest.approx(math.exp(d.mean() - half), rel=1e-6)
    assert found.high == pytest.approx(math.exp(d.mean() + half), rel=1e-6)


def test_rank_biserial_counts_ranks() -> None:
    """|d| has ranks 1 to 6; the sign of rank 2 differs: (21 - 2 * 2) / 21."""
    d = np.array([0.1, -0.2, 0.3, 0.4, 0.5, 0.6])
    assert paired("a", np.exp(d), "b", np.ones(6)).effect == pytest.approx(17 / 21)


def test_equal_errors_are_not_told_apart() -> None:
    found = paired("a", np.ones(8), "b", np.ones(8))
    assert (found.ratio, found.p, found.effect) == (1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="5 samples: a paired test needs 6"):
        paired("a", np.ones(5), "b", np.ones(5))


# ------------------------------------------------------------------------------------------- runs

OFFSETS = {"serial": 0.0, "distrifusion=2": 0.1, "distrifusion=4": 0.2, "cfg=2": 0.0}


def runner(asked: list[tuple[Case, int]]) -> object:
    """Latents that are off by a known share of the serial ones in the last step, half as much before."""

    def run(case: Case, batch: int) -> Seen:
        asked.append((case, batch))
        random = np.random.default_rng(batch)
        serial = random.standard_normal((4, 1, 16, 16))
        off = OFFSETS[case.spec] * (1 + np.arange(4) / 10)[:, None, None, None]
        latents = np.stack([serial * (1 + off / 2), serial * (1 + off)])
        pictures = np.repeat(np.clip(latents[-1] / 8 + 0.5, 0, 1)[:, :, :, :, None], 3, axis=4)
        return latents, pictures

    return run


def measured(batches: int = 2) -> tuple[dict[Case, Errors], list[tuple[Case, int]]]:
    asked: list[tuple[Case, int]] = []
    specs = [spec for spec in OFFSETS if spec != "serial"]
    wanted = [Case(spec, 2, name) for name in ("own", "ddim") for spec in specs]
    return measure(wanted, batches, runner(asked)), asked  # type: ignore[arg-type]


def test_every_case_is_compared_with_its_own_serial_run() -> None:
    found, asked = measured()
    serial = [(case.scheduler, batch) for case, batch in asked if case.spec == "serial"]
    assert serial == [("own", 0), ("ddim", 0), ("own", 1), ("ddim", 1)]
    errors = found[Case("distrifusion=4", 2, "own")]
    expected = np.tile(0.2 * (1 + np.arange(4) / 10), 2)
    np.testing.assert_allclose(errors.final["relative_l2"], expected)
    np.testing.assert_allclose(errors.steps["relative_l2"][:, 0], expected / 2)
    assert errors.final["ssim"].shape == (8,)


def test_sounds_have_no_pictures() -> None:
    latents = LATENTS[None]
    assert set(compare((latents, None), (latents, None)).final) == {"relative_l2", "cosine"}


def report() -> Report:
    found, _ = measured()
    rows = [
        Row(
            case=case,
            n_gpus=2,
            synchronous_steps=1,
            exact=case.spec == "cfg=2",
            max_staleness_steps=int(case.spec != "cfg=2"),
            latency_s=None if case.spec == "cfg=2" else 1.0,
            errors=errors,
        )
        for case, errors in found.items()
    ]
    return Report(
        model="<b>x</b>", what="a model </script>", topology="pcie8",
        facts={"weights": "trained", "samples": 8}, rows=tuple(rows),
    )  # fmt: skip


def test_neighbours_are_stale_and_of_one_run() -> None:
    found = list(neighbours(report().rows))
    assert [(steps, name) for steps, name, _ in found] == [(2, "ddim"), (2, "own")]
    assert {(p.first, p.second) for _, _, p in found} == {("distrifusion=4", "distrifusion=2")}
    assert all(p.ratio == pytest.approx(2.0) for _, _, p in found)


def test_report_is_json_text_and_one_page_that_escapes() -> None:
    data = json.loads(json.dumps(report().to_json(), allow_nan=False))
    assert data["schema"] == "paradiff.validate-fidelity/1"
    assert len(data["results"][0]["final"]["psnr_db"]["samples"]) == 8
    assert len(data["results"][0]["per_step"]["cosine"]) == 2
    assert "distrifusion=4 is off 2.00 times as far as distrifusion=2" in text(report())
    page = fidelity_html.page(report(), ["validate", "fidelity", "--model", "<i>"])
    assert "<b>x</b>" not in page
    assert "a model </script>" not in page
    assert (
        page.count('<img src="data:image/png;base64,') == 8
    )  # serial and three strategies, two samplers
    assert (fidelity_html.sheet_png(report()) or b"").startswith(b"\x89PNG")


def test_the_curve_is_error_against_latency() -> None:
    """Of what is stale: 1 s each, the medians of 0.1 and 0.2 times 1, 1.1, 1.2 and 1.3; the errors of
    eight samples, half of them copies, lie from 1 to 1.3 times that."""
    charts = {chart.id: chart.figure for chart in fidelity_html._charts(report())}
    assert charts.keys() == {"curve", "steps"}
    (line,) = charts["curve"]["data"]
    assert line["x"] == [1.0] * 4
    assert line["y"] == pytest.approx([0.115, 0.23] * 2)
    assert (np.array(line["y"]) + line["error_y"]["array"]).max() <= 0.26


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(fidelity_html.page(report(), ["validate", "fidelity"]), encoding="utf-8")
    with opened(path, width, scheme) as page:
        assert page.locator(".chart .main-svg").count() > 0
        assert check_hovers(page).keys() == {"curve", "steps"}
        assert page.locator("figure img").count() == 8
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


# ------------------------------------------------------------------------------------------ claims


def test_claims_compare_at_equal_numbers_of_synchronous_steps() -> None:
    from paradiff.strategies import Workload, facts, parse_spec

    apart = {"warm-up", "few steps", "PCPP against naive strips"}
    once = {"PCPP against DistriFusion"}
    for claim in CLAIMS:
        for chain in claim.chains:
            found = {
                facts(parse_spec(p.spec), Workload(32, 32, 1, p.steps, 1, "fp32")).synchronous_steps
                for p in chain
            }
            assert (len(found) > 1) == (claim.name in apart), claim.name
            assert claim.name in apart | once or found == {FRESH}, claim.name


def test_verdicts_need_every_link() -> None:
    (claim,) = (each for each in CLAIMS if each.name == "devices")
    eight, four, two = claim.chains[0]
    base = np.linspace(1, 2, 12)
    noisy = base * np.exp(np.random.default_rng(1).standard_normal(12))
    cells = {
        Cell("small-dit", "ddim"): {eight: 3 * base, four: 2 * base, two: base},
        Cell("small-dit", "euler"): {eight: 3 * base, four: 2 * base, two: 2 * noisy},
        Cell("small-unet", "ddim"): {eight: base, four: 2 * base, two: base},
    }
    first, second, third = ({cell: errors} for cell, errors in cells.items())
    assert verdict(links(claim, first)) == "holds (2 of 2)"
    assert verdict(links(claim, second)) == "1 hold, 1 not told apart (of 2)"
    assert verdict(links(claim, third)) == "1 hold, 1 reversed (of 2)"


DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_made_of_what_is_kept() -> None:
    assert markdown(read(DOCS / "fidelity")) in (DOCS / "fidelity.md").read_text(encoding="utf-8")


def test_the_study_has_what_its_claims_need() -> None:
    """Twenty samples or more of every case of every claim, on both models with both samplers."""
    kept = read(DOCS / "fidelity")
    assert kept.keys() == {Cell(model, sampler) for model in BOTH for sampler in SAMPLERS}
    for cell, errors in kept.items():
        assert errors.keys() == {Point(c.spec, c.steps) for c in cases(*cell)}
        assert all(len(values) >= 20 for values in errors.values())
