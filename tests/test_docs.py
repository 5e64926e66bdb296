"""The pages: their commands work, what they show is what is printed, what they name is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from readme import PAGES, ROOT, run_page

PROSE = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "hardware_profiles/README.md"]
)
NAMED = re.compile(r"(?P<file>(?:tests/)?(?:torch/|lab/)?test_\w+\.py)|::\s*(?P<test>test_\w+)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.torch
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_works_and_prints_what_the_page_shows(page: Path) -> None:
    for shown, fresh in run_page(page):
        assert shown.agrees(fresh), f"run: python tools/readme.py\n{shown.command}\n{fresh}"


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    """``tests/a.py::test_b``; ``::test_c`` alone is in the file named before it."""
    inside = ""
    for found in NAMED.finditer(page.read_text(encoding="utf-8")):
        if found["file"]:
            file = ROOT / "tests" / found["file"].removeprefix("tests/")
            assert file.is_file(), found["file"]
            inside = file.read_text(encoding="utf-8")
        else:
            assert f"def {found['test']}(" in inside, found.group()


def test_every_module_of_the_simulator_is_explained() -> None:
    """Its equations and the tests of them, in one of the pages."""
    told = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    modules = [path for path in (ROOT / "simulator").glob("*.py") if path.stem != "__init__"]
    assert [path.name for path in modules if f"simulator/{path.name}" not in told] == []
