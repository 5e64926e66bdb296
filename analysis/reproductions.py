"""Headline figures of five methods, predicted: ``python -m analysis.reproductions [--output-dir DIR]``.

Every bar is a speed-up over one GPU under the clock of its source, without calibration: figures and
cases are in ``hardware_profiles/published/figures.yaml``. Beside each stand the seconds of both runs by
part, which is what makes the difference; a bar that is missed by more than NEAR has its cause.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from analysis.published import Case
from analysis.scoreboard import Predicted, Predictor
from analysis.text import plain
from paradiff.config import Strict, find, load_yaml
from paradiff.strategies import Workload, parse_spec
from simulator.costs import Runtime, Scope

NEAR = 0.15
PARTS = ("text_encoder", "compute", "comm", "bubble", "host", "vae")
LEFT = {"method", "model", "spec", "one GPU", "parts of the run", "cause"}


class Bar(Strict):
    """One published speed-up; what it does not say is as in its figure."""

    spec: str
    published: float
    pixels: tuple[int, int] | None = None
    frames: int | None = None
    model: str | None = None
    dtype: str | None = None
    steps: int | None = None
    cause: str = ""


class Figure(Strict):
    """A figure of one method on one box."""

    method: str
    source: str
    model: str
    topology: str
    runtime: Runtime
    scope: Scope
    dtype: str
    steps: int
    bars: tuple[Bar, ...]


class Figures(Strict):
    """The schema of ``figures.yaml``."""

    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduced:
    """A bar and its prediction."""

    figure: Figure
    bar: Bar
    case: Case
    one_gpu: Predicted
    run: Predicted

    @property
    def speedup(self) -> float:
        return self.one_gpu.seconds / self.run.seconds

    @property
    def error(self) -> float:
        return self.speedup / self.bar.published - 1


def load_figures() -> tuple[Figure, ...]:
    """The shipped figures. Raises ConfigError."""
    return load_yaml(find("published", "figures"), Figures).figures


def reproduce(figure: Figure, predictor: Predictor) -> Iterator[Reproduced]:
    """Every bar of ``figure``. Raises Infeasible where a spec cannot be built."""
    for bar in figure.bars:
        one = _case(figure, bar, predictor, "serial")
        case = _case(figure, bar, predictor, bar.spec)
        yield Reproduced(
            figure=figure,
            bar=bar,
            case=case,
            one_gpu=predictor.predict(one),
            run=predictor.predict(case),
        )


def _case(figure: Figure, bar: Bar, predictor: Predictor, spec: str) -> Case:
    model = bar.model or figure.model
    defaults = predictor.profiles[model].defaults
    width, height = bar.pixels or (defaults["width"], defaults["height"])
    workload = Workload(
        height, width, bar.frames or defaults["frames"], bar.steps or figure.steps, 1,
        bar.dtype or figure.dtype,
    )  # fmt: skip
    return Case(
        model=model, topology=figure.topology, overrides=(), gpu="", workload=workload, specs=(spec,),
        n_gpus=parse_spec(spec).n_gpus, scope=figure.scope, runtime=figure.runtime,
        baseline_runtime=figure.runtime, attention="flash2",
    )  # fmt: skip


def table(bars: list[Reproduced]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Predicted beside published, and where the seconds go."""
    header = (
        "method", "model", "pixels", "spec", "published", "predicted", "error", "one GPU",
        "parts of the run", "cause",
    )  # fmt: skip
    rows = [
        [
            each.figure.method, each.case.model,
            f"{each.case.workload.width}x{each.case.workload.height}", each.bar.spec,
            f"{each.bar.published:.2f}x", f"{each.speedup:.2f}x", f"{each.error:+.0%}",
            _parts(each.one_gpu), _parts(each.run), each.bar.cause,
        ]
        for each in bars
    ]  # fmt: skip
    return header, rows


def _parts(run: Predicted) -> str:
    parts = [f"{name} {run.split[name]:.3g}" for name in PARTS if run.split.get(name, 0) > 5e-4]  # type: ignore[index,call-overload]
    return f"{run.seconds:.3g} s: " + ", ".join(parts)


def main(arguments: list[str]) -> None:
    """Print the table; with ``--output-dir DIR`` also write it as one HTML page."""
    predictor = Predictor()
    bars = [each for figure in load_figures() for each in reproduce(figure, predictor)]
    header, rows = table(bars)
    sys.stdout.write("\n".join(plain(header, rows, LEFT)) + "\n")
    near = sum(abs(each.error) <= NEAR for each in bars)
    summary = f"{near} of {len(bars)} within {NEAR:.0%}, the others with their cause"
    sys.stdout.write(f"\n{summary}\n")
    if arguments[:1] == ["--output-dir"] and len(arguments) == 2:
        from analysis.validation_report import bars_figure, render

        folder = Path(arguments[1])
        folder.mkdir(parents=True, exist_ok=True)
        sources = [f"{figure.method}: {figure.source}" for figure in load_figures()]
        names = [f"{e.figure.method} {e.case.workload.width} px {e.bar.spec}" for e in bars]
        chart = bars_figure(names, [e.bar.published for e in bars], [e.speedup for e in bars])
        text = render(
            "Published speed-ups, predicted", [summary, *sources], chart, [("", (header, rows))]
        )
        staged = folder / ".reproductions.html"
        staged.write_text(text, encoding="utf-8")
        staged.replace(folder / "reproductions.html")
    elif arguments:
        raise SystemExit("usage: python -m analysis.reproductions [--output-dir DIR]")


if __name__ == "__main__":
    main(sys.argv[1:])
