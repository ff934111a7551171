"""A bar for work of many equal parts, on a terminal alone: a log file would fill with it."""

from __future__ import annotations

from typing import Never

from tqdm import tqdm

BEGINS_AFTER_S = 2.0
"""What takes a moment only shows none."""


def work_bar(title: str, total: int, unit: str, shows: bool = True) -> tqdm[Never]:
    """Return a bar, to be used as a context; `update(n)` says that n more parts are done.

    Args:
        title: what is going on, one word.
        total: parts.
        unit: what a part is; large numbers are shortened.
        shows: False on processes that leave it to another one.
    """
    return tqdm(total=total, desc=title, unit=unit, unit_scale=True, delay=BEGINS_AFTER_S,
                disable=None if shows else True)
