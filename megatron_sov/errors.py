"""Mistakes that a user can mend: one sentence, no traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input, settings or files.

    The message is one clear sentence (or a short list) that names the file or field, its value, the rule it breaks
    and what to do.  Commands print it without a traceback and end with exit code 2.
    """


class StopRequested(Exception):
    """The run was asked to stop (signal or time limit) and everything is saved; commands end with exit code 75."""


class GateFailed(Exception):
    """A gate did not pass and everything is saved; commands say which figures failed and end with exit code 3."""


class SilentCorruption(Exception):
    """A process computes or remembers other bits than it should; the ranks end with `EXIT_CORRUPTION`."""


EXIT_HANG, EXIT_CORRUPTION = 76, 77
"""Exit codes of ranks that stood still too long, and of ranks of which one computes wrongly."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
