"""Settings of all tests: drawn examples are the same in every run, and a busy machine is no failure."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
