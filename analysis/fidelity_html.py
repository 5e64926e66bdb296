"""What staleness does to a result as one HTML file and one picture. Decides what is drawn; every number
comes from the report. The frame, and how text and data are kept harmless: ``analysis.page``.
"""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from analysis.fidelity import Array, Report, Row, quantiles, sentences, table
from analysis.page import PALETTE, SYMBOLS, Chart, Figure, axis, figure, line, plain, render

LEAST_PIXELS = 96
"""Smaller pictures are enlarged, pixel by pixel, to at least this many rows."""
LABEL_PIXELS = 16


def page(report: Report, arguments: Sequence[str]) -> str:
    """The report. ``arguments``: of the command that made it."""
    header, rows = table(report)
    strips = [(strip.label, _data_url(strip.pixels)) for strip in _strips(report)]
    return render(
        "fidelity.html.j2",
        _charts(report),
        title=report.model,
        what=report.what,
        sentences=sentences(report),
        header=header,
        rows=rows,
        strips=strips,
        command=shlex.join(["paradiff", *arguments]),
    )


def _charts(report: Report) -> Iterator[Chart]:
    timed = [row for row in report.rows if row.latency_s is not None and not row.exact]
    if timed:
        yield Chart(
            "curve",
            "Error against latency",
            "Relative L2 of the final latent: median, and 10 % to 90 % of the samples; latency simulated"
            f" on {report.topology}. Left and low is better; what is exact has no place on this scale.",
            _curve(timed),
        )
    yield Chart(
        "steps",
        "Error step by step",
        "Relative L2 of the latent after each step, median over the samples.",
        _by_step(report.rows),
    )


def _label(row: Row, rows: Sequence[Row]) -> str:
    """The spec, and of steps and sampler what is not the same everywhere."""
    steps, samplers = ({getattr(r.case, name) for r in rows} for name in ("steps", "scheduler"))
    more = [f"{row.case.steps} steps"] * (len(steps) > 1)
    more += [row.case.scheduler] * (len(samplers) > 1)
    return ", ".join([row.case.spec, *more])


def _curve(rows: Sequence[Row]) -> Figure:
    """A colour and a symbol for each strategy, whatever its degree."""
    families = list(dict.fromkeys(_family(row) for row in rows))
    traces = []
    for k, family in enumerate(families):
        chosen = sorted((r for r in rows if _family(r) == family), key=lambda r: r.latency_s or 0.0)
        errors = [quantiles(row.errors.final["relative_l2"]) for row in chosen]
        traces.append({
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(family),
            "x": [row.latency_s for row in chosen],
            "y": [middle for middle, _, _ in errors],
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [high - middle for middle, _, high in errors],
                "arrayminus": [middle - low for middle, low, _ in errors],
                "thickness": 1,
            },
            "line": {"color": PALETTE[k % len(PALETTE)], "width": 1},
            "marker": {
                "color": PALETTE[k % len(PALETTE)],
                "symbol": SYMBOLS[k % len(SYMBOLS)],
                "size": 10,
            },
            "text": [plain(_label(row, rows)) for row in chosen],
            "hovertemplate": "%{text}: %{x:.3g} s, %{y:.3g}",
        })  # fmt: skip
    y = axis("relative L2 of the final latent") | {"type": "log"}
    return figure(traces, axis("latency, s") | {"rangemode": "tozero"}, y)


def _family(row: Row) -> str:
    """The strategy without degrees and warm-up: ``cfg, distrifusion``."""
    return ", ".join(
        part.partition("=")[0] for part in row.case.spec.split(",") if not part.startswith("warmup")
    )


def _by_step(rows: Sequence[Row]) -> Figure:
    traces = []
    for k, row in enumerate(rows):
        middle = np.median(row.errors.steps["relative_l2"], axis=0)
        x = list(range(1, len(middle) + 1))
        traces.append(
            line(_label(row, rows), x, middle.tolist(), k, hovertemplate="step %{x}: %{y:.3g}")
        )
    return figure(traces, axis("step"), axis("relative L2"))


# ----------------------------------------------------------------------------------------- pictures


class _Strip(NamedTuple):
    """The pictures of one case side by side: ``pixels`` (rows, columns, 3), uint8."""

    label: str
    pixels: Array


def _strips(report: Report) -> Iterator[_Strip]:
    """Those of the serial run before each group that is compared with it. Of videos the middle frame."""
    shown: set[tuple[int, str]] = set()
    for row in report.rows:
        pictures, serial = row.errors.pictures, row.errors.serial
        if pictures is None or serial is None:
            continue
        run = row.case.steps, row.case.scheduler
        if run not in shown:
            shown.add(run)
            yield _Strip(f"serial, {run[0]} steps, {run[1]}", _side_by_side(serial))
        yield _Strip(_label(row, report.rows), _side_by_side(pictures))


def _side_by_side(pictures: Array) -> Array:
    chosen = (pictures[:, pictures.shape[1] // 2] * 255).round().astype(np.uint8)
    times = -(-LEAST_PIXELS // chosen.shape[1])
    large = chosen.repeat(times, axis=1).repeat(times, axis=2)
    return np.concatenate(list(np.pad(large, ((0, 0), (0, 0), (0, 4), (0, 0)))), axis=1)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _data_url(pixels: Array) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(Image.fromarray(pixels))).decode()


def sheet_png(report: Report) -> bytes | None:
    """All strips below each other, each under its name; None where there are no pictures."""
    strips = list(_strips(report))
    if not strips:
        return None
    width = max(strip.pixels.shape[1] for strip in strips)
    height = sum(strip.pixels.shape[0] + LABEL_PIXELS for strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for strip in strips:
        draw.text((2, y + 2), strip.label, fill="black")
        sheet.paste(Image.fromarray(strip.pixels), (0, y + LABEL_PIXELS))
        y += strip.pixels.shape[0] + LABEL_PIXELS
    return _png(sheet)
