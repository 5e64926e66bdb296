"""Make ``docs/pictures`` again: what the README shows of real reports, from chromium, in few colours.

``python tools/pictures.py`` needs playwright and a chromium in /usr/bin. It plans sdxl on pcie8, as the
first command of the README does, one strategy for its timeline, and a service on two boxes.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from typer.testing import CliRunner

from paradiff.cli import app

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/google-chrome")
WIDTH, COLOURS = 1000, 64
PLAN = ["plan", "--topology", "pcie8"]
SHOWN = "distrifusion=4,warmup=4"
TIMELINE = [*PLAN, "--strategy", SHOWN]
CAPACITY = [
    "capacity", "--topology", "pcie8", "--topology", "nvlink8-a100", "--model", "sdxl:0.7,deadline=12s",
    "--model", "pixart-alpha:0.3", "--request-rate", "6", "--slo", "p99=15s", "--num-prompts", "20000",
]  # fmt: skip
REPORTS = {
    "plan/report.html": PLAN, "timeline/report.html": TIMELINE, "capacity/capacity.html": CAPACITY,
}  # fmt: skip
SHOTS: dict[str, tuple[str, str, str]] = {
    "recommendation": ("plan/report.html", "h1", "#ranked tbody tr:nth-child(12)"),
    "time": ("plan/report.html", "#h-time", "#time"),
    "timeline": ("timeline/report.html", "#h-steady", "#steady"),
    "sizes": ("plan/report.html", "#h-sizes", "#sizes"),
    "load": ("capacity/capacity.html", "#h-load", "#load"),
}
"""Picture -> report, the elements at its top and at its bottom."""


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        for report, arguments in REPORTS.items():
            out = str((Path(folder) / report).parent)
            done = CliRunner().invoke(app, [*arguments, "--output-dir", out])
            assert done.exit_code == 0, done.stderr
        found = next(path for path in CHROMIUM if Path(path).exists())
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, (report, top, bottom) in SHOTS.items():
            page = browser.new_page(viewport={"width": WIDTH, "height": 900})
            page.goto((Path(folder) / report).as_uri())
            page.wait_for_function("Object.keys(figures).every(id => id in whole)")
            (PICTURES / f"{name}.png").write_bytes(shot(page, top, bottom))
            page.close()
        browser.close()


def shot(page: Page, top: str, bottom: str) -> bytes:
    """From a little above an element to the end of another, as a PNG with a palette."""
    first, last = (page.locator(each).bounding_box() for each in (top, bottom))
    assert first is not None
    assert last is not None
    y = max(first["y"] - 8, 0)
    clip = {"x": 0, "y": y, "width": WIDTH, "height": last["y"] + last["height"] - y}
    taken = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip)))  # type: ignore[arg-type]
    packed = io.BytesIO()
    taken.convert("RGB").quantize(COLOURS).save(packed, "PNG", optimize=True)
    return packed.getvalue()


if __name__ == "__main__":
    main()
