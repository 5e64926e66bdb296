"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("search", settings.get_profile("default"), deadline=None)
settings.load_profile("ci")
"""The same examples every time, and none fails for having taken long: a change is refused for what it
changed. Others are tried by ``pytest --hypothesis-profile=search``."""

for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "COLUMNS", "LINES"):
    os.environ.pop(name, None)
"""They say how a terminal is written to, which no test has."""
