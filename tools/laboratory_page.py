"""Keep runs of the laboratory, and write the tables of docs/laboratory.md from what is kept.

    paradiff validate lab --cells order --regime compute --output-dir out
    python tools/laboratory_page.py order-compute out/lab.json     # docs/laboratory/order-compute.json
    python tools/laboratory_page.py                                # only the page, again

Every cell of every kept file is in the tables: a run may be split by ``--cells``, ``--ranks``,
``--regime`` or ``--topology``. The tables between the marks are made from these files alone.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "docs" / "laboratory", ROOT / "docs" / "laboratory.md"
MARKS = re.compile(r"(?<=<!-- lab -->\n).*(?=<!-- end -->)", re.DOTALL)
PARTS = {False: "Each strategy at a size of its own", True: "All strategies on the same work"}

Run = Mapping[str, Any]
Cell = Mapping[str, Any]


def read(folder: Path) -> dict[str, Run]:
    """Every kept run, by name."""
    files = sorted(folder.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def keep(name: str, file: Path) -> None:
    """Copy what ``paradiff validate lab`` has written, a line a cell. Raises ValueError."""
    run = json.loads(file.read_text(encoding="utf-8"))
    if run.get("schema") != "paradiff.validate-lab/1":
        raise ValueError(f"{file}: schema {run.get('schema')!r}, allowed: paradiff.validate-lab/1")
    run["machine"].pop("host", None)
    KEPT.mkdir(exist_ok=True)
    text = json.dumps(run).replace('}, {"topology"', '},\n{"topology"')
    partial = KEPT / f"{name}.part"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(KEPT / f"{name}.json")


def markdown(runs: Mapping[str, Run]) -> str:
    """The tables of docs/laboratory.md."""
    blocks: list[str] = []
    for is_shared, title in PARTS.items():
        own = {
            name: run
            for name, run in runs.items()
            if any(c["shared"] == is_shared for c in run["cells"])
        }
        if own:
            cells = [c for run in own.values() for c in run["cells"] if c["shared"] == is_shared]
            blocks += [
                f"### {title}",
                "",
                *_sentences(own, cells, is_shared),
                "",
                *_table(cells),
                "",
            ]
    if runs:
        blocks += ["### Calibrations", "", *_calibrations(runs), ""]
    return "\n".join(blocks)


def _sentences(runs: Mapping[str, Run], cells: Sequence[Cell], is_shared: bool) -> Iterator[str]:
    """What holds, over all of ``runs``."""
    boxes: dict[str, list[float]] = {}
    for c in (c for c in cells if not c["noisy"]):
        boxes.setdefault(c["topology"], []).append(abs(c["error"]))
    quiet = [*chain.from_iterable(boxes.values())]
    worst = max(cells, key=lambda c: abs(c["error"]) * (not c["noisy"]))
    files = ", ".join(f"[{name}.json](laboratory/{name}.json)" for name in runs)
    repeats = min(len(c["repeats_s"]) for c in cells)
    short = sum(c["fixed_share"] > run["allowed"]["fixed_share"]
                for run in runs.values() for c in run["cells"] if c["shared"] == is_shared)  # fmt: skip
    yield (
        f"{files}: {len(cells)} cells, {repeats} repeats or more, {len(quiet)} quiet (widest spread"
        f" {max(c['spread'] for c in cells):.1%}); error {statistics.median(quiet):.1%} median,"
        f" {abs(worst['error']):.1%} worst (`{worst['spec']}`, {worst['topology']}); calls cost more"
        f" than a tenth of the transfers in {short}."
    )
    by_box = (f"{box} {statistics.median(own):.1%}, {max(own):.1%}" for box, own in boxes.items())
    yield f"Median and worst error by box: {'; '.join(by_box)}."
    if is_shared:
        right, total = (sum(run["ordered_pairs"][i] for run in runs.values()) for i in (0, 1))
        yield f"In the predicted order: {right} of {total} pairs that differ by more than 10 %."


def _table(cells: Sequence[Cell]) -> Iterator[str]:
    """A row for each strategy and size, a column for each box and regime."""
    columns = list(dict.fromkeys((c["topology"], c["regime"]) for c in cells))
    rows: dict[tuple[int, str, str], dict[tuple[str, str], Cell]] = {}
    for c in cells:
        size = f"{c['height']} x {c['width']}, {c['steps']}"
        rows.setdefault((c["ranks"], c["spec"], size), {})[c["topology"], c["regime"]] = c
    names = [f"{box.removeprefix('lab-')}, {regime}" for box, regime in columns]
    yield "| " + " | ".join(("ranks", "strategy", "pixels, steps", *names, "fixed")) + " |"
    yield "|" + "---|" * (len(names) + 4)
    for (ranks, spec, size), found in sorted(rows.items(), key=lambda row: row[0][0]):
        shares = [c["fixed_share"] for c in found.values()]
        texts = [_times(found.get(column)) for column in columns]
        yield f"| {ranks} | `{spec}` | {size} | {' | '.join(texts)} | {max(shares):.1%} |"


def _times(cell: Cell | None) -> str:
    if cell is None:
        return ""
    noisy = ", noisy" * cell["noisy"]
    return f"{cell['predicted_s']:.3g} / {cell['measured_s']:.3g} s, {cell['error']:+.1%}{noisy}"


def _calibrations(runs: Mapping[str, Run]) -> Iterator[str]:
    """Milliseconds of a call with few bytes: a row for a call, a column for so many ranks of so many;
    the median of all runs, and the least and the most."""
    machines = dict.fromkeys(
        f"{run['machine']['cpu']}, torch {run['machine']['torch']}" for run in runs.values()
    )
    about = "Milliseconds of a call with few bytes, median (least to most) of all runs"
    yield f"{about}. {'; '.join(machines)}."
    yield ""
    seen: dict[str, dict[str, list[float]]] = {}
    for run in runs.values():
        for key, call_s in run["calibration"]["call_s"].items():
            call, _, ranks = key.partition(" ")
            seen.setdefault(call, {}).setdefault(ranks, []).append(1e3 * call_s)
    columns = sorted(
        {ranks for row in seen.values() for ranks in row}, key=lambda r: r.split()[::-1]
    )
    yield f"| call | {' | '.join(columns)} |"
    yield "|" + "---|" * (len(columns) + 1)
    for call, row in sorted(seen.items()):
        texts = [_milliseconds(row[ranks]) if ranks in row else "" for ranks in columns]
        yield f"| {call} | {' | '.join(texts)} |"


def _milliseconds(seen: Sequence[float]) -> str:
    return f"{statistics.median(seen):.2g} ({min(seen):.2g} to {max(seen):.2g})"


def page() -> str:
    """docs/laboratory.md with the tables of what is kept."""
    return MARKS.sub(lambda _: markdown(read(KEPT)), PAGE.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="what the run is kept as")
    parser.add_argument("file", nargs="?", type=Path, help="its lab.json")
    given = parser.parse_args()
    if given.name is not None:
        if given.file is None:
            parser.error("NAME needs a FILE beside it")
        keep(given.name, given.file)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
