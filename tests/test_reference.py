"""docs/reference.md is what the definitions say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_current() -> None:
    from reference import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/reference.py"


def test_every_key_of_every_file_has_a_meaning() -> None:
    """Said below the key, or by the option of its name."""
    from reference import FILES, meaning, nested

    keys = [(m, key) for *_, file in FILES for m in (file, *nested(file)) for key in m.model_fields]
    assert len(keys) > 120
    assert all(len(meaning(model, key)) > 5 for model, key in keys)


def test_every_field_of_a_result_has_a_meaning_and_every_meaning_a_field() -> None:
    """By the page, whose fields are those of real answers."""
    from glossary import MEANINGS, key
    from reference import MODEL_FILE, PAGE, RESULTS

    used, text = set(), PAGE.read_text(encoding="utf-8")
    for answer in (MODEL_FILE, *RESULTS):
        section = (
            text.partition(f"### {answer.title}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
        )
        rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \|$", section, re.M)
        assert len(rows) > 10, answer.title
        for path, said in rows:
            used.add(key(f"{answer.called}.{path}"))
            assert said == MEANINGS[key(f"{answer.called}.{path}")]
    assert used == MEANINGS.keys()
