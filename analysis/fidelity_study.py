"""Which orderings of the literature hold on the small trained models: claims, and what speaks for them.

A claim is a chain of specs, from the one that should be further off to the one that should be nearer;
its links are compared on the same samples (``analysis.fidelity.paired``). Specs of a chain run as many
synchronous steps as each other, whatever their warm-up is called, where the claim is not about those.
The runs are made by ``tools/fidelity_study.py``; what it found is in docs/fidelity.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from analysis.fidelity import Array, Case, Paired, p_value, paired, quantiles

STEPS, FRESH = 10, 3
"""Denoising steps, and how many of them are synchronous where a claim is not about that."""
SAMPLERS = ("ddim", "dpmsolver++")
ALPHA = 0.01
"""Level of the test of each link."""
Verdict = Literal["holds", "reversed", "open"]

DIT, UNET = "small-dit", "small-unet"
BOTH = (DIT, UNET)


class Point(NamedTuple):
    """A spec at a number of steps."""

    spec: str
    steps: int = STEPS

    @property
    def label(self) -> str:
        return self.spec if self.steps == STEPS else f"{self.spec} in {self.steps} steps"


@dataclass(frozen=True, slots=True)
class Claim:
    """``chains``: each from what should be further off to what should be nearer."""

    name: str
    text: str
    source: str
    models: tuple[str, ...]
    chains: tuple[tuple[Point, ...], ...]

    def links(self) -> Iterator[tuple[Point, Point]]:
        for chain in self.chains:
            yield from pairwise(chain)


def _chain(*specs: str) -> tuple[Point, ...]:
    return tuple(Point(spec) for spec in specs)


CLAIMS = (
    Claim(
        "devices",
        "DistriFusion's error grows with the devices",
        "DistriFusion, table 1: LPIPS 0.146, 0.183, 0.211 on 2, 4, 8",
        BOTH,
        (_chain(*(f"distrifusion={n},warmup=2" for n in (8, 4, 2))),),
    ),
    Claim(
        "warm-up",
        "DistriFusion's error falls with the warm-up",
        "DistriFusion, few-step ablation: LPIPS 0.404, 0.288, 0.196 with none, 1, 2",
        BOTH,
        (_chain(*(f"distrifusion=4,warmup={w}" for w in (0, 1, 3, 6))),),
    ),
    Claim(
        "few steps",
        "DistriFusion's error grows as the steps get fewer, at the same share of synchronous ones",
        "DistriFusion, abstract: it relies on adjacent steps being alike",
        BOTH,
        (
            (
                Point("distrifusion=4,warmup=0", 5),
                Point("distrifusion=4,warmup=1", 10),
                Point("distrifusion=4,warmup=3", 20),
            ),
        ),
    ),
    Claim(
        "corrected against stale GroupNorm",
        "corrected GroupNorm is nearer than stale",
        "DistriFusion, ablation: LPIPS 0.211 against 0.247",
        (UNET,),
        (_chain("distrifusion=4,mode=stale_gn,warmup=2", "distrifusion=4,warmup=2"),),
    ),
    Claim(
        "corrected against separate GroupNorm",
        "corrected GroupNorm is nearer than separate",
        "DistriFusion, ablation: LPIPS 0.211 against 0.317",
        (UNET,),
        (_chain("distrifusion=4,mode=separate_gn,warmup=2", "distrifusion=4,warmup=2"),),
    ),
    Claim(
        "synchronous GroupNorm",
        "synchronous GroupNorm is nearer than corrected, stale and separate",
        "DistriFusion, ablation: LPIPS 0.207 against 0.211, 0.247, 0.317",
        (UNET,),
        tuple(
            _chain(f"distrifusion=4{mode},warmup=2", "distrifusion=4,mode=sync_gn,warmup=2")
            for mode in ("", ",mode=stale_gn", ",mode=separate_gn")
        ),
    ),
    Claim(
        "PipeFusion",
        "PipeFusion is nearer than DistriFusion with as many patches as that has strips",
        "PipeFusion, table 2: FID 22.8 on one GPU, 30.7 and 41.8 with DistriFusion on 4 and 8",
        (DIT,),
        tuple(
            _chain(f"distrifusion={n},warmup=2", f"pipefusion={n},patches={n},warmup=3")
            for n in (2, 4, 8)
        ),
    ),
    Claim(
        "AsyncDiff components",
        "AsyncDiff's error grows with the components",
        "AsyncDiff, table 1: LPIPS 0.212, 0.276, 0.313 with 2, 3, 4",
        BOTH,
        (_chain(*(f"asyncdiff={n},stride=1,warmup=3" for n in (4, 3, 2))),),
    ),
    Claim(
        "AsyncDiff stride",
        "AsyncDiff's error grows with the stride",
        "AsyncDiff, table 1: LPIPS 0.346 against 0.212 (2), 0.378 against 0.276 (3)",
        BOTH,
        tuple(
            _chain(f"asyncdiff={n},stride=2,warmup=3", f"asyncdiff={n},stride=1,warmup=3")
            for n in (2, 3)
        ),
    ),
    Claim(
        "ParaStep",
        "ParaStep's error grows with p",
        "follows from its rule: noise is p - 1 steps old at most",
        BOTH,
        (_chain(*(f"parastep={p},warmup=3" for p in (6, 4, 2))),),
    ),
    Claim(
        "PCPP against DistriFusion",
        "PCPP is further off than DistriFusion",
        "PCPP, abstract: lower PSNR than DistriFusion",
        BOTH,
        tuple(
            _chain(f"pcpp={n},portion=0.3,warmup=0", f"distrifusion={n},warmup=0") for n in (4, 8)
        ),
    ),
    Claim(
        "PCPP against naive strips",
        "naive strips, which have no synchronous step, are further off than PCPP with one",
        "DistriFusion, table 1: LPIPS 0.753 of naive strips on 4",
        BOTH,
        tuple(_chain(f"patch={n},mode=naive", f"pcpp={n},portion=0.3,warmup=0") for n in (4, 8)),
    ),
)


def cases(model: str, sampler: str, claims: Iterable[Claim] = CLAIMS) -> list[Case]:
    """Everything that the claims about ``model`` need, once each."""
    points = (
        point
        for claim in claims
        if model in claim.models
        for chain in claim.chains
        for point in chain
    )
    return list(dict.fromkeys(Case(point.spec, point.steps, sampler) for point in points))


class Cell(NamedTuple):
    """Runs that are compared with each other."""

    model: str
    sampler: str


Found = Mapping[Cell, Mapping[Point, Array]]
"""Relative L2 of the final latent, sample by sample."""


def file_of(folder: Path, cell: Cell) -> Path:
    """Where the runs of one cell are kept."""
    return folder / f"{cell.model}-{cell.sampler}.json"


def read(folder: Path) -> dict[Cell, dict[Point, Array]]:
    """What ``tools/fidelity_study.py`` has kept in ``folder``."""
    found: dict[Cell, dict[Point, Array]] = {}
    for cell in (Cell(model, sampler) for model in BOTH for sampler in SAMPLERS):
        if file_of(folder, cell).exists():
            kept = json.loads(file_of(folder, cell).read_text(encoding="utf-8"))["cases"]
            named = {name.rpartition(" "): kept[name]["relative_l2"] for name in kept}
            found[cell] = {Point(spec, int(n)): np.array(e) for (spec, _, n), e in named.items()}
    return found


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a chain in one cell."""

    cell: Cell
    paired: Paired

    @property
    def verdict(self) -> Verdict:
        """``holds`` where the test is passed and the whole interval lies above 1, ``reversed`` below."""
        told = self.paired.p < ALPHA
        if told and self.paired.low > 1:
            return "holds"
        return "reversed" if told and self.paired.high < 1 else "open"


def links(claim: Claim, found: Found) -> list[Link]:
    """Every step of every chain of ``claim``, in every cell, that has been run."""
    return [
        Link(cell, paired(worse.label, errors[worse], better.label, errors[better]))
        for cell, errors in found.items()
        if cell.model in claim.models
        for worse, better in claim.links()
        if {worse, better} <= errors.keys()
    ]


def verdict(tried: Sequence[Link]) -> str:
    """In words: holds everywhere, nowhere, or where not."""
    kinds = [link.verdict for link in tried]
    if set(kinds) == {"holds"}:
        return f"holds ({len(kinds)} of {len(kinds)})"
    counts = ", ".join(
        f"{kinds.count(kind)} {words}"
        for kind, words in (("holds", "hold"), ("reversed", "reversed"), ("open", "not told apart"))
        if kind in kinds
    )
    return f"{counts} (of {len(kinds)})"


# ----------------------------------------------------------------------------------------- the page


def markdown(found: Found) -> str:
    """The tables of docs/fidelity.md."""
    blocks = ["### Claims", "", *_table(("claim", "literature", "here"), _claim_rows(found))]
    for claim in CLAIMS:
        tried = links(claim, found)
        if tried:
            blocks += ["", f"### {claim.name[0].upper()}{claim.name[1:]}", ""]
            blocks += _table(
                (
                    "model, sampler",
                    "should be further off",
                    "than",
                    "ratio (95 %)",
                    "p",
                    "effect",
                    "",
                ),
                [_link_row(link) for link in tried],
            )
    blocks += ["", "### Errors", "", *_table(("spec", *map(_cell_name, found)), _error_rows(found))]
    return "\n".join(blocks) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _claim_rows(found: Found) -> Iterator[tuple[str, str, str]]:
    for claim in CLAIMS:
        tried = links(claim, found)
        if tried:
            yield claim.text, claim.source, verdict(tried)


def _link_row(link: Link) -> tuple[str, ...]:
    p = link.paired
    ratio = f"{p.ratio:.2f} ({p.low:.2f} - {p.high:.2f})"
    return (
        _cell_name(link.cell), f"`{p.first}`", f"`{p.second}`", ratio, p_value(p.p),
        f"{p.effect:+.2f}", link.verdict,
    )  # fmt: skip


def _cell_name(cell: Cell) -> str:
    return f"{cell.model}, {cell.sampler}"


def _error_rows(found: Found) -> Iterator[tuple[str, ...]]:
    """Median (10 % to 90 % of the samples) of each spec in each cell."""
    points = dict.fromkeys(point for errors in found.values() for point in errors)
    for point in points:
        row = [f"`{point.label}`"]
        for errors in found.values():
            if point not in errors:
                row.append("")
                continue
            middle, low, high = quantiles(np.asarray(errors[point]))
            row.append(f"{middle:.3f} ({low:.3f} - {high:.3f})")
        yield tuple(row)
