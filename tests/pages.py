"""HTML reports as a reader meets them: their elements, and what a browser makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from paradiff.config import find

HOSTILE = "<script>alert(1)</script>\"'&\n\x1b[2J../../../x"
"""A name: markup, quotes, a line break, what clears a terminal, a path."""


class Scripts(HTMLParser):
    """Elements of a page, and whatever would fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href") and v != "data:,"]


def hostile(kind: str, name: str, folder: Path) -> str:
    """A copy in ``folder`` of a shipped file, the thing that it describes called HOSTILE; its path."""
    source = find(kind, name, ".json" if kind == "models" else ".yaml")
    shape = r'"name": *"' + name + '"' if kind == "models" else r"(?m)^name: .*"
    quoted = '"name": ' if kind == "models" else "name: "
    text, changed = re.subn(shape, lambda _: quoted + json.dumps(HOSTILE), source.read_text())
    assert changed == 1
    target = folder / f"hostile{source.suffix}"
    target.write_text(text)
    return str(target)


def check_is_one_harmless_file(path: Path, scripts: int) -> None:
    """Less than 8 MB, so many script elements, nothing fetched, and HOSTILE in it only as text."""
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 8e6
    elements = Scripts()
    elements.feed(text)
    assert elements.tags.count("script") == scripts
    assert elements.fetched == []
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def check_numbers(page: Any, chart: str, x: Iterable[float]) -> None:
    """By keyboard: the numbers of a chart as a table, ``x`` in its third column below the head."""
    page.locator(f"details[data-chart={chart}] summary").focus()
    page.keyboard.press("Enter")
    cells = page.locator(f"details[data-chart={chart}] tr:not(:first-child) td:nth-child(3)")
    cells.first.wait_for()
    assert sorted(map(float, cells.all_inner_texts())) == pytest.approx(sorted(x), rel=1e-3)


@contextmanager
def opened(path: Path, width: int, scheme: str) -> Iterator[Any]:
    """The page in chromium with the network cut. At the end: no error, no dialog, no request, and
    nothing that sticks out. Skips where there is no browser."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(
        filter(Path.exists, map(Path, ("/usr/bin/chromium", "/usr/bin/google-chrome"))), None
    )
    if chromium is None:
        pytest.skip("no chromium in /usr/bin")
    errors: list[str] = []
    asked: list[str] = []
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        page = context.new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: errors.append("a dialog opened"))
        page.goto(path.as_uri())
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert errors == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        browser.close()
