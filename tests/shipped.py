"""The profiles that come with paradiff, read once a test process."""

from __future__ import annotations

from functools import cache

from paradiff.config import find
from paradiff.profiles import Profile, load_profile


@cache
def profile(name: str) -> Profile:
    return load_profile(find("models", name, ".json"))
