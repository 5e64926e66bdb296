"""A scoreboard as text, as CSV and as one HTML page that needs nothing else.

Decides what is shown, never what is counted: the numbers are those of ``analysis.scoreboard``.
"""

from __future__ import annotations

import csv
import html
import io
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from importlib import resources

from analysis.scoreboard import (
    Scored,
    Scores,
    by_source,
    clustered_interval,
    mean_error,
    median_error,
    one_gpu,
    regrets,
    scores,
    worst,
)
from analysis.text import plain

LEFT = {"id", "model", "box", "spec", "runtime", "clock", "note", "source", "not covered, because"}
"""Columns that read better flush left."""
Table = tuple[Sequence[str], list[list[str]]]


def percent(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.1%}"


def summary(scored: Sequence[Scored]) -> list[str]:
    """The scores in words, one a line."""
    total = scores(scored)
    core = [each for each in scored if each.row.is_core]
    repeated = sum(each.covered and not each.counts for each in core)
    low, high = clustered_interval(scored, median_error)
    mean_low, mean_high = clustered_interval(scored, mean_error)
    left_out = [others for _, others in by_source(scored).values()]
    medians = [others.median_ape_calibrated for others in left_out]
    choices = regrets([each for each in scored if each.counts])
    lines = [
        f"{len(scored)} rows; usable core (several GPUs, a whole run, its own one-GPU run): {len(core)},"
        f" of which {repeated} repeat another and {len(core) - repeated - total.count} are not covered",
        f"scored: {total.count} of {len(core) - repeated}"
        f" ({percent(total.count / max(len(core) - repeated, 1))})",
    ]
    if not total.count:
        return lines
    return [
        *lines,
        f"calibrated: median error {percent(total.median_ape_calibrated)} (90 % by source"
        f" {percent(low)} to {percent(high)}), mean {percent(total.mape_calibrated)}"
        f" ({percent(mean_low)} to {percent(mean_high)})",
        f"with one source left out: median {percent(min(medians))} to {percent(max(medians))}",
        f"zero-shot: median error {percent(total.median_ape_zero_shot)},"
        f" mean {percent(total.mape_zero_shot)}",
        f"Kendall tau {_tau(total)} within model, resolution and box",
        f"regret: mean {percent(total.mean_regret)}, largest {percent(total.max_regret)},"
        f" over {len(choices)} choices",
        f"90 % intervals hold {percent(total.interval_coverage)} of the published latencies;"
        f" median width {percent(total.interval_width)} of the prediction",
    ]


def source_table(scored: Sequence[Scored]) -> Table:
    """Every source by itself, and what is left without it."""
    header = (
        "source",
        "rows",
        "median",
        "mean",
        "tau",
        "regret",
        "in interval",
        "median of others",
    )
    rows = []
    for name, (own, others) in by_source(scored).items():
        rows.append(
            [name[:48], str(own.count), *_cells(own), percent(others.median_ape_calibrated)]
        )
    return header, rows


def _cells(own: Scores) -> list[str]:
    return [
        percent(own.median_ape_calibrated), percent(own.mape_calibrated), _tau(own),
        percent(own.mean_regret), percent(own.interval_coverage),
    ]  # fmt: skip


def _tau(own: Scores) -> str:
    return "-" if math.isnan(own.kendall_tau) else f"{own.kendall_tau:.2f}"


def gpu_table(scored: Sequence[Scored]) -> Table:
    """One-GPU runs without calibration, by GPU, and all together."""
    header = ("one GPU, zero-shot", "runs", "bias", "median error", "within 25 %")
    known = one_gpu(scored)
    known["all"] = [error for errors in known.values() for error in errors]
    rows = []
    for gpu, errors in known.items():
        if errors:
            sizes = [abs(error) for error in errors]
            near = sum(size <= 0.25 for size in sizes) / len(sizes)
            rows.append([
                gpu, str(len(errors)), percent(statistics.mean(errors), "+"),
                percent(statistics.median(sizes)), percent(near),
            ])  # fmt: skip
    return header, rows


def row_table(rows: Sequence[Scored]) -> Table:
    """Rows that have a prediction."""
    header = (
        "id", "model", "pixels", "GPU", "box", "spec", "runtime", "clock", "published", "zero-shot",
        "calibrated", "90 % interval", "error", "note",
    )  # fmt: skip
    return header, [_row(each) for each in rows if each.covered]


def _row(each: Scored) -> list[str]:
    case, best = each.case, each.calibrated or each.zero_shot
    assert case is not None
    assert best is not None
    assert each.zero_shot is not None
    size = f"{case.workload.width}x{case.workload.height}"
    size += f"x{case.workload.frames}" if case.workload.frames > 1 else ""
    return [
        each.row["id"], case.model, size, f"{case.n_gpus} {case.gpu}", case.topology, best.spec,
        case.runtime, case.scope, _seconds(each.measured_s), _seconds(each.zero_shot.seconds),
        _seconds(each.calibrated.seconds) if each.calibrated else "",
        f"{best.low_s:.3g} - {best.high_s:.3g} s",
        percent(each.error, "+") if each.calibrated else "",
        "; ".join(filter(None, (each.reason, each.note))),
    ]  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def left_out(scored: Sequence[Scored]) -> Table:
    """Why rows have no prediction, most frequent first; rows of the core counted apart."""
    reasons = Counter(each.reason or "" for each in scored if not each.covered)
    core = Counter(e.reason or "" for e in scored if not e.covered and e.row.is_core)
    rows = [[str(n), str(core[reason]), reason] for reason, n in reasons.most_common()]
    return ("rows", "of the core", "not covered, because"), rows


def text(scored: Sequence[Scored]) -> str:
    """The whole report for a terminal."""
    rows = row_table([each for each in scored if each.counts])
    far = row_table(list(worst(scored)))
    tables = [rows, left_out(scored), gpu_table(scored), source_table(scored)]
    blocks = ["\n".join(plain(*table, LEFT)) for table in tables if table[1]]
    if far[1]:
        blocks.append("largest errors\n" + "\n".join(plain(*far, LEFT)))
    return "\n\n".join([*blocks, "\n".join(summary(scored))])


PARTS = ("text_encoder", "compute", "comm", "bubble", "host", "vae")
COLUMNS = (
    "id", "counts", "reason", "note", "model", "topology", "overrides", "spec", "runtime",
    "baseline_runtime", "scope", "dtype", "steps", "measured_s", "zero_shot_s", "calibrated_s",
    "low_s", "high_s", *(f"{part}_s" for part in PARTS), "source",
)  # fmt: skip
"""Of ``rows.csv``."""


def rows_csv(scored: Sequence[Scored]) -> str:
    """Every row with what was understood and predicted, and where the seconds go."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in scored:
        case, best, zero = each.case, each.calibrated or each.zero_shot, each.zero_shot
        known: list[object] = [""] * 9
        if case is not None:
            known = [
                case.model, case.topology, " ".join(case.overrides), best.spec if best else "",
                case.runtime, case.baseline_runtime, case.scope, case.workload.dtype,
                case.workload.steps,
            ]  # fmt: skip
        seconds: list[object] = [
            each.row.latency_s, zero and zero.seconds,
            each.calibrated and each.calibrated.seconds, best and best.low_s, best and best.high_s,
        ]  # fmt: skip
        split = [best.split.get(part, "") if best else "" for part in PARTS]  # type: ignore[call-overload]
        writer.writerow((
            each.row["id"], int(each.counts), each.reason, each.note, *known,
            *("" if value is None else value for value in seconds), *split, each.row.source,
        ))  # fmt: skip
    return out.getvalue()


def page(scored: Sequence[Scored]) -> str:
    """One HTML page: scores, predicted against published, every row. Text from the file is escaped."""
    tables = [
        ("Largest errors", row_table(list(worst(scored)))),
        ("Rows that count", row_table([each for each in scored if each.counts])),
        ("By source", source_table(scored)),
        ("One GPU", gpu_table(scored)),
        ("Not covered", left_out(scored)),
        ("Predicted, not scored", row_table([e for e in scored if not e.counts])),
    ]
    return render("Predicted against published runs", summary(scored), _figure(scored), tables)


def render(
    title: str, lines: Sequence[str], figure: str, tables: Sequence[tuple[str, Table]]
) -> str:
    """One page that needs nothing else; everything but ``figure`` is escaped."""
    from jinja2 import Environment

    template = resources.files("analysis") / "templates" / "validation.html"
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=title, summary=lines, figure=figure, tables=tables
    )


def bars_figure(
    names: Sequence[str], published: Sequence[float], predicted: Sequence[float]
) -> str:
    """Published and predicted numbers side by side; the library is part of the page."""
    import plotly.graph_objects as go

    labels = [html.escape(name) for name in names]
    figure = go.Figure()
    figure.add_bar(x=labels, y=list(published), name="published")
    figure.add_bar(x=labels, y=list(predicted), name="predicted")
    figure.update_layout(height=560, template="plotly_white", barmode="group")
    figure.update_yaxes(title="times one GPU")
    return str(figure.to_html(full_html=False, include_plotlyjs=True, div_id="bars"))


def _figure(scored: Sequence[Scored]) -> str:
    """Predicted against published, a colour for each GPU; the library is part of the page."""
    import plotly.graph_objects as go

    figure = go.Figure()
    counted = [each for each in scored if each.counts]
    for gpu in sorted({each.case.gpu for each in counted if each.case}):
        rows = [each for each in counted if each.case and each.case.gpu == gpu]
        best = [each.calibrated for each in rows if each.calibrated]
        figure.add_scatter(
            x=[each.measured_s for each in rows],
            y=[each.seconds for each in best],
            error_y={
                "type": "data", "symmetric": False, "thickness": 0.7,
                "array": [each.high_s - each.seconds for each in best],
                "arrayminus": [each.seconds - each.low_s for each in best],
            },
            mode="markers", name=gpu,
            text=[html.escape(f"{e.row['id']} {b.spec}") for e, b in zip(rows, best, strict=True)],
        )  # fmt: skip
    seconds = [each.measured_s for each in counted] or [1.0]
    ends = [min(seconds), max(seconds)]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="exact", line={"color": "#888"})
    figure.update_xaxes(type="log", title="published, s")
    figure.update_yaxes(type="log", title="predicted with the row's one-GPU latency, s")
    figure.update_layout(height=640, template="plotly_white", margin={"t": 20})
    return str(figure.to_html(full_html=False, include_plotlyjs=True, div_id="scatter"))
