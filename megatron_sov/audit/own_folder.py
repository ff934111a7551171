"""Folders in which a run is done again: made once, never of what is not theirs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import UserError

BEGUN, WHOLE = "begun.json", "whole"
"""Files of such a folder: what is done again in it, written first; and that its content is there, written
last."""
REPLAYED_RUN, REPLAYED_STORE = "run", "store"
"""Of a replay's folder."""


def make_once(folder: Path, identity: Mapping[str, Any], content: Sequence[str], make: Callable[[], None], *,
              what: str, other: str) -> None:
    """Make a folder's content, unless it is there; what a killed command left of it is made anew.

    Args:
        folder: it may not be there yet.
        identity: what is done again in it, as plain JSON values.
        content: names of all that `make` makes.
        make: makes it.
        what: such a folder holds, for messages.
        other: what it holds where its identity is another one.

    Raises:
        UserError: it is a link, or holds something else.
    """
    begun, text = folder / BEGUN, to_json(identity)
    if folder.is_symlink() or (folder.exists() and any(folder.iterdir()) and not begun.is_file()):
        raise UserError(f"{folder}: is a link, or holds something else than a {what}; name another --output")
    if begun.is_file() and begun.read_bytes() != text.encode():
        raise UserError(f"{folder}: holds {other}; name another --output")
    if (folder / WHOLE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(begun, text)
    for name in content:
        shutil.rmtree(folder / name, ignore_errors=True)
    make()
    atomic_write(folder / WHOLE, "")
