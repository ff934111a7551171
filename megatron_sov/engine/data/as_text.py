"""Chats as text: of their tokens the weights say what is learned, and not who wrote them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_sov.base.chat.encode import TYPE_TEXT
from megatron_sov.engine.data.media_shards import banks_of, media_of
from megatron_sov.engine.data.token_shards import Documents, Source
from megatron_sov.omni.media.placed import Media

TEXT = "text"


class AsText:
    """Documents whose tokens are all of the type of text."""

    is_plain = False

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self.lengths, self.columns = documents.lengths, documents.columns
        self.banks = banks_of(documents)

    def __reduce__(self) -> tuple[Any, ...]:  # its lengths are maps of files
        return AsText, (self._documents,)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token ids, int64."""
        return self._documents.tokens(document, start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return each token's weight as a target, float32."""
        return self._documents.loss_weights(document, start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token types, uint8."""
        return np.full(count, TYPE_TEXT, np.uint8)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        """Return each token's number in a column, as a target, float32."""
        return self._documents.column(name, document, start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        """Return where each token went."""
        return self._documents.routes(document, start, count)

    def media(self, document: int, start: int, count: int) -> Media:
        """Return the pictures and sounds of some tokens."""
        return media_of(self._documents, document, start, count)


def as_text(source: Source) -> Source:
    """Return a source as one of text: it is cut where a row ends, and its held-out documents, which would be
    judged as responses, are left aside."""
    if source.format == TEXT:
        return source
    return dataclasses.replace(source, format=TEXT, made=AsText(source.shard("train")),
                               num_tokens={"train": source.num_tokens["train"], "heldout": 0})
