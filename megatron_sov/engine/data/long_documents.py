"""The long documents of a source, for context extension."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from megatron_sov.engine.data.lengths import ChainedLengths
from megatron_sov.engine.data.media_shards import banks_of, media_of
from megatron_sov.engine.data.token_shards import Documents
from megatron_sov.omni.media.placed import Media


class LongDocuments:
    """The documents of `documents` with at least `min_tokens` tokens; the index is made on first use."""

    def __init__(self, documents: Documents, min_tokens: int) -> None:
        self._documents, self._min_tokens = documents, min_tokens
        self.is_plain = documents.is_plain
        self.columns = documents.columns
        self.banks = banks_of(documents)

    @cached_property
    def index(self) -> np.ndarray:
        """[long documents] int64: their numbers in the source, ascending."""
        lengths = self._documents.lengths
        parts = lengths.parts if isinstance(lengths, ChainedLengths) else [np.asarray(lengths)]
        starts = np.cumsum([0, *(len(p) for p in parts)])
        return np.concatenate([np.flatnonzero(p >= self._min_tokens) + s
                               for p, s in zip(parts, starts[:-1], strict=True)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """[long documents] int64: their tokens."""
        return np.asarray(self._documents.lengths[self.index], np.int64)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token ids, int64."""
        return self._documents.tokens(int(self.index[document]), start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return each token's weight as a target, float32."""
        return self._documents.loss_weights(int(self.index[document]), start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token types, uint8."""
        return self._documents.types(int(self.index[document]), start, count)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        """Return each token's number in a column, as a target, float32."""
        return self._documents.column(name, int(self.index[document]), start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        """Return where each token went."""
        return self._documents.routes(int(self.index[document]), start, count)

    def media(self, document: int, start: int, count: int) -> Media:
        """Return the pictures and sounds of some tokens."""
        return media_of(self._documents, int(self.index[document]), start, count)
