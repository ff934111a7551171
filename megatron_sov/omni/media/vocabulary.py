"""Tokens of media in texts that `sov-data encode-media` wrote: they are special tokens there, and ordinary
text where other texts spell them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_sov.base.chat.media_tokens import AUDIO_PAD, IMAGE_PAD, SPELLED, VIDEO_PAD
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.shard_files import NO_FEATURE
from megatron_sov.model.modality import PICTURES, SOUNDS, MediaEncoding, Rows
from megatron_sov.omni.media.banks import KINDS

PLACEHOLDERS = {PICTURES: (IMAGE_PAD, VIDEO_PAD), SOUNDS: (AUDIO_PAD,)}
"""Bank -> the tokens that stand for its features."""


class MediaVocabulary:
    """The tokens of media of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, encoding: MediaEncoding) -> None:
        """`tokenizer`: one that `sov-tokenizer media` wrote."""
        self._id_of = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()
                       if SPELLED.fullmatch(token.content)}
        self.ids = frozenset(self._id_of.values())
        self._slots = dict(encoding.slots)

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Return ordinary texts and tokens of media with their ids, in order.

        Raises:
            BadRecord: the tokenizer lacks one.
        """
        found: list[tuple[str, int | None]] = []
        start = 0
        for match in SPELLED.finditer(text):
            id_ = self._id_of.get(match.group())
            if id_ is None:
                raise BadRecord("media_token", f"has {match.group()}, and the tokenizer has no such token; "
                                               "make one "
                                               "with `sov-tokenizer media`, as large as the codec's codebook")
            if start < match.start():
                found.append((text[start:match.start()], None))
            found.append((match.group(), id_))
            start = match.end()
        return [*found, (text[start:], None)] if start < len(text) or not found else found

    def placeholder_ids(self, kind: str) -> tuple[int, ...]:
        """Return the tokens that stand for features of a bank."""
        return tuple(self._id_of[token] for token in PLACEHOLDERS[kind] if token in self._id_of)

    def refuse_lost(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Refuse a document whose tokens of media are not all there: a template may leave calls out, or spell
        them otherwise.

        Raises:
            BadRecord: some are not.
        """
        wanted = sum(1 for text in texts for _ in SPELLED.finditer(text))
        if (found := sum(1 for id_ in ids if id_ in self.ids)) != wanted:
            raise BadRecord("media_lost", f"has {wanted} tokens of media, and {found} behind the chat "
                                          "template, which leaves out or respells calls; encode media with "
                                          "--drawn content")

    def numbers(self, ids: Sequence[int], rows: Rows) -> NDArray[np.int64]:
        """Return what the sidecar says of each token: ``row * slots + slot`` of a placeholder, else -1.

        Raises:
            BadRecord: placeholders and features are not as many.
        """
        tokens = np.asarray(ids, np.int64)
        found = np.full(len(tokens), NO_FEATURE, np.int64)
        for kind in KINDS:
            places = np.flatnonzero(np.isin(tokens, self.placeholder_ids(kind)))
            held, slots = rows.get(kind, ()), self._slots.get(kind, 0)
            # rows come from a stranger's record: a wrong one would point into another one's features
            if any(row < 0 or not 0 < used <= slots for row, used in held):
                raise BadRecord("media_rows", f"names rows of {kind} that cannot be; encode the media again")
            features = [row * slots + slot for row, used in held for slot in range(used)]
            if len(features) != len(places):
                raise BadRecord("placeholders", f"has {len(places)} placeholders of {kind} and "
                                                f"{len(features)} features for them; encode the media again")
            found[places] = features
        return found
