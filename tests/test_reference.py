"""docs/reference.md is what the definitions say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_current() -> None:
    from reference import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/reference.py"
