"""``paradiff validate``: predictions against what others measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from paradiff.cli import validate_run
from paradiff.cli.common import check_output_dir, group, json_text, one_message, progress, staged
from paradiff.cli.validate_fidelity import fidelity
from paradiff.cli.validate_lab import lab

app = group("Predictions against measurements.")
app.command()(fidelity)
app.command()(lab)
app.command()(validate_run.run)


@app.command()
def published(
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Rows in the columns of the shipped runs.csv."),
    ] = None,
    format_: Annotated[
        Literal["table", "json"], typer.Option("--format", help="Output on stdout.")
    ] = "table",
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write validation.json, rows.csv and report.html."),
    ] = None,
) -> None:
    """Predict published runs, with and without their own one-GPU latency, and score it."""
    with one_message():
        from analysis import published as runs
        from analysis import scoreboard
        from paradiff.config import find

        check_output_dir(output_dir)
        rules = runs.load_rules()
        rows = runs.read_rows(data or find("published", "runs", ".csv"))
        with progress(enabled=True) as advance:
            scored = scoreboard.score(rows, rules, scoreboard.Predictor(), advance)
        from analysis import validation_report

        if output_dir is not None:
            with staged(output_dir) as folder:
                answer = json_text(scoreboard.to_json(scored))
                (folder / "validation.json").write_text(answer, encoding="utf-8")
                (folder / "rows.csv").write_text(
                    validation_report.rows_csv(scored), encoding="utf-8"
                )
                (folder / "report.html").write_text(
                    validation_report.page(scored), encoding="utf-8"
                )
    if format_ == "json":
        typer.echo(json_text(scoreboard.to_json(scored)), nl=False)
    else:
        typer.echo(validation_report.text(scored))
