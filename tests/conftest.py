"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# The same examples in every run, and no time limit per example: a loaded machine must not turn a test red.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# A shell starts what runs in its background with Ctrl-C ignored, and tests that press it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
