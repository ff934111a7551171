"""Waiting for an event in another process or thread."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], has_failed: Callable[[], bool] = lambda: False) -> None:
    """Wait until the condition holds, for at most 10 minutes; stop as soon as `has_failed()` is true."""
    deadline_s = time.monotonic() + 600
    while not condition():
        assert not has_failed() and time.monotonic() < deadline_s, "the awaited event did not happen"
        time.sleep(0.01)
