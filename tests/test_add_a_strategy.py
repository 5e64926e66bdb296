"""docs/add-a-strategy.md is run: its code, and nothing else, makes the strategy."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import toys

from paradiff import strategies
from paradiff.strategies import SpecError, Workload, build, facts, parse_spec, stream

PAGE = Path(__file__).parents[1] / "docs" / "add-a-strategy.md"


def test_the_page_makes_a_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    function, line, closed_form = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    known = dict(strategies.STRATEGIES)
    monkeypatch.setattr(strategies, "STRATEGIES", known)
    real = known.pop("streambatch")
    with pytest.raises(SpecError, match="unknown 'streambatch'"):
        parse_spec("streambatch=2")

    here: dict[str, Any] = {}
    for code in (function, line, closed_form):
        exec(compile(code, str(PAGE), "exec"), here)

    assert inspect.getsource(real.emit) in function
    assert real.emit is stream.streambatch
    spec, workload = parse_spec("cfg=2,streambatch=3"), Workload(16, 4, 1, 7)
    ours = build(spec, toys.transformer(), workload)
    assert facts(spec, workload) == strategies.Facts(6, 7, True)
    known["streambatch"] = real
    assert build(spec, toys.transformer(), workload).fingerprint() == ours.fingerprint()
