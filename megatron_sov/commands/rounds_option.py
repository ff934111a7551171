"""--rounds A-B, as commands that work on a rollout store take it."""

from __future__ import annotations

import re

from megatron_sov.errors import UserError


def rounds_between(given: str) -> range:
    """Return the rounds that --rounds names.

    Raises:
        UserError: it has another form.
    """
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", given)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--rounds {given}: must be a round, or the first and the last one, from 1, e.g. "
                        "--rounds 2 or --rounds 3-7")
    return range(first, last + 1)
