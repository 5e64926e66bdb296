"""``paradiff validate lab``: predictions against real transfers between hosts in network namespaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from paradiff.cli.common import (
    GATE_FAILED,
    INFEASIBLE,
    INTERRUPTED,
    check_output_dir,
    json_text,
    leave_with,
    load_model,
    one_message,
    parsed_specs,
    progress,
    shipped,
    staged,
)

if TYPE_CHECKING:
    from paradiff.lab.calibration import Calibration
    from paradiff.lab.laboratory import Cell, Regime, Verdict
    from simulator.topology import Topology

TOPOLOGIES = ("lab-star", "lab-trunk")


def lab(
    topology: Annotated[
        list[str] | None,
        typer.Option(
            help="Links between the hosts, repeatable; default: lab-star and lab-trunk.",
            autocompletion=shipped("topologies"),
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="What-if on the topologies, repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Whose schedules; default: pixart-alpha, in small sizes.",
            autocompletion=shipped("models", ".json"),
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Repeatable; default: all that move something."),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; with --strategy.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; with --strategy.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="With --strategy; default: 4.")] = None,
    cells_: Annotated[
        Literal["each", "order", "all"],
        typer.Option(
            "--cells",
            help="Each strategy at a size and balance of its own, all on the same work (whose order is"
            " compared), or both; with --strategy: the given size, all is each.",
        ),
    ] = "all",
    ranks: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Only strategies of so many, repeatable; default: 4 and 8."),
    ] = None,
    regime: Annotated[
        Literal["compute", "communication", "both"],
        typer.Option(help="What most of the time goes to."),
    ] = "both",
    repeats: Annotated[int, typer.Option(min=2, help="Runs of every cell.")] = 5,
    max_error: Annotated[
        float,
        typer.Option(min=0.0, metavar="X", help="Of the worst cell; half of it in the median."),
    ] = 0.10,
    format_: Annotated[
        Literal["table", "json"], typer.Option("--format", help="Output on stdout.")
    ] = "table",
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write lab.json, cells.md and the traces.")
    ] = None,
) -> None:
    """Run strategies with timed kernels over shaped links and compare (Linux, root; needs [run])."""
    with one_message():
        check_output_dir(output_dir)
        boxes = _boxes(topology or list(TOPOLOGIES), set_ or [])
        cells = _cells(model, strategy, (height, width, steps), ranks, regime, cells_)
        _check_machine()
        from paradiff.executor.machine import facts
        from paradiff.lab import report

        verdict, calibration = _ran(boxes, cells, repeats, max_error, format_ == "table")
        answer = json_text(report.to_json(verdict, calibration, repeats, facts()))
        if output_dir is not None:
            _write(output_dir, verdict, answer)
    typer.echo(answer if format_ == "json" else report.text(verdict), nl=format_ == "table")
    if verdict.failures:
        raise typer.Exit(GATE_FAILED)


def _boxes(names: Sequence[str], overrides: Sequence[str]) -> list[Topology]:
    from paradiff.lab.namespaces import check
    from simulator.topology import load_topology

    boxes = [load_topology(name, overrides) for name in dict.fromkeys(names)]
    for box in boxes:
        check(box)
    return boxes


def _cells(
    model: str | None,
    specs: Sequence[str] | None,
    sizes: tuple[int | None, int | None, int | None],
    ranks: Sequence[int] | None,
    regime: Literal["compute", "communication", "both"],
    which: Literal["each", "order", "all"],
) -> list[Cell]:
    """What is asked for. Raises ConfigError."""
    from paradiff.config import ConfigError
    from paradiff.lab.cells import MODEL, default_cells, order_cells
    from paradiff.lab.laboratory import BALANCE, Cell
    from paradiff.strategies import parse_spec

    regimes: Sequence[Regime] = tuple(BALANCE) if regime == "both" else (regime,)
    if specs is None:
        if model is not None or any(size is not None for size in sizes):
            raise ConfigError("--model, --height, --width, --steps: need --strategy beside them")
        cells = default_cells(regimes) * (which != "order") + order_cells(regimes) * (
            which != "each"
        )
        wanted = ranks or (4, 8)
    else:
        name = model or MODEL
        defaults = load_model(name).defaults
        height, width = (
            defaults[key] if size is None else size
            for key, size in zip(("height", "width"), sizes, strict=False)
        )
        cells = [
            Cell(name, spec, height, width, sizes[2] or 4, each, which == "order")
            for spec in parsed_specs(specs)
            for each in regimes
        ]
        wanted = ranks or sorted({parse_spec(cell.spec).n_gpus for cell in cells})
    for cell in cells:
        if parse_spec(cell.spec).n_gpus < 2:
            raise ConfigError(f"--strategy {cell.spec}: one rank, allowed: two or more")
    found = [cell for cell in cells if parse_spec(cell.spec).n_gpus in wanted]
    if not found:
        raise ConfigError(f"--ranks {', '.join(map(str, wanted))}: no strategy takes so many")
    return found


def _check_machine() -> None:
    """Exit 3 where no hosts can be made; ConfigError where torch is missing."""
    from importlib.util import find_spec

    from paradiff.config import ConfigError
    from paradiff.lab.namespaces import why_not

    for name in ("torch", "diffusers", "greenlet"):
        if find_spec(name) is None:
            raise ConfigError(f"the laboratory needs {name}: pip install 'paradiff[run]'")
    reason = why_not()
    if reason is not None:
        leave_with(INFEASIBLE, reason)


def _ran(
    boxes: Sequence[Topology],
    cells: Sequence[Cell],
    repeats: int,
    max_error: float,
    is_shown: bool,
) -> tuple[Verdict, Calibration]:
    """Calibrate, predict, measure. Raises ConfigError; exits 1, 3 and 130."""
    from paradiff.lab.calibration import calibrate
    from paradiff.lab.laboratory import Oracle, Verdict, check, measure
    from paradiff.lab.ranks import LaboratoryFailed
    from paradiff.lab.ranks import ranks as started
    from paradiff.strategies import Infeasible, parse_spec

    profiles = {name: load_model(name) for name in {cell.model for cell in cells}}
    sizes = {parse_spec(cell.spec).n_gpus for cell in cells}
    try:
        check(boxes, profiles, cells)
        with started() as running, progress("calibrating", enabled=is_shown) as advance:
            calibration = calibrate(running, sizes, advance)
            predictions = [Oracle(box, calibration).predict_all(profiles, cells) for box in boxes]
            results = []
            for number, (box, own) in enumerate(zip(boxes, predictions, strict=True)):
                shown = partial(_advance, advance, number, len(boxes))
                results += measure(box, own, running, repeats, shown)
    except Infeasible as error:
        leave_with(INFEASIBLE, str(error))
    except LaboratoryFailed as error:
        leave_with(GATE_FAILED, str(error))
    except KeyboardInterrupt:
        leave_with(INTERRUPTED, "interrupted")
    return Verdict(tuple(results), max_error), calibration


def _advance(
    advance: Callable[[int, int], None] | None, number: int, boxes: int, done: int, total: int
) -> None:
    """Progress over all boxes, of which ``number`` are done."""
    if advance is not None:
        advance(number * total + done, boxes * total)


def _write(target: Path, verdict: Verdict, answer: str) -> None:
    from analysis.tracks import measured
    from paradiff.lab import report
    from paradiff.trace import write_chrome_trace

    with staged(target) as folder:
        (folder / "lab.json").write_text(answer, encoding="utf-8")
        (folder / "cells.md").write_text(report.markdown(verdict.results), encoding="utf-8")
        for number, result in enumerate(verdict.results, 1):
            profile, own = load_model(result.cell.model), result.prediction
            predicted, typical = result.comparison.predicted, result.comparison.typical
            for name, trace, tracks in (
                ("predicted", predicted, own.tracks(profile)),
                ("measured", typical, measured(own.graph, typical, profile)),
            ):
                write_chrome_trace(trace, folder / f"{number:03d}-{name}.trace.json.gz", tracks)
