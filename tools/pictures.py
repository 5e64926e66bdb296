"""Make ``docs/pictures`` again: what the README shows of real reports, from chromium, in few colours.

``python tools/pictures.py`` needs playwright and a chromium in /usr/bin. It plans sdxl on pcie8, as the
first command of the README does, and a service on two boxes.
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
CAPACITY = [
    "capacity", "--topology", "pcie8", "--topology", "nvlink8-a100", "--model", "sdxl:0.7,deadline=12s",
    "--model", "pixart-alpha:0.3", "--request-rate", "6", "--slo", "p99=15s", "--num-prompts", "20000",
]  # fmt: skip
REPORT, SERVICE = "report.html", "capacity.html"
SHOTS: dict[str, tuple[str, str, int]] = {
    "recommendation": (REPORT, "h1", 780),
    "time": (REPORT, "#h-time", 620),
    "timeline": (REPORT, "#h-second_steady", 500),
    "sizes": (REPORT, "#h-sizes", 480),
    "load": (SERVICE, "#h-load", 480),
}
"""Picture -> report, the element at its top, its height in pixels."""


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        for arguments in (PLAN, CAPACITY):
            done = CliRunner().invoke(app, [*arguments, "--output-dir", folder])
            assert done.exit_code == 0, done.stderr
        found = next(path for path in CHROMIUM if Path(path).exists())
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, (report, top, height) in SHOTS.items():
            page = browser.new_page(viewport={"width": WIDTH, "height": 900})
            page.goto((Path(folder) / report).as_uri())
            page.wait_for_selector(".main-svg", state="attached")
            (PICTURES / f"{name}.png").write_bytes(shot(page, top, height))
            page.close()
        browser.close()


def shot(page: Page, top: str, height: int) -> bytes:
    """From a little above an element on, as a PNG with a palette."""
    y = page.locator(top).bounding_box()["y"] - 8  # type: ignore[index]
    clip = {"x": 0, "y": max(y, 0), "width": WIDTH, "height": height}
    taken = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip)))  # type: ignore[arg-type]
    packed = io.BytesIO()
    taken.convert("RGB").quantize(COLOURS).save(packed, "PNG", optimize=True)
    return packed.getvalue()


if __name__ == "__main__":
    main()
