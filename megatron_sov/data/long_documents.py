"""The long documents of a source as a source of their own, for context extension: NAME@N in a blend."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from megatron_sov.config import RunConfig
from megatron_sov.data.shards import ChainedLengths, Documents, Source
from megatron_sov.errors import UserError


class LongDocuments:
    """The documents of `documents` with at least `min_tokens` tokens; the index is made on first use."""

    def __init__(self, documents: Documents, min_tokens: int) -> None:
        self._documents, self._min_tokens = documents, min_tokens
        self.is_plain = documents.is_plain

    @cached_property
    def index(self) -> np.ndarray:
        """[long documents] int64: their numbers in the source, ascending."""
        lengths = self._documents.lengths
        parts = lengths.parts if isinstance(lengths, ChainedLengths) else [np.asarray(lengths)]
        starts = np.cumsum([0, *(len(p) for p in parts)])
        return np.concatenate([np.flatnonzero(p >= self._min_tokens) + s for p, s in zip(parts, starts[:-1], strict=True)])

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


def with_long_documents(config: RunConfig, sources: list[Source]) -> list[Source]:
    """Return the sources and, for each NAME@N in a blend, the documents of NAME with at least N tokens.

    The two are streams of their own: a long document is read by NAME in its turn as well.

    Raises:
        UserError: N is not a number, or NAME has no document that long.
    """
    known = {s.name: s for s in sources}
    wanted = dict.fromkeys(name for phase in config.data.phases for name in phase.blend if "@" in name and name not in known)
    more = []
    for name in wanted:
        base, _, minimum = name.rpartition("@")
        if base not in known:
            continue  # the plan names the unknown source
        if not minimum.isdecimal():
            raise UserError(f"data.phases blend {name!r}: after the @ stands a number of tokens, e.g. {base}@8192")
        documents = LongDocuments(known[base].shard("train"), int(minimum))
        if not len(documents.index):
            raise UserError(f"data.phases blend {name!r}: source {base} has no document of {minimum} tokens or more")
        tokens = {"train": int(documents.lengths.sum()), "heldout": 0}
        more.append(dataclasses.replace(known[base], name=name, num_tokens=tokens, share=0.0, made=documents))
    return sources + more
