"""What a file of strangers may not ask for: ids far above its tokens, for each of which a library makes room,
and what makes a library panic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from megatron_sov.base.errors import UserError, first_line

FREE_IDS = 1 << 20
"""So many ids above its tokens may be unused: reserved ones, and those of other kinds of input."""
ID_DIGITS = 9
"""Longer numbers are no ids."""


def refuse_far_ids(ids: Iterable[object], where: object) -> None:
    """Refuse ids that are no numbers, or far above what as many tokens need.

    Raises:
        UserError: naming the first one.
    """
    found = list(ids)
    limit = len(found) + FREE_IDS
    for id_ in found:
        if type(id_) is not int or not 0 <= id_ < limit:
            shown = repr(id_)[:20] if not isinstance(id_, int) or abs(id_) < 10**20 else "a huge number"
            raise UserError(f"{where}: {shown} is no id of one of its {len(found)} tokens (0 to "
                            f"{limit - 1}); restore the file from its source")


@contextlib.contextmanager
def no_panics(where: object) -> Iterator[None]:
    """Turn a panic of a library in Rust, which is no `Exception`, into a `UserError`."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: the library that reads it gives up ({first_line(e)}); "
                        "restore it from its source, or take another pattern") from None
