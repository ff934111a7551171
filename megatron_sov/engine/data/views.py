"""Parts of sources by the length of their documents, as sources of their own:
NAME@N and NAME/N in a blend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.long_documents import LongDocuments
from megatron_sov.engine.data.media_shards import banks_of, media_of
from megatron_sov.engine.data.token_shards import Documents, Source
from megatron_sov.model.config import RunConfig
from megatron_sov.omni.media.placed import Media

LONG, SHORT = "@", "/"


# The documents of a source cut into short pieces: what a phase at that length would read, for rehearsal at
# a longer one.


class PieceLengths:
    """The tokens of each piece, worked out when asked: 8 bytes are kept for a document, none for a piece."""

    def __init__(self, document_tokens: np.ndarray, max_tokens: int) -> None:
        self._tokens, self._max_tokens = document_tokens, max_tokens
        self._ends = np.cumsum(-(-document_tokens // max_tokens))

    def find(self, piece: int) -> tuple[int, int]:
        """Return the document that holds a piece, and the piece's first token there."""
        document = int(np.searchsorted(self._ends, piece, side="right"))
        before = int(self._ends[document - 1]) if document else 0
        return document, (piece - before) * self._max_tokens

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, pieces: Any) -> Any:
        documents = np.searchsorted(self._ends, pieces, side="right")
        # pieces of the same document behind this one
        left_behind = self._ends[documents] - 1 - np.asarray(pieces)
        number = -(-self._tokens[documents] // self._max_tokens) - 1 - left_behind
        found = np.minimum(self._max_tokens, self._tokens[documents] - number * self._max_tokens)
        return int(found) if np.ndim(pieces) == 0 else found

    def __iter__(self) -> Iterator[int]:
        return (self[piece] for piece in range(len(self)))


class Pieces:
    """The documents of `documents` in pieces of at most `max_tokens` tokens; a piece knows nothing
    of the one before."""

    def __init__(self, documents: Documents, max_tokens: int) -> None:
        self._documents, self._max_tokens = documents, max_tokens
        self.is_plain = documents.is_plain
        self.columns = documents.columns
        self.banks = banks_of(documents)

    @cached_property
    def lengths(self) -> PieceLengths:
        """Tokens of each piece; made on first use."""
        lengths = self._documents.lengths
        return PieceLengths(np.asarray(lengths[np.arange(len(lengths))], np.int64), self._max_tokens)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token ids of a piece, int64."""
        whole, first = self.lengths.find(document)
        return self._documents.tokens(whole, first + start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return each token's weight as a target, float32."""
        whole, first = self.lengths.find(document)
        return self._documents.loss_weights(whole, first + start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token types, uint8."""
        whole, first = self.lengths.find(document)
        return self._documents.types(whole, first + start, count)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        """Return each token's number in a column, as a target, float32."""
        whole, first = self.lengths.find(document)
        return self._documents.column(name, whole, first + start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        """Return where each token went."""
        whole, first = self.lengths.find(document)
        return self._documents.routes(whole, first + start, count)

    def media(self, document: int, start: int, count: int) -> Media:
        """Return the pictures and sounds of some tokens."""
        whole, first = self.lengths.find(document)
        return media_of(self._documents, whole, first + start, count)


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
