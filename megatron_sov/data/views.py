"""Parts of sources by the length of their documents, as sources of their own:
NAME@N and NAME/N in a blend."""

from __future__ import annotations

import dataclasses

from megatron_sov.config import RunConfig
from megatron_sov.data.long_documents import LongDocuments
from megatron_sov.data.short_pieces import Pieces
from megatron_sov.data.token_shards import Source
from megatron_sov.errors import UserError

LONG, SHORT = "@", "/"


def with_views(config: RunConfig, sources: list[Source]) -> list[Source]:
    """Return the sources and what the blends make of them: NAME@N, the documents of NAME with at least N
    tokens; NAME/N, all its documents in pieces of at most N.

    Each is a stream of its own: a long document is read by NAME in its turn as well.

    Raises:
        UserError: N is not a number, NAME has no document that long, or its conversations would be cut.
    """
    known = {s.name: s for s in sources}
    wanted = dict.fromkeys(name for phase in config.data.phases for name in phase.blend if name not in known)
    views = (_view(name, known) for name in wanted)
    return sources + [view for view in views if view is not None]


def _view(name: str, known: dict[str, Source]) -> Source | None:
    """Return the view that a name means; None where it means none, and the plan names the unknown source."""
    kind = next((mark for mark in (LONG, SHORT) if name.rpartition(mark)[0] in known), None)
    if kind is None:
        return None
    base, _, number = name.rpartition(kind)
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"data.phases blend {name!r}: after the {kind} stands a number of tokens, e.g. "
                        f"{base}{kind}8192")
    source, tokens = known[base], int(number)
    if kind == SHORT:
        if source.is_chat:
            raise UserError(f"data.phases blend {name!r}: conversations of {base} stay whole; "
                            f"name {base} alone")
        return dataclasses.replace(source, name=name, share=0.0, made=Pieces(source.shard("train"), tokens),
                                   num_tokens={"train": source.num_tokens["train"], "heldout": 0})
    if source.group > 1:
        raise UserError(f"data.phases blend {name!r}: documents of {base} belong together by "
                        f"{source.group}; name {base} alone, and see data.over_long")
    documents = LongDocuments(source.shard("train"), tokens)
    if not len(documents.index):
        raise UserError(f"data.phases blend {name!r}: source {base} has no document of {tokens} "
                        "tokens or more")
    return dataclasses.replace(source, name=name, share=0.0, made=documents,
                               num_tokens={"train": int(documents.lengths.sum()), "heldout": 0})
