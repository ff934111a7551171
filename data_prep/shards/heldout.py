"""Choose held-out documents by a hash of their text: duplicates and answers to a prompt share a split."""

import hashlib
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents import Document

_HASH_RANGE = 1 << 64


class HeldoutRule:
    """Holds out documents whose hash is below `threshold`.

    A source of several documents holds out at least its smallest hash, and trains on at least its largest.
    """

    def __init__(self, share: float) -> None:
        """`share`: expected share of held-out documents, in [0, 1)."""
        self.share, self.threshold = share, int(share * _HASH_RANGE)
        self.extra: set[int] = set()
        """Hashes held out although at or above `threshold`."""
        self.exempt: set[int] = set()
        """Hashes trained on although below `threshold` or in `extra`."""

    def add_source(self, smallest: int, largest: int) -> None:
        """Hold out a source's smallest hash if no hash is below `threshold`; a single document is exempt."""
        if self.threshold and smallest >= self.threshold and smallest != largest:
            self.extra.add(smallest)

    def keep_for_training(self, largest: int) -> bool:
        """Exempt a source's largest hash if the whole source would be held out; return whether it was.

        Call after `add_source` for all sources.
        """
        is_heldout = largest < self.threshold or largest in self.extra
        if is_heldout:
            self.exempt.add(largest)
        return is_heldout

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest record; equal records hold out equal documents."""
        record: dict[str, Any] = {"share": self.share, "chosen": sorted(self.extra)}
        if self.exempt:
            record["kept"] = sorted(self.exempt)
        return record

    def is_heldout(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        extra, exempt = (np.array(sorted(hashes_), np.uint64) for hashes_ in (self.extra, self.exempt))
        heldout: NDArray[np.bool_] = (hashes < self.threshold) | np.isin(hashes, extra)
        # `exempt` takes precedence: a source needs a document to train on
        return heldout & ~np.isin(hashes, exempt)


def hash_document(document: Document) -> int:
    """Return a 64-bit hash of a document's text, or of the prompt in preferences, prompts and chats with
    `num_prompt`.

    Text is hashed in Unicode form NFC, because some tokenizers compose text and would make twins equal.
    """
    digest = hashlib.blake2b(digest_size=8)
    # responses share the prompt's hash, because a split must not separate responses to a prompt
    messages = document.messages[:document.num_prompt or None]
    contents = [text for m in messages for text in m.texts()] or [document.text]
    for part in (*(m.role for m in messages), *contents):
        raw = unicodedata.normalize("NFC", part).encode()
        # the length separates parts: "ab", "c" differs from "a", "bc"
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return int.from_bytes(digest.digest(), "little")
