"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run, and no time limit per example: a loaded machine must not turn a test red.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
