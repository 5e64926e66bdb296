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

BUSY_MS = 200_000
"""What takes longer hangs, on a machine that is busy with other tests."""
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


def check_hovers(page: Any) -> dict[str, str]:
    """By mouse: what every chart says of a mark of its first trace that has one."""
    said = {}
    for chart in page.evaluate("Object.keys(figures)"):
        page.locator(f"#{chart}").scroll_into_view_if_needed()
        x, y = page.evaluate(MARK, chart)
        page.mouse.move(x, y)
        label = page.wait_for_selector(f"#{chart} .hoverlayer .hovertext")
        said[chart] = str(label.text_content())
        assert said[chart].strip(), chart
        assert not re.search("undefined|NaN|[%]{", said[chart]), said[chart]
        page.mouse.move(0, 0)
    return said


def check_zooms(page: Any, chart: str) -> None:
    """By keyboard, what a finger does by the same buttons: half as much of x, to its left end and no
    further, all of it again; and not more than that."""
    button = page.locator(f".zoom[data-chart={chart}] button")
    first, last = page.evaluate("id => whole[id]", chart)
    for name, low, high in (
        ("Zoom out", 0, 1),
        ("Zoom in", 1 / 4, 3 / 4),
        ("To the left", 0, 1 / 2),
        ("To the left", 0, 1 / 2),
        ("Zoom in", 1 / 8, 3 / 8),
        ("To the right", 1 / 4, 1 / 2),
        ("Whole", 0, 1),
    ):
        button.and_(page.get_by_role("button", name=name, exact=True)).focus()
        page.keyboard.press("Enter")
        ends = [first + share * (last - first) for share in (low, high)]
        page.wait_for_function(SHOWN, arg=[chart, *ends])
    assert button.evaluate_all(
        "(all, least) => all.every(b => b.getBoundingClientRect().height >= least)",
        44 if page.evaluate("matchMedia('(pointer: coarse)').matches") else 20,
    )


MARK = """id => {
  const chart = document.getElementById(id);
  const bar = [...chart.querySelectorAll('.barlayer .point path')]
    .map(each => each.getBoundingClientRect()).find(box => box.width > 1);
  if (bar) return [bar.x + bar.width / 2, bar.y + bar.height / 2];
  const plot = chart.querySelector('.nsewdrag').getBoundingClientRect();
  const { xaxis, yaxis } = chart._fullLayout, trace = chart.data.find(each => each.x.length);
  const k = Math.floor(trace.x.length / 2);
  return [plot.x + xaxis.d2p(trace.x[k]), plot.y + yaxis.d2p(trace.y[k])];
}"""
"""Where on the screen a mark of a chart is."""
SHOWN = """([id, ...ends]) => shownOf(id).every(
  (x, k) => Math.abs(x - ends[k]) < 1e-9 * (1 + Math.abs(x)))"""
"""Whether the x axis of a chart shows this much."""
ILLEGIBLE = """() => {
  const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const within = (a, b) => a.left > b.left - 1 && a.right < b.right + 1
    && a.top > b.top - 1 && a.bottom < b.bottom + 1;
  const kinds = [
    '.legend .bg', '.xtitle', '.ytitle', '.annotation-text-g', '.xtick text', '.ytick text',
  ];
  const found = [];
  for (const id of Object.keys(figures)) {
    const chart = document.getElementById(id), room = chart.getBoundingClientRect();
    const parts = kinds.flatMap(kind => [...chart.querySelectorAll(kind)].map(
      each => ({ name: `${kind} ${each.textContent}`, box: each.getBoundingClientRect() })
    )).filter(each => each.box.width);
    parts.forEach((each, i) => {
      if (!within(each.box, room)) found.push(`${id}: ${each.name} is cut off`);
      for (const other of parts.slice(i + 1))
        if (overlap(each.box, other.box)) found.push(`${id}: ${each.name} on ${other.name}`);
    });
  }
  return found;
}"""
"""Text of charts that lies on other text, or beyond its chart."""


@contextmanager
def opened(path: Path, width: int, scheme: str) -> Iterator[Any]:
    """The page in chromium with the network cut, by touch where it is narrow. At the end: no error, no
    dialog, no request, nothing that sticks out, no text of a chart on another. Skips where there is no
    browser."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(
        filter(Path.exists, map(Path, ("/usr/bin/chromium", "/usr/bin/google-chrome"))), None
    )
    if chromium is None:
        pytest.skip("no chromium in /usr/bin")
    errors: list[str] = []
    asked: list[str] = []
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=str(chromium),
            args=["--no-sandbox", "--disable-dev-shm-usage"],  # a container may have little of it
            timeout=BUSY_MS,
        )
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            offline=True,
            has_touch=width < 600,
            is_mobile=width < 600,
        )
        context.set_default_timeout(BUSY_MS)
        page = context.new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: errors.append("a dialog opened"))
        page.goto(path.as_uri())
        if page.evaluate("typeof figures") == "object":
            page.wait_for_function("Object.keys(figures).every(id => id in whole)")
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if page.evaluate("typeof figures") == "object":
            assert not (illegible := page.evaluate(ILLEGIBLE)), illegible
        assert errors == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        browser.close()
